# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What the study measures of a model, all of it on pictures that no stage of the training has seen."""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.study.tasks import IDENTIFY, Task
from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.data_collator_visualchat import fill_images
from visualchat.evaluation.answers import generate_answers, is_exact


GENERATION = {"do_sample": False, "max_new_tokens": 8}
BATCH_SIZE = 64


@dataclass
class HeldOut:
    """
    Args:
        rows (`list[dict]`): Conversations.
        batches (`list[dict]`): The same, collated.
        questions (`list[dict]`): Of each question its `kind`, `images` seen so far, and `round`, from 1.
    """

    rows: list[dict]
    batches: list[dict[str, torch.Tensor]]
    questions: list[dict]


def collate(processor: VisualChatProcessor, rows: list[dict]) -> HeldOut:
    """Prepares conversations for [`score`]."""
    collator = VisualChatDataCollator(processor, supervised_logits_only=True)
    batches = [collator(rows[start : start + BATCH_SIZE]) for start in range(0, len(rows), BATCH_SIZE)]
    questions = []
    for row in rows:
        images = 0
        for number, (kind, message) in enumerate(zip(row["kinds"], row["messages"][::2]), 1):
            images += sum(part["type"] == "image" for part in message["content"])
            questions.append({"kind": kind, "images": images, "round": number})
    return HeldOut(rows, batches, questions)


@torch.no_grad()
def score(model: torch.nn.Module, held_out: HeldOut) -> tuple[np.ndarray, float]:
    """
    Returns:
        Which questions are answered exactly (`bool`, of each), and the mean loss of an answer's token, in nats. All answers
        of a conversation are judged in one pass: greedy decoding writes the true answer, after the true answers before it,
        just where every token of it, the end token too, is the likeliest one.
    """
    model.eval()
    right, loss, tokens = [], 0.0, 0
    for batch in held_out.batches:
        kept = batch["logits_to_keep"]
        outputs = model(**batch)
        labels = batch["labels"].roll(-1, 1)
        is_likeliest = outputs.logits.argmax(-1) == labels[kept]
        begins = kept & ~torch.nn.functional.pad(kept[:, :-1], (1, 0))
        answer = begins.flatten().cumsum(0)[kept.flatten()] - 1
        right.append(torch.ones(int(begins.sum())).scatter_reduce(0, answer, is_likeliest.float(), "amin").bool().numpy())
        loss += float(outputs.loss) * len(is_likeliest)
        tokens += len(is_likeliest)
    return np.concatenate(right), loss / tokens


def share_by(questions: list[dict], right: np.ndarray, name: str) -> dict[str, dict]:
    """Right answers and questions for each value of `kind`, `images` or `round`."""
    shares = {}
    for question, is_right in zip(questions, right.tolist()):
        entry = shares.setdefault(str(question[name]), {"right": 0, "count": 0})
        entry["right"] += is_right
        entry["count"] += 1
    return dict(sorted(shares.items()))


@torch.no_grad()
def image_attention(
    model: torch.nn.Module, processor: VisualChatProcessor, task: Task, split: str, count: int, seed: int
) -> dict[str, list[float]]:
    """
    Where rows look that predict the answer to a question about one of three images.

    Returns:
        Of each layer the share of all attention that is paid to `images`, and of that the share paid to the image that is
        `asked` for.
    """
    rows = task.probes(split, 3, count, seed)
    batch = VisualChatDataCollator(processor)(rows)
    predicts = batch.pop("labels").roll(-1, 1) >= 0
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model.eval()(**batch, output_attentions=True).attentions
    model.set_attn_implementation(before)
    is_image = batch["input_ids"] == model.config.image_token_id
    number = (is_image.cumsum(1) - 1) // model.config.image_seq_length + 1  # of the image, where there is one
    is_asked = is_image & (number == torch.tensor([row["asked"] for row in rows])[:, None])
    shares = {"images": [], "asked": []}
    for weights in attentions:  # of shape (batch_size, heads, queries, keys)
        paid = weights.mean(1)[predicts]
        to_images, to_asked = (
            (paid * keys[:, None].expand_as(weights[:, 0])[predicts]).sum(-1) for keys in (is_image, is_asked)
        )
        shares["images"].append(float((to_images / paid.sum(-1)).mean()))
        shares["asked"].append(float((to_asked / to_images).mean()))
    return shares


def answer_probes(model: torch.nn.Module, processor: VisualChatProcessor, rows: list[dict]) -> list[str]:
    """The greedy answer to the one question of each row."""
    prompts = [fill_images(row, "probe")[:1] for row in rows]
    answers = []
    for start in range(0, len(prompts), BATCH_SIZE):
        answers += generate_answers(model, processor, prompts[start : start + BATCH_SIZE], **GENERATION)
    return answers


def robustness(
    model: torch.nn.Module, processor: VisualChatProcessor, task: Task, split: str, count: int, seed: int
) -> dict[str, float]:
    """
    What a question about one of three pictures is answered with when a fourth joins them (`distracted`), when they stand in
    another order and the question names the new number (`reordered`): shares of right answers, and of answers that differ
    from those before; and shares of right answers with more images than any training conversation has.
    """
    rng = np.random.default_rng(seed)
    rows = task.probes(split, 3, count, seed)
    pictures = task.splits[split].images
    distracted, reordered = [], []
    for row in rows:
        other = pictures[rng.integers(len(pictures))]
        distracted.append({**_ask(task, row, 4, row["asked"]), "images": [*row["images"], other]})
        order = rng.permutation(3)
        while order[row["asked"] - 1] == row["asked"] - 1:  # the picture that is asked for moves
            order = rng.permutation(3)
        asked = int(np.flatnonzero(order == row["asked"] - 1)[0]) + 1
        reordered.append({**_ask(task, row, 3, asked), "images": [row["images"][k] for k in order]})
    before = answer_probes(model, processor, rows)
    measures = {"three images": _accuracy(before, rows)}
    for name, changed in (("distracted", distracted), ("reordered", reordered)):
        answers = answer_probes(model, processor, changed)
        measures[name] = _accuracy(answers, changed)
        measures[f"{name}: answers that differ"] = float(np.mean([a != b for a, b in zip(answers, before)]))
    for num_images in (5, 6, 8):
        more = task.probes(split, num_images, count, seed)
        measures[f"{num_images} images"] = _accuracy(answer_probes(model, processor, more), more)
    return measures


def _ask(task: Task, row: dict, num_images: int, asked: int) -> dict:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": IDENTIFY[task.name].format(asked)}]
    return {**row, "messages": [{"role": "user", "content": content}, row["messages"][1]], "asked": asked}


def _accuracy(answers: list[str], rows: list[dict]) -> float:
    return float(np.mean([is_exact(answer, row["messages"][1]["content"]) for answer, row in zip(answers, rows)]))


@torch.no_grad()
def compare_memory(model: torch.nn.Module, processor: VisualChatProcessor, rows: list[dict]) -> dict[str, int]:
    """
    Answers every question twice, from `pixel_values` and from their `ImageMemory`.

    Returns:
        `tokens` that were generated, and how many of them were `different`.
    """
    prompts = [fill_images(row, "row")[:index] for row in rows for index in range(1, len(row["messages"]), 2)]
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
        )
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
