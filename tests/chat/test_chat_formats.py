"""Chats in a decoder's own prompt, and images that stand among the texts of a question, in every path of a chat."""

import json

import pytest

from helpers.chat import GREEDY, PROCESSOR, writes_tokens
from helpers.chat_templates import make_decoder_processor
from helpers.server import Server, picture, text
from helpers.tiny import TOKENS_PER_IMAGE, digit_image, make_model, make_processor, text_part
from modeling_visualchat import ChatSession, VisualChatProcessor
from modeling_visualchat.chat_rounds_visualchat import Round
from visualchat.chat.image_marks import read_marks, write_marks
from visualchat.chat.page_conversation import Conversation
from visualchat.chat.terminal import Terminal
from visualchat.evaluation.answers import generate_answers


IMAGE = {"type": "image"}
ORDERED = [text_part("This"), IMAGE, text_part("or\nthis"), IMAGE, text_part("?")]


@pytest.fixture(scope="module")
def processors():
    return {name: make_decoder_processor(name) for name in ("Qwen2", "Llama 2", "Qwen3")}


@pytest.fixture(scope="module")
def models(processors):
    return {name: make_model_for(processor) for name, processor in processors.items()}


def make_model_for(processor: VisualChatProcessor):
    tokenizer = processor.tokenizer
    special = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(
        text={"vocab_size": len(tokenizer), **special},
        image_token_id=processor.image_token_id,
        image_number_keys=True,
        image_number_token_ids=processor.image_number_token_ids(12),
    )
    model.generation_config.eos_token_id = None  # the processor knows what ends a turn
    return model


def make_paper_processor(image_position: str) -> VisualChatProcessor:
    one = make_processor()
    return VisualChatProcessor(one.image_processor, one.tokenizer, TOKENS_PER_IMAGE, image_position=image_position)


def writes(model, processor, written: str):
    """The model's head is rigged to write a text, which may hold special tokens, again and again."""
    return writes_tokens(model, processor.tokenizer(written, add_special_tokens=False)["input_ids"])


class TestDecoderFormat:
    @pytest.mark.parametrize("name", ["Qwen2", "Llama 2", "Qwen3"])
    def test_an_answer_ends_where_its_turn_does(self, models, processors, name):
        model, processor = models[name], processors[name]
        answer = "Yes.\n### Question:\nIs it a heading?\n### Image 1:\n"
        if name == "Llama 2":
            answer = answer.rstrip() + " "
        end = processor.tokenizer.eos_token
        with writes(model, processor, f"{processor.answer_lead}{answer}{end}More.{end}"):
            chat = model.start_chat(processor)
            assert chat.send("What?", digit_image(0), max_new_tokens=300) == answer
            assert chat.rounds[-1].answer == answer
        with writes(model, processor, f"{processor.answer_lead}{answer}{end}More.{end}"):
            assert "".join(chat.send("Again?", max_new_tokens=300, stream=True)) == answer
        with writes(model, processor, f"ber{end}More.{end}"):
            assert chat.send("A month?", begin_with="Octo", max_new_tokens=300) == "ber"
            assert chat.rounds[-1].answer == "October"
        question = [{"role": "user", "content": "What?"}]
        with writes(model, processor, f"{processor.answer_lead}{answer}{end}More.{end}"):
            assert generate_answers(model, processor, [question, question], max_new_tokens=300) == [answer] * 2

    @pytest.mark.parametrize("name", ["Qwen2", "Llama 2", "Qwen3"])
    def test_answers_are_those_of_the_whole_conversation(self, models, processors, name):
        model, processor = models[name], processors[name]
        chat = model.start_chat(processor)
        for number, question in enumerate((ORDERED, "And?", ORDERED)):
            images = [digit_image(2 * number), digit_image(2 * number + 1)] if question is ORDERED else []
            # Tokens whose text is tokenized to the same tokens
            letters = processor.tokenizer.convert_tokens_to_ids(["x", "q", "z", "j"])
            only = {"suppress_tokens": sorted(set(range(len(processor.tokenizer))) - set(letters)), **GREEDY}
            answer = chat.send(question, images, **only)
            inputs = processor.apply_chat_template(
                chat.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            ids = model.generate(**inputs, **only)
            assert answer == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [part["type"] for part in chat.messages[0]["content"]] == ["text", "image", "text", "image", "text"]


class TestOrder:
    @pytest.mark.parametrize(
        "parts",
        [
            ORDERED,
            [IMAGE, IMAGE, text_part("What?")],
            [text_part("a\n"), IMAGE, text_part(""), IMAGE],
            [IMAGE, text_part("a"), IMAGE],
            [text_part("no image")],
            [IMAGE],
        ],
    )
    @pytest.mark.parametrize("position", ["front", "in_place", "decoder"])
    def test_the_prompt_is_that_of_the_message(self, processors, parts, position, tmp_path):
        processor = processors["Qwen2"] if position == "decoder" else make_paper_processor(position)
        images = [digit_image(k) for k in range(parts.count(IMAGE))]
        sources = iter(images)
        content = [{**part, "image": next(sources)} if part is IMAGE else part for part in parts]
        model = make_model_for(processor)
        chat, asked = model.start_chat(processor), []
        chat._ask = lambda rounds, *_: asked.extend(rounds)
        chat.send(parts, images)
        chat.send(content)
        assert asked[0].image_lines == asked[1].image_lines and asked[0].text == asked[1].text
        message = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(message, add_generation_prompt=True)
        for one in asked:
            assert chat.tokenize([one])[0].tolist() == processor.encode_prompts([prompt])["input_ids"][0].tolist()
        asked[0].answer, chat.rounds = "Yes.", asked[:1]
        chat.save(tmp_path)
        assert ChatSession.load(tmp_path, model, processor).rounds[0].image_lines == asked[0].image_lines

    def test_a_wrong_number_of_images(self, models, processors):
        chat = models["Qwen2"].start_chat(processors["Qwen2"])
        with pytest.raises(ValueError, match="the question: 2 image parts wait for an image, but `images` holds 1"):
            chat.send(ORDERED, digit_image(0))
        with pytest.raises(ValueError, match="the question: message 0, part 0 must be a dict"):
            chat.send([{"type": "video"}])
        assert chat.rounds == []

    def test_edit(self, models, processors):
        chat = models["Qwen2"].start_chat(processors["Qwen2"])
        chat.send(ORDERED, [digit_image(0), digit_image(1)], **GREEDY)
        for question, image_lines in (
            ("Two\nlines?", [1, 2]),
            ("One?", [1, 1]),
            ([text_part("a"), IMAGE, IMAGE, text_part("b")], [1, 1]),
            ([IMAGE, IMAGE, text_part("b")], []),
            ("Front?", []),
        ):
            chat.edit(0, question, **GREEDY)
            assert chat.rounds[0].image_lines == image_lines
        with pytest.raises(ValueError, match="1 image parts wait for an image, but `images` holds 2"):
            chat.edit(0, [IMAGE], **GREEDY)

    @pytest.mark.parametrize(
        ("image_lines", "problem"),
        [
            ([1], r"image_lines has 1 numbers for 2 images"),
            ([0, 3], r"image_lines\[1\] is 3: expected 0 to 2, the lines of the text"),
            ([1, 0], r"image_lines\[1\] is 0: expected 1 to 2"),
            ([True, 1], r"image_lines\[0\] must be an integer, got True"),
            ("no", r"rounds\[0\].image_lines must be a list"),
        ],
    )
    def test_a_file_with_wrong_lines(self, models, processors, tmp_path, image_lines, problem):
        chat = models["Qwen2"].start_chat(processors["Qwen2"])
        chat.rounds = [Round("a\nb", [digit_image(0), digit_image(1)], "c", [1, 2])]
        chat.save(tmp_path)
        file = tmp_path / "conversation.json"
        saved = json.loads(file.read_text())
        assert saved["rounds"][0]["image_lines"] == [1, 2]
        saved["rounds"][0]["image_lines"] = image_lines
        file.write_text(json.dumps(saved))
        with pytest.raises(ValueError, match=problem):
            ChatSession.load(tmp_path, models["Qwen2"], processors["Qwen2"])
        del saved["rounds"][0]["image_lines"]  # as before images had positions
        file.write_text(json.dumps(saved))
        assert ChatSession.load(tmp_path, models["Qwen2"], processors["Qwen2"]).rounds[0].image_lines == []


class TestMarks:
    @pytest.mark.parametrize(
        ("typed", "count", "shown"),
        [
            ("Is <image> or <image> larger?", 2, "Is\n<image>\nor\n<image>\nlarger?"),
            ("<image> Which?", 1, "Which?"),
            ("In HTML, <image> is a tag.", 2, "In HTML, <image> is a tag."),
            (" Plain text ", 0, " Plain text "),
            ("<image>", 1, ""),
        ],
    )
    def test_marks(self, typed, count, shown):
        parts = read_marks(typed, count)
        assert parts.count(IMAGE) == count
        chat = make_model().start_chat(PROCESSOR)
        chat._ask = lambda rounds, *_: rounds[-1]
        asked = chat.send(parts, [digit_image(k) for k in range(count)])
        assert write_marks(asked) == shown
        if shown.count("<image>") == count:
            assert write_marks(chat.send(read_marks(shown, count), asked.images)) == shown

    def test_the_page(self, models, processors):
        chat = Conversation(models["Qwen2"], processors["Qwen2"], None, 9, 10**6, 10**6)
        *_, rounds = chat.ask("Is <image> or <image> larger?", [digit_image(0), digit_image(1)], **GREEDY)
        assert chat.rounds[0].text == "Is\n<image>\nor\n<image>\nlarger?"
        assert [len(one.images) for one in rounds] == [2]
        list(chat.edit(0, "<image>\nis it, <image>\n?", **GREEDY))
        assert chat.rounds[0].text == "<image>\nis it,\n<image>\n?"
        list(chat.retry(**GREEDY))
        assert chat.rounds[0].text == "<image>\nis it,\n<image>\n?"
        list(chat.edit(0, "Which?", **GREEDY))
        assert chat.rounds[0].text == "Which?"

    def test_the_terminal(self, models, processors, tmp_path, capsys):
        digit_image(0).save(tmp_path / "a.png")
        terminal = Terminal(models["Qwen2"].start_chat(processors["Qwen2"]), GREEDY, interactive=False)
        lines = [f"/image {tmp_path}/a.png {tmp_path}/a.png", "Is <image> or <image> larger?", "/edit 1 <image> or <image>?"]
        assert terminal.run(iter(lines[:2])) == 0
        assert terminal.session.rounds[0].image_lines == [1, 2]
        assert terminal.run(iter([*lines[2:], "/retry", "/show"])) == 0
        assert terminal.session.rounds[0].image_lines == [0, 1]
        assert "1: <image>\nor\n<image>\n?" in "".join(capsys.readouterr())
        assert terminal.run(iter(["/edit 2 What?"])) == 1


@pytest.mark.parametrize("name", ["in_place", "Qwen2"])
def test_the_server(models, processors, name):
    processor = processors[name] if name in processors else make_paper_processor(name)
    model = models[name] if name in models else make_model_for(processor)
    first, second = digit_image(0), digit_image(1)
    local = [text_part("This"), {"type": "image", "image": first}, text_part("or"), {"type": "image", "image": second}]
    with Server(model=model, processor=processor) as server:
        expected = server.generate([{"role": "user", "content": local}])
        answer = server.ask(text("This"), picture(first), text("or"), picture(second))
        assert answer.choices[0].message.content == expected
        both = [{"role": "user", "content": [text("This"), picture(first)]}]
        both += [{"role": "user", "content": [text("or"), picture(second)]}]
        assert server.ask(messages=both).choices[0].message.content == expected
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": local}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert answer.usage.prompt_tokens == len(inputs["input_ids"][0])
        begun = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a\n### Question:\nb"}]
        if name == "Qwen2":
            assert server.ask(messages=begun).choices[0].message.content == server.generate(begun)
            end = processor.tokenizer.eos_token
            with writes(model, processor, f"Yes.\n### Answer:\n1{end}"):
                choice = server.ask(text("Is it?"), max_tokens=200).choices[0]
            assert (choice.message.content, choice.finish_reason) == ("Yes.\n### Answer:\n1", "stop")
