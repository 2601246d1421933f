"""
The training dataset. Before the first step, examples are loaded, checked, measured, cut to length and mixed.
`collator.py` makes batches of them.

All examples have the columns of transformers and TRL: `messages` with text and image parts, and `images` for the image
parts, in reading order. `visualchat prepare` makes such examples of the paper's sources and of own images with captions.
Any dataset with these columns can be used.
"""

import hashlib
import json
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import datasets
import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError, DatasetsError

from modeling_visualchat import VisualChatProcessor
from visualchat.data.checks import IMAGE_TYPES, UNREADABLE, InvalidExample, Problem, check_conversation
from visualchat.data.json_examples import TEXT, holds_images, open_json


logger = logging.getLogger(__name__)

UNDECODED_IMAGES = datasets.List(datasets.Image(decode=False))
IMAGE_MARKS = datasets.Features({"images": datasets.List({"path": TEXT})})
MEASURES = ("length", "num_images", "num_rounds", "dropped_rounds", "dropped_images")


def load_examples(
    name: str, streaming: bool = False, extra_columns: tuple[str, ...] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens one dataset with `messages` and `images`. Images are not decoded until a batch is made.

    Args:
        name (`str`): A folder of parquet shards (as `visualchat prepare` writes), a `.parquet`, `.json` or `.jsonl` file, a
            folder of `save_to_disk`, or a Hub id, with `:split` for another split than `train`.
        streaming (`bool`): Whether examples are read when they are needed, for data that does not fit on the disk.
        extra_columns (`tuple[str, ...]`): Further columns to keep.

    Returns:
        The dataset with the columns `source` and `messages`, and with `id`, `images`, `UNREADABLE` and the extra columns
        where it has them. An id is text, or null.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, `messages` is missing, or `images` does not contain lists of images. The dataset or
            its file is named, and the column. In a JSON file, examples that cannot be read are no error; see [`open_json`].
    """
    path = Path(name)
    try:
        dataset = _open(name, streaming, extra_columns)
    except FileNotFoundError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"{name} cannot be read: {' '.join(str(reason).split())}") from error  # in one line
    if dataset.features is None or "messages" not in dataset.features:
        raise ValueError(f"{name}: the dataset needs a column `messages` (and `images`), got {list(dataset.features or [])}")
    if "images" in dataset.features:
        if not holds_images(images := dataset.features["images"]):
            raise ValueError(f"{name}: the column `images` must contain a list of images in each example, got {images}")
        dataset = dataset.cast_column("images", UNDECODED_IMAGES)
    columns = [
        column for column in ("source", "messages", "images", UNREADABLE, *extra_columns) if column in dataset.features
    ]
    if isinstance(dataset.features.get("id"), datasets.Value):  # a nested value is no id
        columns.insert(0, "id")
        if dataset.features["id"] != TEXT and streaming:
            dataset = dataset.cast_column("id", TEXT)
        elif dataset.features["id"] != TEXT:
            dataset = cast_texts(dataset, "id", TEXT)
    dataset = dataset.select_columns(columns)
    if "source" not in columns:  # last: the features of a streamed dataset are not known after it
        described = {} if streaming else {"desc": f"{name}: naming the source"}
        dataset = dataset.map(lambda _: {"source": path.name or name}, **described)
    return dataset


def _open(name: str, streaming: bool, extra_columns: tuple[str, ...]) -> datasets.Dataset | datasets.IterableDataset:
    path = Path(name)
    if path.is_dir() and (path / "dataset_info.json").exists():
        dataset = datasets.load_from_disk(name)
        return dataset.to_iterable_dataset() if streaming else dataset
    if not path.is_dir() and path.suffix not in (".parquet", ".json", ".jsonl"):
        hub_id, _, split = name.partition(":")
        return datasets.load_dataset(hub_id, split=split or "train", streaming=streaming)
    files = sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else [name]
    if not files or not Path(files[0]).exists():
        raise FileNotFoundError(f"{name}: there is no data; a folder must hold .parquet files")
    if not files[0].endswith(".parquet"):
        return open_json(name, streaming, extra_columns)
    for file in files:
        _check_parquet(file)
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    except DatasetGenerationError:
        for file in files:
            _check_parquet(file, whole=True)
        raise


def _check_parquet(file: str, whole: bool = False) -> None:
    """Reads the end of a parquet file, which says where everything is, or the `whole` of it."""
    try:
        with pq.ParquetFile(file) as opened:
            for _ in opened.iter_batches() if whole else ():
                pass
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is broken, or no parquet file: {error}") from error


def cast_texts(dataset: datasets.Dataset, column: str, feature: object) -> datasets.Dataset:
    """The dataset with a column cast to another type. A cast copies all columns that it gets; those of images are not."""
    cast = dataset.select_columns(column).cast_column(column, feature)
    return datasets.concatenate_datasets([cast, dataset.remove_columns(column)], axis=1)


def mark_images(table: pa.Table) -> dict[str, list]:
    """
    The column `images` with a mark for each image that is there: its file's name, and its number of bytes if it is embedded.
    Embedded images are not read from the disk.
    """
    marks = []
    for cell in table["images"]:
        images = cell.values  # `None`, or an array of `bytes` and `path`
        if images is not None:
            has_source = pc.or_(images.field("bytes").is_valid(), images.field("path").is_valid())
            has_source = pc.and_(has_source, images.is_valid()).to_pylist()
            sizes, paths = pc.binary_length(images.field("bytes")).to_pylist(), images.field("path").to_pylist()
            described = [f"{Path(path or '').name} {size or ''}" for path, size in zip(paths, sizes)]
            described = [mark if one else None for mark, one in zip(described, has_source)]
        marks.append(None if images is None else [{"path": mark} for mark in described])
    return {"images": marks}


def check_and_measure(
    example: dict, number: int, name: str, processor: VisualChatProcessor, max_length: int, is_alone: bool = True
) -> dict:
    """
    The columns that are added to an example before its images are opened: `dataset` and `index`, which say where it comes
    from; `fault`, what is wrong with it, or an empty string; and those of [`measure`], which are 0 for an example with a
    fault. The index is known if one process reads the whole dataset (`is_alone`). If shards are streamed to several
    processes, each counts its own examples, and the index is `None`.
    """
    origin = {"dataset": name, "index": number if is_alone else None}
    example = dict(example)  # datasets passes a mapping of its own
    try:
        check_conversation(example, processor.image_token)
    except InvalidExample as bad:
        return {**dict.fromkeys(MEASURES, 0), **origin, "fault": describe_problem({**example, **origin}, bad)}
    return {**measure(example, processor, max_length), **origin, "fault": ""}


def check_measure_and_digest(example: dict, number: int, **arguments) -> dict:
    """
    The columns of [`check_and_measure`], and `digest`, a hash of the messages and of the marks of the images
    ([`mark_images`]), by which a resumed run knows its data again.
    """
    content = json.dumps([example["messages"], example.get("images")], default=str)
    digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    return {**check_and_measure(example, number, **arguments), "digest": digest}


def describe_problem(example: dict, bad: InvalidExample) -> str:
    """The text of a fault, with the dataset, example and field. The example is named by its index, id or question."""
    dataset, number = example.get("dataset", example.get("source", "a dataset")), example.get("index")
    if number is None and example.get("id") is not None:
        number = f"with the id {example['id']!r}"
    elif number is None:
        number = f"that begins {question_excerpt(example)!r}"
    return str(Problem(bad.kind, dataset, str(number), bad.field, bad.detail))


def question_excerpt(example: dict) -> str:
    """The end of the first question, to search the dataset for; or of the messages, if there is no question."""
    messages = example.get("messages")
    asked = [one for one in messages or [] if isinstance(one, dict) and one.get("role") == "user"]
    return str(asked[0].get("content") if asked else messages)[-120:]


def measure(example: dict, processor: VisualChatProcessor, max_length: int) -> dict[str, int]:
    """
    Measures a conversation, and how many of its oldest rounds must be dropped, with their images, to fit in `max_length`.

    Returns:
        `length`, the number of tokens that are left, 0 if no answer is left; `num_images` and `num_rounds`, which are left;
        `dropped_rounds` and `dropped_images`.
    """
    messages = example["messages"]
    rounds = sum(message["role"] == "user" for message in messages)
    total_images = count_images(messages)
    for dropped in range(rounds):
        kept = drop_rounds(messages, dropped)
        images = count_images(kept)
        length = count_tokens(kept, processor)
        if length <= max_length:
            answered = any(message["role"] == "assistant" for message in kept)
            measures = (length if answered else 0, images, rounds - dropped, dropped, total_images - images)
            return dict(zip(MEASURES, measures))
    return dict(zip(MEASURES, (0, 0, 0, rounds, total_images)))


def drop_rounds(messages: list[dict], count: int) -> list[dict]:
    """The messages without their oldest `count` rounds. A system message stays."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    rounds = messages[len(system) :]
    starts = [k for k, message in enumerate(rounds) if message["role"] == "user"] + [len(rounds)]
    return system + rounds[starts[count] :]


def count_tokens(
    messages: list[dict],
    processor: VisualChatProcessor,
    add_generation_prompt: bool = False,
    sanitize_control_tokens: bool = False,
) -> int:
    """The number of tokens of a conversation, with those of its images. The images are not opened."""
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, sanitize_control_tokens=sanitize_control_tokens
    )
    ids = processor.encode_prompts([prompt])["input_ids"][0]
    return len(ids)


def count_images(messages: list[dict]) -> int:
    """The number of image parts in the messages."""
    parts = (part for message in messages if not isinstance(message["content"], str) for part in message["content"])
    return sum(part["type"] in IMAGE_TYPES for part in parts)


@dataclass
class PreparedDataset:
    """
    A dataset that is ready to train on, and what was left out of it.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The examples.
        too_long (`dict[str, int]`): By dataset, how many examples kept no answer when they were cut to length.
        invalid (`dict[str, int]`): By dataset, how many examples had a fault in their texts.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    too_long: dict[str, int] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)


def prepare_dataset(
    names: list[str],
    processor: VisualChatProcessor,
    max_length: int,
    weights: list[float] | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    seed: int = 0,
    skip_invalid: bool = False,
) -> PreparedDataset:
    """
    Loads datasets, checks and measures every example, leaves out those that keep no answer within `max_length`, and mixes
    the datasets. It does not open images: [`TrainingCollator`] does, which also reports the faults of streamed examples.

    Args:
        names (`list[str]`): See [`load_examples`].
        max_length (`int`): The largest number of tokens of a conversation. Longer ones lose their oldest rounds, with the
            images of these rounds.
        weights (`list[float]`, *optional*): The probability that the next example comes from each dataset, until all
            datasets were read once. By default every example is used once.
        seed (`int`): The seed of the mixing.
        skip_invalid (`bool`): Whether examples with a fault are left out and counted. By default they are an error.

    Raises:
        ValueError: If an example has a fault, with the file, example and field; or if no example is left.
    """
    if not names:
        raise ValueError("there is nothing to train on: give --datasets")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"There are {len(names)} datasets, but {len(weights)} weights")
    parts, selected, too_long, faults = [], [], {}, {}
    for name in names:
        dataset = load_examples(name, streaming)
        arguments = {"name": name, "processor": processor, "max_length": max_length}
        if streaming:
            dataset = dataset.map(
                check_and_measure, with_indices=True, fn_kwargs={**arguments, "is_alone": dataset.num_shards == 1}
            )
            dataset = dataset.filter(has_answer_or_fault)
        else:
            texts = dataset.select_columns([column for column in ("messages", UNREADABLE) if column in dataset.features])
            if "images" in dataset.features:  # images are neither read nor copied
                marks = dataset.select_columns("images").with_format("arrow")
                marks = marks.map(mark_images, batched=True, features=IMAGE_MARKS, num_proc=num_proc, desc=f"{name}: images")
                texts = datasets.concatenate_datasets([texts, marks.with_format(None)], axis=1)
            measured = texts.map(
                check_measure_and_digest,
                with_indices=True,
                fn_kwargs=arguments,
                remove_columns=texts.column_names,
                num_proc=num_proc,
                desc=f"{name}: measuring",
            )
            found, lengths = measured["fault"][:], measured["length"][:]
            faults[name] = [fault for fault in found if fault]
            dataset = datasets.concatenate_datasets([dataset, measured.remove_columns("fault")], axis=1)
            kept = [index for index, length in enumerate(lengths) if length > 0]
            cut = [index for index, (length, fault) in enumerate(zip(lengths, found)) if length == 0 and not fault]
            too_long[name] = len(cut)
            if cut:
                logger.warning(
                    "%s: %d of %d examples keep no answer within %d tokens and are left out, the first is example %d",
                    name,
                    too_long[name],
                    len(dataset),
                    max_length,
                    cut[0],
                )
            selected.append(kept)
        parts.append(dataset)
    report_faults(faults, skip_invalid)
    if not streaming:
        if not any(selected):
            raise ValueError(f"{', '.join(names)}: there are no examples to train on")
        parts = [dataset.select_columns([one for one in dataset.features if one != UNREADABLE]) for dataset in parts]
        if len({repr(dataset.features["messages"]) for dataset in parts}) > 1:  # texts in one and parts in the other
            parts = [cast_texts(dataset, "messages", datasets.Json()) for dataset in parts]
        parts = [dataset.select(kept) for dataset, kept in zip(parts, selected)]
    if weights is not None:
        chances = [weight / sum(weights) for weight in weights]
        dataset = datasets.interleave_datasets(parts, chances, seed=seed, stopping_strategy="all_exhausted")
    else:
        dataset = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return PreparedDataset(dataset, too_long, {name: len(found) for name, found in faults.items()})


def has_answer_or_fault(example: dict) -> bool:
    """Whether an answer is left after the cut. An example with a fault stays too, so that the collator reports it."""
    return example["length"] > 0 or example["fault"] != ""


def report_faults(faults: dict[str, list[str]], skip: bool, shown: int = 20) -> None:
    """
    Reports the faults of each dataset: as a warning if their examples are skipped, as an error otherwise.

    Raises:
        ValueError: If there are faults and `skip` is false.
    """
    found = [fault for ones in faults.values() for fault in ones]
    if not found:
        return
    lines = found[:shown] + ([f"… and {len(found) - shown} more"] if len(found) > shown else [])
    names = " ".join(name for name, ones in faults.items() if ones)
    if skip:
        logger.warning("%d examples have a fault and are left out:\n%s", len(found), "\n".join(lines))
        return
    raise ValueError(
        "\n".join(lines) + f"\n{len(found)} examples have a fault: repair them, or leave them out with --skip_broken_images."
        f" `visualchat prepare --dataset {names} --check` names all of them, and all broken images"
    )


def report_statistics(dataset: datasets.Dataset, output_dir: Path) -> str:
    """
    Writes a table of tokens and images by source as `data.md`, and histograms of both as `data.png`. Returns the table.
    """
    by_source = defaultdict(lambda: defaultdict(list))
    for example in dataset.select_columns(["source", *MEASURES]):
        for name in MEASURES:
            by_source[example["source"]][name].append(example[name])
    lines = [
        "| source | examples | rounds | images | tokens | tokens per example: median | most | rounds cut | images cut |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source, columns in sorted(by_source.items()):
        lengths = columns["length"]
        sums = {name: sum(values) for name, values in columns.items()}
        lines.append(
            f"| {source} | {len(lengths)} | {sums['num_rounds']} | {sums['num_images']} | {sums['length']}"
            f" | {median(lengths):g} | {max(lengths)} | {sums['dropped_rounds']} | {sums['dropped_images']} |"
        )
    table = "\n".join(lines)
    (output_dir / "data.md").write_text(table + "\n")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, name, label in zip(axes, ("length", "num_images"), ("tokens per example", "images per example")):
        values = [columns[name] for _, columns in sorted(by_source.items())]
        axis.hist(values, bins=20, stacked=True, label=sorted(by_source))
        axis.set_xlabel(label)
        axis.set_ylabel("examples")
    axes[0].legend(fontsize="small")
    figure.savefig(output_dir / "data.png", dpi=110)
    plt.close(figure)
    return table
