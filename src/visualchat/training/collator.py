# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Batches of a prepared dataset: opens the images, and leaves broken examples out on request."""

import logging
import multiprocessing
from collections.abc import Iterable

from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.image_loading_visualchat import crop_for_clip, shorter_edge
from visualchat.data.checks import IMAGE_TYPES, ModelRequirements, check_example, decode_image
from visualchat.training.dataset import describe_problem, drop_rounds


logger = logging.getLogger(__name__)


class TrainingCollator:
    """
    Makes batches of prepared examples. It opens the images. A broken image or example stops the run by default. With
    `skip_broken_images` it is named in the log and left out, and `broken_rows` counts it across all workers, each time that
    it is read.

    Args:
        processor (`VisualChatProcessor`): The model's.
        skip_broken_images (`bool`): Whether broken examples are left out.
        requirements ([`ModelRequirements`], *optional*): What the model requires. By default the processor says it.
        broken_rows (`int`): How many examples were left out before.
        fallback_examples (`Iterable[dict]`): If all examples of a batch are broken, the first valid one of these is used:
            a process without a batch would leave the others waiting.
    """

    def __init__(
        self,
        processor: VisualChatProcessor,
        skip_broken_images: bool = False,
        requirements: ModelRequirements | None = None,
        broken_rows: int = 0,
        fallback_examples: Iterable[dict] = (),
    ):
        self.collate = VisualChatDataCollator(processor, pad_to_multiple_of=8, supervised_logits_only=True)
        self.requirements = requirements or ModelRequirements(processor.image_token, shorter_edge(processor.image_processor))
        self.skip_broken_images = skip_broken_images
        self.broken_rows = multiprocessing.Value("l", broken_rows)
        self.fallback_examples = fallback_examples
        self.last_valid = None

    def __call__(self, examples: list[dict]) -> dict:
        """See [`VisualChatDataCollator`]."""
        valid = []
        for example in examples:
            try:
                valid.append({"messages": self.read(example)})
            except ValueError as error:
                if not self.skip_broken_images:
                    raise
                with self.broken_rows.get_lock():
                    self.broken_rows.value += 1
                logger.warning("Left out of the batch: %s", error)
        if not valid:
            valid = [self.last_valid or self._find_fallback()]
        self.last_valid = valid[0]
        return self.collate(valid)

    def read(self, example: dict) -> list[dict]:
        """
        The conversation of an example. Its image parts contain the images, cropped as the model sees them.

        Raises:
            ValueError: If the example has faults: all of them, each with the file, example and field.
        """
        images, faults = check_example(example, self.requirements, decode_image, skip=example.get("dropped_images", 0))
        if faults:
            raise ValueError("; ".join(describe_problem(example, fault) for fault in faults))
        image_processor = self.collate.processor.image_processor
        parts = iter([{"type": "image", "image": crop_for_clip(image, image_processor)} for image in images])
        messages = []
        for message in drop_rounds(example["messages"], example.get("dropped_rounds", 0)):
            content = message["content"]
            if not isinstance(content, str):
                content = [next(parts) if part["type"] in IMAGE_TYPES else part for part in content]
            messages.append({**message, "content": content})
        return messages

    def _find_fallback(self) -> dict:
        for example in self.fallback_examples:
            try:
                return {"messages": self.read(example)}
            except ValueError:  # it is named and counted when a batch contains it
                continue
        raise ValueError("No example can be used: run visualchat prepare --check")
