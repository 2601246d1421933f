"""`generate`, with every cache."""

import copy
import pickle

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.cache_utils import QuantoQuantizedLayer

from helpers.generation import LAYOUT, NEW
from helpers.tiny import TOKENS_PER_IMAGE, copy_llama_weights, make_inputs, make_model
from helpers.versions import needs_transformers
from modeling_visualchat.sequence_cache_visualchat import get_image_numbers


def test_cached_decoding_equals_uncached(model):
    inputs = make_inputs(LAYOUT, model)
    cached = model.generate(**inputs, **NEW, return_dict_in_generate=True, output_logits=True)
    uncached = model.generate(**inputs, **NEW, use_cache=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic with config": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=128),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_users_cache(model, cache):
    inputs = make_inputs(LAYOUT, model)
    tokens = model.generate(**inputs, **NEW, past_key_values=CACHES[cache](model))
    assert torch.equal(tokens, model.generate(**inputs, **NEW))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("images", ["all", "new ones"])
def test_a_conversation_goes_on_from_a_cache_with_new_images(model, cache, images):
    """Rounds bring 0, 2, 0 and 1 images; each starts from the cache of the last, and equals a run from scratch."""
    past = CACHES[cache](model)
    rounds = [make_inputs([layout], model, seed=k) for k, layout in enumerate(["tt", "itit", "tt", "tit"])]
    input_ids = torch.empty(1, 0, dtype=torch.long)
    pictures = torch.empty(0, 3, 16, 16)
    for new in rounds:
        input_ids = torch.cat([input_ids, new["input_ids"]], dim=1)
        pictures = torch.cat([pictures, new.get("pixel_values", pictures[:0])])
        everything = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),  # else generate takes padding tokens in answers for padding
            "pixel_values": pictures if len(pictures) else None,
        }
        given = everything if images == "all" else {**everything, "pixel_values": new.get("pixel_values")}
        tokens = model.generate(**given, **NEW, past_key_values=past)
        assert torch.equal(tokens, model.generate(**everything, **NEW))
        input_ids = tokens


def test_a_batch_goes_on_from_a_cache_with_new_images(model):
    first, second = make_inputs(["tit", "ttt"], model), make_inputs(["titi", "tiit"], model, seed=1)
    past = DynamicCache()
    tokens = model.generate(**first, **NEW, past_key_values=past)
    input_ids = torch.cat([tokens, second["input_ids"]], dim=1)
    ones = torch.ones(2, input_ids.shape[1] - first["input_ids"].shape[1], dtype=torch.long)
    attention_mask = torch.cat([first["attention_mask"], ones[:, : tokens.shape[1] - first["input_ids"].shape[1]]], dim=1)
    attention_mask = torch.cat([attention_mask, second["attention_mask"]], dim=1)
    images = torch.cat([first["pixel_values"][:1], second["pixel_values"]])
    kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": images}
    expected = model.generate(**kwargs, **NEW)
    assert torch.equal(model.generate(**kwargs, **NEW, past_key_values=past), expected)


def test_forward_by_pieces_equals_forward_at_once(model):
    inputs = make_inputs(["titit", "iiitt"], model)
    is_image = inputs["input_ids"] == model.config.image_token_id
    with torch.no_grad():
        whole = model(**inputs).logits
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[is_image] = torch.cat(features)
        for cache in CACHES.values():
            past, pieces = cache(model), []
            for start in range(0, embeds.shape[1], 3):  # pieces cut through images
                piece = slice(start, start + 3)
                pieces.append(
                    model(
                        inputs_embeds=embeds[:, piece],
                        mm_token_type_ids=is_image[:, piece].long(),
                        attention_mask=inputs["attention_mask"][:, : start + 3],
                        past_key_values=past,
                    ).logits
                )
            kept = inputs["attention_mask"].bool()
            torch.testing.assert_close(torch.cat(pieces, dim=1)[kept], whole[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_cache_implementations_by_name(model, implementation):
    inputs = make_inputs(LAYOUT, model)
    tokens = model.generate(**inputs, **NEW, cache_implementation=implementation)
    assert torch.equal(tokens, model.generate(**inputs, **NEW))
    beams = model.generate(**inputs, **NEW, num_beams=3, cache_implementation=implementation)
    assert torch.equal(beams, model.generate(**inputs, **NEW, num_beams=3))


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloading_from_the_cpu_says_what_to_use(mmca, implementation):
    with pytest.raises(ValueError, match=r"use 'dynamic' or 'static'"):
        mmca.generate(**make_inputs(["titit"], mmca), **NEW, cache_implementation=implementation)


@needs_transformers("5.23", "no fp8, and no beams in a quantized cache")
def test_a_quantized_cache(model):
    """
    fp8 keys and values: as LLaMA's for text, and with images the numbers that tell them from text stay exact. Such a cache
    holds text and images together, as the definition does.
    """
    inputs = make_inputs(LAYOUT, model)
    kwargs = {**NEW, "return_dict_in_generate": True, "output_logits": True}
    fp8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    exact = model.generate(**inputs, **kwargs)
    quantized = model.generate(**inputs, **kwargs, **fp8)
    # The prefill reads what it just computed
    torch.testing.assert_close(exact.logits[0], quantized.logits[0], atol=1e-5, rtol=1e-5)
    is_image = quantized.sequences[:, :-1] == model.config.image_token_id
    numbers = get_image_numbers(quantized.past_key_values).keys[:, 0, :, 0]
    expected = torch.div(is_image.cumsum(-1) - 1, TOKENS_PER_IMAGE, rounding_mode="floor") + 1
    assert torch.equal(numbers, (expected * is_image).int())
    assert numbers.amax(-1).tolist() == [row.count("i") for row in LAYOUT]
    # The next step reads rounded keys and values
    assert torch.nn.functional.cosine_similarity(exact.logits[1], quantized.logits[1]).median() > 0.99

    text = make_inputs(["ttt", "t"], model)
    llama = copy_llama_weights(model, LlamaForCausalLM(model.config.text_config))
    assert torch.equal(model.generate(**text, **NEW, **fp8), llama.generate(**text, **NEW, **fp8))


@needs_transformers("5.23", "beams do not reorder a quantized cache")
@pytest.mark.slow  # quanto compiles an extension for two minutes, once a machine
def test_a_quanto_cache_is_quantized_in_all_its_layers(model):
    inputs = make_inputs(["titit", "ts"], model)
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}
    quanto = {"cache_implementation": "quantized", "cache_config": config}
    outputs = model.generate(**inputs, **NEW, **quanto, return_dict_in_generate=True)
    cache = outputs.past_key_values
    assert len(cache.layers) == model.config.text_config.num_hidden_layers
    assert all(isinstance(layer, QuantoQuantizedLayer) for layer in cache.layers)
    is_image = outputs.sequences[:, :-1] == model.config.image_token_id
    assert torch.equal(get_image_numbers(cache).keys[:, 0, :, 0] > 0, is_image)
    beams = model.generate(**inputs, **NEW, **quanto, num_beams=2, return_dict_in_generate=True)
    assert len(beams.past_key_values.layers) == len(cache.layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "causal"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_has_the_layers_and_the_format_of_the_decoder(cache, variant, attention):
    model = make_model(attention, multimodal_attention=variant, image_number_keys=True)
    eager = make_model("eager", multimodal_attention=variant, image_number_keys=True)
    inputs = make_inputs(["titit", "ts"], model)
    past = CACHES[cache](model)
    length, kept = inputs["input_ids"].shape[1], inputs["attention_mask"][:, None, :, None]
    text_config = model.config.text_config
    with torch.no_grad():
        model(**inputs, past_key_values=past)
        expected = eager(**inputs, use_cache=True).past_key_values
        assert len(past.layers) == len(expected.layers) == text_config.num_hidden_layers
        shape = (2, text_config.num_key_value_heads, 128 if cache == "static" else length, text_config.head_dim)
        for ours, theirs in zip(past.layers, expected.layers):
            for name in ("keys", "values"):
                states = getattr(ours, name)
                assert states.shape == shape
                close = states[:, :, :length] * kept, getattr(theirs, name) * kept
                torch.testing.assert_close(*close, atol=1e-5, rtol=1e-5)
        token = {
            "input_ids": torch.tensor([[5], [6]]),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        }
        copies = [copy.deepcopy(past), pickle.loads(pickle.dumps(past))]
        logits = model(**token, past_key_values=past).logits
        for one in copies:
            assert torch.equal(model(**token, past_key_values=one).logits, logits)


# Chunks cut through images. In the second batch, one holds 3 rows of an image and 2 of another, as many as an image has
@needs_transformers("5.23", "images are not cut")
@pytest.mark.parametrize("layout, size", [(["titit", "tiitt"], 4), (["titit", "ts", "iit"], 3)])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_chunked_prefill(model, layout, size, implementation):
    inputs = make_inputs(layout, model)
    chunked = model.generate(**inputs, **NEW, prefill_chunk_size=size, cache_implementation=implementation)
    assert torch.equal(chunked, model.generate(**inputs, **NEW))


def test_cropping_and_repeating_a_cache(mmca):
    inputs = make_inputs(["titit"], mmca)
    past = DynamicCache(config=mmca.config)
    with torch.no_grad():
        mmca(**inputs, past_key_values=past)
        next_tokens = torch.tensor([[7, 8, 9]])
        expected = mmca(next_tokens, past_key_values=copy.deepcopy(past)).logits
        mmca(torch.tensor([[11, 12]]), past_key_values=past)
        past.crop(-2)
        past.batch_repeat_interleave(2)
        again = mmca(next_tokens.expand(2, -1), past_key_values=past).logits
        past.reorder_cache(torch.tensor([1, 0]))
        past.batch_select_indices(torch.tensor([1]))
        assert past.get_seq_length() == inputs["input_ids"].shape[1] + 3
    torch.testing.assert_close(again, expected.expand(2, -1, -1), atol=1e-5, rtol=1e-5)


def test_images_after_a_cached_text(mmca):
    """The cache of a text conversation says nothing of images until one comes."""
    text, image = make_inputs(["tt"], mmca), make_inputs(["it"], mmca, seed=1)
    whole = torch.cat([text["input_ids"], image["input_ids"]], dim=1)
    with torch.no_grad():
        expected = mmca(whole, pixel_values=image["pixel_values"]).logits
        for cache in CACHES.values():
            past = cache(mmca)
            mmca(text["input_ids"], past_key_values=past)
            layers = mmca.config.text_config.num_hidden_layers
            assert len(past.layers) == layers
            logits = mmca(image["input_ids"], pixel_values=image["pixel_values"], past_key_values=past).logits
            assert len(past.layers) == layers
            torch.testing.assert_close(logits, expected[:, -logits.shape[1] :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "attention, given",
    [
        *(("mmca", given) for given in ("all images", "new images", "memory of all", "memory of new")),
        ("cross", "all images"),
        ("cross", "new images"),
    ],
)
def test_beams_go_on_from_a_cache(attention, given):
    """The cache is repeated for the beams first, as with any transformers model."""
    model = make_model(multimodal_attention=attention, image_number_keys=True)
    model.generation_config.eos_token_id = None
    first, new = make_inputs(["tit", "itit"], model), make_inputs(["it", "it"], model, seed=1)
    answered = model.generate(**first, **NEW, return_dict_in_generate=True)
    cache = answered.past_key_values
    cache.batch_repeat_interleave(3)
    input_ids = torch.cat([answered.sequences, new["input_ids"]], 1)
    attention_mask = torch.nn.functional.pad(
        first["attention_mask"], (0, input_ids.shape[1] - first["input_ids"].shape[1]), value=1
    )
    old_pixels, new_pixels = first["pixel_values"], new["pixel_values"]
    pixels = torch.cat([old_pixels[:1], new_pixels[:1], old_pixels[1:], new_pixels[1:]])  # row by row
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    expected = model.generate(**inputs, pixel_values=pixels, **NEW, num_beams=3)
    images = {"pixel_values": pixels if given in ("all images", "memory of all") else new_pixels}
    if given.startswith("memory"):
        images = {"image_memory": model.encode_images(images["pixel_values"])}
    assert torch.equal(model.generate(**inputs, **images, past_key_values=cache, **NEW, num_beams=3), expected)
