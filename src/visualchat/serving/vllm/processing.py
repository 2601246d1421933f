# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A prompt and its images to tokens and pixel values, in vLLM's interfaces."""

from collections.abc import Mapping, Sequence

from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from modeling_visualchat import VisualChatConfig, VisualChatProcessor


class VisualChatProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self) -> VisualChatConfig:
        return self.ctx.get_hf_config(VisualChatConfig)

    def get_hf_processor(self, **kwargs: object) -> VisualChatProcessor:
        return self.ctx.get_hf_processor(VisualChatProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": self.get_hf_config().max_image_number}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().image_seq_length}


class VisualChatDummyInputsBuilder(BaseDummyInputsBuilder[VisualChatProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        height, width = self.info.get_hf_config().input_size
        options = mm_options.get("image")
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count, overrides=options)}


class VisualChatMultiModalProcessor(BaseMultiModalProcessor[VisualChatProcessingInfo]):
    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        placeholder = [config.image_token_id]
        replacement = placeholder * config.image_seq_length
        return [PromptReplacement(modality="image", target=placeholder, replacement=replacement)]

    def apply(self, inputs, timing_ctx):
        """
        As in vLLM.

        Raises:
            ValueError: If the prompt has another number of placeholders than there are images. vLLM's chat template does not
                know which text people typed, so that `<image>` in a question is a placeholder there.
        """
        token_id, images = self.info.get_hf_config().image_token_id, inputs.mm_data_items.get_all_counts().get("image", 0)
        if (placeholders := inputs.prompt.count(token_id)) != images:
            token = self.info.get_hf_processor().image_token
            raise ValueError(
                f"The prompt has {placeholders} placeholders {token} for {images} images: a text may not contain {token},"
                " only messages of the user may have images, and truncate_prompt_tokens may not cut one"
            )
        return super().apply(inputs, timing_ctx)
