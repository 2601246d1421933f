"""
What the checks of files cost: the checksum of an image memory, NaN in weights, and the hashes of a checkpoint, each against
the reading or writing that it goes with. Files are read from the page cache.

    OMP_NUM_THREADS=1 python -m benchmarks.checks
"""

import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks.measure import compare, interleave
from benchmarks.report import write_results
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM
from modeling_visualchat.image_memory_visualchat import ImageMemory
from modeling_visualchat.weight_checks_visualchat import find_not_finite
from modeling_visualchat.weight_fingerprint_visualchat import ModelWeights
from visualchat.training.checkpoints import write_manifest


# Layers, images, tokens of an image, key-value heads and head size of LLaMA-2-7B with CLIP ViT-L/14
MEMORY_SHAPE = (32, 1, 257, 32, 128)
# 0.6 billion parameters
TEXT = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 10, "num_attention_heads": 16}


def read_tensors(path: Path) -> None:
    with safe_open(path, framework="pt", backend="pread") as file:
        for name in file.keys():
            file.get_tensor(name)


def compare_memory_file(folder: Path, shape: tuple[int, ...], repeats: int) -> dict:
    memory = ImageMemory(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), fingerprint="0" * 64)
    path = folder / "memory.safetensors"
    memory.save(path)
    times = interleave({"ours": lambda: ImageMemory.load(path), "theirs": lambda: read_tensors(path)}, repeats)
    return compare(f"loading an image memory of {memory.nbytes / 1e6:.0f} MB, against reading its tensors", **times)


def compare_weights(folder: Path, text: dict, repeats: int) -> dict:
    config = VisualChatConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(num_hidden_layers=2))
    model = VisualChatForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    weights, path = ModelWeights(model), folder / "model.safetensors"
    times = interleave({"ours": lambda: find_not_finite(weights), "theirs": lambda: read_tensors(path)}, repeats)
    size = path.stat().st_size / 1e9
    return compare(f"looking for NaN in {size:.1f} GB of weights in bf16, against reading them from files", **times)


def compare_manifest(folder: Path, numbers: int, repeats: int) -> dict:
    tensors, path = {"weights": torch.randn(numbers)}, folder / "weights.safetensors"
    sides = {"ours": lambda: write_manifest(folder, step=1, world_size=1), "theirs": lambda: save_file(tensors, path)}
    save_file(tensors, path)
    times = interleave(sides, repeats)
    return compare(f"hashing a checkpoint of {4 * numbers / 1e9:.1f} GB in one file, against writing it", **times)


def main():
    torch.manual_seed(0)
    results = []
    for measure, size in ((compare_memory_file, MEMORY_SHAPE), (compare_weights, TEXT), (compare_manifest, 250_000_000)):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(Path(folder), size, repeats=7))
    write_results("checks", results)


if __name__ == "__main__":
    main()
