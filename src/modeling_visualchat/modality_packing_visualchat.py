# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path's batches without padding.

Shape letters: B batch, P packed tokens of all sequences, W tokens of the longest sequence.
"""

import torch

from .attention_visualchat import Movable


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
