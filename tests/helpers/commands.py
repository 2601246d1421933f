"""The commands of the package as a shell runs them, in processes of their own."""

import sys


def command(name: str, *words) -> list[str]:
    """`visualchat NAME WORDS`, with the Python of the tests."""
    return [sys.executable, "-m", "visualchat", *name.split(), *map(str, words)]
