"""Commands of the package as a shell runs them, in processes of their own."""

import os
import sys
from pathlib import Path


MODULES = {
    "train": "visualchat.training.train",
    "prepare": "visualchat.data.prepare",
    "chat": "visualchat.chat.terminal",
    "web": "visualchat.chat.page",
    "serve": "visualchat.serving.server",
    "evaluate": "visualchat.evaluation.evaluate",
    "push": "visualchat.hub.push",
}


def command(name: str, *words) -> list[str]:
    """`visualchat NAME WORDS`, with the Python of the tests."""
    return [sys.executable, "-m", MODULES[name], *map(str, words)]
