"""What is written in two files of the repository agrees; workflows run what exists."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import modeling_visualchat
import visualchat


ROOT = next(parent for parent in Path(__file__).parents if (parent / "setup.cfg").exists())
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read_bounds() -> dict[str, str]:
    """The lower bounds of setup.cfg."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(required), flags=re.MULTILINE))


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert modeling_visualchat.__version__ == visualchat.__version__ == citation
    assert f"\n## {citation}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_lowest_versions_are_the_bounds():
    lines = (ROOT / ".ci/constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = read_bounds()
    assert lowest == {name: bounds[name] for name in lowest}
    assert {"torch", "transformers", "accelerate", "peft", "datasets", "deepspeed"} <= set(lowest)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist_with_least_permissions(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            command = step.get("run", "").split()
            if command[:1] == ["make"]:
                assert command[1] in targets
