"""The attention of the released code: what it computes, defects included."""

import logging
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModel,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from helpers.released import make_released
from helpers.tiny import copy_llama_weights, make_config, make_inputs, make_model
from helpers.versions import needs_transformers
from modeling_visualchat.released_attention_visualchat import ReleasedPlan, create_released_masks, place_in_reverse


LAYOUTS = ["itt", "tti", "tiit", "titittit", "i", "ttt"]


BATCH = ["tt", "titit", "tiit", "tti", "itti"]


class TestVariant:
    @pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "i" in layout])
    def test_eager_is_the_released_definition(self, layout):
        """Two masks are added, the lowest number wherever one hides a key; the softmaxes over both sums are summed."""
        model = make_released("eager").double()
        inputs = make_inputs([layout], model)
        is_image = (inputs["input_ids"] == model.config.image_token_id)[0]
        length, config, text_model = len(is_image), model.config.text_config, model.model.language_model
        torch.manual_seed(0)
        hidden_states = torch.randn(1, length, 64, dtype=torch.float64)
        positions = torch.arange(length)[None]
        plan = ReleasedPlan("mmca_released", config, hidden_states, None, positions, None, is_image[None], 5)
        attention, rotary = text_model.layers[1].self_attn, text_model.rotary_emb(hidden_states, positions)
        output, weights = attention(hidden_states, rotary, plan)

        q, k, v = (
            projection(hidden_states).view(1, length, -1, 16).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        lowest = torch.finfo(torch.float64).min
        causal = torch.zeros(length, length).double().masked_fill(torch.ones(length, length).triu(1).bool(), lowest)
        to_text = torch.zeros(length, length).double().masked_fill(is_image[None], lowest)
        to_images = torch.zeros(length, length).double().masked_fill(~is_image[None], lowest)
        to_images[is_image] = lowest
        to_images[is_image, is_image.nonzero()[:, 0]] = 0
        scores = q @ k.mT / math.sqrt(16)
        expected = (scores + (to_text + causal)).softmax(-1) + (scores + (to_images + causal)).softmax(-1)
        torch.testing.assert_close(weights, expected, atol=1e-10, rtol=0)
        expected_output = attention.o_proj((expected @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected_output, atol=1e-10, rtol=0)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_a_batch_equals_its_rows(self, implementation, padding_side):
        model = make_released(implementation)
        inputs = make_inputs(BATCH, model, padding_side=padding_side)
        mask, images = inputs["attention_mask"], iter(inputs["pixel_values"].split([row.count("i") for row in BATCH]))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**inputs, position_ids=positions).logits
            for row, pixel_values in enumerate(images):
                kept = mask[row].bool()
                alone = model(
                    input_ids=inputs["input_ids"][row, kept][None], pixel_values=pixel_values if len(pixel_values) else None
                )
                torch.testing.assert_close(logits[row, kept], alone.logits[0], atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_without_images_it_is_llama(self, implementation):
        model = make_released(implementation)
        llama = LlamaForCausalLM._from_config(model.config.text_config, attn_implementation=implementation)
        llama = copy_llama_weights(model, llama)
        inputs = make_inputs(["ttt", "t"], model)
        kept = inputs["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits[kept], llama(**inputs).logits[kept], atol=1e-5, rtol=1e-5)

    def test_pictures_are_placed_in_reverse_by_sample(self):
        is_image = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1], [0] * 8, [1, 1, 0, 0, 0, 0, 1, 1]]).bool()
        states = torch.arange(10)[:, None]
        placed = place_in_reverse(states, is_image, 2)[:, 0].tolist()
        assert placed == [4, 5, 2, 3, 0, 1, 8, 9, 6, 7]

    def test_features_in_place_and_pixel_values_are_placed_alike(self):
        model = make_released()
        inputs = make_inputs(["titi"], model)
        is_image = inputs["input_ids"] == model.config.image_token_id
        with torch.no_grad():
            features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
            embeds = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(is_image[..., None], features)
            logits = model(inputs_embeds=embeds, mm_token_type_ids=is_image.long()).logits
            torch.testing.assert_close(logits, model(**inputs).logits)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_half_precision_and_gradients_have_no_nan(self, implementation, dtype):
        model = make_released(implementation).to(dtype)
        inputs = make_inputs(BATCH, model)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        outputs = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
        outputs.loss.backward()
        assert outputs.logits.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_it_trains_from_the_projector_to_the_embedding(self):
        model = make_released()
        model.freeze_for_alignment()
        inputs = make_inputs(["titit"], model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


class TestGeneration:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_cached_steps_equal_one_pass(self, implementation):
        """Text after the last picture; sequences begin with text, as a tokenizer's start token makes them."""
        model = make_released(implementation)
        inputs = make_inputs(["tittt", "ttt", "tiitttt"], model)
        whole = model(**inputs).logits
        prompt = inputs["input_ids"].shape[1] - 4
        outputs = model(
            input_ids=inputs["input_ids"][:, :prompt],
            pixel_values=inputs["pixel_values"],
            attention_mask=inputs["attention_mask"][:, :prompt],
            use_cache=True,
        )
        for seen in range(prompt, inputs["input_ids"].shape[1]):
            kept = inputs["attention_mask"][:, :seen].bool()
            torch.testing.assert_close(outputs.logits[:, -1], whole[:, seen - 1], atol=2e-5, rtol=1e-5)
            assert kept[:, -1].all()
            outputs = model(
                input_ids=inputs["input_ids"][:, seen : seen + 1],
                attention_mask=inputs["attention_mask"][:, : seen + 1],
                past_key_values=outputs.past_key_values,
            )

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_tokens_with_any_cache_equal_those_without(self, implementation):
        model = make_released(implementation)
        inputs = make_inputs(["titit", "ttt", "tiitt"], model)
        settings = {"max_new_tokens": 5, "do_sample": False}
        expected = model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(model.generate(**inputs, **settings), expected)
        length = inputs["input_ids"].shape[1] + 8
        static = StaticCache(model.config.get_text_config(), max_cache_len=length)
        assert torch.equal(model.generate(**inputs, **settings, past_key_values=static), expected)
        beams = model.generate(**inputs, **settings, num_beams=2, use_cache=False)
        assert torch.equal(model.generate(**inputs, **settings, num_beams=2), beams)

    def test_a_conversation_goes_on_from_its_cache_by_text(self):
        model = make_released()
        inputs = make_inputs(["titittt"], model)
        with torch.no_grad():
            first = {name: value[:, :-4] for name, value in inputs.items() if name != "pixel_values"}
            cache = model(**first, pixel_values=inputs["pixel_values"], use_cache=True).past_key_values
            logits = model(input_ids=inputs["input_ids"][:, -4:], past_key_values=cache).logits
            torch.testing.assert_close(logits, model(**inputs).logits[:, -4:], atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("begun_with", ["tt", "tit"])
    def test_pictures_after_what_is_cached_are_refused(self, begun_with):
        model = make_released()
        cache = model(**make_inputs([begun_with], model), use_cache=True).past_key_values
        length = cache.get_seq_length()
        inputs = make_inputs(["it"], model)
        with pytest.raises(ValueError, match=rf"the {length} tokens before them.*without past_key_values"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache)

    @needs_transformers("5.23", "images are not cut")
    @pytest.mark.parametrize("chunk", [4, 7])
    def test_a_prefill_in_chunks_is_refused(self, chunk):
        model = make_released()
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**make_inputs(["titit"], model), max_new_tokens=2, prefill_chunk_size=chunk)


class TestRefusals:
    def test_image_memory(self):
        model = make_released()
        inputs = make_inputs(["tit"], model)
        with pytest.raises(ValueError, match="'mmca_released' cannot use image memory"):
            model.encode_images(inputs["pixel_values"])

    def test_numbered_keys(self):
        with pytest.raises(
            StrictDataclassError, match="`image_number_keys` is not for multimodal_attention='mmca_released'"
        ):
            make_config(multimodal_attention="mmca_released", image_number_keys=True)

    def test_flex_attention(self):
        mask = create_block_mask(lambda batch, head, query, key: query >= key, 1, None, 8, 8, device="cpu")
        with pytest.raises(ValueError, match="'mmca_released' needs attn_implementation 'eager' or 'sdpa'"):
            create_released_masks(mask, torch.ones(1, 8, dtype=torch.bool), 0, torch.float32)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "mmca_released" in record.getMessage()]


def test_a_model_warns_once_and_says_how_to_leave_it(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        model = make_released()
        [message] = warnings_of(caplog)
        assert "from_pretrained(..., multimodal_attention='mmca')" in message
        model.save_pretrained(tmp_path)
        caplog.clear()
        AutoModel.from_pretrained(tmp_path)
        assert len(warnings_of(caplog)) == 1
        caplog.clear()
        left = AutoModel.from_pretrained(tmp_path, multimodal_attention="mmca")
        assert warnings_of(caplog) == []
    inputs = make_inputs(["titit"], model)
    with torch.no_grad():
        expected = make_model().eval()
        expected.load_state_dict(model.state_dict())
        assert torch.equal(left(**inputs).logits, expected(**inputs).logits)
