# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""VisualChat model configuration."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .decoders_visualchat import find_decoder_family, without_sliding_window


@strict
class VisualChatConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VisualChatForCausalLM`]: a CLIP vision tower and a decoder of LLaMA's shape, joined by a projector
    and multi-modal causal attention (MMCA; DeepSpeed-VisualChat, arXiv 2309.14327, section 4).

    Args:
        vision_config (`CLIPVisionConfig` or `dict`, *optional*, defaults to CLIP ViT-L/14 at 224 pixels):
            The vision tower.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to LLaMA-2-7B):
            The decoder, of a family in `decoders_visualchat.py`: LLaMA, Mistral, Qwen2 or Qwen3. A `dict` without a
            `model_type` is LLaMA's. A sliding window that hides nothing is left out.
        multimodal_attention (`str`, *optional*, defaults to `"mmca"`):
            `"mmca"`: an image token attends to itself only; a text token sums a softmax over the text keys and a softmax
            over the image keys that it may see (the paper). `"mmca_merged"`: the same, but a text token takes one softmax
            over all of these keys. `"causal"`: plain causal attention over everything (LLaVA, MiniGPT-4).
            `"mmca_released"`: what the released code computes, with its defects, for converted checkpoints
            (`released_attention_visualchat.py`).
        image_number_keys (`bool`, *optional*, defaults to `False`):
            In every layer, add the key of the image's number, as the prompt spells it, to the keys of the image's tokens.
            Needs `image_number_token_ids`.
        image_number_token_ids (`list[list[int]]`, *optional*):
            Entry `k - 1` holds the token ids that spell the number `k` in the prompt
            ([`VisualChatProcessor.image_number_token_ids`] makes this list). Its length is the largest number of images that
            a conversation can hold when `image_number_keys` is on.
        image_number_key_bias (`bool`, *optional*, defaults to `False`):
            Whether the key of a number has the bias of `k_proj` too, for decoders with `attention_bias`. The image's own key
            has it, so that it counts twice. Folders saved before this field existed were trained so: they load
            with `True`.
        projector (`str`, *optional*, defaults to `"linear"`):
            `"linear"`: Linear + LayerNorm. `"vit"`: one CLIP encoder layer, then the same. `"perceiver"`: `num_query_tokens`
            learned queries that cross-attend to the patches, then LayerNorm + Linear. `"perceiver_released"`: the same with
            the biases and the learned positions of the released code.
        num_query_tokens (`int`, *optional*, defaults to 256):
            Learned queries of the perceiver projector, and so the tokens of an image there. A square number.
        vision_feature_layer (`int`, *optional*, defaults to -1):
            The hidden state of the vision tower that is projected. -1 is the tower's last hidden state.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"full"`):
            `"full"` keeps the class token, `"default"` drops it. The perceiver projector never reads it.
        image_token_id (`int`, *optional*, defaults to 32000):
            The id of the `<image>` placeholder in `input_ids`.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output layer shares the token embedding. A tied `text_config` sets it, and to set it afterwards sets
            that of `text_config`.

    Raises a `StrictDataclassError` that names the field if a value has the wrong type or is not allowed.

    ```python
    >>> from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM

    >>> config = VisualChatConfig(text_config={"num_hidden_layers": 2}, multimodal_attention="mmca")
    >>> model = VisualChatForCausalLM(config)  # random weights
    ```"""

    model_type = "visualchat"
    # What the Trainer does not gather with the logits. Batches differ in their number of images, and some have none
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=CLIPVisionConfig,
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    multimodal_attention: Literal["mmca", "mmca_merged", "mmca_released", "causal"] = "mmca"
    image_number_keys: bool = False
    image_number_token_ids: list[list[int]] | None = None
    image_number_key_bias: bool = False
    projector: Literal["linear", "vit", "perceiver", "perceiver_released"] = "linear"
    num_query_tokens: int = 256
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    image_token_id: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        part, expected = self.vision_config, CLIPVisionConfig
        if part.model_type != expected.model_type:
            raise TypeError(f"`vision_config` must be a {expected.__name__}, got one with model_type {part.model_type!r}")
        find_decoder_family(self.text_config)
        self.text_config = without_sliding_window(self.text_config)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "VisualChatConfig":
        """As in transformers. What an earlier version saved computes what it was trained to."""
        is_saved = "transformers_version" in config_dict
        if is_saved and config_dict.get("image_number_keys") and "image_number_key_bias" not in config_dict:
            config_dict = {**config_dict, "image_number_key_bias": True}
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, name: str, value):
        is_first = name not in self.__dict__
        super().__setattr__(name, value)
        if name == "tie_word_embeddings" and not is_first:
            self.text_config.tie_word_embeddings = value

    @property
    def hidden_size(self) -> int:
        """The decoder's: what DeepSpeed's `"auto"` bucket sizes are computed from."""
        return self.text_config.hidden_size

    @property
    def image_seq_length(self) -> int:
        """Tokens that one image takes in `input_ids`."""
        if self.projector in ("perceiver", "perceiver_released"):
            return self.num_query_tokens
        height, width = _pair(self.vision_config.image_size)
        patch_height, patch_width = _pair(self.vision_config.patch_size)
        patches = (height // patch_height) * (width // patch_width)
        return patches + (self.vision_feature_select_strategy == "full")

    def validate_values(self):
        """Values that the types alone do not exclude."""
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` must be 0 or more, got {self.image_token_id}")
        if self.num_query_tokens < 1 or round(self.num_query_tokens**0.5) ** 2 != self.num_query_tokens:
            raise ValueError(f"`num_query_tokens` must be a square number, got {self.num_query_tokens}")
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}, but the vision tower has hidden states"
                f" {-layers - 1} to {layers}"
            )
        if self.image_number_keys and not self.image_number_token_ids:
            raise ValueError(
                "`image_number_keys` needs `image_number_token_ids`, the token ids that spell 1, 2, 3, … in the prompt:"
                " `processor.image_number_token_ids()` gives them"
            )
        if self.image_number_keys and self.multimodal_attention == "mmca_released":
            raise ValueError("`image_number_keys` is not for multimodal_attention='mmca_released', trained without them")
        if self.image_number_token_ids is not None and not all(self.image_number_token_ids):
            empty = self.image_number_token_ids.index([]) + 1
            raise ValueError(f"`image_number_token_ids` holds no token for the number {empty}")


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


__all__ = ["VisualChatConfig"]
