# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The parallel step of `visualchat prepare`: it decodes the images and writes the examples, one shard after the other."""

import io
import itertools
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
    UNREADABLE,
    ImageReference,
    InvalidExample,
    ModelRequirements,
    Problem,
    check_example,
    check_image_size,
    inspect_image,
    inspect_image_file,
    read_image_bytes,
)
from visualchat.data.formats import Sample


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
# `datasets.Image` would write the path alone where such a file exists on this machine, even if there are bytes
ENCODED_IMAGES = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})


@dataclass
class Report:
    """The result of a shard, also written as JSON: its problems, and counts of what it contains and leaves out."""

    planned_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)

    def write(self, path: Path) -> None:
        values = {**vars(self), "problems": [asdict(problem) for problem in self.problems]}
        write_atomically(path, json.dumps(values, ensure_ascii=False, indent=1))

    @classmethod
    def read(cls, path: Path) -> "Report":
        values = json.loads(path.read_text(encoding="utf-8"))
        problems = [Problem(**problem) for problem in values["problems"]]
        return cls(values["planned_rows"], problems, Counter(values["left_out"]), Counter(values["counts"]))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is complete or does not exist, even if the process is killed meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@dataclass(frozen=True)
class Shard:
    """
    Work for one process.

    Args:
        name (`str`): The name of the source or dataset.
        inputs (`list[list[Sample]]` or `datasets.Dataset`): What each example is made of: the samples that it joins, or the
            example of the dataset.
        requirements ([`ModelRequirements`]): What the model requires that will be trained.
        embed_images (`bool`): Whether the bytes of all images are written, or the paths of those that are files.
        parquet (`Path`, *optional*): Where the examples are written. Without it, they are only checked.
        report (`Path`, *optional*): Where the report is written, after the shard.
    """

    name: str
    inputs: list[list[Sample]] | datasets.Dataset
    requirements: ModelRequirements = field(default=ModelRequirements(), kw_only=True)
    embed_images: bool = field(default=False, kw_only=True)
    parquet: Path | None = field(default=None, kw_only=True)
    report: Path | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class SourceShard(Shard):
    """
    Examples of a source. A sample with a broken image is dropped; an example is dropped if no sample of it is left.

    Args:
        min_side (`int`): Samples with an image of fewer pixels in width or height are left out.
    """

    min_side: int
    features = FEATURES

    def make_examples(self, report: Report) -> Iterator[dict]:
        """The valid examples. Problems go to the report."""
        for samples in self.inputs:
            good = [sample for sample in samples if self._check(sample, report)]
            if good:
                report.counts["samples"] += len(good)
                yield make_example(good, self.name, self.embed_images)

    def _check(self, sample: Sample, report: Report) -> bool:
        is_good = True
        for image in (image for one in sample.rounds for image in one.images):
            size, kind, detail = inspect_image_file(Path(image.path), image.span)
            if size is not None:
                kind, detail = check_image_size(size, self.requirements)
            if kind:
                report.problems.append(Problem(kind, sample.file, sample.key, image.field, detail))
                is_good = False
            elif min(size) < self.min_side and is_good:
                report.left_out[f"samples whose image has fewer than {self.min_side} pixels a side"] += 1
                return False
        return is_good


@dataclass(frozen=True)
class DatasetShard(Shard):
    """
    Examples of a dataset that has `messages` and `images` already. They are written unchanged.

    Args:
        numbers (`list[int]`): The index in the dataset of each example, counted from 0.
        repeated (`dict[int, list[int]]`): For each example whose id an earlier example has, all examples with that id.
        dataset (`datasets.Dataset`): The whole dataset.
    """

    numbers: list[int]
    repeated: dict[int, list[int]]
    dataset: datasets.Dataset

    @property
    def features(self) -> datasets.Features:
        return datasets.Features({name: one for name, one in self.inputs.features.items() if name != UNREADABLE})

    def make_examples(self, report: Report) -> Iterator[dict]:
        """The valid examples. Problems go to the report."""
        for number, example in zip(self.numbers, self.inputs):
            if self._check(number, example, report):
                report.counts["samples"] += 1
                images = [self._make_image_value(image) for image in example.get("images") or []]
                yield {**{name: example[name] for name in self.features}, "images": images}

    def _check(self, number: int, example: dict, report: Report) -> bool:
        faults = self._find_faults(example)
        # The first example that can be kept. It may be of another shard, which another process checks
        earlier = itertools.takewhile(lambda one: one < number, self.repeated.get(number, []))
        kept = next((one for one in earlier if not self._find_faults(self.dataset[one])), None)
        if kept is not None:
            faults.insert(0, InvalidExample("duplicate id", "id", f"{example['id']!r} is the id of example {kept} too"))
        report.problems += [Problem(fault.kind, self.name, str(number), fault.field, fault.detail) for fault in faults]
        return not faults

    def _find_faults(self, example: dict) -> list[InvalidExample]:
        return check_example(example, self.requirements, inspect_image)[1]

    def _make_image_value(self, image: dict) -> dict:
        return (
            image
            if image["bytes"] is not None
            else make_image_value(ImageReference(image["path"], "images"), self.embed_images)
        )


def make_shard(shard: SourceShard | DatasetShard) -> Report:
    """Checks the examples of a shard with their images, and writes the valid ones."""
    report, examples = Report(len(shard.inputs)), []
    for example in shard.make_examples(report):
        examples.append(example)
        report.counts["rounds"] += len(example["messages"]) // 2
        report.counts["images"] += len(example["images"])
    report.counts["rows"] = len(examples)
    if shard.parquet is not None:
        temporary = shard.parquet.with_name(f".{shard.parquet.name}.{os.getpid()}")
        datasets.disable_progress_bars()  # those of a single file: one progress bar covers all shards
        features = datasets.Features({**shard.features, "images": ENCODED_IMAGES})
        columns = {name: [example[name] for example in examples] for name in features}
        written = datasets.Dataset.from_dict(columns, features).cast_column("images", FEATURES["images"])
        written.to_parquet(temporary)
        os.replace(temporary, shard.parquet)
        report.write(shard.report)
    return report


def make_example(samples: list[Sample], source: str, embed_images: bool) -> dict:
    """The samples as one conversation, with the columns of `FEATURES`. The chat template numbers the images."""
    messages, images = [], []
    for one in (one for sample in samples for one in sample.rounds):
        parts = [{"type": "image", "text": None} for _ in one.images] + [{"type": "text", "text": one.question}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": one.answer}]})
        images += [make_image_value(image, embed_images) for image in one.images]
    return {"id": "+".join(sample.id for sample in samples), "source": source, "messages": messages, "images": images}


def make_image_value(image: ImageReference, embed_images: bool) -> dict:
    """An image as a value of `datasets.Image`: `bytes` and `path`."""
    if image.span is not None:
        return {"bytes": read_image_bytes(image.path, image.span), "path": None}
    path = find_path(image.path)
    if path is None or not os.path.isfile(path):  # a URL, or base64: datasets writes no path that it cannot open
        return {"bytes": encode_png(load_image(image.path)), "path": None}
    if embed_images:
        return {"bytes": read_image_bytes(path, None), "path": os.path.basename(path)}
    return {"bytes": None, "path": path}


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def run_shards(shards: list[SourceShard | DatasetShard], num_proc: int) -> Iterator[Report]:
    """Runs the shards in `num_proc` processes. Yields their reports in the order in which they finish."""
    inspect_image_file.cache_clear()  # images may have been repaired since an earlier call
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
    """Ends a worker with the main process. Otherwise it would wait for work for ever after the main process was killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
