# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The fields of a recipe that are not [`~transformers.TrainingArguments`]: what is trained, and on what."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A VisualChat: a folder or a Hub id."})
    vision_name_or_path: str | None = field(default=None, metadata={"help": "Or a CLIP vision tower to join …"})
    text_name_or_path: str | None = field(default=None, metadata={"help": "… with a LLaMA-family decoder."})
    multimodal_attention: str = field(default="mmca", metadata={"help": "Of a joined model."})
    image_number_keys: bool = field(default=False, metadata={"help": "Of a joined model."})
    projector: str = field(default="linear", metadata={"help": "Of a joined model."})
    dtype: str = field(default="auto", metadata={"help": "What the weights are loaded in."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The decoder's: eager, sdpa or flex_attention. Left out: the fastest here."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model of another type; a VisualChat needs none."}
    )
    mode: Literal["alignment", "lora", "full"] = field(
        default="alignment", metadata={"help": "alignment: projector and token embedding. lora: these and LoRA. full: all."}
    )
    lora_target: Literal["decoder", "tower", "both"] = field(default="decoder", metadata={"help": "Where LoRA is added."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA's matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA, times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA's input."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the decoder in 4 bits (needs bitsandbytes)."})


@dataclass
class DataArguments:
    """What it is trained on."""

    datasets: list[str] = field(default_factory=list, metadata={"help": "Folders, files or Hub ids; see load_examples."})
    weights: list[float] | None = field(default=None, metadata={"help": "Of each dataset in the mixture."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Fraction of the examples that is held out."})
    max_length: int = field(default=4096, metadata={"help": "Tokens of a conversation; oldest rounds are dropped first."})
    streaming: bool = field(default=False, metadata={"help": "Read examples when they are needed; set --max_steps."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that measure examples."})
    skip_broken_images: bool = field(default=False, metadata={"help": "Leave out broken examples and images; count them."})
    resume: bool = field(default=False, metadata={"help": "Resume from the newest complete checkpoint."})


def describe_fields(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Name, default and help of every field of a class of arguments."""
    for one in fields(kind):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        yield one.name, default, one.metadata["help"]
