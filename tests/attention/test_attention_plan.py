"""What a plan of the attention promises, whichever it is."""

import threading

import pytest
import torch

from helpers.tiny import make_inputs, make_model
from modeling_visualchat import modality_kernels_visualchat


@pytest.mark.parametrize(
    "variant, attention, prefix",
    [
        ("mmca", "eager", None),
        ("mmca", "sdpa", None),
        ("mmca", "sdpa", [5, 7]),
        ("mmca_merged", "eager", [5, 7]),
        ("causal", "sdpa", None),
        ("mmca_released", "eager", None),
    ],
)
def test_a_plan_that_is_moved_computes_the_same(variant, attention, prefix):
    """As accelerate does where layers are spread over devices."""
    settings = {"multimodal_attention": variant, "image_prefix_ids": prefix}
    model = make_model({"text_config": attention, "vision_config": "sdpa"}, **settings)
    inputs = make_inputs(["titit", "ts"], model)
    moved = []

    def move(module, args, kwargs):
        plan = kwargs["plan"]
        assert plan.to(None) is plan and plan.to("cpu") is plan
        on_meta = plan.to("meta")
        assert on_meta.device.type == "meta" and plan.device.type == "cpu"
        assert not [name for name, value in vars(on_meta).items() if isinstance(value, torch.Tensor) and not value.is_meta]
        moved.append(plan.move_to(torch.device("cpu")))
        return args, {**kwargs, "plan": moved[-1]}

    with torch.no_grad():
        expected = model(**inputs).logits
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(move, with_kwargs=True)
        assert torch.equal(model(**inputs).logits, expected)
    assert len(moved) == len(model.model.language_model.layers)


def test_cudnn_is_let_in_again_by_the_last_thread():
    """Threads of a server share the switch: none of them may let it in while another computes."""
    cuda = torch.backends.cuda
    entered, left, seen = threading.Event(), threading.Event(), []

    def compute():
        with modality_kernels_visualchat.without_cudnn():
            entered.set()
            left.wait(10)
            seen.append(cuda.cudnn_sdp_enabled())

    thread = threading.Thread(target=compute)
    with modality_kernels_visualchat.without_cudnn():
        thread.start()
        assert entered.wait(10)
    assert not cuda.cudnn_sdp_enabled()
    left.set()
    thread.join()
    assert seen == [False] and cuda.cudnn_sdp_enabled()
