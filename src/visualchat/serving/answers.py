# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Generates answers in worker threads, a bounded number at a time, and counts what the metrics report."""

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
from anyio import CapacityLimiter, move_on_after
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import Receive
from transformers import LogitsProcessor, StoppingCriteria

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.chat_visualchat import ChatSession, Round
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.serving.errors import RequestError, overloaded_error, stopping_error
from visualchat.serving.limits import Limits
from visualchat.serving.requests import ChatRequest
from visualchat.serving.sampling import DECODE_KWARGS, LogprobsRecorder, PenaltyProcessor, SamplingProcessor, make_warpers


RATE_SECONDS = 10


class DisconnectedError(Exception):
    """The client has disconnected."""


@dataclass
class Conversation:
    """
    A conversation that was checked and is ready to be answered.

    Args:
        session (`ChatSession`): A new session, without rounds.
        rounds (`list[Round]`): The last round is the one to answer. If it has an answer, the model continues it.
        start (`int`): The number of prompt tokens before the last round's answer.
        prompt_tokens (`int`): The number of tokens of the prompt, which includes images and the given part of the answer.
        max_new_tokens (`int`): The most tokens to generate.
    """

    session: ChatSession
    rounds: list[Round]
    start: int
    prompt_tokens: int
    max_new_tokens: int


class AnswerChunk(NamedTuple):
    """
    A part of a choice, as it is streamed.

    Args:
        index (`int`): The index of the choice.
        text (`str`): The new text. It may be empty.
        logprobs (`list[dict]`): The log-probabilities of the tokens whose text is complete. Those of a token that is not
            come with a later chunk.
        finish_reason (`str`, *optional*): Why the generation ended, in the last chunk of the choice.
    """

    index: int
    text: str
    logprobs: list[dict]
    finish_reason: str | None = None


class Choice(StoppingCriteria):
    """
    One of the `n` answers to a request. It is also the stopping criterion that `generate` calls after each token.

    Attributes:
        completion_tokens (`int`): The number of tokens generated so far, including the end token.
        is_complete (`bool`): Whether the answer ended with an end token or a stop string, not at the limit of tokens.
        processors (`list[LogitsProcessor]`): The logits processors of its generation.
    """

    def __init__(self, answer: "Answer", index: int, warpers: list[LogitsProcessor] | None):
        self.answer, self.index, self.conversation = answer, index, answer.conversation
        request, prompt_length = answer.request, self.conversation.prompt_tokens
        # The most tokens that the longest stop string may have, and some more, since the tokenizer may strip leading spaces
        self._stop_tokens = 8 + max((len(one.encode()) for one in request.stop), default=0)
        self.completion_tokens, self.is_complete = 0, False
        self._logprobs = None
        self.processors: list[LogitsProcessor] = []
        if request.logprobs:
            tokenizer = answer.service.processor.tokenizer
            self._logprobs = LogprobsRecorder(tokenizer, self.conversation.start, prompt_length, request.top_logprobs)
            self.processors.append(self._logprobs)
        if request.presence_penalty or request.frequency_penalty or request.logit_bias:
            self.processors.append(PenaltyProcessor(request, prompt_length))
        if warpers is not None:
            self.processors.append(SamplingProcessor(answer.service.model.device, warpers, request.seed, index))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> bool:
        service, request = self.answer.service, self.answer.request
        service.count_token()
        self.completion_tokens = input_ids.shape[1] - self.conversation.prompt_tokens
        if self._logprobs is not None:
            self._logprobs.record(input_ids[0].tolist())
        new = input_ids[0, self.conversation.prompt_tokens :][-self._stop_tokens :].tolist()
        ending = service.processor.tokenizer.decode(new, **DECODE_KWARGS)
        self.is_complete = new[-1] in service.end_tokens or any(one in ending for one in request.stop)
        return self.is_complete or self.answer.is_cancelled

    @property
    def finish_reason(self) -> str:
        return "length" if self.completion_tokens >= self.conversation.max_new_tokens and not self.is_complete else "stop"

    def chunks(self) -> Iterator[AnswerChunk]:
        length = 0
        for text in cut_at_stop(self.answer.service.generate(self), self.answer.request.stop):
            length += len(text)
            yield AnswerChunk(self.index, text, self._take_logprobs(length))
        yield AnswerChunk(self.index, "", self._take_logprobs(length), self.finish_reason)

    def _take_logprobs(self, length: int) -> list[dict]:
        return self._logprobs.take(length) if self._logprobs is not None else []


class Answer:
    """The generation for one request. Its choices are generated one after another, because they share one cached prompt."""

    def __init__(self, request: ChatRequest, conversation: Conversation, service: "AnswerService"):
        self.request, self.conversation, self.service = request, conversation, service
        warpers = make_warpers(request, service.model.generation_config, service.model.device)
        self.choices = [Choice(self, index, warpers) for index in range(request.n)]
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[AnswerChunk | BaseException | None] = asyncio.Queue()

    def submit(self, pool: ThreadPoolExecutor, receive: Receive) -> None:
        """Puts the answer into the queue. It is cancelled when `receive` reports that the client has disconnected."""
        self._watch = asyncio.create_task(self._cancel_when_disconnected(receive))
        self._future = pool.submit(self._run)
        self._future.add_done_callback(lambda future: self._loop.call_soon_threadsafe(self._end, future))

    def cancel(self) -> None:
        """Stops the generation after the next token, or removes the answer from the queue."""
        self._cancelled.set()
        self._future.cancel()

    def fail(self, error: Exception) -> None:
        """Ends the answer with this error now, although its thread stops only after the next token."""
        self._watch.cancel()
        self._events.put_nowait(error)
        self.cancel()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.conversation.prompt_tokens, sum(choice.completion_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def chunks(self) -> AsyncIterator[AnswerChunk]:
        """
        The chunks of all choices, as they are generated. The last chunk of each choice says why it ended.

        Raises:
            DisconnectedError: If the answer was cancelled.
            Exception: Whatever was raised during generation.
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
                for chunk in choice.chunks():
                    self._loop.call_soon_threadsafe(self._events.put_nowait, chunk)

    async def _cancel_when_disconnected(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.service.disconnects += 1
        self.cancel()

    def _end(self, future: Future) -> None:
        self._watch.cancel()
        self.service.end(self)
        if self.is_cancelled:
            self._events.put_nowait(DisconnectedError())
        else:
            self._events.put_nowait(future.exception())


def cut_at_stop(pieces: Iterator[str], stop: list[str]) -> Iterator[str]:
    """Yields the text before the first stop string. Text that may be the start of one is held back until that is decided."""
    text, shown, found = "", 0, []
    for piece in pieces:
        if found:  # the stopping criterion may let one more piece through
            continue
        text += piece
        found = [position for one in stop if (position := text.find(one)) >= 0]
        beginnings = [len(text) - k for one in stop for k in range(1, len(one)) if text.endswith(one[:k])]
        end = min(found or beginnings, default=len(text))
        if end > shown:
            yield text[shown:end]
            shown = end
    if not found and len(text) > shown:
        yield text[shown:]


class AnswerService:
    """
    Generates answers with one model and one image memory, in a pool of threads with a bounded queue.

    Args:
        model (`VisualChatForCausalLM`): The model that generates the answers.
        processor (`VisualChatProcessor`): The processor of the model.
        store (`ImageMemoryStore`): The image memory, which all conversations share.
        concurrency (`int`): The number of answers that are generated at the same time.
        queue (`int`): The number of requests that may wait beyond these.

    Raises:
        ValueError: If the model's `generation_config` asks for beam search, which cannot be streamed.

    Attributes:
        requests (`Counter`): The number of requests by HTTP status.
        disconnects (`int`): The number of answers that were cancelled because the client had disconnected.
        is_stopping (`bool`): Whether the server stops. No request gets a slot then.
        image_limiter (`CapacityLimiter`): Limits the number of threads that open images.
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
                f"The model's generation_config has num_beams={model.generation_config.num_beams}, but this server streams"
                " answers token by token, which beam search does not allow: set num_beams to 1 in its generation_config.json"
            )
        self.model, self.processor, self.store = model, processor, store
        self.num_slots, self.used_slots, self.running = concurrency + queue, 0, 0
        self.requests, self.disconnects, self.is_stopping = Counter(), 0, False
        self.prompt_tokens = self.generated_tokens = 0
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()
        self._answers: set[Answer] = set()
        # Opening an image may take some hundred megabytes
        self.image_limiter = CapacityLimiter(2)
        self._longest_token = max(map(len, processor.tokenizer.get_vocab()))
        self._pool = ThreadPoolExecutor(concurrency, "answer")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @property
    def end_tokens(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return end if isinstance(end, list) else [end]

    def take_slot(self) -> None:
        """
        Takes a slot for a request whose body has arrived. A slow body holds none.

        Raises:
            RequestError: If no slot is free, or the server is stopping.
        """
        if self.is_stopping:
            raise stopping_error()
        if self.used_slots >= self.num_slots:
            raise overloaded_error(f"All {self.num_slots} slots are in use")
        self.used_slots += 1

    def release_slot(self) -> None:
        self.used_slots -= 1

    def prepare(self, request: ChatRequest, system: str | None, rounds: list[Round], limits: Limits) -> Conversation:
        """
        Tokenizes a conversation, and decides how many tokens its answer may have: the number that the request asks for, else
        as many as the model's `generation_config`, the server's limit and the model's context allow.

        Raises:
            RequestError: If prompt and answer do not fit into the model's context.
        """
        context = self.model.config.text_config.max_position_embeddings
        characters = len(system or "") + sum(len(one.text) + len(one.answer) + 1 for one in rounds)
        # Checked before the slow tokenization: even the longest tokens of the vocabulary could not encode this much text
        if characters > context * self._longest_token:
            raise context_length_error(f"about {characters:,} characters", f"{context} tokens")
        vocabulary = self.model.config.text_config.vocab_size
        unknown = [token for token in request.logit_bias if not 0 <= token < vocabulary]
        if unknown:
            message = f"logit_bias: there is no token {unknown[0]!s:.40}, the model has {vocabulary}"
            raise RequestError(message, "logit_bias", "invalid_value")
        session = self.model.start_chat(self.processor, store=self.store, system=system)
        input_ids = session.tokenize(rounds)
        start, prompt_tokens = session.find_answer(rounds, input_ids), input_ids.shape[1]
        name, requested = request.new_tokens
        if requested is not None and requested > limits.new_tokens:
            message = f"{name}: this server answers with up to {limits.new_tokens} tokens, got {requested}"
            raise RequestError(message, name, "invalid_value")
        if prompt_tokens + (requested or 1) > context:
            raise context_length_error(f"{prompt_tokens} tokens and the answer up to {requested or 1}", str(context))
        default = self.model.generation_config.max_new_tokens or limits.new_tokens
        fitting = min(default, limits.new_tokens, context - prompt_tokens)
        return Conversation(session, rounds, start, prompt_tokens, requested or fitting)

    def submit(self, request: ChatRequest, conversation: Conversation, receive: Receive) -> Answer:
        """Puts an answer into the queue. The answer releases the request's slot when it ends."""
        answer = Answer(request, conversation, self)
        self.prompt_tokens += conversation.prompt_tokens
        self._answers.add(answer)
        answer.submit(self._pool, receive)
        return answer

    def end(self, answer: Answer) -> None:
        self._answers.discard(answer)
        self.release_slot()

    def fail_all(self) -> None:
        """Ends all answers, also those in the queue, because the server stops."""
        for answer in self._answers:
            answer.fail(stopping_error())

    async def close(self) -> None:
        """Ends all answers, and waits a second for their threads, no longer: the computation of a token may take long."""
        self.fail_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with move_on_after(1):
            while self._answers:
                await asyncio.sleep(0.02)

    def generate(self, choice: Choice) -> Iterator[str]:
        """Yields the text of a choice. The model's `generation_config` decides what the request does not set."""
        request, conversation = choice.answer.request, choice.conversation
        session, question = conversation.session, conversation.rounds[-1]
        settings = {
            "stream": True,
            "begin_with": question.answer,
            "max_new_tokens": conversation.max_new_tokens,
            "num_return_sequences": 1,
            "do_sample": False,  # `make_warpers` takes care of sampling
            "prompt_lookup_num_tokens": None,  # speculative: would give several tokens per step
            "logits_processor": choice.processors,
            "stopping_criteria": [choice],
        }
        if request.repetition_penalty is not None:
            settings["repetition_penalty"] = request.repetition_penalty
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
            self._drop_times_before(now - RATE_SECONDS)

    def _drop_times_before(self, moment: float) -> None:
        while self._recent and self._recent[0] < moment:
            self._recent.popleft()

    def metrics(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yields the metrics. `prometheus_client` calls this method of a collector."""
        with self._lock:
            self._drop_times_before(time.monotonic() - RATE_SECONDS)
            rate = len(self._recent) / RATE_SECONDS
        requests = CounterMetricFamily("visualchat_requests", "Chat completion requests by HTTP status", labels=["status"])
        for status, count in self.requests.items():
            requests.add_metric([str(status)], count)
        yield requests
        store = self.store
        for name, text, value in (
            ("disconnects", "Answers cancelled because the client had disconnected", self.disconnects),
            ("prompt_tokens", "Prompt tokens, including those of images", self.prompt_tokens),
            ("generated_tokens", "Generated tokens", self.generated_tokens),
            ("image_memory_hits", "Images found in the image memory", store.hits),
            ("image_memory_misses", "Images not found in the image memory, which were encoded", store.misses),
            ("image_memory_evictions", "Images removed from the image memory to make room", store.evictions),
        ):
            yield CounterMetricFamily(f"visualchat_{name}", text, value)
        for name, text, value in (
            ("tokens_per_second", f"Generated tokens per second, over the last {RATE_SECONDS} seconds", rate),
            ("running", "Answers being generated", self.running),
            ("queue_length", "Requests that wait for a thread", self.used_slots - self.running),
            ("image_memory_bytes", "Size of the image memory in RAM", store.nbytes),
        ):
            yield GaugeMetricFamily(f"visualchat_{name}", text, value)


def context_length_error(what: str, context: str) -> RequestError:
    return RequestError(
        f"The conversation has {what}, but the model's context holds {context}: send fewer rounds or images, or ask"
        " for fewer tokens",
        "messages",
        "context_length_exceeded",
    )
