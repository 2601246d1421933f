# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A pretrained vision tower and a pretrained decoder, joined with a new projector to be aligned."""

import copy
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, is_gguf_available

from .attention_visualchat import LearnedImageNumbers
from .cross_attention_visualchat import VisualChatCrossAttention
from .decoders_visualchat import DECODERS, list_decoders, without_sliding_window
from .generation_visualchat import drop_unused_flags
from .towers_visualchat import FOLDER_TYPES, MASK_TOKEN, adopt_tower
from .weight_checks_visualchat import find_weight_file


if is_gguf_available():
    from gguf import GGUFReader


class VisualChatJoiningMixin:
    """How a [`VisualChatForCausalLM`] is made of its parts."""

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        *,
        gguf_file: str | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | dict[str, str] | None = None,
        multimodal_attention: str = "mmca_merged",
        **config,
    ) -> PreTrainedModel:
        """
        Joins a vision tower and a decoder of LLaMA's shape with a new, random projector (and with `"cross"` new blocks of
        cross attention, whose gates are closed), makes room for the placeholder token in the embedding, and freezes what the
        paper freezes ([`~VisualChatForCausalLM.freeze_for_alignment`]).

        Args:
            vision (`str` or `PreTrainedModel`): The tower: a Hub id, a folder, or a model, of one of the families of
                `towers_visualchat.py`. Of a CLIP or a SigLIP with a text encoder, the tower is taken. A model's weights are
                shared, not copied.
            text (`str` or `PreTrainedModel`): The decoder: a Hub id, a folder, or a model such as a `LlamaForCausalLM`, of a
                family in `decoders_visualchat.py`. A model's weights are shared, not copied.
            gguf_file (`str`, *optional*): The GGUF file in the decoder's repository or folder. Its weights are dequantized,
                so that the joined model trains and saves as any other. Needs the package `gguf`.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): What ids and folders are loaded in. The
                projector takes the decoder's.
            attn_implementation (`str` or `dict`, *optional*): As for `from_pretrained`.
            multimodal_attention (`str`, *optional*, defaults to `"mmca_merged"`): As in [`VisualChatConfig`], whose default
                is the paper's `"mmca"`. With one softmax models learned as fast in our studies, or faster (docs/study.md).
            config: Other fields of [`VisualChatConfig`]. `image_token_id` defaults to a new id after the decoder's
                vocabulary, as [`VisualChatProcessor`] assigns it.

        Raises:
            TypeError: If one of the parts is another kind of model. Of ids and folders the `model_type` says so, before any
                weights are loaded; see [`check_parts`].
            ValueError: If weights of a part are missing in its files, if a sliding window hides tokens from the decoder's
                layers, if `gguf_file` is given with a model, or if the decoder's `generation_config` cannot be saved.
                Sampling values without `do_sample`, as folders of LLaMA-2 hold them, are left out; with it they are kept.
        """
        check_parts(*(part if isinstance(part, str) else None for part in (vision, text)), gguf_file=gguf_file)
        if isinstance(vision, str):
            vision = load_all_weights(FOLDER_TYPES[read_model_type(vision)].model_class, vision, dtype)
        vision = adopt_tower(vision)
        if isinstance(text, str):
            text = _load_gguf(text, gguf_file, dtype) if gguf_file else load_all_weights(AutoModelForCausalLM, text, dtype)
        decoders = tuple(family.causal_lm_class for family in DECODERS.values())
        if not isinstance(text, decoders):
            names = " or ".join(kind.__name__ for kind in decoders)
            raise TypeError(f"`text` must be a {names}, got {type(text).__name__}")

        vocab_size = text.config.vocab_size
        config.setdefault("image_token_id", vocab_size)
        text_config = copy.deepcopy(text.config)
        if text_config.to_dict().get("quantization_config", {}).get("quant_method") == "gguf":
            del text_config.quantization_config  # the weights are dequantized, but with it nothing is saved
        visualchat_config = cls.config_class(
            vision_config=copy.deepcopy(vision.config),
            text_config=text_config,
            multimodal_attention=multimodal_attention,
            **config,
        )
        visualchat_config.dtype = text.dtype
        if attn_implementation is not None:
            visualchat_config._attn_implementation = attn_implementation
        with torch.device("meta"):
            model = cls(visualchat_config)
        model.model.vision_tower = vision
        weights = text.model.state_dict()
        for name, parameter in model.model.language_model.named_parameters():
            if "image_numbers" in name or "cross_attn" in name:  # no decoder has them
                weights[name] = torch.zeros(parameter.shape, dtype=text.dtype, device=text.device)
        model.model.language_model.load_state_dict(weights, assign=True)
        for layer in model.model.language_model.layers if multimodal_attention == "cross" else ():
            if layer.cross_attn is not None:
                layer.cross_attn.apply(model.model.language_model._init_weights)
        model.model.language_model.rotary_emb = text.model.rotary_emb
        model.lm_head.load_state_dict(text.lm_head.state_dict(), assign=True)
        model.tie_weights()
        model.model.multi_modal_projector.to_empty(device=text.device).to(text.dtype)
        model.model.multi_modal_projector.apply(model._init_weights)

        model.generation_config = drop_unused_flags(text.generation_config)
        model.generation_config.suppress_tokens = [visualchat_config.image_token_id]
        model.generation_config.validate(strict=True)  # as `save_pretrained` does, which may be after days of training
        if visualchat_config.image_token_id >= vocab_size:
            # The new embedding is the placeholder's, in whose position image features stand
            model.resize_token_embeddings(visualchat_config.image_token_id + 1, mean_resizing=False)
        model.freeze_for_alignment()
        return model.eval()

    def freeze_for_alignment(self, train_embedding: bool = True):
        """
        Freezes all but the projector, the learned numbers of images, the blocks of cross attention and the token embedding:
        what the paper trains (section 5), and what is new. With tied embeddings the output layer is the token embedding, and
        trains too.

        Args:
            train_embedding (`bool`, *optional*, defaults to `True`): Whether the token embedding trains. If it does not, the
                answers to text without images stay those of the decoder.
        """
        self.requires_grad_(False)
        self.model.multi_modal_projector.requires_grad_(True)
        for module in self.model.language_model.modules():
            if isinstance(module, LearnedImageNumbers | VisualChatCrossAttention):
                module.requires_grad_(True)
        self.get_input_embeddings().requires_grad_(train_embedding)


def load_all_weights(kind: type[PreTrainedModel], source: str, dtype: str | torch.dtype) -> PreTrainedModel:
    """
    `kind.from_pretrained`, which would go on with random weights where some are missing.

    Args:
        kind (`type`): The class, or an Auto class.
        source (`str`): A folder or a Hub id.
        dtype (`str` or `torch.dtype`): What it is loaded in.

    Raises:
        ValueError: If a weight that a VisualChat uses is missing. The error names it and its file.
    """
    part, info = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if missing := sorted(name for name in info["missing_keys"] if not name.endswith(MASK_TOKEN)):
        count = f"; {len(missing)} tensors are" if len(missing) > 1 else ""
        raise ValueError(f"{find_weight_file(source, missing[0])}: the tensor {missing[0]} is missing{count}")
    return part


def _load_gguf(text: str, gguf_file: str, dtype: str | torch.dtype) -> PreTrainedModel:
    with _readable(text, gguf_file):
        settings = {"dtype": dtype, "gguf_file": gguf_file, "output_loading_info": True}
        decoder, info = AutoModelForCausalLM.from_pretrained(text, **settings)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{gguf_file} in {text}: the tensor {missing[0]} is missing")
    return decoder


@contextmanager
def _readable(text: str, gguf_file: str) -> Iterator[None]:
    """Turns what a damaged GGUF file raises in its readers into a `ValueError` that names it."""
    try:
        yield
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{gguf_file} in {text} cannot be read as GGUF: {error}") from error


def check_parts(vision: str | None, text: str | None, gguf_file: str | None = None) -> None:
    """
    Checks by their configs alone that a tower and a decoder can be joined.

    Args:
        vision (`str`, *optional*), text (`str`, *optional*): Hub ids or folders.
        gguf_file (`str`, *optional*): The GGUF file of `text`.

    Raises:
        TypeError: If one is of another family. It is named, with its `model_type` and those that can be joined.
        ValueError: If a sliding window hides tokens from the decoder's layers, or if a `gguf_file` is given without `text`.
        OSError: If there is no config.
    """
    if vision is not None:
        model_type = read_model_type(vision)
        if model_type not in FOLDER_TYPES:
            raise TypeError(
                f"`vision`: {vision} has the model_type {model_type!r}, but the vision tower must be of"
                f" {' or '.join(map(repr, FOLDER_TYPES))}"
            )
    if text is None:
        if gguf_file is not None:
            raise ValueError(f"`gguf_file` ({gguf_file}) needs `text`, a folder or a Hub id in which it is")
        return
    fields = PreTrainedConfig.get_config_dict(text)[0] if gguf_file is None else _read_gguf_fields(text, gguf_file)
    model_type = fields.get("model_type")
    if model_type not in DECODERS:
        raise TypeError(f"`text`: {text} has the model_type {model_type!r}, but the decoder must be of {list_decoders()}")
    if gguf_file is None:
        without_sliding_window(DECODERS[model_type].config_class.from_dict(fields), f"`text`: {text}")


def _read_gguf_fields(text: str, gguf_file: str) -> dict[str, str]:
    """
    The `model_type` of a GGUF file.

    Raises:
        ImportError: If the package `gguf` is not installed.
        ValueError: If it is no GGUF file, or if it scales rotary positions: transformers reads the weights alone, and would
            compute something else.
    """
    if not is_gguf_available():
        raise ImportError(f"{gguf_file} needs the package gguf: pip install 'gguf>=0.17'")
    with _readable(text, gguf_file):
        reader = GGUFReader(cached_file(text, gguf_file))
        if (field := reader.get_field("general.architecture")) is None:
            raise ValueError("it has no field general.architecture")
        architecture = field.contents()
    scaling_field = reader.get_field(f"{architecture}.rope.scaling.type")
    scaling = "none" if scaling_field is None else scaling_field.contents()
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        found = "a tensor rope_freqs.weight" if scaling == "none" else f"{architecture}.rope.scaling.type {scaling!r}"
        raise ValueError(
            f"`text`: {gguf_file} in {text} scales its rotary positions ({found}), which transformers does not read from"
            " GGUF: take the decoder's original weights, with their config.json"
        )
    return {"model_type": architecture}


def read_model_type(source: str) -> str | None:
    """The `model_type` in the config of a folder or a Hub id."""
    return PreTrainedConfig.get_config_dict(source)[0].get("model_type")
