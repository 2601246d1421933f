# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The figures of the study."""

from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from benchmarks.study.results import Study, accuracy_at, difference


STYLES = {  # to be told apart in black and white
    "causal": ("0.0", "-", "o"),
    "causal, numbered": ("0.0", "--", "o"),
    "mmca": ("0.45", "-", "s"),
    "mmca, numbered": ("0.45", "--", "s"),
    "mmca_merged": ("0.7", "-", "^"),
    "mmca_merged, numbered": ("0.7", "--", "^"),
    "mmca_merged, prefix": ("0.3", "-.", "^"),
    "mmca_merged, numbered, prefix": ("0.3", "-.", "v"),
    "cross": ("0.55", ":", "D"),
}


def draw_curves(study: Study, path: Path) -> None:
    """Accuracy against conversations, a panel for each task and regime."""
    figure, panels = plt.subplots(
        len(study.tasks),
        len(study.regimes),
        figsize=(2.5 + 4 * len(study.regimes), 3.2 * len(study.tasks)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for task, row in zip(study.tasks, panels):
        for regime, axis in zip(study.regimes, row):
            for variant in study.variants:
                colour, line, marker = STYLES[variant]
                runs = study.runs(task, regime, variant)
                means = [100 * mean(accuracy_at(run, size) for run in runs) for size in study.sizes]
                axis.plot(study.sizes, means, color=colour, linestyle=line, marker=marker, markersize=4, label=variant)
            axis.set_xscale("log", base=2)
            axis.set_title(f"{task}, decoder {regime}", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in panels[-1]:
        axis.set_xlabel("conversations")
    for row in panels:
        row[0].set_ylabel("exact answers, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_differences(study: Study, path: Path) -> None:
    """Differences from causal attention after the most conversations, with their intervals."""
    others = [variant for variant in study.variants if variant != "causal"]
    places = [(task, regime) for task in study.tasks for regime in study.regimes]
    size = (2 + 2.3 * len(places), 1 + 0.3 * len(others))
    figure, axes = plt.subplots(1, len(places), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for (task, regime), axis in zip(places, axes[0]):
        for height, variant in enumerate(reversed(others)):
            middle, half = difference(study, task, regime, "causal", variant, study.sizes[-1])
            colour, _, marker = STYLES[variant]
            filled = colour if "numbered" in variant else "white"
            axis.errorbar(
                100 * middle,
                height,
                xerr=100 * half,
                marker=marker,
                color=colour,
                markerfacecolor=filled,
                linestyle="none",
                capsize=3,
            )
        axis.axvline(0, color="0.0", linewidth=0.8)
        axis.set_title(f"{task}\n{regime}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(others)), list(reversed(others)))
    figure.supxlabel("points more than causal attention", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
