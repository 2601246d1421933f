# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Loads models and processors for the commands, without running code that comes with them unless that is asked for."""

from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

# At the top of transformers, older versions have one that needs torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils.peft_utils import find_adapter_config_file

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor
from visualchat.hub.push import is_hub_id
from visualchat.model_files import (
    check_finite,
    check_tensors,
    find_tensors,
    load_described_processor,
    make_empty_model,
    read_config,
    read_json,
)


def check_name(name: str) -> None:
    """
    Raises:
        FileNotFoundError: If a name is no folder here, and cannot be a Hub id either.
    """
    if not Path(name).is_dir() and not is_hub_id(name):
        raise FileNotFoundError(f"there is no folder {name}")


def check_part(name: str) -> None:
    """
    Checks that the weight files of a tower or a decoder, if it is a folder, are whole.

    Raises:
        FileNotFoundError, ValueError: If there is no such folder, or a file is missing, cut off or something else.
    """
    check_name(name)
    if Path(name).is_dir():
        find_tensors(Path(name), "model")


def check_model_type(name: str, trust_remote_code: bool = False) -> None:
    """
    Refuses a model of another type, or with a damaged config, before anything else of it is read. This package registers
    VisualChat's classes, so transformers takes them instead of code in the folder.

    Args:
        name (`str`): Folder or Hub id.
        trust_remote_code (`bool`): Let other types pass, which bring code of their own.

    Raises:
        OSError: If there is no config of that name.
        ValueError: If the model is of another type, or its config is damaged. The error names the file.
    """
    check_name(name)
    if (Path(name) / "config.json").is_file():
        config = read_json(Path(name) / "config.json")
    else:
        config, _ = PreTrainedConfig.get_config_dict(name)
    if not config:
        raise OSError(f"{name} is neither a folder with a config.json nor a model on the Hub that can be read")
    model_type = config.get("model_type")
    if model_type == VisualChatConfig.model_type:
        read_config(name)
        return
    if trust_remote_code:
        return
    brings = " It brings code of its own, which runs only with --trust-remote-code." if "auto_map" in config else ""
    raise ValueError(f"{name} holds a model of the type {model_type!r}, not 'visualchat'.{brings}")


def load_model(name: str, trust_remote_code: bool = False, **kwargs) -> VisualChatForCausalLM:
    """
    A model. A PEFT adapter is merged into its base, which needs the extra `train`.

    Args:
        name (`str`): Folder or Hub id of a model or an adapter.
        trust_remote_code (`bool`): Run code that comes with the model, if it is of another type than this package's.
        kwargs: As for `AutoModel.from_pretrained`.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it is of another type, or if its config or weights are damaged. The error names the file, and the
            field or the tensor.
    """
    check_name(name)
    if find_adapter_config_file(name) is not None:
        return load_merged(name, trust_remote_code=trust_remote_code, **kwargs)
    return _load_whole(name, trust_remote_code, **kwargs)


def _load_whole(name: str, trust_remote_code: bool, **kwargs) -> VisualChatForCausalLM:
    """A model that is no adapter, checked before and after it is loaded."""
    check_model_type(name, trust_remote_code)
    if PreTrainedConfig.get_config_dict(name)[0]["model_type"] != VisualChatConfig.model_type:
        return AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    folder, found = Path(name), None
    if folder.is_dir():
        if (folder / "generation_config.json").is_file():
            read_json(folder / "generation_config.json")
        found = find_tensors(folder, "model")
    if not is_deepspeed_zero3_enabled():  # which would share out this model too
        check_tensors(folder, found, make_empty_model(name))
    model = AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    model.check_weights()
    return model


def load_merged(adapter: str, base: str | None = None, trust_remote_code: bool = False, **kwargs) -> VisualChatForCausalLM:
    """
    Args:
        adapter (`str`): Folder or Hub id.
        base (`str`, *optional*): Folder or Hub id. By default the adapter names it.
        trust_remote_code (`bool`): Run code that comes with the base, if it is of another type than this package's.
        kwargs: As for `AutoModel.from_pretrained` of the base.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it is no adapter, or if its base is of another type, or if the weights of one are damaged. The error
            names file and tensor.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict  # of the extra `train`

    check_name(adapter)
    if (Path(adapter) / "adapter_config.json").is_file():
        read_json(Path(adapter) / "adapter_config.json")
        check_finite(Path(adapter), "adapter_model")
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    adapted = PeftModel.from_pretrained(_load_whole(base, trust_remote_code, **kwargs), adapter)
    found = find_tensors(Path(adapter), "adapter_model")
    if found is not None and (missing := sorted(set(get_peft_model_state_dict(adapted)) - set(found))):
        count = f"; {len(missing)} tensors are" if len(missing) > 1 else ""
        raise ValueError(f"{Path(adapter) / 'adapter_model.safetensors'}: the tensor {missing[0]} is missing{count}")
    return adapted.merge_and_unload()


def load_processor(name: str, trust_remote_code: bool = False) -> VisualChatProcessor:
    """
    Args:
        name (`str`): Folder or Hub id of a model or an adapter.
        trust_remote_code (`bool`): Run code that comes with the processor, if this package has no such class.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it is no processor of a VisualChat model, or if one of its files is damaged. The error names the file.
    """
    check_name(name)
    if find_adapter_config_file(name) is None:
        check_model_type(name, trust_remote_code)
    if Path(name).is_dir() and not (Path(name) / "processor_config.json").is_file():
        raise FileNotFoundError(
            f"{name} has no processor_config.json: save the processor there, by processor.save_pretrained"
        )
    processor = load_described_processor(name, trust_remote_code=trust_remote_code)
    if not isinstance(processor, VisualChatProcessor) and not trust_remote_code:
        raise ValueError(f"{name} has no processor of a VisualChat model, but a {type(processor).__name__}")
    if isinstance(processor, VisualChatProcessor) and (Path(name) / "config.json").is_file():
        tokens = read_config(name).image_seq_length
        if processor.image_seq_length != tokens:
            raise ValueError(
                f"{name}/processor_config.json: image_seq_length is {processor.image_seq_length}, but the projector and the"
                f" tower of config.json make {tokens} tokens of an image"
            )
    return processor


def load_image_processor(name: str) -> BaseImageProcessor:
    """
    The image processor of a vision tower, with the size, mean and standard deviation of its folder. It works on Pillow's
    images where transformers has such a class: DINOv3's needs torchvision.

    Args:
        name (`str`): Folder or Hub id.

    Raises:
        OSError: If there is none.
        ValueError: If transformers does not know it, or needs a package for it that is not installed.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil")
    except (ImportError, ValueError) as error:
        raise ValueError(f"the image processor of {name} cannot be loaded: {' '.join(str(error).split())}") from error


def find_image_size(image_processor: BaseImageProcessor) -> list[int] | None:
    """Height and width of the images that an image processor makes, in pixels. `None` if they depend on the image."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    return [size.height, size.width] if size.height and size.width else None


def choose_device(name: str | None) -> torch.device:
    """
    Args:
        name (`str`, *optional*): Such as `"cpu"` or `"cuda:1"`. By default the accelerator if there is one, else the CPU.

    Raises:
        ValueError: If there is no such device here.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without CUDA
        raise ValueError(f"there is no device {name!r} here: {error}") from error
