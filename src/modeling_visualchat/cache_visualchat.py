# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
A cache that keeps text and images apart, so that each decoded token adds to the text alone.

[`keep_modalities_apart`] turns the layers of a plain `DynamicCache` into layers of two, and adds one more, which holds the
places of the cached keys in the sequence. What `generate` does to a cache (reordering, repeating, selecting, cropping,
resetting, offloading) it does to every layer, and so to both modalities and to their places.

Shape letters: B batch, G key-value heads, T cached text, I cached image tokens, D head size.
"""

import copy

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PlacesLayer(DynamicLayer):
    """
    Where the cached keys stand in the sequence: `keys` of shape `(batch_size, 1, T, 1)` for text, `values` of shape
    `(batch_size, 1, I, 1)` for images. -1 is a key that does not exist: rows of a batch differ in what they hold.
    """

    def __init__(self):
        super().__init__()
        self.length = 0

    def extend(self, text_BT: torch.Tensor, images_BI: torch.Tensor, length: int) -> None:
        """Adds the places of new keys, and `length` tokens to the sequence."""
        self.update(text_BT[:, None, :, None], images_BI[:, None, :, None])
        self.length += length

    @property
    def of_text(self) -> torch.Tensor:
        """Of shape `(batch_size, T)`."""
        return self.keys[:, 0, :, 0]

    @property
    def of_images(self) -> torch.Tensor:
        """Of shape `(batch_size, I)`."""
        return self.values[:, 0, :, 0]

    def kept_by_crop(self, tokens_to_remove: int) -> tuple[int, int]:
        """How many columns of text and images hold a key that stands before the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        length = self.length + tokens_to_remove
        columns = []
        for places_BK in (self.of_text, self.of_images):
            held_K = ((places_BK >= 0) & (places_BK < length)).any(0).nonzero()
            columns.append(int(held_K[-1]) + 1 if len(held_K) else 0)
        return columns[0], columns[1]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        text, images = self.kept_by_crop(tokens_to_remove)
        self.length += tokens_to_remove
        self.keys = self.keys[:, :, :text]
        self.values = self.values[:, :, :images]
        # A row may have held fewer of the tokens that go than another
        self.keys = self.keys.masked_fill(self.keys >= self.length, -1)
        self.values = self.values.masked_fill(self.values >= self.length, -1)

    def reset(self) -> None:
        super().reset()
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length


class ModalitiesLayer(DynamicLayer):
    """
    One decoder layer's keys and values: of text as in a `DynamicLayer`, of images in a second one.

    Args:
        places (`PlacesLayer`): The places of both, which all layers share.
    """

    def __init__(self, places: PlacesLayer):
        super().__init__()
        self.places = places
        self.images = DynamicLayer()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        image_key_states: torch.Tensor,
        image_value_states: torch.Tensor,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """
        Adds new keys and values of text (BGTD) and images (BGID).

        Returns:
            All keys and all values so far, each a tuple of text's and images'.
        """
        keys, values = super().update(key_states, value_states)
        images = self.images
        if images.get_seq_length() == 0:
            # The first images are kept as they are, without the copy that joining them to nothing would make
            images.lazy_initialization(image_key_states, image_value_states)
            images.keys, images.values = image_key_states, image_value_states
        elif image_key_states.shape[2] > 0:
            images.update(image_key_states, image_value_states)
        return (keys, images.keys), (values, images.values)

    def get_seq_length(self) -> int:
        return self.places.length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        text, images = self.places.kept_by_crop(tokens_to_remove)
        self.keys, self.values = self.keys[:, :, :text], self.values[:, :, :text]
        if self.images.is_initialized:
            self.images.keys, self.images.values = self.images.keys[:, :, :images], self.images.values[:, :, :images]

    def reset(self) -> None:
        super().reset()
        self.images.reset()

    def offload(self) -> None:
        super().offload()
        self.images.offload()

    def prefetch(self) -> None:
        super().prefetch()
        self.images.prefetch()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.images.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.images.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.images.batch_select_indices(indices)


def get_places(cache: Cache | None) -> PlacesLayer | None:
    """The places of a cache that keeps text and images apart; `None` for any other."""
    if cache is None or not cache.layers or not isinstance(cache.layers[0], ModalitiesLayer):
        return None
    return cache.layers[0].places


def can_keep_modalities_apart(cache: Cache, num_hidden_layers: int) -> bool:
    """Whether the cache consists of plain dynamic layers, as many as the decoder has or fewer."""
    grows = len(cache.layers) == num_hidden_layers or cache.layer_class_to_replicate is DynamicLayer
    return grows and len(cache.layers) <= num_hidden_layers and all(type(layer) is DynamicLayer for layer in cache.layers)


def keep_modalities_apart(cache: Cache, num_hidden_layers: int, batch_size: int, device: torch.device) -> PlacesLayer:
    """
    Makes the layers of a plain dynamic cache layers of two, in place. What is cached so far is text.

    Args:
        cache (`Cache`): One of which [`can_keep_modalities_apart`] is true.
        num_hidden_layers (`int`): Layers of the decoder.
        batch_size (`int`): Rows of the cache.
        device (`torch.device`): Where the places are kept.
    """
    places = PlacesLayer()
    length = int(cache.get_seq_length())
    text_BT = torch.arange(length, device=device).expand(batch_size, -1)
    layers = [ModalitiesLayer(places) for _ in range(num_hidden_layers)]
    for layer, plain in zip(layers, cache.layers):
        if plain.is_initialized:
            layer.update(plain.keys, plain.values, plain.keys[:, :, :0], plain.values[:, :, :0])
    cache.layers[:] = [*layers, places]
    places.extend(text_BT, text_BT[:, :0], length)
    return places


def copy_cache(cache: Cache) -> Cache:
    """A copy of a dynamic cache that goes its own way. Its tensors are shared: such caches replace them when they grow."""
    parts = [*cache.layers, *(layer.images for layer in cache.layers if isinstance(layer, ModalitiesLayer))]
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in tensors})
