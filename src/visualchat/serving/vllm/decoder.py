# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
vLLM's LLaMA with multi-modal causal attention. All decoder families of VisualChat have its shape, and differ in what
[`make_llama_config`] and the attention layer see to.
"""

import copy
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.sequence import IntermediateTensors

from modeling_visualchat import VisualChatConfig
from modeling_visualchat.decoders_visualchat import find_decoder_family

from .attention import VisualChatAttention


def make_llama_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A decoder's config with the fields by which vLLM's LLaMA decides on biases."""
    family, config = find_decoder_family(config), copy.deepcopy(config)
    config.qkv_bias, config.attention_bias = family.has_input_bias(config), family.has_output_bias(config)
    return config


class VisualChatDecoderLayer(LlamaDecoderLayer):
    """A layer of vLLM's LLaMA around [`VisualChatAttention`]. `visualchat` is the whole config."""

    def __init__(self, visualchat: VisualChatConfig, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, prefix=prefix, attn_layer_type=partial(VisualChatAttention, visualchat))


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0})
class VisualChatTextModel(LlamaModel):
    """vLLM's, told that the tokens are the last dimension of `positions`."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ):
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    @torch.no_grad()
    def remember_numbers(self, spellings: list[list[int]] | None) -> None:
        """
        Keeps the keys of the images' numbers in each layer.

        Args:
            spellings (`list[list[int]]`, *optional*): The token ids that spell each number. `None`: numbers are learned.
        """
        embeds_NC = None
        if spellings is not None:
            device = self.norm.weight.device
            embeds_NC = torch.stack([self.embed_input_ids(torch.tensor(one, device=device)).mean(0) for one in spellings])
        for layer in self.layers:
            attention, states_NC = layer.self_attn, None if embeds_NC is None else layer.input_layernorm(embeds_NC)
            attention.image_numbers.remember(states_NC, attention.project_keys)

    @torch.no_grad()
    def remember_prefix(self, token_ids: list[int], slot: int) -> None:
        """Keeps the keys and values of the image prefix in each layer, for a slot of [`ImagePrefix`]."""
        hidden_states = self.embed_input_ids(torch.tensor(token_ids, device=self.norm.weight.device))
        for layer in self.layers:
            hidden_states = hidden_states + layer.self_attn.remember_prefix(layer.input_layernorm(hidden_states), slot)
            hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


class VisualChatTextForCausalLM(LlamaForCausalLM):
    """vLLM's, made of these parts."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = VisualChatDecoderLayer):
        return VisualChatTextModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
