"""Converts a checkpoint of the released DeepSpeed-VisualChat training script: `visualchat convert released`."""

import argparse
import copy
import json
import pickle
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor
from visualchat.errors import input_errors


PROJECTORS = {"baseline": "linear", "vit": "vit", "perceiver": "perceiver_released"}
CONFIG_KEYS = ("projector", "vision_config", "text_config", "image_token_id", "base_vocab_size")
EXTRA_TOKENS = ("### Image:", "<image>")  # in this order after the base vocabulary

# Prefixes of our names → prefixes of the released names
BACKBONES = {
    "model.vision_tower.": "vis_encoder.vision_model.",
    "model.language_model.embed_tokens.": "lang_embed.",  # the trained token embedding
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
UNUSED = ("lang_decoder.model.embed_tokens.weight",)  # not trained; the released code uses it for generated tokens only
COMPUTED = ("embeddings.position_ids", "rotary_emb.inv_freq")  # buffers that older versions of transformers saved
LORA_FACTORS = ("lora_right_weight", "lora_left_weight")


def read_config(path: Path, multimodal_attention: str) -> tuple[VisualChatConfig, int]:
    """
    Returns:
        The config of the converted model, and the size of the decoder's original vocabulary.
    """
    parts = json.loads(path.read_text())
    if set(parts) != set(CONFIG_KEYS):
        raise ValueError(f"{path} must have the keys {', '.join(CONFIG_KEYS)}, but has {', '.join(parts)}")
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
    # The released code trains a copy of the token embedding, so it is never tied to the output layer
    text_config = LlamaConfig(**{**parts["text_config"], "tie_word_embeddings": False})
    config = VisualChatConfig(
        vision_config=CLIPVisionConfig(**parts["vision_config"]),
        text_config=text_config,
        image_token_id=parts["image_token_id"],
        projector=PROJECTORS[parts["projector"]],
        multimodal_attention=multimodal_attention,
    )
    return config, base


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    Reads a checkpoint that `torch.save` wrote. It is a pickle, of which only tensors are read, so that no code in it runs.

    Raises:
        ValueError: If the file is not such a checkpoint, or contains other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a file of weights that torch.save wrote: {error}") from error


def fuse_lora(weights: dict[str, torch.Tensor], lora: str | None) -> dict[str, torch.Tensor]:
    """
    Merges the LoRA factors of a checkpoint into its weights.

    Args:
        weights (`dict[str, torch.Tensor]`): The checkpoint.
        lora (`str`, *optional*): `"fused"`: the weights already include the factors, which are dropped. `"unfused"`: the
            product of the factors is added to the weights.

    Returns:
        `dict[str, torch.Tensor]`: The weights without LoRA factors.

    Raises:
        ValueError: If there are LoRA factors and `lora` is not given, if `lora` is given and there are none, or if a factor
            or its weight is missing.
    """
    factors = [name for name in weights if name.endswith(LORA_FACTORS)]
    if factors and lora is None:
        raise ValueError(
            f"The checkpoint holds {len(factors)} LoRA factors ({_listed(factors)}), but does not say whether the"
            " weights already include them. Pass --lora fused if they do (the released training script saves such"
            " checkpoints), or --lora unfused to add them"
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
    """The name of one of our weights in the released code."""
    parts = {
        f"model.multi_modal_projector.{ours}": f"projection.{theirs}" for ours, theirs in PROJECTOR_PARTS[projector].items()
    }
    ours, theirs = next((ours, theirs) for ours, theirs in {**BACKBONES, **parts}.items() if name.startswith(ours))
    return theirs + name.removeprefix(ours)


def convert_weights(weights: dict[str, torch.Tensor], config: VisualChatConfig) -> dict[str, torch.Tensor]:
    """
    Renames the weights of a checkpoint to our names.

    Raises:
        ValueError: If a weight is missing, unexpected, or of another shape than the config says. The error names it.
    """
    shapes = copy.deepcopy(config)
    shapes.multimodal_attention = "mmca"  # the weights are the same, and no warning is logged
    with torch.device("meta"):
        expected = VisualChatForCausalLM._from_config(shapes).state_dict()
    names = {name: released_name(name, config.projector) for name in expected}
    weights = {name: weight for name, weight in weights.items() if not name.endswith(COMPUTED)}
    needed = {*names.values(), *UNUSED}
    missing, left_over = sorted(needed - set(weights)), sorted(set(weights) - needed)
    if missing or left_over:
        raise ValueError(
            f"Of {len(needed)} weights, {len(missing)} are missing in the checkpoint{_named(missing)}, and it has"
            f" {len(left_over)} unexpected ones{_named(left_over)}: check `projector`, `vision_config` and `text_config`"
        )
    converted = {}
    for name, theirs in names.items():
        weight = weights[theirs]
        if theirs.startswith("projection.attn.in_proj_"):  # query, key and value projections in one weight
            if len(weight) != 3 * len(expected[name]):
                raise ValueError(f"{theirs} has {len(weight)} rows, but this config needs {3 * len(expected[name])}")
            weight = weight.chunk(3)["qkv".index(name.removeprefix("model.multi_modal_projector.")[0])]
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{theirs} has the shape {tuple(weight.shape)}, but this config needs {tuple(expected[name].shape)}"
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
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer that the released script saved, or the original tokenizer of the
            decoder, to which the released script's tokens are added.
        config (`VisualChatConfig`): The config of the converted model.
        base_vocab_size (`int`): The size of the decoder's original vocabulary.

    Raises:
        ValueError: If the vocabulary is not the one that the checkpoint was trained with.
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
    """Runs `visualchat convert released` with these options."""
    with input_errors(f"cannot convert {args.model}: "):
        config, base_vocab_size = read_config(args.config, args.attention)
        processor = None
        if args.tokenizer:
            processor = make_processor(AutoTokenizer.from_pretrained(args.tokenizer), config, base_vocab_size)
        weights = convert_weights(fuse_lora(read_weights(args.model), args.lora), config)
    dtype = weights["model.language_model.embed_tokens.weight"].dtype
    model = VisualChatForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    if processor is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, getattr(processor.tokenizer, name))
        processor.save_pretrained(args.output)
    model.save_pretrained(args.output)

    print(f"{args.output}: {model.num_parameters():,} parameters, {dtype}, multimodal_attention={args.attention!r}")
    if args.lora == "fused":
        print("The LoRA factors were dropped, since the weights include them")
    if processor is None:
        print("No processor was saved, since --tokenizer was not given: the folder cannot be used with messages")
    if args.attention == "mmca":
        print(
            "The checkpoint was not trained with this attention: fine-tune the projector and the token embedding before use"
        )
    if args.attention == "causal":
        print("The checkpoint was trained with images in reverse order: pass images last to first, or fine-tune")
