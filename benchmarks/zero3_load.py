"""
Peak memory of a process while it loads a model, alone and as one of two under ZeRO-3, which shares parameters out as they
are read.

    python benchmarks/zero3_load.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import write_results
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, TrainingArguments

from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM


ZERO3 = Path(__file__).parent.parent / "examples" / "deepspeed" / "zero3.json"


def resident(kind: str) -> float:
    """Resident memory in MiB: now (`VmRSS`) or at its highest (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def load(folder: str, zero3: bool) -> None:
    """Prints how many MiB the process took at most while loading, and how many it keeps."""
    arguments = None
    if zero3:
        import deepspeed

        # Kept until the model is loaded: its presence is what makes from_pretrained share out
        arguments = TrainingArguments(folder + "/run", use_cpu=True, deepspeed=str(ZERO3))
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    before = resident("VmRSS")
    model = AutoModel.from_pretrained(folder)
    result = {"peak": resident("VmHWM") - before, "kept": resident("VmRSS") - before}
    rank = os.environ.get("RANK", "0")
    Path(folder, f"measured-{'zero3' if zero3 else 'alone'}-{rank}.json").write_text(json.dumps(result))
    del model, arguments


def main():
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        text = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16)
        vision = CLIPVisionConfig()
        model = VisualChatForCausalLM(VisualChatConfig(text_config=text, vision_config=vision, image_token_id=0))
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        model.save_pretrained(folder, max_shard_size="200MB")
        del model
        subprocess.run([sys.executable, __file__, folder, "alone"], check=True, env=environment)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*torchrun, __file__, folder, "zero3"], check=True, env=environment)
        alone = json.loads(Path(folder, "measured-alone-0.json").read_text())
        ranks = [json.loads(Path(folder, f"measured-zero3-{rank}.json").read_text()) for rank in range(2)]
    print(f"parameters: {size:.0f} MiB")
    print(f"alone: peak {alone['peak']:.0f} MiB, kept {alone['kept']:.0f} MiB")
    for rank, one in enumerate(ranks):
        print(f"ZeRO-3, rank {rank}: peak {one['peak']:.0f} MiB, kept {one['kept']:.0f} MiB")
    ratio = round(max(one["peak"] for one in ranks) / size, 3)
    write_results("zero3_load", [{"claim": "peak of a rank of two while loading / size", "ratio": ratio, "target": 1.0}])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(sys.argv[1], sys.argv[2] == "zero3")
    else:
        main()
