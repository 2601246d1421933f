# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Options that several commands share."""

import argparse


def make_parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """
    Args:
        command (`str`): Its name, such as `"serve"`.
        description (`str`): Printed as it is.
        epilog (`str`, *optional*): Printed after the options, as it is.
    """
    return argparse.ArgumentParser(
        prog=f"visualchat {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser, help: str = "folder or Hub id of a VisualChat model", **kwargs) -> None:
    """Adds the argument MODEL, and the flag that lets code run which lies beside the weights."""
    parser.add_argument("model", metavar="MODEL", help=help, **kwargs)
    add_trust_remote_code(parser)


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model; a VisualChat model needs none, since this package has its code",
    )


def natural(text: str) -> int:
    """An argument that is 0, 1, 2, …"""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, …, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An argument that is 1, 2, 3, …"""
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("expected 1, 2, 3, …, got '0'")
    return int(text)
