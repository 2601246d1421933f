# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What the demo shows of itself: a picture of the conversation, the loss curves and the model card."""

import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image


matplotlib.use("Agg")  # writes files on machines without a display

ROW_HEIGHT = 0.42  # inches, of a line of text
PICTURE_HEIGHT = 0.95  # inches
WIDTH = 7.5  # inches

MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
language: en
tags:
- visualchat
- multi-image
- multi-round
- custom_code
---

# A small VisualChat that reads digits

A CLIP vision tower (2 layers × 64) and a LLaMA decoder (3 layers × 128), trained from scratch and then frozen, joined by a
projector and multi-modal causal attention (DeepSpeed-VisualChat, [arXiv 2309.14327](https://arxiv.org/abs/2309.14327)) with
numbered image keys. In the alignment only the projector and the token embedding were trained. It converses about 1 to 4
scanned digits over several rounds, later images arriving in later rounds. It is a demonstration: it knows nothing else.

![A conversation over digits that the model has not seen](conversation.png)

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/to/this/folder"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [
    {{"role": "user", "content": [{{"type": "image", "path": "digit.png"}},
                                 {{"type": "text", "text": "What digit is in image 1?"}}]}},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Pictures are square, white ink on black, as in scikit-learn's `load_digits`.

## Measured

{conversations} conversations with {questions} questions over {test} scans that no stage of the training has seen. An answer
counts if it is right to the letter; the earlier rounds' true answers stand before each question; decoding is greedy.

| | exact answers |
|---|---|
| **all questions** | **{accuracy:.1%}** |
{by_kind}
| the same model and questions over blank pictures | {accuracy_without_images:.1%} |
| the most common answer to each kind of question | {accuracy_most_common_answer:.1%} |

## Training

Data: scikit-learn's `load_digits`, 1,797 scans of 8 × 8 pixels, of which {train} train, {validation} choose hyperparameters
and {test} test. All of it, with the measurement, took {seconds:.0f} seconds on the CPU that ran it. The command is
`make demo` in the VisualChat repository.
"""

KIND_TITLES = {
    "digit": "“What digit is in image 2?”",
    "same": "“Do image 1 and image 3 show the same digit?”",
    "larger": "“Which digit is larger, image 1 or image 2?”",
    "even": "“How many images show an even digit?”",
}


def draw_conversation(messages: list[dict], answers: list[str], file: Path) -> None:
    """
    Args:
        messages (`list[dict]`): User and assistant in turn. Image parts have a `path`; the assistant's content is the truth.
        answers (`list[str]`): The model's, one for each round.
    """
    rows = []  # (height in inches, what to draw)
    for question, truth, answer in zip(messages[::2], messages[1::2], answers):
        paths = [part["path"] for part in question["content"] if part["type"] == "image"]
        text = " ".join(part["text"] for part in question["content"] if part["type"] == "text")
        if paths:
            rows.append((PICTURE_HEIGHT + ROW_HEIGHT, paths))
        is_right = answer == truth["content"]
        verdict = "✓" if is_right else f"✗  (the truth: {truth['content']})"
        rows += [(ROW_HEIGHT, ("User", text, "black")), (ROW_HEIGHT * 1.3, ("VisualChat", f"{answer}  {verdict}", is_right))]

    total = sum(height for height, _ in rows) + 0.3
    figure = plt.figure(figsize=(WIDTH, total), dpi=120)
    top, number = total - 0.15, 0
    for height, content in rows:
        if isinstance(content, list):
            for column, path in enumerate(content):
                number += 1
                left = 1.4 + column * (PICTURE_HEIGHT + 0.35)
                box = (left / WIDTH, (top - PICTURE_HEIGHT) / total, PICTURE_HEIGHT / WIDTH, PICTURE_HEIGHT / total)
                axes = figure.add_axes(box)
                axes.imshow(Image.open(path), cmap="gray")
                axes.set_axis_off()
                figure.text(
                    (left + PICTURE_HEIGHT / 2) / WIDTH,
                    (top - PICTURE_HEIGHT - 0.06) / total,
                    f"Image {number}",
                    fontsize=9,
                    ha="center",
                    va="top",
                )
        else:
            speaker, text, colour = content
            colour = {True: "darkgreen", False: "crimson"}.get(colour, colour)
            figure.text(0.2 / WIDTH, top / total, speaker, fontsize=11, weight="bold", va="top")
            figure.text(1.4 / WIDTH, top / total, text, fontsize=11, color=colour, va="top")
        top -= height
    figure.savefig(file)
    plt.close(figure)


def draw_losses(losses: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """
    Args:
        losses (`dict`): For each stage of the training, a list of `(step, loss)`.
    """
    figure, panels = plt.subplots(1, len(losses), figsize=(3.4 * len(losses), 2.8), dpi=120, layout="constrained")
    for axes, (stage, curve) in zip(panels, losses.items()):
        axes.plot(*zip(*curve), linewidth=1)
        axes.set(title=stage, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss (nats)")
    figure.savefig(file)
    plt.close(figure)


def write_model_card(output_dir: Path, metrics: dict, split_sizes: dict[str, int]) -> None:
    """Writes `model/README.md`, and the picture of the conversation beside it."""
    by_kind = "\n".join(f"| {KIND_TITLES[kind]} | {share:.1%} |" for kind, share in metrics["accuracy_by_kind"].items())
    card = MODEL_CARD.format(**{**metrics, "by_kind": by_kind}, **split_sizes)
    (output_dir / "model" / "README.md").write_text(card)
    shutil.copy(output_dir / "conversation.png", output_dir / "model" / "conversation.png")
