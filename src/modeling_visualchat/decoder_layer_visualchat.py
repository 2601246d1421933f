# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A layer of the decoder, and what puts its output into the order of the sequence."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_visualchat import AttentionPlan, VisualChatAttention, VisualChatRMSNorm
from .decoders_visualchat import find_decoder_family


class VisualChatDecoderLayer(GradientCheckpointingLayer):
    """The layer of a decoder of LLaMA's shape, around [`VisualChatAttention`]."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int, **numbers):
        super().__init__()
        self.self_attn = VisualChatAttention(config, layer_idx, **numbers)
        self.mlp = find_decoder_family(config).mlp_class(config)
        self.input_layernorm = VisualChatRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = VisualChatRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        number_embeds: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            plan,
            past_key_values,
            self.input_layernorm(number_embeds) if number_embeds is not None else None,
            **kwargs,
        )
        hidden_states = plan.residual(hidden_states) + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SequenceOrder(nn.Module):
    """Puts hidden states into the order of the sequence. What is recorded as hidden states is what this returns."""

    def forward(self, previous: torch.Tensor, hidden_states: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """
        Args:
            previous (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The hidden states before the
                layer, in order; those before the first layer are recorded too.
            hidden_states (`torch.Tensor`): What the layer returned.
            plan (`AttentionPlan`): The layer's.
        """
        return plan.restore(hidden_states)
