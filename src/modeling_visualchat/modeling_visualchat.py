# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
PyTorch VisualChat model (DeepSpeed-VisualChat, arXiv 2309.14327).

    image → vision tower → projector ─┐
                                      ├→ LLaMA decoder with multi-modal causal attention → next token
    text  → token embedding ──────────┘
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_visualchat import VisualChatConfig
from .decoder_visualchat import VisualChatTextModel
from .distributed_visualchat import VisualChatDistributedMixin, VisualChatDummyImageMixin
from .generation_visualchat import VisualChatGenerationMixin
from .image_inputs_visualchat import PlacedImages, VisualChatImageInputsMixin, find_different_images, repeat_images
from .image_memory_visualchat import ImageMemory, VisualChatImageMemoryMixin
from .input_checks_visualchat import check_attention_implementation
from .joining_visualchat import VisualChatJoiningMixin
from .kept_logits_visualchat import find_kept, is_mask, keep_logits_for_trainer, slice_kept
from .projector_visualchat import init_projector_weights
from .released_attention_visualchat import warn_of_defects
from .released_projector_visualchat import ALL_PROJECTORS, VisualChatReleasedPerceiverProjector, released_positions
from .towers_visualchat import make_tower, run_tower
from .weight_checks_visualchat import VisualChatWeightChecksMixin


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
            for each layer. Under `"mmca"` and `"cross"` the weights of a text token that sees an image sum to 2. An image
            prefix has no column, so that the weights of an image token, its own among the columns, sum to less than 1 with
            it.
        image_hidden_states (`torch.Tensor` of shape `(images, image_seq_length, hidden_size)`, *optional*):
            The projected features of the images of this call.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


class VisualChatPreTrainedModel(
    VisualChatDistributedMixin, VisualChatImageMemoryMixin, VisualChatWeightChecksMixin, PreTrainedModel
):
    config_class = VisualChatConfig
    config: VisualChatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # CLIP's is of the `vit` projector; the tower has its own
    _no_split_modules = ["VisualChatDecoderLayer", "VisualChatCrossDecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Folders converted before the released perceiver's positions were a weight lack them: as initialized, they are the same
    _keys_to_ignore_on_load_missing = [r"multi_modal_projector\.positions$"]

    def __init__(self, config: VisualChatConfig):
        check_attention_implementation(config.text_config, config.multimodal_attention, config.is_plain_causal)
        super().__init__(config)

    @classmethod
    def is_custom_code(cls) -> bool:
        # Of custom code, transformers does not initialize modules without parameters of their own: CLIP's attention and MLP,
        # when a checkpoint lacks the tower. It guards against weights written in place, which is not done here
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_projector_weights(module, self.config.text_config.initializer_range)
        if isinstance(module, VisualChatReleasedPerceiverProjector):
            table = released_positions(*module.positions.shape, device=module.positions.device)
            initialization.copy_(module.positions, table)


class VisualChatModel(VisualChatPreTrainedModel, VisualChatImageInputsMixin, VisualChatDummyImageMixin):
    """The vision tower, the projector and the decoder, without the language modeling head."""

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        self.vision_tower = make_tower(config.vision_config)
        self.multi_modal_projector = ALL_PROJECTORS[config.projector](config)
        self.language_model = VisualChatTextModel(config)
        self.post_init()
        if config.multimodal_attention == "mmca_released":
            warn_of_defects()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Images as tokens of the decoder. A frozen vision tower runs without gradients and keeps no activations.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Normalized pixels.

        Returns:
            The vision tower's outputs, with `pooler_output` a `list` of one `torch.Tensor` of shape
            `(image_seq_length, hidden_size)` for each image; equal images share one.
        """
        if pixel_values.dim() != 4:
            raise ValueError(
                "`pixel_values` must have the shape (images in the batch, channels, height, width), got"
                f" {tuple(pixel_values.shape)}"
            )
        self.check_adapters_of_images(len(pixel_values))
        trains = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        different, image_of = find_different_images(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            outputs, features = run_tower(self.vision_tower, different, self.config.vision_feature_layer, **kwargs)
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return repeat_images(outputs, image_of)

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
        See [`VisualChatForCausalLM.forward`] for the inputs, and [`VisualChatTextModel.forward`] for `tokens_to_keep`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Specify only one of `pixel_values` and `mm_encoder_outputs`")
        if isinstance(image_memory, ImageMemory):
            image_memory = [image_memory]

        # Vision tower and projector, before the embedding, as `generate` calls them: it gives the outputs of its images, or
        # an empty dict where it has had the dummy image encoded
        image_outputs = (mm_encoder_outputs or {}).get("image")
        has_features = inputs_embeds is not None and mm_token_type_ids is not None  # in place
        has_images = pixel_values is not None or image_outputs is not None or has_features
        needs_dummy = not has_images and self.needs_dummy_image(past_key_values, has_memory=bool(image_memory))
        if needs_dummy and (mm_encoder_outputs is None or torch.is_grad_enabled()):
            pixel_values = self.dummy_pixel_values()
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if needs_dummy and image_outputs is not None:
            dummy = image_outputs.pooler_output[0].to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds, image_outputs = inputs_embeds + 0.0 * dummy.sum(), None

        # Placeholders. A prefill in chunks, which come without the tower's own output, may cut through an image
        is_chunk = bool(mm_encoder_outputs) and image_outputs is not None and image_outputs.get("last_hidden_state") is None
        images = self.place_images(image_outputs, image_memory, inputs_embeds)
        count = images.count_tokens()
        is_image = self.get_placeholder_mask(input_ids, inputs_embeds, count, mm_token_type_ids, may_cut=is_chunk)
        if is_image is not None and count is None:
            images = PlacedImages(states=inputs_embeds[is_image])
        numbers_images, prefix_embeds = is_image is not None or needs_dummy, None
        number_embeds = self.embed_image_numbers(inputs_embeds) if numbers_images else None
        if self.config.image_prefix_ids is not None and (images.states is not None or needs_dummy):
            prefix_embeds = self.embed_image_prefix(inputs_embeds.device).to(inputs_embeds.dtype)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            is_image=is_image,
            image_states=images.states,
            image_source=images.source,
            image_memory=images.memories,
            number_embeds=number_embeds,
            numbers_images=numbers_images,
            prefix_embeds=prefix_embeds,
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
            image_hidden_states=images.features,
        )


class VisualChatForCausalLM(VisualChatPreTrainedModel, VisualChatJoiningMixin, VisualChatGenerationMixin):
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

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`VisualChatModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

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
                Normalized pixels of the images of `input_ids`, in reading order: sequence by sequence, left to right.
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
                `input_ids` in reading order. In a list, `None` stands for the next image of `pixel_values`. The logits at
                the placeholders of remembered images are those of zeros.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Next tokens to learn, -100
                where there is no loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Compute only the last logits, or those at
                these positions. 0 is all. With a boolean tensor of shape `(batch_size, sequence_length)` that holds at least
                the positions before the labels, the loss is the same, and the vocabulary projection takes these tokens only;
                logits then have the shape `(positions, vocab_size)`. With `num_items_in_batch` and without labels it is as
                0: so calls the `Trainer` where it computes the loss itself, from its labels and the logits of all positions
                (`label_smoothing_factor`, `compute_loss_func`).

        Raises:
            ValueError: If the placeholders do not match the images; both counts are given. If the `Trainer` computes the
                loss of a compiled model itself.
        """
        if labels is None and kwargs.get("num_items_in_batch") is not None:
            logits_to_keep = keep_logits_for_trainer(logits_to_keep)
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
            tokens_to_keep=find_kept(logits_to_keep, input_ids if input_ids is not None else inputs_embeds),
            **kwargs,
        )
        logits = self.lm_head(slice_kept(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            shift_labels = kwargs.pop("shift_labels", None)  # given where a sequence is shared out over processes
            if shift_labels is None:
                shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            if is_mask(logits_to_keep):
                shift_labels = shift_labels[logits_to_keep]
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                shift_labels=shift_labels,
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


# Where the Trainer smooths labels, it shifts them for the classes that it finds here by name; of a model with PEFT's virtual
# tokens it looks at what is inside, without the head
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["visualchat"] = "VisualChatForCausalLM"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["visualchat_model"] = "VisualChatModel"
# The pipeline finds here which models it takes, and else says that it does not know this one
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["visualchat"] = "VisualChatForCausalLM"

__all__ = ["VisualChatForCausalLM", "VisualChatModel", "VisualChatPreTrainedModel"]
