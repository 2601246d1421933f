# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The folder of a run: one run at a time writes into it, and none goes on with what another run has left by mistake."""

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from errno import EACCES, EAGAIN
from pathlib import Path
from typing import TextIO, TypeVar

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from visualchat.training.checkpoints import MANIFEST, find_complete_checkpoint, list_checkpoints, write_json
from visualchat.training.run_record import RECORD, find_differences


logger = logging.getLogger(__name__)

LOCK = "run.lock"
MODEL = "model"
# What a run writes beside its checkpoints
RESULTS = (MODEL, "joined", "metrics.json", "log.json", "curves.png", "data.md", "data.png", RECORD)
Result = TypeVar("Result")


def on_main_process(args: TrainingArguments, work: Callable[[], Result]) -> Result:
    """Does `work` on world rank 0. All processes get its result, or raise its error."""
    outcome = [None, None]
    if args.process_index == 0:
        try:
            outcome = [work(), None]
        except (OSError, ValueError) as error:
            outcome = [None, error]
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def take_lock(folder: Path) -> TextIO | None:
    """
    Reserves the folder for this process. The lock ends with the process, however that ends, or when the file is closed.

    Returns:
        The locked file, or `None` on Windows and on file systems that have no locks.

    Raises:
        ValueError: If another process holds the lock; its number and machine are named.
    """
    if os.name != "posix":
        return None
    import fcntl

    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        # A lock of POSIX: unlike that of flock(2), workers do not inherit it, and cannot keep it after the run was killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (EACCES, EAGAIN):
            logger.warning("%s: no locks here (%s), so that a second run in this folder is not noticed", folder, error)
            return None
        file.seek(0)
        raise ValueError(
            f"{folder} is in use by another run ({file.read().strip()}): wait for its end, or give another --output_dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def read_record(folder: Path) -> dict | None:
    """The record of a run in its folder (not in a checkpoint), which also says whether the run is `finished`."""
    path = folder / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is damaged ({error}): remove it, and give --resume again") from error


def write_record(folder: Path, record: dict, finished: bool) -> None:
    write_json(folder / RECORD, {**record, "finished": finished})


def is_finished(folder: Path, arguments: dict) -> bool:
    """Whether the folder holds the finished run of these arguments (see [`~run_record.record_arguments`])."""
    record = read_record(folder)
    if record is None or not record["finished"] or not (folder / MODEL).exists():
        return False
    return not find_differences(record, {"arguments": arguments})


def open_folder(args: TrainingArguments, resume: bool, overwrite: bool, inputs: list[str | None]) -> str | None:
    """
    Decides what becomes of the runs in `args.output_dir`.

    Args:
        resume (`bool`): Whether to go on from the newest checkpoint. `overwrite` then has no effect: a job that is begun
            again with both must not lose what it has done.
        overwrite (`bool`): Whether checkpoints and results of another run are deleted.
        inputs (`list[str]`): Models and data that the run reads.

    Returns:
        `str`: The checkpoint to go on from, if there is one.

    Raises:
        ValueError: If the folder holds another run, or nothing that can be resumed.
    """
    folder = Path(args.output_dir)
    if resume:
        checkpoint = find_complete_checkpoint(args)
        record = read_record(folder)
        if checkpoint is None and (folder / MODEL).exists() and (record is None or record["finished"]):
            raise ValueError(
                f"{folder} holds a finished model and no checkpoint to go on from: begin anew with --overwrite in place of"
                " --resume, or give another --output_dir"
            )
        return checkpoint
    checkpoints = list_checkpoints(folder)
    if checkpoints or (folder / MODEL).exists():
        found = [*reversed(checkpoints), *(folder / name for name in RESULTS if (folder / name).exists())]
        names = ", ".join(path.name for path in found)
        if not overwrite:
            raise ValueError(
                f"{folder} holds another run: add --resume to go on with it, --overwrite to begin anew and delete {names},"
                " or give another --output_dir"
            )
        delete(found, inputs)
        logger.warning("%s: deleted another run: %s", folder, names)
    return None


def delete(found: list[Path], inputs: list[str | None]) -> None:
    """
    Raises:
        ValueError: If one of them is, or contains, an input of the run; nothing is deleted then.
    """
    for path in found:
        for name in filter(None, inputs):
            if Path(name).resolve().is_relative_to(path.resolve()):
                raise ValueError(
                    f"--overwrite would delete {path}, from which this run reads {name}: give another --output_dir"
                )
    for path in filter(Path.is_dir, found):  # first: what is left after a kill here must not look whole
        (path / MANIFEST).unlink(missing_ok=True)
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
