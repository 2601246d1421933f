# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Multi-modal causal attention over vLLM's own attention kernels and paged cache.

`causal` and `mmca_merged` are one call of vLLM's attention. Under `mmca_merged` the output of image tokens, which attend to
themselves only, is then overwritten by their value.

`mmca` takes two softmaxes, over text keys and over image keys, in one call of grouped-query attention. The heads are
doubled, and one more coordinate of queries and keys tells the halves apart. It is +c in text keys, -c in image keys, +c
in the queries of the first half, and -c in those of the second. A key of the wrong modality has a score that is 2 c²
scaling smaller, of which the softmax makes nothing. The two halves are added; the second counts where an image was seen.

Shape letters: T tokens, N numbers, H query heads, G key-value heads, R query heads that share keys, D head size.
"""

import math

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import PreTrainedConfig
from vllm.config import CacheConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope

from modeling_visualchat import VisualChatConfig
from modeling_visualchat.decoders_visualchat import find_decoder_family, find_head_dim

from .image_numbers import ImageNumbers
from .image_prefix import ImagePrefix
from .token_notes import TokenNotes, read_notes


HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""What the kernels of vLLM's backends take."""

GAP = 64.0
"""How much smaller the score of a key of the wrong modality is at least: e^-64 is nothing beside 1 in every dtype."""


class VisualChatAttention(nn.Module):
    """
    The attention layer, with the weights' names of vLLM's LLaMA.

    Args:
        visualchat (`VisualChatConfig`): The whole config.
        config (`PreTrainedConfig`): The decoder's.
        bias, bias_o_proj (`bool`): Whether the projections have biases.
        cache_config, quant_config, prefix: vLLM's.
        others: What vLLM's layer gives besides, and the config says.
    """

    def __init__(
        self,
        visualchat: VisualChatConfig,
        config: PreTrainedConfig,
        bias: bool,
        bias_o_proj: bool,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
        **others,
    ):
        super().__init__()
        self.variant = visualchat.multimodal_attention
        num_heads, num_kv_heads, processes = (
            config.num_attention_heads,
            config.num_key_value_heads,
            get_tensor_model_parallel_world_size(),
        )
        self.num_heads, self.num_kv_heads = num_heads // processes, max(1, num_kv_heads // processes)
        self.head_dim = find_head_dim(config)
        self.scaling = self.head_dim**-0.5
        self.sizes = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            num_heads,
            num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            config.hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = self.k_norm = None
        if find_decoder_family(config).normalizes_heads:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )

        self.is_doubled = self.variant == "mmca"
        self.kernel_dim = next(size for size in HEAD_SIZES if size > self.head_dim) if self.is_doubled else self.head_dim
        # A power of 2 is exact in every dtype
        self.tag = 2.0 ** math.ceil(0.5 * math.log2(GAP / (2 * self.scaling)))
        self.attn = Attention(
            self.num_heads * (2 if self.is_doubled else 1),
            self.kernel_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

        lora_config = get_current_vllm_config().lora_config
        self.image_numbers = self.image_prefix = None
        if visualchat.max_image_number is not None:
            self.image_numbers = ImageNumbers(visualchat, config.hidden_size, self.sizes[1], lora_config is not None)
        if visualchat.image_prefix_ids is not None:
            slots = 1 if lora_config is None else 1 + lora_config.max_loras
            self.image_prefix = ImagePrefix(len(visualchat.image_prefix_ids), self.num_kv_heads, self.head_dim, slots)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            positions (`torch.LongTensor` of shape `(3, T)`): See `token_notes.py`.
            hidden_states (`torch.Tensor` of shape `(T, hidden_size)`): The normalized input.
        """
        notes = read_notes(positions)
        qkv, _ = self.qkv_proj(hidden_states)
        q, own_k, v = qkv.split(self.sizes, dim=-1)
        k = own_k
        if self.image_numbers is not None:
            k = k + self.image_numbers(notes.numbers, self.project_keys)
        q, k = self._normalize(q, self.q_norm), self._normalize(k, self.k_norm)
        rotated_q, rotated_k = self.rotary_emb(notes.rotary, q.clone(), k.clone())
        attend = self._attend_twice if self.is_doubled else self._attend
        output = attend(rotated_q, rotated_k, v, notes)
        if self.variant != "causal":
            output = torch.where(notes.is_image[:, None], self._attend_to_itself(q, own_k, v), output)
        output, _ = self.o_proj(output)
        return output

    def project_keys(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The keys of states of shape `(T, hidden_size)`, before the rotation."""
        qkv, _ = self.qkv_proj(hidden_states)
        return qkv.split(self.sizes, dim=-1)[1]

    def _normalize(self, states: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """Each head of queries or keys of shape `(T, heads * D)`, as the decoder normalizes them (Qwen3)."""
        if norm is None:
            return states
        return norm(states.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, notes: TokenNotes) -> torch.Tensor:
        return self.attn(q, k, v)

    def _attend_twice(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, notes: TokenNotes) -> torch.Tensor:
        head_dim, more = self.head_dim, self.kernel_dim - self.head_dim - 1
        q_TGRD = q.view(-1, self.num_kv_heads, self.num_heads // self.num_kv_heads, head_dim)
        tags = [q_TGRD.new_full((*q_TGRD.shape[:-1], 1), tag) for tag in (self.tag, -self.tag)]
        both = torch.stack([pad(torch.cat([q_TGRD, tag], -1), (0, more)) for tag in tags], dim=2)
        k_TGD = k.view(-1, self.num_kv_heads, head_dim)
        tag_T = torch.where(notes.is_image, -self.tag, self.tag).to(k.dtype)
        k_TGD = torch.cat([k_TGD, tag_T[:, None, None].expand(-1, self.num_kv_heads, 1)], -1)
        v_TGD = pad(v.view(-1, self.num_kv_heads, head_dim), (0, more + 1))
        output = self.attn(both.flatten(1), pad(k_TGD, (0, more)).flatten(1), v_TGD.flatten(1))
        of_text, of_images = output.view(both.shape)[..., :head_dim].unbind(2)
        return (of_text + of_images * notes.has_seen[:, None, None, None].to(output.dtype)).flatten(1)

    def _attend_to_itself(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What image tokens attend to: themselves, and the image prefix. Of all tokens, since shapes are fixed in graphs."""
        v_TGD = v.view(-1, self.num_kv_heads, self.head_dim)
        groups = self.num_heads // self.num_kv_heads
        if self.image_prefix is None:
            return v_TGD.repeat_interleave(groups, dim=1).flatten(1)
        k = self._normalize(k, self.k_norm)
        positions = torch.full((len(q),), self.image_prefix.length, device=q.device)
        q, k = self.rotary_emb(positions, q.clone(), k.clone())
        q_TGRD = q.view(-1, self.num_kv_heads, groups, self.head_dim)
        k_TGD = k.view(-1, self.num_kv_heads, self.head_dim)
        return self.image_prefix.attend(q_TGRD, k_TGD, v_TGD, self.scaling).flatten(1)

    @torch.no_grad()
    def remember_prefix(self, hidden_states: torch.Tensor, slot: int) -> torch.Tensor:
        """
        Keeps the keys and values of the image prefix, and returns the output of the layer for it.

        Args:
            hidden_states (`torch.Tensor` of shape `(P, hidden_size)`): The normalized input.
            slot (`int`): Of the adapter that computes; see [`ImagePrefix`].
        """
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self._normalize(q, self.q_norm), self._normalize(k, self.k_norm)
        positions = torch.arange(len(hidden_states), device=hidden_states.device)
        q, k = self.rotary_emb(positions, q.clone(), k.clone())
        q_PHD, k_PGD, v_PGD = (states.unflatten(-1, (-1, self.head_dim)) for states in (q, k, v))
        self.image_prefix.remember(k_PGD, v_PGD, slot)
        heads_first = [states.transpose(0, 1)[None] for states in (q_PHD, k_PGD, v_PGD)]
        attended = scaled_dot_product_attention(*heads_first, is_causal=True, scale=self.scaling, enable_gqa=True)
        output, _ = self.o_proj(attended[0].transpose(0, 1).flatten(1))
        return output
