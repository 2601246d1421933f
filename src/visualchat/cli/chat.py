# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Chat with a VisualChat model in the terminal, or through a pipe.

    visualchat chat outputs/demo/model
    echo "What digit is in image 1?" | visualchat chat outputs/demo/model --image first.png

In a pipe, each line is a question or a command. Answers go to the standard output and everything else to the standard
error. The exit status is 1 if a line failed.
"""

import argparse
from pathlib import Path

from visualchat.chat.commands import COMMANDS
from visualchat.cli.options import add_model, make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("chat", __doc__, epilog="commands:\n" + COMMANDS)
    add_model(parser)
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH", help="images of the first question, files or URLs")
    parser.add_argument("--load", metavar="FOLDER", help="go on with a conversation that was saved")
    parser.add_argument("--system", metavar="TEXT", help="in place of the prompt's first line")
    parser.add_argument("--drop-oldest", action="store_true", help="forget the oldest rounds when the context is full")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer, at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="samples answers if above 0")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="samples from the likeliest tokens of this total probability"
    )
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search, without streaming")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampled answers repeatable")
    parser.add_argument("--history", type=Path, default=Path.home() / ".visualchat_history", metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    from visualchat.chat.terminal import run

    return run(args)
