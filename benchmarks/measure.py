"""Measures the time and memory of several implementations (sides), which take turns in one process."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch


def interleave(sides: dict[str, Callable], repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """The seconds of each call of each side. The sides alternate, and so does the side that goes first."""
    seconds = {name: [] for name in sides}
    for _ in range(warmups):
        for call in sides.values():
            call()
    for repeat in range(repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def graph_of(call: Callable) -> Callable:
    """Captures the GPU work of `call` as a CUDA graph. Returns its replay, which has no launch overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(call=call):  # keeps the tensors of the graph alive
        graph.replay()

    return replay


def compare(claim: str, ours: list[float], theirs: list[float], target: float | None = None, unit: str = "s") -> dict:
    """One result: the median and the quartiles of the ratios ours / theirs of each turn, and the median of each side."""
    ratios = [one / other for one, other in zip(ours, theirs)]
    quartiles = [round(float(value), 3) for value in np.percentile(ratios, [25, 75])]
    medians = {"ours": float(f"{median(ours):.3g}"), "theirs": float(f"{median(theirs):.3g}"), "unit": unit}
    return {"claim": claim, "ratio": round(median(ratios), 3), "quartiles": quartiles, "target": target, **medians}


def peak_memory(call: Callable) -> float:
    """The peak memory of `call` in MiB, beyond what this process uses before it (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_of_process("VmHWM")
    call()
    return memory_of_process("VmHWM") - before


def peaks_of(module: str):
    """
    The JSON that `python -m module memory` prints on its last line. It runs in a separate process, in which glibc returns
    freed memory to the system at once. By default glibc keeps much of it, so that the peak would be larger than the memory
    in use.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    output = subprocess.check_output([sys.executable, "-m", module, "memory"], env=environment, text=True)
    return json.loads(output.splitlines()[-1])


def memory_of_process(field: str, pid: int | str = "self") -> float:
    """A memory field of `/proc/PID/status`, such as `VmRSS`, in MiB (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
