# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
PyTorch VisualChat model (DeepSpeed-VisualChat, arXiv 2309.14327).

    image → CLIP vision tower → projector ─┐
                                           ├→ LLaMA decoder with multi-modal causal attention → next token
    text  → token embedding ───────────────┘
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing

from .attention_visualchat import check_attention_implementation
from .chat_visualchat import ChatSession
from .configuration_visualchat import VisualChatConfig
from .decoder_visualchat import VisualChatTextModel, check_values, find_row_arguments
from .generation_visualchat import VisualChatGenerationMixin, drop_unused_flags
from .image_memory_visualchat import ImageMemory, ModelWeights, describe_state, fingerprint_weights
from .projector_visualchat import PROJECTORS, VisualChatPerceiverProjector
from .released_attention_visualchat import warn_of_defects
from .released_projector_visualchat import VisualChatReleasedPerceiverProjector, released_positions


if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule


# Of a CLIP the vision tower is taken
VISION_TYPES = (CLIPVisionModel.config_class.model_type, CLIPModel.config_class.model_type)
TEXT_TYPES = (LlamaForCausalLM.config_class.model_type,)


@dataclass
class VisualChatModelOutputWithPast(BaseModelOutputWithPast):
    """
    A [`~transformers.modeling_outputs.BaseModelOutputWithPast`] and:

    Args:
        image_hidden_states (`torch.Tensor` of shape `(images, image_seq_length, hidden_size)`, *optional*):
            The projected features of the images of this call.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class VisualChatCausalLMOutputWithPast(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`): Next-token loss.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Scores of the next token.
        past_key_values (`Cache`, *optional*, returned with `use_cache=True`): Keys, values and image numbers seen so far.
        hidden_states (`tuple(torch.Tensor)`, *optional*): One of shape `(batch_size, sequence_length, hidden_size)` for the
            embeddings and one for each layer.
        attentions (`tuple(torch.Tensor)`, *optional*): With `eager`, of shape `(batch_size, heads, sequence_length, keys)`
            for each layer. Under `"mmca"` a text row that sees an image sums to 2.
        image_hidden_states (`torch.Tensor` of shape `(images, image_seq_length, hidden_size)`, *optional*):
            The projected features of the images of this call.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


class VisualChatPreTrainedModel(PreTrainedModel):
    config_class = VisualChatConfig
    config: VisualChatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualChatDecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Folders converted before the released perceiver's positions were a weight lack them: as initialized, they are the same
    _keys_to_ignore_on_load_missing = [r"multi_modal_projector\.positions$"]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if torch.distributed.is_available() and issubclass(cls, FSDPModule):
            # FSDP2 puts a model into a subclass that it makes. What a saved folder needs is the code and the name of its own
            own = cls.__bases__[1]
            cls.__module__, cls.__name__ = own.__module__, own.__name__

    def __init__(self, config: VisualChatConfig):
        check_attention_implementation(config.get_text_config())
        super().__init__(config)

    @classmethod
    def is_custom_code(cls) -> bool:
        # What this guards against, weights written in place, is not done here; and it leaves out the initialization of
        # modules without parameters of their own: CLIP's attention and MLP, when a checkpoint lacks the tower
        return False

    def post_init(self):
        super().post_init()
        # Gathered from CLIP's classes, of which a vision tower has no text: FSDP refuses a name that no module has
        self._no_split_modules.discard("CLIPTextEmbeddings")

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args):
        """As in transformers: called by `from_pretrained` before the weights are read."""
        processes, text = distributed_config.tp_size, model.config.text_config
        if text.num_attention_heads % processes or text.num_key_value_heads % processes:
            raise ValueError(
                f"Tensor parallelism gives each process whole heads: {text.num_attention_heads} heads and"
                f" {text.num_key_value_heads} key-value heads cannot be shared out evenly among {processes} processes"
            )
        return super().maybe_distribute_model(model, distributed_config, *args)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VisualChatPerceiverProjector):
            nn.init.normal_(module.query, std=self.config.text_config.initializer_range)
        if isinstance(module, VisualChatReleasedPerceiverProjector):
            table = released_positions(*module.positions.shape, device=module.positions.device)
            initialization.copy_(module.positions, table)


class VisualChatModel(VisualChatPreTrainedModel):
    """The vision tower, the projector and the decoder, without the language modeling head."""

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        projectors = {**PROJECTORS, "perceiver_released": VisualChatReleasedPerceiverProjector}
        self.multi_modal_projector = projectors[config.projector](config)
        self.language_model = VisualChatTextModel(config)
        self._image_fingerprint = None
        self.post_init()
        if config.multimodal_attention == "mmca_released":
            warn_of_defects()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Images as tokens of the decoder. A frozen vision tower runs without gradients and keeps no activations. A picture
        that occurs twice goes through it once.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Normalized pixels.

        Returns:
            The vision tower's outputs, with `pooler_output` a `list` of one `torch.Tensor` of shape
            `(image_seq_length, hidden_size)` for each image; equal pictures share one.
        """
        if pixel_values.dim() != 4:
            raise ValueError(
                "`pixel_values` must have the shape (images in the batch, channels, height, width), got"
                f" {tuple(pixel_values.shape)}"
            )
        self._refuse_adapters_by_row("vision_tower", self.vision_tower, len(pixel_values))
        self._refuse_adapters_by_row("multi_modal_projector", self.multi_modal_projector, len(pixel_values))
        layer = self.config.vision_feature_layer
        is_last_layer = layer in (-1, self.config.vision_config.num_hidden_layers)
        if not is_last_layer and not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = [layer]  # only this one is kept
        trains = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        first_of, picture_of = find_equal_pictures(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            different = pixel_values if len(first_of) == len(pixel_values) else pixel_values[first_of]
            outputs = self.vision_tower(different, return_dict=True, **kwargs)
        features = outputs.last_hidden_state if is_last_layer else outputs.hidden_states[layer]
        projected = self.multi_modal_projector(features).unbind()
        if len(projected) < len(pixel_values):
            for name, states in outputs.items():
                outputs[name] = _select(states, picture_of)
        outputs.pooler_output = [projected[picture] for picture in picture_of]
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_memory: ImageMemory | list[ImageMemory | None] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualChatModelOutputWithPast:
        """
        See [`VisualChatForCausalLM.forward`] for the inputs, and [`VisualChatTextModel.forward`] for `rows_to_keep`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Specify only one of `pixel_values` and `mm_encoder_outputs`")
        tokens = input_ids if input_ids is not None else inputs_embeds[..., 0]
        if mm_token_type_ids is not None and mm_token_type_ids.shape != tokens.shape:
            raise ValueError(
                f"`mm_token_type_ids` has the shape {tuple(mm_token_type_ids.shape)}, but the inputs have"
                f" {tuple(tokens.shape)}: give one entry for each new token"
            )
        if isinstance(image_memory, ImageMemory):
            image_memory = [image_memory]

        image_outputs = (mm_encoder_outputs or {}).get("image")
        # In a training step, and wherever weights are gathered as they are used, every process of a distributed run calls
        # the same modules in the same order, also with a batch of text alone: a blank picture and the numbers go through
        # them there, with no effect on the result. Else ZeRO-3 and FSDP hang, and ZeRO-1 and ZeRO-2 add up the gradients of
        # different parameters. Without gradients, as `generate` runs, there is no training step in training mode either.
        is_training_step = self.training and torch.is_grad_enabled()
        from_embeds = inputs_embeds is not None
        features_in_place = from_embeds and mm_token_type_ids is not None
        without_images = image_outputs is None and pixel_values is None and not features_in_place
        if without_images and not is_training_step:
            without_images = not image_memory and self.runs_in_step(past_key_values)
        # `generate` gives outputs, of its pictures or none: it has had the blank one encoded
        if without_images and (is_training_step or mm_encoder_outputs is None):
            pixel_values = self.blank_picture()
        if pixel_values is not None:  # before the embedding, as `generate` has it done
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        if not from_embeds:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = image_states = image_source = None
        if image_outputs is not None:
            image_features, picture_of = _stack_different(image_outputs.pooler_output)
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        if without_images and image_features is not None:
            inputs_embeds = inputs_embeds + 0.0 * image_features.sum()
            image_features = None
        num_features = None
        if image_features is not None:
            image_states, per_image = image_features.flatten(0, 1), image_features.shape[1]
            num_features = len(picture_of) * per_image
            if len(image_features) < len(picture_of):
                image_source = _rows_of(picture_of, per_image, inputs_embeds.device)
                image_features = image_features[picture_of]
        if image_memory:
            self._check_memory(image_memory)
            image_source = self._place_memory(image_memory, image_states, image_source)
            num_features = len(image_source)
        # A prefill in chunks may cut through an image, a row of a batch may not. Chunks come without the tower's own output
        is_chunk = bool(mm_encoder_outputs) and image_outputs is not None and image_outputs.get("last_hidden_state") is None
        is_image = self._find_image_rows(
            input_ids, inputs_embeds, mm_token_type_ids, num_features, from_embeds, may_cut=is_chunk
        )
        if is_image is not None and num_features is None:  # features in place
            image_states = inputs_embeds[is_image]

        number_embeds = None
        if self.config.image_number_keys and (is_image is not None or without_images):
            number_embeds = self._embed_image_numbers(inputs_embeds.device).to(inputs_embeds.device, inputs_embeds.dtype)
            for layer in self.language_model.layers:
                self._refuse_adapters_by_row("k_proj", layer.self_attn.k_proj, len(number_embeds))

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            is_image=is_image,
            image_states=image_states,
            image_source=image_source,
            image_memory=tuple({id(memory): memory for memory in image_memory or () if memory is not None}.values()),
            number_embeds=number_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return VisualChatModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def encode_images(self, pixel_values: torch.Tensor) -> ImageMemory:
        """See [`VisualChatForCausalLM.encode_images`]."""
        self._check_memory([])
        if len(pixel_values) == 0:
            return self.encode_images(self.blank_picture())[:0]
        self.image_fingerprint()  # before any work: raises if there is none
        with torch.no_grad():
            features, picture_of = _stack_different(self.get_image_features(pixel_values, return_dict=True).pooler_output)
            embedding = self.get_input_embeddings().weight
            keys, values = self.language_model.encode_images(features.to(embedding.device, embedding.dtype))
        # Only now: bitsandbytes' layers bring their biases to another dtype in their first pass
        memory = ImageMemory(keys, values, self.image_fingerprint())
        return memory if len(memory) == len(picture_of) else memory[picture_of]

    def image_fingerprint(self) -> str:
        """
        What an image's memory depends on, as a hash: the weights of vision tower, projector and decoder, adapters and what
        quantized layers hold included, and how they are joined. It is computed again when something has changed. Under
        tensor parallelism each process has its own heads, and so its own memory and hash.

        Raises:
            ValueError: If a weight is not in memory, as under offload or ZeRO-3, or in a form that cannot be read.
        """
        # Neither the token embedding nor the last norm has a part in an image's keys and values
        without = ("language_model.embed_tokens.", "language_model.norm.")
        weights = ModelWeights(self, without)
        weights.check("Image memory")
        vision, text, config = self.config.vision_config, self.config.text_config, self.config
        joined = {
            "vision": [vision.num_attention_heads, vision.layer_norm_eps, vision.hidden_act, vision.patch_size],
            "text": [text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps, text.hidden_act],
            "joined": [config.projector, config.vision_feature_layer, config.vision_feature_select_strategy],
        }
        state = joined, describe_state(self, weights)
        if self._image_fingerprint is None or self._image_fingerprint[0] != state:
            description = {**joined, "adapters": state[1][-1]}
            self._image_fingerprint = state, fingerprint_weights(weights, description)
        return self._image_fingerprint[1]

    def _check_memory(self, memories: list[ImageMemory | None]) -> None:
        variant = self.config.multimodal_attention
        if variant not in ("mmca", "mmca_merged"):
            raise ValueError(
                f"multimodal_attention={variant!r} cannot use image memory: its image rows look at the text and the images"
                " before them, so what is known of a picture differs from one conversation to the next"
            )
        theirs = {memory.fingerprint for memory in memories if memory is not None}
        if theirs and theirs != {ours := self.image_fingerprint()}:
            other = min(theirs - {ours})
            raise ValueError(
                f"The image memory was made with other weights or another dtype (fingerprint {other[:16]}, this model has"
                f" {ours[:16]}): encode the pictures again with this model"
            )

    def _place_memory(
        self, memories: list[ImageMemory | None], image_states: torch.Tensor | None, image_source: torch.Tensor | None
    ) -> torch.LongTensor:
        """
        For each placeholder the row it stands for, among the rows of `image_states` and after them those of the different
        memories. An entry that is `None` is the next new picture.
        """
        per_image = self.config.image_seq_length
        device = self.get_input_embeddings().weight.device
        num_computed = len(image_states) if image_states is not None else 0
        if image_source is None:
            image_source = torch.arange(num_computed, device=device)
        new = list(image_source.split(per_image)) if num_computed else []
        num_new, expected = len(new), sum(memory is None for memory in memories)
        if expected == 0 and new:
            raise ValueError(f"`image_memory` has no entry `None` for the {num_new} new pictures: say where they stand")
        if num_new != expected:
            raise ValueError(f"`image_memory` has {expected} entries `None`, but {num_new} new pictures were given")
        rows, first_row, end = [], {}, num_computed
        for memory in memories:
            if memory is None:
                rows.append(new.pop(0))
                continue
            if id(memory) not in first_row:
                first_row[id(memory)] = end
                end += len(memory) * per_image
            first = first_row[id(memory)]
            rows.append(torch.arange(first, first + len(memory) * per_image, device=device))
        return torch.cat(rows)

    def runs_in_step(self, past_key_values: Cache | None = None) -> bool:
        """
        Whether the processes of a distributed run gather each module's weights when it is called, and so have to begin a
        conversation by calling the same ones (ZeRO-3, FSDP2).
        """
        if is_tracing() or not torch.distributed.is_available():
            return False
        gathers = is_deepspeed_zero3_enabled() or any(isinstance(part, FSDPModule) for part in self.vision_tower.modules())
        return gathers and (past_key_values is None or past_key_values.get_seq_length() == 0)

    def blank_picture(self) -> torch.Tensor:
        """Of shape `(1, channels, height, width)`: what stands for the pictures of a batch that has none."""
        config = self.config.vision_config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(
            1, config.num_channels, height, width, dtype=self.vision_tower.dtype, device=self.vision_tower.device
        )

    def _find_image_rows(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        mm_token_type_ids: torch.LongTensor | None,
        num_features: int | None,
        from_embeds: bool,
        may_cut: bool,
    ) -> torch.BoolTensor | None:
        """
        The rows that belong to an image, of shape `(batch_size, sequence_length)`, or `None` if all are text. Raises a
        `ValueError` with both counts if the placeholders do not match the `num_features` rows of the images, or unless it
        `may_cut` through an image, if a row of the batch does not hold whole ones.
        """
        if mm_token_type_ids is not None:
            is_image = mm_token_type_ids == 1
        elif input_ids is not None:
            is_image = input_ids == self.config.image_token_id
        elif num_features is not None:
            placeholder = torch.tensor([self.config.image_token_id], device=inputs_embeds.device)
            is_image = (inputs_embeds == self._embed_without_noise(placeholder)).all(-1)
        else:
            return None

        if num_features is None:
            if from_embeds:  # the caller has put the image features in place
                return is_image
            if input_ids.shape[1] > 1:  # a single token is one that was generated
                check_values(
                    ~is_image.any(),
                    lambda: self._describe_mismatch(is_image, 0) + ": pass `pixel_values`",
                    "The batch holds image placeholder tokens, but no images were given: pass `pixel_values`",
                )
            return None
        per_image = self.config.image_seq_length
        matches = is_image.sum() == num_features
        if not may_cut:
            matches = matches & (is_image.sum(-1) % per_image == 0).all()
        check_values(
            matches,
            lambda: self._describe_mismatch(is_image, num_features / per_image),
            "The batch's image placeholder tokens are not those of the images that were given",
        )
        return is_image

    def _describe_mismatch(self, is_image: torch.BoolTensor, num_images: float) -> str:
        per_image = self.config.image_seq_length
        tokens = is_image.sum(-1).tolist()
        return (
            f"The batch holds {sum(tokens)} image placeholder tokens ({', '.join(map(str, tokens))} by row), which makes"
            f" {sum(tokens) / per_image:g} images of {per_image} tokens, but {num_images:g} images were given"
        )

    def _embed_image_numbers(self, device: torch.device) -> torch.Tensor:
        """The embedding of each number as the prompt spells it, the mean over its tokens: `(numbers, hidden_size)`."""
        spellings = self.config.image_number_token_ids
        token_ids = torch.tensor([token for spelling in spellings for token in spelling], device=device)
        embeds = self._embed_without_noise(token_ids)
        owners = [k for k, spelling in enumerate(spellings) for _ in spelling]
        lengths = torch.tensor([len(spelling) for spelling in spellings], device=embeds.device)
        sums = embeds.new_zeros(len(spellings), embeds.shape[-1])
        return sums.index_add(0, torch.tensor(owners, device=embeds.device), embeds) / lengths[:, None]

    def _embed_without_noise(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """
        The embeddings of tokens that are not the prompt's, `(tokens, hidden_size)`. NEFTune's noise, which a hook adds where
        the embedding is in training mode, belongs to the prompt. The module is called, as ZeRO-3 and FSDP2 gather weights by
        its call, and with the shape of a prompt, which hooks expect.
        """
        embedding = self.get_input_embeddings()
        self._refuse_adapters_by_row("embed_tokens", embedding, len(token_ids))
        was_training, embedding.training = embedding.training, False
        try:
            return embedding(token_ids[None])[0]
        finally:
            embedding.training = was_training

    def _refuse_adapters_by_row(self, name: str, part: nn.Module, num_inputs: int) -> None:
        """Raises a `ValueError` if PEFT is to give rows of the batch their own adapters in a part that does not see rows."""
        if is_tracing():
            return
        for argument, of_rows in find_row_arguments(part).items():
            if max(len(of_rows), num_inputs) > 1:
                raise ValueError(
                    f"PEFT's `{argument}` is for {len(of_rows)} rows of a batch, but the adapters change {name} too, where"
                    f" {num_inputs} pictures or image numbers go in, and not rows: use one adapter at a time (`set_adapter`)"
                )


class VisualChatForCausalLM(VisualChatPreTrainedModel, VisualChatGenerationMixin):
    """
    VisualChat with its language modeling head: what trains, generates and chats.

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained("outputs/demo/model", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("outputs/demo/model", trust_remote_code=True)
    >>> messages = [{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "Who?"}]}]
    >>> inputs = processor.apply_chat_template(
    ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    >>> processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```"""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        self.model = VisualChatModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # Saved with the config, so that each of these loads the folder; registration alone keeps only one of them
        auto_classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
        config.auto_map = {
            "AutoConfig": "configuration_visualchat.VisualChatConfig",
            **dict.fromkeys(auto_classes, "modeling_visualchat.VisualChatForCausalLM"),
        }
        # A placeholder is input only: it stands for an image that a generated one would lack
        self.generation_config.suppress_tokens = [config.image_token_id]

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | CLIPVisionModel | CLIPModel,
        text: str | LlamaForCausalLM,
        *,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | dict[str, str] | None = None,
        **config,
    ) -> "VisualChatForCausalLM":
        """
        Joins a CLIP vision tower and a LLaMA-family decoder with a new, random projector, makes room for the placeholder
        token in the embedding, and freezes what the paper freezes ([`~VisualChatForCausalLM.freeze_for_alignment`]).

        Args:
            vision (`str`, `CLIPVisionModel` or `CLIPModel`): The tower: a Hub id, a folder, or a model. A model's weights
                are shared, not copied.
            text (`str` or `LlamaForCausalLM`): The decoder: a Hub id, a folder, or a model. A model's weights are shared,
                not copied.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): What ids and folders are loaded in. The
                projector takes the decoder's.
            attn_implementation (`str` or `dict`, *optional*): As for `from_pretrained`.
            config: Fields of [`VisualChatConfig`]. `image_token_id` defaults to a new id after the decoder's vocabulary, as
                [`VisualChatProcessor`] assigns it.

        Raises:
            TypeError: If one of the parts is another kind of model. Of ids and folders the `model_type` says so, before any
                weights are loaded; see [`check_parts`].
            ValueError: If the decoder's `generation_config` cannot be saved. Sampling values without `do_sample`, as folders
                of LLaMA-2 hold them, are left out; with it they are kept.
        """
        check_parts(*(part if isinstance(part, str) else None for part in (vision, text)))
        if isinstance(vision, str):
            vision = CLIPVisionModel.from_pretrained(vision, dtype=dtype)
        elif isinstance(vision, CLIPModel):
            vision = vision.vision_model
        if isinstance(text, str):
            text = LlamaForCausalLM.from_pretrained(text, dtype=dtype)
        for name, part, expected in (("vision", vision, CLIPVisionModel), ("text", text, LlamaForCausalLM)):
            if not isinstance(part, expected):
                raise TypeError(f"`{name}` must be a {expected.__name__}, got {type(part).__name__}")

        vocab_size = text.config.vocab_size
        config.setdefault("image_token_id", vocab_size)
        visualchat_config = cls.config_class(
            vision_config=copy.deepcopy(vision.config), text_config=copy.deepcopy(text.config), **config
        )
        visualchat_config.dtype = text.dtype
        if attn_implementation is not None:
            visualchat_config._attn_implementation = attn_implementation
        with torch.device("meta"):
            model = cls(visualchat_config)
        model.model.vision_tower = vision
        model.model.language_model.load_state_dict(text.model.state_dict(), assign=True)
        model.model.language_model.rotary_emb = text.model.rotary_emb
        model.lm_head.load_state_dict(text.lm_head.state_dict(), assign=True)
        model.tie_weights()
        model.model.multi_modal_projector.to_empty(device=text.device).to(text.dtype)
        model.model.multi_modal_projector.apply(model._init_weights)

        model.generation_config = drop_unused_flags(text.generation_config)
        model.generation_config.suppress_tokens = [visualchat_config.image_token_id]
        model.generation_config.validate(strict=True)  # as `save_pretrained` does, which may be after days of training
        if visualchat_config.image_token_id >= vocab_size:
            # The new row is a placeholder's: image features stand in its place
            model.resize_token_embeddings(visualchat_config.image_token_id + 1, mean_resizing=False)
        model.freeze_for_alignment()
        return model.eval()

    def freeze_for_alignment(self):
        """
        Freezes all but the projector and the token embedding: what the paper trains (section 5). With tied embeddings the
        output layer is the token embedding, and trains too.
        """
        self.requires_grad_(False)
        self.model.multi_modal_projector.requires_grad_(True)
        self.get_input_embeddings().requires_grad_(True)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`VisualChatModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def encode_images(self, pixel_values: torch.Tensor) -> ImageMemory:
        """
        What the decoder knows of pictures, to be used in their place any number of times, by `image_memory` of
        [`~VisualChatForCausalLM.forward`] and [`~VisualChatForCausalLM.generate`].

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Normalized pixels.

        Raises:
            ValueError: If `config.multimodal_attention` lets image rows look at text.
        """
        return self.model.encode_images(pixel_values)

    def image_fingerprint(self) -> str:
        """See [`VisualChatModel.image_fingerprint`]."""
        return self.model.image_fingerprint()

    @property
    def image_memory_nbytes(self) -> int:
        """Bytes of one image's memory: 2 · layers · tokens · key-value heads · head size · bytes of a number."""
        text, tokens = self.config.text_config, self.config.image_seq_length
        return 2 * text.num_hidden_layers * tokens * text.num_key_value_heads * text.head_dim * self.dtype.itemsize

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_memory: ImageMemory | list[ImageMemory | None] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualChatCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens, with `config.image_seq_length` placeholders for each image, as the processor expands them.
            pixel_values (`torch.Tensor` of shape `(images in the batch, channels, height, width)`, *optional*):
                Normalized pixels of the images of `input_ids`, in reading order: row by row, left to right.
            attention_mask (`torch.Tensor` of shape `(batch_size, tokens seen so far)`, *optional*): 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Rotary positions.
            past_key_values (`Cache`, *optional*): What earlier calls returned. Any cache class.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                In place of `input_ids`. With image features already in place, say so by `mm_token_type_ids`.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 where a token belongs to an image. By default it is read off `input_ids`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": model.get_image_features(pixel_values)}` in place of `pixel_values`.
            image_memory ([`ImageMemory`] or `list`, *optional*):
                What [`~VisualChatForCausalLM.encode_images`] returned, in place of `pixel_values`, for the images of
                `input_ids` in reading order. In a list, `None` stands for the next picture of `pixel_values`. The logits at
                the placeholders of remembered images are those of zeros.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Next tokens to learn, -100
                where there is no loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Compute only the last logits, or those at
                these positions. 0 is all. With a boolean tensor of shape `(batch_size, sequence_length)` that holds at least
                the positions before the labels, the loss is the same, and the vocabulary projection takes these rows only;
                logits then have the shape `(positions, vocab_size)`. With `num_items_in_batch` and without labels it is as
                0: so calls the `Trainer` where it computes the loss itself, from its labels and the logits of all positions
                (`label_smoothing_factor`, `compute_loss_func`).

        Raises:
            ValueError: If the placeholders do not match the images; both counts are given. If the `Trainer` computes the
                loss of a compiled model itself.
        """
        takes_mask = isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool
        if labels is None and kwargs.get("num_items_in_batch") is not None:
            if torch.compiler.is_compiling():
                _refuse_loss_of_compiled_model()
            if takes_mask:
                logits_to_keep, takes_mask = 0, False
        rows_to_keep = None
        if (tokens := input_ids if input_ids is not None else inputs_embeds) is not None:
            rows_to_keep = _rows_with_logits(logits_to_keep, tokens.shape[:2], tokens.device)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            image_memory=image_memory,
            rows_to_keep=rows_to_keep,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            next_tokens = kwargs.pop("shift_labels", None)  # given where a sequence is shared out over processes
            if next_tokens is None:
                next_tokens = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            if takes_mask:
                next_tokens = next_tokens[logits_to_keep]
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                shift_labels=next_tokens,
                **kwargs,
            )
        return VisualChatCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def start_chat(self, processor, **settings) -> ChatSession:
        """
        A conversation with this model.

        Args:
            processor (`VisualChatProcessor`): The model's.
            settings: See [`ChatSession`].
        """
        return ChatSession(self, processor, **settings)


def check_parts(vision: str | None, text: str | None) -> None:
    """
    Checks by their configs alone that a tower and a decoder can be joined.

    Args:
        vision (`str`, *optional*), text (`str`, *optional*): Hub ids or folders.

    Raises:
        TypeError: If one is of another family. It is named, with its `model_type` and those that can be joined.
        OSError: If there is no config.
    """
    for name, source, allowed in (("vision", vision, VISION_TYPES), ("text", text, TEXT_TYPES)):
        if source is None:
            continue
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if model_type not in allowed:
            kind = "vision tower" if name == "vision" else "decoder"
            raise TypeError(
                f"`{name}`: {source} has the model_type {model_type!r}, but the {kind} must be of"
                f" {' or '.join(map(repr, allowed))}"
            )


@torch.compiler.disable
def _refuse_loss_of_compiled_model() -> None:
    """In a graph that is traced, an error would be traced too."""
    raise ValueError(
        "The Trainer computes the loss itself from the logits of a compiled model, which it does not know as a language"
        " model: with label_smoothing_factor it would smooth labels that are not shifted. Leave out torch_compile, or"
        " label_smoothing_factor and compute_loss_func"
    )


def find_equal_pictures(pixel_values: torch.Tensor) -> tuple[list[int], list[int]]:
    """
    Args:
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): The pictures.

    Returns:
        The index of the first of each different picture; and for each picture, which of these it is.
    """
    if len(pixel_values) < 2 or is_tracing() or pixel_values.requires_grad:
        return list(range(len(pixel_values))), list(range(len(pixel_values)))
    sums = pixel_values.flatten(1).sum(1, dtype=torch.float64).tolist()
    first_of, picture_of = [], []
    for index, total in enumerate(sums):
        known = (k for k, first in enumerate(first_of) if sums[first] == total)
        same = next((k for k in known if torch.equal(pixel_values[first_of[k]], pixel_values[index])), None)
        if same is None:
            same = len(first_of)
            first_of.append(index)
        picture_of.append(same)
    return first_of, picture_of


def _select(states: torch.Tensor | tuple | None, index: list[int]):
    if isinstance(states, tuple):
        return tuple(_select(one, index) for one in states)
    return None if states is None else states[index]


def _stack_different(features: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """
    The features of different pictures, of shape `(different, tokens, hidden_size)`, and which of them each entry is. Equal
    pictures share one tensor, also after `generate` has repeated them for its beams.
    """
    if is_tracing():  # a graph does not know which are the same
        return torch.stack(features), list(range(len(features)))
    different: dict[int, int] = {}
    picture_of = [different.setdefault(id(one), len(different)) for one in features]
    stacked = [features[picture_of.index(k)] for k in range(len(different))]
    return torch.stack(stacked), picture_of


def _rows_of(pictures: list[int], per_image: int, device: torch.device) -> torch.LongTensor:
    first_rows = torch.tensor(pictures, device=device)[:, None] * per_image
    return (first_rows + torch.arange(per_image, device=device)).flatten()


def _rows_with_logits(
    logits_to_keep: int | torch.Tensor, shape: tuple[int, int], device: torch.device
) -> torch.BoolTensor | None:
    """The rows whose logits are computed, of shape `(batch_size, sequence_length)`; `None`: all."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep == 0 or logits_to_keep >= shape[1]:
            return None
        return (torch.arange(shape[1], device=device) >= shape[1] - logits_to_keep).expand(shape)
    logits_to_keep = logits_to_keep.to(device).expand(shape[0], -1)
    if logits_to_keep.dtype == torch.bool:
        return logits_to_keep
    return torch.zeros(shape, dtype=torch.bool, device=device).scatter(1, logits_to_keep % shape[1], True)


# Where the Trainer smooths labels, it shifts them for the classes that it finds here by name; of a model with PEFT's virtual
# tokens it looks at what is inside, without the head
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["visualchat"] = "VisualChatForCausalLM"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["visualchat_model"] = "VisualChatModel"

__all__ = ["VisualChatForCausalLM", "VisualChatModel", "VisualChatPreTrainedModel"]
