# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The results of the studies as JSON, and from that, and nothing else, `study.md` and its figures.

    python -m benchmarks.study.report docs  # writes them again from the JSON
"""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.study import pretrained_report, pretrained_runs, scratch_report, scratch_runs
from benchmarks.study.figures import draw_curves, draw_differences
from benchmarks.study.jobs import describe_machine
from benchmarks.study.results import Study


# The modules with the jobs and the words of each study, and the names of its files, in the order of the document
STUDIES = {
    "pretrained": (pretrained_runs, pretrained_report, "study_pretrained"),
    "scratch": (scratch_runs, scratch_report, "study"),
}
PACKAGES = ("torch", "transformers", "scikit-learn", "peft")


def write_results(name: str, grid: str, results: list[dict], folder: Path) -> None:
    """
    Args:
        name (`str`): Of the study.
        grid (`str`): Its name.
        results (`list[dict]`): Of all jobs, see [`run_jobs`].
        folder (`Path`): Where everything is written.
    """
    study = {
        "grid": grid,
        "machine": describe_machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "results": _round(results),
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(study, separators=(",", ":"))
    (folder / f"{STUDIES[name][2]}_results.json").write_text(text + "\n")


def read_results(name: str, folder: Path) -> dict | None:
    """What [`write_results`] wrote of a study in this folder, or `None`."""
    path = folder / f"{STUDIES[name][2]}_results.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_study(name: str, folder: Path) -> Study | None:
    """The results of a study in this folder, or `None` if no regime of it is finished for any seed."""
    results = read_results(name, folder)
    study = None if results is None else Study(results, STUDIES[name][0])
    return study if study and study.regimes else None


def write_document(folder: Path) -> None:
    """Writes `study.md` and its figures from the results that are in the same folder, of one study or of both."""
    parts = ["# Which attention, measured\n"]
    for name, (_, report, file) in STUDIES.items():
        study = read_study(name, folder)
        if study is None:
            continue
        draw_curves(study, folder / f"{file}_curves.png")
        draw_differences(study, folder / f"{file}_differences.png")
        parts.append(re.sub(r"^#", "##", report.describe(study), flags=re.MULTILINE))
    (folder / "study.md").write_text("\n".join(parts))


def _round(value):
    if isinstance(value, dict):
        return {key: _round(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_round(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    write_document(Path(sys.argv[1]))
