"""Where an answer ends: at a section of the prompt, when its reader stops, at an error. And answers that are begun."""

import signal
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as models_of_tokens
from transformers import PreTrainedTokenizerFast

from helpers.chat import GREEDY, PROCESSOR, ROUNDS, assert_as_from_scratch, hold, writes
from helpers.tiny import TOKENS_PER_IMAGE, digit_image, make_model
from modeling_visualchat import VisualChatProcessor
from modeling_visualchat.chat_rounds_visualchat import Round
from modeling_visualchat.chat_streaming_visualchat import cut_section, find_sure_part
from modeling_visualchat.chat_visualchat import ChatSession


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


@pytest.mark.parametrize("text", ["\n" * 100_000 + "x", "\ufffd" * 100_000 + "x", "\n### Image 1" * 10_000 + "x"])
def test_the_time_to_find_sections_grows_with_the_length(text):
    """It took minutes where it grew with the square of the length."""
    start = time.monotonic()
    assert cut_section(text) == find_sure_part(text) == text
    assert time.monotonic() - start < 5
