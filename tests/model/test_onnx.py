"""A prefill with pictures as an ONNX graph, run by onnxruntime."""

import numpy as np
import onnxruntime
import pytest
import torch

from helpers.tiny import IMAGE_SIZE, make_inputs, make_model


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs, use_cache=False).logits


def export(model, inputs, path, **settings):
    with torch.no_grad():
        program = torch.onnx.export(Logits(model).eval(), kwargs=inputs, dynamo=True, verbose=False, **settings)
    program.save(path)
    session = onnxruntime.InferenceSession(path)

    def run(inputs) -> torch.Tensor:
        given = {name: value.numpy() for name, value in inputs.items()}
        [logits] = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
        return torch.from_numpy(np.asarray(logits))

    return run


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_logits(run, model, inputs):
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(run(inputs)[kept], logits_of(model, inputs)[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_other_parts_and_learned_numbers(tmp_path):
    """DINOv2 interpolates its positions to the size of the images."""
    tower = {"tower": "dinov2", "vision": {"num_hidden_layers": 1, "image_size": 40}, "image_size": IMAGE_SIZE}
    numbers = {"multimodal_attention": "mmca_merged", "learned_image_numbers": 4, "image_prefix_ids": [5, 7]}
    model = make_model(decoder="qwen3", text={"num_hidden_layers": 2}, **tower, **numbers).requires_grad_(False)
    inputs = make_inputs(["titit", "tiitt"], model)
    run = export(model, inputs, tmp_path / "model.onnx")
    assert_same_logits(run, model, make_inputs(["ttiti", "itiss"], model, seed=1, padding_side="right"))


@pytest.mark.parametrize(
    ("variant", "numbered", "implementation", "projector", "prefix"),
    [
        ("mmca", True, "sdpa", "linear", None),
        pytest.param("mmca", True, "eager", "linear", [5, 7], marks=pytest.mark.slow),
        pytest.param("mmca_merged", False, "sdpa", "vit", [5, 7], marks=pytest.mark.slow),
        pytest.param("causal", True, "sdpa", "perceiver", None, marks=pytest.mark.slow),
        pytest.param("cross", True, "sdpa", "linear", None, marks=pytest.mark.slow),
        pytest.param("mmca_released", False, "sdpa", "perceiver_released", None, marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_models(variant, numbered, implementation, projector, prefix, tmp_path):
    sizes = {"text": {"num_hidden_layers": 2}, "vision": {"num_hidden_layers": 1}, "num_query_tokens": 4}
    settings = {"multimodal_attention": variant, "image_number_keys": numbered, "projector": projector}
    settings["image_prefix_ids"] = prefix
    model = make_model(implementation, **settings, **sizes).requires_grad_(False)
    inputs = make_inputs(["titit", "tiitt"], model)
    run = export(model, inputs, tmp_path / "model.onnx")
    assert_same_logits(run, model, inputs)
    # The graph holds none of it: other rows of the same shape
    assert_same_logits(run, model, make_inputs(["ttiti", "itiss"], model, seed=1, padding_side="right"))
