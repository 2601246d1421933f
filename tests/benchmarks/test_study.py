"""The study from scratch: tasks, measures, and the whole of it in small. That docs/attention.md repeats it is tested too."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study import pretrained_report
from benchmarks.study import run as study
from benchmarks.study.jobs import Job, work
from benchmarks.study.measures import collate, compare_memory, image_attention, score
from benchmarks.study.report import STUDIES, read_study, write_document
from benchmarks.study.results import interval, paired, samples_to_reach
from benchmarks.study.scratch_report import RECOMMENDATION
from benchmarks.study.scratch_runs import (
    CHANGES,
    GRIDS,
    build,
    join_samples,
    list_jobs,
    load_processor,
    perform,
    run,
)
from benchmarks.study.scratch_tasks import SHADES, load_task
from benchmarks.study.tables import headline_table
from helpers.server import wait_until
from helpers.tiny import make_model, make_processor
from modeling_visualchat.messages_visualchat import fill_images


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole study, the tiny grid, and its folder."""
    folder = tmp_path_factory.mktemp("study")
    study.main(["scratch", "--grid", "tiny", "--output", str(folder)])
    return folder


class TestTasks:
    @pytest.mark.parametrize("seed", range(3))
    def test_patches_of_one_place_are_in_one_split(self, seed):
        splits = load_task("patches", seed).splits
        pixels = {name: {np.asarray(p).tobytes() for p in split.images} for name, split in splits.items()}
        # A flat sky has equal patches in several places
        shared = pixels["train"] & pixels["test"]
        assert len(shared) < 0.02 * len(pixels["test"])
        assert min(np.bincount(splits["train"].labels, minlength=8)) > 200
        assert min(np.bincount(splits["test"].labels, minlength=8)) > 0

    def test_answers_are_true(self):
        for row in load_task("patches", 0).conversations("test", 200, 0):
            shades, rough = [label // 2 for label in row["labels"]], [label % 2 for label in row["labels"]]
            seen = 0
            for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
                seen += sum(part["type"] == "image" for part in question["content"])
                text, answer = question["content"][-1]["text"], answer["content"]
                asked = [int(word.strip("?,")) - 1 for word in text.split() if word.strip("?,").isdigit()]
                if text.startswith("How bright"):
                    assert answer == SHADES[shades[asked[0]]]
                elif text.startswith("Do image"):
                    assert answer == ("yes" if rough[asked[0]] == rough[asked[1]] else "no")
                elif text.startswith("Which is"):
                    assert answer == f"image {max(asked, key=lambda k: shades[k]) + 1}"
                else:
                    assert answer == ("none", "one", "two", "three", "four")[sum(rough[:seen])]

    def test_patches_are_as_bright_as_they_are_called(self):
        test = load_task("patches", 0).splits["test"]
        means = np.array([np.asarray(picture.convert("L")).mean() for picture in test.images])
        shades = test.labels // 2
        for shade in range(3):
            assert means[shades == shade].max() < means[shades == shade + 1].min()

    def test_joined_samples_are_the_same_samples(self):
        rows = join_samples(load_task("digits", 0), 50, 0)
        assert {len(row["samples"]) for row in rows} == {1, 2, 3, 4}
        for row in rows:
            for number, sample in enumerate(row["samples"], 1):
                question, answer = row["messages"][2 * number - 2 : 2 * number]
                assert question["content"][-1]["text"] == f"What digit is in image {number}?"
                assert sample["messages"][0]["content"][-1]["text"] == "What digit is in image 1?"
                assert answer == sample["messages"][1]
                assert row["images"][number - 1] is sample["images"][0]


class TestMeasures:
    def test_one_pass_judges_as_greedy_decoding_does(self):
        """On answers that the model gives, and on others."""
        model, processor = make_model(multimodal_attention="mmca", image_number_keys=True), make_processor()
        tokenizer, end = processor.tokenizer, processor.tokenizer.eos_token_id
        with torch.no_grad():  # some answers end soon
            model.lm_head.weight[end] *= 1.5
        rows = load_task("digits", 0).conversations("test", 30, 0)
        expected = []
        for count, row in enumerate(rows):
            for index in range(1, len(row["messages"]), 2):
                inputs = processor.apply_chat_template(
                    fill_images(row, "row")[:index],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
                tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)[
                    0, inputs["input_ids"].shape[1] :
                ].tolist()
                answer = tokenizer.decode(tokens, skip_special_tokens=True)
                # Random tokens need not be those that spell their text
                is_spelled = tokens == [*tokenizer.encode(answer, add_special_tokens=False), end]
                if count % 2 and is_spelled:
                    row["messages"][index]["content"] = answer
                expected.append(is_spelled and row["messages"][index]["content"] == answer)
        right, loss = score(model, collate(processor, rows))
        assert right.tolist() == expected
        assert sum(expected) > 3 and not all(expected) and loss > 0

    def test_attention_to_images_is_half_of_plain_mmcas_and_of_cross_attentions(self):
        for attention, is_half in (("mmca", True), ("mmca_merged", False), ("causal", False), ("cross", True)):
            model = make_model(multimodal_attention=attention)
            shares = image_attention(model, make_processor(), load_task("digits", 0), "test", 6, 0)
            assert all((abs(share - 0.5) < 1e-5) == is_half for share in shares["images"])
            assert all(0 < share < 1 for share in shares["asked"])

    def test_memory_answers_as_pixels_do(self):
        model = make_model(multimodal_attention="mmca", image_number_keys=True)
        rows = load_task("digits", 0).conversations("test", 5, 0)
        counts = compare_memory(model, make_processor(), rows)
        assert counts["questions"] == sum(len(row["kinds"]) for row in rows)
        assert counts["tokens"] > 0 and counts["different"] == 0

    def test_levels_and_intervals(self):
        points = [(512, 0.5), (1024, 0.7), (2048, 0.9)]
        run = {"curve": [{"conversations": count, "accuracy": accuracy} for count, accuracy in points]}
        assert samples_to_reach(run, 0.8) == pytest.approx(1024 * 2**0.5)
        assert samples_to_reach(run, 0.9) == pytest.approx(2048)
        assert samples_to_reach(run, 0.95) is None
        assert samples_to_reach(run, 0.4) == 512
        # t of 2 degrees of freedom is 4.303; the standard error of 1, 2, 3 is 1 / √3
        assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
        first, other = [{"x": 1.0}, {"x": 2.0}], [{"x": 2.0}, {"x": 3.0}]
        assert paired(first, other, lambda one: one["x"]) == (1.0, 0.0)


def test_workers_end_with_a_study_that_is_killed(tmp_path):
    program = (
        "import pathlib, time, os\nfrom multiprocessing import get_context\n"
        "from benchmarks.study.run import end_with_parent\n"
        "def work():\n    end_with_parent()\n    pathlib.Path('pid').write_text(str(os.getpid()))\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    get_context('spawn').Process(target=work).start()\n"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), seconds=120)
    finally:
        parent.kill()
        parent.wait()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestWholeStudy:
    def test_all_of_it_is_there(self, finished):
        study = json.loads((finished / "study_results.json").read_text())
        jobs = [job for stage in list_jobs(GRIDS["tiny"]) for job in stage]
        assert len(study["results"]) == len(jobs) == 1 + 4 + 12 + len(CHANGES)
        text = (finished / "study.md").read_text()
        assert "of which **0 differ**" in text
        for name in ("study_curves.png", "study_differences.png"):
            assert f"({name})" in text and (finished / name).stat().st_size > 10_000

    def test_what_is_done_is_not_done_again(self, finished, monkeypatch, capsys):
        done = sorted((finished / "results").iterdir())
        times = [path.stat().st_mtime_ns for path in done]
        done[0].unlink()  # as if it had been stopped there
        before = (finished / "study_results.json").read_text()
        study.main(["scratch", "--grid", "tiny", "--output", str(finished)])
        changed = [path for path, time in zip(done, times) if path.stat().st_mtime_ns != time]
        assert changed == done[:1]
        assert "min left" in capsys.readouterr().out
        # The job that was done again gave the same numbers
        seconds = {"seconds": None}
        first, again = (
            [{**result, **seconds} for result in json.loads(text)["results"]]
            for text in (before, (finished / "study_results.json").read_text())
        )
        assert first == again

    def test_results_of_other_settings_are_refused(self, finished):
        scale = replace(GRIDS["tiny"], probes=9)
        with pytest.raises(ValueError, match=r"made with other settings, .*'probes': 8"):
            work(perform, list_jobs(scale)[2][0], scale, finished)

    @pytest.mark.parametrize("projector", ["vit", "perceiver"])
    def test_projectors_are_changed(self, finished, projector):
        job = Job("change", 0, "digits", "mmca, numbered", "frozen", projector)
        assert build(job, load_processor(), finished).config.projector == projector

    def test_what_trains(self, finished):
        from safetensors.torch import load_file

        processor = load_processor()
        job = Job("run", 0, "digits", "mmca, numbered", "frozen")
        before = build(job, processor, finished).state_dict()
        after = load_file(finished / "trained" / f"{job.name}.safetensors")
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {name for name in after if "projector" in name or "embed_tokens" in name}
        # The other task trained the decoder of this regime, with the same attention
        weights = load_file(finished / "pretrained" / "digits-mmca, numbered-0.safetensors")
        moved = {name for name in weights if not torch.equal(weights[name], before[name])}
        assert moved == {name for name in weights if "language_model" in name or "lm_head" in name}
        assert run(job, GRIDS["tiny"], finished)["loss"] == pytest.approx(
            json.loads((finished / "results" / f"{job.name}.json").read_text())["loss"], rel=1e-4
        )


def test_the_published_document_is_that_of_its_results(tmp_path):
    docs = ROOT / "docs"
    for _, _, file in STUDIES.values():
        path = docs / f"{file}_results.json"
        if path.exists():
            (tmp_path / path.name).write_text(path.read_text())
    write_document(tmp_path)
    assert (tmp_path / "study.md").read_text() == (docs / "study.md").read_text()


def test_the_document_shows_what_was_found():
    study = read_study("scratch", ROOT / "docs")
    page = (ROOT / "docs" / "attention.md").read_text()
    assert headline_table(study) in page and RECOMMENDATION in page
    pretrained = read_study("pretrained", ROOT / "docs")
    assert headline_table(pretrained) in page and pretrained_report.RECOMMENDATION in page
    assert pretrained.grid == "published" and len(pretrained.seeds) == 3
    assert study.grid == "published"
