"""
Time and peak memory of the prefill as images are added: 1 to 56 images of 257 tokens, 32 text tokens after each, so 289 to
16,184 tokens. Tower excluded on all sides: it costs each image the same. Memory is what a prefill needs beyond what is
resident before it; what the image memory itself holds is added to it.

    python -m benchmarks.growth
"""

import json
import sys
from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import torch

from benchmarks.measure import compare, interleave, peak_memory, peaks_of
from benchmarks.report import RESULTS, write_results
from benchmarks.sides import build_sides, encoder_outputs, make_inputs, prefill
from modeling_visualchat.image_memory_visualchat import ImageMemory


# Images, and how often they are measured
REPEATS = {1: 9, 2: 9, 4: 7, 8: 5, 16: 3, 32: 3, 56: 1}
WITH_MEMORY = "VisualChat with image memory"
STYLES = {"LLaVA": "k--s", "VisualChat": "k-o", WITH_MEMORY: "k:^"}


def encode(ours, features: torch.Tensor) -> ImageMemory:
    """The memory of projected features."""
    memories = []
    for part in features.split(8):
        memories.append(ImageMemory(*ours.model.language_model.encode_images(part), ours.image_fingerprint()))
    return ImageMemory.cat(memories)


def make_sides(ours, llava, counts: Iterable[int]) -> dict[int, dict[str, Callable]]:
    """For each number of images, the prefill of each side."""
    size = (max(counts), ours.config.image_seq_length, ours.config.text_config.hidden_size)
    features = torch.randn(size, generator=torch.Generator().manual_seed(0))
    known = encode(ours, features)

    def of(images: int) -> dict[str, Callable]:
        text, memory = make_inputs(ours, images, pixels=False), known[:images]
        inputs = {**text, "mm_encoder_outputs": encoder_outputs(features[:images])}
        return {
            "LLaVA": lambda: prefill(llava, inputs),
            "VisualChat": lambda: prefill(ours, inputs),
            WITH_MEMORY: lambda: prefill(ours, {**text, "image_memory": memory}),
        }

    return {images: of(images) for images in counts}


def measure_seconds(ours, llava, repeats_of: dict[int, int]) -> list[dict[str, list[float]]]:
    sides = make_sides(ours, llava, repeats_of)
    return [interleave(sides[images], repeats) for images, repeats in repeats_of.items()]


def measure_peaks(ours, llava, counts: Iterable[int]) -> list[dict[str, float]]:
    peaks = []
    for images, sides in make_sides(ours, llava, counts).items():
        peaks.append({name: peak_memory(call) for name, call in sides.items()})
        peaks[-1][WITH_MEMORY] += images * ours.image_memory_nbytes / 2**20
    return peaks


def to_results(counts: Iterable[int], seconds_of: list[dict], peaks_of_sides: list[dict]) -> list[dict]:
    results = []
    for images, seconds, peaks in zip(counts, seconds_of, peaks_of_sides):
        tokens = images * 289  # 257 + 32
        named = f"images {images}, tokens {tokens:,}"
        for side in ("VisualChat", WITH_MEMORY):
            sizes = {"images": images, "tokens": tokens, "side": side}
            claim = f"growth, {named}: {{}} of {side} against LLaVA"
            results.append(compare(claim.format("time"), seconds[side], seconds["LLaVA"]) | sizes)
            memory = [peaks[side]], [peaks["LLaVA"]]
            results.append(compare(claim.format("peak memory"), *memory, unit="MiB") | sizes)
    return results


def draw(results: list[dict]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, unit, label in zip(axes, ("s", "MiB"), ("seconds of a prefill", "GiB at the peak of a prefill")):
        scale = 1 if unit == "s" else 1024
        rows = [result for result in results if result["unit"] == unit]
        for name, style in STYLES.items():
            side, value = ("VisualChat", "theirs") if name == "LLaVA" else (name, "ours")
            points = [(row["tokens"], row[value] / scale) for row in rows if row["side"] == side]
            axis.plot(*zip(*points), style, label=name, markersize=5)
        axis.set_xlabel("tokens (289 for an image and its text)")
        axis.set_ylabel(label)
        axis.grid(color="0.85")
    axes[0].legend(frameon=False)
    figure.savefig(RESULTS / "growth.png", dpi=110)


def main():
    results = to_results(REPEATS, measure_seconds(*build_sides(), REPEATS), peaks_of("benchmarks.growth"))
    write_results("growth", results)
    draw(results)


if __name__ == "__main__":
    if sys.argv[1:] == ["memory"]:
        print(json.dumps(measure_peaks(*build_sides(), REPEATS)))
    else:
        main()
