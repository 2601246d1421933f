"""
The launch files, expanded: each runs with programs in the place of torchrun, deepspeed, srun and scontrol that write down
how they were called, and the launchers' own parsers read that.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples.digits_demo import make_tiny
from helpers.training import losses


ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = ["one_node.sh", "several_nodes_torchrun.sh", "several_nodes_hostfile.sh", "slurm.sbatch"]
PAPER_BATCH = 128
# What sbatch would set in a job of the file's own directives
SLURM = {
    "SLURM_JOB_NODELIST": "node[1-8]",
    "SLURM_JOB_NUM_NODES": "8",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "96",
    "SLURM_JOB_ID": "4711",
}
# https://slurm.schedmd.com/sbatch.html and srun.html: what may stand in the files, and the form of its value
SBATCH_OPTIONS = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"0|\d+[KMGT]",
    "exclusive": None,
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"[\w%.-]+",
}
SRUN_OPTIONS = {"kill-on-bad-exit": r"0|1", "cpus-per-task": r"\d+"}
RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" > "$RECORDED"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    echo "$1" >> "$RECORDED.srun"
    shift
done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[1-8]" ]] || exit 1
for k in 1 2 3 4 5 6 7 8; do echo "node$k"; done
"""


@pytest.fixture
def expand(tmp_path):
    """Runs a launch file and returns the command that it would have run, with the launcher's name first."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"torchrun": RECORD, "deepspeed": RECORD, "srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    recorded = tmp_path / "recorded"

    def run(script: str, *arguments: str, **variables: str) -> list[str]:
        given = {"HOST": "node1"} if script == "several_nodes_torchrun.sh" else {}
        given |= SLURM if script == "slurm.sbatch" else {}
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "RECORDED": str(recorded), **given, **variables}
        subprocess.run(["bash", str(LAUNCH / script), *arguments], cwd=ROOT, env=environment, check=True, timeout=60)
        return recorded.read_text().split("\0")[:-1]

    return run


def parse(command: list[str]) -> tuple[int, list[str]]:
    """The processes of a recorded command, by its launcher's own parser, and the words of the script that they run."""
    launcher, *words = command
    if launcher == "torchrun":
        from torch.distributed.run import config_from_args, get_args_parser

        arguments = get_args_parser().parse_args(words)
        config, _, _ = config_from_args(arguments)
        assert config.min_nodes == config.max_nodes
        if not arguments.standalone:
            assert config.rdzv_backend == "c10d"
            assert re.fullmatch(r"node1:\d+", config.rdzv_endpoint)
        return config.max_nodes * config.nproc_per_node, [arguments.training_script, *arguments.training_script_args]
    assert launcher == "deepspeed"
    from deepspeed.launcher.runner import fetch_hostfile, parse_args, parse_inclusion_exclusion

    arguments = parse_args(words)
    assert arguments.no_local_rank  # train.py takes its rank from the environment
    hosts = parse_inclusion_exclusion(fetch_hostfile(str(ROOT / arguments.hostfile)), arguments.include, arguments.exclude)
    return sum(len(slots) for slots in hosts.values()), [arguments.user_script, *arguments.user_args]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    assert os.access(LAUNCH / script, os.X_OK) == script.endswith(".sh")  # sbatch copies what it is given


def test_every_launch_file_is_tested():
    assert {path.name for path in LAUNCH.iterdir()} == {*SCRIPTS, "hostfile"}


@pytest.mark.parametrize(
    ("script", "recipe"),
    [
        ("one_node.sh", None),
        ("one_node.sh", "paper-13b"),
        ("several_nodes_torchrun.sh", None),
        ("several_nodes_hostfile.sh", None),
        ("slurm.sbatch", None),
    ],
)
def test_the_batch_is_the_papers(expand, script, recipe):
    processes, words = parse(expand(script, *([f"examples/recipes/{recipe}.yaml"] if recipe else [])))
    assert words[0] == "examples/train.py" and (ROOT / words[0]).exists()
    settings = yaml.safe_load((ROOT / words[1]).read_text())
    assert len(words) == 2
    batch = processes * settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert batch == PAPER_BATCH
    config = yaml.safe_load((ROOT / settings["deepspeed"]).read_text())
    assert config["zero_optimization"]["stage"] == (2 if "7b" in words[1] else 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_recipe_and_options_arrive_word_for_word(expand, script):
    options = ["--output_dir", "a folder with spaces", "--resume"]
    _, words = parse(expand(script, "examples/recipes/tiny.yaml", *options))
    assert words == ["examples/train.py", "examples/recipes/tiny.yaml", *options]


@pytest.mark.parametrize(
    ("script", "variables", "processes"),
    [
        ("one_node.sh", {"PROCESSES": "2"}, 2),
        ("several_nodes_torchrun.sh", {"NODES": "4", "PROCESSES": "2", "PORT": "4444"}, 8),
        ("slurm.sbatch", {"SLURM_JOB_NUM_NODES": "2"}, 16),
        ("slurm.sbatch", {"PROCESSES": "4"}, 32),
    ],
)
def test_another_number_of_processes(expand, script, variables, processes):
    assert parse(expand(script, **variables))[0] == processes


def test_another_hostfile(expand, tmp_path):
    (tmp_path / "hosts").write_text("one slots=4\ntwo slots=4\n")
    assert parse(expand("several_nodes_hostfile.sh", HOSTFILE=str(tmp_path / "hosts")))[0] == 8


def test_several_machines_without_a_host_are_refused():
    environment = {"PATH": os.environ["PATH"]}
    script = str(LAUNCH / "several_nodes_torchrun.sh")
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "HOST: the name or address of one of the machines" in result.stderr


def test_a_job_that_begins_again_resumes(expand):
    assert parse(expand("slurm.sbatch", SLURM_RESTART_COUNT="1"))[1][2:] == ["--resume"]


def test_slurm_directives(expand, tmp_path):
    directives = dict(
        re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.+))?", line).groups()
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    expand("slurm.sbatch")
    srun = dict(line[2:].split("=") for line in (tmp_path / "recorded.srun").read_text().splitlines())
    for given, known in ((directives, SBATCH_OPTIONS), (srun, SRUN_OPTIONS)):
        for name, value in given.items():
            assert value is None if known[name] is None else re.fullmatch(known[name], value), name
    assert directives["ntasks-per-node"] == "1"  # torchrun starts the processes of a machine
    names = {"nodes": "JOB_NUM_NODES", "gpus-per-node": "GPUS_ON_NODE", "cpus-per-task": "CPUS_PER_TASK"}
    assert all(directives[name] == SLURM[f"SLURM_{variable}"] for name, variable in names.items())


@pytest.mark.slow
def test_one_node_runs(tmp_path, monkeypatch):
    """Two CPU processes, the tiny recipe."""
    monkeypatch.chdir(tmp_path)
    make_tiny.main(["--rows", "40"])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    options = ["--max_steps", "4", "--eval_strategy", "no", "--load_best_model_at_end", "False", "--logging_steps", "1"]
    script = ["bash", "examples/launch/one_node.sh", "examples/recipes/tiny.yaml"]
    subprocess.run([*script, *options], env=environment, check=True, timeout=300)
    assert len(losses(tmp_path / "outputs" / "tiny" / "run")) == 4
    assert (tmp_path / "outputs" / "tiny" / "run" / "model" / "model.safetensors").exists()
