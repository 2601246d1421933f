# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Fine-tune a VisualChat model. A recipe is a YAML file with the fields of one run; fields on the command line override it:

    visualchat train examples/recipes/tiny.yaml
    visualchat train examples/recipes/tiny.yaml --mode lora --learning_rate 2e-4 --resume

Launchers want a file, which examples/train.py is. With DeepSpeed on one machine (--use_cpu where there is no accelerator):

    torchrun --nproc_per_node 8 examples/train.py examples/recipes/paper-7b.yaml

All fields of transformers.TrainingArguments are options as well.
"""

from visualchat.cli.options import make_parser
from visualchat.training.arguments import DataArguments, ModelArguments, describe_fields


def print_help() -> None:
    parser = make_parser("train", __doc__)
    parser.usage = "visualchat train [RECIPE] [--field value …]"
    for title, kind in (("model", ModelArguments), ("data", DataArguments)):
        group = parser.add_argument_group(title)
        for name, default, about in describe_fields(kind):
            group.add_argument(f"--{name}", metavar="…", help=f"{about} (default: {default})".replace("%", "%%"))
    parser.print_help()


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print_help()
        return
    from visualchat.training.train import main as train

    train(argv)
