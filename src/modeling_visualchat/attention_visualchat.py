# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The attention layer of the decoder, and the plan by which a forward pass computes multi-modal causal attention (MMCA).

The decoder chooses an [`AttentionPlan`] once per forward pass, for all of its layers:

| plan           | file                               | computes                                                         |
|----------------|------------------------------------|------------------------------------------------------------------|
| `SequencePlan` | `sequence_attention_visualchat.py` | the definition of MMCA: all tokens in the order of the sequence  |
| `ReleasedPlan` | `released_attention_visualchat.py` | what the code released with the paper computes, in that order    |
| `ModalityPlan` | `modality_attention_visualchat.py` | the same as the definition, much faster: tokens by modality      |
| `CrossPlan`    | `cross_attention_visualchat.py`    | the paper's other baseline: text alone, which looks at images    |

The definition and the fast path import nothing of each other. The tests compare them.

Shape letters: N image numbers, C hidden size; B batch, Q new tokens, K all tokens that are seen, H query heads, G key-value
heads, D head size.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, repeat_kv
from transformers.utils import is_tracing

from .decoders_visualchat import find_decoder_family, find_head_dim


def find_conversation_starts(
    position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | BlockMask | None, past_key_values: Cache | None
) -> torch.BoolTensor | None:
    """
    The first tokens of conversations that are packed into one sequence, of shape `(batch_size or 1, sequence_length)`.
    `None`: each sequence holds one conversation. As in transformers, `position_ids` tell packed conversations apart if there
    is neither a 2-dimensional `attention_mask` nor a cache; under a 4-dimensional mask, which is the caller's own, one
    begins at each position 0.
    """
    if position_ids is None or past_key_values is not None:
        return None
    if attention_mask is None:
        starts = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
        return starts if is_tracing() or starts[:, 1:].any() else None
    return position_ids == 0 if len(attention_mask.shape) == 4 else None


def is_packed(starts: torch.BoolTensor | None, attention_mask: torch.Tensor | BlockMask | None) -> bool:
    """
    Whether a sequence is known to hold several conversations. In a graph it is not, nor under a mask of the caller's own.

    Args:
        starts (`torch.BoolTensor`, *optional*): What [`find_conversation_starts`] returned.
        attention_mask (`torch.Tensor`, *optional*): What was given to it.
    """
    return starts is not None and attention_mask is None and not is_tracing()


class Movable:
    """An object that holds tensors, and can be copied to another device with them."""

    # Attributes that all copies share
    _shared: tuple[str, ...] = ()

    def to(self, device: torch.device, **kwargs):
        """A copy whose tensors, also those in tuples, lists and other movable objects, are on `device`."""
        moved, known = copy.copy(self), {}

        def move(value):
            if not isinstance(value, torch.Tensor | Movable):
                return value
            if id(value) not in known:  # one tensor may have two names
                known[id(value)] = value.to(device, **kwargs)
            return known[id(value)]

        for name, value in vars(self).items():
            if name not in self._shared:
                setattr(moved, name, tree_map(move, value))
        return moved


class AttentionPlan(Movable):
    """
    How one forward pass computes attention: in which form the layers carry the hidden states, and which keys a query sees.

    Attributes:
        device (`torch.device`): Where its tensors are.
        backend (`str`): The attention implementation whose function [`~AttentionPlan.attend`] is given.
        image_numbers (`torch.Tensor`, *optional*): Which image of its conversation a token belongs to, 1 for the first. With
            learned numbers: which token of all images of its conversation it is.
    """

    device: torch.device
    backend: str = "sdpa"
    image_numbers: torch.Tensor | None

    def to(self, device: torch.device | None, **kwargs) -> "AttentionPlan":
        """The plan on the device of a decoder layer: accelerate's hooks call this. `None` leaves it where it is."""
        if device is None or torch.device(device) == self.device:
            return self
        return self.move_to(torch.device(device), **kwargs)

    def move_to(self, device: torch.device, **kwargs) -> "AttentionPlan":
        """A copy of the plan on this device."""
        moved = super().to(device, **kwargs)
        moved.device = device
        return moved

    def arrange(
        self, inputs_embeds: torch.Tensor, image_states: torch.Tensor | None, prefix_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The hidden states that the first layer takes.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Text embeddings. Those at
                image placeholders are not read.
            image_states (`torch.Tensor` of shape `(image tokens, hidden_size)`, *optional*): Projected image features.
            prefix_embeds (`torch.Tensor` of shape `(tokens, hidden_size)`, *optional*): Of the image prefix, where the plan
                has one.
        """
        raise NotImplementedError

    def for_last_layer(self, is_read: torch.BoolTensor) -> "AttentionPlan":
        """
        The plan of the last layer, which may leave out what nobody reads.

        Args:
            is_read (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The tokens whose output is read.
        """
        return self

    def select_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states of the tokens that have a query."""
        return hidden_states

    def attend(
        self,
        attention: "VisualChatAttention",
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        number_keys: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        softmax_over: Callable,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            attention (`VisualChatAttention`): The layer.
            queries, keys, values (`torch.Tensor` of shape `(…, tokens, heads * head_size)`): Projected, before the rotation.
                Queries are those of [`~AttentionPlan.select_queries`].
            number_keys (`torch.Tensor` of shape `(numbers + 1, key-value heads * head_size)`, *optional*): What is added to
                the keys of text (0: nothing) and of the images with the numbers 1, 2, …, before the rotation.
            position_embeddings (`tuple` of two `torch.Tensor`): cos and sin of the rotary embedding.
            past_key_values (`Cache`, *optional*): Keys after rotation and numbering, and values.
            softmax_over (`Callable`): The function of the plan's `backend`. Takes queries (BHQD), keys (BGKD), values (BGKD)
                and a mask; returns the output (BQHD), and with `eager` the weights (BHQK).

        Returns:
            What the output projection takes, of the tokens that [`~AttentionPlan.residual`] keeps, and with `eager` the
            weights of shape `(batch_size, heads, sequence_length, keys)`.
        """
        raise NotImplementedError

    def residual(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states, before the layer, of the tokens that it computes to the end."""
        return hidden_states

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From hidden states as layers carry them to `(batch_size, sequence_length, hidden_size)`."""
        return hidden_states

    def go_on_from(self, in_order: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        What the next layer takes where hidden states are recorded: `hidden_states`, where possible made of what
        [`~AttentionPlan.restore`] returned of them, which is recorded, so that it has gradients.
        """
        return hidden_states


class VisualChatRMSNorm(LlamaRMSNorm):
    """LLaMA's norm in one kernel in place of eight, which on a GPU each go through memory."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LearnedImageNumbers(nn.Embedding):
    """
    Embeddings of the numbers 1, 2, … of images, and behind them of the tokens of an image, for one layer. They are 0 at the
    start, and so are their keys.
    """


class VisualChatAttention(nn.Module):
    """
    The attention of a decoder family (same weights, same names) with multi-modal causal attention in place of plain causal
    attention.

    Args:
        config (`PreTrainedConfig`): The decoder's.
        layer_idx (`int`): Its index among the layers.
        image_number_key_bias (`bool`), learned_image_numbers (`int`), image_seq_length (`int`): See [`VisualChatConfig`].
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        image_number_key_bias: bool = False,
        learned_image_numbers: int = 0,
        image_seq_length: int = 1,
    ):
        super().__init__()
        self.config, self.layer_idx, self.image_number_key_bias = config, layer_idx, image_number_key_bias
        self.head_dim = find_head_dim(config)
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True  # read by the backends
        family = find_decoder_family(config)
        query_size, key_size = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        input_bias, output_bias = family.has_input_bias(config), family.has_output_bias(config)
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=input_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=input_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=input_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=output_bias)
        self.normalizes_heads = family.normalizes_heads
        if self.normalizes_heads:
            self.q_norm = VisualChatRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = VisualChatRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.learned_image_numbers, self.image_seq_length = learned_image_numbers, image_seq_length
        if learned_image_numbers:
            self.image_numbers = LearnedImageNumbers(learned_image_numbers + image_seq_length, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
        number_states_NC: torch.Tensor | None = None,
        numbers_images: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor`): The normalized input, in the form of the plan.
            position_embeddings (`tuple` of two `torch.Tensor`): cos and sin of the rotary embedding.
            plan (`AttentionPlan`): What each token sees.
            past_key_values (`Cache`, *optional*): Keys after rotation and numbering, and values.
            number_states_NC (`torch.Tensor`, *optional*): The normalized embeddings of the numbers 1 to N. Their keys are
                added to the keys of the images with these numbers, before the rotation.
            numbers_images (`bool`): Whether that is done with the learned embeddings of numbers, where there are some.

        Returns:
            The output, in the form of the plan, and with `eager` the weights of shape
            `(batch_size, heads, sequence_length, keys)`.
        """
        # All processes of a distributed run call the projections in this order, whatever their batches hold
        keys = self.k_proj(hidden_states)
        number_keys = None
        if number_states_NC is not None:
            number_keys = self._project_numbers(number_states_NC)
        elif numbers_images and self.learned_image_numbers:
            number_keys = self._make_learned_keys(hidden_states)
        if number_keys is not None and self.training:  # a batch without images gives the numbers a gradient too
            keys = keys + 0.0 * number_keys.sum()
        queries = self.q_proj(plan.select_queries(hidden_states))
        values = self.v_proj(hidden_states)
        # Here and not in the plans: inference engines look for this call in the code of `forward`
        attention_function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(plan.backend, eager_attention)

        def softmax_over(q_BHQD, k_BGKD, v_BGKD, mask):
            dropout = self.attention_dropout if self.training else 0.0
            return attention_function(self, q_BHQD, k_BGKD, v_BGKD, mask, dropout=dropout, scaling=self.scaling, **kwargs)

        output, weights = plan.attend(
            self, queries, keys, values, number_keys, position_embeddings, past_key_values, softmax_over
        )
        return self.o_proj(output), weights

    def normalize_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """
        Each head's queries, before the rotation, as the decoder normalizes them (Qwen3); else they are returned as they are.

        Args:
            queries (`torch.Tensor` of shape `(…, head_size)`): Projected.
        """
        return self.q_norm(queries) if self.normalizes_heads else queries

    def normalize_keys(self, *keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Each head's keys, before the rotation, as the decoder normalizes them (Qwen3); else they are returned as they are.

        The key of an image's number is in them already. So the sum has the length that the decoder was trained with, however
        long the number's key is: added behind the norm, it would make all scores of images larger. And an image's own key,
        before the sum, depends on the image alone, so that it can be kept and numbered anew in each conversation.

        Args:
            keys (`torch.Tensor` of shape `(tokens, …, head_size)`): Projected and numbered. Several, of text and of images,
                are normalized in one call: the processes of a distributed run have to call `k_norm` equally often, whatever
                their batches hold.
        """
        if not self.normalizes_heads:
            return keys
        return self.k_norm(torch.cat(keys)).split([len(part) for part in keys])

    def _make_learned_keys(self, like: torch.Tensor) -> torch.Tensor:
        """
        What is added to the keys of text (index 0: nothing), and then to those of the tokens of image 1, of image 2, …: the
        key of the image's number and that of the token within its image.
        """
        sizes = self.learned_image_numbers, self.image_seq_length
        states = self.image_numbers(torch.arange(sum(sizes), device=like.device)).to(like.dtype)
        nothing, of_numbers, of_tokens = self._project_numbers(states).split([1, *sizes])
        return torch.cat([nothing, (of_numbers[:, None] + of_tokens).flatten(0, 1)])

    def _project_numbers(self, number_states_NC: torch.Tensor) -> torch.Tensor:
        """
        What is added to the keys of text (index 0: nothing) and of the images 1 to N: W_K norm(e). The keys have the bias of
        `k_proj` already, where it has one.
        """
        number_keys = self.k_proj(nn.functional.pad(number_states_NC, (0, 0, 1, 0)))
        nothing = number_keys[:1]  # k_proj(0), its bias
        if self.image_number_key_bias:
            return torch.cat([nothing - nothing, number_keys[1:]])
        return number_keys - nothing


def eager_attention(
    module: nn.Module,
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One softmax over the keys that `attention_mask` leaves: the definition that every other backend must equal. Returns the
    output of shape `(batch_size, sequence_length, heads, head_size)` and the weights of shape BHQK.
    """
    k_BHKD = repeat_kv(k_BGKD, module.num_key_value_groups)
    v_BHKD = repeat_kv(v_BGKD, module.num_key_value_groups)
    scores_BHQK = q_BHQD @ k_BHKD.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHQK = scores_BHQK + attention_mask
    softmax_dtype = torch.promote_types(scores_BHQK.dtype, torch.float32)
    weights_BHQK = scores_BHQK.softmax(-1, dtype=softmax_dtype).to(q_BHQD.dtype)
    weights_BHQK = nn.functional.dropout(weights_BHQK, p=dropout, training=module.training)
    return (weights_BHQK @ v_BHKD).transpose(1, 2).contiguous(), weights_BHQK
