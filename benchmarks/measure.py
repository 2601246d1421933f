"""Seconds and bytes of several sides, measured in turns within one process."""

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
    """Seconds of each call of each side. The sides take turns, and take turns in going first."""
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
    """Replays of what `call` does on the GPU, without the time of launching it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(call=call):  # holds what the graph reads
        graph.replay()

    return replay


def compare(claim: str, ours: list[float], theirs: list[float], target: float | None = None, unit: str = "s") -> dict:
    """One result: the median and the quartiles of the ratios ours / theirs of each turn, and the median of each side."""
    ratios = [one / other for one, other in zip(ours, theirs)]
    quartiles = [round(float(value), 3) for value in np.percentile(ratios, [25, 75])]
    medians = {"ours": float(f"{median(ours):.3g}"), "theirs": float(f"{median(theirs):.3g}"), "unit": unit}
    return {"claim": claim, "ratio": round(median(ratios), 3), "quartiles": quartiles, "target": target, **medians}


def peak_memory(call: Callable) -> float:
    """MiB by which this process grows at most while `call` runs (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = _status("VmHWM")
    call()
    return (_status("VmHWM") - before) / 1024


def peaks_of(module: str):
    """
    What `python -m module memory` prints as JSON on its last line. It runs in a process of its own, whose allocator gives
    back at once what is freed: by default glibc keeps much of it, and the peak would be more than what is in use.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    output = subprocess.check_output([sys.executable, "-m", module, "memory"], env=environment, text=True)
    return json.loads(output.splitlines()[-1])


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
