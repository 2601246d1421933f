"""`visualchat train --resume`: what it goes on from, what it refuses, and the folder of a run."""

import errno
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from helpers.commands import run_command
from helpers.distributed import ENVIRONMENT
from helpers.tiny import make_model, make_processor
from helpers.training import FEATURES, arguments, losses, make_row, undo_end
from visualchat.errors import InputError
from visualchat.training import output_folder
from visualchat.training.arguments import DataArguments, ModelArguments
from visualchat.training.checkpoints import find_complete_checkpoint
from visualchat.training.run_record import Difference, find_differences, record_arguments
from visualchat.training.train import main
from visualchat.training.trainer import VisualChatTrainingArguments


# 16 examples are trained on, four steps an epoch: the run ends in the middle of the second
SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_fraction": 0.2}


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """A finished run with checkpoints of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("finished") / "run"
    main(arguments(parts, output, **SETTINGS))
    return output


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def killed(run):
    """As after a kill between steps 4 and 6."""
    undo_end(run, 6)
    return run


def train(parts: Path, output: Path, *words: str, **overrides) -> None:
    run_command("train", *arguments(parts, output, **{**SETTINGS, **overrides}), *words)


def contents(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def last_step(output: Path) -> int:
    return max(entry["step"] for entry in json.loads((output / "log.json").read_text()))


class TestFinishedRun:
    @pytest.mark.parametrize("epochs", [False, True])
    def test_nothing_changes(self, parts, run, tmp_path, epochs, caplog):
        settings = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"} if epochs else {}
        if epochs:
            run = tmp_path / "epochs"
            train(parts, run, **settings)
        before = contents(run)
        with caplog.at_level(logging.INFO):
            train(parts, run, "--resume", **settings)
        assert contents(run) == before
        assert "this run is finished" in caplog.text

    def test_without_checkpoints_too(self, parts, run):
        for step in (2, 4, 6):
            shutil.rmtree(run / f"checkpoint-{step}")
        before = contents(run)
        train(parts, run, "--resume")
        assert contents(run) == before

    def test_a_kill_after_the_last_step_saves_the_model_and_makes_no_step(self, parts, run, finished):
        undo_end(run)
        train(parts, run, "--resume")
        assert last_step(run) == 6 and not (run / "checkpoint-7").exists()
        saved, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, finished))
        assert all(torch.equal(saved[name], expected[name]) for name in expected)

    def test_more_steps_are_made_if_they_are_asked_for(self, parts, run):
        with pytest.raises(InputError, match=r"max_steps: 6 in the checkpoint, 8 now\n.*add --accept_changes"):
            train(parts, run, "--resume", max_steps=8)
        train(parts, run, "--resume", "--accept_changes", max_steps=8)
        assert last_step(run) == 8

    def test_more_steps_without_a_checkpoint(self, parts, run):
        for step in (2, 4, 6):
            shutil.rmtree(run / f"checkpoint-{step}")
        with pytest.raises(InputError, match=r"holds a finished model and no checkpoint to go on from: .* --overwrite"):
            train(parts, run, "--resume", "--accept_changes", max_steps=8)


class TestFolder:
    def test_of_another_run_is_refused(self, parts, run):
        before = {path: state for path, state in contents(run).items() if path.name != "run.lock"}
        with pytest.raises(
            InputError, match=r"holds another run: .*--resume .*--overwrite .*checkpoint-2, checkpoint-4"
        ) as refusal:
            train(parts, run, learning_rate=1e-4)
        assert "\n" not in str(refusal.value)
        assert {path: state for path, state in contents(run).items() if path.name != "run.lock"} == before

    def test_of_a_model_without_checkpoints_is_refused(self, parts, tmp_path):
        (tmp_path / "model").mkdir()
        with pytest.raises(InputError, match="holds another run"):
            train(parts, tmp_path)

    def test_is_overwritten_on_request(self, parts, run, caplog):
        train(parts, run, "--overwrite", max_steps=1, save_strategy="no")
        assert not list(run.glob("checkpoint-*")) and last_step(run) == 1
        assert "deleted another run: checkpoint-2, checkpoint-4, checkpoint-6, model, " in caplog.text

    def test_is_not_overwritten_if_the_run_reads_from_it(self, parts, run):
        with pytest.raises(InputError, match=r"--overwrite would delete .*model, from which this run reads .*model"):
            train(parts, run, "--overwrite", model_name_or_path=run / "model")
        assert (run / "model" / "model.safetensors").exists() and (run / "checkpoint-6").exists()

    def test_resume_with_overwrite_deletes_nothing(self, parts, killed):
        train(parts, killed, "--resume", "--overwrite")
        assert (killed / "checkpoint-2").exists() and last_step(killed) == 6

    def test_is_locked_as_long_as_the_other_run_lives(self, parts, tmp_path):
        script = (
            "import pathlib, sys; from visualchat.training.output_folder import take_lock;"
            " lock = take_lock(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as other:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(
                InputError, match=rf"is in use by another run \(process {other.pid} on .*\): wait for its end"
            ):
                train(parts, tmp_path, "--resume")
            assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}
            other.kill()
        assert output_folder.take_lock(tmp_path)

    def test_on_a_file_system_without_locks(self, tmp_path, monkeypatch, caplog):
        def refuse(file, operation):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.lockf", refuse)
        assert output_folder.take_lock(tmp_path) is None
        assert "no locks here" in caplog.text and "No locks available" in caplog.text


class TestChangedSettings:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            (
                {"learning_rate": 1e-4, "max_length": 500},
                ["learning_rate: 0.001 .*, 0.0001 now\n", "max_length: 512 .*, 500 now\n"],
            ),
            (
                {"weight_decay": 0.1, "lr_scheduler_type": "cosine"},
                ["weight_decay: 0.0 ", "'linear' in the .*, 'cosine' now"],
            ),
        ],
    )
    def test_need_a_flag(self, parts, killed, fields, expected):
        with pytest.raises(
            InputError, match=r"checkpoint-4 was made with other settings:(.|\n)*add --accept_changes"
        ) as error:
            train(parts, killed, "--resume", **fields)
        for line in expected:
            assert re.search(line, str(error.value))

    @pytest.mark.parametrize(
        ("fields", "line"),
        [
            ({"mode": "full"}, "mode: 'alignment' in the checkpoint, 'full' now"),
            ({"optim": "adafactor"}, "optim: 'adamw_torch_fused' in the checkpoint, 'adafactor' now"),
            ({"per_device_train_batch_size": 2}, "batch of all processes: 4 in the checkpoint, 2 now"),
            ({"seed": 1}, "evaluation data: '4 examples, digest .* now"),
            ({"eval_fraction": 0.3}, "evaluation data: '4 examples, digest .*, '6 examples, digest .* now"),
        ],
    )
    def test_that_cannot_be_taken_are_refused_with_the_flag_too(self, parts, killed, fields, line):
        with pytest.raises(InputError, match=rf"{line} \(cannot be changed within a run\)"):
            train(parts, killed, "--resume", "--accept_changes", **fields)

    def test_a_removed_example(self, parts, killed, tmp_path):
        rows = [make_row(k, images=k % 4, rounds=1 + k % 2) for k in range(20) if k != 7]
        datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "data.parquet")
        with pytest.raises(InputError) as refusal:
            train(parts, killed, "--resume", "--accept_changes", datasets=tmp_path / "data.parquet")
        for name in ("datasets", "training data", "evaluation data"):
            assert f"\n  {name}: " in str(refusal.value)

    def test_the_same_examples_elsewhere_are_no_change(self, parts, killed, tmp_path, finished):
        shutil.copytree(parts / "data", tmp_path / "moved")
        train(parts, killed, "--resume", datasets=tmp_path / "moved")
        assert losses(killed) == losses(finished)

    def test_the_batch_divided_otherwise_is_no_change(self, parts, killed, finished):
        train(parts, killed, "--resume", per_device_train_batch_size=2, gradient_accumulation_steps=2)
        assert losses(killed) == pytest.approx(losses(finished), abs=1e-4)

    def test_take_effect_when_they_are_accepted(self, parts, killed):
        old_rates = {step: 1e-3 * (7 - step) / 6 for step in (1, 2, 3, 4)}  # linear, to zero
        fields = {"learning_rate": 1e-2, "projector_learning_rate": 1e-1, "weight_decay": 0.5, "adam_beta2": 0.9}
        train(parts, killed, "--resume", "--accept_changes", save_steps=1, **fields)
        log = json.loads((killed / "log.json").read_text())
        rates = {entry["step"]: entry["learning_rate"] for entry in log if "loss" in entry}  # the projector's
        assert rates == {step: pytest.approx(rate) for step, rate in {**old_rates, 5: 0.2 / 6, 6: 0.1 / 6}.items()}
        groups = torch.load(killed / "checkpoint-5" / "optimizer.pt")["param_groups"]
        assert {(group["name"], group["initial_lr"]) for group in groups} == {("embedding", 1e-2), ("projector", 1e-1)}
        assert all(group["betas"] == (0.9, 0.9) for group in groups)
        assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
        assert (killed / "checkpoint-5").exists()  # the checkpoint of step 4 asked for every second
        recorded = json.loads((killed / "checkpoint-6" / "visualchat_run.json").read_text())
        assert recorded["arguments"]["learning_rate"] == 1e-2

    def test_weights_alone_cannot_be_resumed(self, parts, tmp_path):
        train(parts, tmp_path, save_only_model=True)
        undo_end(tmp_path, 6)
        with pytest.raises(InputError, match="checkpoint-4 holds the weights alone"):
            train(parts, tmp_path, "--resume", save_only_model=True)

    def test_of_a_joined_model(self):
        def record(**fields) -> dict:
            args = VisualChatTrainingArguments("run", use_cpu=True)
            return {"arguments": record_arguments(ModelArguments(**fields), DataArguments(), args)}

        joined = {"vision_name_or_path": "tower", "text_name_or_path": "decoder"}
        old = record(**joined)
        assert not find_differences(old, record(**joined, lora_rank=4))  # LoRA's fields are not used
        assert find_differences(old, record(**joined, multimodal_attention="causal", image_number_keys=True)) == [
            Difference("multimodal_attention", "mmca_merged", "causal", is_fixed=True),
            Difference("image_number_keys", False, True, is_fixed=True),
        ]
        assert find_differences(old, record(**joined, image_prefix="Image:")) == [
            Difference("image_prefix", "auto", "Image:", is_fixed=True)
        ]

    def test_the_attention_of_a_joined_model(self, parts, tmp_path):
        model = make_model(text={"vocab_size": 320}, image_token_id=5)
        model.model.vision_tower.save_pretrained(tmp_path / "tower")
        make_processor().image_processor.save_pretrained(tmp_path / "tower")
        LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "decoder")
        make_processor().tokenizer.save_pretrained(tmp_path / "decoder")
        joined = {"vision_name_or_path": tmp_path / "tower", "text_name_or_path": tmp_path / "decoder"}
        settings = {"max_steps": 1, "save_steps": 1, "model_name_or_path": "", **joined}
        run = tmp_path / "run"
        train(parts, run, **settings)
        config = json.loads((run / "model" / "config.json").read_text())
        assert (config["multimodal_attention"], config["learned_image_numbers"]) == ("mmca_merged", 64)
        assert config["image_prefix_ids"] == make_processor().image_prefix_ids()
        undo_end(run)
        with pytest.raises(InputError, match=r"attention: 'mmca_merged' in the checkpoint, 'causal' now \(cannot"):
            train(parts, run, "--resume", "--accept_changes", multimodal_attention="causal", **settings)
        shutil.rmtree(run / "checkpoint-1")  # as if it had been killed before: `joined` is made anew
        train(parts, run, "--resume", multimodal_attention="causal", **settings)
        config = json.loads((run / "model" / "config.json").read_text())
        assert (config["multimodal_attention"], config["learned_image_numbers"]) == ("causal", 0)
        assert config["image_prefix_ids"] is None

    def test_the_models_configuration_is_compared(self):
        old = {
            "arguments": {"lr_scheduler_type": "linear"},
            "model": {"a": 1, "b": 2},
            "data": {"training": "x", "evaluation": None},
        }
        new = {**old, "model": {"a": 1, "b": 3, "c": 4}}
        assert find_differences(old, new) == [Difference("the model's b", 2, 3, is_fixed=True)]


class TestDamage:
    def damage(self, run: Path, name: str, kind: str) -> str:
        path = run / "checkpoint-6" / name
        content = bytearray(path.read_bytes())
        if kind == "missing":
            path.unlink()
            return f"{name} is missing"
        if kind == "cut":
            path.write_bytes(content[: len(content) // 2])
            return f"{name} has {len(content) // 2:,} bytes instead of {len(content):,}"
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return f"{name} has other bytes than were saved"

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
    @pytest.mark.parametrize("kind", ["missing", "cut", "flipped"])
    def test_is_named_with_the_newest_whole_checkpoint(self, run, name, kind):
        expected = self.damage(run, name, kind)
        args = VisualChatTrainingArguments(str(run), use_cpu=True)
        with pytest.raises(ValueError) as refusal:
            find_complete_checkpoint(args)
        assert f"checkpoint-6 is damaged: {expected}" in str(refusal.value)
        assert f"newest whole checkpoint is {run}/checkpoint-4: " in str(refusal.value)
        assert f"(rm -r {run}/checkpoint-6) and give --resume again" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        shutil.rmtree(run / "checkpoint-6")
        assert find_complete_checkpoint(args) == str(run / "checkpoint-4")

    def test_of_the_manifest_and_of_an_older_checkpoint(self, run):
        (run / "checkpoint-6" / "whole.json").write_text('{"step"')
        (run / "checkpoint-4" / "optimizer.pt").unlink()
        with pytest.raises(
            ValueError, match=r"damaged: whole\.json cannot be read .* newest whole checkpoint is .*checkpoint-2"
        ):
            find_complete_checkpoint(VisualChatTrainingArguments(str(run), use_cpu=True))

    def test_of_the_best_checkpoint(self, run):
        state = run / "checkpoint-6" / "trainer_state.json"
        manifest = run / "checkpoint-6" / "whole.json"
        state.write_text(json.dumps({"best_model_checkpoint": str(run / "checkpoint-2")}))
        manifest.write_text(json.dumps({"step": 6, "world_size": 1}))
        (run / "checkpoint-2" / "model.safetensors").unlink()
        args = VisualChatTrainingArguments(str(run), use_cpu=True)
        assert find_complete_checkpoint(args) == str(run / "checkpoint-6")
        args.load_best_model_at_end = True
        with pytest.raises(
            ValueError, match=r"checkpoint-2, the best checkpoint, .* is damaged: model\.safetensors is missing"
        ):
            find_complete_checkpoint(args)

    def test_the_command_says_it_without_a_traceback(self, parts, run):
        expected = self.damage(run, "optimizer.pt", "missing")
        undo_end(run)
        with pytest.raises(InputError, match=expected):
            train(parts, run, "--resume")

    def test_folders_of_other_names_do_not_matter(self, parts, killed):
        (killed / "checkpoint-best").mkdir()
        (killed / "checkpoint-4-copy").mkdir()
        (killed / "checkpoint-9").write_text("a file")
        assert find_complete_checkpoint(VisualChatTrainingArguments(str(killed), use_cpu=True)) == str(
            killed / "checkpoint-4"
        )

    def test_checkpoints_of_older_versions_are_taken_with_a_warning(self, parts, killed, caplog, finished):
        (killed / "checkpoint-4" / "visualchat_run.json").unlink()
        (killed / "checkpoint-4" / "whole.json").write_text(json.dumps({"step": 4, "world_size": 1}))
        train(parts, killed, "--resume")
        assert losses(killed) == losses(finished)
        assert "its files are not checked" in caplog.text
        assert "its recipe and data are not known" in caplog.text
