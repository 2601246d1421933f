# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
MMCA with one thing changed, to find out what makes it learn more slowly than causal attention. This is for training and for
scoring answers: it has no cache, and it computes all scores of all tokens.

Shape letters: B batch, Q tokens, P tokens of the image prefix, N both of them, H query heads, D head size.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_visualchat import VisualChatForCausalLM
from modeling_visualchat.attention_visualchat import VisualChatAttention
from modeling_visualchat.sequence_attention_visualchat import SequencePlan


class AttentionChange(NamedTuple):
    """
    Args:
        image_weight (`float`, *optional*): What the second softmax of `mmca`, over images, is multiplied by: 1 by the paper.
            `None`: a number for each head of each layer, which is learned and begins at 1.
        sees_own_image (`bool`): Whether an image's token attends to the earlier tokens of its image, without their number.
            Its hidden states remain a function of the picture alone.
        image_positions (`str`): By which position an image's key is rotated for the queries of text: that of its own
            `"place"`, as defined; that of the image's first token, `"begin"`; or `"none"`, which leaves it as it is.
    """

    image_weight: float | None = 1.0
    sees_own_image: bool = False
    image_positions: str = "place"


class ChangedPlan(SequencePlan):
    """
    The definition of MMCA with a change.

    Args:
        change (`AttentionChange`): What is changed.
        image_seq_length (`int`): The tokens of an image.
        rotate_positions (`Callable`): Takes positions of shape `(1, n)`, returns cos and sin of shape `(1, n, head_size)`.
        args: Of [`SequencePlan`].
    """

    def __init__(self, change: AttentionChange, image_seq_length: int, rotate_positions: Callable, *args):
        super().__init__(*args)
        self.change, (is_image_BQ, length) = change, (self.is_image, self.prefix_length)
        rank_BQ = (is_image_BQ.cumsum(-1) - 1).clamp(min=0)
        offset_BQ = torch.where(is_image_BQ, rank_BQ % image_seq_length, 0)
        image_BQ = torch.where(is_image_BQ, rank_BQ // image_seq_length + 1, 0)
        index_Q = torch.arange(is_image_BQ.shape[1], device=self.device)
        self.begin_BQ = index_Q - offset_BQ

        # What the tokens of the prefix and of the images see: as one sequence, which is that of an image alone
        index_N = torch.arange(length + is_image_BQ.shape[1], device=self.device)
        earlier_NN = index_N <= index_N[:, None]
        self.own_sees_BNN = (earlier_NN & (index_N < length) | (index_N == index_N[:, None]))[None]
        if change.sees_own_image:
            image_BN = nn.functional.pad(image_BQ, (length, 0))
            same_BNN = (image_BN[:, None] == image_BN[..., None]) & (image_BN[:, None] > 0)
            self.own_sees_BNN = self.own_sees_BNN | (same_BNN & earlier_NN)
        own_BQ = length + (offset_BQ if change.sees_own_image else torch.zeros_like(offset_BQ))
        own_BN = torch.cat([index_N[:length].expand(len(own_BQ), -1), own_BQ], dim=1)
        cos, sin = rotate_positions(torch.arange(length + image_seq_length, device=self.device)[None])
        self.own_rotary = cos[0][own_BN], sin[0][own_BN]

    def attend(
        self,
        attention: VisualChatAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        number_keys: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: None,
        softmax_over: Callable,
    ) -> tuple[torch.Tensor, None]:
        length, own_keys = self.prefix_length, keys
        if number_keys is not None:
            keys = keys + number_keys[nn.functional.pad(self.image_numbers, (length, 0)).long()]
        q_BNHD, k_BNGD, v_BNGD, own_k_BNGD = (
            states.view(*states.shape[:-1], -1, attention.head_dim) for states in (queries, keys, values, own_keys)
        )
        q_BNHD = attention.normalize_queries(q_BNHD)
        k_BNGD, own_k_BNGD = attention.normalize_keys(k_BNGD, own_k_BNGD)
        q_BHND, k_BGND, v_BGND, own_k_BGND = (one.transpose(1, 2) for one in (q_BNHD, k_BNGD, v_BNGD, own_k_BNGD))

        own_q_BHND, own_k_BGND = apply_rotary_pos_emb(q_BHND, own_k_BGND, *self.own_rotary)
        hidden = torch.finfo(values.dtype).min
        own_mask = torch.zeros_like(self.own_sees_BNN, dtype=values.dtype).masked_fill(~self.own_sees_BNN, hidden)
        own_BNHD, _ = softmax_over(own_q_BHND, own_k_BGND, v_BGND, own_mask[:, None])

        q_BHQD, k_BGQD, v_BGQD = (states[:, :, length:] for states in (q_BHND, k_BGND, v_BGND))
        q_BHQD, _ = apply_rotary_pos_emb(q_BHQD, q_BHQD, *position_embeddings)
        k_BGQD, _ = apply_rotary_pos_emb(k_BGQD, k_BGQD, *self._rotary_of_keys(*position_embeddings))

        def attend_to(mask: torch.Tensor) -> torch.Tensor:
            return softmax_over(q_BHQD, k_BGQD, v_BGQD, mask)[0]

        if self.image_keys is None:
            output_BQHD = attend_to(self.all_keys)
        else:
            weight = self.change.image_weight
            weight = attention.image_weight[:, None] if weight is None else weight
            output_BQHD = attend_to(self.text_keys) + weight * attend_to(self.image_keys) * self.sees_image.transpose(1, 2)
        output_BQHD = torch.where(self.is_image[..., None, None], own_BNHD[:, length:], output_BQHD)
        output_BNHD = torch.cat([own_BNHD[:, :length], output_BQHD], dim=1)
        return output_BNHD.reshape(*queries.shape).contiguous(), None

    def _rotary_of_keys(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.change.image_positions == "place":
            return cos, sin
        if self.change.image_positions == "begin":
            index = self.begin_BQ[..., None].expand(-1, -1, cos.shape[-1])
            return tuple(part.expand(len(index), -1, -1).gather(1, index) for part in (cos, sin))
        is_image = self.is_image[..., None]
        return torch.where(is_image, 1.0, cos), torch.where(is_image, 0.0, sin)


def change_attention(model: VisualChatForCausalLM, change: AttentionChange) -> None:
    """
    Changes the attention of a model with `mmca` or `mmca_merged`, in place. It then computes batches with images without a
    cache.
    """
    text_model = model.model.language_model
    make_plain, config = text_model._make_plan, copy.copy(text_model.config)
    config._attn_implementation, text_model.config.use_cache = "eager", False
    if change.image_weight is None:
        for layer in text_model.layers:
            layer.self_attn.image_weight = nn.Parameter(torch.ones(config.num_attention_heads))

    def make_plan(*args):
        embeds, is_image, _, source, memory, mask, position_ids, _, cache, starts, prefix_rotary, returns_weights = args
        if is_image is None:
            return make_plain(*args)
        if cache is not None or memory or returns_weights:
            raise ValueError("a model whose attention is changed computes without a cache, image memory and weights")
        return ChangedPlan(
            change,
            text_model.image_seq_length,
            lambda positions: text_model.rotary_emb(embeds, positions),
            text_model.multimodal_attention,
            config,
            embeds,
            mask,
            position_ids,
            None,
            is_image,
            text_model.tokens_per_number,
            source,
            starts,
            prefix_rotary,
        )

    text_model._make_plan = make_plan
