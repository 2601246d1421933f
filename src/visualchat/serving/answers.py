# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Answers in worker threads, a bounded number of them at a time; and what is measured of them."""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from anyio import CapacityLimiter
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import Receive
from transformers import LogitsProcessor, StoppingCriteria

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.chat_visualchat import ChatSession, Round
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.serving.limits import Limits
from visualchat.serving.requests import ChatRequest, RequestError
from visualchat.serving.sampling import DECODING, Adjusting, Logprobs, Sampling, make_warpers


RATE_SECONDS = 10


class DisconnectedError(Exception):
    """The client has gone."""


@dataclass
class Conversation:
    """
    Args:
        session (`ChatSession`): Empty.
        rounds (`list[Round]`): The last one is to be answered. What it has of an answer is its beginning.
        start (`int`): Tokens of the prompt before the answer and its beginning.
        prompt_tokens (`int`): Of all rounds, images included.
        max_new_tokens (`int`): Of the answer.
    """

    session: ChatSession
    rounds: list[Round]
    start: int
    prompt_tokens: int
    max_new_tokens: int


class Piece(NamedTuple):
    """
    A part of an answer.

    Args:
        index (`int`): Of the choice.
        text (`str`): Perhaps empty.
        logprobs (`list[dict]`): Of its tokens, as far as they are known yet; those of the last come with the next piece.
        finish_reason (`str`, *optional*): Of the choice's last piece.
    """

    index: int
    text: str
    logprobs: list[dict]
    finish_reason: str | None = None


class Choice(StoppingCriteria):
    """
    One of the answers to a request. `generate` asks it after each token whether to stop.

    Attributes:
        completion_tokens (`int`): So far, the end token included.
        is_whole (`bool`): Whether it ended by itself or at a stop string, not for lack of tokens.
        processors (`list[LogitsProcessor]`): Of the scores of its tokens.
    """

    def __init__(self, answer: "Answer", index: int, warpers: list[LogitsProcessor] | None):
        self.answer, self.index, self.conversation = answer, index, answer.conversation
        asked, prompt_length = answer.asked, self.conversation.prompt_tokens
        # Tokens in which the longest stop string can be spelt, and some more for what the tokenizer strips at a beginning
        self._stop_tokens = 8 + max((len(one.encode()) for one in asked.stop), default=0)
        self.completion_tokens, self.is_whole = 0, False
        self._logprobs = None
        self.processors: list[LogitsProcessor] = []
        if asked.logprobs:
            tokenizer = answer.service.processor.tokenizer
            self._logprobs = Logprobs(tokenizer, self.conversation.start, prompt_length, asked.top_logprobs)
            self.processors.append(self._logprobs)
        if asked.presence_penalty or asked.frequency_penalty or asked.logit_bias:
            self.processors.append(Adjusting(asked, prompt_length))
        if warpers is not None:
            self.processors.append(Sampling(answer.service.model.device, warpers, asked.seed, index))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> bool:
        service, asked = self.answer.service, self.answer.asked
        service.count_token()
        self.completion_tokens = input_ids.shape[1] - self.conversation.prompt_tokens
        if self._logprobs is not None:
            self._logprobs.note(input_ids[0].tolist())
        new = input_ids[0, self.conversation.prompt_tokens :][-self._stop_tokens :].tolist()
        ending = service.processor.tokenizer.decode(new, **DECODING)
        self.is_whole = new[-1] in service.end_tokens or any(one in ending for one in asked.stop)
        return self.is_whole or self.answer.is_cancelled

    @property
    def finish_reason(self) -> str:
        return "length" if self.completion_tokens >= self.conversation.max_new_tokens and not self.is_whole else "stop"

    def pieces(self) -> Iterator[Piece]:
        length = 0
        for text in cut_at_stop(self.answer.service.generate(self), self.answer.asked.stop):
            length += len(text)
            yield Piece(self.index, text, self._take_logprobs(length))
        yield Piece(self.index, "", self._take_logprobs(length), self.finish_reason)

    def _take_logprobs(self, length: int) -> list[dict]:
        return self._logprobs.take(length) if self._logprobs is not None else []


class Answer:
    """What is under way for a request: its choices, one after the other, since they go on from one cached prompt."""

    def __init__(self, asked: ChatRequest, conversation: Conversation, service: "AnswerService"):
        self.asked, self.conversation, self.service = asked, conversation, service
        warpers = make_warpers(asked, service.model.generation_config, service.model.device)
        self.choices = [Choice(self, index, warpers) for index in range(asked.n)]
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    def begin(self, pool: ThreadPoolExecutor, receive: Receive) -> None:
        """Puts it in the queue. It is cancelled when `receive` reports that its client has gone."""
        self._watch = asyncio.create_task(self._cancel_when_disconnected(receive))
        self._future = pool.submit(self._run)
        self._future.add_done_callback(lambda future: self._loop.call_soon_threadsafe(self._end, future))

    def cancel(self) -> None:
        """Stops it after its next token, or takes it out of the queue."""
        self._cancelled.set()
        self._future.cancel()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.conversation.prompt_tokens, sum(choice.completion_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def pieces(self) -> AsyncIterator[Piece]:
        """
        The choices as they are made, each with a last piece at least.

        Raises:
            DisconnectedError: If it was cancelled.
            Exception: What went wrong.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event

    def _run(self) -> None:
        with self.service.count_running():
            for choice in self.choices:
                if self.is_cancelled:
                    break
                for piece in choice.pieces():
                    self._loop.call_soon_threadsafe(self._events.put_nowait, piece)

    async def _cancel_when_disconnected(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def _end(self, future: Future) -> None:
        self._watch.cancel()
        self.service.end(self)
        if self.is_cancelled:
            self._events.put_nowait(DisconnectedError())
        else:
            self._events.put_nowait(future.exception())


def cut_at_stop(pieces: Iterator[str], stop: list[str]) -> Iterator[str]:
    """The text before the first stop string. What may be the beginning of one is held back until it is known."""
    text, shown, found = "", 0, []
    for piece in pieces:
        if found:  # the model may be one piece ahead
            continue
        text += piece
        found = [place for one in stop if (place := text.find(one)) >= 0]
        beginnings = [len(text) - k for one in stop for k in range(1, len(one)) if text.endswith(one[:k])]
        end = min(found or beginnings, default=len(text))
        if end > shown:
            yield text[shown:end]
            shown = end
    if not found and len(text) > shown:
        yield text[shown:]


class AnswerService:
    """
    A model with its image memory, `concurrency` threads that answer and `queue` places to wait.

    Args:
        model (`VisualChatForCausalLM`): Answers.
        processor (`VisualChatProcessor`): The model's.
        store (`ImageMemoryStore`): Remembers pictures across conversations.
        concurrency (`int`): Answers at a time.
        queue (`int`): Requests that may wait beyond these.

    Raises:
        ValueError: If the model's `generation_config` says what cannot be followed.

    Attributes:
        requests (`Counter`): By HTTP status.
        disconnects (`int`): Answers that were broken off because their client had gone.
        opening (`CapacityLimiter`): Of threads that open pictures.
    """

    def __init__(
        self,
        model: VisualChatForCausalLM,
        processor: VisualChatProcessor,
        store: ImageMemoryStore,
        concurrency: int,
        queue: int,
    ):
        if (model.generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"The model's generation_config has num_beams={model.generation_config.num_beams}, but answers are served as"
                " they are made, which beam search cannot: set num_beams to 1 in its generation_config.json"
            )
        self.model, self.processor, self.store = model, processor, store
        self.places, self.taken, self.running = concurrency + queue, 0, 0
        self.requests, self.disconnects = Counter(), 0
        self.prompt_tokens = self.generated_tokens = 0
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()
        self._answers: set[Answer] = set()
        # An open picture may take some hundred megabytes
        self.opening = CapacityLimiter(2)
        self._longest_token = max(map(len, processor.tokenizer.get_vocab()))
        self._pool = ThreadPoolExecutor(concurrency, "answer")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @property
    def end_tokens(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return end if isinstance(end, list) else [end]

    def take_place(self) -> None:
        """
        Lets a request in, before its body is read: so the memory of all of them is bounded.

        Raises:
            RequestError: If there is no place.
        """
        if self.taken >= self.places:
            raise RequestError(
                f"All {self.places} places are taken: try again later",
                code="server_overloaded",
                status=503,
                headers={"Retry-After": "1"},
            )
        self.taken += 1

    def leave_place(self) -> None:
        self.taken -= 1

    def fit(self, asked: ChatRequest, system: str | None, rounds: list[Round], limits: Limits) -> Conversation:
        """
        The conversation, with as many tokens for the answer as are asked for, else as fit.

        Raises:
            RequestError: If prompt and answer do not fit the model's context.
        """
        context = self.model.config.text_config.max_position_embeddings
        characters = len(system or "") + sum(len(one.text) + len(one.answer) + 1 for one in rounds)
        # Before anything is tokenized, which takes its time: not even the longest tokens could spell it
        if characters > context * self._longest_token:
            raise too_long(f"about {characters:,} characters", f"{context} tokens")
        vocabulary = self.model.config.text_config.vocab_size
        unknown = [token for token in asked.logit_bias if not 0 <= token < vocabulary]
        if unknown:
            message = f"logit_bias: there is no token {unknown[0]!s:.40}, the model has {vocabulary}"
            raise RequestError(message, "logit_bias", "invalid_value")
        session = self.model.start_chat(self.processor, store=self.store, system=system)
        input_ids = session.tokenize(rounds)
        start, prompt_tokens = session.find_answer(rounds, input_ids), input_ids.shape[1]
        name, wished = asked.new_tokens
        if wished is not None and wished > limits.new_tokens:
            message = f"{name}: this server answers with up to {limits.new_tokens} tokens, got {wished}"
            raise RequestError(message, name, "invalid_value")
        if prompt_tokens + (wished or 1) > context:
            raise too_long(f"{prompt_tokens} tokens and the answer up to {wished or 1}", str(context))
        default = self.model.generation_config.max_new_tokens or limits.new_tokens
        fitting = min(default, limits.new_tokens, context - prompt_tokens)
        return Conversation(session, rounds, start, prompt_tokens, wished or fitting)

    def begin(self, asked: ChatRequest, conversation: Conversation, receive: Receive) -> Answer:
        """Queues an answer, which will leave the request's place."""
        answer = Answer(asked, conversation, self)
        self.prompt_tokens += conversation.prompt_tokens
        self._answers.add(answer)
        answer.begin(self._pool, receive)
        return answer

    def end(self, answer: Answer) -> None:
        self._answers.discard(answer)
        self.disconnects += answer.is_cancelled
        self.leave_place()

    def close(self) -> None:
        """Stops what is under way."""
        for answer in list(self._answers):
            answer.cancel()
        self._pool.shutdown()

    def generate(self, choice: Choice) -> Iterator[str]:
        """The pieces of a choice, by the model's `generation_config` in all that the request leaves open."""
        asked, conversation = choice.answer.asked, choice.conversation
        session, question = conversation.session, conversation.rounds[-1]
        settings = {
            "stream": True,
            "begin_with": question.answer,
            "max_new_tokens": conversation.max_new_tokens,
            "num_return_sequences": 1,
            "do_sample": False,  # `make_warpers` has read it
            "prompt_lookup_num_tokens": None,  # it changes no answer, but has several tokens at once
            "logits_processor": choice.processors,
            "stopping_criteria": [choice],
        }
        if asked.repetition_penalty is not None:
            settings["repetition_penalty"] = asked.repetition_penalty
        if choice.index > 0:
            return session.edit(len(session.rounds) - 1, question.text, **settings)
        session.rounds = conversation.rounds[:-1]
        return session.send(question.text, question.images, **settings)

    @contextmanager
    def count_running(self) -> Iterator[None]:
        with self._lock:
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def count_token(self) -> None:
        now = time.monotonic()
        with self._lock:
            self.generated_tokens += 1
            self._recent.append(now)
            self._forget_before(now - RATE_SECONDS)

    def _forget_before(self, moment: float) -> None:
        while self._recent and self._recent[0] < moment:
            self._recent.popleft()

    def metrics(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """What prometheus_client asks of a collector."""
        with self._lock:
            self._forget_before(time.monotonic() - RATE_SECONDS)
            rate = len(self._recent) / RATE_SECONDS
        requests = CounterMetricFamily("visualchat_requests", "Chat completion requests by HTTP status", labels=["status"])
        for status, count in self.requests.items():
            requests.add_metric([str(status)], count)
        yield requests
        store = self.store
        for name, text, value in (
            ("disconnects", "Answers broken off because their client had gone", self.disconnects),
            ("prompt_tokens", "Tokens of prompts, images included", self.prompt_tokens),
            ("generated_tokens", "Tokens of answers", self.generated_tokens),
            ("image_memory_hits", "Pictures that were remembered", store.hits),
            ("image_memory_misses", "Pictures that had to be encoded", store.misses),
            ("image_memory_evictions", "Pictures forgotten for lack of room", store.evictions),
        ):
            yield CounterMetricFamily(f"visualchat_{name}", text, value)
        for name, text, value in (
            ("tokens_per_second", f"Tokens of answers, over the last {RATE_SECONDS} seconds", rate),
            ("running", "Answers being generated", self.running),
            ("queue_length", "Requests that were let in and wait", self.taken - self.running),
            ("image_memory_bytes", "Of pictures in memory", store.nbytes),
        ):
            yield GaugeMetricFamily(f"visualchat_{name}", text, value)


def too_long(what: str, context: str) -> RequestError:
    return RequestError(
        f"The conversation has {what}, but the model's context holds {context}: send fewer rounds or images, or allow"
        " fewer tokens",
        "messages",
        "context_length_exceeded",
    )
