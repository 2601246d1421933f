# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Conversations of many rounds over many images, of which each round costs its new tokens only."""

import copy
import inspect
import itertools
import os
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from transformers import DynamicCache, StoppingCriteriaList
from transformers.utils import logging

from .chat_rounds_visualchat import Round, read_question
from .chat_saving_visualchat import SavedConversation, load_conversation, save_conversation
from .chat_streaming_visualchat import (
    AnswerReader,
    AnswerThread,
    check_texts,
    choose_settings,
    find_setting,
)
from .image_loading_visualchat import ImageSource, load_own_image
from .image_memory_visualchat import ImageMemoryStore
from .modality_cache_visualchat import copy_cache
from .weight_fingerprint_visualchat import ModelWeights, describe_state


logger = logging.get_logger(__name__)


class Computed(NamedTuple):
    """
    A cache, the tokens in it (of shape `(tokens,)`), the images that their placeholders stand for, and what the model was
    when it computed them.
    """

    cache: DynamicCache
    input_ids: torch.LongTensor
    images: list[Image.Image]
    model_state: tuple = ()


class ChatSession:
    """
    A conversation with a model. Whatever was said or shown before is kept in a cache and in image memory; the answers are
    those of the whole conversation run from the beginning.

    ```python
    >>> chat = model.start_chat(processor)
    >>> chat.send("What is in this image?", images=["harbour.jpg"])
    >>> for piece in chat.send("And in this one?", images=["https://…/b.png"], stream=True):
    ...     print(piece, end="", flush=True)
    >>> chat.undo()
    ```

    Several sessions may be used at once, each by one thread at a time.

    Args:
        model (`VisualChatForCausalLM`): Answers.
        processor (`VisualChatProcessor`): The model's.
        store (`ImageMemoryStore`, *optional*): Remembers images, also across sessions that share it. By default the
            session has one of its own, of up to `max_store_bytes`. Without image memory, which needs `mmca` or
            `mmca_merged`, `sdpa` or `flex_attention`, and all weights in memory in a form that can be read, it is not used.
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
        text: str | list[dict],
        images: ImageSource | list[ImageSource] = (),
        stream: bool = False,
        begin_with: str = "",
        **generation,
    ) -> str | Iterator[str]:
        """
        Asks, and adds the question and its answer to the conversation.

        Args:
            text (`str` or `list[dict]`): The question. What looks like a special token in it is text. A list holds its texts
                and images in order, as the content of a message does; `images` are those of the parts that carry none.
            images (*optional*): An image that comes with it, or a list of them: anything that [`load_image`] takes.
            stream (`bool`, *optional*, defaults to `False`): Returns an iterator over the answer's pieces, as they are made;
                reading begins the answer. The conversation holds it when it ends. Closing the iterator, Ctrl-C, or asking
                something else meanwhile ends the answer where it is. Beam search has but one piece.
            begin_with (`str`, *optional*): The beginning of the answer, from which the model goes on. What it adds is
                returned; the conversation holds both.
            generation: As for `model.generate`. Unless it or the model's `generation_config` says otherwise, up to 512 new
                tokens, or a quarter of the model's context if that is less.

        Raises:
            ValueError: If an image cannot be read, if `begin_with` holds a section of the prompt, or if the conversation
                does not fit the model's context. The conversation is as before, as after any other error.
        """
        images = [images] if isinstance(images, ImageSource) else list(images)
        text, images, image_lines = read_question(text, images)
        check_texts(text, begin_with, self.processor.chat_format)
        images = [load_own_image(image, f"image {number}") for number, image in enumerate(images, 1)]
        asked = Round(text, images, begin_with, image_lines)
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

    def edit(
        self, index: int, text: str | list[dict], stream: bool = False, begin_with: str = "", **generation
    ) -> str | Iterator[str]:
        """
        Asks another question in place of an earlier one, about the same images. The rounds after it are dropped.

        Args:
            index (`int`): The round, from 0.
            text (`str` or `list[dict]`): The new question. The image parts of a list say where the images stand; in a text
                they stay at their lines.
            stream, begin_with, generation: As for [`~ChatSession.send`].

        Raises:
            IndexError: If there is no such round.
        """
        self._take_turn()
        if not 0 <= index < len(self.rounds):
            raise IndexError(f"There is no round {index}: the conversation has {len(self.rounds)}")
        one = self.rounds[index]
        if isinstance(text, str):
            image_lines = [min(line, text.count("\n") + 1) for line in one.image_lines]
        else:
            text, _, image_lines = read_question(text, one.images)
        asked = Round(text, one.images, begin_with, image_lines, one.pixel_values)
        check_texts(text, begin_with, self.processor.chat_format)
        return self._ask([*self.rounds[:index], asked], stream, generation)

    def clear(self) -> None:
        """Begins a new conversation. Images stay remembered."""
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
        """
        Writes `conversation.json` and the images, as PNG, into a folder, in place of an earlier conversation there.

        Raises:
            OSError: If it cannot be written. An earlier conversation is then still whole.
            ValueError: If it is longer than [`~ChatSession.load`] reads: see there.
        """
        rounds = [(one.text, one.images, one.answer, one.image_lines) for one in self.rounds]
        save_conversation(folder, SavedConversation(self.system, self.dropped_rounds, rounds))

    @classmethod
    def load(cls, folder: str | os.PathLike, model, processor, **settings) -> "ChatSession":
        """
        A conversation that [`~ChatSession.save`] wrote, to go on with. The images must lie in the folder.

        Args:
            folder (`str` or `os.PathLike`): Where it lies.
            model, processor, settings: As for [`ChatSession`].

        Raises:
            FileNotFoundError: If there is no `conversation.json`, or one of its images is missing.
            ValueError: If it holds something else, or more than 10,000 rounds, 1,000 images or 8 MiB of text.
        """
        saved = load_conversation(folder)
        session = cls(model, processor, **{"system": saved.system, **settings})
        session.dropped_rounds = saved.dropped_rounds
        session.rounds = [Round(*one) for one in saved.rounds]
        return session

    @property
    def messages(self) -> list[dict]:
        """The conversation as messages, as `processor.apply_chat_template` takes them."""
        return self._messages_of(self.rounds)

    def _messages_of(self, rounds: list[Round]) -> list[dict]:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for one in rounds:
            messages.append({"role": "user", "content": one.content})
            messages.append({"role": "assistant", "content": one.answer})
        return messages

    def tokenize(self, rounds: list[Round]) -> torch.LongTensor:
        """The prompt for the last round's answer, or for the rest of it if it has a beginning, of shape `(1, tokens)`."""
        processor = self.processor
        messages, ending = self._messages_of(rounds), {"continue_final_message": True}
        if not rounds[-1].answer:
            messages, ending = messages[:-1], {"add_generation_prompt": True}
        prompt = processor.apply_chat_template(messages, **ending, sanitize_control_tokens=True)
        return torch.from_numpy(processor.encode_prompts([prompt])["input_ids"][0])[None]

    def find_answer(self, rounds: list[Round], input_ids: torch.LongTensor) -> int:
        """
        Where the last round's answer begins in its prompt, of shape `(1, tokens)`: at its end, unless the answer has a
        beginning. A token that holds characters of both sides counts as the answer's.
        """
        if not rounds[-1].answer:
            return input_ids.shape[1]
        without = self.tokenize([*rounds[:-1], replace(rounds[-1], answer="")])
        return _shared_length(without[0], input_ids[0])

    def _ask(self, rounds: list[Round], stream: bool, generation: dict) -> str | Iterator[str]:
        generation = choose_settings(self.model, generation)
        input_ids, dropped = self._make_room(rounds, generation["max_new_tokens"])
        pieces = self._answer(rounds[dropped:], dropped, input_ids, generation, self._turn)
        self._unfinished = weakref.ref(pieces)
        return pieces if stream else "".join(pieces)

    def _make_room(self, rounds: list[Round], new_tokens: int) -> tuple[torch.LongTensor, int]:
        """The prompt that fits, with room for the answer, and how many rounds were dropped. The last one is always kept."""
        limit = self.model.config.text_config.max_position_embeddings

        def fits(input_ids: torch.LongTensor) -> bool:
            return input_ids.shape[1] + new_tokens <= limit

        input_ids, last = self.tokenize(rounds), len(rounds) - 1
        if fits(input_ids):
            return input_ids, 0
        if self.drop_oldest:  # the fewer rounds there are, the fewer tokens
            dropped = bisect_left(range(last + 1), True, 1, key=lambda count: fits(self.tokenize(rounds[count:])))
            input_ids = self.tokenize(rounds[min(dropped, last) :])
            if dropped <= last:
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
        images = [image for one in rounds for image in one.images]
        # Whatever breaks the answer off, a cache that is half written is not used again
        computed, self._computed = self._computed, self._nothing_computed()
        weights = ModelWeights(self.model)
        num_beams, remembers = find_setting(self.model, generation, "num_beams") or 1, self._can_remember(weights)
        model_state = describe_state(self.model, weights), self.model.config.text_config._attn_implementation
        # Without image memory beams need all images. The model may have been trained on, or have another adapter or dtype
        if (num_beams > 1 and not remembers) or computed.model_state != model_state:
            computed = self._nothing_computed()
        computed = self._cut(computed, input_ids[0], images)._replace(model_state=model_state)
        cache = computed.cache
        if num_beams > 1:
            cache = copy_cache(cache)
            cache.batch_repeat_interleave(num_beams)
        inputs = {
            **self._new_images(rounds, len(computed.images), remembers),
            "input_ids": input_ids.to(self.model.device),
            "attention_mask": torch.ones_like(input_ids, device=self.model.device),  # no token of an answer is padding
            "past_key_values": cache,
        }
        begin_with, start = rounds[-1].answer, self.find_answer(rounds, input_ids)
        reader = AnswerReader(self.processor, start, find_setting(self.model, generation, "eos_token_id"))
        generation["stopping_criteria"] = StoppingCriteriaList([*generation.get("stopping_criteria", []), reader])
        streams = num_beams == 1
        worker = AnswerThread(self.model, reader, streams, inputs, generation)
        beginning = answer = shown = reader.decode(input_ids[0, start:])
        try:
            worker.start()
            for text in reader:
                piece = reader.find_sure_part(text)[len(shown) :]
                if piece:
                    shown += piece
                    yield piece
        finally:
            # Also when the answer is broken off: what there is of it stands in the conversation
            reader.stop()
            worker.join()
            if worker.ids is not None:
                answer = reader.answer(worker.ids)
                rounds[-1].answer = begin_with + answer[len(beginning) :]
                self.rounds = rounds
                if dropped:
                    self.dropped_rounds += dropped
                    logger.warning("The model's context is full: the oldest %d rounds were dropped", dropped)
                if streams:
                    computed = Computed(cache, worker.ids[: cache.get_seq_length()], images, model_state)
                self._computed = computed
        if worker.error is not None:
            raise worker.take_error()
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

    def _cut(self, computed: Computed, input_ids: torch.LongTensor, images: list[Image.Image]) -> Computed:
        """What was computed, cut back to what it shares with a prompt of shape `(tokens,)` and its images."""
        per_image = self.processor.image_seq_length
        placeholders = (input_ids == self.processor.image_token_id).nonzero()[:, 0]
        length = _shared_length(computed.input_ids, input_ids[:-1])  # one token at least is to be computed
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], zip(computed.images, images)))
        if same < len(images):
            length = min(length, int(placeholders[same * per_image]))
        # Under "mmca_released" text depends on the images after it, also on those that were taken back
        has_others = not same == len(images) == len(computed.images)
        if length == 0 or (has_others and self.model.config.multimodal_attention == "mmca_released"):
            return self._nothing_computed()
        computed.cache.crop(length - len(computed.input_ids))
        kept = int((placeholders < length).sum()) // per_image
        return Computed(computed.cache, input_ids[:length], images[:kept])

    def _can_remember(self, weights: ModelWeights) -> bool:
        if not self.model.model.language_model.can_split_modalities(None):
            return False
        for unreadable in weights.unreadable.values():
            logger.warning_once(f"Conversations go on without image memory, which {unreadable.reason}")
            return False
        return True

    def _new_images(self, rounds: list[Round], known: int, remembers: bool) -> dict:
        """The images after the first `known` ones, as inputs of `generate`."""
        for one in rounds:
            if one.images and one.pixel_values is None:
                one.pixel_values = self.processor.image_processor(one.images, return_tensors="pt")["pixel_values"]
        pixel_values = [pixels for one in rounds if one.images for pixels in one.pixel_values][known:]
        if not pixel_values:
            return {}
        pixel_values = torch.stack(pixel_values).to(self.model.device)
        return {"image_memory": self._store.get(pixel_values)} if remembers else {"pixel_values": pixel_values}


def _shared_length(a: torch.LongTensor, b: torch.LongTensor) -> int:
    """How many tokens two prompts of shape `(tokens,)` share from their beginning on."""
    length = min(len(a), len(b))
    differs = (a[:length] != b[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


__all__ = ["ChatSession"]
