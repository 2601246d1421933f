# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path of multi-modal causal attention: tokens by modality.

An image token attends to nothing but itself. So it needs no query and no score, its output is its value, and equal images
have equal hidden states: an image is computed once, wherever and however often it stands in the batch. The layers therefore
carry one stream without padding: the text tokens of the batch, then the tokens of its different images. Where an image
stands (its position, its number) matters only for the keys that text tokens attend to.

With an image prefix (`modality_prefix_visualchat.py`), images have queries for it, and its tokens end the stream. All other
queries are those of text tokens. They attend to text keys and to image keys in separate calls, so no matrix of all tokens by
all tokens is made.

Where a graph is traced (`torch.compile`, `torch.export`, a CUDA graph), shapes must not depend on data. There, padding is
kept among the text tokens, and a batch that brings images is treated as one long sequence, in which no query sees beyond
the sequence that it came from.

Shape letters: B batch, Q new tokens, S sequences and N their new tokens (B and Q, or one sequence of all), P packed tokens,
W tokens of the longest text, T text keys, I image keys, K all of both, H query heads, G key-value heads, D head size.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.utils import is_tracing

from .attention_visualchat import AttentionPlan, VisualChatAttention
from .modality_kernels_visualchat import (
    ImageCall,
    PackedTokens,
    Visibility,
    attend_to_images,
    join,
    merged_softmax,
    rotate,
    softmax,
    with_signed_sin,
    without_cudnn,
)
from .modality_positions_visualchat import NO_KEY, ModalityPositions, cut_mask, sort_by_modality
from .modality_prefix_visualchat import ImagePrefix


class ModalityPlan(AttentionPlan):
    """
    Text tokens, then the tokens of the different images, in one stream of shape `(1, text and image tokens, …)`.

    Args:
        is_image_BQ (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The placeholders among the new
            tokens. `None`: all of them are text.
        attention_mask (`torch.Tensor` of shape `(batch_size, tokens seen)`, *optional*): 0 for padding.
        rotary: cos and sin of shape `(batch_size or 1, sequence_length, head_size)`.
        batch_and_length (`tuple[int, int]`): B and Q.
        image_seq_length (`int`): Tokens that share a number in `image_numbers`: those of one image, or each alone.
        merged (`bool`): Whether text and images share one softmax (`mmca_merged`).
        positions (`ModalityPositions`, *optional*): Positions of the cached keys. The new ones are added to it.
        image_source (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which image token of the stream, or after
            them of the memory, each placeholder stands for. `None`: its own, in order.
        memory (`Sequence[ImageMemory]`): Images whose keys and values are known.
        records (`bool`): Whether to keep the keys and values of the image tokens of each layer in `recorded`.
        num_placeholders (`int`, *optional*): How many placeholders there are. Needed where a graph is traced.
        uses_flex (`bool`): Whether flex attention computes what needs a mask, where that is the faster way.
        prefix (`ImagePrefix`, *optional*): What image tokens attend to besides themselves. Its tokens are the stream's last.
    """

    _shared = ("recorded",)

    def __init__(
        self,
        is_image_BQ: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch_and_length: tuple[int, int],
        image_seq_length: int,
        merged: bool = False,
        positions: ModalityPositions | None = None,
        image_source: torch.Tensor | None = None,
        memory: Sequence = (),
        records: bool = False,
        num_placeholders: int | None = None,
        uses_flex: bool = False,
        prefix: ImagePrefix | None = None,
    ):
        batch_size, length = self.shape = batch_and_length
        self.device = rotary[0].device
        self.is_traced, self.merged = is_tracing(), merged
        self.visibility = Visibility(rotary[0].dtype, self.is_traced, uses_flex)
        self.begins = positions is None or positions.is_empty
        self.past_length = 0 if self.begins else positions.length + 0  # a static cache counts in place
        if attention_mask is not None and not self.is_traced:
            attention_mask = cut_mask(attention_mask, int(self.past_length), length)
        self.sequences = (batch_size, length)
        if self.is_traced and is_image_BQ is not None:
            self.sequences = (1, batch_size * length)
            attention_mask = attention_mask.reshape(self.sequences) if attention_mask is not None else None
        self.attention_mask = attention_mask

        # A single text token in a dynamic cache is one that was decoded. What follows from a static one comes without a mask
        may_pad = is_image_BQ is not None or length > 1 or self.begins or positions.is_compileable
        self.text_index, self.image_index = sort_by_modality(
            is_image_BQ, attention_mask if may_pad else None, batch_and_length, self.device, num_placeholders
        )
        is_whole = is_image_BQ is None and len(self.text_index) == batch_size * length
        self.text = self._pack(self.text_index, is_whole)
        self.images = self._pack(self.image_index, is_image_BQ is None)
        self.num_text = len(self.text_index)
        self.image_numbers = self.image_index
        if is_image_BQ is not None:
            seen_B1 = 0 if self.begins else (positions.of_images != NO_KEY).sum(-1, keepdim=True)
            rank_P = (is_image_BQ.cumsum(-1) - 1 + seen_B1).flatten()[self.image_index]
            self.image_numbers = rank_P // image_seq_length + 1

        self.all_rotary = tuple(part.expand(batch_size, -1, -1).flatten(0, 1) for part in with_signed_sin(*rotary))
        self.text_rotary = self._rotary_of(self.text_index, self.text)
        self.image_rotary = self._rotary_of(self.image_index, self.images)

        self.text_positions_BT = self.text.pad(self._positions_of(self.text_index), NO_KEY)
        self.image_positions_BI = self.images.pad(self._positions_of(self.image_index), NO_KEY)
        if positions is not None:
            positions.extend(self.text_positions_BT, self.image_positions_BI, length)
            if attention_mask is not None and not self.is_traced:
                positions.note_padding(attention_mask)
            if not self.begins:
                self.text_positions_BT, self.image_positions_BI = positions.of_text, positions.of_images
        # What every query sees needs no mask. A graph must know it before it sees the data
        self.sees_all_images = (
            is_image_BQ is None and attention_mask is None and positions is not None and positions.has_no_gaps
        )

        self.image_source = image_source
        self.is_in_order = image_source is None
        if image_source is not None and not self.is_traced:
            in_order = torch.arange(len(self.image_index), device=self.device)
            self.is_in_order = torch.equal(image_source, in_order)
        self.memory = memory
        self.prefix, self.keeps_prefix = prefix, prefix is not None
        self.recorded = [] if records else None
        self._look(None, keeps_images=True)

    def move_to(self, device: torch.device, **kwargs) -> "ModalityPlan":
        plan = super().move_to(device, **kwargs)
        masks = [self.mask, *(call.mask for _, calls in self.image_calls for call in calls)]
        if any(isinstance(mask, BlockMask) for mask in masks):  # its function holds tensors that cannot be moved
            plan._look(plan.kept_text, self.keeps_images)
        return plan

    def _pack(self, index: torch.Tensor, is_whole: bool = False) -> PackedTokens:
        sequences, length = self.sequences
        width = len(index) // sequences if is_whole or self.is_traced else None
        return PackedTokens(index // length, sequences, width)

    def _rotary_of(self, index: torch.Tensor, packed: PackedTokens) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(packed.pad(part[index])[:, None] for part in self.all_rotary)

    def _positions_of(self, index: torch.Tensor) -> torch.Tensor:
        return index % self.sequences[1] + self.past_length

    def for_last_layer(self, is_read: torch.BoolTensor) -> "ModalityPlan":
        """Text tokens that are not read have no query. Either all image tokens are computed to the end, or none."""
        plan = copy.copy(self)
        kept_text = is_read.flatten()[self.text_index].nonzero()[:, 0]
        keeps_images = len(self.image_index) > 0 and bool(is_read.flatten()[self.image_index].any())
        plan._look(kept_text if len(kept_text) < self.num_text else None, keeps_images)
        plan.keeps_prefix = False
        return plan

    def _look(self, kept_text: torch.Tensor | None, keeps_images: bool) -> None:
        """
        What the text tokens `kept_text` (`None`: all) attend to.

        `mask`, of shape `(batch_size, 1, W, T or K)` or a `BlockMask`, is for the scores of text keys, and in `mmca_merged`
        of image keys behind them: `None` is all of them, or with `is_causal` those up to the query's own. `image_calls` are
        the calls over image keys alone, each list for some sequences of the batch.
        """
        self.kept_text, self.keeps_images = kept_text, keeps_images
        index, self.queries, self.query_rotary = self.text_index, self.text, self.text_rotary
        if kept_text is not None:
            index = index[kept_text]
            self.queries = self._pack(index)
            self.query_rotary = self._rotary_of(index, self.queries)
        is_one_sequence = self.sequences != self.shape
        keeps_padding = self.is_traced and self.attention_mask is not None
        has_images = self.image_positions_BI.shape[1] > 0
        self.is_causal = self.begins and kept_text is None and not (is_one_sequence or keeps_padding)
        self.is_causal = self.is_causal and not (has_images and self.merged)
        self.mask, self.image_calls = None, []
        if len(index) == 0:
            return

        last_BW = self.queries.pad(self._positions_of(index), -1)
        # Where the batch is one sequence, a query sees the tokens of its own
        first_BW = self.queries.pad(index - index % self.shape[1]) if is_one_sequence else torch.zeros_like(last_BW)
        image_positions_BI = self._without_padding(self.image_positions_BI)
        if not self.is_causal:
            positions_BK = self._without_padding(self.text_positions_BT)
            if has_images and self.merged:
                positions_BK = torch.cat([positions_BK, image_positions_BI], -1)
            self.mask = self.visibility.make_mask(positions_BK, first_BW, last_BW)
        if has_images and not self.merged:
            self.image_calls = self._find_image_calls(image_positions_BI, first_BW, last_BW)

    def _find_image_calls(
        self, image_positions_BI: torch.Tensor, first_BW: torch.Tensor, last_BW: torch.Tensor
    ) -> list[tuple[slice, list[ImageCall]]]:
        return self.visibility.find_image_calls(image_positions_BI, first_BW, last_BW, self.queries, self.sees_all_images)

    def _without_padding(self, positions_BK: torch.Tensor) -> torch.Tensor:
        """The positions of keys that exist and are not padding; -1 for others."""
        if self.attention_mask is None:
            return positions_BK
        is_kept_BK = self.attention_mask.gather(1, positions_BK.clamp(min=0)) != 0
        return positions_BK.masked_fill(~is_kept_BK, -1)

    def arrange(
        self, inputs_embeds: torch.Tensor, image_states: torch.Tensor | None, prefix_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        stream = inputs_embeds.flatten(0, 1)[self.text_index]
        if image_states is not None:
            stream = torch.cat([stream, image_states] if self.prefix is None else [stream, image_states, prefix_embeds])
        return stream[None]

    def select_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._select_text(hidden_states) if self.prefix is None else self.residual(hidden_states)

    def _select_text(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.num_text == hidden_states.shape[1]:
            return hidden_states if self.kept_text is None else hidden_states[:, self.kept_text]
        text = hidden_states[0, : self.num_text]  # so cut that a projection is one product, not a batch of one
        return text[None] if self.kept_text is None else text[None, self.kept_text]

    def residual(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.prefix is not None and not self.keeps_prefix:
            hidden_states = hidden_states[:, : -self.prefix.length]
        if self.kept_text is None and self.keeps_images:
            return hidden_states
        text = self._select_text(hidden_states)
        return torch.cat([text, hidden_states[:, self.num_text :]], dim=1) if self.keeps_images else text

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens that were not computed to the end, padding and remembered images among them, are zero."""
        index = self.text_index if self.kept_text is None else self.text_index[self.kept_text]
        states = hidden_states[0] if not self.keeps_prefix else hidden_states[0, : -self.prefix.length]
        text, images = states[: len(index)], states[len(index) :]
        sequence = states.new_zeros(self.shape[0] * self.shape[1], states.shape[-1])
        sequence[index] = text
        if self.keeps_images and self.image_source is None:
            sequence[self.image_index] = images
        elif self.keeps_images and len(images) > 0:
            # Behind the computed tokens stands one of zeros, for those of remembered images
            source = self.image_source.clamp(max=len(images))
            sequence[self.image_index] = torch.cat([images, images.new_zeros(1, images.shape[-1])])[source]
        return sequence.view(*self.shape, -1)

    def attend(
        self,
        attention: VisualChatAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        number_keys: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        softmax_over: Callable,
    ) -> tuple[torch.Tensor, None]:
        queries, keys, values = (
            states.view(-1, states.shape[-1] // attention.head_dim, attention.head_dim) for states in (queries, keys, values)
        )
        text_keys, own_keys = self._split(keys)
        text_values, own_values = self._split(values)
        image_keys, image_values = own_keys, own_values
        if self.prefix is not None:
            image_keys, image_values = (states[: -self.prefix.length] for states in (own_keys, own_values))
        if number_keys is not None:
            number_keys = number_keys.view(-1, *keys.shape[1:])
            if len(self.image_index) == 0:  # their gradient, as on the other processes of a distributed run
                text_keys = text_keys + number_keys[:1]
        image_keys, image_values = self._place_images(image_keys, image_values, number_keys, attention.layer_idx)
        # In the order of the definition, which computes text alone: perhaps that of another process
        queries = attention.normalize_queries(queries)
        sees_prefix = self.prefix is not None and self.keeps_images
        if sees_prefix:
            num_queries = self.num_text if self.kept_text is None else len(self.kept_text)
            queries, own_queries = queries[:num_queries], queries[num_queries:]
            text_keys, image_keys, own_keys = attention.normalize_keys(text_keys, image_keys, own_keys)
        else:
            text_keys, image_keys = attention.normalize_keys(text_keys, image_keys)
        k_BGTD = rotate(self.text.pad(text_keys).transpose(1, 2), self.text_rotary)
        k_BGID = rotate(self.images.pad(image_keys).transpose(1, 2), self.image_rotary)
        v_BGTD, v_BGID = self.text.pad(text_values).transpose(1, 2), self.images.pad(image_values).transpose(1, 2)
        all_keys, all_values = (k_BGTD, k_BGID), (v_BGTD, v_BGID)
        if past_key_values is not None:
            cached = past_key_values.update(
                k_BGTD, v_BGTD, attention.layer_idx, image_key_states=k_BGID, image_value_states=v_BGID
            )
            if not self.begins:
                all_keys, all_values = cached
        settings = {"scaling": attention.scaling}
        settings["dropout_p"] = attention.attention_dropout if attention.training else 0.0
        q_BHWD = rotate(self.queries.pad(queries).transpose(1, 2), self.query_rotary)
        output = self.attend_to_keys(q_BHWD, all_keys, all_values, **settings).flatten(1)
        if sees_prefix:
            own_output = self.prefix.attend(own_queries, own_keys, own_values, **settings)
            output = torch.cat([output, own_output.flatten(1)])
        elif self.keeps_images and len(own_values) > 0:  # an image token's output is its value
            if attention.num_key_value_groups > 1:
                own_values = own_values.repeat_interleave(attention.num_key_value_groups, dim=1)
            output = torch.cat([output, own_values.flatten(1)])
        return output[None], None

    def _split(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream, of shape `(tokens, …)`, in two parts: text; images and their prefix."""
        if self.num_text == len(stream):
            return stream, stream[:0]
        return stream.split([self.num_text, len(stream) - self.num_text])

    def _place_images(
        self, keys: torch.Tensor, values: torch.Tensor, number_keys: torch.Tensor | None, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The keys and values of the images where they stand: numbered, not yet normalized and rotated.

        Args:
            keys, values (`torch.Tensor` of shape `(image tokens, key-value heads, head_size)`): Of the image tokens of the
                stream, before numbering.
            number_keys (`torch.Tensor` of shape `(numbers + 1, key-value heads, head_size)`, *optional*): The keys of the
                numbers, from 0, which is nothing.
            layer_idx (`int`): The decoder layer.

        Returns:
            Both of shape `(placeholders, key-value heads, head_size)`.
        """
        if len(self.image_index) == 0:  # while decoding
            return keys, values
        if self.recorded is not None:
            self.recorded.append((keys, values))
        if self.memory:
            known_keys = [known.keys[layer_idx].flatten(0, 1).to(keys) for known in self.memory]
            known_values = [known.values[layer_idx].flatten(0, 1).to(values) for known in self.memory]
            keys, values = join([keys, *known_keys]), join([values, *known_values])
        if not self.is_in_order:
            keys, values = keys[self.image_source], values[self.image_source]
        if number_keys is not None:
            keys = keys + number_keys[self.image_numbers]
        return keys, values

    def attend_to_keys(
        self, q_BHWD: torch.Tensor, keys: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...], **settings: float
    ) -> torch.Tensor:
        """
        What the text tokens see: the sum of a softmax over text keys and one over image keys, or one over both.

        Args:
            q_BHWD (`torch.Tensor` of shape `(batch_size, heads, W, head_size)`): Queries after rotation, padded.
            keys, values (`tuple` of `torch.Tensor`): Of text and of images, of shapes BGTD and BGID; in `mmca_merged`, one
                tensor of both if they already lie behind one another.
            settings: `scaling` and `dropout_p`.

        Returns:
            `torch.Tensor` of shape `(queries, heads, head_size)`.
        """
        if q_BHWD.shape[2] == 0:  # keys and values get a gradient all the same, as on the other processes
            return q_BHWD.transpose(1, 2).flatten(0, 1) + 0.0 * sum(part.sum() for part in (*keys, *values))
        # When a CUDA graph is captured too: what ran before, to warm up, must be what is captured
        if not q_BHWD.is_cuda or torch.compiler.is_compiling():
            return self._attend_to_keys(q_BHWD, keys, values, **settings)
        with without_cudnn():
            return self._attend_to_keys(q_BHWD, keys, values, **settings)

    def _attend_to_keys(self, q_BHWD, keys, values, **settings) -> torch.Tensor:
        if self.merged and keys[-1].shape[2] > 0:
            return self.queries.pack(merged_softmax(q_BHWD, keys, values, self.mask, **settings).transpose(1, 2))
        output_BHWD = softmax(q_BHWD, keys[0], values[0], self.mask, self.is_causal, **settings)
        if not self.image_calls:
            return self.queries.pack(output_BHWD.transpose(1, 2))
        if self.image_calls[0][0] == slice(None):
            output_BHWD = output_BHWD + attend_to_images(self.image_calls[0][1], q_BHWD, keys[1], values[1], **settings)
            return self.queries.pack(output_BHWD.transpose(1, 2))
        of_sequences = [
            attend_to_images(calls, q_BHWD[part], keys[1][part], values[1][part], **settings)
            for part, calls in self.image_calls
        ]
        # Each without its padding
        of_images = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in of_sequences])
        return self.queries.pack(output_BHWD.transpose(1, 2)) + of_images
