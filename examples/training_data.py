"""
Rows for training: loaded, measured, cut to length, mixed and counted before the first step, then batched.

Training sees one schema, transformers' and TRL's own: `messages` with text and image parts, and `images` that fill the image
parts in reading order. `prepare_data.py` makes it of the paper's sources; any dataset that has it trains as it is.
"""

import logging
import multiprocessing
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import datasets
import matplotlib.pyplot as plt

from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.data_collator_visualchat import fill_images
from modeling_visualchat.image_loading_visualchat import load_image
from modeling_visualchat.processing_visualchat import PART_KEYS


logger = logging.getLogger(__name__)

UNDECODED_IMAGES = datasets.List(datasets.Image(decode=False))
TEXT = datasets.Value("string")
MEASURES = ("length", "num_images", "num_rounds", "dropped_rounds", "dropped_images")


def load_rows(
    name: str, streaming: bool = False, extra_columns: tuple[str, ...] = ()
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens one dataset of the schema. Pictures stay undecoded until a batch is made.

    Args:
        name (`str`): A folder of parquet shards (what `prepare_data.py` writes), a `.parquet`, `.json` or `.jsonl` file, a
            folder of `save_to_disk`, or a Hub id, with `:split` for another split than `train`.
        streaming (`bool`): Reads rows as they are needed, for data that does not fit the disk.
        extra_columns (`tuple[str, ...]`): Further columns to keep.

    Returns:
        Rows with `source` and `messages`, and those of `id`, `images` and the extra columns that the dataset has. An id is
        text, or null.

    Raises:
        ValueError: If a column is missing. The dataset and its columns are named.
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
        rows = rows.cast_column("images", UNDECODED_IMAGES)
    if "source" not in rows.features:
        rows = rows.map(lambda row: {"source": path.name or name}, desc=f"{name}: naming the source")
    columns = [column for column in ("source", "messages", "images", *extra_columns) if column in rows.features]
    if not isinstance(rows.features.get("id"), datasets.Value):  # what is nested is no id
        return rows.select_columns(columns)
    if rows.features["id"] != TEXT and streaming:
        rows = rows.cast_column("id", TEXT)
    elif rows.features["id"] != TEXT:  # a cast copies all columns that it is given, and the others hold pictures
        ids = rows.select_columns("id").cast_column("id", TEXT)
        rows = datasets.concatenate_datasets([ids, rows.remove_columns("id")], axis=1)
    return rows.select_columns(["id", *columns])


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
    return sum(part["type"] == "image" for part in parts)


@dataclass
class PreparedRows:
    """Rows that are ready to train on, and what was found while they were made."""

    rows: datasets.Dataset | datasets.IterableDataset
    too_long: dict[str, int] = field(default_factory=dict)  # rows left without an answer, by dataset


def prepare_rows(
    names: list[str],
    processor: VisualChatProcessor,
    max_length: int,
    weights: list[float] | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    seed: int = 0,
) -> PreparedRows:
    """
    Loads datasets, measures every row, leaves out what keeps no answer within `max_length`, and mixes.

    Args:
        names (`list[str]`): See [`load_rows`].
        max_length (`int`): Tokens of a conversation at most. Whole oldest rounds go first, with their images.
        weights (`list[float]`, *optional*): Chance of each dataset to give the next row, until each was read once. By
            default every row is taken once.
        seed (`int`): Of the mixing.
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"There are {len(names)} datasets, but {len(weights)} weights")
    parts, too_long = [], {}
    for name in names:
        rows = load_rows(name, streaming)
        arguments = {"processor": processor, "max_length": max_length}
        if streaming:
            rows = rows.map(measure, fn_kwargs=arguments)
            rows = rows.filter(has_answer)
        else:
            measured = rows.select_columns(["messages"]).map(
                measure, fn_kwargs=arguments, remove_columns=["messages"], num_proc=num_proc, desc=f"{name}: measuring"
            )
            rows = datasets.concatenate_datasets([rows, measured], axis=1)  # pictures are not copied
            kept = [index for index, length in enumerate(rows["length"]) if length > 0]
            too_long[name] = len(rows) - len(kept)
            if too_long[name]:
                first = next(index for index, length in enumerate(rows["length"]) if length == 0)
                logger.warning(
                    "%s: %d of %d rows keep no answer within %d tokens and are left out, row %d the first",
                    name,
                    too_long[name],
                    len(rows),
                    max_length,
                    first,
                )
            rows = rows.select(kept)
        parts.append(rows)
    if weights is not None:
        chances = [weight / sum(weights) for weight in weights]
        rows = datasets.interleave_datasets(parts, chances, seed=seed, stopping_strategy="all_exhausted")
    else:
        rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return PreparedRows(rows, too_long)


def has_answer(row: dict) -> bool:
    """Whether an answer is left after the cut."""
    return row["length"] > 0


def report_rows(rows: datasets.Dataset, output_dir: Path) -> str:
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
    Batches of prepared rows. A picture that cannot be read is never passed over in silence: by default it stops the run;
    with `skip_broken_images` its row is named in the log and left out, and `broken_rows` counts it across all workers.
    """

    def __init__(self, processor: VisualChatProcessor, skip_broken_images: bool = False):
        self.collate = VisualChatDataCollator(processor, pad_to_multiple_of=8, supervised_logits_only=True)
        self.skip_broken_images = skip_broken_images
        self.broken_rows = multiprocessing.Value("l", 0)
        self.last_good = None

    def __call__(self, rows: list[dict]) -> dict:
        """See [`VisualChatDataCollator`]."""
        readable = []
        for row in rows:
            try:
                readable.append({"messages": self._open_images(row)})
            except (ValueError, FileNotFoundError, TypeError) as error:  # what load_image raises
                if not self.skip_broken_images:
                    raise
                with self.broken_rows.get_lock():
                    self.broken_rows.value += 1
                logger.warning("Left out of the batch: %s", error)
        if not readable:
            if self.last_good is None:
                raise ValueError("No row of the first batch has readable pictures: run prepare_data.py --check")
            readable = [self.last_good]  # a rank without a batch would leave the others waiting
        self.last_good = readable[0]
        return self.collate(readable)

    def _open_images(self, row: dict) -> list[dict]:
        question = next((m["content"] for m in row["messages"] if m["role"] == "user"), "")
        name = f"a row of {row.get('source', 'the dataset')} that begins {str(question)[-120:]!r}"
        messages = drop_rounds(fill_images(row, name), row.get("dropped_rounds", 0))
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = [
                    _open_image(part, name) if part["type"] == "image" else part for part in message["content"]
                ]
        return messages


def _open_image(part: dict, name: str) -> dict:
    source = next((part[key] for key in PART_KEYS["image"] if part.get(key) is not None), None)
    return {"type": "image", "image": load_image(source, f"{name}: {source!r:.120}")}
