# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The units of work of a study, which are done in processes of their own, and whose results are kept."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import set_seed


@dataclass(frozen=True)
class Job:
    """
    A unit of work for one process.

    Args:
        kind (`str`): What is done. `run` trains and measures a model, `change` does so with one setting changed; the others
            are each study's own.
        seed (`int`): Of all random choices.
        task, variant, regime, change (`str`): Keys of the study's tables.
    """

    kind: str
    seed: int
    task: str = ""
    variant: str = ""
    regime: str = ""
    change: str = ""

    @property
    def name(self) -> str:
        parts = (self.kind, self.task, self.regime, self.variant, self.change, f"seed {self.seed}")
        return re.sub(r"[ ,]+", "-", " ".join(part for part in parts if part))


@dataclass(frozen=True)
class Scale:
    """
    The size of a study, to which each adds its own.

    Args:
        seeds: The seeds of all random choices.
        variants, regimes, tasks, changes: Keys of the study's tables.
    """

    seeds: tuple[int, ...]
    variants: tuple[str, ...]
    regimes: tuple[str, ...]
    tasks: tuple[str, ...]
    changes: tuple[str, ...]

    @property
    def settings(self) -> dict:
        """What the results of a job depend on: not which other jobs there are."""
        chosen = ("seeds", "variants", "regimes", "tasks", "changes")
        fields = {name: value for name, value in asdict(self).items() if name not in chosen}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def work(perform: Callable, job: Job, scale: Scale, folder: Path) -> dict:
    """
    Does a job, unless its result is already in `folder / "results"`. Saves the result there, and returns it.

    Args:
        perform (`Callable`): Takes the other arguments, and returns the result.
        job ([`Job`]): What is done.
        scale ([`Scale`]): The size of the study.
        folder (`Path`): For models and results.

    Raises:
        ValueError: If the saved result was made with another scale.
    """
    path = folder / "results" / f"{job.name}.json"
    if path.exists():
        result = json.loads(path.read_text())
        if result["settings"] != scale.settings:
            raise ValueError(f"{path} was made with other settings, {result['settings']}: choose another --output")
        return result
    torch.set_num_threads(1)
    set_seed(job.seed)
    started = time.perf_counter()
    result = perform(job, scale, folder)
    result = {**result, "settings": scale.settings, "seconds": round(time.perf_counter() - started, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
    return result
