# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""One of the `n` answers to a request, from its conversation to the pieces that are streamed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import LogitsProcessor, StoppingCriteria

from modeling_visualchat.chat_rounds_visualchat import Round
from modeling_visualchat.chat_visualchat import ChatSession
from visualchat.serving.sampling import DECODE_KWARGS, LogprobsRecorder, PenaltyProcessor, SamplingProcessor


if TYPE_CHECKING:
    from visualchat.serving.answers import Answer


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
        service.tokens.add()
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
