"""
Prefill of a conversation of 1, 2, 4 and 8 images, 32 text tokens after each, against LLaVA: with the vision tower, and
without it, the projected features being given to both sides.

    python -m benchmarks.prefill
"""

from benchmarks.measure import compare, interleave
from benchmarks.report import draw_ratios, write_results
from benchmarks.sides import build_sides, leave_out_tower, make_inputs, prefill


TARGETS, REPEATS = {1: 0.92, 8: 0.70}, {1: 11, 2: 7, 4: 7, 8: 7}


def compare_prefill(ours, llava, images: int, repeats: int) -> list[dict]:
    inputs = make_inputs(ours, images)
    our_features, their_features = (leave_out_tower(model, inputs) for model in (ours, llava))
    with_tower = {"ours": lambda: prefill(ours, inputs), "theirs": lambda: prefill(llava, inputs)}
    without_tower = {"ours": lambda: prefill(ours, our_features), "theirs": lambda: prefill(llava, their_features)}
    name = f"prefill, {images} image{'s' if images > 1 else ''}, against LLaVA"
    seconds = interleave(with_tower, repeats)
    decoder_seconds = interleave(without_tower, repeats)
    return [
        compare(name, seconds["ours"], seconds["theirs"], TARGETS.get(images)),
        compare(f"{name}, tower excluded", decoder_seconds["ours"], decoder_seconds["theirs"], TARGETS.get(images)),
    ]


def main():
    ours, llava = build_sides()
    results = [one for images, repeats in REPEATS.items() for one in compare_prefill(ours, llava, images, repeats)]
    write_results("prefill", results)
    draw_ratios("prefill", results)


if __name__ == "__main__":
    main()
