"""
What each of two processes sees of a tensor-parallel model, beside a whole one of its own. `test_scale.py` starts it:

    cd tests && torchrun --nproc_per_node 2 -m helpers.tensor_parallel FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from helpers.tiny import make_inputs, make_model
from modeling_visualchat import ImageMemory


CASES = {
    "mmca": {},
    "mmca, numbered": {"image_number_keys": True},
    "mmca_merged": {"multimodal_attention": "mmca_merged"},
    "mmca_merged, numbered": {"multimodal_attention": "mmca_merged", "image_number_keys": True},
    "causal": {"multimodal_attention": "causal"},
    "cross, numbered": {"multimodal_attention": "cross", "image_number_keys": True},
    "mmca, in order": {"attn_implementation": "eager"},
    "mmca, numbered, Qwen3": {"image_number_keys": True, "decoder": "qwen3", "image_prefix_ids": [5, 7]},
    "mmca_merged, learned numbers, Qwen2": {
        "multimodal_attention": "mmca_merged",
        "learned_image_numbers": 3,
        "image_prefix_ids": [5, 9],
        "decoder": "qwen2",
        "tower": "dinov2",
    },
}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def share_out(name: str, folder: Path, attn_implementation: str = "sdpa", **overrides):
    """A whole model, and the same shared out among the processes."""
    whole = make_model(attn_implementation, **overrides)
    if torch.distributed.get_rank() == 0:
        whole.save_pretrained(folder / name)
    torch.distributed.barrier()
    split = {"tp_plan": "auto"} if name == "mmca" else {"distributed_config": DistributedConfig(tp_size=2)}
    shared = AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation=attn_implementation, **split)
    return whole, shared


@torch.no_grad()
def compare(whole, shared) -> dict:
    inputs = make_inputs(["titit", "tt"], whole)
    kept = inputs["attention_mask"].bool()
    difference = (shared(**inputs).logits - whole(**inputs).logits)[kept].abs().max()
    tokens = [model.generate(**inputs, **GREEDY) for model in (whole, shared)]
    return {"logits": float(difference), "same tokens": torch.equal(*tokens)}


def compare_gradients(whole, shared) -> float:
    """The largest difference of a gradient, as a share of the largest entry of its weight's."""
    inputs = make_inputs(["titit", "tt"], whole)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == whole.config.image_token_id, -100)
    for model in (whole, shared):
        model(**inputs, labels=labels).loss.backward()
    worst = 0.0
    for (name, weight), other in zip(whole.named_parameters(), shared.parameters()):
        # A bias that moves all keys alike moves no softmax; CLIP's last norm is of the pooled output, which nothing reads
        if weight.grad is not None and not name.endswith("vision_tower.encoder.layers.0.self_attn.k_proj.bias"):
            gradient = other.grad.full_tensor() if isinstance(other.grad, DTensor) else other.grad
            scale = weight.grad.abs().max().clamp(min=1e-3)
            worst = max(worst, float((gradient - weight.grad).abs().max() / scale))
    return worst


def describe_shares(shared) -> dict:
    attention = shared.model.language_model.layers[0].self_attn
    replicated = [*shared.model.vision_tower.parameters(), *shared.model.multi_modal_projector.parameters()]
    return {
        "whole query": tuple(attention.q_proj.weight.shape),
        "own query": tuple(attention.q_proj.weight.to_local().shape),
        "tower and projector are whole": not any(isinstance(weight, DTensor) for weight in replicated),
    }


@torch.no_grad()
def use_memory(whole, shared, folder: Path) -> dict:
    inputs = make_inputs(["titit", "itt"], whole)
    expected = shared.generate(**inputs, **GREEDY)
    pixel_values = inputs.pop("pixel_values")
    memory = shared.encode_images(pixel_values)
    remembered = shared.generate(**inputs, **GREEDY, image_memory=memory)
    path = folder / f"memory-{torch.distributed.get_rank()}.safetensors"
    memory.save(path)
    from_file = shared.generate(**inputs, **GREEDY, image_memory=ImageMemory.load(path))
    results = {
        "heads": memory.keys.shape[3],
        "heads of no picture": shared.encode_images(pixel_values[:0]).keys.shape[3],
        "images of no picture": len(shared.encode_images(pixel_values[:0])),
        "remembered": torch.equal(remembered, expected),
        "from file": torch.equal(from_file, expected),
        "fingerprint": memory.fingerprint,
    }
    try:
        whole.generate(**inputs, **GREEDY, image_memory=memory)
    except ValueError as error:
        results["by the whole model"] = str(error)
    return results


def save_again(shared, folder: Path) -> None:
    shared.save_pretrained(folder / "again")
    torch.distributed.barrier()


def share_out_unevenly(folder: Path) -> dict:
    try:
        share_out("uneven", folder, text={"num_key_value_heads": 1})
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def main(folder: Path):
    torch.distributed.init_process_group("gloo")
    results = {"gradients": {}}
    for name, overrides in CASES.items():
        whole, shared = share_out(name, folder, **overrides)
        results[name] = compare(whole, shared)
        if name == "mmca, numbered":
            results["shares"] = describe_shares(shared)
            results["memory"] = use_memory(whole, shared, folder)
            save_again(shared, folder)
        if name in ("mmca, numbered", "mmca, numbered, Qwen3", "mmca_merged, learned numbers, Qwen2"):
            results["gradients"][name] = compare_gradients(whole, shared)
    results["uneven"] = share_out_unevenly(folder)
    (folder / f"results-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
