# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Examples in a JSON file. datasets reads a whole file of one schema, and reads it fast. What it gives up on is read here line
by line, so that one bad line is named and the others are used.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets.exceptions import DatasetGenerationError

from visualchat.data.checks import UNREADABLE, InvalidExample


TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "source": TEXT,
        "messages": datasets.Json(),  # of any type: the checks look at it
        "images": datasets.List({"bytes": datasets.Value("binary"), "path": TEXT}),
        UNREADABLE: {"kind": TEXT, "field": TEXT, "detail": TEXT},
    }
)


def open_json(path: str, streaming: bool = False, extra_columns: tuple[str, ...] = ()) -> datasets.Dataset:
    """
    Opens a file of JSON Lines, or of a JSON list. If datasets cannot read it, or takes `images` for something else, it is
    read line by line; so is every streamed file. The dataset then has the columns of `FEATURES`, and an example that is no
    JSON object in UTF-8, or whose `images` is no list of images, says so in the column `UNREADABLE`.

    Raises:
        ValueError: If there is no example, or a JSON list is broken. Its line is named; the caller names the file.
    """
    if not streaming and _is_utf8(path):  # which datasets checks of a file's beginning alone
        reader = logging.getLogger("datasets.packaged_modules.json.json")
        level = reader.level
        reader.setLevel(logging.CRITICAL)  # it counts the lines of a block, and not of the file
        try:
            dataset = datasets.load_dataset("json", data_files=[path], split="train")
            if holds_images(dataset.features.get("images")):
                return dataset
        # What its readers raise at broken lines, at types that change, and (the last) at a file without a line
        except (DatasetGenerationError, NotImplementedError, ValueError, StopIteration):
            pass
        finally:
            reader.setLevel(level)
    features = datasets.Features({**FEATURES, **dict.fromkeys(extra_columns, datasets.Json())})
    status = os.stat(path)
    arguments = {"path": path, "extra_columns": extra_columns, "version": (status.st_size, status.st_mtime_ns)}
    if next(generate_examples(**arguments), None) is None:
        raise ValueError("there are no examples in it")
    if streaming:
        return datasets.IterableDataset.from_generator(generate_examples, features, gen_kwargs=arguments)
    return datasets.Dataset.from_generator(generate_examples, features, gen_kwargs=arguments)


def holds_images(feature: object) -> bool:
    """Whether a column of this type (`None`: there is none) has a list of paths, URLs or encoded images in each example."""
    if feature is None or feature == datasets.Value("null"):
        return True
    if not isinstance(feature, datasets.List | datasets.LargeList):
        return False
    inner = feature.feature
    if isinstance(inner, dict):
        return set(inner) <= {"bytes", "path"}
    return isinstance(inner, datasets.Image) or inner in (TEXT, datasets.Value("large_string"), datasets.Value("null"))


def generate_examples(path: str, extra_columns: tuple[str, ...], version: object) -> Iterator[dict]:
    """
    The examples of a file with the columns of `FEATURES`. datasets keeps them until the `version` of the file is another.

    Raises:
        ValueError: If the file is a JSON list, and broken. The line is named.
    """
    for field, value in read_values(path):
        example = {**dict.fromkeys(FEATURES), "source": Path(path).name, **dict.fromkeys(extra_columns)}
        try:
            value = parse_object(value, field)
            example.update({name: value.get(name) for name in ("messages", *extra_columns)})
            example["id"] = str(value["id"]) if isinstance(value.get("id"), str | int | float) else None
            example["source"] = str(value["source"]) if "source" in value else example["source"]
            example["images"] = _read_images(value.get("images"))
        except InvalidExample as bad:
            example[UNREADABLE] = {"kind": bad.kind, "field": bad.field, "detail": bad.detail}
        yield example


def read_values(path: str | Path) -> Iterator[tuple[str, object]]:
    """
    What a file of JSON Lines, or of a JSON list, contains, each with a name: the bytes of a line, or a value of the list.

    Raises:
        ValueError: If the list is broken. Its line is named; the caller names the file.
    """
    with open(path, "rb") as file:
        if file.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
            file.seek(0)
            yield from ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
            return
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"it begins as a list, but line {error.lineno} is no JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not in UTF-8: {error.reason}") from error
    yield from ((f"entry {number}", value) for number, value in enumerate(values))


def parse_object(value: object, field: str) -> dict:
    """
    The JSON object that [`read_values`] found as the bytes of a line, or as a value.

    Raises:
        InvalidExample: If it is none. `field` is the field of the fault.
    """
    try:
        if isinstance(value, bytes):
            value = json.loads(value.decode("utf-8-sig").rstrip())
            json.dumps(value, ensure_ascii=False).encode()  # fails with half a surrogate pair, which no table can keep
    except json.JSONDecodeError as error:
        detail = f"it is no JSON from character {error.pos + 1} on: {error.msg}"
        raise InvalidExample("unreadable example", field, detail) from error
    except (ValueError, RecursionError) as error:
        raise InvalidExample("unreadable example", field, f"it is no JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise InvalidExample("unreadable example", field, f"expected a JSON object, got {value!r:.80}")
    return value


def _read_images(images: object) -> list[dict | None] | None:
    """The images of an example as what datasets' Image feature holds undecoded."""
    if images is None:
        return None
    if not isinstance(images, list):
        raise InvalidExample("missing field", "images", f"expected a list of images, got {images!r:.80}")
    read = []
    for k, image in enumerate(images):
        if isinstance(image, str):
            image = {"path": image}
        values = list(image.values()) if isinstance(image, dict) else [image]
        if not all(value is None or isinstance(value, str) for value in values):
            raise InvalidExample(
                "missing field", f"images[{k}]", f"expected a path, URL or base64 string, got {image!r:.80}"
            )
        if image is not None:
            data = image.get("bytes")
            image = {"bytes": None if data is None else data.encode(), "path": image.get("path")}
        read.append(image)
    return read


def _is_utf8(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 24):
                pass
    except UnicodeDecodeError:
        return False
    return True
