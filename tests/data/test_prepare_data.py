# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
`visualchat prepare` from raw files to rows that train: shards, bad pictures, and runs that are killed.
"""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest

from helpers.commands import command
from helpers.prepared import load, problems, summary
from helpers.raw_data import COCO, as_base64, copy_raw, llava, write_json, write_picture
from helpers.tiny import TOKENS_PER_IMAGE, make_processor
from modeling_visualchat import VisualChatDataCollator
from visualchat.cli import main as visualchat
from visualchat.data import shards
from visualchat.data.sources import SOURCES


DETAIL, REASONING = "llava/detail_23k.json", "llava/complex_reasoning_77k.json"


def run(root, output, *arguments, source="llava", num_proc=1):
    arguments = ["--source", source, "--data-root", root, "--output", output, "--num-proc", num_proc, *arguments]
    return visualchat(["prepare", *map(str, arguments)])


def identities(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.parquet"))}


def make_llava(root, count):
    """LLaVA alone, `count` rows over six pictures."""
    copy_raw(root)
    write_json(root / REASONING, [])
    rows = [{**llava(index % 6 + 1, (f"Q{index}?", f"A{index}.")), "id": f"row{index}"} for index in range(count)]
    write_json(root / DETAIL, rows)
    return root


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return copy_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("many"), 60)


@pytest.mark.parametrize("name", SOURCES)
def test_rows_of_every_source_train(raw, tmp_path, name):
    assert run(raw, tmp_path, source=name) == 0
    rows = load(tmp_path / name).cast_column("images", datasets.List(datasets.Image()))
    assert rows.features == shards.FEATURES
    assert not (tmp_path / f"{name}.partial").exists()
    counts = summary(tmp_path, name)
    assert counts["rows"] == len(rows) > 0 and counts["problems"] == {}
    collator = VisualChatDataCollator(make_processor())
    assert len(set(rows["id"])) == len(rows)
    for row in rows:
        assert row["source"] == name and row["id"]
        parts = [part for message in row["messages"] for part in message["content"]]
        images = [part for part in parts if part["type"] == "image"]
        assert len(images) == len(row["images"]) > 0 and all(part["text"] is None for part in images)
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        batch = collator([row])
        assert batch["pixel_values"].shape[0] == len(row["images"])
        assert (batch["input_ids"] == collator.processor.image_token_id).sum() == len(row["images"]) * TOKENS_PER_IMAGE
        answers = [message["content"][0]["text"] + "</s>" for message in row["messages"][1::2]]
        learned = batch["labels"][0][batch["labels"][0] != -100]
        assert collator.processor.tokenizer.decode(learned) == "".join(answers)


def test_a_row_in_full(raw, tmp_path):
    assert run(raw, tmp_path, source="aokvqa") == 0
    (row,) = load(tmp_path / "aokvqa")
    question, answer = row["messages"][0]["content"][1]["text"], row["messages"][1]["content"][0]["text"]
    assert row == {
        "id": "aokvqa_v1p0_train:q1",
        "source": "aokvqa",
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [{"bytes": None, "path": str(raw / COCO / "000000000005.jpg")}],
    }


def test_pictures_are_paths_unless_embedded_or_base64(raw, tmp_path):
    assert run(raw, tmp_path, "--embed-images") == 0
    for row in load(tmp_path / "llava"):
        for image in row["images"]:
            assert image["bytes"] == (raw / COCO / image["path"]).read_bytes()
    assert run(raw, tmp_path, source="otter_mimicit_vst") == 0
    images = [image for row in load(tmp_path / "otter_mimicit_vst") for image in row["images"]]
    assert {image["bytes"][:4] for image in images} == {b"\x89PNG"} and {image["path"] for image in images} == {None}


def test_samples_are_joined_at_random_each_used_once(many, tmp_path):
    assert run(many, tmp_path) == 0
    joined, used = Counter(), []
    for row in load(tmp_path / "llava"):
        texts = [message["content"][-1]["text"] for message in row["messages"]]
        numbers = [int(text[1:-1]) for text in texts[::2]]
        assert texts[1::2] == [f"A{number}." for number in numbers]
        assert [Path(image["path"]).stem for image in row["images"]] == [f"{number % 6 + 1:012d}" for number in numbers]
        assert row["id"] == "+".join(f"detail_23k:row{number}" for number in numbers)
        joined[len(numbers)] += 1
        used += numbers
    assert sorted(used) == list(range(60)) and used != sorted(used)
    assert set(joined) == {1, 2, 3} and min(joined.values()) > 2


def test_the_seed_decides_and_not_the_number_of_processes(many, tmp_path):
    for folder, num_proc, seed in (("one", 1, 5), ("two", 2, 5), ("other", 1, 6)):
        assert run(many, tmp_path / folder, "--rows-per-shard", 7, "--seed", seed, num_proc=num_proc) == 0
    one, two, other = (load(tmp_path / folder / "llava").to_list() for folder in ("one", "two", "other"))
    assert one == two != other
    assert summary(tmp_path / "one") == summary(tmp_path / "two")
    assert len(identities(tmp_path / "one/llava")) == -(-len(one) // 7)


def test_max_samples_takes_the_first_rows_of_the_same_order(many, tmp_path):
    assert run(many, tmp_path / "all") == 0
    assert run(many, tmp_path / "some", "--max-samples", 4) == 0
    assert load(tmp_path / "some/llava").to_list() == load(tmp_path / "all/llava").to_list()[:4]


def break_pictures(root):
    """Four pictures of detail_23k are broken, each in its own way, and one answer is empty."""
    rows = [llava(number, (f"Q{number}?", f"A{number}.")) for number in range(1, 7)]
    rows[4]["conversations"][1]["value"] = ""
    write_json(root / DETAIL, rows)
    write_json(root / REASONING, [])
    pictures = [root / COCO / f"{number:012d}.jpg" for number in range(1, 5)]
    write_picture(pictures[1], 2, size=(64, 64))
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:-200])
    pictures[2].write_bytes(b"<html>404</html>")
    pictures[3].write_bytes(b"")
    return [
        ("missing image", DETAIL, "0", "image"),
        ("truncated image", DETAIL, "1", "image"),
        ("undecodable image", DETAIL, "2", "image"),
        ("truncated image", DETAIL, "3", "image"),
        ("empty answer", DETAIL, "4", "conversations[1].value"),
    ]


def test_check_names_every_problem_and_writes_no_rows(tmp_path, capsys):
    root, output = copy_raw(tmp_path / "raw"), tmp_path / "out"
    expected = break_pictures(root)
    assert run(root, output, "--check", num_proc=2) == 1
    assert problems(output / "llava.problems.jsonl") == expected
    assert [path.name for path in output.iterdir()] == ["llava.problems.jsonl"]
    shown = capsys.readouterr().out
    assert "5 problems in 5 examples" in shown and "2  truncated image" in shown
    assert f"{DETAIL}, example 0, image: missing image: there is no file {root / COCO / '000000000001.jpg'}" in shown
    assert visualchat(["prepare", "--source", "minigpt4", "--data-root", str(root), "--check", "--num-proc", "1"]) == 0


def test_bad_rows_stop_unless_they_are_skipped(tmp_path, capsys):
    root, output = copy_raw(tmp_path / "raw"), tmp_path / "out"
    expected = break_pictures(root)
    assert run(root, output) == 1
    assert not (output / "llava").exists()
    assert "not finished" in capsys.readouterr().err
    before = identities(output / "llava.partial/shards")
    assert run(root, output, "--skip-bad") == 0
    assert identities(output / "llava") == before  # nothing was decoded twice
    (row,) = load(output / "llava")
    assert [message["content"][-1]["text"] for message in row["messages"]] == ["Q6?", "A6."]
    assert problems(output / "llava/problems.jsonl") == expected
    kept = summary(output)
    assert kept["problems"] == {"missing image": 1, "truncated image": 2, "undecodable image": 1, "empty answer": 1}
    assert (kept["rows"], kept["samples"], kept["images"], kept["rounds"]) == (1, 1, 1, 1)


def test_mended_pictures_make_their_shards_anew(tmp_path):
    root, output = make_llava(tmp_path / "raw", 24), tmp_path / "out"
    (root / COCO / "000000000003.jpg").rename(root / "kept.jpg")
    assert run(root, output, "--rows-per-shard", 2) == 1
    before, bad = identities(output / "llava.partial/shards"), set()
    for path in (output / "llava.partial/reports").iterdir():
        if json.loads(path.read_text())["problems"]:
            bad.add(path.with_suffix(".parquet").name)
    assert 0 < len(bad) < len(before)
    (root / "kept.jpg").rename(root / COCO / "000000000003.jpg")
    assert run(root, output, "--rows-per-shard", 2) == 0
    after = identities(output / "llava")
    assert {name for name in before if before[name] != after[name]} == bad
    assert summary(output)["samples"] == 24


def test_bad_base64_and_dropped_samples_of_a_joined_row(tmp_path):
    root, output = copy_raw(tmp_path / "raw"), tmp_path / "out"
    archive = json.loads((root / "MIMIC-IT/SN.json").read_text())
    archive["SN_IMG_3"], archive["SN_IMG_4"] = "no*base64", as_base64(4)[:-40]
    write_json(root / "MIMIC-IT/SN.json", archive)
    assert run(root, output, "--skip-bad", source="otter_mimicit_sn") == 0
    file = "MIMIC-IT/SN_instructions.json"
    found = problems(output / "otter_mimicit_sn/problems.jsonl")
    assert found[0] == ("undecodable image", file, "SN_INS_2", "image_ids[2]")
    assert found[1][1:] == (file, "SN_INS_2", "image_ids[3]") and found[1][0] in ("truncated image", "undecodable image")
    assert len(load(output / "otter_mimicit_sn")) == 1


def test_books_of_one_pixel_are_left_out(raw, tmp_path):
    assert run(raw, tmp_path, source="ocr_vqa") == 0
    assert [row["id"] for row in load(tmp_path / "ocr_vqa")] == ["dataset:111"]
    reason = "samples whose image has fewer than 2 pixels a side"
    assert summary(tmp_path, "ocr_vqa")["left_out"] == {reason: 1, "records of a held-out split": 1}


def children(process):
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    root = make_llava(tmp_path / "raw", 800)
    shared = ["--rows-per-shard", "2"]
    words = command("prepare", "--source", "llava", "--data-root", root, "--num-proc", "2")
    process = subprocess.Popen(
        [*words, "--output", tmp_path / "out", *shared], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    reports, limit = tmp_path / "out/llava.partial/reports", time.monotonic() + 60
    while len(list(reports.glob("*.json"))) < 5:
        assert process.poll() is None and time.monotonic() < limit, "the run ended before it could be killed"
        time.sleep(0.005)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    limit = time.monotonic() + 20
    while workers and time.monotonic() < limit:  # they end with it
        time.sleep(0.05)
        workers = [worker for worker in workers if Path(f"/proc/{worker}/cmdline").exists()]
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert not workers, "workers outlive the main process"
    shards = tmp_path / "out/llava.partial/shards"
    finished = {f"{path.stem}.parquet" for path in reports.glob("*.json")}
    before = {name: identity for name, identity in identities(shards).items() if name in finished}
    assert not (tmp_path / "out/llava").exists()
    (shards / ".shard-00000-of-00000.parquet.1").write_bytes(b"half")

    assert run(root, tmp_path / "out", *shared, "--seed", 1) == 2  # refused: nothing is touched
    assert run(root, tmp_path / "out", *shared) == 0
    after = identities(tmp_path / "out/llava")
    assert 5 <= len(before) < len(after)
    assert {name: after[name] for name in before} == before
    assert run(root, tmp_path / "whole", *shared) == 0
    assert load(tmp_path / "out/llava").to_list() == load(tmp_path / "whole/llava").to_list()
    assert summary(tmp_path / "out") == summary(tmp_path / "whole")
    names = set(os.listdir(tmp_path / "out/llava"))
    assert names == {*after, "prepared.json", "problems.jsonl", "README.md"}


def test_other_settings_are_refused_by_name(many, tmp_path, capsys):
    assert run(many, tmp_path, "--seed", 1) == 0
    before = identities(tmp_path / "llava")
    capsys.readouterr()
    assert run(many, tmp_path, "--seed", 2, "--max-samples", 5) == 2
    error = capsys.readouterr().err
    assert "seed was 1, now 2" in error and "max_samples was None, now 5" in error and "--overwrite" in error
    assert run(many, tmp_path, "--seed", 1) == 0
    assert identities(tmp_path / "llava") == before
    assert "is complete" in capsys.readouterr().out
    assert run(many, tmp_path, "--seed", 2, "--max-samples", 5, "--overwrite") == 0
    assert len(load(tmp_path / "llava")) == 5


def test_changed_raw_files_are_noticed(tmp_path, capsys):
    root = make_llava(tmp_path / "raw", 6)
    assert run(root, tmp_path / "out") == 0
    write_json(root / DETAIL, json.loads((root / DETAIL).read_text())[:5])
    assert run(root, tmp_path / "out") == 2
    assert f"bytes of {DETAIL} was " in capsys.readouterr().err


def test_foreign_folders_are_left_alone(many, tmp_path, capsys):
    (tmp_path / "llava").mkdir()
    assert run(many, tmp_path, "--overwrite") == 2
    assert "not made by this program" in capsys.readouterr().err


def test_missing_raw_files_and_arguments_are_named(tmp_path, capsys):
    assert run(tmp_path, tmp_path / "out", source="minigpt4") == 2
    error = capsys.readouterr().err
    assert "minigpt4" in error and str(tmp_path / "cc_sbu_align/filter_cap.json") in error
    for arguments, message in (
        (["--source", "llava"], "--data-root, --output missing"),
        (["--check"], "--source or --dataset missing"),
        (["--list", "--num-proc", "0"], "--num-proc must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            visualchat(["prepare", *arguments])
        assert message in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "out", source="lava") == 2
    assert "there is no source 'lava': use one of" in capsys.readouterr().err


def test_list_shows_each_source_and_its_files(capsys):
    assert visualchat(["prepare", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, source in SOURCES.items():
        assert name in shown and all(raw.path in shown for raw in source.files) and source.images in shown
