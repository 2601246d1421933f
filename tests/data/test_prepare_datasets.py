# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""`visualchat prepare` for datasets that have the schema already: what is checked, named and left out."""

import json
import os
from pathlib import Path

import datasets
import pytest

from helpers.prepared import load, problems, summary
from helpers.raw_data import write_picture
from visualchat.cli import main as visualchat
from visualchat.training.dataset import load_examples


def conversation(question, answer, *images):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return {"messages": messages, "images": list(images)}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """`rows.jsonl`: good rows of every kind are the even ones, and every odd one has a fault."""
    monkeypatch.chdir(tmp_path)
    for number in range(1, 4):
        write_picture(tmp_path / f"{number}.png", number)
    write_picture(tmp_path / "cut.jpg", 4, size=(64, 64))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    (tmp_path / "page.png").write_bytes(b"<html>404</html>")
    good = [conversation(f"Q{number}?", f"A{number}.", "1.png", "2.png") for number in range(9)]
    good[1] = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}], "images": []}
    good[2]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    good[3]["messages"][0]["content"].pop()  # the pictures are the question
    good[4]["messages"][0]["content"][0]["path"], good[4]["images"] = "3.png", ["2.png"]
    faults = {
        ("missing image", "images[1]"): conversation("Q?", "A.", "1.png", "none.png"),
        ("truncated image", "images[0]"): conversation("Q?", "A.", "cut.jpg"),
        ("undecodable image", "images[0]"): conversation("Q?", "A.", "page.png"),
        ("image count", "images"): {**conversation("Q?", "A.", "1.png", "2.png"), "images": ["1.png"]},
        ("image count", "messages[0].content"): conversation("<image> Q?", "A.", "1.png"),
        ("empty answer", "messages[1].content"): conversation("Q?", " ", "1.png"),
        ("odd turns", "messages"): {"messages": conversation("Q?", "A.", "1.png")["messages"][:1], "images": ["1.png"]},
        ("missing image", "images[0]"): {**conversation("Q?", "A.", "1.png"), "images": [None]},
    }
    write_rows(tmp_path / "rows.jsonl", [row for k, bad in enumerate(faults.values()) for row in (good[k], bad)] + good[8:])
    return [(kind, "rows.jsonl", str(2 * k + 1), field) for k, (kind, field) in enumerate(faults)]


def by_row(found):
    return sorted(found, key=lambda one: int(one[2]))


@pytest.mark.parametrize("num_proc", ["1", "2"])
def test_any_dataset_is_checked(faulty, tmp_path, capsys, num_proc):
    shared = ["--check", "--num-proc", num_proc, "--rows-per-shard", "5"]
    assert visualchat(["prepare", "--dataset", "rows.jsonl", "--output", "out", *shared]) == 1
    assert by_row(problems(tmp_path / "out/rows.problems.jsonl")) == faulty
    assert os.listdir(tmp_path / "out") == ["rows.problems.jsonl"]
    shown = capsys.readouterr().out
    assert "8 problems in 8 examples" in shown and "2  missing image" in shown
    assert "rows.jsonl, example 1, images[1]: missing image: there is no file none.png" in shown
    assert "example 7, images: image count: 2 image parts need an image, but there are 1 images" in shown


def test_bad_rows_of_a_dataset_are_left_out(faulty, tmp_path):
    command = ["--dataset", "rows.jsonl", "--output", "out", "--num-proc", "1", "--rows-per-shard", "4"]
    assert visualchat(["prepare", *command]) == 1
    assert not (tmp_path / "out/rows").exists()
    assert visualchat(["prepare", *command, "--skip-bad"]) == 0
    assert by_row(problems(tmp_path / "out/rows/problems.jsonl")) == faulty
    kept = summary(tmp_path / "out", "rows")
    assert (kept["rows"], kept["rounds"], kept["images"]) == (9, 9, 15) and sum(kept["problems"].values()) == 8
    good = load_examples("rows.jsonl").select(range(0, 17, 2))
    written = load_examples(str(tmp_path / "out/rows"))
    assert written.to_list() == good.to_list()
    assert visualchat(["prepare", "--dataset", "out/rows", "--check", "--num-proc", "1"]) == 0


@pytest.mark.parametrize("make_id", [str, int], ids=["text", "numbers"])
def test_repeated_ids_of_a_dataset_are_named_and_the_later_rows_left_out(faulty, tmp_path, capsys, make_id):
    rows = [{"id": make_id(k), **conversation(f"Q{number}?", "A.", "1.png")} for number, k in enumerate([7, 5, 7, 3, 5, 7])]
    rows += [{**rows[0], "id": None} for _ in range(2)]  # which is no id
    rows[4]["images"] = ["none.png"]  # its other fault is named as well
    write_rows(tmp_path / "named.jsonl", rows)
    shared = ["--dataset", "named.jsonl", "--output", "out", "--num-proc", "2", "--rows-per-shard", "3"]
    expected = [("duplicate id", "named.jsonl", str(row), "id") for row in (2, 4, 5)]
    expected.insert(2, ("missing image", "named.jsonl", "4", "images[0]"))

    assert visualchat(["prepare", *shared, "--check"]) == 1
    assert problems(tmp_path / "out/named.problems.jsonl") == expected
    shown = capsys.readouterr().out
    assert "4 problems in 3 examples" in shown and "3  duplicate id" in shown
    assert "named.jsonl, example 4, id: duplicate id: '5' is the id of example 1 too" in shown
    assert "named.jsonl, example 5, id: duplicate id: '7' is the id of example 0 too" in shown

    assert visualchat(["prepare", *shared]) == 1 and not (tmp_path / "out/named").exists()
    assert visualchat(["prepare", *shared, "--skip-bad"]) == 0
    assert problems(tmp_path / "out/named/problems.jsonl") == expected
    assert summary(tmp_path / "out", "named")["problems"] == {"duplicate id": 3, "missing image": 1}
    written = load_examples(str(tmp_path / "out/named"))
    assert written["id"][:] == ["7", "5", "3", None, None]
    assert written.to_list() == load_examples("named.jsonl").select([0, 1, 3, 6, 7]).to_list()


def test_changed_ids_are_noticed(faulty, tmp_path, capsys):
    command = ["--dataset", "named.jsonl", "--output", "out", "--num-proc", "1"]
    rows = [{"id": name, **conversation("Q?", "A.", "1.png")} for name in "ab"]
    write_rows(tmp_path / "named.jsonl", rows)
    assert visualchat(["prepare", *command]) == 0
    write_rows(tmp_path / "named.jsonl", [rows[0], {**rows[1], "id": "a"}])
    assert visualchat(["prepare", *command]) == 2
    assert "sha256 of the planned rows was" in capsys.readouterr().err


def test_datasets_in_every_form_are_checked(faulty, tmp_path):
    rows = load_examples("rows.jsonl").select(range(2)).remove_columns("source")
    embedded = datasets.Dataset.from_list(
        [{"messages": row["messages"], "images": [{"bytes": Path("cut.jpg").read_bytes(), "path": None}]} for row in rows]
    )
    embedded = embedded.select([0]).map(lambda row: {"images": row["images"] * 2})
    embedded.save_to_disk("saved")
    Path("shards").mkdir()
    embedded.to_parquet("shards/one.parquet")
    embedded.to_parquet("one.parquet")
    for name in ("saved", "shards", "one.parquet"):
        assert visualchat(["prepare", "--dataset", name, "--check", "--output", "out", "--num-proc", "1"]) == 1
        expected = [("truncated image", name, "0", f"images[{k}]") for k in range(2)]
        assert problems(tmp_path / f"out/{name.removesuffix('.parquet')}.problems.jsonl") == expected


def test_embedded_images_of_a_dataset(faulty, tmp_path):
    write_rows(tmp_path / "good.jsonl", [conversation("Q?", "A.", "1.png")])
    shared = ["--num-proc", "1", "--output", "out", "--embed-images"]
    assert visualchat(["prepare", "--dataset", "good.jsonl", *shared]) == 0
    (row,) = load(tmp_path / "out/good")
    assert row["images"] == [{"bytes": Path("1.png").read_bytes(), "path": "1.png"}]


def test_unreadable_datasets_are_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"conversations": []}])
    assert visualchat(["prepare", "--dataset", str(path), "--check"]) == 2
    assert f"{path}: the dataset needs a column `messages`" in capsys.readouterr().err
