"""The server, over real sockets: limits, the queue, and clients that go away."""

import contextlib
import http.server
import json
import socket
import threading
import time

import openai
import pytest
from PIL import Image

from helpers.server import PATH, Server, body, encode, picture, raw_head, send_and_leave, text, wait_until
from helpers.tiny import digit_image
from visualchat.serving.limits import Limits


@pytest.fixture(scope="module")
def strict():
    limits = Limits(body_bytes=20_000, body_seconds=0.5, images=2, image_bytes=5_000, image_pixels=10_000, new_tokens=8)
    with Server(limits, queue=0) as server:
        yield server


class TestLimits:
    def test_body(self, strict):
        for size in (21_000, 2_000_000):
            with pytest.raises(openai.APIStatusError, match="larger than 20,000 bytes") as error:
                strict.ask(text("a" * size))
            assert error.value.status_code == 413
        assert strict.ask(text(), max_tokens=3).choices

    def test_body_without_a_length(self, strict):
        def chunks():
            for _ in range(30):
                yield b" " * 1000

        assert strict.post(b"".join(chunks()))[0] == 413
        connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST", PATH, chunks(), {"Content-Type": "application/json"}, encode_chunked=True)
            assert connection.getresponse().status == 413

    def test_slow_body(self, strict):
        with socket.create_connection(("127.0.0.1", strict.port)) as client:
            client.sendall(raw_head(100) + b"{")
            client.settimeout(10)
            assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert strict.service.used_slots == 0

    def test_pictures(self, strict):
        noise = encode(Image.effect_noise((90, 90), 50))
        for parts, message in (
            ([picture(digit_image(0))] * 3, "3 images, but this server takes up to 2"),
            ([picture(noise)], "more than 5,000 bytes"),
            ([picture(Image.new("L", (101, 100)))], "101 × 100 pixels, more than 10,000"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                strict.ask(*parts)

    def test_answer(self, strict):
        assert strict.ask(text(), max_tokens=openai.omit).usage.completion_tokens == 8
        with pytest.raises(openai.BadRequestError, match="max_completion_tokens: this server answers with up to 8"):
            strict.ask(text(), max_tokens=openai.omit, max_completion_tokens=9)


class PictureHost(http.server.BaseHTTPRequestHandler):
    """Knows a picture, ways to it, and ways to keep a server busy."""

    def do_GET(self):
        places = {"/around": "/picture.png", "/away": "http://localhost:1/secret.png", "/loop": "/loop"}
        if self.path in places:
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
            return
        if self.path == "/missing.png":
            self.send_error(404)
            return
        if self.path == "/slow":
            time.sleep(1.5)
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(encode(digit_image(5)) if self.path == "/picture.png" else b"x" * 200_000)

    def log_message(self, *_):
        pass


def test_pictures_from_an_allowed_host(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureHost) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        allowed = f"127.0.0.1:{host.server_port}"
        with Server(Limits(hosts=frozenset([allowed]), image_bytes=100_000, fetch_seconds=0.7)) as server:
            expected = server.ask(picture(digit_image(5)), text()).choices[0].message.content
            for path in ("/picture.png", "/around"):
                assert server.ask(picture(f"http://{allowed}{path}"), text()).choices[0].message.content == expected
            for url, message in (
                (f"http://{allowed}/away", "does not fetch images from 'localhost'"),
                (f"http://{allowed}/loop", "redirected more than 3 times"),
                (f"http://{allowed}/missing.png", "404"),
                (f"http://{allowed}/large", "more than 100,000 bytes"),
                (f"http://{allowed}/slow", "no answer within 0.7 seconds|timed out"),
                (f"http://localhost:{host.server_port}/picture.png", "does not fetch images from 'localhost'"),
                (f"http://user:secret@{allowed}/picture.png", "does not fetch images from '127.0.0.1'"),
                ("http://127.0.0.1/picture.png", "does not fetch images from '127.0.0.1'"),
                (f"ftp://{allowed}/picture.png", "must be data URLs"),
            ):
                with pytest.raises(openai.BadRequestError, match=message):
                    server.ask(picture(url), text())
        host.shutdown()


class TestQueue:
    @pytest.fixture
    def busy(self):
        """A server with one place to answer and one to wait."""
        with Server(queue=1) as server:
            server.slow.set()
            yield server

    @pytest.mark.parametrize("stream, fields", [(False, {}), (True, {}), (True, {"n": 8, "logprobs": True})])
    def test_a_client_that_leaves_frees_its_slot(self, busy, stream, fields):
        leaving = send_and_leave(busy, body(text(), **{"max_tokens": 500, "stream": stream, **fields}))
        wait_until(lambda: busy.service.generated_tokens >= 3)
        leaving.close()
        wait_until(lambda: busy.service.used_slots == 0, seconds=4)
        assert busy.service.generated_tokens < 50
        assert busy.service.disconnects == 1 and busy.service.running == 0
        busy.slow.clear()
        assert busy.ask(text(), max_tokens=3).usage.completion_tokens == 3

    def test_a_client_that_leaves_the_queue(self, busy):
        answering = send_and_leave(busy, body(text(), max_tokens=500))
        wait_until(lambda: busy.service.running == 1)
        waiting = send_and_leave(busy, body(text("waiting"), max_tokens=500))
        wait_until(lambda: busy.service.used_slots == 2)
        assert busy.metrics()["visualchat_queue_length"] == 1 and busy.metrics()["visualchat_running"] == 1
        waiting.close()
        wait_until(lambda: busy.service.used_slots == 1, seconds=4)
        assert busy.service.running == 1
        answering.close()
        wait_until(lambda: busy.service.used_slots == 0, seconds=4)

    def test_when_it_is_full_others_are_sent_away(self, busy):
        leaving = [send_and_leave(busy, body(text(), max_tokens=500)) for _ in range(2)]
        wait_until(lambda: busy.service.used_slots == 2)
        status, headers, answer = busy.post(body(text()))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer["error"]["code"] == "server_overloaded" and "All 2 slots are in use" in answer["error"]["message"]
        assert busy.post(body(text("a" * 5_000_000)))[0] == 503
        assert json.loads(busy.get("/health")) == {"status": "ok"}
        for one in leaving:
            one.close()
        wait_until(lambda: busy.service.used_slots == 0, seconds=4)
        assert busy.post(body(text()))[0] == 200

    def test_the_server_stops_while_it_answers(self, busy):
        with send_and_leave(busy, body(text(), max_tokens=500, stream=True)) as client:
            wait_until(lambda: busy.service.running == 1)
            busy.server.should_exit = True
            busy.thread.join(5)
            assert not busy.thread.is_alive() and busy.service.generated_tokens < 400
            client.settimeout(5)
            assert b"data: " in client.recv(10_000)
