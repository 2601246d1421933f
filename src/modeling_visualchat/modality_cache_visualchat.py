# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path's cache: keys and values of text and of images apart, so that decoding adds to those of text alone.

[`split_cache_by_modality`] turns the layers of a plain `DynamicCache` or `StaticCache` into such layers. All of them share
the positions of the cached keys. What `generate` does to a cache (reordering, repeating, selecting, cropping, resetting,
copying) it does to every layer. The last layer then does it to the positions too: all other layers have read them by then.

Shape letters: B batch, G key-value heads, T cached text, I cached image tokens, D head size.
"""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from .modality_positions_visualchat import ModalityPositions, StaticModalityPositions, mark_static


class GrowingLayer(DynamicLayer):
    """
    A `DynamicLayer` that keeps the first keys and values without a copy. They may be views of larger tensors, or belong to
    an image memory: nothing writes into a dynamic cache in place.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.keys.numel() > 0:
            return super().update(key_states, value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class ModalityLayer(CacheLayerMixin):
    """
    One decoder layer's keys and values: of text in one `GrowingLayer`, of images in another.

    Args:
        positions (`ModalityPositions`): The positions of both, which all layers share.
        owns_positions (`bool`): Whether what is done to this layer is done to the positions too.
    """

    is_croppable, is_sliding = True, False

    def __init__(self, positions: ModalityPositions, owns_positions: bool):
        # The base class's `__init__` would set attributes that are properties here
        self.positions, self.owns_positions = positions, owns_positions
        self._make_parts()

    def _make_parts(self) -> None:
        self.text, self.images = GrowingLayer(), GrowingLayer()

    @property
    def _parts(self) -> list[CacheLayerMixin]:
        return [self.text, self.images]

    @property
    def is_initialized(self) -> bool:
        return self.text.is_initialized

    @property
    def keys(self) -> torch.Tensor | None:
        """
        Of shape `(batch_size, key-value heads, tokens, head_size)`, in the order of the sequence, with zeros where padding
        is not kept. They are made anew for each reader, for code that looks into caches: the model computes without them.
        So are `values`.
        """
        return self._in_order("keys")

    @property
    def values(self) -> torch.Tensor | None:
        return self._in_order("values")

    def _in_order(self, name: str) -> torch.Tensor | None:
        if not (self.is_initialized and self.positions.is_initialized):
            return None
        text_BGTD, images_BGID = self._by_modality(name)
        length = self._length_in_order
        # The last column takes the keys that are no part of the sequence
        sequence = text_BGTD.new_zeros(*text_BGTD.shape[:2], length + 1, text_BGTD.shape[3])
        for part_BGKD, positions_BK in ((text_BGTD, self.positions.of_text), (images_BGID, self.positions.of_images)):
            if part_BGKD.shape[2] == 0:  # perhaps a layer that does not look at images
                continue
            index_BK = torch.where(positions_BK < 0, length, positions_BK).to(part_BGKD.device)
            sequence.scatter_(2, index_BK[:, None, :, None].expand_as(part_BGKD), part_BGKD)
        return sequence[:, :, :length]

    def _by_modality(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self.text, name), getattr(self.images, name)

    @property
    def _length_in_order(self) -> int:
        return self.positions.length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for part in self._parts:
            part.update(key_states[:, :, :0], value_states[:, :, :0])

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        image_key_states: torch.Tensor,
        image_value_states: torch.Tensor,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Adds new keys and values of text (BGTD) and images (BGID).

        Returns:
            All keys and all values so far, each a tuple of text's and images'.
        """
        keys, values = self.text.update(key_states, value_states)
        images = self.images
        if not images.is_initialized or image_key_states.shape[2] > 0:
            images.update(image_key_states, image_value_states)
        return (keys, images.keys), (values, images.values)

    def adopt(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes over the keys and values (BGTD) of a plain layer, which are text."""
        self.update(key_states, value_states, key_states[:, :, :0], value_states[:, :, :0])

    def get_seq_length(self) -> int | torch.Tensor:
        return self.positions.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.positions.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        for part, columns in zip(self._parts, self.positions.kept_by_crop(tokens_to_remove)):
            part.keys, part.values = part.keys[:, :, :columns], part.values[:, :, :columns]
        if self.owns_positions:
            self.positions.crop(tokens_to_remove)

    def reset(self) -> None:
        for part in self._parts:
            # Not all versions of transformers drop them
            part.keys, part.values, part.is_initialized = None, None, False
            part.reset()
        if self.owns_positions:
            self.positions.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for part in self._parts:
            part.reorder_cache(beam_idx)
        if self.owns_positions:
            self.positions.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self._parts:
            part.batch_repeat_interleave(repeats)
        if self.owns_positions:
            self.positions.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for part in self._parts:
            part.batch_select_indices(indices)
        if self.owns_positions:
            self.positions.batch_select_indices(indices)

    def offload(self) -> None:
        # The positions stay on the device: every layer needs them, and they are small
        for part in self._parts:
            part.offload()

    def prefetch(self) -> None:
        for part in self._parts:
            part.prefetch()


class StaticPlaces:
    """Mixed into the class of a layer whose cache is static: as many places as the cache has, and none can be taken back."""

    positions: StaticModalityPositions
    is_compileable, is_croppable = True, False

    @property
    def _length_in_order(self) -> int:
        return self.positions.max_cache_len

    def get_max_length(self) -> int:
        return self.positions.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.positions.max_cache_len, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A static cache cannot be cropped: use a dynamic one")


class StaticModalityLayer(StaticPlaces, ModalityLayer):
    """
    One decoder layer's keys and values in the one buffer of a `StaticLayer`: text grows from its beginning, images stand at
    its end.

    Args:
        positions (`StaticModalityPositions`): The positions of both, which all layers share.
        owns_positions (`bool`): As in a [`ModalityLayer`].
        joined (`bool`): Whether one softmax goes over text and images, and so over the whole buffer.
    """

    def __init__(self, positions: StaticModalityPositions, owns_positions: bool, joined: bool):
        super().__init__(positions, owns_positions)
        self.joined = joined

    def _make_parts(self) -> None:
        self.buffer = StaticLayer(self.positions.max_cache_len)

    @property
    def _parts(self) -> list[CacheLayerMixin]:
        return [self.buffer]

    @property
    def is_initialized(self) -> bool:
        return self.buffer.is_initialized

    @property
    def batch_size(self) -> int:
        return self.buffer.batch_size

    def _by_modality(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._split(getattr(self.buffer, name))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.buffer.lazy_initialization(key_states, value_states)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        image_key_states: torch.Tensor,
        image_value_states: torch.Tensor,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Adds new keys and values of text (BGTD) and images (BGID). Their positions have been added before.

        Returns:
            All keys and all values, each a tuple of text's and images', or of the one buffer of both.
        """
        if not self.is_initialized or image_key_states.shape[2] > 0:
            self._make_room(image_key_states, image_value_states)
        keys, values = self.buffer.update(key_states, value_states)
        return ((keys,), (values,)) if self.joined else (self._split(keys), self._split(values))

    def _split(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        room = self.positions.keys.shape[2]
        return buffer[:, :, :room], buffer[:, :, room:]

    def _make_room(self, image_keys: torch.Tensor, image_values: torch.Tensor) -> None:
        layer, room, images = self.buffer, self.positions.keys.shape[2], self.positions.values.shape[2]
        old_images = images - image_keys.shape[2]
        used = int(layer.cumulative_length)
        buffers = []
        for old, new in ((layer.keys, image_keys), (layer.values, image_values)):
            buffers.append(new.new_zeros(*new.shape[:2], room + images, new.shape[3]))
            if layer.is_initialized:
                buffers[-1][:, :, :used] = old[:, :, :used]
                buffers[-1][:, :, room : room + old_images] = old[:, :, old.shape[2] - old_images :]
            buffers[-1][:, :, room + old_images :] = new
        layer.keys, layer.values = buffers
        layer.dtype, layer.device, layer.batch_size = layer.keys.dtype, layer.keys.device, len(layer.keys)
        layer.cumulative_length = layer.cumulative_length.to(layer.device)
        layer.is_initialized = True
        mark_static(layer.keys, layer.values, layer.cumulative_length)

    def reset(self) -> None:
        super().reset()
        self.buffer.keys = self.buffer.values = None
        self.buffer.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.is_initialized:
            return
        # A `StaticLayer` with images alone would take itself for empty
        order = beam_idx.to(self.buffer.device)
        self.buffer.keys = self.buffer.keys.index_select(0, order)
        self.buffer.values = self.buffer.values.index_select(0, order)
        if self.owns_positions:
            self.positions.reorder_cache(beam_idx)


def get_modality_positions(cache: Cache | None) -> ModalityPositions | None:
    """The positions of the keys in a cache that is split by modality; `None` for any other."""
    if cache is None or not cache.layers or not isinstance(cache.layers[0], ModalityLayer):
        return None
    return cache.layers[0].positions


def can_split_by_modality(cache: Cache, num_hidden_layers: int) -> bool:
    """Whether the cache consists of plain dynamic layers, as many as the decoder has or fewer, or of plain static ones."""
    if len(cache.layers) == num_hidden_layers and all(type(layer) is StaticLayer for layer in cache.layers):
        return True
    grows = len(cache.layers) == num_hidden_layers or cache.layer_class_to_replicate is DynamicLayer
    return grows and len(cache.layers) <= num_hidden_layers and all(type(layer) is DynamicLayer for layer in cache.layers)


def split_cache_by_modality(
    cache: Cache,
    num_hidden_layers: int,
    batch_size: int,
    device: torch.device,
    joined: bool = False,
    layer_classes: tuple[type[ModalityLayer], type[ModalityLayer]] | None = None,
) -> ModalityPositions:
    """
    Splits the layers of a plain cache into text and images, in place. What is cached so far is text.

    Args:
        cache (`Cache`): One of which [`can_split_by_modality`] is true.
        num_hidden_layers (`int`): Layers of the decoder.
        batch_size (`int`): Sequences in the cache.
        device (`torch.device`): Where the positions are kept.
        joined (`bool`): See [`StaticModalityLayer`].
        layer_classes (`tuple` of two `type`, *optional*): Of the layers of a dynamic and of a static cache, in the place of
            [`ModalityLayer`] and [`StaticModalityLayer`].
    """
    length = int(cache.get_seq_length())
    dynamic_layer, static_layer = layer_classes or (ModalityLayer, partial(StaticModalityLayer, joined=joined))
    if cache.layers and isinstance(cache.layers[0], StaticLayer):
        positions, make = StaticModalityPositions(cache.layers[0].max_cache_len), static_layer
    else:
        positions, make = ModalityPositions(), dynamic_layer
    layers = [make(positions, k == num_hidden_layers - 1) for k in range(num_hidden_layers)]
    if length > 0:
        text_BT = torch.arange(length, device=device).expand(batch_size, -1)
        positions.extend(text_BT, text_BT[:, :0], length)
        for layer, plain in zip(layers, cache.layers):
            layer.adopt(plain.keys[:, :, :length], plain.values[:, :, :length])
    cache.layers[:] = layers
    return positions


def copy_cache(cache: Cache) -> Cache:
    """A copy of a dynamic cache that can grow by itself. The tensors are shared: such caches replace them when they grow."""
    tensors = [tensor for layer in cache.layers for tensor in _tensors_of(layer)]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in tensors})


def _tensors_of(layer: CacheLayerMixin) -> Iterator[torch.Tensor]:
    for value in vars(layer).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, CacheLayerMixin):
            yield from _tensors_of(value)
