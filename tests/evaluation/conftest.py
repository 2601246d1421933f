"""Tiny models with data, and runs on them that the tests of a module share."""

import json

import datasets
import pytest

from helpers.evaluation import CONVERSATIONS, LABELLED, make_row, run, save_tiny
from helpers.tiny import digit_image


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two models that differ, pictures, a JSON of conversations and a labelled set."""
    root = tmp_path_factory.mktemp("evaluation")
    save_tiny(root / "first")
    save_tiny(root / "other", seed=1)
    (root / "pictures").mkdir()
    for k in range(8):
        digit_image(k).save(root / "pictures" / f"{k}.png")
    (root / "eval.json").write_text(json.dumps(CONVERSATIONS))
    rows = [make_row(k, images=k % 3, rounds=1 + k % 3) for k in range(9)]
    datasets.Dataset.from_list(rows).to_parquet(root / "rows.parquet")
    return root


@pytest.fixture(scope="module")
def conversations(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("conversations")
    assert run(root, output, "--batch-size", 4) == 0
    return output


@pytest.fixture(scope="module")
def labelled(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("labelled")
    assert run(root, output, data=LABELLED) == 0
    return output
