# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
r"""
What the released DeepSpeed-VisualChat code computes, where its attention differs from the paper's:
`multimodal_attention="mmca_released"`, for checkpoints that were trained with it.

The released code adds up two masks, one for the causal order and one for the modality, each the lowest number of the dtype
where it hides a key. So a softmax with no visible key is uniform over the keys that exactly one of the two masks hides. The
output of token i is the sum of

| token i  | a softmax over the text keys ≤ i               | a softmax over the image keys ≤ i                      |
|----------|------------------------------------------------|--------------------------------------------------------|
| text     | always                                         | before the first image instead: uniform over the text  |
|          |                                                | keys ≤ i and all images, which stand after it          |
| an image | before any text instead: uniform over the      | itself only: V_i                                       |
|          | image keys ≤ i and all text, which is after it |                                                        |

Moreover the images of an example stand in reverse: the first one's features are at the last placeholder. The released code
drops examples without images; here they are LLaMA's, as in every variant. No token attends to padding.

A text token before the first image depends on the images after it, and where an image stands depends on how many there are.
So all images come in one call, before anything is cached. The text that follows them, decoded from the cache, is computed as
without a cache, with one exception, which is the released code's too: where no text stands before the first image, not even
a start token, the tokens of that image attend to all text there is, and the cache keeps what they saw of the prompt.

Shape letters: B batch, Q new tokens, K all tokens that are seen, H query heads, G key-value heads, D head size, N images.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.utils import torch_compilable_check

from .sequence_attention_visualchat import SequencePlan


logger = logging.getLogger(__name__)

WARNING = (
    "multimodal_attention='mmca_released' repeats the released DeepSpeed-VisualChat code with its defects: text before the"
    " first image reads images that come after it, a sample's images are placed in reverse order, and image tokens attend to"
    " the text before them. Images cannot be added to a conversation that is cached. To leave this behind, load the folder"
    " with from_pretrained(..., multimodal_attention='mmca') and fine-tune projector and token embedding"
    " (freeze_for_alignment()); the weights are the same."
)


def warn_of_defects() -> None:
    """Says what is wrong with `mmca_released` and how to leave it."""
    logger.warning(WARNING)


class ReleasedMasks(NamedTuple):
    """
    What the tokens of one forward pass attend to.

    Args:
        text_keys, image_keys (`torch.Tensor` of shape `(batch_size, 1, sequence_length, keys)`): The keys of the two
            softmaxes: boolean for `sdpa`, additive for `eager`. Queries without any are opened to all.
        sees_text, sees_image (`torch.BoolTensor` of shape `(batch_size, 1, sequence_length, 1)`): The queries that have any.
        fixed_weights (`torch.Tensor` of shape `(batch_size, 1, sequence_length, keys)`): What is added to their weights.
    """

    text_keys: torch.Tensor
    image_keys: torch.Tensor
    sees_text: torch.Tensor
    sees_image: torch.Tensor
    fixed_weights: torch.Tensor


class ReleasedPlan(SequencePlan):
    """A batch with images, as the released code computes it. The arguments are those of a [`SequencePlan`]."""

    def _split_keys(self, all_keys: torch.Tensor | BlockMask, numbers_BK: torch.Tensor, dtype: torch.dtype) -> None:
        self.masks = create_released_masks(all_keys, self.image_numbers > 0, self.past_length, dtype)

    def _find_images(self, image_states: torch.Tensor) -> torch.Tensor:
        return place_in_reverse(super()._find_images(image_states), self.is_image, self.image_seq_length)

    def _combine(
        self, softmax_over: Callable, v_BGKD: torch.Tensor, num_key_value_groups: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        masks, v_BHKD = self.masks, repeat_kv(v_BGKD, num_key_value_groups)
        text_BQHD, text_weights = softmax_over(masks.text_keys)
        image_BQHD, image_weights = softmax_over(masks.image_keys)
        if text_weights is not None:
            # The output is made of the weights that are returned, so that they have gradients
            weights_BHQK = text_weights * masks.sees_text + image_weights * masks.sees_image + masks.fixed_weights
            return (weights_BHQK @ v_BHKD).transpose(1, 2), weights_BHQK
        fixed_BQHD = (masks.fixed_weights @ v_BHKD).transpose(1, 2)
        sees_text_BQ11, sees_image_BQ11 = masks.sees_text.transpose(1, 2), masks.sees_image.transpose(1, 2)
        return text_BQHD * sees_text_BQ11 + image_BQHD * sees_image_BQ11 + fixed_BQHD, None


def create_released_masks(
    all_keys: torch.Tensor | BlockMask, is_image_BQ: torch.Tensor, past_length: int | torch.Tensor, dtype: torch.dtype
) -> ReleasedMasks:
    """
    Args:
        all_keys (`torch.Tensor`): All keys ≤ i, as the backend takes them.
        is_image_BQ (`torch.BoolTensor`): The tokens that belong to an image.
        past_length (`int` or `torch.Tensor`): Cached tokens.
        dtype (`torch.dtype`): Of the weights.

    Raises:
        ValueError: If something is cached already, or if the masks are made for `flex_attention`.
    """
    if isinstance(all_keys, BlockMask):
        raise ValueError("multimodal_attention='mmca_released' needs attn_implementation 'eager' or 'sdpa'")
    torch_compilable_check(
        past_length == 0,
        lambda: (
            f"With multimodal_attention='mmca_released' images change what the {int(past_length)} tokens before them"
            " compute, but these are cached: pass the whole conversation with all its images, without past_key_values and"
            " prefill_chunk_size"
        ),
    )
    length = is_image_BQ.shape[1]
    visible_B1QK = all_keys if all_keys.dtype == torch.bool else all_keys > torch.finfo(all_keys.dtype).min
    seen_B1QQ = visible_B1QK[..., :length]  # a static cache is longer
    itself_QQ = torch.eye(length, dtype=torch.bool, device=seen_B1QQ.device)
    exists_B11Q = seen_B1QQ.diagonal(dim1=-2, dim2=-1)[:, :, None]  # no padding
    later_B1QQ = seen_B1QQ.transpose(-1, -2) & exists_B11Q & ~itself_QQ

    image_query, image_key = is_image_BQ[:, None, :, None], is_image_BQ[:, None, None, :]
    text_keys = seen_B1QQ & ~image_key
    image_keys = seen_B1QQ & image_key & ~image_query
    sees_text, sees_image = text_keys.any(-1, keepdim=True), image_keys.any(-1, keepdim=True)
    blind_to_text = ~sees_text & ((seen_B1QQ & image_key) | (later_B1QQ & ~image_key))
    has_image = is_image_BQ.any(-1)[:, None, None, None]
    blind_to_images = has_image & ~image_query & ~sees_image & ((seen_B1QQ & ~image_key) | (later_B1QQ & image_key))
    fixed_weights = (itself_QQ & image_query) + _uniform(blind_to_text, dtype) + _uniform(blind_to_images, dtype)

    unused = visible_B1QK.shape[-1] - length
    text_keys, image_keys, fixed_weights = (
        nn.functional.pad(keys, (0, unused)) for keys in (text_keys | ~sees_text, image_keys | ~sees_image, fixed_weights)
    )
    if all_keys.dtype != torch.bool:
        lowest = torch.finfo(all_keys.dtype).min
        text_keys, image_keys = (
            torch.zeros_like(keys, dtype=all_keys.dtype).masked_fill(~keys, lowest) for keys in (text_keys, image_keys)
        )
    return ReleasedMasks(text_keys, image_keys, sees_text, sees_image, fixed_weights.to(dtype))


def _uniform(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return keys / keys.sum(-1, keepdim=True).clamp(min=1).to(torch.promote_types(dtype, torch.float32))


def place_in_reverse(image_states: torch.Tensor, is_image: torch.Tensor, image_seq_length: int) -> torch.Tensor:
    """
    Reverses the order of the images within each sequence.

    Args:
        image_states (`torch.Tensor` of shape `(image tokens, hidden_size)`): In reading order.
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The tokens that belong to an image.
        image_seq_length (`int`): Tokens of one image.

    Returns:
        `torch.Tensor` of shape `(image tokens, hidden_size)`.

    Raises:
        ValueError: If an image is cut, as a prefill in chunks does.
    """
    if len(image_states) % image_seq_length:
        raise ValueError(
            f"With multimodal_attention='mmca_released' images come whole, but {len(image_states)} image tokens are no"
            f" multiple of {image_seq_length}: leave out prefill_chunk_size"
        )
    images = image_states.unflatten(0, (-1, image_seq_length))
    last_B = is_image.sum(-1).div(image_seq_length, rounding_mode="floor").cumsum(0) - 1
    # The image at k of a sequence whose images are first to last changes places with the one at first + last - k
    index_N = torch.arange(len(images), device=is_image.device)
    sequence_N = (last_B < index_N[:, None]).sum(-1)  # ONNX has no searchsorted
    first_B = nn.functional.pad(last_B + 1, (1, 0))
    return images[first_B[sequence_N] + last_B[sequence_N] - index_N].flatten(0, 1)
