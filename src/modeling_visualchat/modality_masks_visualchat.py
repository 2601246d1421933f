# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
What the fast path's text tokens see: masks, and the calls over image keys in which the attention kernels compute it.

Shape letters: B batch, W queries of the longest text, I image keys, K text and image keys.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attention_visualchat import Movable
from .modality_kernels_visualchat import BLOCK_SIZE, ImageCall, make_block_mask


# From this many queries on, a prefill on a GPU is faster in more than one call (`benchmarks/gpu_attention.py`)
QUERIES_PER_CALL = 512
# Queries × keys, over the batch, from which on a training step is clearly faster by flex attention (`benchmarks/gpu_7b.py`)
MIN_FLEX_SCORES = 2 * 2**20


def runs_by_images(device: torch.device) -> bool:
    """Whether a call for each run of text that sees the same images is the fastest way on this device."""
    return device.type == "cpu"


class PackedTokens(Movable):
    """
    Tokens of all sequences of a batch one after another, without padding, and the way between this and the padded form.

    Args:
        sequence_P (`torch.LongTensor` of shape `(tokens,)`): The sequence that each packed token belongs to, ascending.
        batch_size (`int`): Sequences in the batch.
        width (`int`, *optional*): How many tokens each sequence has, where all have as many and it is known.
    """

    def __init__(self, sequence_P: torch.Tensor, batch_size: int, width: int | None = None):
        self.is_full = width is not None
        self.counts, self.shape = [width] * batch_size, (batch_size, width)
        if width is not None:
            return
        counts_B = torch.bincount(sequence_P, minlength=batch_size)
        starts_B = counts_B.cumsum(0) - counts_B
        self.sequence_P = sequence_P
        self.rank_P = torch.arange(len(sequence_P), device=sequence_P.device) - starts_B[sequence_P]
        self.counts = counts_B.tolist()
        self.shape = (batch_size, max(self.counts))
        self.is_full = min(self.counts) == max(self.counts)

    def pad(self, packed: torch.Tensor, value: int = 0) -> torch.Tensor:
        """From `(tokens, …)` to `(batch_size, W, …)`, padded on the right."""
        if self.is_full:
            return packed.view(*self.shape, *packed.shape[1:])
        padded = packed.new_full((*self.shape, *packed.shape[1:]), value)
        return padded.index_put((self.sequence_P, self.rank_P), packed)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """From `(batch_size, W, …)` to `(tokens, …)`."""
        return padded.flatten(0, 1) if self.is_full else padded[self.sequence_P, self.rank_P]


class Visibility:
    """
    What queries see of keys, as the attention kernels take it. Keys are given by their positions, -1 for none; a query sees
    the positions from its `first` up to its `last`.

    Args:
        dtype (`torch.dtype`): Of the scores.
        is_traced (`bool`): Whether shapes must not depend on data.
        uses_flex (`bool`): Whether flex attention computes what needs a mask, where that is the faster way.
    """

    def __init__(self, dtype: torch.dtype, is_traced: bool, uses_flex: bool):
        self.dtype, self.is_traced, self.uses_flex = dtype, is_traced, uses_flex

    def make_mask(
        self, positions_BK: torch.Tensor, first_BW: torch.Tensor, last_BW: torch.Tensor
    ) -> torch.Tensor | BlockMask | None:
        """One mask for all queries and keys, of shape `(batch_size, 1, W, K)` if it is a tensor."""
        if self._takes_blocks(positions_BK, last_BW):
            return make_block_mask(positions_BK, first_BW, last_BW)
        return self._to_mask(_visible(positions_BK, first_BW, last_BW))

    def find_image_calls(
        self,
        positions_BI: torch.Tensor,
        first_BW: torch.Tensor,
        last_BW: torch.Tensor,
        queries: PackedTokens,
        sees_all: bool,
    ) -> list[tuple[slice, list[ImageCall]]]:
        """
        The calls over image keys, each list for some sequences of the batch. `queries` are the packed tokens behind W; with
        `sees_all` each is known to see every key.

        On a CPU, a call without a mask for each run of queries that see the same images. On a GPU such calls are too small
        (`benchmarks/gpu_attention.py`): there, and where what is seen is not what came first, a masked call for every
        `QUERIES_PER_CALL` queries, over the keys up to the last that one of them sees; or one by flex attention, which
        leaves out what no query of a block sees. In a graph, one call.
        """
        width, num_keys = last_BW.shape[1], positions_BI.shape[1]
        if self.is_traced and sees_all:
            return [(slice(None), [ImageCall(0, width, num_keys)])]
        if self._takes_blocks(positions_BI, last_BW):
            return [(slice(None), [ImageCall(0, width, num_keys, make_block_mask(positions_BI, first_BW, last_BW))])]
        visible_BWI = _visible(positions_BI, first_BW, last_BW)
        if self.is_traced:
            return [(slice(None), [self._masked_call(visible_BWI, 0, width, num_keys)])]
        keys_I = torch.arange(num_keys, device=visible_BWI.device)
        counts_BW = (visible_BWI * (keys_I + 1)).amax(-1)
        if runs_by_images(visible_BWI.device) and torch.equal(visible_BWI, keys_I < counts_BW[..., None]):
            return _find_runs(counts_BW.tolist(), queries)
        parts = counts_BW.split(QUERIES_PER_CALL, dim=1)
        counts = torch.stack([part.amax() for part in parts]).tolist()
        starts = range(0, width, QUERIES_PER_CALL)
        calls = [
            self._masked_call(visible_BWI, start, start + part.shape[1], count)
            for start, part, count in zip(starts, parts, counts)
        ]
        return [(slice(None), calls)]

    def _takes_blocks(self, positions_BK: torch.Tensor, last_BW: torch.Tensor) -> bool:
        is_large = last_BW.numel() * positions_BK.shape[1] >= MIN_FLEX_SCORES
        return self.uses_flex and is_large and last_BW.shape[1] > BLOCK_SIZE

    def _to_mask(self, visible_BWK: torch.Tensor) -> torch.Tensor | None:
        """
        What is added to scores; `None` if nothing is hidden. A query that sees nothing is opened to all keys: a softmax over
        nothing is NaN in some kernels, and its gradient in more.
        """
        if not self.is_traced and visible_BWK.all():
            return None
        visible_BWK = visible_BWK | ~visible_BWK.any(-1, keepdim=True)
        *queries, keys = visible_BWK.shape
        # Kernels on GPUs want the mask of each query to begin at a multiple of 16 bytes
        mask = torch.zeros(*queries, (keys + 7) // 8 * 8, dtype=self.dtype, device=visible_BWK.device)
        return mask[..., :keys].masked_fill_(~visible_BWK, float("-inf"))[:, None]

    def _masked_call(self, visible_BWI: torch.Tensor, start: int, stop: int, count: int) -> ImageCall:
        visible_BWI = visible_BWI[:, start:stop, :count]
        sees_image = visible_BWI.any(-1)[:, None, :, None]
        if count == 0 or (not self.is_traced and sees_image.all()):
            sees_image = None
        return ImageCall(start, stop, count, self._to_mask(visible_BWI) if count > 0 else None, sees_image)


def _visible(positions_BK: torch.Tensor, first_BW: torch.Tensor, last_BW: torch.Tensor) -> torch.Tensor:
    """Which keys a query sees: those with positions from its first up to its last. Of shape `(batch_size, W, keys)`."""
    positions_B1K = positions_BK[:, None]
    return (positions_B1K >= first_BW[..., None]) & (positions_B1K <= last_BW[..., None])


def _find_runs(counts: list[list[int]], queries: PackedTokens) -> list[tuple[slice, list[ImageCall]]]:
    if queries.is_full and all(of_sequence == counts[0] for of_sequence in counts):
        return [(slice(None), _runs_of_sequence(counts[0]))]
    sequences = enumerate(queries.counts)
    return [(slice(k, k + 1), _runs_of_sequence(counts[k][:length])) for k, length in sequences if length > 0]


def _runs_of_sequence(counts: list[int]) -> list[ImageCall]:
    starts = [k for k, count in enumerate(counts) if k == 0 or count != counts[k - 1]]
    return [ImageCall(start, stop, counts[start]) for start, stop in zip(starts, [*starts[1:], len(counts)])]
