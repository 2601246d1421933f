# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Checks training data and turns the paper's training data, and own images with captions, into examples with `messages` and
`images`: `visualchat prepare`. It checks and writes any dataset that has these columns already, too.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm
from transformers import AutoProcessor, PreTrainedConfig

from modeling_visualchat import VisualChatConfig
from modeling_visualchat.image_loading_visualchat import shorter_edge
from modeling_visualchat.joining_visualchat import check_parts
from visualchat.data.checks import ModelRequirements, Problem, summarize
from visualchat.data.formats import Context, Sample
from visualchat.data.shards import DatasetShard, Report, SourceShard, run_shards, write_atomically
from visualchat.data.sources import OWN_SOURCES, SOURCES, open_source
from visualchat.errors import input_errors
from visualchat.loading import load_image_processor
from visualchat.training.dataset import load_examples


CARD = """\
---
configs:
- config_name: default
  data_files: shard-*.parquet
---

{rows} conversations of `{name}`, with {images} images and {rounds} rounds, made by VisualChat's
`visualchat prepare`. The settings are in `prepared.json`. Images are stored {storage}.
"""


@dataclass
class Plan:
    """
    The work for one source or dataset.

    Args:
        name (`str`): The name of its folder.
        shards (`list[SourceShard]` or `list[DatasetShard]`): The work in parts. Paths to write to are not set yet.
        origin (`dict`): The settings that describe the source or dataset.
        content (`Iterable`): The examples that the settings keep a digest of.
        storage (`str`): Where the images are stored, unless they are embedded. The dataset card says it.
        problems (`list[Problem]`): Problems that were found when the texts were read.
        left_out (`Counter`): What was left out then, by reason.
    """

    name: str
    shards: list[SourceShard] | list[DatasetShard]
    origin: dict
    content: Iterable
    storage: str
    problems: list[Problem] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def load_requirements(model: str | None) -> ModelRequirements:
    """
    What a model requires of its examples. `model` is a VisualChat model, or the vision tower of one.

    Raises:
        ValueError: If it is neither.
    """
    if model is None:
        return ModelRequirements()
    config, _ = PreTrainedConfig.get_config_dict(model)
    if config.get("model_type") != VisualChatConfig.model_type:
        try:
            check_parts(model, None)
        except TypeError as error:
            raise ValueError(f"--model takes a VisualChat or its tower: {error}") from error
        return ModelRequirements(shorter_edge=shorter_edge(load_image_processor(model)))
    return ModelRequirements.of(AutoProcessor.from_pretrained(model), VisualChatConfig.from_dict(config))


def plan_source(name: str, options: argparse.Namespace) -> Plan:
    """Reads and checks the texts of a source, and divides its examples into shards."""
    context = open_source(name, options.data_root, options.seed)
    examples = plan_examples(context, options.max_samples)
    size = options.rows_per_shard
    return Plan(
        name,
        [
            SourceShard(name, examples[k : k + size], context.source.min_side, requirements=options.requirements)
            for k in range(0, len(examples), size)
        ],
        {
            "source": name,
            "data_root": str(context.root),
            **{f"bytes of {raw.path}": os.path.getsize(context.root / raw.path) for raw in context.source.files},
        },
        examples,
        "in the parquet files" if context.source.images.endswith(".json") else "as paths on the machine that made the data",
        context.problems,
        context.left_out,
    )


def plan_dataset(name: str, options: argparse.Namespace) -> Plan:
    """
    Opens a dataset as `visualchat train` does, and divides its examples into shards. Their order stays.

    Raises:
        ValueError: If the dataset cannot be read.
    """
    dataset = load_examples(name)
    numbers = list(range(len(dataset)))
    if options.max_samples is not None and options.max_samples < len(dataset):
        numbers = sorted(random.Random(f"{options.seed}-{name}").sample(numbers, options.max_samples))
    groups = [numbers[k : k + options.rows_per_shard] for k in range(0, len(numbers), options.rows_per_shard)]
    repeated = find_repeated_ids(dataset, numbers)
    path = Path(name)
    return Plan(
        path.stem if path.suffix in (".parquet", ".json", ".jsonl") else path.name,
        [
            DatasetShard(
                name,
                dataset.select(group),
                group,
                {k: repeated[k] for k in group if k in repeated},
                dataset,
                requirements=options.requirements,
            )
            for group in groups
        ],
        {"dataset": name, "bytes of the rows": dataset.data.nbytes},
        dataset.select_columns([column for column in ("id", "messages") if column in dataset.features]),
        "as in the dataset: in the parquet files, or as paths",
    )


def find_repeated_ids(dataset: Dataset, numbers: list[int]) -> dict[int, list[int]]:
    """
    Looks for repeated ids among the examples with the indices `numbers`. A null is no id.

    Returns:
        For each example whose id an earlier one has, the indices of all examples with that id, in ascending order.
    """
    ids = dataset.select(numbers)["id"][:] if "id" in dataset.features else []
    same = defaultdict(list)
    for number, identity in zip(numbers, ids):
        if identity is not None:
            same[identity].append(number)
    return {number: examples for examples in same.values() for number in examples[1:]}


def plan_examples(context: Context, max_samples: int | None) -> list[list[Sample]]:
    """The samples that each example joins: one to `concatenate` of them, drawn in random order, each sample once."""
    samples = list(context.source.samples(context))
    draw = random.Random(f"{context.seed}-{context.name}")
    draw.shuffle(samples)
    examples, start = [], 0
    while start < len(samples) and (max_samples is None or len(examples) < max_samples):
        stop = start + draw.randint(1, context.source.concatenate)
        examples.append(samples[start:stop])
        start = stop
    return examples


def describe_settings(plan: Plan, options: argparse.Namespace) -> dict:
    """Everything that the result depends on. Two runs with the same settings write the same shards."""
    digest = hashlib.sha256()
    for example in plan.content:
        digest.update(repr(example).encode())
    return {
        **plan.origin,
        "seed": options.seed,
        "max_samples": options.max_samples,
        "rows_per_shard": options.rows_per_shard,
        "embed_images": options.embed_images,
        **({"needs": asdict(options.requirements)} if options.model else {}),
        "sha256 of the planned rows": digest.hexdigest(),
    }


def check_settings(settings: dict, path: Path) -> dict:
    """
    The content of the file at `path`.

    Raises:
        ValueError: If the settings in the file differ. They are named, with both values.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = content["settings"]
    names = [name for name in {**settings, **kept} if settings.get(name) != kept.get(name)]
    if names:
        differences = "; ".join(f"{name} was {kept.get(name)}, now {settings.get(name)}" for name in names)
        raise ValueError(f"{path.parent} was made with other settings: {differences}. Use those, or pass --overwrite")
    return content


def prepare(plan: Plan, options: argparse.Namespace) -> int:
    """Prepares or checks one source or dataset. Returns the exit status."""
    name = plan.name
    if options.check:
        problems, _, _ = collect_results(plan, run_with_progress(plan.shards, [], options.num_proc, f"{name}: checking"))
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            write_problems(options.output / f"{name}.problems.jsonl", problems)
        return 1 if problems else 0

    final, partial = options.output / name, options.output / f"{name}.partial"
    settings = describe_settings(plan, options)
    if final.exists() and not (final / "prepared.json").exists():
        raise ValueError(f"{final} exists, but was not made by this program: use another --output")
    if final.exists() and not options.overwrite:
        dropped = sum(check_settings(settings, final / "prepared.json")["problems"].values())
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{name}: {final} is complete; {dropped} problems, see problems.jsonl there")
        return 1 if dropped and not options.skip_bad else 0
    start_partial_folder(partial, settings, options.overwrite)

    shards, done = [], []
    for index, shard in enumerate(plan.shards):
        label = f"shard-{index:05d}-of-{len(plan.shards):05d}"
        parquet, report = partial / "shards" / f"{label}.parquet", partial / "reports" / f"{label}.json"
        earlier = Report.read(report) if report.exists() and parquet.exists() else None
        if earlier and (options.skip_bad or not earlier.problems):  # else the images may have been repaired
            done.append(earlier)
        else:
            shards.append(replace(shard, embed_images=options.embed_images, parquet=parquet, report=report))
    reports = run_with_progress(shards, done, options.num_proc, f"{name}: preparing")
    problems, left_out, counts = collect_results(plan, reports)
    write_problems(partial / "shards" / "problems.jsonl", problems)
    if problems and not options.skip_bad:
        print(
            f"{name}: not finished. Repair the data and run again, or drop the bad examples with --skip-bad", file=sys.stderr
        )
        print(f"{name}: all problems are listed in {partial / 'shards' / 'problems.jsonl'}", file=sys.stderr)
        return 1
    if not counts["rows"]:
        raise ValueError(f"{name}: there are no examples to write")

    kinds = Counter(problem.kind for problem in problems)
    summary = {"settings": settings, **counts, "shards": len(plan.shards), "problems": kinds, "left_out": left_out}
    write_atomically(partial / "shards" / "prepared.json", json.dumps(summary, indent=1, ensure_ascii=False))
    storage = "in the parquet files" if options.embed_images else plan.storage
    write_atomically(partial / "shards" / "README.md", CARD.format(name=name, storage=storage, **counts))
    publish(partial, final)
    print(f"{name}: {counts['rows']} examples, {counts['rounds']} rounds, {counts['images']} images in {final}")
    return 0


def start_partial_folder(partial: Path, settings: dict, overwrite: bool) -> None:
    """Makes the folder for unfinished work. A run with the same settings that was interrupted is resumed in its folder."""
    if (partial / "settings.json").exists():
        try:
            check_settings(settings, partial / "settings.json")
        except ValueError:
            if not overwrite:
                raise
            shutil.rmtree(partial)
    for folder in ("shards", "reports"):
        (partial / folder).mkdir(parents=True, exist_ok=True)
    write_atomically(partial / "settings.json", json.dumps({"settings": settings}, indent=1))


def publish(partial: Path, final: Path) -> None:
    """Moves the finished shards to their final folder in one step. It replaces an earlier folder."""
    for leftover in (partial / "shards").glob(".*"):  # temporary files of a run that was killed
        leftover.unlink()
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial / "shards", final)
    shutil.rmtree(partial)


def run_with_progress(
    shards: list[SourceShard] | list[DatasetShard], done: list[Report], num_proc: int, label: str
) -> list[Report]:
    """Runs the shards with a progress bar that counts examples. The reports in `done`, of an earlier run, come first."""
    reports, finished = list(done), sum(report.planned_rows for report in done)
    total = finished + sum(len(shard.inputs) for shard in shards)
    with tqdm(total=total, initial=finished, desc=label, unit="example") as bar:
        for report in run_shards(shards, num_proc):
            reports.append(report)
            bar.update(report.planned_rows)
    return reports


def collect_results(plan: Plan, reports: list[Report]) -> tuple[list[Problem], Counter, dict[str, int]]:
    """Joins the reports and prints them: problems in the order of file, example and field, what was left out, and counts."""
    problems = plan.problems + [problem for report in reports for problem in report.problems]
    problems.sort(key=lambda problem: (problem.file, problem.row.zfill(12), problem.field, problem.kind))
    left_out = sum((report.left_out for report in reports), plan.left_out)
    counts = {name: sum(report.counts[name] for report in reports) for name in ("rows", "samples", "rounds", "images")}
    print(f"{plan.name}: {summarize(problems, left_out)}", flush=True)
    return problems, left_out, counts


def write_problems(path: Path, problems: list[Problem]) -> None:
    write_atomically(path, "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems))


def list_sources() -> None:
    for title, sources, mark in (("The paper's data", SOURCES, ", "), ("Data of your own", OWN_SOURCES, " or ")):
        print(f"{title}, with paths relative to --data-root:")
        for name, source in sources.items():
            joined = f", 1 to {source.concatenate} joined" if source.concatenate > 1 else ""
            print(f"{name:<20}{source.about}{joined}\n{'':<20}  records: {mark.join(raw.path for raw in source.files)}")
            print(f"{'':<20}  images:  {source.images}")


def run(options: argparse.Namespace) -> int:
    """The exit status of `visualchat prepare` with these options."""
    if options.list:
        list_sources()
        return 0
    with input_errors():
        options.requirements = load_requirements(options.model)
        statuses = []
        for plan_one, names in ((plan_source, options.source), (plan_dataset, options.dataset)):
            for name in names or []:
                print(f"{name}: reading", flush=True)
                statuses.append(prepare(plan_one(name, options), options))
    return max(statuses)
