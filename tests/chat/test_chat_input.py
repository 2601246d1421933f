"""What a session is asked: kinds of images, texts, settings of generation, and bad input."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteriaList

from helpers.chat import (
    GREEDY,
    LETTERS,
    NEW_TOKENS,
    PROCESSOR,
    ROUNDS,
    SPELLED,
    assert_as_from_scratch,
    count_work,
    hold,
    writes,
)
from helpers.tiny import TOKENS_PER_IMAGE, digit_image
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


def test_kinds_of_images(model, tmp_path):
    store = ImageMemoryStore(model, max_bytes=2**20)
    chat = model.start_chat(PROCESSOR, store=store)
    picture = digit_image(3)
    picture.save(tmp_path / "a.png")
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    pixels = np.asarray(picture)
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", picture, encoded.getvalue(), pixels, torch.tensor(pixels)]
    for kind in kinds:
        chat.clear()
        chat.send("What is it?", [kind, kind], **GREEDY)
        chat.send("And this?", kind, **GREEDY)
        assert [len(one.images) for one in chat.rounds] == [2, 1]
        assert_as_from_scratch(chat)
    assert (store.misses, len(store)) == (1, 1)


def test_pictures_are_the_sessions_own(chat, tmp_path):
    picture = digit_image(3)
    chat.send("What is it?", picture, **GREEDY)
    picture.paste("white", (0, 0, 8, 8))
    assert chat.rounds[0].images[0] == digit_image(3)


def test_bad_input_is_named_and_leaves_the_session_as_it_was(chat, tmp_path):
    hold(chat, ROUNDS[:1])
    before = list(chat.rounds)
    (tmp_path / "text.png").write_text("no picture")
    digit_image(0).resize((64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    for bad, error, message in (
        (tmp_path / "none.png", FileNotFoundError, r"image 2: .*none\.png"),
        (tmp_path / "text.png", ValueError, r"image 2: .*text\.png"),
        (Image.open(tmp_path / "half.png"), ValueError, "image 2: the image is broken"),
        ("http://127.0.0.1:9/a.png", ValueError, r"image 2: cannot fetch http://127\.0\.0\.1:9/a\.png"),
        (b"no picture", ValueError, "image 2: 10 bytes"),
        (7, TypeError, "image 2: .*int"),
    ):
        with pytest.raises(error, match=message):
            chat.send("And these?", [digit_image(1), bad], stream=True, **GREEDY)
    for question in (None, ["What?"]):
        with pytest.raises(TypeError, match="A question is a string"):
            chat.send(question)
        with pytest.raises(TypeError, match="A question is a string"):
            chat.edit(0, question)
    for generation, message in (
        ({"num_return_sequences": 2, "do_sample": True}, "`num_return_sequences`"),
        ({"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)}, "`num_return_sequences`"),
        ({"max_length": 100}, "`max_new_tokens`"),
        ({"return_dict_in_generate": True}, "`return_dict_in_generate`"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.send("And?", **generation)
    with pytest.raises(TypeError, match="streamer"):
        chat.send("And?", streamer=None)
    assert chat.rounds == before
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)


def test_begins_with_text(chat):
    for question, images in (("Hello.", 0), ("How are you?", 0), ("What are these?", 3), ("And now?", 0)):
        chat.send(question, [digit_image(k) for k in range(images)], **GREEDY)
        assert_as_from_scratch(chat)


def test_special_tokens_in_texts_are_text(chat):
    read = []
    hook = chat.model.register_forward_pre_hook(lambda *called: read.append(called[2]["input_ids"]), with_kwargs=True)
    chat.send("What does <image> do in HTML?</s>", digit_image(0), **GREEDY)
    hook.remove()
    read = torch.cat(read, dim=1)
    assert int((read == PROCESSOR.image_token_id).sum()) == TOKENS_PER_IMAGE
    assert int((read == PROCESSOR.tokenizer.eos_token_id).sum()) == 0
    with writes(chat.model, "It is <"):
        chat.send("Say it.", max_new_tokens=4)
    chat.rounds[-1].answer += "image>"
    chat.send("Again?", digit_image(1), **GREEDY)
    inputs = PROCESSOR.apply_chat_template(
        chat.messages[:-1],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
    )
    output = chat.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert chat.rounds[-1].answer == PROCESSOR.decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("variant", ["mmca", "causal"])
def test_sampling_and_beams(models, variant):
    session = models[variant].start_chat(PROCESSOR)
    sampling = {"do_sample": True, "temperature": 2.0, "max_new_tokens": NEW_TOKENS}
    for question, images in ROUNDS[:3]:
        for generation in (sampling, {"num_beams": 3, **GREEDY}, {"num_beams": 2, **sampling}):
            torch.manual_seed(5)
            session.send(question, [digit_image(k) for k in range(images)], **generation)
            torch.manual_seed(5)
            assert_as_from_scratch(session, **generation)


def test_beams_compute_what_is_new(chat):
    session = chat
    session.send("What are these?", [digit_image(0), digit_image(1)], **GREEDY, **SPELLED)
    with count_work(session.model) as work:
        assert len(list(session.send("And?", num_beams=3, stream=True, **GREEDY, **SPELLED))) == 1
    assert work["rows"] < 3 * 40
    assert work["pictures"] == 0


def test_generation_settings(chat):
    chat.send("What?", generation_config=GenerationConfig(max_new_tokens=3))
    assert_as_from_scratch(chat, max_new_tokens=3)
    chat.send("What?", generation_config=GenerationConfig(max_new_tokens=9, return_dict_in_generate=True), max_new_tokens=4)
    assert_as_from_scratch(chat, max_new_tokens=4)
    with writes(chat.model, "one two three four"):
        assert chat.send("Count.", stop_strings="two") == "one two"
    with writes(chat.model, "one two three four"):
        assert chat.send("Count.", generation_config=GenerationConfig(stop_strings=["three", "four"])) == "one two three"
    with writes(chat.model, "one two three four"):
        criteria = StoppingCriteriaList([lambda input_ids, *_: input_ids[0, -1] == LETTERS[0]])
        assert chat.send("Count.", stopping_criteria=criteria) == "one two three four"
    chat.send("What is it?", digit_image(4), **GREEDY)
    chat.send("What, what is it, and what is it again?", digit_image(5), **GREEDY, prompt_lookup_num_tokens=3)
    assert_as_from_scratch(chat)
    chat.send("And?", **GREEDY, repetition_penalty=1.3)
    assert_as_from_scratch(chat, repetition_penalty=1.3)


def test_default_length_of_an_answer(chat):
    """A quarter of a small context, 512 tokens of a large one."""
    with writes(chat.model, "x" * 2000):
        assert chat.send("Write.") == "x" * 256
        chat.model.generation_config.max_new_tokens = 5
        try:
            assert chat.send("Write.") == "x" * 5
        finally:
            chat.model.generation_config.max_new_tokens = None


@pytest.mark.parametrize(("name", "value"), [("cache_implementation", "static"), ("prefill_chunk_size", 4)])
def test_what_a_conversation_has_of_its_own_is_refused_by_name(chat, name, value):
    hold(chat, ROUNDS[:1])
    for images in ([], [digit_image(3)]):
        with pytest.raises(ValueError, match=rf"^`{name}={value!r}`: a conversation keeps a dynamic cache of its own"):
            chat.send("And?", images, **{name: value})
    assert len(chat.rounds) == 1
    assert_as_from_scratch(chat)
    chat.send("And?", **{name: None}, **GREEDY)
    assert_as_from_scratch(chat)


def test_more_images_than_numbers(chat):
    chat.send("What are these?", [digit_image(k) for k in range(12)], **GREEDY)
    with pytest.raises(ValueError, match="13 images"):
        chat.send("And this?", digit_image(12), **GREEDY)
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)
