"""docs/serving.md is true: each row of its tables is sent with OpenAI's client, and no parameter of the API is missing."""

import json
import re
from collections import Counter
from pathlib import Path

import openai
import pytest
import torch
from openai.types.chat import completion_create_params

from helpers.server import data_url, encode, read_stream
from helpers.tiny import digit_image
from visualchat.serving import requests


PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text()
# Cells, without the header and the line below it. None holds a bar
TABLES = [
    [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    for table in re.findall(r"(?:^\|.*\|\n)+", PAGE, flags=re.MULTILINE)
]
PARAMETERS, READ_AS, REFUSED = TABLES
QUESTION = [{"role": "user", "content": "Which digit?"}]
NEW_TOKENS = 16


def value_of(cell):
    return json.loads(cell.strip("`"))


def messages_of(cell):
    return json.loads(cell.strip("`").replace("…", data_url(encode(digit_image(4)))))


def ask(server, messages=QUESTION, **fields):
    fields = {"messages": messages, "max_tokens": openai.omit, "max_completion_tokens": NEW_TOKENS, **fields}
    return server.ask(**fields)


def said(answer):
    return [choice.message.content for choice in answer.choices]


def generate(server, **generation):
    inputs = server.processor.apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = server.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, **generation)
    return inputs["input_ids"], ids[0, inputs["input_ids"].shape[1] :].tolist()


def decode(server, ids):
    return [server.processor.decode(ids, skip_special_tokens=True)]


def greedy(server, **generation):
    return decode(server, generate(server, **generation)[1])


def check_length(server, name, value):
    others = {"max_tokens": openai.omit, "max_completion_tokens": openai.omit}
    usage = ask(server, **{**others, name: value}).usage
    assert usage.completion_tokens == int(value) == 3


def check_stop(server, name, value):
    (whole,) = greedy(server)
    place = min(whole.find(one) for one in ([value] if isinstance(value, str) else value) if one in whole)
    answer = ask(server, stop=value)
    assert (said(answer), answer.choices[0].finish_reason) == ([whole[:place]], "stop")
    assert read_stream(ask(server, stop=value, stream=True))[:2] == (whole[:place], "stop")


def check_n(server, name, value):
    assert said(ask(server, n=value)) == greedy(server) * value
    sampled = ask(server, n=value, temperature=1.5, seed=0)
    assert len({*said(sampled)}) == len(sampled.choices) == value
    assert [choice.index for choice in sampled.choices] == list(range(value))
    assert sampled.usage.completion_tokens == value * NEW_TOKENS
    texts = ["", ""]
    for chunk in ask(server, n=value, temperature=1.5, seed=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == said(sampled)


def check_stream(server, name, value):
    text, reason, usage = read_stream(ask(server, stream=value))
    assert ([text], reason, usage) == (greedy(server), "length", None)


def check_usage(server, name, value):
    *others, last = ask(server, stream=True, stream_options=value)
    assert last.usage == ask(server).usage and last.choices == []
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in others)
    assert ask(server, stream_options=value).usage == last.usage


def check_temperature(server, name, value):
    answers = [ask(server, temperature=value) for _ in range(4)]
    if value == 0:
        assert all(said(answer) == greedy(server) for answer in answers)
    else:
        assert len({text for answer in answers for text in said(answer)}) > 2


def check_narrowing(server, name, value):
    """To the likeliest token, however high the temperature is. Alone, it samples as well."""
    assert said(ask(server, temperature=2, **{name: value})) == greedy(server) == said(ask(server, **{name: value}))
    assert said(ask(server, temperature=2, seed=0)) != greedy(server)


def check_seed(server, name, value):
    first, second = (said(ask(server, temperature=1.5, n=2, seed=value)) for _ in range(2))
    assert first == second != said(ask(server, temperature=1.5, n=2, seed=value + 1))


def check_penalty(server, name, value):
    ids, *_ = generate(server)
    new = []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            scores = server.model(input_ids=torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1]
        for token, count in Counter(new).items():
            scores[token] -= value * count if name == "frequency_penalty" else value
        new.append(int(scores.argmax()))
    assert said(ask(server, **{name: value})) == decode(server, new) != greedy(server)


def check_bias(server, name, value):
    (token,) = map(int, value)
    assert said(ask(server, logit_bias=value)) == decode(server, [token] * NEW_TOKENS) != greedy(server)


def check_logprobs(server, name, value):
    fields = {"logprobs": True, name: value}
    answer = ask(server, **fields)
    ids, new = generate(server)
    with torch.no_grad():
        logits = server.model(input_ids=torch.cat([ids, torch.tensor([new])], 1)).logits[0, ids.shape[1] - 1 : -1]
    logits[:, server.processor.image_token_id] = -torch.inf  # no answer holds it
    expected = logits.log_softmax(-1)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == NEW_TOKENS and said(answer) == greedy(server)
    torch.testing.assert_close(torch.tensor([one.logprob for one in tokens]), expected[range(len(new)), new])
    assert bytes(byte for one in tokens for byte in one.bytes).decode(errors="replace") == said(answer)[0]
    alternatives = value if name == "top_logprobs" else 0
    for one, row in zip(tokens, expected.topk(alternatives).values):
        torch.testing.assert_close(torch.tensor([other.logprob for other in one.top_logprobs]), row)
        assert alternatives == 0 or one.top_logprobs[0].token == one.token
    opening, *streamed = [chunk.choices[0].logprobs for chunk in ask(server, stream=True, **fields)]
    assert opening is None and [token for logprobs in streamed for token in logprobs.content] == tokens


def check_repetition(server, name, value):
    assert said(ask(server, repetition_penalty=value)) == greedy(server, repetition_penalty=value) != greedy(server)


CHECKS = {
    "max_completion_tokens": check_length,
    "max_tokens": check_length,
    "stop": check_stop,
    "n": check_n,
    "stream": check_stream,
    "stream_options": check_usage,
    "temperature": check_temperature,
    "top_p": check_narrowing,
    "top_k": check_narrowing,
    "min_p": check_narrowing,
    "seed": check_seed,
    "presence_penalty": check_penalty,
    "frequency_penalty": check_penalty,
    "logit_bias": check_bias,
    "logprobs": check_logprobs,
    "top_logprobs": check_logprobs,
    "repetition_penalty": check_repetition,
}


@pytest.mark.parametrize("row", PARAMETERS, ids=lambda row: f"{row[0]} {row[1]}")
def test_parameters(server, row):
    name, value, status = row[0].strip("`"), value_of(row[1]), row[2]
    if status == "works":
        CHECKS[name](server, name, value)
    elif status == "no effect":
        given, plain = ask(server, **{name: value}), ask(server)
        assert (said(given), given.usage, given.choices[0].logprobs) == (said(plain), plain.usage, None)
        # Where it comes with what would give it an effect
        with_logprobs = ask(server, **{"logprobs": True, name: value}).choices[0].logprobs
        assert name == "logprobs" or len(with_logprobs.content) == NEW_TOKENS
    else:
        assert status == "refused"
        with pytest.raises(openai.APIStatusError) as error:
            ask(server, **{name: value})
        assert error.value.status_code == (404 if name == "model" else 400)
        assert error.value.param == name and name in error.value.body["message"]


@pytest.mark.parametrize("row", READ_AS, ids=range(len(READ_AS)))
def test_messages_are_read_as_what_stands_beside_them(server, row):
    given, plain = (ask(server, messages_of(cell)) for cell in row)
    assert (said(given), given.usage) == (said(plain), plain.usage)


@pytest.mark.parametrize("row", REFUSED, ids=range(len(REFUSED)))
def test_messages_that_are_refused(server, row):
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, messages_of(row[0]))
    assert error.value.param == row[1].strip("`")
    assert error.value.body["message"].startswith(error.value.param)


def test_nothing_is_missing():
    listed = {row[0].strip("`") for row in PARAMETERS}
    streamed = completion_create_params.CompletionCreateParamsStreaming.__annotations__
    assert listed >= {*completion_create_params.CompletionCreateParamsBase.__annotations__, *streamed}
    assert listed >= {*requests.ChatRequest.model_fields}
    fields = {
        *requests.Message.model_fields,
        *requests.Part.model_fields,
        *requests.ImageUrl.model_fields,
    }
    cells = "".join(row[0] for row in READ_AS + REFUSED)
    assert {field for field in fields if f'"{field}"' not in cells} == {"audio", "function_call", "reasoning"}


def test_null_is_left_out(server):
    names = [name for name in requests.ChatRequest.model_fields if name not in ("model", "messages")]
    given = ask(server, **{name: None for name in names if name not in ("temperature", "max_completion_tokens", "stream")})
    assert said(given) == greedy(server)
