# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
README.md and the pages of docs/ are true: their Python runs, their commands have these options, their files and links exist.

Blocks marked `python` run as they stand, those of a page one after the other, in a folder in which `make demo` seems to have
run. Of the blocks marked `sh`, the commands are read by their own parsers; two of them run. Blocks marked `py` are not run.
"""

import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from transformers import LlamaForCausalLM

from helpers.prompts import DESIGN_PROMPT
from helpers.tiny import digit_image, make_model, make_processor
from modeling_visualchat import VisualChatForCausalLM
from visualchat.cli import COMMANDS
from visualchat.training.train import parse_arguments as parse_training


ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
FOLDERS = "src|examples|benchmarks|docs|hub_configs|tests"


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands_of(page: str) -> list[str]:
    """Lines of its `sh` blocks, without comments; a backslash at the end joins a line with the next one."""
    lines = "".join(blocks_of(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


VISUALCHAT = [(page, command) for page in PAGES for command in commands_of(page) if "visualchat " in command]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder with what `make demo` leaves, of random weights."""
    folder = tmp_path_factory.mktemp("documents")
    make_model(image_number_keys=True).save_pretrained(folder / "outputs/demo/model")
    make_processor().save_pretrained(folder / "outputs/demo/model")
    (folder / "outputs/demo/conversation").mkdir()
    for number in (1, 2):
        digit_image(number).save(folder / f"outputs/demo/conversation/image-{number}.png")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")])
def test_python_blocks_run(page, demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    names = {"__name__": "documents"}
    for number, block in enumerate(blocks_of(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize(("page", "command"), VISUALCHAT, ids=[f"{page}: {command[:60]}" for page, command in VISUALCHAT])
def test_commands_have_these_options(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.split("| ")[-1])[1:]
    taken = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
    words = words[len(taken.split()) :]
    if taken == "train":
        parse_training([*words, "--use_cpu", "--bf16", "False"])
    else:
        importlib.import_module(f"visualchat.cli.{taken.replace(' ', '_')}").parse_arguments(words)


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_scripts_of_commands_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    text = PAGES[page]
    for module in re.findall(r"python -m ([a-z_0-9.]+[a-z_0-9])", text):
        assert importlib.util.find_spec(module), f"{page}: python -m {module}"
    assert "python examples/" not in text and "python benchmarks/" not in text, f"{page}: scripts there are modules"


@pytest.mark.parametrize("begins", ["echo ", "visualchat evaluate outputs/demo/model --conversations"])
def test_commands_that_run_as_written(begins, demo):
    """The tests of the commands run the others, with folders of their own."""
    command = next(command for page in PAGES for command in commands_of(page) if command.startswith(begins))
    (demo / "images").mkdir(exist_ok=True)
    digit_image(0).save(demo / "images/a.png")
    (demo / "eval.json").write_text(json.dumps({"one": [["Which digit?", "a.png"], ["Sure?"]]}))
    command = re.sub(r"\bvisualchat ", f"{sys.executable} -m visualchat ", command)
    done = subprocess.run(command, shell=True, cwd=demo, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if begins == "echo ":
        assert done.stdout.strip()
    else:
        assert (demo / "outputs/asked/report.html").exists()


def test_the_readme_is_short_and_names_every_page():
    readme = PAGES["README.md"]
    assert readme.count("\n") <= 200
    assert len([line for line in blocks_of("README.md", "python")[0].splitlines() if line.strip()]) <= 12
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in readme, f"the README has no link to {page}"


def anchors_of(text: str) -> set[str]:
    """The headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors_of(path.read_text()), f"{page}: {link}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page):
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), f"{page}: {path}"


def test_joining_a_tower_and_a_decoder(tmp_path):
    block = next(block for block in blocks_of("docs/training.md", "py") if "from_vision_text_pretrained" in block)
    model, processor = make_model(text={"vocab_size": 320}, image_token_id=5), make_processor()
    model.model.vision_tower.save_pretrained(tmp_path / "vision")
    processor.image_processor.save_pretrained(tmp_path / "vision")
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "text")
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    block = block.replace("openai/clip-vit-large-patch14", str(tmp_path / "vision"))
    block = block.replace("meta-llama/Llama-2-7b-hf", str(tmp_path / "text"))
    names = {}
    exec(compile(block, "docs/training.md", "exec"), names)
    assert isinstance(names["model"], VisualChatForCausalLM)
    assert names["processor"].image_seq_length == names["model"].config.image_seq_length == 5


def test_the_prompt_is_the_templates():
    assert DESIGN_PROMPT in PAGES["docs/data.md"]


def test_the_tree_names_every_file():
    tree = PAGES["docs/architecture.md"].split("## The tree")[1]
    for folder in ("src/modeling_visualchat", "src/visualchat", "examples/digits_demo", "examples/pictures", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            known = path.name in tree or path.name in ("__init__.py", "__main__.py")
            assert known, f"{path.relative_to(ROOT)} is missing in docs/architecture.md"
    for name in re.findall(r"\b\w+\.py\b", tree):
        assert list(ROOT.glob(f"*/**/{name}")), f"docs/architecture.md names {name}, which does not exist"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in {**PAGES, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}.items():
        targets = set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)`", text))
        for target in targets:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"


def test_the_figure_is_drawn_by_its_script(tmp_path):
    main = runpy.run_path(str(ROOT / "docs" / "mmca_figure.py"))["main"]
    main(tmp_path / "mmca.png")
    drawn, committed = Image.open(tmp_path / "mmca.png"), Image.open(ROOT / "docs" / "mmca.png")
    assert drawn.size == committed.size
    assert ImageChops.difference(drawn.convert("L"), committed.convert("L")).getextrema()[1] < 64
