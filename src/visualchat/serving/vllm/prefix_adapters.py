# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The image prefix under LoRA adapters, which vLLM keeps in a few slots, in any layer. Each slot has a prefix of its own, which
the decoder computes when another adapter comes into the slot.
"""

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager

from .decoder import VisualChatTextModel


LANGUAGE_MODEL = "language_model"
"""vLLM's name of the adapters' metadata for the decoder, from `get_mm_mapping`."""


class PrefixAdapters:
    """
    Args:
        decoder (`VisualChatTextModel`): With an image prefix in each layer.
        token_ids (`list[int]`): Of the prefix.
        slots (`int`): Of adapters.
        max_tokens (`int`): The most tokens of a batch.
    """

    def __init__(self, decoder: VisualChatTextModel, token_ids: list[int], slots: int, max_tokens: int):
        self.decoder, self.token_ids = decoder, token_ids
        self.computed: list[LoRAModel | None] = [None] * slots
        self.slots_T = torch.full((max_tokens,), -1)
        for layer in decoder.layers:
            layer.self_attn.image_prefix.share_slots(self.slots_T)

    @torch.no_grad()
    def prepare(self, manager: LoRAModelManager) -> None:
        """Before a forward pass: the slots of its tokens, and the prefixes of adapters that are new."""
        loaded, is_changed = manager.list_adapters(), False
        for slot, adapter_id in enumerate(manager.lora_index_to_id):
            adapter = loaded.get(adapter_id)
            if adapter is None or adapter is self.computed[slot]:
                continue
            self._map(manager, LoRAMapping((adapter_id,) * len(self.token_ids), (adapter_id,), is_prefill=True))
            self.decoder.remember_prefix(self.token_ids, slot)
            self.computed[slot], is_changed = adapter, True
        if is_changed:
            self._map(manager, manager._last_mapping)  # that of the batch
        slots_T = manager.punica_wrapper_mapping[LANGUAGE_MODEL].token_lora_indices
        self.slots_T[: len(slots_T)].copy_(slots_T)

    def _map(self, manager: LoRAModelManager, mapping: LoRAMapping) -> None:
        """Tells the layers which adapter each row of their input has."""
        metadata = manager.punica_wrapper_mapping[LANGUAGE_MODEL]
        metadata.update_metadata(mapping, manager.lora_index_to_id, manager.lora_slots + 1, manager.vocab_size)
