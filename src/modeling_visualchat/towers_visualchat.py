# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The families of vision towers. Each is an entry of `TOWERS`, which is the only thing to write for another one: it says how
many tokens stand before the patches, and what of the family's model is left out.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import ModelOutput
from transformers.utils import output_capturing


@dataclass(frozen=True)
class TowerFamily:
    """
    A family of vision towers.

    Args:
        name (`str`): What people call it.
        config_class (`type`): The tower's config. `AutoModel` has the model for it.
        count_prefix_tokens (`Callable`): From a config, the tokens before the patches: a class token, registers.
        described_fields (`tuple[str, ...]`): The fields of the config that change what the tower computes although its
            weights and their shapes are the same. They are part of the fingerprint of image memory.
        whole_type (`str`, *optional*): The `model_type` of models that hold such a tower as `vision_model`, beside a text
            encoder.
        settings (`dict`): Fields of the config that a VisualChat sets: no parts that nothing reads, and no random changes of
            positions in training.
        leave_out (`Callable`, *optional*): Takes out of a model what nothing reads.
        takes_any_size (`bool`): Whether the tower takes images of another size than its config's `image_size`.
        has_clip_layers (`bool`): Whether the config describes a `CLIPEncoderLayer`, which the `vit` projector adds.
    """

    name: str
    config_class: type[PreTrainedConfig]
    count_prefix_tokens: Callable[[PreTrainedConfig], int]
    described_fields: tuple[str, ...]
    whole_type: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    leave_out: Callable[[PreTrainedModel], None] | None = None
    takes_any_size: bool = False
    has_clip_layers: bool = False

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return MODEL_MAPPING[self.config_class]

    @property
    def model_types(self) -> tuple[str, ...]:
        """Those whose folders hold such a tower."""
        own = self.config_class.model_type
        return (own, self.whole_type) if self.whole_type else (own,)

    def describe(self, config: PreTrainedConfig) -> list:
        """The values of `described_fields`."""
        return [getattr(config, name) for name in self.described_fields]


def _leave_out_head(tower: PreTrainedModel) -> None:
    """SigLIP's pooling head."""
    if tower.use_head:
        tower.use_head = False
        del tower.head


def _leave_out_mask_token(tower: PreTrainedModel) -> None:
    """
    The token that stands for hidden patches in DINO's pretraining: a parameter that would never get a gradient. An empty
    tensor takes its place, since the tower's initialization writes to it.
    """
    if "mask_token" in dict(tower.embeddings.named_parameters(recurse=False)):
        del tower.embeddings.mask_token
        tower.embeddings.mask_token = torch.zeros(0)


# What each of them computes with its weights
COMMON_FIELDS = ("num_attention_heads", "layer_norm_eps", "hidden_act", "patch_size")
FAMILIES = (
    TowerFamily(
        name="CLIP",
        config_class=CLIPVisionConfig,
        count_prefix_tokens=lambda config: 1,
        described_fields=COMMON_FIELDS,  # without the `model_type`, as in memory files that people have
        whole_type="clip",
        has_clip_layers=True,
    ),
    TowerFamily(
        name="SigLIP (SigLIP2 of a fixed resolution too)",
        config_class=SiglipVisionConfig,
        count_prefix_tokens=lambda config: 0,
        described_fields=("model_type", *COMMON_FIELDS),
        whole_type="siglip",
        settings={"vision_use_head": False},  # pools the patches into one vector
        leave_out=_leave_out_head,
        has_clip_layers=True,
    ),
    TowerFamily(
        name="DINOv2",
        config_class=Dinov2Config,
        count_prefix_tokens=lambda config: 1,
        described_fields=("model_type", *COMMON_FIELDS),
        settings={"use_mask_token": False},
        leave_out=_leave_out_mask_token,
        takes_any_size=True,  # interpolates its positions
    ),
    TowerFamily(
        name="DINOv2 with registers",
        config_class=Dinov2WithRegistersConfig,
        count_prefix_tokens=lambda config: 1 + config.num_register_tokens,
        described_fields=("model_type", *COMMON_FIELDS),
        leave_out=_leave_out_mask_token,
        takes_any_size=True,
    ),
    TowerFamily(
        name="DINOv3 ViT",
        config_class=DINOv3ViTConfig,
        count_prefix_tokens=lambda config: 1 + config.num_register_tokens,
        described_fields=("model_type", *COMMON_FIELDS, "rope_theta"),
        # In training mode the positions would be scaled at random, in a frozen tower too
        settings={"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None},
        leave_out=_leave_out_mask_token,
        takes_any_size=True,  # by rotary positions
    ),
)
TOWERS = {family.config_class.model_type: family for family in FAMILIES}
# What a folder may lack, since it is left out
MASK_TOKEN = "embeddings.mask_token"
# Whether this version of transformers can keep one hidden state alone, named by its index among all
SELECTS_HIDDEN_STATES = "selected_hidden_states" in vars(output_capturing)
# By the `model_type` of a folder
FOLDER_TYPES = {model_type: family for family in FAMILIES for model_type in family.model_types}


def find_tower_family(config: PreTrainedConfig) -> TowerFamily:
    """
    The family of a tower's config.

    Raises:
        TypeError: If VisualChat does not know it. The error lists those that it knows.
    """
    if config.model_type not in TOWERS:
        raise TypeError(
            f"`vision_config` must be a {_list(family.config_class for family in FAMILIES)}, got one with model_type"
            f" {config.model_type!r}"
        )
    return TOWERS[config.model_type]


def make_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with random weights. Its config has the settings of its family."""
    family, tower = find_tower_family(config), AutoModel.from_config(config)
    if family.leave_out is not None:
        family.leave_out(tower)
    return tower


def adopt_tower(model: PreTrainedModel) -> PreTrainedModel:
    """
    The tower of a model, as [`make_tower`] would make it, with the same weights: they are shared, not copied. The model
    itself stays as it is.

    Raises:
        TypeError: If it is no tower of a known family, nor a model that holds one. The error lists the classes.
    """
    family = FOLDER_TYPES.get(model.config.model_type) if isinstance(model, PreTrainedModel) else None
    tower = model
    if family is not None and model.config.model_type == family.whole_type:
        tower = model.vision_model
    if family is None or not isinstance(tower, family.model_class):
        classes = _list(family.model_class for family in FAMILIES)
        raise TypeError(f"`vision` must be a {classes}, got {type(model).__name__}")
    if not family.settings and family.leave_out is None:
        return tower
    tower = copy.deepcopy(tower, {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())})
    for name, value in family.settings.items():
        setattr(tower.config, name, value)
    if family.leave_out is not None:
        family.leave_out(tower)
    return tower


def run_tower(tower: PreTrainedModel, pixel_values: torch.Tensor, layer: int, **kwargs) -> tuple[ModelOutput, torch.Tensor]:
    """
    Args:
        tower (`PreTrainedModel`): What [`make_tower`] or [`adopt_tower`] returned.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Normalized pixels.
        layer (`int`): `vision_feature_layer` of [`VisualChatConfig`].
        kwargs: Of the tower.

    Returns:
        The tower's outputs, and this hidden state, of shape `(images, num_prefix_tokens + patches, vision_hidden_size)`.
    """
    is_last_layer = layer in (-1, tower.config.num_hidden_layers)
    if not is_last_layer and not kwargs.get("output_hidden_states"):
        kwargs["output_hidden_states"] = [layer] if SELECTS_HIDDEN_STATES else True
    outputs = tower(pixel_values, return_dict=True, **kwargs)
    return outputs, outputs.last_hidden_state if is_last_layer else outputs.hidden_states[layer]


def _list(classes) -> str:
    return " or ".join(one.__name__ for one in classes)
