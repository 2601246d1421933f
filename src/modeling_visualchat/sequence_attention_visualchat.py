# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
r"""
Multi-modal causal attention (MMCA): what one token may look at, and how the two modalities are put together.

For the query row i and a key j ≤ i that is not padding:

| variant       | image row i                    | text row i                                                        |
|---------------|--------------------------------|-------------------------------------------------------------------|
| `mmca`        | itself only: its output is V_i | softmax over text keys ≤ i  +  softmax over image keys ≤ i        |
| `mmca_merged` | itself only: its output is V_i | one softmax over all keys ≤ i                                     |
| `causal`      | one softmax over all keys ≤ i  | one softmax over all keys ≤ i                                     |

A text row before the first image gets exactly nothing from the second softmax of `mmca`. After it, the weights of a text
row sum to 2: the paper's definition (arXiv 2309.14327, section 4.1). `released_attention_visualchat.py` defines a fourth variant, what
the released code computes.

An image row never looks beyond itself in the first two variants, so an image's hidden states, keys (before rotation and
numbering) and values are a function of that image alone, in every layer.

This file is the definition: all rows in the order of the sequence, under masks. `modality_attention_visualchat.py` computes the same by
modality, many times faster; what its rows cannot express (quantized caches, `eager` and its weights, 4-dimensional
masks, packed sequences, a prefill that is compiled and fills a cache) is computed here.

Shape letters: B batch, Q new tokens, K all tokens that are seen (cached and new), H query heads, G key-value heads,
D head size, N image numbers, C hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from transformers import LlamaConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, repeat_kv

from .modality_attention_visualchat import ModalityLayout
from .modality_cache_visualchat import carry_image_numbers, get_image_numbers
from .modality_kernels_visualchat import rotate
from .released_attention_visualchat import ReleasedMask, create_released_mask


SUPPORTED_ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def check_attention_implementation(config: LlamaConfig) -> None:
    """
    Raises a `ValueError` that says what to use if the decoder is to run an attention backend that cannot express the masks
    of MMCA. `None` is the default, chosen by transformers.
    """
    implementation = config._attn_implementation
    if implementation is not None and implementation not in SUPPORTED_ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot compute multi-modal causal attention: choose one of"
            f" {', '.join(map(repr, SUPPORTED_ATTENTION_IMPLEMENTATIONS))} for the decoder (the vision tower may differ:"
            " attn_implementation={'text_config': …, 'vision_config': …})"
        )


class MultimodalMask(NamedTuple):
    """
    What the rows of one forward pass may look at. Masks are what the attention backend takes: boolean for `sdpa` (`None`
    where it may skip them), additive for `eager`, a `BlockMask` for `flex_attention`.

    Args:
        all_keys: All keys ≤ i. The only mask that exists where no image has been seen, and in the variants with one softmax.
        text_keys: Text keys ≤ i.
        image_keys: Image keys ≤ i.
        sees_image (`torch.BoolTensor` of shape `(batch_size, 1, sequence_length, 1)`): Whether row i has an image key ≤ i.
            `None` under `flex_attention`, which returns zeros for a row that sees nothing.
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The rows whose output is their own value.
            `None` if there are none.
        past_length (`int` or `torch.Tensor`): Where the new tokens stand among all tokens: the first is key `past_length`.
        backend (`str`): The attention implementation that the masks are made for.
    """

    all_keys: torch.Tensor | BlockMask | None = None
    text_keys: torch.Tensor | BlockMask | None = None
    image_keys: torch.Tensor | BlockMask | None = None
    sees_image: torch.Tensor | None = None
    is_image: torch.Tensor | None = None
    past_length: int | torch.Tensor = 0
    backend: str | None = None


def update_image_numbers(
    past_key_values: Cache | None,
    is_image_BQ: torch.Tensor | None,
    image_seq_length: int,
    batch_and_length: tuple[int, int],
    device: torch.device,
    begins_BQ: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Which image each token belongs to: 0 for text, k for the k-th image of its conversation.

    The first layer of the cache carries the numbers of cached tokens along, whichever class it is: what is done to a cache
    (beam reordering, cropping, repeating, selecting, resetting, copying) is done to them too.

    Args:
        past_key_values (`Cache`, *optional*): The cache, before the decoder's layers are updated. Extended in place.
        is_image_BQ (`torch.BoolTensor`, *optional*): The new tokens that belong to an image. `None`: all are text.
        image_seq_length (`int`): Tokens of one image.
        batch_and_length (`tuple[int, int]`): B and Q.
        device (`torch.device`): Where the numbers are needed.
        begins_BQ (`torch.BoolTensor`, *optional*): What [`find_conversation_starts`] returned.

    Returns:
        `numbers_BQ` of the new tokens and `numbers_BK` of all tokens (of the whole buffer, for a static cache); both `None`
        if no image has been seen.
    """
    cached = get_image_numbers(past_key_values)
    if is_image_BQ is None and cached is None:
        return None, None
    batch_size, length = batch_and_length
    if is_image_BQ is None:
        numbers_BQ = torch.zeros(batch_size, length, dtype=torch.int, device=device)
    else:
        seen_B1 = 0
        if cached is not None and cached.is_initialized:
            seen_B1 = (cached.keys[:, 0, :, 0] > 0).sum(-1, keepdim=True)
        tokens_BQ = seen_B1 + is_image_BQ.cumsum(-1)
        if begins_BQ is not None:  # less what stood before the token's own conversation
            tokens_BQ = tokens_BQ - ((tokens_BQ - is_image_BQ.int()) * begins_BQ).cummax(-1).values
        numbers_BQ = torch.div(tokens_BQ - 1, image_seq_length, rounding_mode="floor") + 1
        numbers_BQ = (numbers_BQ * is_image_BQ).int()
    if past_key_values is None:
        return numbers_BQ, numbers_BQ

    new_BQ = numbers_BQ
    if cached is None:
        past_length = int(past_key_values.get_seq_length())
        cached = carry_image_numbers(past_key_values)
        new_BQ = nn.functional.pad(numbers_BQ, (past_length, 0))  # what is cached so far is text
    new_B1Q1 = new_BQ[:, None, :, None]
    numbers_B1K1, _ = cached.update(new_B1Q1, new_B1Q1[..., :0])
    return numbers_BQ, numbers_B1K1[:, 0, :, 0]


def find_conversation_starts(
    position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | BlockMask | None, past_key_values: Cache | None
) -> torch.BoolTensor | None:
    """
    Where conversations that are packed into one row begin, of shape `(batch_size or 1, sequence_length)`. `None`: each row
    holds one. As in transformers, `position_ids` tell packed conversations apart if there is neither a 2-dimensional
    `attention_mask` nor a cache; under a 4-dimensional mask, which is the caller's own, one begins at each position 0.
    """
    if position_ids is None or past_key_values is not None:
        return None
    if attention_mask is None:
        return position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
    return position_ids == 0 if len(attention_mask.shape) == 4 else None


def create_multimodal_mask(
    multimodal_attention: str,
    config: LlamaConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    position_ids: torch.Tensor,
    past_key_values: Cache | None,
    numbers_BQ: torch.Tensor | None,
    numbers_BK: torch.Tensor | None,
) -> MultimodalMask | ReleasedMask:
    """
    Builds the masks of one forward pass, for every layer.

    Args:
        multimodal_attention (`str`): The variant.
        config (`LlamaConfig`): The decoder's. Its attention implementation is the one that the masks are made for.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): For shape, dtype and device.
        attention_mask (`torch.Tensor`, *optional*): Of shape `(batch_size, tokens seen)` with 0 for padding, or a prepared
            4-dimensional mask.
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Positions of the new tokens.
        past_key_values (`Cache`, *optional*): The cache, before the decoder's layers are updated.
        numbers_BQ, numbers_BK (`torch.IntTensor`, *optional*): What [`update_image_numbers`] returned.
    """
    backend = config._attn_implementation
    two_softmaxes = multimodal_attention in ("mmca", "mmca_released") and numbers_BK is not None
    all_keys = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        allow_is_causal_skip=not two_softmaxes,
    )
    if numbers_BK is None or multimodal_attention == "causal":
        return MultimodalMask(all_keys, backend=backend)
    is_image_BQ = numbers_BQ > 0
    # A copy: a static cache counts in place
    past_length = past_key_values.get_seq_length() + 0 if past_key_values is not None else 0
    if multimodal_attention == "mmca_released":
        return create_released_mask(all_keys, is_image_BQ, past_length, inputs_embeds.dtype, backend)
    if not two_softmaxes:
        return MultimodalMask(all_keys, is_image=is_image_BQ, past_length=past_length, backend=backend)
    text_keys, _ = _restrict(all_keys, numbers_BK == 0)
    image_keys, sees_image_B1Q1 = _restrict(all_keys, numbers_BK > 0)
    return MultimodalMask(None, text_keys, image_keys, sees_image_B1Q1, is_image_BQ, past_length, backend)


def _restrict(mask: torch.Tensor | BlockMask, keep_BK: torch.Tensor) -> tuple[torch.Tensor | BlockMask, torch.Tensor | None]:
    """
    The mask over the kept keys only, and which rows still see a key. A row that sees none is opened to all keys, because a
    softmax over nothing is NaN in some kernels, and its gradient in more of them; the caller drops what such a row gets.
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


def eager_attention(
    module: nn.Module,
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One softmax over the keys that `attention_mask` leaves: the definition that every other backend must equal. Returns the
    output of shape `(batch_size, sequence_length, heads, head_size)` and the weights of shape BHQK.
    """
    k_BHKD = repeat_kv(k_BGKD, module.num_key_value_groups)
    v_BHKD = repeat_kv(v_BGKD, module.num_key_value_groups)
    scores_BHQK = q_BHQD @ k_BHKD.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHQK = scores_BHQK + attention_mask
    softmax_dtype = torch.promote_types(scores_BHQK.dtype, torch.float32)
    weights_BHQK = scores_BHQK.softmax(-1, dtype=softmax_dtype).to(q_BHQD.dtype)
    weights_BHQK = nn.functional.dropout(weights_BHQK, p=dropout, training=module.training)
    return (weights_BHQK @ v_BHKD).transpose(1, 2).contiguous(), weights_BHQK


class VisualChatAttention(LlamaAttention):
    """
    LLaMA's attention (same weights, same names) with multi-modal causal attention in place of plain causal attention.

    Args:
        config (`LlamaConfig`): The decoder's.
        layer_idx (`int`): Its place among the layers.
        image_number_key_bias (`bool`): See [`VisualChatConfig`].
    """

    def __init__(self, config: LlamaConfig, layer_idx: int, image_number_key_bias: bool = False):
        super().__init__(config, layer_idx)
        self.image_number_key_bias = image_number_key_bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: MultimodalMask | ReleasedMask | ModalityLayout,
        past_key_values: Cache | None = None,
        number_states_NC: torch.Tensor | None = None,
        image_numbers_BQ: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The normalized input.
                With a layout, its stream, of shape `(1, text and image rows, hidden_size)`.
            position_embeddings (`tuple` of two `torch.Tensor`): cos and sin of the rotary embedding.
            attention_mask (`MultimodalMask`, `ReleasedMask` or `ModalityLayout`): What each row may look at.
            past_key_values (`Cache`, *optional*): Keys after rotation and numbering, and values.
            number_states_NC (`torch.Tensor`, *optional*): The normalized embeddings of the numbers 1 to N. Their keys are
                added to the keys of the images with these numbers, before the rotation.
            image_numbers_BQ (`torch.IntTensor`, *optional*): The image that each row belongs to, 0 for text.

        Returns:
            The output, shaped like `hidden_states` (with a layout, of the rows that it keeps), and with `eager` the weights
            of shape `(batch_size, heads, sequence_length, keys)`.
        """
        if isinstance(attention_mask, ModalityLayout):
            return self._forward_by_modality(hidden_states, attention_mask, past_key_values, number_states_NC), None
        input_shape = hidden_states.shape[:-1]
        heads_shape = (*input_shape, -1, self.head_dim)
        key_states = self.k_proj(hidden_states)
        if number_states_NC is not None:
            number_keys = self._project_numbers(number_states_NC)
            key_states = key_states + number_keys[image_numbers_BQ.long()]  # ONNX takes no other index

        q_BHQD = self.q_proj(hidden_states).view(heads_shape).transpose(1, 2)
        k_BGQD = key_states.view(heads_shape).transpose(1, 2)
        v_BGQD = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        q_BHQD, k_BGQD = apply_rotary_pos_emb(q_BHQD, k_BGQD, *position_embeddings)

        k_BGKD, v_BGKD = k_BGQD, v_BGQD
        if past_key_values is not None:
            k_BGKD, v_BGKD = past_key_values.update(k_BGQD, v_BGQD, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(attention_mask.backend, eager_attention)

        def softmax_over(mask):
            return attend(
                self,
                q_BHQD,
                k_BGKD,
                v_BGKD,
                mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )

        if isinstance(attention_mask, ReleasedMask):
            output_BQHD, weights = attention_mask.attend(softmax_over, repeat_kv(v_BGKD, self.num_key_value_groups))
            return self.o_proj(output_BQHD.reshape(*input_shape, -1)), weights
        if attention_mask.image_keys is None:
            output_BQHD, weights = softmax_over(attention_mask.all_keys)
        else:
            output_BQHD, weights = softmax_over(attention_mask.text_keys)
            image_BQHD, image_weights = softmax_over(attention_mask.image_keys)
            sees_image_B1Q1 = attention_mask.sees_image
            if sees_image_B1Q1 is not None:
                image_BQHD = image_BQHD * sees_image_B1Q1.transpose(1, 2)
            output_BQHD = output_BQHD + image_BQHD
            if image_weights is not None:
                weights = weights + image_weights * sees_image_B1Q1

        if attention_mask.is_image is not None:
            is_image_BQ = attention_mask.is_image
            if weights is None:
                own_values_BQHD = repeat_kv(v_BGQD, self.num_key_value_groups).transpose(1, 2)
                output_BQHD = torch.where(is_image_BQ[:, :, None, None], own_values_BQHD, output_BQHD)
            else:
                keys_K = torch.arange(weights.shape[-1], device=weights.device)
                own_key_Q = torch.arange(weights.shape[-2], device=weights.device) + attention_mask.past_length
                self_only_QK = (own_key_Q[:, None] == keys_K).to(weights.dtype)
                weights = torch.where(is_image_BQ[:, None, :, None], self_only_QK, weights)
                # The output is made of the weights that are returned, so that they have gradients
                output_BQHD = (weights @ repeat_kv(v_BGKD, self.num_key_value_groups)).transpose(1, 2)

        return self.o_proj(output_BQHD.reshape(*input_shape, -1).contiguous()), weights

    def _forward_by_modality(
        self,
        stream: torch.Tensor,
        layout: ModalityLayout,
        past_key_values: Cache | None,
        number_states_NC: torch.Tensor | None,
    ) -> torch.Tensor:
        # Each projection takes the rows of both modalities in one product, and is called in the order of the other path: the
        # processes of a distributed run must agree on it, whatever their batches hold
        number_keys = None
        keys = self._split_heads(self.k_proj(stream))
        if number_states_NC is not None:
            number_keys = self._split_heads(self._project_numbers(number_states_NC))
        queries = self._split_heads(self.q_proj(layout.keep_text(stream)))
        values = self._split_heads(self.v_proj(stream))

        text_keys, own_keys = layout.split(keys)
        if number_keys is not None and len(layout.image_rows) == 0:  # their gradient, as on the other processes
            text_keys = text_keys + number_keys[:1]
        text_values, own_values = layout.split(values)
        image_keys, image_values = layout.place_images(own_keys, own_values, number_keys, self.layer_idx)
        text_keys = rotate(layout.text.pad(text_keys).transpose(1, 2), layout.text_rotary)
        text_values = layout.text.pad(text_values).transpose(1, 2)
        all_keys, all_values = (text_keys, image_keys), (text_values, image_values)
        if past_key_values is not None:
            cached = past_key_values.update(
                text_keys, text_values, self.layer_idx, image_key_states=image_keys, image_value_states=image_values
            )
            if not layout.begins:
                all_keys, all_values = cached
        output = layout.attend(
            rotate(layout.queries.pad(queries).transpose(1, 2), layout.query_rotary),
            all_keys,
            all_values,
            scaling=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
        ).flatten(1)
        if layout.keeps_images and len(own_values) > 0:  # an image row's output is its value
            if self.num_key_value_groups > 1:
                own_values = own_values.repeat_interleave(self.num_key_value_groups, dim=1)
            output = torch.cat([output, own_values.flatten(1)])
        return self.o_proj(output[None])

    def _project_numbers(self, number_states_NC: torch.Tensor) -> torch.Tensor:
        """
        What is added to the keys of text (row 0: nothing) and of the images 1 to N: W_K norm(e). The keys have the bias of
        `k_proj` already, where it has one.
        """
        number_keys = self.k_proj(nn.functional.pad(number_states_NC, (0, 0, 1, 0)))
        nothing = number_keys[:1]  # k_proj(0), its bias
        if self.image_number_key_bias:
            return torch.cat([nothing - nothing, number_keys[1:]])
        return number_keys - nothing

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(-1, projected.shape[-1] // self.head_dim, self.head_dim)
