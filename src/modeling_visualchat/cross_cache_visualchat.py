# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The cache of cross attention: in each layer, the keys and values that its self-attention made of text, and those that its
cross attention made of images. The first grow with every token; the second are computed once for each image, and kept.

What `generate` does to a cache is done to both, as in `modality_cache_visualchat.py`, whose positions these layers share.

Shape letters: B batch, G key-value heads, T cached text, I cached image tokens, D head size.
"""

import torch
from transformers.cache_utils import StaticLayer

from .modality_cache_visualchat import GrowingLayer, ModalityLayer, StaticPlaces
from .modality_positions_visualchat import mark_static


class CrossCacheLayer(ModalityLayer):
    """
    One decoder layer's keys and values. In a forward pass, those of images are updated before those of text; a layer without
    cross attention has none of images.
    """

    awaits_text = False

    def adopt(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.update(key_states, value_states)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.update(key_states[:, :, :0], value_states[:, :, :0])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, are_images: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Adds new keys and values of text (BGTD), or of images (BGID), which may be none.

        Returns:
            All keys and all values of this modality so far.
        """
        self.awaits_text = are_images
        if are_images:
            return self._update_images(key_states, value_states)
        if not self.images.is_initialized:
            self._update_images(key_states[:, :, :0], value_states[:, :, :0])
        return self._update_text(key_states, value_states)

    def _update_images(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.images.is_initialized or key_states.shape[2] > 0:
            self.images.update(key_states, value_states)
        return self.images.keys, self.images.values

    def _update_text(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text.update(key_states, value_states)

    def offload(self) -> None:
        # transformers offloads a layer at every update, but the text of this one comes next
        if not self.awaits_text:
            super().offload()


class StaticCrossCacheLayer(StaticPlaces, CrossCacheLayer):
    """The same with a buffer for text. The images stand apart from it: new ones are brought outside of graphs."""

    def _make_parts(self) -> None:
        self.text, self.images = StaticLayer(self.positions.max_cache_len), GrowingLayer()

    @property
    def batch_size(self) -> int:
        return self.text.batch_size

    def _by_modality(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        text, images = super()._by_modality(name)
        return self._in_use(text), images

    def _update_images(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = super()._update_images(key_states, value_states)
        if key_states.shape[2] > 0:
            mark_static(*images)
        return images

    def _update_text(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super()._update_text(key_states, value_states)
        return self._in_use(keys), self._in_use(values)

    def _in_use(self, buffer_BGTD: torch.Tensor) -> torch.Tensor:
        """The columns that have a position. Images take places of the sequence, but no columns of text."""
        return buffer_BGTD[:, :, : self.positions.keys.shape[2]]
