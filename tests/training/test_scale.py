"""Tensor parallelism and FSDP2, run for real on CPU with two gloo processes."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from helpers.distributed import ENVIRONMENT, ROOT, TRAIN, launch, needs_compiler, settings, write_config
from helpers.elsewhere import run_elsewhere
from helpers.tensor_parallel import CASES
from helpers.tiny import make_model, make_processor
from helpers.training import FEATURES, losses, make_row, undo_end
from helpers.versions import needs_transformers
from visualchat.training.train import main as train


TESTS = ROOT / "tests"


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    """What each of two processes saw of tensor-parallel models, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*torchrun, "-m", "helpers.tensor_parallel", str(folder)]
    result = subprocess.run(words, cwd=TESTS, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)], folder


@needs_transformers("5.21", "it shares out a vocabulary of even size alone")
class TestTensorParallel:
    @pytest.mark.parametrize("case", CASES)
    def test_logits_and_answers_are_those_of_one_process(self, shared_out, case):
        for rank in shared_out[0]:
            assert rank[case]["logits"] < 1e-4
            assert rank[case]["same tokens"]

    def test_gradients_are_those_of_one_process(self, shared_out):
        for rank in shared_out[0]:
            assert len(rank["gradients"]) == 3
            assert max(rank["gradients"].values()) < 1e-4

    def test_the_decoder_is_shared_out_and_the_tower_is_not(self, shared_out):
        for rank in shared_out[0]:
            assert rank["shares"] == {
                "whole query": [64, 64],
                "own query": [32, 64],
                "tower and projector are whole": True,
            }

    def test_image_memory_holds_the_heads_of_its_process(self, shared_out):
        ranks = [rank["memory"] for rank in shared_out[0]]
        for rank in ranks:
            assert (rank["heads"], rank["heads of no picture"], rank["images of no picture"]) == (1, 1, 0)
            assert rank["remembered"] and rank["from file"]
            assert "made with other weights" in rank["by the whole model"]
        assert ranks[0]["fingerprint"] != ranks[1]["fingerprint"]

    def test_a_shared_out_model_is_saved_whole(self, shared_out):
        saved, again = (load_file(shared_out[1] / name / "model.safetensors") for name in ("mmca, numbered", "again"))
        assert set(saved) == set(again)
        assert all(torch.equal(weight, again[name]) for name, weight in saved.items())

    def test_heads_that_do_not_divide_are_refused_with_both_counts(self, shared_out):
        for rank in shared_out[0]:
            assert "4 heads and 1 key-value heads cannot be shared out evenly among 2 processes" in rank["uneven"]["error"]


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "shard-00000-of-00001.parquet")


MODELS = {
    "mmca": {"learned_image_numbers": 3, "image_prefix_ids": [5, 300, 7], "decoder": "qwen3", "tower": "dinov2"},
    "cross": {"multimodal_attention": "cross", "cross_attention_every": 2, "image_number_keys": True},
}


@pytest.fixture(scope="module", params=["mmca", pytest.param("cross", marks=pytest.mark.slow)])
def parts(tmp_path_factory, request):
    """
    A model, and rows of which the second process gets no image: in training every second pair has none, and of the four that
    are held out only the first has some.
    """
    root = tmp_path_factory.mktemp("fsdp")
    make_model(**MODELS[request.param]).save_pretrained(root / "model")
    make_processor().save_pretrained(root / "model")
    split = datasets.Dataset.from_dict({"index": range(20)}).train_test_split(0.2, seed=3)
    images = {index: 0 if k % 4 >= 2 else 1 + k % 2 for k, index in enumerate(split["train"]["index"])}
    images |= {index: 2 * (k == 0) for k, index in enumerate(split["test"]["index"])}
    write_rows(root / "data", [make_row(k, images=images[k], rounds=1 + k % 2) for k in range(20)])
    return root


def settings_with_evaluation(parts: Path, output: Path, processes: int, **overrides) -> list[str]:
    evaluation = {
        "eval_fraction": 0.2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "generation_samples": 4,
        "generation_max_new_tokens": 3,
        "per_device_eval_batch_size": 2 // processes,
    }
    return settings(parts, output, processes, **{**evaluation, **overrides})


def train_with_fsdp(words: list[str]) -> None:
    """The line of docs/scaling.md, with two processes, in fp32, and with FSDP on CPU processes."""
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "examples" / "fsdp" / "fsdp2.yaml"),
    ]
    processes = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    script = str(TESTS / "helpers" / "fsdp_on_cpu.py")
    words = [*accelerate, *processes, script, TRAIN, *words, "--deepspeed", ""]
    result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def assert_same_run(run: Path, alone: Path) -> None:
    """The losses, and what evaluation made of the loss and of generated answers."""
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    metrics, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, alone))
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)
    assert metrics["eval_exact_answers"] == expected["eval_exact_answers"]


def compare_weights(run: Path, alone: Path) -> None:
    trained, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, alone))
    assert set(trained) == set(expected)
    for key, weight in expected.items():
        torch.testing.assert_close(trained[key], weight, atol=1e-4, rtol=1e-3, msg=key)


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    """One process, without FSDP or DeepSpeed."""
    output = tmp_path_factory.mktemp("alone")
    train(settings_with_evaluation(parts, output, 1))
    return output


class TestOneProcessWithoutImages:
    """Processes that gather weights as they use them train, evaluate and generate together, and as one alone."""

    def test_fsdp2(self, parts, alone, tmp_path):
        run = tmp_path / "run"
        train_with_fsdp(settings_with_evaluation(parts, run, 2))
        assert_same_run(run, alone)
        compare_weights(run, alone)
        # FSDP gives the model a class of another name, from a file of torch's
        run_elsewhere(
            """
            for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
                model = auto.from_pretrained(folder, trust_remote_code=True)
                assert type(model).__name__ == "VisualChatForCausalLM", type(model)
            """,
            tmp_path,
            folder=run / "model",
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["full", "lora"])
    def test_fsdp2_in_other_modes(self, parts, tmp_path, mode):
        train(settings_with_evaluation(parts, tmp_path / "alone", 1, mode=mode))
        train_with_fsdp(settings_with_evaluation(parts, tmp_path / "run", 2, mode=mode))
        assert_same_run(tmp_path / "run", tmp_path / "alone")

    @pytest.mark.slow
    def test_fsdp2_goes_on_from_a_checkpoint(self, parts, tmp_path):
        words = settings(parts, tmp_path, 2, save_strategy="steps", save_steps=2)
        train_with_fsdp(words)
        whole = losses(tmp_path)
        undo_end(tmp_path, 4)
        train_with_fsdp([*words, "--resume"])
        assert losses(tmp_path) == pytest.approx(whole, abs=1e-5)

    @needs_compiler
    def test_zero3(self, parts, alone, tmp_path):
        words = settings_with_evaluation(parts, tmp_path / "run", 2)
        launch([*words, "--deepspeed", str(write_config(tmp_path, "zero3"))], 2)
        assert_same_run(tmp_path / "run", alone)
