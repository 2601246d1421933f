# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A hash of the weights that a model computes with, and a quick check whether they have changed since the last look."""

import hashlib
import json
import operator
import sys
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor


class Unreadable:
    """
    Weights whose content cannot be read.

    Args:
        reason (`str`): Why: the rest of a sentence that begins with what needs them.
        holders (`Iterable`): The objects that hold them. Two are equal if these are the very same.
    """

    def __init__(self, reason: str, holders: Iterable = ()):
        self.reason, self.holders = reason, list(holders)

    def __eq__(self, other) -> bool:
        is_alike = isinstance(other, Unreadable) and len(self.holders) == len(other.holders)
        return is_alike and all(map(operator.is_, self.holders, other.holders))


class ModelWeights:
    """
    What a model computes with, by name: its parameters and the buffers that it saves, and what quantized layers hold besides
    (scales, for example), as far as they save it.

    Args:
        model (`PreTrainedModel`): The model.
        without (`tuple[str, ...]`): Weights whose names begin so are left out.

    Attributes:
        held (`dict[str, torch.Tensor]`): Parameters and buffers, of which this process reads its own part. A tensor that
            consists of others, as torchao's do, is there as these.
        besides (`dict[str, torch.Tensor]`): What else layers save. These tensors may be made anew each time.
        unreadable (`dict[str, Unreadable]`): What cannot be read.
    """

    def __init__(self, model: PreTrainedModel, without: tuple[str, ...] = ()):
        self.held: dict[str, torch.Tensor] = {}
        self.besides: dict[str, torch.Tensor] = {}
        self.unreadable: dict[str, Unreadable] = {}
        layers = dict(model.named_modules())
        held, saved = _find_held(layers), self._read_layers(layers, without)
        for name, weight in {**held, **saved}.items():
            if not name.startswith(without):
                self._read(name, own_part(weight), self.held if name in held else self.besides)

    def check(self, purpose: str) -> None:
        """
        Args:
            purpose (`str`): What needs them.

        Raises:
            ValueError: If there are weights that cannot be read.
        """
        for unreadable in self.unreadable.values():
            raise ValueError(f"{purpose} {unreadable.reason}")

    def _read_layers(self, layers: dict[str, nn.Module], without: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """What is saved by layers that do it in a way of their own."""
        found, refused = {}, set()
        for name, layer in layers.items():
            kind = type(layer)
            if name.startswith(without) or not _saves_its_own_way(kind):
                continue
            if kind not in refused:
                try:
                    saved = layer.state_dict(prefix=f"{name}.")
                except NotImplementedError:  # bitsandbytes' embeddings, for example
                    saved = {name: None}
                if all(isinstance(value, torch.Tensor) for value in saved.values()):
                    found |= saved
                    continue
                refused.add(kind)  # others need not be asked: for the answer, packed weights are unpacked
            reason = f"needs weights that can be read, but {name} is a {kind.__module__}.{kind.__name__}, which hides them"
            self.unreadable[name] = Unreadable(reason, vars(layer).values())
        return found

    def _read(self, name: str, weight: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        if is_traceable_wrapper_subclass(weight):  # made of others, and how is part of their names
            parts, joined = weight.__tensor_flatten__()
            for part in parts:
                self._read(f"{name}.{type(weight).__name__}({joined}).{part}", getattr(weight, part), into)
        elif weight.is_meta or weight.numel() == 0:
            reason = f"needs all weights in memory, but {name} is not: load the model without offload"
            self.unreadable[name] = Unreadable(reason)
        elif not _is_plain(weight):
            kind = f"{type(weight).__name__} ({weight.dtype}, {weight.layout})"
            reason = f"needs weights that can be read, but {name} is a {kind}, not a plain tensor"
            self.unreadable[name] = Unreadable(reason, [weight])
        else:
            into[name] = weight


def _find_held(layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """
    Parameters and the buffers that are saved, each once. torch's own `named_parameters` and `named_buffers` would go through
    all layers once more each, and every answer of a server asks for this.
    """
    held, seen = {}, set()
    for prefix, layer in layers.items():
        buffers = {
            name: one
            for name, one in layer._buffers.items()
            if name not in layer._non_persistent_buffers_set and one is not None and one.numel() > 0
        }
        for name, one in (*layer._parameters.items(), *buffers.items()):
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                held[f"{prefix}.{name}" if prefix else name] = one
    return held


def _saves_its_own_way(kind: type[nn.Module]) -> bool:
    ways = ("state_dict", "_save_to_state_dict", "get_extra_state")
    return any(getattr(kind, way) is not getattr(nn.Module, way) for way in ways)


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether its numbers lie in its own storage."""
    is_ordinary = type(weight).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return is_ordinary and weight.layout == torch.strided and not weight.is_quantized


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight that is shared out."""
    return weight.detach().to_local() if torch.distributed.is_available() and isinstance(weight, DTensor) else weight


def describe_state(model: nn.Module, weights: ModelWeights) -> tuple:
    """
    What tells at little cost that weights have changed since they were last looked at: where they lie, how often they were
    written, a few of their values (some libraries write in secret), and which adapters are at work.

    Args:
        model (`nn.Module`): Whose adapters are looked for.
        weights (`ModelWeights`): The weights that matter.
    """
    samples: dict[tuple, list[torch.Tensor]] = {}
    for weight in (*weights.held.values(), *weights.besides.values()):
        flat = weight.detach() if weight.is_contiguous() else weight.detach().flatten()
        size = flat.numel()
        sample = _bits(flat).as_strided((min(size, 16),), (max(1, size // 16),))
        samples.setdefault((sample.device, sample.dtype), []).append(sample)
    # Brought to the CPU together: one by one, a GPU would wait for each
    values = [torch.cat(some).tolist() for some in samples.values()]
    held = weights.held.values()
    addresses = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in held)
    names = *weights.held, *weights.besides
    return addresses, names, weights.unreadable, tuple(map(tuple, values)), _active_adapters(model)


def _active_adapters(model: nn.Module) -> tuple:
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return tuple(
        (tuner.disable_adapters, tuple(tuner.active_adapters), tuner.merged, _scales_of_adapters(tuner)) for tuner in tuners
    )


def _scales_of_adapters(tuner) -> tuple:
    scales = vars(tuner).get("scaling", {})  # some kinds of adapters have none
    return tuple((name, scales[name]) for name in tuner.active_adapters if name in scales)


def fingerprint_weights(weights: ModelWeights, description: dict) -> str:
    """
    A hash of weights, bit by bit, and of what is computed with them.

    Args:
        weights (`ModelWeights`): All that can be read of them.
        description (`dict`): What else matters, as JSON can write it.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, weight in sorted({**weights.held, **weights.besides}.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_sum_rows(weight.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sum_rows(weight: torch.Tensor) -> torch.Tensor:
    """For each row the sum, modulo 2^64, of its numbers' bits times an odd factor of the column's own."""
    rows = weight.reshape(-1, weight.shape[-1]) if weight.dim() > 1 else weight.reshape(1, -1)
    bits = _bits(rows.contiguous())
    factors = (torch.arange(bits.shape[1], device=bits.device) * 2 + 1) * 0x1E3779B97F4A7C15 | 1
    chunks = bits.split(max(1, 2**22 // bits.shape[1]))  # as 64-bit integers they take eight times the room
    return torch.cat([(chunk.long() * factors).sum(-1) for chunk in chunks])


def _bits(weight: torch.Tensor) -> torch.Tensor:
    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return weight.view(as_integers[weight.dtype.itemsize])
