# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Builds, trains, saves and talks to a small VisualChat, on two CPU cores in a few minutes:

    python -m examples.digits_demo.demo --output_dir outputs/demo

The paper's recipe (DeepSpeed-VisualChat, arXiv 2309.14327) in small. A CLIP tower learns to tell scikit-learn's scanned
digits apart, and a LLaMA learns to converse about digits that are described to it in words. Both are frozen. Then the
projector and the token embedding, and nothing else, learn to put pictures in the place of the words.

Writes to `output_dir`: `metrics.json`, `model/` (all that a Hub repository needs, with a model card), `conversation/` (the
pictures and messages of one test conversation), `conversation.png`, `loss.png`. The saved folder is then loaded in a fresh
process that cannot import this package, and must give the same answers.

What is measured, on conversations over digits that no stage has seen: every question is asked with the true answers of the
earlier rounds before it, answered greedily, and counted if the whole answer is right. `accuracy_without_images` is the
same model and the same questions over blank pictures; `accuracy_most_common_answer` is what one gets by giving, to each
kind of question, the answer that is most common in training.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from examples.digits_demo.report import draw_conversation, draw_losses, write_model_card
from examples.digits_demo.stages import align, describe_in_words, make_processor, train_decoder, train_tower
from examples.digits_demo.talk import hold_conversation
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.data_collator_visualchat import fill_images
from visualchat.data.digits import KINDS, jitter, make_conversations, split_digits
from visualchat.evaluation.answers import generate_answers, is_exact


@dataclass
class DemoArguments:
    output_dir: str = field(default="outputs/demo", metadata={"help": "Where everything is written."})
    seed: int = field(default=0, metadata={"help": "Of the split, the conversations and all weights."})
    train_conversations: int = field(default=24000, metadata={"help": "Conversations to train on."})
    test_conversations: int = field(default=800, metadata={"help": "Held-out conversations, about 2.3 questions each."})
    split: str = field(default="test", metadata={"help": "Digits to measure on. 'validation' to choose hyperparameters."})
    jitter_copies: int = field(default=15, metadata={"help": "Turned and shifted pictures of each training digit."})
    tower_steps: int = field(default=1500, metadata={"help": "Training steps of the vision tower, of 128 pictures."})
    decoder_steps: int = field(default=2000, metadata={"help": "Training steps of the decoder, of 32 conversations."})
    alignment_steps: int = field(default=1000, metadata={"help": "Training steps of the alignment, of 32 conversations."})


def main(args: DemoArguments) -> dict:
    """Runs the demo and returns the metrics."""
    started = time.perf_counter()
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    splits = split_digits(args.seed)
    train_digits = jitter(splits["train"], args.jitter_copies, args.seed)
    train_rows = make_conversations(train_digits, args.train_conversations, args.seed)
    test_rows = make_conversations(splits[args.split], args.test_conversations, args.seed)
    processor = make_processor(train_rows)
    losses = {}

    print(f"\n1. A CLIP tower learns the labels of {len(splits['train'].labels)} digits", flush=True)
    tower, losses["vision tower"] = train_tower(processor, train_digits, args.tower_steps, args.seed)

    print("\n2. A LLaMA learns to converse about digits that are described in words", flush=True)
    described = describe_in_words(processor, train_rows)
    decoder, losses["decoder"] = train_decoder(processor, described, args.decoder_steps, args.seed)

    print("\n3. Both are frozen; projector and token embedding learn to read the pictures", flush=True)
    model = VisualChatForCausalLM.from_vision_text_pretrained(
        tower,
        decoder,
        multimodal_attention="mmca",
        image_number_keys=True,
        image_number_token_ids=processor.image_number_token_ids(9),
        image_token_id=processor.image_token_id,
    )
    losses["alignment"] = align(model, processor, train_rows, args.alignment_steps, args.seed)

    print(
        f"\n4. {len(test_rows)} conversations about {len(splits[args.split].labels)} digits that were never seen", flush=True
    )
    metrics = measure(model, processor, train_rows, test_rows)
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))

    conversation = save_conversation(test_rows, output_dir / "conversation")
    answers = hold_conversation(model, processor, conversation)
    draw_conversation(conversation, answers, output_dir / "conversation.png")
    draw_losses(losses, output_dir / "loss.png")
    model.save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")
    write_model_card(output_dir, metrics, {name: len(split.labels) for name, split in splits.items()})

    print("\n5. The saved folder, in a fresh process without this package", flush=True)
    check_saved_folder(output_dir, answers)
    print(f"\nThe same answers. Everything is in {output_dir}. {time.perf_counter() - started:.0f} seconds in all.")
    return metrics


def measure(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, train_rows: list[dict], test_rows: list[dict]
) -> dict:
    """Exact answers on `test_rows`, as the head of this file says."""
    right = answer_questions(model, processor, test_rows, "with images")
    blank = Image.new("L", test_rows[0]["images"][0].size)
    blank_rows = [{**row, "images": [blank] * len(row["images"])} for row in test_rows]
    right_without = answer_questions(model, processor, blank_rows, "without images")
    kinds = [kind for row in test_rows for kind in row["kinds"]]

    common = {kind: Counter() for kind in KINDS}
    for kind, answer in list_answers(train_rows):
        common[kind][answer] += 1
    guesses = {kind: answers.most_common(1)[0][0] for kind, answers in common.items()}
    guessed = [guesses[kind] == answer for kind, answer in list_answers(test_rows)]
    return {
        "accuracy": share(right),
        "accuracy_without_images": share(right_without),
        "accuracy_most_common_answer": share(guessed),
        "accuracy_by_kind": {
            kind: share([one for one, its_kind in zip(right, kinds) if its_kind == kind]) for kind in KINDS
        },
        "questions": len(kinds),
        "conversations": len(test_rows),
    }


def share(right: list[bool]) -> float:
    return round(sum(right) / len(right), 4)


def list_answers(rows: list[dict]) -> list[tuple[str, str]]:
    """The kind and the true answer of every question."""
    answers = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    return list(zip([kind for row in rows for kind in row["kinds"]], answers))


@torch.no_grad()
def answer_questions(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, rows: list[dict], name: str, batch_size: int = 64
) -> list[bool]:
    """Asks every question of every row, with the true answers of the earlier rounds before it: which are right?"""
    prompts, true_answers = [], []
    for row in rows:
        messages = fill_images(row, "row")
        for index in range(1, len(messages), 2):
            prompts.append(messages[:index])
            true_answers.append(messages[index]["content"])
    answers = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=name):
        batch = prompts[start : start + batch_size]
        answers += generate_answers(model, processor, batch, do_sample=False, max_new_tokens=8)
    return [is_exact(answer, true) for answer, true in zip(answers, true_answers)]


def save_conversation(rows: list[dict], folder: Path) -> list[dict]:
    """
    Writes the pictures and the messages of one row: that with the most kinds of questions, and of these with the most rounds
    that bring images.

    Returns:
        `list[dict]`: Its messages, with the pictures' paths.
    """

    def variety(row):
        arrivals = sum(any(part["type"] == "image" for part in message["content"]) for message in row["messages"][::2])
        return len(set(row["kinds"])), arrivals, len(row["images"])

    row = max(rows, key=variety)
    folder.mkdir(exist_ok=True)
    paths = []
    for number, picture in enumerate(row["images"], 1):
        paths.append(str((folder / f"image-{number}.png").resolve()))
        picture.save(paths[-1])
    waiting = iter(paths)
    messages = [
        {
            "role": message["role"],
            "content": message["content"]
            if message["role"] == "assistant"
            else [{**part, "path": next(waiting)} if part["type"] == "image" else part for part in message["content"]],
        }
        for message in row["messages"]
    ]
    (folder / "messages.json").write_text(json.dumps(messages, indent=2) + "\n")
    return messages


def check_saved_folder(output_dir: Path, answers: list[str]) -> None:
    """
    Holds the conversation again in a process that has the saved folder and not this package.

    Raises:
        RuntimeError: If the answers differ from `answers`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(__file__).with_name("talk.py").resolve()
        model_dir, messages = (output_dir / name for name in ("model", "conversation/messages.json"))
        replies = Path(scratch) / "answers.json"
        command = [sys.executable, script, model_dir.resolve(), messages.resolve(), replies]
        # Code of an earlier run may lie in the usual cache
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=scratch, env=environment, check=True)
        reloaded = json.loads(replies.read_text())
    if reloaded != answers:
        raise RuntimeError(f"The saved folder answers {reloaded}, but the model that was saved answered {answers}")


if __name__ == "__main__":
    main(*HfArgumentParser(DemoArguments, description=__doc__).parse_args_into_dataclasses())
