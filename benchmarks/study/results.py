# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The study's results looked up, and what is computed from them: means, intervals, differences by seed."""

from collections.abc import Callable
from math import log2, sqrt
from statistics import mean, stdev

from benchmarks.study.runs import CHANGES, REGIMES, VARIANTS


# 97.5 % quantiles of Student's t, by degrees of freedom
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Study:
    """The results, and how they are looked up."""

    def __init__(self, study: dict):
        self.grid, self.machine, self.versions = study["grid"], study["machine"], study["versions"]
        self.results = study["results"]
        self.settings = self.results[0]["settings"]
        runs = [result for result in self.results if result["kind"] == "run"]
        self.seeds = sorted({run["seed"] for run in runs})
        self.tasks = list(dict.fromkeys(run["task"] for run in runs))
        self.regimes = [regime for regime in REGIMES if any(run["regime"] == regime for run in runs)]
        self.variants = [variant for variant in VARIANTS if any(run["variant"] == variant for run in runs)]
        self.sizes = [point["conversations"] for point in runs[0]["curve"]]
        self.changes = [name for name in CHANGES if any(result["change"] == name for result in self.results)]
        self.minutes = sum(result["seconds"] for result in self.results) / 60

    def runs(self, task: str, regime: str, variant: str) -> list[dict]:
        """By seed."""
        return self._find("run", task, regime, variant, "")

    def changed(self, change: str) -> list[dict]:
        """By seed."""
        return self._find("change", self.tasks[0], "frozen", "mmca, numbered", change)

    def _find(self, *key: str) -> list[dict]:
        names = ("kind", "task", "regime", "variant", "change")
        found = [result for result in self.results if tuple(result[name] for name in names) == key]
        return sorted(found, key=lambda result: result["seed"])

    def headline_sizes(self) -> list[int]:
        """The smallest number of conversations, the largest, and one in the middle."""
        return sorted({self.sizes[0], self.sizes[len(self.sizes) // 2], self.sizes[-1]})


def accuracy_at(run: dict, conversations: int) -> float:
    return next(point["accuracy"] for point in run["curve"] if point["conversations"] == conversations)


def samples_to_reach(run: dict, level: float) -> float | None:
    """Conversations until the accuracy first reaches a level, between two measurements by their logarithm."""
    before = None
    for point in run["curve"]:
        if point["accuracy"] >= level:
            if before is None:
                return point["conversations"]
            part = (level - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            steps = log2(point["conversations"] / before["conversations"])
            return before["conversations"] * 2 ** (part * steps)
        before = point
    return None


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; 0 for a single value."""
    if len(values) == 1:
        return values[0], 0.0
    return mean(values), STUDENT_T[len(values) - 2] * stdev(values) / sqrt(len(values))


def paired(first: list[dict], other: list[dict], measure: Callable[[dict], float]) -> tuple[float, float]:
    """How much higher the other runs are, seed by seed; see [`interval`]."""
    return interval([measure(b) - measure(a) for a, b in zip(first, other, strict=True)])


def difference(study: Study, task: str, regime: str, first: str, other: str, size: int) -> tuple[float, float]:
    """Of the accuracies after so many conversations."""
    return paired(study.runs(task, regime, first), study.runs(task, regime, other), lambda run: accuracy_at(run, size))
