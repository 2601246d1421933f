# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What a command says when it cannot use what it was given."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """
    A folder, file or option cannot be used. `visualchat` prints the message without a traceback, and its exit status is 2.
    Any other exception is a fault of the program, or of the machine, and keeps its traceback.
    """


@contextmanager
def input_errors(prefix: str = "") -> Iterator[None]:
    """Turns the errors that a bad input raises, `OSError` and `ValueError`, into [`InputError`] with `prefix` before it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{prefix}{error}") from error


def is_panic(error: BaseException) -> bool:
    """
    Whether a library that is written in Rust, such as a tokenizer, panicked. What pyo3 raises then is no `Exception`, and
    its class cannot be imported.
    """
    return type(error).__name__ == "PanicException"
