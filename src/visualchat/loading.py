# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Loads models and processors for the commands, without running code that comes with them unless that is asked for."""

from transformers import AutoModel, AutoProcessor, PreTrainedConfig

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor


def check_model_type(name: str, trust_remote_code: bool = False) -> None:
    """
    Refuses a model of another type before anything else of it is read. This package registers VisualChat's classes, so
    transformers takes them instead of code in the folder.

    Args:
        name (`str`): Folder or Hub id.
        trust_remote_code (`bool`): Let other types pass, which bring code of their own.

    Raises:
        OSError: If there is no config of that name.
        ValueError: If the model is of another type.
    """
    config, _ = PreTrainedConfig.get_config_dict(name)
    if not config:
        raise OSError(f"{name} is neither a folder with a config.json nor a model on the Hub that can be read")
    model_type = config.get("model_type")
    if model_type == VisualChatConfig.model_type or trust_remote_code:
        return
    brings = " It brings code of its own, which runs only with --trust-remote-code." if "auto_map" in config else ""
    raise ValueError(f"{name} holds a model of the type {model_type!r}, not 'visualchat'.{brings}")


def load_model(name: str, trust_remote_code: bool = False, **kwargs) -> VisualChatForCausalLM:
    """
    Args:
        name (`str`): Folder or Hub id.
        trust_remote_code (`bool`): Run code that comes with the model, if it is of another type than this package's.
        kwargs: As for `AutoModel.from_pretrained`.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it is of another type.
    """
    check_model_type(name, trust_remote_code)
    return AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)


def load_processor(name: str, trust_remote_code: bool = False) -> VisualChatProcessor:
    """
    Args:
        name (`str`): Folder or Hub id of a model or an adapter.
        trust_remote_code (`bool`): Run code that comes with the processor, if this package has no such class.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it is no processor of a VisualChat model.
    """
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not isinstance(processor, VisualChatProcessor) and not trust_remote_code:
        raise ValueError(f"{name} has no processor of a VisualChat model, but a {type(processor).__name__}")
    return processor
