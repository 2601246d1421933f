"""
The Trainer with what a vision-language model needs beside it: learning rates by part, accuracy by generation, a count of
broken pictures in every log line, and checkpoints that are known to be whole.
"""

import copy
import json
import logging
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from visualchat.evaluation.answers import generate_answers, is_exact, text_of
from visualchat.training.dataset import TrainingCollator


logger = logging.getLogger(__name__)

WHOLE = "whole.json"
LATEST_UNIVERSAL = "latest_universal"  # written by ds_to_universal when it is done


@dataclass
class VisualChatTrainingArguments(TrainingArguments):
    """transformers' arguments, and learning rates by part. `learning_rate` is for whatever has none of its own."""

    projector_learning_rate: float | None = field(default=None, metadata={"help": "Of the projector."})
    embedding_learning_rate: float | None = field(default=None, metadata={"help": "Of the token embedding."})
    lora_learning_rate: float | None = field(default=None, metadata={"help": "Of LoRA's matrices."})
    generation_samples: int = field(
        default=0, metadata={"help": "Evaluation rows whose last answer is generated, and counted if it is exact."}
    )
    generation_max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a generated answer at most."})


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """
    transformers' batches of like length, in an order of the seed and the epoch alone. Its own is drawn from each process's
    random state, which differs between processes and after a resume: rows would be lost and others seen twice.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class VisualChatTrainer(Trainer):
    """See the module's docstring."""

    args: VisualChatTrainingArguments
    data_collator: TrainingCollator

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # Groups of the whole batch, so that the order does not depend on the number of processes
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeededLengthGroupedSampler(sampler.batch_size * self.args.world_size, sampler.lengths, seed)
        return sampler

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint is whole once every process has written its part of it; only then do older ones go."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / WHOLE).write_text(json.dumps({"step": self.state.global_step, "world_size": self.args.world_size}))
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # after a resume on another number of processes the best may be older than it
            best = Path(self.state.best_model_checkpoint)
            self.model_wrapped._config.load_universal_checkpoint = world_size_changed(best, self.args)
        super()._load_best_model()

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            parts = group_parameters(self.model if model is None else model, self.args)
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parts, **kwargs)
        return self.optimizer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log({**logs, "broken_rows": self.data_collator.broken_rows.value}, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        if conversations := self.read_rows(rows, self.args.generation_samples):
            accuracy = self.exact_answers(conversations)
            metrics[f"{metric_key_prefix}_exact_answers"] = accuracy
            self.log({f"{metric_key_prefix}_exact_answers": accuracy})
        return metrics

    def read_rows(self, rows, count: int) -> list[list[dict]]:
        """The conversations of the first `count` rows that can be used, or of all. Others are named with the loss."""
        conversations = []
        for row in rows:
            if len(conversations) == count:
                break
            try:
                conversations.append(self.data_collator.read(row))
            except ValueError:
                if not self.data_collator.skip_broken_images:
                    raise
        return conversations

    @torch.no_grad()
    def exact_answers(self, conversations: list[list[dict]]) -> float:
        """Share of conversations whose last answer is generated word for word. Every process takes its share of them."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        model.eval()
        settings = {"max_new_tokens": self.args.generation_max_new_tokens, "do_sample": False}
        settings["synced_gpus"] = self.args.world_size > 1
        # The same number of turns on every rank: under ZeRO-3 all of them generate together
        turns = -(-len(conversations) // self.args.world_size)
        right = 0
        for turn in range(turns):
            index = turn * self.args.world_size + self.args.process_index
            messages = conversations[index % len(conversations)]
            last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
            answer = generate_answers(model, self.processing_class, [messages[:last]], **settings)[0]
            right += index < len(conversations) and is_exact(answer, text_of(messages[last]["content"]))
        total = self.accelerator.reduce(torch.tensor(float(right), device=self.args.device))
        return float(total) / len(conversations)


def group_parameters(model: torch.nn.Module, args: VisualChatTrainingArguments) -> list[dict]:
    """Trained parameters by part, each with its learning rate and name. Weight decay leaves out norms and biases."""
    rates = {
        "lora": args.lora_learning_rate,
        "projector": args.projector_learning_rate,
        "embedding": args.embedding_learning_rate,
        "rest": None,
    }
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_" in name:
            part = "lora"
        elif "multi_modal_projector" in name:
            part = "projector"
        elif "embed_tokens" in name:
            part = "embedding"
        else:
            part = "rest"
        decays = not re.search(r"bias$|norm", name)
        rate = rates[part] if rates[part] is not None else args.learning_rate
        key = (part, decays)
        if key not in groups:
            weight_decay = args.weight_decay if decays else 0.0
            groups[key] = {"params": [], "lr": rate, "weight_decay": weight_decay, "name": part}
        groups[key]["params"].append(parameter)
    if not groups:
        raise ValueError("No parameter trains: see --mode")
    return list(groups.values())


class SetEpochCallback(TrainerCallback):
    """
    Tells [`SeededLengthGroupedSampler`] its epoch. On several processes, after a resume in the middle of an epoch, accelerate 1.15
    reaches no sampler but its own random one, and the first epoch's order would come again.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.set_epoch(int(state.epoch))


class RestoreParamGroupsCallback(TrainerCallback):
    """
    Gives the optimizer's groups their own settings again. Under ZeRO-3, DeepSpeed 0.19.8 loads a universal checkpoint with
    the first group's settings for all, and one step counter that every group's update advances.
    """

    def on_train_begin(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        own_groups = group_parameters(model, args)
        for group, own, rate in zip(optimizer.param_groups, own_groups, lr_scheduler.get_last_lr(), strict=True):
            group.update(name=own["name"], weight_decay=own["weight_decay"], lr=rate)
        for entry in optimizer.state.values():
            entry["step"] = copy.deepcopy(entry["step"])  # a tensor, or a number


def world_size_changed(checkpoint: Path, args: TrainingArguments) -> bool:
    """Whether ZeRO, which is to go on, shared out a checkpoint's optimizer state among another number of processes."""
    shared_out = args.deepspeed_plugin is not None and any(checkpoint.glob("global_step*/*_optim_states.pt"))
    return shared_out and json.loads((checkpoint / WHOLE).read_text())["world_size"] != args.world_size


def check_deepspeed(checkpoint: Path, args: TrainingArguments) -> None:
    """
    DeepSpeed keeps the optimizer's state in files of its own, and neither it nor a run without it reads the other's. The
    Trainer would begin with a new optimizer, in silence if the run is the one without.

    Raises:
        ValueError: If one of checkpoint and run is DeepSpeed's and the other is not.
    """
    written_by_deepspeed = any(checkpoint.glob("global_step*"))
    if written_by_deepspeed and args.deepspeed_plugin is None:
        raise ValueError(
            f"{checkpoint} holds its optimizer's state in DeepSpeed's form, and this run is without DeepSpeed: add"
            " --deepspeed FILE, with the JSON that the checkpoint was made with, or give another --output_dir"
        )
    if not written_by_deepspeed and args.deepspeed_plugin is not None:
        raise ValueError(
            f"{checkpoint} holds nothing of DeepSpeed, and this run is with --deepspeed {args.deepspeed}: leave out"
            " --deepspeed (a recipe's field `deepspeed` too), or give another --output_dir"
        )


def find_complete_checkpoint(args: TrainingArguments) -> str | None:
    """
    The newest checkpoint that was written to its end, for `--resume`; newer ones, cut off by a kill, are removed.

    Raises:
        ValueError: If it, or the best one that is loaded at the end, was written by another number of processes under
            ZeRO and is not converted, with the commands that convert. See [`check_deepspeed`], too.
    """
    folders = Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    newest_first = sorted(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)
    for folder in newest_first:
        if not (folder / WHOLE).exists():
            logger.warning("%s was not written to its end: left out", folder)
            if args.process_index == 0:
                shutil.rmtree(folder)
            continue
        check_deepspeed(folder, args)
        loaded = [folder]
        best = json.loads((folder / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
        if args.load_best_model_at_end and best is not None and Path(best) != folder:
            loaded.append(Path(best))
        commands = [
            "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
            f" --input_folder {shlex.quote(str(shards))} --output_folder {shlex.quote(f'{shards}_universal')}"
            for checkpoint in loaded
            if world_size_changed(checkpoint, args) and not (checkpoint / LATEST_UNIVERSAL).exists()
            for shards in checkpoint.glob("global_step*[0-9]")
        ]
        if commands:
            written_by = json.loads((folder / WHOLE).read_text())["world_size"]
            raise ValueError(
                f"{folder} was written by {written_by} processes, and this run has {args.world_size}. Convert, then give"
                " --resume again, with the same product of processes, --per_device_train_batch_size and"
                " --gradient_accumulation_steps:\n  " + "\n  ".join(commands)
            )
        return str(folder)
    return None


def load_universal(trainer: Trainer) -> None:
    """Has `trainer.train` resume from a converted checkpoint."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True
    if plugin.hf_ds_config.is_zero3():
        trainer.add_callback(RestoreParamGroupsCallback())


def plot_curves(log_history: list[dict], path: Path) -> None:
    """Loss, evaluation loss and learning rate by step."""
    figure, (losses, rates) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for key, style in (("loss", "-"), ("eval_loss", "o--")):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            losses.plot(*zip(*points), style, color="black", label=key, markersize=4)
    losses.legend()
    losses.set_ylabel("loss")
    points = [(entry["step"], float(entry["learning_rate"])) for entry in log_history if "learning_rate" in entry]
    if points:
        rates.plot(*zip(*points), color="black")
    rates.set_ylabel("learning rate")
    for axis in (losses, rates):
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)
