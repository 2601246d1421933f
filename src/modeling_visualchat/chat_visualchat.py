# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Conversations of many rounds over many images, of which each round costs its new tokens only."""

import copy
import inspect
import json
import logging
import os
import queue
import re
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from PIL import Image
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .image_loading_visualchat import ImageSource, load_image
from .image_memory_visualchat import ImageMemoryStore, ModelWeights, describe_state
from .modality_cache_visualchat import copy_cache


logger = logging.getLogger(__name__)

# An answer ends where a line of the prompt's own begins a new section. Empty lines before it belong to the section
SECTION = r"(?:\A|\n+)### (?:Image \d+|Question|Answer):"
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
UNSURE = re.compile(rf"(?:\A|\n+){_beginning_of('### ', '(?:' + '|'.join(NAMES) + ')')}\Z|\uFFFD+\Z")
FILE_NAME = "conversation.json"
MAX_NEW_TOKENS = 512


@dataclass
class Round:
    """
    A question and its answer.

    Args:
        text (`str`): The question.
        images (`list[PIL.Image.Image]`): The pictures that came with it.
        answer (`str`): The answer.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): What the processor made of
            the pictures, once they were needed.
    """

    text: str
    images: list[Image.Image] = field(default_factory=list)
    answer: str = ""
    pixel_values: torch.Tensor | None = field(default=None, repr=False, compare=False)


class Computed(NamedTuple):
    """
    A cache, the tokens in it (of shape `(tokens,)`), the pictures that their placeholders stand for, and what the model was
    when it computed them.
    """

    cache: DynamicCache
    input_ids: torch.LongTensor
    pictures: list[Image.Image]
    model_state: tuple = ()


class ChatSession:
    """
    A conversation with a model. Whatever was said or shown before is kept in a cache and in image memory; the answers are
    those of the whole conversation run from the beginning.

    ```python
    >>> chat = model.start_chat(processor)
    >>> chat.send("What is in this picture?", images=["harbour.jpg"])
    >>> for piece in chat.send("And in this one?", images=["https://…/b.png"], stream=True):
    ...     print(piece, end="", flush=True)
    >>> chat.undo()
    ```

    Several sessions may be used at once, each by one thread at a time.

    Args:
        model (`VisualChatForCausalLM`): Answers.
        processor (`VisualChatProcessor`): The model's.
        store (`ImageMemoryStore`, *optional*): Remembers pictures, also across sessions that share it. By default the
            session has one of its own, of up to `max_store_bytes`. Without image memory, which needs `mmca` or
            `mmca_merged`, `sdpa` and all weights in memory in a form that can be read, it is not used.
        system (`str`, *optional*): In place of the prompt's first line.
        drop_oldest (`bool`, *optional*, defaults to `False`): What to do when the conversation and the answer do not fit the
            model's context: drop the oldest rounds with their images, or raise. The images that stay are numbered anew.
        max_store_bytes (`int`, *optional*, defaults to 4 GiB): Of the session's own store.

    Attributes:
        rounds (`list[Round]`): The conversation so far.
        dropped_rounds (`int`): Rounds that were dropped for lack of room.
    """

    def __init__(
        self,
        model,
        processor,
        store: ImageMemoryStore | None = None,
        system: str | None = None,
        drop_oldest: bool = False,
        max_store_bytes: int = 4 * 2**30,
    ):
        self.model, self.processor, self.system, self.drop_oldest = model, processor, system, drop_oldest
        self.rounds: list[Round] = []
        self.dropped_rounds = 0
        self._store = store if store is not None else ImageMemoryStore(model, max_store_bytes)
        self._computed = self._nothing_computed()
        self._unfinished, self._turn = lambda: None, object()

    def send(
        self,
        text: str,
        images: ImageSource | list[ImageSource] = (),
        stream: bool = False,
        begin_with: str = "",
        **generation,
    ) -> str | Iterator[str]:
        """
        Asks, and adds the question and its answer to the conversation.

        Args:
            text (`str`): The question. What looks like a special token in it is text.
            images (*optional*): A picture that comes with it, or a list of them: anything that [`load_image`] takes.
            stream (`bool`, *optional*, defaults to `False`): Returns an iterator over the answer's pieces, as they are made;
                reading begins the answer. The conversation holds it when it ends. Closing the iterator, Ctrl-C, or asking
                something else meanwhile ends the answer where it is. Beam search has but one piece.
            begin_with (`str`, *optional*): The beginning of the answer, from which the model goes on. What it adds is
                returned; the conversation holds both.
            generation: As for `model.generate`. Unless it or the model's `generation_config` says otherwise, up to 512 new
                tokens, or a quarter of the model's context if that is less.

        Raises:
            ValueError: If a picture cannot be read, if `begin_with` holds a section of the prompt, or if the conversation
                does not fit the model's context. The conversation is as before, as after any other error.
        """
        if not isinstance(text, str):
            raise TypeError(f"A question is a string, got {type(text).__name__}")
        images = [images] if isinstance(images, ImageSource) else images
        images = [_load(image, f"image {number}") for number, image in enumerate(images, 1)]
        asked = Round(text, images, answer=_check_beginning(begin_with))
        self._take_turn()
        return self._ask([*self.rounds, asked], stream, generation)

    def undo(self) -> Round:
        """
        Takes back the last question and its answer, and returns them.

        Raises:
            IndexError: If nothing has been asked.
        """
        self._take_turn()
        if not self.rounds:
            raise IndexError("There is nothing to take back: the conversation has no rounds")
        return self.rounds.pop()

    def edit(self, index: int, text: str, stream: bool = False, begin_with: str = "", **generation) -> str | Iterator[str]:
        """
        Asks another question in place of an earlier one, about the same pictures. The rounds after it are dropped.

        Args:
            index (`int`): The round, from 0.
            text (`str`): The new question.
            stream, begin_with, generation: As for [`~ChatSession.send`].

        Raises:
            IndexError: If there is no such round.
        """
        self._take_turn()
        if not 0 <= index < len(self.rounds):
            raise IndexError(f"There is no round {index}: the conversation has {len(self.rounds)}")
        if not isinstance(text, str):
            raise TypeError(f"A question is a string, got {type(text).__name__}")
        one = self.rounds[index]
        asked = Round(text, one.images, answer=_check_beginning(begin_with), pixel_values=one.pixel_values)
        return self._ask([*self.rounds[:index], asked], stream, generation)

    def clear(self) -> None:
        """Begins a new conversation. Pictures stay remembered."""
        self._take_turn()
        self.rounds, self.dropped_rounds = [], 0
        self._computed = self._nothing_computed()

    def fork(self) -> "ChatSession":
        """A conversation that goes on from here on its own. What was computed is shared, not copied."""
        other = copy.copy(self)
        other.rounds = [copy.copy(one) for one in self.rounds]
        other._computed = self._computed._replace(cache=copy_cache(self._computed.cache))
        other._unfinished = lambda: None
        return other

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `conversation.json` and the pictures, as PNG, into a folder."""
        os.makedirs(folder, exist_ok=True)
        rounds, number = [], 0
        for one in self.rounds:
            names = []
            for image in one.images:
                number += 1
                names.append(f"image-{number}.png")
                image.save(os.path.join(folder, names[-1]))
            rounds.append({"text": one.text, "images": names, "answer": one.answer})
        content = {"system": self.system, "dropped_rounds": self.dropped_rounds, "rounds": rounds}
        with open(os.path.join(folder, FILE_NAME), "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)

    @classmethod
    def load(cls, folder: str | os.PathLike, model, processor, **settings) -> "ChatSession":
        """
        A conversation that [`~ChatSession.save`] wrote, to go on with.

        Args:
            folder (`str` or `os.PathLike`): Where it lies.
            model, processor, settings: As for [`ChatSession`].

        Raises:
            FileNotFoundError: If there is no `conversation.json`, or one of its pictures is missing.
            ValueError: If it holds something else.
        """
        path = os.path.join(folder, FILE_NAME)
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            session = cls(model, processor, **{"system": content["system"], **settings})
            session.dropped_rounds = content["dropped_rounds"]
            saved = [(one["text"], one["images"], one["answer"]) for one in content["rounds"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a conversation that was saved here: {error!r}") from error
        for text, names, answer in saved:
            images = [_load(os.path.join(folder, name), name) for name in names]
            session.rounds.append(Round(text, images, answer))
        return session

    @property
    def messages(self) -> list[dict]:
        """The conversation as messages, as `processor.apply_chat_template` takes them."""
        return self._messages_of(self.rounds)

    def _messages_of(self, rounds: list[Round]) -> list[dict]:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for one in rounds:
            images = [{"type": "image", "image": image} for image in one.images]
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": one.text}]})
            messages.append({"role": "assistant", "content": one.answer})
        return messages

    def tokenize(self, rounds: list[Round]) -> torch.LongTensor:
        """The prompt for the last round's answer, or for the rest of it if it has a beginning, of shape `(1, tokens)`."""
        processor = self.processor
        messages, ending = self._messages_of(rounds), {"continue_final_message": True}
        if not rounds[-1].answer:
            messages, ending = messages[:-1], {"add_generation_prompt": True}
        prompt = processor.apply_chat_template(messages, **ending, sanitize_control_tokens=True)
        input_ids = torch.tensor(processor.encode_prompts([prompt])["input_ids"])
        repeats = torch.where(input_ids[0] == processor.image_token_id, processor.image_seq_length, 1)
        return input_ids.repeat_interleave(repeats, dim=1)

    def find_answer(self, rounds: list[Round], input_ids: torch.LongTensor) -> int:
        """
        Where the last round's answer begins in its prompt, of shape `(1, tokens)`: at its end, unless the answer has a
        beginning. A token that holds characters of both sides counts as the answer's.
        """
        if not rounds[-1].answer:
            return input_ids.shape[1]
        without = self.tokenize([*rounds[:-1], replace(rounds[-1], answer="")])
        length = min(without.shape[1], input_ids.shape[1])
        return _shared_length(without[0, :length], input_ids[0, :length])

    def _ask(self, rounds: list[Round], stream: bool, generation: dict) -> str | Iterator[str]:
        if (self._setting(generation, "num_return_sequences") or 1) > 1:
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
        limit = self.model.config.text_config.max_position_embeddings
        new_tokens = self._setting(generation, "max_new_tokens") or min(MAX_NEW_TOKENS, limit // 4)
        input_ids, dropped = self._make_room(rounds, limit, new_tokens)
        # The cache is there, whatever a script has left in the model's settings
        settings = {"cache_implementation": None, "prefill_chunk_size": None}
        generation = {**generation, **settings, "max_new_tokens": new_tokens, "use_cache": True}
        generation["return_dict_in_generate"] = False  # whatever a `generation_config` says
        pieces = self._answer(rounds[dropped:], dropped, input_ids, generation, self._turn)
        self._unfinished = weakref.ref(pieces)
        return pieces if stream else "".join(pieces)

    def _setting(self, generation: dict, name: str):
        defaults = generation.get("generation_config") or self.model.generation_config
        return generation.get(name, getattr(defaults, name, None))

    def _make_room(self, rounds: list[Round], limit: int, new_tokens: int) -> tuple[torch.LongTensor, int]:
        """The prompt that fits, with room for the answer, and how many rounds were dropped. The last one is always kept."""
        for dropped in range(len(rounds) if self.drop_oldest else 1):
            input_ids = self.tokenize(rounds[dropped:])
            if input_ids.shape[1] + new_tokens <= limit:
                return input_ids, dropped
        what = "last question" if self.drop_oldest else "conversation"
        advice = "ask less at once" if self.drop_oldest else "take back or clear rounds, begin it with drop_oldest=True"
        raise ValueError(
            f"The {what} has {input_ids.shape[1]} tokens and the answer up to {new_tokens}, but the model's context holds"
            f" {limit}: {advice}, or allow fewer `max_new_tokens`"
        )

    def _answer(
        self, rounds: list[Round], dropped: int, input_ids: torch.LongTensor, generation: dict, turn: object
    ) -> Iterator[str]:
        if self._turn is not turn:
            raise RuntimeError("Something else was asked of the conversation before this iterator was begun: ask again")
        pictures = [image for one in rounds for image in one.images]
        # Whatever breaks the answer off, a cache that is half written is not used again
        computed, self._computed = self._computed, self._nothing_computed()
        num_beams, remembers = self._setting(generation, "num_beams") or 1, self._can_remember()
        # Where `generate` cannot go on from a cache: beams need all pictures
        if num_beams > 1 and not remembers:
            computed = self._nothing_computed()
        model_state = self._describe_model()
        if computed.model_state != model_state:  # trained on, another adapter, another dtype
            computed = self._nothing_computed()
        computed = self._cut(computed, input_ids[0], pictures)._replace(model_state=model_state)
        cache = computed.cache
        if num_beams > 1:
            cache = copy_cache(cache)
            cache.batch_repeat_interleave(num_beams)
        inputs = {
            **self._new_images(rounds, len(computed.pictures), remembers),
            "input_ids": input_ids.to(self.model.device),
            "attention_mask": torch.ones_like(input_ids, device=self.model.device),  # no token of an answer is padding
            "past_key_values": cache,
        }
        begin_with, start = rounds[-1].answer, self.find_answer(rounds, input_ids)
        reader = AnswerReader(self.processor.tokenizer, start, self._setting(generation, "eos_token_id"))
        generation["stopping_criteria"] = StoppingCriteriaList([*generation.get("stopping_criteria", []), reader])
        outcome = {}

        def run():
            try:
                ids = self.model.generate(
                    **inputs,
                    **generation,
                    streamer=reader if num_beams == 1 else None,
                    tokenizer=reader.tokenizer,  # for `stop_strings`
                )
                outcome["ids"] = ids[0].cpu()
            except BaseException as error:
                outcome["error"] = error
            finally:
                reader.end()

        worker = threading.Thread(target=run, daemon=True)
        beginning = answer = shown = reader.decode(input_ids[0, start:])
        try:
            worker.start()
            for text in reader:
                piece = _sure_part(text)[len(shown) :]
                if piece:
                    shown += piece
                    yield piece
        finally:
            # Also when the answer is broken off: what there is of it stands in the conversation
            reader.stop()
            worker.join()
            if "ids" in outcome:
                ids = outcome["ids"]
                answer = reader.answer(ids)
                rounds[-1].answer = begin_with + answer[len(beginning) :]
                self.rounds = rounds
                if dropped:
                    self.dropped_rounds += dropped
                    logger.warning("The model's context is full: the oldest %d rounds were dropped", dropped)
                if num_beams == 1:
                    computed = Computed(cache, ids[: cache.get_seq_length()], pictures, model_state)
                self._computed = computed
        if "error" in outcome:
            raise outcome["error"]
        if len(answer) > len(shown):
            yield answer[len(shown) :]

    def _take_turn(self) -> None:
        """Ends an answer that is being written; one that was not begun cannot begin any more."""
        pieces = self._unfinished()
        state = inspect.getgeneratorstate(pieces) if pieces is not None else inspect.GEN_CLOSED
        if state == inspect.GEN_RUNNING:
            raise RuntimeError("Another thread is reading an answer of this conversation: let it end, or fork() before")
        if state == inspect.GEN_SUSPENDED:
            pieces.close()
        self._turn = object()

    def _nothing_computed(self) -> Computed:
        return Computed(DynamicCache(config=self.model.config), torch.empty(0, dtype=torch.long), [])

    def _cut(self, computed: Computed, input_ids: torch.LongTensor, pictures: list[Image.Image]) -> Computed:
        """What was computed, cut back to what it shares with a prompt of shape `(tokens,)` and its pictures."""
        per_image = self.processor.image_seq_length
        placeholders = (input_ids == self.processor.image_token_id).nonzero()[:, 0]
        length = min(len(computed.input_ids), len(input_ids) - 1)  # one token at least is to be computed
        length = _shared_length(computed.input_ids[:length], input_ids[:length])
        same = 0
        for known, picture in zip(computed.pictures, pictures):
            if known is not picture:
                break
            same += 1
        if same < len(pictures):
            length = min(length, int(placeholders[same * per_image]))
        # Under "mmca_released" text depends on the pictures after it, also on those that were taken back
        has_others = not same == len(pictures) == len(computed.pictures)
        if length == 0 or (has_others and self.model.config.multimodal_attention == "mmca_released"):
            return self._nothing_computed()
        computed.cache.crop(length - len(computed.input_ids))
        kept = int((placeholders < length).sum()) // per_image
        return Computed(computed.cache, input_ids[:length], pictures[:kept])

    def _describe_model(self) -> tuple:
        """What a cache depends on, of what can be read of the weights."""
        return describe_state(self.model, ModelWeights(self.model)), self.model.config.text_config._attn_implementation

    def _can_remember(self) -> bool:
        if not self.model.model.language_model.can_split_modalities(None):
            return False
        for unreadable in ModelWeights(self.model).unreadable.values():
            logger.warning_once(f"Conversations go on without image memory, which {unreadable.reason}")
            return False
        return True

    def _new_images(self, rounds: list[Round], known: int, remembers: bool) -> dict:
        """The images after the first `known` ones, as inputs of `generate`."""
        for one in rounds:
            if one.images and one.pixel_values is None:
                one.pixel_values = self.processor.image_processor(one.images, return_tensors="pt")["pixel_values"]
        pixel_values = [picture for one in rounds if one.images for picture in one.pixel_values][known:]
        if not pixel_values:
            return {}
        pixel_values = torch.stack(pixel_values).to(self.model.device)
        return {"image_memory": self._store.get(pixel_values)} if remembers else {"pixel_values": pixel_values}


class AnswerReader(BaseStreamer, StoppingCriteria):
    """
    Reads an answer while `generate` makes it: iterates over the text so far, token by token, and ends the answer where a
    section of the prompt begins or where it is asked to.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes.
        prompt_length (`int`): Tokens before the answer, without the beginning that it was given.
        end_tokens (`int` or `list[int]`, *optional*): With which of them the model ends an answer itself.
    """

    def __init__(self, tokenizer, prompt_length: int, end_tokens: int | list[int] | None):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.end_tokens = {end_tokens} if isinstance(end_tokens, int) else set(end_tokens or ())
        self._stopped = threading.Event()
        self._tokens = queue.SimpleQueue()

    def put(self, value: torch.LongTensor) -> None:
        self._tokens.put(value.flatten().tolist())

    def end(self) -> None:
        self._tokens.put(None)

    def stop(self) -> None:
        self._stopped.set()

    def decode(self, ids: torch.LongTensor | list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def answer(self, ids: torch.LongTensor) -> str:
        """The answer in what `generate` returned for one prompt, of shape `(tokens,)`: without the section behind it."""
        new = ids[self.prompt_length :].tolist()
        section = SECTION_START if self.end_tokens.intersection(new) else SECTION_START_OR_END
        return section.split(self.decode(new), maxsplit=1)[0]

    def __iter__(self) -> Iterator[str]:
        tokens = []
        while (new := self._tokens.get()) is not None:
            tokens += new  # the prompt comes first
            if len(tokens) > self.prompt_length:
                yield self.decode(tokens[self.prompt_length :])

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        stopped = self._stopped.is_set()
        done = [stopped or SECTION_START.search(self.decode(row)) is not None for row in input_ids[:, self.prompt_length :]]
        return torch.tensor(done, device=input_ids.device)


def _load(source: ImageSource, name: str) -> Image.Image:
    """A picture of our own: what the caller does to his later does not matter, and one that is read late is read now."""
    image = load_image(source, name)
    try:
        return image.copy()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name}: the picture is broken: {error}") from error


def _shared_length(a: torch.LongTensor, b: torch.LongTensor) -> int:
    """How many tokens two prompts of one shape `(tokens,)` share from their beginning on."""
    differs = (a != b).nonzero()
    return int(differs[0]) if len(differs) else len(a)


def _check_beginning(answer: str) -> str:
    if not isinstance(answer, str):
        raise TypeError(f"An answer begins with a string, got {type(answer).__name__}")
    if cut_section(answer) != answer:
        raise ValueError(f"`begin_with` holds a section line of the prompt, which would end the answer: {answer!r:.80}")
    return answer


def cut_section(answer: str) -> str:
    """The answer up to a line that begins a new section of the prompt."""
    return SECTION_START.split(answer, maxsplit=1)[0]


def _sure_part(answer: str) -> str:
    """What is sure to stay of an unfinished answer."""
    return UNSURE.split(cut_section(answer), maxsplit=1)[0]


__all__ = ["ChatSession"]
