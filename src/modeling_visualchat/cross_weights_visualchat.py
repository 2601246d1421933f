# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The weights of attention of a conversation with images under cross attention, as `output_attentions` returns them: one matrix
in the order of the sequence. A text token has the weights of the layer's own attention at text tokens, whose sum is 1, and
those of the layer's cross attention at the tokens of the images before it, whose sum is 1 too. At an image's own row all
weights are 0, and so are those at images in a layer without cross attention.

Shape letters: B batch, Q new tokens, K all tokens that are seen, W text tokens of the longest text, T text keys, I image
keys, P one of both, H query heads, G key-value heads, D head size.
"""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import repeat_kv

from .attention_visualchat import Movable


class CrossWeights(Movable):
    """
    Where weights stand in the order of the sequence.

    Args:
        rows_BW (`torch.Tensor` of shape `(batch_size, W)`): Of each text token, which of the Q new tokens it is; Q for none.
        last_BW (`torch.Tensor` of shape `(batch_size, W)`): Its position among all tokens.
        text_BT, images_BI (`torch.Tensor`): The positions of text keys and of image keys. Negative: a key that is none.
        num_queries (`int`), num_keys (`int`): Q and K.

    Attributes:
        of_images (`torch.Tensor`, *optional*): The weights of the cross attention of the layer that is being computed.
    """

    def __init__(
        self,
        rows_BW: torch.Tensor,
        last_BW: torch.Tensor,
        text_BT: torch.Tensor,
        images_BI: torch.Tensor,
        num_queries: int,
        num_keys: int,
    ):
        self.rows_BW, self.text_BT, self.images_BI = rows_BW, text_BT, images_BI
        self.num_queries, self.num_keys = num_queries, num_keys
        self.sees_BWI = (images_BI[:, None] >= 0) & (images_BI[:, None] <= last_BW[..., None])
        self.of_images = None

    def look_at_images(
        self, q_BHWD: torch.Tensor, k_BGID: torch.Tensor, v_BGID: torch.Tensor, **settings: float
    ) -> torch.Tensor:
        """What text tokens see of images, of shape BHWD. The weights are kept for the layer's own attention."""
        sees_B1WI = self.sees_BWI[:, None]
        mask = torch.zeros_like(sees_B1WI, dtype=q_BHWD.dtype).masked_fill(~sees_B1WI, torch.finfo(q_BHWD.dtype).min)
        weights_BHWI = eager_weights(q_BHWD, k_BGID, mask, **settings) * sees_B1WI
        self.of_images = self._put(weights_BHWI, self.images_BI)
        return weights_BHWI @ repeat_kv(v_BGID, q_BHWD.shape[1] // v_BGID.shape[1])

    def attend(self, weights_BHWT: torch.Tensor, v_BGTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The output of the layer's own attention, of shape BHWD, made of the weights that are returned, so that they have
        gradients; and these, of shape BHQK.
        """
        weights_BHQK = self._put(weights_BHWT, self.text_BT)
        if self.of_images is not None:
            weights_BHQK, self.of_images = weights_BHQK + self.of_images, None
        taken = self._take(weights_BHQK, self.text_BT)
        return taken @ repeat_kv(v_BGTD, weights_BHWT.shape[1] // v_BGTD.shape[1]), weights_BHQK

    def _put(self, weights_BHWP: torch.Tensor, positions_BP: torch.Tensor) -> torch.Tensor:
        """From the keys of one modality to the order of the sequence. What has no place there goes to a last one."""
        sizes = weights_BHWP.shape[:2]
        columns = torch.where(positions_BP < 0, self.num_keys, positions_BP)[:, None, None].expand_as(weights_BHWP)
        wide = weights_BHWP.new_zeros(*weights_BHWP.shape[:3], self.num_keys + 1).scatter(3, columns, weights_BHWP)
        rows = self.rows_BW[:, None, :, None].expand_as(wide)
        tall = wide.new_zeros(*sizes, self.num_queries + 1, self.num_keys + 1).scatter(2, rows, wide)
        return tall[:, :, : self.num_queries, : self.num_keys]

    def _take(self, weights_BHQK: torch.Tensor, positions_BP: torch.Tensor) -> torch.Tensor:
        """The inverse: of text tokens, at the keys of one modality."""
        heads, length, num_keys = weights_BHQK.shape[1:]
        rows = self.rows_BW.clamp(max=length - 1)[:, None, :, None].expand(-1, heads, -1, num_keys)
        wide = weights_BHQK.gather(2, rows)
        columns = positions_BP.clamp(min=0)[:, None, None].expand(*wide.shape[:3], -1)
        return wide.gather(3, columns) * (positions_BP >= 0)[:, None, None]


def eager_weights(
    q_BHWD: torch.Tensor,
    k_BGPD: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """The weights of one softmax, of shape BHWP, over scores to which a mask is added."""
    scores_BHWP = q_BHWD @ repeat_kv(k_BGPD, q_BHWD.shape[1] // k_BGPD.shape[1]).transpose(2, 3) * scaling
    if mask is not None:
        scores_BHWP = scores_BHWP + mask
    if is_causal:
        is_later_WP = torch.ones(scores_BHWP.shape[-2:], dtype=torch.bool, device=scores_BHWP.device).triu(1)
        scores_BHWP = scores_BHWP.masked_fill(is_later_WP, float("-inf"))
    softmax_dtype = torch.promote_types(scores_BHWP.dtype, torch.float32)
    weights_BHWP = scores_BHWP.softmax(-1, dtype=softmax_dtype).to(q_BHWD.dtype)
    return nn.functional.dropout(weights_BHWP, dropout_p)


def eager_softmax(q_BHWD: torch.Tensor, k_BGPD: torch.Tensor, v_BGPD: torch.Tensor, *mask, **settings) -> torch.Tensor:
    """What [`eager_weights`] make of values, of shape BHWD."""
    weights_BHWP = eager_weights(q_BHWD, k_BGPD, *mask, **settings)
    return weights_BHWP @ repeat_kv(v_BGPD, q_BHWD.shape[1] // v_BGPD.shape[1])
