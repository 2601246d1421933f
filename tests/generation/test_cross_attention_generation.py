"""`generate` with cross attention, whose prompts end with text: from every cache, round by round."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.generation import LAYOUT_ENDING_WITH_TEXT, NEW
from helpers.tiny import make_inputs, make_model
from modeling_visualchat.generation_visualchat import CUTS_IMAGES


@pytest.fixture(scope="module")
def model():
    return make_model(multimodal_attention="cross", image_number_keys=True).double()


def make_batch(layout, model, seed=0):
    inputs = make_inputs(layout, model, seed)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    return inputs


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("size", [None, pytest.param(4, marks=pytest.mark.skipif(not CUTS_IMAGES, reason="needs 5.23"))])
def test_cache_implementations_by_name_and_a_prefill_in_chunks(model, implementation, size):
    inputs = make_batch(LAYOUT_ENDING_WITH_TEXT, model)
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


def test_a_prompt_that_ends_with_an_image_is_refused_with_what_to_do(model):
    with pytest.raises(ValueError, match=r"A prompt that ends with an image has no next token .* let text follow the image"):
        model.generate(**make_batch(["tit", "ti"], model), **NEW)
