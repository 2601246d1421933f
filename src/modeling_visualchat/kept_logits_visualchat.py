# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Which logits are computed: `logits_to_keep` of [`VisualChatForCausalLM.forward`]."""

import torch


def slice_kept(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The decoder's output.
        logits_to_keep (`int` or `torch.Tensor`): The last positions, or these positions, which may differ by sequence. 0 is
            all.

    Returns:
        `torch.Tensor` of shape `(batch_size, positions, hidden_size)`, or with a mask of shape
        `(batch_size, sequence_length)` of shape `(positions, hidden_size)`.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if is_mask(logits_to_keep):
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[:, :, None], dim=1)


def is_mask(logits_to_keep: int | torch.Tensor) -> bool:
    return isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool


def keep_logits_for_trainer(logits_to_keep: int | torch.Tensor) -> int | torch.Tensor:
    """Where the Trainer computes the loss itself, it has the labels of all positions."""
    if torch.compiler.is_compiling():
        _refuse_loss_of_compiled_model()
    return 0 if is_mask(logits_to_keep) else logits_to_keep


@torch.compiler.disable
def _refuse_loss_of_compiled_model() -> None:
    """In a graph that is traced, an error would be traced too."""
    raise ValueError(
        "The Trainer computes the loss itself from the logits of a compiled model, which it does not know as a language"
        " model: with label_smoothing_factor it would smooth labels that are not shifted. Leave out torch_compile, or"
        " label_smoothing_factor and compute_loss_func"
    )


def find_kept(logits_to_keep: int | torch.Tensor, inputs: torch.Tensor | None) -> torch.BoolTensor | None:
    """The tokens whose logits are computed, of shape `(batch_size, sequence_length)`; `None`: all."""
    if inputs is None or (isinstance(logits_to_keep, int) and not 0 < logits_to_keep < inputs.shape[1]):
        return None
    shape, device = inputs.shape[:2], inputs.device
    if isinstance(logits_to_keep, int):
        return (torch.arange(shape[1], device=device) >= shape[1] - logits_to_keep).expand(shape)
    logits_to_keep = logits_to_keep.to(device).expand(shape[0], -1)
    if logits_to_keep.dtype == torch.bool:
        return logits_to_keep
    return torch.zeros(shape, dtype=torch.bool, device=device).scatter(1, logits_to_keep % shape[1], True)
