"""The terminal chat, driven through a pseudo-terminal and through a pipe, as people and scripts do."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from transformers import LlamaConfig

from helpers.chat import PROCESSOR, writes
from helpers.commands import command
from helpers.tiny import digit_image, make_model, make_processor
from visualchat.chat.terminal import Terminal, printable
from visualchat.cli import main as visualchat


PROMPT = "\n> "
# One thread: the tests' own process, and the answer's, need no more
ENVIRONMENT = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    model = make_model(image_number_keys=True)
    letters = make_processor().tokenizer.convert_tokens_to_ids(list("abcdefghij"))  # no end: answers are as long as allowed
    model.generation_config.suppress_tokens = sorted(set(range(model.config.text_config.vocab_size)) - set(letters))
    model.save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    for k in range(3):
        digit_image(k).save(folder / f"digit {k}.png")
    return folder


def run_piped(folder: Path, lines: str, *options: str) -> subprocess.CompletedProcess:
    words = command("chat", "model", *options)
    return subprocess.run(
        words, input=lines, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


def test_piped(folder):
    lines = """What is it?
/image 'digit 1.png' nowhere.png
/image digit\\ 1.png 'digit 2.png'
And these?
/edit 1 Who is it?
/nonsense
/save
/image 'digit 1.png
/show
/quit
Never asked.
"""
    run = run_piped(folder, lines, "--image", "digit 0.png", "--max-new-tokens", "8")
    assert run.returncode == 1
    answers = run.stdout.splitlines()
    assert len(answers) == 3
    assert all(re.fullmatch(r"[a-j]{1,40}", answer) for answer in answers)
    for message in (
        "Loading model",
        "[image 1: digit 0.png]",
        "nowhere.png: there is no file nowhere.png",
        "[image 2: digit 1.png]\n[image 3: digit 2.png]",
        "There is no command /nonsense. Type /help for a list of the commands",
        "/save takes 1 argument, got 0: see /help",
        "No closing quotation",
        f"[image 1]\n1: Who is it?\n{answers[2]}\n",
    ):
        assert message in run.stderr
    assert "And these?" not in run.stderr  # the edit dropped it
    assert "Loading weights: 100%" in run.stderr
    assert "\x1b" not in run.stdout + run.stderr
    assert "> " not in run.stdout


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """Runs the program in this process: its exit status, what it printed as answers, and what else it said."""
    monkeypatch.chdir(folder)

    def run(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return visualchat(["chat", *arguments]), *capsys.readouterr()

    return run


def test_sampled_answers_are_repeatable_and_a_clean_run_exits_with_0(chat):
    options = ["--temperature", "1.5", "--top-p", "0.9", "--max-new-tokens", "8", "--system", "Be brief."]
    first, second, other = (chat("Hello.\n\nHow are you?\n", "model", *options, "--seed", seed) for seed in "334")
    assert first[1] == second[1]
    assert first[0] == second[0] == other[0] == 0
    assert first[1] != other[1]
    assert len(first[1].splitlines()) == 2


def test_what_cannot_be_loaded_is_named(chat, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    for arguments, message in (
        (["model", "--image", "none.png"], "there is no file none.png"),
        (["model", "--load", "none"], "none/conversation.json"),
        ([str(tmp_path / "none")], str(tmp_path / "none")),
        ([str(tmp_path)], "type 'llama', not 'visualchat'"),
    ):
        status, answers, said = chat("Hello.\n", *arguments)
        assert (status, answers) == (2, "")
        assert message in said


def test_long_conversations(chat):
    question = "y" * 400 + "\n"
    status, answers, said = chat(question * 3, "model", "--max-new-tokens", "8")
    assert (status, len(answers.splitlines())) == (1, 2)
    assert "but the model's context holds 1024" in said
    status, answers, said = chat(question * 3, "model", "--max-new-tokens", "8", "--drop-oldest")
    assert (status, len(answers.splitlines())) == (0, 3)
    assert "the oldest rounds were dropped" in said


def save(folder: Path, **fields) -> None:
    one = {"text": "What?", "images": [], "answer": "This.", **fields}
    folder.mkdir(exist_ok=True)
    (folder / "conversation.json").write_text(json.dumps({"system": None, "dropped_rounds": 0, "rounds": [one]}))


def test_a_conversation_that_cannot_be_loaded_leaves_the_one_that_there_is(chat, tmp_path):
    digit_image(0).save(tmp_path / "private.png")
    bad = ({"text": 3}, {"answer": "\ud800"}, {"images": ["../private.png"]}, {"images": ["\x1b[2J.png"]}, {"images": [[]]})
    for k, fields in enumerate(bad):
        save(tmp_path / f"bad {k}", **fields)
    (tmp_path / "bad 5").mkdir()
    (tmp_path / "bad 5" / "conversation.json").write_text("[" * 100_000)
    loads = "".join(f"/load '{tmp_path}/bad {k}'\n" for k in range(6))
    status, answers, said = chat(f"Hello.\n{loads}/show\nAnd?\n", "model", "--max-new-tokens", "8")
    first, *others = answers.splitlines()
    assert status == 1 and len(others) == 1
    assert said.endswith(f"1: Hello.\n{first}\n") and "\x1b" not in said
    for k, where in enumerate(("rounds[0].text", "rounds[0].answer", *["rounds[0].images[0]"] * 3, "nested too deeply")):
        assert any(f"bad {k}/conversation.json" in line and where in line for line in said.splitlines())


HOSTILE = "a\x1b[2J\x9b\x07\u202eb\r\ud800 \u3000c\u200dd\n\te"
SHOWN = "a\ufffd[2J\ufffd\ufffd\ufffdb\ufffd\ufffd \u3000c\u200dd\n\te"


def test_everything_that_is_printed_is_printable(chat, tmp_path):
    assert printable(HOSTILE) == SHOWN
    text, shown = (one.replace("\ud800", "") for one in (HOSTILE, SHOWN))
    save(tmp_path / "saved", text=text, answer=text)
    name = str(tmp_path / "\x1b[2J.png")
    digit_image(0).save(name)
    lines = f"/load '{tmp_path}/saved'\n/image '{name}'\n/image '{name}none'\n/undo\n\x1b[2J\n/\x1b[2J\n"
    _, _, said = chat(lines, "model", "--max-new-tokens", "2")
    assert "\x1b" not in said and "\u202e" not in said
    shown = shown.replace("\ufffdb\ufffd\ufffd", "\ufffdb\ufffd")
    assert f"1: {shown}\n{shown}\n[image 1: " in said and f"[removed: {shown}]" in said
    assert "There is no command /\ufffd[2J" in said and "there is no file" in said


def test_answers_are_printable_in_a_terminal_and_as_they_are_in_a_file(folder, capsys, monkeypatch):
    model = make_model(image_number_keys=True)
    for is_terminal, expected in ((True, "red \ufffd[31m\n"), (False, "red \x1b[31m\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with writes(model, "red \x1b[31m"):
            assert Terminal(model.start_chat(PROCESSOR), {}, interactive=False).run(["What?"]) == 0
        assert capsys.readouterr().out == expected


def test_a_panic_of_the_tokenizer_fails_its_line_only(capsys, monkeypatch):
    class PanicException(BaseException):
        """As pyo3's."""

    model = make_model(image_number_keys=True)
    terminal = Terminal(model.start_chat(PROCESSOR), {"max_new_tokens": 2}, interactive=False)
    assert terminal.run(["One?"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(type(PROCESSOR), "encode_prompts", lambda *_: (_ for _ in ()).throw(PanicException("out of bounds")))
        assert terminal.run(["Two?"]) == 1
    assert terminal.run(["Three?"]) == 0
    assert "The tokenizer cannot read this: out of bounds" in capsys.readouterr().err
    assert [one.text for one in terminal.session.rounds] == ["One?", "Three?"]


def test_bytes_that_are_no_text_fail_nothing(folder):
    words = command("chat", "model", "--max-new-tokens", "2")
    run = subprocess.run(
        words, input=b"What \xff is it?\nAnd?\n", cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=120, check=False
    )
    assert run.returncode == 0 and len(run.stdout.decode().splitlines()) == 2


def ask(terminal: pexpect.spawn, line: str) -> str:
    """Types a line and returns what is printed before the next prompt."""
    terminal.sendline(line)
    terminal.expect_exact(PROMPT)
    printed = terminal.before.replace("\r", "")
    return printed.split(line, 1)[-1].strip()


def begin(folder: Path, *options: str) -> pexpect.spawn:
    python, *arguments = command("chat", "model", "--max-new-tokens", "8", "--history", "history", *options)
    terminal = pexpect.spawn(
        python, arguments, cwd=str(folder), env=ENVIRONMENT, encoding="utf-8", timeout=90, dimensions=(40, 1000)
    )
    terminal.expect_exact("Loading weights")
    terminal.expect_exact(PROMPT)
    return terminal


def test_a_conversation_in_a_terminal(folder):
    terminal = begin(folder)
    assert "/image PATH…" in ask(terminal, "/help")
    assert ask(terminal, "/undo") == "There is nothing to take back: the conversation has no rounds"
    assert ask(terminal, "/retry") == "There is no question to ask again"
    assert "there is no file none.png" in ask(terminal, "/image none.png")
    assert ask(terminal, "/image 'digit 0.png'") == "[image 1: digit 0.png]"
    assert ask(terminal, "/image 'digit 1.png'") == "[image 2: digit 1.png]"
    first = ask(terminal, "What are these?")
    assert re.fullmatch(r"[a-j]{1,40}", first)
    second = ask(terminal, "And?")
    assert ask(terminal, "/retry") == second
    assert ask(terminal, "/show").split("\n") == ["[image 1]", "[image 2]", "1: What are these?", first, "2: And?", second]
    assert ask(terminal, "/save 'my chat'") == "[saved to my chat]"
    assert {path.name for path in (folder / "my chat").iterdir()} == {"conversation.json", "image-1.png", "image-2.png"}
    assert ask(terminal, "/undo") == "[removed: And?]"
    assert ask(terminal, "/undo") == "[removed: What are these?]"
    assert ask(terminal, "/clear") == ""
    assert ask(terminal, "/show") == ""
    assert ask(terminal, "/load 'my chat'").endswith(second)
    assert ask(terminal, "/retry") == second
    assert "Give the number of a question" in ask(terminal, "/edit What?")
    assert "There is no round 6" in ask(terminal, "/edit 7 What?")
    assert ask(terminal, "/edit 1 What are these?") == first
    terminal.send("\x1b[A\x1b[A")  # the arrow keys walk through the history
    terminal.expect_exact("/edit 7 What?")
    terminal.sendcontrol("c")  # leaves, at the prompt
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert "What are these?" in (folder / "history").read_text()

    terminal = begin(folder, "--load", "my chat")
    assert ask(terminal, "/retry") == second
    terminal.sendcontrol("d")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(folder):
    terminal = begin(folder, "--max-new-tokens", "900")
    terminal.sendline("Write.")
    terminal.expect(r"Write\.\r\n[a-j]{10}")  # it is being written
    terminal.sendcontrol("c")
    terminal.expect_exact("[stopped]")
    terminal.expect_exact(PROMPT)
    shown = ask(terminal, "/show")
    assert re.fullmatch(r"1: Write\.\n[a-j]{10,}", shown)
    assert ask(terminal, "/image 'digit 0.png'") == "[image 1: digit 0.png]"
    too_long = ask(terminal, "y" * 900)
    assert "tokens and the answer up to 900, but the model's context holds 1024" in too_long
    assert ask(terminal, "/undo") == "[removed: Write.]"
    terminal.sendline("/quit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
