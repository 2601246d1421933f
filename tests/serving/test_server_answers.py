"""The server, over real sockets: right answers."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from helpers.server import PATH, Server, body, curl, data_url, encode, picture, read_stream, text
from helpers.tiny import TOKENS_PER_IMAGE, digit_image


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
        assert json.loads(server.get("/nowhere"))["error"]["message"].startswith(
            "GET /nowhere: Not Found. This server has POST"
        )

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
