# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The image prefix (`modality_prefix_visualchat.py`): constant tokens that each image token attends to besides itself. What a
layer computes of them depends on the weights alone, so it is computed once, after loading.

Shape letters: T tokens, P tokens of the prefix, G key-value heads, R query heads that share keys, D head size.
"""

import torch
from torch import nn


class ImagePrefix(nn.Module):
    """
    The keys, after the rotation, and the values of a layer's prefix.

    Args:
        length (`int`): P.
        num_kv_heads (`int`), head_dim (`int`): G and D, of this process.
    """

    def __init__(self, length: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.length = length
        for name in ("keys_PGD", "values_PGD"):
            self.register_buffer(name, torch.zeros(length, num_kv_heads, head_dim), persistent=False)

    def attend(self, q_TGRD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scaling: float) -> torch.Tensor:
        """
        One softmax over the prefix and the token itself.

        Args:
            q_TGRD, k_TGD, v_TGD (`torch.Tensor`): Of tokens that stand at the position P.
            scaling (`float`): Of the scores.

        Returns:
            `torch.Tensor` of shape `(T, G, R, D)`.
        """
        of_prefix = torch.einsum("tgrd,pgd->tgrp", q_TGRD, self.keys_PGD).float()
        of_itself = (q_TGRD * k_TGD[:, :, None]).sum(-1, keepdim=True).float()
        weights = (torch.cat([of_prefix, of_itself], -1) * scaling).softmax(-1).to(q_TGRD.dtype)
        weights_TGRP, own_TGR1 = weights.split([self.length, 1], dim=-1)
        return torch.einsum("tgrp,pgd->tgrd", weights_TGRP, self.values_PGD) + own_TGR1 * v_TGD[:, :, None]
