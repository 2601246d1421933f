"""The README is true: its Python runs, its files exist, its prompt is the template's."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from transformers import LlamaForCausalLM

from helpers.prompts import DESIGN_PROMPT
from helpers.tiny import digit_image, make_model, make_processor
from modeling_visualchat import VisualChatForCausalLM


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=[f"block {k + 1}" for k in range(len(PYTHON_BLOCKS))])
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(image_number_keys=True).save_pretrained("outputs/demo/model")
    make_processor().save_pretrained("outputs/demo/model")
    digit_image(0).save("first.png")
    digit_image(1).save("second.png")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("begins", ["echo ", "python examples/evaluate.py --conversations"])
def test_commands_without_a_server_run_as_written(begins, tmp_path):
    """The tests of the other scripts run them with their own folders."""
    command = next(line for line in README.splitlines() if line.startswith(begins))
    make_model(image_number_keys=True).save_pretrained(tmp_path / "outputs/demo/model")
    make_processor().save_pretrained(tmp_path / "outputs/demo/model")
    (tmp_path / "pictures").mkdir()
    for path in (tmp_path / "first.png", tmp_path / "pictures/a.png"):
        digit_image(0).save(path)
    (tmp_path / "eval.json").write_text(json.dumps({"one": [["Which digit?", "a.png"], ["Sure?"]]}))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if begins == "echo ":
        assert done.stdout.strip()
    else:
        assert (tmp_path / "outputs/asked/report.html").exists()


def test_the_first_block_takes_ten_lines():
    statements = [line for line in PYTHON_BLOCKS[0].splitlines() if line.strip()]
    assert len(statements) <= 12


def test_joining_a_tower_and_a_decoder_as_the_readme_does(tmp_path, monkeypatch):
    block = re.search(r"```py\n(.*?)```", README, flags=re.DOTALL).group(1)
    model, processor = make_model(text={"vocab_size": 320}, image_token_id=5), make_processor()
    model.model.vision_tower.save_pretrained(tmp_path / "vision")
    processor.image_processor.save_pretrained(tmp_path / "vision")
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "text")
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    block = block.replace("openai/clip-vit-large-patch14", str(tmp_path / "vision"))
    block = block.replace("meta-llama/Llama-2-7b-hf", str(tmp_path / "text"))
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["model"], VisualChatForCausalLM)
    assert names["processor"].image_seq_length == names["model"].config.image_seq_length == 5


def test_the_prompt_is_the_templates():
    assert DESIGN_PROMPT in README


def test_the_tree_names_every_file():
    tree = README.split("## The tree")[1]
    for folder in ("src/modeling_visualchat", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name in tree or path.name == "__init__.py", f"{folder}/{path.name} is missing in the README's tree"
    for name in re.findall(r"^  (\S+\.py)", tree, flags=re.MULTILINE):
        assert list(ROOT.glob(f"*/**/{name}")), f"the README names {name}, which does not exist"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        targets = set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)`", text))
        for target in targets:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{document}: make {target}"


def test_the_figure_is_drawn_by_its_script(tmp_path):
    main = runpy.run_path(str(ROOT / "docs" / "mmca_figure.py"))["main"]
    main(tmp_path / "mmca.png")
    drawn, committed = Image.open(tmp_path / "mmca.png"), Image.open(ROOT / "docs" / "mmca.png")
    assert drawn.size == committed.size
    assert ImageChops.difference(drawn.convert("L"), committed.convert("L")).getextrema()[1] < 64
