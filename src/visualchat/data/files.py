# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Reads the raw files of the sources in `sources.py`: their records, and where the images inside JSON files are."""

import csv
import itertools
import json
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from visualchat.data.checks import InvalidExample, Problem
from visualchat.data.json_examples import parse_object, read_values


# One entry of {"id": "base64", …}. Base64 contains no quotes, so the string ends at the next one
ENTRY = re.compile(rb'\s*[{,]\s*"([^"\\]*)"\s*:\s*("[^"]*")')
END = re.compile(rb"\s*\{?\s*\}\s*\Z")


@dataclass(frozen=True)
class RawFile:
    """
    A file of records: a JSON list of objects, a JSON object of objects, JSON Lines (`.jsonl`), or CSV with a header
    (`.csv`).

    Args:
        path (`str`): Path relative to the data root.
        inside (`str`, *optional*): The field of the file that contains the records. By default the file is the records.
        id (`str`): The field of a record with its id, if the records are a list. A record without it is known by its index.
            Records of JSON Lines and CSV are known by their lines.
        columns (`tuple[tuple[str, ...], ...]`): Columns that a CSV file must have. Each is given with its other names.
    """

    path: str
    inside: str | None = None
    id: str = "id"
    columns: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Record:
    """
    A record of a raw file. `key` is its index in a list, its key in an object, or its first line in JSON Lines and CSV, as
    `line 3`, counted from 1; `id_field` is the field of its id.
    """

    file: str
    key: str
    id: str
    value: dict
    id_field: str


def find_one(root: Path, files: tuple[RawFile, ...]) -> RawFile:
    """
    The one of `files` that is there.

    Raises:
        FileNotFoundError: If none is there. If there is one in a folder below, it is named.
        ValueError: If several are there.
    """
    present = [raw for raw in files if (root / raw.path).exists()]
    if len(present) > 1:
        raise ValueError(f"{root} contains {' and '.join(raw.path for raw in present)}: keep one of them")
    if not present:
        below = sorted(path for raw in files for depth in ("*", "*/*") for path in root.glob(f"{depth}/{raw.path}"))
        hint = f"; but there is {below[0]}, so take {below[0].parent}" if below else ""
        raise FileNotFoundError(f"{root} contains no {' and no '.join(raw.path for raw in files)}{hint}")
    return present[0]


def read_records(root: Path, raw: RawFile, report: Callable[[Problem], None]) -> list[Record]:
    """
    The records of a file, in its order. A record that is no object is reported and dropped; so is one with the key of an
    earlier record of the same object. In a list, several records may have one id; see [`~visualchat.data.formats.Context`].

    Raises:
        ValueError: If the file is not JSON, or contains no records where they should be; or if a CSV file lacks a column.
    """
    if raw.path.endswith((".jsonl", ".csv")):
        return _read_lines(root, raw, report)
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


def _read_lines(root: Path, raw: RawFile, report: Callable[[Problem], None]) -> list[Record]:
    """As [`read_records`], of JSON Lines or CSV."""
    path, records, is_empty = root / raw.path, [], True
    for key, value in _parse_csv(path, raw.columns) if raw.path.endswith(".csv") else _parse_json_lines(path):
        is_empty = False
        if isinstance(value, dict):
            records.append(Record(raw.path, key, key, value, "record"))
        else:
            report(Problem(value.kind, raw.path, key, value.field, value.detail))
    if is_empty:
        raise ValueError(f"{path}: there are no examples in it")
    return records


def _parse_json_lines(path: Path) -> Iterator[tuple[str, dict | InvalidExample]]:
    """The key of each record, and its value or what is wrong with it."""
    values = read_values(path)
    while True:
        try:
            key, value = next(values)
        except StopIteration:
            return
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        try:
            yield key, parse_object(value, "record")
        except InvalidExample as bad:
            yield key, bad


def _parse_csv(path: Path, needed: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, dict | InvalidExample]]:
    """As [`_parse_json_lines`]. A value that a line lacks at its end is an empty text."""
    lines = _split_csv(path)
    key, columns = next(lines, ("", []))
    if isinstance(columns, InvalidExample):
        raise ValueError(f"{path}, {key}: {columns.detail}")
    present = ", ".join(map(repr, columns)) or "none"
    for names in needed:
        if not set(names).intersection(columns):
            raise ValueError(f"{path}: there is no column {' or '.join(map(repr, names))}; the columns are {present}")
    if any(name and columns.count(name) > 1 for name in columns):
        raise ValueError(f"{path}: two columns have the same name; the columns are {present}")
    for key, values in lines:
        if not isinstance(values, InvalidExample):
            if any(values[len(columns) :]):
                detail = f"it has {len(values)} values for {len(columns)} columns: a text with commas needs quotes"
                values = InvalidExample("unreadable example", "record", detail)
            else:
                values = dict(itertools.zip_longest(columns, values[: len(columns)], fillvalue=""))
        yield key, values


def _split_csv(path: Path) -> Iterator[tuple[str, list[str] | InvalidExample]]:
    """The values of each line that is not blank, the header's too, or what is wrong with the line."""
    # A byte that is not UTF-8 becomes half a surrogate pair. So its line is named, and the others are read
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                values = next(reader)
                "".join(values).encode()
            except StopIteration:
                return
            except (csv.Error, UnicodeEncodeError) as error:
                lines = f" in lines {first} to {reader.line_num}" if reader.line_num > first else ""
                fault = f"it is no CSV: {error}{lines}" if isinstance(error, csv.Error) else "it is not in UTF-8"
                values = InvalidExample("unreadable example", "record", fault)
            if values:
                yield f"line {first}", values


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
