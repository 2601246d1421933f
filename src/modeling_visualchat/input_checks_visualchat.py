# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Checks of what a forward pass is given, also where a graph is traced, and what PEFT says of the sequences of its batch."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers.utils import is_tracing, torch_compilable_check


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
