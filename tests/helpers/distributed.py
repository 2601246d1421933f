"""Training in several processes on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.training import arguments


ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "examples" / "train.py")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and "CI" not in os.environ, reason="DeepSpeed compiles its CPU operators: no g++ was found"
)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for ninja there
}


def settings(parts: Path, output: Path, processes: int, **overrides) -> list[str]:
    return arguments(
        parts,
        output,
        **{
            "per_device_train_batch_size": 4 // processes,
            "train_sampling_strategy": "sequential",
            "eval_fraction": 0,
            "learning_rate": 1e-2,
            "seed": 3,
            **overrides,
        },
    )


def launch(words: list[str], processes: int, wait: bool = True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    process = subprocess.Popen(
        [*command, TRAIN, *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if not wait:
        return process
    try:
        output, _ = process.communicate(timeout=400)  # a hang is a failure
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-4000:]
    return output


def write_config(folder: Path, name: str) -> Path:
    """A shipped JSON, with every parameter of ZeRO-3 shared out, however small: the default keeps tiny ones on all ranks."""
    config = json.loads((ROOT / "examples" / "deepspeed" / f"{name}.json").read_text())
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config))
    return path
