# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""VisualChat model configuration."""

import copy
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .decoders_visualchat import find_decoder_family, without_sliding_window
from .towers_visualchat import find_tower_family


CLIP_VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
"""The vision tower by default."""


@strict
class VisualChatConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VisualChatForCausalLM`]: a vision tower and a decoder of LLaMA's shape, joined by a projector and
    multi-modal causal attention (MMCA; DeepSpeed-VisualChat, arXiv 2309.14327, section 4).

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to CLIP ViT-L/14 at 224 pixels):
            The vision tower, of one of the families of `towers_visualchat.py`. A `dict` without `model_type` is CLIP's.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to LLaMA-2-7B):
            The decoder, of a family in `decoders_visualchat.py`: LLaMA, Mistral, Qwen2 or Qwen3. A `dict` without a
            `model_type` is LLaMA's. A sliding window that hides nothing is left out.
        multimodal_attention (`str`, *optional*, defaults to `"mmca"`):
            `"mmca"`: an image token attends to itself only; a text token sums a softmax over the text keys and a softmax
            over the image keys that it may see (the paper). `"mmca_merged"`: the same, but a text token takes one softmax
            over all of these keys. `"causal"`: plain causal attention over everything (LLaVA, MiniGPT-4).
            `"mmca_released"`: what the released code computes, with its defects, for converted checkpoints
            (`released_attention_visualchat.py`). `"cross"`: images do not pass through the decoder; its layers look at them
            by new blocks of cross attention, which train with the projector (Flamingo; `cross_attention_visualchat.py`).
        cross_attention_every (`int`, *optional*, defaults to 1):
            Which layers of the decoder have cross attention with `"cross"`: every n-th. 1 is all.
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
        learned_image_numbers (`int`, *optional*, defaults to 0):
            In the place of `image_number_keys`, which rests on how the decoder spells numbers: how many numbers have a
            learned embedding in each layer, and so the most images that a conversation can hold. Each token of an image has
            one too, the same in all images. The keys of both are added to the token's own. They are 0 at the start and train
            with the projector.
        image_prefix_ids (`list[int]`, *optional*):
            The image prefix: token ids of a constant text, such as those of `"Image:"`, that each image token attends to
            besides itself, in one softmax and at a fixed distance. By default an image token sees itself only, as in the
            paper. Pretrained decoders treat such a token like the first of a sequence, from which they read nothing: give a
            prefix where the decoder is frozen (`modality_prefix_visualchat.py`). For `"mmca"` and `"mmca_merged"`.
        projector (`str`, *optional*, defaults to `"linear"`):
            `"linear"`: Linear + LayerNorm. `"vit"`: one CLIP encoder layer, then the same. `"perceiver"`: `num_query_tokens`
            learned queries that cross-attend to the patches, then LayerNorm + Linear. `"perceiver_released"`: the same with
            the biases and the learned positions of the released code. `"mlp"`: Linear, GELU, Linear (LLaVA 1.5).
            `"pixel_shuffle"`: `pixel_shuffle_factor` × `pixel_shuffle_factor` patches become one token, then as
            `"linear"`. `"pooled"`: the mean and the maximum of `pool_factor` × `pool_factor` patches become one token, and
            the class token becomes `class_token_outputs` tokens, each by an MLP. `"vit"` is for CLIP and SigLIP.
        num_query_tokens (`int`, *optional*, defaults to 256):
            Learned queries of the perceiver projector, and so the tokens of an image there. A square number.
        pixel_shuffle_factor (`int`, *optional*):
            The side, in patches, of the squares that the `pixel_shuffle` projector makes one token of. It must divide the
            rows and the columns of patches. By default it is 2 with this projector.
        pool_factor (`int`, *optional*):
            The same of the `pooled` projector.
        class_token_outputs (`int`, *optional*):
            How many tokens the `pooled` projector makes of the class token. By default 1; 0 where the tower has none.
        image_size (`int` or `list[int]`, *optional*):
            Height and width, in pixels, of the images that the tower is given, where they are not the `image_size` of
            `vision_config`: DINOv2 is saved with 518 and used at 224. Only DINO's towers take another size.
        vision_feature_layer (`int`, *optional*, defaults to -1):
            The hidden state of the vision tower that is projected. -1 is the tower's last hidden state: behind the final
            norm, where the tower applies one to all tokens (SigLIP, DINO).
        vision_feature_select_strategy (`str`, *optional*, defaults to `"full"`):
            `"full"` keeps what the tower puts before the patches, `"default"` drops it: CLIP's class token, DINO's class
            token and registers, nothing of SigLIP's. The projectors `perceiver` and `pixel_shuffle` never read it;
            `pooled` reads the class token, by `class_token_outputs`.
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
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    multimodal_attention: Literal["mmca", "mmca_merged", "mmca_released", "causal", "cross"] = "mmca"
    cross_attention_every: int = 1
    image_number_keys: bool = False
    image_number_token_ids: list[list[int]] | None = None
    image_number_key_bias: bool = False
    learned_image_numbers: int = 0
    image_prefix_ids: list[int] | None = None
    projector: Literal["linear", "vit", "perceiver", "perceiver_released", "mlp", "pixel_shuffle", "pooled"] = "linear"
    num_query_tokens: int = 256
    pixel_shuffle_factor: int | None = None
    pool_factor: int | None = None
    class_token_outputs: int | None = None
    image_size: int | list[int] | None = None
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    image_token_id: int = 32000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _make_config(self.vision_config, "clip_vision_model", CLIP_VIT_L_14)
        self.text_config = _make_config(self.text_config, "llama", {})
        super().__post_init__(**kwargs)
        if settings := find_tower_family(self.vision_config).settings:
            self.vision_config = copy.deepcopy(self.vision_config)  # the caller's stays as it is
            for name, value in settings.items():
                setattr(self.vision_config, name, value)
        if self.projector == "pixel_shuffle" and self.pixel_shuffle_factor is None:
            self.pixel_shuffle_factor = 2
        if self.projector == "pooled":
            self.pool_factor = 2 if self.pool_factor is None else self.pool_factor
            if self.class_token_outputs is None:
                self.class_token_outputs = min(1, self.num_prefix_tokens)
        if self.image_size is not None and _pair(self.image_size) == _pair(self.vision_config.image_size):
            self.image_size = None
        find_decoder_family(self.text_config)
        self.text_config = without_sliding_window(self.text_config)
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    @classmethod
    def default_config_fields(cls) -> dict:
        """As in transformers. Of parts that are named here, the fields are saved that differ from those of every config."""
        return {**super().default_config_fields(), "vision_config": {}, "text_config": {}}

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
        rows, columns = self.patch_grid
        if self.projector == "pixel_shuffle":
            return rows * columns // self.pixel_shuffle_factor**2
        if self.projector == "pooled":
            return self.class_token_outputs + rows * columns // self.pool_factor**2
        return rows * columns + self.num_prefix_tokens * (self.vision_feature_select_strategy == "full")

    @property
    def max_image_number(self) -> int | None:
        """The most images that a conversation can hold, since the model numbers them. `None`: it does not."""
        if self.image_number_keys:
            return len(self.image_number_token_ids)
        return self.learned_image_numbers or None

    @property
    def is_plain_causal(self) -> bool:
        """Whether the decoder's attention is that of its family, over text and images alike."""
        return self.multimodal_attention == "causal" and self.max_image_number is None

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that the vision tower puts before those of the patches: a class token, registers."""
        return find_tower_family(self.vision_config).count_prefix_tokens(self.vision_config)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images that the vision tower is given, in pixels."""
        return _pair(self.vision_config.image_size if self.image_size is None else self.image_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        height, width = self.input_size
        patch_height, patch_width = _pair(self.vision_config.patch_size)
        return height // patch_height, width // patch_width

    def validate_values(self):
        """Values that the types alone do not exclude."""
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` must be 0 or more, got {self.image_token_id}")
        if self.num_query_tokens < 1 or round(self.num_query_tokens**0.5) ** 2 != self.num_query_tokens:
            raise ValueError(f"`num_query_tokens` must be a square number, got {self.num_query_tokens}")
        self.validate_tower()
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
        for name in ("image_number_keys", "learned_image_numbers"):
            if getattr(self, name) and self.multimodal_attention == "mmca_released":
                raise ValueError(f"`{name}` is not for multimodal_attention='mmca_released', trained without them")
        if self.learned_image_numbers and self.multimodal_attention == "cross":
            raise ValueError("`learned_image_numbers` is not for multimodal_attention='cross': take `image_number_keys`")
        layers = self.text_config.num_hidden_layers
        if not 1 <= self.cross_attention_every <= layers:
            raise ValueError(
                f"`cross_attention_every` must be from 1 to the decoder's {layers} layers, got {self.cross_attention_every}"
            )
        if self.learned_image_numbers < 0:
            raise ValueError(f"`learned_image_numbers` must be 0 or more, got {self.learned_image_numbers}")
        if self.learned_image_numbers and self.image_number_keys:
            raise ValueError("`learned_image_numbers` takes the place of `image_number_keys`: set one of them")
        if self.image_number_token_ids is not None and not all(self.image_number_token_ids):
            empty = self.image_number_token_ids.index([]) + 1
            raise ValueError(f"`image_number_token_ids` holds no token for the number {empty}")

    def validate_image_prefix(self):
        """That image tokens can attend to the image prefix, and that it is text."""
        ids, vocab_size, limit = self.image_prefix_ids, self.text_config.vocab_size, self.text_config.max_position_embeddings
        if ids is None:
            return
        if self.multimodal_attention not in ("mmca", "mmca_merged"):
            is_cross = self.multimodal_attention == "cross"
            reason = "do not pass through the decoder" if is_cross else "see the text before them"
            raise ValueError(
                f"`image_prefix_ids` is not for multimodal_attention={self.multimodal_attention!r}, whose image tokens"
                f" {reason}: leave it out (None)"
            )
        if not ids:
            raise ValueError("`image_prefix_ids` is an empty list: give the ids of at least one token, or None")
        for token_id in ids:
            if not 0 <= token_id < vocab_size or token_id == self.image_token_id:
                reason = "is that of the image placeholder" if token_id == self.image_token_id else "is no token"
                raise ValueError(
                    f"`image_prefix_ids` holds {token_id}, which {reason}: it takes ids from 0 to {vocab_size - 1} that are"
                    " text"
                )
        if len(ids) >= limit:
            raise ValueError(f"`image_prefix_ids` has {len(ids)} tokens, but `max_position_embeddings` is {limit}")

    def validate_tower(self):
        """That the projector and the size of the images suit the vision tower."""
        for name in ("image_size", "patch_size"):
            if getattr(self.vision_config, name) is None:
                raise ValueError(f"`vision_config.{name}` is None, but the number of patches depends on it")
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise ValueError(f"`image_size` must be a number of pixels or [height, width], got {self.image_size}")
        family, (rows, columns) = find_tower_family(self.vision_config), self.patch_grid
        for name, projector in (("pixel_shuffle_factor", "pixel_shuffle"), ("pool_factor", "pooled")):
            factor = getattr(self, name)
            if factor is not None and factor < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {factor}")
            if self.projector == projector and (rows % factor or columns % factor):
                raise ValueError(
                    f"`{name}` is {factor}, which does not divide the vision tower's {rows} × {columns} patches"
                )
        if self.class_token_outputs is not None and self.class_token_outputs < 0:
            raise ValueError(f"`class_token_outputs` must be 0 or more, got {self.class_token_outputs}")
        if self.class_token_outputs and self.num_prefix_tokens == 0:
            raise ValueError(
                f"`class_token_outputs` is {self.class_token_outputs}, but {family.name} has no class token: set it to 0"
            )
        if self.projector == "vit" and not family.has_clip_layers:
            raise ValueError(f"projector='vit' adds a layer of CLIP's, which does not fit a tower of {family.name}")
        if self.image_size is not None and not family.takes_any_size:
            own = _pair(self.vision_config.image_size)
            raise ValueError(
                f"`image_size` is {self.image_size}, but this tower of {family.name} takes images of {own[0]} × {own[1]}"
                " pixels only"
            )
        if min(rows, columns) < 1:
            raise ValueError(f"`image_size`: images of {self.input_size} pixels are smaller than a patch")


def _make_config(given: dict | PreTrainedConfig | None, model_type: str, default: dict) -> PreTrainedConfig:
    """The config of a part: as it was given, or of a `dict`, of this `model_type` unless it names its own."""
    if isinstance(given, PreTrainedConfig):
        return given
    fields = default if given is None else given
    if not isinstance(fields, dict):
        raise TypeError(f"a config must be a `dict`, a `PreTrainedConfig` or `None`, got {type(fields).__name__}")
    model_type = fields.get("model_type", model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model_type {model_type!r}")
    return CONFIG_MAPPING[model_type](**fields)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


__all__ = ["VisualChatConfig"]
