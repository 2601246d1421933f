# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
What a run is made with: the fields that change its result, the model's configuration, and a digest of the data. Each
checkpoint has this record, and `--resume` compares it with the recipe and the data of today.
"""

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from accelerate.utils import str_to_bool
from transformers import PreTrainedConfig, TrainingArguments

from visualchat.training.arguments import DataArguments, ModelArguments


logger = logging.getLogger(__name__)

RECORD = "visualchat_run.json"

# A checkpoint cannot go on with other values of these: its weights, its optimizer's state or its position in the data would
# mean something else
FIXED_FIELDS = (
    "mode",
    "vision_name_or_path",
    "text_name_or_path",
    "text_gguf_file",
    "multimodal_attention",
    "cross_attention_every",
    "image_number_keys",
    "learned_image_numbers",
    "image_prefix",
    "train_embedding",
    "projector",
    "pixel_shuffle_factor",
    "pool_factor",
    "class_token_outputs",
    "chat_format",
    "image_position",
    "lora_target",
    "lora_rank",
    "lora_alpha",
    "load_in_4bit",
    "optim",
    "optim_args",
    "optim_target_modules",
)
# With these it can, if that is asked for
CHANGEABLE_FIELDS = (
    "model_name_or_path",
    "dtype",
    "lora_dropout",
    "datasets",
    "weights",
    "eval_fraction",
    "max_length",
    "streaming",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "projector_learning_rate",
    "embedding_learning_rate",
    "lora_learning_rate",
    "number_learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
JOINED_FIELDS = (
    *("multimodal_attention", "cross_attention_every", "image_number_keys", "learned_image_numbers", "image_prefix"),
    *("projector", "pixel_shuffle_factor", "pool_factor", "class_token_outputs", "chat_format", "image_position"),
    *("vision_name_or_path", "text_name_or_path", "text_gguf_file"),
)
RATE_FIELDS = (
    *("learning_rate", "projector_learning_rate", "embedding_learning_rate", "lora_learning_rate"),
    "number_learning_rate",
)
SCHEDULE_FIELDS = (*RATE_FIELDS, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
LOSS_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # they follow the losses, and their state holds the rates
BATCH, SHARDING = "batch of all processes", "sharding"
# Of a model's configuration, what does not change what it computes
UNCOMPARED_CONFIG = {"transformers_version", "architectures", "auto_map", "dtype", "use_cache", "name_or_path"}


class Difference(NamedTuple):
    """A value of the record that changed. `is_fixed`: the checkpoint cannot go on with the new one."""

    name: str
    old: Any
    new: Any
    is_fixed: bool

    def __str__(self) -> str:
        note = " (cannot be changed within a run)" if self.is_fixed else ""
        return f"  {self.name}: {self.old!r} in the checkpoint, {self.new!r} now{note}"


def record_arguments(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> dict:
    """The fields that change a run's result, as JSON holds them, without those that its mode or model does not use."""
    given = dataclasses.asdict(model_args) | dataclasses.asdict(data_args) | training_args.to_dict()
    unused = {"num_train_epochs" if training_args.max_steps > 0 else "max_steps"}
    unused |= set(JOINED_FIELDS if model_args.model_name_or_path else ())
    unused |= {name for name in given if name.startswith("lora_") and model_args.mode != "lora"}
    unused |= {f"{kind}_steps" for kind in ("eval", "save") if given[f"{kind}_strategy"] != "steps"}
    arguments = {name: given[name] for name in (*FIXED_FIELDS, *CHANGEABLE_FIELDS) if name not in unused}
    arguments[BATCH] = training_args.train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
    arguments[SHARDING] = describe_sharding(training_args)
    arguments["save_only_model"] = training_args.save_only_model
    return json.loads(json.dumps(arguments))


def describe_sharding(args: TrainingArguments) -> str:
    """In which form the optimizer's state is saved."""
    if args.deepspeed_plugin is not None:
        return f"DeepSpeed, ZeRO stage {args.deepspeed_plugin.zero_stage}"
    is_fsdp = bool(args.fsdp) or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    return "FSDP" if is_fsdp else "none"


def record_config(config: PreTrainedConfig) -> dict:
    """A model's configuration by the path of each field, such as `text_config.hidden_size`."""

    def flatten(fields: dict, inside: str) -> dict:
        flat = {}
        for name, value in fields.items():
            if isinstance(value, dict):
                flat |= flatten(value, f"{inside}{name}.")
            elif name not in UNCOMPARED_CONFIG and not name.startswith("_"):
                flat[inside + name] = value
        return flat

    return flatten(json.loads(json.dumps(config.to_dict())), "")


def record_data(dataset: datasets.Dataset | datasets.IterableDataset | None) -> str | None:
    """
    The number of examples and a digest of their contents and order, from the column `digest` of a prepared dataset. `None`
    for no data, and for streamed data, which is not known before it is read.
    """
    if not isinstance(dataset, datasets.Dataset):
        return None
    digest = hashlib.sha256()
    for batch in dataset.select_columns("digest").iter(10_000):
        digest.update("".join(batch["digest"]).encode())
    return f"{len(dataset)} examples, digest {digest.hexdigest()[:16]}"


def find_differences(old: dict, new: dict) -> list[Difference]:
    """
    Args:
        old (`dict`): The record of a checkpoint, or of a finished run.
        new (`dict`): A record, or its `arguments` alone, which are compared then. Fields that one of them lacks are not.
    """
    before, now = old["arguments"], new["arguments"]
    fixed = {*FIXED_FIELDS, BATCH, SHARDING}
    if {before["lr_scheduler_type"], now["lr_scheduler_type"]} & set(LOSS_SCHEDULES):
        fixed |= set(SCHEDULE_FIELDS)
    compared = {*fixed, *CHANGEABLE_FIELDS}
    if "data" in new and new["data"]["training"] is not None and old["data"] == new["data"]:
        compared -= {"datasets"}  # the same examples by another path
    changed = [name for name in before if name in compared and name in now and before[name] != now[name]]
    differences = [Difference(name, before[name], now[name], name in fixed) for name in changed]
    if "model" in new:
        before, now = old["model"], new["model"]
        changed = [name for name in before if name in now and before[name] != now[name]]
        differences += [Difference(f"the model's {name}", before[name], now[name], is_fixed=True) for name in changed]
    if "data" in new:
        for name in ("training", "evaluation"):
            before, now = old["data"][name], new["data"][name]
            if before != now:  # other held-out examples are, most of them, examples that were trained on
                is_fixed = name == "evaluation" and now is not None
                differences.append(Difference(f"{name} data", before, now, is_fixed))
    return differences


def check_same_run(checkpoint: Path, record: dict, accept_changes: bool) -> bool:
    """
    Compares the record of a checkpoint with that of the run that goes on from it.

    Args:
        record (`dict`): Of the run: `arguments`, `model` and `data`.
        accept_changes (`bool`): Whether changes that a run can go on with are taken.

    Returns:
        `bool`: Whether there are such changes.

    Raises:
        ValueError: If there are changes that are not accepted, or cannot be; all are named, with both values.
    """
    if not (checkpoint / RECORD).exists():
        logger.warning("%s is of an older version: its recipe and data are not known, and not compared", checkpoint)
        return accept_changes
    old = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    if old["arguments"]["save_only_model"]:
        raise ValueError(f"{checkpoint} holds the weights alone (save_only_model: true): it cannot be resumed")
    differences = find_differences(old, record)
    lines = "\n".join(map(str, differences))
    if any(difference.is_fixed for difference in differences):
        raise ValueError(
            f"{checkpoint} was made with other settings:\n{lines}\nGive these their old values, or begin anew: with another"
            " --output_dir, or with --overwrite in place of --resume"
        )
    if differences and not accept_changes:
        raise ValueError(
            f"{checkpoint} was made with other settings:\n{lines}\nGive these their old values, or add --accept_changes to"
            " go on with the new ones"
        )
    if differences:
        logger.warning("Goes on from %s with other settings:\n%s", checkpoint, lines)
    return bool(differences)
