# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Access to the study's results, and statistics of them: means, confidence intervals, paired differences."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from math import log2, sqrt
from statistics import mean, stdev
from types import ModuleType


# The 97.5 % quantiles of Student's t distribution for 1, 2, … degrees of freedom
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Study:
    """
    The results of a study, with methods that find those of a setting. Of a study that is not finished, they are those of
    a regime and seed of which all variants are there, or all changes.

    Args:
        study (`dict`): What [`write_results`] wrote.
        tables (`ModuleType`): The module with the study's jobs, whose `VARIANTS`, `REGIMES` and `CHANGES` give the order,
            `GRIDS` and `list_jobs` what belongs to it, and `LEVELS` the accuracies to reach.
    """

    def __init__(self, study: dict, tables: ModuleType):
        self.grid, self.versions, self.levels = study["grid"], study["versions"], tables.LEVELS
        scale = tables.GRIDS[self.grid]
        jobs = [asdict(job) for stage in tables.list_jobs(scale) for job in stage]
        self.results = _leave_out_unfinished(study["results"], jobs)
        self.machine = " and ".join(dict.fromkeys(result.get("machine", study["machine"]) for result in self.results))
        self.settings = self.results[0]["settings"]
        runs = [result for result in self.results if result["kind"] == "run"]
        self.seeds = sorted({run["seed"] for run in runs})
        self.tasks = list(dict.fromkeys(run["task"] for run in runs))
        self.regimes = [regime for regime in tables.REGIMES if any(run["regime"] == regime for run in runs)]
        self.variants = [variant for variant in tables.VARIANTS if any(run["variant"] == variant for run in runs)]
        self.sizes = [point["conversations"] for point in runs[0]["curve"]] if runs else []
        self.changes = [name for name in tables.CHANGES if any(result["change"] == name for result in self.results)]
        self.minutes = sum(result["seconds"] for result in self.results) / 60

    def runs(self, task: str, regime: str, variant: str) -> list[dict]:
        """The runs of a setting, sorted by seed."""
        return self._find("run", task, regime, variant, "")

    def changed(self, change: str, regime: str = "frozen") -> list[dict]:
        """The runs with a change, sorted by seed."""
        return self._find("change", self.tasks[0], regime, "mmca, numbered", change)

    def _find(self, *key: str) -> list[dict]:
        names = ("kind", "task", "regime", "variant", "change")
        found = [result for result in self.results if tuple(result[name] for name in names) == key]
        return sorted(found, key=lambda result: result["seed"])

    def headline_sizes(self) -> list[int]:
        """The smallest number of conversations, the largest, and one in the middle."""
        return sorted({self.sizes[0], self.sizes[len(self.sizes) // 2], self.sizes[-1]})


def _leave_out_unfinished(results: list[dict], jobs: list[dict]) -> list[dict]:
    """Without the results of a kind, task, regime and seed of which some jobs are not done."""
    done, whole = defaultdict(set), defaultdict(set)
    for found, listed in ((done, results), (whole, jobs)):
        for one in listed:
            found[_group(one)].add((one["variant"], one["change"]))
    return [result for result in results if done[_group(result)] == whole[_group(result)]]


def _group(result: dict) -> tuple:
    return result["kind"], result["task"], result["regime"], result["seed"]


def accuracy_at(run: dict, conversations: int) -> float:
    return next(point["accuracy"] for point in run["curve"] if point["conversations"] == conversations)


def samples_to_reach(run: dict, level: float) -> float | None:
    """The conversations after which the accuracy first reaches a level, interpolated on a logarithmic scale, or `None`."""
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
    """The mean, and half the width of its 95 % confidence interval (Student's t), which is 0 for a single value."""
    if len(values) == 1:
        return values[0], 0.0
    return mean(values), STUDENT_T[len(values) - 2] * stdev(values) / sqrt(len(values))


def paired(first: list[dict], other: list[dict], measure: Callable[[dict], float]) -> tuple[float, float]:
    """The mean difference of the other runs from the first ones, paired by seed, with its [`interval`]."""
    return interval([measure(b) - measure(a) for a, b in zip(first, other, strict=True)])


def difference(study: Study, task: str, regime: str, first: str, other: str, size: int) -> tuple[float, float]:
    """The paired difference of the accuracies after `size` conversations."""
    return paired(study.runs(task, regime, first), study.runs(task, regime, other), lambda run: accuracy_at(run, size))
