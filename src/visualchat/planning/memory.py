# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Peak memory of a GPU under each DeepSpeed JSON: the states that ZeRO keeps and the buffers that DeepSpeed makes, added to a
[`visualchat.planning.trace.Trace`].

Sources: ZeRO (arXiv 1910.02054, section 3.1: Adam keeps 12 bytes a trained parameter in mixed precision; section 5: what
each stage partitions) and the code of DeepSpeed 0.19.8, by the file that a line is about:
- `stage_1_and_2.py`: the optimizer's weights are a copy of the GPU's partition, in fp32 also where the model is in fp32.
  Gradients go through a bucket. What is reduced is copied once more if it belongs to several GPUs. The GPU then keeps the
  whole gradient of each parameter that it owns any part of: a single large one (the token embedding) is not partitioned.
- `stage3.py`: partitions of gradients have a buffer of their own. The optimizer's weights are a copy here, too: the branch
  that would spare it in fp32 is not taken (seen in a run; it compares a `torch.device` with a name).
- `partitioned_param_coordinator.py`: gathered weights stay as long as they are used again within
  `stage3_max_reuse_distance` (10⁹) parameters; the next are fetched ahead, twice in memory while they arrive.
- `unfused_optimizer.py`: ZeRO-0 in bf16 keeps a whole fp32 copy and makes fp32 gradients for the step.
- `zero/utils.py`: the norm of a gradient is taken of its copy in fp64.

Not counted: the CUDA context, NCCL's buffers and what the allocator loses to fragments (`visualchat plan --reserve`); what
loading, evaluating and saving need. Batches of the Trainer and the optimizer's step (fused, in place) need nothing that
counts. The peak is that of a step after the first, when the optimizer's state exists.
"""

from collections.abc import Iterator

import numpy as np

from visualchat.planning.states import (
    ALLREDUCE_SIZE,
    Curve,
    Parameter,
    Peak,
    ZeroSetting,
    find_peak,
    parameters_by_name,
    partition_size,
    trained_groups,
)
from visualchat.planning.trace import Trace


def plan_peak(trace: Trace, parameters: list[Parameter], setting: ZeroSetting) -> Peak:
    """
    Args:
        trace (`Trace`): The trace of the micro-batch.
        parameters (`list[Parameter]`): All parameters of the model, in its order.
        setting (`ZeroSetting`): How ZeRO partitions them.
    """
    if setting.stage == 0:
        return _plan_replicated(trace, parameters, setting)
    if setting.stage == 3:
        return _plan_stage3(trace, parameters, setting)
    return max((_plan_stage12(trace, parameters, setting, rank) for rank in _ranks(setting)), key=lambda peak: peak.largest)


def _ranks(setting: ZeroSetting) -> Iterator[int]:
    # Ranks differ by the parameters on the borders of their partition: the first, a middle and the last rank are tried
    yield from sorted({0, setting.gpus // 2, setting.gpus - 1})


def _plan_replicated(trace: Trace, parameters: list[Parameter], setting: ZeroSetting) -> Peak:
    """ZeRO-0: everything on every GPU."""
    size, by_name = setting.itemsize, parameters_by_name(parameters)
    trained = [one.numel for one in parameters if one.group is not None]
    copies = 4 if size == 2 else 0  # fp32 weights beside those in bf16
    states = {"weights": size * sum(one.numel for one in parameters), "optimizer": (8 + copies) * sum(trained)}
    kept = size * sum(trained)
    gradients, done = Curve(trace), 0
    if setting.accumulation > 1:
        gradients.hold(0, kept)
    for event, name in trace.gradients:
        done += size * by_name[name].numel
        if setting.accumulation == 1:
            gradients.hold(event, done)
    flat = size * _largest_bucket(trained, ALLREDUCE_SIZE)
    step = sum(states.values()) + kept + max(flat, copies * sum(trained))
    return find_peak(trace, states, {"gradients": gradients.finish()}, step, host=0)


def _largest_bucket(sizes: list[int], limit: int) -> int:
    """Elements of the largest flat copy if tensors are collected until they exceed a limit. One alone is not copied."""
    largest, total, tensors = 0, 0, 0
    for size in [*sizes, None]:
        if size is not None:
            total, tensors = total + size, tensors + 1
        if size is None or total > limit:
            largest = max(largest, total if tensors > 1 else 0)
            total, tensors = 0, 0
    return largest


class _Partition:
    """
    The partition of one rank under ZeRO-1 and ZeRO-2. Each parameter group is one flat tensor, cut into equal ranges.

    Args:
        groups (`list[list[Parameter]]`): The parameter groups of the optimizer.
        gpus (`int`): The number of ranges of a group.
        rank (`int`): The rank that owns the partition.
    """

    def __init__(self, groups: list[list[Parameter]], gpus: int, rank: int):
        self.gpus, self.sizes, self.slices = gpus, [], []
        self.ranges, self.owned = {}, {}
        for group in groups:
            size = partition_size(sum(one.numel for one in group), gpus)
            self.sizes.append(size)
            offset, slices = 0, []
            for one in group:
                first, last = offset // size, (offset + one.numel - 1) // size
                self.ranges[one.name] = [
                    (owner, min(offset + one.numel, (owner + 1) * size) - max(offset, owner * size))
                    for owner in range(first, last + 1)
                ]
                if first <= rank <= last:
                    self.owned[one.name] = dict(self.ranges[one.name])[rank]
                    slices.append(self.owned[one.name])
                offset += one.numel
            self.slices.append(slices)

    def copied(self, names: list[str], limit: int) -> int:
        """
        Elements that the reduction of a bucket copies at once. A bucket that belongs to one rank as a whole is not copied,
        as with one GPU. Which buckets these are depends on the borders of the ranges, so all are assumed to be copied.
        """
        if self.gpus == 1:
            return 0
        slices = [numel for name in names for _, numel in self.ranges[name]]
        return max(_largest_bucket(slices, limit), slices[0] if len(slices) == 1 else 0)


def _plan_stage12(trace: Trace, parameters: list[Parameter], setting: ZeroSetting, rank: int) -> Peak:
    """ZeRO-1 and ZeRO-2."""
    size, gpus, by_name = setting.itemsize, setting.gpus, parameters_by_name(parameters)
    groups, limit, on_host = trained_groups(parameters), setting.numel("reduce_bucket_size"), setting.offloads("optimizer")
    mine = _Partition(groups, gpus, rank)
    shares = sum(mine.sizes)
    owned = sum(by_name[name].numel for name in mine.owned)  # whole tensors
    largest = max(one.numel for group in groups for one in group)
    states = {"weights": size * sum(one.numel for one in parameters), "optimizer": 12 * shares}
    host = 0
    if on_host:
        # fp32 weights, gradients and moments; a copy of the new weights; the largest gradient, once on each side
        states["optimizer"], states["gathered"] = 0, size * largest
        host = (16 + size) * shares + size * largest
        host += size * owned if setting.accumulation > 1 else 0

    gradients, buckets = Curve(trace), Curve(trace)
    whole = {"cuda": size * limit, "cpu": 0}[setting.device]
    fill, pending, placed, aside, deepest = 0, [], 0, 0, 0
    largest_slice = max(mine.owned.values(), default=0)

    def flush() -> int:
        """Reduces the bucket. Returns the temporary bytes that this needs."""
        nonlocal fill, aside, placed
        if setting.stage == 2 and on_host:
            # The norm's fp64 copy of a slice, or its fp32 copy on the way to the host
            copies = 8 * max((mine.owned[name] for name in pending if name in mine.owned), default=0)
        else:
            copies = 0
            placed += sum(by_name[name].numel for name in pending if name in mine.owned)
        moment = max(size * mine.copied(pending, limit), copies)
        pending.clear()
        fill = aside = 0
        return moment

    def kept() -> int:
        if setting.device == "cuda":
            return size * (owned if placed else 0)
        return size * placed

    def add(name: str) -> None:
        nonlocal fill, aside, deepest
        numel = by_name[name].numel
        if numel > limit:
            aside = numel
        fill += numel
        deepest = max(deepest, fill if numel <= limit else 0)
        pending.append(name)

    def bucket() -> int:
        return whole if setting.device == "cuda" else size * deepest

    order = [name for _, name in trace.gradients]
    step_peak = 0
    if setting.stage == 2:
        if setting.accumulation > 1 and not on_host:
            gradients.hold(0, size * owned)  # of the micro-batches before
        for event, name in trace.gradients:
            if fill + by_name[name].numel > limit and pending:
                before = kept()
                moment = flush()
                # The gradient that does not fit, in the trace still, is there meanwhile
                gradients.touch(event, max(moment, kept() - before))
            add(name)
            gradients.hold(event, kept() + size * aside + (size * owned if setting.accumulation > 1 and not on_host else 0))
            buckets.hold(event, bucket())
        before = gradients.level + bucket()
        moment = flush()
        step_peak = max(step_peak, before + moment, kept() + bucket())
    else:
        # All gradients are whole until the last micro-batch is through; then they go through the bucket, group by group
        done = 0
        total = size * sum(by_name[name].numel for name in order)
        if setting.accumulation > 1:
            gradients.hold(0, total)
        for event, name in trace.gradients:
            done += size * by_name[name].numel
            gradients.hold(event, done if setting.accumulation == 1 else total)
        left = total
        for name in (one.name for group in groups for one in group):
            if fill + by_name[name].numel > limit and pending:
                before = kept()
                step_peak = max(step_peak, left + bucket() + max(before + flush(), kept()))
            numel = by_name[name].numel
            add(name)
            if numel <= limit:
                step_peak = max(step_peak, left + bucket() + kept())
                left -= size * numel
        before = kept()
        step_peak = max(step_peak, left + bucket() + max(before + flush(), kept()))

    fixed = sum(states.values())
    step_peak += fixed
    if not on_host:
        staged = size * owned
        for slices, numel in zip(mine.slices, mine.sizes):
            flat = size * numel if len(slices) != 1 or slices[0] != numel else 0
            as_fp32 = 4 * numel if size == 2 else 0
            step_peak = max(step_peak, fixed + staged + flat + as_fp32)
        step_peak = max(step_peak, fixed + staged + 8 * largest_slice)
    if setting.device == "cpu":
        step_peak = max(step_peak, fixed + size * gpus * max(mine.sizes) * (gpus > 1))
    return find_peak(trace, states, {"gradients": gradients.finish(), "gathered": buckets.finish()}, step_peak, host)


def _plan_stage3(trace: Trace, parameters: list[Parameter], setting: ZeroSetting) -> Peak:
    """ZeRO-3."""
    size, gpus, by_name = setting.itemsize, setting.gpus, parameters_by_name(parameters)
    groups, limit, on_host = trained_groups(parameters), setting.numel("reduce_bucket_size"), setting.offloads("optimizer")
    shares = sum(partition_size(one.numel, gpus) for group in groups for one in group)
    partitions = size * sum(partition_size(one.numel, gpus) for one in parameters)
    threshold = setting.numel("stage3_param_persistence_threshold")
    resident = size * sum(one.numel for one in parameters if one.numel <= threshold)
    states = {"weights": partitions + resident, "gradients": size * shares, "optimizer": 12 * shares}
    host = 0
    if on_host:  # and gradients twice: as they come, and in fp32 for the step
        host += (16 + size) * shares
        states["optimizer"] = states["gradients"] = 0
    if setting.offloads("param"):
        host += partitions
        states["weights"] = resident

    gradients, gathered = Curve(trace), Curve(trace)
    whole = {"cuda": size * limit, "cpu": 0}[setting.device]
    gradients.hold(0, whole)
    gloo = setting.device == "cpu" and gpus > 1
    fill, pending, aside, deepest = 0, [], 0, 0
    if setting.device == "cpu":  # once written, it stays
        deepest = _deepest_fill([by_name[name].numel for _, name in trace.gradients], limit)
        gradients.hold(0, size * deepest)

    def flush() -> int:
        """Reduces and scatters the bucket. Returns the temporary bytes that this needs."""
        nonlocal fill, aside
        numel = sum(by_name[name].numel for name in pending)
        copied = len(pending) > 1 or any(by_name[name].numel % gpus for name in pending)
        moment = size * numel * (copied + gloo)
        if on_host:
            moment = max(moment, 8 * partition_size(max((by_name[name].numel for name in pending), default=0), gpus))
        pending.clear()
        fill = aside = 0
        return moment

    for event, name in trace.gradients:
        numel = by_name[name].numel
        if fill + numel > limit and pending:
            gradients.touch(event, flush())
        fill += numel
        aside = numel if fill > limit else aside
        pending.append(name)
        gradients.hold(event, max(whole, size * deepest) + size * aside)
    last = gradients.level + flush()

    for event, level, moment in _gather(trace, by_name, setting, threshold):
        gathered.touch(event, moment)
        gathered.hold(event, level)
    curves = {"gradients": gradients.finish(), "gathered": gathered.finish()}
    left_over = int(curves["gathered"][-1])

    fixed = sum(states.values())
    step_peak = fixed + last + left_over
    if not on_host:
        limit = setting.numel("sub_group_size")
        for sizes in _sub_groups(groups, gpus, limit):
            flat = size * sum(sizes) if len(sizes) > 1 else 0
            as_fp32 = 4 * sum(sizes) if size == 2 else 0
            step_peak = max(step_peak, fixed + max(whole, size * deepest) + max(flat + as_fp32, 8 * max(sizes)))
    return find_peak(trace, states, curves, step_peak, host)


def _deepest_fill(sizes: list[int], limit: int) -> int:
    deepest = fill = 0
    for numel in sizes:
        if fill + numel > limit:
            fill = 0
        if numel <= limit:
            fill += numel
            deepest = max(deepest, fill)
        else:
            fill = limit
    return deepest


def _sub_groups(groups: list[list[Parameter]], gpus: int, limit: int) -> Iterator[list[int]]:
    for group in groups:
        sizes = []
        for one in group:
            sizes.append(partition_size(one.numel, gpus))
            if sum(sizes) >= limit:
                yield sizes
                sizes = []
        if sizes:
            yield sizes


def _gather(
    trace: Trace, by_name: dict[str, Parameter], setting: ZeroSetting, threshold: int
) -> Iterator[tuple[int, int, int]]:
    """For each use of a module: the event, the bytes that are gathered from then on, and the temporary ones."""
    if setting.gpus == 1:
        return
    size, reuse = setting.itemsize, setting.numel("stage3_max_reuse_distance")
    ahead = setting.numel("stage3_prefetch_bucket_size")
    own = {}
    for name, one in by_name.items():
        if one.numel > threshold:
            own.setdefault(name.rpartition(".")[0], []).append(one)
    weights = {module: sum(one.numel for one in ones) for module, ones in own.items()}
    uses = [(event, module, weights.get(module, 0)) for event, module in trace.uses]
    passed = np.concatenate([[0], np.cumsum([numel for *_, numel in uses])])
    next_use, following = {}, [None] * len(uses)
    for index in range(len(uses) - 1, -1, -1):
        following[index] = next_use.get(uses[index][1])
        next_use[uses[index][1]] = index
    available = {}
    for index, (event, module, numel) in enumerate(uses):
        expired = [name for name, keep in available.items() if not keep]
        for name in expired:
            del available[name]
        fetched = 0 if module in available else numel
        after = following[index]
        available[module] = after is not None and passed[after] - passed[index + 1] < reuse
        total = sum(weights.get(name, 0) for name in available)
        room = max(0, min(ahead, setting.numel("stage3_max_live_parameters") - total))
        upcoming = next((m for _, m, w in uses[index + 1 :] if w and m not in available), None)
        prefetched = min(room, weights[upcoming]) if upcoming is not None else 0
        copies = 1 + (setting.device == "cpu")  # the flat tensor that arrives; gloo's own
        several = len(own.get(module, ())) > 1
        yield event, size * (total + prefetched), size * fetched * (copies - (not several))
