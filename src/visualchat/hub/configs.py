"""
Writes `hub_configs/`: for each model, the files of its Hub repository without weights and code.

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
from modeling_visualchat.configuration_visualchat import CLIP_VIT_L_14


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
TEXT_TOKENS = 512  # text tokens of a conversation, for the number of images that fit beside them
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # the tokens of LLaMA, with the same ids
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
        title (`str`): A short description of the vision tower and the decoder.
        tower, decoder (`dict`): The fields of `CLIPVisionConfig` and `LlamaConfig`.
        projector (`str`): The projector, as in `VisualChatConfig`.
        base_models (`tuple[str, str]`, *optional*): The Hub ids of the vision tower and the decoder.
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
    # 448 pixels and 256 tokens per image, as with the paper's second vision tower, that of Qwen-VL. With a linear projector
    # an image would have 1,025 tokens, so that only 3 images would fit into a context of 4,096 tokens.
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

The configuration of a [DeepSpeed-VisualChat](https://arxiv.org/abs/2309.14327) model: {title}, connected by a
{projector} projector, with multi-modal causal attention. **This folder contains no weights and no code**, only the other
files of a repository of such a model. `from_pretrained` needs weights: [Create the weights](#create-the-weights) shows how
to create them.

| | |
|---|---|
"""
TOKENIZER_OF_LLAMA = """
## Tokenizer

The tokenizer of LLaMA-2 is not part of this folder, because it is under the licence of LLaMA-2. `AutoTokenizer` loads it
from `{text}`. `VisualChatProcessor` adds the placeholder `<image>` as token {image_token_id} and uses `<unk>` as the
padding token, since LLaMA-2 has none. `processor.save_pretrained` saves the tokenizer beside the weights.
"""
TOKENIZER_OF_TINY = """
## Tokenizer

A byte-level tokenizer: tokens 0 to 2 are `<unk>`, `<s>` and `</s>`, tokens 3 to 258 are the 256 bytes, and the placeholder
`<image>` is token {image_token_id}.
"""
CREATE_TINY = """
## Create the weights

The weights are random and serve for tests. This needs the VisualChat package (`pip install .` in its repository). The saved
folder contains its own code:

```python
from transformers import AutoConfig, AutoModel, AutoProcessor

import modeling_visualchat

config = AutoConfig.from_pretrained("hub_configs/{name}")
AutoModel.from_config(config).save_pretrained("outputs/visualchat-{name}")
AutoProcessor.from_pretrained("hub_configs/{name}").save_pretrained("outputs/visualchat-{name}")
```
"""
CREATE_FROM_PARTS = """
## Create the weights

Request access to `{text}` on its page. The projector is initialized at random, so the model does not understand
images until the projector and the token embedding have been trained. This needs the VisualChat package (`pip install .` in
its repository). The saved folder contains its own code:

```python
{import_torch}from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, GenerationConfig

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor

vision, text = "{vision}", "{text}"
image_processor = CLIPImageProcessorPil.from_pretrained(vision{larger_images})
processor = VisualChatProcessor(image_processor, AutoTokenizer.from_pretrained(text))
tower = CLIPVisionModel.from_pretrained(vision, dtype="bfloat16")
{interpolate_positions}model = VisualChatForCausalLM.from_vision_text_pretrained(
    tower,
    text,
    dtype="bfloat16",
    image_token_id=processor.image_token_id,
    projector="{projector}",
    multimodal_attention="mmca",
)
model.generation_config = GenerationConfig.from_pretrained("hub_configs/{name}")
processor.image_seq_length = model.config.image_seq_length
model.save_pretrained("outputs/visualchat-{name}")
processor.save_pretrained("outputs/visualchat-{name}")
```

This is the paper's attention. In our study with a small pretrained decoder (docs/study.md), models with
`multimodal_attention="mmca_merged"`, `learned_image_numbers` and `image_prefix_ids=processor.image_prefix_ids()` learned
much faster.

## Commands

```bash
visualchat plan hub_configs/{name} --gpus 8          # predicts the memory of a training step
visualchat chat outputs/visualchat-{name}            # a chat in the terminal, once the model has been trained
visualchat push outputs/visualchat-{name} USER/NAME  # uploads the folder to the Hugging Face Hub
```
"""
LARGER_IMAGES = """, size={{"shortest_edge": {size}}}, crop_size={{"height": {size}, "width": {size}}}"""
INTERPOLATE_POSITIONS = """
# From {old} to {size} pixels: interpolate the position embeddings of {old_side} × {old_side} patches to {side} × {side}
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

This folder is under Apache-2.0, as VisualChat is. Weights that are created with it contain the weights of LLaMA-2, so they
are under the [LLAMA 2 Community License](https://ai.meta.com/llama/license/), hence `license: llama2` above. A repository
with such weights must include that licence and the notice "Llama 2 is licensed under the LLAMA 2 Community License,
Copyright (c) Meta Platforms, Inc. All Rights Reserved."
"""
LICENCE_OF_TINY = """
## Licence

Apache-2.0.
"""


def build_on_meta(model: HubModel) -> VisualChatForCausalLM:
    """The model that `from_vision_text_pretrained` builds, in bfloat16 on the meta device, which allocates no memory."""
    with torch.device("meta"):
        tower = CLIPVisionModel._from_config(CLIPVisionConfig(**model.tower), dtype=torch.bfloat16)
        decoder = LlamaForCausalLM._from_config(
            LlamaConfig(**model.decoder, bos_token_id=1, eos_token_id=2), dtype=torch.bfloat16
        )
    decoder.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    joined = VisualChatForCausalLM.from_vision_text_pretrained(
        tower, decoder, projector=model.projector, multimodal_attention="mmca"
    )
    joined.config.architectures = [type(joined).__name__]
    return joined


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with LLaMA's special tokens and one token per byte. It puts `<s>` before a text."""
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
    """A stand-in for LLaMA-2's tokenizer, which has only letters as vocabulary: the chat template is the same."""
    tokens = [*SPECIAL_TOKENS, "\u2581", *string.ascii_letters]
    return LlamaTokenizer(vocab={token: k for k, token in enumerate(tokens)}, add_bos_token=True)


def make_processor(model: HubModel, image_seq_length: int) -> VisualChatProcessor:
    """CLIP's image processor at the tower's image size, with a tokenizer of the decoder's type."""
    size = model.tower["image_size"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    tokenizer = make_llama_tokenizer() if model.base_models else make_byte_tokenizer()
    return VisualChatProcessor(image_processor, tokenizer, image_seq_length=image_seq_length)


def make_card(name: str, model: HubModel, joined: VisualChatForCausalLM) -> str:
    """The model card. Its numbers are those of `joined`, the model on the meta device."""
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
        "… trained in alignment (`freeze_for_alignment`): projector and token embedding": trained,
        "bytes of the weights, bfloat16": 2 * total,
        "pixels of an image": f"{side} × {side}",
        "tokens of an image": image_tokens,
        "bytes of the image memory of an image (`model.image_memory_nbytes`), bfloat16": joined.image_memory_nbytes,
        "tokens of the context": context,
        f"images that fit into the context beside {TEXT_TOKENS} text tokens": (context - TEXT_TOKENS) // image_tokens,
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
        make = CREATE_TINY.format(name=name)
    else:
        import_torch = larger_images = interpolate_positions = ""
        if side != (old := CLIP_VIT_L_14["image_size"]):
            patch = config.vision_config.patch_size
            sides = {"old": old, "size": side, "old_side": old // patch, "side": side // patch}
            import_torch = "import torch\n"
            larger_images, interpolate_positions = LARGER_IMAGES.format(**sides), INTERPOLATE_POSITIONS.format(**sides)
        make = CREATE_FROM_PARTS.format(
            name=name,
            vision=vision,
            text=text,
            projector=model.projector,
            import_torch=import_torch,
            larger_images=larger_images,
            interpolate_positions=interpolate_positions,
        )
    tokenizer = TOKENIZER_OF_LLAMA if text else TOKENIZER_OF_TINY
    card += make + tokenizer.format(text=text, image_token_id=config.image_token_id)
    return card + (LICENCE_OF_LLAMA if text else LICENCE_OF_TINY)


def write_folder(name: str, folder: Path) -> None:
    """Writes the files of `MODELS[name]`. An existing `folder` is replaced."""
    model = MODELS[name]
    joined = build_on_meta(model)
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
    (folder / "README.md").write_text(make_card(name, model, joined))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hub_configs"), help="folder to write")
    args = parser.parse_args(argv)
    for name in MODELS:
        write_folder(name, args.output / name)


if __name__ == "__main__":
    main()
