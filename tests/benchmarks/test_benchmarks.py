"""The benchmarks run, at a toy size where nothing can be learned about time. The numbers of the documents are theirs."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import (
    arithmetic_rate,
    attention_op,
    checks,
    decoding,
    gpu_7b,
    growth,
    image_memory,
    measure,
    operator_shares,
    prefill,
    report,
    training_step,
)
from benchmarks.sides import build_sides


ROOT = Path(__file__).parents[2]
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}


def build_toys(**settings):
    return build_sides(TEXT, VISION, threads=torch.get_num_threads(), **settings)


@pytest.fixture
def toy_sides():
    return build_toys()


def toy_growth(sides) -> tuple[list[dict], list[dict]]:
    return growth.measure_seconds(*sides, {1: 1, 2: 1}), growth.measure_peaks(*sides, [1, 2])


def toy_training(sides) -> tuple[dict, dict]:
    steps = training_step.make_steps(*sides, images=2)
    return measure.interleave(steps, repeats=1), training_step.measure_peaks(steps, repeats=1)


def test_checks_of_files(tmp_path):
    results = [
        checks.compare_memory_file(tmp_path, (2, 1, 5, 2, 16), repeats=1),
        checks.compare_weights(tmp_path, TEXT, repeats=1),
        checks.compare_manifest(tmp_path, 1000, repeats=1),
    ]
    assert all(result["ours"] > 0 and result["theirs"] > 0 for result in results)


def test_every_comparison_runs(toy_sides, monkeypatch):
    for module in (growth, training_step):  # toys grow by less than the system can tell
        monkeypatch.setattr(module, "peak_memory", lambda call: call() and 1.0)
    results = [
        *attention_op.compare_attention(2, heads=2, image_tokens=5, repeats=1),
        *prefill.compare_prefill(*toy_sides, images=2, repeats=1),
        *image_memory.compare_first_token(*toy_sides, images=2, repeats=1),
        *decoding.compare_decoding(*toy_sides, images=2, tokens=2),
        *arithmetic_rate.compare_rates(toy_sides[0], images=2, repeats=1),
        *growth.to_results([1, 2], *toy_growth(toy_sides)),
        # Last: it trains
        *training_step.to_results(*toy_training(toy_sides)),
    ]
    claims = [result["claim"] for result in results]
    assert len(set(claims)) == len(claims) == 3 + 2 + 2 + 1 + 1 + 8 + 2
    for result in results:
        assert report.table_row(result).count("|") == 5


def test_every_comparison_on_a_gpu_runs(monkeypatch, tmp_path):
    sides = build_toys(dtype=torch.bfloat16)
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
        monkeypatch.setattr(gpu_7b, name, size)
    # What only a GPU has
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(gpu_7b, "peak_memory", lambda call: call() and 1.0)
    monkeypatch.setattr(gpu_7b, "graph_of", lambda call: [call() for _ in range(3)] and call)
    monkeypatch.setattr(gpu_7b, "build_sides", lambda *args, **kwargs: sides)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    gpu_7b.main()
    table = report.table(["gpu_7b"], with_targets_only=False)
    assert table.count("\n") == 1 + 4 + 2 + 3 + (3 + 3 + 2) + 2 + 2 + 2 * 4
    assert len(set(table.splitlines())) == table.count("\n") + 1
    assert json.loads((tmp_path / "gpu_7b.json").read_text())[0]["machine"].startswith("no GPU, beside ")
    assert not any(model.training or parameter.requires_grad for model in sides for parameter in model.parameters())


def test_the_shares_of_all_operators_are_the_whole():
    shares = operator_shares.operator_shares(lambda: torch.ones(64, 64) @ torch.ones(64, 64))
    assert "aten::mm" in shares and sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_operations_of_a_product():
    assert operator_shares.count_operations(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_what_a_call_needs_at_most():
    assert 190 < measure.peak_memory(lambda: torch.ones(50 * 2**20)) < 220
    assert measure.peak_memory(lambda: None) < 5


def test_the_document_shows_what_was_measured(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(report.DOCUMENT.read_text())
    report.write_document(page)
    assert page.read_text() == report.DOCUMENT.read_text(), "python -m benchmarks.report writes it again"


def test_a_missed_target_is_said():
    missed = {"claim": "a", "ratio": 0.8, "target": 0.7, "unit": "s", "quartiles": [0.7, 0.9]}
    assert report.table_row(missed) == "| a | 0.800 | 0.700 to 0.900 | ≤ 0.70 |"
    results = [missed, {**missed, "ratio": 0.7}, {**missed, "unit": "GFLOP/s"}, {**missed, "target": None}]
    assert [report.misses_target(one) for one in results] == [True, False, False, False]
    assert report.misses_target({**missed, "ratio": 0.6, "unit": "GFLOP/s"})


def test_the_readmes_numbers_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    for name, claim in (
        ("image_memory", "first token of a new question about 8 known images, against LLaVA's full prefill, tower included"),
        ("prefill", "prefill, 8 images, against LLaVA"),
    ):
        for results in (name, "gpu_7b"):
            (ratio,) = (one["ratio"] for one in report.read_results([results]) if one["claim"] == claim)
            assert f"{ratio} " in readme
