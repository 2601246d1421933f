# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""An answer while it is generated: its settings, its text so far, and where it ends."""

import itertools
import queue
import re
import threading
from collections.abc import Iterator

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


# An answer to the paper's prompt ends where a line of the prompt's own begins a new section. Empty lines before it belong to
# the section. The search begins at the first of several newlines only: else its time would grow with the square of their
# number
NEWLINES = r"(?:\A|(?<!\n)\n+)"
SECTION = NEWLINES + r"### (?:Image \d+|Question|Answer):"
SECTION_START = re.compile(SECTION + r"(?=\n)")
# … and an answer that was broken off may be broken off there
SECTION_START_OR_END = re.compile(SECTION + r"(?=\n|\Z)")


def _beginning_of(text: str, rest: str = "") -> str:
    """A pattern for the beginnings of a text, the empty one too, and for all of it with what follows."""
    for character in reversed(text):
        rest = f"(?:{re.escape(character)}{rest})?"
    return rest


# The end of an unfinished text that may yet turn out otherwise: the beginning of a section, or half a character
NAMES = (_beginning_of("Image ", r"(?:\d+:?)?"), _beginning_of("Question:"), _beginning_of("Answer:"))
HALF_CHARACTER = r"(?<!\uFFFD)\uFFFD+\Z"
UNSURE_END = re.compile(HALF_CHARACTER)
UNSURE = re.compile(rf"{NEWLINES}{_beginning_of('### ', '(?:' + '|'.join(NAMES) + ')')}\Z|{HALF_CHARACTER}")
MAX_NEW_TOKENS = 512


class AnswerReader(BaseStreamer, StoppingCriteria):
    """
    Reads an answer while `generate` makes it: iterates over the text so far, token by token, and ends the answer where it is
    asked to, or where the prompt's format ends it: where a section of the paper's prompt begins, or at the token that ends a
    turn of the decoder's.

    Args:
        processor (`VisualChatProcessor`): Its tokenizer decodes, and its `chat_format` says where answers end.
        prompt_length (`int`): Tokens before the answer, without the beginning that it was given.
        end_tokens (`int` or `list[int]`, *optional*): With which of them the model ends an answer itself.
    """

    def __init__(self, processor, prompt_length: int, end_tokens: int | list[int] | None):
        self.tokenizer, self.prompt_length = processor.tokenizer, prompt_length
        self.end_tokens = find_end_tokens(processor, end_tokens)
        self._has_sections, self._lead = processor.chat_format == "paper", processor.answer_lead
        self._stopped = threading.Event()
        self._tokens = queue.SimpleQueue()

    def put(self, value: torch.LongTensor) -> None:
        self._tokens.put(value.flatten().tolist())

    def end(self) -> None:
        self._tokens.put(None)

    def stop(self) -> None:
        self._stopped.set()

    def decode(self, ids: torch.LongTensor | list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(self._lead)

    def answer(self, ids: torch.LongTensor) -> str:
        """The answer in what `generate` returned for one prompt, of shape `(tokens,)`: without what is behind its end."""
        new = ids[self.prompt_length :].tolist()
        if not self._has_sections:
            return self.decode(list(itertools.takewhile(lambda token: token not in self.end_tokens, new)))
        section = SECTION_START if self.end_tokens.intersection(new) else SECTION_START_OR_END
        return section.split(self.decode(new), maxsplit=1)[0]

    def find_sure_part(self, answer: str) -> str:
        """What is sure to stay of an unfinished answer."""
        return find_sure_part(answer) if self._has_sections else UNSURE_END.split(answer, maxsplit=1)[0]

    def __iter__(self) -> Iterator[str]:
        tokens = []
        while (new := self._tokens.get()) is not None:
            tokens += new  # the prompt comes first
            if len(tokens) > self.prompt_length:
                yield self.decode(tokens[self.prompt_length :])

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        stopped = self._stopped.is_set()
        done = [stopped or self._has_ended(ids) for ids in input_ids[:, self.prompt_length :]]
        return torch.tensor(done, device=input_ids.device)

    def _has_ended(self, ids: torch.LongTensor) -> bool:
        if self._has_sections:
            return SECTION_START.search(self.decode(ids)) is not None
        return int(ids[-1]) in self.end_tokens


class AnswerThread(threading.Thread):
    """
    Makes an answer while its reader reads it.

    Args:
        model (`VisualChatForCausalLM`): Answers.
        reader ([`AnswerReader`]): Is told when the answer ends.
        streams (`bool`): Whether the reader is given each token. Beam search has none to give.
        inputs (`dict`), generation (`dict`): Of `model.generate`.

    Attributes:
        ids (`torch.LongTensor` of shape `(tokens,)`, *optional*): Prompt and answer, once they are there.
        error (`BaseException`, *optional*): What broke the answer off.
    """

    def __init__(self, model, reader: AnswerReader, streams: bool, inputs: dict, generation: dict):
        super().__init__(daemon=True)
        self.model, self.reader, self.streamer = model, reader, reader if streams else None
        self.inputs, self.generation = inputs, generation
        self.ids, self.error = None, None

    def run(self):
        try:
            own = {"streamer": self.streamer, "tokenizer": self.reader.tokenizer}  # the tokenizer is for `stop_strings`
            self.ids = self.model.generate(**self.inputs, **self.generation, **own)[0].cpu()
        except BaseException as error:
            self.error = error
        finally:
            self.reader.end()

    def take_error(self) -> BaseException | None:
        """
        The error, which this thread forgets. The traceback refers to the thread, so that they would be a reference cycle,
        which keeps the cache in memory until the garbage collector runs.
        """
        error, self.error = self.error, None
        return error


def find_end_tokens(processor, end_tokens: int | list[int] | None) -> set[int]:
    """The tokens that end an answer: those of `generate`, and the one that ends a turn of the decoder's own prompt."""
    found = {end_tokens} if isinstance(end_tokens, int) else set(end_tokens or ())
    return found if processor.chat_format == "paper" else found | {processor.tokenizer.eos_token_id}


def find_setting(model, generation: dict, name: str):
    """What a call of `generate` with these arguments takes for a setting."""
    defaults = generation.get("generation_config") or model.generation_config
    return generation[name] if name in generation else getattr(defaults, name)


def choose_settings(model, generation: dict) -> dict:
    """
    The arguments of `generate` that make one answer, by those that were given.

    Raises:
        ValueError: If one is not for conversations.
    """
    if (find_setting(model, generation, "num_return_sequences") or 1) > 1:
        raise ValueError("A conversation goes on with one answer: leave out `num_return_sequences`")
    if "max_length" in generation:
        raise ValueError("`max_length` would count the whole conversation: say `max_new_tokens`")
    if generation.get("return_dict_in_generate"):
        raise ValueError("A conversation gives its answer as text: leave out `return_dict_in_generate`")
    for name in ("cache_implementation", "prefill_chunk_size"):
        if generation.get(name) is not None:
            raise ValueError(
                f"`{name}={generation[name]!r}`: a conversation keeps a dynamic cache of its own, which is filled at"
                f" once. Leave `{name}` out, or call `model.generate` with the prompt of `tokenize`"
            )
    limit = model.config.text_config.max_position_embeddings
    new_tokens = find_setting(model, generation, "max_new_tokens") or min(MAX_NEW_TOKENS, limit // 4)
    # Whatever a script has left in the model's settings or a `generation_config` says: the cache is there
    own = {"cache_implementation": None, "prefill_chunk_size": None, "return_dict_in_generate": False, "use_cache": True}
    return {**generation, **own, "max_new_tokens": new_tokens}


def check_texts(question: str, begin_with: str, chat_format: str) -> None:
    for name, form, text in (
        ("A question", "is a string or a list of parts", question),
        ("An answer", "begins with a string", begin_with),
    ):
        if not isinstance(text, str):
            raise TypeError(f"{name} {form}, got {type(text).__name__}")
        check_characters(text, name)
    if chat_format == "paper" and cut_section(begin_with) != begin_with:
        raise ValueError(f"`begin_with` holds a section line of the prompt, which would end the answer: {begin_with!r:.80}")


def check_characters(text: str, name: str) -> None:
    """
    Raises:
        ValueError: If a text, which errors call `name`, holds half a character (a lone surrogate). No tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character, {text[error.start]!r}, at position {error.start}") from error


def cut_section(answer: str) -> str:
    """The answer up to a line that begins a new section of the prompt."""
    return SECTION_START.split(answer, maxsplit=1)[0]


def find_sure_part(answer: str) -> str:
    """What is sure to stay of an unfinished answer to the paper's prompt."""
    return UNSURE.split(cut_section(answer), maxsplit=1)[0]
