"""
Finds the fastest kernel for MMCA's attention on a GPU, by the size of the input: bf16, 32 heads of 128 (LLaMA-2-7B), 257
tokens per image and 32 text tokens after each. Only the attention operation is measured, as in `attention_op.py`. The times
are GPU times of replays of a CUDA graph over the tensors of eight layers, which do not fit into the GPU's cache.

Prefill, in which text queries attend to text keys and to image keys:
- SDPA, masked: a causal call for the text keys, and masked calls for the image keys, each for a block of queries and over
  the keys up to the last one that these see (`ModalityPlan` on a GPU);
- SDPA, a call for each run of text that sees the same images, without a mask (`ModalityPlan` on a CPU);
- flex: flex attention with a block mask instead of the masked calls (`attn_implementation="flex_attention"`).
Training adds the backward pass. The reference is plain causal SDPA over all tokens, as in LLaVA.

Decoding, in which one text query attends to all keys: two calls of SDPA without or with masks (a static cache has a buffer
that is partly in use), or matrix products and a softmax. The reference is one call over all keys.

    python -m benchmarks.gpu_attention
"""

import functools
from statistics import median
from unittest.mock import patch

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.measure import compare, graph_of
from benchmarks.report import save_results
from modeling_visualchat import modality_kernels_visualchat
from modeling_visualchat.modality_attention_visualchat import ModalityPlan


HEADS, HEAD_SIZE, IMAGE_TOKENS, TEXT_TOKENS, LAYERS, REPEATS = 32, 128, 257, 32, 8, 20
# Number of images: the numbers of queries per call that are tried
SIZES = {1: (), 8: (128,), 32: (128, 256, 512), 56: (256, 512)}


def draw(length: int, batch_size: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, HEADS, length, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)


def prefill_sides(images: int, sizes: tuple[int, ...]) -> dict:
    text, image = images * TEXT_TOKENS, images * IMAGE_TOKENS
    is_image = torch.tensor([([True] * IMAGE_TOKENS + [False] * TEXT_TOKENS) * images], device="cuda")
    rotary = (torch.ones(1, text + image, HEAD_SIZE, device="cuda", dtype=torch.bfloat16),) * 2

    def make_layout(queries: int | None, uses_flex: bool = False) -> ModalityPlan:
        by_runs, size = (lambda device: queries is None), queries or text
        with (
            patch.object(modality_kernels_visualchat, "runs_by_images", by_runs),
            patch.object(modality_kernels_visualchat, "QUERIES_PER_CALL", size),
            patch.object(modality_kernels_visualchat, "MIN_FLEX_QUERIES", 1),
            patch.object(modality_kernels_visualchat, "MIN_FLEX_SCORES", 1),
        ):
            return ModalityPlan(is_image, None, rotary, is_image.shape, IMAGE_TOKENS, uses_flex=uses_flex)

    def ours(layout, q, k_text, v_text, k_image, v_image):
        return layout.attend_to_keys(q, (k_text, k_image), (v_text, v_image), scaling=HEAD_SIZE**-0.5)

    parts = {f"SDPA, masked, {size} queries a call": functools.partial(ours, make_layout(size)) for size in sizes}
    parts["SDPA, masked, one call"] = functools.partial(ours, make_layout(text))
    parts["flex"] = functools.partial(ours, make_layout(text, uses_flex=True))
    parts["SDPA, a call for each run"] = functools.partial(ours, make_layout(None))
    sides = {name: (part, (text, text, text, image, image)) for name, part in parts.items()}
    sides["causal SDPA"] = (lambda q, k, v: sdpa(q, k, v, is_causal=True), (text + image,) * 3)
    return sides


def products(q, k, v, mask=None):
    scores = q @ k.transpose(2, 3) * HEAD_SIZE**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def decoding_sides(images: int, batch_size: int) -> dict:
    used, image = images * TEXT_TOKENS, images * IMAGE_TOKENS
    text = used + 128  # a static buffer is larger than what is in use
    keep_text = (torch.arange(text, device="cuda") < used).expand(batch_size, 1, 1, -1)
    keep_image = torch.ones(batch_size, 1, 1, image, device="cuda", dtype=torch.bool)
    keep_all = torch.cat([keep_text, keep_image], -1)

    def two(attend, q, k_text, v_text, k_image, v_image, masks=(None, None)):
        return attend(q, k_text, v_text, masks[0]) + attend(q, k_image, v_image, masks[1])

    masked = functools.partial(two, masks=(keep_text, keep_image))
    return {
        "SDPA": (functools.partial(two, sdpa), (1, used, used, image, image)),
        "SDPA, masked": (functools.partial(masked, sdpa), (1, text, text, image, image)),
        "products": (functools.partial(two, products), (1, used, used, image, image)),
        "products, masked": (functools.partial(masked, products), (1, text, text, image, image)),
        "one SDPA": (sdpa, (1, used + image, used + image)),
        "one SDPA, masked": (lambda q, k, v: sdpa(q, k, v, keep_all), (1, text + image, text + image)),
    }


def measure(sides: dict, batch_size: int = 1, trains: bool = False) -> dict[str, list[float]]:
    """The time of one layer in microseconds."""
    replays = {}
    for name, (attend, lengths) in sides.items():
        layers = [[draw(length, batch_size).requires_grad_(trains) for length in lengths] for _ in range(LAYERS)]

        def run(attend=attend, layers=layers):
            for tensors in layers:
                output = attend(*tensors)
                if trains:
                    torch.autograd.grad(output, tensors, torch.ones_like(output))

        replays[name] = graph_of(run)
    times = {name: [] for name in sides}
    for repeat in range(REPEATS):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replays[name]()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(1000 * start.elapsed_time(stop) / LAYERS)
    return times


def compare_sides(claim: str, times: dict[str, list[float]], reference: str) -> list[dict]:
    print(claim, {name: round(median(values), 1) for name, values in times.items()}, flush=True)
    names = [name for name in times if name != reference]
    return [compare(f"{claim}: {name}, against {reference}", times[name], times[reference], unit="µs") for name in names]


def main():
    torch.manual_seed(0)
    results, machine = [], torch.cuda.get_device_name()
    for images, sizes in SIZES.items():
        for work, trains in (("forward", False), ("forward and backward", True)):
            times = measure(prefill_sides(images, sizes), trains=trains)
            results += compare_sides(f"GPU attention, prefill of {images} images, {work}", times, "causal SDPA")
            save_results("gpu_attention", results, machine)
    for images in (1, 8, 32):
        for batch_size in (1, 8):
            times = measure(decoding_sides(images, batch_size), batch_size)
            results += compare_sides(f"GPU attention, decoding after {images} images, batch {batch_size}", times, "one SDPA")
            save_results("gpu_attention", results, machine)


if __name__ == "__main__":
    main()
