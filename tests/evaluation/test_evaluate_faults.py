"""What `visualchat evaluate` cannot answer is named, and the rest goes on."""

import base64
import json
import re

import datasets
import pytest
from PIL import Image

from helpers.evaluation import by_round, journal, make_row, results, run
from helpers.tiny import digit_image, make_model, make_processor


class TestBroken:
    def test_a_broken_picture_is_named_and_the_rest_goes_on(self, root, tmp_path, capsys):
        (tmp_path / "broken.png").write_bytes(b"no picture")
        tests = {
            "sound": [["What is this?", str(root / "pictures/0.png")]],
            "broken": [["What is this?"], ["And this?", "broken.png"], ["1 2 3"]],
            "missing": [["What is this?", "missing.png"]],
            "odd": [["What is this?"], "And this?"],
            "empty": [],
        }
        (tmp_path / "eval.json").write_text(json.dumps(tests))
        assert run(root, tmp_path / "out", data=("--conversations", tmp_path / "eval.json")) == 1
        assert set(by_round(journal(tmp_path / "out"))) == {("sound", 1), ("broken", 1)}
        found = results(tmp_path / "out", root)
        failures = {one["test_name"]: one for one in found["failures"]}
        assert {name: (one["round"], one["unanswered"]) for name, one in failures.items()} == {
            "broken": (2, 2),
            "missing": (1, 1),
            "odd": (1, 1),
            "empty": (1, 0),
        }
        where = f"{tmp_path}/eval.json"
        errors = {name: one["error"] for name, one in failures.items()}
        assert errors["broken"].startswith(f"{where}, broken, round 2: {tmp_path}/broken.png is not an image")
        assert errors["missing"] == f"{where}, missing, round 1: there is no file {tmp_path}/missing.png"
        assert errors["odd"].startswith(f"{where}, odd: round 2: expected")
        assert errors["empty"] == f"{where}, empty: expected a list of rounds, got []"
        said = capsys.readouterr()
        assert all(error in said.err for error in errors.values())
        assert "2 answers, 4 of 5 dialogues failed" in said.out
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert page.count('<tr class="failed">') == 4 and "image 1, cannot be read" in page

        digit_image(9).save(tmp_path / "broken.png")  # a mended picture is asked about, and nothing else again
        before = journal(tmp_path / "out")
        assert run(root, tmp_path / "out", data=("--conversations", tmp_path / "eval.json")) == 1
        after = journal(tmp_path / "out")
        assert after[:2] == before
        assert {(one["test_name"], one["round"]) for one in after[2:]} == {("broken", 2), ("broken", 3)}

    def test_what_does_not_fit_the_context_is_named(self, root, tmp_path):
        (tmp_path / "eval.json").write_text(json.dumps({"long": [["1 2 3"], ["word " * 2000]], "short": [["1"]]}))
        assert run(root, tmp_path / "out", data=("--conversations", tmp_path / "eval.json")) == 1
        (failure,) = results(tmp_path / "out", root)["failures"]
        assert (failure["test_name"], failure["round"]) == ("long", 2)
        assert re.search(r"long, round 2: the conversation has \d+ tokens and the answer up to 6, but", failure["error"])

    @pytest.mark.parametrize(
        "text, message",
        [
            ('{"a": [["b"],\n ["c"}', r"eval\.json: line 2, column 6: this is not JSON"),
            ('[["a"]]', r"eval\.json: expected an object .* got \[\[\"a\"\]\]"),
            ("{}", r"expected an object .* with one test at least"),
            ('{"a": [["b"]], "a": [["c"]]}', r"eval\.json: the name 'a' occurs more than once"),
        ],
    )
    def test_malformed_json(self, root, tmp_path, capsys, text, message):
        (tmp_path / "eval.json").write_text(text)
        assert run(root, tmp_path / "out", data=("--conversations", tmp_path / "eval.json")) == 2
        assert re.search(message, capsys.readouterr().err)

    def test_missing_data_and_models(self, root, tmp_path, capsys):
        assert run(root, tmp_path, data=("--conversations", "nothing.json")) == 2
        assert f"{root}/nothing.json: there is no such file" in capsys.readouterr().err
        assert run(root, tmp_path, data=("--labelled", "nothing.parquet")) == 2
        assert "nothing.parquet" in capsys.readouterr().err
        assert run(root, tmp_path, model=("nothing",)) == 2
        assert f"there is no folder {root}/nothing" in capsys.readouterr().err
        (tmp_path / "bad.jsonl").write_text('{"messages": [\n')
        assert run(root, tmp_path, data=("--labelled", tmp_path / "bad.jsonl")) == 2
        assert "bad.jsonl" in capsys.readouterr().err

    def test_nothing_answered_is_status_2(self, root, tmp_path):
        (tmp_path / "eval.json").write_text(json.dumps({"a": [["What is this?", "missing.png"]]}))
        assert run(root, tmp_path / "out", data=("--conversations", tmp_path / "eval.json")) == 2
        assert (tmp_path / "out" / "report.html").exists()

    def test_a_picture_that_is_too_thin_is_named(self, root, tmp_path):
        make_model(image_number_keys=True).save_pretrained(tmp_path / "model")
        make_processor({"shortest_edge": 16}).save_pretrained(tmp_path / "model")
        Image.new("L", (400_000, 1)).save(tmp_path / "thin.png")
        (tmp_path / "eval.json").write_text(json.dumps({"thin": [["1"], ["And this?", "thin.png"]], "short": [["1"]]}))
        paths = {"data": ("--conversations", tmp_path / "eval.json"), "model": (tmp_path / "model",)}
        assert run(root, tmp_path / "out", **paths) == 1
        (failure,) = results(tmp_path / "out", root, tmp_path / "model")["failures"]
        assert (failure["test_name"], failure["round"]) == ("thin", 2)
        assert "thin, round 2: An image of 400000×1 pixels is too thin" in failure["error"]

    def test_pictures_of_the_home_directory_and_of_urls(self, root, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(root))
        picture = (root / "pictures" / "0.png").read_bytes()
        sources = ["~/pictures/0.png", (root / "pictures" / "0.png").as_uri()]
        sources.append("DATA:image/png;base64," + base64.b64encode(picture).decode())
        tests = {str(k): [["What is this?", source]] for k, source in enumerate(sources)}
        (tmp_path / "eval.json").write_text(json.dumps(tests))
        assert run(root, tmp_path / "out", data=("--conversations", tmp_path / "eval.json")) == 0
        assert len({one["answer"] for one in journal(tmp_path / "out")}) == 1

    def test_a_bad_row_of_a_labelled_set(self, root, tmp_path):
        rows = [make_row(k, images=1, rounds=2) for k in range(4)]
        rows[1]["images"][0]["bytes"] = b"no picture"
        rows[2]["images"] = []
        rows[3]["task"] = ["one"]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        assert run(root, tmp_path / "out", data=("--labelled", tmp_path / "rows.parquet")) == 1
        found = results(tmp_path / "out", root)
        assert found["exact"]["count"] == 2 and found["loss"]["conversations"] == 1
        errors = [one["error"] for one in found["failures"]]
        where = f"{tmp_path}/rows.parquet, example"
        assert errors[0].startswith(f"{where} 1, round 1: 10 bytes is not an image")
        assert errors[1] == f"{where} 2: images: image count: 1 image parts need an image, but there are 0 images"
        assert errors[2] == f"{where} 3: task: missing field: 1 tasks for 2 answers"
