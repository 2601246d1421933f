"""The server, over real sockets: wrong requests."""

import openai
import pytest
from PIL import Image

from helpers.server import body, encode, picture, read_stream, text
from helpers.tiny import digit_image


WRONG = {
    "not JSON": (b'{"model": "tiny"', 400, None, "not valid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', 400, None, "not valid JSON"),
    "no object": (b"[]", 400, None, "Input should be an object"),
    "deeply nested": (b'{"model":' + b"[" * 10_000, 400, None, "not valid JSON"),
    "more deeply nested": (b'{"model":' + b"[" * 100_000, 413, None, "100,001 JSON values"),
    "no model": ({"messages": [{"role": "user", "content": "a"}]}, 400, "model", "required"),
    "unknown model": (body(text(), model="gpt-4"), 404, "model", "use 'tiny'"),
    "no messages": ({"model": "tiny"}, 400, "messages", "required"),
    "empty messages": ({"model": "tiny", "messages": []}, 400, "messages", "at least 1"),
    "messages of text": ({"model": "tiny", "messages": "hi"}, 400, "messages", "array"),
    "role": (body(text(), role="tool"), 400, "messages[0].role", "'system', 'developer', 'user' or 'assistant'"),
    "unknown role": (body(text(), role="bot"), 400, "messages[0].role", "got 'bot'"),
    "assistant first": (body(text(), role="assistant"), 400, "messages[0]", "does not follow a message"),
    "system alone": (body(text(), role="system"), 400, "messages", "no message of the user"),
    "picture of the assistant": (
        body(picture(b"x"), role="assistant"),
        400,
        "messages[0]",
        "only messages of the user may have images",
    ),
    "message without content": (
        {"model": "tiny", "messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
        400,
        "messages[1].content",
        "required",
    ),
    "no content": ({"model": "tiny", "messages": [{"role": "user"}]}, 400, "messages[0].content", "required"),
    "content of a number": (
        {"model": "tiny", "messages": [{"role": "user", "content": 7}]},
        400,
        "messages[0].content",
        "7",
    ),
    "kind of part": (body({"type": "input_audio"}), 400, "messages[0].content[0].type", "'text' or 'image_url'"),
    "part without text": (body(text(), {"type": "text"}), 400, "messages[0].content[1]", "needs the field 'text'"),
    "part with both": (body({**text(), **picture("x"), "type": "text"}), 400, "messages[0].content[0]", "and no other"),
    "image_url of a number": (
        body({"type": "image_url", "image_url": 7}),
        400,
        "messages[0].content[0].image_url",
        "object",
    ),
    "plain image_url": (
        body({"type": "image_url", "image_url": "x"}),
        400,
        "messages[0].content[0].image_url.url",
        "data URLs",
    ),
    "detail": (
        body({"type": "image_url", "image_url": {"url": "x", "detail": "best"}}),
        400,
        "messages[0].content[0].image_url.detail",
        "'high'",
    ),
    "half a character": (body(text("\ud800")), 400, None, "not valid JSON"),
    "max_tokens of text": (body(text(), max_tokens="many"), 400, "max_tokens", "integer, got 'many'"),
    "max_tokens of a fraction": (body(text(), max_tokens=1.5), 400, "max_tokens", "integer"),
    "max_tokens 0": (body(text(), max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
    "max_tokens beyond the limit": (body(text(), max_tokens=513), 400, "max_tokens", "up to 512 tokens, got 513"),
    "temperature": (body(text(), temperature=3), 400, "temperature", "less than or equal to 2"),
    "temperature of text": (body(text(), temperature="1"), 400, "temperature", "number"),
    "temperature NaN": (body(text(), temperature=float("nan")), 400, "temperature", ""),
    "top_p": (body(text(), top_p=0), 400, "top_p", "greater than 0"),
    "seed": (body(text(), seed="x"), 400, "seed", "integer"),
    "seed too large": (body(text(), seed=2**70), 400, "seed", ""),
    "stop of a number": (body(text(), stop=7), 400, "stop", "array"),
    "five stop strings": (body(text(), stop=["a"] * 5), 400, "stop", "at most 4"),
    "empty stop string": (body(text(), stop=["a", ""]), 400, "stop[1]", "at least 1"),
    "stream": (body(text(), stream="yes"), 400, "stream", "boolean"),
    "no answers": (body(text(), n=0), 400, "n", "greater than or equal to 1"),
    "nine answers": (body(text(), n=9), 400, "n", "up to 8 answers, got 9"),
    "half an answer": (body(text(), n=0.5), 400, "n", "integer"),
    "two lengths": (body(text(), max_completion_tokens=5), 400, "max_tokens", "max_completion_tokens 5"),
    "penalty": (body(text(), presence_penalty=3), 400, "presence_penalty", "less than or equal to 2"),
    "penalty NaN": (body(text(), frequency_penalty=float("nan")), 400, "frequency_penalty", ""),
    "bias": (body(text(), logit_bias={"7": 101}), 400, "logit_bias.7", "less than or equal to 100"),
    "bias of a word": (body(text(), logit_bias={"a": 1}), 400, "logit_bias.a.[key]", "integer"),
    "bias of no token": (body(text(), logit_bias={"100000": 1}), 400, "logit_bias", "no token 100000, the model has"),
    "bias of a negative token": (body(text(), logit_bias={"-1": 1}), 400, "logit_bias", "no token -1"),
    "logprobs of a number": (body(text(), logprobs=5), 400, "logprobs", "boolean"),
    "top_logprobs alone": (body(text(), top_logprobs=5), 400, "top_logprobs", "logprobs is not true"),
    "top_logprobs": (body(text(), logprobs=True, top_logprobs=21), 400, "top_logprobs", "less than or equal to 20"),
    "stream_options": (body(text(), stream_options={"a": 1}), 400, "stream_options.a", "does not support"),
    "tools": (body(text(), tools=[{}]), 400, "tools", "calls no tools"),
    "unknown field": (body(text(), temprature=1), 400, "temprature", "does not support"),
    "too long": (body(text("word " * 400), max_tokens=400), 400, "messages", "context holds 1024"),
    "far too long": (body(text("a" * 1_000_000)), 400, "messages", "1,000,0"),
    "path": (body(picture("/etc/passwd")), 400, "messages[0].content[0].image_url.url", "reads no files"),
    **{
        url: (body(picture(url)), 400, "messages[0].content[0].image_url.url", "reads no files")
        for url in (
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "file://localhost/etc/passwd",
            "file:/etc/passwd",
            "~/.ssh/id_rsa",
            "~root/.ssh/id_rsa",
            "ftp://127.0.0.1/a.png",
        )
    },
    "host in capitals": (body(picture("HTTP://A.ORG/b.png")), 400, "messages[0].content[0].image_url.url", "'a.org'"),
    "host": (body(text(), picture("https://a.org/b.png")), 400, "messages[0].content[1].image_url.url", "'a.org'"),
    "own machine": (body(picture("http://127.0.0.1:1/")), 400, "messages[0].content[0].image_url.url", "--allow-host"),
    "no URL": (body(picture("http://a:b/c.png")), 400, "messages[0].content[0].image_url.url", "data URLs"),
    "broken base64": (body(picture("data:image/png;base64,&&&&")), 400, "messages[0].content[0].image_url.url", "base64"),
    "no ASCII in base64": (body(picture("data:image/png;base64,ä")), 400, "messages[0].content[0].image_url.url", "base64"),
    "not base64": (body(picture("data:image/png,abc")), 400, "messages[0].content[0].image_url.url", "must begin with"),
    "no picture": (body(picture(b"nothing")), 400, "messages[0].content[0].image_url.url", "PNG, JPEG"),
    "empty picture": (body(picture(b"")), 400, "messages[0].content[0].image_url.url", "not a readable image"),
    "half a picture": (
        body(picture(digit_image(0)), picture(encode(Image.effect_noise((64, 64), 50))[:900])),
        400,
        "messages[0].content[1].image_url.url",
        "broken image",
    ),
    "PostScript": (
        body(picture(encode(digit_image(0), "EPS"))),
        400,
        "messages[0].content[0].image_url.url",
        "not a readable image",
    ),
    "pixels": (
        body(picture(Image.new("L", (5001, 5000)))),
        400,
        "messages[0].content[0].image_url.url",
        "5001 × 5000 pixels, more than 25,000,000",
    ),
    "a bomb": (
        body(picture(Image.new("1", (20_000, 20_000)))),
        400,
        "messages[0].content[0].image_url.url",
        "decompression bomb",
    ),
    "thin": (body(picture(Image.new("L", (8, 801)))), 400, "messages[0].content[0].image_url.url", "8 × 801"),
    "13 images": (
        body(*[picture(digit_image(0))] * 13),
        400,
        "messages[0].content[12].image_url.url",
        "13 images, but this server takes up to 12",
    ),
}


class TestWrongRequests:
    @pytest.mark.parametrize("name", WRONG)
    def test_are_refused_with_the_field_at_fault(self, server, name):
        request, status, param, message = WRONG[name]
        got, _, answer = server.post(request)
        assert (got, answer["error"]["param"], answer["error"]["type"]) == (status, param, "invalid_request_error")
        assert message in answer["error"]["message"] and len(answer["error"]["message"]) < 500

    def test_what_is_far_too_long_is_not_tokenized(self, server, monkeypatch):
        monkeypatch.setattr(server.processor, "tokenizer", None)
        assert server.post(WRONG["far too long"][0])[0] == 400

    def test_the_server_goes_on_after_them(self, server):
        for request, *_ in WRONG.values():
            server.post(request)
        assert server.service.used_slots == 0
        assert len(server.post(body(picture(digit_image(0)), text()))[2]["choices"]) == 1

    def test_the_openai_client_understands_them(self, server):
        with pytest.raises(openai.BadRequestError, match="must begin with") as error:
            server.ask(picture("data:image/png,abc"))
        assert (error.value.code, error.value.param) == ("invalid_base64", "messages[0].content[0].image_url.url")
        with pytest.raises(openai.NotFoundError, match="There is no model"):
            server.ask(text(), model="other")

    def test_content_type_keeps_other_pages_out(self, server):
        assert server.post(body(text("a" * 5_000_000)), {"Content-Type": "text/plain"})[0] == 415
        assert server.post(body(text()), {"Content-Type": "application/json; charset=utf-8"})[0] == 200

    def test_errors_inside_are_not_shown(self, server, monkeypatch):
        def fail_at_once(answer):
            raise ValueError("the secret path")

        def fail_later(answer):
            yield "So "
            raise ValueError("the secret path")

        for fail in (fail_at_once, fail_later):
            monkeypatch.setattr(server.service, "generate", fail)
            for stream in (False, True):
                if fail is fail_later and stream:
                    with pytest.raises(openai.APIError, match="failed to answer") as error:
                        read_stream(server.ask(text(), stream=True))
                else:
                    with pytest.raises(openai.InternalServerError, match="failed to answer") as error:
                        server.ask(text(), stream=stream)
                assert "secret" not in str(error.value.body) and error.value.code == "internal_error"
        monkeypatch.undo()
        assert server.ask(text()).choices
