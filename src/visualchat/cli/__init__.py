# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The command `visualchat`. One module here for each of its commands holds the options and the help; it imports what does the
work only after the options are read, so that `--help` is quick.
"""

import importlib
import os
import sys
from importlib.metadata import version


COMMANDS = {
    "train": "fine-tune a model: a recipe, or fields on the command line",
    "prepare": "check data for training, or turn public datasets into it",
    "chat": "chat in the terminal",
    "web": "chat on a web page",
    "serve": "serve the OpenAI chat completions API over HTTP",
    "evaluate": "answer the questions of a dataset, score and compare models",
    "plan": "predict memory and speed of a training run",
    "push": "upload a model or an adapter to the Hugging Face Hub",
    "merge": "merge a LoRA adapter into its base model",
    "convert released": "convert a checkpoint of DeepSpeed-VisualChat's own training script",
    "convert llava": "start a model from a LLaVA 1.5 checkpoint",
}
# What pip installs for them beside what the model needs
EXTRAS = {"train": "train", "prepare": "train", "evaluate": "train", "plan": "train", "merge": "train"}
EXTRAS |= {"serve": "serve", "web": "web"}


def main(argv: list[str] | None = None) -> int:
    """
    Args:
        argv (`list[str]`, *optional*): The words after `visualchat`; by default those of the process.

    Returns:
        `int`: The exit status: 0, 1 if a part of the work failed, 2 for bad options.
    """
    words = sys.argv[1:] if argv is None else argv
    if words == ["--version"]:
        print(f"visualchat {version('visualchat')}")
        return 0
    taken = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if taken is None:
        if words and words[-1] in ("-h", "--help"):
            print(describe_commands())
            return 0
        given = f"{' '.join(words[:2])!r} is not a command" if words else "a command is needed"
        print(f"visualchat: {given}\n\n{describe_commands()}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn after every fork otherwise
    command = importlib.import_module(f"visualchat.cli.{taken.replace(' ', '_')}")
    try:
        return command.main(words[len(taken.split()) :]) or 0
    except ModuleNotFoundError as error:
        if taken not in EXTRAS:
            raise
        print(f"visualchat {taken}: {error}: pip install 'visualchat[{EXTRAS[taken]}]' installs it", file=sys.stderr)
        return 2


def describe_commands() -> str:
    lines = ["usage: visualchat COMMAND …", "", "commands:"]
    lines += [f"  {name:<18}{about}" for name, about in COMMANDS.items()]
    return "\n".join([*lines, "", "`visualchat COMMAND --help` shows the options; `visualchat --version` the version."])
