# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The config of a VisualChat as vLLM reads it."""

from vllm.config import CUDAGraphMode, VllmConfig

from modeling_visualchat import VisualChatConfig


VARIANTS = ("causal", "mmca", "mmca_merged")


class VisualChatServingConfig(VisualChatConfig):
    """
    A [`VisualChatConfig`] by which vLLM keeps three rows of positions for each token, as for models with M-RoPE. The rows
    carry what a layer has to know of the token (`token_notes.py`). The rotary embedding itself has one position.
    """

    mrope_section = (1, 1, 1)


def check_config(vllm_config: VllmConfig) -> None:
    """
    Raises:
        ValueError: If vLLM is told to do what cannot be done right with this model, or if the model itself is of a variant
            that is not served here. The error says what to do.
    """
    config = vllm_config.model_config.hf_config
    if config.multimodal_attention not in VARIANTS:
        raise ValueError(
            f"vLLM serves multimodal_attention {' or '.join(map(repr, VARIANTS))}, but this model has"
            f" {config.multimodal_attention!r}: serve it with `visualchat serve`"
        )
    if config.text_config.hidden_act != "silu":
        raise ValueError(f"vLLM's LLaMA computes hidden_act 'silu', but this decoder has {config.text_config.hidden_act!r}")
    if vllm_config.lora_config is not None and config.image_prefix_ids is not None:
        length, most = len(config.image_prefix_ids), vllm_config.scheduler_config.max_num_batched_tokens
        if length > most:
            raise ValueError(
                f"With LoRA adapters, max_num_batched_tokens must be at least {length}, the length of the model's image"
                f" prefix, but it is {most}"
            )
        if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL:
            raise ValueError(
                "With LoRA adapters and an image prefix, CUDA graphs cannot hold prompts: set cudagraph_mode"
                " FULL_AND_PIECEWISE or PIECEWISE"
            )
