# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
r"""
Cross attention (CrA): `multimodal_attention="cross"`, the other baseline of the paper (arXiv 2309.14327, section 4.1), which
was not released with it. The paper names Flamingo's design (arXiv 2204.14198) and describes it by what it costs: new
parameters. Here is that design, as it is built today.

A layer with cross attention begins with

    h ← h + tanh(gate) · W_O softmax(W_Q n_q(h) · W_K n_k(images)) W_V n_k(images)

and goes on as the decoder's own, whose attention is plain causal attention over text. In it

- `images` are the projected features of all images that stand before the text token, the same in every layer: they do not
  pass through the decoder. Flamingo and IDEFICS let a token see the last image alone, and Llama 3.2 Vision the last ones
  between which there is no text. A question of a chat may be about any image ("what differs between the first and the
  third?"), so here a token sees all of them, as in MMCA.
- A token before the first image gets exactly nothing.
- The gate begins at 0 (Flamingo, Llama 3.2 Vision): a joined model begins as its decoder, image or no image, and learns
  first to open the gates. The new matrices begin as the decoder's began, at random.
- `n_q` and `n_k` are RMSNorms of the block's own. The first is Flamingo's; the second gives keys and values the same scale
  whatever the projector and its initialization: it does for all heads what Llama 3.2 Vision's norm of keys does for each.
- The block has as many heads and key-value heads as the decoder's attention, and no biases. It is one attention without the
  feed-forward network that Flamingo, too, puts behind it, which is no part of how text looks at images: what the block adds
  in parameters is what it needs to look.
- There is no rotation: an image is at no distance from the text. Where within an image a token is, the tower's features say.
  Which image it is they cannot say. With `image_number_keys` the key of the image's number, W_K n_k(e_k), is added to the
  keys of its tokens, as in the other variants; the keys of text have no number.
- `cross_attention_every` n gives every n-th layer such a block, the n-th, the 2n-th, and so on (Llama 3.2 Vision has one in
  every fifth); 1, the default, gives all.

Placeholders stand in `input_ids` as in the other variants, and text keeps its positions, those of a sequence with
placeholders: a prompt is the same in each variant. But the layers carry the text tokens alone, and the output at a
placeholder is that of zeros. There is one way to compute this, which has the stream of text, the calls over image keys and
the kernels of MMCA's fast path (`modality_attention_visualchat.py`). There is no image memory, which saves the passes of
images through the decoder: here there are none.

A conversation without images is computed as the decoder computes it, and goes on here when the first image comes.

Shape letters: B batch, W tokens of the longest text, T text keys, I image keys, K one of both, H query heads, G key-value
heads, D head size, N image numbers, C hidden size.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import is_tracing

from .attention_visualchat import AttentionPlan, VisualChatAttention, VisualChatRMSNorm, is_packed
from .cross_cache_visualchat import CrossCacheLayer, StaticCrossCacheLayer
from .cross_weights_visualchat import CrossWeights, eager_softmax, eager_weights
from .decoder_layer_visualchat import VisualChatDecoderLayer
from .decoders_visualchat import find_head_dim
from .input_checks_visualchat import find_sequence_arguments
from .modality_attention_visualchat import ModalityPlan
from .modality_cache_visualchat import can_split_by_modality, get_modality_positions, split_cache_by_modality
from .modality_kernels_visualchat import ImageCall, attend_to_images, rotate, softmax, without_cudnn
from .modality_positions_visualchat import ModalityPositions


class VisualChatCrossAttention(nn.Module):
    """
    What a text token sees of the images before it.

    Args:
        config (`PreTrainedConfig`): The decoder's.
        layer_idx (`int`): Its index among the decoder's layers.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, find_head_dim(config)
        self.num_key_value_heads = config.num_key_value_heads
        self.scaling, self.attention_dropout = self.head_dim**-0.5, config.attention_dropout
        query_size, key_size = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.query_norm = VisualChatRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.image_norm = VisualChatRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        number_embeds: torch.Tensor | None,
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Of text, in the form of the plan.
            image_states (`torch.Tensor` of shape `(image tokens, hidden_size)`, *optional*): Projected features of the new
                images, of each once. `None`: there are none.
            number_embeds (`torch.Tensor` of shape `(N, hidden_size)`, *optional*): Embeddings of the numbers 1 to N.
            plan (`AttentionPlan`): A [`CrossPlan`]; or, where no image has been seen, another, under which nothing is added.
            past_key_values (`Cache`, *optional*): Keys after numbering, and values, of the images so far.

        Returns:
            What is added to `hidden_states`.
        """
        # All processes of a distributed run call the projections in this order, whatever their batches hold
        queries = self.q_proj(self.query_norm(hidden_states))
        keys = values = number_keys = None
        if image_states is not None:
            images = self.image_norm(image_states)
            keys, values = self.k_proj(images), self.v_proj(images)
        if number_embeds is not None:
            number_keys = pad(self.k_proj(self.image_norm(number_embeds)), (0, 0, 1, 0))
        if isinstance(plan, CrossPlan):
            seen = plan.look_at_images(self, queries, keys, values, number_keys, past_key_values)
        else:
            seen = see_nothing(queries, keys, values, number_keys)
        return self.gate.tanh() * self.o_proj(seen)


class VisualChatCrossDecoderLayer(VisualChatDecoderLayer):
    """
    The layer of a decoder of LLaMA's shape, with cross attention before it where `config.cross_attention_every` says so.

    Args:
        config (`PreTrainedConfig`): The decoder's.
        layer_idx (`int`): Its index among the layers.
        cross_attention_every (`int`): See [`VisualChatConfig`].
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, cross_attention_every: int = 1):
        super().__init__(config, layer_idx)
        has_cross_attention = (layer_idx + 1) % cross_attention_every == 0
        self.cross_attn = VisualChatCrossAttention(config, layer_idx) if has_cross_attention else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        number_embeds: torch.Tensor | None,
        image_states: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
        looks_at_images: bool = True,
        **kwargs,
    ) -> torch.Tensor:
        if self.cross_attn is not None and looks_at_images:
            seen = self.cross_attn(hidden_states, image_states, number_embeds, plan, past_key_values)
            hidden_states = hidden_states + seen
        return super().forward(hidden_states, None, position_embeddings, plan, past_key_values, **kwargs)


class CrossPlan(ModalityPlan):
    """
    The text tokens of a batch whose conversations hold images, in one stream. The arguments are those of a [`ModalityPlan`],
    of which `merged`, `memory`, `records`, `uses_flex` and `prefix` are not for this variant, and these.

    Args:
        is_eager (`bool`): Whether all scores are written out (`attn_implementation="eager"`).
        returns_weights (`bool`): Whether the weights of attention are then returned.
    """

    # Over the image keys, of all text tokens. Empty: none of them sees an image
    calls_of_text: tuple[tuple[slice, list[ImageCall]], ...] = ()

    def __init__(self, *args, is_eager: bool = False, returns_weights: bool = False, **kwargs):
        self.is_eager, self.weights = is_eager, None
        super().__init__(*args, **kwargs)
        if is_eager and returns_weights and not self.is_traced:
            positions, length = kwargs["positions"], self.shape[1]
            is_static = positions is not None and positions.is_compileable
            self.weights = CrossWeights(
                self.text.pad(self.text_index % length, length),
                self.text.pad(self._positions_of(self.text_index), -1),
                self._without_padding(self.text_positions_BT),
                self._without_padding(self.image_positions_BI),
                length,
                positions.max_cache_len if is_static else int(self.past_length) + length,
            )

    def for_last_layer(self, is_read: torch.BoolTensor) -> "CrossPlan":
        return self if self.weights is not None else super().for_last_layer(is_read)

    def _look(self, kept_text: torch.Tensor | None, keeps_images: bool) -> None:
        super()._look(kept_text, keeps_images=False)

    def _find_image_calls(self, *look: torch.Tensor) -> list[tuple[slice, list[ImageCall]]]:
        # The last layer's text keys are made of what all text tokens see, also of those that have no query there
        if self.kept_text is None:
            calls = super()._find_image_calls(*look)
            self.calls_of_text = tuple(calls) if any(call.count for _, part in calls for call in part) else ()
        return []

    def arrange(
        self, inputs_embeds: torch.Tensor, image_states: torch.Tensor | None, prefix_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().arrange(inputs_embeds, None)

    def go_on_from(self, in_order: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.arrange(in_order, None)

    def attend(
        self,
        attention: VisualChatAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        number_keys: None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        softmax_over: Callable,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Plain causal attention over text."""
        queries, keys, values = (
            states.view(-1, states.shape[-1] // attention.head_dim, attention.head_dim) for states in (queries, keys, values)
        )
        queries = attention.normalize_queries(queries)
        (keys,) = attention.normalize_keys(keys)
        q_BHWD = rotate(self.queries.pad(queries).transpose(1, 2), self.query_rotary)
        k_BGTD = rotate(self.text.pad(keys).transpose(1, 2), self.text_rotary)
        v_BGTD = self.text.pad(values).transpose(1, 2)
        if past_key_values is not None:
            cached = past_key_values.update(k_BGTD, v_BGTD, attention.layer_idx)
            if not self.begins:
                k_BGTD, v_BGTD = cached
        settings = _settings_of(attention)
        if self.weights is None:
            return self.attend_to_keys(q_BHWD, (k_BGTD,), (v_BGTD,), **settings).flatten(1)[None], None
        weights = eager_weights(q_BHWD, k_BGTD, self.mask, self.is_causal, **settings)
        output_BHWD, weights = self.weights.attend(weights, v_BGTD)
        return self.text.pack(output_BHWD.transpose(1, 2)).flatten(1)[None], weights

    def _attend_to_keys(self, q_BHWD, keys, values, **settings) -> torch.Tensor:
        output_BHWD = self._softmax(q_BHWD, keys[0], values[0], self.mask, self.is_causal, **settings)
        return self.queries.pack(output_BHWD.transpose(1, 2))

    def _softmax(self, *args, **settings) -> torch.Tensor:
        return eager_softmax(*args, **settings) if self.is_eager else softmax(*args, **settings)

    def look_at_images(
        self,
        attention: VisualChatCrossAttention,
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        number_keys: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """
        What text tokens see of the images before them.

        Args:
            attention (`VisualChatCrossAttention`): The block.
            queries (`torch.Tensor` of shape `(1, text tokens, heads * head_size)`): Projected.
            keys, values (`torch.Tensor` of shape `(image tokens, key-value heads * head_size)`, *optional*): Of the new
                images, of each once.
            number_keys (`torch.Tensor` of shape `(N + 1, key-value heads * head_size)`, *optional*): As
                [`~AttentionPlan.attend`] takes them.
            past_key_values (`Cache`, *optional*): The images so far. The new ones are added.

        Returns:
            `torch.Tensor` of the shape of `queries`.
        """
        heads = queries.shape[-1] // attention.head_dim
        q_BHWD = self.text.pad(queries.view(-1, heads, attention.head_dim)).transpose(1, 2)
        if keys is None:
            k_BGID = v_BGID = q_BHWD.new_empty(len(q_BHWD), attention.num_key_value_heads, 0, attention.head_dim)
        else:
            k_BGID, v_BGID = self._place_new_images(attention, keys, values, number_keys)
        if past_key_values is not None:
            k_BGID, v_BGID = past_key_values.update(k_BGID, v_BGID, attention.layer_idx, are_images=True)
        if not self.calls_of_text:
            return see_nothing(queries, keys, values, number_keys)
        if self.weights is not None:
            output_BHWD = self.weights.look_at_images(q_BHWD, k_BGID, v_BGID, **_settings_of(attention))
            return self.text.pack(output_BHWD.transpose(1, 2)).flatten(1)[None]
        is_on_gpu = q_BHWD.is_cuda and not torch.compiler.is_compiling()
        with without_cudnn() if is_on_gpu else nullcontext():
            output = self._call(q_BHWD, k_BGID, v_BGID, **_settings_of(attention))
        return output.flatten(1)[None]

    def _place_new_images(self, attention, keys, values, number_keys) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the new images where they stand, of shape BGID."""
        heads = keys.shape[-1] // attention.head_dim, attention.head_dim
        keys, values = keys.unflatten(-1, heads), values.unflatten(-1, heads)
        number_keys = number_keys.unflatten(-1, heads) if number_keys is not None else None
        keys, values = self._place_images(keys, values, number_keys, attention.layer_idx)
        return self.images.pad(keys).transpose(1, 2), self.images.pad(values).transpose(1, 2)

    def _call(self, q_BHWD: torch.Tensor, k_BGID: torch.Tensor, v_BGID: torch.Tensor, **settings: float) -> torch.Tensor:
        """By the calls over image keys, of shape `(text tokens, heads, head_size)`."""
        settings["attend"] = self._softmax
        if self.calls_of_text[0][0] == slice(None):
            output_BHWD = attend_to_images(self.calls_of_text[0][1], q_BHWD, k_BGID, v_BGID, **settings)
            return self.text.pack(output_BHWD.transpose(1, 2))
        of_sequences = [  # each without its padding
            attend_to_images(calls, q_BHWD[part], k_BGID[part], v_BGID[part], **settings)
            for part, calls in self.calls_of_text
        ]
        return torch.cat([output.transpose(1, 2).flatten(0, 1) for output in of_sequences])


def _settings_of(attention: VisualChatAttention | VisualChatCrossAttention) -> dict[str, float]:
    return {"scaling": attention.scaling, "dropout_p": attention.attention_dropout if attention.training else 0.0}


def see_nothing(queries: torch.Tensor, *images: torch.Tensor | None) -> torch.Tensor:
    """Exactly 0, of the shape of `queries`. All that was computed gets a gradient, as on the other processes of a run."""
    return 0.0 * queries + sum((0.0 * states).sum() for states in images if states is not None)


def make_cross_plan(
    decoder: nn.Module,
    is_image: torch.Tensor | None,
    attention_mask: torch.Tensor | BlockMask | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    batch_and_length: tuple[int, int],
    past_key_values: Cache | None,
    starts: torch.Tensor | None,
    **kwargs,
) -> CrossPlan:
    """
    The plan of a batch whose conversations hold images. Its cache is split by modality, if it is not yet.

    Args:
        decoder (`VisualChatTextModel`): The decoder.
        is_image, attention_mask, position_embeddings, batch_and_length, kwargs: As [`CrossPlan`] takes them.
        past_key_values (`Cache`, *optional*): The cache.
        starts (`torch.BoolTensor`, *optional*): What [`find_conversation_starts`] returned.

    Raises:
        ValueError: If conversations are packed, if a mask has 4 dimensions, if the cache is of another kind, or if the
            sequences of the batch have adapters of their own.
    """
    if not (attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)):
        raise ValueError(
            "multimodal_attention='cross' computes the text of a conversation with images without its placeholders, which an"
            " `attention_mask` of 4 dimensions counts: give one of 2 dimensions, or none"
        )
    if is_packed(starts, attention_mask):
        raise ValueError(
            "multimodal_attention='cross' takes one conversation with images in each sequence of a batch, but"
            " `position_ids` begin again within a sequence: pad the conversations instead of packing them"
        )
    if not is_tracing() and find_sequence_arguments(decoder):
        raise ValueError(
            "multimodal_attention='cross' takes one PEFT adapter for all sequences of a batch that holds images (no"
            " `adapter_names`)"
        )
    positions = get_modality_positions(past_key_values)
    # New images of a conversation with a cache are sorted as the data has it, outside of a graph
    if past_key_values is None or (is_image is None and positions is not None):
        make = CrossPlan
    else:
        make = _make_outside_of_graphs
    if past_key_values is not None and positions is None:
        device = position_embeddings[0].device
        positions = _split_cache(past_key_values, decoder.config.num_hidden_layers, batch_and_length[0], device)
    return make(
        is_image,
        attention_mask,
        position_embeddings,
        batch_and_length,
        decoder.tokens_per_number,
        positions=positions,
        is_eager=decoder.config._attn_implementation == "eager",
        **kwargs,
    )


@torch.compiler.disable
def _make_outside_of_graphs(*args, **kwargs) -> CrossPlan:
    return CrossPlan(*args, **kwargs)


@torch.compiler.disable
def _split_cache(cache: Cache, num_hidden_layers: int, batch_size: int, device: torch.device) -> ModalityPositions:
    if not can_split_by_modality(cache, num_hidden_layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ValueError(
            "multimodal_attention='cross' keeps the keys of text and of images apart, in a dynamic or a static cache, but"
            f" past_key_values consists of {kinds}: use another cache, or none"
        )
    classes = CrossCacheLayer, StaticCrossCacheLayer
    return split_cache_by_modality(cache, num_hidden_layers, batch_size, device, layer_classes=classes)
