# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Fine-tune a VisualChat model. A recipe is a YAML file with the fields of one run; fields on the command line override it:

    visualchat train examples/recipes/tiny.yaml
    visualchat train examples/recipes/tiny.yaml --mode lora --learning_rate 2e-4 --resume

Launchers want a file, which examples/train.py is. With DeepSpeed on one machine (--use_cpu where there is no accelerator):

    torchrun --nproc_per_node 8 examples/train.py examples/recipes/paper-7b.yaml

All fields of transformers.TrainingArguments are options as well, such as --output_dir, --num_train_epochs and --deepspeed.
"""

import sys

from visualchat.cli.options import make_parser
from visualchat.errors import InputError
from visualchat.training.arguments import DataArguments, LoopArguments, ModelArguments, describe_fields


def print_help() -> None:
    parser = make_parser("train", __doc__)
    parser.usage = "visualchat train [RECIPE] [--field value …]"
    for title, kind in (("model", ModelArguments), ("data", DataArguments), ("training", LoopArguments)):
        group = parser.add_argument_group(title)
        for name, default, about in describe_fields(kind):
            group.add_argument(f"--{name}", metavar="…", help=f"{about} (default: {default})".replace("%", "%%"))
    parser.print_help()


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print_help()
        return 0
    from visualchat.training.interruption import Interrupted
    from visualchat.training.train import prepare, train

    try:
        run = prepare(argv)
    except ModuleNotFoundError:  # `visualchat` names the extra
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise InputError(error) from error
    if run is None:
        return 0
    try:
        train(run)
    except Interrupted as stop:
        print(f"visualchat train: {stop}", file=sys.stderr)
        return stop.exit_status
    return 0
