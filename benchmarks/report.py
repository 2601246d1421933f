"""
Results of the benchmarks as a table, as `results/<name>.json` with the machine they were measured on, and as a picture.

    python -m benchmarks.report  # the README's table, from the results of `make bench`
    python -m benchmarks.report gpu_7b  # all that one benchmark measured
"""

import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch


RESULTS = Path(__file__).parent / "results"
# In the order of `make bench`
BENCHMARKS = ("attention_op", "prefill", "image_memory", "decoding", "training_step", "arithmetic_rate", "growth")
HIGHER_IS_BETTER = ("GFLOP/s", "TFLOP/s", "TB/s", "tokens/s")
HEAD = "| ours / theirs | ours | theirs | ratio | target |\n|---|---|---|---|---|"


def write_results(name: str, results: list[dict], machine: str | None = None) -> None:
    """
    Args:
        name (`str`): Of the benchmark.
        results (`list[dict]`): `claim`, `ratio` (ours / theirs) and `target`.
        machine (`str`, *optional*): The GPU that they were measured on. The CPU beside it is named too.
    """
    print("| claim | ratio | target |\n|---|---|---|")
    for result in results:
        print(f"| {result['claim']} | {result['ratio']} | {result['target']} |")
    save_results(name, results, machine)


def save_results(name: str, results: list[dict], machine: str | None = None) -> None:
    """As [`write_results`], without printing them."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    host = f"{cpu}, {os.cpu_count()} cores"
    setting = {
        "machine": host if machine is None else f"{machine}, beside {host}",
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers", "pillow")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps([{**result, **setting} for result in results], indent=2) + "\n")


def table_row(result: dict) -> str:
    """A result of [`measure.compare`] as a row of a table."""
    sides = (result["ours"], result["theirs"])
    ours, theirs = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in sides)
    unit = result["unit"]
    sign = "≥" if unit in HIGHER_IS_BETTER else "≤"
    target = "" if result["target"] is None else f"{sign} {result['target']:.2f}"
    return f"| {result['claim']} | {ours} {unit} | {theirs} {unit} | {result['ratio']:.3f} | {target} |"


def draw_ratios(name: str, results: list[dict]) -> None:
    """Writes results/<name>.png: a bar for each ratio, and a line where its target is."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.42 * len(results)), layout="constrained")
    places = range(len(results), 0, -1)
    axis.barh(places, [result["ratio"] for result in results], height=0.55, color="0.75", edgecolor="black")
    for place, result in zip(places, results):
        beyond = max(result["ratio"], result["target"] or 0)
        axis.annotate(f"{result['ratio']:.3f}", (beyond, place), (6, 0), textcoords="offset points", va="center")
        if result["target"] is not None:
            axis.plot([result["target"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=3)
    axis.axvline(1, color="black", linestyle="--", linewidth=1)
    axis.set_xlim(0, 1.15 * max(1, *(result["ratio"] for result in results)))
    axis.set_yticks(places, [result["claim"] for result in results])
    axis.set_xlabel("ours / theirs (dashed: equal; thick line: target)")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)


def table(names: Iterable[str] = BENCHMARKS, with_targets_only: bool = True) -> str:
    """The claims of these benchmarks, or those of them that have a target, as the README shows them."""
    results = [result for name in names for result in json.loads((RESULTS / f"{name}.json").read_text())]
    shown = [result for result in results if result["target"] is not None or not with_targets_only]
    return "\n".join([HEAD, *map(table_row, shown)])


if __name__ == "__main__":
    print(table(sys.argv[1:], with_targets_only=False) if sys.argv[1:] else table())
