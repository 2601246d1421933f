# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Batches of conversations for the Trainer."""

from dataclasses import dataclass

import numpy as np
import torch

from .processing_visualchat import VisualChatProcessor


IGNORE_INDEX = -100


@dataclass
class VisualChatDataCollator:
    """
    Turns rows of `{"messages": [...], "images": [...]}` into a batch. `images` fills the image parts that carry no picture
    of their own, in reading order. Labels are the answers and their end tokens, in every round, taken from the chat
    template's generation spans; all else is -100.

    Args:
        processor (`VisualChatProcessor`): Assembles and tokenizes.
        pad_to_multiple_of (`int`, *optional*): Pads the length of the batch up to a multiple.
        supervised_logits_only (`bool`, *optional*, defaults to `False`): Adds `logits_to_keep`, so that the model computes
            logits where there is a label and nowhere else. The loss is the same at a fraction of the memory; metrics that
            want the logits of every position need it off.

    Raises:
        ValueError: If a row's images and image parts differ in number (both are given), or if a row has nothing to learn.
            The row's index in the batch is named.
    """

    processor: VisualChatProcessor
    pad_to_multiple_of: int | None = None
    supervised_logits_only: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)`, padded on the right, and
            `pixel_values` of shape `(images in the batch, channels, height, width)` if there are images.
        """
        conversations = [fill_images(row, f"row {index}") for index, row in enumerate(rows)]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                # Not the text: spans are found in lists, in tensors it takes longer than all the rest
                "images_kwargs": {"return_tensors": "pt"},
                "padding": True,
                "padding_side": "right",
                "pad_to_multiple_of": self.pad_to_multiple_of,
            },
        )
        learned = torch.from_numpy(np.array(batch.pop("assistant_masks"), dtype=bool))
        batch = {name: torch.from_numpy(np.asarray(values)) for name, values in batch.items()}  # of lists, torch is slow
        for index, row_learned in enumerate(learned):
            if not row_learned.any():
                raise ValueError(f"row {index} holds no answer: a conversation needs an assistant message to learn from")
        batch = {**batch, "labels": batch["input_ids"].masked_fill(~learned, IGNORE_INDEX)}
        if self.supervised_logits_only:
            # The logits at a position predict the next token
            batch["logits_to_keep"] = torch.nn.functional.pad(learned[:, 1:], (0, 1))
        return batch


def fill_images(row: dict, name: str) -> list[dict]:
    """
    The messages of a row, with its images put into the image parts that carry none, in reading order. An image may be what
    datasets' undecoded Image feature holds, a dict of `bytes` and `path`.
    """
    images = [_undecoded(image) for image in row.get("images") or []]
    given = len(images)
    empty = 0
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, list):
            filled = []
            for part in content:
                if part["type"] == "image" and all(part.get(key) is None for key in ("image", "url", "path", "base64")):
                    empty += 1
                    part = {"type": "image", "image": images.pop(0) if images else None}
                filled.append(part)
            content = filled
        messages.append({**message, "content": content})
    if empty != given:
        raise ValueError(f"{name}: {empty} image parts wait for a picture, but `images` holds {given}")
    return messages


def _undecoded(image):
    if isinstance(image, dict):
        return image["bytes"] if image["bytes"] is not None else image["path"]
    return image
