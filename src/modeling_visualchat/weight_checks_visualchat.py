# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Whether all weights of a model came from its files, and are numbers."""

import json
import os

import torch
from transformers import PreTrainedModel

from .weight_fingerprint_visualchat import ModelWeights


# Without an operation that finds a smallest and a largest number
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


class VisualChatWeightChecksMixin:
    """How a VisualChat remembers what its files lacked. A model class lists it before transformers' base class."""

    # By name: a weight that was initialized anew when the model was loaded, how often it had been written then, and why
    _not_loaded: dict[str, tuple[torch.Tensor, int, str]] = {}
    _are_weights_checked = False

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs) -> PreTrainedModel | tuple:
        """As in transformers. The model remembers which weights its files lack, for [`check_weights`]."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        reasons = dict.fromkeys(info["missing_keys"], "is missing")
        for name, in_file, in_model in info["mismatched_keys"]:
            reasons[name] = f"has the shape {tuple(in_file)}, but the config needs {tuple(in_model)}"
        held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        model._not_loaded = {
            name: (held[name], _count_writes(held[name]), reason)
            for name, reason in sorted(reasons.items())
            if name in held and not held[name].is_meta  # FSDP has it sent by another process
        }
        return (model, info) if output_loading_info else model

    def check_weights(self) -> None:
        """
        Checks once that the weights which the model was loaded with came from its files, and that all are finite: one pass
        over those in memory. Weights that were written since, by training for example, and those of a model that was never
        loaded may have come from anywhere.

        Raises:
            ValueError: If a weight was missing, or has no finite numbers. The error names it and its file.
        """
        if self._are_weights_checked:
            return
        present = {id(weight) for weight in (*self.parameters(), *self.buffers())}
        unwritten = [
            (name, reason)
            for name, (weight, writes, reason) in self._not_loaded.items()
            if id(weight) in present and _count_writes(weight) <= writes
        ]
        wrong = unwritten or [(name, "holds NaN or infinity") for name in find_not_finite(ModelWeights(self))]
        if wrong:
            name, reason = wrong[0]
            count = f"; {len(wrong)} tensors are wrong" if len(wrong) > 1 else ""
            raise ValueError(f"{find_weight_file(self.name_or_path, name)}: the tensor {name} {reason}{count}")
        self._are_weights_checked = True


def _count_writes(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def find_not_finite(weights: ModelWeights) -> list[str]:
    """The names of weights that hold NaN or infinity, of those that can be read."""
    found: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, weight in {**weights.held, **weights.besides}.items():
        if not weight.is_floating_point() or (weight.dtype.itemsize == 1 and weight.dtype not in EIGHT_BITS):
            continue
        weight = weight.detach()
        # The least and the largest number are NaN if one is: the quickest pass there is
        extremes = (weight.bfloat16() if weight.dtype in EIGHT_BITS else weight).aminmax()
        found.setdefault(weight.device, {})[name] = torch.stack(extremes).isfinite().all()
    wrong = []
    for of_device in found.values():  # read together: one by one, a GPU would wait for each
        wrong += [name for name, good in zip(of_device, torch.stack([*of_device.values()]).tolist()) if not good]
    return sorted(wrong)


def find_weight_file(folder: str, name: str) -> str:
    """
    The file that holds a weight, or should hold it.

    Args:
        folder (`str`): Of the model, or its Hub id, or empty.
        name (`str`): The weight's.
    """
    whole = os.path.join(folder, "model.safetensors")
    index = f"{whole}.index.json"
    if folder and os.path.isfile(whole):
        return whole
    if folder and os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            shard = json.load(file)["weight_map"].get(name)
        return os.path.join(folder, shard) if shard else index
    return folder or "the model"
