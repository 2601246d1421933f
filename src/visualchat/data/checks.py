# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The checks of raw records and of examples, and the problems that they find before training does."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from modeling_visualchat import VisualChatConfig, VisualChatProcessor
from modeling_visualchat.image_loading_visualchat import (
    LONGEST_PATH,
    ImageSource,
    check_not_too_thin,
    decode_base64,
    load_image,
    shorter_edge,
)
from modeling_visualchat.messages_visualchat import MAX_TEXT_LENGTH, PART_KEYS, undecoded


PLACEHOLDER = "<image>"
UNREADABLE = "_unreadable"  # the column in which `json_examples.py` says why it could not read an example
IMAGE_TYPES = ("image", "image_url")  # types of a content part
Opened = TypeVar("Opened")
KINDS = {
    "unreadable example": "a line or an entry of the file is no JSON object or no line of CSV, or is not in UTF-8",
    "missing field": "a needed field is absent or of the wrong type",
    "empty question": "a question has no text",
    "empty answer": "an answer has no text",
    "long text": f"a message has more than {MAX_TEXT_LENGTH} characters, which no tokenizer is given",
    "odd turns": "the speakers do not alternate, or a question has no answer",
    "image count": "the images do not match the placeholders or the image names in the text",
    "duplicate id": "two examples of a file or dataset have the same id; the first without a fault is kept",
    "duplicate caption": "a line repeats the image, question and caption of an earlier line; the earlier one is kept",
    "unknown record": "a record refers to one that the file does not hold; the reference is ignored",
    "missing image": "there is no such file or entry",
    "truncated image": "the image data ends too early",
    "undecodable image": "the data is not an image that can be decoded",
    "thin image": "one edge is so much longer than the other that the resized image would fill the memory",
}


@dataclass(frozen=True)
class Problem:
    """
    One problem of the data. Its fields are those of a line of `problems.jsonl`.

    Args:
        kind (`str`): A key of `KINDS`.
        file (`str`): The raw file, relative to the data root; or the dataset, as the user named it.
        row (`str`): Which example of the file: its index, counted from 0, in a list; its key in an object; or `line 3`.
        field (`str`): Path of the field within the example, such as `conversations[1].value`.
        detail (`str`): What is wrong with the value.
    """

    kind: str
    file: str
    row: str
    field: str
    detail: str

    def __str__(self) -> str:
        example = self.row if self.row.startswith(("line ", "entry ")) else f"example {self.row}"
        return f"{self.file}, {example}, {self.field}: {self.kind}: {self.detail}"


class InvalidExample(Exception):  # noqa: N818 - it is reported, and is no error of the program
    """An example has a fault. The caller knows the file and the example's number, and makes a [`Problem`] of it."""

    def __init__(self, kind: str, field: str, detail: str):
        super().__init__(f"{field}: {kind}: {detail}")
        self.kind, self.field, self.detail = kind, field, detail


@dataclass(frozen=True)
class ModelRequirements:
    """
    What a model requires of the examples that it trains on. The defaults are those of a CLIP tower for 224 pixels.

    Args:
        image_token (`str`): The placeholder of an image. No text may contain it.
        shorter_edge (`int`, *optional*): See [`~modeling_visualchat.image_loading_visualchat.shorter_edge`].
        max_images (`int`, *optional*): How many images a conversation may have. Only a model with numbered image keys has
            such a limit.
    """

    image_token: str = PLACEHOLDER
    shorter_edge: int | None = 224
    max_images: int | None = None

    @classmethod
    def of(cls, processor: VisualChatProcessor, config: VisualChatConfig) -> "ModelRequirements":
        return cls(processor.image_token, shorter_edge(processor.image_processor), config.max_image_number)


class ImageSize(NamedTuple):
    """Width and height of an image in pixels, as a PIL image has them; the image itself is not kept."""

    width: int
    height: int


class LeftOut(Exception):  # noqa: N818
    """A record is valid, but the source's recipe leaves it out. It is counted under its reason."""


@dataclass(frozen=True)
class ImageReference:
    """
    Where an image is stored. It has not been opened yet.

    Args:
        path (`str`): Absolute path of the image file, or of the JSON file that contains the image as a base64 string.
        field (`str`): The field of the raw record that names the image.
        span (`tuple[int, int]`, *optional*): First byte and last byte + 1 of the base64 string, with its quotes.
    """

    path: str
    field: str
    span: tuple[int, int] | None = None

    # `prepared.json` keeps a digest of this text: it stays as it was in version 0.1, so that its folders are recognized
    def __repr__(self) -> str:
        return f"Picture(path={self.path!r}, field={self.field!r}, span={self.span!r})"


def get_field(parent: dict, field: str, kind: type | tuple, inside: str = ""):
    """
    Args:
        parent (`dict`): An example or record, or an object inside it.
        inside (`str`): The path of `parent` within the example; empty for the example itself.

    Returns:
        The value of the field.

    Raises:
        InvalidExample: If the field is missing, or its value is not of the type `kind`.
    """
    path = f"{inside}.{field}" if inside else field
    if not isinstance(parent, dict):
        raise InvalidExample("missing field", inside, f"expected an object with the field {field!r}, got {parent!r:.80}")
    if field not in parent:
        raise InvalidExample("missing field", path, f"there is no such field; present: {', '.join(parent) or 'none'}")
    if not isinstance(parent[field], kind) or isinstance(parent[field], bool):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise InvalidExample("missing field", path, f"expected {names}, got {parent[field]!r:.80}")
    return parent[field]


def check_text(text: str, field: str, what: str, image_token: str = PLACEHOLDER) -> str:
    """
    Strips a question or an answer (`what` says which).

    Raises:
        InvalidExample: If there is no text, if it is too long for a tokenizer, or if it contains an image's placeholder.
    """
    if len(text) > MAX_TEXT_LENGTH:
        raise InvalidExample("long text", field, f"the {what} has {len(text)} characters, the most is {MAX_TEXT_LENGTH}")
    text = text.strip()
    if not text:
        raise InvalidExample(f"empty {what}", field, "there is no text")
    if image_token in text:
        raise InvalidExample(
            "image count", field, f"the {what} contains {image_token!r}, but there is no image for it: {text!r:.80}"
        )
    return text


def check_turns(turns: list, speakers: tuple[str, str], field: str, key: str, start: int = 0) -> None:
    """Checks that the two speakers alternate from the turn `start` on: the first one begins and the second one ends."""
    for index, turn in enumerate(turns[start:], start):
        speaker, expected = get_field(turn, key, str, f"{field}[{index}]"), speakers[(index - start) % 2]
        if speaker != expected:
            raise InvalidExample("odd turns", f"{field}[{index}].{key}", f"expected {expected!r}, got {speaker!r}")
    count = len(turns) - start
    if not count or count % 2:
        raise InvalidExample("odd turns", field, f"{count} turns: every question needs an answer")


def check_example(
    example: dict,
    requirements: ModelRequirements,
    open_image: Callable[[ImageSource], tuple[Opened, str, str]],
    skip: int = 0,
) -> tuple[list[Opened], list[InvalidExample]]:
    """
    Finds all faults of an example with `messages` and `images`. `visualchat prepare` and training both call it.

    Args:
        requirements ([`ModelRequirements`]): What the model requires.
        open_image (`Callable`): [`decode_image`], or a function that returns an [`ImageSize`] instead of the image.
        skip (`int`): How many of the first images are not opened.

    Returns:
        What `open_image` returned for each image, in reading order; and the faults.
    """
    try:
        images = check_conversation(example, requirements.image_token)
    except InvalidExample as fault:
        return [], [fault]
    opened, faults = [], []
    if requirements.max_images is not None and (count := len(images) - skip) > requirements.max_images:
        detail = f"there are {count} images, but the model numbers at most {requirements.max_images}"
        return [], [InvalidExample("image count", "messages", detail)]
    for field, source in images[skip:]:
        image, kind, detail = open_image(source)
        if image is not None:
            kind, detail = check_image_size(ImageSize(image.width, image.height), requirements)
        if kind:
            faults.append(InvalidExample(kind, field, detail))
        opened.append(image)
    return opened, faults


def check_image_size(size: ImageSize, requirements: ModelRequirements) -> tuple[str, str]:
    """The kind of problem and its detail if the image is too thin; two empty strings otherwise."""
    try:
        check_not_too_thin(size, requirements.shorter_edge)
    except ValueError as error:
        return "thin image", str(error)
    return "", ""


def check_conversation(example: dict, image_token: str = PLACEHOLDER) -> list[tuple[str, ImageSource]]:
    """
    Checks an example with `messages` and `images`, without opening the images. A system message may come first. A question
    with an image needs no text.

    Returns:
        For every image, in reading order, its field, and its path, URL or data.

    Raises:
        InvalidExample: With the first fault.
    """
    if example.get(UNREADABLE):
        raise InvalidExample(**example[UNREADABLE])
    messages, images = get_field(example, "messages", list), example.get("images") or []
    begins_with_system = bool(messages) and get_field(messages[0], "role", str, "messages[0]") == "system"
    check_turns(messages, ("user", "assistant"), "messages", "role", start=int(begins_with_system))
    found, unfilled = [], []  # `unfilled`: indices in `found` of the parts whose image comes from the column `images`
    for index, message in enumerate(messages):
        content, field = get_field(message, "content", (str, list), f"messages[{index}]"), f"messages[{index}].content"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts, shown = [], 0
        for k, part in enumerate(parts):
            kind = get_field(part, "type", str, f"{field}[{k}]")
            if kind == "text":
                texts.append(get_field(part, "text", str, f"{field}[{k}]"))
            elif kind not in IMAGE_TYPES:
                raise InvalidExample("missing field", f"{field}[{k}].type", f"expected 'image' or 'text', got {kind!r:.80}")
            elif message["role"] != "user":
                raise InvalidExample(
                    "image count", f"{field}[{k}]", f"only the user's messages may have images, not the {message['role']}'s"
                )
            else:
                shown += 1
                key, source = find_image_source(part)
                if source is not None:
                    found.append((f"{field}[{k}].{key}", source))
                elif kind == "image":
                    unfilled.append(len(found))
                    found.append(("", None))
                else:
                    raise InvalidExample("missing image", f"{field}[{k}].image_url", "there is no URL")
        text = "\n".join(texts)
        needs_text = message["role"] == "assistant" or (message["role"] == "user" and not shown)
        if needs_text or text.strip() or len(text) > MAX_TEXT_LENGTH:
            what = {"system": "system message", "user": "question", "assistant": "answer"}[message["role"]]
            check_text(text, field, what, image_token)
    if len(unfilled) != len(images):
        count = len(unfilled)
        raise InvalidExample(
            "image count", "images", f"{count} image parts need an image, but there are {len(images)} images"
        )
    for k, (position, image) in enumerate(zip(unfilled, images)):
        source = undecoded(image)
        if source is None:
            raise InvalidExample("missing image", f"images[{k}]", "there is neither a path nor data")
        found[position] = f"images[{k}]", source
    return found


def find_image_source(part: dict) -> tuple[str, ImageSource | None]:
    """The key of an image part that names its image, and the path, URL or data; `"", None` if the column `images` has it."""
    for key in PART_KEYS[part["type"]]:
        if part.get(key) is not None:
            return key, part[key].get("url") if isinstance(part[key], dict) else part[key]
    return "", None


def read_image_bytes(path: str, span: tuple[int, int] | None) -> bytes:
    """
    The encoded bytes of an image.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the span is not base64.
    """
    with open(path, "rb") as file:
        if span is None:
            return file.read()
        file.seek(span[0])
        text = json.loads(file.read(span[1] - span[0]))
    return decode_base64(text)


@functools.lru_cache(maxsize=1 << 16)
def inspect_image_file(path: str | Path, span: tuple[int, int] | None = None) -> tuple[ImageSize | None, str, str]:
    """As [`inspect_image_data`], for an image in a file. Each process decodes it once, however many examples show it."""
    try:
        return inspect_image_data(path if span is None else read_image_bytes(path, span))
    except (OSError, ValueError) as error:
        return None, "undecodable image", str(error)


def inspect_image(source: ImageSource) -> tuple[ImageSize | None, str, str]:
    """As [`inspect_image_data`]; the result for a path is kept."""
    is_path = isinstance(source, str) and len(source) <= LONGEST_PATH
    return inspect_image_file(source) if is_path else inspect_image_data(source)


def inspect_image_data(source: ImageSource) -> tuple[ImageSize | None, str, str]:
    """As [`decode_image`], with the size in place of the image."""
    image, kind, detail = decode_image(source)
    return ImageSize(*image.size) if image is not None else None, kind, detail


def decode_image(source: ImageSource) -> tuple[Image.Image | None, str, str]:
    """
    Decodes an image.

    Returns:
        The image and two empty strings; or `None`, the kind of problem and its detail.
    """
    try:
        return load_image(source), "", ""
    except FileNotFoundError:
        return None, "missing image", f"there is no file {source}"
    except (OSError, TypeError, ValueError) as error:
        reason = f"{error.__cause__ or ''}".lower()
        is_truncated = "truncated" in reason or str(error).endswith("is empty")
        return None, "truncated image" if is_truncated else "undecodable image", str(error)


def summarize(problems: Iterable[Problem], left_out: Counter, shown: int = 20) -> str:
    """The text of a report: counts by kind, and the first `shown` problems one by one."""
    problems = list(problems)
    counts = Counter(problem.kind for problem in problems)
    examples = {(problem.file, problem.row) for problem in problems}
    lines = [f"{len(problems)} problems in {len(examples)} examples" if problems else "no problems"]
    lines += [f"  {counts[kind]:>8}  {kind}: {meaning}" for kind, meaning in KINDS.items() if counts[kind]]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  … and {len(problems) - shown} more")
    if left_out:
        lines.append(f"{sum(left_out.values())} left out by the source's recipe; these are no problems")
        lines += [f"  {count:>8}  {reason}" for reason, count in sorted(left_out.items())]
    return "\n".join(lines)
