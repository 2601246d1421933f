"""
Rows for training: loaded, measured, cut to length, mixed and counted before the first step, then batched.

Training sees one schema, transformers' and TRL's own: `messages` with text and image parts, and `images` that fill the image
parts in reading order. `visualchat prepare` makes it of the paper's sources; any dataset that has it trains as it is.
"""

import logging
import multiprocessing
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import datasets
import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.compute as pc

from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.image_loading_visualchat import crop_for_clip, shorter_edge
from visualchat.data.checks import (
    IMAGE_TYPES,
    InvalidExample,
    ModelRequirements,
    Problem,
    check_conversation,
    check_example,
    decode_image,
)


logger = logging.getLogger(__name__)

UNDECODED_IMAGES = datasets.List(datasets.Image(decode=False))
TEXT = datasets.Value("string")
MARKS = datasets.Features({"images": datasets.List({"path": TEXT})})
MEASURES = ("length", "num_images", "num_rounds", "dropped_rounds", "dropped_images")


def load_examples(
    name: str, streaming: bool = False, extra_columns: tuple[str, ...] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens one dataset of the schema. Pictures stay undecoded until a batch is made.

    Args:
        name (`str`): A folder of parquet shards (as `visualchat prepare` writes), a `.parquet`, `.json` or `.jsonl` file, a
            folder of `save_to_disk`, or a Hub id, with `:split` for another split than `train`.
        streaming (`bool`): Reads rows as they are needed, for data that does not fit the disk.
        extra_columns (`tuple[str, ...]`): Further columns to keep.

    Returns:
        Rows with `source` and `messages`, and those of `id`, `images` and the extra columns that the dataset has. An id is
        text, or null.

    Raises:
        ValueError: If a column is missing, or `images` holds no lists. The dataset and its columns are named.
    """
    path = Path(name)
    if path.is_dir() and (path / "dataset_info.json").exists():
        rows = datasets.load_from_disk(name)
        rows = rows.to_iterable_dataset() if streaming else rows
    elif path.is_dir() or path.suffix in (".parquet", ".json", ".jsonl"):
        files = sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else [name]
        if not files or not Path(files[0]).exists():
            raise FileNotFoundError(f"{name}: there is no data; a folder must hold .parquet files")
        kind = "parquet" if files[0].endswith(".parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming)
    else:
        hub_id, _, split = name.partition(":")
        rows = datasets.load_dataset(hub_id, split=split or "train", streaming=streaming)

    if rows.features is None or "messages" not in rows.features:
        raise ValueError(f"{name}: rows need a column `messages` (and `images`), got {list(rows.features or [])}")
    if "images" in rows.features:
        images = rows.features["images"]
        if not isinstance(images, datasets.List | datasets.LargeList) and images != datasets.Value("null"):
            raise ValueError(f"{name}: the column `images` must hold a list of pictures in each row, got {images}")
        rows = rows.cast_column("images", UNDECODED_IMAGES)
    columns = [column for column in ("source", "messages", "images", *extra_columns) if column in rows.features]
    if isinstance(rows.features.get("id"), datasets.Value):  # what is nested is no id
        columns.insert(0, "id")
        if rows.features["id"] != TEXT and streaming:
            rows = rows.cast_column("id", TEXT)
        elif rows.features["id"] != TEXT:  # a cast copies all columns that it is given, and the others hold pictures
            ids = rows.select_columns("id").cast_column("id", TEXT)
            rows = datasets.concatenate_datasets([ids, rows.remove_columns("id")], axis=1)
    rows = rows.select_columns(columns)
    if "source" not in columns:  # last: the features of streamed rows are not known after it
        described = {} if streaming else {"desc": f"{name}: naming the source"}
        rows = rows.map(lambda row: {"source": path.name or name}, **described)
    return rows


def mark_images(table: pa.Table) -> dict[str, list]:
    """Of the column `images` only which pictures are there. Embedded ones are not read from the disk for that."""
    marks = []
    for cell in table["images"]:
        pictures = cell.values  # `None`, or an array of `bytes` and `path`
        if pictures is not None:
            has_source = pc.or_(pictures.field("bytes").is_valid(), pictures.field("path").is_valid())
            has_source = pc.and_(has_source, pictures.is_valid()).to_pylist()
        marks.append(None if pictures is None else [{"path": "" if one else None} for one in has_source])
    return {"images": marks}


def examine(
    row: dict, number: int, name: str, processor: VisualChatProcessor, max_length: int, is_alone: bool = True
) -> dict:
    """
    What is known of a row before its pictures are opened: where it stands, `fault`, what is wrong with it or "", and what
    [`measure`] finds, zeros for a row with a fault. Its number is that of the row in the dataset where one process reads
    all of it (`is_alone`); where shards are streamed to several, each counts its own.
    """
    place = {"dataset": name, "row": number if is_alone else None}
    row = dict(row)  # of datasets' own kind
    try:
        check_conversation(row, processor.image_token)
    except InvalidExample as bad:
        return {**dict.fromkeys(MEASURES, 0), **place, "fault": name_problem({**row, **place}, bad)}
    return {**measure(row, processor, max_length), **place, "fault": ""}


def name_problem(row: dict, bad: InvalidExample) -> str:
    """A fault with the file, the row, as far as it is known, and the field."""
    place, number = row.get("dataset", row.get("source", "a dataset")), row.get("row")
    if number is None and row.get("id") is not None:
        number = f"with the id {row['id']!r}"
    elif number is None:
        number = f"that begins {first_words(row)!r}"
    return str(Problem(bad.kind, place, number, bad.field, bad.detail))


def first_words(row: dict) -> str:
    """What a row can be found by: the end of its first question, or whatever stands there."""
    messages = row.get("messages")
    asked = [one for one in messages or [] if isinstance(one, dict) and one.get("role") == "user"]
    return str(asked[0].get("content") if asked else messages)[-120:]


def measure(row: dict, processor: VisualChatProcessor, max_length: int) -> dict[str, int]:
    """
    How long a conversation is, and how many of its oldest rounds must go, with their images, so that it fits.

    Returns:
        `length` in tokens after the cut, 0 if no answer is left; `num_images` and `num_rounds` after the cut;
        `dropped_rounds` and `dropped_images`.
    """
    messages = row["messages"]
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
    """Tokens of a conversation, those of its images included. The pictures are not opened."""
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, sanitize_control_tokens=sanitize_control_tokens
    )
    ids = processor.encode_prompts([prompt])["input_ids"][0]
    return len(ids) + count_images(messages) * (processor.image_seq_length - 1)


def count_images(messages: list[dict]) -> int:
    """Image parts of the messages."""
    parts = (part for message in messages if not isinstance(message["content"], str) for part in message["content"])
    return sum(part["type"] in IMAGE_TYPES for part in parts)


@dataclass
class PreparedDataset:
    """Rows that are ready to train on, and what was found while they were made."""

    rows: datasets.Dataset | datasets.IterableDataset
    too_long: dict[str, int] = field(default_factory=dict)  # rows left without an answer, by dataset
    faulty: dict[str, int] = field(default_factory=dict)  # rows with a fault in their texts, left out, by dataset


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
    Loads datasets, checks and measures every row, leaves out what keeps no answer within `max_length`, and mixes. Pictures
    are not opened: see [`TrainingCollator`], which also finds what is wrong with streamed rows.

    Args:
        names (`list[str]`): See [`load_examples`].
        max_length (`int`): Tokens of a conversation at most. Whole oldest rounds go first, with their images.
        weights (`list[float]`, *optional*): Chance of each dataset to give the next row, until each was read once. By
            default every row is taken once.
        seed (`int`): Of the mixing.
        skip_invalid (`bool`): Leaves out and counts rows with a fault, which are an error otherwise.

    Raises:
        ValueError: If a row has a fault, naming file, row and field; or if no row is left.
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"There are {len(names)} datasets, but {len(weights)} weights")
    parts, too_long, faults = [], {}, {}
    for name in names:
        rows = load_examples(name, streaming)
        arguments = {"name": name, "processor": processor, "max_length": max_length}
        if streaming:
            rows = rows.map(examine, with_indices=True, fn_kwargs={**arguments, "is_alone": rows.num_shards == 1})
            rows = rows.filter(is_to_be_read)
        else:
            texts = rows.select_columns(["messages"])
            if "images" in rows.features:  # pictures are neither read nor copied
                marks = rows.select_columns("images").with_format("arrow")
                marks = marks.map(mark_images, batched=True, features=MARKS, num_proc=num_proc, desc=f"{name}: images")
                texts = datasets.concatenate_datasets([texts, marks.with_format(None)], axis=1)
            measured = texts.map(
                examine,
                with_indices=True,
                fn_kwargs=arguments,
                remove_columns=texts.column_names,
                num_proc=num_proc,
                desc=f"{name}: measuring",
            )
            found, lengths = measured["fault"][:], measured["length"][:]
            faults[name] = [fault for fault in found if fault]
            rows = datasets.concatenate_datasets([rows, measured.remove_columns("fault")], axis=1)
            kept = [index for index, length in enumerate(lengths) if length > 0]
            cut = [index for index, (length, fault) in enumerate(zip(lengths, found)) if length == 0 and not fault]
            too_long[name] = len(cut)
            if cut:
                logger.warning(
                    "%s: %d of %d rows keep no answer within %d tokens and are left out, row %d the first",
                    name,
                    too_long[name],
                    len(rows),
                    max_length,
                    cut[0],
                )
            rows = rows.select(kept)
        parts.append(rows)
    report_faults(faults, skip_invalid)
    if not streaming and not any(len(rows) for rows in parts):
        raise ValueError(f"{', '.join(names)}: there are no rows to train on")
    if weights is not None:
        chances = [weight / sum(weights) for weight in weights]
        rows = datasets.interleave_datasets(parts, chances, seed=seed, stopping_strategy="all_exhausted")
    else:
        rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return PreparedDataset(rows, too_long, {name: len(found) for name, found in faults.items()})


def is_to_be_read(row: dict) -> bool:
    """Whether an answer is left after the cut, or a fault is to be told."""
    return row["length"] > 0 or row["fault"] != ""


def report_faults(faults: dict[str, list[str]], skip: bool, shown: int = 20) -> None:
    """
    Logs what is wrong with the rows of each dataset.

    Raises:
        ValueError: With the same, unless they are to be skipped.
    """
    found = [fault for ones in faults.values() for fault in ones]
    if not found:
        return
    lines = found[:shown] + ([f"… and {len(found) - shown} more"] if len(found) > shown else [])
    names = " ".join(name for name, ones in faults.items() if ones)
    if skip:
        logger.warning("%d rows have a fault and are left out:\n%s", len(found), "\n".join(lines))
        return
    raise ValueError(
        "\n".join(lines) + f"\n{len(found)} rows have a fault: mend them, or leave them out with --skip_broken_images."
        f" `visualchat prepare --dataset {names} --check` names all of them, and all broken pictures"
    )


def report_statistics(rows: datasets.Dataset, output_dir: Path) -> str:
    """
    A table of tokens and images by source, for the log and as `data.md`, and a histogram of both as `data.png`.
    """
    by_source = defaultdict(lambda: defaultdict(list))
    for row in rows.select_columns(["source", *MEASURES]):
        for name in MEASURES:
            by_source[row["source"]][name].append(row[name])
    lines = [
        "| source | rows | rounds | images | tokens | tokens of a row: median | most | rounds cut | images cut |",
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
    for axis, name, label in zip(axes, ("length", "num_images"), ("tokens of a row", "images of a row")):
        values = [columns[name] for _, columns in sorted(by_source.items())]
        axis.hist(values, bins=20, stacked=True, label=sorted(by_source))
        axis.set_xlabel(label)
        axis.set_ylabel("rows")
    axes[0].legend(fontsize="small")
    figure.savefig(output_dir / "data.png", dpi=110)
    plt.close(figure)
    return table


class TrainingCollator:
    """
    Batches of prepared rows. Here pictures are opened. A row or picture that cannot be used is never passed over in silence:
    by default it stops the run; with `skip_broken_images` it is named in the log and left out, and `broken_rows` counts it
    across all workers, each time that it comes up.

    Args:
        processor (`VisualChatProcessor`): The model's.
        skip_broken_images (`bool`): Whether to go on.
        requirements ([`ModelRequirements`], *optional*): Of the model. Defaults to the processor's.
        broken_rows (`int`): Rows that were left out before.
        fallback_examples (`Iterable[dict]`): Rows. The first that can be used takes the place of a batch without any: a process
            without a batch would leave the others waiting.
    """

    def __init__(
        self,
        processor: VisualChatProcessor,
        skip_broken_images: bool = False,
        requirements: ModelRequirements | None = None,
        broken_rows: int = 0,
        fallback_examples: Iterable[dict] = (),
    ):
        self.collate = VisualChatDataCollator(processor, pad_to_multiple_of=8, supervised_logits_only=True)
        self.requirements = requirements or ModelRequirements(processor.image_token, shorter_edge(processor.image_processor))
        self.skip_broken_images = skip_broken_images
        self.broken_rows = multiprocessing.Value("l", broken_rows)
        self.fallback_examples = fallback_examples
        self.last_good = None

    def __call__(self, rows: list[dict]) -> dict:
        """See [`VisualChatDataCollator`]."""
        readable = []
        for row in rows:
            try:
                readable.append({"messages": self.read(row)})
            except ValueError as error:
                if not self.skip_broken_images:
                    raise
                with self.broken_rows.get_lock():
                    self.broken_rows.value += 1
                logger.warning("Left out of the batch: %s", error)
        if not readable:
            readable = [self.last_good or self._find_stand_in()]
        self.last_good = readable[0]
        return self.collate(readable)

    def read(self, row: dict) -> list[dict]:
        """
        The conversation of a row, with its pictures as the model sees them in its image parts.

        Raises:
            ValueError: If there is something wrong with it: all of it, with the file, row and field of each.
        """
        pictures, faults = check_example(row, self.requirements, decode_image, skip=row.get("dropped_images", 0))
        if faults:
            raise ValueError("; ".join(name_problem(row, fault) for fault in faults))
        image_processor = self.collate.processor.image_processor
        parts = iter([{"type": "image", "image": crop_for_clip(picture, image_processor)} for picture in pictures])
        messages = []
        for message in drop_rounds(row["messages"], row.get("dropped_rounds", 0)):
            content = message["content"]
            if not isinstance(content, str):
                content = [next(parts) if part["type"] in IMAGE_TYPES else part for part in content]
            messages.append({**message, "content": content})
        return messages

    def _find_stand_in(self) -> dict:
        for row in self.fallback_examples:
            try:
                return {"messages": self.read(row)}
            except ValueError:  # it is named and counted when its turn comes
                continue
        raise ValueError("No row can be used: run visualchat prepare --check")
