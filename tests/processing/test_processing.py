"""Messages in, model inputs out: the prompt to the letter, labels to the token, and what bad messages are told."""

import base64
import copy

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from helpers.prompts import DESIGN_PROMPT
from helpers.tiny import TOKENS_PER_IMAGE, assistant, digit_image, make_model, make_processor, text_part, user
from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.image_loading_visualchat import load_image
from modeling_visualchat.messages_visualchat import MAX_TEXT_LENGTH


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def cats():
    return [
        user("please describe the image.", digit_image(0)),
        assistant("It's a cute black cat."),
        user("What's the difference between the three cats?", digit_image(1), digit_image(2)),
    ]


def inputs_of(processor, conversation, **kwargs):
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(conversation, **settings)


class TestPrompt:
    def test_the_prompt_is_the_papers(self, processor, cats):
        assert processor.apply_chat_template(cats, add_generation_prompt=True) == DESIGN_PROMPT

    def test_text_only_rounds_and_a_first_image_in_a_later_round(self, processor):
        conversation = [
            {"role": "user", "content": "Hi"},
            assistant("Hello"),
            user("Who?", digit_image(0)),
            assistant("Me"),
            user("Why?"),
        ]
        assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
            "<s>You are a powerful vision-language assistant.\n\n### Question:\nHi\n\n### Answer:\nHello</s>\n"
            "### Image 1:\n<image>\n\n### Question:\nWho?\n\n### Answer:\nMe</s>\n"
            "\n### Question:\nWhy?\n\n### Answer:\n"
        )

    def test_a_system_message_takes_the_place_of_the_default(self, processor, cats):
        conversation = [{"role": "system", "content": "You see."}, *cats]
        expected = DESIGN_PROMPT.replace("You are a powerful vision-language assistant.", "You see.")
        assert processor.apply_chat_template(conversation, add_generation_prompt=True) == expected

    def test_images_stand_before_the_question_of_their_turn_and_texts_are_joined_by_lines(self, processor):
        content = [text_part("a"), {"type": "image", "image": digit_image(0)}, text_part("b")]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        assert prompt.endswith("\n\n### Image 1:\n<image>\n\n### Question:\na\nb\n")

    def test_a_later_turn_never_rewrites_an_earlier_one(self, processor, cats):
        before = processor.apply_chat_template(cats[:1], add_generation_prompt=True)
        assert processor.apply_chat_template(cats, add_generation_prompt=True).startswith(before)
        short = inputs_of(processor, cats[:1], add_generation_prompt=True)["input_ids"][0]
        whole = inputs_of(processor, cats)["input_ids"][0]
        assert torch.equal(whole[: len(short)], short)

    def test_continue_final_message(self, processor, cats):
        prompt = processor.apply_chat_template([*cats, assistant("They are")], continue_final_message=True)
        assert prompt == DESIGN_PROMPT + "They are"


class TestInputs:
    def test_placeholders_are_expanded_and_images_are_in_reading_order(self, processor, cats):
        other = [user("And this?", digit_image(3))]
        batch = inputs_of(processor, [cats, other], processor_kwargs={"padding": True})
        is_image = batch["input_ids"] == processor.image_token_id
        assert is_image.sum(-1).tolist() == [3 * TOKENS_PER_IMAGE, TOKENS_PER_IMAGE]
        assert batch["pixel_values"].shape == (4, 3, 16, 16)
        for index in range(4):
            alone = processor.image_processor(digit_image(index), return_tensors="pt")["pixel_values"][0]
            assert torch.equal(batch["pixel_values"][index], alone)
        assert batch["attention_mask"][1, 0] == 0  # padded on the left, for generation
        assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum(-1).tolist() == [1, 1]

    def test_the_model_reads_what_the_processor_writes(self, processor, cats):
        model = make_model(image_number_keys=True)
        inputs = inputs_of(processor, [cats, cats[:1]], processor_kwargs={"padding": True}, add_generation_prompt=True)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert len(processor.batch_decode(tokens, skip_special_tokens=True)) == 2

    def test_text_and_images_without_a_template(self, processor):
        inputs = processor(text="a <image> b <image>", images=[digit_image(0), digit_image(1)], return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * TOKENS_PER_IMAGE

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
    def test_pixel_values_are_the_image_processors(self, processor, mode):
        photograph = Image.fromarray(load_sample_image("china.jpg"))
        pictures = [photograph, photograph.rotate(90, expand=True), photograph.resize((20, 5))]
        if mode == "I;16":
            pictures = [Image.fromarray(np.asarray(one.convert("L")).astype(np.uint16) * 257) for one in pictures]
        pictures = [one.convert(mode) for one in pictures]
        expected = processor.image_processor([load_image(one) for one in pictures], return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs_of(processor, [user("?", *pictures)])["pixel_values"], expected)
        row = {"messages": [user("?", *pictures), assistant("A")]}
        assert torch.equal(VisualChatDataCollator(processor)([row])["pixel_values"], expected)

    def test_the_usual_pictures_do_not_pass_through_the_image_processor(self, processor, cats, monkeypatch):
        monkeypatch.setattr(type(processor.image_processor), "preprocess", None)
        inputs_of(processor, cats)
        VisualChatDataCollator(processor)([{"messages": [*cats, assistant("No.")]}])
        with pytest.raises(TypeError):
            inputs_of(processor, cats, return_tensors="np")

    @pytest.mark.parametrize(
        "options",
        [
            {"do_normalize": False},
            {"images_kwargs": {"do_normalize": False}},
            {"size": {"height": 8, "width": 8}},
            {"crop_size": {"height": 20, "width": 20}, "size": {"shortest_edge": 24}},
            {"images_kwargs": {"do_center_crop": False, "size": {"height": 24, "width": 12}}},
            {"resample": 0},
        ],
        ids=str,
    )
    def test_options_of_the_image_processor_are_heeded(self, processor, options):
        picture = Image.fromarray(load_sample_image("china.jpg"))
        inputs = processor(text="<image>", images=[picture], return_tensors="pt", **options)
        options = options.get("images_kwargs", options)
        expected = processor.image_processor([picture], return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(inputs["pixel_values"], expected)

    @pytest.mark.parametrize("tensors", ["np", None])
    def test_pixel_values_as_arrays(self, processor, tensors):
        picture = Image.fromarray(load_sample_image("china.jpg"))
        values = processor(text="<image>", images=[picture], return_tensors=tensors)["pixel_values"]
        expected = processor.image_processor([picture], return_tensors=tensors)["pixel_values"]
        assert type(values) is type(expected)
        assert np.array_equal(values, expected)

    def test_a_wrong_number_of_images_raises_with_both_counts(self, processor):
        with pytest.raises(ValueError, match=r"2 <image> tokens and 1 images"):
            processor(text="<image> and <image>", images=[digit_image(0)])
        with pytest.raises(ValueError, match=r"Found 1 <image> tokens in the text but no images"):
            processor(text="<image>")

    def test_truncation_through_an_image_raises(self, processor, cats):
        with pytest.raises(ValueError, match="truncation"):
            inputs_of(processor, cats, processor_kwargs={"truncation": True, "max_length": 40})

    def test_number_token_ids_are_the_numbers_in_the_prompt(self, processor):
        spelled = processor.image_number_token_ids(12)
        assert [processor.tokenizer.decode(tokens).strip() for tokens in spelled] == [str(k) for k in range(1, 13)]
        conversation = [user("Q", *(digit_image(k) for k in range(12)))]
        prompt = inputs_of(processor, conversation)["input_ids"][0].tolist()
        starts = [i for i in range(len(prompt)) if prompt[i] == processor.image_token_id != prompt[i - 1]]
        for start, tokens in zip(starts, spelled):
            header = prompt[start - len(tokens) - 2 : start]
            assert tokens == header[: len(tokens)] or tokens == header[1 : len(tokens) + 1], (tokens, header)

    def test_saving_and_loading(self, processor, cats, tmp_path):
        processor.save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)
        assert type(again) is VisualChatProcessor
        assert again.image_seq_length == TOKENS_PER_IMAGE
        assert again.image_token_id == processor.image_token_id
        assert len(again.tokenizer) == len(processor.tokenizer)
        expected, loaded = inputs_of(processor, cats), inputs_of(again, cats)
        assert {key: value.tolist() for key, value in loaded.items()} == {k: v.tolist() for k, v in expected.items()}

    def test_an_ordinary_token_of_the_placeholders_name_becomes_special(self):
        backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<image>": 2, "b": 3}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        processor = VisualChatProcessor(make_processor().image_processor, tokenizer, image_seq_length=2)
        assert processor.image_token_id == 2
        inputs = processor(text="a <image> b", images=[digit_image(0)])
        assert inputs["input_ids"] == [[1, 2, 2, 3]]


class TestLabels:
    def test_labels_are_the_answers_and_their_end_tokens_in_every_round(self, processor, cats):
        conversation = [*cats, assistant("Their tails."), {"role": "user", "content": "Sure?"}, assistant("Yes.")]
        batch = VisualChatDataCollator(processor)(
            [{"messages": conversation}, {"messages": [*cats[:1], assistant("A cat")]}]
        )
        tokenizer = processor.tokenizer
        end = tokenizer.eos_token_id
        answers = [["It's a cute black cat.", "Their tails.", "Yes."], ["A cat"]]
        for row, expected in enumerate(answers):
            labels = batch["labels"][row].tolist()
            supervised = [token for answer in expected for token in [*tokenizer.encode(answer)[1:], end]]
            assert [token for token in labels if token != -100] == supervised
            learned = [token == label for token, label in zip(batch["input_ids"][row].tolist(), labels) if label != -100]
            assert all(learned)
        assert batch["attention_mask"][1, -1] == 0  # padded on the right, for training
        assert batch["labels"][1, -1] == -100

    @pytest.mark.parametrize("kind", ["byte-level", "metaspace", "stripping placeholder", "template without bos"])
    def test_batches_equal_those_of_the_processor(self, cats, kind):
        """The collator sends one placeholder an image through the tokenizer, the processor all of them."""
        processor = make_processor()
        if kind == "metaspace":  # LLaMA's
            backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
            backend.train_from_iterator([DESIGN_PROMPT], trainer)
            names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
            processor = VisualChatProcessor(processor.image_processor, tokenizer, image_seq_length=7)
        elif kind == "stripping placeholder":
            tokenizer = make_processor().tokenizer
            tokenizer.add_tokens([AddedToken("<picture>", lstrip=True, rstrip=True, special=True)], special_tokens=True)
            processor = VisualChatProcessor(processor.image_processor, tokenizer, 7, image_token="<picture>")
            processor.chat_template = processor.chat_template.replace("<image>", "<picture>")
        elif kind == "template without bos":
            processor.chat_template = processor.chat_template.replace("bos_token", "''")
        system = {"role": "system", "content": "Talk\u00a0about  pictures."}
        conversations = [
            [*cats, assistant("Their tails, naïvely \U0001f408.")],
            [system, user("No picture?"), assistant(" None\n\n"), user("<And> now?", digit_image(1)), assistant("###")],
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A."}, user("And?", digit_image(2))],
        ]
        batch = VisualChatDataCollator(processor, pad_to_multiple_of=16)([{"messages": one} for one in conversations])
        expected = inputs_of(
            processor,
            conversations,
            return_assistant_tokens_mask=True,
            return_tensors=None,
            processor_kwargs={"padding": True, "padding_side": "right", "pad_to_multiple_of": 16},
        )
        learned = np.array(expected["assistant_masks"], dtype=bool)
        assert learned.any(axis=1).all()
        assert batch["input_ids"].tolist() == expected["input_ids"]
        assert batch["attention_mask"].tolist() == expected["attention_mask"]
        assert batch["labels"].tolist() == np.where(learned, expected["input_ids"], -100).tolist()
        assert np.array_equal(batch["pixel_values"], np.array(expected["pixel_values"]))

    def test_a_template_that_forgets_images_is_reported(self, cats):
        processor = make_processor()
        processor.chat_template = processor.chat_template.replace("<image>", "")
        with pytest.raises(ValueError, match="example 0: the chat template writes 0 image placeholders for 3 images"):
            VisualChatDataCollator(processor)([{"messages": [*cats, assistant("No.")]}])

    def test_openais_form_of_an_image(self, processor, tmp_path):
        digit_image(0).save(tmp_path / "digit.png")
        url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'digit.png').read_bytes()).decode()}"
        plain = VisualChatDataCollator(processor)([{"messages": [user("What?", digit_image(0)), assistant("A.")]}])
        for image_url in (url, {"url": url}):
            content = [{"type": "image_url", "image_url": image_url}, text_part("What?")]
            row = {"messages": [{"role": "user", "content": content}, assistant("A.")]}
            batch = VisualChatDataCollator(processor)([row])
            assert all(torch.equal(batch[key], plain[key]) for key in plain)

    def test_an_end_token_as_padding_is_learned_where_it_ends_an_answer_only(self, cats):
        processor = make_processor()
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
        rows = [{"messages": [*cats, assistant("No.")]}, {"messages": [*cats[:1], assistant("A cat")]}]
        labels = VisualChatDataCollator(processor)(rows)["labels"]
        assert (labels == processor.tokenizer.eos_token_id).sum(-1).tolist() == [2, 1]

    def test_images_fill_the_empty_image_parts(self, processor):
        empty = {"type": "image"}
        messages = [
            {"role": "user", "content": [empty, text_part("What?")]},
            assistant("A."),
            {"role": "user", "content": [{"type": "image", "image": None, "text": None}, text_part("And?")]},
            assistant("B."),
        ]
        row = {"messages": messages, "images": [digit_image(1), digit_image(2)]}
        untouched = copy.deepcopy(messages)
        batch = VisualChatDataCollator(processor)([row])
        inline = [user("What?", digit_image(1)), assistant("A."), user("And?", digit_image(2)), assistant("B.")]
        expected = VisualChatDataCollator(processor)([{"messages": inline}])
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
        assert messages == untouched
        assert len(row["images"]) == 2

    def test_logits_are_kept_where_the_next_token_is_learned(self, processor, cats):
        rows = [{"messages": [*cats, assistant("No.")]}, {"messages": [*cats[:1], assistant("A cat")]}]
        batch = VisualChatDataCollator(processor, supervised_logits_only=True)(rows)
        assert torch.equal(batch["logits_to_keep"][:, :-1], batch["labels"][:, 1:] != -100)
        assert not batch["logits_to_keep"][:, -1].any()

    def test_undecoded_images_of_a_table(self, processor, tmp_path):
        digit_image(0).save(tmp_path / "digit.png")
        content = [{"type": "image"}, {"type": "image"}, text_part("What?")]
        messages = [{"role": "user", "content": content}, assistant("A.")]
        stored = [
            {"bytes": (tmp_path / "digit.png").read_bytes(), "path": None},
            {"bytes": None, "path": str(tmp_path / "digit.png")},
        ]
        batch = VisualChatDataCollator(processor)([{"messages": messages, "images": stored}])
        decoded = VisualChatDataCollator(processor)([{"messages": messages, "images": [digit_image(0)] * 2}])
        assert torch.equal(batch["pixel_values"], decoded["pixel_values"])

    @pytest.mark.parametrize("given", [1, 3])
    def test_a_wrong_number_of_images_names_the_row_and_both_counts(self, processor, given):
        content = [{"type": "image"}, {"type": "image"}, text_part("What?")]
        row = {"messages": [{"role": "user", "content": content}, assistant("A.")], "images": [digit_image(0)] * given}
        good = {"messages": [{"role": "user", "content": "Hi"}, assistant("A.")]}
        with pytest.raises(ValueError, match=rf"example 1: 2 image parts wait for an image, but `images` holds {given}"):
            VisualChatDataCollator(processor)([good, row])

    def test_a_row_without_an_answer_is_reported(self, processor):
        good = {"messages": [{"role": "user", "content": "Hi"}, assistant("A.")]}
        with pytest.raises(ValueError, match="example 1 holds no answer"):
            VisualChatDataCollator(processor)([good, {"messages": [{"role": "user", "content": "Hi"}]}])

    def test_text_only_batches_have_no_pixel_values(self, processor):
        batch = VisualChatDataCollator(processor, pad_to_multiple_of=64)(
            [{"messages": [{"role": "user", "content": "Hi"}, assistant("A.")]}]
        )
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["input_ids"].shape[1] % 64 == 0


class TestBadMessages:
    @pytest.mark.parametrize(
        ("conversation", "message"),
        [
            ([], "the conversation is empty"),
            ([{"role": "tool", "content": "x"}], "message 0 has the role 'tool': use 'system', 'user' or 'assistant'"),
            ([{"content": "x"}], "message 0 has the role None"),
            ([{"role": "user", "content": "x"}] * 2, "message 1 has the role 'user', .* expected 'assistant'"),
            ([{"role": "assistant", "content": "x"}], "message 0 has the role 'assistant', .* expected 'user'"),
            ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "message 1 has the role 'system'"),
            ([{"role": "system", "content": "y"}], "only a system message"),
            ([{"role": "user"}], "message 0 has a content of type NoneType"),
            ([{"role": "user", "content": [{"type": "video"}]}], "message 0, part 0 must be a dict whose 'type'"),
            ([{"role": "user", "content": ["x"]}], "message 0, part 0 must be a dict"),
            (
                [{"role": "user", "content": [{"type": "text"}]}],
                "message 0, part 0 has the type 'text', but its 'text' is None",
            ),
            (
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image"}]}],
                "message 1, part 0 is an image in a message of the role 'assistant'",
            ),
            ([{"role": "user", "content": "see <image>"}], "message 0 holds the text '<image>'"),
            (
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": [text_part("x" * 200_001)] * 2}],
                "message 1 holds 400002 characters of text, but at most 400000 are tokenized",
            ),
        ],
    )
    def test_each_is_named(self, processor, conversation, message):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation)
        good = [{"role": "user", "content": "Hi"}]
        with pytest.raises(ValueError, match="conversation 1: .*" + message):
            processor.apply_chat_template([good, conversation])

    def test_the_longest_texts_are_tokenized(self):
        """With the expression of the digits demo, which tokenizers gives up on at 2,000,000 characters."""
        processor = make_processor()
        pieces = Regex(r" ?\p{N}|:?\n+(?:### ?\p{L}+(?::\n)?)?|[^\p{N}\n]+?(?= ?\p{N}|:?\n|$)")
        cut = [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
        longest = "x" * MAX_TEXT_LENGTH
        messages = [{"role": "system", "content": longest}, user(longest), assistant(longest)]
        (ids,) = processor.encode_prompts([processor.apply_chat_template(messages)])["input_ids"]
        assert len(ids) > 3 * MAX_TEXT_LENGTH

    def test_an_image_part_without_a_picture_raises_when_tokenized(self, processor):
        with pytest.raises(ValueError, match="no images were passed"):
            inputs_of(processor, [{"role": "user", "content": [{"type": "image"}, text_part("x")]}])

    def test_a_strangers_placeholder_can_be_taken_as_text(self, processor):
        conversation = [user("a <image> and </s> b", digit_image(0))]
        inputs = inputs_of(processor, conversation, sanitize_control_tokens=True)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == TOKENS_PER_IMAGE
        assert (inputs["input_ids"] == processor.tokenizer.eos_token_id).sum() == 0
        assert inputs["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
        plain = inputs_of(processor, [user("a", digit_image(0))])
        sanitized = inputs_of(processor, [user("a", digit_image(0))], sanitize_control_tokens=True)
        assert torch.equal(plain["input_ids"], sanitized["input_ids"])

    def test_openai_image_urls(self, processor, tmp_path):
        path = tmp_path / "digit.png"
        digit_image(0).save(path)
        part = {"type": "image_url", "image_url": {"url": str(path)}}
        inputs = inputs_of(processor, [{"role": "user", "content": [part, text_part("x")]}])
        assert inputs["pixel_values"].shape == (1, 3, 16, 16)
