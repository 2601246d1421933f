"""A session answers as the whole conversation would from the beginning, computes what is new only, and stays valid."""

import importlib
import io
import json
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from helpers.tiny import TOKENS_PER_IMAGE, digit_image, make_model, make_processor
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as models_of_tokens
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteriaList

from modeling_visualchat import VisualChatProcessor
from modeling_visualchat.chat_visualchat import ChatSession, Round, _sure_part
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


NEW_TOKENS = 8
# (question, number of its images): two that come together, rounds without any
ROUNDS = [("What is it?", 1), ("And?", 0), ("These?", 2), ("More.", 0), ("And this one?", 1), ("Bye.", 0)]
PROCESSOR = make_processor()


@pytest.fixture(scope="module")
def models():
    variants = ("mmca", "mmca_merged", "causal")
    return {name: make_model(multimodal_attention=name, image_number_keys=True) for name in variants}


@pytest.fixture
def model(models):
    return models["mmca"]


@pytest.fixture
def chat(model):
    """Greedy, unless told otherwise."""
    return model.start_chat(PROCESSOR)


GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
# What these tokens spell is made of the same tokens again, so that a cached answer fits what was answered
LETTERS = PROCESSOR.tokenizer.convert_tokens_to_ids(["x", "q", "z", "j"])
SPELLED = {"suppress_tokens": sorted(set(range(len(PROCESSOR.tokenizer))) - set(LETTERS))}


def from_scratch(session: ChatSession, **generation) -> torch.Tensor:
    """The tokens of the last answer, its conversation run from the beginning with pixel values and no cache."""
    inputs = PROCESSOR.apply_chat_template(
        session.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = session.model.generate(**inputs, **{**GREEDY, **generation})
    return output[0, inputs["input_ids"].shape[1] :]


def assert_as_from_scratch(session: ChatSession, **generation) -> None:
    assert session.rounds[-1].answer == PROCESSOR.decode(from_scratch(session, **generation), skip_special_tokens=True)


def hold(session: ChatSession, rounds: list[tuple[str, int]], first: int = 0) -> None:
    for question, images in rounds:
        session.send(question, [digit_image(k) for k in range(first, first + images)], **GREEDY)
        first += images


@contextmanager
def count_work(model):
    """Rows that enter the first decoder layer, and pictures that enter the tower."""
    work = {"rows": 0, "pictures": 0}

    def count_rows(module, args, kwargs):
        work["rows"] += args[0].shape[1]

    def count_pictures(module, args, kwargs):
        work["pictures"] += len(args[0])

    handles = [
        model.model.language_model.layers[0].register_forward_pre_hook(count_rows, with_kwargs=True),
        model.model.vision_tower.register_forward_pre_hook(count_pictures, with_kwargs=True),
    ]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def writes(model, text: str):
    """The model's head is rigged to write a text, and then its end token, again and again."""
    tokens = [*PROCESSOR.tokenizer(text, add_special_tokens=False)["input_ids"], PROCESSOR.tokenizer.eos_token_id]
    step = [0]

    def rig(module, args, output):
        output = torch.full_like(output, -100.0)
        output[..., tokens[step[0] % len(tokens)]] = 100.0
        step[0] += 1
        return output

    handle = model.lm_head.register_forward_hook(rig)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "causal"])
def test_six_rounds_answer_as_from_scratch_and_compute_what_is_new(models, variant, stream):
    session = models[variant].start_chat(PROCESSOR)
    cached = seen = 0
    for question, images in ROUNDS:
        pictures = [digit_image(k) for k in range(seen, seen + images)]
        seen += images
        with count_work(models[variant]) as work:
            answer = session.send(question, pictures, stream=stream, **GREEDY, **SPELLED)
            answer = "".join(answer)
        assert answer == session.rounds[-1].answer
        expected = from_scratch(session, **SPELLED)
        assert len(expected) == NEW_TOKENS
        assert answer == PROCESSOR.decode(expected)

        prompt = PROCESSOR.apply_chat_template(session.messages[:-1], add_generation_prompt=True)
        length = len(PROCESSOR.tokenizer(prompt, add_special_tokens=False)["input_ids"]) + seen * (TOKENS_PER_IMAGE - 1)
        # The last token of an answer is read in the next round, its others are when they are made
        assert work == {"rows": length - cached + NEW_TOKENS - 1, "pictures": images}
        cached = length + NEW_TOKENS - 1


@pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "causal"])
def test_answers_that_spell_otherwise_than_they_were_made(models, variant):
    """Random tokens: half characters, merges. What was cached does not fit the text, and is computed again."""
    session = models[variant].start_chat(PROCESSOR)
    seen = 0
    for question, images in ROUNDS:
        pieces = list(session.send(question, [digit_image(k) for k in range(seen, seen + images)], stream=True, **GREEDY))
        seen += images
        assert len(pieces) > 1
        assert "".join(pieces) == session.rounds[-1].answer
        assert_as_from_scratch(session)


def test_a_variant_whose_text_reads_later_images():
    session = make_model(multimodal_attention="mmca_released").start_chat(PROCESSOR)
    for question, images in ROUNDS[:4]:
        session.send(question, [digit_image(k) for k in range(images)], **GREEDY)
        assert_as_from_scratch(session)
    session.undo()
    session.undo()
    with count_work(session.model) as work:
        session.send("Without them?", **GREEDY)
        session.send("And on?", **GREEDY)
    assert_as_from_scratch(session)
    assert work["pictures"] == 1


def test_a_model_whose_settings_switch_the_cache_off():
    model = make_model(image_number_keys=True)
    model.config.use_cache = model.generation_config.use_cache = False
    session = model.start_chat(PROCESSOR)
    for question, images in ROUNDS[:3]:
        session.send(question, [digit_image(k) for k in range(images)], **GREEDY)
        assert_as_from_scratch(session)
    with count_work(model) as work:
        session.send("And?", **GREEDY, **SPELLED)
    assert work["rows"] < 60


def test_settings_for_other_caches_are_left_to_others():
    answers = []
    for _ in range(2):
        model = make_model(image_number_keys=True)
        session = model.start_chat(PROCESSOR)
        if answers:
            model.generation_config.cache_implementation, model.generation_config.prefill_chunk_size = "static", 8
        hold(session, ROUNDS[:3])
        answers.append([one.answer for one in session.rounds])
    assert answers[0] == answers[1]


def test_a_model_that_changes_computes_the_conversation_again():
    model = make_model(image_number_keys=True)
    session = model.start_chat(PROCESSOR)

    def ask(reuses: bool):
        with count_work(model) as work:
            session.send("And?", **GREEDY, **SPELLED)
        assert_as_from_scratch(session, **SPELLED)
        assert (work["rows"] < 60) == reuses

    session.send("What is it?", [digit_image(1), digit_image(2)], **GREEDY, **SPELLED)
    ask(reuses=True)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.5)
    ask(reuses=False)
    ask(reuses=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj", init_lora_weights=False))
    ask(reuses=False)
    with adapted.disable_adapter():
        ask(reuses=False)
    ask(reuses=False)
    model.set_attn_implementation({"text_config": "eager"})
    ask(reuses=False)
    model.bfloat16()
    session.send("And?", **GREEDY)


def test_eager_attention_goes_without_image_memory():
    session = make_model("eager", image_number_keys=True).start_chat(PROCESSOR)
    for question, images in ROUNDS[:3]:
        session.send(question, [digit_image(k) for k in range(images)], do_sample=False, max_new_tokens=3)
    assert_as_from_scratch(session, max_new_tokens=3)


def test_offloaded_weights_go_without_image_memory(models):
    accelerate = pytest.importorskip("accelerate")
    model = make_model(image_number_keys=True)
    expected = make_model(image_number_keys=True).start_chat(PROCESSOR).send("What?", digit_image(0), **GREEDY)
    accelerate.cpu_offload(model.model.language_model.layers[2], execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert model.start_chat(PROCESSOR).send("What?", digit_image(0), **GREEDY) == expected


def test_undo_edit_and_clear(chat):
    with pytest.raises(IndexError, match="nothing to take back"):
        chat.undo()
    hold(chat, ROUNDS[:4])
    taken = chat.undo()
    assert (taken.text, len(chat.rounds)) == ("More.", 3)
    chat.undo()
    chat.send("Something else?", digit_image(9), **GREEDY)
    assert_as_from_scratch(chat)

    with count_work(chat.model) as work:
        chat.edit(0, "Who is it?", **GREEDY)
    assert [(one.text, len(one.images)) for one in chat.rounds] == [("Who is it?", 1)]
    assert work["pictures"] == 0
    assert_as_from_scratch(chat)
    for index in (1, -1):
        with pytest.raises(IndexError, match=r"no round .* has 1"):
            chat.edit(index, "What?")

    chat.clear()
    assert (chat.rounds, chat.messages, chat.dropped_rounds) == ([], [], 0)
    with count_work(chat.model) as work:
        chat.send("Again?", digit_image(0), **GREEDY)
    assert work["pictures"] == 0
    assert_as_from_scratch(chat)


@pytest.mark.parametrize("variant", ["mmca", "causal"])
def test_forks_go_on_independently_and_share_tensors(models, variant):
    session = models[variant].start_chat(PROCESSOR, system="Be brief.")
    hold(session, ROUNDS[:3])
    fork = session.fork()
    for ours, theirs in zip(session._computed.cache.layers, fork._computed.cache.layers):
        for part, other in zip(*([layer.text, layer.images] if variant == "mmca" else [layer] for layer in (ours, theirs))):
            assert part.keys.data_ptr() == other.keys.data_ptr()
    with count_work(fork.model) as work:
        fork.send("Left?", digit_image(7), **GREEDY)
    assert work["rows"] < 80
    session.send("Right?", digit_image(8), **GREEDY)
    fork.undo()
    fork.edit(1, "Left, once more?", **GREEDY)
    session.send("And on?", **GREEDY)
    assert [one.text for one in session.rounds] == ["What is it?", "And?", "These?", "Right?", "And on?"]
    assert [one.text for one in fork.rounds] == ["What is it?", "Left, once more?"]
    for one in (session, fork):
        assert one.messages[0] == {"role": "system", "content": "Be brief."}
        assert_as_from_scratch(one)


def test_save_and_load(chat, tmp_path):
    chat.system, chat.dropped_rounds = "Be brief — très bref.", 3
    hold(chat, ROUNDS[:3])
    chat.save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "conversation.json").read_text())
    assert content["rounds"][2]["images"] == ["image-2.png", "image-3.png"]

    loaded = ChatSession.load(tmp_path / "saved", chat.model, PROCESSOR, drop_oldest=True)
    assert loaded.rounds == chat.rounds
    assert (loaded.system, loaded.dropped_rounds, loaded.drop_oldest) == (chat.system, 3, True)
    for one in (chat, loaded):
        hold(one, ROUNDS[3:], first=3)
    assert loaded.rounds == chat.rounds
    assert_as_from_scratch(loaded)


def test_what_is_no_saved_conversation_is_named(chat, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"conversation\.json"):
        ChatSession.load(tmp_path, chat.model, PROCESSOR)
    for content in ("{", "[]", '{"system": null}', '{"system": null, "dropped_rounds": 0, "rounds": [{"text": "a"}]}'):
        (tmp_path / "conversation.json").write_text(content)
        with pytest.raises(ValueError, match=r"conversation\.json is not a conversation"):
            ChatSession.load(tmp_path, chat.model, PROCESSOR)
    hold(chat, ROUNDS[:1])
    chat.save(tmp_path)
    (tmp_path / "image-1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"image-1\.png"):
        ChatSession.load(tmp_path, chat.model, PROCESSOR)


def test_kinds_of_images(chat, tmp_path):
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
    assert (chat._store.misses, len(chat._store)) == (1, 1)


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
        (Image.open(tmp_path / "half.png"), ValueError, "image 2: the picture is broken"),
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
    image_token = PROCESSOR.image_token_id
    chat.send("What does <image> do in HTML?</s>", digit_image(0), **GREEDY)
    assert int((chat._computed.input_ids == image_token).sum()) == TOKENS_PER_IMAGE
    assert int((chat._computed.input_ids == PROCESSOR.tokenizer.eos_token_id).sum()) == 0
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


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("A cat.", "A cat."),
        ("A cat.\n\n### Question:\nWhat?", "A cat."),
        ("A cat.\n### Image 2:\n", "A cat."),
        ("### Question:\nWhat?", ""),
        ("A cat.\n### Answer:\nA dog.", "A cat."),
        ("A cat.\n\n\n### Image 12:\n", "A cat."),
        # Headings of Markdown, and lines that only resemble the prompt's, are the model's own
        ("A cat:\n\n### Size\nsmall\n### Color\nblack", "A cat:\n\n### Size\nsmall\n### Color\nblack"),
        ("### Size\nsmall", "### Size\nsmall"),
        ("### Question 1:\n#### Answer:\nx", "### Question 1:\n#### Answer:\nx"),
        ("### Image:\n### Answer: yes\n", "### Image:\n### Answer: yes\n"),
        # The model ended it itself
        ("It asks\n### Question:", "It asks\n### Question:"),
        ("It asks\n\n### Image 1:", "It asks\n\n### Image 1:"),
        ("a ### b", "a ### b"),
        ("a\n###b\n##\n\n", "a\n###b\n##\n\n"),
        ("a\n###", "a\n###"),
        ("Un été, 一只猫 🐈\n\nIt ends.\n", "Un été, 一只猫 🐈\n\nIt ends.\n"),
    ],
)
def test_an_answer_ends_where_a_section_begins(chat, written, answer, beams):
    with writes(chat.model, written):
        if beams == 1:
            pieces = list(chat.send("What?", stream=True, max_new_tokens=60))
            assert "".join(pieces) == answer
            assert len(pieces) > 1 or not answer
            assert "\ufffd" not in "".join(pieces)
    with writes(chat.model, written):
        assert chat.send("What?", max_new_tokens=60, num_beams=beams) == answer
    assert chat.rounds[-1].answer == answer
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    ("written", "answer"),
    [("It is\n\n### Question:", "It is"), ("### Image 1:", ""), ("It is\n### Que", "It is\n### Que"), ("a\n\n", "a\n\n")],
)
def test_an_answer_that_is_broken_off_in_a_sections_line(chat, written, answer, beams):
    """Of which it is not known yet whether it is one."""
    length = len(PROCESSOR.tokenizer(written, add_special_tokens=False)["input_ids"])
    with writes(chat.model, written):
        assert chat.send("What?", max_new_tokens=length, num_beams=beams) == answer
    if beams == 1:
        with writes(chat.model, written):
            assert "".join(chat.send("What?", max_new_tokens=length, stream=True)) == answer
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)


def test_no_piece_shows_what_is_cut_later():
    text = "A cat.\n\n### Image 12:\n### Question:\nx"
    for end in range(len(text)):
        assert "A cat.".startswith(_sure_part(text[:end]))
    for line in ("### Size\n", "### Image x", "### Answers", "#### ", "###Q"):
        assert _sure_part(f"a\n{line}") == f"a\n{line.rstrip(chr(10))}"


def test_closing_the_iterator_ends_the_answer(chat):
    hold(chat, ROUNDS[:1])
    with writes(chat.model, "x" * 500):
        pieces = chat.send("Write.", digit_image(4), stream=True, max_new_tokens=400)
        assert len(chat.rounds) == 1  # reading begins it
        assert next(pieces) + next(pieces) == "xx"
        pieces.close()
        assert 2 <= len(chat.rounds[-1].answer) < 400
        for _ in chat.send("Write.", stream=True, max_new_tokens=400):
            break  # nobody holds the iterator any more
        assert 1 <= len(chat.rounds[-1].answer) < 400
    assert set(chat.rounds[-1].answer) == {"x"}
    assert [one.text for one in chat.rounds] == ["What is it?", "Write.", "Write."]
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)


def test_asking_something_else_ends_the_answer_that_is_being_written(chat):
    with writes(chat.model, "x" * 500):
        first = chat.send("Write.", stream=True, max_new_tokens=400)
        next(first)
        fork = chat.fork()
        second = chat.send("And?", stream=True, max_new_tokens=3)
        assert len(chat.rounds) == 1
        assert list(first) == []
        chat.send("Go on.", max_new_tokens=3)
        with pytest.raises(RuntimeError, match="Something else was asked"):
            next(second)
        third = chat.send("Write.", stream=True, max_new_tokens=400)
        next(third)
        assert chat.undo().text == "Write."
    assert [one.text for one in chat.rounds] == ["Write.", "Go on."]
    assert fork.rounds == []
    for one in (chat, fork):
        one.send("And?", **GREEDY)
        assert_as_from_scratch(one)


def test_one_thread_at_a_time(chat):
    begun, go_on, pieces = threading.Event(), threading.Event(), []

    def wait(input_ids, scores):
        begun.set()
        go_on.wait(20)
        return False

    with writes(chat.model, "x" * 500):
        answer = chat.send("Write.", stream=True, max_new_tokens=20, stopping_criteria=[wait])
        reader = threading.Thread(target=lambda: pieces.extend(answer))
        reader.start()
        begun.wait(20)
        for something_else in (lambda: chat.send("And?"), chat.undo, chat.clear):
            with pytest.raises(RuntimeError, match="Another thread is reading an answer"):
                something_else()
        go_on.set()
        reader.join()
    assert "".join(pieces) == chat.rounds[-1].answer == "x" * 20


def test_ctrl_c_in_the_consumer(chat):
    with writes(chat.model, "x" * 500):
        with pytest.raises(KeyboardInterrupt):
            for _ in chat.send("Write.", digit_image(1), stream=True, max_new_tokens=400):
                raise KeyboardInterrupt
    chat.send("And?", **GREEDY)
    assert [one.text for one in chat.rounds] == ["Write.", "And?"]
    assert_as_from_scratch(chat)


@pytest.mark.parametrize("beams", [1, 2])
def test_ctrl_c_while_waiting(chat, beams):
    hold(chat, ROUNDS[:1])

    def interrupt_once(input_ids, scores):
        if input_ids.shape[1] - prompt_length == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return False

    prompt_length = chat.tokenize([*chat.rounds, Round("Write.")]).shape[1]
    with writes(chat.model, "x" * 500), pytest.raises(KeyboardInterrupt):
        chat.send("Write.", max_new_tokens=400, num_beams=beams, stopping_criteria=[interrupt_once])
    assert chat.rounds[-1].text == "Write."
    assert 3 <= len(chat.rounds[-1].answer) < 400
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)


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


def test_prompt_lookup_goes_on_from_what_was_computed(chat):
    for question, images in ROUNDS[:4]:
        with count_work(chat.model) as work:
            chat.send(question, [digit_image(k) for k in range(images)], **GREEDY, prompt_lookup_num_tokens=3)
        assert_as_from_scratch(chat)
    assert work["rows"] < 80


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_generate_leaves_the_session_as_it_was(chat, stream):
    hold(chat, ROUNDS[:1])
    before = list(chat.rounds)

    def fail_late(input_ids, scores):
        if input_ids.shape[1] > 60:
            raise MemoryError("no room for a token")
        return scores

    with pytest.raises(MemoryError, match="no room for a token"):
        "".join(chat.send("Write.", digit_image(2), stream=stream, logits_processor=[fail_late], max_new_tokens=60))
    assert chat.rounds == before
    chat.send("And?", digit_image(3), **GREEDY)
    assert_as_from_scratch(chat)


def test_too_long_a_conversation_raises(chat):
    hold(chat, ROUNDS[:1])
    before = list(chat.rounds)
    with pytest.raises(ValueError, match=r"conversation has 1\d\d\d tokens and the answer up to 8, .* holds 1024"):
        chat.send("y" * 1000, **GREEDY)
    with pytest.raises(ValueError, match="the answer up to 1000"):
        chat.edit(0, "What?", max_new_tokens=1000)
    assert chat.rounds == before
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)


def test_oldest_rounds_are_dropped_with_their_images(model, caplog):
    chat = model.start_chat(PROCESSOR, drop_oldest=True)
    for k in range(5):
        with count_work(model) as work:
            chat.send(f"{k}" + "y" * 300, digit_image(k), **GREEDY)
        assert work["pictures"] == 1  # those that stay are remembered
        assert_as_from_scratch(chat)
    assert [one.text[0] for one in chat.rounds] == ["3", "4"]
    assert chat.dropped_rounds == 3
    assert "the oldest 1 rounds were dropped" in caplog.text
    with pytest.raises(ValueError, match=r"last question has 1\d\d\d tokens .* ask less at once"):
        chat.send("y" * 1000, **GREEDY)
    with pytest.raises(TypeError, match="streamer"):
        chat.send("z" * 500, streamer=None, **GREEDY)
    assert chat.dropped_rounds == 3


def added_from_scratch(session: ChatSession, beginning: str) -> str:
    """What the model adds to the last answer's beginning, its conversation run from the beginning."""
    messages = [*session.messages[:-1], {"role": "assistant", "content": beginning}]
    inputs = PROCESSOR.apply_chat_template(
        messages, continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = session.model.generate(**inputs, **GREEDY)
    return PROCESSOR.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class TestBegunAnswers:
    @pytest.mark.parametrize("beginning", ["It is", "It is ", "A cat:\n", "\n\nWell", " ", "#", "A\n##"])
    def test_go_on_as_from_scratch(self, chat, beginning):
        hold(chat, ROUNDS[:2])
        added = chat.send("These?", [digit_image(7)], begin_with=beginning, **GREEDY)
        assert added == added_from_scratch(chat, beginning)
        assert chat.rounds[-1].answer == beginning + added
        streamed = "".join(chat.edit(2, "These?", stream=True, begin_with=beginning, **GREEDY))
        assert (streamed, chat.rounds[-1].answer) == (added, beginning + added)
        chat.send("And then?", **GREEDY)
        assert_as_from_scratch(chat)

    def test_blanks_between_beginning_and_rest_are_kept(self, chat):
        with writes(chat.model, " is a cat"):
            assert chat.send("What is it?", begin_with="It") == " is a cat"
        assert chat.rounds[-1].answer == "It is a cat"

    def test_a_tokenizer_that_strips_the_first_blank(self):
        """LLaMA's: an answer that is decoded alone loses the blank before its first word, one that goes on must not."""
        backend = Tokenizer(models_of_tokens.BPE(unk_token="<unk>", byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = decoders.Strip(" ", left=1)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
        backend.train_from_iterator(["### Question:\nWhat is it?\n### Answer:\nIt is a cat."], trainer)
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        processor = VisualChatProcessor(PROCESSOR.image_processor, tokenizer, TOKENS_PER_IMAGE)
        chat = make_model(image_token_id=processor.image_token_id).start_chat(processor)
        ids = [*tokenizer.encode("a cat", add_special_tokens=False), tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a cat"

        def write(input_ids, scores):
            wanted = torch.full_like(scores, -torch.inf)
            wanted[:, ids[input_ids.shape[1] - len(prompt[0])]] = 0.0
            return wanted

        for beginning, added in (("", "a cat"), ("It is", " a cat"), ("It is\n", " a cat")):
            prompt = chat.tokenize([*chat.rounds, Round("What is it?", answer=beginning)])
            assert chat.send("What is it?", begin_with=beginning, logits_processor=[write]) == added
            assert chat.rounds[-1].answer == beginning + added

    def test_special_tokens_in_a_beginning_are_text(self, chat):
        hold(chat, ROUNDS[:1])
        chat.send("And?", begin_with="</s><image> a", **GREEDY)
        assert chat.rounds[-1].answer.startswith("</s><image> a")
        prompt = chat.tokenize([chat.rounds[0], Round("And?", answer="</s><image> a")])
        without = chat.tokenize([chat.rounds[0], Round("And?")])
        special = torch.tensor(PROCESSOR.tokenizer.all_special_ids)
        assert torch.isin(prompt, special).sum() == torch.isin(without, special).sum()
        start = chat.find_answer([chat.rounds[0], Round("And?", answer="</s><image> a")], prompt)
        assert PROCESSOR.decode(prompt[0, start:]) == "</s><image> a"

    def test_a_section_that_is_begun_ends_the_answer(self, chat):
        with writes(chat.model, "## Question:\nMore"):
            assert chat.send("What is it?", begin_with="A cat\n#") == ""
        assert chat.rounds[-1].answer == "A cat\n#"

    def test_what_cannot_begin_an_answer(self, chat):
        hold(chat, ROUNDS[:1])
        before = list(chat.rounds)
        with pytest.raises(ValueError, match="`begin_with` holds a section line of the prompt"):
            chat.send("And?", begin_with="So\n### Question:\nWhy?")
        with pytest.raises(TypeError, match="begins with a string, got int"):
            chat.edit(0, "And?", begin_with=7)
        assert chat.rounds == before


def test_more_images_than_numbers(chat):
    chat.send("What are these?", [digit_image(k) for k in range(12)], **GREEDY)
    with pytest.raises(ValueError, match="13 images"):
        chat.send("And this?", digit_image(12), **GREEDY)
    chat.send("And?", **GREEDY)
    assert_as_from_scratch(chat)


def test_sessions_share_a_store(model):
    store = ImageMemoryStore(model, max_bytes=2**20)
    first, second = (model.start_chat(PROCESSOR, store=store) for _ in range(2))
    first.send("What are these?", [digit_image(0), digit_image(1)], **GREEDY)
    with count_work(model) as work:
        second.send("Hello.", **GREEDY)
        second.send("And these?", [digit_image(1), digit_image(0)], **GREEDY)
    assert work["pictures"] == 0
    assert (store.hits, store.misses) == (2, 2)
    assert_as_from_scratch(second)


def test_the_benchmark_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    benchmark = importlib.import_module("chat_rounds")
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sides = benchmark.make_model_and_processor(text, {**vision, "image_size": 16, "patch_size": 8})
    seconds = benchmark.measure_rounds(*sides, rounds=3, repeats=2)
    assert [len(rounds) for rounds in seconds.values()] == [3, 3]
    assert len(benchmark.to_results(seconds)) == 3
