# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Rounds of a conversation, and their questions as contents of messages: texts and images in the order of the user."""

from dataclasses import dataclass, field

import torch
from PIL import Image

from .image_loading_visualchat import ImageSource
from .messages_visualchat import fill_images, list_images


@dataclass
class Round:
    """
    A question and its answer.

    Args:
        text (`str`): The question.
        images (`list[PIL.Image.Image]`): The images that came with it.
        answer (`str`): The answer.
        image_lines (`list[int]`): For each image, how many lines of the text stand before it. If it is empty, all images
            stand before the text.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): What the processor made of
            the images, once they were needed.
    """

    text: str
    images: list[Image.Image] = field(default_factory=list)
    answer: str = ""
    image_lines: list[int] = field(default_factory=list)
    pixel_values: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def content(self) -> list[dict]:
        """The question as the content of a message."""
        lines, parts, begun = self.text.split("\n"), [], 0
        for image, line in zip(self.images, self.image_lines or [0] * len(self.images)):
            if line > begun:
                parts.append({"type": "text", "text": "\n".join(lines[begun:line])})
                begun = line
            parts.append({"type": "image", "image": image})
        if begun < len(lines) and (self.text or not self.images):
            parts.append({"type": "text", "text": "\n".join(lines[begun:])})
        return parts


def read_question(text: str | list[dict], images: list[ImageSource]) -> tuple[str, list[ImageSource], list[int]]:
    """
    The text, the images and the `image_lines` of a [`Round`]. Of a list of parts, `images` fills the image parts that carry
    no image of their own, in order; a text has all images before it.

    Raises:
        ValueError: If a part cannot be used, or `images` and the image parts that wait for one differ in number.
    """
    if not isinstance(text, list) or not all(isinstance(part, dict) for part in text):
        return text, images, []  # a text, or what is refused as none
    (question,) = fill_images({"messages": [{"role": "user", "content": text}], "images": images}, "the question")
    text, image_lines = join_texts([part.get("text") for part in question["content"]])
    return text, list_images([question]), image_lines


def join_texts(parts: list[str | None]) -> tuple[str, list[int]]:
    """The text and the `image_lines` of a [`Round`], by the texts of a question's parts: `None` for an image."""
    texts, image_lines, lines = [], [], 0
    for text in parts:
        if text is None:
            image_lines.append(lines)
        else:
            texts.append(text)
            lines += text.count("\n") + 1
    return "\n".join(texts), image_lines if any(image_lines) else []
