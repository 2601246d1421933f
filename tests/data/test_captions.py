# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The source `captions`: a folder of own images with `metadata.jsonl` or `metadata.csv`, and what is wrong with one."""

import csv
import json
import os
from pathlib import Path

import datasets
import pytest

from helpers.raw_data import write_picture
from helpers.tiny import make_processor
from modeling_visualchat import VisualChatDataCollator
from visualchat.cli import main as visualchat
from visualchat.data import formats, shards, sources
from visualchat.training.dataset import load_examples


GOOD = [
    {"file_name": "one.png", "text": "A one."},
    {"file_name": "one.png", "text": "A thin digit,\nupright."},
    {"file_name": "more/two.jpg", "text": 'The "two".', "question": "Which digit?"},
    {"file_name": "./three.png", "text": "Drei: groß.", "question": ""},
]
NAMES = ("one.png", "more/two.jpg", "three.png")


def write_lines(root, records):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (root / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return "metadata.jsonl"


def write_csv(root, records):
    with open(root / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for record in records for name in record}), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return "metadata.csv"


BOTH = pytest.mark.parametrize("write", [write_lines, write_csv])


@pytest.fixture
def folder(tmp_path):
    """A folder of three images, without metadata."""
    for number, name in enumerate(NAMES, 1):
        write_picture(tmp_path / "mine" / name, number)
    return tmp_path / "mine"


def read(root, seed=0):
    """The image's path in the folder, question and answer of each line; and the problems of the texts."""
    context = sources.open_source("captions", root, seed)
    samples = list(context.source.samples(context))
    assert all(len(sample.rounds) == len(sample.rounds[0].images) == 1 for sample in samples)
    rounds = {sample.key: sample.rounds[0] for sample in samples}
    found = [(one.kind, one.row, one.field, one.detail) for one in context.problems]
    return {key: (os.path.relpath(one.images[0].path, root), one.question, one.answer) for key, one in rounds.items()}, found


def run(root, output, *arguments):
    words = ["prepare", "--source", "captions", "--data-root", root, "--output", output, "--num-proc", 1, *arguments]
    return visualchat([str(word) for word in words])


@BOTH
def test_each_line_is_an_example(folder, write):
    file = write(folder, GOOD)
    samples, found = read(folder)
    assert found == []
    lines = (
        ["line 1", "line 2", "line 3", "line 4"] if file == "metadata.jsonl" else ["line 2", "line 3", "line 5", "line 6"]
    )
    assert list(samples) == lines
    images, questions, answers = zip(*samples.values())
    assert images == ("one.png", "one.png", "more/two.jpg", "three.png")
    assert answers == tuple(record["text"] for record in GOOD)
    assert questions[2] == "Which digit?"
    drawn = {question for seed in range(12) for question in list(zip(*read(folder, seed)[0].values()))[1]}
    assert len(drawn) > 6 and drawn <= {*formats.DESCRIBE, "Which digit?"}
    assert read(folder, 3) == read(folder, 3)


@BOTH
def test_the_folder_is_one_of_the_hub(folder, write, tmp_path):
    """`imagefolder` of datasets reads the same folder, and finds the same captions of the same images."""
    write(folder, [{**record, "question": "Which?", "license": "CC0"} for record in GOOD])
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    published = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    published = published.cast_column("image", datasets.Image(decode=False))
    expected = [(os.path.relpath(one["image"]["path"], folder), one["question"], one["text"]) for one in published]
    samples, found = read(folder)
    assert found == [] and list(samples.values()) == expected


def test_links_of_the_cache_of_the_hub_are_followed(folder, tmp_path):
    blob = tmp_path / "blob"
    (folder / "one.png").rename(blob)
    (folder / "one.png").symlink_to("../blob")
    write_lines(folder, GOOD[:1])
    assert run(folder, tmp_path / "out") == 0


def test_examples_train(folder, tmp_path):
    write_lines(folder, GOOD)
    assert run(folder, tmp_path / "out") == 0
    examples = load_examples(str(tmp_path / "out/captions"))
    assert sorted(examples["id"]) == [f"metadata:line {number}" for number in (1, 2, 3, 4)]
    assert set(examples["source"]) == {"captions"}
    collator = VisualChatDataCollator(make_processor())
    for example in examples:
        (image,) = example["images"]
        number = int(example["id"][-1])
        assert image == {"bytes": None, "path": str(folder / os.path.normpath(GOOD[number - 1]["file_name"]))}
        batch = collator([example])
        assert batch["pixel_values"].shape[0] == 1
        learned = batch["labels"][0][batch["labels"][0] != -100]
        assert collator.processor.tokenizer.decode(learned) == GOOD[number - 1]["text"] + "</s>"


def test_images_are_embedded_and_a_second_run_has_nothing_to_do(folder, tmp_path, capsys):
    write_csv(folder, GOOD)
    assert run(folder, tmp_path / "out", "--embed-images", "--rows-per-shard", 2) == 0
    written = datasets.load_dataset(str(tmp_path / "out/captions"), split="train", cache_dir=str(tmp_path / "cache"))
    assert written.features == shards.FEATURES
    images = written.cast_column("images", datasets.List(datasets.Image(decode=False)))["images"]
    assert sorted(image["path"] for (image,) in images) == ["one.png", "one.png", "three.png", "two.jpg"]
    assert all(image["bytes"] for (image,) in images)
    assert run(folder, tmp_path / "out", "--embed-images", "--rows-per-shard", 2) == 0
    assert "is complete" in capsys.readouterr().out
    write_csv(folder, GOOD[:3])
    assert run(folder, tmp_path / "out", "--embed-images", "--rows-per-shard", 2) == 2
    assert "bytes of metadata.csv was" in capsys.readouterr().err


OUTSIDE = "expected the path of an image in the folder, got "
BAD = [
    ({"text": "A."}, "missing field", "file_name", "there is no such field; present: text"),
    ({"file_name": "one.png", "label": 1}, "missing field", "text", "there is no such field; present: file_name, label"),
    ({"file_name": "one.png", "text": None}, "missing field", "text", "expected str, got None"),
    ({"file_name": "one.png", "caption": 5}, "missing field", "caption", "expected str, got 5"),
    ({"file_name": "one.png", "text": "A.", "question": 5}, "missing field", "question", "expected str, got 5"),
    ({"file_name": ["one.png"], "text": "A."}, "missing field", "file_name", "expected str, got ['one.png']"),
    ({"file_name": "one.png", "text": " \n"}, "empty answer", "text", "there is no text"),
    ({"file_name": "one.png", "text": "x" * 400_001}, "long text", "text", "the answer has 400001 characters"),
    ({"file_name": "one.png", "text": "An <image>."}, "image count", "text", "the answer contains '<image>'"),
    ({"file_name": "one.png", "text": "A.", "question": "<image>?"}, "image count", "question", "the question contains"),
    ({"file_name": "three.png", "text": "Drei: groß. "}, "duplicate caption", "text", "line 4 has the same image, question"),
    ({"file_name": "../one.png", "text": "A."}, "missing image", "file_name", OUTSIDE + "'../one.png'"),
    ({"file_name": "more/../../one.png", "text": "A."}, "missing image", "file_name", OUTSIDE),
    ({"file_name": "more\\..\\..\\one.png", "text": "A."}, "missing image", "file_name", OUTSIDE),
    ({"file_name": "/etc/one.png", "text": "A."}, "missing image", "file_name", OUTSIDE + "'/etc/one.png'"),
    ({"file_name": "file:///etc/one.png", "text": "A."}, "missing image", "file_name", OUTSIDE),
    ({"file_name": "", "text": "A."}, "missing image", "file_name", OUTSIDE + "''"),
    ('{"file_name": "one.png", "text": "A.}', "unreadable example", "record", "it is no JSON from character"),
    ("[1]", "unreadable example", "record", "expected a JSON object, got [1]"),
]  # fmt: skip


@pytest.mark.parametrize("bad, kind, field, detail", BAD, ids=[f"{kind}-{k}" for k, (_, kind, *_) in enumerate(BAD)])
def test_a_bad_line_is_named_and_the_others_are_used(folder, bad, kind, field, detail):
    write_lines(folder, [*GOOD, bad, "", {"file_name": "one.png", "caption": "The last."}])
    samples, ((found_kind, line, found_field, found_detail),) = read(folder)
    assert (found_kind, line, found_field) == (kind, "line 5", field) and found_detail.startswith(detail)
    assert list(samples) == ["line 1", "line 2", "line 3", "line 4", "line 7"]
    assert samples["line 7"][2] == "The last."


def test_the_same_caption_under_other_questions_is_no_duplicate(folder):
    write_lines(
        folder, [{"file_name": "one.png", "text": "1", **more} for more in ({}, {"question": "A?"}, {"question": "B?"})]
    )
    samples, found = read(folder)
    assert len(samples) == 3 and found == []


def test_bad_lines_of_a_csv_file(folder):
    content = [
        b"\xef\xbb\xbffile_name,caption,note\r\n",  # Excel begins a file so
        b'one.png,"A one, and\r\nnothing else.",\r\n',
        b"\r\n",
        b"one.png,A one, and no quotes,x\r\n",
        b"one.png,gro\xdf,\r\n",  # Latin-1
        b'one.png,"A ""good"" one.",,\r\n',
        b"one.png,Short\r\n",
        b'one.png,"A "bad" one.",\r\n',
        b",No name.,\r\n",
        b"one.png\r\n",
        b'one.png,"It does not end.\r\n',
        b"more/two.jpg,Lost.,\r\n",
    ]
    (folder / "metadata.csv").write_bytes(b"".join(content))
    samples, found = read(folder)
    assert {key: answer for key, (_, _, answer) in samples.items()} == {
        "line 2": "A one, and\r\nnothing else.",
        "line 7": 'A "good" one.',
        "line 8": "Short",
    }
    assert found == [
        ("unreadable example", "line 5", "record", "it has 4 values for 3 columns: a text with commas needs quotes"),
        ("unreadable example", "line 6", "record", "it is not in UTF-8"),
        ("unreadable example", "line 9", "record", "it is no CSV: ',' expected after '\"'"),
        ("unreadable example", "line 12", "record", "it is no CSV: unexpected end of data in lines 12 to 13"),
        ("missing image", "line 10", "file_name", OUTSIDE + "''"),
        ("empty answer", "line 11", "caption", "there is no text"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name;text\none.png;A.\n", "there is no column 'file_name'; the columns are 'file_name;text'"),
        (b"image, text\none.png,A.\n", "there is no column 'file_name'; the columns are 'image', ' text'"),
        (b"file_name,label\none.png,1\n", "there is no column 'text' or 'caption'; the columns are 'file_name', 'label'"),
        (b"file_name,text,text\none.png,1,2\n", "two columns have the same name; the columns are 'file_name', "),
        ("file_name,text\n".encode("utf-16"), "line 1: it is not in UTF-8"),
        (b"file_name,text\n", "there are no examples in it"),
        (b"", "there is no column 'file_name'; the columns are none"),
    ],
)  # fmt: skip
def test_csv_files_without_the_columns_are_refused(folder, tmp_path, capsys, content, message):
    (folder / "metadata.csv").write_bytes(content)
    assert run(folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{folder}/metadata.csv" in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_exactly_one_metadata_file_must_be_there(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out") == 2
    assert f"{folder} contains no metadata.jsonl and no metadata.csv\n" in capsys.readouterr().err
    write_lines(folder / "more", GOOD)  # as the splits of a dataset on the Hub
    assert run(folder, tmp_path / "out") == 2
    assert f"no metadata.csv; but there is {folder}/more/metadata.jsonl, so take {folder}/more\n" in capsys.readouterr().err
    write_lines(folder, GOOD)
    write_csv(folder, GOOD)
    assert run(folder, tmp_path / "out") == 2
    assert f"{folder} contains metadata.jsonl and metadata.csv: keep one of them" in capsys.readouterr().err
    (folder / "metadata.csv").unlink()
    for content, message in (
        ("", "there are no examples in it"),
        ('[{"file_name":', "it begins as a list, but line 1 is no"),
    ):
        (folder / "metadata.jsonl").write_text(content)
        assert run(folder, tmp_path / "out") == 2
        assert f"{folder}/metadata.jsonl: {message}" in capsys.readouterr().err


def test_bad_images_and_lines_are_left_out_if_asked(folder, tmp_path, capsys):
    write_picture(folder / "cut.jpg", 4, size=(64, 64))
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-200])
    (folder / "page.png").write_bytes(b"<html>404</html>")
    write_picture(folder / "flat.png", 5, size=(4000, 1))
    names = ["none.png", "cut.jpg", "page.png", "flat.png", "more", "../mine/one.png"]
    write_lines(folder, [*({"file_name": name, "text": "A."} for name in names), *GOOD, GOOD[0]])
    kinds = ["missing image", "truncated image", "undecodable image", "thin image", "missing image", "missing image"]
    expected = [(f"line {number}", kind, "file_name") for number, kind in enumerate(kinds, 1)]
    expected.append(("line 11", "duplicate caption", "text"))

    def problems(path):
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert {one["file"] for one in found} == {"metadata.jsonl"}
        return [(one["row"], one["kind"], one["field"]) for one in found]

    assert run(folder, tmp_path / "out", "--check") == 1
    assert problems(tmp_path / "out/captions.problems.jsonl") == expected
    shown = capsys.readouterr().out
    assert "7 problems in 7 examples" in shown
    assert f"metadata.jsonl, line 1, file_name: missing image: there is no file {folder}/none.png\n" in shown
    assert run(folder, tmp_path / "out") == 1 and not (tmp_path / "out/captions").exists()
    assert run(folder, tmp_path / "out", "--skip-bad") == 0
    assert problems(tmp_path / "out/captions/problems.jsonl") == expected
    assert len(load_examples(str(tmp_path / "out/captions"))) == 4


def test_list_keeps_own_data_apart(capsys):
    assert visualchat(["prepare", "--list"]) == 0
    paper, own = capsys.readouterr().out.split("Data of your own")
    assert "metadata.jsonl or metadata.csv" in own and "captions   " in own
    assert all(f"{name} " in paper for name in sources.SOURCES) and "metadata" not in paper
    assert "captions" in sources.OWN_SOURCES and not set(sources.OWN_SOURCES) & set(sources.SOURCES)
    assert Path(sources.OWN_SOURCES["captions"].images) == Path()
