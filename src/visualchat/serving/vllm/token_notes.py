# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
What a layer has to know of each token, written into its positions.

vLLM computes the positions of a request once. It cuts them for chunks of a prompt, for prefixes that are cached, and for
requests that were preempted, and gives them to every layer in a buffer of fixed address. So what stands in them is always
in step with the tokens. There are three rows:

    row 0:         the rotary position, plus SEEN if an image stands at or before the token
    row 1 - row 0: the number of the token, 0 for text. Tokens of image 1 have the number 1, or with learned numbers, where
                   each token of an image has its own, the next ones
    row 2:         as row 0

A token that is generated has three equal rows, from which vLLM's offset makes its position: it is text, behind the images.
"""

from typing import NamedTuple

import torch


SEEN = 1 << 30
"""More than any rotary position."""


class TokenNotes(NamedTuple):
    """
    Of T tokens:

    Args:
        rotary (`torch.LongTensor` of shape `(T,)`): Rotary positions.
        numbers (`torch.LongTensor` of shape `(T,)`): 0 for text; see above.
        is_image (`torch.BoolTensor` of shape `(T,)`): Whether a token belongs to an image.
        has_seen (`torch.BoolTensor` of shape `(T,)`): Whether an image stands at or before the token.
    """

    rotary: torch.Tensor
    numbers: torch.Tensor
    is_image: torch.Tensor
    has_seen: torch.Tensor


def write_notes(length: int, images: list[tuple[int, int]], tokens_per_number: int) -> tuple[torch.Tensor, int]:
    """
    Args:
        length (`int`): Tokens of the prompt, T.
        images (`list[tuple[int, int]]`): Where each image begins, and its number of tokens, in the order of the prompt.
        tokens_per_number (`int`): How many tokens of an image share a number: all of them, or 1.

    Returns:
        The positions, of shape `(3, T)`, and what is added to the index of a generated token.
    """
    is_image = torch.zeros(length, dtype=torch.bool)
    for start, count in images:
        is_image[start : start + count] = True
    seen = is_image.cumsum(0)
    numbers = torch.where(is_image, (seen - 1) // tokens_per_number + 1, 0)
    first = torch.arange(length) + SEEN * (seen > 0)
    return torch.stack([first, first + numbers, first]), SEEN * bool(images)


def read_notes(positions: torch.Tensor) -> TokenNotes:
    """
    Args:
        positions (`torch.LongTensor` of shape `(3, T)`): What [`write_notes`] wrote, or parts of it.
    """
    numbers = positions[1] - positions[0]
    return TokenNotes(positions[0] % SEEN, numbers, numbers > 0, positions[0] >= SEEN)
