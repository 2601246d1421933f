# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Upload a VisualChat folder, or a PEFT adapter of one, to the Hugging Face Hub:

    visualchat push outputs/demo/model user/name --dry-run
    visualchat push outputs/demo/model user/name --private

A dry run lists every file with its size and SHA-256, and sends nothing. The model card that is sent lists the code that
trust_remote_code=True will run. Links, and files that hold a token, a key or a password in a known form, are refused.
Run the command again to resume an interrupted upload.
"""

import argparse
from pathlib import Path

from visualchat.cli.options import make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("push", __doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of the model or adapter, with its processor")
    parser.add_argument("repository", metavar="REPOSITORY", help="user/name")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a private repository, if there is none yet"
    )
    parser.add_argument("--revision", help="branch to push to, created if need be; main by default")
    parser.add_argument("--base-model", help="Hub id of an adapter's base, if the adapter names a folder")
    parser.add_argument(
        "--token", help="access token; other users of this machine see it: better `hf auth login` or HF_TOKEN"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.hub.push import run

    run(args)
