"""
The Trainer with additions for a vision-language model: learning rates by part, accuracy of generated answers, a count of
broken examples in every log line, and checkpoints that are known to be complete.
"""

import copy
import json
import logging
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from visualchat.evaluation.answers import generate_answers, is_exact, text_of
from visualchat.training.arguments import LoopArguments
from visualchat.training.collator import TrainingCollator


logger = logging.getLogger(__name__)

COMPLETE_MARKER = "whole.json"  # written into a checkpoint when every process has saved its part
LATEST_UNIVERSAL = "latest_universal"  # written by ds_to_universal when it is done


@dataclass
class VisualChatTrainingArguments(LoopArguments, TrainingArguments):
    """transformers' arguments and ours."""


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """
    transformers' sampler of batches of similar length, in an order that depends on the seed and the epoch alone. The order
    of the base class depends on the random state, which differs between processes and after a resume: some examples would be
    skipped and others used twice.
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
        """Marks a checkpoint as complete when every process has saved its part. Older checkpoints are deleted only then."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            written = {"step": self.state.global_step, "world_size": self.args.world_size}
            (folder / COMPLETE_MARKER).write_text(json.dumps(written))
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # another number of processes may have written the best checkpoint, before a resume
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
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if conversations := self.read_conversations(dataset, self.args.generation_samples):
            accuracy = self.exact_answers(conversations)
            metrics[f"{metric_key_prefix}_exact_answers"] = accuracy
            self.log({f"{metric_key_prefix}_exact_answers": accuracy})
        return metrics

    def read_conversations(self, dataset, count: int) -> list[list[dict]]:
        """The conversations of the first `count` valid examples. The collator names the others when the loss is computed."""
        conversations = []
        for example in dataset:
            if len(conversations) == count:
                break
            try:
                conversations.append(self.data_collator.read(example))
            except ValueError:
                if not self.data_collator.skip_broken_images:
                    raise
        return conversations

    @torch.no_grad()
    def exact_answers(self, conversations: list[list[dict]]) -> float:
        """The fraction of conversations whose last answer is generated word for word. The processes divide the work."""
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
    """The optimizer's groups: trained parameters by part, with its learning rate and name. Norms and biases do not decay."""
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
    Sets the epoch of [`SeededLengthGroupedSampler`]. On several processes, after a resume in the middle of an epoch,
    accelerate 1.15 sets it for its own random sampler only, and the order of the first epoch would be repeated.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.set_epoch(int(state.epoch))


class RestoreParamGroupsCallback(TrainerCallback):
    """
    Restores the settings of each parameter group after a universal checkpoint was loaded. Under ZeRO-3, DeepSpeed 0.19.8
    gives all groups the settings of the first one, and a step counter that the update of every group advances.
    """

    def on_train_begin(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        own_groups = group_parameters(model, args)
        for group, own, rate in zip(optimizer.param_groups, own_groups, lr_scheduler.get_last_lr(), strict=True):
            group.update(name=own["name"], weight_decay=own["weight_decay"], lr=rate)
        for entry in optimizer.state.values():
            entry["step"] = copy.deepcopy(entry["step"])  # a tensor, or a number


def world_size_changed(checkpoint: Path, args: TrainingArguments) -> bool:
    """Whether the run uses ZeRO and the checkpoint's optimizer state is divided among another number of processes."""
    is_partitioned = args.deepspeed_plugin is not None and any(checkpoint.glob("global_step*/*_optim_states.pt"))
    return is_partitioned and json.loads((checkpoint / COMPLETE_MARKER).read_text())["world_size"] != args.world_size


def check_deepspeed_checkpoint(checkpoint: Path, args: TrainingArguments) -> None:
    """
    DeepSpeed saves the optimizer's state in files of its own. A run with DeepSpeed cannot read the state of a run without
    it, and vice versa. The Trainer would start with a new optimizer, without a warning if the run is without DeepSpeed.

    Raises:
        ValueError: If either the checkpoint or the run uses DeepSpeed, and the other does not.
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
    The newest complete checkpoint, for `--resume`. Newer ones that a killed run did not finish are removed.

    Raises:
        ValueError: If this checkpoint, or the best one that is loaded at the end, was written under ZeRO by another number
            of processes and is not converted; the error gives the commands that convert it. See also
            [`check_deepspeed_checkpoint`].
    """
    folders = Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    newest_first = sorted(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)
    for folder in newest_first:
        if not (folder / COMPLETE_MARKER).exists():
            logger.warning("%s is not complete: it is not used", folder)
            if args.process_index == 0:
                shutil.rmtree(folder)
            continue
        check_deepspeed_checkpoint(folder, args)
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
            written_by = json.loads((folder / COMPLETE_MARKER).read_text())["world_size"]
            raise ValueError(
                f"{folder} was written by {written_by} processes, and this run has {args.world_size}. Convert, then give"
                " --resume again, with the same product of processes, --per_device_train_batch_size and"
                " --gradient_accumulation_steps:\n  " + "\n  ".join(commands)
            )
        return str(folder)
    return None


def load_universal_checkpoint(trainer: Trainer) -> None:
    """Makes `trainer.train` resume from a checkpoint in DeepSpeed's universal format."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True
    if plugin.hf_ds_config.is_zero3():
        trainer.add_callback(RestoreParamGroupsCallback())


def plot_curves(log_history: list[dict], path: Path) -> None:
    """Plots loss, evaluation loss and learning rate by step."""
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
