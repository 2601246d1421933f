# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The conversation of one visitor of the web page, with its limits, and the example conversations of the page."""

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
from modeling_visualchat.messages_visualchat import MAX_TEXT_LENGTH
from visualchat.chat.image_marks import read_marks, write_marks
from visualchat.data.digits import split_digits


class DisplayedRound(NamedTuple):
    """
    A round as the page shows it, also while its answer is being generated.

    Args:
        images (`list[PIL.Image.Image]`): The images of the round, cropped to the part that the model sees.
        text (`str`): The question, with marks where its images stand if they do not stand before it; see [`write_marks`].
        answer (`str`): The answer so far.
    """

    images: list[Image.Image]
    text: str
    answer: str


class Conversation:
    """
    A conversation within the limits of the page. An error loses none of its rounds.

    Args:
        model (`VisualChatForCausalLM`), processor (`VisualChatProcessor`): They generate the answers.
        store (`ImageMemoryStore`): The image memory, which all visitors share: it finds an image by its content.
        max_images (`int`): The most images in the conversation.
        max_pixels (`int`): The most pixels of an image, before it is cropped.
        max_bytes (`int`): The largest size of the files of a question, together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        store: ImageMemoryStore,
        max_images: int,
        max_pixels: int,
        max_bytes: int,
    ):
        self.max_images, self.max_pixels, self.max_bytes = max_images, max_pixels, max_bytes
        self._start_chat = lambda: model.start_chat(processor, store=store)
        self._image_processor = processor.image_processor
        self._chat = self._start_chat()
        self._lock = threading.Lock()  # held while an answer is being generated
        self._stopped = threading.Event()

    @property
    def rounds(self) -> list[DisplayedRound]:
        return [DisplayedRound(one.images, write_marks(one), one.answer) for one in self._chat.rounds]

    @property
    def num_images(self) -> int:
        return sum(len(one.images) for one in self._chat.rounds)

    def ask(
        self, text: str, images: list[str | os.PathLike | Image.Image], seed: int | None = None, **generation
    ) -> Iterator[list[DisplayedRound]]:
        """
        Asks a question. Yields all rounds, again after each new piece of the answer.

        Args:
            text (`str`): The question. A mark for each of its images says where they stand; see [`read_marks`].
            images (`list`): The files or PIL images that the question brings.
            seed (`int`, *optional*): The random seed of sampling. On the same machine, the same seed gives the same answer.
            generation: Keyword arguments of `model.generate`.

        Raises:
            ValueError: If a limit is exceeded, an image cannot be read, the conversation does not fit into the model's
                context, or an answer is being generated.
        """
        with self._exclusively():
            _check_text(text, "Type a question: images alone are not enough")
            if self.num_images + len(images) > self.max_images:
                raise ValueError(
                    f"{len(images)} more images are too many: the conversation has {self.num_images} of at most"
                    f" {self.max_images}"
                )
            files = [image for image in images if not isinstance(image, Image.Image) and os.path.isfile(image)]
            size = sum(map(os.path.getsize, files))
            if size > self.max_bytes:
                raise ValueError(
                    f"The {len(files)} images have {size:,} bytes together: at most {self.max_bytes:,} are allowed"
                )
            opened = [self._open_image(image, f"image {k}") for k, image in enumerate(images, 1)]
            parts = read_marks(text, len(opened))
            pieces = self._chat.send(parts, images=opened, stream=True, **self._stoppable(generation))
            yield from _stream_rounds([*self.rounds, DisplayedRound(opened, text, "")], pieces, seed)

    def ask_all(
        self, rounds: list[tuple[str, list]], seed: int | None = None, **generation
    ) -> Iterator[list[DisplayedRound]]:
        """Asks several questions, one after another, each with its images. Yields and raises as [`~Conversation.ask`]."""
        for text, images in rounds:
            yield from self.ask(text, images, seed, **generation)
            if self._stopped.is_set():
                break

    def edit(self, index: int, text: str, seed: int | None = None, **generation) -> Iterator[list[DisplayedRound]]:
        """
        Replaces the question of a round (counted from 0) by `text`, which may be the same, and answers it. The images of the
        round stay, where marks say so, and later rounds are dropped. Yields and raises as [`~Conversation.ask`].
        """
        with self._exclusively():
            _check_text(text, "Type a new question in place of the one that you edit")
            if not 0 <= index < len(self.rounds):
                raise ValueError(f"There is no question {index + 1}: {len(self.rounds)} have been asked")
            parts = read_marks(text, len(self.rounds[index].images))
            pieces = self._chat.edit(index, parts, stream=True, **self._stoppable(generation))
            yield from _stream_rounds(
                [*self.rounds[:index], self.rounds[index]._replace(text=text, answer="")], pieces, seed
            )

    def retry(self, seed: int | None = None, **generation) -> Iterator[list[DisplayedRound]]:
        """Asks the last question again. Yields and raises as [`~Conversation.ask`]."""
        if not self.rounds:
            raise ValueError("There is no question to ask again: none has been asked")
        yield from self.edit(len(self.rounds) - 1, self.rounds[-1].text, seed, **generation)

    def undo(self) -> DisplayedRound:
        """
        Removes the last round, and returns it.

        Raises:
            ValueError: If no question has been asked, or an answer is being generated.
        """
        with self._exclusively():
            if not self.rounds:
                raise ValueError("There is no question to undo: none has been asked")
            last = self.rounds[-1]
            self._chat.undo()
            return last

    def clear(self) -> None:
        """
        Starts a new conversation.

        Raises:
            ValueError: If an answer is being generated.
        """
        with self._exclusively():
            self._chat = self._start_chat()

    def stop(self) -> None:
        """Stops the answer that is being generated. What there is of it stays."""
        self._stopped.set()

    def release(self) -> None:
        """Stops the answer, and frees the cache. The conversation can continue: the next answer computes the cache again."""
        self.stop()
        with self._lock:
            rounds, self._chat = self._chat.rounds, self._start_chat()
            self._chat.rounds = rounds

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ValueError("An answer is being generated: stop it, or wait until it is complete")
        try:
            yield
        finally:
            self._lock.release()

    def _stoppable(self, generation: dict) -> dict:
        self._stopped.clear()
        return {**generation, "stopping_criteria": [lambda *_: self._stopped.is_set()]}

    def _open_image(self, image: str | os.PathLike | Image.Image, name: str) -> Image.Image:
        """Opens an image, and crops it to the part that the model sees."""
        if not isinstance(image, Image.Image):
            name = f"{name}, {Path(image).name}"
            try:
                image = Path(image).read_bytes()
            except FileNotFoundError as error:
                raise ValueError(f"{name}: the server no longer has this file, add it again") from error
            _check_pixels(image, name, self.max_pixels)
        return crop_for_clip(load_image(image, name), self._image_processor)


def _stream_rounds(rounds: list[DisplayedRound], pieces: Iterator[str], seed: int | None) -> Iterator[list[DisplayedRound]]:
    """Yields the rounds before and after each piece of the last round's answer."""
    with closing(pieces):
        yield rounds
        if seed is not None:
            torch.manual_seed(seed)
        for piece in pieces:
            rounds = [*rounds[:-1], rounds[-1]._replace(answer=rounds[-1].answer + piece)]
            yield rounds


def _check_text(text: str, missing: str) -> None:
    """Raises a `ValueError`, which is `missing` where there is no text, before anything is tokenized."""
    if not text.strip():
        raise ValueError(missing)
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"The question has {len(text):,} characters: at most {MAX_TEXT_LENGTH:,} are allowed")


def _check_pixels(data: bytes, name: str, max_pixels: int) -> None:
    """Raises a `ValueError` if an image is too large. Only the header is read: decoding a small file may fill the memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as header:
                width, height = header.size
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return  # `load_image` raises an error that says what is wrong
    if width * height > max_pixels:
        raise ValueError(f"{name} has {width} × {height} pixels: at most {max_pixels:,} are allowed")


class Example(NamedTuple):
    """
    A conversation that the page offers to a visitor.

    Args:
        title (`str`): The title that the page shows.
        rounds (`list[tuple[str, list[PIL.Image.Image]]]`): The questions, each with the images that it brings.
    """

    title: str
    rounds: list[tuple[str, list[Image.Image]]]


def photograph_examples() -> list[Example]:
    """Example conversations about the two sample photographs of scikit-learn: a Chinese palace and a flower."""
    palace, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    return [
        Example("A photograph", [("Please describe the image.", [palace]), ("What colors do you see in it?", [])]),
        Example(
            "Two photographs, one after another",
            [
                ("What is in this image?", [palace]),
                ("And what is in image 2?", [flower]),
                ("What is the difference between image 1 and image 2?", []),
            ],
        ),
    ]


def digit_examples() -> list[Example]:
    """Example conversations for the model of `make demo`, about scanned digits that it was not trained on."""
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
