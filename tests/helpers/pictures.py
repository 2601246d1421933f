"""Tiny random parts in place of those that `examples/pictures/parts.py` downloads."""

import shutil
from pathlib import Path

import matplotlib
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from examples.pictures.parts import IMAGE_SIZE
from helpers.chat_templates import make_decoder_tokenizer


FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


def save_parts(folder: Path) -> None:
    """The folders `tower`, `decoder` and `drawings`."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": IMAGE_SIZE, "patch_size": 14}
    Dinov2Model(Dinov2Config(**tower)).save_pretrained(folder / "tower")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    BitImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder / "tower")
    tokenizer = make_decoder_tokenizer("SmolLM2")
    decoder = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(decoder).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    (folder / "drawings").mkdir()
    shutil.copy(FONT, folder / "drawings/openmoji.ttf")
