# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The task of the study with pretrained parts: conversations about the scenes of drawings of `make pictures`.

The vision tower is frozen, so it sees each scene once. In the conversations an image is a single pixel whose color is the
scene's index, and [`StoredTower`] gives the stored features of that scene. Everything else is as with real images.
"""

from functools import cached_property
from random import Random
from typing import NamedTuple

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from examples.pictures.conversations import (
    ConversationMaker,
    list_questions,
    make_round,
    make_scenes,
    split_kinds,
)
from examples.pictures.dataset import ask_sort, one_token_kinds
from examples.pictures.scenes import Scene


QUESTION_WEIGHTS = {"name": 4, "count": 2, "same": 2, "sort": 2, "ground": 0.5, "total": 0.5}
ROUNDS = (1, 3)
# The scenes of all seeds, and so the features, are the same; a seed draws the conversations
SCENES_SEED = 0
CHANNELS = torch.tensor([1, 256, 65536])


class Split(NamedTuple):
    """Of one split: the scenes, and the images that stand for them."""

    scenes: list[Scene]
    images: list[Image.Image]


class Drawings:
    """
    The task, as [`Task`] for the study from scratch.

    Args:
        tokenizer: The decoder's. Things are shown whose name is one of its tokens.
        sizes (`dict[str, int]`): How many scenes `train`, `test` and `unseen` have.
        held_out (`int`): Kinds of things that only `unseen` shows.
    """

    name = "drawings"
    identify = "What is in image {}?"

    def __init__(self, tokenizer, sizes: dict[str, int], held_out: int = 24):
        trained, unseen = split_kinds(one_token_kinds(tokenizer), held_out, SCENES_SEED)
        self.splits, first = {}, 0
        for split, count in sizes.items():
            scenes = make_scenes(unseen if split == "unseen" else trained, count, split, SCENES_SEED)
            self.splits[split] = Split(scenes, [name_scene(first + index) for index in range(count)])
            first += count

    @property
    def scenes(self) -> list[Scene]:
        """Of all splits, in the order of the stored features."""
        return [scene for split in self.splits.values() for scene in split.scenes]

    def conversations(self, split: str, count: int, seed: int) -> list[dict]:
        """Conversations of 1 to 4 images and 1 to 3 rounds: `messages`, `images`, and the `kinds` of the questions."""
        maker = ConversationMaker(self.splits[split].scenes, f"study {split} {seed}", QUESTION_WEIGHTS, ROUNDS)
        return [self._with_images(split, maker.make_conversation()) for _ in range(count)]

    def unseen(self) -> list[dict]:
        """About each image with a thing of a kind that was never trained: what sort of thing it is."""
        scenes = self.splits["unseen"].scenes
        return [self._with_images("unseen", ask_sort(scenes, index)) for index in self._alone["unseen"]]

    def probes(self, split: str, num_images: int, count: int, seed: int) -> list[dict]:
        """
        Conversations of one round with `num_images` images of one thing each, and the question what one of them shows.

        Returns:
            `list[dict]`: As [`Drawings.conversations`], with `asked` (`int`), the number of the image.
        """
        rng = Random(f"study probes {split} {num_images} {seed}")
        scenes, examples = self.splits[split].scenes, []
        for _ in range(count):
            indices = rng.sample(self._alone[split], num_images)
            asked = rng.randint(1, num_images)
            questions = list_questions([scenes[index] for index in indices])
            question = next(one for one in questions if one.text == self.identify.format(asked))
            example = {"scenes": indices, "messages": make_round(question, num_images), "kinds": ["name"]}
            examples.append({**self._with_images(split, example), "asked": asked})
        return examples

    @cached_property
    def _alone(self) -> dict[str, list[int]]:
        return {
            name: [index for index, scene in enumerate(split.scenes) if len(scene.things) == 1]
            for name, split in self.splits.items()
        }

    def _with_images(self, split: str, example: dict) -> dict:
        images = [self.splits[split].images[index] for index in example["scenes"]]
        return {"messages": example["messages"], "images": images, "kinds": example["kinds"]}


def name_scene(index: int) -> Image.Image:
    """The pixel that stands for a scene."""
    return Image.new("RGB", (1, 1), (index % 256, index // 256 % 256, index // 65536))


def make_pixel_processor() -> CLIPImageProcessorPil:
    """The image processor for such pixels: it changes nothing."""
    return CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)


class StoredTower(torch.nn.Module):
    """
    Gives the features that a vision tower once computed, in its place.

    Args:
        features (`torch.Tensor` of shape `(scenes, tokens, vision_hidden_size)`): Of all scenes.
        config (`PreTrainedConfig`): The tower's.
    """

    def __init__(self, features: torch.Tensor, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.register_buffer("features", features, persistent=False)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, 1, 1)`): Of the images of [`name_scene`].
        """
        index = (pixel_values[:, :, 0, 0].long() * CHANNELS.to(pixel_values.device)).sum(1)
        return BaseModelOutputWithPooling(last_hidden_state=self.features[index].float())
