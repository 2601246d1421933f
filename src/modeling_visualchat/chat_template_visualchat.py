# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Chat templates: the paper's prompt, and that of an instruct decoder, made from its tokenizer's own chat template. Nothing
else in the project assembles a prompt.
"""

import itertools
import re

from transformers.utils.chat_template_utils import render_jinja_template


# The turn of the user in the paper's prompt: its images before the question
IMAGES_IN_FRONT = """\
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}
                {%- set numbered.images = numbered.images + 1 -%}
                {{- '\\n' if loop.first and numbered.rounds == 0 else '' -}}
                {{- '### Image ' + numbered.images | string + ':\\n<image>\\n' -}}
            {%- endfor -%}
        {%- endif -%}
        {%- set numbered.rounds = numbered.rounds + 1 -%}
        {{- '\\n### Question:\\n' + text_of(message) + '\\n' -}}
"""
# … or: images before the first text stand before the question, to the letter as above, and others where they are in it
IMAGES_IN_PLACE = """\
        {%- set turn = namespace(text='', begun=false, opened=false) -%}
        {%- set text_only = [{'type': 'text', 'text': message['content']}] -%}
        {%- for part in (text_only if message['content'] is string else message['content']) -%}
            {%- if part['type'] == 'image' -%}
                {%- set numbered.images = numbered.images + 1 -%}
                {%- set lines = '### Image ' + numbered.images | string + ':\\n<image>' -%}
            {%- endif -%}
            {%- if part['type'] == 'image' and not turn.begun -%}
                {{- '\\n' if not turn.opened and numbered.rounds == 0 else '' -}}
                {{- lines + '\\n' -}}
                {%- set turn.opened = true -%}
            {%- else -%}
                {%- set text = lines if part['type'] == 'image' else part['text'] -%}
                {%- set turn.text = turn.text + '\\n' + text if turn.begun else text -%}
                {%- set turn.begun = true -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set numbered.rounds = numbered.rounds + 1 -%}
        {{- '\\n### Question:\\n' + turn.text + '\\n' -}}
"""
# The paper's prompt (DeepSpeed-VisualChat, arXiv 2309.14327, section 4.2): plain text, images numbered through the whole
# conversation and placed before the question of the turn that brings them. The generation block is what is learned: it ends
# with the end token, and the newline after it belongs to what follows, so that nothing after the end token is ever learned.
CHAT_TEMPLATE = """\
{%- set numbered = namespace(images=0, rounds=0, gap='') -%}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
            {{- '' if loop.first else '\\n' -}}{{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- 'You are a powerful vision-language assistant.\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- numbered.gap -}}
    {%- set numbered.gap = '' -%}
    {%- if message['role'] == 'system' -%}
        {{- text_of(message) + '\\n' -}}
    {%- elif message['role'] == 'user' -%}
QUESTION_TURN
    {%- elif message['role'] == 'assistant' -%}
        {{- '\\n### Answer:\\n' -}}
        {%- generation -%}{{- text_of(message) + eos_token -}}{%- endgeneration -%}
        {%- set numbered.gap = '\\n' -%}
    {%- else -%}
        {{- raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- numbered.gap + '\\n### Answer:\\n' -}}
{%- endif -%}
""".replace("QUESTION_TURN\n", IMAGES_IN_FRONT)
# How the prompt begins, for tokenizers that begin a text with `<s>`, and for those (LLaMA's "first" prefix) that besides put
# a blank before a text, but none before a text behind a token: there it is written, unless the text begins with one
OPENING = "{{- bos_token -}}\n"
OPENING_WITH_BLANK = """\
{%- set begins_blank = messages[0]['role'] == 'system' and (text_of(messages[0]) + '\\n')[0] in ' \\u2581' -%}
{{- bos_token + ('' if begins_blank else ' ') -}}
"""
FIRST_LINE = "You are a powerful vision-language assistant.\n"
# The prompt of an instruct decoder. The names in capitals are what its tokenizer's own template writes around the contents
DECODER_TEMPLATE = """\
{%- set numbered = namespace(images=0) -%}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '' if loop.first else '\\n' -}}
            {%- if part['type'] == 'image' -%}
                {%- set numbered.images = numbered.images + 1 -%}
                {{- 'Image ' + numbered.images | string + ': ' + IMAGE_TOKEN -}}
            {%- else -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- SYSTEM -}}
    {%- elif message['role'] == 'user' -%}
        {{- START if loop.first else NEXT_QUESTION if loop.previtem['role'] == 'assistant' else '' -}}
        {{- QUESTION + QUESTION_END -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ANSWER_START -}}
        {%- generation -%}{{- ANSWER_LEAD + ANSWER + TURN_END -}}{%- endgeneration -%}
        {{- GAP -}}
    {%- else -%}
        {{- raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ANSWER_START -}}
{%- endif -%}
"""
NO_SYSTEM = "raise_exception('The chat template of this decoder takes no system message')"
# What a template may do with a content
FILTERS = ("{}", "{} | trim", "({}).lstrip('\\n')", "({}).strip('\\n')")
# Written by templates that can open a thought, and told not to
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")
# Before a template: today's date then stands as its format between two private characters
MARK_DATES = "{%- macro strftime_now(format) -%}\U000f0002{{- format -}}\U000f0003{%- endmacro -%}{{ '' }}"
# A template that begins so takes away what stands before it. Any other begins a line, alone and behind MARK_DATES: Jinja
# treats blanks at the beginning of a line otherwise
TAKES_BLANKS = re.compile(r"\s*\{[%{#]-")
DATE = re.compile("\U000f0002(.*?)\U000f0003")


def write_chat_template(tokenizer, begin: str, image_position: str) -> str:
    """The paper's prompt with `begin` before it, token for token as if the tokenizer began the text itself."""
    template = CHAT_TEMPLATE.replace(IMAGES_IN_FRONT, IMAGES_IN_PLACE) if image_position == "in_place" else CHAT_TEMPLATE
    if not begin:
        return template.replace(OPENING, "")

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = tokenizer(FIRST_LINE)["input_ids"]
    needs_blank = encode(begin + FIRST_LINE) != expected == encode(f"{begin} {FIRST_LINE}")
    opening = OPENING_WITH_BLANK if needs_blank else OPENING
    if begin != tokenizer.bos_token:
        opening = opening.replace("bos_token", repr(begin))
    return template.replace(OPENING, opening)


def splice_chat_template(tokenizer, image_token: str) -> str:
    """
    The chat template of an instruct decoder with images in the user's turns, and what is learned marked as generated. It is
    made from what the tokenizer's own template writes before, between and behind the contents of messages, and writes the
    same text as that one for messages of text. If that one writes an empty thought before the last answer alone (Qwen3's),
    it stands before every answer here, so that a later turn never changes an earlier one.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The decoder's, with its own chat template.
        image_token (`str`): The placeholder of an image, which stands on a line "Image k: ".

    Raises:
        ValueError: If the template cannot be spliced, with the reason.
    """
    try:
        original = tokenizer.get_chat_template()
    except ValueError:
        raise _refusal("the tokenizer has none") from None
    if "### Question:" in original:
        raise _refusal("the tokenizer holds that of the paper: load the tokenizer of the decoder itself")
    special_tokens = tokenizer.special_tokens_map

    def render(template: str, messages: list[dict], **options) -> str:
        options = {"enable_thinking": False, **special_tokens, **options}
        begins_line = "" if TAKES_BLANKS.match(template) else "\n"
        try:
            rendered, _ = render_jinja_template([messages], chat_template=MARK_DATES + begins_line + template, **options)
        except Exception as error:  # a template is a program of anybody's: it may raise anything
            raise _refusal(f"it fails with {type(error).__name__}: {error}") from error
        return rendered[0][len(begins_line) :]

    parts = _find_parts(lambda messages, **options: render(original, messages, **options), tokenizer)
    try:
        system = _find_system(lambda messages: render(original, messages), parts)
    except ValueError:  # many templates take no system message, or move it about
        system = None
    return _choose_filters(render, original, parts, system, image_token)


def read_turn(template: str, special_tokens: dict[str, str]) -> tuple[str, str, str]:
    """
    What a template of [`splice_chat_template`] writes: the beginning of a conversation, up to the first question; what
    stands before an answer, though it is learned with it; and what ends an answer.
    """
    messages = [_message("user", "QUESTION"), _message("assistant", "ANSWER")]
    rendered, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
    )
    if len(spans[0]) != 1:
        raise ValueError("chat_format='decoder': the chat template has no {% generation %} block around an answer")
    start, end = spans[0][0]
    lead, turn_end = rendered[0][start:end].split("ANSWER")
    return rendered[0].split("QUESTION")[0], lead, turn_end


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"chat_format='decoder' cannot use the tokenizer's chat template: {reason}. Take chat_format='paper', or give a"
        " `chat_template`"
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _talk(*contents: str, system: str | None = None) -> list[dict]:
    """Messages of the user and the assistant in turn."""
    turns = [_message(role, content) for role, content in zip(itertools.cycle(("user", "assistant")), contents)]
    return turns if system is None else [_message("system", system), *turns]


CONTENTS = ("Question1", "Answer1", "Question2", "Answer2", "Question3")


def _split(text: str, contents: tuple[str, ...]) -> list[str]:
    """What stands before, between and behind the contents."""
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            raise _refusal("it does not write the content of each message once, in order")
        pieces.append(before)
    return [*pieces, text]


def _find_parts(render, tokenizer) -> dict[str, str]:
    """The texts that a template writes around contents, by their names in `DECODER_TEMPLATE`."""
    start, to_answer, to_question, *again, prompt = _split(render(_talk(*CONTENTS), add_generation_prompt=True), CONTENTS)
    if again != [to_answer, to_question]:
        raise _refusal("it writes the second round otherwise than the first")
    question_end = _split(render(_talk(*CONTENTS[:1])), CONTENTS[:1])[-1]
    answer_end = _split(render(_talk(*CONTENTS[:2])), CONTENTS[:2])[-1]
    pairs = (to_question, answer_end), (to_answer, question_end), (prompt, question_end)
    if not all(text.startswith(beginning) for text, beginning in pairs):
        raise _refusal("a later message changes what it writes behind an earlier one")
    lead = ""
    if to_answer.startswith(prompt) and not to_answer.removeprefix(prompt).strip():
        lead = to_answer.removeprefix(prompt)
    elif not (prompt.startswith(to_answer) and EMPTY_THOUGHT.fullmatch(prompt.removeprefix(to_answer))):
        raise _refusal(f"an answer begins with {prompt!r} if it is asked for, and with {to_answer!r} if it is there")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [(answer_end.index(token), -len(token), token) for token in special if token in answer_end]
    if not ends:
        raise _refusal("no special token ends an answer")
    position, _, token = min(ends)
    turn_end = answer_end[: position + len(token)]
    return {
        "START": start,
        "NEXT_QUESTION": to_question.removeprefix(answer_end),
        "QUESTION_END": question_end,
        "ANSWER_START": prompt.removeprefix(question_end),
        "ANSWER_LEAD": lead,
        "TURN_END": turn_end,
        "GAP": answer_end.removeprefix(turn_end),
    }


def _find_system(render, parts: dict[str, str]) -> tuple[str, str]:
    """What stands before and behind a system message, up to the first question."""
    before, behind, end = _split(render(_talk("Question1", system="System1")), ("System1", "Question1"))
    pieces = _split(render(_talk(*CONTENTS, system="System1")), ("System1", *CONTENTS))
    if end != parts["QUESTION_END"] or pieces[:2] != [before, behind]:
        raise _refusal("a system message changes what stands around others")
    return before, behind


def _choose_filters(render, original: str, parts: dict, system: tuple[str, str] | None, image_token: str) -> str:
    """The template that writes what the original writes, for contents with blanks around them too."""
    padded = {role: f" \n\n{role.upper()} \n\n" for role in ("system", "user", "assistant")}
    chosen = dict.fromkeys(padded, "{}")
    for role in chosen:
        if role == "system" and system is None:
            continue
        contents = {name: padded[name] if name == role else name for name in padded}
        messages = _talk(contents["user"], contents["assistant"], system=contents["system"] if role == "system" else None)
        expected = render(original, messages)
        tried = {one: render(_fill(parts, system, {**chosen, role: one}, image_token), messages) for one in FILTERS}
        fitting = [one for one, rendered in tried.items() if rendered == expected]
        if not fitting:
            raise _refusal(f"it changes the content of a message of the role {role!r}, or what stands around it")
        chosen[role] = fitting[0]
    template = _fill(parts, system, chosen, image_token)
    texts = [f"{{{{ Text }}}} {number}:\nline 'é' \\n \"東\" </x>" for number in range(7)]
    for count, prompted in itertools.product(range(1, 8), (False, True)):
        if prompted and count % 2 == 0:
            continue
        for first in (None,) if system is None else (None, "You are.\nKind"):
            messages = _talk(*texts[:count], system=first)
            both = [render(one, messages, add_generation_prompt=prompted) for one in (template, original)]
            if count > 2:  # an empty thought stands before each answer, not before the last alone
                both = [EMPTY_THOUGHT.sub("", text) for text in both]
            if both[0] != both[1]:
                raise _refusal(f"it writes a conversation of {count} messages otherwise than its parts")
    return template


def _fill(parts: dict[str, str], system: tuple[str, str] | None, filters: dict[str, str], image_token: str) -> str:
    """The template of these parts. `filters` say by role what is done with a content."""
    values = {name: _literal(text) for name, text in parts.items()}
    text = "text_of(message)"
    values["SYSTEM"] = NO_SYSTEM
    if system is not None:
        values["SYSTEM"] = f"{_literal(system[0])} + ({filters['system'].format(text)}) + {_literal(system[1])}"
    values["QUESTION"] = f"({filters['user'].format(text)})"
    values["ANSWER"] = f"({filters['assistant'].format(text)})"
    values["IMAGE_TOKEN"] = _literal(image_token)
    names = "|".join(sorted(values, key=len, reverse=True))
    return re.sub(rf"\b(?:{names})\b", lambda name: values[name[0]], DECODER_TEMPLATE)


def _literal(text: str) -> str:
    """A text as a template writes it, with today's date where the original has it."""
    pieces = DATE.split(text)
    dates = [f"strftime_now({piece!a})" if k % 2 else ascii(piece) for k, piece in enumerate(pieces)]
    return dates[0] if len(dates) == 1 else f"({' + '.join(dates)})"
