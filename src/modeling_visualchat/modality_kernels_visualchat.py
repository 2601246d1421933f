# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path's arithmetic, by the kernels of torch: what each text token sees, as masks and calls over image keys;
rotation; and the softmaxes over text keys, image keys or both.

Shape letters: B batch, W queries of the longest text, I image keys, K text and image keys, H query heads, G key-value heads,
R queries of the heads that share keys, D head size.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import dropout, pad, scaled_dot_product_attention

from .attention_visualchat import Movable


# Queries and keys that flex attention computes or leaves out together
BLOCK_SIZE = 128
# How often it may be compiled for other kinds of shapes. Beyond torch's own limit, 8, torch would compute all scores instead
FLEX_RECOMPILES = 64
# From this many queries on, a prefill on a GPU is faster in more than one call (`benchmarks/gpu_attention.py`)
QUERIES_PER_CALL = 512
# Queries × keys, over the batch, from which on a training step is clearly faster by flex attention (`benchmarks/gpu_7b.py`)
MIN_FLEX_SCORES = 2 * 2**20
# And at least this many queries: a block of them
MIN_FLEX_QUERIES = BLOCK_SIZE + 1


class ImageCall(NamedTuple):
    """
    A call of the attention kernel over image keys: the queries from `start` up to `stop` and the first `count` keys. `mask`,
    of shape `(batch_size, 1, queries, count)`, says by -inf what they do not see, or is a `BlockMask`; `None`: they see all.
    `sees_image`, of shape `(batch_size, 1, queries, 1)`: whether a query sees any. Flex attention needs no such thing.
    """

    start: int
    stop: int
    count: int
    mask: torch.Tensor | BlockMask | None = None
    sees_image: torch.Tensor | None = None


def attend_to_images(
    calls: list[ImageCall],
    q_BHWD: torch.Tensor,
    k_BGID: torch.Tensor,
    v_BGID: torch.Tensor,
    attend: Callable | None = None,
    **settings: float,
) -> torch.Tensor:
    """What queries see of images, of shape BHWD, by calls of `attend` ([`softmax`] by default) that follow one another."""
    attend, seen = attend or softmax, []
    for start, stop, count, mask, sees_image in calls:
        q_part = _part(q_BHWD, start, stop)
        if count == 0:  # who sees no image gets exactly nothing
            seen.append(torch.zeros_like(q_part))
            continue
        part = attend(q_part, _part(k_BGID, 0, count), _part(v_BGID, 0, count), mask, **settings)
        seen.append(part if sees_image is None else part * sees_image)
    return join(seen, dim=2)


def rotate(states_BHWD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """
    The rotary embedding, by cos and sin of shape `(batch_size, 1, W, head_size)`, the first half of sin with its sign
    changed. The result is contiguous for each head, however `states` lie in memory: image keys are many, and attention on a
    CPU is 1.6 times faster for it.
    """
    cos, signed_sin = rotary
    return states_BHWD.roll(states_BHWD.shape[-1] // 2, -1).mul_(signed_sin).addcmul_(states_BHWD, cos)


def with_signed_sin(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of shape `(…, head_size)` as [`rotate`] takes them."""
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def softmax(
    q_BHWD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """
    One softmax, of shape BHWD, over scores to which a mask of shape `(batch_size, 1, W, keys)` is added; with a `BlockMask`
    by flex attention, which gives zeros to a query that sees nothing.
    """
    settings = {"is_causal": is_causal, "scale": scaling, "dropout_p": dropout_p}
    batch_size, heads, width, head_size = q_BHWD.shape
    groups = k_BGKD.shape[1]
    if isinstance(mask, BlockMask):
        # Values are views of what a projection gave, here with an offset and there without: two kinds of input to a compiler
        return _flex(q_BHWD, k_BGKD, v_BGKD.contiguous(), block_mask=mask, enable_gqa=heads != groups, scale=scaling)
    if heads == groups or is_causal:
        return scaled_dot_product_attention(q_BHWD, k_BGKD, v_BGKD, mask, enable_gqa=heads != groups, **settings)
    # The heads that share keys are queries of one head, so that keys and values are read once
    shared = heads // groups
    q_BGRD = q_BHWD.reshape(batch_size, groups, shared * width, head_size)
    mask = mask.repeat(1, 1, shared, 1) if mask is not None else None
    return scaled_dot_product_attention(q_BGRD, k_BGKD, v_BGKD, mask, **settings).reshape(q_BHWD.shape)


def merged_softmax(
    q_BHWD: torch.Tensor,
    keys: tuple[torch.Tensor, ...],
    values: tuple[torch.Tensor, ...],
    mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """One softmax, of shape BHWD, over text and image keys together."""
    if q_BHWD.shape[2] > 1 or len(keys) == 1:
        return softmax(q_BHWD, join(list(keys), 2), join(list(values), 2), mask, scaling=scaling, dropout_p=dropout_p)
    # While decoding, the scores are put together and not the keys, which are many more
    q_BGRD = q_BHWD.reshape(len(q_BHWD), keys[0].shape[1], -1, q_BHWD.shape[-1])
    scores_BGRK = torch.cat([q_BGRD @ part.transpose(2, 3) for part in keys], dim=-1) * scaling
    if mask is not None:
        scores_BGRK = scores_BGRK + mask
    softmax_dtype = torch.promote_types(scores_BGRK.dtype, torch.float32)
    weights_BGRK = dropout(scores_BGRK.softmax(-1, dtype=softmax_dtype).to(scores_BGRK.dtype), dropout_p)
    text, images = weights_BGRK.split([part.shape[2] for part in keys], dim=-1)
    return (text @ values[0] + images @ values[1]).view(q_BHWD.shape)


def _flex(*states: torch.Tensor, **settings) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return flex_attention(*states, **settings)
    limits = torch._dynamo.config
    before = limits.recompile_limit
    limits.recompile_limit = max(before, FLEX_RECOMPILES)
    try:
        return _compile_flex()(*states, **settings)
    finally:
        limits.recompile_limit = before


@functools.cache
def _compile_flex() -> Callable:
    return torch.compile(flex_attention, fullgraph=True)


def make_block_mask(positions_BK: torch.Tensor, first_BW: torch.Tensor, last_BW: torch.Tensor) -> BlockMask:
    """
    For flex attention: a query sees the keys whose positions are from its `first` up to its `last`. `create_block_mask`
    would look at each key of each query to find out which blocks hold something; their smallest and largest positions tell
    it too.
    """
    positions_BK, first_BW, last_BW = (states.int() for states in (positions_BK, first_BW, last_BW))

    def sees(batch_idx, head_idx, q_idx, kv_idx):
        position = positions_BK[batch_idx, kv_idx]
        return (position >= first_BW[batch_idx, q_idx]) & (position <= last_BW[batch_idx, q_idx])

    # The last block is padded with -1, which is no key, and with queries that see nothing
    keys, lasts = _in_blocks(positions_BK, -1), _in_blocks(last_BW, -1)
    firsts = _in_blocks(first_BW, 0)
    nowhere = torch.iinfo(keys.dtype).max
    lowest = keys.masked_fill(keys < 0, nowhere).amin(-1)[:, None]
    some = (lowest <= lasts.amax(-1)[..., None]) & (keys.amax(-1)[:, None] >= firsts.amin(-1)[..., None])
    every = (keys.amin(-1)[:, None] >= firsts.amax(-1)[..., None]) & (keys.amax(-1)[:, None] <= lasts.amin(-1)[..., None])
    partly, wholly = _indices_of(some & ~every), _indices_of(every)
    seq_lengths = (last_BW.shape[1], positions_BK.shape[1])
    return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=BLOCK_SIZE, mask_mod=sees, seq_lengths=seq_lengths)


def _in_blocks(states_BN: torch.Tensor, value: int) -> torch.Tensor:
    """Of shape `(batch_size, blocks, BLOCK_SIZE)`, the last block being padded."""
    return pad(states_BN, (0, -states_BN.shape[1] % BLOCK_SIZE), value=value).unflatten(1, (-1, BLOCK_SIZE))


def _indices_of(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries, how many blocks of keys there are, and which: these come first. For all heads."""
    indices = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]


class _CudnnUse:
    """How many threads have left cuDNN's attention out of torch's choice, which all threads of a process share."""

    def __init__(self):
        self.lock, self.threads, self.lets_in_again = threading.Lock(), 0, False


_cudnn_use = _CudnnUse()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """
    Leaves cuDNN's attention out, which torch prefers on Hopper GPUs. It plans each new shape for 60 ms on the host (torch
    2.11 on an H100, by its profiler). While decoding with a cache that grows, every token has a new shape; so have most
    prompts and training batches. The last thread to leave lets cuDNN in again, if the first one found it allowed.
    """
    cuda = torch.backends.cuda
    with _cudnn_use.lock:
        if _cudnn_use.threads == 0:
            others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()
            _cudnn_use.lets_in_again = cuda.cudnn_sdp_enabled() and others
            if _cudnn_use.lets_in_again:
                cuda.enable_cudnn_sdp(False)
        _cudnn_use.threads += 1
    try:
        yield
    finally:
        with _cudnn_use.lock:
            _cudnn_use.threads -= 1
            if _cudnn_use.threads == 0 and _cudnn_use.lets_in_again:
                cuda.enable_cudnn_sdp(True)


def join(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """As `torch.cat`, without a copy where only one of the tensors holds something."""
    filled = [tensor for tensor in tensors if tensor.shape[dim] > 0] or tensors[:1]
    return torch.cat(filled, dim) if len(filled) > 1 else filled[0]


def _part(states_BHWD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return states_BHWD if stop - start == states_BHWD.shape[2] else states_BHWD[:, :, start:stop]


def computes_by_flex(device: torch.device) -> bool:
    """Where not, SDPA computes what flex attention would: on a CPU it has no backward pass."""
    return device.type != "cpu"


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
        return self.uses_flex and is_large and last_BW.shape[1] >= MIN_FLEX_QUERIES

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
