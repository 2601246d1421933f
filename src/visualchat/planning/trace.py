# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The memory that one training step allocates, traced from the model's own code. Forward and backward run on the meta device,
where tensors have shapes but no values, and every allocation and release of a storage is recorded. So no formula has to
follow the model for what autograd keeps, what checkpointing drops and what is temporary: that the attention computes text
positions only, that a frozen tower keeps nothing, that the vocabulary projection computes supervised positions only.

Three things differ from a step on a real device:
- Tokens have real values, on the CPU, since their positions determine shapes. Rotary angles stay there too, until the
  tokens are sorted by modality. The layers then get the sorted layout on the meta device.
- All images are different, and all sequences have the same length: the batch has no padding and needs the most memory.
- The attention kernel is the one that the device would use (torch, `sdp_utils`). Meta tensors alone would take the slow
  kernel, which keeps all scores.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from modeling_visualchat import (
    modality_kernels_visualchat,
    modeling_visualchat,
    sequence_attention_visualchat,
)
from modeling_visualchat.attention_visualchat import AttentionPlan


PARTS = ("activations", "logits", "image features")


@dataclass(frozen=True)
class StepShape:
    """
    The shape of one micro-batch of one GPU.

    Args:
        batch_size (`int`): Sequences.
        sequence_length (`int`): Tokens of each sequence, with those of its images.
        images (`int`): Images of each sequence.
        supervised (`int`): Tokens of each sequence that have a label, and so have logits.
    """

    batch_size: int
    sequence_length: int
    images: int
    supervised: int


@dataclass
class Trace:
    """
    Allocated bytes over the events of a step, in the order of time.

    Args:
        live (`np.ndarray` of shape `(events, parts)`): Bytes by `PARTS`, without finished gradients.
        gradients (`list[tuple[int, str]]`): For each parameter, the event at which its gradient is
            finished, and its name.
        uses (`list[tuple[int, str]]`): For each use of a module with parameters of its own, the event, and its
            name.
        flops (`int`): Operations of matrix products and attention. A multiplication and an addition count as 2.
    """

    live: np.ndarray
    gradients: list[tuple[int, str]]
    uses: list[tuple[int, str]]
    flops: int

    def at_batch_size(self, larger: "Trace", batch_size: int) -> "Trace":
        """
        The trace of any batch size. `self` is the trace of batch size 2, and `larger` that of 3. Both run the same
        operations, and each tensor is constant or grows linearly. (At batch size 1 some copies are views.)
        """
        live = self.live + (batch_size - 2) * (larger.live - self.live)
        return Trace(live, self.gradients, self.uses, self.flops + (batch_size - 2) * (larger.flops - self.flops))


class AllocationLog(TorchDispatchMode):
    """
    Records the bytes of every storage that is made on a device, by the part of the model that makes it, and operations.

    Args:
        known (`list[torch.Tensor]`): Tensors that existed before. They are not counted.
        device (`str`): `meta`, or the device of a real step, for comparison.
    """

    def __init__(self, known: list[torch.Tensor], device: str = "meta"):
        super().__init__()
        self.device, self.flops = device, 0
        self.part, self.events, self.live = PARTS[0], [], {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("aten::masked_"):  # meta tensors with a mask on the CPU
            args = [arg.to(args[0].device) if isinstance(arg, torch.Tensor) else arg for arg in args]
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=results)
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.device.type == self.device:
                self._note(result)
        return results

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.known or storage.nbytes() == 0:
            return
        change = np.zeros(len(PARTS), dtype=np.int64)
        change[PARTS.index(self.part)] = storage.nbytes()
        self.events.append(change)
        # The log may be deleted before the last storages are
        self.live[key] = weakref.ref(storage, lambda _: self.forget(key)), change

    def forget(self, key: int) -> None:
        """Stops counting a storage: it was freed, or it is counted elsewhere from now on."""
        if key in self.live:
            self.events.append(-self.live.pop(key)[1])

    def hand_over(self, tensor: torch.Tensor) -> None:
        """Stops counting a tensor that is a finished gradient, which [`Trace`] lists separately."""
        key = tensor.untyped_storage()._cdata
        self.forget(key)
        self.known.add(key)


@contextmanager
def device_kernels(device: str, gathers: bool) -> Iterator[None]:
    """
    Replaces functions by those that the device would run, where meta tensors would run others. A torch mode would not be
    enough: it does not apply when checkpointing computes a layer again.

    Args:
        device (`str`): `cpu` or `cuda`.
        gathers (`bool`): Whether ZeRO-3 is used, with its own linear layers: see [`GatheredLinear`].
    """
    functional = torch.nn.functional
    attend_as_torch, attend = functional.scaled_dot_product_attention, attend_on_cpu if device == "cpu" else attend_on_gpu

    def attend_on_device(query, *args, **kwargs):
        return (attend if query.device.type == "meta" else attend_as_torch)(query, *args, **kwargs)

    with ExitStack() as stack:
        for module in (functional, modality_kernels_visualchat):
            stack.enter_context(patch.object(module, "scaled_dot_product_attention", attend_on_device))
        if gathers:
            stack.enter_context(patch.object(functional, "linear", GatheredLinear.apply))
        if device != "cpu":
            # Layouts are made on the host, as for the device
            stack.enter_context(patch.object(modality_kernels_visualchat, "runs_by_images", lambda device: False))
            stack.enter_context(patch.object(functional, "rms_norm", norm_on_gpu))
        yield


def attend_on_cpu(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Runs the kernel that torch chooses on the CPU for tensors of these shapes."""
    settings = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    on_cpu = [torch.empty_like(part, device="cpu", requires_grad=part.requires_grad) for part in (query, key, value)]
    mask = None if attn_mask is None else torch.empty_like(attn_mask, device="cpu")
    chosen = torch._fused_sdp_choice(*on_cpu, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if chosen == SDPBackend.MATH.value:
        return scaled_dot_product_attention(query, key, value, **settings, enable_gqa=enable_gqa)
    settings["attn_mask"] = _as_numbers(attn_mask, query)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **settings)[0]


def norm_on_gpu(states, normalized_shape, weight, eps):
    """One kernel, which keeps one number for each token (torch, `layer_norm.cpp`)."""
    return torch.ops.aten._fused_rms_norm(states, normalized_shape, weight, eps)[0]


def attend_on_gpu(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """
    Runs FlashAttention if there is no mask, and the memory-efficient kernel otherwise (masks of images, fp32). That kernel
    takes a mask of the queries' dtype, whose last dimension is padded to a multiple of 16 (torch, `sdp_utils` and
    `transformers/attention.cpp`).
    """
    if attn_mask is None and query.dtype != torch.float32:
        settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, **settings)[0]
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    bias = _as_numbers(attn_mask, query)
    if bias is not None:
        keys = bias.shape[-1]
        bias = torch.nn.functional.pad(bias, (0, -keys % 16))[..., :keys].expand(*query.shape[:-1], keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


def _as_numbers(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, 0)


class GatheredLinear(torch.autograd.Function):
    """
    The linear layer of DeepSpeed under ZeRO-3 (`deepspeed/runtime/zero/linear.py`). It keeps its input for the backward pass
    even if the weight does not train.
    """

    @staticmethod
    def forward(ctx, states, weight, bias=None):
        ctx.save_for_backward(states, weight)
        if states.dim() == 2 and bias is not None:
            return torch.addmm(bias, states, weight.t())
        output = states.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx, gradient):
        states, weight = ctx.saved_tensors
        of_states = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_weight = flat.t().matmul(states.reshape(-1, states.shape[-1])) if ctx.needs_input_grad[1] else None
        of_bias = flat.sum(0) if len(ctx.needs_input_grad) > 2 and ctx.needs_input_grad[2] else None
        return of_states, of_weight, of_bias


def make_tokens(config, shape: StepShape) -> dict[str, torch.Tensor]:
    """
    `input_ids`, `attention_mask`, `labels` and `logits_to_keep` as the collator makes them. Each round has one image after
    its first token. The last text tokens of the sequence are supervised.
    """
    text = shape.sequence_length - shape.images * config.image_seq_length
    rounds = max(1, shape.images)
    ids = []
    for turn in range(rounds):
        tokens = [config.image_token_id + 1 if config.image_token_id == 0 else 0] * (text // rounds + (turn < text % rounds))
        image = [config.image_token_id] * (config.image_seq_length if shape.images else 0)
        ids += [*tokens[:1], *image, *tokens[1:]]
    input_ids = torch.tensor([ids]).expand(shape.batch_size, -1).contiguous()
    is_text = torch.nonzero(input_ids[0] != config.image_token_id)[:, 0]
    labels = torch.full_like(input_ids, -100)
    learned = is_text[1:][-shape.supervised :]
    labels[:, learned] = input_ids[:, learned]
    keep = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "logits_to_keep": keep,
    }


def trace_step(model: torch.nn.Module, shape: StepShape, device: str = "cuda", gathers: bool = False) -> Trace:
    """
    Traces one forward and backward pass.

    Args:
        model (`torch.nn.Module`): A VisualChat model on the meta device, in which `requires_grad` is set. PEFT may wrap
            it.
        shape (`StepShape`): The micro-batch.
        device (`str`): The device whose attention kernels run, `cuda` or `cpu`.
        gathers (`bool`): Whether ZeRO-3 is used.
    """
    config = model.config
    log = AllocationLog([*model.parameters(), *model.buffers()])
    gradients, uses = [], []
    with ExitStack() as stack:
        for hook in _watch(model, log, gradients, uses, device):
            stack.callback(hook.remove)
        stack.enter_context(patch.object(modeling_visualchat, "find_different_images", _all_different))
        stack.enter_context(patch.object(sequence_attention_visualchat, "create_causal_mask", _mask_without_padding))
        stack.enter_context(device_kernels(device, gathers))
        stack.enter_context(log)
        batch = make_tokens(config, shape)
        if shape.images:
            log.part = "image features"
            pixels = (shape.batch_size * shape.images, config.vision_config.num_channels, *config.input_size)
            batch["pixel_values"] = torch.empty(pixels, dtype=model.dtype, device="meta")
            log.part = PARTS[0]
        loss = model(**batch, use_cache=False).loss
        log.part = PARTS[0]
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return Trace(np.cumsum(log.events, axis=0), gradients, uses, log.flops)


def _all_different(pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    return pixel_values, list(range(len(pixel_values)))


def _mask_without_padding(inputs_embeds, allow_is_causal_skip, **kwargs) -> torch.Tensor | None:
    # As transformers' `create_causal_mask`, which looks at positions and padding; sdpa's is boolean
    if allow_is_causal_skip:
        return None
    batch_size, length = inputs_embeds.shape[:2]
    return torch.ones(batch_size, 1, length, length, dtype=torch.bool, device="meta").tril_()


def _watch(model: torch.nn.Module, log: AllocationLog, gradients: list, uses: list, device: str) -> Iterator:
    """Registers the hooks of a trace, and yields their handles."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = core.model.language_model
    on_meta = {}

    def keep_angles_on_host(module, args, angles):
        return tuple(torch.zeros(part.shape, dtype=part.dtype) for part in angles)

    def bring_layout(module, args, kwargs):
        for name, move in (("plan", _plan_to_meta), ("position_embeddings", _angles_to_meta)):
            ours = kwargs[name]
            if id(ours) not in on_meta:
                on_meta[id(ours)] = ours, move(ours)  # kept, so that ids stay apart
            kwargs[name] = on_meta[id(ours)][1]
        return args, kwargs

    yield decoder.rotary_emb.register_forward_hook(keep_angles_on_host)
    for layer in decoder.layers:
        yield layer.register_forward_pre_hook(bring_layout, with_kwargs=True)

    def enter(part):
        def hook(module, args):
            log.part = part

        return hook

    for module, part in ((core.model.vision_tower, "image features"), (core.lm_head, "logits")):
        yield module.register_forward_pre_hook(enter(part))
    yield decoder.register_forward_pre_hook(enter(PARTS[0]))

    def use(name):
        def hook(module, *args):
            uses.append((len(log.events), name))

        return hook

    def finish(name):
        def hook(parameter):
            gradients.append((len(log.events), name))
            log.hand_over(parameter.grad)

        return hook

    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            yield module.register_forward_pre_hook(use(name))
            yield module.register_full_backward_pre_hook(use(name))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(finish(name))


def _angles_to_meta(angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(part.to("meta") for part in angles)


def _plan_to_meta(plan: AttentionPlan) -> AttentionPlan:
    return plan.to("meta")
