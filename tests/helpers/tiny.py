"""Tiny models, tokenizers and pictures, made in-process: no test needs a network."""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor


IMAGE_SIZE = 16
PATCH_SIZE = 8
TOKENS_PER_IMAGE = 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2
# Decoder families, and what the tiny ones have besides: heads larger than their share, a window that hides nothing
DECODERS = {
    "llama": {},
    "mistral": {"head_dim": 24, "sliding_window": 1024},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
}
CORPUS = [
    "You are a powerful vision-language assistant.\n\n### Image 1:\n\n### Question:\nWhat is this?\n\n### Answer:\n",
    "please describe the image. It's a cute black cat. What's the difference between the three cats?",
    "1 2 3 4 5 6 7 8 9 10 11 12",
]

# One tiny tower of each family: the class of its config, and the fields that the others lack
TOWERS = {
    "clip": (CLIPVisionConfig, {"intermediate_size": 48, "initializer_factor": 5.0}),
    "siglip": (SiglipVisionConfig, {"intermediate_size": 48}),
    "dinov2": (Dinov2Config, {"mlp_ratio": 2, "initializer_range": 0.2}),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig,
        {"mlp_ratio": 2, "initializer_range": 0.2, "num_register_tokens": 3},
    ),
    "dinov3_vit": (DINOv3ViTConfig, {"intermediate_size": 48, "initializer_range": 0.2, "num_register_tokens": 2}),
}


def make_tower_config(tower: str = "clip", **overrides) -> PreTrainedConfig:
    """The config of a tower of `TOWERS`."""
    config_class, fields = TOWERS[tower]
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return config_class(**{**size, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **fields, **overrides})


def make_image_processor(tower: str) -> BaseImageProcessor:
    """An image processor of the class and with the steps of the tower's family. DINOv3's own needs torchvision."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    imagenet = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if tower == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
    if tower.startswith("dinov2"):
        return BitImageProcessorPil(size={"shortest_edge": IMAGE_SIZE + 4}, crop_size=square, **imagenet)
    return SiglipImageProcessorPil(size=square, **(imagenet if tower == "dinov3_vit" else {}))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts sequences with <s>, as LLaMA's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_processor(size: dict | None = None) -> VisualChatProcessor:
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size=size or square, crop_size=square)
    return VisualChatProcessor(image_processor, make_tokenizer(), image_seq_length=TOKENS_PER_IMAGE)


def make_config(decoder: str = "llama", **overrides) -> VisualChatConfig:
    """
    A config whose vocabulary is that of `make_processor`. `decoder` is the decoder's family, and `tower` the tower's; `text`
    and `vision` override the fields of the sub-configs.
    """
    processor = make_processor()
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": processor.tokenizer.bos_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
        "pad_token_id": processor.tokenizer.pad_token_id,
        **DECODERS[decoder],
        **overrides.pop("text", {}),
    }
    vision = make_tower_config(overrides.pop("tower", "clip"), **overrides.pop("vision", {}))
    if overrides.get("image_number_keys"):
        overrides.setdefault("image_number_token_ids", processor.image_number_token_ids(12))
    overrides.setdefault("image_token_id", processor.image_token_id)
    text_config = AutoConfig.for_model(decoder, **text)
    return VisualChatConfig(vision_config=vision, text_config=text_config, **overrides)


def make_model(attn_implementation: str = "sdpa", seed: int = 0, **overrides) -> VisualChatForCausalLM:
    """Random weights, large enough that every token has its say in the logits."""
    torch.manual_seed(seed)
    config = make_config(**overrides)
    model = VisualChatForCausalLM._from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # of cross attention, which starts closed
                parameter.fill_(1.0)
            elif parameter.dim() == 1:  # norms and biases, which start at one and zero
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "image_numbers" in name:  # start at zero
                parameter.normal_()
    return model


def make_inputs(
    layout: list[str], model: VisualChatForCausalLM, seed: int = 0, padding_side: str = "left"
) -> dict[str, torch.Tensor]:
    """
    A batch from strings such as "ttitit": `t` is a run of two text tokens, `s` a single one, `i` an image.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    rows = []
    for row in layout:
        tokens = []
        for part in row:
            if part == "i":
                tokens += [config.image_token_id] * config.image_seq_length
            else:
                tokens += torch.randint(3, 256, (1 if part == "s" else 2,), generator=generator).tolist()
        rows.append(tokens)
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if padding_side == "left" else (0, width - len(row)) for row in rows]
    input_ids = torch.tensor([[0] * left + row + [0] * right for row, (left, right) in zip(rows, pads)])
    attention_mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right for row, (left, right) in zip(rows, pads)])
    images = sum(row.count("i") for row in layout)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return inputs


def digit_image(index: int) -> Image.Image:
    """One of scikit-learn's 1,797 scans of handwritten digits, 8×8 pixels."""
    return Image.fromarray(np.uint8(load_digits().images[index] * 15)).convert("RGB")


def user(text: str, *images: Image.Image) -> dict:
    return {"role": "user", "content": [*({"type": "image", "image": image} for image in images), text_part(text)]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [text_part(text)]}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def copy_llama_weights(model: VisualChatForCausalLM, llama: torch.nn.Module) -> torch.nn.Module:
    """Gives a stock `LlamaForCausalLM` the decoder's weights, without those of cross attention."""
    weights = model.model.language_model.state_dict()
    llama.model.load_state_dict({name: weight for name, weight in weights.items() if "cross_attn" not in name})
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    return llama.eval()
