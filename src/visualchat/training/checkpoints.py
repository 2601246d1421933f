# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Checkpoints that are known to be whole. The last file of a checkpoint is its manifest, `whole.json`: the names of all other
files, their sizes and their hashes. `--resume` compares them before it goes on.
"""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

MANIFEST = "whole.json"  # written into a checkpoint when every process has saved its part
LATEST_UNIVERSAL = "latest_universal"  # written by ds_to_universal when it is done
HASH = "sha256"
READERS = 8  # files that are hashed at the same time; hashlib lets other threads run meanwhile


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, the newest first. Others, such as `checkpoint-best`, are not the run's."""
    names = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    steps = {path: names.fullmatch(path.name) for path in Path(output_dir).iterdir() if path.is_dir()}
    return sorted((path for path, step in steps.items() if step), key=lambda path: int(steps[path][1]), reverse=True)


def write_json(path: Path, content: dict) -> None:
    """Writes a file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def hash_files(paths: list[Path]) -> list[str]:
    def hash_file(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, HASH).hexdigest()

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(hash_file, paths))


def write_manifest(checkpoint: Path, step: int, world_size: int) -> None:
    """
    Completes a checkpoint. Every process must have saved its part.

    Args:
        step (`int`): The number of optimizer steps that were made.
        world_size (`int`): The number of processes that saved a part.
    """
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, HASH: digest}
        for path, digest in zip(paths, hash_files(paths), strict=True)
    }
    write_json(checkpoint / MANIFEST, {"step": step, "world_size": world_size, "files": files})


def read_manifest(checkpoint: Path) -> dict:
    """
    Raises:
        ValueError: If it is damaged.
    """
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{checkpoint} is damaged: {MANIFEST} cannot be read ({error})") from error


def find_damage(checkpoint: Path) -> str:
    """
    Compares a checkpoint with its manifest. Files that the manifest does not name, such as converted ones, do not matter.

    Returns:
        `str`: The files that are missing or changed, and what is wrong with each; empty if the checkpoint is whole.
    """
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return str(error).removeprefix(f"{checkpoint} is damaged: ")
    if "files" not in manifest:
        logger.warning("%s is of an older version, which wrote no hashes: its files are not checked", checkpoint)
        return ""
    faults, whole = [], []
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["size"]:
            faults.append(f"{name} has {size:,} bytes instead of {expected['size']:,}")
        else:
            whole.append(name)
    if not faults:  # sizes cost nothing: all bytes are read only if they agree
        digests = hash_files([checkpoint / name for name in whole])
        faults = [
            f"{name} has other bytes than were saved ({HASH})"
            for name, digest in zip(whole, digests, strict=True)
            if digest != manifest["files"][name][HASH]
        ]
    more = f"; and {len(faults) - 5} more files" if len(faults) > 5 else ""
    return "; ".join(faults[:5]) + more


def world_size_changed(checkpoint: Path, args: TrainingArguments) -> bool:
    """Whether the run uses ZeRO and the checkpoint's optimizer state is divided among another number of processes."""
    is_partitioned = args.deepspeed_plugin is not None and any(checkpoint.glob("global_step*/*_optim_states.pt"))
    return is_partitioned and read_manifest(checkpoint)["world_size"] != args.world_size


def check_deepspeed_checkpoint(checkpoint: Path, args: TrainingArguments) -> None:
    """
    DeepSpeed saves the optimizer's state in files of its own. A run with DeepSpeed cannot read the state of a run without
    it, and vice versa. The Trainer would start with a new optimizer, without a warning if the run is without DeepSpeed.

    Raises:
        ValueError: If either the checkpoint or the run uses DeepSpeed, and the other does not.
    """
    written_by_deepspeed = any(checkpoint.glob("global_step*"))
    if written_by_deepspeed and args.deepspeed_plugin is None:
        raise ValueError(
            f"{checkpoint} holds its optimizer's state in DeepSpeed's form, and this run is without DeepSpeed: add"
            " --deepspeed FILE, with the JSON that the checkpoint was made with, or give another --output_dir"
        )
    if not written_by_deepspeed and args.deepspeed_plugin is not None:
        raise ValueError(
            f"{checkpoint} holds nothing of DeepSpeed, and this run is with --deepspeed {args.deepspeed}: leave out"
            " --deepspeed (a recipe's field `deepspeed` too), or give another --output_dir"
        )


def find_complete_checkpoint(args: TrainingArguments) -> str | None:
    """
    The newest complete checkpoint, for `--resume`. Newer ones that a killed run did not finish are removed. World rank 0
    calls this for all processes.

    Raises:
        ValueError: If this checkpoint, or the best one that is loaded at the end, is damaged: the files are named, and the
            newest whole checkpoint. Or if it was written under ZeRO by another number of processes and is not converted; the
            error gives the commands that convert it. See also [`check_deepspeed_checkpoint`].
    """
    folders = list_checkpoints(args.output_dir)
    for number, folder in enumerate(folders):
        if not (folder / MANIFEST).exists():
            logger.warning("%s is not complete: it is removed", folder)
            shutil.rmtree(folder)
            continue
        if damage := find_damage(folder):
            raise ValueError(f"{folder} is damaged: {damage}. {offer_whole_checkpoint(folder, folders[number + 1 :])}")
        check_deepspeed_checkpoint(folder, args)
        loaded = [folder, *find_best_checkpoint(folder, args)]
        check_world_size(loaded, args)
        return str(folder)
    return None


def offer_whole_checkpoint(damaged: Path, older: list[Path]) -> str:
    """What to do if a checkpoint is damaged: one sentence, with the command."""
    for folder in older:
        if (folder / MANIFEST).exists() and not find_damage(folder):
            return (
                f"The newest whole checkpoint is {folder}: to go on from there, remove the damaged one"
                f" (rm -r {shlex.quote(str(damaged))}) and give --resume again"
            )
    return "There is no whole checkpoint: begin anew with --overwrite in place of --resume"


def find_best_checkpoint(checkpoint: Path, args: TrainingArguments) -> list[Path]:
    """The best checkpoint, if another than `checkpoint` is loaded at the end; none if it was moved or removed since."""
    best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
    if not args.load_best_model_at_end or best is None or Path(best) == checkpoint or not (Path(best) / MANIFEST).exists():
        return []
    if damage := find_damage(Path(best)):
        raise ValueError(
            f"{best}, the best checkpoint, which is loaded at the end, is damaged: {damage}. To go on without it, remove it"
            f" (rm -r {shlex.quote(best)}) and give --resume again"
        )
    return [Path(best)]


def check_world_size(loaded: list[Path], args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: If a checkpoint must be converted for this number of processes, with the commands.
    """
    commands = [
        "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
        f" --input_folder {shlex.quote(str(shards))} --output_folder {shlex.quote(f'{shards}_universal')}"
        for checkpoint in loaded
        if world_size_changed(checkpoint, args) and not (checkpoint / LATEST_UNIVERSAL).exists()
        for shards in checkpoint.glob("global_step*[0-9]")
    ]
    if commands:
        raise ValueError(
            f"{loaded[0]} was written by {read_manifest(loaded[0])['world_size']} processes, and this run has"
            f" {args.world_size}. Convert, then give --resume again, with the same product of processes,"
            " --per_device_train_batch_size and --gradient_accumulation_steps:\n  " + "\n  ".join(commands)
        )
