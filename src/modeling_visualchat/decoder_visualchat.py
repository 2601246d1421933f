# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The decoder: LLaMA's, with multi-modal causal attention in place of plain causal attention."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlamaConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_tracing, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_visualchat import VisualChatConfig
from .modality_attention_visualchat import ModalityLayout
from .modality_cache_visualchat import can_keep_modalities_apart, get_places, keep_modalities_apart
from .modality_masks_visualchat import computes_by_flex
from .released_attention_visualchat import ReleasedMask, place_in_reverse
from .sequence_attention_visualchat import (
    MultimodalMask,
    VisualChatAttention,
    check_attention_implementation,
    create_multimodal_mask,
    find_conversation_starts,
    update_image_numbers,
)


class VisualChatRMSNorm(LlamaRMSNorm):
    """LLaMA's norm in one kernel in place of eight, which on a GPU each go through memory."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class VisualChatMLP(LlamaMLP):
    """LLaMA's MLP. Where nothing is differentiated, it works in place: new memory costs a CPU more than what is computed."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.is_silu = config.hidden_act == "silu"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or is_tracing() or not self.is_silu or self._is_watched():
            return super().forward(hidden_states)
        gate = nn.functional.silu(self.gate_proj(hidden_states), inplace=True)
        return self.down_proj(gate.mul_(self.up_proj(hidden_states)))

    def _is_watched(self) -> bool:
        """Whether somebody's hooks are given what would be overwritten."""
        parts = (*self.gate_proj.modules(), *self.act_fn.modules())
        return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class VisualChatDecoderLayer(GradientCheckpointingLayer):
    """LLaMA's decoder layer around [`VisualChatAttention`]."""

    def __init__(self, config: LlamaConfig, layer_idx: int, image_number_key_bias: bool = False):
        super().__init__()
        self.self_attn = VisualChatAttention(config, layer_idx, image_number_key_bias)
        self.mlp = VisualChatMLP(config)
        self.input_layernorm = VisualChatRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = VisualChatRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        number_embeds: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: MultimodalMask | ReleasedMask | ModalityLayout,
        past_key_values: Cache | None = None,
        image_numbers: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask,
            past_key_values,
            self.input_layernorm(number_embeds) if number_embeds is not None else None,
            image_numbers,
            **kwargs,
        )
        if isinstance(attention_mask, ModalityLayout):
            hidden_states = attention_mask.keep(hidden_states)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SequenceOrder(nn.Module):
    """Puts hidden states into the order of the sequence. What is recorded as hidden states is what this returns."""

    def forward(self, previous: torch.Tensor, hidden_states: torch.Tensor, layout: ModalityLayout | None) -> torch.Tensor:
        """
        Args:
            previous (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The hidden states before the
                layer, in order; those before the first layer are recorded too.
            hidden_states (`torch.Tensor`): What the layer returned.
            layout (`ModalityLayout`, *optional*): How its rows are sorted, if they are.
        """
        return hidden_states if layout is None else layout.to_sequence(hidden_states)


class VisualChatTextModel(LlamaPreTrainedModel):
    """
    LLaMA's decoder with multi-modal causal attention. Its parameters have the names of a
    [`~transformers.LlamaModel`], and its config is a plain `LlamaConfig`.
    """

    _no_split_modules = ["VisualChatDecoderLayer"]
    _supports_flash_attn = False
    _can_record_outputs = {"hidden_states": SequenceOrder, "attentions": VisualChatAttention}

    def __init__(self, config: VisualChatConfig):
        super().__init__(config.text_config)
        self.multimodal_attention = config.multimodal_attention
        self.image_seq_length = config.image_seq_length
        text_config = config.text_config
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size, text_config.pad_token_id)
        self.layers = nn.ModuleList(
            [
                VisualChatDecoderLayer(text_config, layer_idx, config.image_number_key_bias)
                for layer_idx in range(text_config.num_hidden_layers)
            ]
        )
        self.norm = VisualChatRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(text_config)
        self.sequence_order = SequenceOrder()
        self.sdpa_config = copy.copy(text_config)
        self.sdpa_config._attn_implementation = "sdpa"
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        is_image: torch.BoolTensor | None = None,
        image_states: torch.Tensor | None = None,
        image_source: torch.LongTensor | None = None,
        image_memory: Sequence = (),
        number_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        rows_to_keep: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Text embeddings; where an
                image stands, anything.
            is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The rows that belong to an
                image. `None`: all of them are text.
            image_states (`torch.Tensor` of shape `(image rows, hidden_size)`, *optional*): Projected features, of each
                picture once.
            image_source (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which row of `image_states`, or after
                them of `image_memory`, each placeholder stands for, in reading order. `None`: its own.
            image_memory (`Sequence[ImageMemory]`): Images whose keys and values are known.
            number_embeds (`torch.Tensor` of shape `(numbers, hidden_size)`, *optional*): Embeddings of the numbers 1, 2, ….
                Without images they have no effect.
            rows_to_keep (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The rows of the last
                hidden state that are read. The others may be zero.
        """
        check_attention_implementation(self.config)
        begins = find_conversation_starts(position_ids, attention_mask, past_key_values)
        may_be_packed = begins is not None and attention_mask is None and not is_tracing()
        is_packed = may_be_packed and bool(begins[:, 1:].any())
        # A cache cannot be gone on with where a row holds several conversations, and with one they are not kept apart
        if use_cache and past_key_values is None and not is_packed:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if is_image is not None:
            self.check_length(inputs_embeds.shape[1], past_length)
        num_placeholders = None
        if image_source is not None or image_states is not None:
            num_placeholders = len(image_source) if image_source is not None else len(image_states)
        is_sortable = self._is_sortable(is_image, num_placeholders, attention_mask, position_ids, past_key_values)
        sorts_rows = is_sortable and not is_packed
        if image_memory and not sorts_rows:
            raise ValueError(
                "image_memory needs attn_implementation 'sdpa' or 'flex_attention', a dynamic or static cache or none, a"
                " 2-dimensional attention_mask, and one PEFT adapter for all rows (no `adapter_names`). Under torch.compile,"
                " it needs to be without a cache"
            )
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        records = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if sorts_rows:
            image_numbers = None
            layout = self._sort_rows(
                is_image,
                attention_mask,
                position_embeddings,
                inputs_embeds.shape[:2],
                past_key_values,
                image_source=image_source,
                memory=image_memory,
                num_placeholders=num_placeholders,
            )
            self._check_numbers(layout.image_numbers, number_embeds)
            masks = [layout] * len(self.layers)
            if rows_to_keep is not None and not records and not is_tracing():
                reads_images = is_image is not None and bool((rows_to_keep & is_image).any())
                masks[-1] = layout.keep_rows(rows_to_keep, reads_images)
            hidden_states = inputs_embeds.flatten(0, 1)[layout.text_rows]
            if image_states is not None:
                hidden_states = torch.cat([hidden_states, image_states])
            hidden_states = hidden_states[None]
            in_order = layout.to_sequence(hidden_states) if records else None
        else:
            if image_states is not None:
                placed = image_states if image_source is None else image_states[image_source]
                if self.multimodal_attention == "mmca_released":
                    if is_packed:
                        raise ValueError(
                            "multimodal_attention='mmca_released' takes one conversation in each row of a batch, but"
                            " `position_ids` begin again within a row: pad the conversations instead of packing them"
                        )
                    placed = place_in_reverse(placed, is_image, self.image_seq_length)
                inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], placed)
            hidden_states = in_order = inputs_embeds
            mask, image_numbers = self._mask_rows(
                inputs_embeds, is_image, number_embeds, attention_mask, position_ids, past_key_values, begins
            )
            masks = [mask] * len(self.layers)

        for layer, mask in zip(self.layers, masks):
            # By position: what needs a gradient. Reentrant gradient checkpointing does not see keyword arguments
            hidden_states = layer(
                hidden_states,
                number_embeds,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                image_numbers=image_numbers,
                **kwargs,
            )
            if records:
                in_order = self.sequence_order(in_order, hidden_states, mask if sorts_rows else None)
        hidden_states = self.norm(hidden_states)
        if sorts_rows:
            hidden_states = masks[-1].to_sequence(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    @torch.no_grad()
    def encode_images(self, image_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The keys, before rotation and numbering, and the values of images in every layer.

        Args:
            image_states (`torch.Tensor` of shape `(images, image_seq_length, hidden_size)`): Projected features.

        Returns:
            Both of shape `(layers, images, image_seq_length, key-value heads, head_size)`.
        """
        images, length = image_states.shape[:2]
        is_image = torch.ones(1, images * length, dtype=torch.bool, device=image_states.device)
        position_embeddings = self.rotary_emb(image_states, torch.zeros_like(is_image, dtype=torch.long))
        layout = ModalityLayout(
            is_image,
            None,
            position_embeddings,
            is_image.shape,
            length,
            records=True,
            num_placeholders=images * length,
        )
        masks = [layout] * len(self.layers)
        masks[-1] = layout.keep_rows(is_image, keeps_images=False)
        hidden_states = image_states.flatten(0, 1)[None]
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, None, position_embeddings=position_embeddings, attention_mask=mask)
        keys, values = zip(*layout.recorded)
        return torch.stack(keys).unflatten(1, (images, length)), torch.stack(values).unflatten(1, (images, length))

    def can_sort_rows(self, attention_mask: torch.Tensor | BlockMask | None) -> bool:
        """Whether the attention can be computed by modality, with such a mask."""
        is_own = self.multimodal_attention in ("mmca", "mmca_merged")
        is_plain = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)
        return is_own and is_plain and self.config._attn_implementation in ("sdpa", "flex_attention")

    def _is_sortable(
        self,
        is_image: torch.Tensor | None,
        num_placeholders: int | None,
        attention_mask: torch.Tensor | BlockMask | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> bool:
        """Whether this call, unless it holds packed conversations, can be computed by modality."""
        can_sort = self.can_sort_rows(attention_mask)
        if get_places(past_key_values) is not None:
            if not can_sort:
                raise ValueError(
                    "The conversation in past_key_values was begun with attn_implementation='sdpa' or 'flex_attention' and a"
                    " 2-dimensional attention_mask: go on with both"
                )
            return True
        # Text alone is computed as LLaMA's is; but flex attention would compile each kind of shape, and few are worth it
        if not can_sort or (is_image is None and self.config._attn_implementation != "flex_attention"):
            return False
        if is_tracing():
            # A graph is not made to change what a cache consists of
            is_plain = position_ids is None or attention_mask is not None
            return is_plain and past_key_values is None and num_placeholders is not None
        if find_row_arguments(self):  # sorted by modality, a batch is one row
            return False
        if past_key_values is not None:
            return can_keep_modalities_apart(past_key_values, self.config.num_hidden_layers)
        return True

    def _sort_rows(self, is_image, attention_mask, rotary, shape, past_key_values, **images) -> ModalityLayout:
        is_merged = self.multimodal_attention == "mmca_merged"
        places = get_places(past_key_values)
        if past_key_values is not None and places is None:
            places = keep_modalities_apart(
                past_key_values, self.config.num_hidden_layers, shape[0], rotary[0].device, joined=is_merged
            )
        # New images of a cached conversation are sorted as the data has it, outside of a graph
        is_for_graphs = is_image is None or (places is None and images["num_placeholders"] is not None)
        make = ModalityLayout if is_for_graphs else _make_layout_outside_of_graphs
        uses_flex = self.config._attn_implementation == "flex_attention" and computes_by_flex(rotary[0].device)
        if uses_flex and self.training and self.config.attention_dropout > 0:
            raise ValueError("'flex_attention' has no dropout: set attention_dropout=0 or attn_implementation='sdpa'")
        settings = {"merged": is_merged, "places": places, "uses_flex": uses_flex, **images}
        return make(is_image, attention_mask, rotary, tuple(shape), self.image_seq_length, **settings)

    def _mask_rows(
        self, inputs_embeds, is_image, number_embeds, attention_mask, position_ids, past_key_values, begins
    ) -> tuple[MultimodalMask | ReleasedMask, torch.Tensor | None]:
        image_numbers, key_image_numbers = update_image_numbers(
            past_key_values,
            is_image,
            self.image_seq_length,
            inputs_embeds.shape[:2],
            inputs_embeds.device,
            begins,
        )
        if number_embeds is not None and image_numbers is None:
            image_numbers = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int, device=inputs_embeds.device)
        self._check_numbers(image_numbers, number_embeds)
        variant = self.multimodal_attention
        if variant == "mmca_released" and is_image is None:
            variant = "mmca"  # rows of text that follow all images, where the two agree
        is_flex = self.config._attn_implementation == "flex_attention" and not isinstance(attention_mask, BlockMask)
        uses_sdpa = is_flex and not computes_by_flex(inputs_embeds.device)
        mask = create_multimodal_mask(
            variant,
            self.sdpa_config if uses_sdpa else self.config,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            image_numbers,
            key_image_numbers,
        )
        return mask, image_numbers

    def _check_numbers(self, image_numbers: torch.Tensor | None, number_embeds: torch.Tensor | None) -> None:
        if number_embeds is None or image_numbers.numel() == 0:
            return
        check_values(
            image_numbers.max() <= len(number_embeds),
            lambda: (
                f"A conversation holds {int(image_numbers.max())} images, but config.image_number_token_ids spells"
                f" only {len(number_embeds)} numbers"
            ),
            f"A conversation holds more images than config.image_number_token_ids spells numbers, {len(number_embeds)}",
        )

    def check_length(self, new_length: int, past_length: int | torch.Tensor = 0) -> None:
        """
        Raises a `ValueError` if this many tokens are more than the decoder has positions for. A static cache, whose length
        is a tensor, has a limit of its own.
        """
        if isinstance(past_length, torch.Tensor):
            return
        limit = self.config.max_position_embeddings
        if past_length + new_length > limit and self.config.rope_parameters["rope_type"] != "dynamic":
            raise ValueError(
                f"The input is {past_length + new_length} tokens long, but the decoder's max_position_embeddings is {limit}:"
                f" shorten the conversation or bring fewer images ({self.image_seq_length} tokens each)"
            )


def check_values(holds: torch.BoolTensor, describe: Callable[[], str], summary: str) -> None:
    """
    Raises a `ValueError` that describes the data unless `holds`. In a graph, an assertion of torch says the `summary`: torch
    2.11 cannot trace transformers' `torch_compilable_check` of a tensor.
    """
    if is_tracing():
        torch._assert_async(holds, summary)
    else:
        torch_compilable_check(holds, describe)


def find_row_arguments(module: nn.Module) -> dict[str, Sequence]:
    """
    What PEFT tells its layers inside a module of the rows of the batch, one entry a row: `adapter_names`, which adapter each
    has, or `alora_offsets`, from which token on. Its hooks put them among the layers' arguments.
    """
    hooks = (hook for part in module.modules() for hook in part._forward_pre_hooks.values() if isinstance(hook, partial))
    names = ("adapter_names", "alora_offsets")
    return next(({name: hook.keywords[name]} for hook in hooks for name in names if name in hook.keywords), {})


@torch.compiler.disable
def _make_layout_outside_of_graphs(*args, **kwargs) -> ModalityLayout:
    return ModalityLayout(*args, **kwargs)
