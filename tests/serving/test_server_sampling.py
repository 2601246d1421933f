"""The server: how answers are sampled, spelled and cut."""

import json
import re

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from helpers.server import body, text
from helpers.tiny import make_model, make_processor
from visualchat.cli import main as visualchat
from visualchat.serving import sampling
from visualchat.serving.choices import cut_at_stop
from visualchat.serving.limits import Limits
from visualchat.serving.requests import ChatRequest, parse_request


def request(**fields):
    return parse_request(json.dumps(body(text(), **fields)).encode(), Limits())


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
            warpers = sampling.make_warpers(asked, server.model.generation_config, output.scores[0].device)
            return sampling.LogitsProcessorList(warpers)(inputs["input_ids"], allowed)

        inputs = server.processor.tokenizer("What is this?", return_tensors="pt")
        configure(do_sample=True, **settings)
        output = server.model.generate(
            **inputs, max_new_tokens=1, output_scores=True, output_logits=True, return_dict_in_generate=True
        )
        allowed = output.logits[0].clone()
        allowed[:, server.processor.image_token_id] = -torch.inf
        torch.testing.assert_close(narrow(request()), output.scores[0])
        named = {name: settings[name] for name in settings if name in ChatRequest.model_fields}
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

    def test_beam_search_is_refused_at_the_start(self, tmp_path, capsys):
        model = make_model()
        model.generation_config.num_beams = 3
        model.save_pretrained(tmp_path)
        make_processor().save_pretrained(tmp_path)
        assert visualchat(["serve", str(tmp_path)]) == 2
        assert re.search(r"num_beams=3.*set num_beams to 1", capsys.readouterr().err)


class TestSpelling:
    def test_of_byte_level_tokens(self):
        tokenizer = make_processor().tokenizer
        ids = tokenizer(" a€𝄞b", add_special_tokens=False)["input_ids"]
        spelled = [sampling.decode_token(tokenizer, ids[:k], token) for k, token in enumerate(ids)]
        assert b"".join(spelling for _, spelling in spelled).decode() == " a€𝄞b"
        assert spelled[0][0] == " a" and spelled[-1] == ("b", b"b")
        assert (r"bytes:\xe2", b"\xe2") in spelled
        assert sampling.decode_token(tokenizer, ids, tokenizer.eos_token_id) == ("</s>", None)

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
        spelled = [sampling.decode_token(tokenizer, ids[:k], token) for k, token in enumerate(ids)]
        texts = ["a", " a", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "b", r"bytes:\xe2", "é"]
        assert [one for one, _ in spelled] == texts
        assert b"".join(spelling for _, spelling in spelled) == "a a€b".encode() + b"\xe2" + "é".encode()


def test_sampling_follows_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.5, -1.0, -torch.inf]]).repeat(40_000, 1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        asked = request(temperature=temperature, top_p=top_p)
        warpers = sampling.make_warpers(asked, GenerationConfig(), scores.device)
        sampler = sampling.SamplingProcessor(scores.device, warpers, seed=0)
        drawn = sampler(None, scores).argmax(-1).bincount(minlength=5) / len(scores)
        expected = (scores[0] / temperature).softmax(-1)
        kept = expected.cumsum(-1) - expected < top_p
        expected = torch.where(kept, expected, 0) / expected[kept].sum()
        torch.testing.assert_close(drawn, expected, atol=0.01, rtol=0)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet="ab", max_size=4)), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_before_a_stop_string_however_it_arrives(pieces, stop):
    whole = "".join(pieces)
    shown = "".join(cut_at_stop(iter(pieces), stop))
    assert whole.startswith(shown)
    assert not any(one in shown for one in stop)
    if len(stop) < 2:
        assert shown == (whole.split(stop[0])[0] if stop else whole)
    elif not any(one in whole for one in stop):
        assert shown == whole
