# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
What several processes need of a model: hooks of FSDP2 and tensor parallelism, and a dummy image where there is no image.

In a training step, and wherever weights are gathered as they are used (ZeRO-3, FSDP2), every process has to call the same
modules in the same order, also with a batch of text alone. Else ZeRO-3 and FSDP hang, and ZeRO-1 and ZeRO-2 add up the
gradients of different parameters. So a dummy image and the image numbers go through their modules there, with no effect on
the result.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_tracing


if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule


def gathers_weights(part: nn.Module) -> bool:
    """Whether a distributed run gathers the weights of this part as its modules are called (ZeRO-3, FSDP2)."""
    if is_tracing() or not torch.distributed.is_available():
        return False
    return is_deepspeed_zero3_enabled() or any(isinstance(module, FSDPModule) for module in part.modules())


class VisualChatDistributedMixin:
    """Overrides hooks of transformers' base class, which a model class must list after this one."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if torch.distributed.is_available() and issubclass(cls, FSDPModule):
            # FSDP2 puts a model into a subclass that it makes. What a saved folder needs is the code and the name of its own
            own = cls.__bases__[1]
            cls.__module__, cls.__name__ = own.__module__, own.__name__

    def post_init(self):
        super().post_init()
        # Gathered from the tower's classes, some of which are of text encoders: FSDP refuses a name that no module has
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args):
        """As in transformers: called by `from_pretrained` before the weights are read, in some versions always."""
        processes, text = 1 if distributed_config is None else distributed_config.tp_size, model.config.text_config
        if text.num_attention_heads % processes or text.num_key_value_heads % processes:
            raise ValueError(
                f"Tensor parallelism gives each process whole heads: {text.num_attention_heads} heads and"
                f" {text.num_key_value_heads} key-value heads cannot be shared out evenly among {processes} processes"
            )
        return super().maybe_distribute_model(model, distributed_config, *args)


class VisualChatDummyImageMixin:
    """The dummy image of [`VisualChatModel`]."""

    def runs_in_step(self, past_key_values: Cache | None = None) -> bool:
        """
        Whether the processes of a distributed run gather each module's weights when it is called, and so have to begin a
        conversation by calling the same ones (ZeRO-3, FSDP2).
        """
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        return gathers_weights(self.vision_tower) and begins

    def needs_dummy_image(self, past_key_values: Cache | None, has_memory: bool) -> bool:
        """
        Whether a batch without new images has to call the modules of images. Without gradients, as `generate` runs, there is
        no training step in training mode either.
        """
        is_training_step = self.training and torch.is_grad_enabled()
        return is_training_step or (not has_memory and self.runs_in_step(past_key_values))

    def dummy_pixel_values(self) -> torch.Tensor:
        """The pixels of the dummy image, of shape `(1, channels, height, width)`."""
        config = self.config.vision_config
        return torch.zeros(
            1, config.num_channels, *self.config.input_size, dtype=self.vision_tower.dtype, device=self.vision_tower.device
        )
