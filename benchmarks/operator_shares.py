"""
What takes the time of our side: the share of each operator in a prefill of 8 images, tower excluded, and in the first token
of a new question about 8 known images, by torch's profiler.

    python benchmarks/operator_shares.py
"""

from collections.abc import Callable

import torch
from sides import build_sides, leave_out_tower, make_inputs, prefill, without


IMAGES, SHOWN = 8, 6


def operator_shares(call: Callable) -> dict[str, float]:
    """Of each operator, without those that it calls, the largest first."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return {name: time / sum(times.values()) for name, time in sorted(times.items(), key=lambda item: -item[1])}


def main():
    ours, _ = build_sides()
    inputs = make_inputs(ours, IMAGES)
    known = {**without(inputs, "pixel_values"), "image_memory": ours.encode_images(inputs["pixel_values"])}
    for work, given in ((f"prefill of {IMAGES} images", leave_out_tower(ours, inputs)), (f"{IMAGES} known images", known)):
        print(f"| {work} | share |\n|---|---|")
        for name, share in list(operator_shares(lambda given=given: prefill(ours, given)).items())[:SHOWN]:
            print(f"| {name} | {share:.2f} |")


if __name__ == "__main__":
    main()
