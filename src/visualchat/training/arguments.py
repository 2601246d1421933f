# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The fields of a recipe that are not [`~transformers.TrainingArguments`]: what is trained, and on what."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A VisualChat model: a folder or a Hub id."})
    vision_name_or_path: str | None = field(default=None, metadata={"help": "Or a vision tower to join (docs/parts.md) …"})
    text_name_or_path: str | None = field(
        default=None, metadata={"help": "… with a decoder: LLaMA, Mistral, Qwen2 or Qwen3."}
    )
    text_gguf_file: str | None = field(default=None, metadata={"help": "The decoder's GGUF file there; is dequantized."})
    multimodal_attention: str = field(
        default="mmca_merged", metadata={"help": "Of a joined model: mmca (the paper's), mmca_merged, causal or cross."}
    )
    cross_attention_every: int = field(
        default=1, metadata={"help": "With cross: every how many layers of the decoder look at images."}
    )
    image_number_keys: bool = field(default=False, metadata={"help": "Of a joined model: numbered image keys."})
    learned_image_numbers: int | None = field(
        default=None,
        metadata={
            "help": "Of a joined model: so many learned numbers for images, in place of image_number_keys. Left out: 64 with"
            " mmca and mmca_merged, else 0."
        },
    )
    image_prefix: str | None = field(
        default="auto",
        metadata={"help": "Of a joined model with mmca, mmca_merged: a text that images see, auto (a chat's begin), none."},
    )
    projector: str = field(
        default="linear", metadata={"help": "Of a joined model: linear, mlp, pixel_shuffle, pooled, vit or perceiver."}
    )
    pixel_shuffle_factor: int | None = field(
        default=None, metadata={"help": "With pixel_shuffle: the side, in patches, of what becomes one token; 2 by default."}
    )
    pool_factor: int | None = field(default=None, metadata={"help": "With pooled: the same; 2 by default."})
    class_token_outputs: int | None = field(
        default=None, metadata={"help": "With pooled: how many tokens the class token becomes; 1 by default."}
    )
    chat_format: Literal["paper", "decoder"] = field(
        default="paper", metadata={"help": "Of a joined model: the paper's prompt, or the decoder's own chat template."}
    )
    image_position: Literal["front", "in_place"] | None = field(
        default=None,
        metadata={"help": "Of a joined model: images in front of a question, or in_place."},
    )
    dtype: str = field(default="auto", metadata={"help": "Of the weights; auto: as they are saved."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The decoder's: eager, sdpa or flex_attention. Left out: the fastest here."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model; a VisualChat model needs none."}
    )
    mode: Literal["alignment", "lora", "full"] = field(
        default="alignment",
        metadata={"help": "alignment: projector, embedding, cross attention. lora: these and LoRA. full: all."},
    )
    train_embedding: bool = field(
        default=True,
        metadata={"help": "alignment, lora: whether the token embedding trains; if not, text alone is answered as before."},
    )
    lora_target: Literal["decoder", "tower", "both"] = field(default="decoder", metadata={"help": "Where LoRA is added."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA's matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA is scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA's matrices."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the decoder in 4 bits (needs bitsandbytes)."})


@dataclass
class DataArguments:
    """What it is trained on."""

    datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of parquet files, .parquet, .json or .jsonl files, save_to_disk folders, Hub ids."},
    )
    weights: list[float] | None = field(default=None, metadata={"help": "How often each dataset is drawn from."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Fraction of the examples that is held out."})
    max_length: int = field(default=4096, metadata={"help": "Most tokens of a conversation; oldest rounds are dropped."})
    streaming: bool = field(default=False, metadata={"help": "Read examples when they are needed; set --max_steps."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that check and measure the examples."})
    skip_broken_images: bool = field(default=False, metadata={"help": "Leave out bad examples of every kind; count them."})
    resume: bool = field(
        default=False, metadata={"help": "Resume from the newest complete checkpoint; a finished run stays as it is."}
    )
    accept_changes: bool = field(
        default=False, metadata={"help": "Resume with other settings than the checkpoint's, where that can be done."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Delete checkpoints and results of another run in output_dir. With --resume it has no effect."},
    )


@dataclass
class LoopArguments:
    """How it is trained and measured, beside transformers' own fields. `learning_rate` is for what has none of its own."""

    projector_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    embedding_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the token embedding."})
    lora_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of LoRA's matrices."})
    number_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of learned image numbers."})
    generation_samples: int = field(
        default=0, metadata={"help": "Held-out examples whose last answer is generated, and counted if it is exact."}
    )
    generation_max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a generated answer, at most."})


def describe_fields(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Name, default and help of every field of a class of arguments."""
    for one in fields(kind):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        yield one.name, default, one.metadata["help"]
