"""Models and checkpoints of the released code."""

import json

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from helpers.commands import run_command
from helpers.tiny import make_model, make_tokenizer


def make_released(attn_implementation="sdpa", **overrides):
    return make_model(attn_implementation, multimodal_attention="mmca_released", **overrides)


class ReleasedVit(nn.Module):
    """The names of the released `vit` projector."""

    def __init__(self, vision_config, hidden_size):
        super().__init__()
        self.vis_layer = CLIPEncoderLayer(vision_config)
        self.projection = nn.Sequential(
            nn.Linear(vision_config.hidden_size, hidden_size), nn.LayerNorm(hidden_size, eps=1e-12)
        )

    def forward(self, features):
        return self.projection(self.vis_layer(features, attention_mask=None))


class ReleasedPerceiver(nn.Module):
    """
    The names of the released `perceiver` projector: 16 × 16 queries, one head for 128 features. Its table of positions is
    frozen when it is made, and trained all the same: the script makes the whole projector trainable afterwards.
    """

    def __init__(self, vision_config, hidden_size):
        super().__init__()
        rows, columns = np.divmod(np.arange(256), 16)
        exponents = np.arange(hidden_size // 4) / (hidden_size / 4)
        angles = [np.outer(places, 10000.0**-exponents) for places in (columns, rows)]
        table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
        self.pos_embed = nn.Parameter(torch.from_numpy(table).float(), requires_grad=False)
        self.query = nn.Parameter(torch.randn(256, hidden_size))
        self.kv_proj = nn.Linear(vision_config.hidden_size, hidden_size)
        self.attn = nn.MultiheadAttention(hidden_size, hidden_size // 128, batch_first=True)
        self.ln_q = nn.LayerNorm(hidden_size, eps=1e-12)
        self.ln_kv = nn.LayerNorm(hidden_size, eps=1e-12)
        self.projection = nn.Sequential(nn.LayerNorm(hidden_size, eps=1e-12), nn.Linear(hidden_size, hidden_size))

    def forward(self, features):
        patches = self.ln_kv(self.kv_proj(features[:, 1:]))
        side, positions = round(patches.shape[1] ** 0.5), self.pos_embed
        if side != 16:
            grid = positions.float().reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
            grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            positions = grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(self.pos_embed)
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(features), -1, -1)
        return self.projection(self.attn(queries, patches + positions, patches)[0])


def train_released(projection, features, steps: int = 4) -> None:
    """As the released script does: whatever was frozen in the projector is trained."""
    projection.requires_grad_(True)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.01)
    target = torch.randn_like(projection(features))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(projection(features), target).backward()
        optimizer.step()


class ReleasedCheckpoint:
    """A tiny checkpoint in the released layout, with what its projector makes of pictures."""

    def __init__(self, folder, projector="baseline", image_size=16, patch_size=4, hidden_size=64, base_vocab_size=None):
        torch.manual_seed(0)
        base = base_vocab_size or len(make_tokenizer())
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": image_size, "patch_size": patch_size,
        }  # fmt: skip
        text = {
            "vocab_size": base + 2, "hidden_size": hidden_size, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 2048,
        }  # fmt: skip
        vision_config = CLIPVisionConfig(**vision)
        self.tower = CLIPVisionModel(vision_config).eval()
        self.decoder = LlamaForCausalLM(LlamaConfig(**text)).eval()
        self.embedding = nn.Embedding(base + 2, hidden_size)
        makers = {"vit": ReleasedVit, "perceiver": ReleasedPerceiver}
        if projector in makers:
            self.projection = makers[projector](vision_config, hidden_size)
        else:
            self.projection = nn.Sequential(nn.Linear(32, hidden_size), nn.LayerNorm(hidden_size, eps=1e-12))
        for parameter in self.projection.parameters():
            if parameter.dim() == 1:  # norms and biases, which start at one and zero
                nn.init.normal_(parameter)
        if projector == "perceiver":
            train_released(self.projection, torch.randn(2, 1 + (image_size // patch_size) ** 2, 32))
        self.weights = {
            **{f"vis_encoder.vision_model.{name}": weight for name, weight in self.tower.state_dict().items()},
            **{f"lang_decoder.{name}": weight for name, weight in self.decoder.state_dict().items()},
            **{f"lang_embed.{name}": weight for name, weight in self.embedding.state_dict().items()},
            **{f"projection.{name}": weight for name, weight in self.projection.state_dict().items()},
        }
        self.config = {
            "projector": projector, "vision_config": vision, "text_config": text, "image_token_id": base + 1,
            "base_vocab_size": base,
        }  # fmt: skip
        self.folder = folder

    def convert(self, *arguments):
        torch.save(self.weights, self.folder / "pytorch_model.bin")
        (self.folder / "config.json").write_text(json.dumps(self.config))
        paths = ["pytorch_model.bin", "--config", "config.json", "--output", "converted"]
        given = [word if word.startswith("--") else str(self.folder / word) for word in paths]
        run_command("convert released", *given, *arguments)
        return AutoModel.from_pretrained(self.folder / "converted").eval()
