"""The study with pretrained parts: its data, the changes of the attention, and the whole of it with tiny random parts."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from benchmarks.study import drawings as drawings_module
from benchmarks.study import pretrained_runs
from benchmarks.study.attention_changes import AttentionChange, change_attention
from benchmarks.study.drawings import Drawings, StoredTower, make_pixel_processor, name_scene
from benchmarks.study.jobs import Job, restore, work
from benchmarks.study.report import read_results, read_study, write_document, write_results
from examples.pictures.conversations import list_questions, split_kinds
from examples.pictures.kinds import list_kinds
from helpers.pictures import save_parts
from helpers.tiny import make_inputs, make_model


KINDS = 20


def use_few_kinds(patch) -> None:
    """The names of all kinds are one token of SmolLM2's only."""
    patch.setattr(drawings_module, "one_token_kinds", lambda tokenizer: list_kinds()[:KINDS])
    patch.setattr(drawings_module, "split_kinds", lambda kinds, held_out, seed: split_kinds(kinds, 4, seed))


@pytest.fixture
def few_kinds(monkeypatch):
    use_few_kinds(monkeypatch)


class TestData:
    def test_a_pixel_names_its_scene(self):
        indices = [0, 5, 255, 256, 70_000]
        pixels = make_pixel_processor()([name_scene(index) for index in indices], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (5, 3, 1, 1)
        features = torch.arange(70_001, dtype=torch.float)[:, None, None]
        assert StoredTower(features, None)(pixels).last_hidden_state.flatten().tolist() == indices

    def test_answers_are_those_of_the_scenes_that_the_images_name(self, few_kinds):
        drawings = Drawings(None, {"train": 60, "test": 40, "unseen": 16})
        scenes = drawings.scenes
        for example in [*drawings.conversations("test", 50, 1), *drawings.probes("test", 3, 20, 1), *drawings.unseen()]:
            shown = [scenes[index_of(image)] for image in example["images"]]
            seen = 0
            for question, answer in zip(example["messages"][::2], example["messages"][1::2]):
                seen += sum(part["type"] == "image" for part in question["content"])
                answers = {one.text: one.answer for one in list_questions(shown[:seen])}
                assert answers[question["content"][-1]["text"]] == answer["content"][0]["text"]
        trained = {thing.kind for scene in drawings.splits["train"].scenes for thing in scene.things}
        assert not trained & {thing.kind for scene in drawings.splits["unseen"].scenes for thing in scene.things}

    def test_the_order_keeps_each_conversation(self, few_kinds):
        examples = Drawings(None, {"train": 60, "test": 40, "unseen": 16}).conversations("train", 100, 0)
        ordered = pretrained_runs.batch_by_length(examples, 0)
        assert sorted(map(id, ordered)) == sorted(map(id, examples)) and ordered != examples
        batches = (-1, pretrained_runs.BATCH_SIZE)
        lengths = np.array([pretrained_runs.estimate_length(one) for one in ordered[:96]]).reshape(batches)
        assert np.ptp(lengths, axis=1).mean() < 0.5 * np.ptp(lengths)


def index_of(image) -> int:
    red, green, blue = image.getpixel((0, 0))
    return red + 256 * green + 65536 * blue


class TestChanges:
    def logits(self, change: AttentionChange | None, **config) -> torch.Tensor:
        model = make_model(seed=3, **config)
        if change is not None:
            change_attention(model, change)
        inputs = make_inputs(["tiitit", "tt", "itt"], model, padding_side="right")
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        return logits[inputs["attention_mask"].bool()]

    @pytest.mark.parametrize("numbered", [{}, {"learned_image_numbers": 4}, {"image_number_keys": True}])
    @pytest.mark.parametrize("prefix", [None, [5, 9, 17]])
    @pytest.mark.parametrize("attention", ["mmca", "mmca_merged"])
    def test_without_a_change_it_is_the_definition(self, attention, prefix, numbered):
        config = {"multimodal_attention": attention, "image_prefix_ids": prefix, **numbered}
        torch.testing.assert_close(self.logits(AttentionChange(), **config), self.logits(None, **config))

    @pytest.mark.parametrize(
        "change",
        [
            AttentionChange(image_weight=0.5),
            AttentionChange(sees_own_image=True),
            AttentionChange(image_positions="begin"),
            AttentionChange(image_positions="none"),
        ],
    )
    @pytest.mark.parametrize("prefix", [None, [5, 9, 17]])
    def test_a_change_changes(self, change, prefix):
        config = {"multimodal_attention": "mmca", "image_prefix_ids": prefix}
        assert (self.logits(change, **config) - self.logits(None, **config)).abs().max() > 1e-4

    def test_a_learned_weight_begins_as_the_paper_has_it_and_has_a_gradient(self):
        model = make_model(seed=3, multimodal_attention="mmca")
        change_attention(model, AttentionChange(image_weight=None))
        inputs = make_inputs(["tiitit"], model)
        model(**inputs, use_cache=False, labels=inputs["input_ids"]).loss.backward()
        assert all(layer.self_attn.image_weight.grad.abs().min() > 0 for layer in model.model.language_model.layers)
        torch.testing.assert_close(
            self.logits(AttentionChange(image_weight=None), multimodal_attention="mmca"),
            self.logits(None, multimodal_attention="mmca"),
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole study, the tiny grid, done in this process; and its folder."""
    folder, scale = tmp_path_factory.mktemp("study"), pretrained_runs.GRIDS["tiny"]
    threads = torch.get_num_threads()
    save_parts(folder / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained_runs, "PARTS", folder / "parts")
        use_few_kinds(patch)
        for cached in (pretrained_runs.load_processor, pretrained_runs.load_drawings):
            cached.cache_clear()
        jobs = [job for stage in pretrained_runs.list_jobs(scale) for job in stage]
        results = [{**asdict(job), **work(pretrained_runs.perform, job, scale, folder)} for job in jobs]
        torch.set_num_threads(threads)
        yield folder, results
        for cached in (pretrained_runs.load_processor, pretrained_runs.load_drawings):
            cached.cache_clear()


@pytest.mark.slow
class TestWholeStudy:
    def test_all_of_it_is_there(self, finished, tmp_path):
        _, results = finished
        write_results("pretrained", "tiny", results, tmp_path)
        write_document(tmp_path)
        text = (tmp_path / "study.md").read_text()
        assert "of which **0 differ**" in text and "## With pretrained parts" in text and "From scratch" not in text
        assert "| image_numbers | `mmca_merged, numbered, prefix`, frozen | 0.001: " in text
        for name in ("study_pretrained_curves.png", "study_pretrained_differences.png"):
            assert f"({name})" in text and (tmp_path / name).stat().st_size > 10_000
        study = read_study("pretrained", tmp_path)
        assert study.variants == list(pretrained_runs.VARIANTS) and study.changes == list(pretrained_runs.CHANGES)

    def test_published_results_are_not_computed_again(self, finished, tmp_path):
        _, results = finished
        scale = pretrained_runs.GRIDS["tiny"]
        write_results("pretrained", "tiny", results, tmp_path)
        published = read_results("pretrained", tmp_path)["results"]
        restore(published, scale, pretrained_runs.LEAVE_FILES, tmp_path)

        def fail(*args):
            raise AssertionError("computed again")

        for result in results:
            job = Job(*(result[name] for name in ("kind", "seed", "task", "variant", "regime", "change")))
            if job.kind in pretrained_runs.LEAVE_FILES:
                assert not (tmp_path / f"results/{job.name}.json").exists()
                continue
            again = work(fail, job, scale, tmp_path)
            assert again["seconds"] == result["seconds"] and again["machine"] == result["machine"]
        restore(published, pretrained_runs.GRIDS["published"], (), tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_what_is_not_finished_is_left_out(self, finished, tmp_path):
        _, results = finished
        of_lora = [result for result in results if result["regime"] == "lora" and result["kind"] == "run"]
        without = [result for result in results if result not in (of_lora[-1], results[-1])]
        write_results("pretrained", "tiny", without, tmp_path)
        write_document(tmp_path)
        study = read_study("pretrained", tmp_path)
        assert study.regimes == ["frozen"] and len(study.results) == len(results) - 1 - len(of_lora)
        text = (tmp_path / "study.md").read_text()
        assert "Not measured yet." in text and "With LoRA:" not in text
        of_lora = [result for result in results if result["regime"] == "lora" and result["kind"] == "change"]
        write_results("pretrained", "tiny", [result for result in results if result not in of_lora], tmp_path)
        write_document(tmp_path)
        assert "With LoRA:" in (tmp_path / "study.md").read_text()
        without = [result for result in results if result["kind"] != "run" or result["variant"] == "causal"]
        write_results("pretrained", "tiny", without, tmp_path)
        assert read_study("pretrained", tmp_path) is None

    def test_a_frozen_decoder_answers_text_as_before(self, finished):
        _, results = finished
        before = results[0]
        for result in results:
            if result["kind"] == "run" and result["regime"] == "frozen":
                assert result["text_answers"] == before["text_answers"], result["variant"]
                assert result["text_loss"] == pytest.approx(before["text_loss"], rel=1e-6)

    def test_all_variants_of_a_seed_begin_with_the_same_projector(self, finished):
        folder, _ = finished
        jobs = [Job("run", 0, "drawings", variant, "frozen") for variant in pretrained_runs.VARIANTS]
        first, *others = (pretrained_runs.build(job, folder).model.multi_modal_projector.state_dict() for job in jobs)
        for other in others:
            assert all(torch.equal(other[name], weight) for name, weight in first.items())

    def test_what_trains(self, finished):
        folder, _ = finished
        trained = {}
        for variant in ("mmca, numbered", "cross"):
            model = pretrained_runs.build(Job("run", 0, "drawings", variant, "frozen"), folder)
            pretrained_runs.choose_trained(model)
            names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            trained[variant] = {part for part in pretrained_runs.RATES if any(part in name for name in names)}
            assert all(any(part in name for part in pretrained_runs.RATES) for name in names)
        assert trained == {"mmca, numbered": {"projector", "image_numbers"}, "cross": {"projector", "cross_attn"}}
