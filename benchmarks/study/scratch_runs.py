# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The jobs of the study from scratch: `base` makes tower and decoder of a seed, `pretraining` trains a decoder on the images of
the other task than `task`, `run` trains a variant and measures it, and `change` is a run with one setting changed.
"""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlamaForCausalLM, TrainerCallback, set_seed

from benchmarks.study.jobs import Job, Scale
from benchmarks.study.measures import collate, compare_memory, image_attention, robustness, score, share_by
from benchmarks.study.scratch_tasks import IDENTIFY, Task, load_task
from examples.digits_demo.stages import describe_in_words, make_processor, train, train_decoder, train_tower
from modeling_visualchat import VisualChatDataCollator, VisualChatForCausalLM, VisualChatProcessor
from visualchat.data.digits import Digits


TASKS = tuple(IDENTIFY)
# `multimodal_attention` and `image_number_keys`
VARIANTS = {
    "causal": ("causal", False),
    "causal, numbered": ("causal", True),
    "mmca": ("mmca", False),
    "mmca, numbered": ("mmca", True),
    "mmca_merged": ("mmca_merged", False),
    "mmca_merged, numbered": ("mmca_merged", True),
}
REGIMES = {
    "frozen": "decoder trained on text, then frozen (the paper)",
    "trained": "decoder trained on text, then trained on",
    "pretrained": "decoder trained on text, then with images of the other task and the same attention, then frozen",
}
CHANGES = {
    "vit": "vit projector",
    "perceiver": "perceiver projector",
    "slow embedding": "embedding at a tenth of its rate",
    "frozen embedding": "embedding not trained",
    "longer": "half as many steps again",
    "lora": "half as many steps again, with LoRA on the decoder",
    "special prefixes": "prefixes as special tokens",
    "single samples": "trained on one image and one question a conversation",
    "concatenated samples": "the same examples, one to four of them a conversation",
}
LEVELS = (0.8, 0.9, 0.95)
# Jobs that leave files for others; of these the results are not enough
LEAVE_FILES = ("base", "pretraining")
BATCH_SIZE = 32
# The learning rate is constant after the warm-up, so that a run after N conversations equals a run of N conversations
WARMUP_STEPS = 8
ALIGNMENT_RATE, DECODER_RATE, LORA_RATE = 1e-2, 5e-4, 1e-3
PERCEIVER_QUERIES = 4  # per image: as many tokens as it has patches
PREFIXES = ["### Image", "### Question:", "### Answer:"]


@dataclass(frozen=True)
class ScratchScale(Scale):
    """
    The size of this study.

    Args:
        tower_steps, decoder_steps, pretraining_steps: The training steps of the models that the runs start from.
        checkpoints: The steps after which a run is measured. It ends after the last one.
        conversations, probes: The numbers of test conversations and of probes.
    """

    tower_steps: int
    decoder_steps: int
    pretraining_steps: int
    checkpoints: tuple[int, ...]
    conversations: int
    probes: int


GRIDS = {
    "tiny": ScratchScale((0,), ("causal", "mmca, numbered"), tuple(REGIMES), TASKS, tuple(CHANGES), 4, 4, 2, (1, 2), 20, 8),
    "published": ScratchScale(
        (0, 1, 2),
        tuple(VARIANTS),
        tuple(REGIMES),
        TASKS,
        tuple(CHANGES),
        1000,
        2000,
        256,
        (16, 24, 32, 48, 64, 96, 128, 192, 256),
        400,
        192,
    ),
    "wide": ScratchScale(
        tuple(range(10)),
        tuple(VARIANTS),
        tuple(REGIMES),
        TASKS,
        tuple(CHANGES),
        1500,
        3000,
        1024,
        (16, 32, 64, 128, 256, 512, 1024),
        800,
        384,
    ),
}


def list_jobs(scale: ScratchScale) -> list[list[Job]]:
    """The jobs in stages. The jobs of a stage depend only on earlier stages."""
    bases = [Job("base", seed) for seed in scale.seeds]
    runs = [
        Job("run", seed, task, variant, regime)
        for task in scale.tasks
        for regime in scale.regimes
        for seed in scale.seeds
        for variant in scale.variants
    ]
    pretraining = [Job("pretraining", run.seed, run.task, run.variant) for run in runs if run.regime == "pretrained"]
    changes = [
        Job("change", seed, scale.tasks[0], "mmca, numbered", "frozen", change)
        for change in scale.changes
        for seed in scale.seeds
    ]
    return [bases, pretraining, runs, changes]


def count_steps(kind: str, scale: ScratchScale) -> int:
    """Training steps of a job of this kind."""
    if kind == "base":
        return scale.tower_steps + scale.decoder_steps
    return scale.pretraining_steps if kind == "pretraining" else scale.checkpoints[-1]


def perform(job: Job, scale: ScratchScale, folder: Path) -> dict:
    """Does a job; see [`work`]."""
    return {"base": make_base, "pretraining": pretrain, "run": run, "change": run}[job.kind](job, scale, folder)


@cache
def load_processor(special_prefixes: bool = False) -> VisualChatProcessor:
    """The processor of all seeds and both tasks. Its tokenizer is trained on the training conversations of seed 0."""
    tasks = [load_task(name, 0) for name in TASKS]
    examples = [example for task in tasks for example in task.conversations("train", 500, 0)]
    processor = make_processor(examples, tuple(word for task in tasks for word in task.subject.words))
    if special_prefixes:
        processor.tokenizer.add_tokens(PREFIXES, special_tokens=True)
    return processor


def make_base(job: Job, scale: ScratchScale, folder: Path) -> dict:
    """Trains a vision tower on the labels of both tasks, and a decoder on conversations in which words stand for images."""
    processor = load_processor()
    tasks = [load_task(name, job.seed) for name in TASKS]
    images, labels, offset = [], [], 0
    for task in tasks:
        split = task.splits["train"]
        images += [image.convert("RGB") for image in split.images]
        labels.append(split.labels + offset)
        offset += len(task.subject.words)
    labels = np.concatenate(labels)
    quiet = {"disable_tqdm": True}
    tower, tower_curve = train_tower(
        processor, Digits(images, labels, np.arange(len(labels))), scale.tower_steps, job.seed, **quiet
    )
    described = []
    for task in tasks:
        examples = task.conversations("train", scale.decoder_steps * BATCH_SIZE // len(tasks), job.seed)
        described += describe_in_words(processor, examples, task.subject.words)
    decoder, decoder_curve = train_decoder(processor, described, scale.decoder_steps, job.seed, **quiet)
    tower.save_pretrained(folder / "base" / str(job.seed) / "tower")
    decoder.save_pretrained(folder / "base" / str(job.seed) / "decoder")
    return {"tower_curve": tower_curve, "decoder_curve": decoder_curve}


def build(job: Job, processor: VisualChatProcessor, folder: Path) -> VisualChatForCausalLM:
    """A model of the job's variant, with the tower and decoder of its seed and a new projector."""
    attention, numbered = VARIANTS[job.variant]
    base = folder / "base" / str(job.seed)
    numbers = {"image_number_keys": True, "image_number_token_ids": processor.image_number_token_ids(9)} if numbered else {}
    set_seed(job.seed)
    model = VisualChatForCausalLM.from_vision_text_pretrained(
        CLIPVisionModel.from_pretrained(base / "tower"),
        LlamaForCausalLM.from_pretrained(base / "decoder"),
        multimodal_attention=attention,
        projector=job.change if job.change in ("vit", "perceiver") else "linear",
        num_query_tokens=PERCEIVER_QUERIES,
        image_token_id=processor.image_token_id,
        **numbers,
    )
    if job.change == "special prefixes":
        model.resize_token_embeddings(len(processor.tokenizer))
    return model


def pretrain(job: Job, scale: ScratchScale, folder: Path) -> dict:
    """Trains decoder, token embedding and projector on the other task. Saves the weights without the projector."""
    processor = load_processor()
    model = build(job, processor, folder)
    other = load_task(next(name for name in TASKS if name != job.task), job.seed)
    examples = other.conversations("train", scale.pretraining_steps * BATCH_SIZE, job.seed + 1000)
    fit(model, processor, examples, job, "trained")
    path = folder / "pretrained" / f"{job.task}-{job.variant}-{job.seed}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_without_projector(model), path)
    held_out = collate(processor, other.conversations("test", scale.conversations, job.seed))
    right, loss = score(model, held_out)
    return {"accuracy": float(right.mean()), "loss": loss}


def run(job: Job, scale: ScratchScale, folder: Path) -> dict:
    """Trains one model on the task, with measurements during training and at the end."""
    processor = load_processor(job.change == "special prefixes")
    task = load_task(job.task, job.seed)
    model = build(job, processor, folder)
    if processor.image_seq_length != model.config.image_seq_length:  # with the perceiver projector
        processor = copy.copy(processor)
        processor.image_seq_length = model.config.image_seq_length
    if job.regime == "pretrained":
        weights = load_file(folder / "pretrained" / f"{job.task}-{job.variant}-{job.seed}.safetensors")
        model.load_state_dict(weights, strict=False)
    steps, per_step = scale.checkpoints[-1], BATCH_SIZE
    if job.change in ("longer", "lora"):
        plain = Job("run", job.seed, job.task, job.variant, job.regime)
        model.load_state_dict(load_file(folder / "trained" / f"{plain.name}.safetensors"), strict=False)
        steps //= 2
        examples = task.conversations("train", steps * BATCH_SIZE, job.seed + 2000)
        model = add_lora(model) if job.change == "lora" else model
    elif job.change in ("single samples", "concatenated samples"):
        examples = join_samples(task, steps * BATCH_SIZE, job.seed)
        if job.change == "single samples":
            examples = [sample for example in examples for sample in example["samples"]]
            per_step = len(examples) // steps
    else:
        examples = task.conversations("train", steps * BATCH_SIZE, job.seed)
    held_out = collate(processor, task.conversations("test", scale.conversations, job.seed))
    curve = []

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in scale.checkpoints:
                right, loss = score(model, held_out)
                curve.append({"conversations": state.global_step * per_step, "accuracy": float(right.mean()), "loss": loss})
                model.train()

    fit(model, processor, examples, job, job.regime, per_step, [Measure()])
    right, loss = score(model, held_out)
    result = {
        "accuracy": float(right.mean()),
        "loss": loss,
        "curve": curve,
        **{f"by_{name}": share_by(held_out.questions, right, name) for name in ("kind", "images", "round")},
    }
    if job.kind == "run":
        result["image_attention"] = image_attention(model, processor, task, "test", scale.probes, job.seed)
        result["robustness"] = robustness(model, processor, task, "test", scale.probes, job.seed)
        if model.config.multimodal_attention in ("mmca", "mmca_merged") and job.seed == scale.seeds[0]:
            result["memory"] = compare_memory(model, processor, held_out.examples)
        if job.regime == "frozen":  # some changes start from it
            path = folder / "trained" / f"{job.name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.clone() for name, weight in model.state_dict().items()}, path)
    return result


def fit(
    model: torch.nn.Module,
    processor: VisualChatProcessor,
    examples: list[dict],
    job: Job,
    regime: str,
    per_step: int = BATCH_SIZE,
    callbacks: list[TrainerCallback] = (),
) -> None:
    """Trains the model in place, with one pass over the conversations."""
    learning_rates = {"projector": ALIGNMENT_RATE, "embed_tokens": ALIGNMENT_RATE, "lora_": LORA_RATE}
    if job.change in ("slow embedding", "frozen embedding"):
        learning_rates["embed_tokens"] *= 0.1 if job.change == "slow embedding" else 0
    if regime == "trained":
        learning_rates |= {"language_model": DECODER_RATE, "lm_head": DECODER_RATE}
    groups = {part: [] for part in learning_rates}
    for name, parameter in model.named_parameters():
        part = next((part for part in learning_rates if part in name), None)
        parameter.requires_grad_(part is not None and learning_rates[part] > 0)
        if parameter.requires_grad:
            groups[part].append(parameter)
    parts = [{"params": parameters, "lr": learning_rates[part]} for part, parameters in groups.items() if parameters]
    optimizer = torch.optim.AdamW(parts, betas=(0.9, 0.95), weight_decay=0.0)
    train(
        model,
        examples,
        len(examples) // per_step,
        job.seed,
        data_collator=VisualChatDataCollator(processor, supervised_logits_only=True),
        optimizer=optimizer,
        callbacks=callbacks,
        per_device_train_batch_size=per_step,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_strategy="no",
    )


def add_lora(model: VisualChatForCausalLM) -> torch.nn.Module:
    """LoRA of rank 8 on the decoder's attention."""
    targets = r".*language_model.*\.self_attn\.(q|k|v|o)_proj"
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def join_samples(task: Task, count: int, seed: int) -> list[dict]:
    """
    Concatenates samples of one image and one question to conversations of one to four rounds, with renumbered images, as the
    paper does. `samples` of each conversation are the separate samples.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, size=count)
    samples = iter(task.probes("train", 1, int(sizes.sum()), seed))
    examples = []
    for size in sizes.tolist():
        own = [next(samples) for _ in range(size)]
        messages = []
        for number, sample in enumerate(own, 1):
            content = [{"type": "image"}, {"type": "text", "text": IDENTIFY[task.name].format(number)}]
            messages += [{"role": "user", "content": content}, sample["messages"][1]]
        examples.append({"messages": messages, "images": [sample["images"][0] for sample in own], "samples": own})
    return examples


def _without_projector(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    return {name: weight.clone() for name, weight in weights.items() if "projector" not in name}
