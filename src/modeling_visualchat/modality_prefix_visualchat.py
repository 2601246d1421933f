# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The image prefix on the fast path: a few constant tokens, computed beside the batch, that image tokens attend to.

A token that sees only itself is treated by pretrained decoders like the first token of a sequence, to which most tokens give
attention that they have no other use for: its hidden state becomes very large, and nothing that it says can be read from it.
So an image token may also attend to constant tokens before it, such as those of "Image:". It stands at the same distance
behind them in every conversation. What a decoder computes of an image therefore remains a function of the image alone.

Shape letters: P tokens of the prefix, I image tokens, N both, one after the other, H query heads, G key-value heads, R query
heads that share keys, D head size.
"""

import torch
from torch.nn.functional import dropout

from .attention_visualchat import Movable
from .modality_kernels_visualchat import rotate, with_signed_sin


class ImagePrefix(Movable):
    """
    What image tokens, and the tokens of the prefix themselves, attend to: the tokens of the prefix before them, and
    themselves, in one softmax. Images are behind all of the prefix.

    Args:
        rotary: cos and sin of shape `(1, P + 1, head_size)`, of the positions 0 to P - 1 of the prefix, and of P, where
            each image token is.
        num_image_tokens (`int`): I.

    Attributes:
        length (`int`): P.
    """

    def __init__(self, rotary: tuple[torch.Tensor, torch.Tensor], num_image_tokens: int):
        cos, sin = rotary
        self.length = cos.shape[1] - 1
        positions_P = torch.arange(self.length, device=cos.device)
        positions_N = torch.cat([positions_P.new_full((num_image_tokens,), self.length), positions_P])
        self.rotary = tuple(part[0, positions_N][:, None] for part in with_signed_sin(cos, sin))
        is_hidden_NP = positions_P >= positions_N[:, None]
        self.mask_NP = torch.zeros_like(is_hidden_NP, dtype=cos.dtype).masked_fill(is_hidden_NP, float("-inf"))

    def attend(
        self, q_NHD: torch.Tensor, k_NGD: torch.Tensor, v_NGD: torch.Tensor, scaling: float, dropout_p: float
    ) -> torch.Tensor:
        """
        Args:
            q_NHD (`torch.Tensor` of shape `(tokens, heads, head_size)`): Queries of the images, and of the prefix if its
                output is needed, before the rotation.
            k_NGD, v_NGD (`torch.Tensor` of shape `(tokens, key-value heads, head_size)`): Keys before the rotation, without
                the images' numbers, and values of the images and the prefix.
            scaling (`float`), dropout_p (`float`): As attention has them.

        Returns:
            `torch.Tensor` of shape `(tokens with a query, heads, head_size)`.
        """
        num_queries, groups = len(q_NHD), k_NGD.shape[1]
        cos, sin = self.rotary
        k_NGD, q_NHD = rotate(k_NGD, (cos, sin)), rotate(q_NHD, (cos[:num_queries], sin[:num_queries]))
        q_GNRD = q_NHD.unflatten(1, (groups, -1)).transpose(0, 1)
        own_k_GN1D, own_v_GN1D = (states[:num_queries].transpose(0, 1)[:, :, None] for states in (k_NGD, v_NGD))
        k_GPD, v_GPD = (states[-self.length :].transpose(0, 1) for states in (k_NGD, v_NGD))

        softmax_dtype = torch.promote_types(q_NHD.dtype, torch.float32)
        scores_GNRP = (q_GNRD.flatten(1, 2) @ k_GPD.transpose(1, 2)).unflatten(1, (num_queries, -1))
        scores_GNRP = scores_GNRP * scaling + self.mask_NP[:num_queries, None]
        own_scores_GNR1 = (q_GNRD.to(softmax_dtype) * own_k_GN1D).sum(-1, keepdim=True) * scaling
        weights = torch.cat([scores_GNRP.to(softmax_dtype), own_scores_GNR1], dim=-1).softmax(-1).to(q_NHD.dtype)
        weights_GNRP, own_weights_GNR1 = dropout(weights, dropout_p).split([self.length, 1], dim=-1)
        of_prefix_GNRD = (weights_GNRP.flatten(1, 2) @ v_GPD).unflatten(1, (num_queries, -1))
        return (of_prefix_GNRD + own_weights_GNR1 * own_v_GN1D).transpose(0, 1).flatten(1, 2)
