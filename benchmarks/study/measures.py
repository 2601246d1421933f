# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The measurements of the study, all on images that were not used for training."""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.study.drawings import Drawings
from benchmarks.study.scratch_tasks import Task
from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.messages_visualchat import fill_images
from visualchat.evaluation.answers import generate_answers, is_exact, text_of


GENERATION = {"do_sample": False, "max_new_tokens": 8}
BATCH_SIZE = 64


@dataclass
class HeldOut:
    """
    Args:
        examples (`list[dict]`): The conversations.
        batches (`list[dict]`): The same conversations, collated.
        questions (`list[dict]`): For each question its `kind`, the number of `images` so far, and its `round`, counted from
        1.
    """

    examples: list[dict]
    batches: list[dict[str, torch.Tensor]]
    questions: list[dict]


def collate(processor: VisualChatProcessor, examples: list[dict]) -> HeldOut:
    """Collates conversations for [`score`]."""
    collator = VisualChatDataCollator(processor, supervised_logits_only=True)
    batches = [collator(examples[start : start + BATCH_SIZE]) for start in range(0, len(examples), BATCH_SIZE)]
    questions = []
    for example in examples:
        images = 0
        for number, (kind, message) in enumerate(zip(example["kinds"], example["messages"][::2]), 1):
            images += sum(part["type"] == "image" for part in message["content"])
            questions.append({"kind": kind, "images": images, "round": number})
    return HeldOut(examples, batches, questions)


@torch.no_grad()
def score(model: torch.nn.Module, held_out: HeldOut) -> tuple[np.ndarray, float]:
    """
    Returns:
        For each question whether it is answered exactly (`bool`), and the mean loss of the answers' tokens, in nats. One
        forward pass scores all answers of a conversation: after the true answers before it, greedy decoding generates the
        true answer if and only if each of its tokens, including the end token, is the most likely one.
    """
    model.eval()
    right, loss, tokens = [], 0.0, 0
    for batch in held_out.batches:
        batch = {name: one.to(model.device) for name, one in batch.items()}
        kept = batch["logits_to_keep"]
        outputs = model(**batch)
        labels = batch["labels"].roll(-1, 1)
        is_likeliest = outputs.logits.argmax(-1) == labels[kept]
        begins = kept & ~torch.nn.functional.pad(kept[:, :-1], (1, 0))
        answer = begins.flatten().cumsum(0)[kept.flatten()] - 1
        is_right = torch.ones(int(begins.sum()), device=model.device)
        right.append(is_right.scatter_reduce(0, answer, is_likeliest.float(), "amin").bool().cpu().numpy())
        loss += float(outputs.loss) * len(is_likeliest)
        tokens += len(is_likeliest)
    return np.concatenate(right), loss / tokens


def share_by(questions: list[dict], right: np.ndarray, name: str) -> dict[str, dict]:
    """The numbers of correct answers and of questions for each value of `kind`, `images` or `round`."""
    shares = {}
    for question, is_right in zip(questions, right.tolist()):
        entry = shares.setdefault(str(question[name]), {"right": 0, "count": 0})
        entry["right"] += is_right
        entry["count"] += 1
    return dict(sorted(shares.items()))


@torch.no_grad()
def image_attention(
    model: torch.nn.Module, processor: VisualChatProcessor, task: Task | Drawings, split: str, count: int, seed: int
) -> dict[str, list[float]]:
    """
    The attention of the tokens that predict the answer to a question about one of three images.

    Returns:
        For each layer the share of the attention on `images`, and of that the share on the image that is `asked` about.
    """
    examples = task.probes(split, 3, count, seed)
    batch = VisualChatDataCollator(processor)(examples)
    predicts = batch.pop("labels").roll(-1, 1) >= 0
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model.eval()(**batch, output_attentions=True).attentions
    model.set_attn_implementation(before)
    is_image = batch["input_ids"] == model.config.image_token_id
    number = (is_image.cumsum(1) - 1) // model.config.image_seq_length + 1  # the number of the image, for image tokens
    is_asked = is_image & (number == torch.tensor([example["asked"] for example in examples])[:, None])
    shares = {"images": [], "asked": []}
    for weights in attentions:  # of shape (batch_size, heads, queries, keys)
        paid = weights.mean(1)[predicts]
        to_images, to_asked = (
            (paid * keys[:, None].expand_as(weights[:, 0])[predicts]).sum(-1) for keys in (is_image, is_asked)
        )
        shares["images"].append(float((to_images / paid.sum(-1)).mean()))
        shares["asked"].append(float((to_asked / to_images).mean()))
    return shares


def answer_probes(model: torch.nn.Module, processor: VisualChatProcessor, examples: list[dict]) -> list[str]:
    """The greedy answer to the only question of each example."""
    prompts = [fill_images(example, "probe")[:1] for example in examples]
    answers = []
    for start in range(0, len(prompts), BATCH_SIZE):
        answers += generate_answers(model, processor, prompts[start : start + BATCH_SIZE], **GENERATION)
    return answers


def robustness(
    model: torch.nn.Module, processor: VisualChatProcessor, task: Task | Drawings, split: str, count: int, seed: int
) -> dict[str, float]:
    """
    The accuracy on questions about one of three images; when a fourth image is added (`distracted`), and when the images are
    in another order and the question has the new number (`reordered`), each also with the share of answers that change; and
    the accuracy with more images than any training conversation has.
    """
    rng = np.random.default_rng(seed)
    examples = task.probes(split, 3, count, seed)
    images = task.splits[split].images
    distracted, reordered = [], []
    for example in examples:
        other = images[rng.integers(len(images))]
        distracted.append({**_ask(task, example, 4, example["asked"]), "images": [*example["images"], other]})
        order = rng.permutation(3)
        while order[example["asked"] - 1] == example["asked"] - 1:  # the image that is asked about must move
            order = rng.permutation(3)
        asked = int(np.flatnonzero(order == example["asked"] - 1)[0]) + 1
        reordered.append({**_ask(task, example, 3, asked), "images": [example["images"][k] for k in order]})
    before = answer_probes(model, processor, examples)
    measures = {"three images": _accuracy(before, examples)}
    for name, changed in (("distracted", distracted), ("reordered", reordered)):
        answers = answer_probes(model, processor, changed)
        measures[name] = _accuracy(answers, changed)
        measures[f"{name}: answers that differ"] = float(np.mean([a != b for a, b in zip(answers, before)]))
    for num_images in (5, 6, 8):
        more = task.probes(split, num_images, count, seed)
        measures[f"{num_images} images"] = _accuracy(answer_probes(model, processor, more), more)
    return measures


def _ask(task: Task | Drawings, example: dict, num_images: int, asked: int) -> dict:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": task.identify.format(asked)}]
    return {**example, "messages": [{"role": "user", "content": content}, example["messages"][1]], "asked": asked}


def _accuracy(answers: list[str], examples: list[dict]) -> float:
    return float(
        np.mean([is_exact(answer, text_of(example["messages"][1]["content"])) for answer, example in zip(answers, examples)])
    )


@torch.no_grad()
def compare_memory(model: torch.nn.Module, processor: VisualChatProcessor, examples: list[dict]) -> dict[str, int]:
    """
    Answers each question twice, from `pixel_values` and from their `ImageMemory`.

    Returns:
        The number of `questions`, of generated `tokens`, and of tokens that are `different`.
    """
    prompts = [
        fill_images(example, "example")[:index] for example in examples for index in range(1, len(example["messages"]), 2)
    ]
    counts = {"questions": len(prompts), "tokens": 0, "different": 0}
    model.eval()
    for start in range(0, len(prompts), BATCH_SIZE):
        inputs = processor.apply_chat_template(
            prompts[start : start + BATCH_SIZE],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        computed = model.generate(**inputs, **GENERATION)
        memory = model.encode_images(inputs.pop("pixel_values"))
        remembered = model.generate(**inputs, image_memory=memory, **GENERATION)
        length = inputs["input_ids"].shape[1]
        width = max(computed.shape[1], remembered.shape[1])
        computed, remembered = (
            torch.nn.functional.pad(tokens[:, length:], (0, width - tokens.shape[1]), value=-1)
            for tokens in (computed, remembered)
        )
        counts["tokens"] += computed.numel()
        counts["different"] += int((computed != remembered).sum())
    return counts
