# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Conversations over scikit-learn's 1,797 scanned digits: the data of the demo. As a labelled dataset for
`visualchat evaluate`:

    python -m visualchat.data.digits --output outputs/digits.parquet

A digit belongs to one of three splits, so that the digits of the test conversations are seen in no stage of the training.
Each answer is a function of the digits' labels, and answers are balanced: within a kind of question (and a number of
images, which the text gives away), each answer is given about as often as any other.
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
# How often each kind is asked: telling whether two digits are the same is what a decoder learns last
KIND_WEIGHTS = {"digit": 2, "same": 2, "larger": 1, "even": 1}
KINDS = tuple(KIND_WEIGHTS)
# Of the 1,797 digits. Validation is for choosing hyperparameters; the test split is only reported.
SPLIT_SIZES = {"validation": 150, "test": 300}
# Scans are 8 × 8 pixels. They are enlarged once, so that turning and shifting them loses nothing.
PICTURE_SIZE = 32


@dataclass
class Digits:
    """
    Scanned digits of one split.

    Args:
        pictures (`list[PIL.Image.Image]`): 32 × 32 pixels, grayscale, white ink on black.
        labels (`np.ndarray` of shape `(pictures,)`): 0 to 9.
        scans (`np.ndarray` of shape `(pictures,)`): Which of the 1,797 scans a picture shows. Several pictures show one
            scan where a split was enlarged by [`jitter`].
    """

    pictures: list[Image.Image]
    labels: np.ndarray
    scans: np.ndarray


def split_digits(seed: int = 0) -> dict[str, Digits]:
    """The splits `train`, `validation` and `test`: disjoint scans, each split with all classes in the same shares."""
    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    size = (PICTURE_SIZE, PICTURE_SIZE)
    pictures = [Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC) for scan in pixels]

    rest = np.arange(len(pictures))
    scans = {}
    for name, count in SPLIT_SIZES.items():
        rest, scans[name] = train_test_split(rest, test_size=count, stratify=data.target[rest], random_state=seed)
    scans["train"] = rest
    return {
        name: Digits([pictures[scan] for scan in scans[name]], data.target[scans[name]], scans[name])
        for name in ("train", "validation", "test")
    }


def jitter(digits: Digits, copies: int, seed: int = 0) -> Digits:
    """
    The digits and `copies` more pictures of each: turned by up to 15°, shifted by up to an eighth of the picture, scaled
    and slanted by up to 15 %. 1,347 scans are few to learn ten classes from.
    """
    rng = np.random.default_rng(seed)
    pictures = list(digits.pictures)
    centre = (PICTURE_SIZE - 1) / 2
    for _ in range(copies):
        for picture in digits.pictures:
            angle = np.deg2rad(rng.uniform(-15, 15))
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            stretch = np.diag(rng.uniform(0.85, 1.15, size=2)) + np.array([[0, rng.uniform(-0.15, 0.15)], [0, 0]])
            matrix = turn @ stretch
            shift = rng.uniform(-PICTURE_SIZE / 8, PICTURE_SIZE / 8, size=2)
            offset = centre + shift - matrix @ np.array([centre, centre])
            affine = (*matrix[0], offset[0], *matrix[1], offset[1])
            size = (PICTURE_SIZE, PICTURE_SIZE)
            pictures.append(picture.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))
    return Digits(pictures, np.tile(digits.labels, copies + 1), np.tile(digits.scans, copies + 1))


def make_conversations(
    digits: Digits,
    count: int,
    seed: int = 0,
    subject: "Subject | None" = None,
    image_chances: tuple[float, ...] = (0.1, 0.15, 0.25, 0.5),
) -> list[dict]:
    """
    Conversations of 1 to 4 images and 1 to 4 rounds. The first round brings at least one image, later rounds may bring
    more; a question is about images that are there by then, and nothing is asked twice.

    Args:
        digits (`Digits`): Pictures with labels.
        count, seed (`int`): How many conversations, and of which draw.
        subject (`Subject`, *optional*): What can be asked. Defaults to `DIGITS`.
        image_chances (`tuple[float]`): How often a conversation has 1, 2, 3, … images. By default longer ones are drawn more
            often: with one image there is nothing to tell apart.

    Returns:
        `list[dict]`: Rows with `messages` and `images`, as `VisualChatDataCollator` takes them, and `labels` (`list[int]`,
        of the images) and `kinds` (`list[str]`, of the rounds' questions).
    """
    subject = subject or DIGITS
    rng = np.random.default_rng(seed)
    by_label = [np.flatnonzero(digits.labels == label) for label in range(len(subject.words))]
    given = Counter()
    rows = []
    for _ in range(count):
        num_images = int(rng.choice(np.arange(1, len(image_chances) + 1), p=image_chances))
        labels = _draw_labels(num_images, len(subject.words), rng)
        num_rounds = int(rng.choice([1, 2, 3, 4], p=[0.05, 0.15, 0.3, 0.5]))
        # The round in which each image comes: half of them in the first, so that many questions are asked about all
        later = rng.integers(0, num_rounds, size=len(labels) - 1) * (rng.random(len(labels) - 1) < 0.5)
        arrivals = [0, *later.tolist()]
        rounds = _draw_rounds(labels, sorted(arrivals), num_rounds, subject, given, rng)
        labels = labels[: sum(new_images for new_images, _ in rounds)]

        messages = []
        for new_images, question in rounds:
            content = [{"type": "image"}] * new_images + [{"type": "text", "text": question.text}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
        images = [digits.pictures[rng.choice(by_label[label])] for label in labels]
        kinds = [question.kind for _, question in rounds]
        rows.append({"messages": messages, "images": images, "labels": labels, "kinds": kinds})
    return rows


class Question(NamedTuple):
    """
    Args:
        kind: A key of the subject's `kind_weights`.
        images: The numbers of the images that it is about. Two questions of a kind about the same images are the same.
        text, answer: What is asked and what is true.
        outcome, num_outcomes: Which of how many answers is true, as far as balance goes.
    """

    kind: str
    images: frozenset[int]
    text: str
    answer: str
    outcome: int
    num_outcomes: int


def list_questions(labels: list[int]) -> list[Question]:
    """All that can be asked about images with these labels, the first of which is image 1."""
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
    What conversations are about.

    Args:
        words: What stands for a picture of each label where there are no pictures. The number of labels is even.
        kind_weights: How often each kind of question is asked.
        list_questions: All that can be asked about images with these labels.
    """

    words: tuple[str, ...]
    kind_weights: dict[str, int]
    list_questions: Callable[[list[int]], list[Question]]


DIGITS = Subject(WORDS, KIND_WEIGHTS, list_questions)


def _draw_labels(count: int, num_labels: int, rng: np.random.Generator) -> list[int]:
    """Labels among which every number of even ones is as likely, and equal ones are common."""
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
    How many images each round brings, and its question: of those that can be asked, one whose kind and answer were given
    least often so far. Ends early where nothing is left to ask: a single image leaves two questions.
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
    # The text gives away how many images there are: balanced for each number
    return question.kind, num_seen, question.outcome


def main(argv: list[str] | None = None) -> None:
    """Writes the conversations that the demo measures by default, with the kind of each question as its task."""
    import datasets  # of the extra `train`

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="parquet file to write")
    parser.add_argument("--conversations", type=int, default=800)
    parser.add_argument("--split", default="test", choices=[*SPLIT_SIZES, "train"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = []
    for row in make_conversations(split_digits(args.seed)[args.split], args.conversations, args.seed):
        for message in row["messages"][1::2]:  # all contents of a column are of one type
            message["content"] = [{"type": "text", "text": message["content"]}]
        rows.append({"messages": row["messages"], "images": row["images"], "task": row["kinds"]})
    datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image())).to_parquet(args.output)


if __name__ == "__main__":
    main()
