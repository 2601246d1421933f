# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Image memory: what the decoder knows of an image, kept for the next time.

Under `mmca` and `mmca_merged` an image token attends to nothing but itself, so its keys (before numbering and rotation) and
values in every layer depend on the image alone: not on the prompt, not on other images, not on its position. Computed once,
they are exact in any later round and any other conversation. Prefix caches need the same prefix, and approximate
position-independent caches recompute some tokens.
"""

import hashlib
import json
import operator
import os
import threading
import uuid
import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .decoders_visualchat import find_head_dim
from .image_memory_folder_visualchat import ImageMemoryFolder
from .towers_visualchat import find_tower_family
from .weight_fingerprint_visualchat import ModelWeights, describe_state, fingerprint_weights


logger = logging.get_logger(__name__)

# What a file has beside the tensors, at most: safetensors' header
HEADER_BYTES = 1024


@dataclass(eq=False, repr=False)
class ImageMemory:
    """
    The keys and values of images in every decoder layer, as [`VisualChatForCausalLM.encode_images`] makes them.

    ```python
    >>> memory = model.encode_images(processor.image_processor(images, return_tensors="pt")["pixel_values"])
    >>> len(memory), memory.nbytes
    >>> first_two = memory[:2]
    >>> model.generate(**text_inputs, image_memory=ImageMemory.cat([memory[3], first_two]))
    ```

    Args:
        keys (`torch.Tensor` of shape `(layers, images, image_seq_length, key-value heads, head_size)`): Before numbering and
            rotation.
        values (`torch.Tensor`): Of the same shape.
        fingerprint (`str`): Of the weights that they were computed with. A model with other weights refuses them.
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

    def save(self, path: str | os.PathLike, image: str | None = None) -> None:
        """
        Writes a safetensors file, whole or not at all, with a checksum of all that it holds.

        Args:
            path (`str` or `os.PathLike`): The file.
            image (`str`, *optional*): What tells the images from others, such as a hash. The file holds it.
        """
        kept = ImageMemory(self.keys.contiguous(), self.values.contiguous(), self.fingerprint)
        metadata = {"fingerprint": self.fingerprint, "checksum": kept._checksum(image)}
        if image is not None:
            metadata["image"] = image
        unfinished = f"{os.fspath(path)}.{uuid.uuid4()}.part"
        try:
            save_file({"keys": kept.keys, "values": kept.values}, unfinished, metadata=metadata)
            os.replace(unfinished, path)
        except BaseException:
            if os.path.exists(unfinished):
                os.unlink(unfinished)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu", image: str | None = None) -> "ImageMemory":
        """
        Reads what [`~ImageMemory.save`] wrote.

        Args:
            path (`str` or `os.PathLike`): The file.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the memory will be.
            image (`str`, *optional*): What the file must have been saved with.

        Raises:
            ValueError: If the file holds something else, or is damaged, or was written by an earlier version, without a
                checksum. The error names the file and the reason.
        """
        try:
            # Not mapped into memory: it is opened once, and what was checked cannot change afterwards
            with safe_open(path, framework="pt", backend="pread") as file:
                stored, names = file.metadata() or {}, set(file.keys())
                if names != {"keys", "values"} or "fingerprint" not in stored:
                    raise ValueError(f"{path} holds {', '.join(sorted(names))}, which is not an image memory")
                memory = cls(file.get_tensor("keys"), file.get_tensor("values"), stored["fingerprint"])
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if "checksum" not in stored:
            raise ValueError(f"{path} has no checksum, as earlier versions wrote it: encode the images again")
        if stored["checksum"] != memory._checksum(stored.get("image")):
            raise ValueError(f"{path} does not match its own checksum: it was damaged or changed after it was written")
        if image not in (None, stored.get("image")):
            raise ValueError(f"{path} is the memory of another image")
        return memory.to(device)

    def _checksum(self, image: str | None) -> str:
        tensors = self.keys, self.values
        described = [self.fingerprint, image, *([str(tensor.dtype), *tensor.shape] for tensor in tensors)]
        total = zlib.crc32(json.dumps(described).encode())
        for tensor in tensors:
            total = zlib.crc32(_as_bytes(tensor), total)
        return f"crc32:{total:08x}"


class ImageMemoryStore:
    """
    Remembers images by their content, so that a known image skips the vision tower and its prefill.

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
            next process. Several processes may share it. A file that does not hold what was written is encoded again.
        max_folder_bytes (`int`, *optional*, defaults to 40 GiB): How much is kept in the folder, memories of other models
            and processes included. What was used least recently is deleted; see [`ImageMemoryFolder`].

    Attributes:
        hits, misses, evictions (`int`): Images that were known, that were encoded, and that went for lack of room.
        nbytes (`int`): Bytes in memory.
    """

    def __init__(self, model, max_bytes: int, folder: str | os.PathLike | None = None, max_folder_bytes: int = 40 * 2**30):
        self.model, self.max_bytes, self.folder, self.max_folder_bytes = model, max_bytes, folder, max_folder_bytes
        self._files = ImageMemoryFolder(folder, max_folder_bytes) if folder is not None else None
        self.hits = self.misses = self.evictions = self.nbytes = 0
        self._memories: OrderedDict[str, ImageMemory] = OrderedDict()
        self._fingerprint = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._memories)

    def get(self, pixel_values: torch.Tensor) -> list[ImageMemory]:
        """
        The memory of each image. Those that are not known are encoded together, in one pass.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Normalized pixels.
        """
        fingerprint = self.model.image_fingerprint()
        keys = [f"{fingerprint[:16]}-{_hash_tensor(pixels)}" for pixels in pixel_values]
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
                    if self._files is not None:
                        self._write(key, found[key])
            # What was known moves to the end first, so that what is new does not push it out
            for key in sorted(found, key=lambda key: key in unknown):
                self._keep(key, found[key])
                if self._files is not None and key not in unknown:
                    self._files.touch(key)
        return [found[key] for key in keys]

    def _write(self, key: str, memory: ImageMemory) -> None:
        path = self._files.locate(key)
        try:
            if self._files.make_room(memory.nbytes + HEADER_BYTES):
                memory.save(path, image=key)
                self._files.add(key)
        except (SafetensorError, OSError) as error:  # a disk that is full: the answer need not wait for it
            logger.warning("%s cannot be written, the image is known to this process alone: %s", path, error)

    def _find(self, key: str, fingerprint: str) -> ImageMemory | None:
        if key in self._memories:
            return self._memories[key]
        if self._files is None or not self._files.locate(key).is_file():
            return None
        path = self._files.locate(key)
        try:
            memory = ImageMemory.load(path, self.model.device, image=key)
            if memory.fingerprint != fingerprint:
                raise ValueError(f"{path} was made with other weights (fingerprint {memory.fingerprint[:16]})")
            self.model.check_memory_shape(memory, path)
        except FileNotFoundError:  # another process has just deleted it
            return None
        except (ValueError, OSError) as error:
            logger.warning_once(f"The image is encoded again, since a file cannot be used: {error}")
            return None
        return memory

    def _keep(self, key: str, memory: ImageMemory) -> None:
        if key not in self._memories:
            self._memories[key] = memory
            self.nbytes += memory.nbytes
        self._memories.move_to_end(key)
        while self.nbytes > self.max_bytes:
            _, oldest = self._memories.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self.evictions += 1


class VisualChatImageMemoryMixin:
    """How a VisualChat makes image memory, and which it takes."""

    _image_fingerprint: tuple | None = None  # of the base model: the state of its weights, and their hash

    def encode_images(self, pixel_values: torch.Tensor) -> ImageMemory:
        """
        What the decoder knows of images, to be used in their place any number of times, by `image_memory` of
        [`~VisualChatForCausalLM.forward`] and [`~VisualChatForCausalLM.generate`].

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Normalized pixels.

        Raises:
            ValueError: If `config.multimodal_attention` lets image tokens attend to text.
        """
        model = self.base_model
        model._check_memory([])
        if len(pixel_values) == 0:
            return self.encode_images(model.dummy_pixel_values())[:0]
        model.image_fingerprint()  # before any work: raises if there is none
        with torch.no_grad():
            features = torch.stack(model.get_image_features(pixel_values, return_dict=True).pooler_output)
            embedding = model.get_input_embeddings().weight
            features = features.to(embedding.device, embedding.dtype)
            prefix_embeds = None
            if self.config.image_prefix_ids is not None:
                prefix_embeds = model.embed_image_prefix(features.device).to(features.dtype)
            keys, values = model.language_model.encode_images(features, prefix_embeds)
        # Only now: bitsandbytes' layers bring their biases to another dtype in their first pass
        return ImageMemory(keys, values, model.image_fingerprint())

    def image_fingerprint(self) -> str:
        """
        What an image's memory depends on, as a hash: the weights of vision tower, projector and decoder, adapters and what
        quantized layers hold included, the image prefix, and how they are joined. It is computed again when something has
        changed. Under tensor parallelism each process has its own heads, and so its own memory and hash.

        Raises:
            ValueError: If a weight is not in memory, as under offload or ZeRO-3, or in a form that cannot be read.
        """
        model, config = self.base_model, self.config
        # Neither the last norm nor the token embedding, but for an image prefix, has a part in an image's keys and values
        without = ("language_model.embed_tokens.", "language_model.norm.")
        weights = ModelWeights(model, without)
        weights.check("Image memory")
        vision, text = config.vision_config, config.text_config
        joined = {
            "vision": find_tower_family(vision).describe(vision),
            "text": [text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps, text.hidden_act],
            "joined": [config.projector, config.vision_feature_layer, config.vision_feature_select_strategy],
        }
        if config.projector in ("pixel_shuffle", "pooled"):
            factor = config.pixel_shuffle_factor if config.projector == "pixel_shuffle" else config.pool_factor
            joined["joined"] += [factor, config.patch_grid]
        if config.image_prefix_ids is not None:
            with torch.no_grad():
                prefix_embeds = model.embed_image_prefix(model.get_input_embeddings().weight.device)
            joined["prefix"] = [config.image_prefix_ids, text.rope_parameters, _hash_tensor(prefix_embeds)]
        state = joined, describe_state(model, weights)
        if model._image_fingerprint is None or model._image_fingerprint[0] != state:
            description = {**joined, "adapters": state[1][-1]}
            model._image_fingerprint = state, fingerprint_weights(weights, description)
        return model._image_fingerprint[1]

    @property
    def image_memory_nbytes(self) -> int:
        """Bytes of one image's memory: 2 · layers · tokens · key-value heads · head size · bytes of a number."""
        text, tokens = self.config.text_config, self.config.image_seq_length
        return 2 * text.num_hidden_layers * tokens * text.num_key_value_heads * find_head_dim(text) * self.dtype.itemsize

    def check_memory_shape(self, memory: ImageMemory, name: str | os.PathLike = "The image memory") -> None:
        """
        Args:
            memory ([`ImageMemory`]): Of any number of images.
            name (`str` or `os.PathLike`, *optional*): What the error calls it.

        Raises:
            ValueError: If it has another shape than this model makes. Under tensor parallelism it has some of the heads.
        """
        text, given, of_values = self.config.text_config, tuple(memory.keys.shape), tuple(memory.values.shape)
        images, heads = (given[1], given[3]) if len(given) == 5 else (1, 0)
        if heads == 0 or text.num_key_value_heads % heads:
            heads = text.num_key_value_heads
        expected = (text.num_hidden_layers, images, self.config.image_seq_length, heads, find_head_dim(text))
        if not given == of_values == expected:
            raise ValueError(
                f"{name} has keys of the shape {given} and values of the shape {of_values}, but this model's have {expected}"
            )

    def _check_memory(self, memories: list[ImageMemory | None]) -> None:
        variant = self.config.multimodal_attention
        if variant not in ("mmca", "mmca_merged"):
            reason = (
                "its image tokens look at the text and the images before them, so what is known of an image differs from one"
                " conversation to the next"
            )
            if variant == "cross":
                reason = "its images do not pass through the decoder, where there is nothing of theirs to save"
            raise ValueError(f"multimodal_attention={variant!r} cannot use image memory: {reason}")
        theirs = {memory.fingerprint for memory in memories if memory is not None}
        if theirs and theirs != {ours := self.image_fingerprint()}:
            other = min(theirs - {ours})
            raise ValueError(
                f"The image memory was made with other weights or another dtype (fingerprint {other[:16]}, this model has"
                f" {ours[:16]}): encode the images again with this model"
            )
        for memory in memories:
            if memory is not None:
                self.check_memory_shape(memory)


def _hash_tensor(tensor: torch.Tensor) -> str:
    described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(described + _as_bytes(tensor).tobytes()).hexdigest()


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


__all__ = ["ImageMemory", "ImageMemoryStore"]
