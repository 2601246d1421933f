"""
One training step in alignment mode (forward, backward, AdamW; projector and token embedding train) over a conversation of 4
images, against LLaVA with the same parts frozen. The second half of each text is an answer. Our side computes logits where
there is a label, as the collator asks; LLaVA computes them everywhere, as it does with `labels`. Memory is what a step needs
at its peak beyond what there is before it: weights and optimizer state, which are the same on both sides, are not counted.

    python -m benchmarks.training_step
"""

import json
import sys
from collections.abc import Callable

import torch

from benchmarks.measure import compare, interleave, peak_memory, peaks_of
from benchmarks.report import draw_ratios, write_results
from benchmarks.sides import IMAGE_TOKEN, TEXT_TOKENS, build_sides, make_inputs


IMAGES, REPEATS, MEMORY_REPEATS = 4, 7, 3


def freeze(model) -> None:
    model.requires_grad_(False).train()
    model.model.multi_modal_projector.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)


def make_step(model, inputs: dict) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make_training_inputs(ours, images: int) -> dict[str, torch.Tensor]:
    inputs = make_inputs(ours, images)
    labels = inputs["input_ids"].clone().view(images, -1)
    labels[:, : -TEXT_TOKENS // 2] = -100
    inputs["labels"] = labels.view(1, -1)
    assert not (inputs["labels"] == IMAGE_TOKEN).any()
    return inputs


def keep_labelled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As our collator asks: logits where there is a label."""
    return {**inputs, "logits_to_keep": torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))}


def make_steps(ours, llava, images: int = IMAGES) -> dict[str, Callable]:
    inputs = make_training_inputs(ours, images)
    for model in (ours, llava):
        freeze(model)
    return {"ours": make_step(ours, keep_labelled(inputs)), "theirs": make_step(llava, inputs)}


def measure_peaks(steps: dict[str, Callable], repeats: int = MEMORY_REPEATS) -> dict[str, list[float]]:
    for step in steps.values():
        step()  # makes the optimizer's state
    return {name: [peak_memory(step) for _ in range(repeats)] for name, step in steps.items()}


def to_results(seconds: dict[str, list[float]], peaks: dict[str, list[float]], images: int = IMAGES) -> list[dict]:
    claim = f"training step, alignment mode, {images} images, against LLaVA"
    return [
        compare(claim, seconds["ours"], seconds["theirs"], 0.70),
        compare(f"{claim}: peak memory", peaks["ours"], peaks["theirs"], 0.60, "MiB"),
    ]


def main():
    results = to_results(interleave(make_steps(*build_sides()), REPEATS), peaks_of("benchmarks.training_step"))
    write_results("training_step", results)
    draw_ratios("training_step", results)


if __name__ == "__main__":
    if sys.argv[1:] == ["memory"]:
        print(json.dumps(measure_peaks(make_steps(*build_sides()))))
    else:
        main()
