"""
Results of the benchmarks: as `results/<name>.json` with the machine they were measured on, as a figure, and as the tables of
`docs/performance.md`.

    python -m benchmarks.report  # writes the tables of docs/performance.md, from results/
    python -m benchmarks.report gpu_7b  # prints all that one benchmark measured
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
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
# Its tables, by their names in the document
TABLES = {"cpu": BENCHMARKS, "gpu": ("gpu_7b",)}
HEAD = "| VisualChat / the other side | ratio | middle half of the turns | target |\n|---|---|---|---|"


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
    """
    A result of [`measure.compare`] as a line of a table: the ratio and its spread. The medians of both sides stay in the
    JSON file: on a busy machine their quotient differs from the median of the ratios, which compares turns near in time.
    """
    spread = " to ".join(f"{value:.3f}" for value in result["quartiles"]) if "quartiles" in result else "not recorded"
    target = "" if result["target"] is None else describe_target(result)
    return f"| {result['claim']} | {result['ratio']:.3f} | {spread} | {target} |"


def describe_target(result: dict) -> str:
    return f"{'≥' if is_higher_better(result) else '≤'} {result['target']:.2f}"


def is_higher_better(result: dict) -> bool:
    return result["unit"] in HIGHER_IS_BETTER


def misses_target(result: dict) -> bool:
    if result["target"] is None:
        return False
    return result["ratio"] < result["target"] if is_higher_better(result) else result["ratio"] > result["target"]


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


def read_results(names: Iterable[str]) -> list[dict]:
    return [result for name in names for result in json.loads((RESULTS / f"{name}.json").read_text())]


def table(names: Iterable[str] = BENCHMARKS, with_targets_only: bool = True) -> str:
    """The claims of these benchmarks, or those of them that have a target."""
    shown = [result for result in read_results(names) if result["target"] is not None or not with_targets_only]
    return "\n".join([HEAD, *map(table_row, shown)])


def section(names: Iterable[str]) -> str:
    """What `docs/performance.md` shows of these benchmarks: the machine, the missed targets, and the table."""
    results = [result for result in read_results(names) if result["target"] is not None]
    settings = {
        (one["machine"], *(f"{name} {one['versions'][name]}" for name in ("torch", "transformers"))) for one in results
    }
    missed = [f"{one['claim']} ({one['ratio']:.3f}, target {describe_target(one)})" for one in results if misses_target(one)]
    said = f"{len(missed)} of {len(results)} targets are missed: {'; '.join(missed)}." if missed else "All targets are met."
    machines = "; ".join(", ".join(one) for one in sorted(settings))
    return f"Measured on: {machines}.\n\n{said}\n\n{table(names)}\n"


def write_document(path: Path = DOCUMENT) -> None:
    """Puts each section between its two marks. Raises a `ValueError` if the document lacks them."""
    text = path.read_text()
    for name, names in TABLES.items():
        begin, end = f"<!-- results: {name} -->\n", f"<!-- end of results: {name} -->\n"
        if begin not in text or end not in text:
            raise ValueError(f"{path} has no place for the results {name!r}: it needs {begin.strip()} and {end.strip()}")
        before, rest = text.split(begin)
        text = before + begin + "\n" + section(names) + "\n" + end + rest.split(end)[1]
    path.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(table(sys.argv[1:], with_targets_only=False))
    else:
        write_document()
