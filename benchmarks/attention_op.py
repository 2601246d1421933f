"""
The attention operation of one layer alone, from queries, keys and values to the input of the output projection. Rotary
embeddings, which all sides have, are excluded, as are masks and the layout, which are made once for all layers.

- ours: `ModalityPlan.attend_to_keys` for the text tokens, and a copy of the image tokens' values;
- causal SDPA: one call with `is_causal` over all tokens, and the transposition of its output, as in transformers' LLaMA;
- dense, as released (DeepSpeed-VisualChat, modeling_llama.py): the scores of all queries with all keys, two additive masks,
  two softmaxes, and their sum times the values;
- two masked SDPA calls: what `sequence_attention_visualchat.py` does where tokens cannot be sorted by modality.

    python -m benchmarks.attention_op
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import compare, interleave
from benchmarks.report import draw_ratios, write_results
from modeling_visualchat.modality_attention_visualchat import ModalityPlan


HEADS, HEAD_SIZE, IMAGE_TOKENS, TEXT_TOKENS, REPEATS = 16, 64, 257, 32, 9


def dense(q, k, v, text_bias, image_bias):
    scores = q @ k.transpose(2, 3) * HEAD_SIZE**-0.5
    weights = (scores + text_bias).softmax(-1) + (scores + image_bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def two_masked_calls(q, k, v, text_mask, image_mask, is_image):
    output = scaled_dot_product_attention(q, k, v, text_mask) + scaled_dot_product_attention(q, k, v, image_mask)
    return torch.where(is_image[:, None, :, None], v, output).transpose(1, 2).flatten(2)


@torch.no_grad()
def compare_attention(
    images: int, heads: int = HEADS, image_tokens: int = IMAGE_TOKENS, repeats: int = REPEATS
) -> list[dict]:
    is_image = torch.tensor([([True] * image_tokens + [False] * TEXT_TOKENS) * images])
    length = is_image.shape[1]
    torch.manual_seed(0)
    states = torch.randn(3, length, heads, HEAD_SIZE)
    q, k, v = (part[None].transpose(1, 2) for part in states)
    k, v = k.contiguous(), v.contiguous()  # as a cache returns them

    rotary = (torch.ones(1, length, HEAD_SIZE),) * 2
    layout = ModalityPlan(is_image, None, rotary, (1, length), image_tokens)
    queries, own_values = q[:, :, ~is_image[0]], states[2][is_image[0]]
    keys, values = ((part[:, :, ~is_image[0]], part[:, :, is_image[0]]) for part in (k, v))

    def ours():
        output = layout.attend_to_keys(queries, keys, values, scaling=HEAD_SIZE**-0.5).flatten(1)
        return torch.cat([output, own_values.flatten(1)])

    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masks = [causal & visible for visible in (~is_image, is_image)]
    masks = [mask | ~mask.any(-1, keepdim=True) for mask in masks]  # a softmax over nothing is NaN
    biases = [torch.zeros(length, length).masked_fill(~mask, torch.finfo(torch.float32).min) for mask in masks]
    sides = {
        "ours": ours,
        "causal SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2),
        "dense MMCA as released": lambda: dense(q, k, v, *biases),
        "two masked SDPA calls": lambda: two_masked_calls(q, k, v, *masks, is_image),
    }
    for name in ("dense MMCA as released", "two masked SDPA calls"):
        # Only text queries are compared: in the released code, image queries attend to text, too
        torch.testing.assert_close(sides[name]()[0, ~is_image[0]], ours()[: queries.shape[2]], rtol=1e-4, atol=1e-4)

    milliseconds = {name: [1000 * one for one in times] for name, times in interleave(sides, repeats).items()}
    targets = {"causal SDPA": 0.25, "dense MMCA as released": 0.03} if images == 8 else {}
    claim = f"attention alone, {images} image{'s' if images > 1 else ''}, against"
    return [
        compare(f"{claim} {name}", milliseconds["ours"], milliseconds[name], targets.get(name), "ms")
        for name in list(sides)[1:]
    ]


def main():
    torch.set_num_threads(2)
    results = [result for images in (1, 2, 4, 8) for result in compare_attention(images)]
    write_results("attention_op", results)
    draw_ratios("attention_op", results)


if __name__ == "__main__":
    main()
