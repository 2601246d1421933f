# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path's arithmetic: rotation, and the softmaxes over text keys, image keys or both, by the kernels of torch.

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


# Queries and keys that flex attention computes or leaves out together
BLOCK_SIZE = 128
# How often it may be compiled for other kinds of shapes. Beyond torch's own limit, 8, torch would compute all scores instead
FLEX_RECOMPILES = 64


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
    calls: list[ImageCall], q_BHWD: torch.Tensor, k_BGID: torch.Tensor, v_BGID: torch.Tensor, **settings: float
) -> torch.Tensor:
    """What queries see of images, of shape BHWD, by calls that follow one another."""
    seen = []
    for start, stop, count, mask, sees_image in calls:
        q_part = _part(q_BHWD, start, stop)
        if count == 0:  # who sees no image gets exactly nothing
            seen.append(torch.zeros_like(q_part))
            continue
        part = softmax(q_part, _part(k_BGID, 0, count), _part(v_BGID, 0, count), mask, **settings)
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
