# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Conversations as files: `conversation.json` beside the images that it names.

A folder holds a whole conversation at any moment, the earlier or the new one: what is new is written under names that are
free, and `conversation.json` is then replaced at once. What is read may come from anybody: it is checked.
"""

import contextlib
import io
import itertools
import json
import os
import re
import reprlib
import stat
import uuid
from typing import NamedTuple

from PIL import Image

from .chat_streaming_visualchat import check_characters
from .image_loading_visualchat import load_own_image
from .messages_visualchat import MAX_TEXT_LENGTH


FILE_NAME = "conversation.json"
# Names that `save_conversation` gives. No other file is ever removed
OWN_IMAGE = re.compile(r"image-[1-9][0-9]*\.png")
UNFINISHED = re.compile(r"conversation\.[0-9a-f]{32}\.part")
NO_FILE_NAME = re.compile(r"\A\.{0,2}\Z|[/\\:\0]")  # what leads to another folder, on any system
# What no model has room for: a round takes at least ten tokens of its own, an image 257, and a token holds some four bytes.
# These limits are those of a context of 100,000 tokens of rounds, 256,000 of images, and two million of text
MAX_ROUNDS = 10_000
MAX_IMAGES = 1_000
MAX_BYTES = 2**23
KINDS = {str: "a string", int: "an integer", list: "a list", dict: "an object", type(None): "null"}  # as JSON calls them


class SavedConversation(NamedTuple):
    """
    What is kept of a conversation.

    Args:
        system (`str`, *optional*): In place of the prompt's first line.
        dropped_rounds (`int`): Rounds that were dropped for lack of room.
        rounds (`list[tuple[str, list, str, list[int]]]`): The question, its images (in `conversation.json`, the names of
            their files), the answer and the `image_lines` of each round; see [`Round`].
    """

    system: str | None
    dropped_rounds: int
    rounds: list[tuple[str, list[Image.Image] | list[str], str, list[int]]]


def save_conversation(folder: str | os.PathLike, conversation: SavedConversation) -> None:
    """
    Writes a conversation into a folder. Images that lie there already are left as they are, and those that only an earlier
    conversation needs are removed at the end.

    Raises:
        OSError: If it cannot be written. The folder is as before.
        ValueError: If [`load_conversation`] would refuse it. Nothing is written.
    """
    os.makedirs(folder, exist_ok=True)
    earlier = _own_images(folder, FILE_NAME)
    # A process that was killed leaves the list of the images that it was writing
    for name in filter(UNFINISHED.fullmatch, os.listdir(folder)):
        _remove(folder, _own_images(folder, name) - earlier | {name})

    taken, rounds, files = {*os.listdir(folder)}, [], {}
    positions = itertools.count(1)
    for text, images, answer, image_lines in conversation.rounds:
        names = []
        for image, position in zip(images, positions):
            png = io.BytesIO()
            image.save(png, "PNG")
            name = f"image-{position}.png"
            if not (name in earlier and _holds(folder, name, png.getvalue())):
                if name in taken:
                    name = next(other for k in itertools.count(1) if (other := f"image-{k}.png") not in taken)
                files[name] = png.getvalue()
            taken.add(name)
            names.append(name)
        # As before images had positions, where none has one
        positions_in_text = {"image_lines": image_lines} if image_lines else {}
        rounds.append({"text": text, "images": names, "answer": answer, **positions_in_text})
    content = {"system": conversation.system, "dropped_rounds": conversation.dropped_rounds, "rounds": rounds}
    encoded = json.dumps(content, ensure_ascii=False, indent=1).encode()
    _parse(encoded)

    unfinished, written = f"conversation.{uuid.uuid4().hex}.part", []
    try:
        for name, data in {unfinished: encoded, **files}.items():
            with open(os.path.join(folder, name), "xb") as file:
                written.append(name)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(folder)
        os.replace(os.path.join(folder, unfinished), os.path.join(folder, FILE_NAME))
    except BaseException:
        _remove(folder, written)
        raise
    _sync(folder)
    _remove(folder, earlier.difference(*(one["images"] for one in rounds)))


def load_conversation(folder: str | os.PathLike) -> SavedConversation:
    """
    Reads what [`save_conversation`] wrote.

    Raises:
        FileNotFoundError: If there is no `conversation.json`, or one of its images is missing.
        ValueError: If it holds something else, naming the file and the field.
    """
    path = os.path.join(folder, FILE_NAME)
    try:
        conversation = _read(folder, FILE_NAME)
        rounds = []
        for index, (text, names, answer, image_lines) in enumerate(conversation.rounds):
            fields = (f"rounds[{index}].images[{k}], {name!r:.80}" for k, name in enumerate(names))
            images = [load_own_image(_find(folder, name, field), field) for name, field in zip(names, fields)]
            rounds.append((text, images, answer, image_lines))
        return conversation._replace(rounds=rounds)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a conversation that was saved here: {error}") from error


def _own_images(folder: str | os.PathLike, name: str) -> set[str]:
    """The images that a file lists, and whose names [`save_conversation`] gives. None of a file that cannot be read."""
    try:
        return {image for _, names, _, _ in _read(folder, name).rounds for image in names if OWN_IMAGE.fullmatch(image)}
    except (OSError, ValueError):
        return set()


def _holds(folder: str | os.PathLike, name: str, data: bytes) -> bool:
    try:
        with open(_find(folder, name, name), "rb") as file:
            return file.read(len(data) + 1) == data
    except (OSError, ValueError):
        return False


def _remove(folder: str | os.PathLike, names: list[str] | set[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            os.unlink(os.path.join(folder, name))


def _sync(folder: str | os.PathLike) -> None:
    """Names of files last through a power failure from here on, where the system can promise it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every file system can
            os.fsync(handle)
        os.close(handle)


def _find(folder: str | os.PathLike, name: str, field: str) -> str:
    """The path of a regular file that lies in the folder itself. Errors begin with `field`."""
    if NO_FILE_NAME.search(name):
        raise ValueError(f"{field} is not the plain name of a file in the folder")
    path = os.path.realpath(os.path.join(folder, name))
    if os.path.dirname(path) != os.path.realpath(folder):
        raise ValueError(f"{field} is a link that leads out of the folder")
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)  # a pipe would be waited for
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{field}: there is no such file") from error
    except OSError as error:  # a link to itself, a name that is too long
        raise ValueError(f"{field} cannot be opened: {error.strerror}") from error
    if not is_file:
        raise ValueError(f"{field} is not a file")
    return path


def _read(folder: str | os.PathLike, name: str) -> SavedConversation:
    with open(_find(folder, name, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, at most {MAX_BYTES} are read")
        return _parse(file.read(MAX_BYTES))


def _parse(data: bytes) -> SavedConversation:
    """
    Raises:
        ValueError: Naming the field at fault.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        content = json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
    system = _get(content, "system", str, type(None))
    dropped_rounds, saved = _get(content, "dropped_rounds", int), _get(content, "rounds", list)
    if dropped_rounds < 0:
        raise ValueError(f"dropped_rounds is {dropped_rounds}, but cannot be negative")
    if len(saved) > MAX_ROUNDS:
        raise ValueError(f"rounds has {len(saved)} rounds, at most {MAX_ROUNDS} are read")
    rounds, num_images = [], 0
    for index, one in enumerate(saved):
        where = f"rounds[{index}]"
        fields = {"text": str, "images": list, "answer": str}
        text, names, answer = (_get(one, field, kind, where=where) for field, kind in fields.items())
        for k, name in enumerate(names):
            _check(name, f"{where}.images[{k}]", str)
        image_lines = _get({"image_lines": [], **one}, "image_lines", list, where=where)
        _check_lines(image_lines, f"{where}.image_lines", len(names), text)
        rounds.append((text, names, answer, image_lines))
        num_images += len(names)
    if num_images > MAX_IMAGES:
        raise ValueError(f"rounds has {num_images} images, at most {MAX_IMAGES} are read")
    return SavedConversation(system, dropped_rounds, rounds)


def _check_lines(image_lines: list, field: str, num_images: int, text: str) -> None:
    """Raises a `ValueError` unless each image has its number of lines before it, of those of the text, in order."""
    if image_lines and len(image_lines) != num_images:
        raise ValueError(f"{field} has {len(image_lines)} numbers for {num_images} images")
    least, most = 0, text.count("\n") + 1
    for k, line in enumerate(image_lines):
        _check(line, f"{field}[{k}]", int)
        if not least <= line <= most:
            raise ValueError(f"{field}[{k}] is {line}: expected {least} to {most}, the lines of the text")
        least = line


def _get(record: dict, field: str, *kinds: type, where: str = ""):
    """A field of a JSON object, which stands at `where` in the file."""
    _check(record, where or "it", dict)
    name = f"{where}.{field}" if where else field
    if field not in record:
        raise ValueError(f"{name} is missing")
    _check(record[field], name, *kinds)
    return record[field]


def _check(value, field: str, *kinds: type) -> None:
    if type(value) not in kinds:  # in JSON, true is no integer
        expected = " or ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"{field} must be {expected}, got {reprlib.repr(value)}")
    if isinstance(value, str):
        check_characters(value, field)
        if len(value) > MAX_TEXT_LENGTH:
            raise ValueError(f"{field} has {len(value)} characters, at most {MAX_TEXT_LENGTH} are read")
