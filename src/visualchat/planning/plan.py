# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Predicts the memory and speed of a training run: `visualchat plan`. `trace.py` traces activations, logits and image features
from the model's own code. `memory.py` adds the states that ZeRO keeps and DeepSpeed's buffers, with sources.
`benchmarks/plan.py` compares the predictions with real runs.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from modeling_visualchat import VisualChatConfig
from visualchat.loading import check_model_type
from visualchat.planning.memory import plan_peak
from visualchat.planning.states import STATES, Parameter, Peak, ZeroSetting
from visualchat.planning.trace import StepShape, Trace, trace_step
from visualchat.training.arguments import ModelArguments
from visualchat.training.train import set_mode
from visualchat.training.trainer import VisualChatTrainingArguments, group_parameters


DEEPSPEED = Path(__file__).parents[1] / "training" / "deepspeed"
# From the fastest to the most frugal; the first that fits is recommended. ZeRO-2 communicates as little as ZeRO-0 and 1
NAMES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PREFERRED = (
    ("zero2", False),
    ("zero3", False),
    ("zero2", True),
    ("zero3", True),
    ("zero2_offload", True),
    ("zero3_offload", True),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What this version of transformers calls it: before 5.23 it has the second name alone
ENABLE_CHECKPOINTING = next(
    name for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if name in dir(PreTrainedModel)
)
LARGEST_BATCH = 1024  # nobody trains with a larger micro-batch
HEADS = {"image features": "images", "gathered": "buffers"}


@dataclass
class Row:
    """
    One row of the table: a way to run the training.

    Args:
        name (`str`): The name of the DeepSpeed JSON.
        checkpointing (`bool`): Whether gradient checkpointing is on.
        peak (`Peak`): The memory of the requested micro-batch.
        fits (`bool`): Whether the requested micro-batch fits in the memory.
        largest_batch (`int`): The largest micro-batch that fits, or 0.
        tokens_per_second (`float`, *optional*): The rate of all GPUs together, if the matrix rate is given.
    """

    name: str
    checkpointing: bool
    peak: Peak
    fits: bool
    largest_batch: int
    tokens_per_second: float | None


def check_shape(args: argparse.Namespace) -> tuple[VisualChatConfig, StepShape]:
    """
    Loads the config and completes the shape of the micro-batch.

    Raises:
        OSError: If the config cannot be loaded.
        ValueError: If it is not a VisualChat's, or if the model cannot take such a sequence. The numbers are given.
    """
    try:
        check_model_type(args.model, args.trust_remote_code)
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise OSError(f"{args.model}: neither a folder with a config.json nor a Hub id that can be read") from error
    if config.multimodal_attention == "mmca_released":
        raise ValueError(
            f"{args.model}: multimodal_attention 'mmca_released' is for converted checkpoints, not for training"
        )
    limit = config.text_config.max_position_embeddings
    length = args.seq_length or min(4096, limit)
    if length > limit:
        raise ValueError(f"--seq-length {length} is more than the model's max_position_embeddings, {limit}")
    image_tokens = args.images * config.image_seq_length
    text = length - image_tokens
    if text < max(2, args.images):
        raise ValueError(
            f"--images {args.images} take {image_tokens} tokens ({config.image_seq_length} each), which leaves {text} of"
            f" --seq-length {length} for text"
        )
    if config.max_image_number is not None and args.images > config.max_image_number:
        raise ValueError(f"--images {args.images}: the model counts to {config.max_image_number}")
    supervised = args.supervised or text - 1
    if supervised > text - 1:
        raise ValueError(f"--supervised {supervised} is more than the {text - 1} text tokens after the first")
    return config, StepShape(args.batch, length, args.images, supervised)


def build_model(
    config: VisualChatConfig,
    model_args: ModelArguments,
    dtype: torch.dtype,
    checkpointing: bool = False,
) -> tuple[torch.nn.Module, list[Parameter]]:
    """The model on the meta device, as `visualchat train` would train it, and its parameters with their optimizer groups."""
    with torch.device("meta"):
        model = AutoModel.from_config(
            config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=model_args.trust_remote_code
        )
        model = set_mode(model, model_args)
    model.to(dtype).train()  # DeepSpeed casts all parameters, also LoRA's, which PEFT makes in fp32
    if checkpointing:
        getattr(model, ENABLE_CHECKPOINTING)({"use_reentrant": False})
    groups = group_parameters(model, VisualChatTrainingArguments(output_dir="unused", use_cpu=True))
    group_of = {id(one): index for index, group in enumerate(groups) for one in group["params"]}
    return model, [Parameter(name, one.numel(), group_of.get(id(one))) for name, one in model.named_parameters()]


def count_parts(parameters: list[Parameter]) -> dict[str, tuple[int, int]]:
    """The number of all parameters, and of the trained ones, by part of the model."""
    new = ("projector", "embedding", "image numbers", "cross attention")
    parts = dict.fromkeys(("vision tower", *new, "decoder layers", "lm_head", "LoRA"), (0, 0))
    names = {"vision_tower": "vision tower", "multi_modal_projector": "projector", "embed_tokens": "embedding"}
    names |= {"image_numbers": "image numbers", "cross_attn": "cross attention"}
    for one in parameters:
        part = next((part for name, part in names.items() if name in one.name), "decoder layers")
        part = "LoRA" if "lora_" in one.name else "lm_head" if "lm_head" in one.name else part
        every, trained = parts[part]
        parts[part] = every + one.numel, trained + one.numel * (one.group is not None)
    return {part: counts for part, counts in parts.items() if counts[0]}


class Planner:
    """
    Plans the training of one model. Each trace is made when it is first needed, and then kept.

    Args:
        config (`VisualChatConfig`): The model's.
        shape (`StepShape`): The micro-batch. Its batch size is not used: [`Planner.peak`] takes one.
        model_args (`ModelArguments`): Which parameters train, as in `visualchat train`.
        dtype (`torch.dtype`): The dtype of the weights.
        device (`str`): `cuda`, or `cpu` with gloo.
    """

    def __init__(
        self,
        config: VisualChatConfig,
        shape: StepShape,
        model_args: ModelArguments,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ):
        self.config, self.shape, self.dtype, self.device = config, shape, dtype, device
        self.models = {flag: build_model(config, model_args, dtype, flag) for flag in (False, True)}
        self.parameters = self.models[False][1]
        self._traces: dict[tuple[bool, bool], list[Trace]] = {}

    def trace(self, batch_size: int, checkpointing: bool, gathers: bool) -> Trace:
        """The trace of any batch size. See [`Trace.at_batch_size`]."""
        key = checkpointing, gathers
        if key not in self._traces:
            shapes = [
                StepShape(count, self.shape.sequence_length, self.shape.images, self.shape.supervised) for count in (2, 3)
            ]
            model = self.models[checkpointing][0]
            self._traces[key] = [trace_step(model, shape, self.device, gathers) for shape in shapes]
        return self._traces[key][0].at_batch_size(self._traces[key][1], batch_size)

    def setting(self, zero: dict, gpus: int, accumulation: int = 1) -> ZeroSetting:
        return ZeroSetting(zero, gpus, self.dtype.itemsize, self.config.hidden_size, accumulation, self.device)

    def peak(self, setting: ZeroSetting, batch_size: int, checkpointing: bool) -> Peak:
        return plan_peak(self.trace(batch_size, checkpointing, setting.stage == 3), self.parameters, setting)

    def largest_batch(self, setting: ZeroSetting, checkpointing: bool, memory: float) -> int:
        """The largest micro-batch whose peak is within `memory` bytes, or 0 if a single sequence needs more."""
        fits, too_large = 0, LARGEST_BATCH + 1
        while too_large - fits > 1:
            middle = min((fits + too_large) // 2, max(1, 2 * fits)) if too_large > LARGEST_BATCH else (fits + too_large) // 2
            if self.peak(setting, middle, checkpointing).largest <= memory:
                fits = middle
            else:
                too_large = middle
        return fits


def read_zero(name: str) -> dict:
    """The section `zero_optimization` of a JSON of `examples/deepspeed/`."""
    return json.loads((DEEPSPEED / f"{name}.json").read_text())["zero_optimization"]


def plan(args: argparse.Namespace) -> tuple[Planner, list[Row]]:
    """Plans every DeepSpeed JSON, with the requested settings of gradient checkpointing."""
    model_args = ModelArguments(
        mode=args.mode,
        lora_target=args.lora_target,
        lora_rank=args.lora_rank,
        trust_remote_code=args.trust_remote_code,
    )
    planner = Planner(args.config, args.shape, model_args, DTYPES[args.dtype])
    memory = (args.gpu_memory - args.reserve) * 1e9
    rows = []
    for checkpointing in {"on": (True,), "off": (False,), "both": (True, False)}[args.checkpointing]:
        for name in NAMES:
            setting = planner.setting(read_zero(name), args.gpus, args.accumulation)
            peak = planner.peak(setting, args.batch, checkpointing)
            largest = planner.largest_batch(setting, checkpointing, memory)
            rate = None
            if args.matrix_rate:
                flops = planner.trace(args.batch, checkpointing, setting.stage == 3).flops
                rate = args.batch * args.shape.sequence_length * args.gpus * args.matrix_rate * 1e12 / flops
            rows.append(Row(name, checkpointing, peak, peak.largest <= memory, largest, rate))
    return planner, rows


def recommend(rows: list[Row]) -> Row | None:
    """The fastest row that fits the requested micro-batch; else the row that fits the largest micro-batch, if any does."""
    by_key = {(row.name, row.checkpointing): row for row in rows}
    preferred = [by_key[key] for key in PREFERRED if key in by_key]
    smaller = sorted((row for row in preferred if row.largest_batch), key=lambda row: -row.largest_batch)
    return next((row for row in preferred if row.fits), smaller[0] if smaller else None)


def describe(args: argparse.Namespace, planner: Planner, rows: list[Row]) -> str:
    """The text that is printed: parameters, a table of all rows, and the recommendation."""
    lines = [
        f"{args.mode} in {args.dtype}, {args.gpus} GPUs of {args.gpu_memory:g} GB ({args.reserve:g} kept free), micro-batch"
        f" {args.batch} × {args.shape.sequence_length} tokens, with {args.images} images and"
        f" {args.shape.supervised} supervised tokens each",
        "",
    ]
    counts = count_parts(planner.parameters)
    counts["all"] = tuple(map(sum, zip(*counts.values())))
    for part, (every, trained) in counts.items():
        lines.append(f"{part:<16}{every / 1e6:>12,.1f} million parameters, {trained / 1e6:>12,.1f} trained")
    heads = [HEADS.get(name, name) for name in STATES]
    last = ["tokens/s"] if args.matrix_rate else []
    for checkpointing in sorted({row.checkpointing for row in rows}, reverse=True):
        lines += ["", f"gradient checkpointing {'on' if checkpointing else 'off'}, GB of each GPU:"]
        lines.append(_line("", [*heads, "step", "peak", "host", "fits", "batch", *last]))
        for row in (row for row in rows if row.checkpointing == checkpointing):
            sizes = [*row.peak.parts.values(), row.peak.step, row.peak.largest, row.peak.host]
            cells = [f"{size / 1e9:.1f}" for size in sizes]
            cells += ["yes" if row.fits else "no", f"≤ {row.largest_batch}" if row.largest_batch else "none"]
            lines.append(_line(row.name, cells + ([f"{row.tokens_per_second:,.0f}"] if last else [])))
    lines += [
        "",
        "step: all memory during the optimizer's step. peak: the largest. host: CPU memory for each GPU.",
        "batch: the largest micro-batch that fits.",
    ]
    if (row := recommend(rows)) is None:
        return "\n".join([*lines, "Nothing fits: more GPUs, a shorter --seq-length, or --mode lora or alignment."])
    batch = args.batch if row.fits else row.largest_batch
    advice = f"--deepspeed examples/deepspeed/{row.name}.json --per_device_train_batch_size {batch}"
    advice += f" --gradient_checkpointing {row.checkpointing}"
    lines.append(f"Use: {advice} (fits up to {row.largest_batch})")
    if not row.fits:
        lines.append(f"A micro-batch of {args.batch} fits nowhere: raise --gradient_accumulation_steps instead.")
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<14}" + "".join(f"{cell:>{max(8, len(head) + 2)}}" for cell, head in zip(cells, _line_heads()))


def _line_heads() -> list[str]:
    return [*(HEADS.get(name, name) for name in STATES), "step", "peak", "host", "fits", "batch", "tokens/s  "]


def run(args: argparse.Namespace) -> None:
    """Prints the plan for the options of `visualchat plan`, completed by [`check_shape`]."""
    planner, rows = plan(args)
    if args.json:
        chosen = recommend(rows)
        report = {
            "parameters": count_parts(planner.parameters),
            "rows": [asdict(row) for row in rows],
            "recommended": chosen and {"name": chosen.name, "checkpointing": chosen.checkpointing},
        }
        print(json.dumps(report, indent=2))
    else:
        print(describe(args, planner, rows))
