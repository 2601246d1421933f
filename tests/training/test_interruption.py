"""`visualchat train`: SIGTERM and SIGINT save a checkpoint, and the exit status is the signal's."""

import os
import signal
import subprocess
from pathlib import Path

import datasets
import pytest

from helpers.commands import command
from helpers.distributed import ENVIRONMENT, launch, settings
from helpers.training import FEATURES, arguments, losses, make_row
from visualchat.training import interruption
from visualchat.training.checkpoints import find_complete_checkpoint
from visualchat.training.interruption import Interrupted, InterruptionCallback
from visualchat.training.train import main
from visualchat.training.trainer import VisualChatTrainer, VisualChatTrainingArguments


EVALUATED = {"max_steps": 5, "eval_fraction": 0.2, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1}


def interrupt(monkeypatch, method: str, calls: int, number: int = signal.SIGTERM) -> None:
    """Sends a signal to this process in the given call of a method of the trainer."""
    work, left = getattr(VisualChatTrainer, method), [calls]

    def work_and_interrupt(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return work(self, *args, **kwargs)

    monkeypatch.setattr(VisualChatTrainer, method, work_and_interrupt)


def whole_checkpoints(output: Path) -> set[str]:
    return {path.parent.name for path in output.glob("checkpoint-*/whole.json")}


class TestInterruption:
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_step_ends_with_a_checkpoint_from_which_the_run_goes_on(self, parts, tmp_path, monkeypatch, number, status):
        usual = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
        settings = {"max_steps": 5, "save_strategy": "epoch", "eval_fraction": 0.2}
        main(arguments(parts, tmp_path / "whole", **settings))
        with monkeypatch.context() as patch:
            interrupt(patch, "training_step", 3, number)
            with pytest.raises(Interrupted, match="a checkpoint of step 3 is saved; go on with --resume") as stop:
                main(arguments(parts, tmp_path / "run", **settings))
        assert stop.value.exit_status == status
        assert whole_checkpoints(tmp_path / "run") == {"checkpoint-3"} and not (tmp_path / "run" / "model").exists()
        assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == usual
        main([*arguments(parts, tmp_path / "run", **settings), "--resume"])
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    @pytest.mark.parametrize(
        ("method", "fields", "step"),
        [("prediction_step", {}, 3), ("exact_answers", {}, 3), ("prediction_step", {"eval_on_start": True}, 1)],
    )
    def test_an_evaluation_is_given_up(self, parts, tmp_path, monkeypatch, method, fields, step):
        interrupt(monkeypatch, method, 1)
        with pytest.raises(Interrupted, match=f"step {step}"):
            main(arguments(parts, tmp_path, **EVALUATED, **fields, per_device_eval_batch_size=1, generation_samples=2))
        assert whole_checkpoints(tmp_path) == {f"checkpoint-{step}"}

    def test_an_evaluation_that_is_due_is_left_out(self, parts, tmp_path, monkeypatch):
        def evaluate(*args, **kwargs):
            raise AssertionError("it evaluates")

        interrupt(monkeypatch, "training_step", 3)
        monkeypatch.setattr(VisualChatTrainer, "evaluate", evaluate)
        with pytest.raises(Interrupted, match="step 3"):
            main(arguments(parts, tmp_path, **EVALUATED))
        assert whole_checkpoints(tmp_path) == {"checkpoint-3"}

    def test_after_the_last_step(self, parts, tmp_path, monkeypatch):
        """The checkpoint of the best model is kept by `save_total_limit: 1`, and that of the signal too."""
        best = {"load_best_model_at_end": True, "save_steps": 3, "greater_is_better": True, "save_total_limit": 1}
        interrupt(monkeypatch, "training_step", 5)
        words = arguments(parts, tmp_path, **EVALUATED, **best)
        with pytest.raises(Interrupted, match="step 5"):
            main(words)
        assert whole_checkpoints(tmp_path) == {"checkpoint-3", "checkpoint-5"}
        main([*words, "--resume"])
        assert (tmp_path / "model" / "model.safetensors").exists()

    def test_a_second_signal_ends_the_process_unless_it_is_the_same_one_passed_on(self, monkeypatch):
        killed, now = [], [0.0]
        callback = InterruptionCallback()
        monkeypatch.setattr(interruption.signal, "signal", lambda number, handler: killed.append(handler))
        monkeypatch.setattr(interruption.os, "kill", lambda process, number: killed.append((process, number)))
        monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
        callback.receive(signal.SIGINT, None)
        callback.receive(signal.SIGINT, None)
        assert not killed
        now[0] = 3.0
        callback.receive(signal.SIGTERM, None)
        assert killed == [signal.SIG_DFL, (os.getpid(), signal.SIGTERM)]

    def test_exit_status_of_the_command_when_its_whole_group_gets_the_signal(self, parts, tmp_path):
        """As a terminal and SLURM send it: to the workers that read the examples too."""
        words = arguments(parts, tmp_path, max_steps=100_000, save_strategy="no", dataloader_num_workers=1)
        process = subprocess.Popen(
            command("train", *words),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        wait_for_a_step(process)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 143, output[-3000:]
        assert "is saved; go on with --resume" in output and "Traceback" not in output
        assert find_complete_checkpoint(VisualChatTrainingArguments(str(tmp_path), use_cpu=True))

    @pytest.mark.slow
    def test_a_run_that_fails_ends_its_workers(self, parts, tmp_path):
        """Python waits for them when it exits: they must not ignore the SIGTERM of their parent."""
        row = make_row(1, images=1)
        row["images"] = [{"bytes": b"no image", "path": None}]
        features = datasets.Features({**FEATURES, "images": datasets.List(datasets.Image(decode=False))})
        datasets.Dataset.from_list([row] * 8, features=features).to_parquet(tmp_path / "data.parquet")
        fields = {"datasets": tmp_path / "data.parquet", "eval_fraction": 0, "dataloader_num_workers": 2}
        words = command("train", *arguments(parts, tmp_path / "run", **fields))
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 1 and "undecodable image" in done.stderr

    @pytest.mark.slow
    def test_all_processes_end_after_the_same_step(self, parts, tmp_path):
        words = settings(parts, tmp_path, 2, max_steps=100_000, save_strategy="no", logging_steps=1)
        process = launch(words, 2, wait=False)
        wait_for_a_step(process)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGTERM)  # one of two
        output, _ = process.communicate(timeout=300)
        assert output.count("is saved; go on with --resume") == 2, output[-3000:]
        assert len(whole_checkpoints(tmp_path)) == 1


def wait_for_a_step(process: subprocess.Popen) -> None:
    read = []
    for line in process.stdout:
        read.append(line)
        if "'loss'" in line:
            return
    raise AssertionError("".join(read)[-3000:])
