# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Chat with a VisualChat model on a web page:

    visualchat web outputs/demo/model --examples digits

Every visitor has a conversation of their own. Answers are made one at a time, in the order of the questions. The page loads
nothing from other machines and reports nothing to them.
"""

import argparse

from visualchat.cli.options import add_model, make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("web", __doc__)
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860, help="default %(default)s")
    parser.add_argument("--share", action="store_true", help="also make a public link through Gradio's servers")
    parser.add_argument(
        "--examples",
        choices=("photographs", "digits", "none"),
        default="photographs",
        help="conversations to begin with (default %(default)s)",
    )
    parser.add_argument("--max-upload", default="10mb", help="size of an image file (default %(default)s)")
    parser.add_argument("--max-pixels", type=int, default=20_000_000, help="pixels of an image (default %(default)s)")
    parser.add_argument("--max-images", type=int, default=16, help="images of a conversation (default %(default)s)")
    parser.add_argument(
        "--max-sessions", type=int, default=200, help="conversations to keep, the latest (default %(default)s)"
    )
    parser.add_argument(
        "--max-cached", type=int, default=8, help="of these, those whose cache is kept (default %(default)s)"
    )
    parser.add_argument("--max-waiting", type=int, default=32, help="questions that may wait (default %(default)s)")
    parser.add_argument("--store-gb", type=float, default=4, help="GB for remembered images (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.chat.page import run

    run(args)
