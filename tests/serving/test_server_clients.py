"""Several clients at one server: how many requests each may have, and whose turn it is. Routes as clients ask for them."""

import http.client
import threading

import openai
import pytest

from helpers.server import PATH, Server, body, read_stream, send_and_leave, text, wait_until
from visualchat.serving import server as program
from visualchat.serving.turns import FairQueue, find_client


class TestFairQueue:
    def test_clients_take_turns(self):
        queue = FairQueue()
        for client, item in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)):
            queue.put(client, item)
        assert [queue.take() for _ in range(3)] == [1, 4, 5]
        queue.put("c", 7)
        queue.remove("a", 2)
        queue.remove("a", 2)
        queue.remove("d", 1)
        assert [queue.take() for _ in range(5)] == [3, 6, 7, None, None]

    def test_what_was_removed_takes_no_turn(self):
        queue = FairQueue()
        queue.put("a", 1)
        queue.remove("a", 1)
        queue.put("b", 2)
        assert [queue.take(), queue.take()] == [2, None]


@pytest.mark.parametrize(
    "address, client",
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::"),
        ("::1", "::"),
        ("behind-a-proxy", "behind-a-proxy"),
    ],
)
def test_clients_are_told_by_their_address(address, client):
    scope = {"type": "http", "client": (address, 0)}
    assert find_client(program.Request(scope)) == client


class TestManyRequests:
    """Clients have the addresses that the header X-Forwarded-For of a proxy on this machine tells."""

    @pytest.fixture
    def busy(self):
        with Server(queue=5, max_per_client=4) as server:
            server.slow.set()
            yield server

    def test_a_client_with_too_many_is_sent_away_and_others_are_not(self, busy):
        leaving = [send_and_leave(busy, body(text(), max_tokens=500)) for _ in range(4)]
        wait_until(lambda: busy.service.used_slots == 4)
        status, headers, answer = busy.post(body(text()))
        assert (status, headers["Retry-After"], answer["error"]["code"]) == (429, "1", "rate_limit_exceeded")
        assert "4 requests from your address" in answer["error"]["message"] and "up to 4" in answer["error"]["message"]
        with pytest.raises(openai.RateLimitError, match="--max-per-client"):
            busy.ask(text())
        other = send_and_leave(busy, body(text(), max_tokens=500), "X-Forwarded-For: 10.0.0.2")
        wait_until(lambda: busy.service.used_slots == 5)
        leaving.append(other)
        leaving.append(send_and_leave(busy, body(text(), max_tokens=500), "X-Forwarded-For: 10.0.0.3"))
        wait_until(lambda: busy.service.used_slots == 6)
        assert busy.post(body(text()), {"X-Forwarded-For": "10.0.0.4"})[0] == 503
        for one in leaving:
            one.close()
        wait_until(lambda: busy.service.used_slots == 0)
        busy.slow.clear()
        assert busy.post(body(text()))[0] == 200 and busy.metrics()['visualchat_requests_total{status="429"}'] == 2

    def test_clients_take_turns(self, busy):
        order, threads = [], []

        def ask(client, name):
            busy.post(body(text(name), max_tokens=3), {"X-Forwarded-For": client})
            order.append(name)

        holder = send_and_leave(busy, body(text(), max_tokens=500), "X-Forwarded-For: 10.0.0.9")
        wait_until(lambda: busy.service.running == 1)
        for k, (client, name) in enumerate((("10.0.0.1", "a1"), ("10.0.0.1", "a2"), ("10.0.0.1", "a3"), ("10.0.0.2", "b1"))):
            threads.append(threading.Thread(target=ask, args=(client, name)))
            threads[-1].start()
            wait_until(lambda expected=k + 2: busy.metrics()["visualchat_queue_length"] + 1 == expected)
        holder.close()
        for thread in threads:
            thread.join(30)
        assert order == ["a1", "b1", "a2", "a3"]

    def test_an_answer_that_left_the_queue_is_not_kept(self, busy):
        holder = send_and_leave(busy, body(text(), max_tokens=500))
        wait_until(lambda: busy.service.running == 1)
        waiting = send_and_leave(busy, body(text(), max_tokens=500))
        wait_until(lambda: busy.service.used_slots == 2)
        waiting.close()
        wait_until(lambda: busy.service.used_slots == 1)
        assert busy.service.queue.take() is None and busy.service.running == 1
        holder.close()
        wait_until(lambda: busy.service.used_slots == 0)


class TestRoutes:
    @pytest.mark.parametrize(
        "path", ["/health", "/health/", "/v1/models", "/v1/models/", "/v1/models/tiny", "/v1/models/tiny/"]
    )
    def test_head_and_a_slash_at_the_end(self, server, path):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        answers = {}
        for method in ("GET", "HEAD"):  # on one connection, which a body behind HEAD would break
            connection.request(method, path)
            response = connection.getresponse()
            answers[method] = response.status, response.headers["Content-Length"], response.headers["Content-Type"]
            assert bool(response.read()) == (method == "GET")
        assert answers["HEAD"] == answers["GET"] and answers["GET"][0] == 200
        connection.close()

    def test_metrics_and_completions(self, server):
        assert server.get("/metrics/").startswith("# HELP") and "200 OK" in server.get("/metrics", "--head")
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for method, path, expected in (
            ("POST", PATH + "/", 415),
            ("GET", PATH, 405),
            ("POST", "/health/", 405),
            ("GET", "/x/", 404),
        ):
            connection.request(method, path)
            response = connection.getresponse()
            response.read()
            assert (response.status, response.headers["Location"]) == (expected, None)
        connection.close()


class Panic(BaseException):
    """As the tokenizer's Rust code raises it: not an `Exception`."""


class TestPanics:
    """A tokenizer that panics ends the request and nothing else."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("place", ["the prompt", "a token", "a piece"])
    def test_they_are_answered(self, server, monkeypatch, place, stream):
        def panic(*_, **__):
            raise Panic("the secret text")

        if place == "the prompt":
            monkeypatch.setattr(type(server.processor), "encode_prompts", panic)
        else:
            tokenizer = type(server.processor.tokenizer)
            decode = tokenizer.decode

            def sometimes(self, *arguments, **settings):
                in_worker = threading.current_thread().name.startswith("answer")
                return panic() if in_worker == (place == "a piece") else decode(self, *arguments, **settings)

            monkeypatch.setattr(tokenizer, "decode", sometimes)
        with pytest.raises(openai.APIError, match="failed to answer") as error:
            answer = server.ask(text(), stream=stream)
            read_stream(answer)
        assert "secret" not in str(error.value.body) and error.value.code == "internal_error"
        monkeypatch.undo()
        wait_until(lambda: server.service.used_slots == server.service.running == 0)
        assert server.ask(text()).choices

    def test_what_a_tokenizer_refuses_is_no_fault_of_the_server(self, server, monkeypatch):
        def refuse(*_, **__):
            raise ValueError("message 0 is too long")

        monkeypatch.setattr(type(server.processor), "encode_prompts", refuse)
        with pytest.raises(openai.BadRequestError, match="messages: message 0 is too long"):
            server.ask(text())
