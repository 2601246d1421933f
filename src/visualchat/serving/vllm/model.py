# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""VisualChat in vLLM: the tower and the projector of `modeling_visualchat`, and vLLM's decoder with MMCA."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMRoPE,
    SupportsMultiModal,
)
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors

from modeling_visualchat.released_projector_visualchat import ALL_PROJECTORS
from modeling_visualchat.towers_visualchat import make_tower, run_tower

from .config import check_config
from .decoder import VisualChatDecoderLayer, VisualChatTextForCausalLM, make_llama_config
from .prefix_adapters import PrefixAdapters
from .processing import VisualChatDummyInputsBuilder, VisualChatMultiModalProcessor, VisualChatProcessingInfo
from .token_notes import write_notes


TOWER = "model.vision_tower."
"""How the names of the tower's weights begin in a folder."""


@MULTIMODAL_REGISTRY.register_processor(
    VisualChatMultiModalProcessor, info=VisualChatProcessingInfo, dummy_inputs=VisualChatDummyInputsBuilder
)
class VisualChatForCausalLM(nn.Module, SupportsMultiModal, SupportsMRoPE, SupportsLoRA):
    """
    Raises:
        ValueError: If the model, or what vLLM is told to do with it, cannot be served; see [`check_config`].
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            TOWER: "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )
    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_config(vllm_config)
        config = self.config = vllm_config.model_config.hf_config
        text_config = make_llama_config(config.text_config)
        self.configure_mm_token_handling(vocab_size=text_config.vocab_size, mm_token_ids=[config.image_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = make_tower(config.vision_config).to(vllm_config.model_config.dtype)
            self.multi_modal_projector = ALL_PROJECTORS[config.projector](config)
        with self._mark_language_model(vllm_config):
            self.language_model = VisualChatTextForCausalLM(
                vllm_config=vllm_config.with_hf_config(text_config, architectures=["LlamaForCausalLM"]),
                prefix=maybe_prefix(prefix, "language_model"),
                layer_type=partial(VisualChatDecoderLayer, config),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        lora_config = vllm_config.lora_config
        self.lora_manager = self.prefix_adapters = None  # vLLM sets the first
        if lora_config is not None and config.image_prefix_ids is not None:
            self.prefix_adapters = PrefixAdapters(
                self.language_model.model,
                config.image_prefix_ids,
                lora_config.max_loras,
                vllm_config.scheduler_config.max_num_batched_tokens,
            )
        if config.image_number_keys:  # they are made of the tokens' embeddings, once
            embeddings = self.language_model.embedding_modules
            self.language_model.embedding_modules = {
                name: role for name, role in embeddings.items() if name != "embed_tokens"
            }

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        if isinstance(pixel_values, list):
            pixel_values = torch.stack(pixel_values)
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        _, features = run_tower(self.vision_tower, pixel_values, self.config.vision_feature_layer)
        return self.multi_modal_projector(features)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        places = sorted((feature.mm_position.offset, feature.mm_position.length) for feature in mm_features)
        tokens_per_number = 1 if self.config.learned_image_numbers else self.config.image_seq_length
        return write_notes(len(input_tokens), places, tokens_per_number)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if self.prefix_adapters is not None and self.lora_manager is not None:
            self.prefix_adapters.prepare(self.lora_manager)
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:  # of the other processes of tensor parallelism
            # As `generation_config.suppress_tokens` says, which vLLM does not read
            logits[..., self.config.image_token_id] = float("-inf")
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # Folders keep the names that a tower's family had first, which its class in transformers may have changed
        conversions = get_model_conversion_mapping(self.vision_tower)
        renaming = WeightsMapper(orig_to_new_renaming=[one for one in conversions if isinstance(one, WeightRenaming)])

        def rename(name: str) -> str:
            in_tower = name.removeprefix(TOWER)
            return name if in_tower == name else f"{TOWER}{renaming.map_name(in_tower)}"

        renamed = ((rename(name), weight) for name, weight in weights)
        return AutoWeightsLoader(self).load_weights(renamed, mapper=self.hf_to_vllm_mapper)

    def process_weights_after_loading(self) -> None:
        """Called by vLLM when the layers' own weights are in their final form."""
        config, decoder = self.config, self.language_model.model
        if config.max_image_number is not None:
            decoder.remember_numbers(config.image_number_token_ids if config.image_number_keys else None)
        if config.image_prefix_ids is not None:
            decoder.remember_prefix(config.image_prefix_ids, slot=-1)
