"""`visualchat evaluate`: conversations and labelled sets, several checkpoints, kills, and what is broken."""

import base64
import csv
import io
import json
import re
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image

from helpers.commands import command
from helpers.evaluation import CONVERSATIONS, LABELLED, by_round, journal, make_row, results, run, save_tiny
from helpers.tiny import make_processor
from modeling_visualchat import VisualChatDataCollator
from modeling_visualchat.messages_visualchat import fill_images
from visualchat.cli import main as visualchat
from visualchat.evaluation import answers, evaluate


class TestConversations:
    def test_answers_are_a_chat_sessions(self, root, conversations):
        model, processor = evaluate.load_checkpoint(str(root / "first"), "auto", "cpu", False), make_processor()
        found = by_round(journal(conversations))
        for name, rounds in CONVERSATIONS.items():
            chat = model.start_chat(processor)
            for number, (question, *paths) in enumerate(rounds, 1):
                pictures = [root / path for path in " ".join(paths).split()]
                answer = chat.send(question, images=pictures, max_new_tokens=6, do_sample=False)
                assert found[name, number] == answer, (name, number)
        assert len(found) == sum(map(len, CONVERSATIONS.values()))

    def test_a_batch_of_four_equals_one_by_one(self, root, conversations, tmp_path):
        assert run(root, tmp_path, "--batch-size", 1) == 0
        assert by_round(journal(tmp_path)) == by_round(journal(conversations))

    def test_csv_has_the_released_columns(self, conversations):
        (path,) = conversations.glob("*/answers.csv")
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert header == ["test_name", "image_path", "question", "answer"]
        found = by_round(journal(conversations))
        expected = [
            [name, paths[0] if paths else "", question, found[name, number]]
            for name, rounds in CONVERSATIONS.items()
            for number, (question, *paths) in enumerate(rounds, 1)
        ]
        assert rows == expected

    def test_the_report_is_self_contained_and_escaped(self, conversations):
        page = (conversations / "report.html").read_text(encoding="utf-8")
        assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "&lt;b&gt;short&lt;/b&gt;" in page
        urls = re.findall(r'<img src="([^"]*)"', page)
        assert len(urls) == 7
        for url in urls:
            head, _, data = url.partition(",")
            assert head == "data:image/jpeg;base64"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 8)
        assert not re.search(r'(src|href)="(?!data:)', page)

    def test_a_report_with_a_limit_shows_faults_first(self, root, tmp_path):
        tests = {"sound": [["1"]], "missing": [["2", "missing.png"]], "sound too": [["3"]]}
        (tmp_path / "eval.json").write_text(json.dumps(tests))
        data = ("--conversations", tmp_path / "eval.json")
        for limit, expected in ((3, ["sound", "missing", "sound too"]), (2, ["missing", "sound"])):
            assert run(root, tmp_path / "out", "--report-limit", limit, data=data) == 1
            page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
            assert re.findall("<h3>(.*)</h3>", page) == expected

    def test_image_root(self, root, conversations, tmp_path):
        (tmp_path / "elsewhere.json").write_text(json.dumps(CONVERSATIONS))
        words = ["--image-root", root]
        assert run(root, tmp_path / "out", *words, data=("--conversations", tmp_path / "elsewhere.json")) == 0
        assert by_round(journal(tmp_path / "out")) == by_round(journal(conversations))

    def test_drawn_answers_depend_on_the_seed_alone(self, root, tmp_path):
        drawn = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert run(root, tmp_path / name, "--temperature", 1.5, "--seed", seed) == 0
            drawn.append(journal(tmp_path / name))
        assert drawn[0] == drawn[1] != drawn[2]


class TestResume:
    @pytest.mark.parametrize("words", [(), ("--temperature", 1.5)], ids=["greedy", "drawn"])
    @pytest.mark.parametrize("data", [("--conversations", "eval.json"), LABELLED], ids=["conversations", "labelled"])
    def test_a_run_that_was_cut_off_goes_on(self, root, tmp_path, monkeypatch, words, data):
        """At every batch; the last line of what was cut off is half written."""
        words = ["--batch-size", 2, *words]
        assert run(root, tmp_path / "whole", *words, data=data) == 0
        generate, asked = evaluate.generate_answers, []

        def record(model, processor, conversations, **settings):
            asked.append(len(conversations))
            return generate(model, processor, conversations, **settings)

        monkeypatch.setattr(evaluate, "generate_answers", record)
        whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*/*.jsonl")}
        lines = whole["answers.jsonl"].splitlines(keepends=True)
        folder = next(path for path in (tmp_path / "whole").iterdir() if path.is_dir())
        for kept in (0, 3, len(lines) - 1):
            cut = tmp_path / str(kept) / folder.name
            cut.mkdir(parents=True)
            (cut / "settings.json").write_bytes((folder / "settings.json").read_bytes())
            (cut / "answers.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
            asked.clear()
            assert run(root, cut.parent, *words, data=data) == 0
            assert {path.name: path.read_bytes() for path in cut.glob("*.jsonl")} == whole
            for name in ("results.json", "report.html"):
                assert (cut.parent / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            if not words[2:]:
                assert sum(asked) == len(lines) - kept
        asked.clear()
        assert run(root, tmp_path / "whole", *words, data=data) == 0
        assert not asked

    def test_a_killed_process_goes_on(self, root, tmp_path):
        tests = {f"test {k}": [["What is this?", str(root / f"pictures/{k % 8}.png")], ["1 2 3"]] for k in range(60)}
        (tmp_path / "eval.json").write_text(json.dumps(tests))
        data = ("--conversations", tmp_path / "eval.json")
        words = [root / "first", *data, "--output", tmp_path / "killed", "--batch-size", "2"]
        words = command("evaluate", *words, "--max-new-tokens", "6", "--device", "cpu")
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        started = time.monotonic()
        while not list((tmp_path / "killed").glob("*/answers.jsonl")) and time.monotonic() < started + 60:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        path = next((tmp_path / "killed").glob("*/answers.jsonl"))
        before = path.read_bytes()
        assert run(root, tmp_path / "killed", "--batch-size", 2, data=data) == 0
        assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
        assert run(root, tmp_path / "whole", "--batch-size", 2, data=data) == 0
        for name in ("answers.jsonl", "answers.csv"):
            whole = next((tmp_path / "whole").glob(f"*/{name}"))
            assert path.with_name(name).read_bytes() == whole.read_bytes()
        assert len(before.splitlines()) < len(path.read_bytes().splitlines())

    def test_other_settings_are_refused_with_both_values(self, root, tmp_path, capsys):
        assert run(root, tmp_path) == 0
        capsys.readouterr()
        assert run(root, tmp_path, "--temperature", 0.5) == 2
        error = capsys.readouterr().err
        assert "temperature 0.0, now 0.5" in error and "another --output" in error
        assert run(root, tmp_path, data=("--labelled", "rows.parquet")) == 2
        assert "eval.json" in (error := capsys.readouterr().err) and "rows.parquet" in error
        assert run(root, tmp_path, "--batch-size", 2) == 0  # the likeliest answers do not depend on it

    def test_other_weights_are_refused(self, root, tmp_path, capsys):
        save_tiny(tmp_path / "model")
        words = [tmp_path / "model"]
        assert run(root, tmp_path / "out", model=words) == 0
        save_tiny(tmp_path / "model", seed=1)
        assert run(root, tmp_path / "out", model=words) == 2
        assert re.search(r"weights '[0-9a-f]{64}', now '[0-9a-f]{64}'", capsys.readouterr().err)


class TestLabelled:
    def test_every_answer_is_given_with_the_true_ones_before_it(self, root, labelled):
        model, processor = evaluate.load_checkpoint(str(root / "first"), "auto", "cpu", False), make_processor()
        rows = [make_row(k, images=k % 3, rounds=1 + k % 3) for k in range(9)]
        found = by_round(journal(labelled))
        assert len(found) == sum(len(row["task"]) for row in rows)
        for row in rows:
            messages = fill_images(row, "row")
            for number in range(1, len(row["task"]) + 1):
                prompt = messages[: 2 * number - 1]
                expected = answers.generate_answers(model, processor, [prompt], do_sample=False, max_new_tokens=6)
                assert [found[row["id"], number]] == expected

    def test_the_loss_is_the_models_own(self, root, labelled):
        model, processor = evaluate.load_checkpoint(str(root / "first"), "auto", "cpu", False), make_processor()
        rows = [make_row(k, images=k % 3, rounds=1 + k % 3) for k in range(9)]
        batch = VisualChatDataCollator(processor)(rows)
        with torch.no_grad():
            expected = model(**batch).loss.item()
        found = results(labelled, root)["loss"]
        assert found["value"] == pytest.approx(expected, rel=1e-5)
        assert found["low"] < found["value"] < found["high"]
        assert found["conversations"] == 9
        assert found["tokens"] == int((batch["labels"] != -100).sum())

    def test_scores_by_task_and_round(self, root, labelled):
        found = results(labelled, root)
        assert {task: one["exact"]["count"] for task, one in found["by_task"].items()} == {"first": 9, "later": 9}
        assert {number: one["exact"]["count"] for number, one in found["by_round"].items()} == {"1": 9, "2": 6, "3": 3}
        assert found["exact"]["right"] == sum(entry["exact"] for entry in journal(labelled))

    def test_the_source_is_the_task_where_there_is_none(self, root, tmp_path):
        messages = make_row(0, 0, 1)["messages"]
        rows = [{"messages": messages, "source": source, "task": None} for source in ("a", "b", "b")]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run(root, tmp_path / "out", data=("--labelled", tmp_path / "rows.jsonl")) == 0
        found = results(tmp_path / "out", root)
        assert {task: one["exact"]["count"] for task, one in found["by_task"].items()} == {"a": 1, "b": 2}


class TestCompare:
    def test_two_checkpoints_side_by_side(self, root, tmp_path):
        assert run(root, tmp_path, data=LABELLED, model=("first", "other")) == 0
        first, other = by_round(journal(tmp_path)), by_round(journal(tmp_path, model="other"))
        assert first != other
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        heads = [page.count(f"<th>{root}/{name}</th>") for name in ("first", "other")]
        assert heads == [1 + 9, 1 + 9 + 1]  # of the summary, the dialogues and the differences
        for answer in [*first.values(), *other.values()]:
            if answer.isalnum():
                assert answer in page
        differences = json.loads((tmp_path / "results.json").read_text())["differences"][f"{root}/other"]
        losses = [results(tmp_path, root, name)["loss"]["value"] for name in ("other", "first")]
        assert differences["loss"]["value"] == pytest.approx(losses[0] - losses[1])
        assert differences["loss"]["low"] <= differences["loss"]["value"] <= differences["loss"]["high"]

    def test_a_checkpoint_that_was_evaluated_is_not_again(self, root, tmp_path, monkeypatch):
        assert run(root, tmp_path, model=("first",)) == 0
        seen = []
        generate = evaluate.generate_answers
        monkeypatch.setattr(
            evaluate, "generate_answers", lambda *given, **settings: seen.append(1) or generate(*given, **settings)
        )
        assert run(root, tmp_path, model=("first", "other"), data=("--conversations", "eval.json")) == 0
        assert len(seen) == max(map(len, CONVERSATIONS.values()))  # the other's alone, all dialogues at once

    def test_the_same_twice_is_refused(self, root, tmp_path, capsys):
        assert run(root, tmp_path, model=("first", "first")) == 2
        assert "is given twice" in capsys.readouterr().err

    def test_an_adapter_answers_as_merged(self, root, tmp_path):
        from peft import LoraConfig, get_peft_model

        base = evaluate.load_checkpoint(str(root / "first"), "auto", "cpu", False)
        base.name_or_path = str(root / "first")
        torch.manual_seed(0)
        targets = r".*language_model\.layers\..*\.v_proj"
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        make_processor().save_pretrained(tmp_path / "adapter")
        visualchat(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
        models = ("first", tmp_path / "adapter", tmp_path / "merged")
        assert run(root, tmp_path / "out", model=models) == 0
        plain, adapter, merged = (by_round(journal(tmp_path / "out", model=one)) for one in ("first", "adapter", "merged"))
        assert adapter == merged != plain
