"""
Requests as clients sent them to the server, recorded between the two. The clients are no dependencies: openai 3.57.0,
litellm 1.110.2, langchain-openai 1.7.4 and Open WebUI 0.12.4. `…` stands for an image, and `tiny` for the model.
"""

import http.client
import json
import re
from pathlib import Path

import pytest

from helpers.server import PATH, Server, data_url, encode
from helpers.tiny import digit_image
from visualchat.serving.limits import Limits


IMAGE = {"type": "image_url", "image_url": {"url": "…"}}
QUESTION = {"type": "text", "text": "Which digit?"}
LITELLM = {"model": "tiny", "messages": [{"role": "user", "content": [IMAGE, QUESTION]}], "max_tokens": 12}
USER = {"content": [QUESTION, IMAGE], "role": "user"}
LANGCHAIN = {"model": "tiny", "stream": False, "messages": [USER], "max_completion_tokens": 12}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
WEBUI = {"stream": True, "model": "tiny", "messages": [USER]}
PENALTIES = {"presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": 1}}
DIGIT = {"description": "A digit.", "properties": {"digit": {"title": "Digit", "type": "integer"}}, "required": ["digit"]}
SCHEMA = {"schema": {**DIGIT, "title": "Digit", "type": "object", "additionalProperties": False}, "name": "Digit"}
PARAMETERS = {"properties": {"digit": {"type": "integer"}}, "required": ["digit"], "type": "object"}
TOOL = {"type": "function", "function": {"name": "Digit", "description": "A digit.", "parameters": PARAMETERS}}
CALL = {"type": "function", "id": "a", "function": {"name": "add", "arguments": "{}"}}
ANSWERED = {
    "litellm: completion(model='openai/m'), and 'hosted_vllm/m', 'custom_openai/m'": LITELLM,
    "litellm: acompletion(stream=True), with usage": {**LITELLM, **USAGE},
    "litellm: parameters of OpenAI": {**LITELLM, "temperature": 0.7, "top_p": 0.9, "stop": ["."], "seed": 3, **PENALTIES},
    "litellm: others, given by name and as extra_body": {**LITELLM, "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1},
    "litellm: cache_control_injection_points, parallel_tool_calls": {
        **LITELLM,
        "messages": [{"role": "user", "content": [IMAGE, {**QUESTION, "cache_control": {"type": "ephemeral"}}]}],
        "parallel_tool_calls": False,
    },
    "langchain-openai: invoke, in the second round": {
        **LANGCHAIN,
        "messages": [USER, {"content": "one", "role": "assistant"}, {"content": "Why?", "role": "user"}],
    },
    "langchain-openai: stream, with stream_usage=True": {**LANGCHAIN, **USAGE},
    "langchain-openai: settings": {
        **LANGCHAIN,
        **PENALTIES,
        "n": 1,
        "seed": 1,
        "stop": ["."],
        "temperature": 0.5,
        "top_p": 0.9,
        "service_tier": "auto",
        "store": False,
    },
    "Open WebUI: a chat in the second round, with the model's capability Usage": {
        **WEBUI,
        **USAGE,
        "messages": [USER, {"role": "assistant", "content": "one"}, USER],
    },
    "Open WebUI: settings of a chat": {
        **WEBUI,
        **PENALTIES,
        **USAGE,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 3,
        "stop": ["###"],
        "max_tokens": 12,
    },
    "Open WebUI: a system prompt": {
        **WEBUI,
        **USAGE,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    },
    "Open WebUI: tags of a chat": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "### Task:\nGenerate 1-3 broad tags"}],
        "stream": False,
    },
    "langchain-openai: names": {
        **LANGCHAIN,
        "messages": [
            {"content": "Be brief.", "role": "system"},
            {"content": "Hi", "name": "me", "role": "user"},
            {"content": "Ho", "name": "m", "role": "assistant"},
            {"content": "Why?", "role": "user"},
        ],
    },
}
REFUSED = {
    "litellm, openai's parse: response_format=Digit; langchain-openai: with_structured_output(Digit)": (
        {**LITELLM, "response_format": {"type": "json_schema", "json_schema": {**SCHEMA, "strict": True}}},
        "response_format",
    ),
    "Open WebUI: a chat, with the model's capability Builtin Tools, which all models have": (
        {**WEBUI, "tools": [{"type": "function", "function": {"name": "get_current_timestamp"}}]},
        "tools",
    ),
    "Open WebUI: the title of a chat": (
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title"}],
            "stream": False,
            "max_tokens": 1000,
        },
        "max_tokens",
    ),
    **{
        f"Open WebUI: {name}, a setting of a chat": ({**WEBUI, **USAGE, name: value}, name)
        for name, value in {
            "repeat_penalty": 1.1,
            "repeat_last_n": 64,
            "tfs_z": 1,
            "mirostat": 1,
            "num_ctx": 2048,
            "num_keep": 24,
            "think": True,
            "format": "json",
            "keep_alive": "5m",
            "reasoning_effort": "low",
        }.items()
    },
    "langchain-openai: bind_tools([Digit])": ({**LANGCHAIN, "tools": [TOOL]}, "tools"),
    "langchain-openai: with_structured_output(Digit, method='function_calling')": (
        {
            **LANGCHAIN,
            "parallel_tool_calls": False,
            "tool_choice": {"type": "function", "function": {"name": "Digit"}},
            "tools": [TOOL],
        },
        "tools",
    ),
    "langchain-openai: a conversation with a tool": (
        {
            **LANGCHAIN,
            "messages": [
                USER,
                {"content": None, "role": "assistant", "tool_calls": [CALL]},
                {"content": "1", "role": "tool", "tool_call_id": "a"},
            ],
        },
        "messages[1].tool_calls",
    ),
    "langchain-openai: a file": (
        {
            **LANGCHAIN,
            "messages": [{**USER, "content": [QUESTION, {"type": "file", "file": {"file_data": "data:", "filename": "a"}}]}],
        },
        "messages[0].content[1].type",
    ),
}


@pytest.fixture(scope="module")
def server():
    """Its answers have up to 16 tokens, where a request does not say how many."""
    with Server(Limits(images=12, new_tokens=16)) as server:
        yield server


def send(server, recorded):
    """The status, and the events of a stream or the JSON of another answer, to a client that gives some API key."""
    body = json.dumps(recorded, ensure_ascii=False).replace("…", data_url(encode(digit_image(4)))).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", PATH, body, {"Content-Type": "application/json", "Authorization": "Bearer any"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.headers["Content-Type"].startswith("text/event-stream"):
        *events, done = text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        return response.status, [json.loads(event.removeprefix("data: ")) for event in events]
    return response.status, json.loads(text)


@pytest.mark.parametrize("name", ANSWERED)
def test_they_are_answered(server, name):
    recorded = ANSWERED[name]
    status, answer = send(server, recorded)
    assert status == 200
    if recorded.get("stream"):
        *events, last = answer
        assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    else:
        assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("name", REFUSED)
def test_they_are_refused_by_name(server, name):
    recorded, param = REFUSED[name]
    status, answer = send(server, recorded)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(f"{param}: ")


def test_open_webui_gets_the_tool_error_on_its_page(server):
    """It shows the message, and nothing else, in place of the answer."""
    (recorded, _), *_ = (value for name, value in REFUSED.items() if "Builtin Tools" in name)
    assert "in Open WebUI, take Builtin Tools from" in send(server, recorded)[1]["error"]["message"]


def test_open_webui_asks_for_the_models(server):
    headers = ["-H", "Authorization: Bearer any", "-H", "Content-Type: application/json", "-H", "User-Agent: Python/3.11"]
    (model,) = json.loads(server.get("/v1/models", *headers))["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")


@pytest.mark.parametrize(
    "path",
    [
        "/chat/completions",  # every client, of a base URL without /v1
        "/v1/responses",  # openai: responses.create; litellm: responses; langchain-openai: use_responses_api, reasoning
        "/v1/completions",  # openai: completions.create; litellm: text_completion
        "/v1/embeddings",  # openai: embeddings.create
    ],
)
def test_other_apis_are_told_what_there_is(server, path):
    answer = json.loads(server.get(path, "--json", "{}"))
    assert answer["error"]["message"].startswith(f"POST {path}: Not Found. This server has POST {PATH}")
    assert "a base URL that ends in /v1" in answer["error"]["message"]


SECTION = (Path(__file__).parents[2] / "docs/serving.md").read_text().split("\n## Clients\n")[1].split("\n## ")[0]
FIRST, *OTHERS = re.findall(r"^```py\n(.*?)^```", SECTION, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("package", ["openai", "langchain_openai", "litellm"])
def test_the_lines_of_the_page_run(server, package, tmp_path, monkeypatch, capsys):
    pytest.importorskip(package, reason="a client of which only the requests are kept here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/demo/conversation").mkdir(parents=True)
    digit_image(1).save(tmp_path / "outputs/demo/conversation/image-1.png")
    names = {}
    of_package = [block for block in OTHERS if re.match(rf"(from|import) {package}\b", block)]
    for block in (FIRST, *of_package):
        block = block.replace("http://127.0.0.1:8000", server.url).replace("outputs/demo/model", "tiny")
        exec(compile(block, "docs/serving.md", "exec"), names)
    assert capsys.readouterr().out.strip()
