# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The two tasks of the study from scratch, both with real images: scanned digits (`digits.py`), and patches of scikit-learn's
two sample photographs, with questions about their brightness and their texture (smooth or rough, compared with others of
their shade).
"""

from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from visualchat.data.digits import COUNTS, DIGITS, Digits, Question, Subject, jitter, make_conversations, split_digits


SHADES = ("dark", "dim", "light", "bright")
PATCH_SIZE, PATCH_STRIDE, BLOCK_SIZE = 16, 8, 64  # pixels
# Quantiles of the training patches (texture: of those of one shade). Patches between two classes are not used
SHADE_QUANTILES = ((0.0, 0.2), (0.27, 0.47), (0.53, 0.73), (0.8, 1.0))
SMOOTH_BELOW, ROUGH_ABOVE = 0.4, 0.6
BLOCK_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
# The question for the label of one image
IDENTIFY = {"digits": "What digit is in image {}?", "patches": "How bright is image {}?"}


class Task(NamedTuple):
    """
    Args:
        name: A key of `IDENTIFY`.
        subject: The questions and the words for the labels.
        splits: `train`, `validation` and `test`, with disjoint scans or disjoint parts of the photographs.
    """

    name: str
    subject: Subject
    splits: dict[str, Digits]

    @property
    def identify(self) -> str:
        """The question for the label of an image, with `{}` for its number."""
        return IDENTIFY[self.name]

    def conversations(self, split: str, count: int, seed: int, **settings) -> list[dict]:
        """See [`make_conversations`]."""
        return make_conversations(self.splits[split], count, seed, self.subject, **settings)

    def probes(self, split: str, num_images: int, count: int, seed: int) -> list[dict]:
        """
        Conversations of one round with `num_images` images, whose labels are uniformly random, and a question about one
        image.

        Returns:
            `list[dict]`: As [`make_conversations`], with `asked` (`int`), the number of the image that is asked about.
        """
        rng = np.random.default_rng(seed)
        digits = self.splits[split]
        by_label = [np.flatnonzero(digits.labels == label) for label in range(len(self.subject.words))]
        examples = []
        for _ in range(count):
            labels = rng.integers(len(by_label), size=num_images).tolist()
            asked = int(rng.integers(num_images)) + 1
            images = [digits.images[rng.choice(by_label[label])] for label in labels]
            text = self.identify.format(asked)
            question = next(one for one in self.subject.list_questions(labels) if one.text == text)
            content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
            examples.append({"messages": messages, "images": images, "labels": labels, "asked": asked})
        return examples


def list_patch_questions(labels: list[int]) -> list[Question]:
    """All questions about patches with these labels. A label is twice the shade's index, plus 1 if rough."""
    questions = []
    for k, label in enumerate(labels, 1):
        text = IDENTIFY["patches"].format(k)
        questions.append(Question("shade", frozenset({k}), text, SHADES[label // 2], label // 2, 4))
    for (j, left), (k, right) in permutations(enumerate(labels, 1), 2):
        images = frozenset({j, k})
        if j < k:
            alike = left % 2 == right % 2
            text = f"Do image {j} and image {k} have the same texture?"
            questions.append(Question("texture", images, text, "yes" if alike else "no", int(alike), 2))
        if left // 2 != right // 2:
            text = f"Which is brighter, image {j} or image {k}?"
            brighter = f"image {j if left > right else k}"
            questions.append(Question("brighter", images, text, brighter, int(left > right), 2))
    rough = sum(label % 2 for label in labels)
    images = frozenset(range(1, len(labels) + 1))
    questions.append(Question("rough", images, "How many images are rough?", COUNTS[rough], rough, len(labels) + 1))
    return questions


PATCHES = Subject(
    tuple(f"{shade} {texture}" for shade in SHADES for texture in ("smooth", "rough")),
    {"shade": 2, "texture": 2, "brighter": 1, "rough": 1},
    list_patch_questions,
)


def split_patches(seed: int = 0) -> dict[str, Digits]:
    """
    The splits of the patches of 16 × 16 pixels, taken every 8 pixels within blocks of 64 × 64. All patches of a block are in
    the same split.
    """
    rng = np.random.default_rng(seed)
    shares = np.cumsum(list(BLOCK_SHARES.values()))
    found = {name: [] for name in BLOCK_SHARES}
    for photograph in load_sample_images().images:
        for top in range(0, photograph.shape[0] - BLOCK_SIZE + 1, BLOCK_SIZE):
            for left in range(0, photograph.shape[1] - BLOCK_SIZE + 1, BLOCK_SIZE):
                name = list(BLOCK_SHARES)[int(np.searchsorted(shares, rng.random(), side="right"))]
                for y in range(top, top + BLOCK_SIZE - PATCH_SIZE + 1, PATCH_STRIDE):
                    for x in range(left, left + BLOCK_SIZE - PATCH_SIZE + 1, PATCH_STRIDE):
                        found[name].append(photograph[y : y + PATCH_SIZE, x : x + PATCH_SIZE])
    luminance = {name: np.stack(patches) @ np.array([0.299, 0.587, 0.114]) for name, patches in found.items()}
    means = {name: values.mean((1, 2)) for name, values in luminance.items()}
    spreads = {name: values.std((1, 2)) for name, values in luminance.items()}
    bounds = np.quantile(means["train"], np.array(SHADE_QUANTILES))
    bounds[0, 0], bounds[-1, -1] = -np.inf, np.inf
    splits = {}
    for name, patches in found.items():
        labels = np.full(len(patches), -1)
        for shade, (low, high) in enumerate(bounds):
            of_train = (means["train"] >= low) & (means["train"] <= high)
            smooth, rough = np.quantile(spreads["train"][of_train], [SMOOTH_BELOW, ROUGH_ABOVE])
            of_shade = (means[name] >= low) & (means[name] <= high)
            labels[of_shade & (spreads[name] <= smooth)] = 2 * shade
            labels[of_shade & (spreads[name] >= rough)] = 2 * shade + 1
        kept = np.flatnonzero(labels >= 0)
        splits[name] = Digits([Image.fromarray(patches[k]) for k in kept], labels[kept], kept)
    return splits


@cache
def load_task(name: str, seed: int, jitter_copies: int = 15) -> Task:
    """A task with the splits of a seed. Training digits are augmented as in the demo; patches are enough without."""
    if name == "patches":
        return Task(name, PATCHES, split_patches(seed))
    splits = split_digits(seed)
    return Task(name, DIGITS, {**splits, "train": jitter(splits["train"], jitter_copies, seed)})
