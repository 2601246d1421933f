"""DeepSpeed and plain data parallelism, run for real on CPU with gloo: the losses of one process without either."""

import json
import os
import re
import signal
import subprocess
import time

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from helpers.distributed import ENVIRONMENT, launch, needs_compiler, settings, write_config
from helpers.tiny import make_model, make_processor
from helpers.training import FEATURES, losses, make_row, undo_end
from visualchat.training.checkpoints import find_complete_checkpoint
from visualchat.training.train import main as train
from visualchat.training.trainer import VisualChatTrainingArguments


pytestmark = needs_compiler


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model and 16 rows in an order in which every second pair of rows has no image: the second rank's."""
    root = tmp_path_factory.mktemp("deepspeed")
    make_model(image_number_keys=True).save_pretrained(root / "model")
    make_processor().save_pretrained(root / "model")
    rows = [make_row(k, images=0 if k % 4 >= 2 else 1 + k % 2, rounds=1 + k % 2) for k in range(16)]
    (root / "data").mkdir()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(root / "data" / "shard-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def reference(parts, tmp_path_factory):
    """One process, no DeepSpeed."""
    output = tmp_path_factory.mktemp("reference")
    train(settings(parts, output, 1))
    return output


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        (None, 2),
        ("zero2", 2),
        slow("zero3", 2),  # test_scale.py runs it with evaluation
        slow("zero0", 1),
        slow("zero0", 2),
        slow("zero1", 1),
        slow("zero1", 2),
        slow("zero2", 1),
        slow("zero3", 1),
        slow("zero2_offload", 2),
        slow("zero3_offload", 2),
    ],
)
def test_losses_and_weights_equal_one_process_and_a_rank_without_images_does_not_hang(
    parts, reference, tmp_path, name, processes
):
    words = settings(parts, tmp_path / "run", processes)
    if name:
        words += ["--deepspeed", str(write_config(tmp_path, name))]
    launch(words, processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), abs=1e-4)

    expected = AutoModel.from_pretrained(reference / "model").state_dict()
    trained = AutoModel.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert set(trained) == set(expected)
    for key, weight in expected.items():
        torch.testing.assert_close(trained[key], weight, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", [None, slow("zero2"), slow("zero3")])
def test_a_killed_run_goes_on_as_if_it_had_not_been(parts, tmp_path, name):
    processes = 1 if name is None else 2
    more = ["--deepspeed", str(write_config(tmp_path, name))] if name else []
    overrides = {"max_steps": 12, "save_steps": 2, "save_strategy": "steps", "gradient_accumulation_steps": 1}

    def run(words: list[str]) -> None:
        train(words) if name is None else launch(words, processes)

    run([*settings(parts, tmp_path / "whole", processes, **overrides), *more])
    words = [*settings(parts, tmp_path / "killed", processes, **overrides), *more]
    process = launch(words, processes, wait=False)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoint-4").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)  # in the middle of writing checkpoint 4
    process.communicate()
    run([*words, "--resume"])
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
def test_two_processes_share_a_stream(parts, reference, tmp_path):
    launch(settings(parts, tmp_path, 2, streaming=True), 2)
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_processes_resume_in_the_middle_of_the_second_epoch(parts, tmp_path, strategy):
    words = settings(parts, tmp_path, 2, max_steps=8, save_strategy="steps", save_steps=6, train_sampling_strategy=strategy)
    launch(words, 2)
    whole = losses(tmp_path)
    undo_end(tmp_path, 8)
    launch([*words, "--resume"], 2)
    assert losses(tmp_path) == pytest.approx(whole, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("zero2", "alignment"), ("zero3", "alignment"), ("zero3", "lora")])
def test_another_number_of_processes_goes_on_after_the_commands_that_the_refusal_prints(parts, tmp_path, name, mode):
    """The newest checkpoint is converted and trains on as if nothing had happened; the best one is converted and loaded."""
    run = tmp_path / "run"
    overrides = {
        "mode": mode,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_fraction": 0.25,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the best is then the first, which two processes write
        "train_sampling_strategy": "group_by_length",
        "projector_learning_rate": 2e-2,
        "weight_decay": 0.1,
    }
    config = ["--deepspeed", str(write_config(tmp_path, name))]
    launch([*settings(parts, run, 2, **overrides), *config], 2)
    whole = losses(run)
    undo_end(run, 6)

    words = [*settings(parts, run, 1, **overrides), *config, "--resume"]
    refused = launch(words, 1, wait=False)
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode != 0
    assert f"{run}/checkpoint-4 was written by 2 processes, and this run has 1." in output
    commands = list(dict.fromkeys(re.findall(r"python -m deepspeed\.checkpoint\.ds_to_universal .*", output)))
    assert [re.search(r"checkpoint-\d", command).group() for command in commands] == ["checkpoint-4", "checkpoint-2"]
    for one in commands:
        subprocess.run(one, shell=True, env=ENVIRONMENT, check=True, capture_output=True)

    launch(words, 1)
    assert losses(run) == pytest.approx(whole, abs=1e-4)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    weights = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    best, kept = (load_file(run / folder / weights) for folder in ("checkpoint-2", "model"))
    assert set(best) == set(kept)
    for key, weight in best.items():
        torch.testing.assert_close(kept[key], weight, atol=1e-6, rtol=0, msg=key)


def test_another_number_of_processes_is_refused_with_the_command_that_converts(tmp_path):
    shards = tmp_path / "checkpoint-4" / "global_step4"
    shards.mkdir(parents=True)
    folder = shards.parent
    (folder / "whole.json").write_text(json.dumps({"step": 4, "world_size": 2}))
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None}))
    args = VisualChatTrainingArguments(str(tmp_path), use_cpu=True)
    args.deepspeed_plugin = "of zero2.json"
    (shards / "mp_rank_00_model_states.pt").touch()
    assert find_complete_checkpoint(args) == str(folder)  # without ZeRO nothing is shared out
    (shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match=r"written by 2 processes, and this run has 1(.|\n)*ds_to_universal") as refusal:
        find_complete_checkpoint(args)
    assert str(refusal.value).endswith(f"--input_folder {shards} --output_folder {shards}_universal")
    (folder / "latest_universal").touch()
    assert find_complete_checkpoint(args) == str(folder)
