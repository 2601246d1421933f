"""
The two sides of the benchmarks: VisualChat, and the LLaVA of transformers with the same CLIP and LLaMA weights.

The decoder has 8 layers of hidden size 1024, with 16 heads and an intermediate size of 2816. The vision tower is CLIP ViT-B
with patches of 14 pixels, so an image has 257 tokens. All in fp32. Our side uses "mmca", the default attention.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM


IMAGE_TOKEN, TEXT_TOKENS = 32000, 32  # text tokens after each image
TEXT = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VISION |= {"image_size": 224, "patch_size": 14}


def build_sides(
    text: dict = TEXT,
    vision: dict = VISION,
    threads: int = 2,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[VisualChatForCausalLM, LlavaForConditionalGeneration]:
    """Both models, frozen, on `device`, with the same weights except for the projectors, whose architectures differ."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vision_config = CLIPVisionConfig(**vision)
    text_config = LlamaConfig(vocab_size=IMAGE_TOKEN + 1, max_position_embeddings=16384, **text)
    config = VisualChatConfig(vision_config=vision_config, text_config=text_config, image_token_id=IMAGE_TOKEN)
    settings = {"attn_implementation": "sdpa", "dtype": dtype}
    with torch.device(device):
        ours = VisualChatForCausalLM._from_config(config, **settings).eval().requires_grad_(False)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=ours.config.image_seq_length,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.device(device):
        llava = LlavaForConditionalGeneration._from_config(config, **settings).eval().requires_grad_(False)
    llava.model.vision_tower.load_state_dict(ours.model.vision_tower.state_dict())
    llava.model.language_model.load_state_dict(ours.model.language_model.state_dict())
    llava.lm_head.load_state_dict(ours.lm_head.state_dict())
    _check_same(ours, llava)
    return ours, llava


@torch.no_grad()
def _check_same(ours: VisualChatForCausalLM, llava: LlavaForConditionalGeneration) -> None:
    """Checks that both vision towers give the same features, and that text alone gives the same logits."""
    inputs = make_inputs(ours, 1)
    features = [model.model.vision_tower(inputs["pixel_values"]).last_hidden_state for model in (ours, llava)]
    assert_near(*features)
    text = inputs["input_ids"][:, -TEXT_TOKENS:]
    assert_near(ours(input_ids=text).logits, llava(input_ids=text).logits, rtol=1e-4, atol=1e-4)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, **tolerances: float) -> None:
    """
    `torch.testing.assert_close` in fp32. In half precision, single values differ much after many layers, so the relative
    distance of the whole tensors is checked.
    """
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, **tolerances)
    else:
        distance = ((actual - expected).float().norm() / expected.float().norm()).item()
        assert distance < 0.1, f"The relative distance is {distance:.3f}"


def make_inputs(ours: VisualChatForCausalLM, images: int, pixels: bool = True) -> dict[str, torch.Tensor]:
    """The inputs of both sides, on the device of the model: a conversation with 32 text tokens after each image."""
    generator = torch.Generator().manual_seed(images)
    image = torch.full((ours.config.image_seq_length,), IMAGE_TOKEN)
    parts = [part for _ in range(images) for part in (image, torch.randint(3, 300, (TEXT_TOKENS,), generator=generator))]
    input_ids = torch.cat(parts)[None].to(ours.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if pixels:
        size = ours.config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(images, 3, size, size, generator=generator).to(ours.device, ours.dtype)
    return inputs


def leave_out_tower(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict:
    """The inputs with the projected features of the images instead of their pixel values."""
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    return {**without(inputs, "pixel_values"), "mm_encoder_outputs": encoder_outputs(features)}


def encoder_outputs(features: list[torch.Tensor]) -> dict[str, BaseModelOutputWithPooling]:
    return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}


def without(inputs: dict, name: str) -> dict:
    return {key: value for key, value in inputs.items() if key != name}


@torch.no_grad()
def prefill(model: torch.nn.Module, inputs: dict):
    """The prefill of `generate`, which fills a cache and returns the logits of the next token."""
    return model(**inputs, use_cache=True, logits_to_keep=1)
