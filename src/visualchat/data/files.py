# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Reads the raw JSON files of the sources in `data_sources.py`, row by row, and finds pictures within them."""

import json
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visualchat.data.checks import Problem


# One entry of {"id": "base64", …}. Base64 holds no quotes, so the string ends at the next one
ENTRY = re.compile(rb'\s*[{,]\s*"([^"\\]*)"\s*:\s*("[^"]*")')
END = re.compile(rb"\s*\{?\s*\}\s*\Z")


@dataclass(frozen=True)
class RawFile:
    """
    A JSON file with one row after the other: a list of objects, or an object of objects.

    Args:
        path (`str`): Relative to the data root.
        inside (`str`, *optional*): The field of the file that holds the rows. Defaults to the whole file.
        id (`str`): The field of a row that names it, where the rows form a list. Rows without one go by their index.
    """

    path: str
    inside: str | None = None
    id: str = "id"


@dataclass(frozen=True)
class Record:
    """A row as it stands in a raw file; `row` is its index or key."""

    file: str
    row: str
    id: str
    value: dict


def read_records(root: Path, raw: RawFile, report: Callable[[Problem], None]) -> list[Record]:
    """
    The rows of a file, in its order. Rows that are no objects, and all but the first with the same id, are reported and
    dropped.

    Raises:
        ValueError: If the file is not JSON, or holds no rows where they should be.
    """
    value, repeated = _load_json(root / raw.path)
    if raw.inside is not None:
        if not isinstance(value, dict) or raw.inside not in value:
            raise ValueError(f"{root / raw.path}: expected an object with the field {raw.inside!r}")
        value = value[raw.inside]
    if isinstance(value, dict):
        for keys in (keys for one, keys in repeated if one is value):
            for key in keys:
                report(Problem("duplicate id", raw.path, key, "key", f"the file has the key {key!r} more than once"))
        named = [(key, key, row) for key, row in value.items()]
    elif isinstance(value, list):
        ids = [row.get(raw.id) if isinstance(row, dict) else None for row in value]
        named = [(str(index), str(index if ids[index] is None else ids[index]), row) for index, row in enumerate(value)]
    else:
        raise ValueError(f"{root / raw.path}: expected a list or an object of rows, got {type(value).__name__}")

    records: dict[str, Record] = {}
    for row, identity, content in named:
        if not isinstance(content, dict):
            report(Problem("missing field", raw.path, row, "row", f"expected an object, got {content!r:.80}"))
        elif identity in records:
            first = records[identity].row
            report(Problem("duplicate id", raw.path, row, raw.id, f"{identity!r} is the id of row {first} too"))
        else:
            records[identity] = Record(raw.path, row, identity, content)
    return list(records.values())


def _load_json(path: Path) -> tuple[dict | list, list[tuple[dict, list[str]]]]:
    """The content of a file, and for every object in it that has a key more than once, the object and these keys."""
    repeated = []

    def build(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            value, keys = {}, []
            for key, item in pairs:
                if key in value:
                    keys.append(key)
                value.setdefault(key, item)
            repeated.append((value, keys))
        return value

    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=build), repeated
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): was the download complete?") from error


def index_pictures(root: Path, path: str, report: Callable[[Problem], None]) -> dict[str, tuple[int, int]]:
    """
    Where a JSON file of the form `{"id": "base64", …}` holds each picture, without loading it: such files have gigabytes.

    Returns:
        For every id the first byte and the last byte + 1 of its string, quotes included.
    """
    spans: dict[str, tuple[int, int]] = {}
    with open(root / path, "rb") as file:
        if file.seek(0, 2) == 0:
            raise ValueError(f"{root / path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            position = 0
            while match := ENTRY.match(data, position):
                position = match.end()
                name = match[1].decode()
                if name in spans:
                    report(Problem("duplicate id", path, name, "key", f"the file has the key {name!r} more than once"))
                else:
                    spans[name] = match.span(2)
            if not END.match(data, position):
                raise ValueError(
                    f'{root / path}: expected \'"id": "base64"\' or the end at byte {position}: was the download complete?'
                )
    return spans
