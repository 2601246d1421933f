"""A server of a tiny model in a thread, and the requests that tests send to it."""

import base64
import contextlib
import functools
import http.server
import inspect
import io
import json
import socket
import subprocess
import threading
import time

import openai
from openai.resources.chat import Completions
from PIL import Image

from helpers.tiny import make_model, make_processor
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.serving.answers import AnswerService
from visualchat.serving.hosts import find_allowed_hosts
from visualchat.serving.limits import ConnectionLimits, Limits
from visualchat.serving.process import Server as HttpServer
from visualchat.serving.server import build_app


PATH = "/v1/chat/completions"


KNOWN_FIELDS = inspect.signature(Completions.create).parameters


class Server:
    """A server in a thread. While `slow` is set, each of its tokens takes 20 ms."""

    def __init__(self, limits=None, concurrency=1, queue=8, max_per_client=None, model=None, processor=None, **connections):
        self.model, self.processor = model or make_model(image_number_keys=True), processor or make_processor()
        # Random weights end an answer anywhere
        self.model.generation_config.eos_token_id = None
        self.slow = threading.Event()
        self.model.register_forward_hook(lambda *_: time.sleep(0.02 * self.slow.is_set()))
        self.tower_calls = []
        self.model.model.vision_tower.register_forward_hook(
            lambda module, args, output: self.tower_calls.append(len(output[0]))
        )
        self.store = ImageMemoryStore(self.model, 2**30)
        self.service = AnswerService(
            self.model, self.processor, self.store, concurrency, queue, max_per_client or concurrency + queue
        )
        hosts = find_allowed_hosts("127.0.0.1", ["*.example.com"])
        app = build_app(self.service, "tiny", limits or Limits(images=12), hosts)
        self.server = HttpServer(app, self.service, ConnectionLimits(**{"shutdown_seconds": 1, **connections}), "critical")
        listeners = self.server.listen("127.0.0.1", 0)
        self.port = listeners[0].getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=[listeners], daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.slow.clear()
        if "client" in vars(self):
            self.client.close()  # the server would wait a second for its next request
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @functools.cached_property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def ask(self, *content, messages=None, **fields):
        """With the OpenAI client, also what it does not know."""
        messages = [{"role": "user", "content": list(content)}] if messages is None else messages
        fields = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **fields}
        others = {name: fields.pop(name) for name in [*fields] if name not in KNOWN_FIELDS}
        return self.client.chat.completions.create(**fields, extra_body=others)

    def post(self, body, headers=()):
        """Status, headers and JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", PATH, body, {"Content-Type": "application/json", **dict(headers)})
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())

    def get(self, path, *options):
        return curl(self.url + path, *options)

    def metrics(self):
        lines = self.get("/metrics").splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def generate(self, messages, max_new_tokens=12):
        """What the model answers, or adds to an answer that is begun, without a server."""
        begun = messages[-1]["role"] == "assistant"
        ending = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
        inputs = self.processor.apply_chat_template(messages, **ending, tokenize=True, return_dict=True, return_tensors="pt")
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def curl(*arguments):
    return subprocess.run(["curl", "-sS", "--noproxy", "*", *arguments], capture_output=True, check=True, text=True).stdout


def encode(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(image):
    """An image part: of a PIL image, bytes or a URL."""
    image = encode(image) if isinstance(image, Image.Image) else image
    return {"type": "image_url", "image_url": {"url": data_url(image) if isinstance(image, bytes) else image}}


def text(words="What is this?"):
    return {"type": "text", "text": words}


def body(*content, role="user", **fields):
    return {"model": "tiny", "messages": [{"role": role, "content": list(content)}], "max_tokens": 4, **fields}


def read_stream(stream):
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"tiny"} and len({chunk.id for chunk in chunks}) == 1
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason, chunks[-1].usage


def raw_head(length, *lines):
    """The head of a request with a body of `length` bytes; `lines` are further headers."""
    first = (f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join([*first, *lines, "", ""]).encode()


def send_and_leave(server, request, *headers):
    """A socket on which a request was sent and nothing was read."""
    payload = json.dumps(request).encode()
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(raw_head(len(payload), *headers) + payload)
    return client
