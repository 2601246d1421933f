# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Image memory: what the decoder knows of a picture, kept for the next time.

Under `mmca` and `mmca_merged` an image row looks at nothing but itself, so its keys (before numbering and rotation) and
values in every layer depend on the picture alone: not on the prompt, not on other pictures, not on its place. Computed once,
they are exact in any later round and any other conversation. Prefix caches need the same prefix, and approximate
position-independent caches recompute some tokens.
"""

import hashlib
import json
import logging
import operator
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class ImageMemory:
    """
    The keys and values of images in every decoder layer, as [`VisualChatForCausalLM.encode_images`] makes them.

    ```python
    >>> memory = model.encode_images(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
    >>> len(memory), memory.nbytes
    >>> first_two = memory[:2]
    >>> model.generate(**text_inputs, image_memory=ImageMemory.cat([memory[3], first_two]))
    ```

    Args:
        keys (`torch.Tensor` of shape `(layers, images, image_seq_length, key-value heads, head_size)`): Before numbering and
            rotation.
        values (`torch.Tensor`): Of the same shape.
        fingerprint (`str`): Of the weights they were computed with. Others refuse them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    fingerprint: str

    def __repr__(self) -> str:
        return f"ImageMemory({len(self)} images, {self.nbytes:,} bytes, {self.keys.dtype}, {self.keys.device})"

    def __len__(self) -> int:
        return self.keys.shape[1]

    def __getitem__(self, index: int | slice | list[int] | torch.Tensor) -> "ImageMemory":
        """The memory of one image, or of several, without copying where `index` is a number or a slice."""
        if not isinstance(index, slice | list) and not (isinstance(index, torch.Tensor) and index.dim() > 0):
            index = operator.index(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of a memory of {len(self)} images")
            index %= len(self)
            index = slice(index, index + 1)
        return ImageMemory(self.keys[:, index], self.values[:, index], self.fingerprint)

    @property
    def nbytes(self) -> int:
        """2 · layers · images · tokens · key-value heads · head size · bytes of a number."""
        return self.keys.nbytes + self.values.nbytes

    @classmethod
    def cat(cls, memories: list["ImageMemory"]) -> "ImageMemory":
        """
        Several memories as one, in this order.

        Raises:
            ValueError: If there are none, or if they come from different weights.
        """
        fingerprints = sorted({memory.fingerprint for memory in memories})
        if len(fingerprints) != 1:
            raise ValueError(f"Memories of one model are needed, got {len(fingerprints)}: {', '.join(fingerprints)}")
        keys = torch.cat([memory.keys for memory in memories], dim=1)
        return cls(keys, torch.cat([memory.values for memory in memories], dim=1), fingerprints[0])

    def to(self, *args, **kwargs) -> "ImageMemory":
        """On another device or in another dtype, as `torch.Tensor.to`. What is computed with them has the model's dtype."""
        return ImageMemory(self.keys.to(*args, **kwargs), self.values.to(*args, **kwargs), self.fingerprint)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, whole or not at all."""
        tensors = {"keys": self.keys.contiguous(), "values": self.values.contiguous()}
        unfinished = f"{os.fspath(path)}.{os.getpid()}-{threading.get_ident()}.part"
        save_file(tensors, unfinished, metadata={"fingerprint": self.fingerprint})
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "ImageMemory":
        """
        Reads what [`~ImageMemory.save`] wrote.

        Raises:
            ValueError: If the file holds something else.
        """
        with safe_open(path, framework="pt", device=str(device)) as file:
            fingerprint = (file.metadata() or {}).get("fingerprint")
            if fingerprint is None or set(file.keys()) != {"keys", "values"}:
                raise ValueError(f"{path} holds {', '.join(file.keys())}, which is not an image memory")
            return cls(file.get_tensor("keys"), file.get_tensor("values"), fingerprint)


class ImageMemoryStore:
    """
    Remembers pictures by their content, so that asking about a known one costs neither vision tower nor prefill.

    ```python
    >>> store = ImageMemoryStore(model, max_bytes=8 * 2**30, folder="memories")
    >>> inputs = processor.apply_chat_template(messages, ...)
    >>> memories = store.get(inputs.pop("pixel_values"))
    >>> model.generate(**inputs, image_memory=memories)
    ```

    Args:
        model (`VisualChatForCausalLM`): Encodes what is not known. If its weights change, all it remembered is forgotten.
        max_bytes (`int`): How much is kept in memory. What was used least recently goes first.
        folder (`str` or `os.PathLike`, *optional*): Where memories are also kept as files, beyond `max_bytes` and for the
            next process. Files are never deleted.

    Attributes:
        hits, misses, evictions (`int`): Pictures that were known, that were encoded, and that went for lack of room.
        nbytes (`int`): Bytes in memory.
    """

    def __init__(self, model, max_bytes: int, folder: str | os.PathLike | None = None):
        self.model, self.max_bytes, self.folder = model, max_bytes, folder
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        self.hits = self.misses = self.evictions = self.nbytes = 0
        self._memories: OrderedDict[str, ImageMemory] = OrderedDict()
        self._fingerprint = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._memories)

    def get(self, pixel_values: torch.Tensor) -> list[ImageMemory]:
        """
        The memory of each picture. Those that are not known are encoded together, in one pass.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Normalized pixels.
        """
        fingerprint = self.model.image_fingerprint()
        keys = [f"{fingerprint[:16]}-{_hash_picture(picture)}" for picture in pixel_values]
        with self._lock:
            if fingerprint != self._fingerprint:
                self._memories.clear()
                self._fingerprint, self.nbytes = fingerprint, 0
            found = {key: memory for key in keys if (memory := self._find(key, fingerprint)) is not None}
            unknown = {key: index for index, key in enumerate(keys) if key not in found}
            self.hits += len(keys) - len(unknown)
            self.misses += len(unknown)
            if unknown:
                encoded = self.model.encode_images(pixel_values[list(unknown.values())])
                for index, key in enumerate(unknown):
                    # A copy: a slice would keep the memory of all of them
                    found[key] = encoded[[index]]
                    if self.folder is not None:
                        self._write(key, found[key])
            # What was known moves to the end first, so that what is new does not push it out
            for key in sorted(found, key=lambda key: key in unknown):
                self._keep(key, found[key])
        return [found[key] for key in keys]

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, f"{key}.safetensors")

    def _write(self, key: str, memory: ImageMemory) -> None:
        try:
            memory.save(self._path(key))
        except (SafetensorError, OSError) as error:  # a disk that is full: the answer need not wait for it
            logger.warning("%s cannot be written, the picture is known to this process alone: %s", self._path(key), error)

    def _find(self, key: str, fingerprint: str) -> ImageMemory | None:
        if key in self._memories:
            return self._memories[key]
        if self.folder is None or not os.path.isfile(self._path(key)):
            return None
        try:
            memory = ImageMemory.load(self._path(key), self.model.device)
        except (SafetensorError, ValueError, OSError) as error:
            logger.warning("%s is damaged and will be written again: %s", self._path(key), error)
            return None
        return memory if memory.fingerprint == fingerprint else None

    def _keep(self, key: str, memory: ImageMemory) -> None:
        if key not in self._memories:
            self._memories[key] = memory
            self.nbytes += memory.nbytes
        self._memories.move_to_end(key)
        while self.nbytes > self.max_bytes:
            _, oldest = self._memories.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self.evictions += 1


def _hash_picture(picture: torch.Tensor) -> str:
    described = f"{picture.dtype} {tuple(picture.shape)}".encode()
    return hashlib.sha256(described + picture.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Unreadable:
    """
    Weights whose content cannot be read.

    Args:
        reason (`str`): What they are, to stand behind the name of what needs them.
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
        saved = self._read_layers(model, without)
        not_saved = dict(model.named_non_persistent_buffers())
        held = dict(model.named_parameters())
        held |= {name: one for name, one in model.named_buffers() if name not in not_saved and one.numel() > 0}
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

    def _read_layers(self, model: PreTrainedModel, without: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """What is saved by layers that do it in a way of their own."""
        found, refused = {}, set()
        for name, layer in model.named_modules():
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
    places = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in held)
    names = *weights.held, *weights.besides
    return places, names, weights.unreadable, tuple(map(tuple, values)), _active_adapters(model)


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


__all__ = ["ImageMemory", "ImageMemoryStore"]
