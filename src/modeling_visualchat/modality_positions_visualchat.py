# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path's positions: which of the new tokens are text and images, and where in the sequence the cached keys of both
stand.

Shape letters: B batch, Q new tokens, T cached text, I cached image tokens, K one of both.
"""

import torch
from transformers.cache_utils import DynamicLayer
from transformers.utils import is_tracing


# Positions of a key that does not exist, since the sequences of a batch differ in what they hold, and of one that is padding
NO_KEY, PADDING = -1, -2


class ModalityPositions(DynamicLayer):
    """
    The positions of the cached keys: their indices in the sequence, counted from 0 with padding. They are kept like the keys
    of a layer: `keys` of shape `(batch_size, 1, T, 1)` for text, `values` of shape `(batch_size, 1, I, 1)` for images. A
    negative position is `NO_KEY` or `PADDING`.

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
        """Adds the positions of new keys, and `length` tokens to the sequence."""
        self.update(text_BT[:, None, :, None], images_BI[:, None, :, None])
        self.length += length

    def note_padding(self, attention_mask: torch.Tensor) -> None:
        """
        Notes which cached keys a 2-dimensional mask hides. Whatever goes on from a dynamic cache comes with a mask: here
        nothing needs to be noted.
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
        """How many columns of text and of images hold a key from before the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        length = self.length + tokens_to_remove
        columns = []
        for positions_BK in (self.of_text, self.of_images):
            held_K = ((positions_BK >= 0) & (positions_BK < length)).any(0).nonzero()
            columns.append(int(held_K[-1]) + 1 if len(held_K) else 0)
        return columns[0], columns[1]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        text, images = self.kept_by_crop(tokens_to_remove)
        self.length += int(tokens_to_remove)
        self.keys = self.keys[:, :, :text]
        self.values = self.values[:, :, :images]
        # One sequence may have held fewer of the removed tokens than another
        self.keys = self.keys.masked_fill(self.keys >= self.length, NO_KEY)
        self.values = self.values.masked_fill(self.values >= self.length, NO_KEY)

    def reset(self) -> None:
        self.keys, self.values, self.is_initialized = None, None, False
        super().reset()
        self.length = 0

    def get_seq_length(self) -> int | torch.Tensor:
        return self.length


class StaticModalityPositions(ModalityPositions):
    """
    The positions of a static cache: a buffer for those of text, filled with `NO_KEY` ahead, and those of the images.

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
        """As in a dynamic cache. New images make new buffers, outside of graphs."""
        if self.is_empty or images_BI.shape[1] > 0:
            self._make_room(text_BT, images_BI, length)
        columns = torch.arange(text_BT.shape[1], device=self.columns.device) + self.columns
        self.keys.index_copy_(2, columns, text_BT[:, None, :, None])
        self.columns.add_(text_BT.shape[1])
        self.length.add_(length)

    def note_padding(self, attention_mask: torch.Tensor) -> None:
        """
        Decoding from a static cache has no mask. Padding is not cached, but cached tokens may be padding by now: padding in
        rounds of text before the first image, and what followed the end of an answer that was shorter than others.
        """
        for positions_B1K1 in (self.keys, self.values):
            is_kept_BK = attention_mask.gather(1, positions_B1K1[:, 0, :, 0].clamp(min=0)) != 0
            positions_B1K1.masked_fill_(~is_kept_BK[:, None, :, None] & (positions_B1K1 >= 0), PADDING)
        self.has_no_gaps = bool((self.values >= 0).all())

    def _make_room(self, text_BT: torch.Tensor, images_BI: torch.Tensor, length: int) -> None:
        images = images_BI[:, None, :, None]
        if self.is_empty:
            self.length, self.columns = self.length.to(text_BT.device), self.columns.to(text_BT.device)
            mark_static(self.length, self.columns)
        else:
            images = torch.cat([self.values, images], dim=2)
        # All further tokens may be text
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


def mark_static(*tensors: torch.Tensor) -> None:
    """CUDA graphs read these tensors where they lie, and write them in place."""
    if not is_tracing():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def sort_by_modality(
    is_image_BQ: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    batch_and_length: tuple[int, int],
    device: torch.device,
    num_placeholders: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The indices, among all new tokens of the batch, of the text tokens and of the placeholders. Padding is left out where
    shapes may depend on it.

    Args:
        is_image_BQ (`torch.BoolTensor`, *optional*): The placeholders. `None`: all are text.
        attention_mask (`torch.Tensor` of shape `(batch_size, tokens seen)`, *optional*): 0 for padding. `None`: there is
            none.
        batch_and_length (`tuple[int, int]`): B and Q.
        device (`torch.device`): Where the indices are needed.
        num_placeholders (`int`, *optional*): How many placeholders there are. Needed where a graph is traced.
    """
    batch_size, length = batch_and_length
    index_P = torch.arange(batch_size * length, device=device)
    if is_image_BQ is None:
        text_index, image_index = index_P, index_P[:0]
    elif is_tracing():
        order_P = (index_P + is_image_BQ.flatten() * len(index_P)).argsort()  # no two are equal: ONNX has no stable sort
        num_text = len(index_P) - num_placeholders
        text_index, image_index = order_P[:num_text], order_P[num_text:]
    else:
        text_index, image_index = index_P[~is_image_BQ.flatten()], index_P[is_image_BQ.flatten()]
    if attention_mask is not None and not is_tracing():
        is_kept = attention_mask[:, -length:].flatten() != 0
        text_index = text_index[is_kept[text_index]]
    return text_index, image_index


def cut_mask(attention_mask: torch.Tensor, past_length: int, length: int) -> torch.Tensor:
    """
    The columns of the tokens seen: those of the cache, and `length` new ones. A mask may have been made for a whole static
    cache.

    Raises:
        ValueError: If there are fewer columns; both counts are given.
    """
    seen = past_length + length
    if attention_mask.shape[1] < seen:
        raise ValueError(
            f"`attention_mask` has {attention_mask.shape[1]} columns, but {seen} tokens have been seen: the {past_length} of"
            f" the cache and {length} new ones"
        )
    return attention_mask[:, :seen]
