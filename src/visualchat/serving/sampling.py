# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The logits processors of an answer: sampling, penalties and log-probabilities, as the request asks for them."""

import re

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from visualchat.serving.requests import ChatRequest


# The default of `generate` where `generation_config` does not set it
DEFAULT_TOP_K = 50
# OpenAI's value for minus infinity, which JSON does not have
MIN_LOGPROB = -9999.0
# The number of tokens before a token that are decoded with it: enough for the longest UTF-8 character
CONTEXT_TOKENS = 8
# Added to the seed for each further choice. It is large, so that choice 1 of seed 0 is not choice 0 of seed 1
SEED_STEP = 0x1E3779B97F4A7C15
# The arguments with which `ChatSession` decodes answers
DECODE_KWARGS = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}


class SamplingProcessor(LogitsProcessor):
    """
    Samples with its own random generator: it adds Gumbel noise to the scores, and greedy decoding then takes the largest
    (the Gumbel-max trick). `do_sample=True` would draw from torch's global generator, which all threads share, so that a
    seed would not make an answer reproducible while other requests are answered.

    Args:
        device (`torch.device`): The device of the scores.
        warpers (`list[LogitsProcessor]`): Temperature, top-k, top-p and the like, which are applied before the noise.
        seed (`int`, *optional*): The seed of the request.
        index (`int`): The index of the choice. Each choice has its own generator, so it does not depend on the others.
    """

    def __init__(self, device: torch.device, warpers: list[LogitsProcessor], seed: int | None, index: int = 0):
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((seed + index * SEED_STEP) % 2**63)
        self.warpers = LogitsProcessorList(warpers)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return self.warpers(input_ids, scores) - noise.clamp_min_(torch.finfo(scores.dtype).tiny).log()


class PenaltyProcessor(LogitsProcessor):
    """
    OpenAI's `logit_bias`, `presence_penalty` and `frequency_penalty`. Only generated tokens are penalized.

    Args:
        request (`ChatRequest`): It sets the bias and the penalties.
        prompt_length (`int`): The number of tokens of the prompt.
    """

    def __init__(self, request: ChatRequest, prompt_length: int):
        self.request, self.prompt_length = request, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        request = self.request
        counts = input_ids[0, self.prompt_length :].bincount(minlength=scores.shape[1])
        scores = scores - request.frequency_penalty * counts - request.presence_penalty * (counts > 0)
        if request.logit_bias:
            tokens = torch.tensor([*request.logit_bias], device=scores.device)
            scores[:, tokens] += torch.tensor([*request.logit_bias.values()], dtype=scores.dtype, device=scores.device)
        return scores


class LogprobsRecorder(LogitsProcessor):
    """
    Records the log-probability of each generated token and of the most likely tokens at its position, in OpenAI's format.
    They are computed before temperature, `top_p`, bias and OpenAI's penalties are applied, but after the processors that
    `generate` itself adds, such as `repetition_penalty`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): It decodes the tokens.
        start (`int`): The position of the first token of the answer, including a part that the request gives.
        prompt_length (`int`): The position of the first generated token.
        alternatives (`int`): The number of most likely tokens to record for each position.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, prompt_length: int, alternatives: int):
        self.tokenizer, self.start, self.prompt_length, self.alternatives = tokenizer, start, prompt_length, alternatives
        # For each token: where its text begins in the generated text, and its entry in the response
        self._entries: list[tuple[int, dict]] = []
        self._taken = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._logprobs = scores[0].float().log_softmax(-1)
        return scores

    def record(self, ids: list[int]) -> None:
        """Records the last token of `ids`, which are the prompt and the answer so far."""
        *context, chosen = ids[self.start :]
        beginning = len(self.tokenizer.decode(ids[self.start : self.prompt_length], **DECODE_KWARGS))
        # An incomplete UTF-8 character is decoded as U+FFFD. It does not count as text yet
        begins = len(self.tokenizer.decode(context, **DECODE_KWARGS).rstrip("\ufffd")) - beginning
        top = self._logprobs.topk(self.alternatives)
        alternatives = zip(top.indices.tolist(), top.values.tolist())
        context = context[-CONTEXT_TOKENS:]
        entry = self._describe(context, chosen, float(self._logprobs[chosen]))
        entry["top_logprobs"] = [self._describe(context, token, logprob) for token, logprob in alternatives]
        self._entries.append((begins, entry))

    def take(self, length: int) -> list[dict]:
        """The entries of tokens that begin within the first `length` characters and were not returned before."""
        taken = self._taken
        while self._taken < len(self._entries) and self._entries[self._taken][0] < length:
            self._taken += 1
        return [entry for _, entry in self._entries[taken : self._taken]]

    def _describe(self, context: list[int], token: int, logprob: float) -> dict:
        text, encoded = decode_token(self.tokenizer, context, token)
        encoded = list(encoded) if encoded is not None else None
        return {"token": text, "bytes": encoded, "logprob": max(logprob, MIN_LOGPROB)}


def decode_token(tokenizer: PreTrainedTokenizerBase, context: list[int], token: int) -> tuple[str, bytes | None]:
    """
    The text that a token adds to the tokens before it, and the bytes of that text. If a token is a part of a UTF-8
    character, its text is in OpenAI's notation, such as `bytes:\\xe2\\x82`. The text of a special token is its name, and it
    has no bytes.
    """
    name = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.all_special_ids:
        return name, None
    before, after = (tokenizer.decode(ids, **DECODE_KWARGS) for ids in (context, [*context, token]))
    if after.startswith(before) and not after.endswith("\ufffd"):
        text = after[len(before) :]
        return text, text.encode()
    # SentencePiece has a token for each byte; in byte-level BPE, each character of a token stands for one byte
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        encoded = bytes.fromhex(name[3:5])
    elif all(character in BYTE_OF_CHARACTER for character in name):
        encoded = bytes(BYTE_OF_CHARACTER[character] for character in name)
    else:
        return name, None
    try:
        return encoded.decode(), encoded
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded), encoded


def make_warpers(
    request: ChatRequest, generation_config: GenerationConfig, device: torch.device
) -> list[LogitsProcessor] | None:
    """
    The logits warpers for sampling, in the order in which `generate` applies them. The request overrides the model's
    `generation_config`. Returns `None` for greedy decoding.
    """

    def setting(name: str):
        value = getattr(request, name)
        return value if value is not None else getattr(generation_config, name)

    temperature, top_k, top_p, min_p = map(setting, ("temperature", "top_k", "top_p", "min_p"))
    named = (request.temperature, request.top_k, request.top_p, request.min_p)
    if temperature == 0 or not (generation_config.do_sample or any(value is not None for value in named)):
        return None
    top_k = DEFAULT_TOP_K if top_k is None else top_k
    warpers = [TemperatureLogitsWarper(float(temperature))] if temperature is not None else []
    if generation_config.top_h is not None:
        warpers.append(TopHLogitsWarper(generation_config.top_h))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    if generation_config.typical_p is not None and generation_config.typical_p < 1:
        warpers.append(TypicalLogitsWarper(generation_config.typical_p))
    if generation_config.epsilon_cutoff:
        warpers.append(EpsilonLogitsWarper(generation_config.epsilon_cutoff))
    if generation_config.eta_cutoff:
        warpers.append(EtaLogitsWarper(generation_config.eta_cutoff, device=device))
    return warpers
