"""
Memory of each of two processes while they load a model under ZeRO-3, which shares parameters out as they are read.

Anonymous memory is what a process needs. File-backed memory is what rank 0 has mapped of the checkpoint: clean pages, which
the system drops when it wants the room. transformers keeps all shards mapped until the last weight is read
(`PreTrainedModel._load_pretrained_model`), on rank 0 alone. Everything lies in host memory, without an accelerator.

    python -m benchmarks.zero3_load
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import deepspeed
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, TrainingArguments

from benchmarks.report import write_results
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM


ZERO3 = Path(__file__).parent.parent / "examples" / "deepspeed" / "zero3.json"
# In bytes. What is larger goes back to the system as soon as it is freed. By default glibc raises this size, up to 32 MiB:
# freed weights then leave holes between the parts of the model that are kept
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def resident() -> tuple[float, float]:
    """Anonymous and file-backed resident memory of this process, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))


def load(folder: str) -> None:
    """Loads the model and writes, in MiB, the peaks of both kinds of memory meanwhile and the anonymous memory it keeps."""
    # Kept until the model is loaded: its presence is what makes from_pretrained share out
    arguments = TrainingArguments(folder + "/run", use_cpu=True, deepspeed=str(ZERO3))
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    before, samples, loaded = resident(), [], threading.Event()

    def watch():
        while not loaded.wait(0.005):
            samples.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModel.from_pretrained(folder)
    loaded.set()
    watcher.join()
    samples.append(resident())
    anonymous, file_backed = (max(values) - start for values, start in zip(zip(*samples), before))
    result = {"anonymous": anonymous, "file_backed": file_backed, "kept": samples[-1][0] - before[0]}
    rounded = {name: round(value) for name, value in result.items()}
    Path(folder, f"measured-{os.environ['RANK']}.json").write_text(json.dumps(rounded))
    del model, arguments


def save_model(folder: str) -> float:
    """Saves a model of 16 layers in shards of 200 MB. Returns the size of its parameters in MiB."""
    text = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16)
    model = VisualChatForCausalLM(VisualChatConfig(text_config=text, vision_config=CLIPVisionConfig(), image_token_id=0))
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def measure(folder: str, environment: dict[str, str]) -> list[dict[str, int]]:
    """What each of two ranks measured."""
    # DeepSpeed looks for ninja on the path
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment}
    subprocess.run([*torchrun, "-m", "benchmarks.zero3_load", folder], check=True, env=environment)
    return [json.loads(Path(folder, f"measured-{rank}.json").read_text()) for rank in range(2)]


def main():
    with tempfile.TemporaryDirectory() as folder:
        size = save_model(folder)
        measured = {"glibc's default": measure(folder, {}), "MALLOC_MMAP_THRESHOLD_ of 1 MiB": measure(folder, GIVE_BACK)}
    print(f"parameters: {size:.0f} MiB")
    print("| MiB | rank | anonymous, peak | file-backed, peak | anonymous, kept |\n|---|---|---|---|---|")
    results = []
    # A half of the model, and its largest weight, the token embedding, twice while it is shared out: 0.68
    for (setting, ranks), target in zip(measured.items(), (1.0, 0.7)):
        for rank, one in enumerate(ranks):
            print(f"| {setting} | {rank} | {one['anonymous']} | {one['file_backed']} | {one['kept']} |")
        claim = f"anonymous peak of a rank of two while loading under ZeRO-3 / size of the model, {setting}"
        ratio = round(max(one["anonymous"] for one in ranks) / size, 3)
        results.append({"claim": claim, "ratio": ratio, "target": target, "mib_by_rank": ranks})
    write_results("zero3_load", results)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(sys.argv[1])
    else:
        main()
