# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
r"""
Multi-modal causal attention (MMCA), its definition: what a token attends to, and how text and images are combined.

For the query of token i and a key j ≤ i that is not padding:

| variant       | image token i                  | text token i                                                      |
|---------------|--------------------------------|-------------------------------------------------------------------|
| `mmca`        | itself only: its output is V_i | softmax over text keys ≤ i  +  softmax over image keys ≤ i        |
| `mmca_merged` | itself only: its output is V_i | one softmax over all keys ≤ i                                     |
| `causal`      | one softmax over all keys ≤ i  | one softmax over all keys ≤ i                                     |

A text token before the first image gets exactly nothing from the second softmax of `mmca`. After it, the weights of a text
token sum to 2: the paper's definition (arXiv 2309.14327, section 4.1). `released_attention_visualchat.py` defines a fourth
variant, what the released code computes.

An image token never attends beyond itself in the first two variants, so an image's hidden states, keys (before rotation and
numbering) and values are a function of that image alone, in every layer.

With an image prefix of P constant tokens, "itself only" becomes one softmax over the keys of the prefix, at positions 0 to
P - 1, and its own, which is at position P and has no number. The prefix is causal text, and no other token attends to it.
What is said above of an image holds.

Here all tokens stand in the order of the sequence, under masks. The fast path computes the same many times faster; what it
cannot express is computed here: `eager` and its weights, quantized caches, 4-dimensional masks, packed sequences, a compiled
prefill that fills a cache.

Shape letters: B batch, Q new tokens, K all tokens that are seen (cached and new), P tokens of the prefix, N both of P and Q,
H query heads, G key-value heads, D head size, C hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from .attention_visualchat import AttentionPlan, VisualChatAttention
from .sequence_cache_visualchat import update_image_numbers


class SequencePlan(AttentionPlan):
    """
    All tokens in the order of the sequence, under masks: the definition.

    Args:
        multimodal_attention (`str`): The variant.
        config (`PreTrainedConfig`): The decoder's. Its attention implementation is the one that the masks are made for.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): For shape, dtype and device.
        attention_mask (`torch.Tensor`, *optional*): Of shape `(batch_size, tokens seen)` with 0 for padding, or a prepared
            4-dimensional mask.
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Positions of the new tokens.
        past_key_values (`Cache`, *optional*): The cache, before the decoder's layers are updated. The image numbers of the
            new tokens are added to it.
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The new tokens that belong to an
            image. `None`: all of them are text.
        image_seq_length (`int`): Tokens that share a number in `image_numbers`: those of one image, or each alone.
        image_source (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which image token each placeholder stands
            for. `None`: its own, in order.
        starts (`torch.BoolTensor`, *optional*): What [`find_conversation_starts`] returned.
        prefix_rotary (`tuple` of two `torch.Tensor`, *optional*): cos and sin of shape `(1, P + 1, head_size)` of an image
            prefix, which stands before the tokens of each sequence. `None`: there is none, or no new image.

    Attributes:
        all_keys: All keys ≤ i. Masks are what the attention backend takes: boolean for `sdpa` (`None` where it may skip
            them), additive for `eager`, a `BlockMask` for `flex_attention`. The only mask that exists where no image has
            been seen, and in the variants with one softmax.
        text_keys, image_keys: Text keys ≤ i, and image keys ≤ i.
        sees_image (`torch.BoolTensor` of shape `(batch_size, 1, sequence_length, 1)`): Whether token i has an image key ≤ i.
            `None` under `flex_attention`, which returns zeros for a query that sees nothing.
        sees_itself_only (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The tokens whose output is their own
            value, or with an image prefix what they see of both. `None` if there are none.
        past_length (`int` or `torch.Tensor`): Cached tokens: the first new token is key `past_length`.
    """

    def __init__(
        self,
        multimodal_attention: str,
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
        is_image: torch.Tensor | None,
        image_seq_length: int,
        image_source: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        prefix_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.device, self.backend = inputs_embeds.device, config._attn_implementation
        self.is_image, self.image_source, self.image_seq_length = is_image, image_source, image_seq_length
        self.prefix_rotary = prefix_rotary
        self.prefix_length = prefix_rotary[0].shape[1] - 1 if prefix_rotary is not None else 0
        self.all_keys = self.text_keys = self.image_keys = self.sees_image = self.sees_itself_only = None
        self.image_numbers, numbers_BK = update_image_numbers(
            past_key_values, is_image, image_seq_length, inputs_embeds.shape[:2], self.device, starts
        )
        # A copy: a static cache counts in place
        self.past_length = past_key_values.get_seq_length() + 0 if past_key_values is not None else 0
        has_two_softmaxes = multimodal_attention in ("mmca", "mmca_released") and numbers_BK is not None
        all_keys = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=not has_two_softmaxes,
        )
        if has_two_softmaxes:
            self._split_keys(all_keys, numbers_BK, inputs_embeds.dtype)
        else:
            self.all_keys = all_keys
        if numbers_BK is not None and multimodal_attention in ("mmca", "mmca_merged"):
            self.sees_itself_only = self.image_numbers > 0

    def _split_keys(self, all_keys: torch.Tensor | BlockMask, numbers_BK: torch.Tensor, dtype: torch.dtype) -> None:
        """Makes the masks of the two softmaxes."""
        self.text_keys, _ = _restrict(all_keys, numbers_BK == 0)
        self.image_keys, self.sees_image = _restrict(all_keys, numbers_BK > 0)

    def arrange(
        self, inputs_embeds: torch.Tensor, image_states: torch.Tensor | None, prefix_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        if image_states is None:
            return inputs_embeds
        hidden_states = inputs_embeds.masked_scatter(self.is_image[..., None], self._find_images(image_states))
        if self.prefix_rotary is None:
            return hidden_states
        return torch.cat([prefix_embeds.expand(len(hidden_states), -1, -1), hidden_states], dim=1)

    def _find_images(self, image_states: torch.Tensor) -> torch.Tensor:
        """The image states of all placeholders, in reading order."""
        return image_states if self.image_source is None else image_states[self.image_source]

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.prefix_rotary is None else hidden_states[:, self.prefix_length :]

    def go_on_from(self, in_order: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.prefix_rotary is None:
            return hidden_states
        return torch.cat([hidden_states[:, : self.prefix_length], in_order], dim=1)

    def attend(
        self,
        attention: VisualChatAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        number_keys: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        softmax_over: Callable,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        own_keys = keys
        if number_keys is not None and self.image_numbers is None:  # all is text
            keys = keys + number_keys[:1]
        elif number_keys is not None:
            numbers = self.image_numbers
            if self.prefix_rotary is not None:
                numbers = nn.functional.pad(numbers, (self.prefix_length, 0))
            keys = keys + number_keys[numbers.long()]  # ONNX takes no other index
        q_BQHD, k_BQGD, v_BQGD, own_k_BQGD = (
            states.view(*states.shape[:-1], -1, attention.head_dim) for states in (queries, keys, values, own_keys)
        )
        q_BQHD = attention.normalize_queries(q_BQHD)
        prefix_output, seen = None, None
        if self.prefix_rotary is None:
            (k_BQGD,) = attention.normalize_keys(k_BQGD)
        else:
            k_BQGD, own_k_BQGD = attention.normalize_keys(k_BQGD, own_k_BQGD)
            prefix_output, *seen = self._attend_to_prefix(attention, q_BQHD, own_k_BQGD, v_BQGD)
            q_BQHD, k_BQGD, v_BQGD = (states[:, self.prefix_length :] for states in (q_BQHD, k_BQGD, v_BQGD))
        q_BHQD, k_BGQD, v_BGQD = (states.transpose(1, 2) for states in (q_BQHD, k_BQGD, v_BQGD))
        q_BHQD, k_BGQD = apply_rotary_pos_emb(q_BHQD, k_BGQD, *position_embeddings)
        k_BGKD, v_BGKD = k_BGQD, v_BGQD
        if past_key_values is not None:
            k_BGKD, v_BGKD = past_key_values.update(k_BGQD, v_BGQD, attention.layer_idx)

        output_BQHD, weights = self._combine(
            partial(softmax_over, q_BHQD, k_BGKD, v_BGKD), v_BGKD, attention.num_key_value_groups
        )
        if self.sees_itself_only is not None:
            output_BQHD, weights = self._see_itself(
                output_BQHD, weights, v_BGQD, v_BGKD, attention.num_key_value_groups, seen
            )
        if prefix_output is not None:
            output_BQHD = torch.cat([prefix_output, output_BQHD], dim=1)
        return output_BQHD.reshape(*queries.shape).contiguous(), weights

    def _attend_to_prefix(
        self, attention: VisualChatAttention, q_BNHD: torch.Tensor, k_BNGD: torch.Tensor, v_BNGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        What the tokens of the prefix see, and what each new token would see as an image's does: the prefix and itself.

        Args:
            attention (`VisualChatAttention`): The layer.
            q_BNHD, k_BNGD, v_BNGD (`torch.Tensor`): Before the rotation, the keys without the images' numbers. The prefix
                comes first.

        Returns:
            The output of the prefix (BPHD); and of the new tokens, what comes from the prefix (BQHD), and the weights of
            their own values in the same softmax (BHQ1).
        """
        length, (cos, sin) = self.prefix_length, self.prefix_rotary
        positions_N = torch.arange(q_BNHD.shape[1], device=q_BNHD.device).clamp(max=length)
        q_BHND, k_BGND = apply_rotary_pos_emb(
            q_BNHD.transpose(1, 2), k_BNGD.transpose(1, 2), cos[:, positions_N], sin[:, positions_N]
        )
        k_BHND, v_BHND = (repeat_kv(states, attention.num_key_value_groups) for states in (k_BGND, v_BNGD.transpose(1, 2)))
        softmax_dtype = torch.promote_types(q_BHND.dtype, torch.float32)
        is_earlier_NP = torch.arange(length, device=q_BHND.device) < positions_N[:, None]
        scores_BHNP = (q_BHND @ k_BHND[:, :, :length].transpose(2, 3)).masked_fill(~is_earlier_NP, float("-inf"))
        own_scores_BHN1 = (q_BHND.to(softmax_dtype) * k_BHND).sum(-1, keepdim=True)
        scores = torch.cat([scores_BHNP.to(softmax_dtype), own_scores_BHN1], dim=-1) * attention.scaling
        weights = scores.softmax(-1).to(q_BHND.dtype)
        weights = nn.functional.dropout(weights, p=attention.attention_dropout, training=attention.training)
        weights_BHNP, own_weights_BHN1 = weights.split([length, 1], dim=-1)
        of_prefix_BHND = weights_BHNP @ v_BHND[:, :, :length]
        output_BHPD = (of_prefix_BHND + own_weights_BHN1 * v_BHND)[:, :, :length]
        return output_BHPD.transpose(1, 2), of_prefix_BHND[:, :, length:].transpose(1, 2), own_weights_BHN1[:, :, length:]

    def _combine(
        self, softmax_over: Callable, v_BGKD: torch.Tensor, num_key_value_groups: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The output of all tokens that see others.

        Args:
            softmax_over (`Callable`): Takes a mask, returns the output (BQHD) and with `eager` the weights (BHQK).
            v_BGKD (`torch.Tensor`): The values of all tokens.
            num_key_value_groups (`int`): H / G.

        Returns:
            As `softmax_over`.
        """
        if self.image_keys is None:
            return softmax_over(self.all_keys)
        output_BQHD, weights = softmax_over(self.text_keys)
        image_BQHD, image_weights = softmax_over(self.image_keys)
        if self.sees_image is not None:
            image_BQHD = image_BQHD * self.sees_image.transpose(1, 2)
        output_BQHD = output_BQHD + image_BQHD
        if image_weights is not None:
            weights = weights + image_weights * self.sees_image
        return output_BQHD, weights

    def _see_itself(
        self,
        output_BQHD: torch.Tensor,
        weights: torch.Tensor | None,
        v_BGQD: torch.Tensor,
        v_BGKD: torch.Tensor,
        num_key_value_groups: int,
        seen: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Puts in the output of the tokens that see only themselves and the prefix.

        Args:
            output_BQHD, weights: What `_combine` returned.
            v_BGQD, v_BGKD (`torch.Tensor`): The values of the new tokens, and of all tokens.
            num_key_value_groups (`int`): H / G.
            seen (`tuple` of two `torch.Tensor`, *optional*): What comes from the prefix (BQHD), and the weights of the
                tokens' own values (BHQ1). `None`: there is no prefix, and these weights are 1.

        Returns:
            As `_combine`. The prefix has no column among the weights.
        """
        is_alone_BQ11 = self.sees_itself_only[:, :, None, None]
        if weights is None:
            own_BQHD = repeat_kv(v_BGQD, num_key_value_groups).transpose(1, 2)
            if seen is not None:
                own_BQHD = seen[0] + seen[1].transpose(1, 2) * own_BQHD
            return torch.where(is_alone_BQ11, own_BQHD, output_BQHD), None
        keys_K = torch.arange(weights.shape[-1], device=weights.device)
        own_key_Q = torch.arange(weights.shape[-2], device=weights.device) + self.past_length
        own_weights = (own_key_Q[:, None] == keys_K).to(weights.dtype)
        if seen is not None:
            own_weights = own_weights * seen[1]
        weights = torch.where(is_alone_BQ11.transpose(1, 2), own_weights, weights)
        # The output is made of the weights that are returned, so that they have gradients
        output_BQHD = (weights @ repeat_kv(v_BGKD, num_key_value_groups)).transpose(1, 2)
        return output_BQHD if seen is None else output_BQHD + seen[0].masked_fill(~is_alone_BQ11, 0), weights


def _restrict(mask: torch.Tensor | BlockMask, keep_BK: torch.Tensor) -> tuple[torch.Tensor | BlockMask, torch.Tensor | None]:
    """
    The mask over the kept keys only, and which queries still see a key. A query that sees none is opened to all keys,
    because a softmax over nothing is NaN in some kernels, and its gradient in more of them; the caller drops what it gets.
    """
    if isinstance(mask, BlockMask):

        def keeps(batch_idx, head_idx, q_idx, kv_idx):
            return keep_BK[batch_idx, kv_idx]

        query_length, key_length = mask.seq_lengths
        restricted = create_block_mask(
            and_masks(mask.mask_mod, keeps), keep_BK.shape[0], None, query_length, key_length, device=keep_BK.device
        )
        return restricted, None
    keep_B11K = keep_BK[:, None, None, :]
    if mask.dtype == torch.bool:
        visible = mask & keep_B11K
        sees_B1Q1 = visible.any(-1, keepdim=True)
        return visible | ~sees_B1Q1, sees_B1Q1
    lowest = torch.finfo(mask.dtype).min
    additive = mask.masked_fill(~keep_B11K, lowest)
    sees_B1Q1 = (additive > lowest).any(-1, keepdim=True)
    return additive.masked_fill(~sees_B1Q1, 0), sees_B1Q1
