"""The benchmarks run, at a toy size where nothing can be learned about time. The README's numbers are theirs."""

import importlib
import json
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}


@pytest.fixture(autouse=True)
def benchmarks_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def build_toys(**settings):
    return importlib.import_module("sides").build_sides(TEXT, VISION, threads=torch.get_num_threads(), **settings)


@pytest.fixture
def toy_sides():
    return build_toys()


def run(name: str, function: str, *args, **kwargs) -> list[dict]:
    return getattr(importlib.import_module(name), function)(*args, **kwargs)


def toy_growth(sides) -> tuple[list[dict], list[dict]]:
    return run("growth", "measure_seconds", *sides, {1: 1, 2: 1}), run("growth", "measure_peaks", *sides, [1, 2])


def toy_training(sides) -> tuple[dict, dict]:
    steps = run("training_step", "make_steps", *sides, images=2)
    return run("measure", "interleave", steps, repeats=1), run("training_step", "measure_peaks", steps, repeats=1)


def test_every_comparison_runs(toy_sides, monkeypatch):
    for name in ("growth", "training_step"):  # toys grow by less than the system can tell
        monkeypatch.setattr(importlib.import_module(name), "peak_memory", lambda call: call() and 1.0)
    results = [
        *run("attention_op", "compare_attention", 2, heads=2, image_tokens=5, repeats=1),
        *run("prefill", "compare_prefill", *toy_sides, images=2, repeats=1),
        *run("image_memory", "compare_first_token", *toy_sides, images=2, repeats=1),
        *run("decoding", "compare_decoding", *toy_sides, images=2, tokens=2),
        *run("arithmetic_rate", "compare_rates", toy_sides[0], images=2, repeats=1),
        *run("growth", "to_results", [1, 2], *toy_growth(toy_sides)),
        # Last: it trains
        *run("training_step", "to_results", *toy_training(toy_sides)),
    ]
    claims = [result["claim"] for result in results]
    assert len(set(claims)) == len(claims) == 3 + 2 + 2 + 1 + 1 + 8 + 2
    for result in results:
        assert importlib.import_module("report").table_row(result).count("|") == 6


def test_every_comparison_on_a_gpu_runs(monkeypatch, tmp_path):
    sides = build_toys(dtype=torch.bfloat16)
    gpu, report = importlib.import_module("gpu_7b"), importlib.import_module("report")
    sizes = {
        "IMAGES": (1, 2),
        "TRAINING_IMAGES": 2,
        "GROWTH": (3,),
        "FLEX_IMAGES": (1, 2),
        "TOKENS": 2,
        "COPIED_BYTES": 10**6,
        "MATRIX_SIZE": 64,
    }
    sizes |= dict.fromkeys(("REPEATS", "TRAINING_REPEATS", "GROWTH_REPEATS"), 1)
    for name, size in sizes.items():
        monkeypatch.setattr(gpu, name, size)
    # What only a GPU has
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(gpu, "peak_memory", lambda call: call() and 1.0)
    monkeypatch.setattr(gpu, "graph_of", lambda call: [call() for _ in range(3)] and call)
    monkeypatch.setattr(gpu, "build_sides", lambda *args, **kwargs: sides)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    gpu.main()
    table = report.table(["gpu_7b"], with_targets_only=False)
    assert table.count("\n") == 1 + 4 + 2 + 3 + (3 + 3 + 2) + 2 + 2 + 2 * 4
    assert len(set(table.splitlines())) == table.count("\n") + 1
    assert json.loads((tmp_path / "gpu_7b.json").read_text())[0]["machine"].startswith("no GPU, beside ")
    assert not any(model.training or parameter.requires_grad for model in sides for parameter in model.parameters())


def test_the_shares_of_all_operators_are_the_whole():
    shares = run("operator_shares", "operator_shares", lambda: torch.ones(64, 64) @ torch.ones(64, 64))
    assert "aten::mm" in shares and sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_operations_of_a_product():
    assert run("operator_shares", "count_operations", lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_what_a_call_needs_at_most():
    peak_memory = importlib.import_module("measure").peak_memory
    assert 190 < peak_memory(lambda: torch.ones(50 * 2**20)) < 220
    assert peak_memory(lambda: None) < 5


def test_the_readme_shows_what_was_measured():
    report, readme = importlib.import_module("report"), (ROOT / "README.md").read_text()
    assert report.table() in readme
    assert report.table(["gpu_7b"]) in readme
