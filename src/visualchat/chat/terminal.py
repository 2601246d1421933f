# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A chat in the terminal, or through a pipe: `visualchat chat`."""

import argparse
import contextlib
import io
import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import set_seed

from modeling_visualchat import ChatSession
from modeling_visualchat.image_loading_visualchat import load_image
from visualchat.chat.commands import COMMANDS
from visualchat.chat.image_marks import read_marks, write_marks
from visualchat.errors import input_errors, is_panic
from visualchat.loading import load_model, load_processor


# Unicode's control, format, surrogate, line separator and paragraph separator characters, but not those that texts need: a
# new line, a tab, and what joins and parts letters of some scripts and emoji
CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
HARMLESS = "\n\t\u200c\u200d"


class Terminal:
    """
    Reads questions and commands, one per line, and prints the answers.

    Args:
        session (`ChatSession`): The conversation.
        generation (`dict`): Keyword arguments of `model.generate`.
        interactive (`bool`): Whether a person types the lines and reads the answers.

    Attributes:
        attached (`list[PIL.Image.Image]`): The images that the next question will bring.
    """

    def __init__(self, session: ChatSession, generation: dict, interactive: bool):
        self.session, self.generation, self.interactive = session, generation, interactive
        self.attached = []

    def run(self, lines: Iterator[str]) -> int:
        """Returns the exit status: 1 if a line failed while no person was there to correct it, else 0."""
        failed = False
        for line in lines:
            if line.strip() == "/quit":
                break
            try:
                self.handle_line(line.strip())
            except KeyboardInterrupt:
                print_status("[stopped]")
            except (ValueError, OSError, IndexError, RuntimeError) as error:  # RuntimeError includes out of memory
                print_status(f"{error}")
                failed = True
            except BaseException as error:
                if not is_panic(error):
                    raise
                print_status(f"The tokenizer cannot read this: {error}")
                failed = True
        return int(failed and not self.interactive)

    def handle_line(self, line: str) -> None:
        if not line:
            return
        if not line.startswith("/"):
            parts = read_marks(line, len(self.attached))
            self.answer(lambda: self.session.send(parts, self.attached, stream=True, **self.generation))
            return
        name, _, rest = line.partition(" ")
        if name == "/edit":
            number, _, text = rest.strip().partition(" ")
            if not number.isdecimal() or not text:
                raise ValueError("Give the number of a question and its new text, as in: /edit 2 What colour is it?")
            self.answer(lambda: self.edit(int(number) - 1, text))
            return
        commands = {
            "/image": (self.attach, None),
            "/retry": (self.retry, 0),
            "/undo": (self.undo, 0),
            "/show": (self.show, 0),
            "/save": (self.save, 1),
            "/load": (self.load, 1),
            "/clear": (self.clear, 0),
            "/help": (lambda: print_status(COMMANDS), 0),
        }
        if name not in commands:
            raise ValueError(f"There is no command {name}. Type /help for a list of the commands")
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
            with contextlib.closing(pieces):  # Ctrl-C stops the generation
                for piece in pieces:
                    print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        finally:
            print(flush=True)
            if self.session.rounds[-1:] != before:  # after an error, the images stay attached for the next try
                self.attached = []
        if self.session.dropped_rounds > dropped:
            print_status("[The conversation was too long: the oldest rounds were dropped, and the images were renumbered]")

    def attach(self, *paths: str) -> None:
        if not paths:
            raise ValueError("Give the paths of the images, as in: /image first.png 'second image.png'")
        self.attached += [load_image(path, path) for path in paths]  # all of them, or none if one cannot be read
        first = sum(len(one.images) for one in self.session.rounds) + len(self.attached) - len(paths) + 1
        for number, path in enumerate(paths, first):
            print_status(f"[image {number}: {path}]")

    def edit(self, index: int, text: str) -> Iterator[str]:
        rounds = self.session.rounds
        images = rounds[index].images if 0 <= index < len(rounds) else []
        return self.session.edit(index, read_marks(text, len(images)), stream=True, **self.generation)

    def retry(self) -> None:
        last = len(self.session.rounds) - 1
        if last < 0:
            raise ValueError("There is no question to ask again")
        text = self.session.rounds[last].text
        self.answer(lambda: self.session.edit(last, text, stream=True, **self.generation))

    def undo(self) -> None:
        print_status(f"[removed: {self.session.undo().text}]")

    def show(self) -> None:
        image_number = 0
        for number, one in enumerate(self.session.rounds, 1):
            for _ in one.images:
                image_number += 1
                print_status(f"[image {image_number}]")
            print_status(f"{number}: {write_marks(one)}\n{one.answer}")

    def save(self, folder: str) -> None:
        self.session.save(Path(folder).expanduser())
        print_status(f"[saved to {folder}]")

    def load(self, folder: str) -> None:
        settings = {"drop_oldest": self.session.drop_oldest}
        folder = Path(folder).expanduser()
        self.session = ChatSession.load(folder, self.session.model, self.session.processor, **settings)
        self.show()

    def clear(self) -> None:
        self.session.clear()
        self.attached = []


def print_status(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """
    The text as it can be shown in a terminal: in place of each character that the terminal would obey, such as the first one
    of an escape sequence, and of each invisible one, which may turn the direction of what follows, stands U+FFFD.
    """
    return "".join(
        "\ufffd" if unicodedata.category(character) in CONTROL_CATEGORIES and character not in HARMLESS else character
        for character in text
    )


def read_lines(history: Path) -> Iterator[str]:
    """Yields the lines that a person types, until Ctrl-C or Ctrl-D at the prompt."""
    import readline  # does not exist on Windows, and only a person needs it

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
    print_status(f"Loading {arguments.model} …")
    model = load_model(arguments.model, arguments.trust_remote_code, dtype="auto", device_map="auto")
    processor = load_processor(arguments.model, arguments.trust_remote_code)
    return model.start_chat(processor, system=arguments.system, drop_oldest=arguments.drop_oldest)


def run(arguments: argparse.Namespace) -> int:
    """Runs `visualchat chat` with these options. Returns the exit status."""
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

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text fails its line at most
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with input_errors(f"cannot chat with {arguments.model}: "):
        terminal = Terminal(start_session(arguments), generation, interactive)
        if arguments.load:
            terminal.load(arguments.load)
        if arguments.image:
            terminal.attach(*arguments.image)
    if interactive:
        print_status("Type a question, or /help for a list of the commands.")
    return terminal.run(read_lines(arguments.history) if interactive else iter(sys.stdin))
