# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The decoder: LLaMA's, with multi-modal causal attention in place of plain causal attention."""

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_visualchat import (
    MultimodalMask,
    VisualChatAttention,
    check_attention_implementation,
    create_multimodal_mask,
    update_image_numbers,
)
from .configuration_visualchat import VisualChatConfig


class VisualChatDecoderLayer(GradientCheckpointingLayer):
    """LLaMA's decoder layer around [`VisualChatAttention`]."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = VisualChatAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        number_embeds: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: MultimodalMask,
        past_key_values: Cache | None = None,
        image_numbers: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask,
            past_key_values,
            self.input_layernorm(number_embeds) if number_embeds is not None else None,
            image_numbers,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class VisualChatTextModel(LlamaPreTrainedModel):
    """
    LLaMA's decoder with multi-modal causal attention. Its parameters have the names of a
    [`~transformers.LlamaModel`], and its config is a plain `LlamaConfig`.
    """

    _no_split_modules = ["VisualChatDecoderLayer"]
    _supports_flash_attn = False
    _can_record_outputs = {"hidden_states": VisualChatDecoderLayer, "attentions": VisualChatAttention}

    def __init__(self, config: VisualChatConfig):
        super().__init__(config.text_config)
        self.multimodal_attention = config.multimodal_attention
        self.image_seq_length = config.image_seq_length
        text_config = config.text_config
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size, text_config.pad_token_id)
        self.layers = nn.ModuleList(
            [VisualChatDecoderLayer(text_config, layer_idx) for layer_idx in range(text_config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(text_config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        is_image: torch.BoolTensor | None = None,
        number_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Text embeddings and image
                features, in place.
            is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The rows that belong to an
                image. `None`: all of them are text.
            number_embeds (`torch.Tensor` of shape `(numbers, hidden_size)`, *optional*): Embeddings of the numbers 1, 2, ….
                Without images they have no effect.
        """
        check_attention_implementation(self.config)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if is_image is not None:
            self.check_length(inputs_embeds.shape[1], past_length)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length

        image_numbers, key_image_numbers = update_image_numbers(
            past_key_values,
            is_image,
            self.image_seq_length,
            self.config.num_hidden_layers,
            inputs_embeds.shape[:2],
            inputs_embeds.device,
        )
        if number_embeds is not None and image_numbers is None:
            image_numbers = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int, device=inputs_embeds.device)
        elif number_embeds is not None:
            torch_compilable_check(
                image_numbers.max() <= len(number_embeds),
                lambda: (
                    f"A conversation holds {int(image_numbers.max())} images, but config.image_number_token_ids spells"
                    f" only {len(number_embeds)} numbers"
                ),
            )
        mask = create_multimodal_mask(
            self.multimodal_attention,
            self.config,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            image_numbers,
            key_image_numbers,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers:
            # By position: what needs a gradient. Reentrant gradient checkpointing does not see keyword arguments
            hidden_states = layer(
                hidden_states,
                number_embeds,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                image_numbers=image_numbers,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

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
