# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The decoder families that VisualChat can be made of. To add a family of LLaMA's shape, add it to [`DECODERS`].

LLaMA's shape is: RMSNorm before attention and before a gated MLP, rotary positions, grouped heads. Families differ in their
config class, in the biases of their projections, and in whether queries and keys are normalized.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP


class DecoderFamily(NamedTuple):
    """
    What a family of decoders has of its own.

    Args:
        causal_lm_class (`type[PreTrainedModel]`): Its model with a language modeling head, in transformers.
        mlp_class (`type[nn.Module]`): Its MLP, made from the config.
        has_input_bias (`Callable`): Whether `q_proj`, `k_proj` and `v_proj` have a bias, by the config.
        has_output_bias (`Callable`): Whether `o_proj` has one, by the config.
        normalizes_heads (`bool`): Whether each head's queries and keys go through an RMSNorm (`q_norm`, `k_norm`) before the
            rotation.
    """

    causal_lm_class: type[PreTrainedModel]
    mlp_class: type[nn.Module]
    has_input_bias: Callable[[PreTrainedConfig], bool]
    has_output_bias: Callable[[PreTrainedConfig], bool]
    normalizes_heads: bool = False

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return self.causal_lm_class.config_class


def _always(config: PreTrainedConfig) -> bool:
    return True


def _never(config: PreTrainedConfig) -> bool:
    return False


def _by_attention_bias(config: PreTrainedConfig) -> bool:
    return config.attention_bias


DECODERS = {
    family.config_class.model_type: family
    for family in (
        DecoderFamily(LlamaForCausalLM, LlamaMLP, _by_attention_bias, _by_attention_bias),
        DecoderFamily(MistralForCausalLM, MistralMLP, _never, _never),
        DecoderFamily(Qwen2ForCausalLM, Qwen2MLP, _always, _never),
        DecoderFamily(Qwen3ForCausalLM, Qwen3MLP, _by_attention_bias, _by_attention_bias, normalizes_heads=True),
    )
}


def find_decoder_family(config: PreTrainedConfig) -> DecoderFamily:
    """
    The family of a decoder.

    Raises:
        TypeError: If it is none of [`DECODERS`]. The error names its `model_type` and those that can be used.
    """
    if config.model_type not in DECODERS:
        raise TypeError(
            f"`text_config` has the model_type {config.model_type!r}, but the decoder must be of {list_decoders()}"
        )
    return DECODERS[config.model_type]


def list_decoders() -> str:
    """The `model_type` of all families, for errors."""
    *others, last = map(repr, DECODERS)
    return f"{', '.join(others)} or {last}"


def find_head_dim(config: PreTrainedConfig) -> int:
    """The size of a head. Not all families have a field for it (Qwen2), and a field may be empty."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def without_sliding_window(config: PreTrainedConfig, name: str = "`text_config`") -> PreTrainedConfig:
    """
    The config without a sliding window that hides nothing: one of no layer, or as long as `max_position_embeddings`. A
    config that has none is returned as it is, any other is copied.

    Args:
        config (`PreTrainedConfig`): A decoder's.
        name (`str`): What errors call it.

    Raises:
        ValueError: If a sliding window hides tokens: multi-modal causal attention has text see all images before it.
    """
    fields = config.to_dict()
    window = fields.get("sliding_window")
    if window is None:
        return config
    layer_types = fields.get("layer_types") or ["sliding_attention"] * config.num_hidden_layers
    layers = [index for index, layer_type in enumerate(layer_types) if layer_type == "sliding_attention"]
    if layers and window < config.max_position_embeddings:
        raise ValueError(
            f"{name}: {len(layers)} of the {config.num_hidden_layers} layers of this {config.model_type!r} decoder, the"
            f" first of them layer {layers[0]}, attend to the last {window} tokens only (`sliding_window`), but"
            f" `max_position_embeddings` is {config.max_position_embeddings}. Multi-modal causal attention has no sliding"
            f" window: take a decoder without one, or set its `max_position_embeddings` to {window}"
        )
    config = copy.deepcopy(config)
    config.sliding_window = None
    if "use_sliding_window" in fields:
        config.use_sliding_window = False
    if "layer_types" in fields:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config
