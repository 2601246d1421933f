"""The web page: what its controls do, without a browser. `test_web_demo_browser.py` uses a real one."""

import gc
import html
import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.tiny import digit_image, make_model, make_processor
from visualchat.chat.page import ChatPage
from visualchat.chat.page_conversation import EXAMPLES, digit_examples
from visualchat.cli.web import parse_arguments


SETTINGS = (6, 0, 1, -1)  # max new tokens, temperature, top-p, seed
ANNA, BERT = SimpleNamespace(session_hash="anna"), SimpleNamespace(session_hash="bert")


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What the page would show as a message."""
    import gradio

    shown = []
    monkeypatch.setattr(gradio, "Warning", lambda message, **_: shown.append(html.unescape(message)))
    return shown


@pytest.fixture(scope="module")
def model():
    return make_model(image_number_keys=True)


@pytest.fixture
def sessions(model, monkeypatch) -> list[weakref.ref]:
    """Of the model, those that the page begins, in turn."""
    begun, start_chat = [], model.start_chat

    def record(*args, **kwargs):
        session = start_chat(*args, **kwargs)
        begun.append(weakref.ref(session))
        return session

    monkeypatch.setattr(model, "start_chat", record)
    return begun


@pytest.fixture
def page(model, warnings):
    return ChatPage(model, make_processor(), max_images=4, max_pixels=10_000, max_cached=2)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three pictures, as Gradio hands over uploads."""
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for k, path in enumerate(paths):
        digit_image(k).resize((40, 30)).save(path)
    return [str(path) for path in paths]


def ask(page, text, files=(), conversation=None, visitor=ANNA, settings=SETTINGS):
    return list(page.ask(visitor, conversation, {"text": text, "files": list(files)}, *settings))


def numbers(messages: list[dict]) -> list[list[int]]:
    """The image numbers that each question shows."""
    shown, pictures = [], []
    for message in messages:
        if not isinstance(message["content"], str):
            pictures = [int(k) for k in re.findall(r"<figcaption>Image (\d+)<", message["content"].value)]
        elif message["role"] == "user":
            shown.append(pictures)
            pictures = []
    return shown


def box_of(shown: list) -> dict:
    return shown[2].constructor_args


class TestAsking:
    def test_numbers_are_those_of_the_prompt(self, page, files, sessions):
        *_, shown = ask(page, "first", files[:2])
        *_, shown = ask(page, "second", conversation=shown[0])
        *_, shown = ask(page, "third", files[2:], shown[0])
        assert numbers(shown[1]) == [[1, 2], [], [3]]
        (session,) = sessions
        prompt = page.processor.apply_chat_template(session().messages)
        assert re.findall(r"### Image (\d+)|### Question:\n(\w+)", prompt) == [
            ("1", ""), ("2", ""), ("", "first"), ("", "second"), ("3", ""), ("", "third")
        ]  # fmt: skip
        assert "next image will be Image 4" in box_of(shown)["label"]

    def test_the_answer_grows_and_is_that_of_the_session(self, page, files, model):
        *growing, last = ask(page, "What is this?", files[:2], settings=(40, 1.5, 1, 3))
        answers = [shown[1][-1]["content"] for shown in growing]
        assert answers[0] == "" and len(set(answers)) > 3
        assert all(later.startswith(earlier) for earlier, later in zip(answers, [*answers[1:], last[1][-1]["content"]]))
        torch.manual_seed(3)
        chat = model.start_chat(page.processor)
        truth = chat.send("What is this?", images=files[:2], max_new_tokens=40, do_sample=True, temperature=1.5, top_p=1.0)
        assert html.unescape(last[1][-1]["content"]) == truth
        assert growing[0][3].constructor_args["interactive"] and not last[3].constructor_args["interactive"]  # Stop

    def test_the_seed_repeats_an_answer(self, page, warnings):
        def answer(seed):
            return ask(page, "Why?", settings=(20.0, 1, 1, seed))[-1][1][-1]["content"]

        assert answer(5) == answer(5) != answer(6)
        assert not warnings
        assert len({answer(-1) for _ in range(3)}) > 1

    def test_pictures_are_kept_as_the_model_sees_them(self, page, tmp_path):
        Image.new("RGBA", (90, 60)).save(tmp_path / "clear.png")
        conversation = ask(page, "What?", [tmp_path / "clear.png"])[-1][0]
        assert conversation.rounds[0].images[0].size == (16, 16)  # the tower's
        assert conversation.rounds[0].images[0].getpixel((8, 8)) == (255, 255, 255)  # transparency on white

    def test_text_is_shown_as_it_is(self, page):
        question = 'Is <b>this</b> <img src="http://example.com/a.png"> & bold?'
        conversation, messages, *_ = ask(page, question)[-1]
        assert messages[0]["content"] == html.escape(question, quote=False)
        assert conversation.rounds[0].text == question
        event = SimpleNamespace(index=0, value=messages[0]["content"])
        assert list(page.edit(ANNA, event, conversation, *SETTINGS))[-1][0].rounds[0].text == question


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "make", "message"),
        [
            ("What?", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nbroken"), "new.png: 14 bytes is not an image"),
            ("What?", lambda path: None, "new.png: the server no longer has this file, add it again"),
            ("What?", lambda path: path.write_bytes(b""), "image 1, new.png: 0 bytes: the image is empty"),
            ("What?", lambda path: Image.new("L", (101, 100)).save(path), "101 × 100 pixels: at most 10,000 are allowed"),
            ("  ", lambda path: Image.new("L", (9, 9)).save(path), "Type a question"),
            ("so long " * 400, lambda path: Image.new("L", (9, 9)).save(path), "but the model's context holds 1024"),
        ],
        ids=["broken", "gone", "empty", "pixels", "no-question", "context"],
    )  # fmt: skip
    def test_nothing_is_lost(self, page, files, warnings, tmp_path, text, make, message):
        conversation, messages, *_ = ask(page, "first", files[:1])[-1]
        make(tmp_path / "new.png")
        *growing, shown = ask(page, text, [str(tmp_path / "new.png")], conversation)
        assert len(warnings) == 1 and message in warnings[0]
        assert str(tmp_path) not in warnings[0]  # nobody learns where files lie
        assert not growing and shown[0] is conversation
        assert shown[1][-1]["content"] == messages[-1]["content"] and len(shown[1]) == len(messages)
        assert box_of(shown)["value"] == {"text": text, "files": [str(tmp_path / "new.png")]}
        assert numbers(ask(page, "second", files[1:2], conversation)[-1][1]) == [[1], [2]]

    def test_a_file_is_read_as_it_is_named_alone(self, page, files, warnings, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        conversation = ask(page, "first", files[:1])[-1][0]
        for source in (Path(files[1]).as_uri(), f"~/{Path(files[1]).name}"):
            ask(page, "second", [source], conversation)
        assert len(warnings) == 2 and all("the server no longer has this file, add it again" in one for one in warnings)
        assert len(conversation.rounds) == 1

    def test_too_many_pictures(self, page, files, warnings):
        conversation = ask(page, "first", files)[-1][0]
        ask(page, "second", files[:2], conversation)
        assert warnings == ["2 more images are too many: the conversation has 3 of at most 4"]
        shown = ask(page, "second", files[:1], conversation)[-1]
        assert len(warnings) == 1 and box_of(shown)["label"] == "The conversation has 4 images, which is the maximum"

    def test_the_images_of_a_message_have_a_limit_together(self, page, files, warnings):
        conversation = ask(page, "first", files[:1])[-1][0]
        page.max_bytes = conversation.max_bytes = sum(os.path.getsize(path) for path in files[:2])
        shown = ask(page, "second", files, conversation)[-1]
        assert re.fullmatch(r"The 3 images have [\d,]+ bytes together: at most [\d,]+ are allowed", warnings[0])
        assert box_of(shown)["value"] == {"text": "second", "files": files}
        assert len(ask(page, "second", files[:2], conversation)[-1][0].rounds) == 2 and len(warnings) == 1

    def test_a_long_text_is_refused_before_it_is_tokenized(self, page, warnings, monkeypatch):
        conversation = ask(page, "first")[-1][0]
        monkeypatch.setattr(page.processor, "encode_prompts", None)
        shown = ask(page, "x" * 2_000_000, (), conversation)[-1]
        assert box_of(shown)["interactive"] and len(box_of(shown)["value"]["text"]) == 2_000_000
        list(page.edit(ANNA, SimpleNamespace(index=0, value="x" * 400_001), conversation, *SETTINGS))
        assert warnings == [
            f"The question has {count} characters: at most 400,000 are allowed" for count in ("2,000,000", "400,001")
        ]

    @pytest.mark.parametrize("seed", [2**53, 2**64, -2, 1e30])
    def test_a_seed_that_is_none(self, page, warnings, seed):
        shown = ask(page, "first", settings=(6, 0, 1, seed))[-1]
        assert warnings == [f"The seed is {seed}: use 0 to 9007199254740991, or -1 for a different answer each time"]
        assert box_of(shown)["value"]["text"] == "first" and shown[0].rounds == []

    def test_the_largest_seed_and_an_empty_field(self, page, warnings):
        for seed in (2**53 - 1, 0, None):
            assert len(ask(page, "first", settings=(6, 1, 1, seed))[-1][0].rounds) == 1
        assert not warnings

    def test_a_panic_of_the_tokenizer(self, page, files, warnings, monkeypatch, caplog):
        class PanicException(BaseException):
            """As pyo3's."""

        def panic(*_):
            raise PanicException("called `Result::unwrap()` on an `Err` value")

        conversation = ask(page, "first")[-1][0]
        with monkeypatch.context() as patch:
            patch.setattr(page.processor, "encode_prompts", panic)
            shown = ask(page, "second", files[:1], conversation)[-1]
        assert warnings == ["The answer failed. The log of the page has the details"]
        assert "called `Result::unwrap()`" in caplog.text
        assert box_of(shown)["interactive"] and box_of(shown)["value"] == {"text": "second", "files": files[:1]}
        assert [one.text for one in ask(page, "third", (), conversation)[-1][0].rounds] == ["first", "third"]

    def test_calls_that_the_page_does_not_make(self, page, warnings):
        conversation = ask(page, "first")[-1][0]
        for event in (SimpleNamespace(index=[0], value="x"), SimpleNamespace(index=0, value=None)):
            *_, shown = page.edit(ANNA, event, conversation, *SETTINGS)
            assert box_of(shown)["interactive"]
        *_, shown = page.ask_example(ANNA, SimpleNamespace(index=99), conversation, *SETTINGS)
        assert box_of(shown)["interactive"] and len(shown[0].rounds) == 1 and len(warnings) == 3

    def test_half_a_character(self, page, warnings):
        ask(page, "a\ud800")
        assert warnings == ["A question holds half a character, '\\ud800', at position 1"]

    def test_the_models_numbers_are_a_limit(self, model):
        assert ChatPage(model, make_processor(), max_images=99).max_images == 12

    def test_a_failure_while_answering(self, page, files, warnings, monkeypatch):
        conversation = ask(page, "first", files[:1])[-1][0]
        with monkeypatch.context() as patch:
            patch.setattr(page.model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
            shown = ask(page, "second", files[1:2], conversation)[-1]
        assert warnings == ["out of memory"]
        assert box_of(shown)["value"] == {"text": "second", "files": files[1:2]} and box_of(shown)["interactive"]
        assert [one.text for one in ask(page, "third", (), conversation)[-1][0].rounds] == ["first", "third"]

    def test_an_empty_conversation(self, page, warnings):
        page.undo(None)
        list(page.retry(ANNA, None, *SETTINGS))
        list(page.edit(ANNA, SimpleNamespace(index=4, value="What?"), None, *SETTINGS))
        assert [message.split(":")[0] for message in warnings] == [
            "There is no question to undo", "There is no question to ask again", "There is no question 1"
        ]  # fmt: skip

    def test_controls_while_an_answer_is_written(self, page, warnings):
        answering = page.ask(ANNA, None, {"text": "first", "files": []}, *SETTINGS)
        conversation = next(answering)[0]
        page.undo(conversation)
        page.clear(conversation)
        assert warnings == ["An answer is being generated: stop it, or wait until it is complete"] * 2
        assert [one.text for one in list(answering)[-1][0].rounds] == ["first"]


class TestControls:
    def test_undo_puts_the_question_back(self, page, files):
        conversation = ask(page, "first", files[:1])[-1][0]
        ask(page, "second", files[1:], conversation)
        shown = page.undo(conversation)
        assert numbers(shown[1]) == [[1]]
        assert box_of(shown)["value"]["text"] == "second"
        again = ask(page, "second", box_of(shown)["value"]["files"], conversation)[-1]
        assert numbers(again[1]) == [[1], [2, 3]]
        assert not page.undo(page.undo(conversation)[0])[4].constructor_args["interactive"]

    def test_retry_asks_the_same_about_the_same(self, page, files):
        conversation = ask(page, "first", files[:2])[-1][0]
        before = conversation.rounds
        shown = list(page.retry(ANNA, conversation, *SETTINGS))[-1]
        assert shown[0].rounds == before  # greedy
        shown = list(page.retry(ANNA, conversation, 20, 1.5, 1, 1))[-1]
        assert shown[0].rounds[0].answer != before[0].answer and numbers(shown[1]) == [[1, 2]]

    def test_edit_drops_what_follows(self, page, files):
        conversation = ask(page, "first", files[:2])[-1][0]
        ask(page, "second", (), conversation)
        ask(page, "third", files[2:], conversation)
        event = SimpleNamespace(index=3, value="another")  # pictures, first, answer, second
        shown = list(page.edit(ANNA, event, conversation, *SETTINGS))[-1]
        assert [one.text for one in shown[0].rounds] == ["first", "another"] and numbers(shown[1]) == [[1, 2], []]

    def test_clear_begins_at_image_1(self, page, files):
        conversation = ask(page, "first", files)[-1][0]
        assert page.clear(conversation)[1] == []
        assert numbers(ask(page, "second", files[:2], conversation)[-1][1]) == [[1, 2]]

    def test_stop_keeps_what_there_is(self, page, files):
        answering = page.ask(ANNA, None, {"text": "first", "files": files[:1]}, 500, 1.5, 1, 0)
        for shown in answering:
            if shown[1][-1]["content"]:
                page.stop(shown[0])
        answer = shown[0].rounds[0].answer
        assert answer and len(page.processor.tokenizer(answer)["input_ids"]) < 400
        assert numbers(ask(page, "second", files[1:2], shown[0])[-1][1]) == [[1], [2]]
        page.stop(None)  # nothing has been asked

    @pytest.mark.parametrize("name", ["digits", "photographs", "none"])
    def test_examples(self, model, name):
        page = ChatPage(model, make_processor(), EXAMPLES[name]())
        page.build()
        for index, example in enumerate(page.examples):
            *_, shown = page.ask_example(ANNA, SimpleNamespace(index=index), None, *SETTINGS)
            assert [one.text for one in shown[0].rounds] == [text for text, _ in example.rounds]
            count = sum(len(images) for _, images in example.rounds)
            assert [k for question in numbers(shown[1]) for k in question] == list(range(1, count + 1))
        assert (name == "none") == (not page.examples)

    def test_stop_ends_an_example(self, page):
        page.examples = digit_examples()
        answering = page.ask_example(ANNA, SimpleNamespace(index=1), None, *SETTINGS)
        page.stop(next(answering)[0])
        assert len(list(answering)[-1][0].rounds) == 1


class TestVisitors:
    def test_they_do_not_see_each_other(self, page, files, model):
        anna = ask(page, "What is this?", files[:1], visitor=ANNA)[-1][0]
        bert = ask(page, "And what is that?", files[:2], visitor=BERT)[-1][0]
        assert page.store.hits == 1  # Bert's first picture is the one that Anna showed
        anna_shown = ask(page, "Sure?", files[2:], anna, ANNA)[-1]
        bert_shown = page.undo(bert)
        assert numbers(anna_shown[1]) == [[1], [2]] and numbers(bert_shown[1]) == []
        alone = model.start_chat(page.processor)
        alone.send("What is this?", images=files[:1], max_new_tokens=6)
        assert alone.send("Sure?", images=files[2:], max_new_tokens=6) == anna.rounds[1].answer

    def test_a_closed_tab_frees_the_cache(self, page, files, sessions):
        conversation = ask(page, "first", files[:1])[-1][0]
        (session,) = sessions
        page.leave(ANNA)
        page.leave(BERT)  # who never asked
        gc.collect()
        assert session() is None and not page.cached
        assert numbers(ask(page, "second", files[1:2], conversation)[-1][1]) == [[1], [2]]  # the tab came back

    def test_a_tab_closed_while_an_answer_is_written(self, page):
        answering = page.ask(ANNA, None, {"text": "first", "files": []}, 500, 0, 1, -1)
        conversation = next(answering)[0]
        next(answering)
        answering.close()  # as Gradio does
        page.leave(ANNA)
        assert [one.text for one in conversation.rounds] == ["first"]
        assert [one.text for one in ask(page, "second", (), conversation)[-1][0].rounds] == ["first", "second"]

    def test_the_cache_of_the_one_who_asked_longest_ago_goes(self, page, sessions):
        visitors = [SimpleNamespace(session_hash=f"visitor {k}") for k in range(2)]
        conversations = [ask(page, "first", visitor=visitor)[-1][0] for visitor in visitors]
        first, second = sessions
        ask(page, "first", visitor=BERT)
        gc.collect()
        assert first() is None and second() is not None
        assert len(ask(page, "second", (), conversations[0], visitors[0])[-1][0].rounds) == 2

    def test_an_ended_session_is_freed(self, page):
        shown = ask(page, "first")[-1]
        gone = weakref.ref(shown[0])
        page.leave(ANNA)
        del shown
        gc.collect()
        assert gone() is None


def test_it_listens_on_the_loopback_only_and_shares_nothing():
    options = parse_arguments(["model"])
    assert options.host == "127.0.0.1" and not options.share
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
