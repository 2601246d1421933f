# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The parallel step of `visualchat prepare`: pictures are decoded, and rows written in shards, each whole or not there."""

import io
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
from PIL import Image

from modeling_visualchat.image_loading_visualchat import find_path, load_image
from visualchat.data.checks import (
    Needs,
    Picture,
    Problem,
    inspect,
    inspect_picture,
    judge_size,
    open_row,
    read_picture,
)
from visualchat.data.rows import Sample


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "messages": datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
            }
        ),
        "images": datasets.List(datasets.Image()),
    }
)
# What the feature Image writes of a picture is its path alone, if there is such a file where the program runs
AS_GIVEN = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})


@dataclass
class Report:
    """What became of a shard: its problems, and counts of what it holds and leaves out."""

    planned_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)

    def write(self, path: Path) -> None:
        values = {**vars(self), "problems": [asdict(problem) for problem in self.problems]}
        write_whole(path, json.dumps(values, ensure_ascii=False, indent=1))

    @classmethod
    def read(cls, path: Path) -> "Report":
        values = json.loads(path.read_text(encoding="utf-8"))
        problems = [Problem(**problem) for problem in values["problems"]]
        return cls(values["planned_rows"], problems, Counter(values["left_out"]), Counter(values["counts"]))


def write_whole(path: Path, text: str) -> None:
    """A file that is whole or not there, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@dataclass(frozen=True)
class Shard:
    """
    Work for one process.

    Args:
        name (`str`): Of the source or dataset.
        rows (`list[list[Sample]]` or `datasets.Dataset`): What rows are made of: the samples that each joins, or rows.
        needs ([`Needs`]): Of the model that is to be trained.
        embed_images (`bool`): Whether rows hold the bytes of all pictures, or paths of those that are files.
        parquet (`Path`, *optional*): Where to write. Without it, rows are only checked.
        report (`Path`, *optional*): Where to write what became of the shard, once the shard is there.
    """

    name: str
    rows: list[list[Sample]] | datasets.Dataset
    needs: Needs = field(default=Needs(), kw_only=True)
    embed_images: bool = field(default=False, kw_only=True)
    parquet: Path | None = field(default=None, kw_only=True)
    report: Path | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class SourceShard(Shard):
    """
    Rows of a source. A sample with a bad picture is dropped, and a row only if none of its samples is good.

    Args:
        min_side (`int`): Samples with a picture of fewer pixels a side are left out.
    """

    min_side: int
    features = FEATURES

    def make_rows(self, report: Report) -> Iterator[dict]:
        """The good rows."""
        for samples in self.rows:
            good = [sample for sample in samples if self._check(sample, report)]
            if good:
                report.counts["samples"] += len(good)
                yield make_row(good, self.name, self.embed_images)

    def _check(self, sample: Sample, report: Report) -> bool:
        is_good = True
        for picture in (picture for one in sample.rounds for picture in one.pictures):
            size, kind, detail = inspect_picture(Path(picture.path), picture.span)
            if size is not None:
                kind, detail = judge_size(size, self.needs)
            if kind:
                report.problems.append(Problem(kind, sample.file, sample.row, picture.field, detail))
                is_good = False
            elif min(size) < self.min_side and is_good:
                report.left_out[f"samples whose image has fewer than {self.min_side} pixels a side"] += 1
                return False
        return is_good


@dataclass(frozen=True)
class DatasetShard(Shard):
    """
    Rows of a dataset in the schema, written as they are.

    Args:
        numbers (`list[int]`): Which row of the dataset each one is, counted from 0.
        repeated (`dict[int, int]`): For those whose id an earlier row of the dataset has, the first that has it.
    """

    numbers: list[int]
    repeated: dict[int, int]

    @property
    def features(self) -> datasets.Features:
        return self.rows.features

    def make_rows(self, report: Report) -> Iterator[dict]:
        """The good rows."""
        for number, row in zip(self.numbers, self.rows):
            if self._check(number, row, report):
                report.counts["samples"] += 1
                yield {**row, "images": [self._make_cell(image) for image in row.get("images") or []]}

    def _check(self, number: int, row: dict, report: Report) -> bool:
        problems = []
        if number in self.repeated:
            detail = f"{row['id']!r} is the id of row {self.repeated[number]} too"
            problems.append(Problem("duplicate id", self.name, str(number), "id", detail))
        _, faults = open_row(row, self.needs, inspect)
        problems += [Problem(fault.kind, self.name, str(number), fault.field, fault.detail) for fault in faults]
        report.problems += problems
        return not problems

    def _make_cell(self, image: dict) -> dict:
        return image if image["bytes"] is not None else make_cell(Picture(image["path"], "images"), self.embed_images)


def make_shard(shard: SourceShard | DatasetShard) -> Report:
    """Checks the rows of a shard with their pictures and writes the good ones."""
    report, rows = Report(len(shard.rows)), []
    for row in shard.make_rows(report):
        rows.append(row)
        report.counts["rounds"] += len(row["messages"]) // 2
        report.counts["images"] += len(row["images"])
    report.counts["rows"] = len(rows)
    if shard.parquet is not None:
        temporary = shard.parquet.with_name(f".{shard.parquet.name}.{os.getpid()}")
        datasets.disable_progress_bars()  # of the single file; there is one over all shards
        features = datasets.Features({**shard.features, "images": AS_GIVEN})
        written = datasets.Dataset.from_list(rows, features=features).cast_column("images", FEATURES["images"])
        written.to_parquet(temporary)
        os.replace(temporary, shard.parquet)
        report.write(shard.report)
    return report


def make_row(samples: list[Sample], source: str, embed_images: bool) -> dict:
    """One conversation in the schema. Images follow each other; the chat template numbers them."""
    messages, images = [], []
    for one in (one for sample in samples for one in sample.rounds):
        parts = [{"type": "image", "text": None} for _ in one.pictures] + [{"type": "text", "text": one.question}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": one.answer}]})
        images += [make_cell(picture, embed_images) for picture in one.pictures]
    return {"id": "+".join(sample.id for sample in samples), "source": source, "messages": messages, "images": images}


def make_cell(picture: Picture, embed_images: bool) -> dict:
    if picture.span is not None:
        return {"bytes": read_picture(picture.path, picture.span), "path": None}
    path = find_path(picture.path)
    if path is None or not os.path.isfile(path):  # a URL, or base64: datasets writes no path that it cannot open
        return {"bytes": encode_png(load_image(picture.path)), "path": None}
    if embed_images:
        return {"bytes": read_picture(path, None), "path": os.path.basename(path)}
    return {"bytes": None, "path": path}


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def run_shards(shards: list[SourceShard | DatasetShard], num_proc: int) -> Iterator[Report]:
    """The reports, in the order in which the shards become ready."""
    inspect_picture.cache_clear()  # pictures may have been mended since an earlier call
    if num_proc == 1 or len(shards) < 2:
        yield from map(make_shard, shards)
        return
    with ProcessPoolExecutor(min(num_proc, len(shards)), initializer=_end_with_parent) as pool:
        futures = [pool.submit(make_shard, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Workers wait for work for ever if the main process is killed, unless they watch it."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
