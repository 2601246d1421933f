# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What a plan of memory is made of: parameters, the settings of ZeRO, bytes over the events of a trace, and the peak."""

from dataclasses import dataclass, field

import numpy as np

from visualchat.planning.trace import PARTS, Trace


# zero/config.py of DeepSpeed; engine.py for what ZeRO-0 reduces at once. In parameters
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
ALLREDUCE_SIZE = 500_000_000
STATES = ("weights", "gathered", "gradients", "optimizer", *PARTS)


@dataclass(frozen=True)
class Parameter:
    """
    Args:
        name (`str`): Its name in the model.
        numel (`int`): Its number of elements.
        group (`int`, *optional*): The index of its parameter group in the optimizer; `None` if it is frozen.
    """

    name: str
    numel: int
    group: int | None


@dataclass(frozen=True)
class ZeroSetting:
    """
    Args:
        zero (`dict`): The section `zero_optimization` of a DeepSpeed JSON.
        gpus (`int`): The number of processes.
        itemsize (`int`): Bytes of a weight: 2 in bf16, 4 in fp32.
        hidden_size (`int`): The decoder's. `"auto"` is computed from it (transformers, `trainer_config_finalize`).
        accumulation (`int`): The number of micro-batches of a step.
        device (`str`): `cuda`, or `cpu` with gloo. On the CPU an empty buffer takes no memory until it is written, and gloo
            gathers and scatters through a copy.
    """

    zero: dict
    gpus: int
    itemsize: int
    hidden_size: int
    accumulation: int = 1
    device: str = "cuda"

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    def offloads(self, what: str) -> bool:
        """Whether `optimizer` or `param` is kept on the host."""
        return self.zero.get(f"offload_{what}", {}).get("device", "none") != "none"

    def numel(self, name: str) -> int:
        """A size among `DEFAULTS`, in parameters."""
        value = self.zero.get(name, DEFAULTS[name])
        if value != "auto":
            return int(value)
        square = self.hidden_size**2
        by_name = {
            "stage3_prefetch_bucket_size": int(0.9 * square),
            "stage3_param_persistence_threshold": 10 * self.hidden_size,
        }
        return by_name.get(name, square)


@dataclass
class Peak:
    """
    Args:
        parts (`dict[str, int]`): Bytes on the GPU by `STATES`, at the largest moment of forward and backward.
        step (`int`): Bytes on the GPU at the largest moment of reduction and the optimizer's step.
        host (`int`): Bytes on the host for each GPU.
    """

    parts: dict[str, int]
    step: int
    host: int
    largest: int = field(init=False)

    def __post_init__(self):
        self.largest = max(sum(self.parts.values()), self.step)


def partition_size(numel: int, gpus: int) -> int:
    """The number of elements of one GPU's partition of a tensor. All partitions are padded to the same size."""
    return -(-numel // gpus)


def trained_groups(parameters: list[Parameter]) -> list[list[Parameter]]:
    trained = [one for one in parameters if one.group is not None]
    return [[one for one in trained if one.group == group] for group in sorted({one.group for one in trained})]


def parameters_by_name(parameters: list[Parameter]) -> dict[str, Parameter]:
    return {one.name: one for one in parameters}


def find_peak(trace: Trace, states: dict[str, int], moving: dict[str, np.ndarray], step: int, host: int) -> Peak:
    """The largest moment of forward and backward, by `STATES`. `moving` has bytes after each event."""
    total = trace.live.sum(1) + sum(moving.values())
    at = int(total.argmax())
    parts = dict.fromkeys(STATES, 0) | states
    for name, curve in moving.items():
        parts[name] += int(curve[at])
    for name, size in zip(PARTS, trace.live[at]):
        parts[name] += int(size)
    return Peak(parts, step, host)


class Curve:
    """Bytes over the events of a trace: levels that last until the next level, and temporary additions."""

    def __init__(self, trace: Trace):
        self.bytes, self.level, self.since = np.zeros(len(trace.live), dtype=np.int64), 0, 0

    def hold(self, event: int, level: int) -> None:
        """Sets the level from this event on."""
        self.bytes[self.since : event] += self.level
        self.level, self.since = level, event

    def touch(self, event: int, extra: int) -> None:
        """Adds temporary bytes to the level before this event."""
        at = min(event, len(self.bytes)) - 1
        self.bytes[at] += max(0, extra)

    def finish(self) -> np.ndarray:
        self.hold(len(self.bytes), 0)
        return self.bytes
