"""A session answers as the whole conversation would from the beginning, and computes what is new only."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.chat import (
    GREEDY,
    NEW_TOKENS,
    PROCESSOR,
    ROUNDS,
    SPELLED,
    assert_as_from_scratch,
    count_work,
    from_scratch,
    hold,
)
from helpers.tiny import TOKENS_PER_IMAGE, digit_image, make_model
from modeling_visualchat.chat_visualchat import ChatSession
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "causal", "cross"])
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
        rows = length - cached + NEW_TOKENS - 1
        rows -= images * TOKENS_PER_IMAGE if variant == "cross" else 0  # images do not pass through the decoder
        assert work == {"rows": rows, "pictures": images}
        cached = length + NEW_TOKENS - 1


@pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "causal", "cross"])
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


@pytest.mark.parametrize("variant", ["mmca", "causal", "cross"])
def test_forks_go_on_independently(models, variant):
    session = models[variant].start_chat(PROCESSOR, system="Be brief.")
    hold(session, ROUNDS[:3])
    fork = session.fork()
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


def test_prompt_lookup_goes_on_from_what_was_computed(chat):
    for question, images in ROUNDS[:4]:
        with count_work(chat.model) as work:
            chat.send(question, [digit_image(k) for k in range(images)], **GREEDY, prompt_lookup_num_tokens=3)
        assert_as_from_scratch(chat)
    assert work["rows"] < 80


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
