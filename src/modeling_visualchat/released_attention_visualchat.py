# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
r"""
What the released DeepSpeed-VisualChat code computes, where it differs from the paper: `multimodal_attention="mmca_released"`
and `projector="perceiver_released"`, for checkpoints that were trained with it.

The released code adds up two masks, one for the causal order and one for the modality, each the lowest number of the dtype
where it hides a key. So a softmax with no visible key is uniform over the keys that exactly one of the two masks hides. The
output of row i is the sum of

| row i    | a softmax over the text keys ≤ i               | a softmax over the image keys ≤ i                      |
|----------|------------------------------------------------|--------------------------------------------------------|
| text     | always                                         | before the first image instead: uniform over the text  |
|          |                                                | keys ≤ i and all images, which stand after it          |
| an image | before any text instead: uniform over the      | itself only: V_i                                       |
|          | image keys ≤ i and all text, which is after it |                                                        |

Moreover the pictures of a sample are placed in reverse: the first one's features stand at the last placeholder. The released
code drops samples without pictures; here they are LLaMA's, as in every variant. Padding is never looked at.

A row of text before the first image depends on the images after it, and where a picture stands on how many there are. So all
pictures come in one call, before anything is cached. The text that follows them, decoded from the cache, is computed as
without one, with one exception, which is the released code's too: where no text stands before the first image, not even a
start token, the rows of that image look at all text there is, and the cache keeps what the prompt's made of them.

Shape letters: B batch, Q new tokens, K all tokens that are seen, H query heads, D head size, C hidden size, I image rows.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.utils import torch_compilable_check

from .configuration_visualchat import VisualChatConfig
from .projector_visualchat import VisualChatPerceiverProjector


logger = logging.getLogger(__name__)

WARNING = (
    "multimodal_attention='mmca_released' repeats the released DeepSpeed-VisualChat code with its defects: text before the"
    " first image reads images that come after it, a sample's images are placed in reverse order, and image tokens attend to"
    " the text before them. Pictures cannot be added to a conversation that is cached. To leave this behind, load the folder"
    " with from_pretrained(..., multimodal_attention='mmca') and fine-tune projector and token embedding"
    " (freeze_for_alignment()); the weights are the same."
)


def warn_of_defects() -> None:
    """Says what is wrong with `mmca_released` and how to leave it."""
    logger.warning(WARNING)


class ReleasedMask(NamedTuple):
    """
    What the rows of one forward pass look at.

    Args:
        text_keys, image_keys (`torch.Tensor` of shape `(batch_size, 1, sequence_length, keys)`): The keys of the two
            softmaxes: boolean for `sdpa`, additive for `eager`. Rows without any are opened to all.
        sees_text, sees_image (`torch.BoolTensor` of shape `(batch_size, 1, sequence_length, 1)`): The rows that have any.
        fixed_weights (`torch.Tensor` of shape `(batch_size, 1, sequence_length, keys)`): What is added to their weights.
        backend (`str`): The attention implementation that the masks are made for.
    """

    text_keys: torch.Tensor
    image_keys: torch.Tensor
    sees_text: torch.Tensor
    sees_image: torch.Tensor
    fixed_weights: torch.Tensor
    backend: str

    def attend(self, softmax_over: Callable, v_BHKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            softmax_over (`Callable`): Takes a mask, returns the output (BQHD) and with `eager` the weights (BHQK).
            v_BHKD (`torch.Tensor`): The values, of all query heads.

        Returns:
            The same two.
        """
        text_BQHD, text_weights = softmax_over(self.text_keys)
        image_BQHD, image_weights = softmax_over(self.image_keys)
        if text_weights is not None:
            # The output is made of the weights that are returned, so that they have gradients
            weights_BHQK = text_weights * self.sees_text + image_weights * self.sees_image + self.fixed_weights
            return (weights_BHQK @ v_BHKD).transpose(1, 2), weights_BHQK
        fixed_BQHD = (self.fixed_weights @ v_BHKD).transpose(1, 2)
        sees_text_BQ11, sees_image_BQ11 = self.sees_text.transpose(1, 2), self.sees_image.transpose(1, 2)
        return text_BQHD * sees_text_BQ11 + image_BQHD * sees_image_BQ11 + fixed_BQHD, None


def create_released_mask(
    all_keys: torch.Tensor | BlockMask,
    is_image_BQ: torch.Tensor,
    past_length: int | torch.Tensor,
    dtype: torch.dtype,
    backend: str,
) -> ReleasedMask:
    """
    Args:
        all_keys (`torch.Tensor`): All keys ≤ i, as the backend takes them.
        is_image_BQ (`torch.BoolTensor`): The rows that belong to an image.
        past_length (`int` or `torch.Tensor`): Cached tokens.
        dtype (`torch.dtype`): Of the weights.
        backend (`str`): The attention implementation that `all_keys` is made for.

    Raises:
        ValueError: If something is cached already, or if the backend is `flex_attention`.
    """
    if isinstance(all_keys, BlockMask):
        raise ValueError("multimodal_attention='mmca_released' needs attn_implementation 'eager' or 'sdpa'")
    torch_compilable_check(
        past_length == 0,
        lambda: (
            f"With multimodal_attention='mmca_released' pictures change what the {int(past_length)} tokens before them"
            " compute, but these are cached: pass the whole conversation with all its pictures, without past_key_values and"
            " prefill_chunk_size"
        ),
    )
    length = is_image_BQ.shape[1]
    visible_B1QK = all_keys if all_keys.dtype == torch.bool else all_keys > torch.finfo(all_keys.dtype).min
    seen_B1QQ = visible_B1QK[..., :length]  # a static cache is longer
    itself_QQ = torch.eye(length, dtype=torch.bool, device=seen_B1QQ.device)
    exists_B11Q = seen_B1QQ.diagonal(dim1=-2, dim2=-1)[:, :, None]  # no padding
    later_B1QQ = seen_B1QQ.transpose(-1, -2) & exists_B11Q & ~itself_QQ

    image_row, image_key = is_image_BQ[:, None, :, None], is_image_BQ[:, None, None, :]
    text_keys = seen_B1QQ & ~image_key
    image_keys = seen_B1QQ & image_key & ~image_row
    sees_text, sees_image = text_keys.any(-1, keepdim=True), image_keys.any(-1, keepdim=True)
    blind_to_text = ~sees_text & ((seen_B1QQ & image_key) | (later_B1QQ & ~image_key))
    has_image = is_image_BQ.any(-1)[:, None, None, None]
    blind_to_images = has_image & ~image_row & ~sees_image & ((seen_B1QQ & ~image_key) | (later_B1QQ & image_key))
    fixed_weights = (itself_QQ & image_row) + _uniform(blind_to_text, dtype) + _uniform(blind_to_images, dtype)

    unused = visible_B1QK.shape[-1] - length
    text_keys, image_keys, fixed_weights = (
        nn.functional.pad(keys, (0, unused)) for keys in (text_keys | ~sees_text, image_keys | ~sees_image, fixed_weights)
    )
    if all_keys.dtype != torch.bool:
        lowest = torch.finfo(all_keys.dtype).min
        text_keys, image_keys = (
            torch.zeros_like(keys, dtype=all_keys.dtype).masked_fill(~keys, lowest) for keys in (text_keys, image_keys)
        )
    return ReleasedMask(text_keys, image_keys, sees_text, sees_image, fixed_weights.to(dtype), backend)


def _uniform(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return keys / keys.sum(-1, keepdim=True).clamp(min=1).to(torch.promote_types(dtype, torch.float32))


def place_in_reverse(image_states: torch.Tensor, is_image: torch.Tensor, image_seq_length: int) -> torch.Tensor:
    """
    Turns round the order of each sample's pictures.

    Args:
        image_states (`torch.Tensor` of shape `(image rows, hidden_size)`): In reading order.
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The rows that belong to an image.
        image_seq_length (`int`): Tokens of one image.

    Returns:
        `torch.Tensor` of shape `(image rows, hidden_size)`.

    Raises:
        ValueError: If an image is cut, as a prefill in chunks does.
    """
    if len(image_states) % image_seq_length:
        raise ValueError(
            f"With multimodal_attention='mmca_released' images come whole, but {len(image_states)} rows are no multiple of"
            f" {image_seq_length}: leave out prefill_chunk_size"
        )
    pictures = image_states.unflatten(0, (-1, image_seq_length))
    last_B = is_image.sum(-1).div(image_seq_length, rounding_mode="floor").cumsum(0) - 1
    # The k-th of a sample whose pictures are first to last is the one at first + last - k
    place_N = torch.arange(len(pictures), device=is_image.device)
    sample_N = (last_B < place_N[:, None]).sum(-1)  # ONNX has no searchsorted
    first_B = nn.functional.pad(last_B + 1, (1, 0))
    return pictures[first_B[sample_N] + last_B[sample_N] - place_N].flatten(0, 1)


class VisualChatReleasedPerceiverProjector(VisualChatPerceiverProjector):
    """
    The released perceiver: both linear maps have a bias, and the positions are a weight. It begins as a sine-cosine table of
    the queries' grid in whole cells, columns before rows, and is trained with the rest. The patches' positions are the same
    ones, resized to the patches' grid where it is another.
    """

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.kv_proj = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.positions = nn.Parameter(torch.empty(config.num_query_tokens, hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See [`VisualChatPerceiverProjector.forward`]."""
        patches = self.kv_norm(self.kv_proj(features[:, 1:]))
        queries = self.query_norm(self.query)
        side = int(patches.shape[1] ** 0.5)
        if side * side != patches.shape[1]:
            raise ValueError(f"The perceiver projector needs a square grid of patches, got {patches.shape[1]} patches")
        patch_positions = self.positions
        if patches.shape[1] != len(self.positions):
            grid = self.positions.float().T.unflatten(1, (round(len(self.positions) ** 0.5), -1))[None]
            resized = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            patch_positions = resized[0].flatten(1).T
        query_states = self.q_proj(queries + self.positions.to(queries.dtype))
        key_states = self.k_proj(patches + patch_positions.to(patches.dtype))
        attended = nn.functional.scaled_dot_product_attention(
            self._split_heads(query_states.expand(len(features), -1, -1)),
            self._split_heads(key_states),
            self._split_heads(self.v_proj(patches)),
        )
        return self.linear(self.layer_norm(self.out_proj(attended.transpose(1, 2).flatten(2))))


def released_positions(length: int, hidden_size: int, device: torch.device | None = None) -> torch.Tensor:
    """
    The 2-D sine-cosine positions that the released perceiver begins with, of a square grid of `length` cells: half of the
    features encode the column, half the row.

    Returns:
        `torch.FloatTensor` of shape `(length, hidden_size)`.
    """
    if hidden_size % 4:
        raise ValueError(f"The perceiver projector needs a text hidden size divisible by 4, got {hidden_size}")
    quarter = hidden_size // 4
    cells = torch.arange(round(length**0.5), dtype=torch.float32, device=device)
    angles = cells[:, None] / 10000 ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns = waves[None].expand(len(cells), -1, -1)
    rows = waves[:, None].expand(-1, len(cells), -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)
