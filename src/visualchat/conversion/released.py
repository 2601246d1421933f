"""Converts a checkpoint of the released DeepSpeed-VisualChat training script: `visualchat convert released`."""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor


PROJECTORS = {"baseline": "linear", "vit": "vit", "perceiver": "perceiver_released"}
CONFIG_KEYS = ("projector", "vision_config", "text_config", "image_token_id", "base_vocab_size")
EXTRA_TOKENS = ("### Image:", "<image>")  # in this order after the base vocabulary

# Our name → the released name, by their beginnings
BACKBONES = {
    "model.vision_tower.": "vis_encoder.vision_model.",
    "model.language_model.embed_tokens.": "lang_embed.",  # the trained one
    "model.language_model.": "lang_decoder.model.",
    "lm_head.": "lang_decoder.lm_head.",
}
PROJECTOR_PARTS = {
    "linear": {"linear.": "0.", "layer_norm.": "1."},
    "vit": {"encoder_layer.": "vis_layer.", "linear.": "projection.0.", "layer_norm.": "projection.1."},
    "perceiver_released": {
        "query_norm.": "ln_q.",
        "query": "query",
        "positions": "pos_embed",
        "kv_proj.": "kv_proj.",
        "kv_norm.": "ln_kv.",
        "q_proj.": "attn.in_proj_",
        "k_proj.": "attn.in_proj_",
        "v_proj.": "attn.in_proj_",
        "out_proj.": "attn.out_proj.",
        "layer_norm.": "projection.0.",
        "linear.": "projection.1.",
    },
}
UNUSED = ("lang_decoder.model.embed_tokens.weight",)  # was not trained, and embeds generated tokens only
COMPUTED = ("embeddings.position_ids", "rotary_emb.inv_freq")  # saved by older versions of transformers
LORA_FACTORS = ("lora_right_weight", "lora_left_weight")


def read_config(path: Path, multimodal_attention: str) -> tuple[VisualChatConfig, int]:
    """
    Returns:
        The config of the converted model, and the size of the vocabulary before it was extended.
    """
    parts = json.loads(path.read_text())
    if set(parts) != set(CONFIG_KEYS):
        raise ValueError(f"{path} must hold {', '.join(CONFIG_KEYS)}, but holds {', '.join(parts)}")
    if parts["projector"] not in PROJECTORS:
        raise ValueError(f"{path}: `projector` is {parts['projector']!r}, use one of {', '.join(PROJECTORS)}")
    vocab_size, base = parts["text_config"].get("vocab_size"), parts["base_vocab_size"]
    if vocab_size is None or vocab_size < base + len(EXTRA_TOKENS):
        raise ValueError(
            f"{path}: `vocab_size` of `text_config` is {vocab_size}, but `base_vocab_size` is {base} and"
            f" {' and '.join(EXTRA_TOKENS)} come after it"
        )
    if not base <= parts["image_token_id"] < vocab_size:
        raise ValueError(f"{path}: `image_token_id` is {parts['image_token_id']}, use one from {base} to {vocab_size - 1}")
    # The trained embedding is a copy of its own, whatever the decoder's was tied to
    text_config = LlamaConfig(**{**parts["text_config"], "tie_word_embeddings": False})
    config = VisualChatConfig(
        vision_config=CLIPVisionConfig(**parts["vision_config"]),
        text_config=text_config,
        image_token_id=parts["image_token_id"],
        projector=PROJECTORS[parts["projector"]],
        multimodal_attention=multimodal_attention,
    )
    return config, base


def fuse_lora(weights: dict[str, torch.Tensor], lora: str | None) -> dict[str, torch.Tensor]:
    """
    The weights without LoRA's factors.

    Args:
        weights (`dict[str, torch.Tensor]`): The checkpoint.
        lora (`str`, *optional*): `"fused"`: the factors are part of the weights already. `"unfused"`: they are added.

    Raises:
        ValueError: If there are any and `lora` is not given, or if one of a pair is missing.
    """
    factors = [name for name in weights if name.endswith(LORA_FACTORS)]
    if factors and lora is None:
        raise ValueError(
            f"The checkpoint holds {len(factors)} LoRA factors ({_listed(factors)}), and nothing in it says whether they are"
            " part of the weights already. Pass --lora fused if so, as the released training script saves them, or"
            " --lora unfused to add them"
        )
    if lora is not None and not factors:
        raise ValueError(f"--lora {lora} was given, but the checkpoint holds no LoRA factors")
    fused = {name: weight for name, weight in weights.items() if name not in factors}
    for layer in sorted({name.rpartition(".")[0] for name in factors}):
        names = [f"{layer}.{name}" for name in (*LORA_FACTORS, "weight")]
        if missing := [name for name in names if name not in weights]:
            raise ValueError(f"The LoRA of {layer} lacks {', '.join(missing)}")
        if lora == "unfused":
            right, left, weight = (weights[name] for name in names)
            update = (right.float() @ left.float()).T / right.shape[1]
            fused[names[2]] = (weight.float() + update).to(weight.dtype)
    return fused


def released_name(name: str, projector: str) -> str:
    """What the released code calls one of our weights."""
    parts = {
        f"model.multi_modal_projector.{ours}": f"projection.{theirs}" for ours, theirs in PROJECTOR_PARTS[projector].items()
    }
    ours, theirs = next((ours, theirs) for ours, theirs in {**BACKBONES, **parts}.items() if name.startswith(ours))
    return theirs + name.removeprefix(ours)


def convert_weights(weights: dict[str, torch.Tensor], config: VisualChatConfig) -> dict[str, torch.Tensor]:
    """
    A checkpoint's weights under our names.

    Raises:
        ValueError: Naming each weight that is missing, left over, or of another shape than the config makes it.
    """
    shapes = copy.deepcopy(config)
    shapes.multimodal_attention = "mmca"  # has the same weights, and no warning
    with torch.device("meta"):
        expected = VisualChatForCausalLM._from_config(shapes).state_dict()
    names = {name: released_name(name, config.projector) for name in expected}
    weights = {name: weight for name, weight in weights.items() if not name.endswith(COMPUTED)}
    needed = {*names.values(), *UNUSED}
    missing, left_over = sorted(needed - set(weights)), sorted(set(weights) - needed)
    if missing or left_over:
        raise ValueError(
            f"Of {len(needed)} weights the checkpoint lacks {len(missing)}{_named(missing)} and has {len(left_over)} that"
            f" have no place in this model{_named(left_over)}: check `projector`, `vision_config` and `text_config`"
        )
    converted = {}
    for name, theirs in names.items():
        weight = weights[theirs]
        if theirs.startswith("projection.attn.in_proj_"):  # queries, keys and values in one
            if len(weight) != 3 * len(expected[name]):
                raise ValueError(f"{theirs} has {len(weight)} rows, but the config makes it {3 * len(expected[name])}")
            weight = weight.chunk(3)["qkv".index(name.removeprefix("model.multi_modal_projector.")[0])]
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{theirs} has the shape {tuple(weight.shape)}, but the config makes it {tuple(expected[name].shape)}"
            )
        converted[name] = weight
    return converted


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _named(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def make_processor(
    tokenizer: PreTrainedTokenizerBase, config: VisualChatConfig, base_vocab_size: int
) -> VisualChatProcessor:
    """
    The processor of a converted model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): What the released script saved, or the decoder's own, which is extended.
        config (`VisualChatConfig`): Of the converted model.
        base_vocab_size (`int`): Tokens of the decoder's own.

    Raises:
        ValueError: If its vocabulary is not the trained one.
    """
    if len(tokenizer) == base_vocab_size:
        tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>") if "<image>" in tokenizer.get_vocab() else None
    if image_id != config.image_token_id:
        raise ValueError(f"The tokenizer's id of <image> is {image_id}, but `image_token_id` is {config.image_token_id}")
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, but the embedding {config.text_config.vocab_size}")
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return VisualChatProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def run(args: argparse.Namespace) -> None:
    """Converts with the options of `visualchat convert released`."""
    config, base_vocab_size = read_config(args.config, args.attention)
    processor = None
    if args.tokenizer:
        processor = make_processor(AutoTokenizer.from_pretrained(args.tokenizer), config, base_vocab_size)
    weights = torch.load(args.model, map_location="cpu", weights_only=True, mmap=True)
    weights = convert_weights(fuse_lora(weights, args.lora), config)
    dtype = weights["model.language_model.embed_tokens.weight"].dtype
    model = VisualChatForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    if processor is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, getattr(processor.tokenizer, name))
        processor.save_pretrained(args.output)
    model.save_pretrained(args.output)

    print(f"{args.output}: {model.num_parameters():,} parameters, {dtype}, multimodal_attention={args.attention!r}")
    if args.lora == "fused":
        print("The LoRA factors are left out, as part of the weights")
    if processor is None:
        print("No processor was written, for want of --tokenizer: the folder takes tensors, not messages")
    if args.attention == "mmca":
        print("The checkpoint was not trained with this attention: fine-tune projector and token embedding before use")
    if args.attention == "causal":
        print("The checkpoint was trained with pictures in reverse: give each sample's last picture first, or fine-tune")
