"""
Draws docs/mmca.png, what each token of a short conversation attends to, from the model's own masks.

    python docs/mmca_figure.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from transformers import LlamaConfig

from modeling_visualchat.sequence_attention_visualchat import SequencePlan


FIGURE = Path(__file__).with_name("mmca.png")
TOKENS = ["You", "see", "img 1", "img 1", "img 1", "Who", "?", "img 2", "img 2", "img 2", "And", "this", "?"]
PANELS = {
    "causal": "causal (LLaVA)\none softmax",
    "mmca": "mmca (the paper, default)\ntwo softmaxes, summed",
    "mmca_merged": "mmca_merged\none softmax",
}
NOTHING, TEXT, IMAGE, ALL, ITSELF = range(5)
COLORS = {NOTHING: "white", TEXT: "#4477aa", IMAGE: "#ee9944", ALL: "#77aa77", ITSELF: "black"}
NAMES = {
    TEXT: "softmax over text keys",
    IMAGE: "softmax over image keys",
    ALL: "softmax over all keys",
    ITSELF: "its own value",
}


def visible(variant: str) -> torch.Tensor:
    """A matrix of shape `(queries, keys)` of the codes above."""
    is_image = torch.tensor([[token.startswith("img") for token in TOKENS]])
    length = len(TOKENS)
    config = LlamaConfig(num_hidden_layers=1, attn_implementation="sdpa")
    plan = SequencePlan(variant, config, torch.zeros(1, length, 1), None, torch.arange(length)[None], None, is_image, 3)
    cells = torch.full((length, length), NOTHING)
    if plan.image_keys is None:
        cells[torch.ones(length, length).tril().bool()] = ALL
    else:
        cells[plan.text_keys[0, 0]] = TEXT
        cells[plan.image_keys[0, 0] & plan.sees_image[0, 0]] = IMAGE
    if plan.sees_itself_only is not None:
        cells[is_image[0]] = NOTHING
        cells[is_image[0].diag()] = ITSELF
    return cells


def main(path: Path = FIGURE):
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13.5, 6), layout="constrained")
    for axis, (variant, title) in zip(axes, PANELS.items()):
        axis.imshow(visible(variant), cmap=ListedColormap(list(COLORS.values())), vmin=0, vmax=4)
        axis.set_title(title)
        axis.set_xticks(range(len(TOKENS)), TOKENS, rotation=90)
        axis.set_yticks(range(len(TOKENS)), TOKENS)
        axis.set_xticks([x - 0.5 for x in range(1, len(TOKENS))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(TOKENS))], minor=True)
        axis.grid(which="minor", color="lightgray", linewidth=0.5)
        axis.tick_params(which="both", length=0)
        axis.set_xlabel("key")
    axes[0].set_ylabel("token (query)")
    patches = [Patch(facecolor=COLORS[code], label=name) for code, name in NAMES.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
