# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The images of a batch on their way to the decoder: which tokens are their placeholders, which features or which image memory
each placeholder stands for, and the embeddings of the images' numbers and of the image prefix.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_tracing

from .image_memory_visualchat import ImageMemory
from .input_checks_visualchat import check_values, find_sequence_arguments


@dataclass
class PlacedImages:
    """
    What the placeholders of a batch stand for.

    Args:
        states (`torch.Tensor` of shape `(image tokens, hidden_size)`, *optional*): Projected features, of each new image
            once.
        source (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which of `states`, or after them of the tokens of
            `memories`, each placeholder stands for, in reading order. `None`: its own.
        memories (`tuple[ImageMemory]`): Images whose keys and values are known, each memory once.
        features (`torch.Tensor` of shape `(images, image_seq_length, hidden_size)`, *optional*): Projected features of all
            new images.
    """

    states: torch.Tensor | None = None
    source: torch.LongTensor | None = None
    memories: tuple[ImageMemory, ...] = ()
    features: torch.Tensor | None = None

    def count_tokens(self) -> int | None:
        """The placeholders that there should be. `None`: there are no images."""
        if self.source is not None:
            return len(self.source)
        return len(self.states) if self.states is not None else None


class VisualChatImageInputsMixin:
    """How [`VisualChatModel`] places images."""

    def check_adapters_of_images(self, num_images: int) -> None:
        """Raises a `ValueError` if the sequences of a batch have adapters of their own in the tower or the projector."""
        for name in ("vision_tower", "multi_modal_projector"):
            refuse_adapters_by_sequence(name, getattr(self, name), num_images)

    def place_images(
        self,
        image_outputs: BaseModelOutputWithPooling | None,
        image_memory: list[ImageMemory | None] | None,
        inputs_embeds: torch.Tensor,
    ) -> PlacedImages:
        """
        Args:
            image_outputs (`BaseModelOutputWithPooling`, *optional*): What `get_image_features` returned for the new images.
                Entries of `pooler_output` that are one tensor, as `generate` repeats them for its beams, are one image.
            image_memory (`list`, *optional*): As [`~VisualChatForCausalLM.forward`] takes it.
            inputs_embeds (`torch.Tensor`): The features take its device and dtype.

        Raises:
            ValueError: If the image memory is of other weights, or does not say where the new images stand.
        """
        images = PlacedImages()
        if image_outputs is not None:
            features, image_of = stack_different(image_outputs.pooler_output)
            images.features = features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            images.states = features.flatten(0, 1)
            if len(features) < len(image_of):
                first_tokens = torch.tensor(image_of, device=features.device)[:, None] * features.shape[1]
                images.source = (first_tokens + torch.arange(features.shape[1], device=features.device)).flatten()
                images.features = features[image_of]
        if image_memory:
            self._check_memory(image_memory)
            images.source = self._place_memory(image_memory, images)
            images.memories = tuple({id(memory): memory for memory in image_memory if memory is not None}.values())
        return images

    def _place_memory(self, memories: list[ImageMemory | None], images: PlacedImages) -> torch.LongTensor:
        """The `source` of new images and memories together. An entry that is `None` is the next new image."""
        per_image = self.config.image_seq_length
        device = self.get_input_embeddings().weight.device
        num_computed = len(images.states) if images.states is not None else 0
        source = images.source if images.source is not None else torch.arange(num_computed, device=device)
        new = list(source.split(per_image)) if num_computed else []
        num_new, expected = len(new), sum(memory is None for memory in memories)
        if expected == 0 and new:
            raise ValueError(f"`image_memory` has no entry `None` for the {num_new} new images: say where they stand")
        if num_new != expected:
            raise ValueError(f"`image_memory` has {expected} entries `None`, but {num_new} new images were given")
        placed, first_token, end = [], {}, num_computed
        for memory in memories:
            if memory is None:
                placed.append(new.pop(0))
                continue
            if id(memory) not in first_token:
                first_token[id(memory)] = end
                end += len(memory) * per_image
            first = first_token[id(memory)]
            placed.append(torch.arange(first, first + len(memory) * per_image, device=device))
        return torch.cat(placed)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        num_image_tokens: int | None,
        mm_token_type_ids: torch.LongTensor | None = None,
        may_cut: bool = False,
    ) -> torch.BoolTensor | None:
        """
        The tokens that belong to an image, of shape `(batch_size, sequence_length)`, or `None` if all are text.

        Args:
            num_image_tokens (`int`, *optional*): Tokens of the images. `None`: there are none, unless the caller has put
                their features into `inputs_embeds`.
            may_cut (`bool`, *optional*, defaults to `False`): Whether a sequence may hold a part of an image.

        Raises:
            ValueError: If the placeholders do not match the images; both counts are given.
        """
        if mm_token_type_ids is not None:
            if mm_token_type_ids.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"`mm_token_type_ids` has the shape {tuple(mm_token_type_ids.shape)}, but the inputs have"
                    f" {tuple(inputs_embeds.shape[:2])}: give one entry for each new token"
                )
            is_image = mm_token_type_ids == 1
        elif input_ids is not None:
            is_image = input_ids == self.config.image_token_id
        elif num_image_tokens is not None:
            placeholder = torch.tensor([self.config.image_token_id], device=inputs_embeds.device)
            is_image = (inputs_embeds == self._embed_without_noise(placeholder)).all(-1)
        else:
            return None

        if num_image_tokens is None:
            if input_ids is None:  # the caller has put the image features in place
                return is_image
            if input_ids.shape[1] > 1:  # a single token is one that was generated
                check_values(
                    ~is_image.any(),
                    lambda: self._describe_mismatch(is_image, 0) + ": pass `pixel_values`",
                    "The batch holds image placeholder tokens, but no images were given: pass `pixel_values`",
                )
            return None
        per_image = self.config.image_seq_length
        matches = is_image.sum() == num_image_tokens
        if not may_cut:
            matches = matches & (is_image.sum(-1) % per_image == 0).all()
        check_values(
            matches,
            lambda: self._describe_mismatch(is_image, num_image_tokens / per_image),
            "The batch's image placeholder tokens are not those of the images that were given",
        )
        return is_image

    def _describe_mismatch(self, is_image: torch.BoolTensor, num_images: float) -> str:
        per_image = self.config.image_seq_length
        tokens = is_image.sum(-1).tolist()
        return (
            f"The batch holds {sum(tokens)} image placeholder tokens ({', '.join(map(str, tokens))} by sequence), which"
            f" makes {sum(tokens) / per_image:g} images of {per_image} tokens, but {num_images:g} images were given"
        )

    def embed_image_numbers(self, inputs_embeds: torch.Tensor) -> torch.Tensor | None:
        """
        The embedding of each number as the prompt spells it, the mean over its tokens: of shape `(numbers, hidden_size)`, on
        the device of `inputs_embeds` and in its dtype. `None`: without `image_number_keys`.
        """
        if self.config.max_image_number is None:
            return None
        for layer in self.language_model.layers:
            for name in ("k_proj", *(["image_numbers"] if self.config.learned_image_numbers else [])):
                refuse_adapters_by_sequence(name, getattr(layer.self_attn, name), self.config.max_image_number)
        if not self.config.image_number_keys:
            return None
        device, spellings = inputs_embeds.device, self.config.image_number_token_ids
        token_ids = torch.tensor([token for spelling in spellings for token in spelling], device=device)
        embeds = self._embed_without_noise(token_ids)
        owners = [k for k, spelling in enumerate(spellings) for _ in spelling]
        lengths = torch.tensor([len(spelling) for spelling in spellings], device=embeds.device)
        sums = embeds.new_zeros(len(spellings), embeds.shape[-1])
        means = sums.index_add(0, torch.tensor(owners, device=embeds.device), embeds) / lengths[:, None]
        return means.to(device, inputs_embeds.dtype)

    def embed_image_prefix(self, device: torch.device) -> torch.Tensor:
        """The embeddings of `config.image_prefix_ids`, of shape `(tokens, hidden_size)`, on this device."""
        return self._embed_without_noise(torch.tensor(self.config.image_prefix_ids, device=device)).to(device)

    def _embed_without_noise(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """
        The embeddings of tokens that are not the prompt's, `(tokens, hidden_size)`. NEFTune's noise, which a hook adds where
        the embedding is in training mode, belongs to the prompt. The module is called, as ZeRO-3 and FSDP2 gather weights by
        its call, and with the shape of a prompt, which hooks expect.
        """
        embedding = self.get_input_embeddings()
        refuse_adapters_by_sequence("embed_tokens", embedding, len(token_ids))
        was_training, embedding.training = embedding.training, False
        try:
            return embedding(token_ids[None])[0]
        finally:
            embedding.training = was_training


def find_different_images(pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """
    TRL's GRPO puts several copies of a conversation into a batch: an image then passes tower, projector and decoder once.

    Args:
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): The images.

    Returns:
        The different images; and for each image, which of these it is.
    """
    if len(pixel_values) < 2 or is_tracing() or pixel_values.requires_grad:
        return pixel_values, list(range(len(pixel_values)))
    sums = pixel_values.flatten(1).sum(1, dtype=torch.float64).tolist()
    first_of, image_of = [], []
    for index, total in enumerate(sums):
        known = (k for k, first in enumerate(first_of) if sums[first] == total)
        same = next((k for k in known if torch.equal(pixel_values[first_of[k]], pixel_values[index])), None)
        if same is None:
            same = len(first_of)
            first_of.append(index)
        image_of.append(same)
    return pixel_values if len(first_of) == len(pixel_values) else pixel_values[first_of], image_of


def repeat_images(outputs: BaseModelOutputWithPooling, image_of: list[int]) -> BaseModelOutputWithPooling:
    """The outputs for all images, from those for the different ones. Equal images share one tensor in `pooler_output`."""

    def repeat(states: torch.Tensor | tuple | None):
        if isinstance(states, tuple):
            return tuple(map(repeat, states))
        return None if states is None else states[image_of]

    features = outputs.pooler_output
    if len(features) < len(image_of):
        for name, states in outputs.items():
            outputs[name] = [features[k] for k in image_of] if name == "pooler_output" else repeat(states)
    return outputs


def stack_different(features: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """
    The features of different images, of shape `(different, tokens, hidden_size)`, and which of them each entry is. Entries
    that are the very same tensor are one image.
    """
    if is_tracing():  # a graph does not know which are the same
        return torch.stack(features), list(range(len(features)))
    different: dict[int, int] = {}
    image_of = [different.setdefault(id(one), len(different)) for one in features]
    return torch.stack([features[image_of.index(k)] for k in range(len(different))]), image_of


def refuse_adapters_by_sequence(name: str, part: nn.Module, num_inputs: int) -> None:
    """
    Raises a `ValueError` if PEFT is to give the sequences of a batch their own adapters in a part whose inputs, so many, are
    not sequences.
    """
    if is_tracing():
        return
    for argument, of_sequences in find_sequence_arguments(part).items():
        if max(len(of_sequences), num_inputs) > 1:
            raise ValueError(
                f"PEFT's `{argument}` is for {len(of_sequences)} sequences of a batch, but the adapters change {name} too,"
                f" where {num_inputs} images, image numbers or tokens of the image prefix go in, and not sequences: use one"
                " adapter at a time"
                " (`set_adapter`)"
            )
