# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Generates answers in worker threads, a bounded number at a time."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from anyio import CapacityLimiter, move_on_after
from starlette.types import Receive

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.chat_rounds_visualchat import Round
from modeling_visualchat.chat_streaming_visualchat import find_end_tokens
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.serving.choices import AnswerChunk, Choice, Conversation
from visualchat.serving.errors import RequestError, overloaded_error, panics_as_errors, stopping_error
from visualchat.serving.limits import Limits
from visualchat.serving.metrics import TokenCounter
from visualchat.serving.model_thread import ModelThread, ThreadImageStore
from visualchat.serving.requests import ChatRequest
from visualchat.serving.sampling import make_warpers
from visualchat.serving.turns import FairQueue


class DisconnectedError(Exception):
    """The client has disconnected."""


class Answer:
    """
    The generation for one request. Its choices are generated one after another, because they share one cached prompt.

    Attributes:
        usage (`dict[str, int]`): The numbers of tokens, in OpenAI's format, after the answer has ended.
    """

    def __init__(self, request: ChatRequest, conversation: Conversation, service: "AnswerService", client: str):
        self.request, self.conversation, self.service, self.client = request, conversation, service, client
        warpers = make_warpers(request, service.model.generation_config, service.model.device)
        self.choices = [Choice(self, index, warpers) for index in range(request.n)]
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[AnswerChunk | BaseException | None] = asyncio.Queue()
        self._future: Future[None] = Future()
        self._future.add_done_callback(lambda future: self._loop.call_soon_threadsafe(self._end, future))

    def watch(self, receive: Receive) -> None:
        """Cancels the answer when `receive` reports that the client has disconnected."""
        self._watch = asyncio.create_task(self._cancel_when_disconnected(receive))

    def run(self) -> None:
        """Generates the answer, unless it was cancelled."""
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            self._generate()
        except Exception as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(None)

    def cancel(self) -> None:
        """Stops the generation after the next token, or removes the answer from the queue."""
        self._cancelled.set()
        if self._future.cancel():
            self.service.queue.remove(self.client, self)

    def fail(self, error: Exception) -> None:
        """Ends the answer with this error now, although its thread stops only after the next token."""
        self._watch.cancel()
        self._events.put_nowait(error)
        self.cancel()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    async def chunks(self) -> AsyncIterator[AnswerChunk]:
        """
        The chunks of all choices, as they are generated. The last chunk of each choice says why it ended.

        Raises:
            DisconnectedError: If the answer was cancelled.
            Exception: Whatever was raised during generation.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                try:
                    raise event
                finally:
                    del event  # its traceback refers to this frame: a reference cycle, as in `_end`
            yield event

    @panics_as_errors()
    def _generate(self) -> None:
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
        prompt, completion = self.conversation.prompt_tokens, sum(choice.completion_tokens for choice in self.choices)
        self.usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        self._events.put_nowait(DisconnectedError() if self.is_cancelled else future.exception())
        # They refer to this answer. Without this line, its images and its key-value cache would stay until the garbage
        # collector looks for reference cycles among old objects, which may take hundreds of answers
        del self._watch, self._future, self.choices, self.conversation


class AnswerService:
    """
    Generates answers with one model and one image memory, in a pool of threads with a bounded queue.

    Args:
        model (`VisualChatForCausalLM`): The model that generates the answers.
        processor (`VisualChatProcessor`): The processor of the model.
        store (`ImageMemoryStore`): The image memory, which all conversations share.
        concurrency (`int`): The number of answers that are generated at the same time.
        queue (`int`): The number of requests that may wait beyond these.
        max_per_client (`int`, *optional*): The number of requests that one client may have in work or in the queue. By
            default, half of the number for all clients.

    Raises:
        ValueError: If the model's `generation_config` asks for beam search, which cannot be streamed.

    Attributes:
        queue (`FairQueue[Answer]`): The answers that wait. Clients take turns.
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
        max_per_client: int | None = None,
    ):
        if (model.generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"The model's generation_config has num_beams={model.generation_config.num_beams}, but this server streams"
                " answers token by token, which beam search does not allow: set num_beams to 1 in its generation_config.json"
            )
        self.model, self.processor, self.store = model, processor, store
        self.num_slots, self.running = concurrency + queue, 0
        self.max_per_client = max_per_client or (self.num_slots + 1) // 2
        self.requests, self.disconnects, self.is_stopping = Counter(), 0, False
        self.prompt_tokens, self.tokens = 0, TokenCounter()
        self.queue: FairQueue[Answer] = FairQueue()
        self._slots: Counter[str] = Counter()  # by client
        self._lock = threading.Lock()
        self._answers: set[Answer] = set()
        # Opening an image may take some hundred megabytes
        self.image_limiter = CapacityLimiter(2)
        self._longest_token = max(map(len, processor.tokenizer.get_vocab()))
        self._pool = ThreadPoolExecutor(concurrency, "answer")
        self._model_thread = ModelThread(model)
        self._thread_store = ThreadImageStore(store, self._model_thread)

    @property
    def end_tokens(self) -> set[int]:
        return find_end_tokens(self.processor, self.model.generation_config.eos_token_id)

    @property
    def used_slots(self) -> int:
        return self._slots.total()

    @property
    def generated_tokens(self) -> int:
        return self.tokens.total

    def take_slot(self, client: str) -> None:
        """
        Takes a slot for a request whose body has arrived. A slow body holds none.

        Raises:
            RequestError: If no slot is free, the client has as many as one client may have, or the server is stopping.
        """
        if self.is_stopping:
            raise stopping_error()
        if self.used_slots >= self.num_slots:
            raise overloaded_error(f"All {self.num_slots} slots are in use")
        if self._slots[client] >= self.max_per_client:
            raise RequestError(
                f"{self._slots[client]} requests from your address are not answered yet, and this server takes up to"
                f" {self.max_per_client} at a time: try again later (the operator can change this with --max-per-client)",
                code="rate_limit_exceeded",
                status=429,
                headers={"Retry-After": "1"},
            )
        self._slots[client] += 1

    def release_slot(self, client: str) -> None:
        self._slots[client] -= 1
        self._slots += Counter()  # drops clients without slots

    @panics_as_errors()
    def prepare(self, request: ChatRequest, system: str | None, rounds: list[Round], limits: Limits) -> Conversation:
        """
        Tokenizes a conversation, and decides how many tokens its answer may have: the number that the request asks for, else
        as many as the model's `generation_config`, the server's limit and the model's context allow.

        Raises:
            RequestError: If the tokenizer or the model's context cannot take the conversation.
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
        session = self.model.start_chat(self.processor, store=self._thread_store, system=system)
        try:
            input_ids = session.tokenize(rounds)
            start, prompt_tokens = session.find_answer(rounds, input_ids), input_ids.shape[1]
        except ValueError as error:
            raise RequestError(f"messages: {error}", "messages", "invalid_value") from error
        name, requested = request.new_tokens
        if requested is not None and requested > limits.new_tokens:
            message = (
                f"{name}: this server answers with up to {limits.new_tokens} tokens, got {requested} (the operator can"
                " change this with --max-new-tokens)"
            )
            raise RequestError(message, name, "invalid_value")
        if prompt_tokens + (requested or 1) > context:
            raise context_length_error(f"{prompt_tokens} tokens and the answer up to {requested or 1}", str(context))
        default = self.model.generation_config.max_new_tokens or limits.new_tokens
        fitting = min(default, limits.new_tokens, context - prompt_tokens)
        return Conversation(session, rounds, start, prompt_tokens, requested or fitting)

    def submit(self, request: ChatRequest, conversation: Conversation, receive: Receive, client: str) -> Answer:
        """
        Puts an answer into the queue. It releases the request's slot when it ends, and is cancelled when `receive` reports
        that the client has disconnected.
        """
        answer = Answer(request, conversation, self, client)
        self.prompt_tokens += conversation.prompt_tokens
        self._answers.add(answer)
        answer.watch(receive)
        self.queue.put(client, answer)
        self._pool.submit(self._answer_next)
        return answer

    def _answer_next(self) -> None:
        answer = self.queue.take()
        if answer is not None:
            answer.run()

    def end(self, answer: Answer) -> None:
        self._answers.discard(answer)
        self.release_slot(answer.client)

    def fail_all(self) -> None:
        """Ends all answers, also those in the queue, because the server stops."""
        for answer in self._answers:
            answer.fail(stopping_error())

    async def close(self) -> None:
        """Ends all answers, and waits a second for their threads, no longer: the computation of a token may take long."""
        self.fail_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._model_thread.close()
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
            "custom_generate": partial(self._model_thread.decode, empties_cache=choice.index == request.n - 1),
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
            return session.edit(len(session.rounds) - 1, question.text, **settings)  # the images stay in their positions
        session.rounds = conversation.rounds[:-1]
        return session.send(question.content, **settings)

    @contextmanager
    def count_running(self) -> Iterator[None]:
        with self._lock:
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1


def context_length_error(what: str, context: str) -> RequestError:
    # By "prompt is too long", litellm and langchain-openai tell this error from others
    return RequestError(
        f"The prompt is too long: the conversation has {what}, but the model's context holds {context}. Send fewer rounds or"
        " images, or ask for fewer tokens",
        "messages",
        "context_length_exceeded",
    )
