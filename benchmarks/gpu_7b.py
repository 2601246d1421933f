"""
VisualChat against LLaVA on one GPU, with the shapes of LLaMA-2-7B and CLIP ViT-L/14: bf16, random weights, 257 tokens per
image and 32 text tokens after each. Both models (28 GB) are on the GPU and take turns. The GPU is synchronized before a time
is taken.

- Prefill, first token of a new question about known images, training step: as in `prefill.py`, `image_memory.py` and
  `training_step.py`. Peak memory is the most that torch has allocated, minus what was allocated before.
- Time per decoded token after 8 images, with the same tokens on both sides: with the default dynamic cache, as in
  `decoding.py`; the same without cuDNN's attention, which makes a new plan for each length of the cache, and which ours
  never uses; and with a static cache, where the step is captured as a CUDA graph and replayed.
- Rates, computed from these times. The memory bandwidth of decoding counts the decoder's layers, its last norm, the head,
  and the prompt's keys and values once per token. It is compared with a copy of 2 GB on the same GPU, which reads and
  writes. The arithmetic rate of prefill counts matrix products as in `arithmetic_rate.py`, without those inside attention.
  It is compared with the product of two 8192 × 8192 matrices.
- Prefill of up to 56 images (16,184 tokens) without the vision tower: time and peak memory.
- Flex attention against SDPA, both ours: prefill and training step by the number of images, and the first step of each size,
  which compiles a kernel or finds a compiled one. Flex attention is used for all sizes here, whereas
  `attn_implementation="flex_attention"` uses SDPA for small ones (`MIN_FLEX_SCORES`).

    python -m benchmarks.gpu_7b  # some minutes on an H100, 80 GB
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from unittest.mock import patch

import torch
from transformers import StaticCache

from benchmarks.arithmetic_rate import CountProducts
from benchmarks.measure import compare, graph_of, interleave
from benchmarks.prefill import compare_prefill
from benchmarks.report import HEAD, save_results, table_row
from benchmarks.sides import assert_near, build_sides, encoder_outputs, leave_out_tower, make_inputs, prefill, without
from benchmarks.training_step import freeze, keep_labelled, make_step, make_steps, make_training_inputs, to_results
from modeling_visualchat import modality_kernels_visualchat
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from modeling_visualchat.modality_kernels_visualchat import without_cudnn


TEXT = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 14}
IMAGES, TRAINING_IMAGES, GROWTH, FLEX_IMAGES = (1, 2, 4, 8), 4, (16, 32, 56), (8, 16, 24, 32)
REPEATS, TRAINING_REPEATS, GROWTH_REPEATS = 9, 7, 3
# Decoded tokens that are measured, decoded tokens before them, and the tokens that a static cache has room for
TOKENS, WARMUPS, ROOM = 32, 4, 128
DYNAMIC, STATIC = "dynamic cache", "static cache, CUDA graph"
DYNAMIC_WITHOUT_CUDNN = f"{DYNAMIC}, torch's cuDNN attention switched off"
COPIED_BYTES, MATRIX_SIZE, CALLS = 2 * 10**9, 8192, 10


@contextmanager
def synchronizing(*models: torch.nn.Module) -> Iterator[None]:
    """Synchronizes the GPU after each forward pass of the models."""
    hooks = [model.register_forward_hook(lambda *_: torch.cuda.synchronize()) for model in models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def peak_memory(call: Callable) -> float:
    """The peak GPU memory of `call` in MiB, beyond what is allocated before it."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare_first_token(ours, llava, images: int, repeats: int) -> list[dict]:
    inputs = make_inputs(ours, images)
    text, pixel_values = without(inputs, "pixel_values"), inputs["pixel_values"]
    their_features = leave_out_tower(llava, inputs)
    store = ImageMemoryStore(ours, max_bytes=images * ours.image_memory_nbytes)
    store.get(pixel_values)

    def ask(memory):
        return prefill(ours, {**text, "image_memory": memory})

    memory = ours.encode_images(pixel_values)
    assert_near(ask(memory).logits, prefill(ours, inputs).logits, rtol=1e-4, atol=1e-5)
    claim = f"first token of a new question about {images} known images, against LLaVA's full prefill"
    results = []
    for tower, target, our_call, their_inputs in (
        ("excluded", 0.12, lambda: ask(memory), their_features),
        ("included", 0.10, lambda: ask(store.get(pixel_values)), inputs),
    ):
        seconds = interleave({"ours": our_call, "theirs": lambda given=their_inputs: prefill(llava, given)}, repeats)
        results.append(compare(f"{claim}, tower {tower}", seconds["ours"], seconds["theirs"], target))
    return results


def decode_dynamic(model, inputs: dict, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Prefills, and returns a decoding step, which takes the next of `tokens` and returns the logits."""
    cache = prefill(model, inputs).past_key_values
    past, remaining = inputs["input_ids"].shape[1], iter(tokens)
    mask = inputs["attention_mask"].new_ones(1, past + len(tokens))

    def step():
        nonlocal past
        past += 1
        given = {"input_ids": next(remaining), "attention_mask": mask[:, :past], "past_key_values": cache}
        return prefill(model, given).logits

    return step


def decode_static(model, inputs: dict, tokens: torch.Tensor, room: int) -> Callable[[], torch.Tensor]:
    """The same with a static cache and a CUDA graph. The warm-up of the capture decodes the first token three times."""
    past = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=past + room)
    prefill(model, {**without(inputs, "attention_mask"), "past_key_values": cache})
    token, outputs = tokens[0].clone(), {}

    def decode():
        outputs["logits"] = prefill(model, {"input_ids": token, "past_key_values": cache}).logits

    replay, remaining = graph_of(decode), iter(tokens[3:])

    def step():
        token.copy_(next(remaining))
        replay()
        torch.cuda.synchronize()
        return outputs["logits"]

    return step


def compare_decoding(ours, llava, images: int, tokens: int) -> Iterator[dict]:
    inputs = make_inputs(ours, images)
    total = WARMUPS + tokens
    new_tokens = torch.randint(3, 300, (total, 1, 1), generator=torch.Generator().manual_seed(0)).to(ours.device)
    new_tokens[:3] = new_tokens[0]  # as in the warm-up of `decode_static`
    last_logits = {}

    def measure(steps: dict[str, Callable], cache: str, warmups: int) -> dict:
        def keep(name):
            last_logits[name, cache] = steps[name]()

        seconds = interleave({name: lambda name=name: keep(name) for name in steps}, tokens, warmups)
        sides = ([1000 * one for one in seconds[name]] for name in ("ours", "theirs"))
        return compare(decoding_claim(images, cache), *sides, 1.03, "ms")

    models = {"ours": ours, "theirs": llava}
    for cache, setting in ((DYNAMIC, nullcontext), (DYNAMIC_WITHOUT_CUDNN, without_cudnn)):
        with synchronizing(ours, llava), setting():
            steps = {name: decode_dynamic(model, inputs, new_tokens) for name, model in models.items()}
            yield measure(steps, cache, WARMUPS)
    steps = {name: decode_static(model, inputs, new_tokens, ROOM) for name, model in models.items()}
    yield measure(steps, STATIC, WARMUPS - 3)
    for name in models:
        assert_near(last_logits[name, STATIC], last_logits[name, DYNAMIC], rtol=1e-4, atol=1e-4)


def decoding_claim(images: int, cache: str) -> str:
    return f"time per decoded token after {images} images, {cache}, against LLaVA"


def measure_rate(amount: float, call: Callable) -> float:
    """The rate per second of the GPU at a `call` that processes `amount` bytes or operations."""

    def calls():
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return CALLS * amount / median(interleave({"": calls}, REPEATS)[""])


def compare_rates(ours, llava, images: int, medians: dict[str, dict]) -> Iterator[dict]:
    """
    Args:
        images (`int`): The number of images in the prompt.
        medians (`dict[str, dict]`): The results so far by their claims, from which the rates are computed.
    """
    inputs = make_inputs(ours, images)
    length = inputs["input_ids"].shape[1]
    prefilled = medians[f"prefill, {images} images, against LLaVA, tower excluded"]
    rates = {f"prefill of {images} images, tower excluded": [length / prefilled[side] for side in ("ours", "theirs")]}
    for cache in (DYNAMIC, STATIC):
        decoded = medians[decoding_claim(images, cache)]
        rates[f"decoding after {images} images, {cache}"] = [1000 / decoded[side] for side in ("ours", "theirs")]
    for work, (our_rate, their_rate) in rates.items():
        yield compare(f"tokens per second, {work}, against LLaVA", [our_rate], [their_rate], unit="tokens/s")

    source, copied = torch.empty(2, COPIED_BYTES, dtype=torch.uint8, device=ours.device)
    own_bandwidth = measure_rate(2 * COPIED_BYTES, lambda: copied.copy_(source)) / 1e12
    read = (*ours.model.language_model.layers, ours.model.language_model.norm, ours.lm_head)
    read_bytes = sum(weight.nbytes for part in read for weight in part.parameters())
    read_bytes += length * ours.image_memory_nbytes // ours.config.image_seq_length
    cases = (("VisualChat", "ours", STATIC), ("LLaVA", "theirs", STATIC), ("VisualChat", "ours", DYNAMIC))
    for name, side, cache in cases:
        reached = 1000 * read_bytes / medians[decoding_claim(images, cache)][side] / 1e12
        claim = f"memory bandwidth of decoding after {images} images, {cache}, {name}, against a copy on the GPU"
        yield compare(claim, [reached], [own_bandwidth], unit="TB/s")

    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=ours.device, dtype=ours.dtype)
    own_products = measure_rate(2 * MATRIX_SIZE**3, lambda: torch.mm(left, right)) / 1e12
    for name, side, model in (("VisualChat", "ours", ours), ("LLaVA", "theirs", llava)):
        given = leave_out_tower(model, inputs)
        with CountProducts() as counted:
            prefill(model, given)
        flops = sum(2 * rows * inner * columns * count for (rows, inner, columns), count in counted.shapes.items())
        claim = f"arithmetic rate of the prefill of {images} images, tower excluded, {name}, against torch.mm on the GPU"
        yield compare(claim, [flops / prefilled[side] / 1e12], [own_products], unit="TFLOP/s")


def compare_training(ours, llava, images: int, repeats: int) -> list[dict]:
    steps = make_steps(ours, llava, images)
    seconds = interleave(steps, repeats)
    peaks = {name: [peak_memory(step)] for name, step in steps.items()}
    for model in (ours, llava):
        model.eval().requires_grad_(False)
    return to_results(seconds, peaks, images)


def make_inputs_without_tower(ours, images: int) -> dict:
    size = (images, ours.config.image_seq_length, ours.config.text_config.hidden_size)
    features = torch.randn(size, device=ours.device, dtype=ours.dtype)
    return {**make_inputs(ours, images, pixels=False), "mm_encoder_outputs": encoder_outputs(features)}


def compare_growth(ours, llava, counts: Iterable[int], repeats: int) -> Iterator[dict]:
    for images in counts:
        inputs = make_inputs_without_tower(ours, images)
        sides = {"ours": lambda given=inputs: prefill(ours, given), "theirs": lambda given=inputs: prefill(llava, given)}
        seconds = interleave(sides, repeats)
        claim = f"growth, images {images}, tokens {inputs['input_ids'].shape[1]:,}: {{}} of VisualChat against LLaVA"
        yield compare(claim.format("time"), seconds["ours"], seconds["theirs"])
        peaks = {name: [peak_memory(call)] for name, call in sides.items()}
        yield compare(claim.format("peak memory"), peaks["ours"], peaks["theirs"], unit="MiB")


def compare_flex(ours, counts: Iterable[int], repeats: int) -> Iterator[dict]:
    def by(implementation: str, call: Callable) -> Callable:
        def run():
            ours.set_attn_implementation({"text_config": implementation})
            result = call()
            torch.cuda.synchronize()
            return result

        return run

    def sides_of(call: Callable) -> dict[str, Callable]:
        return {"ours": by("flex_attention", call), "theirs": by("sdpa", call)}

    freeze(ours)
    steps = {images: make_step(ours, keep_labelled(make_training_inputs(ours, images))) for images in counts}
    for images, step in steps.items():
        claim = f"training step, alignment mode, {images} images, flex attention against SDPA"
        first = interleave(sides_of(step), 1, warmups=0)
        yield compare(f"{claim}: the first", first["ours"], first["theirs"])
        seconds = interleave(sides_of(step), repeats)
        yield compare(claim, seconds["ours"], seconds["theirs"])
        peaks = {name: [peak_memory(call)] for name, call in sides_of(step).items()}
        yield compare(f"{claim}: peak memory", peaks["ours"], peaks["theirs"], unit="MiB")
    ours.eval().requires_grad_(False)
    for images in counts:
        inputs = make_inputs_without_tower(ours, images)
        seconds = interleave(sides_of(lambda given=inputs: prefill(ours, given)), repeats, warmups=2)
        claim = f"prefill, {images} images, tower excluded, flex attention against SDPA"
        yield compare(claim, seconds["ours"], seconds["theirs"])
    ours.set_attn_implementation({"text_config": "sdpa"})


def main():
    ours, llava = build_sides(TEXT, VISION, device="cuda", dtype=torch.bfloat16)
    results = {}

    def show(part: Iterable[dict]) -> None:
        for result in part:
            print(table_row(result), flush=True)
            results[result["claim"]] = result
            save_results("gpu_7b", list(results.values()), machine=torch.cuda.get_device_name())
        gc.collect()
        torch.cuda.empty_cache()

    print(HEAD, flush=True)
    with synchronizing(ours, llava):
        for images in IMAGES:
            show(compare_prefill(ours, llava, images, REPEATS))
        show(compare_first_token(ours, llava, IMAGES[-1], REPEATS))
    show(compare_decoding(ours, llava, IMAGES[-1], TOKENS))
    show(compare_rates(ours, llava, IMAGES[-1], results))
    show(compare_training(ours, llava, TRAINING_IMAGES, TRAINING_REPEATS))
    with synchronizing(ours, llava):
        show(compare_growth(ours, llava, GROWTH, GROWTH_REPEATS))
    with patch.object(modality_kernels_visualchat, "MIN_FLEX_SCORES", 0):
        show(compare_flex(ours, FLEX_IMAGES, GROWTH_REPEATS))


if __name__ == "__main__":
    main()
