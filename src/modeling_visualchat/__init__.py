# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
VisualChat for transformers. Importing this package registers its classes with the Auto classes.

`AutoModel` and `AutoModelForImageTextToText` give [`VisualChatForCausalLM`], as `AutoModelForCausalLM` does: a model that
is loaded with `AutoModel` trains with the `Trainer`, which needs a loss.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .chat_visualchat import ChatSession
from .configuration_visualchat import VisualChatConfig
from .data_collator_visualchat import VisualChatDataCollator
from .image_memory_visualchat import ImageMemory, ImageMemoryStore
from .modeling_visualchat import VisualChatForCausalLM, VisualChatModel, VisualChatPreTrainedModel
from .processing_visualchat import VisualChatProcessor


__version__ = "0.2.0"

AutoConfig.register("visualchat", VisualChatConfig)
AutoProcessor.register(VisualChatConfig, VisualChatProcessor)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(VisualChatConfig, VisualChatForCausalLM)

# A saved folder carries the code, so that it loads where this package is not installed
VisualChatConfig.register_for_auto_class()
VisualChatProcessor.register_for_auto_class()
VisualChatForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "ChatSession",
    "ImageMemory",
    "ImageMemoryStore",
    "VisualChatConfig",
    "VisualChatDataCollator",
    "VisualChatForCausalLM",
    "VisualChatModel",
    "VisualChatPreTrainedModel",
    "VisualChatProcessor",
]
