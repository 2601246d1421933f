"""The server, over raw sockets: clients that are slow, silent, many, or that close their direction after the request."""

import contextlib
import errno
import http.client
import json
import socket
import threading
import time

import pytest

from helpers.server import PATH, Server, body, send_and_leave, text, wait_until
from visualchat.serving import bodies, connections
from visualchat.serving.connections import Connections, Listener, possible_connections
from visualchat.serving.limits import ConnectionLimits, Limits


HALF_A_BODY = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
GET = "GET {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.fixture(scope="module")
def hasty():
    """A server with one slot and short limits of time."""
    limits = Limits(images=12, body_seconds=3, body_pause_seconds=1.5)
    with Server(limits, queue=0, head_seconds=1.5, idle_seconds=1.5, send_seconds=1) as server:
        yield server


@contextlib.contextmanager
def connected(server, count, sent=""):
    """Clients that have sent this."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(count)]
        for client in clients:
            client.settimeout(10)
            client.sendall(sent.encode())
        yield clients


def read_to_the_end(client):
    """What the server sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65_536):
            received += data
    return received


def read_response(client):
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.headers, response.read().decode()


def check_health(server):
    start = time.monotonic()
    assert json.loads(server.get("/health")) == {"status": "ok"}
    assert time.monotonic() - start < 2


def count_connections(server):
    return server.server.client_connections.count


class TestSlowClients:
    @pytest.mark.parametrize("sent", ["", "GET /health HTTP/1.1\r\nHost: x\r\nA: "])
    def test_a_request_that_does_not_come(self, hasty, sent):
        with connected(hasty, 40, sent) as clients:
            check_health(hasty)
            assert [read_to_the_end(client) for client in clients] == [b""] * 40
            wait_until(lambda: count_connections(hasty) == 0)

    def test_headers_that_come_byte_by_byte(self, hasty):
        with connected(hasty, 1, "GET /health HTTP/1.1\r\nHost: x\r\nA: ") as (client,):
            with pytest.raises(ConnectionError):
                for _ in range(100):
                    client.sendall(b"a")
                    time.sleep(0.1)

    def test_a_connection_is_kept_for_the_next_request(self, hasty):
        with connected(hasty, 1) as (client,):
            for _ in range(2):
                client.sendall(GET.format("/health").encode())
                assert read_response(client)[0] == 200
            assert read_to_the_end(client) == b""

    def test_a_body_that_does_not_come_takes_no_slot(self, hasty):
        with connected(hasty, 33, HALF_A_BODY) as clients:
            wait_until(lambda: count_connections(hasty) == 33)
            assert hasty.service.used_slots == 0
            assert hasty.ask(text(), max_tokens=3).choices
            check_health(hasty)
            for client in clients:
                status, headers, answer = read_response(client)
                assert (status, headers["Connection"]) == (408, "close")
                assert "nothing of it did for 1.5 seconds" in json.loads(answer)["error"]["message"]

    def test_a_body_that_comes_byte_by_byte(self, hasty):
        with connected(hasty, 1, HALF_A_BODY) as (client,):
            client.settimeout(0.1)
            for _ in range(90):
                client.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    assert client.recv(100).startswith(b"HTTP/1.1 408")
                    break
            else:
                pytest.fail("the server waits for longer than 3 seconds")

    def test_a_body_that_nobody_reads(self, hasty):
        """The route is answered before the rest of the body has come."""
        with connected(hasty, 1, HALF_A_BODY.replace(PATH, "/health")) as (client,):
            assert read_response(client)[0] == 405
            assert read_to_the_end(client) == b""

    def test_an_answer_that_is_not_read(self, hasty):
        with connected(hasty, 1) as (client,):
            end = time.monotonic() + 60
            with pytest.raises(ConnectionError):
                while time.monotonic() < end:  # the system may take megabytes before the server's limit of time is over
                    client.sendall(GET.format("/metrics").encode() * 10)
            wait_until(lambda: count_connections(hasty) == 0)
        check_health(hasty)

    def test_an_answer_that_is_read_slowly(self):
        def send(client):
            with contextlib.suppress(ConnectionError):
                client.sendall(GET.format("/metrics").encode() * 20_000)

        with Server(send_seconds=1) as server, connected(server, 1) as (client,):
            sender = threading.Thread(target=send, args=[client])
            sender.start()
            wait_until(lambda: any(one.flow.write_paused for one in list(server.server.server_state.connections)))
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                assert client.recv(200_000)
                time.sleep(0.05)
            assert count_connections(server) == 1
            client.shutdown(socket.SHUT_RDWR)
            sender.join()

    def test_bodies_that_arrive_have_a_limit_of_memory(self, monkeypatch):
        monkeypatch.setattr(bodies, "BEGINNING_BYTES", 1000)
        request = json.dumps(body(text("a" * 19_000), max_tokens=2)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        sent = f"{head}Content-Length: {len(request)}\r\n\r\n".encode() + request[:-1]
        question = json.dumps(body(text("hello"), max_tokens=2)).encode()
        with Server(Limits(body_bytes=20_000, images=12)) as server, connected(server, 10) as (*clients, asker):
            for client in clients[:-1]:
                client.sendall(sent)
            wait_until(lambda: len(server.server.client_connections.uploading) == 8)
            time.sleep(0.3)  # for what was sent to be received
            clients[-1].sendall(sent + request[-1:])
            status, _, answer = read_response(clients[-1])
            assert status == 503 and "Too many large requests are arriving" in json.loads(answer)["error"]["message"]
            asker.sendall(f"{head}Content-Length: {len(question)}\r\n\r\n".encode() + question)
            assert read_response(asker)[0] == 200
            for client in clients[:-1]:
                client.sendall(request[-1:])
            # Too long for the context, which is known only after it was read
            assert [read_response(client)[0] for client in clients[:-1]] == [400] * 8


class TestManyConnections:
    def test_silent_ones_make_room(self, monkeypatch):
        warnings = []
        monkeypatch.setattr(connections.logger, "warning", lambda *message: warnings.append(message))
        with Server(connections=10) as server, connected(server, 60) as clients:
            for _ in range(3):
                check_health(server)
            assert count_connections(server) <= 10
            assert sum(read_to_the_end(client) == b"" for client in clients[:50]) == 50
            assert len(warnings) == 1 and "All 10 connections are in use" in warnings[0][1]

    def test_uploads_make_room_if_most_are_uploads(self):
        with Server(connections=5) as server, connected(server, 5, HALF_A_BODY) as clients:
            wait_until(lambda: len(server.server.client_connections.uploading) == 5)
            check_health(server)
            assert read_to_the_end(clients[0]) == b""
            assert len(server.server.client_connections.uploading) == 4

    def test_answers_do_not(self):
        with Server(connections=2, queue=1) as server:
            server.slow.set()
            answering = [send_and_leave(server, body(text(), max_tokens=500)) for _ in range(2)]
            wait_until(lambda: server.service.used_slots == 2)
            with connected(server, 1) as (client,):
                assert read_to_the_end(client).startswith(b"HTTP/1.1 503")
            assert server.service.used_slots == 2
            for client in answering:
                client.close()
            wait_until(lambda: server.service.used_slots == 0)

    def test_no_files_left(self, monkeypatch):
        limited = Connections(ConnectionLimits())
        accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

        def fail_first(self):
            if failures:
                raise failures.pop()
            return accept(self)

        monkeypatch.setattr(socket.socket, "accept", fail_first)
        with contextlib.closing(Listener(limited)) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.setblocking(False)
            with socket.create_connection(listener.getsockname()) as turned_away:
                with pytest.raises(BlockingIOError):
                    listener.accept()
                assert read_to_the_end(turned_away).startswith(b"HTTP/1.1 503")
            with socket.create_connection(listener.getsockname()):
                listener.accept()[0].close()
            assert limited.count == 1

    def test_their_number_follows_from_the_open_files(self, monkeypatch):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (256, 256))
        assert (possible_connections(1000), possible_connections(9)) == (160, 9)
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (96, 96))
        with pytest.raises(connections.InputError, match="may open 96 files"):
            possible_connections(1000)


class TestHalfClosed:
    """Clients that say with the end of their direction that the request is whole, as `nc -N` does."""

    @pytest.mark.parametrize("stream", [False, True])
    def test_it_gets_its_answer(self, server, stream):
        server.slow.set()
        expected = server.ask(text(), max_tokens=40).choices[0].message.content
        with send_and_leave(server, body(text(), max_tokens=40, temperature=0, stream=stream)) as client:
            client.shutdown(socket.SHUT_WR)
            client.settimeout(20)
            status, _, answer = read_response(client)
            assert status == 200
            if stream:
                assert answer.endswith("data: [DONE]\n\n")
            else:
                assert json.loads(answer)["choices"][0]["message"]["content"] == expected
            assert client.recv(1) == b""
        server.slow.clear()
        assert server.service.disconnects == 0

    def test_all_requests_before_the_end_are_answered(self, server):
        with connected(server, 1, GET.format("/health") + GET.format("/v1/models") + GET.format("/health")) as (client,):
            client.shutdown(socket.SHUT_WR)
            received = read_to_the_end(client)
        assert received.count(b"HTTP/1.1 200 OK") == 3 and received.endswith(b'{"status":"ok"}')

    def test_a_part_of_a_request_is_no_request(self, server):
        for sent in ("", "GET /health HTTP/1.1\r\n", HALF_A_BODY):
            with connected(server, 1, sent) as (client,):
                client.shutdown(socket.SHUT_WR)
                assert read_to_the_end(client) == b""

    def test_it_leaves_later(self, server):
        server.slow.set()
        client = send_and_leave(server, body(text(), max_tokens=500))
        client.shutdown(socket.SHUT_WR)
        before = server.service.disconnects
        wait_until(lambda: server.service.running == 1)
        time.sleep(0.5)
        assert server.service.used_slots == 1
        client.close()
        wait_until(lambda: server.service.used_slots == 0)
        server.slow.clear()
        assert server.service.disconnects == before + 1
