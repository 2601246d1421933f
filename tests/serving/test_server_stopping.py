"""The server is told to stop: answers may end within a limit of time, and then its process does."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from helpers.commands import command
from helpers.server import PATH, Server, body, read_stream, send_and_leave, text, wait_until
from helpers.tiny import make_model, make_processor
from visualchat.errors import InputError
from visualchat.serving import connections, process
from visualchat.serving.connections import ConnectionLimits


LONG = body(text(), max_tokens=500)


def stop(server):
    server.server.should_exit = True
    wait_until(lambda: server.service.is_stopping)


def read_response(client):
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.headers, json.loads(response.read())


def test_answers_end_also_those_in_the_queue():
    with Server(queue=3, shutdown_seconds=60) as server, ThreadPoolExecutor(3) as pool:
        server.slow.set()
        one = pool.submit(server.ask, text(), max_tokens=20)
        streamed = pool.submit(lambda: read_stream(server.ask(text(), max_tokens=20, stream=True)))
        other = pool.submit(server.ask, text("And now?"), max_tokens=20)
        wait_until(lambda: server.service.used_slots == 3)
        stop(server)
        assert [answer.result().usage.completion_tokens for answer in (one, other)] == [20, 20]
        assert streamed.result()[1] == "length"
        server.thread.join(10)
        assert not server.thread.is_alive() and server.service.used_slots == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))


def test_after_the_limit_they_get_an_error():
    with Server(queue=3, shutdown_seconds=0.3, concurrency=2) as server:
        server.slow.set()
        unstreamed = send_and_leave(server, LONG)
        streamed = send_and_leave(server, {**LONG, "stream": True})
        wait_until(lambda: server.service.running == 2 and server.service.generated_tokens > 6)
        queued = [send_and_leave(server, {**LONG, "stream": stream}) for stream in (False, True)]
        wait_until(lambda: server.service.used_slots == 4)
        stop(server)
        for client in (unstreamed, *queued):
            status, headers, answer = read_response(client)
            assert (status, headers["Connection"], answer["error"]["code"]) == (503, "close", "server_stopping")
        response = http.client.HTTPResponse(streamed)
        response.begin()
        *_, last, end = response.read().decode().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping" and not end
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert server.service.generated_tokens < 500 and server.service.disconnects == 0
        for client in (unstreamed, streamed, *queued):
            client.close()


def test_a_kept_connection_is_told(monkeypatch):
    monkeypatch.setattr(connections, "LAST_SECONDS", 20)
    with Server(shutdown_seconds=60) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        late = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(kept), contextlib.closing(late):
            kept.request("GET", "/health")
            assert json.loads(kept.getresponse().read()) == {"status": "ok"}
            # Its body has not arrived when the server stops
            late.putrequest("POST", PATH)
            late.putheader("Content-Type", "application/json")
            late.putheader("Content-Length", str(len(json.dumps(LONG))))
            late.endheaders()
            wait_until(lambda: server.server.client_connections.uploading)
            stop(server)
            kept.request("POST", PATH, json.dumps(LONG), {"Content-Type": "application/json"})
            late.send(json.dumps(LONG).encode())
            for client in (kept, late):
                response = client.getresponse()
                assert (response.status, response.headers["Connection"]) == (503, "close")
                assert json.loads(response.read())["error"]["code"] == "server_stopping"


def test_a_body_that_does_not_come_ends_with_the_limit(monkeypatch):
    monkeypatch.setattr(process, "CLOSING_SECONDS", 0.1)
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with Server(shutdown_seconds=0.1) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode())
        wait_until(lambda: server.server.client_connections.uploading)
        stop(server)
        client.settimeout(20)
        assert read_response(client)[0] == 503


def test_a_thread_of_the_model_does_not_hold_it(monkeypatch):
    stuck = threading.Event()
    with Server(shutdown_seconds=0.2) as server:
        monkeypatch.setattr(server.service, "generate", lambda choice: iter([str(stuck.wait(60))]))
        with send_and_leave(server, LONG) as client:
            wait_until(lambda: server.service.running == 1)
            stop(server)
            client.settimeout(20)
            assert read_response(client)[0] == 503
        server.thread.join(20)
        assert not server.thread.is_alive() and server.service.running == 1
        stuck.set()


def test_a_thread_that_does_not_end_is_noticed():
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=False)
    thread.start()
    assert not process.threads_ended(0.05)
    end.set()
    thread.join()


@pytest.fixture
def signals():
    handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sig, handler in handlers.items():
        signal.signal(sig, handler)


def test_ctrl_c_and_addresses_that_cannot_be_used(signals, monkeypatch):
    monkeypatch.setattr(process, "threads_ended", lambda _: True)
    monkeypatch.setattr(process.Server, "run", lambda self, listeners: [one.close() for one in listeners])
    process.serve(None, None, "localhost", 0, ConnectionLimits())

    def interrupt(server, listeners):
        os.kill(os.getpid(), signal.SIGINT)
        assert server.should_exit
        listeners[0].close()

    monkeypatch.setattr(process.Server, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        process.serve(None, None, "127.0.0.1", 0, ConnectionLimits())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(InputError, match=rf"listen on 127.0.0.1 port {taken.getsockname()[1]}: Address already in use"):
            process.serve(None, None, "127.0.0.1", taken.getsockname()[1], ConnectionLimits())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model(image_number_keys=True)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


class TestProcess:
    @contextlib.contextmanager
    def serving(self, folder, log, files=1024):
        """`visualchat serve` in a process that may open so many files. Yields the process and the port."""

        words = command("serve", folder, "--model-name", "tiny", "--port", 0, "--shutdown-seconds", 60)
        limited = ["bash", "-c", 'ulimit -n "$0" && exec "$@"', str(files), *words]
        with open(log, "wb") as output:
            server = subprocess.Popen(limited, stdout=output, stderr=output)
        try:
            wait_until(lambda: "Listening on" in log.read_text() or server.poll() is not None, seconds=120)
            yield server, int(log.read_text().partition("Listening on http://127.0.0.1:")[2].split()[0])
        finally:
            server.kill()
            server.wait()

    def test_sigterm_and_few_files(self, folder, tmp_path):
        log = tmp_path / "log"
        with self.serving(folder, log, files=256) as (server, port), ThreadPoolExecutor(1) as pool:
            with contextlib.ExitStack() as stack:
                for _ in range(300):
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
                assert [one.id for one in client.models.list()] == ["tiny"]
                answer = pool.submit(
                    client.chat.completions.create, model="tiny", messages=LONG["messages"], max_tokens=300, n=8
                )
                wait_until(lambda: is_answering(port), seconds=60)
                server.send_signal(signal.SIGTERM)
                assert answer.result().usage.completion_tokens == 8 * 300
            client.close()
            assert server.wait(30) == 0
        shown = log.read_text()
        assert len(shown) < 10_000 and "Traceback" not in shown
        assert "Up to 160 connections, not 1000" in shown and shown.count("All 160 connections are in use") == 1

    def test_the_second_signal_ends_it_at_once(self, folder, tmp_path):
        log = tmp_path / "log"
        with self.serving(folder, log) as (server, port):
            payload = json.dumps({**LONG, "n": 8})
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            with contextlib.closing(connection):
                connection.request("POST", PATH, payload, {"Content-Type": "application/json"})
                wait_until(lambda: is_answering(port), seconds=60)
                server.send_signal(signal.SIGINT)
                wait_until(lambda: "Stopping" in log.read_text(), seconds=30)
                time.sleep(0.2)
                assert server.poll() is None
                server.send_signal(signal.SIGINT)
                assert server.wait(10) == 130


def is_answering(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        return "visualchat_running 1.0" in connection.getresponse().read().decode()
