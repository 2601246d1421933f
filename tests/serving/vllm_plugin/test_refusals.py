"""The middleware for vLLM: what vLLM would ignore in silence is refused, by the values of the table in docs/serving.md."""

import asyncio
import json

import pytest


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from visualchat.serving.vllm.refusals import RefuseIgnoredParameters


pytestmark = pytest.mark.vllm
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def send(body: bytes, path="/v1/chat/completions", pieces=2):
    """Status and JSON of the answer. The application behind the middleware answers with the body that it received."""

    async def application(scope, receive, send):
        received = bytearray()
        while True:
            message = await receive()
            received += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"received": received.decode()}).encode()})

    size = -(-len(body) // pieces)
    parts = [body[k * size : (k + 1) * size] for k in range(pieces)]
    messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    sent = []

    async def receive():
        return messages.pop(0)

    async def reply(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(RefuseIgnoredParameters(application)(scope, receive, reply))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.mark.parametrize(
    "fields",
    [
        {"temprature": 1},
        {"repeat_penalty": 1.1},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"reasoning_effort": "high"},
        {"verbosity": "low"},
        {"prediction": {"type": "content", "content": "a"}},
        {"web_search_options": {}},
        {"moderation": {"model": "omni-moderation-latest"}},
        {"store": True},
        {"service_tier": "priority"},
        {"documents": [{"text": "a"}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_vllm_would_ignore_is_refused_by_name(fields):
    status, answer = send(json.dumps({**BODY, **fields}).encode())
    (name,) = fields
    assert (status, answer["error"]["param"]) == (400, name) and answer["error"]["message"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ({"tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, "tool_calls"),
        ({"refusal": "No."}, "refusal"),
        ({"prefix": True}, "prefix"),
    ],
)
def test_so_is_what_it_would_ignore_of_a_message(message, name):
    answered = {"role": "assistant", "content": "Ho", **message}
    status, answer = send(json.dumps({**BODY, "messages": [*BODY["messages"], answered, *BODY["messages"]]}).encode())
    assert (status, answer["error"]["param"]) == (400, f"messages[1].{name}")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "messages": [
                {"role": "user", "content": "Hi", "name": "me"},
                {"role": "assistant", "content": "Ho", "refusal": None},
            ]
        },
        {"messages": ["Hi", 7]},
        {"messages": "Hi"},
        {"temperature": 0.5, "top_k": 3, "min_tokens": 2, "structured_outputs": {"choice": ["a"]}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}, "logprobs": True, "parallel_tool_calls": False},
        {"user": "me", "metadata": {"run": "1"}, "safety_identifier": "me", "prompt_cache_key": "a"},
        {"store": False, "service_tier": "auto", "verbosity": "medium", "modalities": ["text"], "reasoning_effort": "none"},
        {"temprature": None, "store": None},
    ],
    ids=str,
)
def test_the_rest_reaches_vllm_as_it_was_sent(fields):
    body = json.dumps({**BODY, **fields})
    assert send(body.encode()) == (200, {"received": body})


@pytest.mark.parametrize("body", ["", "{", "[]", "7", '{"a": "\\ud800"}'])
def test_what_is_no_request_is_left_to_vllm(body):
    assert send(body.encode(), pieces=1) == (200, {"received": body})


def test_other_paths_are_left_alone():
    assert send(b'{"temprature": 1}', path="/v1/completions")[0] == 200
