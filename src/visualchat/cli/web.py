# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Chat with a VisualChat model on a web page:

    visualchat web outputs/demo/model --examples digits

Every visitor has a conversation of their own. Answers are made one at a time, in the order of the questions. The page loads
nothing from other machines and reports nothing to them.
"""

import argparse

from visualchat.cli.options import (
    add_allowed_host,
    add_image_memory,
    add_model,
    make_parser,
    natural,
    not_negative,
    port,
    positive,
)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("web", __doc__)
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    add_allowed_host(parser)
    parser.add_argument("--port", type=port, default=7860, help="default %(default)s")
    parser.add_argument("--share", action="store_true", help="also make a public link through Gradio's servers")
    parser.add_argument(
        "--examples",
        choices=("photographs", "digits", "none"),
        default="photographs",
        help="example conversations that the page offers (default %(default)s)",
    )
    add_image_memory(parser)
    parser.add_argument(
        "--max-image-mb", type=not_negative, default=10, metavar="MB", help="of an image file (default %(default)g)"
    )
    parser.add_argument(
        "--max-message-mb",
        type=not_negative,
        default=32,
        metavar="MB",
        help="of the image files of a message together (default %(default)g)",
    )
    parser.add_argument(
        "--max-image-megapixels", type=not_negative, default=20, metavar="N", help="of an image (default %(default)g)"
    )
    parser.add_argument(
        "--max-images", type=positive, default=16, metavar="N", help="of a conversation (default %(default)s)"
    )
    parser.add_argument(
        "--max-sessions",
        type=positive,
        default=200,
        metavar="N",
        help="conversations to keep, the latest (default %(default)s)",
    )
    parser.add_argument(
        "--max-cached",
        type=natural,
        default=8,
        metavar="N",
        help="conversations whose key-value cache is kept, the latest (default %(default)s)",
    )
    parser.add_argument(
        "--max-waiting",
        type=positive,
        default=32,
        metavar="N",
        help="questions that may wait for their turn (default %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.chat.page import run

    run(args)
