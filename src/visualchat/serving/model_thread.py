# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The thread that decodes answers: one forward pass of the model gives each of them its next token."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from modeling_visualchat.image_memory_visualchat import ImageMemory, ImageMemoryStore
from visualchat.serving.cache_batch import CacheBatch, can_join


T = TypeVar("T")

# Their frequencies depend on the longest conversation of a batch
BATCH_DEPENDENT_ROPES = ("dynamic", "longrope")


class Sequence:
    """
    A prompt, and its answer so far.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, tokens)`): The prompt.
        logits_processor, stopping_criteria, streamer: As `generate` has them.
        model_kwargs (`dict`): What else the model takes for the prompt, such as its images and its cache.
        empties_cache (`bool`): Whether this cache is emptied when its content is in a batch.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        model_kwargs: dict,
        empties_cache: bool,
    ):
        self.input_ids, self.model_kwargs, self.empties_cache = input_ids, model_kwargs, empties_cache
        self.logits_processor, self.stopping_criteria, self.streamer = logits_processor, stopping_criteria, streamer
        self._ended, self._error = threading.Event(), None

    @property
    def cache(self) -> Cache:
        return self.model_kwargs["past_key_values"]

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> torch.LongTensor:
        """
        Waits for the answer.

        Returns:
            `torch.LongTensor` of shape `(1, tokens)`: Prompt and answer.

        Raises:
            BaseException: What ended the answer.
        """
        self._ended.wait()
        # Forgotten: the traceback refers to this object, and would keep it until the garbage collector runs
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error
        return self.input_ids

    def fail(self, error: BaseException) -> None:
        if not self.has_ended:
            self._error = error
            self._ended.set()

    @contextmanager
    def fails_alone(self) -> Iterator[None]:
        """What is raised here ends this answer and no other."""
        try:
            yield
        except BaseException as error:
            self.fail(error)

    def prefill(self, model: PreTrainedModel) -> None:
        """Computes the tokens of the prompt that are not in its cache, and takes the first token of the answer."""
        model_inputs = model.prepare_inputs_for_generation(
            self.input_ids,
            next_sequence_length=self.input_ids.shape[1] - self.cache.get_seq_length(),
            is_first_iteration=True,
            **self.model_kwargs,
        )
        self.take(model(**model_inputs, return_dict=True).logits[:, -1])

    def take(self, logits: torch.FloatTensor) -> None:
        """Takes the likeliest token by logits of shape `(1, vocab_size)`, and ends if a criterion says so."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        token = self.logits_processor(self.input_ids, logits).argmax(-1)
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        if self.stopping_criteria(self.input_ids, None).all():
            self._ended.set()


class Batch:
    """Answers that are decoded together."""

    def __init__(self):
        self.sequences: list[Sequence] = []
        self._caches = CacheBatch()

    def add(self, new: list[Sequence]) -> None:
        """Adds answers whose prompts are in their caches."""
        self._change([*range(len(self.sequences))], new)

    def remove_ended(self) -> None:
        self._change([row for row, one in enumerate(self.sequences) if not one.has_ended], [])

    def step(self, model: PreTrainedModel) -> None:
        """Gives each answer its next token."""
        input_ids = torch.cat([one.input_ids[:, -1:] for one in self.sequences]).to(model.device)
        logits = model(input_ids=input_ids, **self._caches.inputs(), return_dict=True).logits[:, -1]
        self._caches.count_token()
        for one, of_one in zip(self.sequences, logits.split(1)):
            with one.fails_alone():
                one.take(of_one)

    def fail(self, error: BaseException) -> None:
        """Ends all answers. Each has an exception of its own, since each is raised in another thread."""
        for one in self.sequences:
            of_one = RuntimeError(f"A batch of answers failed: {error}")
            of_one.__cause__ = error
            one.fail(of_one)
        self.sequences, self._caches = [], CacheBatch()

    def _change(self, kept: list[int], new: list[Sequence]) -> None:
        self.sequences = [self.sequences[row] for row in kept] + new
        self._caches.change(kept, [one.cache for one in new])
        for one in new:
            if one.empties_cache:
                one.cache.layers.clear()


class ModelThread:
    """
    Decodes the answers of several requests in one thread. Between two tokens, it computes the prompts and images that have
    come, one after the other; the answers then join the batch. All work of the model is done here: other threads would take
    Python's lock from this one at each operation.

    Its method `decode` is a decoding method of transformers: `model.generate(…, custom_generate=thread.decode)`.

    Args:
        model (`PreTrainedModel`): The model, a VisualChat.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        rope_type = model.config.text_config.rope_parameters["rope_type"]
        self._can_batch = rope_type not in BATCH_DEPENDENT_ROPES
        self._prefilled: list[Sequence] = []
        self._batches = [Batch()]  # those behind the first one have one answer each, whose cache is of another kind
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock, self._is_open = threading.Lock(), True
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config=None,
        streamer: BaseStreamer | None = None,
        tokenizer=None,
        synced_gpus: bool = False,
        empties_cache: bool = False,
        **model_kwargs,
    ) -> torch.LongTensor:
        """
        Decodes the answer to one prompt, greedily, and waits for it. Sampling is done by a logits processor.

        Args:
            empties_cache (`bool`): Whether the cache in `model_kwargs` is emptied once the prompt is in the batch, so that
                it is not kept twice.
            The others are those of transformers.

        Returns:
            `torch.LongTensor` of shape `(1, tokens)`: Prompt and answer.

        Raises:
            RuntimeError: If the thread was closed.
        """
        one = Sequence(input_ids, logits_processor, stopping_criteria, streamer, model_kwargs, empties_cache)
        self._put(partial(self._prefill, one))
        return one.wait()

    def call(self, function: Callable[[], T]) -> T:
        """
        Calls a function in this thread, between two tokens, and waits for what it returns.

        Raises:
            RuntimeError: If the thread was closed.
            BaseException: What the function raises.
        """
        result: Future[T] = Future()
        self._put(partial(_fulfil, result, function))
        try:
            return result.result()
        finally:
            del result  # an exception refers to this frame

    def close(self) -> None:
        """Ends the thread when what it was given has ended."""
        with self._lock:
            self._is_open = False
            self._tasks.put(None)

    def _put(self, task: Callable[[], None]) -> None:
        with self._lock:
            if not self._is_open:
                raise RuntimeError("The model's thread was closed")
            self._tasks.put(task)

    @torch.no_grad()
    def _run(self) -> None:
        is_open = True
        while is_open or self._is_busy:
            if not self._do_tasks(waits=not self._is_busy):
                is_open = False
            self._join_batches()
            for batch in self._batches:
                if batch.sequences:
                    self._advance(batch)
            self._batches[1:] = [batch for batch in self._batches[1:] if batch.sequences]

    @property
    def _is_busy(self) -> bool:
        return any(batch.sequences for batch in self._batches)

    def _do_tasks(self, waits: bool) -> bool:
        """
        Does what has come. Whether more may come.

        Args:
            waits (`bool`): Whether to wait if nothing has come.
        """
        while waits or not self._tasks.empty():
            task = self._tasks.get()
            if task is None:
                return False
            task()
            waits = False
        return True

    def _prefill(self, one: Sequence) -> None:
        with one.fails_alone():
            one.prefill(self.model)
        if not one.has_ended:
            self._prefilled.append(one)

    def _join_batches(self) -> None:
        new, self._prefilled = self._prefilled, []
        together = [one for one in new if self._can_batch and can_join(one.cache)]
        self._add(self._batches[0], together)
        for one in new:
            if one not in together:
                self._batches.append(Batch())
                self._add(self._batches[-1], [one])

    def _add(self, batch: Batch, new: list[Sequence]) -> None:
        try:
            batch.add(new)
        except BaseException as error:
            batch.fail(error)

    def _advance(self, batch: Batch) -> None:
        try:
            batch.step(self.model)
            batch.remove_ended()
        except BaseException as error:
            batch.fail(error)


class ThreadImageStore:
    """
    An image memory whose images are encoded in the model's thread.

    Args:
        store (`ImageMemoryStore`): The image memory.
        thread (`ModelThread`): The thread.
    """

    def __init__(self, store: ImageMemoryStore, thread: ModelThread):
        self.store, self.thread = store, thread

    def get(self, pixel_values: torch.Tensor) -> list[ImageMemory]:
        return self.thread.call(partial(self.store.get, pixel_values))


def _fulfil(result: Future, function: Callable[[], T]) -> None:
    try:
        result.set_result(function())
    except BaseException as error:
        result.set_exception(error)
    finally:
        del result  # an exception refers to this frame
