# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The files of a model folder, checked before anything is loaded: what each says, and whether all weights are there."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor, PreTrainedConfig, ProcessorMixin
from transformers.activations import ACT2FN
from transformers.core_model_loading import revert_weight_conversion

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Fields of the tower's and the decoder's config that are counts
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels"),
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def read_json(path: Path) -> dict:
    """
    Raises:
        ValueError: If a file is no JSON, or no object. The error names it.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        refuse_lfs_pointer(path)
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object with fields")
    return content


def refuse_lfs_pointer(path: Path) -> None:
    """
    Raises:
        ValueError: If a file is what git leaves in the place of a large one.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS in place of the file: run `git lfs pull` in its folder")


def read_config(name: str) -> VisualChatConfig:
    """
    Args:
        name (`str`): Folder or Hub id of a VisualChat.

    Raises:
        ValueError: If a field has a wrong type or value. The error is one line and names file and field.
    """
    fields, _ = PreTrainedConfig.get_config_dict(name)
    for part in ("vision_config", "text_config"):
        section = fields.get(part)
        for field, value in section.items() if isinstance(section, dict) else ():
            where = f"{name}/config.json: {part}.{field} is {value!r:.50}"
            if field in SIZES and isinstance(value, int) and value < 1:
                raise ValueError(f"{where}, but must be 1 or more")
            if field == "hidden_act" and isinstance(value, str) and value not in ACT2FN:
                raise ValueError(f"{where}, which transformers does not know")
    with _one_line(f"{name}/config.json is no config of a VisualChat"):
        return VisualChatConfig.from_pretrained(name)


def make_empty_model(name: str) -> VisualChatForCausalLM:
    """
    A model without weights, as a config describes it.

    Args:
        name (`str`): Folder or Hub id of a VisualChat.

    Raises:
        ValueError: If the config describes none; see also [`read_config`].
    """
    config = read_config(name)
    with _one_line(f"{name}/config.json describes no model"), torch.device("meta"):
        return VisualChatForCausalLM(config)


@contextmanager
def _one_line(prefix: str) -> Iterator[None]:
    """Turns whatever a wrong value raises where it is used first, in transformers or torch, into a `ValueError`."""
    try:
        yield
    except (OSError, ImportError):  # no fault of a value
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{prefix}: {reason:.300}") from error


def load_described_processor(name: str, **kwargs) -> ProcessorMixin:
    """
    `AutoProcessor.from_pretrained`.

    Raises:
        ValueError: If one of its files is damaged, or has a field of a wrong type. The error is one line.
    """
    for file in PROCESSOR_FILES:
        if (Path(name) / file).is_file():
            read_json(Path(name) / file)
    with _one_line(f"{name} describes no processor"):
        return AutoProcessor.from_pretrained(name, **kwargs)


def find_tensors(folder: Path, stem: str) -> dict[str, tuple[Path, tuple[int, ...]]] | None:
    """
    Reads the headers of a folder's safetensors files.

    Args:
        folder (`Path`): Of a model or an adapter.
        stem (`str`): `"model"` or `"adapter_model"`.

    Returns:
        File and shape of each tensor by name, or `None` if there are no safetensors files.

    Raises:
        FileNotFoundError, ValueError: If a file is missing, cut off or something else. The error names it.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return {name: (whole, shape) for name, shape in read_header(whole).items()}
    if not index.is_file():
        return None
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    headers = {}
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}, which {index.name} names, is missing")
        headers[file] = read_header(folder / file)
    for name, file in files.items():
        if name not in headers[file]:
            raise ValueError(f"{folder / file}: the tensor {name}, which {index.name} says it holds, is missing")
    return {name: (folder / file, shape) for file, header in headers.items() for name, shape in header.items()}


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """
    The shapes of a safetensors file's tensors, by name.

    Raises:
        ValueError: If the file is cut off or something else.
    """
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off, or is no safetensors file: {error}") from error


def check_tensors(folder: Path, found: dict[str, tuple[Path, tuple[int, ...]]] | None, model: VisualChatForCausalLM) -> None:
    """
    Checks that a folder's safetensors files hold all weights of a model, in its shapes, and no others. Their names are those
    that transformers saves them by, which are others for DINO's towers, or the model's own, as DeepSpeed gathers them. Of
    tied weights one is enough. Quantized folders hold other tensors, and pass.

    Args:
        folder (`Path`): Of the model.
        found (`dict`, *optional*): What [`find_tensors`] found there.
        model (`VisualChatForCausalLM`): Without weights.

    Raises:
        ValueError: If a weight is missing, has another shape or is one too many. The error names it and its file.
    """
    if found is None or getattr(model.config, "quantization_config", None):
        return
    tied = {**model.all_tied_weights_keys, **{source: name for name, source in model.all_tied_weights_keys.items()}}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing]
    own = model.state_dict()
    weights = min(own, revert_weight_conversion(model, own), key=lambda named: len(named.keys() - found.keys()))
    needed = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong = []
    for name, shape in needed.items():
        if name in found and found[name][1] != shape:
            path, in_file = found[name]
            wrong.append(f"{path}: the tensor {name} has the shape {in_file}, but config.json needs {shape}")
        elif not (name in found or tied.get(name) in found or any(pattern.search(name) for pattern in optional)):
            files = sorted({path for path, _ in found.values()})
            where = files[0] if len(files) == 1 else folder / "model.safetensors.index.json"
            wrong.append(f"{where}: the tensor {name} is missing")
    for name in sorted(found.keys() - needed.keys()):
        wrong.append(f"{found[name][0]}: the tensor {name} belongs to no part of the model that config.json describes")
    if wrong:
        raise ValueError(wrong[0] + (f"; {len(wrong)} of {len(needed)} tensors are wrong" if len(wrong) > 1 else ""))


def check_finite(folder: Path, stem: str) -> None:
    """
    Reads all tensors of a folder.

    Raises:
        ValueError: If one holds NaN or infinity. The error names it and its file.
    """
    for path in sorted({path for path, _ in (find_tensors(folder, stem) or {}).values()}):
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.keys():
                if not file.get_tensor(name).isfinite().all():
                    raise ValueError(f"{path}: the tensor {name} holds NaN or infinity")
