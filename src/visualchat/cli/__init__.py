# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The command `visualchat`. One module here for each of its commands holds the options and the help; it imports what does the
work only after the options are read, so that `--help` is quick.
"""

import importlib
import os
import platform
import sys
from importlib.metadata import version

from visualchat import __version__
from visualchat.errors import InputError


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
# Modules that a plain `pip install visualchat` leaves out, and the extra that brings them
EXTRAS = {
    **dict.fromkeys(("datasets", "deepspeed", "matplotlib", "peft", "tensorboard"), "train"),
    **dict.fromkeys(("fastapi", "prometheus_client", "uvicorn"), "serve"),
    **dict.fromkeys(("gradio", "sklearn"), "web"),
    "gguf": "gguf",
}
EXIT_STATUSES = """\
Exit status: 0 if all is done; 1 if a part failed, or the program did (with a traceback); 2 if an option, a file or a model
cannot be used; 130 after Ctrl-C; of `train`, 143 after SIGTERM."""


def main(argv: list[str] | None = None) -> int:
    """
    Args:
        argv (`list[str]`, *optional*): The words after `visualchat`; by default those of the process.

    Returns:
        `int`: The exit status, as [`EXIT_STATUSES`] says.
    """
    words = sys.argv[1:] if argv is None else argv
    if words == ["--version"]:
        others = [f"{name} {version(name)}" for name in ("transformers", "torch")]
        print(f"visualchat {__version__} ({', '.join(others)}, Python {platform.python_version()})")
        return 0
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        if words and words[-1] in ("-h", "--help"):
            print(describe_commands())
            return 0
        given = f"{' '.join(words[:2])!r} is not a command" if words else "a command is needed"
        print(f"visualchat: {given}\n\n{describe_commands()}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn after every fork otherwise
    command = importlib.import_module(f"visualchat.cli.{name.replace(' ', '_')}")
    try:
        return command.main(words[len(name.split()) :]) or 0
    except InputError as error:
        print(f"visualchat {name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        print(f"visualchat {name} needs {error.name}: pip install 'visualchat[{extra}]' installs it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"visualchat {name}: stopped", file=sys.stderr)
        return 130


def describe_commands() -> str:
    lines = ["usage: visualchat COMMAND …", "", "commands:"]
    lines += [f"  {name:<18}{about}" for name, about in COMMANDS.items()]
    lines += ["", "`visualchat COMMAND --help` shows the options; `visualchat --version` the version.", EXIT_STATUSES]
    return "\n".join(lines)
