# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The image prefix (`modality_prefix_visualchat.py`): constant tokens that each image token attends to besides itself. What a
layer computes of them depends on the weights alone, so it is computed once, after loading; and once for each LoRA adapter
(`prefix_adapters.py`).

Shape letters: T tokens, P tokens of the prefix, S slots of adapters and one without, G key-value heads, R query heads that
share keys, D head size.
"""

import torch
from torch import nn


class ImagePrefix(nn.Module):
    """
    The keys, after the rotation, and the values of a layer's prefix.

    Args:
        length (`int`): P.
        num_kv_heads (`int`), head_dim (`int`): G and D, of this process.
        slots (`int`): S. The last one is that of the model without an adapter.
    """

    def __init__(self, length: int, num_kv_heads: int, head_dim: int, slots: int):
        super().__init__()
        self.length = length
        for name in ("keys_SPGD", "values_SPGD"):
            self.register_buffer(name, torch.zeros(slots, length, num_kv_heads, head_dim), persistent=False)

    def share_slots(self, slots_T: torch.Tensor) -> None:
        """Takes the tensor in which the slots of a batch's tokens will stand, for all layers."""
        self.register_buffer("slots_T", slots_T, persistent=False)

    def remember(self, keys_PGD: torch.Tensor, values_PGD: torch.Tensor, slot: int) -> None:
        self.keys_SPGD[slot].copy_(keys_PGD)
        self.values_SPGD[slot].copy_(values_PGD)

    def attend(self, q_TGRD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scaling: float) -> torch.Tensor:
        """
        One softmax over the prefix and the token itself.

        Args:
            q_TGRD, k_TGD, v_TGD (`torch.Tensor`): Of tokens that stand at the position P.
            scaling (`float`): Of the scores.

        Returns:
            `torch.Tensor` of shape `(T, G, R, D)`.
        """
        of_itself = (q_TGRD * k_TGD[:, :, None]).sum(-1, keepdim=True)
        output_TGRD = self._attend(-1, q_TGRD, of_itself, v_TGD, scaling)
        for slot in range(len(self.keys_SPGD) - 1):
            is_adapted = (self.slots_T[: len(q_TGRD)] == slot)[:, None, None, None]
            output_TGRD = torch.where(is_adapted, self._attend(slot, q_TGRD, of_itself, v_TGD, scaling), output_TGRD)
        return output_TGRD

    def _attend(
        self, slot: int, q_TGRD: torch.Tensor, of_itself: torch.Tensor, v_TGD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        of_prefix = torch.einsum("tgrd,pgd->tgrp", q_TGRD, self.keys_SPGD[slot])
        weights = (torch.cat([of_prefix, of_itself], -1).float() * scaling).softmax(-1).to(q_TGRD.dtype)
        weights_TGRP, own_TGR1 = weights.split([self.length, 1], dim=-1)
        return torch.einsum("tgrp,pgd->tgrd", weights_TGRP, self.values_SPGD[slot]) + own_TGR1 * v_TGD[:, :, None]
