# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Builds and trains a small VisualChat model, saves it and has a conversation with it, on two CPU cores in a few minutes:

    python -m examples.digits_demo.demo --output_dir outputs/demo

It follows the paper's recipe (DeepSpeed-VisualChat, arXiv 2309.14327) at a small scale. A CLIP vision tower is trained to
classify scikit-learn's scanned digits, and a LLaMA decoder is trained on conversations in which words stand for the images.
Both are then frozen, and only the projector and the token embedding are trained, on the same conversations with images.

The demo writes to `output_dir`: `metrics.json`, `model/` (all files of a Hub repository, with a model card),
`conversation/` (the images and messages of one test conversation), `conversation.png` and `loss.png`. Then it loads the
saved folder in a new process that cannot import this package, and checks that the answers are the same.

The accuracy is measured on conversations about digits that were not used for training. Each question comes after the true
answers of the earlier rounds. It is answered with greedy decoding, and counts as correct if the whole answer is.
`accuracy_without_images` is the accuracy of the same model on the same questions with blank images.
`accuracy_most_common_answer` is the accuracy of always giving the answer that is most common in the training data for this
kind of question.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from examples.digits_demo.report import draw_conversation, draw_losses, write_model_card
from examples.digits_demo.stages import align, describe_in_words, make_processor, train_decoder, train_tower
from examples.digits_demo.talk import run_conversation
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.messages_visualchat import fill_images
from visualchat.data.digits import KINDS, jitter, make_conversations, split_digits
from visualchat.evaluation.answers import generate_answers, is_exact, text_of


@dataclass
class DemoArguments:
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for all output."})
    seed: int = field(default=0, metadata={"help": "Random seed of the split, the conversations and all weights."})
    train_conversations: int = field(default=24000, metadata={"help": "Number of training conversations."})
    test_conversations: int = field(
        default=800, metadata={"help": "Number of test conversations, with about 2.3 questions each."}
    )
    split: str = field(
        default="test", metadata={"help": "Split for the evaluation. Use 'validation' to choose hyperparameters."}
    )
    jitter_copies: int = field(default=15, metadata={"help": "Augmented images of each training digit: rotated, shifted."})
    tower_steps: int = field(default=1500, metadata={"help": "Training steps of the vision tower, 128 images each."})
    decoder_steps: int = field(default=2000, metadata={"help": "Training steps of the decoder, 32 conversations each."})
    alignment_steps: int = field(default=1000, metadata={"help": "Training steps of the alignment, 32 conversations each."})


def main(args: DemoArguments) -> dict:
    """Runs the demo, and returns the metrics."""
    started = time.perf_counter()
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    splits = split_digits(args.seed)
    train_digits = jitter(splits["train"], args.jitter_copies, args.seed)
    train_examples = make_conversations(train_digits, args.train_conversations, args.seed)
    test_examples = make_conversations(splits[args.split], args.test_conversations, args.seed)
    processor = make_processor(train_examples)
    losses = {}

    print(f"\n1. Train a CLIP vision tower to classify {len(splits['train'].labels)} digits", flush=True)
    tower, losses["vision tower"] = train_tower(processor, train_digits, args.tower_steps, args.seed)

    print("\n2. Train a LLaMA decoder on conversations in which words stand for the images", flush=True)
    described = describe_in_words(processor, train_examples)
    decoder, losses["decoder"] = train_decoder(processor, described, args.decoder_steps, args.seed)

    print("\n3. Freeze both; train the projector and the token embedding on conversations with images", flush=True)
    model = VisualChatForCausalLM.from_vision_text_pretrained(
        tower,
        decoder,
        multimodal_attention="mmca",
        image_number_keys=True,
        image_number_token_ids=processor.image_number_token_ids(9),
        image_token_id=processor.image_token_id,
    )
    losses["alignment"] = align(model, processor, train_examples, args.alignment_steps, args.seed)

    print(
        f"\n4. Evaluate on {len(test_examples)} conversations about {len(splits[args.split].labels)} other digits",
        flush=True,
    )
    metrics = measure(model, processor, train_examples, test_examples)
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))

    conversation = save_conversation(test_examples, output_dir / "conversation")
    answers = run_conversation(model, processor, conversation)
    draw_conversation(conversation, answers, output_dir / "conversation.png")
    draw_losses(losses, output_dir / "loss.png")
    model.save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")
    write_model_card(output_dir, metrics, {name: len(split.labels) for name, split in splits.items()})

    print("\n5. Load the saved folder in a new process without this package", flush=True)
    check_saved_folder(output_dir, answers)
    print(
        f"\nThe answers are the same. All output is in {output_dir}. This took {time.perf_counter() - started:.0f} seconds."
    )
    return metrics


def measure(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, train_examples: list[dict], test_examples: list[dict]
) -> dict:
    """The metrics on `test_examples`, as described at the top of this file."""
    correct = answer_questions(model, processor, test_examples, "with images")
    blank = Image.new("L", test_examples[0]["images"][0].size)
    blank_examples = [{**example, "images": [blank] * len(example["images"])} for example in test_examples]
    correct_without = answer_questions(model, processor, blank_examples, "without images")
    kinds = [kind for example in test_examples for kind in example["kinds"]]

    guesses = most_common_answers(train_examples)
    guessed = [guesses[kind] == answer for kind, answer in list_answers(test_examples)]
    return {
        "accuracy": accuracy(correct),
        "accuracy_without_images": accuracy(correct_without),
        "accuracy_most_common_answer": accuracy(guessed),
        "accuracy_by_kind": {
            kind: accuracy([one for one, its_kind in zip(correct, kinds) if its_kind == kind]) for kind in KINDS
        },
        "questions": len(kinds),
        "conversations": len(test_examples),
    }


def accuracy(correct: list[bool]) -> float:
    return round(sum(correct) / len(correct), 4)


def list_answers(examples: list[dict]) -> list[tuple[str, str]]:
    """The kind and the true answer of each question."""
    messages = [message for example in examples for message in example["messages"]]
    answers = [text_of(message["content"]) for message in messages if message["role"] == "assistant"]
    return list(zip([kind for example in examples for kind in example["kinds"]], answers))


def most_common_answers(examples: list[dict]) -> dict[str, str]:
    """For each kind of question the most common answer."""
    counts = defaultdict(Counter)
    for kind, answer in list_answers(examples):
        counts[kind][answer] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}


def list_prompts(examples: list[dict]) -> list[list[dict]]:
    """For each question its conversation up to there, with the true answers of the earlier rounds."""
    conversations = [fill_images(example, "example") for example in examples]
    return [messages[:index] for messages in conversations for index in range(1, len(messages), 2)]


@torch.no_grad()
def answer_questions(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, examples: list[dict], name: str, batch_size: int = 64
) -> list[bool]:
    """Asks each question after the true answers of the earlier rounds. Returns whether each answer is correct."""
    prompts, answers = list_prompts(examples), []
    for start in tqdm(range(0, len(prompts), batch_size), desc=name):
        batch = prompts[start : start + batch_size]
        answers += generate_answers(model, processor, batch, do_sample=False, max_new_tokens=8)
    return [is_exact(answer, true) for answer, (_, true) in zip(answers, list_answers(examples))]


def save_conversation(examples: list[dict], folder: Path) -> list[dict]:
    """
    Saves the images and messages of one example: the one with the most kinds of questions, and among these the one with the
    most rounds that bring images.

    Returns:
        `list[dict]`: The messages of the example, with the paths of the images.
    """

    def variety(example):
        arrivals = sum(any(part["type"] == "image" for part in message["content"]) for message in example["messages"][::2])
        return len(set(example["kinds"])), arrivals, len(example["images"])

    example = max(examples, key=variety)
    folder.mkdir(exist_ok=True)
    paths = []
    for number, image in enumerate(example["images"], 1):
        paths.append(str((folder / f"image-{number}.png").resolve()))
        image.save(paths[-1])
    remaining_paths = iter(paths)
    messages = [
        {
            "role": message["role"],
            "content": text_of(message["content"])
            if message["role"] == "assistant"
            else [
                {**part, "path": next(remaining_paths)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in example["messages"]
    ]
    (folder / "messages.json").write_text(json.dumps(messages, indent=2) + "\n")
    return messages


def check_saved_folder(output_dir: Path, answers: list[str]) -> None:
    """
    Repeats the conversation in a process that has only the saved folder, and cannot import this package.

    Raises:
        RuntimeError: If the answers differ from `answers`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(__file__).with_name("talk.py").resolve()
        model_dir, messages = (output_dir / name for name in ("model", "conversation/messages.json"))
        replies = Path(scratch) / "answers.json"
        command = [sys.executable, script, model_dir.resolve(), messages.resolve(), replies]
        # The default cache may contain the code of an earlier run
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=scratch, env=environment, check=True)
        reloaded = json.loads(replies.read_text())
    if reloaded != answers:
        raise RuntimeError(f"The saved model answers {reloaded}, but before it was saved it answered {answers}")


if __name__ == "__main__":
    main(*HfArgumentParser(DemoArguments, description=__doc__).parse_args_into_dataclasses())
