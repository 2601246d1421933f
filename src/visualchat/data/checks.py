# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What can be wrong with a row, raw or of `messages` and `images`, and the checks that find it before training does."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from modeling_visualchat import VisualChatConfig, VisualChatProcessor
from modeling_visualchat.data_collator_visualchat import undecoded
from modeling_visualchat.image_loading_visualchat import (
    LONGEST_PATH,
    ImageSource,
    check_not_too_thin,
    decode_base64,
    load_image,
    shorter_edge,
)
from modeling_visualchat.processing_visualchat import PART_KEYS


PLACEHOLDER = "<image>"
IMAGE_TYPES = ("image", "image_url")  # of parts
Opened = TypeVar("Opened")
KINDS = {
    "missing field": "a needed field is absent or of the wrong type",
    "empty question": "a question without words",
    "empty answer": "an answer without words",
    "odd turns": "the speakers do not take turns, or a question lacks its answer",
    "image count": "the images and the text's placeholders or names for them do not agree",
    "duplicate id": "two rows of a file or dataset have the same id; the first is kept",
    "unknown record": "a record refers to one that the file does not hold; the reference is ignored",
    "missing image": "there is no such file or entry",
    "truncated image": "the picture's data ends too early",
    "undecodable image": "the data is not a picture that can be read",
    "thin image": "one edge is so much longer than the other that resizing the shorter one would fill the memory",
}


@dataclass(frozen=True)
class Problem:
    """
    One thing that is wrong with the data.

    Args:
        kind (`str`): A key of `KINDS`.
        file (`str`): The raw file, relative to the data root; or the dataset, as it was named.
        row (`str`): Index, counted from 0, of a row in a list; key of a row in a mapping.
        field (`str`): Path of the field within the row, such as `conversations[1].value`.
        detail (`str`): What was found there.
    """

    kind: str
    file: str
    row: str
    field: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, {self.field}: {self.kind}: {self.detail}"


class BadRow(Exception):  # noqa: N818 - it is reported, not an error of the program
    """Raised by row functions; becomes a [`Problem`] once the file and row are known."""

    def __init__(self, kind: str, field: str, detail: str):
        super().__init__(f"{field}: {kind}: {detail}")
        self.kind, self.field, self.detail = kind, field, detail


@dataclass(frozen=True)
class Needs:
    """
    What a model asks of the rows that it trains on. The defaults are a CLIP tower's, for 224 pixels.

    Args:
        image_token (`str`): The placeholder, which no text may hold.
        shorter_edge (`int`, *optional*): See [`~modeling_visualchat.image_loading_visualchat.shorter_edge`].
        max_images (`int`, *optional*): Of a conversation, if their keys are numbered.
    """

    image_token: str = PLACEHOLDER
    shorter_edge: int | None = 224
    max_images: int | None = None

    @classmethod
    def of(cls, processor: VisualChatProcessor, config: VisualChatConfig) -> "Needs":
        max_images = len(config.image_number_token_ids) if config.image_number_keys else None
        return cls(processor.image_token, shorter_edge(processor.image_processor), max_images)


class Size(NamedTuple):
    """Of a picture that was opened and is not kept."""

    width: int
    height: int


class LeftOut(Exception):  # noqa: N818
    """Raised for a row that is sound, but that the recipe leaves out; counted under its reason."""


@dataclass(frozen=True)
class Picture:
    """
    A picture that has not been opened yet.

    Args:
        path (`str`): Absolute path of the picture, or of the JSON file that holds it as a base64 string.
        field (`str`): The field of the raw row that names it.
        span (`tuple[int, int]`, *optional*): First and last byte + 1 of that string, quotes included.
    """

    path: str
    field: str
    span: tuple[int, int] | None = None


def need(row: dict, field: str, kind: type | tuple, inside: str = ""):
    """The value of a field that the row must have, of the type it must have. `inside` is the path of `row` itself."""
    path = f"{inside}.{field}" if inside else field
    if not isinstance(row, dict):
        raise BadRow("missing field", inside, f"expected an object with the field {field!r}, got {row!r:.80}")
    if field not in row:
        raise BadRow("missing field", path, f"there is no such field; present: {', '.join(row) or 'none'}")
    if not isinstance(row[field], kind) or isinstance(row[field], bool):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadRow("missing field", path, f"expected {names}, got {row[field]!r:.80}")
    return row[field]


def words(text: str, field: str, what: str, image_token: str = PLACEHOLDER) -> str:
    """`text` without the blanks around it, checked: `what` ("question" or "answer") has words and no stray placeholder."""
    text = text.strip()
    if not text:
        raise BadRow(f"empty {what}", field, "there is no text")
    if image_token in text:
        raise BadRow("image count", field, f"the {what} holds {image_token!r}, but has no image there: {text!r:.80}")
    return text


def check_turns(turns: list, speakers: tuple[str, str], field: str, key: str, start: int = 0) -> None:
    """Checks that from the turn `start` on the two speakers alternate, the first one begins and the second one ends."""
    for index, turn in enumerate(turns[start:], start):
        speaker, expected = need(turn, key, str, f"{field}[{index}]"), speakers[(index - start) % 2]
        if speaker != expected:
            raise BadRow("odd turns", f"{field}[{index}].{key}", f"it is {speaker!r}, but expected was {expected!r}")
    count = len(turns) - start
    if not count or count % 2:
        raise BadRow("odd turns", field, f"{count} turns: every question needs an answer")


def open_row(
    row: dict, needs: Needs, open_picture: Callable[[ImageSource], tuple[Opened, str, str]], skip: int = 0
) -> tuple[list[Opened], list[BadRow]]:
    """
    Finds all that is wrong with a row of `messages` and `images`, for `visualchat prepare` and for training alike.

    Args:
        needs ([`Needs`]): Of the model.
        open_picture (`Callable`): [`load_picture`], or a function that returns a [`Size`] in place of the picture.
        skip (`int`): Pictures that are not opened, the first ones.

    Returns:
        What `open_picture` made of the pictures, in reading order; and what is wrong.
    """
    try:
        pictures = check_conversation(row, needs.image_token)
    except BadRow as fault:
        return [], [fault]
    opened, faults = [], []
    if needs.max_images is not None and (count := len(pictures) - skip) > needs.max_images:
        detail = f"{count} images, but the model numbers up to {needs.max_images}"
        return [], [BadRow("image count", "messages", detail)]
    for field, source in pictures[skip:]:
        picture, kind, detail = open_picture(source)
        if picture is not None:
            kind, detail = judge_size(Size(picture.width, picture.height), needs)
        if kind:
            faults.append(BadRow(kind, field, detail))
        opened.append(picture)
    return opened, faults


def judge_size(size: Size, needs: Needs) -> tuple[str, str]:
    """The kind of problem and the detail of a picture that is too thin; "" and "" of others."""
    try:
        check_not_too_thin(size, needs.shorter_edge)
    except ValueError as error:
        return "thin image", str(error)
    return "", ""


def check_conversation(row: dict, image_token: str = PLACEHOLDER) -> list[tuple[str, ImageSource]]:
    """
    Checks a row of `messages` and `images`, all but the pictures themselves. A system message may come first, and a question
    that brings a picture needs no words.

    Returns:
        For every picture, in reading order, its field, and its path, URL or data.

    Raises:
        BadRow: For the first fault.
    """
    messages, images = need(row, "messages", list), row.get("images") or []
    begins_with_system = bool(messages) and need(messages[0], "role", str, "messages[0]") == "system"
    check_turns(messages, ("user", "assistant"), "messages", "role", start=int(begins_with_system))
    pictures, waiting = [], []
    for index, message in enumerate(messages):
        content, field = need(message, "content", (str, list), f"messages[{index}]"), f"messages[{index}].content"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts, shown = [], 0
        for k, part in enumerate(parts):
            kind = need(part, "type", str, f"{field}[{k}]")
            if kind == "text":
                texts.append(need(part, "text", str, f"{field}[{k}]"))
            elif kind not in IMAGE_TYPES:
                raise BadRow("missing field", f"{field}[{k}].type", f"expected 'image' or 'text', got {kind!r:.80}")
            elif message["role"] != "user":
                raise BadRow("image count", f"{field}[{k}]", f"only the user shows images, not the {message['role']}")
            else:
                shown += 1
                key, source = find_source(part)
                if source is not None:
                    pictures.append((f"{field}[{k}].{key}", source))
                elif kind == "image":
                    waiting.append(len(pictures))
                    pictures.append(("", None))
                else:
                    raise BadRow("missing image", f"{field}[{k}].image_url", "there is no URL")
        text = "\n".join(texts)
        if text.strip() or message["role"] == "assistant" or (message["role"] == "user" and not shown):
            what = {"system": "system message", "user": "question", "assistant": "answer"}[message["role"]]
            words(text, field, what, image_token)
    if len(waiting) != len(images):
        count = len(waiting)
        raise BadRow("image count", "images", f"{count} image parts wait for a picture, but there are {len(images)} images")
    for k, (place, image) in enumerate(zip(waiting, images)):
        source = undecoded(image)
        if source is None:
            raise BadRow("missing image", f"images[{k}]", "there is neither a path nor data")
        pictures[place] = f"images[{k}]", source
    return pictures


def find_source(part: dict) -> tuple[str, ImageSource | None]:
    """The key under which an image part has its own picture, and the path, URL or data; `None` if the row's `images` do."""
    for key in PART_KEYS[part["type"]]:
        if part.get(key) is not None:
            return key, part[key].get("url") if isinstance(part[key], dict) else part[key]
    return "", None


def read_picture(path: str, span: tuple[int, int] | None) -> bytes:
    """
    The encoded bytes of a picture.

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
def inspect_picture(path: str | Path, span: tuple[int, int] | None = None) -> tuple[Size | None, str, str]:
    """[`inspect_data`] of a picture that lies elsewhere: decoded once in each process, however many rows show it."""
    try:
        return inspect_data(path if span is None else read_picture(path, span))
    except (OSError, ValueError) as error:
        return None, "undecodable image", str(error)


def inspect(source: ImageSource) -> tuple[Size | None, str, str]:
    """[`inspect_data`], once for each path."""
    is_path = isinstance(source, str) and len(source) <= LONGEST_PATH
    return inspect_picture(source) if is_path else inspect_data(source)


def inspect_data(source: ImageSource) -> tuple[Size | None, str, str]:
    """[`load_picture`], of which the size is kept."""
    picture, kind, detail = load_picture(source)
    return Size(*picture.size) if picture is not None else None, kind, detail


def load_picture(source: ImageSource) -> tuple[Image.Image | None, str, str]:
    """
    Decodes a picture.

    Returns:
        The picture, "" and ""; or None, the kind of problem and the detail.
    """
    try:
        return load_image(source, name="picture"), "", ""
    except FileNotFoundError:
        return None, "missing image", f"there is no file {source}"
    except (OSError, TypeError, ValueError) as error:
        reason = f"{error.__cause__ or ''}".lower()
        is_cut = "truncated" in reason or str(error).endswith("is empty")
        return None, "truncated image" if is_cut else "undecodable image", str(error)


def summarize(problems: Iterable[Problem], left_out: Counter, shown: int = 20) -> str:
    """Counts by kind, and the first problems one by one."""
    problems = list(problems)
    counts = Counter(problem.kind for problem in problems)
    bad_rows = {(problem.file, problem.row) for problem in problems}
    lines = [f"{len(problems)} problems in {len(bad_rows)} rows" if problems else "no problems"]
    lines += [f"  {counts[kind]:>8}  {kind}: {meaning}" for kind, meaning in KINDS.items() if counts[kind]]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  … and {len(problems) - shown} more")
    if left_out:
        lines.append(f"{sum(left_out.values())} left out by the recipe, which is no problem")
        lines += [f"  {count:>8}  {reason}" for reason, count in sorted(left_out.items())]
    return "\n".join(lines)
