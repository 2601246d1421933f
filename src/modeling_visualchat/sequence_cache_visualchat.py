# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The definition's cache: any cache of transformers, whose first layer also carries which image each cached token belongs to.

What `generate` does to a cache (reordering, repeating, selecting, cropping, resetting, copying) it does to every layer, and
so to these numbers.

Shape letters: B batch, Q new tokens, K all tokens that are seen (cached and new).
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


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


def update_image_numbers(
    past_key_values: Cache | None,
    is_image_BQ: torch.Tensor | None,
    image_seq_length: int,
    batch_and_length: tuple[int, int],
    device: torch.device,
    begins_BQ: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Which image each token belongs to: 0 for text, k for the k-th image of its conversation.

    Args:
        past_key_values (`Cache`, *optional*): The cache, before the decoder's layers are updated. Extended in place.
        is_image_BQ (`torch.BoolTensor`, *optional*): The new tokens that belong to an image. `None`: all are text.
        image_seq_length (`int`): Tokens of one image.
        batch_and_length (`tuple[int, int]`): B and Q.
        device (`torch.device`): Where the numbers are needed.
        begins_BQ (`torch.BoolTensor`, *optional*): Where packed conversations begin.

    Returns:
        `numbers_BQ` of the new tokens and `numbers_BK` of all tokens (of the whole buffer, for a static cache); both `None`
        if no image has been seen.
    """
    cached = get_image_numbers(past_key_values)
    if is_image_BQ is None and cached is None:
        return None, None
    batch_size, length = batch_and_length
    if is_image_BQ is None:
        numbers_BQ = torch.zeros(batch_size, length, dtype=torch.int, device=device)
    else:
        seen_B1 = 0
        if cached is not None and cached.is_initialized:
            seen_B1 = (cached.keys[:, 0, :, 0] > 0).sum(-1, keepdim=True)
        tokens_BQ = seen_B1 + is_image_BQ.cumsum(-1)
        if begins_BQ is not None:  # less what stood before the token's own conversation
            tokens_BQ = tokens_BQ - ((tokens_BQ - is_image_BQ.int()) * begins_BQ).cummax(-1).values
        numbers_BQ = torch.div(tokens_BQ - 1, image_seq_length, rounding_mode="floor") + 1
        numbers_BQ = (numbers_BQ * is_image_BQ).int()
    if past_key_values is None:
        return numbers_BQ, numbers_BQ

    new_BQ = numbers_BQ
    if cached is None:
        past_length = int(past_key_values.get_seq_length())
        cached = carry_image_numbers(past_key_values)
        new_BQ = nn.functional.pad(numbers_BQ, (past_length, 0))  # what is cached so far is text
    new_B1Q1 = new_BQ[:, None, :, None]
    numbers_B1K1, _ = cached.update(new_B1Q1, new_B1Q1[..., :0])
    return numbers_BQ, numbers_B1K1[:, 0, :, 0]
