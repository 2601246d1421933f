# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path of multi-modal causal attention: rows sorted by modality.

An image row looks at nothing but itself. So it needs no query and no score, its output is its value, and equal pictures have
equal rows: a picture is computed once, wherever and however often it stands in the batch. The decoder therefore carries a
stream of rows without padding: the text rows of the batch, then the rows of its different images. Where an image stands (its
place, its number) matters only for the keys that text rows look at.

The queries are text rows alone. They look at text keys and at image keys in separate calls, so nothing of size n×n is made.

Where a graph is traced (`torch.compile`, `torch.export`, a CUDA graph), shapes must not depend on data. There, padding is
kept among the text rows, and the rows of a batch that brings images are one sequence, in which nothing sees beyond its own.

Shape letters: B batch, Q new tokens, S sequences and N their new tokens (B and Q, or one sequence of all), R packed rows,
W rows of the longest text, T text keys, I image keys, K all of both, H query heads, G key-value heads, D head size.
"""

import copy
from collections.abc import Sequence

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.utils import is_tracing

from .modality_cache_visualchat import NO_KEY, Places
from .modality_kernels_visualchat import attend_to_images, join, merged_softmax, rotate, softmax, without_cudnn
from .modality_masks_visualchat import Visibility
from .modality_packing_visualchat import PackedRows, move


class ModalityLayout:
    """
    How the rows of one forward pass are sorted, and what each text row looks at.

    Args:
        is_image_BQ (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): The placeholders among the new
            tokens. `None`: all of them are text.
        attention_mask (`torch.Tensor` of shape `(batch_size, tokens seen)`, *optional*): 0 for padding.
        rotary: cos and sin of shape `(batch_size or 1, sequence_length, head_size)`.
        batch_and_length (`tuple[int, int]`): B and Q.
        image_seq_length (`int`): Tokens of one image.
        merged (`bool`): Whether text and images share one softmax (`mmca_merged`).
        places (`Places`, *optional*): Places of the cached keys. The new ones are added to it.
        image_source (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which image row of the stream, or after
            them of the memory, each placeholder stands for. `None`: its own, in order.
        memory (`Sequence[ImageMemory]`): Images whose keys and values are known.
        records (`bool`): Whether to keep the keys and values of the image rows of each layer in `recorded`.
        num_placeholders (`int`, *optional*): How many placeholders there are. Needed where a graph is traced.
        uses_flex (`bool`): Whether flex attention computes what needs a mask, where that is the faster way.
    """

    def __init__(
        self,
        is_image_BQ: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch_and_length: tuple[int, int],
        image_seq_length: int,
        merged: bool = False,
        places: Places | None = None,
        image_source: torch.Tensor | None = None,
        memory: Sequence = (),
        records: bool = False,
        num_placeholders: int | None = None,
        uses_flex: bool = False,
    ):
        batch_size, length = self.shape = batch_and_length
        self.is_traced, self.merged = is_tracing(), merged
        self.visibility = Visibility(rotary[0].dtype, self.is_traced, uses_flex)
        self.begins = places is None or places.is_empty
        self.past_length = 0 if self.begins else places.length + 0  # a static cache counts in place
        if attention_mask is not None and not self.is_traced:
            attention_mask = self._cut_mask(attention_mask)
        self.sequences = (batch_size, length)
        if self.is_traced and is_image_BQ is not None:
            self.sequences = (1, batch_size * length)
            attention_mask = attention_mask.reshape(self.sequences) if attention_mask is not None else None
        self.attention_mask = attention_mask

        # A single text token in a dynamic cache is one that was decoded. What follows from a static one comes without a mask
        may_pad = is_image_BQ is not None or length > 1 or self.begins or places.is_compileable
        self.text_rows, self.image_rows = self._sort(is_image_BQ, rotary[0].device, num_placeholders, may_pad)
        is_whole = is_image_BQ is None and len(self.text_rows) == batch_size * length
        self.text = self._pack(self.text_rows, is_whole)
        self.images = self._pack(self.image_rows, is_image_BQ is None)
        self.num_text_rows = len(self.text_rows)
        self.image_numbers = self.image_rows
        if is_image_BQ is not None:
            seen_B1 = 0 if self.begins else (places.of_images != NO_KEY).sum(-1, keepdim=True)
            rank_R = (is_image_BQ.cumsum(-1) - 1 + seen_B1).flatten()[self.image_rows]
            self.image_numbers = rank_R // image_seq_length + 1

        cos, sin = rotary
        half = sin.shape[-1] // 2
        signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # as `rotate` takes it
        self.all_rotary = tuple(part.expand(batch_size, -1, -1).flatten(0, 1) for part in (cos, signed_sin))
        self.text_rotary = self._rotary_of(self.text_rows, self.text)
        self.image_rotary = self._rotary_of(self.image_rows, self.images)

        self.text_places_BT = self.text.pad(self._places_of(self.text_rows), NO_KEY)
        self.image_places_BI = self.images.pad(self._places_of(self.image_rows), NO_KEY)
        if places is not None:
            places.extend(self.text_places_BT, self.image_places_BI, length)
            if attention_mask is not None and not self.is_traced:
                places.note_padding(attention_mask)
            if not self.begins:
                self.text_places_BT, self.image_places_BI = places.of_text, places.of_images
        # What every query sees needs no mask. A graph must know it before it sees the data
        self.sees_all_images = is_image_BQ is None and attention_mask is None and places is not None and places.has_no_gaps

        self.image_source = image_source
        self.is_in_order = image_source is None
        if image_source is not None and not self.is_traced:
            in_order = torch.arange(len(self.image_rows), device=self.image_rows.device)
            self.is_in_order = torch.equal(image_source, in_order)
        self.memory = memory
        self.recorded = [] if records else None
        self._look(None, keeps_images=True)

    def to(self, device: torch.device | None, **kwargs) -> "ModalityLayout":
        """Where a decoder layer is, if the layers are spread over devices: accelerate's hooks call this. `None`: here."""
        is_here = device is None or torch.device(device) == self.text_rows.device
        return self if is_here else self._moved(device, **kwargs)

    def _moved(self, device: torch.device, **kwargs) -> "ModalityLayout":
        layout = move(self, device, **kwargs)
        masks = [self.mask, *(call.mask for _, calls in self.image_calls for call in calls)]
        if any(isinstance(mask, BlockMask) for mask in masks):  # they hold places that cannot be moved
            layout._look(layout.kept_text, self.keeps_images)
        return layout

    def _sort(
        self, is_image_BQ: torch.Tensor | None, device: torch.device, num_placeholders: int | None, may_pad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of text, without padding where shapes may depend on it, and of images, counted through the batch."""
        length = self.shape[1]
        rows_R = torch.arange(self.shape[0] * length, device=device)
        if is_image_BQ is None:
            text_rows, image_rows = rows_R, rows_R[:0]
        elif self.is_traced:
            order_R = (rows_R + is_image_BQ.flatten() * len(rows_R)).argsort()  # no two are equal: ONNX has no stable sort
            num_text = len(rows_R) - num_placeholders
            text_rows, image_rows = order_R[:num_text], order_R[num_text:]
        else:
            text_rows, image_rows = rows_R[~is_image_BQ.flatten()], rows_R[is_image_BQ.flatten()]
        if may_pad and self.attention_mask is not None and not self.is_traced:
            is_kept = self.attention_mask[:, -length:].flatten() != 0
            text_rows = text_rows[is_kept[text_rows]]
        return text_rows, image_rows

    def _cut_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """The columns of the tokens seen. A mask may have been made for a whole static cache."""
        seen = int(self.past_length) + self.shape[1]
        if attention_mask.shape[1] < seen:
            raise ValueError(
                f"`attention_mask` has {attention_mask.shape[1]} columns, but {seen} tokens have been seen: the"
                f" {int(self.past_length)} of the cache and {self.shape[1]} new ones"
            )
        return attention_mask[:, :seen]

    def _pack(self, rows: torch.Tensor, is_whole: bool = False) -> PackedRows:
        sequences, length = self.sequences
        width = len(rows) // sequences if is_whole or self.is_traced else None
        return PackedRows(rows // length, sequences, width)

    def _rotary_of(self, rows: torch.Tensor, packed: PackedRows) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(packed.pad(part[rows])[:, None] for part in self.all_rotary)

    def _places_of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows % self.sequences[1] + self.past_length

    def keep_rows(self, keep_BQ: torch.Tensor, keeps_images: bool) -> "ModalityLayout":
        """
        The layout of a last layer, which computes to the end only what somebody reads.

        Args:
            keep_BQ (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The text tokens that are read.
            keeps_images (`bool`): Whether image rows are read too. If so, all of them are kept.
        """
        layout = copy.copy(self)
        kept_text = keep_BQ.flatten()[self.text_rows].nonzero()[:, 0]
        layout._look(kept_text if len(kept_text) < self.num_text_rows else None, keeps_images)
        return layout

    def _look(self, kept_text: torch.Tensor | None, keeps_images: bool) -> None:
        """
        What the text rows `kept_text` (`None`: all) look at.

        `mask`, of shape `(batch_size, 1, W, T or K)` or a `BlockMask`, is for the scores of text keys, and in `mmca_merged`
        of image keys behind them: `None` is all of them, or with `is_causal` those up to the query's own. `image_calls` are
        the calls over image keys alone, each list for some rows of the batch.
        """
        self.kept_text, self.keeps_images = kept_text, keeps_images
        rows, self.queries, self.query_rotary = self.text_rows, self.text, self.text_rotary
        if kept_text is not None:
            rows = rows[kept_text]
            self.queries = self._pack(rows)
            self.query_rotary = self._rotary_of(rows, self.queries)
        is_one_sequence = self.sequences != self.shape
        keeps_padding = self.is_traced and self.attention_mask is not None
        has_images = self.image_places_BI.shape[1] > 0
        self.is_causal = self.begins and kept_text is None and not (is_one_sequence or keeps_padding)
        self.is_causal = self.is_causal and not (has_images and self.merged)
        self.mask, self.image_calls = None, []
        if len(rows) == 0:
            return

        last_BW = self.queries.pad(self._places_of(rows), -1)
        # Of all batch rows in one sequence, a query sees its own
        first_BW = self.queries.pad(rows - rows % self.shape[1]) if is_one_sequence else torch.zeros_like(last_BW)
        image_places_BI = self._without_padding(self.image_places_BI)
        if not self.is_causal:
            places_BK = self._without_padding(self.text_places_BT)
            if has_images and self.merged:
                places_BK = torch.cat([places_BK, image_places_BI], -1)
            self.mask = self.visibility.make_mask(places_BK, first_BW, last_BW)
        if has_images and not self.merged:
            self.image_calls = self.visibility.find_image_calls(
                image_places_BI, first_BW, last_BW, self.queries, self.sees_all_images
            )

    def _without_padding(self, places_BK: torch.Tensor) -> torch.Tensor:
        """The places of keys that exist and are not padding; -1 for others."""
        if self.attention_mask is None:
            return places_BK
        is_kept_BK = self.attention_mask.gather(1, places_BK.clamp(min=0)) != 0
        return places_BK.masked_fill(~is_kept_BK, -1)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the stream, of shape `(text and image rows, …)`, into those of text and those of images."""
        if self.num_text_rows == len(rows):
            return rows, rows[:0]
        return rows.split([self.num_text_rows, len(rows) - self.num_text_rows])

    def keep_text(self, stream: torch.Tensor) -> torch.Tensor:
        """Of the stream, of shape `(1, text and image rows, …)`, the text rows that are computed to the end."""
        if self.num_text_rows == stream.shape[1]:
            return stream if self.kept_text is None else stream[:, self.kept_text]
        text = stream[0, : self.num_text_rows]  # so cut that a projection is one product, not a batch of one
        return text[None] if self.kept_text is None else text[None, self.kept_text]

    def keep(self, stream: torch.Tensor) -> torch.Tensor:
        """Of the stream, all rows that are computed to the end."""
        if self.kept_text is None and self.keeps_images:
            return stream
        text = self.keep_text(stream)
        return torch.cat([text, stream[:, self.num_text_rows :]], dim=1) if self.keeps_images else text

    def to_sequence(self, stream: torch.Tensor) -> torch.Tensor:
        """
        From the rows that were kept, of shape `(1, rows, hidden_size)`, to `(batch_size, sequence_length, hidden_size)`. All
        other rows, padding and remembered images among them, are zero.
        """
        rows = self.text_rows if self.kept_text is None else self.text_rows[self.kept_text]
        states = stream[0]
        text, images = states[: len(rows)], states[len(rows) :]
        sequence = states.new_zeros(self.shape[0] * self.shape[1], states.shape[-1])
        sequence[rows] = text
        if self.keeps_images and self.image_source is None:
            sequence[self.image_rows] = images
        elif self.keeps_images and len(images) > 0:
            # Behind the computed rows stands one of zeros, for what is remembered
            source = self.image_source.clamp(max=len(images))
            sequence[self.image_rows] = torch.cat([images, images.new_zeros(1, images.shape[-1])])[source]
        return sequence.view(*self.shape, -1)

    def place_images(
        self, keys: torch.Tensor, values: torch.Tensor, number_keys: torch.Tensor | None, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The keys and values of the images where they stand: numbered, rotated and padded.

        Args:
            keys, values (`torch.Tensor` of shape `(image rows, key-value heads, head_size)`): Of the image rows of the
                stream, before numbering and rotation.
            number_keys (`torch.Tensor` of shape `(numbers + 1, key-value heads, head_size)`, *optional*): The keys of the
                numbers, from 0, which is nothing.
            layer_idx (`int`): The decoder layer.

        Returns:
            Both of shape BGID, for the new placeholders.
        """
        if len(self.image_rows) == 0:  # while decoding
            nothing = keys.view(self.images.shape[0], keys.shape[1], 0, keys.shape[2])
            return nothing, nothing
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
        k_BGID, v_BGID = (self.images.pad(part).transpose(1, 2) for part in (keys, values))
        return rotate(k_BGID, self.image_rotary), v_BGID

    def attend(
        self, q_BHWD: torch.Tensor, keys: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...], **settings: float
    ) -> torch.Tensor:
        """
        What the text rows see: the sum of a softmax over text keys and one over image keys, or one over both.

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
            return self._attend(q_BHWD, keys, values, **settings)
        with without_cudnn():
            return self._attend(q_BHWD, keys, values, **settings)

    def _attend(self, q_BHWD, keys, values, **settings) -> torch.Tensor:
        if self.merged and keys[-1].shape[2] > 0:
            return self.queries.pack(merged_softmax(q_BHWD, keys, values, self.mask, **settings).transpose(1, 2))
        output_BHWD = softmax(q_BHWD, keys[0], values[0], self.mask, self.is_causal, **settings)
        if not self.image_calls:
            return self.queries.pack(output_BHWD.transpose(1, 2))
        if self.image_calls[0][0] == slice(None):
            output_BHWD = output_BHWD + attend_to_images(self.image_calls[0][1], q_BHWD, keys[1], values[1], **settings)
            return self.queries.pack(output_BHWD.transpose(1, 2))
        of_rows = [
            attend_to_images(calls, q_BHWD[rows], keys[1][rows], values[1][rows], **settings)
            for rows, calls in self.image_calls
        ]
        # Each without its padding
        of_images = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in of_rows])
        return self.queries.pack(output_BHWD.transpose(1, 2)) + of_images
