# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The parallel step of `prepare_data.py`: pictures are decoded, and rows written in shards, each whole or not there."""

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
from data_checks import Picture, Problem, inspect_picture, read_picture
from data_rows import Sample


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


@dataclass(frozen=True)
class Shard:
    """
    Work for one process.

    Args:
        source (`str`): Name of the source.
        rows (`list[list[Sample]]`): The samples that each row joins.
        min_side (`int`): Samples with a picture of fewer pixels a side are left out.
        embed_images (`bool`): Whether rows hold the bytes of all pictures, or paths of those that are files.
        parquet (`Path`, *optional*): Where to write. Without it, rows are only checked.
        report (`Path`, *optional*): Where to write what became of the shard, once the shard is there.
    """

    source: str
    rows: list[list[Sample]]
    min_side: int
    embed_images: bool = False
    parquet: Path | None = None
    report: Path | None = None


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


def make_shard(shard: Shard) -> Report:
    """
    Checks the pictures of a shard and writes its good samples. A sample with a bad picture is dropped, and a row only if
    none of its samples is good.
    """
    report, rows = Report(len(shard.rows)), []
    for samples in shard.rows:
        good = [sample for sample in samples if _check_sample(sample, shard.min_side, report)]
        if good:
            rows.append(make_row(good, shard.source, shard.embed_images))
            report.counts["samples"] += len(good)
            report.counts["rounds"] += len(rows[-1]["messages"]) // 2
            report.counts["images"] += len(rows[-1]["images"])
    report.counts["rows"] = len(rows)
    if shard.parquet is not None:
        temporary = shard.parquet.with_name(f".{shard.parquet.name}.{os.getpid()}")
        datasets.disable_progress_bars()  # of the single file; there is one over all shards
        datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(temporary)
        os.replace(temporary, shard.parquet)
        report.write(shard.report)
    return report


def _check_sample(sample: Sample, min_side: int, report: Report) -> bool:
    is_good = True
    for picture in (picture for one in sample.rounds for picture in one.pictures):
        size, kind, detail = inspect_picture(picture.path, picture.span)
        if size is None:
            report.problems.append(Problem(kind, sample.file, sample.row, picture.field, detail))
            is_good = False
        elif min(size) < min_side and is_good:
            report.left_out[f"samples whose image has fewer than {min_side} pixels a side"] += 1
            return False
    return is_good


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
    if embed_images:
        return {"bytes": read_picture(picture.path, None), "path": os.path.basename(picture.path)}
    return {"bytes": None, "path": picture.path}


def run_shards(shards: list[Shard], num_proc: int) -> Iterator[Report]:
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
