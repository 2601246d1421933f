# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Rows of a batch without padding. Shape letters: B batch, R packed rows, W rows of the longest."""

import copy

import torch

from .modality_kernels_visualchat import ImageCall


class PackedRows:
    """
    Rows of a batch one after another without padding, and the way between this and the padded form.

    Args:
        batch_R (`torch.LongTensor` of shape `(rows,)`): The batch row of each packed row, ascending.
        batch_size (`int`): Rows of the batch.
        width (`int`, *optional*): How many packed rows each batch row has, where all have as many and it is known.
    """

    def __init__(self, batch_R: torch.Tensor, batch_size: int, width: int | None = None):
        self.is_full = width is not None
        self.counts, self.shape = [width] * batch_size, (batch_size, width)
        if width is not None:
            return
        counts_B = torch.bincount(batch_R, minlength=batch_size)
        starts_B = counts_B.cumsum(0) - counts_B
        self.batch_R, self.rank_R = batch_R, torch.arange(len(batch_R), device=batch_R.device) - starts_B[batch_R]
        self.counts = counts_B.tolist()
        self.shape = (batch_size, max(self.counts))
        self.is_full = min(self.counts) == max(self.counts)

    def pad(self, packed: torch.Tensor, value: int = 0) -> torch.Tensor:
        """From `(rows, …)` to `(batch_size, W, …)`, padded on the right."""
        if self.is_full:
            return packed.view(*self.shape, *packed.shape[1:])
        padded = packed.new_full((*self.shape, *packed.shape[1:]), value)
        return padded.index_put((self.batch_R, self.rank_R), packed)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """From `(batch_size, W, …)` to `(rows, …)`."""
        return padded.flatten(0, 1) if self.is_full else padded[self.batch_R, self.rank_R]

    def to(self, device: torch.device, **kwargs) -> "PackedRows":
        return move(self, device, **kwargs)


def move(holder: object, device: torch.device, **kwargs) -> object:
    """A copy of an object with the tensors that it holds, in tuples, lists, rows and calls too, on `device`."""
    moved, known = copy.copy(holder), {}
    for name, value in vars(holder).items():
        if name != "recorded":  # which all layers share
            setattr(moved, name, _to_device(value, known, device, **kwargs))
    return moved


def _to_device(value, known: dict, device: torch.device, **kwargs):
    """`known` holds what has been moved: much is there under two names."""
    if isinstance(value, torch.Tensor | PackedRows):
        if id(value) not in known:
            known[id(value)] = value.to(device, **kwargs)
        return known[id(value)]
    if isinstance(value, ImageCall):
        return ImageCall(*(_to_device(part, known, device, **kwargs) for part in value))
    if type(value) in (list, tuple):
        return type(value)(_to_device(part, known, device, **kwargs) for part in value)
    return value
