# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
SIGTERM and SIGINT during training: a checkpoint at the end of the step, then the exit status of the signal.

transformers' own `enable_jit_checkpoint` saves on SIGTERM too. Its processes do not agree on the step, it saves before the
optimizer's step, and the program goes on as if training had ended.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from accelerate.utils import gather
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which a further signal is the same one: torchrun passes on what a terminal or SLURM sends to all processes
SAME_SIGNAL_SECONDS = 2.0


class Interrupted(Exception):  # noqa: N818 - it is reported, and is no error of the program
    """Training ended by a signal, and its checkpoint is saved. `exit_status` is what a shell reports of that signal."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name}: a checkpoint of step {step} is saved; go on with --resume")
        self.exit_status = 128 + number


class EvaluationInterrupted(Exception):  # noqa: N818
    """A signal arrived while the Trainer evaluated: the step is done, and a checkpoint can be saved."""


class InterruptionCallback(TrainerCallback):
    """
    Ends training after the step in which a signal arrived at any of the processes, with a checkpoint. An evaluation that is
    due or under way is left out, as it may take longer than a scheduler waits. A second signal ends the process at once.

    `received` is the number of the signal that arrived here, and `signal` the one on which all processes agreed; or 0.
    """

    def __init__(self):
        self.makes_steps, self.usual_handlers = False, {}
        self.signal, self.received, self.received_at = 0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.signal = self.received = 0
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.usual_handlers = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.makes_steps = True

    def restore_handlers(self) -> None:
        """After this, signals act as usual."""
        for number, handler in self.usual_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: of no Python program
        self.makes_steps, self.usual_handlers = False, {}

    def repeat_late_signal(self) -> None:
        """Sends a signal again that came when no step was left to end with a checkpoint."""
        if self.received and not self.signal:
            os.kill(os.getpid(), self.received)

    def receive(self, number: int, frame) -> None:
        """The handler of the signals."""
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            logger.warning(
                "%s: a checkpoint is saved at the end of this step. A second signal ends the run at once",
                signal.Signals(number).name,
            )
        elif time.monotonic() - self.received_at > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agree(self, args) -> bool:
        """Whether a signal arrived at any process. All processes call this at the same point."""
        received = self.received
        if args.world_size > 1:
            received = int(gather(torch.tensor([received], device=args.device)).max())
        self.signal = received
        return received != 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.agree(args):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args, state, control, **kwargs):
        self.give_up_evaluation(args, control)

    def give_up_evaluation(self, args, control) -> None:
        """
        Raises:
            EvaluationInterrupted: If a signal arrived at any process, and the evaluation is one between the steps. All
                processes call this at the same point.
        """
        if self.makes_steps and self.agree(args):
            control.should_training_stop = True
            raise EvaluationInterrupted

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.signal:  # the step has saved what there is
            control.should_save = control.should_evaluate = False


def keep_working(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    """
    Begins a worker of a data loader that goes on until the step has ended, although a terminal or SLURM sends its signals to
    all processes. Only SIGTERM of its parent ends it. Other systems than Linux do not tell who sent a signal.
    """
    if sys.platform == "linux":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the thread takes it
        threading.Thread(target=wait_for_parents_signal, daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def wait_for_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
