# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
A cache that keeps text and images apart, so that each decoded token adds to the text alone.

[`keep_modalities_apart`] turns the layers of a plain `DynamicCache` or `StaticCache` into layers of two, and adds one more,
which holds the places of the cached keys in the sequence. What `generate` does to a cache (reordering, repeating, selecting,
cropping, resetting, offloading) it does to every layer, and so to both modalities and to their places.

Shape letters: B batch, G key-value heads, T cached text, I cached image tokens, D head size.
"""

import copy

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.utils import is_tracing


# In the place of a key that does not exist, since rows of a batch differ in what they hold; and of one that is padding
NO_KEY, PADDING = -1, -2


class PlacesLayer(DynamicLayer):
    """
    Where the cached keys stand in the sequence: `keys` of shape `(batch_size, 1, T, 1)` for text, `values` of shape
    `(batch_size, 1, I, 1)` for images. Negative: `NO_KEY` or `PADDING`.

    Attributes:
        length (`int` or, in a static cache, `torch.Tensor`): Tokens of the sequence.
        is_empty (`bool`): Whether nothing is cached.
        has_no_gaps (`bool`): Whether every key of an image is known to exist.
        first_layer (`ModalitiesLayer`): The layer that is needed after this one.
    """

    has_no_gaps = False

    def __init__(self):
        super().__init__()
        self.length = 0
        self.first_layer = None

    @property
    def is_empty(self) -> bool:
        return self.length == 0

    def extend(self, text_BT: torch.Tensor, images_BI: torch.Tensor, length: int) -> None:
        """Adds the places of new keys, and `length` tokens to the sequence."""
        self.update(text_BT[:, None, :, None], images_BI[:, None, :, None])
        self.length += length

    def note_padding(self, attention_mask: torch.Tensor) -> None:
        """
        What a 2-dimensional mask says of the keys. Tokens of a dynamic cache come with a mask, and nothing is to be noted.
        """

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
        self.keys = self.keys.masked_fill(self.keys >= self.length, NO_KEY)
        self.values = self.values.masked_fill(self.values >= self.length, NO_KEY)

    def reset(self) -> None:
        super().reset()
        self.length = 0

    def prefetch(self) -> None:
        # Offloading begins to fetch the layer behind the one at work. Places are never offloaded
        self.first_layer.prefetch()

    def get_seq_length(self) -> int | torch.Tensor:
        return self.length


class StaticPlacesLayer(PlacesLayer):
    """
    The places of a static cache: a buffer for text, in which what is not yet written is `NO_KEY`, and those of the images.

    Args:
        max_cache_len (`int`): Tokens that a sequence may have.

    Attributes:
        columns (`torch.Tensor` of shape `()`): Columns of text that are written.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int):
        super().__init__()
        self.max_cache_len = max_cache_len
        self.length, self.columns = torch.tensor(0), torch.tensor(0)

    @property
    def is_empty(self) -> bool:
        return not self.is_initialized

    def extend(self, text_BT: torch.Tensor, images_BI: torch.Tensor, length: int) -> None:
        """As in a dynamic cache. New images make new buffers: what they hold is not changed in a graph."""
        if self.is_empty or images_BI.shape[1] > 0:
            self._make_room(text_BT, images_BI, length)
        columns = torch.arange(text_BT.shape[1], device=self.columns.device) + self.columns
        self.keys.index_copy_(2, columns, text_BT[:, None, :, None])
        self.columns.add_(text_BT.shape[1])
        self.length.add_(length)

    def note_padding(self, attention_mask: torch.Tensor) -> None:
        """
        Decoding from a static cache has no mask. Padding is not cached; but what was cached may be padding by now: that of
        rounds of text before the first image, or what followed the end of an answer that was shorter than others.
        """
        for places_B1K1 in (self.keys, self.values):
            is_kept_BK = attention_mask.gather(1, places_B1K1[:, 0, :, 0].clamp(min=0)) != 0
            places_B1K1.masked_fill_(~is_kept_BK[:, None, :, None] & (places_B1K1 >= 0), PADDING)
        self.has_no_gaps = bool((self.values >= 0).all())

    def _make_room(self, text_BT: torch.Tensor, images_BI: torch.Tensor, length: int) -> None:
        images = images_BI[:, None, :, None]
        if self.is_empty:
            self.length, self.columns = self.length.to(text_BT.device), self.columns.to(text_BT.device)
            mark_static(self.length, self.columns)
        else:
            images = torch.cat([self.values, images], dim=2)
        # All that is still to come may be text
        used = int(self.columns)
        room = used + text_BT.shape[1] + self.max_cache_len - int(self.length) - length
        keys = text_BT.new_full((len(text_BT), 1, room, 1), NO_KEY)
        if not self.is_empty:
            keys[:, :, :used] = self.keys[:, :, :used]
        self.keys, self.values, self.has_no_gaps = keys, images.contiguous(), bool((images >= 0).all())
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        mark_static(self.keys, self.values)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.length.zero_()
        self.columns.zero_()

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0


class GrowingLayer(DynamicLayer):
    """
    A `DynamicLayer` that keeps the first keys and values as they are: joining them to nothing would copy them. They may be
    views of more, and an image memory's own: nothing writes into a dynamic cache in place.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.keys.numel() > 0:
            return super().update(key_states, value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class ModalitiesLayer(GrowingLayer):
    """
    One decoder layer's keys and values: of text as in a `GrowingLayer`, of images in a second one.

    Args:
        places (`PlacesLayer`): The places of both, which all layers share.
    """

    def __init__(self, places: PlacesLayer):
        super().__init__()
        self.places = places
        self.images = GrowingLayer()

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
        if not images.is_initialized or image_key_states.shape[2] > 0:
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


class StaticModalitiesLayer(StaticLayer):
    """
    One decoder layer's keys and values in one buffer: text grows from its beginning, images stand at its end.

    Args:
        places (`StaticPlacesLayer`): The places of both, which all layers share.
        joined (`bool`): Whether one softmax goes over text and images, and so over the whole buffer.
    """

    def __init__(self, places: StaticPlacesLayer, joined: bool):
        super().__init__(places.max_cache_len)
        self.places, self.joined = places, joined

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        image_key_states: torch.Tensor,
        image_value_states: torch.Tensor,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Adds new keys and values of text (BGTD) and images (BGID), whose places are known already.

        Returns:
            All keys and all values, each a tuple of text's and images', or of the one buffer of both.
        """
        if not self.is_initialized or image_key_states.shape[2] > 0:
            self._make_room(image_key_states, image_value_states)
        super().update(key_states, value_states)
        if self.joined:
            return (self.keys,), (self.values,)
        room = self.places.keys.shape[2]
        return (self.keys[:, :, :room], self.keys[:, :, room:]), (self.values[:, :, :room], self.values[:, :, room:])

    def _make_room(self, image_keys: torch.Tensor, image_values: torch.Tensor) -> None:
        room, images = self.places.keys.shape[2], self.places.values.shape[2]
        old_images = images - image_keys.shape[2]
        used = int(self.cumulative_length)
        buffers = []
        for old, new in ((self.keys, image_keys), (self.values, image_values)):
            buffers.append(new.new_zeros(*new.shape[:2], room + images, new.shape[3]))
            if self.is_initialized:
                buffers[-1][:, :, :used] = old[:, :, :used]
                buffers[-1][:, :, room : room + old_images] = old[:, :, old.shape[2] - old_images :]
            buffers[-1][:, :, room + old_images :] = new
        self.keys, self.values = buffers
        self.dtype, self.device, self.batch_size = self.keys.dtype, self.keys.device, len(self.keys)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True
        mark_static(self.keys, self.values, self.cumulative_length)

    def get_seq_length(self) -> int | torch.Tensor:
        return self.places.length

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A static cache cannot be cropped: use a dynamic one")

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length.zero_()


def mark_static(*tensors: torch.Tensor) -> None:
    """CUDA graphs read them where they lie, and write them in place."""
    if not is_tracing():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def get_places(cache: Cache | None) -> PlacesLayer | None:
    """The places of a cache that keeps text and images apart; `None` for any other."""
    if cache is None or not cache.layers or not isinstance(cache.layers[0], ModalitiesLayer | StaticModalitiesLayer):
        return None
    return cache.layers[0].places


def can_keep_modalities_apart(cache: Cache, num_hidden_layers: int) -> bool:
    """Whether the cache consists of plain dynamic layers, as many as the decoder has or fewer, or of plain static ones."""
    if len(cache.layers) == num_hidden_layers and all(type(layer) is StaticLayer for layer in cache.layers):
        return True
    grows = len(cache.layers) == num_hidden_layers or cache.layer_class_to_replicate is DynamicLayer
    return grows and len(cache.layers) <= num_hidden_layers and all(type(layer) is DynamicLayer for layer in cache.layers)


def keep_modalities_apart(
    cache: Cache, num_hidden_layers: int, batch_size: int, device: torch.device, joined: bool = False
) -> PlacesLayer:
    """
    Makes the layers of a plain cache layers of two, in place. What is cached so far is text.

    Args:
        cache (`Cache`): One of which [`can_keep_modalities_apart`] is true.
        num_hidden_layers (`int`): Layers of the decoder.
        batch_size (`int`): Rows of the cache.
        device (`torch.device`): Where the places are kept.
        joined (`bool`): See [`StaticModalitiesLayer`].
    """
    length = int(cache.get_seq_length())
    if cache.layers and isinstance(cache.layers[0], StaticLayer):
        places = StaticPlacesLayer(cache.layers[0].max_cache_len)
        layers = [StaticModalitiesLayer(places, joined) for _ in range(num_hidden_layers)]
    else:
        places = PlacesLayer()
        layers = [ModalitiesLayer(places) for _ in range(num_hidden_layers)]
    places.first_layer = layers[0]
    if length > 0:
        text_BT = torch.arange(length, device=device).expand(batch_size, -1)
        places.extend(text_BT, text_BT[:, :0], length)
        for layer, plain in zip(layers, cache.layers):
            keys, values = plain.keys[:, :, :length], plain.values[:, :, :length]
            layer.update(keys, values, keys[:, :, :0], values[:, :, :0])
    cache.layers[:] = [*layers, places]
    return places


def copy_cache(cache: Cache) -> Cache:
    """A copy of a dynamic cache that goes its own way. Its tensors are shared: such caches replace them when they grow."""
    parts = [*cache.layers, *(layer.images for layer in cache.layers if isinstance(layer, ModalitiesLayer))]
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in tensors})
