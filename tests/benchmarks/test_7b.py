# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""A model of 7 billion parameters, random but of full size: written, loaded and asked about two pictures within 20 GB."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from tokenizers import Tokenizer
from transformers import AutoConfig, CLIPImageProcessorPil, PreTrainedTokenizerFast

from benchmarks import load_7b
from helpers.elsewhere import PRELUDE
from helpers.tiny import make_tokenizer
from modeling_visualchat import VisualChatProcessor


ROOT = Path(__file__).parents[2]
LIMIT = 20  # GB, 10⁹ bytes
NEEDED_MEMORY, NEEDED_DISK = 17, 16  # GB

ANSWER = """
import json
from PIL import Image

model = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", low_cpu_mem_usage=True
)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
pictures = [Image.open(f"{folder}/{name}.png") for name in ("china", "flower")]
parts = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "What differs?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
print(json.dumps({
    "class": type(model).__name__,
    "dtypes": sorted({str(weight.dtype) for weight in model.parameters()}),
    "parameters": sum(weight.numel() for weight in model.parameters()),
    "image_tokens": int((inputs["input_ids"] == model.config.image_token_id).sum()),
    "new_tokens": tokens.shape[1] - inputs["input_ids"].shape[1],
}))
"""


def available_memory() -> float:
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024 / 1e9


def make_processor_of_7b() -> VisualChatProcessor:
    """That of `hub_configs/7b`. In the place of LLaMA's tokenizer, which is licensed, the tests' with 32,000 tokens."""
    small = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = small["model"]["vocab"]
    vocabulary |= {f"<unused {index}>": index for index in range(len(vocabulary), 32000)}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(small)), **special)
    image_processor = CLIPImageProcessorPil.from_pretrained(ROOT / "hub_configs" / "7b")
    return VisualChatProcessor(image_processor, tokenizer, image_seq_length=257)


@pytest.mark.slow
def test_7b_is_written_loaded_and_asked_about_two_pictures_within_20_gb(tmp_path):
    if not Path("/proc/meminfo").exists():
        pytest.skip("needs Linux, which says how much memory a process takes")
    if available_memory() < NEEDED_MEMORY:
        pytest.skip(f"needs {NEEDED_MEMORY} GB of memory, {available_memory():.0f} are available")
    if (free := shutil.disk_usage(tmp_path).free / 1e9) < NEEDED_DISK:
        pytest.skip(f"needs {NEEDED_DISK} GB of disk in {tmp_path}, {free:.0f} are free")
    try:
        written = load_7b.run_alone("write", str(tmp_path))
        sizes = [path.stat().st_size for path in tmp_path.glob("model-*.safetensors")]
        assert len(sizes) == 3 and max(sizes) <= 5e9 and sum(sizes) > 14e9
        processor = make_processor_of_7b()
        assert processor.image_token_id == AutoConfig.from_pretrained(tmp_path).image_token_id == 32000
        processor.save_pretrained(tmp_path)
        for name in ("china", "flower"):
            Image.fromarray(load_sample_image(f"{name}.jpg")).save(tmp_path / f"{name}.png")

        # A fresh process, which knows this package through the folder alone
        script = f"{PRELUDE}folder = {str(tmp_path)!r}\n{ANSWER}"
        output, asked = load_7b.run_watched([sys.executable, "-c", script], cwd=tmp_path)
    finally:
        for path in tmp_path.glob("*.safetensors"):  # pytest would keep 14 GB
            path.unlink()
    assert json.loads(output.splitlines()[-1]) == {
        "class": "VisualChatForCausalLM",
        "dtypes": ["torch.bfloat16"],
        "parameters": 7_045_810_176,
        "image_tokens": 2 * 257,
        "new_tokens": 3,
    }
    print(f"GB at most, written: {written}, loaded and asked: {asked}")
    assert max(written["resident"], asked["resident"]) < LIMIT
