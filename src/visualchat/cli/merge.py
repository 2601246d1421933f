# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Merge a PEFT adapter that `visualchat train --mode lora` saved into its base model, as a plain VisualChat folder:

    visualchat merge outputs/lora/model --output outputs/merged
"""

import argparse

from visualchat.cli.options import add_model, make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("merge", __doc__)
    add_model(parser, help="folder or Hub id of the adapter")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--base", help="folder or Hub id of the base model; by default the adapter names it")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.training.merge import run

    run(args)
