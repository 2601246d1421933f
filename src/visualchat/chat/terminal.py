# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A chat in the terminal, or through a pipe: `visualchat chat`."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import set_seed

from modeling_visualchat import ChatSession
from modeling_visualchat.image_loading_visualchat import load_image
from visualchat.chat.commands import COMMANDS
from visualchat.loading import load_model, load_processor


class Terminal:
    """
    Reads lines, which are questions or commands, and prints answers.

    Args:
        session (`ChatSession`): The conversation.
        generation (`dict`): As for `model.generate`.
        interactive (`bool`): Whether a person is reading.

    Attributes:
        attached (`list[PIL.Image.Image]`): Pictures that wait for the next question.
    """

    def __init__(self, session: ChatSession, generation: dict, interactive: bool):
        self.session, self.generation, self.interactive = session, generation, interactive
        self.attached = []

    def run(self, lines: Iterator[str]) -> int:
        """Returns the exit status: 1 if a line failed that no person could mend."""
        failed = False
        for line in lines:
            if line.strip() == "/quit":
                break
            try:
                self.take(line.strip())
            except KeyboardInterrupt:
                tell("[stopped]")
            except (ValueError, OSError, IndexError, RuntimeError) as error:  # RuntimeError: also out of memory
                tell(f"{error}")
                failed = True
        return int(failed and not self.interactive)

    def take(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            self.answer(lambda: self.session.send(line, self.attached, stream=True, **self.generation))
            return
        name, _, rest = line.partition(" ")
        if name == "/edit":
            number, _, text = rest.strip().partition(" ")
            if not number.isdecimal() or not text:
                raise ValueError("Say which question and what to ask instead: /edit 2 What colour is it?")
            self.answer(lambda: self.session.edit(int(number) - 1, text, stream=True, **self.generation))
            return
        commands = {
            "/image": (self.attach, None),
            "/retry": (self.retry, 0),
            "/undo": (self.undo, 0),
            "/show": (self.show, 0),
            "/save": (self.save, 1),
            "/load": (self.load, 1),
            "/clear": (self.clear, 0),
            "/help": (lambda: tell(COMMANDS), 0),
        }
        if name not in commands:
            raise ValueError(f"There is no command {name}: /help lists them")
        command, expected = commands[name]
        words = shlex.split(rest)
        if expected is not None and len(words) != expected:
            raise ValueError(f"{name} takes {expected or 'no'} argument{'s' * (expected != 1)}, got {len(words)}: see /help")
        command(*words)

    def answer(self, ask: Callable[[], Iterator[str]]) -> None:
        before = self.session.rounds[-1:]
        dropped = self.session.dropped_rounds
        pieces = ask()
        try:
            with contextlib.closing(pieces):  # Ctrl-C ends the answer where it is
                for piece in pieces:
                    print(printable(piece) if self.interactive else piece, end="", flush=True)
        finally:
            print(flush=True)
            if self.session.rounds[-1:] != before:  # an error leaves the pictures for the next try
                self.attached = []
        if self.session.dropped_rounds > dropped:
            tell("[The conversation got too long: its oldest rounds were dropped, the pictures numbered anew]")

    def attach(self, *paths: str) -> None:
        if not paths:
            raise ValueError("Say which pictures: /image first.png 'second picture.png'")
        self.attached += [load_image(path, path) for path in paths]  # all of them or none
        first = sum(len(one.images) for one in self.session.rounds) + len(self.attached) - len(paths) + 1
        for number, path in enumerate(paths, first):
            tell(f"[image {number}: {path}]")

    def retry(self) -> None:
        last = len(self.session.rounds) - 1
        if last < 0:
            raise ValueError("There is nothing to ask again")
        text = self.session.rounds[last].text
        self.answer(lambda: self.session.edit(last, text, stream=True, **self.generation))

    def undo(self) -> None:
        tell(f"[taken back: {self.session.undo().text}]")

    def show(self) -> None:
        image = 0
        for number, one in enumerate(self.session.rounds, 1):
            for _ in one.images:
                image += 1
                tell(f"[image {image}]")
            tell(f"{number}: {one.text}\n{printable(one.answer)}")

    def save(self, folder: str) -> None:
        self.session.save(Path(folder).expanduser())
        tell(f"[saved to {folder}]")

    def load(self, folder: str) -> None:
        settings = {"drop_oldest": self.session.drop_oldest}
        folder = Path(folder).expanduser()
        self.session = ChatSession.load(folder, self.session.model, self.session.processor, **settings)
        self.show()

    def clear(self) -> None:
        self.session.clear()
        self.attached = []


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def read_lines(history: Path) -> Iterator[str]:
    """What a person types, until Ctrl-C or Ctrl-D at the prompt."""
    import readline  # not on Windows, and of use to a person only

    if history.exists():
        readline.read_history_file(history)
    try:
        while True:
            yield input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        readline.set_history_length(1000)
        readline.write_history_file(history)


def start_session(arguments: argparse.Namespace) -> ChatSession:
    tell(f"Loading {arguments.model} …")
    model = load_model(arguments.model, arguments.trust_remote_code, dtype="auto", device_map="auto")
    processor = load_processor(arguments.model, arguments.trust_remote_code)
    return model.start_chat(processor, system=arguments.system, drop_oldest=arguments.drop_oldest)


def run(arguments: argparse.Namespace) -> int:
    """The exit status of `visualchat chat` with these options."""
    names = ("max_new_tokens", "top_p", "num_beams")
    generation = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.temperature is not None:
        generation["do_sample"] = arguments.temperature > 0
        if arguments.temperature > 0:
            generation["temperature"] = arguments.temperature
    elif arguments.top_p is not None:
        generation["do_sample"] = True
    if arguments.seed is not None:
        set_seed(arguments.seed)

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        terminal = Terminal(start_session(arguments), generation, interactive)
        if arguments.load:
            terminal.load(arguments.load)
        if arguments.image:
            terminal.attach(*arguments.image)
    except (OSError, ValueError) as error:
        tell(f"{error}")
        return 2
    if interactive:
        tell("Type a question; /help lists the commands.")
    return terminal.run(read_lines(arguments.history) if interactive else iter(sys.stdin))
