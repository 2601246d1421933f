# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The projector: what turns the vision tower's features into tokens of the decoder (arXiv 2309.14327, section 4.2). With the
token embedding it is the only part that the paper trains.
"""

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .configuration_visualchat import VisualChatConfig


LAYER_NORM_EPS = 1e-12


class VisualChatLinearProjector(nn.Module):
    """Linear + LayerNorm: the paper's default."""

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        self.num_dropped_tokens = count_dropped_tokens(config)
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.text_config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(images, num_prefix_tokens + patches, vision_hidden_size)`): The tower's.

        Returns:
            `torch.Tensor` of shape `(images, config.image_seq_length, text_hidden_size)`.
        """
        return self.layer_norm(self.linear(features[:, self.num_dropped_tokens :]))


class VisualChatVitProjector(VisualChatLinearProjector):
    """One more CLIP encoder layer, trained from scratch, then Linear + LayerNorm."""

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        self.encoder_layer = CLIPEncoderLayer(config.vision_config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(self.encoder_layer(features, attention_mask=None))


class VisualChatMlpProjector(nn.Module):
    """Linear, GELU, Linear, with the names of LLaVA 1.5's (arXiv 2310.03744)."""

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        self.num_dropped_tokens = count_dropped_tokens(config)
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See [`VisualChatLinearProjector.forward`]."""
        return self.linear_2(nn.functional.gelu(self.linear_1(features[:, self.num_dropped_tokens :])))


class VisualChatPixelShuffleProjector(nn.Module):
    """
    Space to depth: the features of a square of patches are put one behind the other and become one token, as in Idefics3,
    SmolVLM and InternVL. Then Linear + LayerNorm, as in the paper's projector: the tokens have the same scale at the start,
    and learn at the same rates.
    """

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        self.grid, self.factor = config.patch_grid, config.pixel_shuffle_factor
        self.num_prefix_tokens = config.num_prefix_tokens
        self.linear = nn.Linear(config.vision_config.hidden_size * self.factor**2, config.text_config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.text_config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(images, num_prefix_tokens + patches, vision_hidden_size)`): The tower's.

        Returns:
            `torch.Tensor` of shape `(images, patches / factor², text_hidden_size)`.

        Raises:
            ValueError: If the image has another number of patches than the config says.
        """
        squares = _split_squares(features[:, self.num_prefix_tokens :], self.grid, self.factor)
        return self.layer_norm(self.linear(squares.flatten(2)))


class VisualChatPooledProjector(nn.Module):
    """
    The mean and the maximum of the features in a square of patches become one token, and the class token becomes some, each
    by an MLP. Then LayerNorm, and a learned embedding of each token's position among them, which is 0 at the start. A few
    tokens say what an image shows: the class token as a whole, the squares where.
    """

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        self.grid, self.factor = config.patch_grid, config.pool_factor
        self.num_prefix_tokens, self.class_token_outputs = config.num_prefix_tokens, config.class_token_outputs
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.square_mlp = _make_mlp(2 * vision_size, text_size, 1)
        if self.class_token_outputs:
            self.class_mlp = _make_mlp(vision_size, text_size, self.class_token_outputs)
        self.layer_norm = nn.LayerNorm(text_size, eps=LAYER_NORM_EPS)
        self.positions = nn.Parameter(torch.zeros(config.image_seq_length, text_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(images, num_prefix_tokens + patches, vision_hidden_size)`): The tower's.

        Returns:
            `torch.Tensor` of shape `(images, class_token_outputs + patches / factor², text_hidden_size)`.

        Raises:
            ValueError: If the image has another number of patches than the config says.
        """
        squares = _split_squares(features[:, self.num_prefix_tokens :], self.grid, self.factor)
        tokens = self.square_mlp(torch.cat([squares.mean(-2), squares.amax(-2)], dim=-1))
        if self.class_token_outputs:
            of_class_token = self.class_mlp(features[:, 0]).unflatten(-1, (self.class_token_outputs, -1))
            tokens = torch.cat([of_class_token, tokens], dim=1)
        return self.layer_norm(tokens) + self.positions


class VisualChatPerceiverProjector(nn.Module):
    """
    Learned queries on a square grid cross-attend to the patches (class token and registers are left out), then LayerNorm +
    Linear. Queries and keys carry 2-D sine-cosine positions of their grids.
    """

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.num_heads = max(1, hidden_size // 128)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.query = nn.Parameter(torch.empty(config.num_query_tokens, hidden_size))
        self.query_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.kv_proj = nn.Linear(config.vision_config.hidden_size, hidden_size, bias=False)
        self.kv_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(images, num_prefix_tokens + patches, vision_hidden_size)`): The tower's.

        Returns:
            `torch.Tensor` of shape `(images, num_query_tokens, text_hidden_size)`.
        """
        patches = self.kv_norm(self.kv_proj(features[:, self.num_prefix_tokens :]))
        queries = self.query_norm(self.query)
        patch_positions = sincos_positions(patches.shape[1], patches)
        query_positions = sincos_positions(queries.shape[0], patches)
        q = self._split_heads(self.q_proj(queries + query_positions).expand(len(features), -1, -1))
        k = self._split_heads(self.k_proj(patches + patch_positions))
        v = self._split_heads(self.v_proj(patches))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.linear(self.layer_norm(self.out_proj(attended)))

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _split_squares(patches: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """
    Args:
        patches (`torch.Tensor` of shape `(images, patches, vision_hidden_size)`): Row by row.
        grid (`tuple[int, int]`): Rows and columns of patches.
        factor (`int`): The side of a square, in patches.

    Returns:
        `torch.Tensor` of shape `(images, squares, factor², vision_hidden_size)`. Within a square, patches are row by row too
        (Idefics3's order).
    """
    rows, columns = grid
    if patches.shape[1] != rows * columns:
        raise ValueError(f"The images have {patches.shape[1]} patches, but the model takes {rows} × {columns}")
    squares = patches.unflatten(1, (rows // factor, factor, columns // factor, factor)).transpose(2, 3)
    return squares.flatten(3, 4).flatten(1, 2)


def _make_mlp(vision_size: int, text_size: int, outputs: int) -> nn.Sequential:
    hidden_size = 2 * text_size
    return nn.Sequential(nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, outputs * text_size))


def init_projector_weights(module: nn.Module, std: float) -> None:
    """Initializes the weights that a projector holds beside its layers; `std` is the standard deviation of queries."""
    if isinstance(module, VisualChatPerceiverProjector):
        nn.init.normal_(module.query, std=std)
    if isinstance(module, VisualChatPooledProjector):
        nn.init.zeros_(module.positions)


def count_dropped_tokens(config: VisualChatConfig) -> int:
    """The tokens of the tower, from the first one, that `vision_feature_select_strategy` drops."""
    return config.num_prefix_tokens if config.vision_feature_select_strategy == "default" else 0


def sincos_positions(length: int, like: torch.Tensor) -> torch.Tensor:
    """
    2-D sine-cosine positions of a square grid of `length` cells, over the unit square, so that grids of different sizes
    (queries, patches) name the same position alike. Half of the features encode the row, half the column.

    Returns:
        `torch.Tensor` of shape `(length, like.shape[-1])`, with the dtype and device of `like`.
    """
    side = round(length**0.5)
    if side * side != length:
        raise ValueError(f"The perceiver projector needs a square grid of patches, got {length} patches")
    hidden_size = like.shape[-1]
    if hidden_size % 4:
        raise ValueError(f"The perceiver projector needs a text hidden size divisible by 4, got {hidden_size}")
    quarter = hidden_size // 4
    frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float32, device=like.device) / quarter)
    # In units of cells of the default 16 × 16 grid, measured at the cells' centres
    centres = (torch.arange(side, dtype=torch.float32, device=like.device) + 0.5) * 16 / side
    angles = centres[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(length, hidden_size).to(like.dtype)


PROJECTORS = {
    "linear": VisualChatLinearProjector,
    "vit": VisualChatVitProjector,
    "perceiver": VisualChatPerceiverProjector,
    "mlp": VisualChatMlpProjector,
    "pixel_shuffle": VisualChatPixelShuffleProjector,
    "pooled": VisualChatPooledProjector,
}
