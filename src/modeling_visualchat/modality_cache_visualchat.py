# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
What a cache knows of images, beside the keys and values of the decoder's layers.

[`keep_modalities_apart`] turns the layers of a plain `DynamicCache` or `StaticCache` into layers of two, so that decoding
adds to the text alone, and notes the places of the cached keys in the sequence. [`carry_image_numbers`] leaves the
layers of any cache as they are, and notes which image each cached token belongs to. What `generate` does to a cache
(reordering, repeating, selecting, cropping, resetting, copying) it does to every layer, and one of them does the same to the
places or numbers: the last layer to the places, when all others have read them, the first to the numbers.

Shape letters: B batch, G key-value heads, T cached text, I cached image tokens, D head size.
"""

import copy
from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.utils import is_tracing


# In the place of a key that does not exist, since rows of a batch differ in what they hold; and of one that is padding
NO_KEY, PADDING = -1, -2


class Places(DynamicLayer):
    """
    Where the cached keys stand in the sequence, kept like the keys of a layer: `keys` of shape `(batch_size, 1, T, 1)` for
    text, `values` of shape `(batch_size, 1, I, 1)` for images. Negative: `NO_KEY` or `PADDING`.

    Attributes:
        length (`int` or, in a static cache, `torch.Tensor`): Tokens of the sequence.
        is_empty (`bool`): Whether nothing is cached.
        has_no_gaps (`bool`): Whether every key of an image is known to exist.
    """

    has_no_gaps = False

    def __init__(self):
        super().__init__()
        self.length = 0

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

    def get_seq_length(self) -> int | torch.Tensor:
        return self.length


class StaticPlaces(Places):
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


class ModalitiesLayer(CacheLayerMixin):
    """
    One decoder layer's keys and values: of text in one `GrowingLayer`, of images in another.

    Args:
        places (`Places`): The places of both, which all layers share.
        owns_places (`bool`): Whether what is done to this layer is done to the places too.
    """

    is_croppable, is_sliding = True, False

    def __init__(self, places: Places, owns_places: bool):
        # The base class's own would set what are properties here
        self.places, self.owns_places = places, owns_places
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
        Of shape `(batch_size, key-value heads, tokens, head_size)`, in the order of the sequence, as any layer gives them,
        and zeros where padding is not kept. Made anew for each reader: nothing here computes with them. So are `values`.
        """
        return self._in_order("keys")

    @property
    def values(self) -> torch.Tensor | None:
        return self._in_order("values")

    def _in_order(self, name: str) -> torch.Tensor | None:
        if not (self.is_initialized and self.places.is_initialized):
            return None
        text_BGTD, images_BGID = self._by_modality(name)
        length = self._length_in_order
        # Behind the sequence stands what is not part of it
        sequence = text_BGTD.new_zeros(*text_BGTD.shape[:2], length + 1, text_BGTD.shape[3])
        for part_BGKD, places_BK in ((text_BGTD, self.places.of_text), (images_BGID, self.places.of_images)):
            index_BK = torch.where(places_BK < 0, length, places_BK).to(part_BGKD.device)
            sequence.scatter_(2, index_BK[:, None, :, None].expand_as(part_BGKD), part_BGKD)
        return sequence[:, :, :length]

    def _by_modality(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self.text, name), getattr(self.images, name)

    @property
    def _length_in_order(self) -> int:
        return self.places.length

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

    def get_seq_length(self) -> int | torch.Tensor:
        return self.places.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        for part, columns in zip(self._parts, self.places.kept_by_crop(tokens_to_remove)):
            part.keys, part.values = part.keys[:, :, :columns], part.values[:, :, :columns]
        if self.owns_places:
            self.places.crop(tokens_to_remove)

    def reset(self) -> None:
        for part in self._parts:
            part.reset()
        if self.owns_places:
            self.places.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for part in self._parts:
            part.reorder_cache(beam_idx)
        if self.owns_places:
            self.places.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self._parts:
            part.batch_repeat_interleave(repeats)
        if self.owns_places:
            self.places.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for part in self._parts:
            part.batch_select_indices(indices)
        if self.owns_places:
            self.places.batch_select_indices(indices)

    def offload(self) -> None:
        # The places stay: every layer needs them, and they are small
        for part in self._parts:
            part.offload()

    def prefetch(self) -> None:
        for part in self._parts:
            part.prefetch()


class StaticModalitiesLayer(ModalitiesLayer):
    """
    One decoder layer's keys and values in the one buffer of a `StaticLayer`: text grows from its beginning, images stand at
    its end.

    Args:
        places (`StaticPlaces`): The places of both, which all layers share.
        owns_places (`bool`): As in a [`ModalitiesLayer`].
        joined (`bool`): Whether one softmax goes over text and images, and so over the whole buffer.
    """

    is_compileable, is_croppable = True, False

    def __init__(self, places: StaticPlaces, owns_places: bool, joined: bool):
        super().__init__(places, owns_places)
        self.joined = joined

    def _make_parts(self) -> None:
        self.buffer = StaticLayer(self.places.max_cache_len)

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

    @property
    def _length_in_order(self) -> int:
        return self.places.max_cache_len

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
        Adds new keys and values of text (BGTD) and images (BGID), whose places are known already.

        Returns:
            All keys and all values, each a tuple of text's and images', or of the one buffer of both.
        """
        if not self.is_initialized or image_key_states.shape[2] > 0:
            self._make_room(image_key_states, image_value_states)
        keys, values = self.buffer.update(key_states, value_states)
        return ((keys,), (values,)) if self.joined else (self._split(keys), self._split(values))

    def _split(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        room = self.places.keys.shape[2]
        return buffer[:, :, :room], buffer[:, :, room:]

    def _make_room(self, image_keys: torch.Tensor, image_values: torch.Tensor) -> None:
        layer, room, images = self.buffer, self.places.keys.shape[2], self.places.values.shape[2]
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

    def get_max_length(self) -> int:
        return self.places.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.max_cache_len, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A static cache cannot be cropped: use a dynamic one")

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
        if self.owns_places:
            self.places.reorder_cache(beam_idx)


class CarriesImageNumbers:
    """
    Mixed into the class of a cache's first layer: the layer carries `image_numbers` along, a layer whose keys, of shape
    `(batch_size, 1, tokens, 1)`, say which image each cached token belongs to. Whatever is done to a cache is done to them.
    """

    image_numbers: DynamicLayer | StaticLayer

    def __reduce__(self):
        # The class may have been made here: copies and pickles are told how
        return _make_carrier, (type(self).__bases__[1],), vars(self)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.image_numbers.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.image_numbers.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.image_numbers.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.image_numbers.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.image_numbers.batch_select_indices(indices)


class NumberedDynamicLayer(CarriesImageNumbers, DynamicLayer):
    """A `DynamicLayer` that carries image numbers."""


class NumberedStaticLayer(CarriesImageNumbers, StaticLayer):
    """A `StaticLayer` that carries image numbers."""


# Of other layers, such as quantized ones, the class is made when it is needed. A graph can make none
_CARRIERS = {DynamicLayer: NumberedDynamicLayer, StaticLayer: NumberedStaticLayer}


def _make_carrier(layer_class: type) -> CarriesImageNumbers:
    if layer_class not in _CARRIERS:
        _CARRIERS[layer_class] = type(f"Numbered{layer_class.__name__}", (CarriesImageNumbers, layer_class), {})
    carrier = _CARRIERS[layer_class]
    return carrier.__new__(carrier)


def get_image_numbers(cache: Cache | None) -> DynamicLayer | StaticLayer | None:
    """The image numbers that a cache carries; `None` if it carries none."""
    carries = cache is not None and cache.layers and isinstance(cache.layers[0], CarriesImageNumbers)
    return cache.layers[0].image_numbers if carries else None


def carry_image_numbers(cache: Cache) -> DynamicLayer | StaticLayer:
    """Lets a cache of whichever class carry image numbers, of which there are none yet."""
    if not cache.layers:  # made without a config, a cache creates its layers when they are first updated
        cache.layers.append(cache.layer_class_to_replicate())
    first = cache.layers[0]
    is_static = isinstance(first, StaticLayer)
    numbers = StaticLayer(max_cache_len=cache.get_max_length()) if is_static else DynamicLayer()
    cache.layers[0] = _make_carrier(type(first))
    vars(cache.layers[0]).update(vars(first), image_numbers=numbers)
    return numbers


def mark_static(*tensors: torch.Tensor) -> None:
    """CUDA graphs read them where they lie, and write them in place."""
    if not is_tracing():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def get_places(cache: Cache | None) -> Places | None:
    """The places of a cache that keeps text and images apart; `None` for any other."""
    if cache is None or not cache.layers or not isinstance(cache.layers[0], ModalitiesLayer):
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
) -> Places:
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
        places = StaticPlaces(cache.layers[0].max_cache_len)
        layers = [StaticModalitiesLayer(places, k == num_hidden_layers - 1, joined) for k in range(num_hidden_layers)]
    else:
        places = Places()
        layers = [ModalitiesLayer(places, k == num_hidden_layers - 1) for k in range(num_hidden_layers)]
    if length > 0:
        text_BT = torch.arange(length, device=device).expand(batch_size, -1)
        places.extend(text_BT, text_BT[:, :0], length)
        for layer, plain in zip(layers, cache.layers):
            keys, values = plain.keys[:, :, :length], plain.values[:, :, :length]
            layer.update(keys, values, keys[:, :, :0], values[:, :, :0])
    cache.layers[:] = layers
    return places


def copy_cache(cache: Cache) -> Cache:
    """A copy of a dynamic cache that goes its own way. Its tensors are shared: such caches replace them when they grow."""
    tensors = [tensor for layer in cache.layers for tensor in _tensors_of(layer)]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in tensors})


def _tensors_of(layer: CacheLayerMixin) -> Iterator[torch.Tensor]:
    for value in vars(layer).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, CacheLayerMixin):
            yield from _tensors_of(value)
