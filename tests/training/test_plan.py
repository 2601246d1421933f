# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Plans of memory: the shipped models at their true sizes on the meta device, and a small step counted tensor by tensor."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from helpers.tiny import make_config
from modeling_visualchat import VisualChatForCausalLM
from visualchat.cli import main as visualchat
from visualchat.planning import plan, trace
from visualchat.planning.memory import plan_peak
from visualchat.planning.states import ZeroSetting
from visualchat.training.arguments import ModelArguments
from visualchat.training.train import set_mode


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "hub_configs"


def make_planner(name: str, mode: str):
    config = AutoConfig.from_pretrained(CONFIGS / name)
    shape = trace.StepShape(1, config.image_seq_length + 200, 1, 64)
    return plan.Planner(config, shape, ModelArguments(mode=mode))


@pytest.fixture(scope="module")
def planners():
    made = {}

    def get(name: str, mode: str):
        if (name, mode) not in made:
            made[name, mode] = make_planner(name, mode)
        return made[name, mode]

    return get


@pytest.mark.parametrize(
    ("name", "json_name", "gpus", "alignment", "full"),
    [("7b", "zero2", 8, 14.3, 26.4), ("13b", "zero3", 8, 3.6, 26.6), ("70b", "zero3", 64, 2.2, 17.3)],
)
def test_states_are_those_of_the_document(name, json_name, gpus, alignment, full):
    """Weights, gradients and the optimizer's state, each shared out as the stage says, without buffers."""
    config = AutoConfig.from_pretrained(CONFIGS / name)
    assert f"· {full}" in (ROOT / "docs" / "scaling.md").read_text()
    for mode, expected in (("alignment", alignment), ("full", full)):
        _, parameters = plan.build_model(config, ModelArguments(mode=mode), torch.bfloat16)
        every = sum(one.numel for one in parameters)
        trained = sum(one.numel for one in parameters if one.group is not None)
        stage = plan.read_zero(json_name)["stage"]
        gigabytes = (2 * every / (gpus if stage == 3 else 1) + 14 * trained / gpus) / 1e9
        assert gigabytes == pytest.approx(expected, abs=0.06)

        # The plan keeps the same, and what DeepSpeed adds: small weights that stay everywhere
        empty = trace.Trace(np.zeros((1, 3), dtype=np.int64), [], [], 0)
        setting = ZeroSetting(plan.read_zero(json_name), gpus, 2, config.hidden_size)
        parts = plan_peak(empty, parameters, setting).parts
        kept = parts["weights"] + parts["optimizer"] + 2 * trained / gpus
        assert kept / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_more_gpus_need_no_more_and_offload_no_more_of_a_gpu(planners):
    for model, mode in (("7b", "alignment"), ("tiny", "full")):
        planner = planners(model, mode)
        for name in plan.NAMES:
            sizes = [planner.peak(planner.setting(plan.read_zero(name), gpus), 2, True).largest for gpus in (2, 8, 64)]
            assert sizes == sorted(sizes, reverse=True), (mode, name)
        for name in ("zero2", "zero3"):
            plain, offloaded = (
                planner.peak(planner.setting(plan.read_zero(kind), 8), 2, True) for kind in (name, f"{name}_offload")
            )
            assert plain.host == 0 < offloaded.host
            # Under ZeRO-2 room for one gradient comes on top, see plan_memory
            slack = 2 * max(one.numel for one in planner.parameters)
            assert offloaded.largest <= plain.largest + (slack if name == "zero2" else 0)


def test_the_largest_batch_is_the_largest_that_fits(planners):
    planner = planners("7b", "alignment")
    setting = planner.setting(plan.read_zero("zero2"), 8)
    for memory in (20e9, 40e9, 76e9):
        largest = planner.largest_batch(setting, True, memory)
        assert planner.peak(setting, largest, True).largest <= memory < planner.peak(setting, largest + 1, True).largest
    assert planner.largest_batch(setting, True, 10e9) == 0


def test_the_command_recommends_a_json_of_the_repository(capsys):
    words = [str(CONFIGS / "7b"), "--gpus", "8", "--seq-length", "512", "--checkpointing", "on"]
    visualchat(["plan", *words, "--matrix-rate", "300"])
    text = capsys.readouterr().out
    use = next(line for line in text.splitlines() if line.startswith("Use: "))
    assert (ROOT / use.split("--deepspeed ")[1].split()[0]).exists()
    assert "tokens/s" in text and "7,045.8 million parameters" in text


def test_json_output(capsys):
    visualchat(["plan", str(CONFIGS / "tiny"), "--gpus", "2", "--mode", "lora", "--seq-length", "64", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert len(report["rows"]) == 2 * len(plan.NAMES)
    assert {row["name"] for row in report["rows"]} == {
        path.stem for path in (ROOT / "examples" / "deepspeed").glob("*.json")
    }
    assert report["recommended"]["name"] in plan.NAMES
    assert report["parameters"]["LoRA"][0] == report["parameters"]["LoRA"][1] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/folder", "--gpus", "8"], "no/such/folder: neither a folder"),
        (["7b", "--gpus", "0"], "--gpus must be more than 0, got 0"),
        (["7b", "--gpus", "8", "--batch", "-1"], "--batch must be more than 0, got -1"),
        (["7b", "--gpus", "8", "--images", "16"], "--images 16 take 4112 tokens (257 each), which leaves -16"),
        (["7b", "--gpus", "8", "--seq-length", "5000"], "max_position_embeddings, 4096"),
        (["7b", "--gpus", "8", "--supervised", "4000"], "--supervised 4000 is more than the 3838"),
        (["7b", "--gpus", "8", "--reserve", "80"], "--reserve 80 leaves nothing"),
    ],
)
def test_bad_input_is_named(words, message, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS)
    with pytest.raises(SystemExit):
        visualchat(["plan", *words])
    assert message in capsys.readouterr().err


OTHER_PARTS = {
    "tower": "dinov2",
    "vision": {"image_size": 40},
    "image_size": 32,
    "decoder": "qwen3",
    "projector": "pooled",
    "multimodal_attention": "mmca_merged",
    "learned_image_numbers": 8,
    "image_prefix_ids": [5, 9, 7],
}
CROSS = {"multimodal_attention": "cross", "cross_attention_every": 2, "image_number_keys": True}


@pytest.mark.parametrize(
    ("mode", "parts"),
    [("alignment", {}), ("lora", {}), ("full", {}), ("alignment", OTHER_PARTS), ("alignment", CROSS)],
    ids=lambda value: str(value)[:9],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trace_has_the_bytes_of_a_real_step(mode, parts, checkpointing):
    """The same step on the CPU, every storage counted: the peak of activations and gradients."""
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    peaks = []
    for device in ("meta", "cpu"):
        config = make_config(text=text, **copy.deepcopy(parts))
        with torch.device(device):
            model = VisualChatForCausalLM._from_config(config, attn_implementation="sdpa")
            model = set_mode(model, ModelArguments(mode=mode)).train()
        if checkpointing:
            getattr(model, plan.ENABLE_CHECKPOINTING)({"use_reentrant": False})
        shape = trace.StepShape(3, 400, 3, 100)
        if device == "meta":
            traced = trace.trace_step(model, shape, "cpu")
            total, sizes = traced.live.sum(1), {name: 4 * one.numel() for name, one in model.named_parameters()}
            for event, name in traced.gradients:
                total[event:] += sizes[name]
        else:
            log = trace.AllocationLog([*model.parameters(), *model.buffers()], "cpu")
            batch = trace.make_tokens(config, shape)
            with log:
                batch["pixel_values"] = torch.randn(9, 3, *config.input_size)
                model(**batch, use_cache=False).loss.backward()
            total = np.cumsum(log.events, axis=0).sum(1)
        peaks.append(int(total.max()))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)


def test_learned_numbers_are_counted_by_themselves():
    config = make_config(**copy.deepcopy(OTHER_PARTS))
    counts = plan.count_parts(plan.build_model(config, ModelArguments(), torch.float32)[1])
    embeddings = config.learned_image_numbers + config.image_seq_length  # of the numbers, and of the tokens of an image
    size = config.text_config.num_hidden_layers * embeddings * config.hidden_size
    assert counts["image numbers"] == (size, size) and counts["decoder layers"][1] == 0
    assert sum(every for every, _ in counts.values()) == VisualChatForCausalLM(config).num_parameters()


def test_cross_attention_is_counted_by_itself():
    config = make_config(**copy.deepcopy(CROSS))
    counts = plan.count_parts(plan.build_model(config, ModelArguments(), torch.float32)[1])
    # Of three layers the second; 4 heads and 2 of keys, each of 16; two norms and the gate
    size = 2 * 64 * (64 + 32) + 2 * 64 + 1
    assert counts["cross attention"] == (size, size) and counts["decoder layers"][1] == 0


def test_the_benchmark_was_within_ten_percent_in_fp32():
    """In bf16, 10 to 12 % are missing on the CPU; what takes them is not known."""
    results = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())
    outside = [result["claim"] for result in results if not 0.9 <= result["ratio"] <= 1.1]
    assert all(claim.endswith("bf16") for claim in outside) and len(results) >= 20
