"""The prompt of a decoder's own chat template, and images that stay where they are in a turn."""

import itertools

import pytest
import torch
from transformers import AutoProcessor

from helpers.chat_templates import DECODERS, LLAMA3, SMOLLM2, THINKING, make_decoder_processor, make_decoder_tokenizer
from helpers.elsewhere import run_elsewhere
from helpers.prompts import DESIGN_PROMPT
from helpers.tiny import TOKENS_PER_IMAGE, assistant, digit_image, make_model, make_processor, text_part, user
from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.chat_template_visualchat import EMPTY_THOUGHT
from modeling_visualchat.processing_visualchat import MARK


TAKES_SYSTEM = [name for name in DECODERS if name not in ("Mistral", "Mistral 3")]


@pytest.fixture(scope="module")
def decoders():
    return {name: make_decoder_processor(name) for name in DECODERS}


def image_part(index: int) -> dict:
    return {"type": "image", "image": digit_image(index)}


def mixed(*parts: str | int) -> dict:
    """A message of the user: a number is an image."""
    return {"role": "user", "content": [text_part(one) if isinstance(one, str) else image_part(one) for one in parts]}


def as_text(message: dict, numbers) -> dict:
    """The message with its images as text, as the decoder's own template is given it."""
    lines = [one.get("text") or f"Image {next(numbers)}: <image>" for one in message["content"]]
    return {**message, "content": "\n".join(lines)}


TALK = [
    mixed("First this:", 0, "then\nthat:", 1, "What differs?"),
    assistant("The 'second' {{ one }}."),
    mixed(2, "And here?"),
    assistant("Nothing."),
    mixed("Thanks.", 3),
]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("length", range(1, 6))
@pytest.mark.parametrize("system", [None, "Be\nkind. "])
def test_the_prompt_is_that_of_the_decoders_own_template(decoders, name, length, system):
    if system is not None and name not in TAKES_SYSTEM:
        return
    first = [] if system is None else [{"role": "system", "content": system}]
    options = {"add_generation_prompt": length % 2 == 1}
    numbers = itertools.count(1)
    plain = [*first, *(as_text(one, numbers) for one in TALK[:length])]
    expected = make_decoder_tokenizer(name).apply_chat_template(plain, tokenize=False, enable_thinking=False, **options)
    prompt = decoders[name].apply_chat_template([*first, *TALK[:length]], **options)
    if length > 2:  # Qwen 3's empty thought: here before every answer
        prompt, expected = EMPTY_THOUGHT.sub("", prompt), EMPTY_THOUGHT.sub("", expected)
    assert prompt == expected
    # Token for token too: by the processor, and by its tokenizer alone
    own = make_decoder_tokenizer(name)
    own.add_tokens(["<image>"], special_tokens=True)
    whole = decoders[name].apply_chat_template([*first, *TALK[:length]], **options)
    ids = decoders[name].encode_prompts([whole])["input_ids"][0].tolist()
    once = [token for k, token in enumerate(ids) if token != decoders[name].image_token_id or ids[k - 1] != token]
    assert once == own(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", DECODERS)
def test_answers_and_what_ends_their_turn_are_learned(decoders, name):
    processor = decoders[name]
    batch = VisualChatDataCollator(processor)([{"messages": TALK[:4]}])
    assert batch["pixel_values"].shape[0] == 3
    labels = batch["labels"][0].tolist()
    spans = [list(group) for is_learned, group in itertools.groupby(labels, lambda label: label != -100) if is_learned]
    answers = [TALK[1]["content"][0]["text"], TALK[3]["content"][0]["text"]]
    assert len(spans) == 2
    for span, answer in zip(spans, answers):
        assert processor.decode(span, skip_special_tokens=True).strip() == answer
        assert span[-1] == processor.tokenizer.eos_token_id and span.count(processor.tokenizer.eos_token_id) == 1


def test_a_later_turn_changes_no_earlier_one(decoders):
    for processor in decoders.values():
        prompts = [processor.apply_chat_template(TALK[:length]) for length in range(1, 6)]
        for shorter, longer in itertools.pairwise(prompts):
            assert longer.startswith(shorter)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (THINKING, "an answer begins with"),
        ("{% for message in messages %}{{ message['content'] | upper }}{% endfor %}", "the content of each message once"),
        (SMOLLM2.replace("<|im_end|>", "###"), "no special token ends an answer"),
        (SMOLLM2.replace("message['content']", "message['content'] | replace('é', 'e')"), "a conversation of 1 messages"),
        (SMOLLM2.replace("message['content']", "'?'"), "once, in order"),
        ("{{ raise_exception('No.') }}", "TemplateError: No."),
        ("{{ messages[5] }}", "once, in order"),
        (
            "{% for message in messages %}{{ loop.index ~ message['content'] + eos_token }}{% endfor %}",
            "the second round otherwise than the first",
        ),
    ],
)
def test_a_template_that_cannot_be_spliced_is_refused(template, problem):
    tokenizer = make_decoder_tokenizer(template=template)
    with pytest.raises(ValueError, match=f"chat_format='decoder' cannot use .*{problem}"):
        VisualChatProcessor(make_processor().image_processor, tokenizer, TOKENS_PER_IMAGE, chat_format="decoder")


def test_what_is_no_decoders_template_is_refused():
    paper = make_processor()
    with pytest.raises(ValueError, match="holds that of the paper"):
        VisualChatProcessor(paper.image_processor, paper.tokenizer, chat_format="decoder")
    paper.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has none"):
        VisualChatProcessor(paper.image_processor, paper.tokenizer, chat_format="decoder")
    with pytest.raises(ValueError, match=r"no {% generation %} block"):
        VisualChatProcessor(paper.image_processor, paper.tokenizer, chat_format="decoder", chat_template=LLAMA3)
    with pytest.raises(ValueError, match="chat_format is 'chatml': use 'paper' or 'decoder'"):
        make_decoder_processor(chat_format="chatml")
    with pytest.raises(ValueError, match="image_position is 'front': in the chat_format 'decoder', use 'in_place'"):
        make_decoder_processor(image_position="front")


@pytest.mark.parametrize("name", ["Mistral", "Mistral 3"])
def test_a_system_message_that_cannot_be_spliced_is_refused(decoders, name):
    with pytest.raises(Exception, match="takes no system message"):
        decoders[name].apply_chat_template([{"role": "system", "content": "Be kind."}, user("Hi")])


def test_todays_date_is_written_each_day(decoders):
    template = decoders["Llama 3.2"].chat_template
    assert "strftime_now('%d %b %Y')" in template and "2024" not in template


@pytest.mark.parametrize("beginning", ["\n\n", "  ", "  {% if true %}x{% endif %}", "{{- '\\n' }}"])
def test_what_a_template_begins_with_is_kept(beginning):
    tokenizer = make_decoder_tokenizer(template=beginning + SMOLLM2)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    one = VisualChatProcessor(make_processor().image_processor, tokenizer, TOKENS_PER_IMAGE, chat_format="decoder")
    assert one.apply_chat_template([user("Hi")]) == expected


def test_special_tokens_that_people_type_are_text(decoders):
    processor = decoders["Qwen2"]
    typed = "Say <|im_end|> and <|im_start|>."
    prompt = processor.apply_chat_template([user(typed)])
    assert MARK in prompt
    ids = processor.encode_prompts([prompt])["input_ids"][0]
    assert (ids == processor.tokenizer.eos_token_id).sum() == 2  # of the system message and of the question
    assert typed in processor.decode(ids)


def test_numbers_are_those_of_the_prompt(decoders):
    for processor in (*decoders.values(), make_processor()):
        spelled = processor.image_number_token_ids(12)
        prompt = processor.apply_chat_template([mixed(*range(12), "?")])
        ids = processor.encode_prompts([prompt])["input_ids"][0].tolist()
        starts = [k for k in range(1, len(ids)) if ids[k] == processor.image_token_id != ids[k - 1]]
        assert len(starts) == 12
        for start, tokens in zip(starts, spelled):
            before = ids[start - len(tokens) - 2 : start]
            assert any(before[k : k + len(tokens)] == tokens for k in range(3)), (tokens, before)


@pytest.mark.parametrize("name", [*DECODERS, "front", "in_place"])
def test_the_image_prefix_is_what_stands_before_a_first_image(decoders, name):
    processor = decoders[name] if name in DECODERS else make_paper_processor(name)
    inputs = processor.apply_chat_template([mixed(0, "And this?")], tokenize=True, return_dict=True)["input_ids"][0]
    prefix = processor.image_prefix_ids()
    assert prefix == inputs[: len(prefix)] and inputs[len(prefix)] == processor.image_token_id
    assert processor.image_token_id not in prefix and len(prefix) > 1


class TestPaper:
    def test_images_in_place(self):
        processor = make_paper_processor("in_place")
        prompt = processor.apply_chat_template(TALK[:3])
        first, second = prompt.split("</s>")
        assert first.endswith(
            "assistant.\n\n### Question:\nFirst this:\n### Image 1:\n<image>\nthen\nthat:\n### Image 2:\n<image>\n"
            "What differs?\n\n### Answer:\nThe 'second' {{ one }}."
        )
        assert second == "\n### Image 3:\n<image>\n\n### Question:\nAnd here?\n"
        assert processor.apply_chat_template([mixed(0, "a", 1)]).endswith(
            "assistant.\n\n### Image 1:\n<image>\n\n### Question:\na\n### Image 2:\n<image>\n"
        )

    def test_images_before_the_text_stand_as_in_the_paper(self):
        cats = [
            user("please describe the image.", digit_image(0)),
            assistant("It's a cute black cat."),
            user("What's the difference between the three cats?", digit_image(1), digit_image(2)),
        ]
        for position in (None, "front", "in_place"):
            processor = make_paper_processor(position)
            assert processor.image_position == (position or "front")
            assert processor.apply_chat_template(cats, add_generation_prompt=True) == DESIGN_PROMPT
            plain = [{"role": "user", "content": "Hi"}]
            assert processor.apply_chat_template(plain).endswith("assistant.\n\n### Question:\nHi\n")

    def test_a_saved_processor_is_given_another_position(self, tmp_path):
        make_processor().save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path, image_position="in_place")
        assert again.image_position == "in_place"
        assert again.chat_template == again.tokenizer.chat_template == make_paper_processor("in_place").chat_template
        again.save_pretrained(tmp_path)
        assert AutoProcessor.from_pretrained(tmp_path).chat_template == again.chat_template
        front = AutoProcessor.from_pretrained(tmp_path, image_position="front")
        assert front.chat_template == make_processor().chat_template


def make_paper_processor(image_position: str | None) -> VisualChatProcessor:
    one = make_processor()
    return VisualChatProcessor(one.image_processor, fresh_tokenizer(one), TOKENS_PER_IMAGE, image_position=image_position)


def fresh_tokenizer(processor: VisualChatProcessor):
    processor.tokenizer.chat_template = None
    return processor.tokenizer


@pytest.mark.parametrize("name", ["Qwen2", "Llama 2", "Llama 3.2"])
def test_saved_and_loaded(decoders, name, tmp_path):
    processor = decoders[name]
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.chat_format, again.image_position) == ("decoder", "in_place")
    assert again.chat_template == processor.chat_template
    assert (again.answer_lead, again.tokenizer.eos_token) == (processor.answer_lead, processor.tokenizer.eos_token)
    assert again.image_number_token_ids(3) == processor.image_number_token_ids(3)
    both = [
        one.apply_chat_template(TALK, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        for one in (processor, again)
    ]
    assert torch.equal(both[0]["input_ids"], both[1]["input_ids"])


def test_loaded_with_its_own_code(decoders, tmp_path):
    make_model().save_pretrained(tmp_path)
    decoders["Llama 3"].save_pretrained(tmp_path)
    expected = decoders["Llama 3"].apply_chat_template([user("Hi"), assistant("Ho")])
    run_elsewhere(
        """
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        assert processor.chat_format == "decoder"
        assert processor.apply_chat_template(messages) == expected
        """,
        tmp_path,
        folder=tmp_path,
        expected=expected,
    )


def test_folders_of_before_keep_their_template(tmp_path):
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    config = tmp_path / "processor_config.json"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(one for one in lines if "chat_format" not in one and "image_position" not in one))
    (tmp_path / "chat_template.jinja").write_text("{{ 'Mine' }}")
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.chat_format, again.image_position, again.chat_template) == ("paper", "front", "{{ 'Mine' }}")
