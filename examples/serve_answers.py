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

import torch
from anyio import CapacityLimiter
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from serve_requests import ChatRequest, Limits, RequestError
from starlette.types import Receive
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, TemperatureLogitsWarper, TopPLogitsWarper

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.chat_visualchat import ChatSession, Round
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


RATE_SECONDS = 10


class DisconnectedError(Exception):
    """The client has gone."""


class Sampling(LogitsProcessor):
    """
    Samples with a generator of its own: it adds Gumbel noise to the scores, of which the largest is then taken. `do_sample`
    draws from the one generator that all threads share: a seed would fix nothing while others are answered.
    """

    def __init__(self, device: torch.device, temperature: float, top_p: float, seed: int | None):
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return self.warpers(input_ids, scores) - noise.clamp_min_(torch.finfo(scores.dtype).tiny).log()


@dataclass
class Conversation:
    """
    Args:
        system (`str`, *optional*): In place of the prompt's first line.
        rounds (`list[Round]`): The last one is to be answered.
        prompt_tokens (`int`): Of all rounds, images included.
        max_new_tokens (`int`): Of the answer.
    """

    system: str | None
    rounds: list[Round]
    prompt_tokens: int
    max_new_tokens: int


class Answer(StoppingCriteria):
    """
    An answer under way. `generate` asks it after each token whether to stop.

    Attributes:
        completion_tokens (`int`): So far, the end token included.
        is_whole (`bool`): Whether it ended by itself or at a stop string, not for lack of tokens.
    """

    def __init__(self, asked: ChatRequest, conversation: Conversation, service: "AnswerService"):
        self.asked, self.conversation, self.service = asked, conversation, service
        # Tokens in which the longest stop string can be spelt, and some more for what the tokenizer strips at a beginning
        self._stop_tokens = 8 + max((len(one.encode()) for one in asked.stop), default=0)
        self.completion_tokens, self.is_whole = 0, False
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> bool:
        self.service.count_token()
        self.completion_tokens = input_ids.shape[1] - self.conversation.prompt_tokens
        new = input_ids[0, self.conversation.prompt_tokens :][-self._stop_tokens :].tolist()
        ending = self.service.processor.decode(new, skip_special_tokens=True)
        self.is_whole = new[-1] in self.service.end_tokens or any(one in ending for one in self.asked.stop)
        return self.is_whole or self._cancelled.is_set()

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
    def finish_reason(self) -> str:
        return "length" if self.completion_tokens >= self.conversation.max_new_tokens and not self.is_whole else "stop"

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.conversation.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def pieces(self) -> AsyncIterator[str]:
        """
        The text as it is made.

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
            for piece in cut_at_stop(self.service.generate(self), self.asked.stop):
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
        session = self._start_chat(system)
        prompt_tokens = session.tokenize(rounds).shape[1]
        name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        wished = getattr(asked, name)
        if wished is not None and wished > limits.new_tokens:
            message = f"{name}: this server answers with up to {limits.new_tokens} tokens, got {wished}"
            raise RequestError(message, name, "invalid_value")
        if prompt_tokens + (wished or 1) > context:
            raise too_long(f"{prompt_tokens} tokens and the answer up to {wished or 1}", str(context))
        return Conversation(system, rounds, prompt_tokens, wished or min(limits.new_tokens, context - prompt_tokens))

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

    def generate(self, answer: Answer) -> Iterator[str]:
        """The pieces of an answer."""
        conversation = answer.conversation
        session = self._start_chat(conversation.system)
        *session.rounds, asked = conversation.rounds
        return session.send(
            asked.text,
            asked.images,
            stream=True,
            max_new_tokens=conversation.max_new_tokens,
            num_beams=1,
            do_sample=False,
            logits_processor=self._sampling(answer.asked),
            stopping_criteria=[answer],
        )

    def _start_chat(self, system: str | None) -> ChatSession:
        return self.model.start_chat(self.processor, store=self.store, system=system)

    def _sampling(self, asked: ChatRequest) -> list[Sampling]:
        defaults = self.model.generation_config
        samples = asked.temperature != 0 if asked.temperature is not None else defaults.do_sample or asked.top_p is not None
        if not samples:
            return []
        temperature = asked.temperature or defaults.temperature or 1.0
        return [Sampling(self.model.device, temperature, asked.top_p or defaults.top_p or 1.0, asked.seed)]

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
