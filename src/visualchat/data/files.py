# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Reads the raw JSON files of the sources in `sources.py`: their records, and where the images inside them are."""

import json
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visualchat.data.checks import Problem


# One entry of {"id": "base64", …}. Base64 contains no quotes, so the string ends at the next one
ENTRY = re.compile(rb'\s*[{,]\s*"([^"\\]*)"\s*:\s*("[^"]*")')
END = re.compile(rb"\s*\{?\s*\}\s*\Z")


@dataclass(frozen=True)
class RawFile:
    """
    A JSON file of records: a list of objects, or an object of objects.

    Args:
        path (`str`): Path relative to the data root.
        inside (`str`, *optional*): The field of the file that contains the records. By default the file is the records.
        id (`str`): The field of a record with its id, if the records are a list. A record without it is known by its index.
    """

    path: str
    inside: str | None = None
    id: str = "id"


@dataclass(frozen=True)
class Record:
    """A record of a raw file. `key` is its index in a list, or its key in an object; `id_field` is the field of its id."""

    file: str
    key: str
    id: str
    value: dict
    id_field: str


def read_records(root: Path, raw: RawFile, report: Callable[[Problem], None]) -> list[Record]:
    """
    The records of a file, in its order. A record that is no object is reported and dropped; so is one with the key of an
    earlier record of the same object. In a list, several records may have one id; see [`~visualchat.data.formats.Context`].

    Raises:
        ValueError: If the file is not JSON, or contains no records where they should be.
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
        named = [(key, key, record) for key, record in value.items()]
    elif isinstance(value, list):
        ids = [record.get(raw.id) if isinstance(record, dict) else None for record in value]
        named = [(str(k), str(k if ids[k] is None else ids[k]), record) for k, record in enumerate(value)]
    else:
        raise ValueError(f"{root / raw.path}: expected a list or an object of records, got {type(value).__name__}")

    records = []
    for key, identity, content in named:
        if isinstance(content, dict):
            records.append(Record(raw.path, key, identity, content, raw.id))
        else:
            report(Problem("missing field", raw.path, key, "record", f"expected an object, got {content!r:.80}"))
    return records


def _load_json(path: Path) -> tuple[dict | list, list[tuple[dict, list[str]]]]:
    """The content of a file; and every object in it that has a key more than once, with these keys."""
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): was the download complete?") from error


def index_images(root: Path, path: str, report: Callable[[Problem], None]) -> dict[str, tuple[int, int]]:
    """
    Finds each image in a JSON file of the form `{"id": "base64", …}` without loading the file, which may have gigabytes.

    Returns:
        For every id the first byte and the last byte + 1 of its string, with the quotes.
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
