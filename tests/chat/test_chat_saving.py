"""Conversations as files: a save that fails or is killed loses nothing, and a file from elsewhere does no harm."""

import errno
import json
import os
import re

import pytest
from PIL import Image

from helpers.chat import GREEDY, PROCESSOR
from helpers.tiny import digit_image, make_model
from modeling_visualchat import chat_saving_visualchat as saving
from modeling_visualchat.chat_rounds_visualchat import Round
from modeling_visualchat.chat_visualchat import ChatSession


@pytest.fixture(scope="module")
def model():
    return make_model(image_number_keys=True)


@pytest.fixture
def chat(model):
    return model.start_chat(PROCESSOR)


@pytest.fixture
def later(model):
    """A conversation that begins as the one in `saved`, with other images after its first."""
    session = model.start_chat(PROCESSOR, system="Be brief.")
    session.rounds = [Round("What?", [digit_image(0), digit_image(7)], "Two."), Round("And?", [digit_image(8)], "One.")]
    return session


@pytest.fixture
def saved(chat, tmp_path):
    chat.rounds = [Round("What?", [digit_image(0), digit_image(1), digit_image(2)], "Three.")]
    chat.save(tmp_path / "saved")
    return tmp_path / "saved"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder, model) -> ChatSession:
    return ChatSession.load(folder, model, PROCESSOR)


def fail_at(monkeypatch, name: str, count: int) -> None:
    """Lets the call `count` (from 1) of a function of `os` find the disk full."""
    real, calls = getattr(os, name), []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(saving.os, name, call)


# The list, two new images; then the list takes its name
FAILURES = [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)]


class TestSaving:
    @pytest.mark.parametrize(("name", "count"), FAILURES)
    def test_a_full_disk_leaves_the_earlier_conversation(self, chat, later, saved, model, monkeypatch, name, count):
        before = contents(saved)
        with monkeypatch.context() as patch:
            fail_at(patch, name, count)
            with pytest.raises(OSError, match="No space left on device") as error:
                later.save(saved)
        assert type(error.value) is OSError
        assert contents(saved) == before
        assert load(saved, model).rounds == chat.rounds

    @pytest.mark.parametrize(("name", "count"), FAILURES)
    def test_a_killed_save_leaves_the_earlier_conversation_and_the_next_one_cleans_up(
        self, chat, later, saved, model, monkeypatch, name, count
    ):
        (saved / "image-9.png").write_bytes(b"somebody's")
        with monkeypatch.context() as patch:
            fail_at(patch, name, count)
            patch.setattr(saving, "_remove", lambda *_: None)  # a killed process removes nothing
            with pytest.raises(OSError, match="No space left"):
                later.save(saved)
        assert load(saved, model).rounds == chat.rounds
        assert any(path.suffix == ".part" for path in saved.iterdir())
        later.save(saved)
        loaded = load(saved, model)
        assert (loaded.rounds, loaded.system) == (later.rounds, "Be brief.")
        assert len(contents(saved)) == 1 + 3 + 1
        assert (saved / "image-9.png").read_bytes() == b"somebody's"

    def test_a_failure_of_the_first_save_leaves_nothing(self, later, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            fail_at(patch, "replace", 1)
            with pytest.raises(OSError, match="No space left"):
                later.save(tmp_path / "new")
        assert contents(tmp_path / "new") == {}

    def test_images_that_stay_are_not_written_again_and_others_go(self, chat, later, saved, model):
        (saved / "notes.txt").write_text("mine")
        written = (saved / "image-1.png").stat().st_mtime_ns
        later.save(saved)
        names = [one["images"] for one in json.loads((saved / "conversation.json").read_text())["rounds"]]
        assert names == [["image-1.png", "image-4.png"], ["image-5.png"]]
        assert {*contents(saved)} == {"conversation.json", "notes.txt", "image-1.png", "image-4.png", "image-5.png"}
        assert (saved / "image-1.png").stat().st_mtime_ns == written
        chat.save(saved)
        assert {*contents(saved)} == {"conversation.json", "notes.txt", "image-1.png", "image-2.png", "image-3.png"}
        assert load(saved, model).rounds == chat.rounds

    def test_files_of_others_are_neither_written_over_nor_removed(self, chat, later, tmp_path, model):
        """Whatever a list that came from elsewhere names, and whatever lies there."""
        (tmp_path / "image-1.png").write_bytes(b"a photograph")
        (tmp_path / "thesis.png").write_bytes(b"a thesis")
        other = {"system": None, "dropped_rounds": 0, "rounds": [{"text": "", "images": ["thesis.png"], "answer": ""}]}
        (tmp_path / "conversation.json").write_text(json.dumps(other))
        later.save(tmp_path)
        assert (tmp_path / "image-1.png").read_bytes() == b"a photograph"
        assert (tmp_path / "thesis.png").read_bytes() == b"a thesis"
        assert load(tmp_path, model).rounds == later.rounds

    def test_what_could_not_be_loaded_is_not_saved(self, chat, saved):
        before = contents(saved)
        chat.rounds = chat.rounds * (saving.MAX_ROUNDS + 1)
        for one in chat.rounds:
            one.images = []
        with pytest.raises(ValueError, match=r"rounds has 10001 rounds, at most 10000"):
            chat.save(saved)
        assert contents(saved) == before


def write(folder, content=None, **fields) -> None:
    """A conversation of one round with these fields, or a `content`."""
    if content is None:
        one = {"text": "What?", "images": ["image-1.png"], "answer": "This.", **fields}
        content = {"system": None, "dropped_rounds": 0, "rounds": [one]}
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "conversation.json").write_text(text)


@pytest.fixture
def folder(tmp_path):
    """With an image, beside a private one."""
    (tmp_path / "chat" / "below").mkdir(parents=True)
    for path in ("private.png", "chat/image-1.png", "chat/below/image-1.png"):
        digit_image(0).save(tmp_path / path)
    (tmp_path / "chat" / "out.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "chat" / "round.png").symlink_to("round.png")
    (tmp_path / "chat" / "inside.png").symlink_to("image-1.png")
    (tmp_path / "chat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    os.mkfifo(tmp_path / "chat" / "pipe.png")
    return tmp_path / "chat"


class TestLoading:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("../private.png", "is not the plain name"),
            ("/etc/passwd", "is not the plain name"),
            ("below/image-1.png", "is not the plain name"),
            ("..\\private.png", "is not the plain name"),
            ("C:image-1.png", "is not the plain name"),
            ("file:image-1.png", "is not the plain name"),
            ("image-1.png\0", "is not the plain name"),
            ("", "is not the plain name"),
            ("..", "is not the plain name"),
            ("out.png", "leads out of the folder"),
            ("round.png", "cannot be opened"),
            ("pipe.png", "is not a file"),
            ("below", "is not a file"),
            ("broken.png", "broken.png is not an image"),
            ("a" * 5000, "cannot be opened"),
            ("\udc80.png", "half a character"),
            (3, "must be a string, got 3"),
            (["a"], "must be a string, got"),
        ],
    )
    def test_images_lie_in_the_folder(self, folder, model, name, message):
        write(folder, images=["inside.png", name])
        with pytest.raises(ValueError, match=r"conversation\.json is not a .*: rounds\[0\]\.images\[1\].*" + message):
            load(folder, model)

    def test_a_link_within_the_folder_and_a_link_to_it_are_fine(self, folder, model, tmp_path):
        write(folder, images=["inside.png"])
        (tmp_path / "link").symlink_to(folder)
        assert load(tmp_path / "link", model).rounds == [Round("What?", [digit_image(0)], "This.")]

    def test_the_list_itself_lies_in_the_folder(self, folder, model, tmp_path):
        (tmp_path / "private.json").write_text("{}")
        (folder / "conversation.json").symlink_to(tmp_path / "private.json")
        with pytest.raises(ValueError, match="leads out of the folder"):
            load(folder, model)

    def test_a_missing_image_is_named(self, folder, model):
        write(folder, images=["image-2.png"])
        with pytest.raises(FileNotFoundError, match=r"conversation\.json: rounds\[0\]\.images\[0\], 'image-2\.png'"):
            load(folder, model)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], r"it must be an object, got \[\]"),
            ({"dropped_rounds": 0, "rounds": []}, "system is missing"),
            ({"system": 3, "dropped_rounds": 0, "rounds": []}, "system must be a string or null, got 3"),
            ({"system": None, "dropped_rounds": True, "rounds": []}, "dropped_rounds must be an integer, got True"),
            ({"system": None, "dropped_rounds": -1, "rounds": []}, "dropped_rounds is -1"),
            ({"system": None, "dropped_rounds": 0, "rounds": 3}, "rounds must be a list, got 3"),
            ({"system": None, "dropped_rounds": 0, "rounds": ["a"]}, r"rounds\[0\] must be an object, got 'a'"),
            ("[" * 100_000, "nested too deeply"),
            ('{"system": ' + "[" * 900 + "]" * 900 + "}", "system must be a string or null|nested too deeply"),
            ("{\ufffd", "Expecting property name"),
        ],
    )
    def test_other_content_is_named(self, folder, model, content, message):
        write(folder, content)
        with pytest.raises(ValueError, match=r"conversation\.json is not a conversation .*" + message):
            load(folder, model)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"text": 3}, r"rounds\[0\]\.text must be a string, got 3"),
            ({"text": "\ud800"}, r"rounds\[0\]\.text holds half a character, '\\ud800', at position 0"),
            ({"answer": None}, r"rounds\[0\]\.answer must be a string, got None"),
            ({"answer": "a\udfff"}, r"rounds\[0\]\.answer holds half a character"),
            ({"images": {"a": 1}}, r"rounds\[0\]\.images must be a list"),
            ({"images": "image-1.png"}, r"rounds\[0\]\.images must be a list"),
        ],
    )
    def test_fields_are_named(self, folder, model, fields, message):
        write(folder, **fields)
        with pytest.raises(ValueError, match=message):
            load(folder, model)

    def test_limits(self, folder, model):
        one = {"text": "a", "images": [], "answer": "b"}
        write(folder, {"system": None, "dropped_rounds": 0, "rounds": [one] * 100_000})
        with pytest.raises(ValueError, match="rounds has 100000 rounds, at most 10000 are read"):
            load(folder, model)
        write(folder, images=["image-1.png"] * 2000)
        with pytest.raises(ValueError, match="rounds has 2000 images, at most 1000 are read"):
            load(folder, model)
        write(folder, text="a" * 400_001)
        with pytest.raises(ValueError, match=r"rounds\[0\]\.text has 400001 characters, at most 400000 are read"):
            load(folder, model)
        write(folder, text="a" * saving.MAX_BYTES)
        with pytest.raises(ValueError, match=r"it has 83\d{5} bytes, at most 8388608 are read"):
            load(folder, model)

    def test_the_most_rounds_go_on_without_the_oldest(self, folder, model):
        """Room is made for the answer in a few steps, not in one for each round."""
        one = {"text": "a", "images": [], "answer": "b"}
        write(folder, {"system": None, "dropped_rounds": 0, "rounds": [one] * saving.MAX_ROUNDS})
        chat = ChatSession.load(folder, model, PROCESSOR, drop_oldest=True)
        chat.send("Hi", **GREEDY)
        assert 1 < len(chat.rounds) < 100
        assert chat.dropped_rounds + len(chat.rounds) == saving.MAX_ROUNDS + 1
        length = chat.tokenize(chat.rounds[:-1]).shape[1]
        assert length + 100 > model.config.text_config.max_position_embeddings


def test_half_a_character_is_refused_before_anything_is_done(chat):
    for ask in (lambda: chat.send("a\ud800"), lambda: chat.send("a", begin_with="\ud800")):
        with pytest.raises(ValueError, match="half a character"):
            ask()
    assert chat.rounds == []


def test_errors_show_no_control_character(folder, model):
    """They are printed in terminals."""
    for fields in ({"images": ["\x1b[2J\u202e"]}, {"images": ["\x1b]0;x\x07/a"]}, {"text": ["\x1b[2J"]}):
        write(folder, **fields)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load(folder, model)
        assert re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", str(error.value)) is None


def test_images_of_any_mode_come_back(chat, tmp_path, model):
    chat.rounds = [Round("What?", [Image.new("RGB", (3, 2), "red")] * 2, "Red.")]
    chat.save(tmp_path)
    assert load(tmp_path, model).rounds == chat.rounds
