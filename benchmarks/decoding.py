"""
Time per decoded token after a prefill of 8 images, against LLaVA, token by token in turns: each side goes on from its own
dynamic cache, and both are given the same tokens.

    python -m benchmarks.decoding
"""

import time

import torch

from benchmarks.measure import compare
from benchmarks.report import draw_ratios, write_results
from benchmarks.sides import TEXT_TOKENS, build_sides, make_inputs, prefill


IMAGES, TOKENS, WARMUPS = (1, 8), 64, 4


def compare_decoding(ours, llava, images: int, tokens: int = TOKENS) -> list[dict]:
    inputs = make_inputs(ours, images)
    caches = {"ours": prefill(ours, inputs).past_key_values, "theirs": prefill(llava, inputs).past_key_values}
    models = {"ours": ours, "theirs": llava}
    seconds = {"ours": [], "theirs": []}
    new_tokens = torch.randint(3, 300, (WARMUPS + tokens, 1, 1), generator=torch.Generator().manual_seed(0))
    attention_mask = inputs["attention_mask"]
    for step, token in enumerate(new_tokens):
        attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
        for name in list(models)[:: -1 if step % 2 else 1]:
            start = time.perf_counter()
            given = {"input_ids": token, "attention_mask": attention_mask, "past_key_values": caches[name]}
            prefill(models[name], given)
            seconds[name].append(1000 * (time.perf_counter() - start))
    expected = images * (ours.config.image_seq_length + TEXT_TOKENS) + len(new_tokens)
    assert caches["ours"].get_seq_length() == caches["theirs"].get_seq_length() == expected
    claim = f"time per decoded token after {images} image{'s' if images > 1 else ''}, against LLaVA"
    target = 1.03 if images == 8 else None
    return [compare(claim, seconds["ours"][WARMUPS:], seconds["theirs"][WARMUPS:], target, "ms")]


def main():
    ours, llava = build_sides()
    results = [result for images in IMAGES for result in compare_decoding(ours, llava, images)]
    write_results("decoding", results)
    draw_ratios("decoding", results)


if __name__ == "__main__":
    main()
