"""Cross attention, the paper's other baseline: text looks at images, which do not pass through the decoder."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import QuantizedLayer

from helpers.cross import assert_is_the_definition, norm
from helpers.modality import DOUBLE, LAYOUTS, SIDES, assert_equal_where_kept, drawn, forward, make_pair, with_edges
from helpers.tiny import TOKENS_PER_IMAGE, copy_llama_weights, make_config, make_inputs, make_model
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM
from modeling_visualchat.cross_cache_visualchat import CrossCacheLayer, StaticCrossCacheLayer


def make_cross(attn_implementation="sdpa", **overrides):
    return make_model(attn_implementation, multimodal_attention="cross", **overrides)


class TestDefinition:
    @pytest.mark.parametrize("backend", ["sdpa", "eager"])
    @drawn(max_examples=25)
    @with_edges(numbered=True, kv_heads=2, side="left")
    @given(layout=LAYOUTS, numbered=st.booleans(), kv_heads=st.sampled_from([1, 2, 4]), side=SIDES)
    def test_logits_of_text_are_those_of_the_definition(self, backend, layout, numbered, kv_heads, side):
        model = make_pair("cross", numbered, kv_heads, dtype=DOUBLE)[backend == "eager"]
        inputs = make_inputs(layout, model, padding_side=side)
        assert_is_the_definition(model, inputs, forward(model, inputs).logits)

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_every_how_many_layers_look_at_images(self, every):
        model = make_cross(cross_attention_every=every, image_number_keys=True).double()
        layers = model.model.language_model.layers
        assert [k for k, layer in enumerate(layers) if layer.cross_attn is not None] == list(range(every - 1, 3, every))
        inputs = make_inputs(["titit", "tt", "iit"], model)
        assert_is_the_definition(model, inputs, forward(model, inputs).logits)

    def test_text_alone_passes_the_layers_and_placeholders_give_the_logits_of_zeros(self):
        model = make_cross()
        shapes = []
        model.model.language_model.layers[1].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
        inputs = make_inputs(["titit", "tt", "iit"], model)
        logits = forward(model, inputs).logits
        assert shapes == [(1, 6 + 4 + 2, 64)]
        assert not logits[inputs["input_ids"] == model.config.image_token_id].any()

    @pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
    def test_a_token_sees_all_images_before_it_and_none_after(self, numbered):
        model = make_cross(image_number_keys=numbered)
        inputs = make_inputs(["titit"], model)
        before = forward(model, inputs).logits[0]
        later = {0: 2 + TOKENS_PER_IMAGE, 1: 4 + 2 * TOKENS_PER_IMAGE}  # the first text token behind each
        for image, first in later.items():
            pixels = inputs["pixel_values"].clone()
            pixels[image] = torch.randn_like(pixels[image])
            after = forward(model, {**inputs, "pixel_values": pixels}).logits[0]
            changed = (after != before).any(-1)
            is_text = inputs["input_ids"][0] != model.config.image_token_id
            assert not changed[:first].any()
            assert changed[first:][is_text[first:]].all()

    def test_the_order_of_images_matters_by_their_numbers_alone(self):
        inputs = None
        for numbered in (False, True):
            model = make_cross(image_number_keys=numbered).double()
            inputs = make_inputs(["tiit"], model)
            swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
            ours, others = (forward(model, one).logits[:, -2:] for one in (inputs, swapped))
            assert torch.allclose(ours, others, atol=1e-9) == (not numbered)

    def test_equal_images_are_projected_once(self):
        model = make_cross(image_number_keys=True).double()
        inputs = make_inputs(["titit", "tit"], model)
        inputs["pixel_values"][2] = inputs["pixel_values"][0]
        rows = []
        hook = model.model.language_model.layers[0].cross_attn.v_proj.register_forward_hook(
            lambda module, args, output: rows.append(len(output))
        )
        logits = forward(model, inputs).logits
        hook.remove()
        assert rows == [2 * TOKENS_PER_IMAGE]
        assert_is_the_definition(model, inputs, logits)


class TestClosedGates:
    def test_the_decoder_alone_answers(self):
        model = make_cross(image_number_keys=True)
        for layer in model.model.language_model.layers:
            torch.nn.init.zeros_(layer.cross_attn.gate)
        llama = LlamaForCausalLM._from_config(model.config.text_config, attn_implementation="sdpa")
        llama = copy_llama_weights(model, llama)
        inputs = make_inputs(["titit"], model)
        is_text = inputs["input_ids"] != model.config.image_token_id
        positions = is_text[0].nonzero()[:, 0][None]
        with torch.no_grad():
            expected = llama(
                inputs["input_ids"][is_text][None], position_ids=positions, attention_mask=torch.ones_like(positions)
            ).logits[0]
        torch.testing.assert_close(forward(model, inputs).logits[is_text], expected, atol=1e-5, rtol=1e-5)
        text = make_inputs(["tttt", "tt"], model)
        kept = text["attention_mask"].bool()
        assert torch.equal(forward(model, text).logits[kept], forward(llama, text).logits[kept])

    def test_a_joined_model_has_closed_gates_and_new_weights_of_its_own(self, tmp_path):
        parts = make_model()
        decoder = copy_llama_weights(parts, LlamaForCausalLM(parts.config.text_config))
        joined = VisualChatForCausalLM.from_vision_text_pretrained(
            parts.model.vision_tower, decoder, multimodal_attention="cross", cross_attention_every=2
        )
        block = joined.model.language_model.layers[1].cross_attn
        assert block.gate.tolist() == [0.0]
        assert (block.query_norm.weight == 1).all() and (block.image_norm.weight == 1).all()
        spread = joined.config.text_config.initializer_range
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(block, name).weight.std().item() == pytest.approx(spread, rel=0.1)
        joined.check_weights()
        inputs = make_inputs(["titit", "tt"], joined)
        without = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert torch.equal(forward(joined, inputs).logits, forward(joined, without).logits)
        joined.save_pretrained(tmp_path)
        reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert reloaded.config.cross_attention_every == 2
        assert torch.equal(forward(reloaded, inputs).logits, forward(joined, inputs).logits)

    def test_first_the_gate_trains_then_all_of_the_block_and_the_projector(self):
        parts = make_model()
        decoder = copy_llama_weights(parts, LlamaForCausalLM(parts.config.text_config))
        model = VisualChatForCausalLM.from_vision_text_pretrained(
            parts.model.vision_tower, decoder, multimodal_attention="cross"
        ).train()
        model.freeze_for_alignment(train_embedding=False)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name.split(".")[1] for name in trained} == {"multi_modal_projector", "language_model"}
        assert {name.split(".")[4] for name in trained if "language_model" in name} == {"cross_attn"}
        inputs = make_inputs(["titit", "tt"], model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(2):
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            moving = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert moving == trained
            moving = {name for name in trained if model.get_parameter(name).grad.any()}
            assert moving == (trained if step else {name for name in trained if name.endswith("gate")})
            optimizer.step()


class TestWeights:
    """With `eager`, `output_attentions` gives one matrix: of a layer's own attention, and at images of cross attention."""

    @pytest.mark.parametrize("every", [1, 3])
    def test_outputs_are_made_of_the_weights(self, every):
        model = make_cross("eager", cross_attention_every=every).double()
        inputs = make_inputs(["titit", "tt", "iti"], model)
        outputs = {}
        for index, layer in enumerate(model.model.language_model.layers):
            for name in ("self_attn", "cross_attn"):
                if (block := getattr(layer, name)) is not None:
                    hook = lambda module, args, output, key=(index, name): outputs.update({key: output})  # noqa: E731
                    block.register_forward_hook(hook)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        result = model(**inputs, output_attentions=True, output_hidden_states=True)
        kept = inputs["attention_mask"].bool()
        is_image = inputs["input_ids"] == model.config.image_token_id
        is_text, seen = kept & ~is_image, is_image.cumsum(-1) > 0
        for index, layer in enumerate(model.model.language_model.layers):
            weights, has_block = result.attentions[index], (index + 1) % every == 0
            sums = is_text * (1.0 + seen * has_block)
            torch.testing.assert_close(weights.sum(-1).double(), sums[:, None].expand(-1, 4, -1).double())
            states, cross = result.hidden_states[index], 0
            if has_block:
                block = layer.cross_attn
                values = torch.zeros(*is_image.shape, 2, 16, dtype=DOUBLE)
                features = norm(result.image_hidden_states.flatten(0, 1), block.image_norm)
                values[is_image] = block.v_proj(features).unflatten(-1, (2, 16))
                mixed = (weights * is_image[:, None, None]) @ values.transpose(1, 2).repeat_interleave(2, 1)
                cross = block.gate.tanh() * block.o_proj(mixed.transpose(1, 2).flatten(2))
                torch.testing.assert_close(outputs[index, "cross_attn"][0], cross[is_text])
            values = layer.self_attn.v_proj(layer.input_layernorm(states + cross)).unflatten(-1, (2, 16))
            mixed = (weights * is_text[:, None, None]) @ values.transpose(1, 2).repeat_interleave(2, 1)
            output = layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            torch.testing.assert_close(outputs[index, "self_attn"][0][0], output[is_text])

    @pytest.mark.parametrize("static", [False, True])
    def test_from_a_cache_they_are_the_rows_of_those_without(self, static):
        model = make_cross("eager", image_number_keys=True).double()
        inputs = make_inputs(["titit", "tt"], model)
        expected = forward(model, inputs, output_attentions=True)
        assert_equal_where_kept(expected.logits, forward(model, inputs).logits, inputs, atol=1e-9)
        cache = StaticCache(config=model.config.text_config, max_cache_len=30) if static else DynamicCache()
        first = {name: inputs[name][:, :-2] for name in ("input_ids", "attention_mask")}
        forward(model, {**first, "pixel_values": inputs["pixel_values"]}, past_key_values=cache)
        last = {"input_ids": inputs["input_ids"][:, -2:], "attention_mask": inputs["attention_mask"]}
        ours = forward(model, last, past_key_values=cache, output_attentions=True)
        length = inputs["input_ids"].shape[1]
        for one, other in zip(ours.attentions, expected.attentions):
            assert one.shape[-1] == (30 if static else length)
            torch.testing.assert_close(one[..., :length], other[:, :, -2:])
            assert not one[..., length:].any()


class TestTraining:
    @pytest.mark.parametrize("layout", [["tttt"], ["tti"]], ids=["no image", "an image that no text sees"])
    def test_a_batch_in_which_no_text_sees_an_image_trains_every_part_with_zero_effect(self, layout):
        model = make_cross(image_number_keys=True).train()
        model.freeze_for_alignment()
        inputs = make_inputs(layout, model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if "cross_attn" in name or "projector" in name:
                assert not parameter.requires_grad or not parameter.grad.any(), name

    def test_the_dropout_of_the_decoders_attention(self):
        model = make_cross(text={"attention_dropout": 0.5})
        inputs = make_inputs(["titit"], model)
        assert torch.equal(forward(model, inputs).logits, forward(model, inputs).logits)
        model.train()
        assert not torch.equal(forward(model, inputs).logits, forward(model, inputs).logits)

    def test_lora_on_the_decoder_leaves_the_new_blocks_whole(self):
        model = make_cross()
        inputs = make_inputs(["titit", "tt"], model)
        expected = forward(model, inputs).logits
        lora = LoraConfig(r=2, target_modules=r".*self_attn\.q_proj", modules_to_save=["cross_attn"])
        adapted = get_peft_model(model, lora)
        torch.testing.assert_close(forward(adapted, inputs).logits, expected)
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
        assert any("cross_attn.modules_to_save" in name for name in with_gradient)
        assert all("lora" in name or "cross_attn.modules_to_save" in name for name in with_gradient)


class TestCache:
    @pytest.mark.parametrize("every", [1, 2])
    @pytest.mark.parametrize("static", [False, True])
    def test_keys_of_images_are_made_once_and_kept(self, every, static):
        model = make_cross(cross_attention_every=every, image_number_keys=True).double()
        config = model.config.text_config
        cache = StaticCache(config=config, max_cache_len=40) if static else DynamicCache()
        inputs = make_inputs(["titit", "ts"], model)
        forward(model, inputs, past_key_values=cache)
        kind = StaticCrossCacheLayer if static else CrossCacheLayer
        assert [type(layer) for layer in cache.layers] == [kind] * 3
        images = [layer.images.keys.shape[2] for layer in cache.layers]
        assert images == [2 * TOKENS_PER_IMAGE if (k + 1) % every == 0 else 0 for k in range(3)]
        where, calls = cache.layers[1].images.keys.data_ptr(), []
        model.model.language_model.layers[1].cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(3):
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[7], [8]])], 1)
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            new = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
            logits = forward(model, new, past_key_values=cache).logits
            assert not calls and cache.layers[1].images.keys.data_ptr() == where  # not even copied
            expected = forward(model, inputs).logits[:, -1:]
            calls.clear()
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        assert cache.layers[0].keys.shape[2] == (40 if static else inputs["input_ids"].shape[1])  # in the order of text

    def test_hidden_states_from_a_cache_equal_those_without(self):
        model = make_cross().double()
        inputs = make_inputs(["titit", "tt"], model)
        expected = forward(model, inputs, output_hidden_states=True).hidden_states
        cache = DynamicCache()
        first = {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        forward(model, {**first, "pixel_values": inputs["pixel_values"]}, past_key_values=cache)
        last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
        ours = forward(model, last, past_key_values=cache, output_hidden_states=True).hidden_states
        assert len(ours) == len(expected) == 4
        for one, other in zip(ours, expected):
            torch.testing.assert_close(one, other[:, -1:], atol=1e-9, rtol=1e-9)

    @pytest.mark.slow
    def test_a_model_compiled_as_a_whole_brings_images_into_a_cache(self):
        model = make_cross()
        torch._dynamo.reset()
        inputs = make_inputs(["titit", "ts"], model)
        ours = forward(torch.compile(model, backend="eager"), inputs, use_cache=True)
        assert_equal_where_kept(ours.logits, forward(model, inputs).logits, inputs)
        assert [type(layer) for layer in ours.past_key_values.layers] == [CrossCacheLayer] * 3


class TestRefusals:
    """By name, with what to do."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"image_prefix_ids": [5, 7]},
                "`image_prefix_ids` is not for .*'cross'.* do not pass through the decoder",
            ),
            ({"learned_image_numbers": 2}, "`learned_image_numbers` is not for .*'cross': take `image_number_keys`"),
            ({"cross_attention_every": 0}, "`cross_attention_every` must be from 1 to the decoder's 3 layers, got 0"),
            ({"cross_attention_every": 4}, "`cross_attention_every` must be from 1 to the decoder's 3 layers, got 4"),
        ],
    )
    def test_fields_of_the_config(self, settings, message):
        with pytest.raises(StrictDataclassError, match=message):
            make_config(multimodal_attention="cross", **settings)

    def test_flex_attention(self):
        message = "'cross' needs attn_implementation 'eager' or 'sdpa', not 'flex_attention'"
        with pytest.raises(ValueError, match=message):
            make_cross("flex_attention")
        model = make_cross()
        model.set_attn_implementation({"text_config": "flex_attention"})
        with pytest.raises(ValueError, match=message):
            model(**make_inputs(["tit"], model))

    def test_image_memory(self):
        model = make_cross()
        with pytest.raises(ValueError, match="'cross' cannot use image memory: its images do not pass through the decoder"):
            model.encode_images(torch.zeros(1, 3, 16, 16))
        assert not model.model.language_model.can_split_modalities(None)

    def test_masks_of_4_dimensions_and_packed_conversations(self):
        model = make_cross()
        inputs = make_inputs(["tit"], model)
        length = inputs["input_ids"].shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match="an `attention_mask` of 4 dimensions counts: give one of 2"):
            model(**{**inputs, "attention_mask": mask})
        inputs.pop("attention_mask")
        positions = torch.tensor([[*range(length - 2), 0, 1]])
        with pytest.raises(ValueError, match="pad the conversations instead of packing them"):
            model(**inputs, position_ids=positions)

    def test_other_caches(self):
        class OtherLayer(QuantizedLayer):
            def _quantize(self, tensor, axis):
                return tensor

            def _dequantize(self, quantized):
                return quantized

        model = make_cross()
        cache = DynamicCache(config=model.config.text_config)
        cache.layers[:] = [OtherLayer() for _ in cache.layers]
        with pytest.raises(ValueError, match="past_key_values consists of OtherLayer: use another cache, or none"):
            model(**make_inputs(["tit"], model), past_key_values=cache)

    def test_adapters_by_sequence(self):
        model = make_cross()
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*self_attn\.q_proj")).eval()
        adapted.add_adapter("other", LoraConfig(r=2, target_modules=r".*language_model.*self_attn\.q_proj"))
        inputs = make_inputs(["tit", "tit"], model)
        with pytest.raises(ValueError, match="'cross' takes one PEFT adapter for all sequences"):
            adapted(**inputs, adapter_names=["default", "other"])


def test_a_config_without_the_field_is_as_before():
    saved = make_config().to_dict()
    del saved["cross_attention_every"]
    assert VisualChatConfig.from_dict(saved).cross_attention_every == 1
