"""
The Trainer with additions for a vision-language model: learning rates by part, accuracy of generated answers, a count of
broken examples in every log line, and checkpoints that are known to be complete.
"""

import copy
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from visualchat.evaluation.answers import generate_answers, is_exact, text_of
from visualchat.training.arguments import LoopArguments
from visualchat.training.checkpoints import MANIFEST, world_size_changed, write_json, write_manifest
from visualchat.training.collator import TrainingCollator
from visualchat.training.interruption import EvaluationInterrupted, Interrupted, InterruptionCallback, keep_working
from visualchat.training.run_record import RECORD


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
    """
    See the module's docstring.

    Args:
        run_record (`dict`, *optional*): What the run is made with; each checkpoint gets it (see `run_record.py`).
    """

    args: VisualChatTrainingArguments
    data_collator: TrainingCollator

    def __init__(self, *args, run_record: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_record = run_record
        self.interruption = InterruptionCallback()
        self.add_callback(self.interruption)

    def train(self, *args, **kwargs):
        """
        See [`~transformers.Trainer.train`].

        Raises:
            Interrupted: If SIGTERM or SIGINT arrived; a checkpoint is saved.
        """
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.interruption.restore_handlers()
        self.interruption.repeat_late_signal()
        return output

    def _get_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = loader.base_dataloader  # accelerate's loader reads from it
        inner.worker_init_fn = partial(keep_working, inner.worker_init_fn)
        return loader

    def _init_training_state(self, max_steps, *args, **kwargs) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint brings the intervals that it was made with
        return position

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # of a finished checkpoint; the Trainer would make one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationInterrupted:
            self._save_checkpoint(model, trial)

    def _finalize_training(self, trial, *args, **kwargs):
        if self.interruption.agree(self.args):
            if not (self.checkpoint_folder / MANIFEST).exists():
                self._save_checkpoint(self.model, trial)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise Interrupted(self.interruption.signal, self.state.global_step)
        return super()._finalize_training(trial, *args, **kwargs)

    @property
    def checkpoint_folder(self) -> Path:
        """The checkpoint of this step, whether it is saved or not."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

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
            if self.run_record is not None:
                write_json(self.checkpoint_folder / RECORD, self.run_record)
            write_manifest(self.checkpoint_folder, self.state.global_step, self.args.world_size)
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
            self.interruption.give_up_evaluation(self.args, self.control)
            index = turn * self.args.world_size + self.args.process_index
            messages = conversations[index % len(conversations)]
            last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
            answer = generate_answers(model, self.processing_class, [messages[:last]], **settings)[0]
            right += index < len(conversations) and is_exact(answer, text_of(messages[last]["content"]))
        total = self.accelerator.reduce(torch.tensor(float(right), device=self.args.device))
        return float(total) / len(conversations)


def group_parameters(model: torch.nn.Module, args: VisualChatTrainingArguments) -> list[dict]:
    """
    The optimizer's groups: trained parameters by part, with its learning rate and name. Norms, biases and gates do not
    decay.
    """
    rates = {
        "lora": args.lora_learning_rate,
        "numbers": args.number_learning_rate,
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
        elif "image_numbers" in name:
            part = "numbers"
        elif "multi_modal_projector" in name:
            part = "projector"
        elif "embed_tokens" in name:
            part = "embedding"
        else:
            part = "rest"
        decays = not re.search(r"bias$|norm|gate$", name)
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
    Gives each parameter group the settings of the arguments, after a checkpoint was loaded: the optimizer and the schedule
    bring those that the checkpoint was made with.
    """

    def on_train_begin(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        own_groups = group_parameters(model, args)
        _, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        for group, own in zip(optimizer.param_groups, own_groups, strict=True):
            given = {**settings, **own, "initial_lr": own["lr"]}
            group.update({name: given[name] for name in group.keys() & given.keys() - {"params", "lr"}}, name=own["name"])
        if isinstance(lr_scheduler, LambdaLR):  # the others follow the losses, and have no base rate
            lr_scheduler.base_lrs = [own["lr"] for own in own_groups]
            factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
            rates = [rate * factor for rate, factor in zip(lr_scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            lr_scheduler._last_lr = rates


class RestoreStepsCallback(TrainerCallback):
    """
    Gives each parameter a step counter of its own after a universal checkpoint was loaded: under ZeRO-3, DeepSpeed 0.19.8
    loads one that the update of every group advances.
    """

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        for entry in optimizer.state.values():
            entry["step"] = copy.deepcopy(entry["step"])  # a tensor, or a number


def load_universal_checkpoint(trainer: Trainer) -> None:
    """Makes `trainer.train` resume from a checkpoint in DeepSpeed's universal format."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True
    if plugin.hf_ds_config.is_zero3():  # DeepSpeed 0.19.8 gives all groups the settings of the first one
        trainer.add_callback(RestoreParamGroupsCallback())
        trainer.add_callback(RestoreStepsCallback())


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
