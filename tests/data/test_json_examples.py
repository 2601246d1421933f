"""JSON files with broken lines, in other encodings and of mixed types; parquet files that are cut off; ids that repeat."""

import json
from pathlib import Path

import datasets
import pytest

from helpers.tiny import assistant, digit_image, make_processor, text_part
from visualchat.cli import main as visualchat
from visualchat.training.collator import TrainingCollator
from visualchat.training.dataset import load_examples, prepare_dataset


def make_example(question: str = "Q?", **fields) -> dict:
    parts = [{"type": "image"}, text_part(question)]
    return {"messages": [{"role": "user", "content": parts}, assistant("a")], "images": ["good.png"], **fields}


GOOD = json.dumps(make_example()).encode()
# Of each line what the check says of it, with its number in the file
BAD_LINES = {
    b'{"messages": [{"ro': "it is no JSON from character 16 on: Unterminated string",
    json.dumps(make_example("Café?"), ensure_ascii=False).encode("latin-1"): "it is no JSON in UTF-8: 'utf-8' codec can't",
    b"[1, 2]": "expected a JSON object, got [1, 2]",
    b'{"id": ' + b"[" * 100_000: "it is no JSON in UTF-8: maximum recursion depth exceeded",
    json.dumps(make_example("\ud800")).encode(): "it is no JSON in UTF-8: 'utf-8' codec can't encode character",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digit_image(0).save("good.png")
    return tmp_path


def write_lines(lines: list[bytes], name: str = "rows.jsonl") -> None:
    Path(name).write_bytes(b"\n".join(lines) + b"\n")


def check(name: str, capsys, status: int = 1) -> list[str]:
    """What the check prints of `name`: the counts by kind, and every problem."""
    assert visualchat(["prepare", "--dataset", name, "--check", "--num-proc", "1"]) == status
    shown = capsys.readouterr()
    return [line.strip() for line in (shown.out if status < 2 else shown.err).splitlines() if line.strip()][status < 2 :]


def test_every_broken_line_is_named_and_the_others_are_used(capsys):
    write_lines([line for bad in BAD_LINES for line in (GOOD, b"", bad)] + [GOOD])
    expected = [
        f"rows.jsonl, example {2 * k + 1}, line {3 * k + 3}: unreadable example: {detail}"
        for k, detail in enumerate(BAD_LINES.values())
    ]
    head, count, *shown = check("rows.jsonl", capsys)
    assert head == "rows: 5 problems in 5 examples" and count.startswith("5  unreadable example")
    assert len(shown) == len(expected) and all(map(str.startswith, shown, expected)), shown

    processor = make_processor()
    with pytest.raises(ValueError, match=r"rows\.jsonl, example 1, line 3: [\s\S]*5 examples have a fault"):
        prepare_dataset(["rows.jsonl"], processor, 512)
    prepared = prepare_dataset(["rows.jsonl"], processor, 512, skip_invalid=True)
    assert prepared.invalid == {"rows.jsonl": 5} and prepared.dataset["index"][:] == [0, 2, 4, 6, 8, 10]
    rows = list(prepare_dataset(["rows.jsonl"], processor, 512, streaming=True).dataset)
    skipping = TrainingCollator(processor, skip_broken_images=True)
    assert skipping(rows)["pixel_values"].shape[0] == 6 and skipping.broken_rows.value == 5

    command = ["prepare", "--dataset", "rows.jsonl", "--output", "out", "--num-proc", "1", "--rows-per-shard", "1"]
    assert visualchat(command) == 1
    assert visualchat([*command, "--skip-bad"]) == 0  # also with shards that have no example
    written = load_examples("out/rows")
    assert written["messages"][:] == [make_example()["messages"]] * 6 and set(written["source"]) == {"rows.jsonl"}


def test_a_broken_line_of_a_large_file_has_its_number(capsys):
    """datasets reads such a file in blocks, and counts within them."""
    lines = [json.dumps(make_example(f"{k} " + "x" * 1000)).encode() for k in range(1000)]
    lines[899] = lines[899][:-5]
    write_lines(lines)
    assert check("rows.jsonl", capsys)[-1].startswith("rows.jsonl, example 899, line 900: unreadable example: it is no JSON")


def test_types_that_change_after_the_first_block(capsys):
    lines = [json.dumps(make_example("x" * 350_000)).encode() for _ in range(31)]  # more than the 10 MB of a block
    changed = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "a"}], "id": 7}
    lines += [json.dumps(changed).encode(), json.dumps(make_example(images="good.png")).encode(), GOOD]
    write_lines(lines)
    examples = load_examples("rows.jsonl")
    assert len(examples) == 34 and examples[31]["messages"] == changed["messages"] and examples[31]["id"] == "7"
    assert check("rows.jsonl", capsys)[2:] == [
        "rows.jsonl, example 32, images: missing field: expected a list of images, got 'good.png'"
    ]


def test_a_file_that_changed_is_read_anew():
    write_lines([GOOD, b"broken"])
    assert len(load_examples("rows.jsonl")) == 2
    write_lines([GOOD, GOOD, b"broken"])
    assert len(load_examples("rows.jsonl")) == 3


def test_entries_of_a_list(capsys):
    Path("rows.json").write_text(json.dumps([make_example(), 5, make_example(images=[5])]))
    assert check("rows.json", capsys)[3:] == [
        "rows.json, example 1, entry 1: unreadable example: expected a JSON object, got 5",
        "rows.json, example 2, images[0]: missing field: expected a path, URL or base64 string, got 5",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "rows.jsonl cannot be read: there are no examples in it"),
        ("rows.jsonl", b"\n \n", "rows.jsonl cannot be read: there are no examples in it"),
        ("rows.json", b"[]", "rows.json cannot be read: there are no examples in it"),
        ("rows.json", b'[{"id": 1},\n{"id":', "rows.json cannot be read: it begins as a list, but line 2 is no JSON: "),
        ("rows.json", b'[{"id": 1},\n{"id": "\xe9"}]', "rows.json cannot be read: line 2 is not in UTF-8: "),
        ("rows.parquet", b"", "rows.parquet cannot be read: rows.parquet is broken, or no parquet file: "),
        ("rows.parquet", b"PAR1 and no more", "rows.parquet cannot be read: rows.parquet is broken, or no parquet file: "),
    ],
)
def test_files_that_cannot_be_read_at_all(capsys, name, content, message):
    Path(name).write_bytes(content)
    (shown,) = check(name, capsys, status=2)
    assert shown.startswith(f"visualchat prepare: {message}")
    for streaming in (False, True):
        with pytest.raises(ValueError) as error:
            load_examples(name, streaming)
        assert str(error.value).startswith(message)
    words = ["--model_name_or_path", "model", "--datasets", name, "--output_dir", "run", "--report_to", "none"]
    make_processor().save_pretrained("model")
    assert visualchat(["train", *words]) == 2


def test_a_broken_shard_among_sound_ones_is_named(capsys):
    Path("shards").mkdir()
    for k in range(3):
        datasets.Dataset.from_list([make_example(f"{k}?" * 2000)]).to_parquet(f"shards/{k}.parquet")
    data = bytearray(Path("shards/1.parquet").read_bytes())
    data[20:120] = bytes(100)  # its end is whole
    Path("shards/1.parquet").write_bytes(data)
    *_, shown = check("shards", capsys, status=2)  # after the progress bar
    assert shown.startswith("visualchat prepare: shards cannot be read: shards/1.parquet is broken, or no parquet file: ")


def test_datasets_of_texts_and_of_parts_are_mixed():
    write_lines([GOOD, b"broken"])
    plain = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "a"}]}
    write_lines([json.dumps(plain).encode()] * 2, "plain.jsonl")
    prepared = prepare_dataset(["rows.jsonl", "plain.jsonl"], make_processor(), 512, skip_invalid=True)
    batch = TrainingCollator(make_processor())(list(prepared.dataset))
    assert batch["input_ids"].shape[0] == 3 and batch["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("rows_per_shard", ["1", "10"])
def test_of_a_repeated_id_the_first_example_without_a_fault_is_kept(capsys, rows_per_shard):
    rows = [make_example(f"{k}?", id="a") for k in range(4)] + [make_example("4?", id="b")]
    rows[0]["images"] = ["none.png"]
    write_lines([json.dumps(row).encode() for row in rows])
    command = ["prepare", "--dataset", "rows.jsonl", "--output", "out", "--num-proc", "1", "--skip-bad"]
    assert visualchat([*command, "--rows-per-shard", rows_per_shard]) == 0
    assert load_examples("out/rows")["messages"][:] == [rows[k]["messages"] for k in (1, 4)]
    shown = capsys.readouterr().out
    assert "rows.jsonl, example 0, images[0]: missing image" in shown and "example 1, " not in shown
    assert "rows.jsonl, example 3, id: duplicate id: 'a' is the id of example 1 too" in shown
