# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The projector of the released DeepSpeed-VisualChat code: `projector="perceiver_released"`."""

import torch
from torch import nn

from .configuration_visualchat import VisualChatConfig
from .projector_visualchat import PROJECTORS, VisualChatPerceiverProjector


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
        patches = self.kv_norm(self.kv_proj(features[:, self.num_prefix_tokens :]))
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


ALL_PROJECTORS = {**PROJECTORS, "perceiver_released": VisualChatReleasedPerceiverProjector}
"""By the config field `projector`."""
