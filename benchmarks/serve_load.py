"""
Sends 500 requests to the server, from 16 clients at the same time, of which 5 % are invalid. Checks that each valid request
gets the answer of `model.generate` and each invalid one a status 4xx, and that the server's memory does not grow. The
requests have more images than the image memory holds.

    make demo && python -m benchmarks.serve_load
"""

import argparse
import base64
import http.client
import io
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModel, AutoProcessor

import modeling_visualchat  # noqa: F401  registers the classes
from benchmarks.measure import memory_of_process
from benchmarks.report import write_results


ROOT = Path(__file__).parent.parent
MODEL = "visualchat"
CONVERSATIONS, IMAGES, NEW_TOKENS = 60, 150, 8
IMAGE_MEMORY_GB = 0.001


class Request(NamedTuple):
    """A request. `expected` is the text of the answer, or `None` if the request is invalid."""

    body: bytes
    expected: str | None


class Response(NamedTuple):
    status: int
    text: str
    seconds: float


def make_conversations(count: int, seed: int = 0) -> list[list[dict]]:
    """Conversations of one or two rounds about one to three digits, in the message format of transformers."""
    draw = random.Random(seed)
    scans = [Image.fromarray(np.uint8(scan * 15)).convert("RGB") for scan in load_digits().images[:IMAGES]]

    def ask(number: int) -> dict:
        images = [{"type": "image", "image": draw.choice(scans)} for _ in range(draw.randint(1, 3))]
        return {"role": "user", "content": [*images, {"type": "text", "text": f"What digit is in image {number}?"}]}

    conversations = []
    for _ in range(count):
        messages = [ask(1)]
        if draw.random() < 0.5:
            messages += [{"role": "assistant", "content": "three"}, ask(2)]
        conversations.append(messages)
    return conversations


def answer_directly(model_dir: str, conversations: list[list[dict]]) -> list[str]:
    """The answers of `model.generate`, without server, chat session or image memory."""
    model, processor = AutoModel.from_pretrained(model_dir).eval(), AutoProcessor.from_pretrained(model_dir)
    answers = []
    for messages in conversations:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def to_request(messages: list[dict], **settings) -> dict:
    """The request for a conversation, in OpenAI's format."""

    def to_part(part: dict) -> dict:
        if part["type"] == "text":
            return part
        file = io.BytesIO()
        part["image"].save(file, "PNG")
        return image_part("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())

    messages = [
        {
            **one,
            "content": [to_part(part) for part in one["content"]] if isinstance(one["content"], list) else one["content"],
        }
        for one in messages
    ]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS, **settings}


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def invalid_bodies() -> list[bytes]:
    def body(*content, role: str = "user", **settings) -> bytes:
        return json.dumps({"model": MODEL, "messages": [{"role": role, "content": list(content)}], **settings}).encode()

    text = {"type": "text", "text": "What is this?"}
    return [
        b'{"model": ',
        body(text, role="tool"),
        body(image_part("data:image/png;base64,&&&&"), text),
        body(image_part("data:image/png;base64," + base64.b64encode(b"no image").decode()), text),
        body(image_part("http://127.0.0.1:9/image.png"), text),
        body(image_part("/etc/passwd"), text),
        body({"type": "text", "text": "too long " * 5000}),
        body(text, max_tokens="many"),
        body(text, model="another"),
    ]


def mix(conversations: list[list[dict]], answers: list[str], count: int, invalid: float, seed: int = 0) -> list[Request]:
    """Valid and invalid requests in random order. Half of the valid ones are streamed."""
    draw = random.Random(seed)
    bodies = invalid_bodies()
    num_invalid = round(invalid * count)
    requests = [Request(bodies[k % len(bodies)], None) for k in range(num_invalid)]
    for k in range(count - num_invalid):
        which = k % len(conversations)
        requests.append(Request(json.dumps(to_request(conversations[which], stream=k % 2 == 1)).encode(), answers[which]))
    draw.shuffle(requests)
    return requests


@contextmanager
def serving(model_dir: str, *arguments: str, seconds: float = 120) -> Iterator[tuple[int, int]]:
    """Runs `visualchat serve`. Yields its port and process id."""
    with socket.socket() as free, tempfile.TemporaryFile() as log:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [
            sys.executable,
            "-m",
            "visualchat",
            "serve",
            model_dir,
            "--model-name",
            MODEL,
            "--port",
            str(port),
            *arguments,
        ]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + seconds
            while True:
                try:
                    if ask(port, "GET", "/health").status == 200:
                        break
                except OSError as error:
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise RuntimeError(f"The server did not start:\n{log.read().decode()[-2000:]}") from error
                    time.sleep(0.2)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(30)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> Response:
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    return Response(response.status, text, time.perf_counter() - start)


def read_answer(text: str) -> str:
    """The text of the answer in a response, streamed or not."""
    if not text.startswith("data: "):
        return json.loads(text)["choices"][0]["message"]["content"]
    events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    if events[-1] != "[DONE]":
        raise ValueError(f"A stream ends with {events[-1]!r:.200}")
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


def is_right(sent: Request, got: Response) -> bool:
    if sent.expected is None:
        return 400 <= got.status < 500 and bool(json.loads(got.text)["error"]["message"])
    return got.status == 200 and read_answer(got.text) == sent.expected


def measure_load(model_dir: str, count: int = 500, clients: int = 16, invalid: float = 0.05) -> list[dict]:
    """
    Runs the benchmark. The first fifth of the requests is not timed, and the server's memory at the end is compared with its
    memory after them.

    Raises:
        RuntimeError: If a request gets no answer or a wrong one.
    """
    conversations = make_conversations(min(CONVERSATIONS, count))
    requests = mix(conversations, answer_directly(model_dir, conversations), count, invalid)
    warm = count // 5
    options = ("--queue", str(clients), "--max-per-client", str(clients), "--image-memory-gb", str(IMAGE_MEMORY_GB))
    with serving(model_dir, *options) as (port, pid):

        def send(sent: Request) -> Response:
            return ask(port, "POST", "/v1/chat/completions", sent.body)

        with ThreadPoolExecutor(clients) as pool:
            first = list(pool.map(send, requests[:warm]))
            before, start = memory_of_process("VmRSS", pid), time.perf_counter()
            rest = list(pool.map(send, requests[warm:]))
            seconds, after = time.perf_counter() - start, memory_of_process("VmRSS", pid)
        metrics = dict(
            line.rsplit(" ", 1) for line in ask(port, "GET", "/metrics").text.splitlines() if not line.startswith("#")
        )
    answered = list(zip(requests, first + rest))
    wrong = [got for sent, got in answered if not is_right(sent, got)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {count} requests got a wrong answer, the first one {wrong[0]}")
    twentieths = quantiles([got.seconds for got in rest], n=20)
    good = sum(sent.expected is not None for sent in requests)
    memory = {name: int(float(metrics[f"visualchat_image_memory_{name}_total"])) for name in ("hits", "misses", "evictions")}
    figures = {
        "clients": clients,
        "requests_per_second": round(len(rest) / seconds, 1),
        "p50_seconds": round(twentieths[9], 3),
        "p95_seconds": round(twentieths[18], 3),
        "image_memory": memory,
    }
    return [
        {"claim": f"{good} requests answered as by model.generate", "ratio": 1.0, "target": 1.0, **figures},
        {"claim": f"{count - good} invalid requests answered with a 4xx", "ratio": 1.0, "target": 1.0},
        {
            "claim": f"the server's memory after {count} requests, to that after {warm}",
            "ratio": round(after / before, 3),
            "target": 1.05,
            "mib": [round(before, 1), round(after, 1)],
        },
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT / "outputs/demo/model"), help="folder of the model; by default the one of make demo"
    )
    parser.add_argument("--requests", type=int, default=500, help="default %(default)s")
    parser.add_argument("--clients", type=int, default=16, help="default %(default)s")
    args = parser.parse_args(argv)
    results = measure_load(args.model, args.requests, args.clients)
    write_results("serve_load", results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
