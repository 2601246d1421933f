"""The short examples run as their docstrings say, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.tiny import make_model, make_processor


ROOT = next(parent for parent in Path(__file__).parents if (parent / "setup.cfg").exists())
EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder(tmp_path) -> Path:
    make_model(image_number_keys=True).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(name: str, *words, folder: Path | None = None) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_chat(folder):
    assert len(re.findall(r"^> .*image 1", run("chat.py", folder), flags=re.MULTILINE)) == 2


def test_image_memory(folder, tmp_path):
    assert run("image_memory.py", folder, folder=tmp_path).strip()
    assert (tmp_path / "three.safetensors").exists()


@pytest.mark.parametrize("use_lora", [False, True])
def test_finetune(use_lora, folder, tmp_path):
    words = ["--model_name_or_path", folder, "--output_dir", tmp_path / "out", "--max_steps", 2, "--use_cpu"]
    run("finetune.py", *words, "--report_to", "none", *["--use_lora"] * use_lora)
    assert (tmp_path / "out/processor_config.json").exists()
    if use_lora:
        assert any("lora_A" in name for name in load_file(tmp_path / "out/adapter_model.safetensors"))
        return
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("multi_modal_projector" in name or "embed_tokens" in name for name in moved)


def test_the_readme_names_every_file_and_folder():
    text = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert path.name in text
