# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Batches of conversations for the Trainer."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from PIL import Image

from .image_loading_visualchat import ImageSource, crop_for_clip, load_image
from .messages_visualchat import fill_images, list_images
from .processing_visualchat import VisualChatProcessor


IGNORE_INDEX = -100


@dataclass
class VisualChatDataCollator:
    """
    Turns examples of `{"messages": [...], "images": [...]}` into a batch. `images` fills the image parts that carry no image
    of their own, in reading order. Labels are the answers and their end tokens, in every round, taken from the chat
    template's generation spans; all else is -100.

    Args:
        processor (`VisualChatProcessor`): Assembles and tokenizes.
        pad_to_multiple_of (`int`, *optional*): Pads the length of the batch up to a multiple.
        supervised_logits_only (`bool`, *optional*, defaults to `False`): Adds `logits_to_keep`, so that the model computes
            logits where there is a label and nowhere else. The loss is the same at a fraction of the memory; metrics that
            want the logits of every position need it off.

    Raises:
        ValueError: If an example's messages or an image cannot be used, if its images and image parts differ in number (both
            are given), or if it has nothing to learn. Its index in the batch is named.
    """

    processor: VisualChatProcessor
    pad_to_multiple_of: int | None = None
    supervised_logits_only: bool = False

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch_size, sequence_length)`, padded on the right, and
            `pixel_values` of shape `(images in the batch, channels, height, width)` if there are images.
        """
        processor = self.processor
        conversations = [
            processor.prepare_conversation(fill_images(example, f"example {index}"), f"example {index}: ")
            for index, example in enumerate(examples)
        ]
        images = [
            [self._open(source, f"example {index}, image {number}") for number, source in enumerate(list_images(one), 1)]
            for index, one in enumerate(conversations)
        ]
        tokens, learned = [], []
        for index, (ids, is_answer) in enumerate(processor.encode_answers(conversations)):
            placeholders = (ids == processor.image_token_id).sum() // processor.image_seq_length
            if placeholders != len(images[index]):
                raise ValueError(
                    f"example {index}: the chat template writes {placeholders} image placeholders for"
                    f" {len(images[index])} images"
                )
            if not is_answer.any():
                raise ValueError(f"example {index} holds no answer: a conversation needs an assistant message to learn from")
            tokens.append(ids)
            learned.append(is_answer)

        length = max(len(ids) for ids in tokens)
        length += -length % (self.pad_to_multiple_of or 1)
        batch = {
            "input_ids": _pad(tokens, length, processor.tokenizer.pad_token_id),
            "attention_mask": _pad([np.ones_like(ids) for ids in tokens], length, 0),
        }
        if any(images):
            batch.update(processor(images=list(chain.from_iterable(images)), return_tensors="pt"))
        learned = _pad(learned, length, False)
        batch["labels"] = batch["input_ids"].masked_fill(~learned, IGNORE_INDEX)
        if self.supervised_logits_only:
            # The logits at a position predict the next token
            batch["logits_to_keep"] = torch.nn.functional.pad(learned[:, 1:], (0, 1))
        return batch

    def _open(self, source: ImageSource, name: str) -> Image.Image:
        return crop_for_clip(load_image(source, name), self.processor.image_processor, f"{name}: ")


def _pad(sequences: list[np.ndarray], length: int, value: int | bool) -> torch.Tensor:
    padded = np.full((len(sequences), length), value, dtype=sequences[0].dtype)
    for sequence, padded_sequence in zip(sequences, padded):
        padded_sequence[: len(sequence)] = sequence
    return torch.from_numpy(padded)
