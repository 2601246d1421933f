"""
Writes `hub_configs/`: for each model a Hub repository's root, less weights and code.

    python -m visualchat.hub.configs
"""

import argparse
import shutil
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor


CLIP_VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_2_7B = {
    **LLAMA_2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_2_13B = {
    **LLAMA_2,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
LLAMA_2_70B = {
    **LLAMA_2,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
TEXT_TOKENS = 512  # of a conversation, beside its pictures
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # LLaMA's, with LLaMA's ids
TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
TINY_DECODER = {
    "vocab_size": len(SPECIAL_TOKENS) + 256,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class HubModel:
    """
    Args:
        title (`str`): The tower and the decoder, in words.
        tower, decoder (`dict`): Fields of `CLIPVisionConfig` and `LlamaConfig`.
        projector (`str`): As in `VisualChatConfig`.
        base_models (`tuple[str, str]`, *optional*): Hub ids of tower and decoder.
    """

    title: str
    tower: dict
    decoder: dict
    projector: str = "linear"
    base_models: tuple[str, str] | None = None


CLIP_ID = "openai/clip-vit-large-patch14"
MODELS = {
    "tiny": HubModel("a CLIP tower of 2 layers and a LLaMA of 2 layers, for tests", TINY_TOWER, TINY_DECODER),
    "7b": HubModel(
        "CLIP ViT-L/14 and LLaMA-2-7B", CLIP_VIT_L_14, LLAMA_2_7B, base_models=(CLIP_ID, "meta-llama/Llama-2-7b-hf")
    ),
    "13b": HubModel(
        "CLIP ViT-L/14 and LLaMA-2-13B", CLIP_VIT_L_14, LLAMA_2_13B, base_models=(CLIP_ID, "meta-llama/Llama-2-13b-hf")
    ),
    "70b": HubModel(
        "CLIP ViT-L/14 and LLaMA-2-70B", CLIP_VIT_L_14, LLAMA_2_70B, base_models=(CLIP_ID, "meta-llama/Llama-2-70b-hf")
    ),
    # 448 px and 256 tokens an image, as the paper's second tower, Qwen-VL's. A linear projector would give 1,025 tokens: a
    # context of 4,096 would hold 3 pictures.
    "7b-448": HubModel(
        "CLIP ViT-L/14 at 448 pixels and LLaMA-2-7B",
        {**CLIP_VIT_L_14, "image_size": 448},
        LLAMA_2_7B,
        projector="perceiver",
        base_models=(CLIP_ID, "meta-llama/Llama-2-7b-hf"),
    ),
}

ABOUT = """
# VisualChat {name}

The configuration of a [DeepSpeed-VisualChat](https://arxiv.org/abs/2309.14327) model: {title}, joined by a
{projector} projector and multi-modal causal attention. **This folder holds no weights and no code**: it says what a
repository of such a model looks like. `from_pretrained` needs weights; the section below makes them.

| | |
|---|---|
"""
TOKENIZER_OF_LLAMA = """
## Tokenizer

LLaMA-2's tokenizer is licensed and not part of this folder. It comes with the decoder: `AutoTokenizer` reads it from
`{text}`, and `VisualChatProcessor` adds the placeholder `<image>` as token {image_token_id} and, as LLaMA-2
has no padding token, pads with `<unk>`. `processor.save_pretrained` writes it beside the weights, whose licence it shares.
"""
TOKENIZER_OF_TINY = """
## Tokenizer

One token a byte (3 to 258), after `<unk>`, `<s>` and `</s>`; the placeholder `<image>` is token {image_token_id}.
"""
MAKE_TINY = """
## Make the weights

Random ones, for tests. The `modeling_visualchat` package must be installed; the folder that is written carries its own code:

```python
from transformers import AutoConfig, AutoModel, AutoProcessor

import modeling_visualchat

config = AutoConfig.from_pretrained("hub_configs/{name}")
AutoModel.from_config(config).save_pretrained("outputs/visualchat-{name}")
AutoProcessor.from_pretrained("hub_configs/{name}").save_pretrained("outputs/visualchat-{name}")
```
"""
MAKE_OF_PARTS = """
## Make the weights

Access to `{text}` is asked for on its page. The projector is new and random: it and the token embedding are
what to train, and until then the model does not know what it sees. The `modeling_visualchat` package must be installed; the
folder that is written carries its own code:

```python
{import_torch}from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, GenerationConfig

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor

vision, text = "{vision}", "{text}"
image_processor = CLIPImageProcessorPil.from_pretrained(vision{larger_pictures})
processor = VisualChatProcessor(image_processor, AutoTokenizer.from_pretrained(text))
tower = CLIPVisionModel.from_pretrained(vision, dtype="bfloat16")
{enlarge_tower}model = VisualChatForCausalLM.from_vision_text_pretrained(
    tower, text, dtype="bfloat16", image_token_id=processor.image_token_id, projector="{projector}"
)
model.generation_config = GenerationConfig.from_pretrained("hub_configs/{name}")
processor.image_seq_length = model.config.image_seq_length
model.save_pretrained("outputs/visualchat-{name}")
processor.save_pretrained("outputs/visualchat-{name}")
```

`image_number_keys` is off, as in the paper. Where conversations hold several pictures, pass `image_number_keys=True` and
`image_number_token_ids=processor.image_number_token_ids()` as well.
"""
LARGER_PICTURES = """, size={{"shortest_edge": {size}}}, crop_size={{"height": {size}, "width": {size}}}"""
ENLARGE_TOWER = """
# From {old} to {size} pixels: the positions of {old_side} × {old_side} patches, interpolated to {side} × {side}
embeddings = tower.embeddings
positions = embeddings.position_embedding.weight.data
grid = positions[1:].unflatten(0, ({old_side}, {old_side})).permute(2, 0, 1)[None].float()
grid = torch.nn.functional.interpolate(grid, size=({side}, {side}), mode="bicubic", align_corners=False)
positions = torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])
embeddings.position_embedding = torch.nn.Embedding.from_pretrained(positions, freeze=False)
embeddings.register_buffer("position_ids", torch.arange(len(positions))[None], persistent=False)
embeddings.image_size = tower.config.image_size = {size}

"""
LICENCE_OF_LLAMA = """
## Licence

This folder is Apache-2.0, as VisualChat is. Weights that are made with it hold those of LLaMA-2 and are under the
[LLAMA 2 Community License](https://ai.meta.com/llama/license/), which `license: llama2` above stands for: a repository with
weights passes the licence on, with the notice "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta
Platforms, Inc. All Rights Reserved."
"""
LICENCE_OF_TINY = """
## Licence

Apache-2.0.
"""


def join_on_meta(model: HubModel) -> VisualChatForCausalLM:
    """What `from_vision_text_pretrained` makes of the two parts, in bfloat16, without memory for weights."""
    with torch.device("meta"):
        tower = CLIPVisionModel._from_config(CLIPVisionConfig(**model.tower), dtype=torch.bfloat16)
        decoder = LlamaForCausalLM._from_config(
            LlamaConfig(**model.decoder, bos_token_id=1, eos_token_id=2), dtype=torch.bfloat16
        )
    decoder.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    joined = VisualChatForCausalLM.from_vision_text_pretrained(tower, decoder, projector=model.projector)
    joined.config.architectures = [type(joined).__name__]
    return joined


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after LLaMA's special tokens, and `<s>` before a text."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_llama_tokenizer() -> LlamaTokenizer:
    """LLaMA-2's but for its words, of which it has letters only: what the chat template of its folder is written for."""
    tokens = [*SPECIAL_TOKENS, "\u2581", *string.ascii_letters]
    return LlamaTokenizer(vocab={token: k for k, token in enumerate(tokens)}, add_bos_token=True)


def make_processor(model: HubModel, image_seq_length: int) -> VisualChatProcessor:
    """CLIP's image processor at the tower's size, with a tokenizer of the decoder's kind."""
    size = model.tower["image_size"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    tokenizer = make_llama_tokenizer() if model.base_models else make_byte_tokenizer()
    return VisualChatProcessor(image_processor, tokenizer, image_seq_length=image_seq_length)


def write_card(name: str, model: HubModel, joined: VisualChatForCausalLM) -> str:
    """The model card: numbers come from the model on the meta device."""
    config, parts = joined.config, joined.model
    vision, text = model.base_models or (None, None)
    tower, projector, total = (
        sum(p.numel() for p in part.parameters()) for part in (parts.vision_tower, parts.multi_modal_projector, joined)
    )
    placeholder = 2 * config.hidden_size
    trained = sum(p.numel() for p in joined.parameters() if p.requires_grad)
    context, image_tokens = config.text_config.max_position_embeddings, config.image_seq_length
    side = config.vision_config.image_size
    numbers = {
        "parameters": total,
        "… of the vision tower": tower,
        "… of the projector": projector,
        "… of the decoder": total - tower - projector - placeholder,
        "… of the placeholder token, in embedding and output layer": placeholder,
        "… trained by `freeze_for_alignment`: projector and token embedding": trained,
        "bytes of the weights, bfloat16": 2 * total,
        "pixels of a picture": f"{side} × {side}",
        "tokens of a picture": image_tokens,
        "bytes of a picture's memory (`model.image_memory_nbytes`), bfloat16": joined.image_memory_nbytes,
        "tokens of the context": context,
        f"pictures that fit beside {TEXT_TOKENS} tokens of text": (context - TEXT_TOKENS) // image_tokens,
        "layers · heads · key-value heads of the decoder": " · ".join(
            str(getattr(config.text_config, field))
            for field in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        ),
    }
    front = ["license: " + ("llama2" if text else "apache-2.0"), "library_name: transformers"]
    front += ["pipeline_tag: image-text-to-text"]
    if model.base_models:
        front += ["base_model:", *(f"- {base}" for base in model.base_models)]
    front += ["tags:", "- visualchat", "- multi-image", "- multi-modal-causal-attention"]
    rows = [f"| {key} | {value:,} |" if isinstance(value, int) else f"| {key} | {value} |" for key, value in numbers.items()]
    card = "\n".join(["---", *front, "---"]) + ABOUT.format(name=name, title=model.title, projector=model.projector)
    card += "\n".join(rows) + "\n"
    if text is None:
        make = MAKE_TINY.format(name=name)
    else:
        import_torch = larger_pictures = enlarge_tower = ""
        if side != (old := CLIP_VIT_L_14["image_size"]):
            patch = config.vision_config.patch_size
            sides = {"old": old, "size": side, "old_side": old // patch, "side": side // patch}
            import_torch = "import torch\n"
            larger_pictures, enlarge_tower = LARGER_PICTURES.format(**sides), ENLARGE_TOWER.format(**sides)
        make = MAKE_OF_PARTS.format(
            name=name,
            vision=vision,
            text=text,
            projector=model.projector,
            import_torch=import_torch,
            larger_pictures=larger_pictures,
            enlarge_tower=enlarge_tower,
        )
    tokenizer = TOKENIZER_OF_LLAMA if text else TOKENIZER_OF_TINY
    card += make + tokenizer.format(text=text, image_token_id=config.image_token_id)
    return card + (LICENCE_OF_LLAMA if text else LICENCE_OF_TINY)


def write_folder(name: str, folder: Path) -> None:
    """Replaces `folder` by the one of `MODELS[name]`."""
    model = MODELS[name]
    joined = join_on_meta(model)
    with tempfile.TemporaryDirectory() as saved:
        joined.config.save_pretrained(saved)
        joined.generation_config.save_pretrained(saved)
        make_processor(model, joined.config.image_seq_length).save_pretrained(saved)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in Path(saved).iterdir():
            is_tokenizers = path.name.startswith("tokenizer")
            if path.suffix != ".py" and not (is_tokenizers and model.base_models):
                shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(write_card(name, model, joined))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hub_configs"), help="folder to write")
    args = parser.parse_args(argv)
    for name in MODELS:
        write_folder(name, args.output / name)


if __name__ == "__main__":
    main()
