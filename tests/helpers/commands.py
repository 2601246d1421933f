"""The commands of the package: as a shell runs them, and without the handler of errors."""

import importlib
import sys


def command(name: str, *words) -> list[str]:
    """`visualchat NAME WORDS`, with the Python of the tests."""
    return [sys.executable, "-m", "visualchat", *name.split(), *map(str, words)]


def run_command(name: str, *words) -> None:
    """Runs `visualchat NAME WORDS` in this process. Bad input raises its [`visualchat.errors.InputError`]."""
    importlib.import_module(f"visualchat.cli.{name.replace(' ', '_')}").main([*map(str, words)])
