# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The jobs of the study with pretrained parts: SmolLM2-135M-Instruct, which knows language, and a DINOv2-small, both frozen, as
in the paper. The parts, the scenes, and the way in which the projector learns words are those of `make pictures`.
"""

import os
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from benchmarks.study.attention_changes import AttentionChange, change_attention
from benchmarks.study.drawings import Drawings, StoredTower, make_pixel_processor
from benchmarks.study.jobs import Job, Scale
from benchmarks.study.measures import collate, compare_memory, robustness, score, share_by
from benchmarks.study.pretrained_measures import cost_of_known_images, saved_bytes, take_turns, text_answers, text_loss
from benchmarks.study.scratch_runs import add_lora
from examples.digits_demo.stages import train
from examples.pictures.demo import MOST_IMAGES
from examples.pictures.parts import IMAGE_SIZE, make_parts
from examples.pictures.precision import autocast, computes_bfloat16, find_device
from examples.pictures.scenes import Scene, draw_scene
from examples.pictures.words import CLASS_TOKEN_OUTPUTS, see, teach_words
from modeling_visualchat import VisualChatDataCollator, VisualChatForCausalLM, VisualChatProcessor
from visualchat.loading import find_image_size, load_image_processor


TASKS = ("drawings",)
MERGED = {"multimodal_attention": "mmca_merged"}
NUMBERED = {"learned_image_numbers": MOST_IMAGES}
PREFIX = {"image_prefix": True}
VARIANTS = {
    "causal": {"multimodal_attention": "causal"},
    "causal, numbered": {"multimodal_attention": "causal", **NUMBERED},
    "mmca": {"multimodal_attention": "mmca"},
    "mmca, numbered": {"multimodal_attention": "mmca", **NUMBERED},
    "mmca_merged": MERGED,
    "mmca_merged, numbered": {**MERGED, **NUMBERED},
    "mmca_merged, prefix": {**MERGED, **PREFIX},
    "mmca_merged, numbered, prefix": {**MERGED, **NUMBERED, **PREFIX},
    "cross": {"multimodal_attention": "cross", "cross_attention_every": 3},
}
REGIMES = {
    "frozen": "decoder frozen (the paper)",
    "lora": "LoRA of rank 8 on the decoder's attention",
}
# Fields of the config, and what is computed otherwise
CHANGES = {
    "image prefix": (PREFIX, None),
    "sees own image": ({}, AttentionChange(sees_own_image=True)),
    "image weight ½": ({}, AttentionChange(image_weight=0.5)),
    "image weight learned": ({}, AttentionChange(image_weight=None)),
    "keys at the image's begin": ({}, AttentionChange(image_positions="begin")),
    "keys without position": ({}, AttentionChange(image_positions="none")),
    "keys of number tokens": ({"learned_image_numbers": 0, "image_number_keys": True}, None),
    "image prefix, image weight ½": (PREFIX, AttentionChange(image_weight=0.5)),
    "image prefix, one softmax, sees own image": ({**MERGED, **PREFIX}, AttentionChange(sees_own_image=True)),
}
# What the changes are made to
CHANGED_VARIANT = "mmca, numbered"
# Those that are also tried with LoRA, where image prefix and one softmax do not reach causal attention
LORA_CHANGES = ("image prefix, one softmax, sees own image",)
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6)
# Jobs that leave files for others; of these the results are not enough
LEAVE_FILES = ("features", "base")
PARTS = Path("outputs/parts")
# The learning rates of the parts, and what was tried to choose them: each on conversations that no other measure uses
RATES = {"projector": 2e-4, "image_numbers": 3e-3, "image_weight": 1e-2, "cross_attn": 1e-3, "lora_": 1e-3}
TRIED_RATES = {
    ("frozen", "causal", "projector"): (2e-4, 4e-4),
    ("frozen", "mmca_merged, numbered, prefix", "projector"): (1e-4, 2e-4, 4e-4),
    ("frozen", "mmca_merged, numbered, prefix", "image_numbers"): (1e-3, 3e-3, 1e-2),
    ("frozen", "cross", "cross_attn"): (1e-3, 3e-3),
    ("lora", "causal", "lora_"): (5e-4, 1e-3, 2e-3),
}
WARMUP_STEPS, BATCH_SIZE = 8, 4
REPEATS = 7  # of a measured time


@dataclass(frozen=True)
class PretrainedScale(Scale):
    """
    The size of this study. Its seeds are those of the projector's weights and of the conversations.

    Args:
        scenes: How many there are of each split, in the order of `SPLITS`.
        word_steps: The steps in which the projector learns words, before the runs. `None`: as in `make pictures`.
        checkpoints: The training steps after which a run is measured. It ends after the last one.
        conversations, probes: The numbers of test conversations and of probes.
    """

    scenes: tuple[int, int, int]
    word_steps: int | None
    checkpoints: tuple[int, ...]
    conversations: int
    probes: int


SPLITS = ("train", "test", "unseen")
GRIDS = {
    "tiny": PretrainedScale((0,), tuple(VARIANTS), tuple(REGIMES), TASKS, tuple(CHANGES), (40, 20, 8), 2, (1, 2), 6, 4),
    "published": PretrainedScale(
        (0, 1, 2), tuple(VARIANTS), tuple(REGIMES), TASKS, tuple(CHANGES), (8000, 800, 240), None, (20, 40, 80), 64, 16
    ),
}


def list_jobs(scale: PretrainedScale) -> list[list[Job]]:
    """The jobs in stages. The jobs of a stage depend only on earlier stages."""
    bases = [Job("base", seed) for seed in scale.seeds]
    tried = [
        Job("rate", scale.seeds[0], TASKS[0], variant, regime, f"{part} {rate:g}")
        for (regime, variant, part), rates in TRIED_RATES.items()
        for rate in rates
    ]
    of_seeds = []  # a seed is complete before the next one begins
    for seed in scale.seeds:
        frozen, *others = [
            [Job("run", seed, TASKS[0], variant, regime) for variant in scale.variants] for regime in scale.regimes
        ]
        changed = [Job("change", seed, TASKS[0], CHANGED_VARIANT, "frozen", change) for change in scale.changes]
        with_lora = [Job("change", seed, TASKS[0], CHANGED_VARIANT, "lora", change) for change in LORA_CHANGES]
        of_seeds += [*frozen, *changed, *chain.from_iterable(others), *with_lora]
    return [[Job("features", 0)], bases, tried, of_seeds, [Job("cost", 0)]]


def count_steps(kind: str, scale: PretrainedScale) -> int:
    """About how long a job of this kind takes, in training steps of a run."""
    steps = {"features": 200, "base": 100, "cost": 60}
    return steps.get(kind, scale.checkpoints[-1])


def perform(job: Job, scale: PretrainedScale, folder: Path) -> dict:
    """Does a job; see [`work`]."""
    kinds = {"features": make_features, "base": make_base, "rate": try_rate, "run": run, "change": run, "cost": measure_cost}
    return kinds[job.kind](job, scale, folder)


@cache
def load_processor() -> VisualChatProcessor:
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "decoder")
    tokens = CLASS_TOKEN_OUTPUTS + 4  # what `build` makes of an image
    return VisualChatProcessor(make_pixel_processor(), tokenizer, tokens, chat_format="decoder")


@cache
def load_drawings(scenes: tuple[int, ...]) -> Drawings:
    return Drawings(load_processor().tokenizer, dict(zip(SPLITS, scenes)))


def make_tower_processor(image_seq_length: int = CLASS_TOKEN_OUTPUTS + 4) -> VisualChatProcessor:
    """The processor for drawings themselves, not for the pixels that name them."""
    image_processor = load_image_processor(str(PARTS / "tower"))
    return VisualChatProcessor(image_processor, load_processor().tokenizer, image_seq_length, chat_format="decoder")


def draw(scenes: list[Scene]) -> list[Image.Image]:
    return [draw_scene(scene, PARTS / "drawings/openmoji.ttf", IMAGE_SIZE) for scene in scenes]


def make_features(job: Job, scale: PretrainedScale, folder: Path) -> dict:
    """Gets the parts, lets the tower see all scenes, and asks the decoder itself what it knows of text."""
    torch.set_num_threads(os.cpu_count())  # it is alone
    make_parts(PARTS)
    images = draw(load_drawings(scale.scenes).scenes)
    folder.mkdir(parents=True, exist_ok=True)
    features = see(join("causal").to(find_device()), make_tower_processor(), images)
    save_file({"features": features}, folder / "features.safetensors")
    decoder = AutoModelForCausalLM.from_pretrained(PARTS / "decoder", dtype=torch.float32).to(find_device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "decoder")
    return {
        "text_loss": text_loss(decoder, tokenizer, decoder.config.vocab_size),
        "text_answers": text_answers(decoder, tokenizer),
    }


def join(variant: str, tower=None, decoder=None, **settings) -> VisualChatForCausalLM:
    """
    Tower and decoder with a new projector, which makes 7 tokens of an image: 3 of the class token, 4 of its quarters.

    Args:
        variant (`str`): Of `VARIANTS`.
        tower, decoder (`PreTrainedModel`, *optional*): The parts, whose weights are shared. By default they are loaded.
        settings: Fields of the config, instead of those of the variant. `image_prefix` (`bool`) stands for the ids.
    """
    processor = load_processor()
    fields = {"projector": "pooled", "pool_factor": 4, "class_token_outputs": CLASS_TOKEN_OUTPUTS}
    fields = {**fields, **VARIANTS[variant], **settings}
    if fields.pop("image_prefix", False):
        fields["image_prefix_ids"] = processor.image_prefix_ids()
    if fields.get("image_number_keys"):
        fields["image_number_token_ids"] = processor.image_number_token_ids(MOST_IMAGES)
    return VisualChatForCausalLM.from_vision_text_pretrained(
        tower or str(PARTS / "tower"),
        decoder or str(PARTS / "decoder"),
        image_token_id=processor.image_token_id,
        image_size=find_image_size(load_image_processor(str(PARTS / "tower"))),
        **fields,
    )


def make_base(job: Job, scale: PretrainedScale, folder: Path) -> dict:
    """Teaches the projector words, without the decoder. All runs of a seed begin with this projector."""
    model, drawings = join("causal").to(find_device()), load_drawings(scale.scenes)
    scenes = drawings.splits["train"].scenes
    features = load_file(folder / "features.safetensors")["features"][: len(scenes)].to(model.device)
    teach_words(model, load_processor(), scenes, features, job.seed, scale.word_steps)
    path = folder / f"projector-{job.seed}.safetensors"
    save_file(model.model.multi_modal_projector.state_dict(), path)
    return {}


def build(job: Job, folder: Path) -> VisualChatForCausalLM:
    """The job's model before its training, with the stored features for a tower and the projector of its seed."""
    settings, change = CHANGES.get(job.change, ({}, None))
    set_seed(job.seed)
    model = join(job.variant, **settings)
    model.model.multi_modal_projector.load_state_dict(load_file(folder / f"projector-{job.seed}.safetensors"))
    config = AutoConfig.from_pretrained(PARTS / "tower")
    model.model.vision_tower = StoredTower(load_file(folder / "features.safetensors")["features"], config)
    if change is not None:
        change_attention(model, change)
    return (add_lora(model) if job.regime == "lora" else model).to(find_device())


def try_rate(job: Job, scale: PretrainedScale, folder: Path) -> dict:
    """Trains a model with a learning rate, and scores it with other conversations about the training scenes."""
    processor, drawings = load_processor(), load_drawings(scale.scenes)
    model, steps = build(job, folder), scale.checkpoints[-1]
    part, rate = job.change.split()
    examples = drawings.conversations("train", steps * BATCH_SIZE + scale.conversations, job.seed)
    held_out = collate(processor, sorted(examples[steps * BATCH_SIZE :], key=estimate_length))
    examples = batch_by_length(examples[: steps * BATCH_SIZE], job.seed)
    fit(model, processor, examples, job.seed, [], {**RATES, part: float(rate)})
    with autocast(find_device()):
        right, loss = score(model, held_out)
    return {"accuracy": float(right.mean()), "loss": loss}


def run(job: Job, scale: PretrainedScale, folder: Path) -> dict:
    """Trains one model, with measurements during training and at the end."""
    processor, drawings = load_processor(), load_drawings(scale.scenes)
    model = build(job, folder)
    steps = scale.checkpoints[-1]
    examples = batch_by_length(drawings.conversations("train", steps * BATCH_SIZE, job.seed), job.seed)
    test = drawings.conversations("test", scale.conversations, job.seed)
    held_out = collate(processor, sorted(test, key=estimate_length))
    curve = []

    def measure(step: int) -> np.ndarray:
        with autocast(find_device()):
            right, loss = score(model, held_out)
        curve.append({"conversations": step * BATCH_SIZE, "accuracy": float(right.mean()), "loss": loss})
        return right

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in scale.checkpoints[:-1]:
                measure(state.global_step)
                model.train()

    if job.regime == "frozen":  # LoRA begins with the same answers
        measure(0)
    fit(model, processor, examples, job.seed, [Measure()])
    right = measure(steps)
    with autocast(find_device()):
        unseen, _ = score(model, collate(processor, drawings.unseen()))
    result = {
        "start": curve.pop(0)["accuracy"] if job.regime == "frozen" else None,
        **{name: curve[-1][name] for name in ("accuracy", "loss")},
        "curve": curve,
        **{f"by_{name}": share_by(held_out.questions, right, name) for name in ("kind", "images", "round")},
        "unseen": float(unseen.mean()),
    }
    if job.kind == "run":
        with autocast(find_device()):
            result["robustness"] = robustness(model, processor, drawings, "test", scale.probes, job.seed)
        result["text_loss"] = text_loss(model, processor.tokenizer, processor.image_token_id)
        if job.seed == scale.seeds[0]:
            result["text_answers"] = text_answers(model, processor.tokenizer)
        if model.config.multimodal_attention in ("mmca", "mmca_merged") and job.seed == scale.seeds[0]:
            result["memory"] = compare_memory(model, processor, test[: scale.probes])
    return result


def batch_by_length(examples: list[dict], seed: int) -> list[dict]:
    """The examples in an order in which batches hold such of similar length: each window of 8 batches is sorted."""
    rng, window, ordered = np.random.default_rng(seed), 8 * BATCH_SIZE, []
    for start in range(0, len(examples), window):
        part = sorted(examples[start : start + window], key=estimate_length)
        batches = [part[first : first + BATCH_SIZE] for first in range(0, len(part), BATCH_SIZE)]
        ordered += [example for index in rng.permutation(len(batches)) for example in batches[index]]
    return ordered


def estimate_length(example: dict) -> int:
    """About how many tokens an example has: for all variants the same."""
    texts = [part["text"] for message in example["messages"] for part in message["content"] if part["type"] == "text"]
    return 14 * len(example["images"]) + sum(8 + len(text) // 4 for text in texts)


def choose_trained(model: torch.nn.Module, rates: dict[str, float] = RATES) -> list[dict]:
    """The parameter groups of the optimizer. All other weights are frozen."""
    groups = {part: [] for part in rates}
    for name, parameter in model.named_parameters():
        part = next((part for part in rates if part in name), None)
        parameter.requires_grad_(part is not None)
        if part is not None:
            groups[part].append(parameter)
    return [{"params": parameters, "lr": rates[part]} for part, parameters in groups.items() if parameters]


def count_weights(groups: list[dict]) -> int:
    return sum(parameter.numel() for group in groups for parameter in group["params"])


def fit(
    model: torch.nn.Module,
    processor: VisualChatProcessor,
    examples: list[dict],
    seed: int,
    callbacks: list[TrainerCallback],
    rates: dict[str, float] = RATES,
) -> None:
    """Trains the model in place, with one pass over the conversations."""
    train(
        model,
        examples,
        len(examples) // BATCH_SIZE,
        seed,
        data_collator=VisualChatDataCollator(processor, supervised_logits_only=True),
        optimizer=torch.optim.AdamW(choose_trained(model, rates), betas=(0.9, 0.95), weight_decay=0.0),
        callbacks=callbacks,
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        use_cpu=find_device() == "cpu",
        bf16=computes_bfloat16(find_device()),
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_strategy="no",
    )
    vars(model).pop("forward", None)  # the Trainer leaves one with autocast


def measure_cost(job: Job, scale: PretrainedScale, folder: Path) -> dict:
    """
    What each variant costs: a training step, and a question about four images, which pass the tower with all of their 65
    tokens, as they would with the paper's projector. The variants take turns.
    """
    torch.set_num_threads(os.cpu_count())  # it is alone
    device = find_device()
    tower = AutoModel.from_pretrained(PARTS / "tower").to(device).eval()
    decoder = AutoModelForCausalLM.from_pretrained(PARTS / "decoder", dtype=torch.float32).to(device)
    processor, drawings = load_processor(), load_drawings(scale.scenes)
    batch = VisualChatDataCollator(processor, supervised_logits_only=True)(drawings.conversations("train", BATCH_SIZE, 0))
    batch = {name: one.to(device) for name, one in batch.items()}
    models = {variant: join(variant, tower, decoder) for variant in scale.variants}
    costs, features = {}, load_file(folder / "features.safetensors")["features"]
    for variant, model in models.items():
        model.model.vision_tower = StoredTower(features, tower.config).to(device)
        trained = count_weights(choose_trained(model.train()))
        costs[variant] = {"trained_weights": trained, "saved_bytes": saved_bytes(model, batch)}

    def step(model: VisualChatForCausalLM) -> None:
        model(**batch).loss.backward()

    for variant, seconds in take_turns({name: partial(step, model) for name, model in models.items()}, REPEATS).items():
        costs[variant]["step_seconds"] = seconds

    models = {variant: join(variant, tower, decoder, projector="linear") for variant in scale.variants}
    length = next(iter(models.values())).config.image_seq_length
    images = [{"type": "image", "image": image} for image in draw(drawings.scenes[:4])]
    content = [*images, {"type": "text", "text": "What is in image 3?"}]
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = make_tower_processor(length).apply_chat_template([{"role": "user", "content": content}], **chat).to(device)
    for variant, of_known in cost_of_known_images(models, inputs, REPEATS).items():
        costs[variant].update(of_known)
    return {"image_seq_length": length, "prompt_tokens": inputs["input_ids"].shape[1], "costs": costs}
