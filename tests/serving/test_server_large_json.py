"""Bodies that are large, or made to keep the server busy: they are refused, and the server answers others meanwhile."""

import http.client
import threading
import time

import numpy as np
import pytest
from PIL import Image

from helpers.server import Server, body, encode, picture, text, wait_until
from visualchat.serving.errors import RequestError
from visualchat.serving.json_limits import check_json
from visualchat.serving.limits import Limits


BEGINNING = b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, '
MESSAGES, METADATA, PARTS = b'{"messages": [', BEGINNING + b'"metadata": ', b'{"messages": [{"role": "user", "content": ['
MESSAGE, PART = b'{"role":"user","content":""},', b'{"type":"text","text":""},'
NO_IMAGE = "bytes of the body, more than 2,000,000 are no image data"
VALUES = "JSON values (messages, parts, fields and the like), but this server takes up to 20,000"
LARGE = {
    "32 MB of tiny messages": (MESSAGES, MESSAGE, 32, 413, NO_IMAGE),
    "2 MB of tiny messages": (MESSAGES, MESSAGE, 1.9, 413, VALUES),
    "2 MB of wrong messages": (MESSAGES, b"{},", 1.9, 413, VALUES),
    "2 MB of tiny parts": (PARTS, PART, 1.9, 413, VALUES),
    "32 MB of metadata": (METADATA + b"[", b"1,", 32, 413, NO_IMAGE),
    "2 MB of metadata": (METADATA + b"[", b"[],", 1.9, 413, VALUES),
    "2 MB of quotation marks": (METADATA, b'"', 1.9, 400, "not valid JSON"),
    "2 MB of unknown fields": (BEGINNING, b'"a":1,', 1.9, 413, VALUES),
    "2 MB of biases": (BEGINNING + b'"logit_bias": {', b'"1":1,', 1.9, 413, VALUES),
    "deep nesting": (METADATA, b"[", 0.019, 400, "not valid JSON"),
    "a number": (METADATA, b"1", 1.9, 400, "not valid JSON"),
    "tiny images": (
        PARTS,
        picture("data:,")["image_url"]["url"].join(['{"image_url":"', '"},']).encode(),
        32,
        413,
        NO_IMAGE,
    ),
}


def fill(beginning, unit, megabytes):
    return beginning + unit * int((megabytes * 1e6 - len(beginning)) / len(unit))


@pytest.fixture(scope="module")
def tester():
    with Server(Limits(image_bytes=31_000_000, images=8, image_pixels=50_000_000)) as server:
        yield server


class TestLargeBodies:
    @pytest.fixture
    def longest_wait(self, tester):
        """Asks for `/health` all the time, and knows how long the longest answer took."""
        done, waits = threading.Event(), []

        def ask():
            connection = http.client.HTTPConnection("127.0.0.1", tester.port, timeout=60)
            while not done.wait(0.01):
                start = time.monotonic()
                connection.request("GET", "/health")
                assert connection.getresponse().read() == b'{"status":"ok"}'
                waits.append(time.monotonic() - start)
            connection.close()

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: waits)
        yield lambda: max(waits)
        done.set()
        thread.join()

    @pytest.mark.parametrize("name", LARGE)
    def test_are_refused_without_keeping_the_server_from_others(self, tester, longest_wait, name):
        *content, status, message = LARGE[name]
        start = time.monotonic()
        got, _, answer = tester.post(fill(*content))
        assert (got, message in answer["error"]["message"]) == (status, True), answer
        assert len(answer["error"]["message"]) < 500
        # On a quiet machine 0.3 s and 0.05 s. Without the limits, most of these take from 1 s to some minutes
        assert time.monotonic() - start < 5 and longest_wait() < 2

    def test_large_images_are_answered(self, tester, longest_wait):
        noise = np.random.default_rng(0).integers(0, 256, (2_700, 2_700, 3), np.uint8)
        large = picture(encode(Image.fromarray(noise), "BMP"))
        assert len(large["image_url"]["url"]) > 29_000_000
        assert tester.post(body(large, text("What?")))[0] == 200
        assert longest_wait() < 2

    def test_what_is_within_the_limits_is_answered_or_refused_quickly(self, tester, longest_wait):
        many = [{"role": role, "content": [text("")]} for _ in range(1600) for role in ("user", "assistant")]
        status, _, answer = tester.post({"model": "tiny", "messages": [*many, {"role": "user", "content": "a"}]})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        lines = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n" * 900_000}]
        status, _, answer = tester.post({"model": "tiny", "messages": lines})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        for wrong, param in (
            (fill(MESSAGES, b"{},", 0.03).rstrip(b",") + b"]}", "messages[0].role"),
            (BEGINNING + b",".join(b'"%d": 1' % k for k in range(19_000)) + b"}", "0"),
        ):
            status, _, answer = tester.post(wrong)
            assert (status, answer["error"]["param"] or "") == (400, param) or "model" in answer["error"]["param"]
        assert longest_wait() < 2


class TestChecks:
    """What counts, without a server."""

    LIMITS = Limits(text_bytes=300, values=12)

    @pytest.mark.parametrize(
        "content",
        [
            b'{"image_url": {"url": "data:image/png;base64,%s"}}' % (b"A" * 5000),
            b'{"image_url": "DATA:image/png;base64,%s"}' % (b"A\\/" * 5000),
            b'[{"url" :\n"data:image/png;base64,%s"}, {"url":"data:,%s"}]' % (b"A" * 5000, b"B" * 5000),
            b'{"text": "%s"}' % (b"{[," * 90),
            b'{"text": "\\"%s\\\\\\""}' % (b"{[," * 90),
            b'["\\\\", "%s"]' % (b"{" * 200),
        ],
    )
    def test_images_and_strings_do_not(self, content):
        check_json(content, self.LIMITS)

    @pytest.mark.parametrize(
        "content, message",
        [
            (b'{"text": "data:image/png;base64,%s"}' % (b"A" * 5000), "5,0.. bytes of the body, more than 300 are no image"),
            (b'{"text": "\\"url\\": \\"data:image/png;base64,%s"}' % (b"A" * 5000), "more than 300 are no image"),
            (b'{"url": "data:image/png;base64,\\"%s"}' % (b"A" * 5000), "more than 300 are no image"),
            (b'{"url": "data:%s,AAAA"}' % (b"A" * 5000), "more than 300 are no image"),
            (b'{"url": "data:,"}' * 100, "more than 300 are no image"),
            (b'{"url": "data:,AA"},' * 13, "26 JSON values .* up to 12"),
            (b'{"a": "\\\\", "b": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]}', "14 JSON values .* up to 12"),
            (b'["\\\\\\"", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]', "13 JSON values .* up to 12"),
        ],
    )
    def test_others_do(self, content, message):
        with pytest.raises(RequestError, match=message) as error:
            check_json(content, self.LIMITS)
        assert (error.value.status, error.value.error["code"]) == (413, "request_too_large")


class TestErrorsAreShort:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"a" * 1_000_000: 1},
            {"logit_bias": {"a" * 1_000_000: 1}},
            {"stop": "a" * 1_000_000},
            {"max_tokens": "a" * 1_000_000},
            {"max_tokens": [["a" * 1_000_000]]},
            {"stream_options": {"a" * 1_000_000: 1}},
            {"model": "a" * 1_000_000},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a" * 1_000_000}]}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://a.b/" + "a" * 60_000}]}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": f"http://{'a' * 9000}/"}]}]},
        ],
    )
    def test_names_and_values_are_cut(self, server, wrong):
        status, _, answer = server.post({**body(text()), **wrong})
        assert status in (400, 404) and len(str(answer)) < 800

    def test_paths_are_cut(self, server):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for path in ("/" + "a" * 5000, "/v1/models/" + "a" * 5000):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 404 and len(response.read()) < 500
        connection.close()
