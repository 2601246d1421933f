# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The report of the demo: an image of the conversation, the loss curves and the model card."""

import shutil
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image


matplotlib.use("Agg")  # works on machines without a display

LINE_HEIGHT = 0.42  # inches, of a line of text
IMAGE_HEIGHT = 0.95  # inches
WIDTH = 7.5  # inches
LINE_LENGTH = 68  # characters of an answer

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

A CLIP vision tower (2 layers, hidden size 64) and a LLaMA decoder (3 layers, hidden size 128), trained from scratch and then
frozen. They are connected by a projector, with multi-modal causal attention and numbered image keys (DeepSpeed-VisualChat,
[arXiv 2309.14327](https://arxiv.org/abs/2309.14327)). In the alignment only the projector and the token embedding were
trained. The model answers questions about 1 to 4 scanned digits in conversations of several rounds, in which later rounds
may bring more images. It is a demonstration and cannot do anything else.

![A conversation about digits that the model was not trained on](conversation.png)

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

Images must be square, with a white digit on black, as in scikit-learn's `load_digits`.

Or chat in the terminal, with the VisualChat package installed: `visualchat chat path/to/this/folder`.

## Accuracy

Measured on {conversations} conversations with {questions} questions about {test} scans that were not used for training. An
answer is correct if it equals the true answer exactly. Each question comes after the true answers of the earlier rounds.
Decoding is greedy.

| | accuracy |
|---|---|
| **all questions** | **{accuracy:.1%}** |
{by_kind}
| the same model and questions with blank images | {accuracy_without_images:.1%} |
| always the most common answer to the kind of question | {accuracy_most_common_answer:.1%} |

## Training

The data are the 1,797 scans of 8 × 8 pixels of scikit-learn's `load_digits`: {train} for training, {validation} for the
choice of hyperparameters and {test} for the test. Training and evaluation took {seconds:.0f} seconds on a CPU. To repeat
them, run `make demo` in the VisualChat repository.
"""

KIND_TITLES = {
    "digit": "“What digit is in image 2?”",
    "same": "“Do image 1 and image 3 show the same digit?”",
    "larger": "“Which digit is larger, image 1 or image 2?”",
    "even": "“How many images show an even digit?”",
}


def draw_conversation(messages: list[dict], answers: list[str], file: Path, credit: str = "") -> None:
    """
    Args:
        messages (`list[dict]`): Messages of the user, whose image parts have a `path`, each followed by a message of the
            assistant with the true answer.
        answers (`list[str]`): The answer of the model in each round.
        file (`Path`): Where the drawing is saved.
        credit (`str`): A line under the conversation: who made the images.
    """
    rows = []  # (height in inches, what to draw)
    for question, true_answer, answer in zip(messages[::2], messages[1::2], answers):
        paths = [part["path"] for part in question["content"] if part["type"] == "image"]
        text = " ".join(part["text"] for part in question["content"] if part["type"] == "text")
        if paths:
            rows.append((IMAGE_HEIGHT + LINE_HEIGHT, paths))
        is_correct = answer == true_answer["content"]
        verdict = "✓" if is_correct else f"✗  (true answer: {true_answer['content']})"
        lines = textwrap.wrap(f"{answer}  {verdict}", LINE_LENGTH)
        rows += [
            (LINE_HEIGHT, ("User", text, "black")),
            (LINE_HEIGHT * (0.9 + 0.4 * len(lines)), ("VisualChat", "\n".join(lines), is_correct)),
        ]

    total = sum(height for height, _ in rows) + (0.5 if credit else 0.3)
    figure = plt.figure(figsize=(WIDTH, total), dpi=120)
    top, number = total - 0.15, 0
    for height, content in rows:
        if isinstance(content, list):
            for column, path in enumerate(content):
                number += 1
                left = 1.4 + column * (IMAGE_HEIGHT + 0.35)
                box = (left / WIDTH, (top - IMAGE_HEIGHT) / total, IMAGE_HEIGHT / WIDTH, IMAGE_HEIGHT / total)
                axes = figure.add_axes(box)
                axes.imshow(Image.open(path), cmap="gray")
                axes.set_axis_off()
                figure.text(
                    (left + IMAGE_HEIGHT / 2) / WIDTH,
                    (top - IMAGE_HEIGHT - 0.06) / total,
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
    figure.text(0.2 / WIDTH, 0.1 / total, credit, fontsize=8, color="dimgray")
    figure.savefig(file)
    plt.close(figure)


def draw_losses(losses: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """
    Args:
        losses (`dict`): The loss curve of each training stage, a list of `(step, loss)`.
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
    """Writes the model card `model/README.md`, and copies the image of the conversation to its folder."""
    by_kind = "\n".join(f"| {KIND_TITLES[kind]} | {share:.1%} |" for kind, share in metrics["accuracy_by_kind"].items())
    card = MODEL_CARD.format(**{**metrics, "by_kind": by_kind}, **split_sizes)
    (output_dir / "model" / "README.md").write_text(card)
    shutil.copy(output_dir / "conversation.png", output_dir / "model" / "conversation.png")
