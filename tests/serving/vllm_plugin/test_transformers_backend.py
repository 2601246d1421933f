"""vLLM's Transformers backend serves `causal` with the tokens of `model.generate`; the rest is refused."""

import json
from pathlib import Path

import pytest
import torch


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from helpers.transformers_backend import FLAGS, answer_with_backend
from helpers.vllm_engine import NEW_TOKENS, answer_with_transformers, list_conversations, save_model, with_data_urls


pytestmark = pytest.mark.vllm
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 16,
    "limit_mm_per_prompt": {"image": 8},
    "seed": 0,
}
MODELS = {
    "llama-compiled": {},
    "qwen3": {"decoder": "qwen3", "tower": "siglip", "projector": "mlp", "vision_feature_layer": -2},
    "mistral": {"decoder": "mistral", "tower": "dinov2_with_registers", "projector": "pooled"},
    "qwen2": {"decoder": "qwen2", "projector": "perceiver"},
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_equal_those_of_generate(name, tmp_path):
    """Of several conversations at once, whose prompts, and the images in them, are cut into chunks of 16 tokens."""
    placeholder = save_model(tmp_path, multimodal_attention="causal", **MODELS[name]).image_token_id
    conversations = list_conversations()
    expected = answer_with_transformers(tmp_path, conversations)
    prompts, is_eager = [with_data_urls(one) for one in conversations], not name.endswith("-compiled")
    given = answer_with_backend(tmp_path, prompts, NEW_TOKENS, placeholder, **ENGINE, enforce_eager=is_eager)
    assert [one["tokens"] for one in given] == [one.tokens for one in expected]
    for one, other in zip(given, expected):
        torch.testing.assert_close(torch.tensor(one["logprobs"]), other.logprobs, atol=1e-3, rtol=0)


def test_the_document_has_these_flags():
    document = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    overrides = json.dumps(FLAGS["hf_overrides"])
    assert f"--model-impl {FLAGS['model_impl']} --trust-remote-code \\\n  --hf-overrides '{overrides}'" in document


def test_what_it_would_compute_wrong_is_refused(tmp_path):
    placeholder = save_model(tmp_path, multimodal_attention="mmca").image_token_id
    with pytest.raises(RuntimeError, match=r"attn_implementation='vllm'.* install the package visualchat"):
        answer_with_backend(tmp_path, [[{"role": "user", "content": "Who?"}]], 1, placeholder, **ENGINE, enforce_eager=True)
