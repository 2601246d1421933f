"""What needs a GPU: the fast path, every kind of cache, and what is compiled there, against `eager` on the same GPU."""

import copy

import pytest
import torch

from helpers.tiny import make_inputs, make_model
from modeling_visualchat import modality_kernels_visualchat


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYOUTS = {
    "first": ["iss"],
    "last": ["tti"],
    "adjacent": ["tiit"],
    "none": ["tts"],
    "all": ["ii"],
    "unequal rows": ["titit", "ts", "iit"],
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def make_pair(variant="mmca", dtype=torch.float32, attention="sdpa", **text):
    pair = [
        make_model(
            {"text_config": decoder, "vision_config": "sdpa"},
            multimodal_attention=variant,
            image_number_keys=True,
            text=text,
        )
        for decoder in (attention, "eager")
    ]
    pair[1].load_state_dict(pair[0].state_dict())
    return [model.to("cuda", dtype) for model in pair]


def to_gpu(inputs, dtype=torch.float32):
    return {name: value.to("cuda", dtype if value.is_floating_point() else None) for name, value in inputs.items()}


@pytest.fixture
def in_blocks(monkeypatch):
    """Flex attention for the little that a tiny model computes."""
    monkeypatch.setattr(modality_kernels_visualchat, "MIN_FLEX_QUERIES", 2)
    monkeypatch.setattr(modality_kernels_visualchat, "MIN_FLEX_SCORES", 1)


def assert_logits_and_gradients_equal(pair, layout, side, compiled=None):
    inputs = to_gpu(make_inputs(layout, pair[0], padding_side=side))
    kept = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~kept, -100)
    labels[:, 1:][~kept[:, :-1]] = -100
    results = []
    for model, forward in zip(pair, (pair[0] if compiled is None else compiled, pair[1])):
        model.train()
        outputs = forward(**inputs, labels=labels, use_cache=False)
        outputs.loss.backward()
        results.append((outputs.logits[kept], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for name, expected in their_gradients.items():
        ours = our_gradients.get(name, torch.zeros_like(expected))
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradients_equal_eager(variant, layout, side):
    assert_logits_and_gradients_equal(make_pair(variant), layout, side)


@pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
@pytest.mark.parametrize("layout", ["last", "adjacent", "unequal rows"])
def test_flex_attention_equals_eager(in_blocks, variant, layout):
    assert_logits_and_gradients_equal(make_pair(variant, attention="flex_attention"), LAYOUTS[layout], "left")


@pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_compiled_training_step_equals_eager(in_blocks, variant, attention):
    pair = make_pair(variant, attention=attention)
    compiled = torch.compile(pair[0], fullgraph=True)
    assert_logits_and_gradients_equal(pair, LAYOUTS["unequal rows"], "left", compiled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
def test_half_precision_is_near(variant, dtype):
    inputs = to_gpu(make_inputs(["titit", "ts"], pair := make_pair(variant)[0]))
    with torch.no_grad():
        kept = inputs["attention_mask"].bool()
        exact = pair(**inputs).logits[kept]
        half = make_pair(variant, dtype)[0]
        logits = half(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}).logits[kept]
    assert (logits - exact).norm() / exact.norm() < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "offloaded_static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_every_cache_and_decoding_mode_answers_as_eager_does(variant, options):
    fast, eager = make_pair(variant)
    reference = {name: value for name, value in options.items() if name == "num_beams"}
    layouts = [["titit"]] if "prompt_lookup_num_tokens" in options else [["titit"], ["titit", "ts", "iit"], ["tts"]]
    for layout in layouts:
        inputs = to_gpu(make_inputs(layout, fast))
        expected = eager.generate(**copy.deepcopy(inputs), **GREEDY, **reference)
        assert torch.equal(fast.generate(**copy.deepcopy(inputs), **GREEDY, **options), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_flex_attention_answers_as_eager_does(in_blocks, options):
    fast, eager = make_pair(attention="flex_attention")
    inputs = to_gpu(make_inputs(["titit", "ts", "iit"], fast))
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    expected = eager.generate(**copy.deepcopy(inputs), **GREEDY, **beams)
    assert torch.equal(fast.generate(**copy.deepcopy(inputs), **GREEDY, **options, disable_compile=True), expected)


@pytest.mark.parametrize(
    "variant, layout", [("mmca", ["titit"]), ("mmca", ["titit", "ts", "iit"]), ("mmca_merged", ["titit"])], ids=str
)
def test_compiled_decoding_from_a_static_cache_answers_as_eager_does(variant, layout):
    """As `generate` compiles it on a GPU: inductor's kernels in CUDA graphs."""
    fast, eager = make_pair(variant)
    for seed in (0, 1):  # the second conversation is answered by the graph of the first
        inputs = to_gpu(make_inputs(layout, fast, seed))
        expected = eager.generate(**copy.deepcopy(inputs), **GREEDY)
        assert torch.equal(fast.generate(**copy.deepcopy(inputs), **GREEDY, cache_implementation="static"), expected)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "offloaded"}, {"cache_implementation": "static"}], ids=str)
def test_image_memory_gives_the_answers_of_pictures(options):
    model = make_pair()[0]
    inputs = to_gpu(make_inputs(["titit", "iit"], model))
    expected = model.generate(**inputs, **GREEDY)
    memory = model.encode_images(inputs.pop("pixel_values"))
    for known in (memory, memory.to("cpu").to("cuda")):
        tokens = model.generate(**inputs, image_memory=known, **GREEDY, **options, disable_compile=True)
        assert torch.equal(tokens, expected)
