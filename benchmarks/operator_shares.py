"""
Where the time goes in a prefill of 8 images, with the vision tower and without it, on our side and LLaVA's, and in the first
token of a new question about 8 known images: the share of each operator, by torch's profiler; and of all matrix products how
many operations each side needs, by torch's `FlopCounterMode`, which does not count attention on a CPU.

    python -m benchmarks.operator_shares
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sides import build_sides, leave_out_tower, make_inputs, prefill, without


IMAGES, SHOWN = 8, 6


def operator_shares(call: Callable) -> dict[str, float]:
    """Of each operator, without those that it calls, the largest first."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return {name: time / sum(times.values()) for name, time in sorted(times.items(), key=lambda item: -item[1])}


def count_operations(call: Callable) -> int:
    """2 for a multiplication and an addition."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main():
    ours, llava = build_sides()
    inputs = make_inputs(ours, IMAGES)
    known = {**without(inputs, "pixel_values"), "image_memory": ours.encode_images(inputs["pixel_values"])}
    work = f"prefill of {IMAGES} images"
    calls = {f"{work}, {name}": (model, inputs) for name, model in (("ours", ours), ("LLaVA", llava))}
    calls |= {f"{name}, tower excluded": (model, leave_out_tower(model, inputs)) for name, (model, _) in calls.items()}
    calls[f"{IMAGES} known images"] = ours, known
    for name, given in calls.items():
        print(f"| {name} | share |\n|---|---|")
        for operator, share in list(operator_shares(lambda given=given: prefill(*given)).items())[:SHOWN]:
            print(f"| {operator} | {share:.2f} |")
    print("| matrix products | operations |\n|---|---|")
    for name, given in calls.items():
        print(f"| {name} | {count_operations(lambda given=given: prefill(*given)) / 1e9:.0f} · 10⁹ |")


if __name__ == "__main__":
    main()
