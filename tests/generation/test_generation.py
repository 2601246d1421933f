"""`generate`, with every decoding mode and every cache."""

import copy
import json
import pickle

import pytest
import torch
from helpers.tiny import TOKENS_PER_IMAGE, copy_llama_weights, make_inputs, make_model, make_tokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import QuantoQuantizedLayer

from modeling_visualchat.cache_visualchat import get_image_numbers


NEW = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
LAYOUT = ["tt", "titit", "iitt", "ti", "tiiiit"]


@pytest.fixture(scope="module", params=["mmca", "mmca_merged", "causal"])
def model(request):
    return make_model(multimodal_attention=request.param, image_number_keys=True)


@pytest.fixture(scope="module")
def mmca():
    return make_model(image_number_keys=True)


def rows_alone(inputs, layout):
    image = 0
    for row, parts in enumerate(layout):
        kept = inputs["attention_mask"][row].bool()
        images = parts.count("i")
        alone = {
            "input_ids": inputs["input_ids"][row][kept][None],
            "attention_mask": inputs["attention_mask"][row][kept][None],
        }
        if images:
            alone["pixel_values"] = inputs["pixel_values"][image : image + images]
        image += images
        yield alone


def test_cached_decoding_equals_uncached(model):
    inputs = make_inputs(LAYOUT, model)
    cached = model.generate(**inputs, **NEW, return_dict_in_generate=True, output_logits=True)
    uncached = model.generate(**inputs, **NEW, use_cache=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


def test_a_left_padded_batch_of_0_to_4_images_equals_its_rows_alone(model):
    inputs = make_inputs(LAYOUT, model)
    assert sorted(row.count("i") for row in LAYOUT) == [0, 1, 2, 2, 4]
    together = model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]
    for row, alone in enumerate(rows_alone(inputs, LAYOUT)):
        tokens = model.generate(**alone, **NEW)[0, alone["input_ids"].shape[1] :]
        assert tokens.tolist() == together[row].tolist()


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_decoding_modes_equal_their_uncached_selves(model, mode):
    # In double precision: a drawn token differs where rounding moves a probability across the number that was drawn
    model = copy.deepcopy(model).double()
    layout = ["tiittt"] if "prompt_lookup_num_tokens" in mode else ["titit", "tt", "iit"]
    inputs = make_inputs(layout, model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    settings = {**NEW, **mode}
    torch.manual_seed(0)
    cached = model.generate(**inputs, **settings)
    if "prompt_lookup_num_tokens" in mode:  # which needs a cache: greedy search is its definition
        settings.pop("prompt_lookup_num_tokens")
        assert torch.equal(cached, model.generate(**inputs, **settings))
    else:
        torch.manual_seed(0)
        assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    assert cached.shape[0] == len(layout) * mode.get("num_return_sequences", 1)


def test_prompt_lookup_never_proposes_a_placeholder(mmca):
    # The last two tokens stand before an image in the prompt, so the lookup finds placeholders to propose
    inputs = make_inputs(["titt"], mmca)
    input_ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :2]], dim=1)
    kwargs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": inputs["pixel_values"]}
    looked_up = mmca.generate(**kwargs, **NEW, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up, mmca.generate(**kwargs, **NEW))


def test_no_placeholder_is_ever_generated(mmca):
    model = copy.deepcopy(mmca)
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_id] = 0.0
        model.lm_head.weight[:].mul_(1e-3)  # all tokens equally likely, but for the suppression
    inputs = make_inputs(["tit"], model)
    torch.manual_seed(0)
    tokens = model.generate(**inputs, do_sample=True, max_new_tokens=40, num_return_sequences=20, eos_token_id=None)
    assert model.config.image_token_id not in tokens[:, inputs["input_ids"].shape[1] :]


def test_assisted_decoding_with_a_text_model(mmca):
    assistant = copy_llama_weights(mmca, LlamaForCausalLM(mmca.config.text_config))
    inputs = make_inputs(["titit"], mmca)
    assert torch.equal(mmca.generate(**inputs, **NEW, assistant_model=assistant), mmca.generate(**inputs, **NEW))


def test_an_assistant_that_needs_images_says_what_to_use(mmca):
    assistant = make_model(seed=3)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        mmca.generate(**make_inputs(["titit"], mmca), **NEW, assistant_model=assistant)
    text = make_inputs(["ttt"], mmca)
    assert torch.equal(mmca.generate(**text, **NEW, assistant_model=assistant), mmca.generate(**text, **NEW))


@pytest.mark.parametrize("mode", ["prompt_lookup_num_tokens", "assistant_model"])
@pytest.mark.parametrize("rounds", [["titit", "tit"], ["tttt", "ttt"], ["tit", "ttt"], ["ttt", "ti"]], ids=str)
def test_assisted_decoding_goes_on_from_a_cache(model, mode, rounds):
    assistant = copy_llama_weights(model, LlamaForCausalLM(model.config.text_config))
    assisted = {mode: assistant if mode == "assistant_model" else 4}
    first, second = (make_inputs([layout], model, seed) for seed, layout in enumerate(rounds))
    past = DynamicCache(config=model.config)
    answered = model.generate(**first, **NEW, past_key_values=past)
    input_ids = torch.cat([answered, second["input_ids"]], dim=1)
    whole = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    pictures = [one["pixel_values"] for one in (first, second) if "pixel_values" in one]
    images = {"pixel_values": torch.cat(pictures)} if pictures else {}
    expected = model.generate(**whole, **images, **NEW)
    for given in (whole, {"input_ids": input_ids}):
        ours = model.generate(**given, **images, **NEW, **assisted, past_key_values=copy.deepcopy(past))
        assert torch.equal(ours, expected)
    # The last token of an answer is not in its cache
    new = {"input_ids": input_ids[:, past.get_seq_length() :], "attention_mask": whole["attention_mask"]}
    new_images = {"pixel_values": second["pixel_values"]} if "pixel_values" in second else {}
    ours = model.generate(**new, **new_images, **NEW, **assisted, past_key_values=copy.deepcopy(past))
    assert torch.equal(ours[:, -NEW["max_new_tokens"] :], expected[:, -NEW["max_new_tokens"] :])
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=rf"`{name}` with `{mode}` and a filled `past_key_values`"):
            model.generate(**whole, **images, **NEW, **assisted, **{name: True}, past_key_values=past)


def test_early_exit_is_refused_by_name(mmca):
    with pytest.raises(ValueError, match=r"`assistant_early_exit`.* use `prompt_lookup_num_tokens`"):
        mmca.generate(**make_inputs(["tit"], mmca), **NEW, assistant_early_exit=2)


def test_streamers(mmca):
    tokenizer = make_tokenizer()
    inputs = make_inputs(["titit"], mmca)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    tokens = mmca.generate(**inputs, **NEW, streamer=streamer)[0, inputs["input_ids"].shape[1] :]
    assert "".join(streamer) == tokenizer.decode(tokens)


@pytest.mark.parametrize("images", ["pixel_values", "in place"])
def test_inputs_embeds(model, images):
    inputs = make_inputs(LAYOUT, model)
    expected = model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    kwargs = {"pixel_values": inputs["pixel_values"]}
    if images == "in place":
        is_image = inputs["input_ids"] == model.config.image_token_id
        embeds[is_image] = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output).detach()
        kwargs = {"mm_token_type_ids": is_image.long()}
    tokens = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **kwargs, **NEW)
    assert torch.equal(tokens, expected)


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


def test_a_generation_config_is_saved_and_loaded(mmca, tmp_path):
    mmca.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == [mmca.config.image_token_id]


def test_stopping_criteria_and_scores(mmca):
    inputs = make_inputs(["titit"], mmca)
    outputs = mmca.generate(
        **inputs,
        **{**NEW, "max_new_tokens": 50},
        stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids.shape[1] >= inputs["input_ids"].shape[1] + 3]),
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
    )
    assert outputs.sequences.shape[1] == inputs["input_ids"].shape[1] + 3 == 6 + 2 * TOKENS_PER_IMAGE + 3
    assert len(outputs.scores) == len(outputs.hidden_states) == 3


@pytest.mark.parametrize("given", ["all images", "new images", "memory of all", "memory of new"])
def test_beams_go_on_from_a_cache(given):
    """The cache is repeated for the beams first, as with any transformers model."""
    model = make_model(image_number_keys=True)
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
    images = {
        "all images": {"pixel_values": pixels},
        "new images": {"pixel_values": new_pixels},
        "memory of all": {"image_memory": model.encode_images(pixels)},
        "memory of new": {"image_memory": model.encode_images(new_pixels)},
    }[given]
    assert torch.equal(model.generate(**inputs, **images, past_key_values=cache, **NEW, num_beams=3), expected)


class TestGuidance:
    NEGATIVE = torch.tensor([[5, 6, 7]])

    def test_a_negative_prompt_of_text(self, mmca):
        """By hand: what each prompt says of the next token, the difference weighed."""
        inputs = make_inputs(["titit"], mmca)
        scale, ids, negative = 1.5, inputs["input_ids"], self.NEGATIVE
        with torch.no_grad():
            for _ in range(4):
                logits = mmca(ids, pixel_values=inputs["pixel_values"]).logits[:, -1].log_softmax(-1)
                without = mmca(negative).logits[:, -1].log_softmax(-1)
                scores = scale * (logits - without) + without
                scores[:, mmca.config.image_token_id] = -torch.inf
                ids, negative = (torch.cat([one, scores.argmax(-1)[:, None]], -1) for one in (ids, negative))
        settings = {**NEW, "max_new_tokens": 4, "guidance_scale": scale}
        assert torch.equal(mmca.generate(**inputs, **settings, negative_prompt_ids=self.NEGATIVE), ids)
        assert mmca.generate(**inputs, **settings).shape == ids.shape  # the last token by default

    def test_a_negative_prompt_with_placeholders_is_refused_with_what_to_give(self, mmca):
        inputs = make_inputs(["tit"], mmca)
        message = f"`negative_prompt_ids` holds {TOKENS_PER_IMAGE} image placeholder .* Give `negative_prompt_ids` of text"
        with pytest.raises(ValueError, match=message):
            mmca.generate(**inputs, **NEW, guidance_scale=2.0, negative_prompt_ids=inputs["input_ids"])
        config = GenerationConfig(**NEW, guidance_scale=2.0)
        with pytest.raises(ValueError, match=message):
            mmca.generate(**inputs, generation_config=config, negative_prompt_ids=inputs["input_ids"])
        with pytest.raises(ValueError, match=r"the prompt's last token, its negative prompt by default, holds 1 image"):
            mmca.generate(**make_inputs(["ti"], mmca), **NEW, guidance_scale=2.0)
        unused = mmca.generate(**inputs, **NEW, guidance_scale=1.0, negative_prompt_ids=inputs["input_ids"])
        assert torch.equal(unused, mmca.generate(**inputs, **NEW))


class TestInTrainingMode:
    """TRL's GRPO generates with a model that trains."""

    @pytest.mark.parametrize(("layout", "runs"), [("titit", 1), ("tt", 0)])
    def test_the_tower_runs_once_for_pictures_and_never_for_tokens(self, layout, runs):
        model = make_model(image_number_keys=True).train()
        called = []
        model.model.vision_tower.register_forward_hook(lambda *_: called.append(1))
        inputs = make_inputs([layout], model)
        answer = model.generate(**inputs, **{**NEW, "max_new_tokens": 20})
        assert len(called) == runs
        assert torch.equal(answer, model.eval().generate(**inputs, **{**NEW, "max_new_tokens": 20}))

    def test_a_training_step_of_text_alone_still_runs_it(self):
        model = make_model(image_number_keys=True).train()
        inputs = make_inputs(["tt"], model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.model.multi_modal_projector.parameters())


@pytest.mark.parametrize("do_sample", [None, True])
def test_sampling_values_of_a_joined_decoder(do_sample, tmp_path):
    model = make_model()
    text = LlamaForCausalLM(model.config.text_config)
    text.save_pretrained(tmp_path / "decoder")
    path = tmp_path / "decoder" / "generation_config.json"
    values = {"temperature": 0.9, "top_p": 0.6, "do_sample": do_sample, "pad_token_id": -1, "length_penalty": 0.5}
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    text = LlamaForCausalLM.from_pretrained(tmp_path / "decoder")
    joined = type(model).from_vision_text_pretrained(model.model.vision_tower, text)
    joined.save_pretrained(tmp_path / "joined")
    saved = GenerationConfig.from_pretrained(tmp_path / "joined")
    expected = (0.9, 0.6, True) if do_sample else (None, None, None)
    assert (saved.temperature, saved.top_p, saved.do_sample) == expected
    assert (saved.pad_token_id, saved.length_penalty) == (None, None)
    assert text.generation_config.temperature == 0.9  # the caller's is left alone


def test_what_cannot_be_saved_is_refused_when_joining():
    model = make_model()
    text = LlamaForCausalLM(model.config.text_config)
    text.generation_config.output_scores = True
    with pytest.raises(ValueError, match="output_scores"):
        type(model).from_vision_text_pretrained(model.model.vision_tower, text)
