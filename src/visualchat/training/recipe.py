# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Reads a recipe and the fields of the command line, and refuses fields that contradict each other."""

from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.utils import is_bitsandbytes_available

from visualchat.hub.push import is_hub_id
from visualchat.training.arguments import DataArguments, ModelArguments
from visualchat.training.trainer import VisualChatTrainingArguments


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, VisualChatTrainingArguments]:
    """A recipe's fields are defaults, which the command line overrides."""
    kinds = (ModelArguments, DataArguments, VisualChatTrainingArguments)
    parser = HfArgumentParser(kinds, prog="visualchat train", description="Fine-tunes a VisualChat model.")
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = read_recipe(Path(argv[0]))
        known = {one.name for kind in kinds for one in fields(kind)}
        if unknown := sorted(set(recipe) - known):
            raise ValueError(f"{argv[0]}: unknown fields {', '.join(unknown)}")
        parser.set_defaults(**recipe)
        argv = argv[1:]
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown options {' '.join(unknown)}")
    return tuple(parsed)


def read_recipe(path: Path) -> dict:
    """
    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no YAML file of fields.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold fields and their values, such as `mode: lora`, got {recipe!r:.80}")
    return recipe


def check_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: VisualChatTrainingArguments
) -> None:
    """
    Raises:
        ImportError: If `load_in_4bit` is asked for without bitsandbytes.
        ValueError: If two fields contradict each other; both are named, with their values.
    """
    if model_args.load_in_4bit and model_args.mode != "lora":
        raise ValueError(f"load_in_4bit trains by LoRA alone: it needs mode: lora, got {model_args.mode}")
    if model_args.mode == "full" and not model_args.train_embedding:
        raise ValueError("mode: full trains everything: it needs train_embedding: true, got false")
    if model_args.load_in_4bit and not is_bitsandbytes_available():
        raise ImportError("load_in_4bit needs bitsandbytes: pip install -U bitsandbytes")
    if training_args.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint is not used: --resume goes on from the newest checkpoint of output_dir, got"
            f" {training_args.resume_from_checkpoint}"
        )
    if training_args.enable_jit_checkpoint:
        raise ValueError("enable_jit_checkpoint must be left out: SIGTERM saves a checkpoint in any case, got true")
    if data_args.streaming:
        if training_args.max_steps <= 0:
            raise ValueError(f"streaming: true does not know its length: it needs max_steps, got {training_args.max_steps}")
        if training_args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                "streaming: true reads examples in their order: it needs train_sampling_strategy: random (the default), got "
                f"{training_args.train_sampling_strategy}"
            )
    if training_args.push_to_hub and model_args.mode == "lora" and not is_hub_id(model_args.model_name_or_path or "/"):
        raise ValueError(
            "push_to_hub with mode: lora publishes an adapter, which names its base: it needs model_name_or_path to be a Hub"
            f" id, got {model_args.model_name_or_path}"
        )
    if training_args.label_smoothing_factor and training_args.torch_compile:
        raise ValueError(
            "label_smoothing_factor needs torch_compile: false: the Trainer does not see that a compiled model is a language"
            f" model, and smooths labels that are not shifted; got {training_args.label_smoothing_factor} and true"
        )
    if training_args.eval_strategy != "no" and (data_args.streaming or data_args.eval_fraction == 0):
        reason = "streaming: true" if data_args.streaming else "eval_fraction: 0"
        strategy = training_args.eval_strategy.value
        raise ValueError(f"{reason} holds out no examples: it needs eval_strategy: no, got {strategy}")
