"""
Predictions of `visualchat plan` against real training steps: two processes of the Trainer with DeepSpeed and gloo, one
thread each, on a model whose parts are tens of MB.

Measured is the anonymous memory of a process at its peak within the second step (forward, backward and the optimizer's
step), less what it had after a whole run of a toy model, which brings in all code and DeepSpeed's engine. The larger of the
two processes counts. glibc gives back at once what is freed (`MALLOC_MMAP_THRESHOLD_`), as a GPU's allocator uses it again.
Predicted is the same step with the attention kernels of the CPU, and with gloo: empty buffers take no memory until they are
written, and gloo gathers and scatters through a copy. Where a JSON offloads, host and device are one memory here, so their
sum is compared: that checks what there is, not where it is.

    python -m benchmarks.plan
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, TrainerCallback

from benchmarks.report import RESULTS, write_results
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM


EXAMPLES = Path(__file__).parent.parent / "examples"

# In bytes. What is larger goes back to the system as soon as it is freed. Shares of single weights are below 1 MiB
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
PROCESSES, IMAGES, SAMPLES = 2, 2, 2
TARGET = 1.1  # and no less than 1 / 1.1
TEXT = {"vocab_size": 16001, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6}
VISION |= {"image_size": 112, "patch_size": 14}
TOY_TEXT = {**TEXT, "vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TOY_VISION = {**VISION, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Case:
    """A JSON of `examples/deepspeed/`, what trains, and on how many tokens of a sample."""

    name: str
    mode: str
    length: int
    checkpointing: bool
    dtype: str = "fp32"

    def __str__(self) -> str:
        layers = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{self.name}, {self.mode}, {SAMPLES} × {self.length} tokens, {layers}, {self.dtype}"


MODES = ("alignment", "lora", "full")
CASES = [
    *(Case(name, mode, 512, True) for name in ("zero3", "zero1", "zero2", "zero0") for mode in MODES),
    *(Case("zero2", mode, length, False) for length in (256, 1024) for mode in MODES),
    Case("zero3", "full", 256, False),
    *(Case(name, "full", 256, True) for name in ("zero2_offload", "zero3_offload")),
    *(Case(name, "full", 512, True, "bf16") for name in ("zero2", "zero3")),
]


def make_config(text: dict, vision: dict) -> VisualChatConfig:
    parts = {"text_config": LlamaConfig(**text), "vision_config": CLIPVisionConfig(**vision)}
    return VisualChatConfig(**parts, image_token_id=text["vocab_size"] - 1)


def predict(case: Case) -> dict:
    """The peak in MiB, on device and host together, and its parts."""
    from visualchat.planning.plan import DTYPES, Planner, read_zero
    from visualchat.planning.trace import StepShape
    from visualchat.training.train import ModelArguments

    config = make_config(TEXT, VISION)
    text = case.length - IMAGES * config.image_seq_length
    shape = StepShape(SAMPLES, case.length, IMAGES, text - 1)
    planner = Planner(config, shape, ModelArguments(mode=case.mode), DTYPES[case.dtype], device="cpu")
    peak = planner.peak(planner.setting(read_zero(case.name), PROCESSES), SAMPLES, case.checkpointing)
    parts = {name: round(size / 2**20) for name, size in {**peak.parts, "step": peak.step, "host": peak.host}.items()}
    return {"mib": (peak.largest + peak.host) / 2**20, "parts": parts}


def anonymous() -> float:
    """Anonymous resident memory of this process in MiB, now."""
    return _status("RssAnon")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


class PeakOfSecondStep(TrainerCallback):
    """The peak of anonymous memory in MiB: that of all memory, less pages of files and shared ones, which hardly change."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.peak = _status("VmHWM") - _status("RssFile") - _status("RssShmem")


class FixedBatch:
    """In place of the collator: the batch that the planner plans with, and different pictures."""

    def __init__(self, config: VisualChatConfig, length: int):
        from visualchat.planning.trace import StepShape, make_tokens

        self.broken_rows = torch.zeros((), dtype=torch.long)
        self.broken_rows.value = 0
        text = length - IMAGES * config.image_seq_length
        self.tokens = make_tokens(config, StepShape(SAMPLES, length, IMAGES, text - 1))
        size = config.vision_config.image_size
        self.pictures = SAMPLES * IMAGES, 3, size, size

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        return {**self.tokens, "pixel_values": torch.randn(self.pictures)}


def train(case: Case, config: VisualChatConfig, length: int, folder: str) -> float:
    """Trains for two steps. Returns the peak of the second in MiB."""
    import deepspeed

    from visualchat.planning.plan import DTYPES
    from visualchat.training.train import ModelArguments, set_mode
    from visualchat.training.trainer import VisualChatTrainer, VisualChatTrainingArguments

    arguments = VisualChatTrainingArguments(
        folder,
        use_cpu=True,
        deepspeed=str(EXAMPLES / "deepspeed" / f"{case.name}.json"),
        bf16=case.dtype == "bf16",
        per_device_train_batch_size=SAMPLES,
        max_steps=2,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_checkpointing=case.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = VisualChatForCausalLM._from_config(config, attn_implementation="sdpa", dtype=DTYPES[case.dtype])
    model.config.use_cache = not case.checkpointing
    model = set_mode(model, ModelArguments(mode=case.mode))
    watch = PeakOfSecondStep()
    rows = list(range(4 * SAMPLES * PROCESSES))
    batch = FixedBatch(config, length)
    trainer = VisualChatTrainer(model, arguments, data_collator=batch, train_dataset=rows, callbacks=[watch])
    trainer.train()
    engine = trainer.model_wrapped
    assert torch.distributed.get_world_size() == PROCESSES and type(engine).__name__ == "DeepSpeedEngine", type(engine)
    return watch.peak


def run_case(case: Case, folder: str) -> None:
    """In a process of its own: writes what it needed beyond a toy's run, in MiB."""
    toy = make_config(TOY_TEXT, TOY_VISION)
    train(case, toy, IMAGES * toy.image_seq_length + 8, folder)
    gc.collect()
    before = anonymous()
    peak = train(case, make_config(TEXT, VISION), case.length, folder)
    Path(folder, f"measured-{os.environ['RANK']}.json").write_text(json.dumps(peak - before))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(case: Case) -> float:
    """MiB of the process that needs more."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja there
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **GIVE_BACK}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*torchrun, "-m", "benchmarks.plan", json.dumps(asdict(case)), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        files = [Path(folder, f"measured-{rank}.json") for rank in range(PROCESSES)]
        if not all(file.exists() for file in files):  # a finished run may abort at its exit
            raise RuntimeError(f"{case}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return max(json.loads(file.read_text()) for file in files)


def compare(case: Case) -> dict:
    """One result: predicted / measured."""
    predicted, measured = predict(case), measure(case)
    ratio = round(predicted["mib"] / measured, 3)
    sizes = {"predicted_mib": round(predicted["mib"]), "measured_mib": round(measured), "parts_mib": predicted["parts"]}
    print(f"{case}: predicted {sizes['predicted_mib']} MiB, measured {sizes['measured_mib']} MiB, {ratio}", flush=True)
    return {"claim": f"peak of a process, predicted / measured: {case}", "ratio": ratio, "target": TARGET, **sizes}


def draw(results: list[dict], cases: list[Case]) -> None:
    """Writes results/plan.png: predicted over measured, by mode, and the band of the target."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 5), layout="constrained")
    largest = 1.1 * max(max(one["predicted_mib"], one["measured_mib"]) for one in results)
    axis.fill_between([0, largest], [0, largest / TARGET], [0, largest * TARGET], color="0.9", label="within 10 %")
    axis.plot([0, largest], [0, largest], color="black", linewidth=1)
    for mode, marker in zip(MODES, "os^"):
        points = [(one["measured_mib"], one["predicted_mib"]) for one, case in zip(results, cases) if case.mode == mode]
        if points:
            axis.scatter(*zip(*points), marker=marker, facecolors="none", edgecolors="black", label=mode)
    axis.set(xlim=(0, largest), ylim=(0, largest), xlabel="measured, MiB of a process", ylabel="predicted, MiB")
    axis.legend()
    figure.savefig(RESULTS / "plan.png", dpi=110)
    plt.close(figure)


def main():
    torch.set_num_threads(1)
    results = [compare(case) for case in CASES]
    write_results("plan", results)
    draw(results, CASES)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_case(Case(**json.loads(sys.argv[1])), sys.argv[2])
    else:
        main()
