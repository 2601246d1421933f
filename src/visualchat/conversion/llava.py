"""Starts a VisualChat model from a LLaVA 1.5 checkpoint: `visualchat convert llava`."""

import argparse

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.projector_visualchat import VisualChatLinearProjector


def check_config(config: LlavaConfig) -> None:
    """Raises a `ValueError` that names what VisualChat cannot take over."""
    for name, expected in (("vision_config", "clip_vision_model"), ("text_config", "llama")):
        model_type = getattr(config, name).model_type
        if model_type != expected:
            raise ValueError(f"`{name}` has the model_type {model_type!r}: VisualChat takes over {expected!r} only")
    if not isinstance(config.vision_feature_layer, int):
        layers = config.vision_feature_layer
        raise ValueError(f"`vision_feature_layer` joins {len(layers)} layers ({layers}): VisualChat projects 1")


def convert(llava: LlavaForConditionalGeneration, **config) -> tuple[VisualChatForCausalLM, list[str]]:
    """
    Args:
        llava (`LlavaForConditionalGeneration`): Its weights are shared, not copied.
        config: Fields of [`VisualChatConfig`], such as `multimodal_attention` and `projector`.

    Returns:
        The model, and what became of each part, a line each.
    """
    check_config(llava.config)
    with torch.device("meta"):
        text = LlamaForCausalLM(llava.config.text_config)
    text.model, text.lm_head = llava.model.language_model, llava.lm_head
    text.generation_config = llava.generation_config
    model = VisualChatForCausalLM.from_vision_text_pretrained(
        llava.model.vision_tower,
        text,
        image_token_id=llava.config.image_token_id,
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        **config,
    )
    return model, ["vision tower and decoder: LLaVA's", *_start_projector(model, llava)]


@torch.no_grad()
def _start_projector(model: VisualChatForCausalLM, llava: LlavaForConditionalGeneration) -> list[str]:
    ours, theirs = model.model.multi_modal_projector, llava.model.multi_modal_projector
    if not isinstance(ours, VisualChatLinearProjector):
        return ["projector: random; none of the weights of LLaVA's two-layer MLP has a place in it"]
    ours.linear.weight.copy_(theirs.linear_1.weight)
    nn.init.zeros_(ours.linear.bias)
    if theirs.linear_1.bias is not None:
        ours.linear.bias.copy_(theirs.linear_1.bias)
    shape = tuple(theirs.linear_2.weight.shape)
    lines = [
        "projector, linear: the first layer of LLaVA's MLP",
        f"projector, layer_norm: at its start; the second layer of LLaVA's MLP {shape} has no place in Linear + LayerNorm",
    ]
    return lines + (["projector, encoder_layer: random"] if model.config.projector == "vit" else [])


def make_processor(name: str, model: VisualChatForCausalLM) -> VisualChatProcessor:
    """LLaVA's tokenizer and image processor, with VisualChat's prompt."""
    processor = VisualChatProcessor(
        CLIPImageProcessorPil.from_pretrained(name),
        AutoTokenizer.from_pretrained(name),
        image_seq_length=model.config.image_seq_length,
    )
    if processor.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"The tokenizer's id of {processor.image_token} is {processor.image_token_id}, but the model's image token is"
            f" {model.config.image_token_id}"
        )
    vocabulary = model.config.text_config.vocab_size
    if len(processor.tokenizer) > vocabulary:
        raise ValueError(f"The tokenizer has {len(processor.tokenizer)} tokens, but the embedding {vocabulary}")
    return processor


def run(args: argparse.Namespace) -> None:
    """Converts with the options of `visualchat convert llava`."""
    check_config(LlavaConfig.from_pretrained(args.model))
    llava = LlavaForConditionalGeneration.from_pretrained(args.model, dtype="auto")
    model, lines = convert(llava, multimodal_attention=args.attention, projector=args.projector)
    make_processor(args.model, model).save_pretrained(args.output)
    model.save_pretrained(args.output)
    print(f"{args.output}: {model.num_parameters():,} parameters, {model.dtype}", *lines, sep="\n  ")
    print("Train the projector before use: it has not seen this attention, nor LLaVA's weights this projector")
