"""`visualchat train`: settings that contradict each other, and the fastest attention."""

import functools
import json
from pathlib import Path

import pytest
import torch

from helpers.tiny import make_config
from helpers.training import arguments, losses
from visualchat.training import train
from visualchat.training.checkpoints import find_complete_checkpoint
from visualchat.training.train import fastest_attention, main
from visualchat.training.trainer import VisualChatTrainingArguments


def make_checkpoint(output: Path) -> Path:
    """A whole checkpoint of one process, as far as `--resume` looks at it."""
    folder = output / "checkpoint-4"
    folder.mkdir()
    (folder / "whole.json").write_text(json.dumps({"step": 4, "world_size": 1}))
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None}))
    return folder


class TestContradictions:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"streaming": True, "max_steps": -1}, "streaming: true .* needs max_steps, got -1"),
            (
                {"streaming": True, "train_sampling_strategy": "group_by_length"},
                "streaming: true .* needs train_sampling_strategy: random .* got group_by_length",
            ),
            ({"streaming": True, "eval_strategy": "steps"}, "streaming: true .* needs eval_strategy: no, got steps"),
            ({"eval_fraction": 0, "eval_strategy": "epoch"}, "eval_fraction: 0 .* needs eval_strategy: no, got epoch"),
            ({"mode": "full", "train_embedding": False}, "mode: full .* needs train_embedding: true, got false"),
            ({"load_in_4bit": True}, "load_in_4bit .* needs mode: lora, got alignment"),
            ({"label_smoothing_factor": 0.1, "torch_compile": True}, "label_smoothing_factor needs torch_compile: false"),
        ],
    )
    def test_both_fields_are_named_before_any_work_starts(self, parts, tmp_path, fields, message):
        with pytest.raises(ValueError, match=message):
            main(arguments(parts, tmp_path / "run", **fields))
        assert not (tmp_path / "run").exists()

    def test_a_checkpoint_of_deepspeed_and_a_run_without_it(self, parts, tmp_path, monkeypatch):
        def no_work(*arguments):
            raise AssertionError("the run had begun")

        folder = make_checkpoint(tmp_path)
        words = [*arguments(parts, tmp_path), "--resume"]
        monkeypatch.setattr(train, "prepare_processor", no_work)
        with pytest.raises(AssertionError, match="the run had begun"):
            train.main(words)
        (folder / "global_step4").mkdir()
        with pytest.raises(ValueError, match=rf"{folder} holds .* DeepSpeed's form, .*: add --deepspeed FILE"):
            train.main(words)

    def test_a_run_of_deepspeed_and_a_checkpoint_without_it(self, tmp_path):
        folder = make_checkpoint(tmp_path)
        args = VisualChatTrainingArguments(str(tmp_path), use_cpu=True)
        assert find_complete_checkpoint(args) == str(folder)
        args.deepspeed, args.deepspeed_plugin = "zero2.json", "of zero2.json"
        with pytest.raises(ValueError, match=rf"{folder} holds nothing of DeepSpeed, .* zero2\.json: leave out --deepspeed"):
            find_complete_checkpoint(args)
        (folder / "global_step4").mkdir()
        assert find_complete_checkpoint(args) == str(folder)

    def test_streamed_rows_train_without_evaluation(self, parts, tmp_path):
        assert main(arguments(parts, tmp_path, streaming=True)) == {"broken_rows": 0}
        assert len(losses(tmp_path)) == 4


class TestFastestAttention:
    def choose(self, device="cuda", **settings):
        return fastest_attention(make_config(**settings), torch.device(device))

    def test_flex_attention_on_a_gpu_for_the_variants_that_it_computes(self, monkeypatch):
        monkeypatch.setattr(train, "try_flex_attention", lambda config, device: None)
        assert self.choose() == self.choose(multimodal_attention="mmca_merged") == "flex_attention"
        assert self.choose(device="cpu") == self.choose(multimodal_attention="causal") == "sdpa"
        assert self.choose(text={"attention_dropout": 0.1}) == "sdpa"

    def test_sdpa_where_it_does_not_compile(self, monkeypatch, caplog):
        monkeypatch.setattr(train, "try_flex_attention", functools.partial(self.try_on_the_cpu, train.try_flex_attention))
        assert self.choose() == "sdpa"
        assert "Trains by SDPA: flex attention does not compile here" in caplog.text
        assert "FlexAttention does not support backward on CPU" in caplog.text

    def try_on_the_cpu(self, try_flex_attention, config, device):
        try_flex_attention(config, torch.device("cpu"))
