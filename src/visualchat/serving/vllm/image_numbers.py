# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
What is added to the keys of image tokens: the keys of their numbers (`decoder_visualchat.py`).

They depend on the weights alone, so they are computed once, after loading. Where vLLM serves LoRA adapters, they depend on
the adapter of the request too: there they are computed for each token, by the layer that computes the token's own key.

Shape letters: T tokens, N numbers, L tokens of an image, C hidden size, K size of all key heads of this process.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import pad

from modeling_visualchat import VisualChatConfig


class ImageNumbers(nn.Module):
    """
    Of one layer.

    Args:
        config (`VisualChatConfig`): The whole config.
        hidden_size (`int`): C.
        key_size (`int`): K.
        has_adapters (`bool`): Whether vLLM serves LoRA adapters.
    """

    def __init__(self, config: VisualChatConfig, hidden_size: int, key_size: int, has_adapters: bool):
        super().__init__()
        self.is_biased, self.has_adapters = config.image_number_key_bias, has_adapters
        self.is_learned = bool(config.learned_image_numbers)
        self.length = config.image_seq_length if self.is_learned else 1
        numbers = config.max_image_number
        self.rows = numbers * self.length
        if self.is_learned:
            self.weight = nn.Parameter(torch.zeros(numbers + self.length, hidden_size), requires_grad=False)
        elif has_adapters:
            self.register_buffer("states_NC", torch.zeros(numbers, hidden_size), persistent=False)
        self.register_buffer("bias_K", torch.zeros(key_size), persistent=False)
        if not has_adapters:
            self.register_buffer("keys_NK", torch.zeros(self.rows + 1, key_size), persistent=False)

    @torch.no_grad()
    def remember(self, states_NC: torch.Tensor | None, project: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """
        Computes what the weights alone decide.

        Args:
            states_NC (`torch.Tensor` of shape `(N, C)`, *optional*): The normalized embeddings of the numbers. `None`: they
                are learned.
            project (`Callable`): From `(T, C)` to keys of shape `(T, K)`.
        """
        states_NC = self.weight if self.is_learned else states_NC
        bias_K, keys_NK = project(pad(states_NC, (0, 0, 1, 0))).split([1, len(states_NC)])
        if not self.is_biased:
            self.bias_K.copy_(bias_K[0])  # the token's own key has it already
        if self.has_adapters:
            if not self.is_learned:
                self.states_NC.copy_(states_NC)
            return
        keys_NK = keys_NK - self.bias_K
        if self.is_learned:
            of_numbers, of_tokens = keys_NK[: -self.length], keys_NK[-self.length :]
            keys_NK = (of_numbers[:, None] + of_tokens).flatten(0, 1)
        self.keys_NK[1:] = keys_NK

    def forward(self, numbers_T: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        Args:
            numbers_T (`torch.LongTensor` of shape `(T,)`): Of the tokens, 0 for text; see `token_notes.py`.
            project (`Callable`): As for [`remember`], with each token's adapter.

        Returns:
            `torch.Tensor` of shape `(T, K)`: 0 for text.
        """
        numbers_T = numbers_T.clamp(0, self.rows)  # rows of a graph that hold no request may hold any position
        if not self.has_adapters:
            return self.keys_NK[numbers_T]
        index_T = (numbers_T - 1).clamp(min=0)
        if self.is_learned:
            states_TC = self.weight[index_T // self.length] + self.weight[index_T % self.length - self.length]
        else:
            states_TC = self.states_NC[index_T]
        keys_TK = project(states_TC) - self.bias_K
        return torch.where(numbers_T[:, None] > 0, keys_TK, 0)
