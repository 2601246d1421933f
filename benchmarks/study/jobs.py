# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The units of work of a study, which are done in processes of their own, and whose results are kept."""

import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
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
        kept = {name: value for name, value in asdict(self).items() if name not in chosen}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


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
    if (result := read_result(job, scale, folder)) is not None:
        return result
    torch.set_num_threads(1)
    set_seed(job.seed)
    started = time.perf_counter()
    result = perform(job, scale, folder)
    seconds = round(time.perf_counter() - started, 1)
    result = {**result, "settings": scale.settings, "seconds": seconds, "machine": describe_machine()}
    save(result, job, folder)
    return result


def read_result(job: Job, scale: Scale, folder: Path) -> dict | None:
    """What [`work`] saved, or `None`. Its errors are those of [`work`]."""
    path = find_result(job, folder)
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != scale.settings:
        raise ValueError(f"{path} was made with other settings, {result['settings']}: choose another --output")
    return result


def find_result(job: Job, folder: Path) -> Path:
    return folder / "results" / f"{job.name}.json"


def save(result: dict, job: Job, folder: Path) -> None:
    """Writes the file of a result, which appears when it is complete."""
    path = find_result(job, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def restore(results: list[dict], scale: Scale, leave_files: tuple[str, ...], folder: Path) -> None:
    """
    Saves published results to `folder / "results"`, where [`work`] finds them.

    Args:
        results (`list[dict]`): Of a study. Those that were made with another scale are left out.
        scale ([`Scale`]): The size of the study.
        leave_files (`tuple[str, ...]`): The kinds of jobs that have to be done again, since others need their files.
        folder (`Path`): As for [`work`].
    """
    for result in results:
        job = Job(**{field.name: result[field.name] for field in fields(Job)})
        is_same = result["settings"] == scale.settings and result["kind"] not in leave_files
        if is_same and not find_result(job, folder).exists():
            save(result, job, folder)


def describe_machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = [f"a {torch.cuda.get_device_name()}"] if torch.cuda.is_available() else []
    return ", ".join([cpu, f"{os.cpu_count()} cores", *gpu])
