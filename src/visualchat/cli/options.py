# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Options that several commands share."""

import argparse
import math


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


def add_model(
    parser: argparse.ArgumentParser, help: str = "folder or Hub id of a VisualChat model, or of an adapter of one", **kwargs
) -> None:
    """Adds the argument MODEL, and the flag that allows code beside the weights to run."""
    parser.add_argument("model", metavar="MODEL", help=help, **kwargs)
    add_trust_remote_code(parser)


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model; a VisualChat model needs none, since this package has its code",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=choices, default="auto", help="of the weights; auto, the default: as saved")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the accelerator if there is one")


def add_image_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-memory-gb", type=not_negative, default=4.0, metavar="GB", help="for remembered images (default %(default)g)"
    )


def add_allowed_host(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="HOST",
        help="answer to this name as well, such as example.com, *.example.com, or * for all; repeat for several (default:"
        " localhost, the name of this machine, what --host says, and IP addresses)",
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


def not_negative(text: str) -> float:
    """An argument that is a number, 0 or above."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:  # also false for NaN
        raise argparse.ArgumentTypeError(f"expected a number, 0 or above, got {text!r}")
    return number


def port(text: str) -> int:
    """An argument that is a TCP port."""
    if natural(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port up to 65535, got {text!r}")
    return int(text)
