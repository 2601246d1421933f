# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The decoder: one of LLaMA's shape, with multi-modal causal attention in place of plain causal attention."""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_tracing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_visualchat import (
    AttentionPlan,
    LearnedImageNumbers,
    VisualChatAttention,
    VisualChatRMSNorm,
    find_conversation_starts,
    is_packed,
)
from .configuration_visualchat import VisualChatConfig
from .cross_attention_visualchat import CrossPlan, VisualChatCrossAttention, VisualChatCrossDecoderLayer, make_cross_plan
from .decoder_layer_visualchat import SequenceOrder, VisualChatDecoderLayer
from .distributed_visualchat import gathers_weights
from .input_checks_visualchat import check_attention_implementation, check_image_numbers, find_sequence_arguments
from .modality_attention_visualchat import ModalityPlan
from .modality_cache_visualchat import can_split_by_modality, get_modality_positions, split_cache_by_modality
from .modality_kernels_visualchat import computes_by_flex
from .modality_prefix_visualchat import ImagePrefix
from .released_attention_visualchat import ReleasedPlan
from .sequence_attention_visualchat import SequencePlan


class VisualChatTextModel(PreTrainedModel):
    """
    A decoder of LLaMA's shape with multi-modal causal attention. Its config and the names of its parameters are those of its
    family's model in transformers, for example a [`~transformers.LlamaModel`].
    """

    config: PreTrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualChatDecoderLayer", "VisualChatCrossDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SequenceOrder, "attentions": VisualChatAttention}

    def __init__(self, config: VisualChatConfig):
        super().__init__(config.text_config)
        self.multimodal_attention, self.is_plain_causal = config.multimodal_attention, config.is_plain_causal
        self.image_seq_length, self.max_image_number = config.image_seq_length, config.max_image_number
        # Learned numbers tell the tokens of an image apart: there, each token has a number of its own
        self.tokens_per_number = 1 if config.learned_image_numbers else config.image_seq_length
        text_config = config.text_config
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size, text_config.pad_token_id)
        make_layer = partial(
            VisualChatDecoderLayer,
            image_number_key_bias=config.image_number_key_bias,
            learned_image_numbers=config.learned_image_numbers,
            image_seq_length=config.image_seq_length,
        )
        if self.multimodal_attention == "cross":
            make_layer = partial(VisualChatCrossDecoderLayer, cross_attention_every=config.cross_attention_every)
        self.layers = nn.ModuleList([make_layer(text_config, index) for index in range(text_config.num_hidden_layers)])
        self.norm = VisualChatRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(text_config)
        self.sequence_order = SequenceOrder()
        self.sdpa_config = copy.copy(text_config)
        self.sdpa_config._attn_implementation = "sdpa"
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LearnedImageNumbers):
            nn.init.zeros_(module.weight)
        if isinstance(module, VisualChatCrossAttention):
            nn.init.zeros_(module.gate)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_image: torch.BoolTensor | None = None,
        image_states: torch.Tensor | None = None,
        image_source: torch.LongTensor | None = None,
        image_memory: Sequence = (),
        number_embeds: torch.Tensor | None = None,
        numbers_images: bool = False,
        prefix_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        tokens_to_keep: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens, in place of
                `inputs_embeds`.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*): Text
                embeddings. Those at image placeholders are not read.
            is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The tokens that belong to an
                image. `None`: all of them are text.
            image_states (`torch.Tensor` of shape `(image tokens, hidden_size)`, *optional*): Projected features, of each
                image once.
            image_source (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which token of `image_states`, or after
                them of `image_memory`, each placeholder stands for, in reading order. `None`: its own.
            image_memory (`Sequence[ImageMemory]`): Images whose keys and values are known.
            number_embeds (`torch.Tensor` of shape `(numbers, hidden_size)`, *optional*): Embeddings of the numbers 1, 2, ….
                Without images they have no effect.
            numbers_images (`bool`): Whether the batch brings images, or has to seem so, to be numbered by learned numbers.
            prefix_embeds (`torch.Tensor` of shape `(tokens, hidden_size)`, *optional*): Embeddings of the image prefix.
                Without new images they have no effect.
            tokens_to_keep (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The tokens whose last
                hidden state is read. The others may be zero.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`")
        check_attention_implementation(self.config, self.multimodal_attention, self.is_plain_causal)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        starts = find_conversation_starts(position_ids, attention_mask, past_key_values)
        # A cache does not keep packed conversations apart, so none of them could be continued from it
        if use_cache and past_key_values is None and not is_packed(starts, attention_mask):
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if is_image is not None:
            packed = is_packed(starts, attention_mask)
            self.check_length(int(position_ids.max()) + 1 if packed else inputs_embeds.shape[1], past_length)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
        prefix_rotary = None
        if prefix_embeds is not None:
            # Before the call for the sequence: frequencies that depend on the length are those of short texts
            prefix_rotary = self.rotate_prefix(prefix_embeds)
            if image_states is None or not (is_tracing() or len(image_states) > 0):
                # No new image: it is called, and gets a gradient, as on the other processes of a distributed run
                prefix_rotary, inputs_embeds = None, inputs_embeds + 0.0 * prefix_embeds.sum()
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        plan = self._make_plan(
            inputs_embeds,
            is_image,
            image_states,
            image_source,
            image_memory,
            attention_mask,
            position_ids,
            position_embeddings,
            past_key_values,
            starts,
            prefix_rotary,
            kwargs.get("output_attentions", self.config.output_attentions),
        )
        check_image_numbers(plan.image_numbers, self.max_image_number, self.image_seq_length // self.tokens_per_number)
        plans = [plan] * len(self.layers)
        records = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if tokens_to_keep is not None and not records and not is_tracing():
            plans[-1] = plan.for_last_layer(tokens_to_keep)

        hidden_states = plan.arrange(inputs_embeds, image_states, prefix_embeds)
        if records:
            in_order = plan.restore(hidden_states)
            hidden_states = plan.go_on_from(in_order, hidden_states)
        sources = (number_embeds,)
        if self.multimodal_attention == "cross":
            is_cross = isinstance(plan, CrossPlan)
            if numbers_images and not is_cross:  # the dummy image of a distributed run
                image_states = inputs_embeds.new_zeros(self.image_seq_length, inputs_embeds.shape[-1])
            sources = (number_embeds, image_states)
            kwargs["looks_at_images"] = is_cross or numbers_images or gathers_weights(self.layers[0])
        for layer, plan in zip(self.layers, plans):
            # By position: what needs a gradient. Reentrant gradient checkpointing does not see keyword arguments
            hidden_states = layer(
                hidden_states,
                *sources,
                position_embeddings=position_embeddings,
                plan=plan,
                position_ids=position_ids,
                past_key_values=past_key_values,
                numbers_images=numbers_images,
                **kwargs,
            )
            if records:
                in_order = self.sequence_order(in_order, hidden_states, plan)
                hidden_states = plan.go_on_from(in_order, hidden_states)
        hidden_states = plan.restore(self.norm(hidden_states))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def rotate_prefix(self, prefix_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, of shape `(1, P + 1, head_size)`, of an image prefix of P tokens and of the image behind it."""
        positions = torch.arange(len(prefix_embeds) + 1, device=prefix_embeds.device)
        return self.rotary_emb(prefix_embeds, positions[None])

    @torch.no_grad()
    def encode_images(
        self, image_states: torch.Tensor, prefix_embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The keys, before rotation and numbering, and the values of images in every layer.

        Args:
            image_states (`torch.Tensor` of shape `(images, image_seq_length, hidden_size)`): Projected features.
            prefix_embeds (`torch.Tensor` of shape `(tokens, hidden_size)`, *optional*): Embeddings of the image prefix.

        Returns:
            Both of shape `(layers, images, image_seq_length, key-value heads, head_size)`.
        """
        images, length = image_states.shape[:2]
        is_image = torch.ones(1, images * length, dtype=torch.bool, device=image_states.device)
        prefix = ImagePrefix(self.rotate_prefix(prefix_embeds), images * length) if prefix_embeds is not None else None
        position_embeddings = self.rotary_emb(image_states, torch.zeros_like(is_image, dtype=torch.long))
        plan = ModalityPlan(
            is_image,
            None,
            position_embeddings,
            is_image.shape,
            length,
            records=True,
            num_placeholders=images * length,
            prefix=prefix,
        )
        plans = [plan] * len(self.layers)
        plans[-1] = plan.for_last_layer(torch.zeros_like(is_image))  # its output is not needed
        hidden_states = plan.arrange(image_states.flatten(0, 1)[None], image_states.flatten(0, 1), prefix_embeds)
        for layer, plan in zip(self.layers, plans):
            hidden_states = layer(hidden_states, None, position_embeddings=position_embeddings, plan=plan)
        keys, values = zip(*plan.recorded)
        return torch.stack(keys).unflatten(1, (images, length)), torch.stack(values).unflatten(1, (images, length))

    def takes_padding_mask(self, attention_mask: torch.Tensor | None) -> bool:
        """Whether images are computed apart from text by such a mask of 2 dimensions, also where the cache is static."""
        return self.multimodal_attention == "cross" or self.can_split_modalities(attention_mask)

    def can_split_modalities(self, attention_mask: torch.Tensor | BlockMask | None) -> bool:
        """Whether the fast path can compute attention with such a mask."""
        is_own = self.multimodal_attention in ("mmca", "mmca_merged")
        is_plain = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)
        return is_own and is_plain and self.config._attn_implementation in ("sdpa", "flex_attention")

    def _make_plan(
        self,
        inputs_embeds: torch.Tensor,
        is_image: torch.Tensor | None,
        image_states: torch.Tensor | None,
        image_source: torch.Tensor | None,
        image_memory: Sequence,
        attention_mask: torch.Tensor | BlockMask | None,
        position_ids: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        starts: torch.Tensor | None,
        prefix_rotary: tuple[torch.Tensor, torch.Tensor] | None,
        returns_weights: bool,
    ) -> AttentionPlan:
        """
        The fast path where it can compute this call; else the definition, or what the released code computes. With cross
        attention its own where images have been seen, and the decoder's where not.
        """
        num_placeholders = None
        if image_source is not None or image_states is not None:
            num_placeholders = len(image_source) if image_source is not None else len(image_states)
        config, device = self.config, position_embeddings[0].device
        if config._attn_implementation == "flex_attention" and not computes_by_flex(device):
            config = self.sdpa_config if not isinstance(attention_mask, BlockMask) else config
        if self._splits_modalities(is_image, num_placeholders, attention_mask, past_key_values, starts):
            uses_flex = config._attn_implementation == "flex_attention"
            if uses_flex and self.training and config.attention_dropout > 0:
                raise ValueError("'flex_attention' has no dropout: set attention_dropout=0 or attn_implementation='sdpa'")
            positions = get_modality_positions(past_key_values)
            # New images of a cached conversation are sorted as the data has it, outside of a graph
            is_for_graphs = is_image is None or (positions is None and num_placeholders is not None)
            is_merged = self.multimodal_attention == "mmca_merged"
            if past_key_values is not None and positions is None:
                batch_size = inputs_embeds.shape[0]
                positions = split_cache_by_modality(
                    past_key_values, config.num_hidden_layers, batch_size, device, joined=is_merged
                )
            make = ModalityPlan if is_for_graphs else _make_modality_plan_outside_of_graphs
            return make(
                is_image,
                attention_mask,
                position_embeddings,
                tuple(inputs_embeds.shape[:2]),
                self.tokens_per_number,
                merged=is_merged,
                positions=positions,
                image_source=image_source,
                memory=image_memory,
                num_placeholders=num_placeholders,
                uses_flex=uses_flex,
                prefix=ImagePrefix(prefix_rotary, len(image_states)) if prefix_rotary is not None else None,
            )

        if image_memory:
            raise ValueError(
                "image_memory needs attn_implementation 'sdpa' or 'flex_attention', a dynamic or static cache or none, a"
                " 2-dimensional attention_mask, and one PEFT adapter for all sequences (no `adapter_names`). Under"
                " torch.compile, it needs to be without a cache"
            )
        variant, make = self.multimodal_attention, SequencePlan
        if variant == "cross" and (is_image is not None or get_modality_positions(past_key_values) is not None):
            return make_cross_plan(
                self,
                is_image,
                attention_mask,
                position_embeddings,
                tuple(inputs_embeds.shape[:2]),
                past_key_values,
                starts,
                returns_weights=returns_weights,
                image_source=image_source,
                num_placeholders=num_placeholders,
            )
        if variant == "mmca_released" and is_image is None:
            variant = "mmca"  # text that follows all images, where the two agree
        elif variant == "mmca_released":
            make = ReleasedPlan
            if is_packed(starts, attention_mask):
                raise ValueError(
                    "multimodal_attention='mmca_released' takes one conversation in each sequence of a batch, but"
                    " `position_ids` begin again within a sequence: pad the conversations instead of packing them"
                )
        return make(
            variant,
            config,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            is_image,
            self.tokens_per_number,
            image_source,
            starts,
            prefix_rotary,
        )

    def _splits_modalities(
        self,
        is_image: torch.Tensor | None,
        num_placeholders: int | None,
        attention_mask: torch.Tensor | BlockMask | None,
        past_key_values: Cache | None,
        starts: torch.Tensor | None,
    ) -> bool:
        """Whether the fast path computes this call."""
        can_split = self.can_split_modalities(attention_mask)
        if self.multimodal_attention == "cross":
            return False
        if get_modality_positions(past_key_values) is not None:
            if not can_split:
                raise ValueError(
                    "The conversation in past_key_values was begun with attn_implementation='sdpa' or 'flex_attention' and a"
                    " 2-dimensional attention_mask: go on with both"
                )
            return True
        # Text alone is computed as LLaMA's is; but flex attention would compile each kind of shape, and few are worth it
        if not can_split or (is_image is None and self.config._attn_implementation != "flex_attention"):
            return False
        if starts is not None:
            return False
        if is_tracing():
            # A graph is not made to change what a cache consists of
            return past_key_values is None and num_placeholders is not None
        if find_sequence_arguments(self):  # the stream is one sequence, whatever adapters the sequences of the batch have
            return False
        return past_key_values is None or can_split_by_modality(past_key_values, self.config.num_hidden_layers)

    def check_length(self, new_length: int, past_length: int | torch.Tensor = 0) -> None:
        """
        Raises a `ValueError` if this many tokens are more than the decoder has positions for. A static cache, whose length
        is a tensor, has a limit of its own.
        """
        if isinstance(past_length, torch.Tensor):
            return
        limit = self.config.max_position_embeddings
        if past_length + new_length > limit and self.config.rope_parameters["rope_type"] != "dynamic":
            raise ValueError(
                f"The input is {past_length + new_length} tokens long, but the decoder's max_position_embeddings is {limit}:"
                f" shorten the conversation or bring fewer images ({self.image_seq_length} tokens each)"
            )


@torch.compiler.disable
def _make_modality_plan_outside_of_graphs(*args, **kwargs) -> ModalityPlan:
    return ModalityPlan(*args, **kwargs)
