# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The caches of several conversations as the cache of one batch, which conversations join and leave between two tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from modeling_visualchat.cross_cache_visualchat import CrossCacheLayer
from modeling_visualchat.modality_cache_visualchat import (
    ModalityLayer,
    copy_cache,
    get_modality_positions,
    split_cache_by_modality,
)
from modeling_visualchat.modality_positions_visualchat import NO_KEY
from modeling_visualchat.sequence_cache_visualchat import NumberedDynamicLayer, carry_image_numbers, get_image_numbers


class CacheBatch:
    """
    The caches of several conversations as one. The last tokens of all of them stand in the last column; conversations with
    fewer tokens are padded on the left.

    Attributes:
        cache (`Cache`, *optional*): The cache of the batch. `None`: no conversation is in it.
        lengths (`list[int]`): The number of tokens of each conversation.
    """

    def __init__(self):
        self.cache: Cache | None = None
        self.lengths: list[int] = []
        # How many of them have columns of their own, for images. A plain cache has one kind of columns
        self._images: list[int] = []

    def change(self, kept: list[int], new: list[Cache]) -> None:
        """
        Removes conversations, and adds others behind those that are kept.

        Args:
            kept (`list[int]`): The indices of the conversations that stay, ascending.
            new (`list[Cache]`): The caches of new conversations, each of one sequence without padding. Not changed.
        """
        if len(kept) == len(self.lengths) and not new:
            return
        old = self.cache
        if kept and len(kept) < len(self.lengths):
            old.batch_select_indices(torch.tensor(kept))  # on the CPU: layers may lie on several devices
        caches = [old] * bool(kept) + [copy_cache(cache) for cache in new]
        counts = [[self.lengths[row] for row in kept]] * bool(kept) + [[int(cache.get_seq_length())] for cache in new]
        _make_alike(caches, counts)
        self._images = [self._images[row] for row in kept] + [_count_images(cache) for cache in new]
        self.lengths = [length for lengths in counts for length in lengths]
        self.cache = _join(caches, self.lengths, self._images) if caches else None

    def inputs(self) -> dict[str, torch.Tensor | Cache | bool | None]:
        """What the model's `forward` takes beside `input_ids`, of shape `(conversations, 1)`, to compute the next tokens."""
        device = _device_of(self.cache)
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        longest, attention_mask = max(self.lengths), None
        # The fast path's cache says itself which columns are none of a conversation's
        if get_modality_positions(self.cache) is None and min(self.lengths) < longest:
            attention_mask = (torch.arange(longest + 1, device=device) >= longest - lengths_B1).long()
        return {
            "position_ids": lengths_B1,
            "attention_mask": attention_mask,
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def count_token(self) -> None:
        """Notes that the model has added a token of text to each conversation in the cache."""
        self.lengths = [length + 1 for length in self.lengths]


def can_join(cache: Cache) -> bool:
    """Whether a cache is of the kinds that [`CacheBatch`] can make one of: the dynamic ones of this package's attentions."""
    kinds = DynamicLayer, NumberedDynamicLayer, ModalityLayer, CrossCacheLayer
    return all(type(layer) in kinds for layer in cache.layers)


def _count_images(cache: Cache) -> int:
    positions = get_modality_positions(cache)
    return positions.of_images.shape[1] if positions is not None else 0


def _make_alike(caches: list[Cache], counts: list[list[int]]) -> None:
    """
    Gives caches that have seen no image what the others have, in place: places for images, or image numbers.

    Args:
        caches (`list[Cache]`): The caches. In each, the last tokens stand in the last column.
        counts (`list[list[int]]`): The number of tokens of each conversation in each cache.
    """
    split_layer = next((type(cache.layers[0]) for cache in caches if get_modality_positions(cache) is not None), None)
    carries = any(get_image_numbers(cache) is not None for cache in caches)
    for cache, lengths in zip(caches, counts):
        longest, device = max(lengths), _device_of(cache)
        if split_layer is not None and get_modality_positions(cache) is None:
            classes = split_layer, split_layer  # the second one is for static caches, which are not joined
            positions = split_cache_by_modality(cache, len(cache.layers), len(lengths), device, layer_classes=classes)
            is_padding = positions.of_text < longest - torch.tensor(lengths, device=device)[:, None]
            positions.keys = positions.keys.masked_fill(is_padding[:, None, :, None], NO_KEY)
        elif carries and get_image_numbers(cache) is None:
            numbers = torch.zeros(len(lengths), 1, longest, 1, dtype=torch.int, device=device)
            carry_image_numbers(cache).update(numbers, numbers[..., :0])


def _join(caches: list[Cache], lengths: list[int], images: list[int]) -> Cache:
    """
    The first of the caches, which are alike, with the conversations of all of them. These have so many tokens, and so many
    that stand in columns of images.
    """
    joined, length, image_width = caches[0], max(lengths), max(images)
    text_width = max(tokens - of_images for tokens, of_images in zip(lengths, images))
    for parts in zip(*map(_parts_of, caches)):
        layers, width = [layer for layer, _ in parts], image_width if parts[0][1] else text_width
        layers[0].keys, layers[0].values = (
            _join_columns(states, width) for states in zip(*((layer.keys, layer.values) for layer in layers))
        )
    positions = [found for cache in caches if (found := get_modality_positions(cache)) is not None]
    if positions:
        shifted = [[_shift(part, length - one.length) for part in (one.keys, one.values)] for one in positions]
        of_text, of_images = zip(*shifted)
        positions[0].keys = _join_columns(of_text, text_width, NO_KEY)
        positions[0].values = _join_columns(of_images, image_width, NO_KEY)
        positions[0].length = length
    return joined


def _shift(positions: torch.Tensor, by: int) -> torch.Tensor:
    return torch.where(positions >= 0, positions + by, positions)


def _parts_of(cache: Cache) -> Iterator[tuple[DynamicLayer, bool]]:
    """The layers that hold a column for each token, and whether these are the tokens of images alone."""
    for layer in cache.layers:
        if isinstance(layer, ModalityLayer):
            yield layer.text, False
            yield layer.images, True
        else:
            yield layer, False
    if (numbers := get_image_numbers(cache)) is not None:
        yield numbers, False


def _device_of(cache: Cache) -> torch.device:
    return next(_parts_of(cache))[0].device


def _join_columns(parts: Sequence[torch.Tensor], width: int, fill: int = 0) -> torch.Tensor:
    """
    The last `width` columns of states of shape `(conversations, heads, columns, size)`; on the left, padding. Layers without
    cross attention have no columns of images.
    """
    width = min(width, max(part.shape[2] for part in parts))
    parts = [pad(part, (0, 0, width - part.shape[2], 0), value=fill) for part in parts]  # negative padding cuts
    return torch.cat(parts) if len(parts) > 1 else parts[0]
