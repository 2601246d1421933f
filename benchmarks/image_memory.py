"""
The first token of a new question about known images. Our side remembers them, so it computes the text of the conversation,
all 256 tokens of it; LLaVA computes everything. With the tower, LLaVA starts from pixels, and so do we: the pictures are
hashed and found in an `ImageMemoryStore`.

    python -m benchmarks.image_memory
"""

from torch.testing import assert_close

from benchmarks.measure import compare, interleave
from benchmarks.report import draw_ratios, write_results
from benchmarks.sides import build_sides, leave_out_tower, make_inputs, prefill, without
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


IMAGES, REPEATS = 8, 9


def compare_first_token(ours, llava, images: int = IMAGES, repeats: int = REPEATS) -> list[dict]:
    inputs = make_inputs(ours, images)
    text, pixel_values = without(inputs, "pixel_values"), inputs["pixel_values"]
    their_features = leave_out_tower(llava, inputs)
    memory = ours.encode_images(pixel_values)
    store = ImageMemoryStore(ours, max_bytes=memory.nbytes)
    store.get(pixel_values)
    assert_close(prefill(ours, {**text, "image_memory": memory}).logits, prefill(ours, inputs).logits, rtol=1e-4, atol=1e-5)

    sides = {
        "ours": lambda: prefill(ours, {**text, "image_memory": memory}),
        "theirs": lambda: prefill(llava, their_features),
        "ours, from pixels": lambda: prefill(ours, {**text, "image_memory": store.get(pixel_values)}),
        "theirs, from pixels": lambda: prefill(llava, inputs),
    }
    seconds = interleave(sides, repeats)
    claim = f"first token of a new question about {images} known images, against LLaVA's full prefill"
    return [
        compare(f"{claim}, tower excluded", seconds["ours"], seconds["theirs"], 0.12),
        compare(f"{claim}, tower included", seconds["ours, from pixels"], seconds["theirs, from pixels"], 0.10),
    ]


def main():
    results = compare_first_token(*build_sides())
    write_results("image_memory", results)
    draw_ratios("image_memory", results)


if __name__ == "__main__":
    main()
