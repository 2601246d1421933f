"""The default attention, by modality, equals `eager`, the definition."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from helpers.modality import DOUBLE, LAYOUTS, MODELS, SIDES, assert_equal_where_kept, drawn, forward, make_pair, with_edges
from helpers.tiny import TOKENS_PER_IMAGE, make_inputs, make_model


class TestForward:
    @pytest.mark.parametrize("watched", ["gate_proj", "act_fn", "up_proj"])
    def test_what_hooks_were_given_is_not_overwritten(self, watched):
        model, seen = make_pair()[0], []
        part = getattr(model.model.language_model.layers[0].mlp, watched)
        handle = part.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
        try:
            forward(model, make_inputs(["titit"], model))
        finally:
            handle.remove()
        assert len(seen) == 1 and torch.equal(*seen[0])

    @drawn(max_examples=40)
    @with_edges(key=("mmca", True, 2), side="left")
    @given(key=MODELS, layout=LAYOUTS, side=SIDES)
    def test_logits_and_the_hidden_states_of_every_layer_equal_eager(self, key, layout, side):
        fast, eager = make_pair(*key, dtype=DOUBLE)
        inputs = make_inputs(layout, fast, padding_side=side)
        expected = forward(eager, inputs, output_hidden_states=True)
        recorded = forward(fast, inputs, output_hidden_states=True)
        assert_equal_where_kept(forward(fast, inputs).logits, expected.logits, inputs)
        assert_equal_where_kept(recorded.logits, expected.logits, inputs)
        assert len(recorded.hidden_states) == len(expected.hidden_states)
        for ours, theirs in zip(recorded.hidden_states, expected.hidden_states):
            assert_equal_where_kept(ours, theirs, inputs)
        if inputs.pop("attention_mask").all():
            torch.testing.assert_close(forward(fast, inputs).logits, expected.logits, atol=1e-5, rtol=1e-5)

    @drawn(max_examples=20)
    @with_edges(key=("mmca", True, 2), side="left", supervised=1.0)
    @given(key=MODELS, layout=LAYOUTS, side=SIDES, supervised=st.sampled_from([0.3, 1.0]))
    def test_gradients_of_all_weights_equal_eager(self, key, layout, side, supervised):
        pair = make_pair(*key, dtype=DOUBLE, trains=True)
        inputs = make_inputs(layout, pair[0], padding_side=side)
        assume(inputs["input_ids"].shape[1] > 1)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        learned = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1)) <= supervised
        learned[:, 1:] &= inputs["attention_mask"][:, :-1].bool()  # no loss at what a padding row predicts
        labels = inputs["input_ids"].masked_fill(~learned | (inputs["attention_mask"] == 0), -100)
        assume((labels[:, 1:] != -100).any())
        losses, gradients = [], []
        for model in pair:
            model.zero_grad()
            losses.append(model(**inputs, labels=labels).loss)
            losses[-1].backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
        if any(part in row for row in layout for part in "st"):
            assert set(gradients[0]) == set(gradients[1])
        for name, expected in gradients[1].items():
            ours = gradients[0].get(name, torch.zeros(()).expand_as(expected))
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4, check_dtype=False, msg=name)

    def test_a_batch_without_any_supervised_position_gives_every_weight_a_gradient(self):
        fast, eager = make_pair(trains=True)
        inputs = make_inputs(["tit", "tt"], fast)
        labels = torch.full_like(inputs["input_ids"], -100)
        names = []
        for model in (eager, fast):
            model.zero_grad()
            model(**inputs, labels=labels, logits_to_keep=labels != -100, num_items_in_batch=3).loss.backward()
            names.append({name for name, p in model.named_parameters() if p.grad is not None})
        assert names[0] == names[1]

    def test_gradients_in_double_precision_are_finite_where_the_longest_text_is_one_token(self):
        model = make_pair("mmca_merged", dtype=DOUBLE, trains=True)[0]
        inputs = make_inputs(["i", "s"], model, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model.zero_grad()
        model(**{**inputs, "pixel_values": inputs["pixel_values"].double()}, labels=labels).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    @drawn(max_examples=12)
    @given(key=MODELS, layout=LAYOUTS, side=SIDES, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def test_half_precision_is_finite_and_near(self, key, layout, side, dtype):
        exact = make_pair(*key, dtype=DOUBLE)[0]
        inputs = make_inputs(layout, exact, padding_side=side)
        half = make_pair(*key, dtype=dtype)[0]
        logits = forward(half, inputs).logits
        assert logits.isfinite().all()
        kept = inputs["attention_mask"].bool()
        expected = forward(exact, inputs).logits[kept]
        error = (logits[kept].double() - expected).norm() / expected.norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02)

    @drawn(max_examples=25)
    @given(data=st.data(), key=MODELS, layout=LAYOUTS, side=SIDES)
    def test_logits_to_keep_gives_the_slices_of_the_full_logits(self, data, key, layout, side):
        model = make_pair(*key, dtype=DOUBLE)[0]
        inputs = make_inputs(layout, model, padding_side=side)
        full = forward(model, inputs).logits
        batch, length = inputs["input_ids"].shape
        kept = inputs["attention_mask"].bool()

        last = data.draw(st.integers(1, length + 1))
        ours = forward(model, inputs, logits_to_keep=last).logits
        assert ours.shape[1] == min(last, length)
        torch.testing.assert_close(ours[kept[:, -last:]], full[:, -last:][kept[:, -last:]], atol=1e-5, rtol=1e-5)

        index = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4)))
        ours = forward(model, inputs, logits_to_keep=index).logits
        torch.testing.assert_close(ours[kept[:, index]], full[:, index][kept[:, index]], atol=1e-5, rtol=1e-5)

        flags = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
        mask = torch.tensor(data.draw(flags)).view(batch, length) & kept
        ours = forward(model, inputs, logits_to_keep=mask).logits
        torch.testing.assert_close(ours, full[mask], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "logits_to_keep",
        [
            torch.tensor([-1, 0]),
            pytest.param(
                torch.tensor([[0, 3], [5, 1]]),
            ),
            pytest.param(
                torch.arange(9) % 2 == 0,
            ),
        ],
        ids=["from the end", "by row", "one mask for all rows"],
    )
    def test_logits_to_keep_is_what_transformers_slices(self, logits_to_keep):
        fast, eager = make_pair()
        inputs = make_inputs(["tit", "itt"], fast)
        expected = forward(eager, inputs, logits_to_keep=logits_to_keep).logits
        torch.testing.assert_close(
            forward(fast, inputs, logits_to_keep=logits_to_keep).logits, expected, atol=1e-5, rtol=1e-5
        )

    @drawn(max_examples=12)
    @given(key=MODELS, layout=LAYOUTS, side=SIDES)
    def test_the_loss_of_supervised_positions_alone_is_the_full_one(self, key, layout, side):
        model = make_pair(*key, dtype=DOUBLE)[0]
        inputs = make_inputs(layout, model, padding_side=side)
        is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
        labels = inputs["input_ids"].masked_fill(~is_text, -100)
        supervised = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        assume(supervised.any())
        full = forward(model, inputs, labels=labels).loss
        kept = forward(model, inputs, labels=labels, logits_to_keep=supervised).loss
        torch.testing.assert_close(kept, full, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


class TestCost:
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_nothing_of_the_sequence_by_itself_is_made(self, variant):
        vision = {"patch_size": 2}
        largest = {}
        for decoder in ("sdpa", "eager"):
            model = make_model(
                {"text_config": decoder, "vision_config": "sdpa"}, multimodal_attention=variant, vision=vision
            )
            inputs = make_inputs(["t" + "i" * 8 + "t"], model)
            length = inputs["input_ids"].shape[1]
            assert length == 8 * 65 + 4
            with Largest() as largest[decoder]:
                model(**inputs, labels=inputs["input_ids"], use_cache=decoder == "sdpa").loss.backward()
        assert largest["sdpa"].numel < length**2 <= largest["eager"].numel

    def test_equal_images_go_through_the_tower_once_and_have_the_gradients_of_copies(self):
        fast, eager = make_pair(dtype=DOUBLE, trains=True)
        inputs = make_inputs(["tiit", "it"], fast)
        labels = inputs["input_ids"].clone()
        labels[1, : -TOKENS_PER_IMAGE - 1] = -100  # padding, and what it predicts
        images = inputs["pixel_values"].double()
        images[2] = images[0]
        # Copies that differ by less than any result shows are encoded one by one
        apart = images + 1e-13 * torch.arange(3)[:, None, None, None]
        encoded, results = [], []
        for model, pixel_values in ((fast, images), (eager, apart)):
            hook = model.model.vision_tower.register_forward_hook(
                lambda module, args, output: encoded.append(len(output.last_hidden_state))
            )
            model.zero_grad()
            outputs = model(**{**inputs, "pixel_values": pixel_values}, labels=labels)
            outputs.loss.backward()
            hook.remove()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append((outputs, gradients))
        assert encoded == [2, 3]
        (ours, our_gradients), (theirs, their_gradients) = results
        assert_equal_where_kept(ours.logits, theirs.logits, inputs)
        torch.testing.assert_close(ours.image_hidden_states, theirs.image_hidden_states, atol=1e-6, rtol=1e-6)
        assert torch.equal(ours.image_hidden_states[0], ours.image_hidden_states[2])
        for name, expected in their_gradients.items():
            torch.testing.assert_close(our_gradients[name], expected, atol=2e-5, rtol=1e-4, msg=name)

    def test_images_that_differ_in_one_pixel_are_two(self):
        model = make_pair()[0]
        inputs = make_inputs(["itit"], model)
        inputs["pixel_values"][1] = inputs["pixel_values"][0]
        same = forward(model, inputs).logits
        # The sum of all pixels stays
        inputs["pixel_values"][1, 0, 0, 0], inputs["pixel_values"][1, 0, 0, 1] = 3.0, -3.0
        inputs["pixel_values"][0, 0, 0, 0], inputs["pixel_values"][0, 0, 0, 1] = -3.0, 3.0
        assert not torch.allclose(same, forward(model, inputs).logits, atol=1e-3)
        pair = make_pair()[1]
        torch.testing.assert_close(forward(model, inputs).logits, forward(pair, inputs).logits, atol=1e-5, rtol=1e-5)

    def test_one_tensor_for_two_images_is_computed_once_and_has_the_gradients_of_copies(self):
        fast, eager = make_pair(dtype=DOUBLE, trains=True)
        inputs = make_inputs(["tiit", "it"], fast)
        labels = inputs["input_ids"].clone()
        labels[1, : -TOKENS_PER_IMAGE - 1] = -100  # padding, and what it predicts
        album, shown = inputs.pop("pixel_values").double(), [0, 1, 0]
        lengths, results = [], []
        for model in (fast, eager):
            model.zero_grad()
            images = {"pixel_values": album[shown]}
            if model is fast:  # as `generate` gives them to its beams
                features = model.get_image_features(album[:2], return_dict=True).pooler_output
                repeated = BaseModelOutputWithPooling(pooler_output=[features[k] for k in shown])
                images = {"mm_encoder_outputs": {"image": repeated}}
            hook = model.model.language_model.layers[0].register_forward_pre_hook(
                lambda module, args: lengths.append(args[0].shape[0] * args[0].shape[1])
            )
            outputs = model(**inputs, **images, labels=labels)
            outputs.loss.backward()
            hook.remove()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append((outputs, gradients))
        assert lengths[1] - lengths[0] >= TOKENS_PER_IMAGE
        (ours, our_gradients), (theirs, their_gradients) = results
        assert_equal_where_kept(ours.logits, theirs.logits, inputs)
        torch.testing.assert_close(ours.image_hidden_states, theirs.image_hidden_states, atol=1e-6, rtol=1e-6)
        assert torch.equal(ours.image_hidden_states[0], ours.image_hidden_states[2])
        for name, expected in their_gradients.items():
            torch.testing.assert_close(our_gradients[name], expected, atol=2e-5, rtol=1e-4, msg=name)
