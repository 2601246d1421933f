# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
VisualChat in vLLM (https://docs.vllm.ai): `vllm serve FOLDER`.

vLLM finds [`register`] by the entry point `vllm.general_plugins` of this package, and calls it in each of its processes.

| file | content |
|---|---|
| `config.py` | the config as vLLM reads it, and what this engine refuses |
| `processing.py` | a prompt and its images to tokens and pixel values |
| `token_notes.py` | what a layer has to know of a token, carried by its positions |
| `attention.py`, `image_prefix.py` | multi-modal causal attention over vLLM's attention kernels and paged cache |
| `decoder.py` | vLLM's LLaMA around it |
| `model.py` | the vision tower and the projector of `modeling_visualchat`, and this decoder |
| `refusals.py` | a middleware for parameters that vLLM would ignore |
"""


def register() -> None:
    """Makes vLLM know the model. It imports nothing that needs a device."""
    from transformers import AutoConfig, AutoProcessor
    from vllm import ModelRegistry

    from modeling_visualchat import VisualChatProcessor

    from .config import VisualChatServingConfig

    AutoConfig.register("visualchat", VisualChatServingConfig, exist_ok=True)
    AutoProcessor.register(VisualChatServingConfig, VisualChatProcessor, exist_ok=True)
    ModelRegistry.register_model("VisualChatForCausalLM", "visualchat.serving.vllm.model:VisualChatForCausalLM")
