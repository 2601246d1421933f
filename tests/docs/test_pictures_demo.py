"""`make pictures` with tiny random parts and few steps: it writes everything, trains what it should, and can be resumed."""

import json
from functools import partial

import pytest
import torch
import yaml

from examples.pictures import dataset, demo, own_pictures, words
from examples.pictures.conversations import split_kinds
from examples.pictures.kinds import list_kinds
from helpers.pictures import save_parts
from modeling_visualchat import VisualChatForCausalLM
from visualchat.cli import main as visualchat


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    save_parts(root)
    return root


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """The output folder of a run, its metrics, and the settings that made it short."""
    output = tmp_path_factory.mktemp("pictures") / "output"
    recipe = yaml.safe_load(demo.RECIPE.read_text())
    recipe |= {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "bf16": False, "number_learning_rate": 1.0}
    (output.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RECIPE", output.parent / "recipe.yaml")
        patch.setattr(dataset, "SCENES", {"train": 40, "test": 40, "unseen": 8})
        patch.setattr(dataset, "CONVERSATIONS", {"train": 12, "test": 6, "names-1": 3, "names-3": 2, "counts": 4})
        patch.setattr(dataset, "one_token_kinds", lambda tokenizer: list_kinds()[:20])
        patch.setattr(dataset, "split_kinds", partial(split_kinds, held_out=4))
        patch.setattr(words, "STEPS", 3)
        arguments = ["--parts", str(parts), "--output", str(output)]
        metrics = demo.main(arguments)
        yield output, metrics, arguments


def test_it_writes_everything(run):
    output, metrics, _ = run
    assert {"model", "data", "start", "metrics.json", "conversation", "conversation.png"} <= {
        p.name for p in output.iterdir()
    }
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["conversations"] == 6 and metrics["names-3"]["questions"] == 6 and metrics["unseen"]["questions"] == 4
    assert sum(row["questions"] for row in metrics["by_kind"].values()) == metrics["questions"]
    text_answers = metrics["text_answers"]
    assert text_answers["asked"] == text_answers["same_tokens"] == 3  # as many as there are conversations of names-1
    assert metrics["counts"]["questions"] == 4
    card = (output / "model/README.md").read_text()
    assert "OpenMoji" in card and "CC BY-SA 4.0" in card and f"{metrics['accuracy']:.1%}" in card
    assert (output / "model/conversation.png").exists()


def test_only_the_projector_and_the_numbers_train(run):
    output, _, _ = run
    before, after = (VisualChatForCausalLM.from_pretrained(output / name).state_dict() for name in ("start", "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("multi_modal_projector" in name or "image_numbers" in name for name in changed)
    assert any("image_numbers" in name for name in changed)


def test_what_is_complete_is_kept(run):
    output, metrics, arguments = run
    kept = [*output.glob("data/*.jsonl"), *output.glob("start/*"), output / "model/model.safetensors"]
    times = [path.stat().st_mtime_ns for path in kept]
    again = demo.main(arguments)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert again | {"seconds": 0} == metrics | {"seconds": 0}


def test_a_folder_of_own_pictures_is_what_prepare_reads(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_pictures, "PICTURES", {"train": 5, "test": 2})
    own_pictures.main(["--parts", str(parts), "--output", str(tmp_path / "own")])
    assert visualchat(["prepare", "--source", "captions", "--data-root", str(tmp_path / "own/train"), "--check"]) == 0
    assert "captions: no problems" in capsys.readouterr().out
    captions = [json.loads(line)["text"] for line in (tmp_path / "own/train/metadata.jsonl").read_text().splitlines()]
    assert len(captions) == 5 and all(caption.endswith(" background.") for caption in captions)
