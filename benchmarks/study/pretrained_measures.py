# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What only the study with pretrained parts measures: what the decoder still knows of text, and what each variant costs."""

import time
from collections.abc import Callable
from importlib.resources import files
from statistics import median

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.pictures.measure import TEXT_QUESTIONS, TEXT_TOKENS
from modeling_visualchat import VisualChatForCausalLM


# Of scikit-learn's descriptions of its data sets
DESCRIPTIONS = ("lfw.rst", "twenty_newsgroups.rst", "kddcup99.rst", "olivetti_faces.rst")
CHUNK_LENGTH, CHUNKS = 128, 12


@torch.no_grad()
def text_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> float:
    """
    The mean loss of a token of English text, in nats, without images: the logarithm of the perplexity.

    Args:
        model (`PreTrainedModel`): VisualChat, or the decoder itself.
        tokenizer (`PreTrainedTokenizerBase`): The decoder's.
        vocab_size (`int`): How many tokens may follow: those of the decoder, and not the image placeholder.
    """
    folder = files("sklearn.datasets.descr")
    text = "\n".join((folder / name).read_text() for name in DESCRIPTIONS)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    chunks = ids[: len(ids) // CHUNK_LENGTH * CHUNK_LENGTH].view(-1, CHUNK_LENGTH)[:CHUNKS].to(model.device)
    logits = model(input_ids=chunks).logits[:, :-1, :vocab_size]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), chunks[:, 1:].flatten()))


@torch.no_grad()
def text_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The greedy answers to questions without an image, up to `TEXT_TOKENS` tokens each."""
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in TEXT_QUESTIONS], add_generation_prompt=True, tokenize=False
    )
    settings = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    inputs = tokenizer(prompts, return_tensors="pt", **settings).to(model.device)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TEXT_TOKENS)
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def saved_bytes(model: torch.nn.Module, batch: dict) -> int:
    """The bytes of the tensors that a training step keeps from its forward pass for its backward pass, less the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(sizes.values())


def take_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each side. They take turns, so that all meet the same noise; the first turn does not count."""
    seconds = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times[1:]) for name, times in seconds.items()}


@torch.no_grad()
def cost_of_known_images(
    models: dict[str, VisualChatForCausalLM], inputs: dict[str, torch.Tensor], repeats: int
) -> dict[str, dict]:
    """
    The cost of a question about images that another conversation has shown.

    Args:
        models (`dict[str, VisualChatForCausalLM]`): By variant.
        inputs (`dict[str, torch.Tensor]`): Of one prompt with images.
        repeats (`int`): Times that each variant answers.

    Returns:
        For each variant: the `new_seconds` to the first token with new images; the `known_seconds` with what can be kept of
        them, which is the image memory, or where there is none the projected features; and the `kept_bytes` of that.
    """
    known, kept_bytes = {}, {}
    text = {name: one for name, one in inputs.items() if name != "pixel_values"}
    for variant, model in models.items():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True)
        if model.config.multimodal_attention in ("mmca", "mmca_merged"):
            memory = model.encode_images(inputs["pixel_values"])
            known[variant] = {"image_memory": memory}
            kept_bytes[variant] = memory.nbytes
        else:
            known[variant] = {"mm_encoder_outputs": {"image": features}}
            kept_bytes[variant] = sum(one.nbytes for one in features.pooler_output)

    def first_token(variant: str, images: dict) -> Callable[[], object]:
        return lambda: models[variant](**text, **images, logits_to_keep=1)

    new = take_turns({name: first_token(name, {"pixel_values": inputs["pixel_values"]}) for name in models}, repeats)
    again = take_turns({name: first_token(name, known[name]) for name in models}, repeats)
    return {
        name: {"new_seconds": new[name], "known_seconds": again[name], "kept_bytes": kept_bytes[name]} for name in models
    }
