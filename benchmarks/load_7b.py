"""
Seconds to load a model of 7 billion random parameters (`hub_configs/7b`, bf16, files of 5 GB), beside reading the same files
with safetensors alone, and the memory that writing and loading take.

Both sides map the files, which are read when they are needed: timed is the return, and the moment when every page of every
weight has been read. The files are dropped from the system's cache before each turn, and each turn is a process of its own,
whose imports are not counted.

    python -m benchmarks.load_7b  # 15 GB of disk in the temporary folder, 18 GB of memory, some minutes
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.measure import compare
from benchmarks.report import write_results
from modeling_visualchat import VisualChatForCausalLM


HUB_CONFIG = Path(__file__).parent.parent / "hub_configs" / "7b"
PAGE = 4096  # bytes
KINDS = {"RssAnon": "anonymous", "VmHWM": "resident"}  # what Linux calls them


def run_watched(command: list[str], **settings) -> tuple[str, dict[str, float]]:
    """
    Runs a command. Returns what it prints, and the peaks of its memory in GB (10⁹ bytes): `anonymous`, what it needs, seen a
    hundred times a second; `resident`, with the pages of files that it has mapped, which the system takes back when it wants
    the room.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **settings)
    peaks = {"anonymous": 0.0, "resident": 0.0}
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines) if name in KINDS}
        for name, value in kilobytes.items():
            peaks[KINDS[name]] = max(peaks[KINDS[name]], value * 1024 / 1e9)
        time.sleep(0.01)
    output = process.communicate()[0]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return output, peaks


def write(folder: str) -> None:
    """Saves the model as any other is saved: in one piece in memory, in bf16, in files of 5 GB."""
    config = AutoConfig.from_pretrained(HUB_CONFIG)
    torch.manual_seed(0)
    model = VisualChatForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")


def read_pages(tensors) -> None:
    for tensor in tensors:
        tensor.detach().view(-1).view(torch.uint8)[::PAGE].sum()


def load_model(folder: str) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto", low_cpu_mem_usage=True)


def load_files(folder: str) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def take_turn(side: str, folder: str) -> dict[str, float]:
    """Seconds until one side says that it is done, and until all was read."""
    start = time.perf_counter()
    tensors = list(load_model(folder).state_dict().values() if side == "ours" else load_files(folder).values())
    returned = time.perf_counter() - start
    read_pages(tensors)
    return {"returned": returned, "read": time.perf_counter() - start}


def drop_from_cache(folder: str) -> None:
    for file in Path(folder).glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_alone(task: str, folder: str) -> dict[str, float]:
    """`task` ("write", "ours" or "theirs") in a process of its own: its seconds and peaks of memory."""
    output, peaks = run_watched([sys.executable, "-m", "benchmarks.load_7b", task, folder])
    return {**json.loads(output.splitlines()[-1]), **peaks}


def main(repeats: int = 3):
    with tempfile.TemporaryDirectory() as folder:
        written = run_alone("write", folder)
        turns = {"ours": [], "theirs": []}
        for repeat in range(repeats):
            for side in list(turns)[:: -1 if repeat % 2 else 1]:
                drop_from_cache(folder)
                turns[side].append(run_alone(side, folder))
                print(side, turns[side][-1], flush=True)
    results = []
    for kind, claim in (("read", "every weight read"), ("returned", "until from_pretrained returns, with the files mapped")):
        ours, theirs = ([turn[kind] for turn in turns[side]] for side in ("ours", "theirs"))
        claim = f"loading 7 billion parameters in bf16, {claim}, against safetensors alone"
        results.append(compare(claim, ours, theirs, 1.3))
    loaded = {kind: max(turn[kind] for turn in turns["ours"]) for kind in KINDS.values()}
    for name, peaks in (("peak_gb_writing", written), ("peak_gb_loading", loaded)):
        results[0][name] = {kind: round(peaks[kind], 2) for kind in KINDS.values()}
    write_results("load_7b", results)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "write":
        write(sys.argv[2])
        print("{}")
    else:
        print(json.dumps(take_turn(*sys.argv[1:])))
