# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Conversations over scikit-learn's 1,797 scanned digits: the data of the demo. As a labelled dataset for
`visualchat evaluate`:

    python -m visualchat.data.digits --output outputs/digits.parquet

Each digit belongs to one of three splits, so that no stage of the training sees the digits of the test conversations.
Each answer is a function of the digits' labels. Answers are balanced: among the questions of one kind about conversations
with the same number of images, each answer is given about as often as any other.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = ("none", *WORDS[1:])
# How often each kind of question is asked: a decoder learns last to tell whether two digits are the same
KIND_WEIGHTS = {"digit": 2, "same": 2, "larger": 1, "even": 1}
KINDS = tuple(KIND_WEIGHTS)
# Of the 1,797 digits. Validation is for choosing hyperparameters; the test split is only reported.
SPLIT_SIZES = {"validation": 150, "test": 300}
# Scans have 8 × 8 pixels. They are enlarged once, so that rotating and shifting them loses nothing.
IMAGE_SIZE = 32


@dataclass
class Digits:
    """
    Scanned digits of one split.

    Args:
        images (`list[PIL.Image.Image]`): 32 × 32 pixels, grayscale, white digits on black.
        labels (`np.ndarray` of shape `(images,)`): 0 to 9.
        scans (`np.ndarray` of shape `(images,)`): Which of the 1,797 scans an image shows. Several images show the same
            scan if [`jitter`] enlarged the split.
    """

    images: list[Image.Image]
    labels: np.ndarray
    scans: np.ndarray


def split_digits(seed: int = 0) -> dict[str, Digits]:
    """The splits `train`, `validation` and `test`. They share no scan, and all have the same proportions of the classes."""
    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = [Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC) for scan in pixels]

    rest = np.arange(len(images))
    scans = {}
    for name, count in SPLIT_SIZES.items():
        rest, scans[name] = train_test_split(rest, test_size=count, stratify=data.target[rest], random_state=seed)
    scans["train"] = rest
    return {
        name: Digits([images[scan] for scan in scans[name]], data.target[scans[name]], scans[name])
        for name in ("train", "validation", "test")
    }


def jitter(digits: Digits, copies: int, seed: int = 0) -> Digits:
    """
    Data augmentation: the digits and `copies` more images of each, rotated by up to 15°, shifted by up to an eighth of the
    image, scaled and sheared by up to 15 %. The 1,347 scans of the training split are few to learn ten classes from.
    """
    rng = np.random.default_rng(seed)
    images = list(digits.images)
    centre = (IMAGE_SIZE - 1) / 2
    for _ in range(copies):
        for image in digits.images:
            angle = np.deg2rad(rng.uniform(-15, 15))
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            stretch = np.diag(rng.uniform(0.85, 1.15, size=2)) + np.array([[0, rng.uniform(-0.15, 0.15)], [0, 0]])
            matrix = turn @ stretch
            shift = rng.uniform(-IMAGE_SIZE / 8, IMAGE_SIZE / 8, size=2)
            offset = centre + shift - matrix @ np.array([centre, centre])
            affine = (*matrix[0], offset[0], *matrix[1], offset[1])
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images.append(image.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))
    return Digits(images, np.tile(digits.labels, copies + 1), np.tile(digits.scans, copies + 1))


def make_conversations(
    digits: Digits,
    count: int,
    seed: int = 0,
    subject: "Subject | None" = None,
    image_chances: tuple[float, ...] = (0.1, 0.15, 0.25, 0.5),
) -> list[dict]:
    """
    Makes conversations of 1 to 4 images and 1 to 4 rounds. The first round has at least one image; later rounds may add
    more. A question is about images that were shown so far, and no question is asked twice.

    Args:
        digits (`Digits`): Images with labels.
        count (`int`): How many conversations are made.
        seed (`int`): The seed of all random choices.
        subject (`Subject`, *optional*): What can be asked. Defaults to `DIGITS`.
        image_chances (`tuple[float]`): The probabilities of 1, 2, 3, … images. By default more images are more likely: with
            one image there is nothing to tell apart.

    Returns:
        `list[dict]`: Examples with `messages` and `images`, as `VisualChatDataCollator` takes them, with the `labels`
        (`list[int]`) of the images and the `kinds` (`list[str]`) of the questions.
    """
    subject = subject or DIGITS
    rng = np.random.default_rng(seed)
    by_label = [np.flatnonzero(digits.labels == label) for label in range(len(subject.words))]
    given = Counter()
    examples = []
    for _ in range(count):
        num_images = int(rng.choice(np.arange(1, len(image_chances) + 1), p=image_chances))
        labels = _draw_labels(num_images, len(subject.words), rng)
        num_rounds = int(rng.choice([1, 2, 3, 4], p=[0.05, 0.15, 0.3, 0.5]))
        # The round of each image: half of the images come in the first, so that many questions are about all of them
        later = rng.integers(0, num_rounds, size=len(labels) - 1) * (rng.random(len(labels) - 1) < 0.5)
        arrivals = [0, *later.tolist()]
        rounds = _draw_rounds(labels, sorted(arrivals), num_rounds, subject, given, rng)
        labels = labels[: sum(new_images for new_images, _ in rounds)]

        messages = []
        for new_images, question in rounds:
            content = [{"type": "image"}] * new_images + [{"type": "text", "text": question.text}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
        images = [digits.images[rng.choice(by_label[label])] for label in labels]
        kinds = [question.kind for _, question in rounds]
        examples.append({"messages": messages, "images": images, "labels": labels, "kinds": kinds})
    return examples


class Question(NamedTuple):
    """
    Args:
        kind: A key of the subject's `kind_weights`.
        images: The numbers of the images that it is about. Two questions of one kind about the same images are the same.
        text: The question.
        answer: The true answer.
        outcome: The number of the answer among the `num_outcomes` possible ones. Balancing counts it.
        num_outcomes: How many answers are possible.
    """

    kind: str
    images: frozenset[int]
    text: str
    answer: str
    outcome: int
    num_outcomes: int


def list_questions(labels: list[int]) -> list[Question]:
    """All questions about images with these labels. The first image is image 1."""
    questions = []
    for k, label in enumerate(labels, 1):
        text = f"What digit is in image {k}?"
        questions.append(Question("digit", frozenset({k}), text, WORDS[label], label, 10))
    for (j, left), (k, right) in permutations(enumerate(labels, 1), 2):
        images = frozenset({j, k})
        if j < k:
            text = f"Do image {j} and image {k} show the same digit?"
            questions.append(Question("same", images, text, "yes" if left == right else "no", int(left == right), 2))
        if left != right:
            text = f"Which digit is larger, image {j} or image {k}?"
            larger = f"image {j if left > right else k}"
            questions.append(Question("larger", images, text, larger, int(left > right), 2))
    images = frozenset(range(1, len(labels) + 1))
    even = sum(label % 2 == 0 for label in labels)
    text = "How many images show an even digit?"
    questions.append(Question("even", images, text, COUNTS[even], even, len(labels) + 1))
    return questions


class Subject(NamedTuple):
    """
    What the conversations are about.

    Args:
        words: A word for each label, which replaces an image of that label where text alone is used. The number of labels
            is even.
        kind_weights: How often each kind of question is asked.
        list_questions: Returns all questions about images with given labels.
    """

    words: tuple[str, ...]
    kind_weights: dict[str, int]
    list_questions: Callable[[list[int]], list[Question]]


DIGITS = Subject(WORDS, KIND_WEIGHTS, list_questions)


def _draw_labels(count: int, num_labels: int, rng: np.random.Generator) -> list[int]:
    """Draws labels. Every number of even ones is equally likely, and equal labels are frequent."""
    parities = rng.permutation(np.arange(count) < rng.integers(0, count + 1))
    labels = []
    for is_even in parities:
        alike = [label for label in labels if (label % 2 == 0) == is_even]
        if alike and rng.random() < 0.35:
            labels.append(alike[rng.integers(len(alike))])
        else:
            labels.append(int(2 * rng.integers(num_labels // 2) + (not is_even)))
    return labels


def _draw_rounds(
    labels: list[int],
    arrivals: list[int],
    num_rounds: int,
    subject: Subject,
    given: Counter,
    rng: np.random.Generator,
) -> list[tuple[int, Question]]:
    """
    Draws the number of new images of each round, and its question: among the possible ones, one whose kind and answer were
    given least often so far. There are fewer rounds if no question is left: about a single image there are two.
    """
    rounds, asked = [], set()
    for turn in range(num_rounds):
        num_seen = sum(arrival <= turn for arrival in arrivals)
        questions = [one for one in subject.list_questions(labels[:num_seen]) if (one.kind, one.images) not in asked]
        if not questions:
            break
        rng.shuffle(questions)
        question = min(
            questions, key=lambda one: given[_balance_key(one, num_seen)] * one.num_outcomes / subject.kind_weights[one.kind]
        )
        given[_balance_key(question, num_seen)] += 1
        asked.add((question.kind, question.images))
        rounds.append((arrivals.count(turn), question))
    return rounds


def _balance_key(question: Question, num_seen: int) -> tuple[str, int, int]:
    # A model can tell the number of images from the text, so answers are balanced for each number
    return question.kind, num_seen, question.outcome


def main(argv: list[str] | None = None) -> None:
    """Writes the conversations of the demo's default measurement, with the kind of each question as its task."""
    import datasets  # of the extra `train`

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="parquet file to write")
    parser.add_argument("--conversations", type=int, default=800)
    parser.add_argument("--split", default="test", choices=[*SPLIT_SIZES, "train"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    examples = []
    for made in make_conversations(split_digits(args.seed)[args.split], args.conversations, args.seed):
        for message in made["messages"][1::2]:  # all contents of a column have one type
            message["content"] = [{"type": "text", "text": message["content"]}]
        examples.append({"messages": made["messages"], "images": made["images"], "task": made["kinds"]})
    datasets.Dataset.from_list(examples).cast_column("images", datasets.List(datasets.Image())).to_parquet(args.output)


if __name__ == "__main__":
    main()
