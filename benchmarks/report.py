"""Results of the benchmarks as a table and as `results/<name>.json`, with the machine they were measured on."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def write_results(name: str, results: list[dict]) -> None:
    """
    Args:
        name (`str`): Of the benchmark.
        results (`list[dict]`): `claim`, `ratio` (ours / theirs) and `target`.
    """
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    setting = {
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers", "pillow")},
    }
    print("| claim | ratio | target |\n|---|---|---|")
    for result in results:
        print(f"| {result['claim']} | {result['ratio']} | {result['target']} |")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps([{**result, **setting} for result in results], indent=2) + "\n")
