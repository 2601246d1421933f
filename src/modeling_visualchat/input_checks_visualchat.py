# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Checks of what a forward pass is given, also where a graph is traced, of the attention implementation, and what PEFT says of
the sequences of a batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_tracing, torch_compilable_check
from transformers.utils.generic import is_flash_attention_requested


SUPPORTED_ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def check_attention_implementation(config: PreTrainedConfig, multimodal_attention: str, is_plain_causal: bool) -> None:
    """
    Args:
        config (`PreTrainedConfig`): The decoder's. Without an attention implementation, transformers chooses one.
        multimodal_attention (`str`): See [`VisualChatConfig`].
        is_plain_causal (`bool`): Whether its attention is that of its family. Then any function will do that others have
            registered with transformers: it is called as the family's own attention calls it.

    Raises:
        ValueError: If the decoder is to run an attention function that cannot express its masks, or that cross attention
            does not use. The error says what to use.
    """
    implementation = config._attn_implementation
    if implementation == "flex_attention" and multimodal_attention == "cross":
        raise ValueError("multimodal_attention='cross' needs attn_implementation 'eager' or 'sdpa', not 'flex_attention'")
    if implementation is None or implementation in SUPPORTED_ATTENTION_IMPLEMENTATIONS:
        return
    if not _is_of_others(implementation):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot compute multi-modal causal attention: choose one of"
            f" {', '.join(map(repr, SUPPORTED_ATTENTION_IMPLEMENTATIONS))} for the decoder (the vision tower may differ:"
            " attn_implementation={'text_config': …, 'vision_config': …})"
        )
    if not is_plain_causal:
        raise ValueError(
            f"attn_implementation={implementation!r}, which is not of transformers, would compute plain causal attention: it"
            " is for multimodal_attention='causal' without numbers of images. Choose one of"
            f" {', '.join(map(repr, SUPPORTED_ATTENTION_IMPLEMENTATIONS))} for the decoder. In vLLM, leave out `--model-impl"
            " transformers` and install the package visualchat, which serves this model with an attention of its own"
        )


def _is_of_others(implementation: str) -> bool:
    """Whether an attention function was registered with transformers by others: an inference engine, a user."""
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return False
    return implementation in ALL_ATTENTION_FUNCTIONS and not implementation.startswith("paged|")


def check_image_numbers(image_numbers: torch.Tensor | None, limit: int | None, numbers_per_image: int = 1) -> None:
    """Raises a `ValueError` with both counts if there are more images than the model has numbers for (`None`: no limit)."""
    if limit is None or image_numbers is None or image_numbers.numel() == 0:
        return
    check_values(
        image_numbers.max() <= limit * numbers_per_image,
        lambda: (
            f"A conversation holds {-(-int(image_numbers.max()) // numbers_per_image)} images, but the model has only"
            f" {limit} numbers for them (config.max_image_number)"
        ),
        f"A conversation holds more images than the model has numbers for, {limit} (config.max_image_number)",
    )


def check_values(holds: torch.BoolTensor, describe: Callable[[], str], summary: str) -> None:
    """
    Raises a `ValueError` that describes the data unless `holds`. In a graph, an assertion of torch says the `summary`: torch
    2.11 cannot trace transformers' `torch_compilable_check` of a tensor.
    """
    if is_tracing():
        torch._assert_async(holds, summary)
    else:
        torch_compilable_check(holds, describe)


def find_sequence_arguments(module: nn.Module) -> dict[str, Sequence]:
    """
    What PEFT tells its layers inside a module of each sequence of the batch: `adapter_names`, which adapter it has, or
    `alora_offsets`, from which token on. Its hooks put them among the layers' arguments.
    """
    hooks = (hook for part in module.modules() for hook in part._forward_pre_hooks.values() if isinstance(hook, partial))
    names = ("adapter_names", "alora_offsets")
    return next(({name: hook.keywords[name]} for hook in hooks for name in names if name in hook.keywords), {})
