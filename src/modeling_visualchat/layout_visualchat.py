# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The fast path of multi-modal causal attention: rows sorted by modality.

An image row looks at nothing but itself. So it needs no query and no score, its output is its value, and equal pictures have
equal rows: a picture is computed once, wherever and however often it stands in the batch. The decoder therefore carries a
stream of rows without padding: the text rows of the batch, then the rows of its different images. Where an image stands (its
place, its number) matters only for the keys that text rows look at.

The queries are text rows alone. They look at text keys and at image keys in separate calls, so nothing of size n×n is made.

Shape letters: B batch, Q new tokens, R packed rows, W rows of the longest text, T text keys, I image keys, K all of both,
H query heads, G key-value heads, D head size.
"""

import copy
from collections.abc import Sequence

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from .cache_visualchat import PlacesLayer


class PackedRows:
    """
    Rows of a batch one after another without padding, and the way between this and the padded form.

    Args:
        batch_R (`torch.LongTensor` of shape `(rows,)`): The batch row of each packed row, ascending.
        batch_size (`int`): Rows of the batch.
    """

    def __init__(self, batch_R: torch.Tensor, batch_size: int):
        counts_B = torch.bincount(batch_R, minlength=batch_size)
        starts_B = counts_B.cumsum(0) - counts_B
        self.batch_R, self.rank_R = batch_R, torch.arange(len(batch_R), device=batch_R.device) - starts_B[batch_R]
        self.counts = counts_B.tolist()
        self.shape = (batch_size, max(self.counts))
        self.is_full = min(self.counts) == max(self.counts)

    def pad(self, packed: torch.Tensor, value: int = 0) -> torch.Tensor:
        """From `(rows, …)` to `(batch_size, W, …)`, padded on the right."""
        if self.is_full:
            return packed.view(*self.shape, *packed.shape[1:])
        padded = packed.new_full((*self.shape, *packed.shape[1:]), value)
        return padded.index_put((self.batch_R, self.rank_R), packed)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """From `(batch_size, W, …)` to `(rows, …)`."""
        return padded.flatten(0, 1) if self.is_full else padded[self.batch_R, self.rank_R]

    def to(self, device: torch.device, **kwargs) -> "PackedRows":
        return _move(self, device, **kwargs)


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
        places (`PlacesLayer`, *optional*): Places of the cached keys. The new ones are added to it.
        image_source (`torch.LongTensor` of shape `(placeholders,)`, *optional*): Which image row of the stream, or after
            them of the memory, each placeholder stands for. `None`: its own, in order.
        memory (`Sequence[ImageMemory]`): Images whose keys and values are known.
        records (`bool`): Whether to keep the keys and values of the image rows of each layer in `recorded`.
    """

    def __init__(
        self,
        is_image_BQ: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch_and_length: tuple[int, int],
        image_seq_length: int,
        merged: bool = False,
        places: PlacesLayer | None = None,
        image_source: torch.Tensor | None = None,
        memory: Sequence = (),
        records: bool = False,
    ):
        batch_size, length = self.shape = batch_and_length
        rows_R = torch.arange(batch_size * length, device=rotary[0].device)
        self.past_length = places.length if places is not None else 0
        self.text_rows, self.image_rows = rows_R, rows_R[:0]
        if is_image_BQ is not None:
            self.text_rows, self.image_rows = rows_R[~is_image_BQ.flatten()], rows_R[is_image_BQ.flatten()]
        if attention_mask is not None and (is_image_BQ is not None or self.past_length == 0):
            is_kept = attention_mask[:, -length:].flatten() != 0  # while decoding, nothing is padding
            self.text_rows = self.text_rows[is_kept[self.text_rows]]
        self.text = PackedRows(self.text_rows // length, batch_size)
        self.images = PackedRows(self.image_rows // length, batch_size)
        self.num_text_rows = len(self.text_rows)

        image_rank_R = self.images.rank_R
        if self.past_length > 0:
            image_rank_R = image_rank_R + (places.of_images >= 0).sum(-1)[self.images.batch_R]
        self.image_numbers = image_rank_R // image_seq_length + 1

        cos, sin = (part.expand(batch_size, -1, -1).flatten(0, 1)[:, None] for part in rotary)
        self.text_rotary = cos[self.text_rows], sin[self.text_rows]
        self.image_rotary = cos[self.image_rows], sin[self.image_rows]

        self.text_places_BT = self.text.pad(self.text_rows % length + self.past_length, -1)
        self.image_places_BI = self.images.pad(self.image_rows % length + self.past_length, -1)
        if places is not None:
            places.extend(self.text_places_BT, self.image_places_BI, length)
            self.text_places_BT, self.image_places_BI = places.of_text, places.of_images

        self.attention_mask, self.merged, self.image_source = attention_mask, merged, image_source
        in_order = torch.arange(len(self.image_rows), device=rows_R.device)
        self.is_in_order = image_source is None or torch.equal(image_source, in_order)
        self.memory = memory
        self.recorded = [] if records else None
        self._look(None, keeps_images=True)

    def to(self, device: torch.device, **kwargs) -> "ModalityLayout":
        """Where a decoder layer is, if the layers are spread over devices: accelerate's hooks call this."""
        return _move(self, device, **kwargs)

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

        `text_mask` and `image_mask`, of shape `(batch_size, 1, W, T or I)`, say which keys a query sees: `None` is all of
        them, or with `is_causal` those up to its own. In place of `image_mask`, `image_runs` lists runs of queries that see
        the same images: batch rows, then for each run the first query, the query after the last, and the image keys seen.
        """
        self.kept_text, self.keeps_images = kept_text, keeps_images
        batch_size, length = self.shape
        rows, self.queries, self.query_rotary = self.text_rows, self.text, self.text_rotary
        if kept_text is not None:
            rows = rows[kept_text]
            self.queries = PackedRows(rows // length, batch_size)
            self.query_rotary = tuple(part[kept_text] for part in self.text_rotary)
        places_BW1 = self.queries.pad(rows % length + self.past_length, -1)[..., None]

        self.is_causal = self.past_length == 0 and kept_text is None
        self.text_mask = self.image_mask = self.sees_image = self.image_runs = None
        has_images = self.image_places_BI.shape[1] > 0
        if self.merged and has_images:
            self.is_causal = False
        if not self.is_causal:
            self.text_mask = self._visible(self.text_places_BT, places_BW1)
        if not has_images or len(rows) == 0:
            return
        visible_BWI = self._visible(self.image_places_BI, places_BW1)
        if self.merged:
            self.image_mask = visible_BWI
            return
        counts_BW1 = visible_BWI.sum(-1, keepdim=True)
        keys_I = torch.arange(visible_BWI.shape[-1], device=visible_BWI.device)
        if visible_BWI.all():
            return
        if visible_BWI.device.type == "cpu" and torch.equal(visible_BWI, keys_I < counts_BW1):
            self.image_runs = _find_runs(counts_BW1[..., 0].tolist(), self.queries)
        else:
            self.image_mask, self.sees_image = visible_BWI, counts_BW1[:, None] > 0

    def _visible(self, places_BK: torch.Tensor, query_places_BW1: torch.Tensor) -> torch.Tensor:
        """Which keys exist, are not padding, and stand no later than the query: of shape `(batch_size, W, keys)`."""
        exists_BK = places_BK >= 0
        if self.attention_mask is not None:
            exists_BK = exists_BK & (self.attention_mask.gather(1, places_BK.clamp(min=0)) != 0)
        return exists_BK[:, None] & (places_BK[:, None] <= query_places_BW1)

    def keep_text(self, stream: torch.Tensor) -> torch.Tensor:
        """Of the stream, of shape `(1, text and image rows, …)`, the text rows that are computed to the end."""
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
        elif self.keeps_images:
            is_computed = self.image_source < len(images)
            sequence[self.image_rows[is_computed]] = images[self.image_source[is_computed]]
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
        if self.recorded is not None:
            self.recorded.append((keys, values))
        if self.memory:
            known_keys = [known.keys[layer_idx].flatten(0, 1).to(keys) for known in self.memory]
            known_values = [known.values[layer_idx].flatten(0, 1).to(values) for known in self.memory]
            keys, values = _join([keys, *known_keys]), _join([values, *known_values])
        if not self.is_in_order:
            keys, values = keys[self.image_source], values[self.image_source]
        if number_keys is not None:
            keys = keys + number_keys[self.image_numbers]
        keys = rotate(keys, self.image_rotary)
        return self.images.pad(keys).transpose(1, 2), self.images.pad(values).transpose(1, 2)

    def attend(
        self,
        queries: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        values: tuple[torch.Tensor, torch.Tensor],
        **settings: float,
    ) -> torch.Tensor:
        """
        What the text rows see: the sum of a softmax over text keys and one over image keys, or one over both.

        Args:
            queries (`torch.Tensor` of shape `(queries, heads, head_size)`): After rotation.
            keys, values (`tuple` of two `torch.Tensor`): Of text and of images, of shapes BGTD and BGID.
            settings: `scaling` and `dropout_p`.

        Returns:
            `torch.Tensor`, shaped like `queries`.
        """
        if len(queries) == 0:  # keys and values get a gradient all the same, as on the other processes
            return queries + 0.0 * sum(part.sum() for part in (*keys, *values))
        q_BHWD = self.queries.pad(queries).transpose(1, 2)
        has_images = self.image_places_BI.shape[1] > 0
        if has_images and self.merged:
            merged_BHWD = merged_softmax(q_BHWD, keys, values, torch.cat([self.text_mask, self.image_mask], -1), **settings)
            return self.queries.pack(merged_BHWD.transpose(1, 2))
        text_BHWD = softmax(q_BHWD, keys[0], values[0], self.text_mask, self.is_causal, **settings)
        output = self.queries.pack(text_BHWD.transpose(1, 2))
        if not has_images:
            return output
        if self.image_runs is not None:
            return output + self._attend_by_runs(q_BHWD, keys[1], values[1], **settings)
        images_BHWD = softmax(q_BHWD, keys[1], values[1], self.image_mask, **settings)
        if self.sees_image is not None:
            images_BHWD = images_BHWD * self.sees_image
        return output + self.queries.pack(images_BHWD.transpose(1, 2))

    def _attend_by_runs(self, q_BHWD, k_BGID, v_BGID, **settings) -> torch.Tensor:
        outputs = []
        for rows, runs in self.image_runs:
            seen = []
            for start, stop, count in runs:
                q_run = q_BHWD[rows, :, start:stop]
                # A run that sees no image gets exactly nothing
                k_run, v_run = k_BGID[rows, :, :count], v_BGID[rows, :, :count]
                seen.append(softmax(q_run, k_run, v_run, **settings) if count > 0 else torch.zeros_like(q_run))
            outputs.append(_join([run.transpose(1, 2) for run in seen], dim=1).flatten(0, 1))
        return _join(outputs)


def _move(rows: PackedRows | ModalityLayout, device: torch.device, **kwargs) -> PackedRows | ModalityLayout:
    moved = copy.copy(rows)
    for name, value in vars(rows).items():
        if isinstance(value, torch.Tensor | PackedRows):
            setattr(moved, name, value.to(device, **kwargs))
        elif name.endswith("_rotary"):
            setattr(moved, name, tuple(part.to(device, **kwargs) for part in value))
    return moved


def _find_runs(counts: list[list[int]], queries: PackedRows) -> list[tuple[slice, list[tuple[int, int, int]]]]:
    if queries.is_full and all(row == counts[0] for row in counts):
        return [(slice(None), _runs_of_row(counts[0]))]
    rows = enumerate(queries.counts)
    return [(slice(row, row + 1), _runs_of_row(counts[row][:length])) for row, length in rows if length > 0]


def _runs_of_row(counts: list[int]) -> list[tuple[int, int, int]]:
    starts = [k for k, count in enumerate(counts) if k == 0 or count != counts[k - 1]]
    return [(start, stop, counts[start]) for start, stop in zip(starts, [*starts[1:], len(counts)])]


def _join(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    filled = [tensor for tensor in tensors if tensor.shape[dim] > 0] or tensors[:1]
    return torch.cat(filled, dim) if len(filled) > 1 else filled[0]


def rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The rotary embedding of packed rows of shape `(rows, heads, head_size)`."""
    cos, sin = rotary
    half = states.shape[-1] // 2
    rotated = states * cos
    # As rotate_half of transformers, without its copies: these rows are many
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def softmax(
    q_BHWD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    mask_BWK: torch.Tensor | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """
    One softmax, of shape BHWD, over the keys that the mask shows. A query that is shown none gets a mean over all of them:
    a softmax over nothing is NaN in some kernels, and its gradient in more.
    """
    mask = None
    if mask_BWK is not None:
        mask = (mask_BWK | ~mask_BWK.any(-1, keepdim=True))[:, None]
    settings = {"is_causal": is_causal, "scale": scaling, "dropout_p": dropout_p}
    batch_size, heads, width, head_size = q_BHWD.shape
    groups = k_BGKD.shape[1]
    if heads == groups or is_causal:
        return scaled_dot_product_attention(q_BHWD, k_BGKD, v_BGKD, mask, enable_gqa=heads != groups, **settings)
    # The heads that share keys are queries of one head, so that keys and values are read once
    shared = heads // groups
    q_BGRD = q_BHWD.reshape(batch_size, groups, shared * width, head_size)
    mask = mask.repeat(1, 1, shared, 1) if mask is not None else None
    return scaled_dot_product_attention(q_BGRD, k_BGKD, v_BGKD, mask, **settings).reshape(q_BHWD.shape)


def merged_softmax(
    q_BHWD: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    mask_BWK: torch.Tensor,
    scaling: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """One softmax, of shape BHWD, over text and image keys together."""
    if q_BHWD.shape[2] > 1:
        return softmax(q_BHWD, torch.cat(keys, 2), torch.cat(values, 2), mask_BWK, scaling=scaling, dropout_p=dropout_p)
    # While decoding, the scores are put together and not the keys, which are many more
    q_BGRD = q_BHWD.reshape(len(q_BHWD), keys[0].shape[1], -1, q_BHWD.shape[-1])
    scores_BGRK = torch.cat([q_BGRD @ part.transpose(2, 3) for part in keys], dim=-1) * scaling
    scores_BGRK = scores_BGRK.masked_fill(~mask_BWK[:, None], torch.finfo(scores_BGRK.dtype).min)
    softmax_dtype = torch.promote_types(scores_BGRK.dtype, torch.float32)
    weights_BGRK = dropout(scores_BGRK.softmax(-1, dtype=softmax_dtype).to(scores_BGRK.dtype), dropout_p)
    text, images = weights_BGRK.split([part.shape[2] for part in keys], dim=-1)
    return (text @ values[0] + images @ values[1]).view(q_BHWD.shape)
