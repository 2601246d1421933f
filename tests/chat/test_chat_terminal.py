"""The terminal chat, driven through a pseudo-terminal and through a pipe, as people and scripts do."""

import io
import os
import re
import subprocess
from pathlib import Path

import pexpect
import pytest
from transformers import LlamaConfig

from helpers.commands import command
from helpers.tiny import digit_image, make_model, make_processor
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
        "There is no command /nonsense: /help lists them",
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
    assert "its oldest rounds were dropped" in said


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
    assert ask(terminal, "/retry") == "There is nothing to ask again"
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
    assert ask(terminal, "/undo") == "[taken back: And?]"
    assert ask(terminal, "/undo") == "[taken back: What are these?]"
    assert ask(terminal, "/clear") == ""
    assert ask(terminal, "/show") == ""
    assert ask(terminal, "/load 'my chat'").endswith(second)
    assert ask(terminal, "/retry") == second
    assert "Say which question" in ask(terminal, "/edit What?")
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
    assert ask(terminal, "/undo") == "[taken back: Write.]"
    terminal.sendline("/quit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
