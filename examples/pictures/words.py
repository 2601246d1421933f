# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Teaches the projector the decoder's words, in a minute, before the decoder itself takes part in the training: each token that
the projector makes of an image is drawn to the embedding of the word for what it stands for.
"""

import torch
from PIL import Image
from tqdm import tqdm

from examples.pictures.conversations import NUMBERS
from examples.pictures.precision import autocast
from examples.pictures.scenes import Scene
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor


STEPS, BATCH_SIZE, LEARNING_RATE = 800, 256, 2e-3

# Of the cosine between a token and a word, for a softmax over the words
COSINE_SCALE = 30.0
# Weight of the squared distance to the word's embedding: being nearest is not enough for the decoder
DISTANCE_WEIGHT = 5.0

CLASS_TOKEN_OUTPUTS = 3
"""The class token becomes the word of the thing, of the number of things, and of the ground's colour."""

MIXED = "different"
"""The word for different things, which have no name in common."""


def list_words(scene: Scene) -> list[str]:
    """
    The word of each token of an image, as the `pooled` projector makes them: three of the class token, then those of the
    upper left, upper right, lower left and lower right quarter, which show a thing or the ground. A thing alone, which is in
    all quarters, is the word of the first: so as many quarters have its word as there are things.
    """
    names = [thing.kind.name for thing in scene.things]
    quarters = [scene.ground] * 4
    for thing in scene.things:
        quarters[2 * (thing.y > 0.5) + (thing.x > 0.5) if len(names) > 1 else 0] = thing.kind.name
    return [names[0] if len(set(names)) == 1 else MIXED, NUMBERS[len(names)], scene.ground, *quarters]


@torch.no_grad()
def see(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, images: list[str | Image.Image], batch_size: int = 64
) -> torch.Tensor:
    """The vision tower's features of images or files, in bfloat16: `(images, tower tokens, vision_hidden_size)`."""
    features = []
    for start in tqdm(range(0, len(images), batch_size), desc="vision tower"):
        batch = processor.image_processor.fetch_images(images[start : start + batch_size])
        pixels = processor.image_processor(batch, return_tensors="pt")["pixel_values"].to(model.device)
        with autocast(model.device.type):
            features.append(model.model.vision_tower(pixels, return_dict=True).last_hidden_state.bfloat16())
    return torch.cat(features)


def teach_words(
    model: VisualChatForCausalLM,
    processor: VisualChatProcessor,
    scenes: list[Scene],
    features: torch.Tensor,
    seed: int = 0,
    steps: int | None = None,
) -> None:
    """
    Trains the projector in place. The loss is the cross-entropy of the nearest word, and the squared distance to its
    embedding.

    Args:
        model ([`VisualChatForCausalLM`]): With the projector `pooled`, `class_token_outputs` 3 and four squares.
        processor ([`VisualChatProcessor`]): Its processor.
        scenes (`list[Scene]`): What the images show.
        features (`torch.Tensor`): What [`see`] returned for the images.
        seed (`int`): Seed of the batches.
        steps (`int`, *optional*): Training steps, by default `STEPS`.
    """
    steps = STEPS if steps is None else steps
    labels = [list_words(scene) for scene in scenes]
    words = sorted({word for row in labels for word in row})
    index = {word: number for number, word in enumerate(words)}
    targets = torch.tensor([[index[word] for word in row] for row in labels], device=model.device)
    embeds_WC = embed_words(model, processor, words)
    mean = embeds_WC.mean(0)
    directions_WC = torch.nn.functional.normalize(embeds_WC - mean, dim=-1)
    variance = embeds_WC.var()

    projector = model.model.multi_modal_projector
    with torch.no_grad():  # the projector ends with a LayerNorm: tokens begin as large as words are
        projector.layer_norm.weight.fill_(embeds_WC.square().mean().sqrt())
    projector.train()
    optimizer = torch.optim.AdamW(projector.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 30) * (1 - step / steps))
    generator = torch.Generator().manual_seed(seed)
    progress = tqdm(range(steps), desc="words")
    for _ in progress:
        batch = torch.randint(len(scenes), (BATCH_SIZE,), generator=generator)
        with autocast(model.device.type):
            tokens_NKC = projector(features[batch].float()).float()
        tokens, target = tokens_NKC.flatten(0, 1), targets[batch].flatten()
        similarity = COSINE_SCALE * torch.nn.functional.normalize(tokens - mean, dim=-1) @ directions_WC.T
        distance = (tokens - embeds_WC[target]).square().mean() / variance
        loss = torch.nn.functional.cross_entropy(similarity, target) + DISTANCE_WEIGHT * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    projector.eval()


@torch.no_grad()
def embed_words(model: VisualChatForCausalLM, processor: VisualChatProcessor, words: list[str]) -> torch.Tensor:
    """The mean embedding of each word's tokens, as it stands behind a blank; of shape `(words, hidden_size)`."""
    ids = [processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    table = model.get_input_embeddings().weight
    return torch.stack([table[torch.tensor(spelled, device=table.device)].float().mean(0) for spelled in ids])
