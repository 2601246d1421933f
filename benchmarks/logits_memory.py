"""
Peak memory of one training step in alignment mode, with logits at every position and with logits where there is a label,
each in a process of its own.

    python -m benchmarks.logits_memory
"""

import resource
import subprocess
import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks.report import write_results
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM


BATCH, LENGTH, ANSWER, VOCABULARY = 4, 512, 32, 32001


def step(supervised_only: bool) -> None:
    """Prints the process's resident memory in MiB before the step, and its peak."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = VisualChatForCausalLM(VisualChatConfig(text_config=text, vision_config=vision)).train()
    model.freeze_for_alignment()
    input_ids = torch.randint(3, 1000, (BATCH, LENGTH))
    labels = torch.full_like(input_ids, -100)
    labels[:, -ANSWER:] = input_ids[:, -ANSWER:]
    kwargs = {}
    if supervised_only:
        kwargs["logits_to_keep"] = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    loss = model(input_ids=input_ids, labels=labels, **kwargs).loss
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{before:.0f} {peak:.0f} {loss.item():.6f}")


def main():
    measured = {}
    for way in ("all", "supervised"):
        command = [sys.executable, "-m", "benchmarks.logits_memory", way]
        before, peak, loss = map(float, subprocess.check_output(command, text=True).split()[-3:])
        measured[way] = peak - before
        print(f"logits {way}: the step takes {peak - before:.0f} MiB more than the model, loss {loss:.6f}")
    ratio = round(measured["supervised"] / measured["all"], 3)
    claim = f"memory of a step, {ANSWER} of {LENGTH} positions supervised, batch {BATCH}, against logits at all positions"
    write_results("logits_memory", [{"claim": claim, "ratio": ratio, "target": None}])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step(sys.argv[1] == "supervised")
    else:
        main()
