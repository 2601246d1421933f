# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What one visitor of the web page says and shows, within limits; and conversations to begin with."""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import PreTrainedModel, ProcessorMixin

from modeling_visualchat.image_loading_visualchat import crop_for_clip, load_image
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.data.digits import split_digits


class ShownRound(NamedTuple):
    """
    A round as the page shows it, also while its answer is being written.

    Args:
        images (`list[PIL.Image.Image]`): What the model sees of the pictures of the round.
        text, answer (`str`): The question, and what there is of the answer.
    """

    images: list[Image.Image]
    text: str
    answer: str


class Conversation:
    """
    A conversation in the limits of the page. Nothing of it is lost by an error.

    Args:
        model (`VisualChatForCausalLM`), processor (`VisualChatProcessor`): They answer.
        store (`ImageMemoryStore`): Shared by all visitors: it knows pictures by their content, not by who showed them.
        max_images (`int`): Of the conversation.
        max_pixels (`int`): Of a picture as it comes.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, store: ImageMemoryStore, max_images: int, max_pixels: int
    ):
        self.max_images, self.max_pixels = max_images, max_pixels
        self._begin = lambda: model.start_chat(processor, store=store)
        self._image_processor = processor.image_processor
        self._chat = self._begin()
        self._lock = threading.Lock()  # held while an answer is written
        self._stopped = threading.Event()

    @property
    def rounds(self) -> list[ShownRound]:
        return [ShownRound(one.images, one.text, one.answer) for one in self._chat.rounds]

    @property
    def num_images(self) -> int:
        return sum(len(one.images) for one in self._chat.rounds)

    def ask(
        self, text: str, pictures: list[str | os.PathLike | Image.Image], seed: int | None = None, **generation
    ) -> Iterator[list[ShownRound]]:
        """
        Asks, and yields the conversation again and again while the answer grows.

        Args:
            text (`str`): The question.
            pictures (`list`): Files, or PIL images, that come with it.
            seed (`int`, *optional*): Of sampling: the same one gives the same answer, on the same machine.
            generation: As for `model.generate`.

        Raises:
            ValueError: If a limit is exceeded, a picture cannot be read, the conversation does not fit the model's context,
                or an answer is being written.
        """
        with self._unless_answering():
            if not text.strip():
                raise ValueError("Write a question: pictures alone are not one")
            if self.num_images + len(pictures) > self.max_images:
                raise ValueError(
                    f"{len(pictures)} more pictures are too many: the conversation has {self.num_images} of at most"
                    f" {self.max_images}"
                )
            images = [self._open(picture, f"picture {k}") for k, picture in enumerate(pictures, 1)]
            pieces = self._chat.send(text, images=images, stream=True, **self._stoppable(generation))
            yield from _grow([*self.rounds, ShownRound(images, text, "")], pieces, seed)

    def ask_all(self, rounds: list[tuple[str, list]], seed: int | None = None, **generation) -> Iterator[list[ShownRound]]:
        """Asks several questions, in turn, each with its pictures. Yields and raises as [`~Conversation.ask`]."""
        for text, pictures in rounds:
            yield from self.ask(text, pictures, seed, **generation)
            if self._stopped.is_set():
                break

    def edit(self, index: int, text: str, seed: int | None = None, **generation) -> Iterator[list[ShownRound]]:
        """
        Asks another question, or the same again, in place of the one of a round, from 0. Later rounds are dropped. Yields
        and raises as [`~Conversation.ask`].
        """
        with self._unless_answering():
            if not text.strip():
                raise ValueError("Write a question in place of the one that you edit")
            if not 0 <= index < len(self.rounds):
                raise ValueError(f"There is no question {index + 1}: {len(self.rounds)} have been asked")
            pieces = self._chat.edit(index, text, stream=True, **self._stoppable(generation))
            yield from _grow([*self.rounds[:index], self.rounds[index]._replace(text=text, answer="")], pieces, seed)

    def retry(self, seed: int | None = None, **generation) -> Iterator[list[ShownRound]]:
        """Asks the last question again. Yields and raises as [`~Conversation.ask`]."""
        if not self.rounds:
            raise ValueError("There is nothing to ask again: nothing has been asked")
        yield from self.edit(len(self.rounds) - 1, self.rounds[-1].text, seed, **generation)

    def undo(self) -> ShownRound:
        """
        Takes back the last round, and returns it.

        Raises:
            ValueError: If nothing has been asked, or an answer is being written.
        """
        with self._unless_answering():
            if not self.rounds:
                raise ValueError("There is nothing to take back: nothing has been asked")
            last = self.rounds[-1]
            self._chat.undo()
            return last

    def clear(self) -> None:
        """
        Begins anew.

        Raises:
            ValueError: If an answer is being written.
        """
        with self._unless_answering():
            self._chat = self._begin()

    def stop(self) -> None:
        """Ends the answer that is being written where it is."""
        self._stopped.set()

    def release(self) -> None:
        """Stops, and frees what is cached. The conversation can go on: its next answer computes the cache again."""
        self.stop()
        with self._lock:
            rounds, self._chat = self._chat.rounds, self._begin()
            self._chat.rounds = rounds

    @contextmanager
    def _unless_answering(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ValueError("An answer is being written: stop it, or wait for its end")
        try:
            yield
        finally:
            self._lock.release()

    def _stoppable(self, generation: dict) -> dict:
        self._stopped.clear()
        return {**generation, "stopping_criteria": [lambda *_: self._stopped.is_set()]}

    def _open(self, picture: str | os.PathLike | Image.Image, name: str) -> Image.Image:
        """The part of a picture that the model sees: the rest need not be kept."""
        if not isinstance(picture, Image.Image):
            name = f"{name}, {Path(picture).name}"
            try:
                picture = Path(picture).read_bytes()
            except FileNotFoundError as error:
                raise ValueError(f"{name}, is no longer kept: add it again") from error
            _check_pixels(picture, name, self.max_pixels)
        return crop_for_clip(load_image(picture, name), self._image_processor)


def _grow(rounds: list[ShownRound], pieces: Iterator[str], seed: int | None) -> Iterator[list[ShownRound]]:
    with closing(pieces):
        yield rounds
        if seed is not None:
            torch.manual_seed(seed)
        for piece in pieces:
            rounds = [*rounds[:-1], rounds[-1]._replace(answer=rounds[-1].answer + piece)]
            yield rounds


def _check_pixels(data: bytes, name: str, max_pixels: int) -> None:
    """Before anything is decoded: a small file may hold a picture that fills the memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as header:
                width, height = header.size
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return  # `load_image` says what is wrong with it
    if width * height > max_pixels:
        raise ValueError(f"{name} has {width} × {height} pixels: at most {max_pixels:,} are allowed")


class Example(NamedTuple):
    """
    A conversation to begin with.

    Args:
        title (`str`): What it is about.
        rounds (`list[tuple[str, list[PIL.Image.Image]]]`): Its questions, with the pictures that come with each.
    """

    title: str
    rounds: list[tuple[str, list[Image.Image]]]


def photograph_examples() -> list[Example]:
    """About the two sample photographs of scikit-learn: a Chinese palace and a flower."""
    palace, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    return [
        Example("A photograph", [("Please describe the image.", [palace]), ("What colors do you see in it?", [])]),
        Example(
            "Two photographs, one after the other",
            [
                ("What is in this picture?", [palace]),
                ("And what is in image 2?", [flower]),
                ("What is the difference between image 1 and image 2?", []),
            ],
        ),
    ]


def digit_examples() -> list[Example]:
    """About scanned digits that the model of `make demo` has not seen, as it was taught to be asked."""
    digits = split_digits()["test"]

    def show(*labels: int) -> list[Image.Image]:
        return [digits.images[np.flatnonzero(digits.labels == label)[0]] for label in labels]

    return [
        Example("One digit", [("What digit is in image 1?", show(7))]),
        Example(
            "Two digits, then a third",
            [
                ("Do image 1 and image 2 show the same digit?", show(4, 9)),
                ("Which digit is larger, image 1 or image 3?", show(2)),
                ("How many images show an even digit?", []),
            ],
        ),
    ]


EXAMPLES = {"photographs": photograph_examples, "digits": digit_examples, "none": list}
