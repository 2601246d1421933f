"""`generate` with cross attention, whose prompts end with text: in every decoding mode, from every cache, round by round."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.generation import NEW, rows_alone
from helpers.tiny import make_inputs, make_model
from modeling_visualchat.generation_visualchat import CUTS_IMAGES


LAYOUT = ["tt", "titit", "iitt", "its", "tiiiit"]


@pytest.fixture(scope="module")
def model():
    # In double precision: a drawn token differs where rounding moves a probability across the number that was drawn
    return make_model(multimodal_attention="cross", image_number_keys=True).double()


def make_batch(layout, model, seed=0):
    inputs = make_inputs(layout, model, seed)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    return inputs


def test_a_left_padded_batch_of_0_to_4_images_equals_its_rows_alone(model):
    inputs = make_batch(LAYOUT, model)
    together = model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]
    for row, alone in enumerate(rows_alone(inputs, LAYOUT)):
        tokens = model.generate(**alone, **NEW)[0, alone["input_ids"].shape[1] :]
        assert tokens.tolist() == together[row].tolist()


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_decoding_modes_equal_their_uncached_selves(model, mode):
    inputs = make_batch(["titit", "tt", "iit"], model)
    torch.manual_seed(0)
    cached = model.generate(**inputs, **{**NEW, **mode})
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(**inputs, **{**NEW, **mode}, use_cache=False))
    assert cached.shape[0] == 3 * mode.get("num_return_sequences", 1)


def test_prompt_lookup_equals_greedy_search(model):
    inputs = make_batch(["tiittt"], model)
    assert torch.equal(model.generate(**inputs, **NEW, prompt_lookup_num_tokens=4), model.generate(**inputs, **NEW))


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("size", [None, pytest.param(4, marks=pytest.mark.skipif(not CUTS_IMAGES, reason="needs 5.23"))])
def test_cache_implementations_by_name_and_a_prefill_in_chunks(model, implementation, size):
    inputs = make_batch(LAYOUT, model)
    chunks = {} if size is None else {"prefill_chunk_size": size}
    tokens = model.generate(**inputs, **NEW, **chunks, cache_implementation=implementation)
    assert torch.equal(tokens, model.generate(**inputs, **NEW, use_cache=False))
    beams = model.generate(**inputs, **NEW, num_beams=3, cache_implementation=implementation)
    assert torch.equal(beams, model.generate(**inputs, **NEW, num_beams=3, use_cache=False))


CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic with config": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=128),
}


@pytest.mark.parametrize("images", ["all", "new ones"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_conversation_goes_on_from_a_cache_with_new_images(model, cache, images):
    """Rounds bring 0, 2, 0 and 1 images; each starts from the cache of the last, and equals a run from scratch."""
    past, pictures = CACHES[cache](model), torch.empty(0, 3, 16, 16, dtype=torch.float64)
    input_ids = torch.empty(1, 0, dtype=torch.long)
    for seed, layout in enumerate(["tt", "itit", "tt", "tit"]):
        new = make_batch([layout], model, seed)
        input_ids = torch.cat([input_ids, new["input_ids"]], dim=1)
        new_pictures = new.get("pixel_values", pictures[:0])
        pictures = torch.cat([pictures, new_pictures])
        whole = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        given = pictures if images == "all" else new_pictures
        ours = model.generate(**whole, pixel_values=given if len(given) else None, **NEW, past_key_values=past)
        expected = model.generate(**whole, pixel_values=pictures if len(pictures) else None, **NEW, use_cache=False)
        assert torch.equal(ours, expected)
        input_ids = ours


def test_beams_go_on_from_a_cache(model):
    first, new = make_batch(["tit", "itit"], model), make_batch(["it", "it"], model, seed=1)
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = None
    answered = model.generate(**first, **NEW, return_dict_in_generate=True)
    cache = answered.past_key_values
    cache.batch_repeat_interleave(3)
    input_ids = torch.cat([answered.sequences, new["input_ids"]], 1)
    attention_mask = torch.nn.functional.pad(
        first["attention_mask"], (0, input_ids.shape[1] - first["input_ids"].shape[1]), value=1
    )
    old_pixels, new_pixels = first["pixel_values"], new["pixel_values"]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    pixels = torch.cat([old_pixels[:1], new_pixels[:1], old_pixels[1:], new_pixels[1:]])  # row by row
    expected = model.generate(**inputs, pixel_values=pixels, **NEW, num_beams=3)
    assert torch.equal(
        model.generate(**inputs, pixel_values=new_pixels, past_key_values=cache, **NEW, num_beams=3), expected
    )


def test_a_prompt_that_ends_with_an_image_is_refused_with_what_to_do(model):
    with pytest.raises(ValueError, match=r"A prompt that ends with an image has no next token .* let text follow the image"):
        model.generate(**make_batch(["tit", "ti"], model), **NEW)
