# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""From the scores of the next token to the one that is taken: what requests and `generation_config` say of it."""

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


# What `generate` takes where neither it nor `generation_config` is told
DEFAULT_TOP_K = 50
# As OpenAI writes it: JSON has no infinity
LEAST_LOGPROB = -9999.0
# Tokens before one that say how it is spelt: enough for the longest character
CONTEXT = 8
# Far from the seeds that people choose: the second answer of one is not the first of the next
SEED_STEP = 0x1E3779B97F4A7C15
# As a chat reads answers
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class Sampling(LogitsProcessor):
    """
    Samples with a generator of its own: it adds Gumbel noise to the scores, of which the largest is then taken. `do_sample`
    draws from the one generator that all threads share: a seed would fix nothing while others are answered.

    Args:
        device (`torch.device`): Of the scores.
        warpers (`list[LogitsProcessor]`): What narrows the choice.
        seed (`int`, *optional*): Of the request.
        index (`int`): Of the choice: each draws on its own, however long the others are.
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


class Adjusting(LogitsProcessor):
    """
    OpenAI's `logit_bias`, and its penalties of tokens that the answer already has.

    Args:
        asked (`ChatRequest`): Says how much.
        prompt_length (`int`): Tokens before the answer.
    """

    def __init__(self, asked: ChatRequest, prompt_length: int):
        self.asked, self.prompt_length = asked, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        asked = self.asked
        counts = input_ids[0, self.prompt_length :].bincount(minlength=scores.shape[1])
        scores = scores - asked.frequency_penalty * counts - asked.presence_penalty * (counts > 0)
        if asked.logit_bias:
            tokens = torch.tensor([*asked.logit_bias], device=scores.device)
            scores[:, tokens] += torch.tensor([*asked.logit_bias.values()], dtype=scores.dtype, device=scores.device)
        return scores


class Logprobs(LogitsProcessor):
    """
    Notes the log-probability of each token and of its most likely alternatives, in OpenAI's form. They are the model's own,
    before temperature, `top_p`, bias and OpenAI's penalties; what `generate` itself forbids or penalizes counts.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Spells.
        start (`int`): Where the answer begins, with the beginning that it was given.
        prompt_length (`int`): Where what the model adds begins.
        alternatives (`int`): To each token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, prompt_length: int, alternatives: int):
        self.tokenizer, self.start, self.prompt_length, self.alternatives = tokenizer, start, prompt_length, alternatives
        # Where the text of each token begins in the text that the model adds, and what is said of it
        self._noted: list[tuple[int, dict]] = []
        self._taken = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._logprobs = scores[0].float().log_softmax(-1)
        return scores

    def note(self, ids: list[int]) -> None:
        """The last token of a prompt and its answer so far."""
        *context, chosen = ids[self.start :]
        beginning = len(self.tokenizer.decode(ids[self.start : self.prompt_length], **DECODING))
        # A character of which only some bytes are there is not a text yet
        begins = len(self.tokenizer.decode(context, **DECODING).rstrip("\ufffd")) - beginning
        top = self._logprobs.topk(self.alternatives)
        alternatives = zip(top.indices.tolist(), top.values.tolist())
        context = context[-CONTEXT:]
        noted = self._describe(context, chosen, float(self._logprobs[chosen]))
        noted["top_logprobs"] = [self._describe(context, token, logprob) for token, logprob in alternatives]
        self._noted.append((begins, noted))

    def take(self, length: int) -> list[dict]:
        """The tokens of the first `length` characters that were not taken before."""
        taken = self._taken
        while self._taken < len(self._noted) and self._noted[self._taken][0] < length:
            self._taken += 1
        return [noted for _, noted in self._noted[taken : self._taken]]

    def _describe(self, context: list[int], token: int, logprob: float) -> dict:
        text, spelling = spell(self.tokenizer, context, token)
        spelling = list(spelling) if spelling is not None else None
        return {"token": text, "bytes": spelling, "logprob": max(logprob, LEAST_LOGPROB)}


def spell(tokenizer: PreTrainedTokenizerBase, context: list[int], token: int) -> tuple[str, bytes | None]:
    """
    What a token adds to the text of those before it, and the bytes of it. Where these are a part of a character, the text is
    `bytes:\\xe2\\x82`, as OpenAI writes it. A special token adds nothing: its text is its name, and there are no bytes.
    """
    name = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.all_special_ids:
        return name, None
    before, after = (tokenizer.decode(ids, **DECODING) for ids in (context, [*context, token]))
    if after.startswith(before) and not after.endswith("\ufffd"):
        text = after[len(before) :]
        return text, text.encode()
    # Bytes of their own in a vocabulary of SentencePiece, all tokens in one of byte-level BPE
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        spelling = bytes.fromhex(name[3:5])
    elif all(character in BYTE_OF for character in name):
        spelling = bytes(BYTE_OF[character] for character in name)
    else:
        return name, None
    try:
        return spelling.decode(), spelling
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling), spelling


def make_warpers(asked: ChatRequest, defaults: GenerationConfig, device: torch.device) -> list[LogitsProcessor] | None:
    """
    What narrows the choice of a token: as `generate` with `do_sample` takes it from the model's `generation_config`, in its
    order, unless the request says otherwise. `None` where the likeliest token is to be taken.
    """

    def setting(name: str):
        value = getattr(asked, name)
        return value if value is not None else getattr(defaults, name)

    temperature, top_k, top_p, min_p = map(setting, ("temperature", "top_k", "top_p", "min_p"))
    named = (asked.temperature, asked.top_k, asked.top_p, asked.min_p)
    if temperature == 0 or not (defaults.do_sample or any(value is not None for value in named)):
        return None
    top_k = DEFAULT_TOP_K if top_k is None else top_k
    warpers = [TemperatureLogitsWarper(float(temperature))] if temperature is not None else []
    if defaults.top_h is not None:
        warpers.append(TopHLogitsWarper(defaults.top_h))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    if defaults.typical_p is not None and defaults.typical_p < 1:
        warpers.append(TypicalLogitsWarper(defaults.typical_p))
    if defaults.epsilon_cutoff:
        warpers.append(EpsilonLogitsWarper(defaults.epsilon_cutoff))
    if defaults.eta_cutoff:
        warpers.append(EtaLogitsWarper(defaults.eta_cutoff, device=device))
    return warpers
