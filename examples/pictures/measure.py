# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Measures the model of `make pictures` on scenes that it was not trained on.

Each question comes after the true answers of the earlier rounds, and is answered with greedy decoding, in bfloat16 where the
device has it. An answer is right if it equals the true one after SQuAD's normalization, which drops articles: "A eagle." is
right. `exact` counts what is right word for word.
"""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.digits_demo.demo import accuracy, list_answers, list_prompts, most_common_answers
from examples.pictures.dataset import read_examples
from examples.pictures.precision import autocast
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.messages_visualchat import fill_images
from visualchat.evaluation.answers import generate_answers, is_exact, is_normalized_match


TEXT_QUESTIONS = (
    "What is the capital of Greece?",
    "What is the capital of China?",
    "What is the capital of Austria?",
    "What is the capital of Italy?",
    "What is the opposite of old?",
    "What is the opposite of day?",
    "What is 3 plus 4?",
    "Who was Isaac Newton?",
    "Who wrote Romeo and Juliet?",
    "What is a poem?",
    "What is oxygen?",
    "What is an island?",
    "What do bees make?",
    "What language is spoken in Germany?",
    "Where do penguins live?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Why is reading good?",
    "Name three planets.",
    "Write one sentence about the sea.",
)
"""None of them is among those of the training, `text_rounds.py`."""

TEXT_TOKENS = 32


def measure(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, data: Path, decoder: Path
) -> tuple[dict, list[list[bool]]]:
    """
    Answers the questions of all test files.

    Args:
        model ([`VisualChatForCausalLM`]), processor ([`VisualChatProcessor`]): What was trained.
        data (`Path`): What [`make_data`] wrote.
        decoder (`Path`): The decoder's folder, for the answers to text alone.

    Returns:
        The metrics, whose shares are between 0 and 1; and of each conversation of `test.jsonl`, which answers are right.
    """
    test = read_examples(data / "test.jsonl")
    kinds, true = zip(*list_answers(test))
    answers = answer_questions(model, processor, test, "test")
    right = list(map(is_normalized_match, answers, true))
    in_order = iter(right)
    by_conversation = [[next(in_order) for _ in example["kinds"]] for example in test]
    blank = Image.new("RGB", Image.open(test[0]["images"][0]).size, "white")
    blanks = [{**example, "images": [blank] * len(example["images"])} for example in test]
    without = list(map(is_normalized_match, answer_questions(model, processor, blanks, "blank images"), true))
    guesses = most_common_answers(read_examples(data / "train.jsonl"))
    guessed = [is_normalized_match(guesses.get(kind, ""), answer) for kind, answer in zip(kinds, true)]
    by_kind = defaultdict(list)
    for kind, *of_question in zip(kinds, right, without, guessed):
        by_kind[kind].append(of_question)
    metrics = {
        "accuracy": accuracy(right),
        "exact": accuracy(list(map(is_exact, answers, true))),
        "accuracy_blank_images": accuracy(without),
        "accuracy_most_common_answer": accuracy(guessed),
        "by_kind": {
            kind: {
                "questions": len(rows),
                "accuracy": accuracy([row[0] for row in rows]),
                "blank_images": accuracy([row[1] for row in rows]),
                "most_common_answer": accuracy([row[2] for row in rows]),
            }
            for kind, rows in sorted(by_kind.items())
        },
        "questions": len(true),
        "conversations": len(test),
    }
    for name in ("names-1", "names-3", "counts", "unseen"):
        examples = read_examples(data / f"{name}.jsonl")
        true = [answer for _, answer in list_answers(examples)]
        answers = answer_questions(model, processor, examples, name)
        right, exact = (list(map(matches, answers, true)) for matches in (is_normalized_match, is_exact))
        metrics[name] = {"questions": len(true), "accuracy": accuracy(right), "exact": accuracy(exact)}
    metrics["text_answers"] = compare_text_answers(model, processor, decoder, read_examples(data / "names-1.jsonl"))
    return metrics, by_conversation


def list_typical(examples: list[dict], right: list[list[bool]]) -> list[dict]:
    """
    The conversations that show no image twice, and of whose answers as many are right as in the whole test, or as near to it
    as there are.

    Args:
        examples (`list[dict]`): The conversations of the test.
        right (`list[list[bool]]`): What [`measure`] returned for them.
    """
    accuracy_of_all = np.mean([one for of_example in right for one in of_example])
    varied = [k for k, example in enumerate(examples) if len(set(example["images"])) == len(example["images"])]
    distances = {k: abs(np.mean(right[k]) - accuracy_of_all) for k in varied}
    return [examples[k] for k in varied if distances[k] == min(distances.values())]


@torch.no_grad()
def answer_questions(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, examples: list[dict], name: str, batch_size: int = 32
) -> list[str]:
    """Asks each question after the true answers of the earlier rounds."""
    prompts = list_prompts(examples)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    with autocast(model.device.type):
        for start in tqdm(range(0, len(prompts), batch_size), desc=name):
            batch = by_length[start : start + batch_size]
            given = generate_answers(
                model, processor, [prompts[index] for index in batch], do_sample=False, max_new_tokens=32
            )
            for index, answer in zip(batch, given):
                answers[index] = answer
    return answers


@torch.no_grad()
def compare_text_answers(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, folder: Path, examples: list[dict]
) -> dict[str, int]:
    """
    Asks questions without an image: of the decoder, of the model, and of the model after an image and a question about it.

    Args:
        model ([`VisualChatForCausalLM`]), processor ([`VisualChatProcessor`]): What was trained.
        folder (`Path`): The decoder's.
        examples (`list[dict]`): Conversations of one round about one image.

    Returns:
        `dict`: How many questions were `asked`, how many answers have `same_tokens` as the decoder's (in float32, up to
        `TEXT_TOKENS`), and how many after an image have the `same_first_sentence_after_image`.
    """
    decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    settings = {"do_sample": False, "max_new_tokens": TEXT_TOKENS}
    same_tokens, own, seen = 0, [], []
    for question, example in zip(TEXT_QUESTIONS, examples):
        turn = {"role": "user", "content": question}
        inputs = tokenizer.apply_chat_template([turn], **chat).to(model.device)
        expected = decoder.generate(**inputs, **settings)
        tokens = model.generate(**processor.apply_chat_template([turn], **chat).to(model.device), **settings)
        same_tokens += tokens.tolist() == expected.tolist()
        own.append(tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        seen.append([*fill_images(example, "example"), turn])
    after_image = generate_answers(model, processor, seen, **settings)
    same = [is_normalized_match(first_sentence(left), first_sentence(right)) for left, right in zip(after_image, own)]
    return {"asked": len(own), "same_tokens": same_tokens, "same_first_sentence_after_image": sum(same)}


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[^\d][.!?])\s", text.strip(), maxsplit=1)[0]
