"""The definition of MMCA and the fast path that it judges know nothing of each other, and no import goes in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import modeling_visualchat


FOLDER = Path(modeling_visualchat.__file__).parent
SUFFIX = "_visualchat"


def read_imports() -> dict[str, set[str]]:
    """For each file, the files of the package that it imports, anywhere in it; all without the suffix."""
    imports = {}
    for path in FOLDER.glob(f"*{SUFFIX}.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}
        imports[path.stem.removesuffix(SUFFIX)] = {name.removesuffix(SUFFIX) for name in names}
    return imports


def reach(name: str, imports: dict[str, set[str]]) -> set[str]:
    """All that a file imports, itself or by what it imports."""
    reached, new = set(), imports[name]
    while new:
        reached |= new
        new = set().union(*(imports[one] for one in new)) - reached
    return reached


@pytest.mark.parametrize(
    "name, others",
    [
        ("attention", ("sequence_", "released_", "modality_", "cross_")),  # the plan's interface knows none of the plans
        ("sequence_attention", ("released_", "modality_", "cross_")),
        ("released_attention", ("modality_", "cross_")),
        ("modality_attention", ("sequence_", "released_", "cross_")),
        ("modality_cache", ("sequence_", "released_", "cross_")),
        ("cross_attention", ("sequence_", "released_")),  # made on the stream of the fast path
    ],
)
def test_a_plan_knows_nothing_of_the_others(name, others):
    reached = reach(name, read_imports())
    assert not [one for one in reached if one.startswith(others)]
    assert "decoder" not in reached


def test_the_decoder_alone_chooses_among_the_plans():
    plans = {"sequence_attention", "released_attention", "modality_attention", "cross_attention"}
    imports = read_imports()
    assert plans <= imports["decoder"]
    assert {name for name, imported in imports.items() if "modality_attention" in imported} == {
        "decoder",
        "cross_attention",
    }
    assert {name for name, imported in imports.items() if "sequence_attention" in imported} == {
        "decoder",
        "released_attention",
    }


def test_no_import_goes_in_a_circle():
    imports = read_imports()
    assert list(TopologicalSorter(imports).static_order())
    assert set().union(*imports.values()) <= set(imports)
