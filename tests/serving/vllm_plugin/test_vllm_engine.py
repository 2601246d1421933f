"""vLLM with the plugin gives the tokens of `model.generate`, for each attention, decoder, tower and projector."""

import os
from pathlib import Path

import pytest
import torch


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from peft import LoraConfig, get_peft_model
from vllm.exceptions import VLLMValidationError
from vllm.lora.ops.torch_ops import bgmv_expand
from vllm.lora.request import LoRARequest

from helpers.tiny import TOKENS_PER_IMAGE, assistant, digit_image, user
from helpers.vllm_engine import (
    answer_with_transformers,
    answer_with_vllm,
    list_conversations,
    save_model,
    start_engine,
)
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor


pytestmark = pytest.mark.vllm
MODELS = {
    "causal": {"multimodal_attention": "causal"},
    "causal-numbered": {"multimodal_attention": "causal", "image_number_keys": True},
    "mmca": {"multimodal_attention": "mmca"},
    "mmca-numbered": {"multimodal_attention": "mmca", "image_number_keys": True, "decoder": "qwen3", "tower": "siglip"},
    "merged": {"multimodal_attention": "mmca_merged", "decoder": "mistral", "projector": "mlp", "vision_feature_layer": -2},
    "merged-numbered": {"multimodal_attention": "mmca_merged", "image_number_keys": True, "projector": "perceiver"},
    "merged-learned-prefix": {
        "multimodal_attention": "mmca_merged",
        "learned_image_numbers": 8,
        "image_prefix_ids": [5, 9, 17, 40],
        "tower": "dinov2_with_registers",
        "projector": "pooled",
        "decoder": "qwen3",
    },
    "mmca-learned-prefix": {
        "multimodal_attention": "mmca",
        "learned_image_numbers": 8,
        "image_prefix_ids": [5, 9, 17],
        "projector": "pixel_shuffle",
        "decoder": "qwen2",
        "tower": "dinov3_vit",
        "text": {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64, "head_dim": None},
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_equal_those_of_generate(name, tmp_path):
    save_model(tmp_path, **MODELS[name])
    conversations = list_conversations()
    expected = answer_with_transformers(tmp_path, conversations)
    given = answer_with_vllm(start_engine(tmp_path), conversations)
    assert [one.tokens for one in given] == [one.tokens for one in expected]
    for one, other in zip(given, expected):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-3, rtol=0)


def test_cached_prefixes_and_graphs_change_nothing(tmp_path):
    """A question that goes on from cached blocks, which end within an image, in a compiled model."""
    save_model(tmp_path, multimodal_attention="mmca", image_number_keys=True)
    engine = start_engine(
        tmp_path, enforce_eager=False, block_size=32, enable_prefix_caching=True, max_num_batched_tokens=64
    )
    images = [digit_image(index) for index in range(8)]
    rounds = [user("describe these images", *images), assistant("eight cats"), user("what is image 7?")]
    conversations = [rounds[:1], rounds, rounds, [*rounds, assistant("a cat"), user("and image 8?")]]
    assert 8 * TOKENS_PER_IMAGE > 32
    expected = answer_with_transformers(tmp_path, conversations)
    for conversation, one in zip(conversations, expected):
        (given,) = answer_with_vllm(engine, [conversation])
        assert given.tokens == one.tokens
    hits = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:prefix_cache_hits"]
    assert sum(hits) >= 32


needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each process is bound to a core of its own")


@needs_two_cores
@pytest.mark.parametrize("name", ["mmca-numbered", "merged-learned-prefix"])
def test_two_processes_share_the_heads(name, tmp_path, monkeypatch):
    """Tensor parallelism. Each process computes the keys of the numbers, and the prefix, for its own heads."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    save_model(tmp_path, **MODELS[name])
    conversations = list_conversations()
    expected = answer_with_transformers(tmp_path, conversations)
    given = answer_with_vllm(start_engine(tmp_path, tensor_parallel_size=2), conversations)
    assert [one.tokens for one in given] == [one.tokens for one in expected]
    for one, other in zip(given, expected):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-3, rtol=0)


ADAPTED = {
    "merged": {"multimodal_attention": "mmca_merged", "projector": "mlp"},
    "mmca-numbered": MODELS["mmca-numbered"],
    "causal-numbered-biased": {**MODELS["causal-numbered"], "decoder": "qwen2", "image_number_key_bias": True},
    "merged-learned-prefix": MODELS["merged-learned-prefix"],
    "mmca-learned-prefix": MODELS["mmca-learned-prefix"],
}
PROJECTIONS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def save_adapter(base: Path, folder: Path, seed: int, targets: str = PROJECTIONS) -> None:
    """A random adapter, and the model with it as `folder / "merged"`."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(VisualChatForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder / "merged")
    VisualChatProcessor.from_pretrained(base).save_pretrained(folder / "merged")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ADAPTED),
        ("merged-learned-prefix", {"enforce_eager": False}),
        pytest.param("mmca-learned-prefix", {"tensor_parallel_size": 2}, marks=needs_two_cores),
    ],
)
def test_lora_adapters(name, options, tmp_path, monkeypatch):
    """The base model and three adapters, of which two fit at a time, in one engine, and two in one batch."""
    base, folders = tmp_path / "base", [tmp_path / f"adapter-{number}" for number in range(3)]
    save_model(base, **ADAPTED[name])
    conversations = list_conversations()[1:9]
    expected = [answer_with_transformers(base, conversations)]
    for seed, folder in enumerate(folders):
        save_adapter(base, folder, seed)
        expected.append(answer_with_transformers(folder / "merged", conversations))
    if "tensor_parallel_size" in options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    engine = start_engine(base, enable_lora=True, max_loras=2, max_lora_rank=8, **options)
    adapters = [None, *(LoRARequest(folder.name, k + 1, str(folder)) for k, folder in enumerate(folders))]
    # Not the base model: vLLM's operations for CPUs give its rows the last adapter, where others of the batch have one
    mixed = [1 + k % 2 for k in range(len(conversations))]
    given = answer_with_vllm(engine, conversations, lora_request=[adapters[k] for k in mixed])
    assert [one.tokens for one in given] == [expected[k][number].tokens for number, k in enumerate(mixed)]
    for adapter, of_adapter in zip([*adapters, adapters[1]], [*expected, expected[1]]):
        given = answer_with_vllm(engine, conversations, lora_request=adapter)
        assert [one.tokens for one in given] == [one.tokens for one in of_adapter]
        for one, other in zip(given, of_adapter):
            torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-3, rtol=0)
    assert len({tuple(one[1].tokens) for one in expected}) > 1


def test_vllm_still_gives_rows_without_an_adapter_the_last_one():
    """docs/serving.md warns of it. When this fails, vLLM has mended it, and the warning has to go."""
    weights, output = torch.tensor([[[1.0]], [[2.0]]]), torch.zeros(1, 1)
    bgmv_expand(torch.ones(1, 1), weights, output, torch.tensor([-1]))
    assert output.item() == 2.0


class TestRefusals:
    def test_a_placeholder_in_a_text(self, tmp_path):
        save_model(tmp_path, multimodal_attention="mmca_merged")
        engine = start_engine(tmp_path)
        with pytest.raises(ValueError, match="2 placeholders <image> for 1 images"):
            answer_with_vllm(engine, [[user("what is <image>?", digit_image(0))]])

    def test_more_images_than_numbers(self, tmp_path):
        save_model(tmp_path, multimodal_attention="mmca_merged", learned_image_numbers=2)
        engine = start_engine(tmp_path, limit_mm_per_prompt={"image": 2})
        with pytest.raises(VLLMValidationError, match="At most 2 image"):
            answer_with_vllm(engine, [[user("what?", *map(digit_image, range(3)))]])

    def test_an_adapter_of_the_embeddings_that_number_images(self, tmp_path, capfd):
        save_model(tmp_path / "base", multimodal_attention="mmca", image_number_keys=True)
        save_adapter(tmp_path / "base", tmp_path / "adapter", 0, r"model\.language_model\.embed_tokens")
        engine = start_engine(tmp_path / "base", enable_lora=True, max_lora_rank=8)
        with pytest.raises(Exception):  # noqa: B017, as below
            answer_with_vllm(engine, list_conversations()[:1], lora_request=LoRARequest("a", 1, str(tmp_path / "adapter")))
        assert "embed_tokens']. Please verify" in "".join(capfd.readouterr())

    @pytest.mark.parametrize(
        ("config", "options", "reason"),
        [
            ({"multimodal_attention": "mmca_released"}, {}, "serve it with `visualchat serve`"),
            ({"multimodal_attention": "cross"}, {}, "this model has 'cross': serve it with `visualchat serve`"),
            (
                {"multimodal_attention": "mmca_merged", "image_prefix_ids": list(range(5, 25))},
                {"enable_lora": True},
                "must be at least 20",
            ),
        ],
    )
    def test_models_that_are_not_served(self, config, options, reason, tmp_path, capfd):
        save_model(tmp_path, **config)
        with pytest.raises(Exception):  # noqa: B017, vLLM's engine process dies of it, and says why
            start_engine(tmp_path, **options)
        assert reason in "".join(capfd.readouterr())
