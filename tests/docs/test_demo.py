# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The demo: its data is right, and a short run of it writes everything and trains only what it should."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.digits_demo import demo
from visualchat.data import digits


@pytest.fixture(scope="module")
def splits():
    return digits.split_digits(seed=0)


@pytest.fixture(scope="module")
def rows(splits):
    return digits.make_conversations(splits["test"], 1000, seed=3)


def read_rounds(row):
    """`(images seen so far, images that are new, question, answer)` of each round."""
    rounds, seen = [], 0
    for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
        assert (question["role"], answer["role"]) == ("user", "assistant")
        new = sum(part["type"] == "image" for part in question["content"])
        seen += new
        rounds.append((seen, new, question["content"][-1]["text"], answer["content"]))
    return rounds


def test_splits_are_disjoint_scans(splits):
    scans = {name: set(split.scans.tolist()) for name, split in splits.items()}
    assert {name: len(one) for name, one in scans.items()} == {"train": 1347, "validation": 150, "test": 300}
    assert len(set.union(*scans.values())) == 1797
    for split in splits.values():
        assert len(split.images) == len(split.labels) == len(split.scans)
        assert np.bincount(split.labels, minlength=10).min() > 0.09 * len(split.labels)


def test_jitter_keeps_labels_and_scans(splits):
    validation = splits["validation"]
    more = digits.jitter(validation, copies=2, seed=0)
    assert len(more.images) == len(more.labels) == len(more.scans) == 450
    assert set(more.scans) == set(validation.scans)
    label_of = dict(zip(validation.scans, validation.labels))
    assert all(label_of[scan] == label for scan, label in zip(more.scans, more.labels))
    assert more.images[0] is validation.images[0]
    assert np.any(np.asarray(more.images[150]) != np.asarray(validation.images[0]))


def test_one_to_four_images_and_rounds_with_later_images_in_later_rounds(rows):
    rounds = [read_rounds(row) for row in rows]
    assert {len(one) for one in rounds} == {1, 2, 3, 4}
    assert {one[-1][0] for one in rounds} == {1, 2, 3, 4}
    assert all(one[0][1] >= 1 for one in rounds), "the first round brings an image"
    assert sum(any(new for _, new, _, _ in one[1:]) for one in rounds) > len(rows) / 3
    for row, one in zip(rows, rounds):
        assert one[-1][0] == len(row["images"]) == len(row["labels"])
        assert len(row["kinds"]) == len(one)
        assert len({(seen, question) for seen, _, question, _ in one}) == len(one), "nothing is asked twice"


def test_answers_follow_from_the_labels(splits, rows):
    test = splits["test"]
    label_of_picture = {id(picture): label for picture, label in zip(test.images, test.labels)}
    for row in rows:
        assert [label_of_picture[id(image)] for image in row["images"]] == row["labels"]
        for seen, _, question, answer in read_rounds(row):
            numbers = [int(number) for number in re.findall(r"image (\d)", question)]
            assert all(1 <= number <= seen for number in numbers), "only images that are there are asked about"
            shown = [row["labels"][number - 1] for number in numbers]
            if question.startswith("What digit"):
                assert answer == digits.WORDS[shown[0]]
            elif question.startswith("Do image"):
                assert answer == ("yes" if shown[0] == shown[1] else "no")
            elif question.startswith("Which digit"):
                assert shown[0] != shown[1]
                assert answer == f"image {numbers[int(np.argmax(shown))]}"
            else:
                even = sum(label % 2 == 0 for label in row["labels"][:seen])
                assert answer == ("none", "one", "two", "three", "four")[even]


def test_answers_are_balanced(rows):
    answers = defaultdict(Counter)
    for row in rows:
        for kind, (seen, _, question, answer) in zip(row["kinds"], read_rounds(row)):
            if kind == "larger":
                answer = re.findall(r"image \d", question).index(answer)
            answers[kind, seen if kind == "even" else 0][answer] += 1
    assert {kind for kind, _ in answers} == {"digit", "same", "larger", "even"}
    for (kind, seen), counts in answers.items():
        assert len(counts) == {"digit": 10, "same": 2, "larger": 2, "even": seen + 1}[kind]
        fair = counts.total() / len(counts)
        assert max(counts.values()) < 1.3 * fair, (kind, seen, counts)


def test_same_seed_same_conversations(splits, rows):
    def texts(some):
        return [(row["messages"], row["labels"], [image.tobytes() for image in row["images"]]) for row in some]

    assert texts(digits.make_conversations(splits["test"], 1000, seed=3)) == texts(rows)
    assert texts(digits.make_conversations(splits["test"], 1000, seed=4)) != texts(rows)
    again = digits.split_digits(seed=0)
    assert all((again[name].scans == splits[name].scans).all() for name in splits)
    assert (digits.split_digits(seed=1)["test"].scans != splits["test"].scans).any()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps: its folder, its metrics, and the weights before and after the alignment."""
    output_dir = tmp_path_factory.mktemp("demo")
    weights = {}

    def align(model, *args):
        weights["before"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        curve = original(model, *args)
        weights["after"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return curve

    original = demo.align
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "align", align)
        metrics = demo.main(
            demo.DemoArguments(
                output_dir=str(output_dir),
                train_conversations=64,
                test_conversations=8,
                jitter_copies=0,
                tower_steps=10,
                decoder_steps=10,
                alignment_steps=10,
            )
        )
    return output_dir, metrics, weights


def test_run_writes_everything(run):
    output_dir, metrics, _ = run
    for name in ("conversation.png", "loss.png", "conversation/messages.json", "conversation/image-1.png"):
        assert (output_dir / name).stat().st_size > 0, name
    model_files = {file.name for file in (output_dir / "model").iterdir()}
    assert model_files >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "conversation.png",
        "generation_config.json",
        "model.safetensors",
        "modeling_visualchat.py",
        "processing_visualchat.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((output_dir / "metrics.json").read_text()) == metrics
    assert {"accuracy", "accuracy_without_images", "accuracy_by_kind", "seconds"} <= set(metrics)
    assert set(metrics["accuracy_by_kind"]) == {"digit", "same", "larger", "even"}
    card = (output_dir / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\nlicense: apache-2.0\n")
    assert f"{metrics['accuracy']:.1%}" in card


def test_alignment_trains_projector_and_embedding_only(run):
    _, _, weights = run
    assert weights["before"].keys() == weights["after"].keys()
    for name, before in weights["before"].items():
        trains = "multi_modal_projector" in name or name == "model.language_model.embed_tokens.weight"
        assert torch.equal(before, weights["after"][name]) != trains, name


def test_folder_loads(run):
    output_dir, _, weights = run
    model = AutoModelForImageTextToText.from_pretrained(output_dir / "model")
    processor = AutoProcessor.from_pretrained(output_dir / "model")
    assert model.config.multimodal_attention == "mmca"
    assert model.config.image_number_keys
    assert processor.image_seq_length == model.config.image_seq_length == 5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights["after"][name]), name


def test_a_folder_that_answers_differently_is_reported(run):
    output_dir, _, _ = run
    with pytest.raises(RuntimeError, match="but before it was saved it answered"):
        demo.check_saved_folder(output_dir, ["no such answer"])
