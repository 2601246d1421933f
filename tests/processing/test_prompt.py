"""
Which tokens a prompt is: those of before, by every way to them, TRL's included; special tokens that people type are text.
"""

import json
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, pipeline
from transformers.utils.chat_template_utils import render_jinja_template

from helpers.tiny import TOKENS_PER_IMAGE, assistant, digit_image, make_model, make_processor, user
from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor
from modeling_visualchat.chat_rounds_visualchat import Round
from modeling_visualchat.chat_template_visualchat import CHAT_TEMPLATE, FIRST_LINE
from modeling_visualchat.messages_visualchat import list_images
from modeling_visualchat.processing_visualchat import MARK
from visualchat.evaluation.answers import generate_answers


# What folders hold that were saved earlier: the tokenizer began the prompt, and a newline followed the end token
OLD_TEMPLATE = """\
{%- set numbered = namespace(images=0, rounds=0) -%}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
            {{- '' if loop.first else '\n' -}}{{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token if write_bos_token else '' -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- 'You are a powerful vision-language assistant.\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- text_of(message) + '\n' -}}
    {%- elif message['role'] == 'user' -%}
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}
                {%- set numbered.images = numbered.images + 1 -%}
                {{- '\n' if loop.first and numbered.rounds == 0 else '' -}}
                {{- '### Image ' + numbered.images | string + ':\n<image>\n' -}}
            {%- endfor -%}
        {%- endif -%}
        {%- set numbered.rounds = numbered.rounds + 1 -%}
        {{- '\n### Question:\n' + text_of(message) + '\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '\n### Answer:\n' -}}
        {%- generation -%}{{- text_of(message) + eos_token -}}{%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\n### Answer:\n' -}}
{%- endif -%}
"""
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
STRUCK = "In HTML <s>old</s> is struck, and <image> <unk>."
ROUNDS = [
    [user("What is this?")],
    [user("What is this?", digit_image(0)), assistant("A cat.\n"), user(" And these?", digit_image(1), digit_image(2))],
    *(
        [
            {"role": "system", "content": system},
            user("Who?", digit_image(0)),
            assistant(" Me"),
            user("Why?"),
        ]
        for system in ("You see.", " You  see.", "", "\n", "\u00a0You", "\u2581You")
    ),
]


def make_tokenizer(kind: str, ending: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of a kind; `ending` is what its post-processor puts behind a text."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [*"\u2581\n\u00a0", *string.ascii_letters, *string.digits, *string.punctuation]
    if kind == "LLaMA's":
        vocab = {token: k for k, token in enumerate([*special, *alphabet])}
        merges = [("\u2581", "Y"), ("e", "e"), ("<", "s")]
        vocab |= {"".join(pair): len(vocab) + k for k, pair in enumerate(merges)}
        return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, add_eos_token=bool(ending), **SPECIAL)
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind in ("first", "always"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte-level with blank")
        backend.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([f"{FIRST_LINE}\n### Question:\nWhat is this? You see."], trainer)
    if kind not in ("no bos", "bos not added"):
        ids = [("<s>", 1), ("</s>", 2)]
        backend.post_processor = processors.TemplateProcessing(f"<s> $A {ending}".strip(), "$A $B", ids)
    elif ending:
        backend.post_processor = processors.TemplateProcessing(f"$A {ending}", "$A $B", [("</s>", 2)])
    names = {"eos_token": "</s>"} if kind == "no bos" else SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)


KINDS = ["byte-level", "byte-level with blank", "first", "always", "legacy", "LLaMA's", "no bos", "bos not added"]


def make_processor_of(kind: str, ending: str = "", **options) -> VisualChatProcessor:
    return VisualChatProcessor(make_processor().image_processor, make_tokenizer(kind, ending), TOKENS_PER_IMAGE, **options)


def ids_of_before(kind: str, conversation: list[dict], **options) -> list[int]:
    """As a tokenizer gives them that nobody has touched, with one placeholder an image."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    prompts, _ = render_jinja_template([conversation], chat_template=OLD_TEMPLATE, **tokenizer.special_tokens_map, **options)
    return tokenizer(prompts[0])["input_ids"]


def once(ids, processor: VisualChatProcessor) -> list[int]:
    """Token ids with one placeholder an image."""
    ids = torch.as_tensor(ids).flatten()
    is_image = ids == processor.image_token_id
    is_first = is_image.cumsum(0) % processor.image_seq_length == 1 % processor.image_seq_length
    return ids[~is_image | is_first].tolist()


def every_way(processor: VisualChatProcessor, conversation: list[dict]) -> dict[str, list[int]]:
    """The prompt for an answer, with one placeholder an image."""
    images = list_images(conversation)
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    batch = VisualChatDataCollator(processor)([{"messages": [*conversation, assistant("Yes")]}])
    ways = {
        "processor": processor.apply_chat_template(conversation, **settings)["input_ids"][0],
        "in two steps": processor(text=prompt, images=images or None)["input_ids"][0],
        "in a batch": processor.apply_chat_template([conversation, conversation], **settings)["input_ids"][1],
        "collator": batch["input_ids"][0, : int((batch["labels"][0] == -100).nonzero()[-1]) + 1],
    }
    by_tokenizer = processor.tokenizer.apply_chat_template(conversation, **settings)["input_ids"]
    return {"tokenizer": by_tokenizer, **{way: once(ids, processor) for way, ids in ways.items()}}


@pytest.mark.parametrize("ending", ["", "</s>"], ids=["", "add_eos_token"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_before_by_every_way(kind, ending):
    processor = make_processor_of(kind, ending)
    begins = kind not in ("no bos", "bos not added")
    for conversation in ROUNDS:
        expected = ids_of_before(kind, conversation, add_generation_prompt=True)
        ways = every_way(processor, conversation)
        assert ways == dict.fromkeys(ways, expected)
        assert [expected.count(token) for token in (1, 2)] == [begins, (len(conversation) - 1) // 2]
        # What is answered ends with its end token, where a newline followed
        answered = [*conversation, assistant("So")]
        expected = ids_of_before(kind, answered)
        expected = expected[: len(expected) - expected[::-1].index(2)]
        batch = VisualChatDataCollator(processor)([{"messages": answered}])
        assert once(batch["input_ids"], processor) == expected
        assert processor.tokenizer.apply_chat_template(answered, return_dict=False) == expected
        learned = batch["labels"][batch["labels"] != -100].tolist()
        assert learned[-1] == 2 and learned.count(2) == len(answered) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders(kind, tmp_path):
    processor = make_processor_of(kind, "</s>")
    processor.save_pretrained(tmp_path)
    again, tokenizer = AutoProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == again.tokenizer.chat_template == tokenizer.chat_template == processor.chat_template
    for conversation in ROUNDS[1:4]:
        assert every_way(again, conversation) == every_way(processor, conversation)
        ids = tokenizer.apply_chat_template(conversation, return_dict=False)
        assert ids == processor.tokenizer.apply_chat_template(conversation, return_dict=False)
    typed = {"messages": [user("a"), assistant("Say </s>.")]}
    assert torch.equal(*(VisualChatDataCollator(one)([typed])["labels"] for one in (processor, again)))


@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_were_saved_earlier(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    make_processor_of(kind).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(OLD_TEMPLATE)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == OLD_TEMPLATE
    for conversation in ROUNDS:
        expected = ids_of_before(kind, conversation, add_generation_prompt=True)
        ways = every_way(processor, conversation)
        del ways["tokenizer"], ways["collator"]  # which began no prompt, and which has a newline more
        assert ways == dict.fromkeys(ways, expected)
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
        assert once(processor.encode_prompts([prompt])["input_ids"][0], processor) == expected
        answered = [*conversation, assistant("So")]
        batch = VisualChatDataCollator(processor)([{"messages": answered}])
        assert once(batch["input_ids"], processor) == ids_of_before(kind, answered)
        assert (batch["labels"][0] == 2).sum() == len(answered) // 2


def test_the_template_of_a_tokenizer_that_begins_with_tokens_of_its_own():
    tokenizer = make_tokenizer("no bos")
    tokenizer.add_tokens(["[a]", "'b'"], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(["[a]", "'b'"])
    names = [*zip(["[a]", "'b'"], ids), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[a] 'b' $A </s>", "$A $B", names)
    processor = VisualChatProcessor(make_processor().image_processor, tokenizer, TOKENS_PER_IMAGE)
    for conversation in ROUNDS[:2]:
        expected = ids_of_before("no bos", conversation, add_generation_prompt=True)
        image = tokenizer.convert_tokens_to_ids("<image>")  # after the two others
        expected = [*ids, *(image if token == ids[0] else token for token in expected)]
        assert set(map(tuple, every_way(processor, conversation).values())) == {tuple(expected)}


@pytest.mark.parametrize("ending", ["", " </s>"])
def test_a_tokenizer_that_knows_no_words_yet(ending):
    """As a tokenizer's training corpus is written with."""
    backend = Tokenizer(models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    names = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"<s> $A{ending}", "$A $B", names)
    processor = VisualChatProcessor(make_processor().image_processor, tokenizer, TOKENS_PER_IMAGE)
    assert processor.apply_chat_template([user("a"), assistant("b")]).startswith("<s>You are")
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_texts_of_which_some_begin_are_refused():
    with pytest.raises(ValueError, match="Text 1 begins with '<s>' and text 0 does not"):
        make_processor()(text=["a", "<s>a"])


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer = make_tokenizer("byte-level")
    type_without = type("Slow", (type(tokenizer),), {"is_fast": False})
    tokenizer.__class__ = type_without
    with pytest.raises(ValueError, match="Slow is no tokenizer of the `tokenizers` library"):
        VisualChatProcessor(make_processor().image_processor, tokenizer)


class TestTypedTokens:
    @pytest.mark.parametrize("kind", KINDS)
    def test_they_are_text_and_labels_are_exact(self, kind):
        processor = make_processor_of(kind)
        tokenizer = processor.tokenizer
        struck = STRUCK.replace("<image>", "<<s>s>")
        conversation = [
            {"role": "system", "content": "<s>See.</s>"},
            user("Is <s>it</s> </s>?", digit_image(0)),
            assistant(struck),
            user("<|</s>|> and again"),
            assistant("</s>"),
        ]
        batch = VisualChatDataCollator(processor)([{"messages": conversation}])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        begins = kind not in ("no bos", "bos not added")
        assert [(ids == token).sum() for token in (0, 1, 2)] == [0, begins, 2]
        learned = labels[labels != -100]
        first, second = learned.tensor_split([int((learned == 2).nonzero()[0]) + 1])
        assert tokenizer.decode(first).strip() == struck + "</s>"
        assert tokenizer.decode(second).strip() == "</s></s>"
        assert (len(learned) - first.shape[0]) > 2 and learned[-1] == 2
        if kind in ("byte-level", "no bos", "bos not added"):  # no blank is put anywhere
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            spelled = [tokenizer(one, **plain)["input_ids"] for one in (struck, "</s>")]
            assert [first.tolist(), second.tolist()] == [[*one, 2] for one in spelled]

        settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        whole = processor.apply_chat_template(conversation, **settings)
        assert whole["input_ids"] == [ids.tolist()]
        assert whole["assistant_masks"] == [(labels != -100).long().tolist()]
        text = processor.apply_chat_template(conversation)
        assert MARK in text and text.replace(MARK, "").endswith("### Answer:\n</s></s>")
        again = processor(text=text, images=[digit_image(0)])
        assert again["input_ids"] == [ids.tolist()]

    @pytest.mark.parametrize("kind", KINDS)
    def test_chat_asks_what_training_shows(self, kind):
        """The question is written as in training, and begins and ends with no token more."""
        processor, model = make_processor_of(kind), make_model()
        begins = kind not in ("no bos", "bos not added")
        for question in (
            "Hi",
            "<s>",
            "</s>",
            "<unk>",
            " </s>",
            "</s> a <s>",
            "<<s>s></s></s>",
            "<image>",
            "a <image>\n</s>",
        ):
            ids = model.start_chat(processor).tokenize([Round(question)])[0]
            assert [(ids == token).sum() for token in (0, 1, 2, processor.image_token_id)] == [0, begins, 0, 0]
            if "<image>" not in question:  # training refuses it
                batch = VisualChatDataCollator(processor)([{"messages": [user(question), assistant("Yes")]}])
                assert torch.equal(batch["input_ids"][0, : len(ids)], ids) and (batch["labels"][0, : len(ids)] == -100).all()

    def test_the_placeholder_is_text_where_it_is_allowed(self):
        processor = make_processor()
        conversation = [user(STRUCK, digit_image(0)), assistant(STRUCK), user("And?")]
        settings = {"add_generation_prompt": True, "sanitize_control_tokens": True}
        inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **settings)
        assert inputs["input_ids"][0].count(processor.image_token_id) == TOKENS_PER_IMAGE
        prompt = processor.apply_chat_template(conversation, **settings)
        assert processor(text=prompt, images=[digit_image(0)])["input_ids"] == inputs["input_ids"]
        chat = make_model().start_chat(processor)
        chat.send(STRUCK, digit_image(0), max_new_tokens=1)
        chat.rounds[0].answer = STRUCK
        assert chat.tokenize([*chat.rounds, Round("And?")]).tolist() == inputs["input_ids"]
        with pytest.raises(ValueError, match="example 0: message 0 holds the text '<image>'"):
            VisualChatDataCollator(processor)([{"messages": conversation[:2]}])

    @pytest.mark.parametrize("kind", ["byte-level", "first", "legacy"])
    def test_tokens_that_are_looked_for_in_normalized_text(self, kind):
        tokenizer = make_tokenizer(kind)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [{**token, "normalized": True} for token in state["added_tokens"]]
        backend = Tokenizer.from_str(json.dumps(state))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **SPECIAL)
        assert all(token.normalized for token in tokenizer.added_tokens_decoder.values())
        expected = tokenizer("<s>You are.</s>\n")["input_ids"]
        processor = VisualChatProcessor(make_processor().image_processor, tokenizer, TOKENS_PER_IMAGE)
        assert tokenizer("<s>You are.</s>\n")["input_ids"] == expected
        row = {"messages": [user("What?"), assistant("An <s> old.")]}
        if kind == "legacy":
            with pytest.raises(
                ValueError, match="example 0: message 1 holds the text '<s>', which this tokenizer cannot take"
            ):
                VisualChatDataCollator(processor)([row])
        else:
            usual = VisualChatDataCollator(make_processor_of(kind))([row])
            assert torch.equal(VisualChatDataCollator(processor)([row])["labels"], usual["labels"])

    def test_what_was_learned_is_answered(self):
        """Special tokens and headings: by chat, streamed and whole, and by evaluation."""
        processor, model = make_processor(), make_model()
        struck, sizes = STRUCK.replace("<image> ", ""), "A cat:\n\n### Size\nsmall\n### Color\nblack"
        answers = {"Struck?": struck, "Size?": sizes, "Head?": "### Size\nx"}
        batch = VisualChatDataCollator(processor)([{"messages": [user(q), assistant(a)]} for q, a in answers.items()])
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(80):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        settings = {"do_sample": False, "max_new_tokens": 80}
        assert generate_answers(model, processor, [[user(q)] for q in answers], **settings) == list(answers.values())
        for question, answer in answers.items():
            assert model.start_chat(processor).send(question, **settings) == answer
            assert "".join(model.start_chat(processor).send(question, stream=True, **settings)) == answer


@pytest.mark.parametrize("task", ["text-generation", "image-text-to-text"])
def test_pipelines(task, monkeypatch):
    processor, model = make_processor(), make_model()
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs["input_ids"]) or generate(**inputs))
    images = [digit_image(0)] if task == "image-text-to-text" else []
    parts = {"processor": processor} if images else {"tokenizer": processor.tokenizer}
    pipeline(task, model=model, **parts)([user("What?", *images)], max_new_tokens=2)
    expected = every_way(processor, [user("What?", *images)])["collator"]
    assert once(seen[0], processor) == expected
    assert expected.count(processor.tokenizer.bos_token_id) == 1


def test_the_template_begins_and_ends_nothing_else():
    """What a conversation is, is its beginning in a longer one: the newline behind an answer begins what follows."""
    processor = make_processor()
    assert processor.chat_template == processor.tokenizer.chat_template == CHAT_TEMPLATE
    answered = [user("a"), assistant("b")]
    text = processor.apply_chat_template(answered)
    assert text.startswith("<s>You are") and text.endswith("### Answer:\nb</s>")
    for more in ([user("c")], [user("c", digit_image(0))]):
        longer = processor.apply_chat_template([*answered, *more])
        assert longer.startswith(text + "\n") and longer[len(text)] == "\n"
