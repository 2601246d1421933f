"""What computes the attention by modality on a GPU: masked calls and flex attention, on the CPU as far as they run there.

This file alone of the attention's tests replaces private functions, since the compiled kernel trains on a GPU only.
"""

import copy
import functools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from helpers.modality import DOUBLE, EDGES, Conversations, assert_equal_where_kept, drawn, forward, make_pair
from helpers.tiny import make_inputs, make_model
from modeling_visualchat import (
    decoder_visualchat,
    modality_attention_visualchat,
    modality_kernels_visualchat,
)


def compute_all_by_flex(monkeypatch):
    """On a CPU too, and however few the queries."""
    monkeypatch.setattr(decoder_visualchat, "computes_by_flex", lambda device: True)
    monkeypatch.setattr(modality_kernels_visualchat, "MIN_FLEX_QUERIES", 2)
    monkeypatch.setattr(modality_kernels_visualchat, "MIN_FLEX_SCORES", 1)


@pytest.fixture(params=["sdpa", "flex_attention"])
def on_a_gpu(request, monkeypatch):
    """What a GPU computes: a masked call for every few queries, or one by flex attention, whose masks are here applied."""
    monkeypatch.setattr(modality_kernels_visualchat, "runs_by_images", lambda device: False)
    monkeypatch.setattr(modality_kernels_visualchat, "QUERIES_PER_CALL", 3)
    if request.param == "flex_attention":
        compute_all_by_flex(monkeypatch)
        monkeypatch.setattr(modality_kernels_visualchat, "_flex", apply_block_mask)
    return request.param


def apply_block_mask(query, key, value, block_mask, **settings):
    assert block_mask.shape == (len(query), 1, query.shape[2], key.shape[2])
    visible = create_mask(block_mask.mask_mod, len(query), 1, query.shape[2], key.shape[2], query.device)
    sees = visible.any(-1, keepdim=True)
    return scaled_dot_product_attention(query, key, value, visible | ~sees, **settings) * sees


class TestMaskedCalls:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("layout", [*EDGES, ["ttititst"], ["titsit", "ttt", "iitti"]], ids=str)
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_logits_and_gradients_equal_eager(self, on_a_gpu, variant, layout, side):
        pair = make_pair(variant, dtype=DOUBLE, trains=True, attention=on_a_gpu)
        inputs = make_inputs(layout, pair[0], padding_side=side)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100
        outputs, gradients = [], []
        for model in pair:
            model.zero_grad()
            outputs.append(model(**inputs, labels=labels))
            if outputs[-1].loss.isfinite():  # not where nothing is learned
                outputs[-1].loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert_equal_where_kept(outputs[0].logits, outputs[1].logits, inputs)
        for name, expected in gradients[1].items():
            ours = gradients[0].get(name, torch.zeros_like(expected))
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4, msg=name)

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_rounds_equal_a_run_from_scratch(self, on_a_gpu, variant):
        conversations = Conversations(*make_pair(variant, attention=on_a_gpu), 2)
        for layout in (["titt", "s"], ["", "itst"], ["t", "t"], ["iitst", "ts"]):
            conversations.say(layout)


class TestFlexAttention:
    @drawn(max_examples=40)
    @given(data=st.data(), batch_size=st.integers(1, 3), images=st.integers(1, 4), in_one_sequence=st.booleans())
    def test_a_block_is_computed_if_it_holds_something_and_without_a_mask_if_all_of_it_is_seen(
        self, data, batch_size, images, in_one_sequence
    ):
        """Compared with the masks of torch, which looks at each key of each query."""
        rows = []
        for _ in range(batch_size):
            texts = [data.draw(st.integers(0, 200)) for _ in range(images + 1)]
            tokens = [False] * texts[0] + [token for text in texts[1:] for token in [True] * 150 + [False] * text]
            rows.append(torch.tensor(tokens))
        is_image = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        kept = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        places = torch.arange(is_image.shape[1]).expand(batch_size, -1)
        keys, last = places.masked_fill(~is_image, -1), places.masked_fill(~kept | is_image, -1)
        first = torch.zeros_like(last)
        if in_one_sequence:
            first = (torch.arange(batch_size) * places.shape[1])[:, None].expand_as(last)
            keys, last = (torch.where(part < 0, -1, part + first).reshape(1, -1) for part in (keys, last))
            first = first.reshape(1, -1)
        mask = modality_kernels_visualchat.make_block_mask(keys, first, last)
        exact = create_block_mask(mask.mask_mod, len(keys), None, last.shape[1], keys.shape[1], device="cpu")
        assert (mask.shape, mask.BLOCK_SIZE) == (exact.shape, exact.BLOCK_SIZE)
        assert torch.equal(mask.full_kv_num_blocks, exact.full_kv_num_blocks)
        held, computed = (one.to_dense() != 0 for one in (exact, mask))
        assert computed[held].all()
        of_blocks = create_mask(mask.mask_mod, len(keys), 1, last.shape[1], keys.shape[1], "cpu")
        for row, query, key in zip(*torch.where(_full_blocks(mask))):
            block = of_blocks[row, 0, 128 * query : 128 * (query + 1), 128 * key : 128 * (key + 1)]
            assert block.shape == (128, 128) and block.all()

    def test_the_kernel_itself_equals_eager(self, monkeypatch):
        """As compiled for a CPU, which has no backward pass of it: training is tested on a GPU."""
        compute_all_by_flex(monkeypatch)
        calls, attend = [], modality_kernels_visualchat._flex
        monkeypatch.setattr(
            modality_kernels_visualchat, "_flex", lambda *args, **kwargs: calls.append(args) or attend(*args, **kwargs)
        )
        flex, eager = make_pair(attention="flex_attention")
        inputs = make_inputs(["titit", "ts", "iit"], flex)
        assert_equal_where_kept(forward(flex, inputs).logits, forward(eager, inputs).logits, inputs)
        assert len(calls) > 0

    def test_on_a_cpu_it_trains_and_decodes_as_sdpa_does(self):
        flex, eager = make_pair(trains=True, attention="flex_attention")
        inputs = make_inputs(["titit", "ts"], flex, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        losses = [model(**inputs, labels=labels).loss for model in (flex, eager)]
        torch.testing.assert_close(*losses)
        losses[0].backward()
        greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        flex, eager = (copy.deepcopy(model).eval() for model in (flex, eager))
        for layout in (["titit", "ts"], ["tst", "tt"]):
            for cache in ({}, {"cache_implementation": "static"}):
                inputs = make_inputs(layout, flex)
                assert torch.equal(flex.generate(**inputs, **greedy, **cache), eager.generate(**inputs, **greedy))

    def test_text_alone_is_left_to_sdpa_and_gives_the_numbers_a_gradient(self, on_a_gpu):
        """Each process of a distributed run has gradients of the same weights, whatever its batch holds."""
        flex, eager = make_pair(trains=True, attention="flex_attention")
        inputs = make_inputs(["tst", "tt"], flex, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        results = []
        for model in (flex, eager):
            model.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)

    def test_it_computes_what_is_large_enough(self, monkeypatch):
        def takes_blocks(images, text_tokens, batch_size=1):
            is_image = torch.tensor([([True] * 257 + [False] * text_tokens) * images]).expand(batch_size, -1)
            rotary = (torch.ones(1, is_image.shape[1], 2),) * 2
            layout = modality_attention_visualchat.ModalityPlan(is_image, None, rotary, is_image.shape, 257, uses_flex=True)
            return isinstance(layout.image_calls[0][1][0].mask, BlockMask)

        assert not takes_blocks(8, 32) and takes_blocks(8, 32, batch_size=4) and takes_blocks(16, 32)
        assert not takes_blocks(100, 1)

    def test_few_kinds_of_shapes_are_compiled(self, monkeypatch):
        """Batches of one and of several, of equal and unequal rows, of any size. On a GPU, so many with gradients again."""
        compute_all_by_flex(monkeypatch)
        torch._dynamo.reset()
        counter, limit = CompileCounter(), torch._dynamo.config.recompile_limit
        compiled = torch.compile(flex_attention, backend=counter, fullgraph=True)
        monkeypatch.setattr(modality_kernels_visualchat, "_compile_flex", lambda: compiled)
        flex, eager = make_pair(attention="flex_attention")
        generator = random.Random(0)
        for _ in range(24):
            length = generator.randint(1, 4)
            equal = ["it" + "".join(generator.choice("its") for _ in range(length))] * generator.randint(1, 3)
            unequal = ["it" + "".join(generator.choice("its") for _ in range(generator.randint(0, 4))) for _ in range(3)]
            inputs = make_inputs(generator.choice([equal, unequal]), flex)
            assert_equal_where_kept(forward(flex, inputs).logits, forward(eager, inputs).logits, inputs)
        assert 0 < counter.frame_count <= 6
        assert torch._dynamo.config.recompile_limit == limit

    def test_attention_dropout_is_refused(self, on_a_gpu):
        model = make_model({"text_config": on_a_gpu, "vision_config": "sdpa"}, text={"attention_dropout": 0.1}).train()
        inputs = make_inputs(["titit"], model)
        if on_a_gpu == "sdpa":
            model(**inputs)
            return
        with pytest.raises(ValueError, match="no dropout: set attention_dropout=0 or attn_implementation='sdpa'"):
            model(**inputs)
        model.eval()(**inputs)

    def test_a_layout_that_is_moved_masks_what_it_did(self, on_a_gpu):
        """As accelerate does where layers are spread over devices."""
        flex, eager = make_pair(attention=on_a_gpu)
        inputs = make_inputs(["titit", "ts"], flex)
        hook = functools.partial(_move_layouts, device="cpu")
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in flex.model.language_model.layers]
        try:
            assert_equal_where_kept(forward(flex, inputs).logits, forward(eager, inputs).logits, inputs)
        finally:
            for handle in handles:
                handle.remove()


def _full_blocks(mask):
    only_full = BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    return only_full.to_dense()[:, 0] != 0


def _move_layouts(module, args, kwargs, device):
    moved = kwargs["plan"].move_to(torch.device(device))
    assert kwargs["plan"].to(device) is kwargs["plan"]
    return args, {**kwargs, "plan": moved}


def test_cudnn_is_left_out_and_let_in_again_as_the_user_has_it():
    cuda = torch.backends.cuda
    assert cuda.cudnn_sdp_enabled()
    with pytest.raises(ZeroDivisionError), modality_kernels_visualchat.without_cudnn():
        assert not cuda.cudnn_sdp_enabled() and cuda.flash_sdp_enabled()
        _ = 1 / 0
    assert cuda.cudnn_sdp_enabled()
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION),
        modality_kernels_visualchat.without_cudnn(),
    ):
        assert cuda.cudnn_sdp_enabled()  # the user allows nothing else
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with modality_kernels_visualchat.without_cudnn():
            assert not cuda.cudnn_sdp_enabled()
        assert not cuda.cudnn_sdp_enabled()
