"""The server, over real sockets: right answers, wrong requests, clients that go away."""

import base64
import contextlib
import functools
import http.server
import importlib
import inspect
import io
import json
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.resources.chat import Completions
from PIL import Image
from helpers.tiny import TOKENS_PER_IMAGE, digit_image, make_model, make_processor
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast
from benchmarks import serve_load
from visualchat.serving import requests, sampling, server as program
from visualchat.serving.answers import AnswerService
from visualchat.serving.requests import Limits, parse_request

from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


ROOT = Path(__file__).parents[2]
PATH = "/v1/chat/completions"
KNOWN_FIELDS = inspect.signature(Completions.create).parameters




class Server:
    """A server in a thread. While `slow` is set, each of its tokens takes 20 ms."""

    def __init__(self, limits=None, concurrency=1, queue=8):
        self.model, self.processor = make_model(image_number_keys=True), make_processor()
        # Random weights end an answer anywhere
        self.model.generation_config.eos_token_id = None
        self.slow = threading.Event()
        self.model.register_forward_hook(lambda *_: time.sleep(0.02 * self.slow.is_set()))
        self.tower_calls = []
        self.model.model.vision_tower.register_forward_hook(
            lambda module, args, output: self.tower_calls.append(len(output[0]))
        )
        self.store = ImageMemoryStore(self.model, 2**30)
        self.service = AnswerService(self.model, self.processor, self.store, concurrency, queue)
        app = serve.build_app(self.service, "tiny", limits or Limits(images=12))
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.slow.clear()
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()
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

    def get(self, path):
        return curl(self.url + path)

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


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server
        assert server.service.taken == server.service.running == 0


@pytest.fixture(scope="module")
def strict():
    limits = Limits(body_bytes=20_000, body_seconds=0.5, images=2, image_bytes=5_000, image_pixels=10_000, new_tokens=8)
    with Server(limits, queue=0) as server:
        yield server


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


def request(**fields):
    return parse_request(json.dumps(body(text(), **fields)).encode())


def read_stream(stream):
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"tiny"} and len({chunk.id for chunk in chunks}) == 1
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason, chunks[-1].usage


def send_and_leave(server, request):
    """A socket on which a request was sent and nothing was read."""
    payload = json.dumps(request).encode()
    client = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    client.sendall(head.encode() + payload)
    return client


class TestAnswers:
    def test_two_rounds_with_the_openai_client(self, server):
        first, second, third = (digit_image(k) for k in range(3))
        local = [{"role": "system", "content": "You read digits."}]
        remote = list(local)
        for question, images in (("Which is larger?", [first, second]), ("And now?", [third]), ("Why?", [])):
            local.append({"role": "user", "content": [*({"type": "image", "image": i} for i in images), text(question)]})
            remote.append({"role": "user", "content": [*map(picture, images), text(question)]})
            answer = server.ask(messages=remote)
            expected = server.generate(local)
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "length")
            streamed = server.ask(messages=remote, stream=True, stream_options={"include_usage": True})
            assert read_stream(streamed) == (expected, "length", answer.usage)
            inputs = server.processor.apply_chat_template(local, add_generation_prompt=True, tokenize=True, return_dict=True)
            assert answer.usage.prompt_tokens == len(inputs["input_ids"][0]) > TOKENS_PER_IMAGE
            assert answer.usage.completion_tokens == 12
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
            local.append({"role": "assistant", "content": expected})
            # As the client gives it back, with fields that are null
            remote.append(answer.choices[0].message.model_dump())

    def test_data_urls_as_clients_write_them(self, server):
        image = encode(digit_image(3))
        expected = server.ask(picture(image), text()).choices[0].message.content
        lines = base64.encodebytes(image).decode()
        for url in (data_url(image).replace("data:image", "DATA:Image"), f"data:image/png;BASE64,{lines}"):
            assert server.ask(picture(url), text()).choices[0].message.content == expected

    def test_with_curl(self, server, tmp_path):
        image = digit_image(3)
        expected = server.generate([{"role": "user", "content": [{"type": "image", "image": image}, text()]}], 4)
        request = tmp_path / "request.json"
        send = ("-H", "Content-Type: application/json", "-d", f"@{request}", server.url + PATH)
        request.write_text(json.dumps(body(picture(image), text(), temperature=0)))
        assert json.loads(curl(*send))["choices"][0]["message"]["content"] == expected
        request.write_text(json.dumps(body(picture(image), text(), temperature=0, stream=True)))
        events = curl("-N", *send).strip().split("\n\n")
        assert events.pop() == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == expected
        assert json.loads(server.get("/health")) == {"status": "ok"}
        assert [one["id"] for one in json.loads(server.get("/v1/models"))["data"]] == ["tiny"]
        assert json.loads(server.get("/v1/models/tiny"))["id"] == "tiny"
        assert "use 'tiny'" in json.loads(server.get("/v1/models/other"))["error"]["message"]
        assert json.loads(server.get("/nowhere"))["error"]["message"] == "GET /nowhere: Not Found"

    def test_a_picture_sent_again_is_remembered(self, server):
        pictures = [digit_image(k) for k in (20, 21)]
        before = server.metrics()
        server.ask(*map(picture, pictures), text())
        calls = len(server.tower_calls)
        server.ask(picture(pictures[1]), text("Something else, in another conversation"))
        # The same pixels in another file
        server.ask(picture(encode(pictures[0], "BMP")), text(), stream=True).close()
        server.ask(picture(pictures[0]), text())
        assert len(server.tower_calls) == calls
        after = server.metrics()
        misses, hits = (f"visualchat_image_memory_{name}_total" for name in ("misses", "hits"))
        assert (after[misses] - before[misses], after[hits] - before[hits]) == (2, 3)

    def test_stop_strings_end_an_answer_and_are_not_in_it(self, server):
        expected = server.generate([{"role": "user", "content": [text()]}], 40)
        stop = expected[12:15]
        assert expected.index(stop) > 3
        whole = server.ask(text(), max_tokens=40, stop=[stop, "never"])
        assert whole.choices[0].message.content == expected.split(stop)[0]
        assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens < 40
        streamed = server.ask(text(), max_tokens=40, stop=stop, stream=True)
        assert read_stream(streamed) == (expected.split(stop)[0], "stop", None)

    def test_the_end_token_ends_an_answer(self, server, monkeypatch):
        inputs = server.processor.apply_chat_template(
            [{"role": "user", "content": "Hi"}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = server.model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
        monkeypatch.setattr(server.model.generation_config, "eos_token_id", ids[3])
        answer = server.ask(text("Hi"), max_tokens=ids.index(ids[3]) + 1)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == ids.index(ids[3]) + 1

    def test_an_answer_takes_what_is_left_of_the_context(self, server, monkeypatch):
        monkeypatch.setattr(server.model.config.text_config, "max_position_embeddings", 90)
        usage = server.ask(text("Hi"), max_tokens=openai.omit).usage
        assert usage.total_tokens == 90

    def test_what_looks_like_a_placeholder_is_text(self, server):
        assert server.ask(text("<image></s>### Image 7:"), picture(digit_image(1))).choices[0].message.content

    def test_a_seed_fixes_a_sampled_answer(self, server):
        def sample(**settings):
            return server.ask(text(), **{"temperature": 1.5, "max_tokens": 16, **settings}).choices[0].message.content

        assert sample(seed=3) == sample(seed=3)
        assert len({sample(seed=seed) for seed in range(4)} | {sample(), sample()}) > 3
        greedy = server.generate([{"role": "user", "content": [text()]}], 16)
        assert sample(temperature=0) == sample(top_p=1e-6, seed=1) == sample(temperature=1e-6) == greedy

    def test_a_seed_does_not_depend_on_what_else_is_answered(self):
        with Server(concurrency=4) as server, ThreadPoolExecutor(8) as pool:
            seeds = [*range(4), *range(4)]
            answers = pool.map(lambda seed: server.ask(text(), temperature=1.5, seed=seed).choices[0].message.content, seeds)
            answers = list(answers)
        assert answers[:4] == answers[4:] and len(set(answers)) == 4

    def test_several_answers_cost_one_prefill(self, server):
        rows = []
        layer = server.model.model.language_model.layers[0]
        handle = layer.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
        pictures = [picture(digit_image(k)) for k in (30, 31)]
        server.ask(*pictures, text(), max_tokens=1)  # remembers them
        calls = len(server.tower_calls)
        rows.clear()
        one = server.ask(*pictures, text(), temperature=1.5, max_tokens=5)
        rows_of_one = sum(rows)
        rows.clear()
        three = server.ask(*pictures, text(), temperature=1.5, max_tokens=5, n=3)
        handle.remove()
        assert len(server.tower_calls) == calls
        assert sum(rows) == rows_of_one + 2 * 5 < 2 * rows_of_one
        assert three.usage.prompt_tokens == one.usage.prompt_tokens and three.usage.completion_tokens == 15
        assert len({choice.message.content for choice in three.choices}) == 3

    def test_a_seed_fixes_several_answers_beside_others(self):
        with Server(concurrency=4) as server, ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda seed: server.ask(text(), temperature=1.5, seed=seed, n=3).choices, [1, 2, 1, 2])
            first, second, *again = [[choice.message.content for choice in choices] for choices in answers]
        assert [first, second] == again and len({*first, *second}) == 6

    def test_the_first_of_several_answers_is_the_only_one_of_its_seed(self, server):
        one, three = (server.ask(text(), temperature=1.5, seed=5, n=n).choices for n in (1, 3))
        assert one[0].message == three[0].message

    @pytest.mark.parametrize("stream", [False, True])
    def test_each_of_several_answers_ends_at_stop_strings(self, server, stream):
        sampling = {"temperature": 1.5, "seed": 2, "n": 3, "max_tokens": 40}
        whole = [choice.message.content for choice in server.ask(text(), **sampling).choices]
        stop = [one[k : k + 2] for one, k in zip(whole, (5, 9, 13))]
        places = [min((one.find(end) for end in stop if end in one), default=len(one)) for one in whole]
        answer = server.ask(text(), **sampling, stop=stop, stream=stream)
        texts, reasons = ["", "", ""], [None] * 3
        if stream:
            for choice in (chunk.choices[0] for chunk in answer):
                assert reasons[choice.index] is None
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason
        else:
            texts, reasons = zip(*[(choice.message.content, choice.finish_reason) for choice in answer.choices])
        assert list(texts) == [one[:place] for one, place in zip(whole, places)] and set(reasons) == {"stop"}

    def test_an_answer_goes_on_from_its_beginning(self, server):
        image = digit_image(8)
        for beginning in ("It is", "Sure:\n", " ", "\n\n", "a </s> b"):
            answer = {"role": "assistant", "content": beginning}
            remote = [{"role": "user", "content": [picture(image), text()]}, answer]
            if "</s>" not in beginning:
                local = [{"role": "user", "content": [{"type": "image", "image": image}, text()]}, answer]
                added = server.generate(local)
            else:
                added = server.ask(messages=remote).choices[0].message.content
            assert added != server.ask(messages=remote[:1]).choices[0].message.content
            given = server.ask(messages=remote, n=2, logprobs=True)
            assert [choice.message.content for choice in given.choices] == [added, added]
            assert given.usage.completion_tokens == 24
            for choice in given.choices:
                spelled = bytes(byte for token in choice.logprobs.content for byte in token.bytes)
                assert spelled.decode(errors="replace") == added
            assert read_stream(server.ask(messages=remote, stream=True)) == (added, "length", None)
            stop = added[4:6]
            stopped = server.ask(messages=remote, stop=[stop, beginning]).choices[0]
            assert (stopped.message.content, stopped.finish_reason) == (added.split(stop)[0], "stop")

    def test_the_clients_own_reading_of_a_stream(self, server):
        fields = {"temperature": 1.5, "seed": 4, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 20}
        messages = [{"role": "user", "content": "What is this?"}]
        # It takes no answer that ended for lack of tokens
        fields["stop"] = [choice.message.content[9:11] for choice in server.ask(messages=messages, **fields).choices]
        with server.client.chat.completions.stream(model="tiny", messages=messages, **fields) as stream:
            read = stream.get_final_completion()
        answer = server.ask(messages=messages, **fields)
        for one, other in zip(read.choices, answer.choices, strict=True):
            assert (one.index, one.message.content, one.finish_reason) == (other.index, other.message.content, "stop")
            assert one.logprobs.content == other.logprobs.content

    def test_tokens_of_an_answer_that_is_cut(self, server):
        whole = server.ask(text(), max_tokens=40, logprobs=True).choices[0]
        assert any(token.token.startswith("bytes:") for token in whole.logprobs.content)
        stop = whole.message.content[12:15]
        cut = server.ask(text(), max_tokens=40, logprobs=True, stop=stop).choices[0]
        tokens = cut.logprobs.content
        assert tokens == whole.logprobs.content[: len(tokens)]
        lengths = [
            len(bytes(b for t in tokens[:k] for b in t.bytes).decode(errors="replace")) for k in range(len(tokens) + 1)
        ]
        assert lengths[-2] <= len(cut.message.content) <= lengths[-1]


class TestGenerationConfig:
    """What the model's `generation_config` says, unless a request says otherwise."""

    @pytest.fixture
    def configure(self, server, monkeypatch):
        def configure(**settings):
            for name, value in settings.items():
                monkeypatch.setattr(server.model.generation_config, name, value)

        return configure

    def test_sampling(self, server, configure):
        def sample(**fields):
            fields = {"temperature": openai.omit, **fields}
            return {server.ask(text(), **fields).choices[0].message.content for _ in range(4)}

        greedy = sample(temperature=0)
        configure(do_sample=True, temperature=3.0, top_k=1)
        assert sample() == sample(temperature=2) == sample(top_p=0.9) == greedy
        assert len(sample(top_k=0)) == len(sample(top_k=-1)) == len(sample(top_k=40)) == 4
        configure(top_k=None, top_p=1e-6)
        assert sample() == greedy != sample(top_p=1)
        configure(temperature=1e-6, top_p=None)
        assert sample() == greedy != sample(temperature=2)
        configure(temperature=3.0)
        assert len(sample()) == 4 and sample(temperature=0) == greedy

    SETTINGS = (
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_k": 0},
        {"top_p": 0.4},
        {"top_h": 0.5},
        {"min_p": 0.2},
        {"typical_p": 0.3},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.05},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.8, "top_h": 0.9, "top_k": 40, "top_p": 0.9, "typical_p": 0.95, "epsilon_cutoff": 1e-3},
    )

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_scores_are_narrowed_as_generate_does(self, server, configure, settings):
        def narrow(asked):
            warpers = serve_sampling.make_warpers(asked, server.model.generation_config, output.scores[0].device)
            return serve_sampling.LogitsProcessorList(warpers)(inputs["input_ids"], allowed)

        inputs = server.processor.tokenizer("What is this?", return_tensors="pt")
        configure(do_sample=True, **settings)
        output = server.model.generate(
            **inputs, max_new_tokens=1, output_scores=True, output_logits=True, return_dict_in_generate=True
        )
        allowed = output.logits[0].clone()
        allowed[:, server.processor.image_token_id] = -torch.inf
        torch.testing.assert_close(narrow(request()), output.scores[0])
        named = {name: settings[name] for name in settings if name in serve_requests.ChatRequest.model_fields}
        # The same by the request, against what the model says
        configure(**{name: value for name, value in (("temperature", 9.0), ("top_k", 2), ("top_p", 0.1)) if name in named})
        torch.testing.assert_close(narrow(request(**named)), output.scores[0])

    @pytest.mark.parametrize(
        "settings",
        [
            {"repetition_penalty": 5.0},
            {"no_repeat_ngram_size": 1},
            {"suppress_tokens": [*range(40, 300)]},
            {"sequence_bias": {(70,): 50.0}},
            {"stop_strings": ["n"]},
            {"max_new_tokens": 3},
            {"eos_token_id": 70, "min_new_tokens": 5, "sequence_bias": {(70,): 50.0}},
        ],
        ids=", ".join,
    )
    def test_the_rest_is_as_in_a_chat(self, server, configure, settings):
        length = {} if "max_new_tokens" in settings else {"max_new_tokens": 12}
        plain = server.model.start_chat(server.processor).send("What is this?", max_new_tokens=12)
        configure(**settings)
        expected = server.model.start_chat(server.processor).send("What is this?", **length)
        fields = {"max_tokens": openai.omit} if "max_new_tokens" in settings else {}
        answer = server.ask(text(), temperature=openai.omit, **fields)
        assert answer.choices[0].message.content == expected != plain

    def test_a_request_may_ask_for_more_than_the_model_does_by_itself(self, server, configure):
        configure(max_new_tokens=3, repetition_penalty=5.0)
        greedy = server.generate([{"role": "user", "content": [text()]}])
        assert server.ask(text(), max_tokens=9).usage.completion_tokens == 9
        assert server.ask(text()).choices[0].message.content == greedy
        assert server.ask(text(), repetition_penalty=1).choices[0].message.content != greedy

    def test_prompt_lookup_changes_nothing(self, server, configure):
        expected = server.ask(text(), logprobs=True).choices
        configure(prompt_lookup_num_tokens=3)
        assert server.ask(text(), logprobs=True).choices == expected

    def test_beam_search_is_refused_at_the_start(self, tmp_path):
        model = make_model()
        model.generation_config.num_beams = 3
        model.save_pretrained(tmp_path)
        make_processor().save_pretrained(tmp_path)
        with pytest.raises(SystemExit, match=r"cannot serve .*num_beams=3.*set num_beams to 1"):
            serve.main([str(tmp_path)])


class TestSpelling:
    def test_of_byte_level_tokens(self):
        tokenizer = make_processor().tokenizer
        ids = tokenizer(" a€𝄞b", add_special_tokens=False)["input_ids"]
        spelled = [serve_sampling.spell(tokenizer, ids[:k], token) for k, token in enumerate(ids)]
        assert b"".join(spelling for _, spelling in spelled).decode() == " a€𝄞b"
        assert spelled[0][0] == " a" and spelled[-1] == ("b", b"b")
        assert (r"bytes:\xe2", b"\xe2") in spelled
        assert serve_sampling.spell(tokenizer, ids, tokenizer.eos_token_id) == ("</s>", None)

    def test_of_tokens_with_blanks_and_bytes(self):
        """As LLaMA's tokenizer writes them: ▁ for a blank, stripped at a beginning, and <0x..> for what has no token."""
        vocabulary = ["<unk>", "▁a", "b", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
        model = models.BPE({token: k for k, token in enumerate(vocabulary)}, [], byte_fallback=True, unk_token="<unk>")
        tokenizer = Tokenizer(model)
        replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", left=1)
        tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        names = ["▁a", "▁a", "<0xE2>", "<0x82>", "<0xAC>", "b", "<0xE2>", "é"]
        ids = tokenizer.convert_tokens_to_ids(names)
        spelled = [serve_sampling.spell(tokenizer, ids[:k], token) for k, token in enumerate(ids)]
        texts = ["a", " a", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "b", r"bytes:\xe2", "é"]
        assert [one for one, _ in spelled] == texts
        assert b"".join(spelling for _, spelling in spelled) == "a a€b".encode() + b"\xe2" + "é".encode()


def test_sampling_follows_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0, -torch.inf]]).repeat(40_000, 1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        asked = request(temperature=temperature, top_p=top_p)
        warpers = serve_sampling.make_warpers(asked, GenerationConfig(), scores.device)
        sampling = serve_sampling.Sampling(scores.device, warpers, seed=0)
        drawn = sampling(None, scores).argmax(-1).bincount(minlength=5) / len(scores)
        expected = (scores[0] / temperature).softmax(-1)
        kept = expected.cumsum(-1) - expected < top_p
        expected = torch.where(kept, expected, 0) / expected[kept].sum()
        torch.testing.assert_close(drawn, expected, atol=0.01, rtol=0)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet="ab", max_size=4)), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_before_a_stop_string_however_it_arrives(pieces, stop):
    whole = "".join(pieces)
    shown = "".join(serve_answers.cut_at_stop(iter(pieces), stop))
    assert whole.startswith(shown)
    assert not any(one in shown for one in stop)
    if len(stop) < 2:
        assert shown == (whole.split(stop[0])[0] if stop else whole)
    elif not any(one in whole for one in stop):
        assert shown == whole


WRONG = {
    "not JSON": (b'{"model": "tiny"', 400, None, "not valid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', 400, None, "not valid JSON"),
    "no object": (b"[]", 400, None, "Input should be an object"),
    "deeply nested": (b'{"model":' + b"[" * 100_000, 400, None, "not valid JSON"),
    "no model": ({"messages": [{"role": "user", "content": "a"}]}, 400, "model", "required"),
    "unknown model": (body(text(), model="gpt-4"), 404, "model", "use 'tiny'"),
    "no messages": ({"model": "tiny"}, 400, "messages", "required"),
    "empty messages": ({"model": "tiny", "messages": []}, 400, "messages", "at least 1"),
    "messages of text": ({"model": "tiny", "messages": "hi"}, 400, "messages", "array"),
    "role": (body(text(), role="tool"), 400, "messages[0].role", "'system', 'developer', 'user' or 'assistant'"),
    "unknown role": (body(text(), role="bot"), 400, "messages[0].role", "got 'bot'"),
    "assistant first": (body(text(), role="assistant"), 400, "messages[0]", "answers no message"),
    "system alone": (body(text(), role="system"), 400, "messages", "only system messages"),
    "picture of the assistant": (body(picture(b"x"), role="assistant"), 400, "messages[0]", "only the user brings pictures"),
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
    "empty picture": (body(picture(b"")), 400, "messages[0].content[0].image_url.url", "not a picture"),
    "half a picture": (
        body(picture(digit_image(0)), picture(encode(Image.effect_noise((64, 64), 50))[:900])),
        400,
        "messages[0].content[1].image_url.url",
        "broken picture",
    ),
    "PostScript": (
        body(picture(encode(digit_image(0), "EPS"))),
        400,
        "messages[0].content[0].image_url.url",
        "not a picture that can be read",
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
        assert server.service.taken == 0
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
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
            client.sendall(head.encode())
            client.settimeout(10)
            assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert strict.service.taken == 0

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
                (f"http://{allowed}/away", "fetches nothing from 'localhost'"),
                (f"http://{allowed}/loop", "redirected more than 3 times"),
                (f"http://{allowed}/missing.png", "404"),
                (f"http://{allowed}/large", "more than 100,000 bytes"),
                (f"http://{allowed}/slow", "no answer within 0.7 seconds|timed out"),
                (f"http://localhost:{host.server_port}/picture.png", "fetches nothing from 'localhost'"),
                (f"http://user:secret@{allowed}/picture.png", "fetches nothing from '127.0.0.1'"),
                ("http://127.0.0.1/picture.png", "fetches nothing from '127.0.0.1'"),
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
        wait_until(lambda: busy.service.taken == 0, seconds=4)
        assert busy.service.generated_tokens < 50
        assert busy.service.disconnects == 1 and busy.service.running == 0
        busy.slow.clear()
        assert busy.ask(text(), max_tokens=3).usage.completion_tokens == 3

    def test_a_client_that_leaves_the_queue(self, busy):
        answering = send_and_leave(busy, body(text(), max_tokens=500))
        wait_until(lambda: busy.service.running == 1)
        waiting = send_and_leave(busy, body(text("waiting"), max_tokens=500))
        wait_until(lambda: busy.service.taken == 2)
        assert busy.metrics()["visualchat_queue_length"] == 1 and busy.metrics()["visualchat_running"] == 1
        waiting.close()
        wait_until(lambda: busy.service.taken == 1, seconds=4)
        assert busy.service.running == 1
        answering.close()
        wait_until(lambda: busy.service.taken == 0, seconds=4)

    def test_when_it_is_full_others_are_sent_away(self, busy):
        leaving = [send_and_leave(busy, body(text(), max_tokens=500)) for _ in range(2)]
        wait_until(lambda: busy.service.taken == 2)
        status, headers, answer = busy.post(body(text()))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer["error"]["code"] == "server_overloaded" and "All 2 places are taken" in answer["error"]["message"]
        assert busy.post(body(text("a" * 5_000_000)))[0] == 503
        assert json.loads(busy.get("/health")) == {"status": "ok"}
        for one in leaving:
            one.close()
        wait_until(lambda: busy.service.taken == 0, seconds=4)
        assert busy.post(body(text()))[0] == 200

    def test_the_server_stops_while_it_answers(self, busy):
        with send_and_leave(busy, body(text(), max_tokens=500, stream=True)) as client:
            wait_until(lambda: busy.service.running == 1)
            busy.server.should_exit = True
            busy.thread.join(5)
            assert not busy.thread.is_alive() and busy.service.generated_tokens < 400
            client.settimeout(5)
            assert b"data: " in client.recv(10_000)


def test_metrics():
    with Server(Limits(images=2)) as server:
        server.ask(*[picture(digit_image(k)) for k in (1, 2)], text(), max_tokens=5)
        server.ask(picture(digit_image(1)), text(), max_tokens=5)
        server.post(b"{")
        server.post(body(text(), model="x"))
        server.store.max_bytes = server.store.nbytes
        server.ask(picture(digit_image(3)), text(), max_tokens=5)
        metrics = server.metrics()
        assert server.get("/metrics").startswith("# HELP visualchat_requests_total")
        expected = {
            'requests_total{status="200"}': 3,
            'requests_total{status="400"}': 1,
            'requests_total{status="404"}': 1,
            "generated_tokens_total": 15,
            "image_memory_hits_total": 1,
            "image_memory_misses_total": 3,
            "image_memory_evictions_total": 1,
            "image_memory_bytes": server.store.nbytes,
            "disconnects_total": 0,
            "queue_length": 0,
            "running": 0,
        }
        assert {name: metrics[f"visualchat_{name}"] for name in expected} == expected
        assert 0 < metrics["visualchat_tokens_per_second"] <= 1.5
        assert metrics["process_resident_memory_bytes"] > 1e7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(image_number_keys=True).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def test_the_script_under_load(folder):
    """The command line, in a process of its own: 60 requests by 8 clients. The benchmark sends 500."""
    results = serve_load.measure_load(folder, count=60, clients=8, broken=0.15)
    assert [result["claim"][:2] for result in results] == ["51", "9 ", "th"]
    assert results[0]["image_memory"]["hits"] > 0


def test_arguments_reach_the_server(folder, tmp_path, monkeypatch):
    built, run = [], []
    monkeypatch.setattr(serve, "build_app", lambda *arguments: built.extend(arguments))
    monkeypatch.setattr(serve.uvicorn, "run", lambda app, **settings: run.append(settings))
    serve.main([folder])
    service, name, limits = built
    assert (name, limits, service.places) == (folder, Limits(images=12), 33)
    assert run[0]["host"] == "127.0.0.1" and run[0]["port"] == 8000
    built.clear()
    arguments = "--model-name m --host ::1 --port 7 --dtype bfloat16 --concurrency 2 --queue 3 --image-memory-gb 0.5"
    arguments += f" --image-memory-folder {tmp_path}/memory --allow-host A.org --allow-host b.org:81 --max-body-mb 1"
    arguments += " --max-images 3 --max-choices 4 --max-image-mb 0.5 --max-image-megapixels 2 --max-new-tokens 9"
    serve.main([folder, *arguments.split()])
    service, name, limits = built
    assert (name, service.places, service.model.dtype) == ("m", 5, torch.bfloat16)
    assert (service.store.max_bytes, service.store.folder) == (2**29, f"{tmp_path}/memory")
    hosts = frozenset({"a.org", "b.org:81"})
    expected = Limits(1_000_000, images=3, choices=4, image_bytes=500_000, image_pixels=2_000_000, new_tokens=9, hosts=hosts)
    assert limits == expected
    assert run[1]["host"] == "::1" and run[1]["port"] == 7


def test_help_and_wrong_arguments(capsys, tmp_path):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--allow-host", "--image-memory-gb", "--queue", "--max-image-megapixels"))
    for arguments, message in (
        ([], "model"),
        (["x", "--concurrency", "0"], "expected 1"),
        (["x", "--queue", "-"], "expected 0"),
    ):
        with pytest.raises(SystemExit):
            serve.main(arguments)
        assert message in capsys.readouterr().err
    make_model().model.language_model.config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is not a VisualChat model"):
        serve.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="cannot load"):
        serve.main([str(tmp_path / "nothing")])
