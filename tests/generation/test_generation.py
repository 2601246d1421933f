"""`generate`, with every decoding mode."""

import copy
import json

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from helpers.generation import LAYOUT, LAYOUT_ENDING_WITH_TEXT, NEW, rows_alone
from helpers.tiny import TOKENS_PER_IMAGE, copy_llama_weights, make_inputs, make_model, make_tokenizer
from helpers.versions import needs_transformers


def test_a_left_padded_batch_of_0_to_4_images_equals_its_rows_alone(any_model):
    layout = LAYOUT_ENDING_WITH_TEXT if any_model.config.multimodal_attention == "cross" else LAYOUT
    inputs = make_inputs(layout, any_model)
    assert sorted(row.count("i") for row in layout) == [0, 1, 2, 2, 4]
    together = any_model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]
    for row, alone in enumerate(rows_alone(inputs, layout)):
        tokens = any_model.generate(**alone, **NEW)[0, alone["input_ids"].shape[1] :]
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
def test_decoding_modes_equal_their_uncached_selves(any_model, mode):
    # In double precision: a drawn token differs where rounding moves a probability across the number that was drawn
    model = copy.deepcopy(any_model).double()
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


@needs_transformers("5.18", "it hands images to the assistant")
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


@needs_transformers("5.18", "it knows a cache of the whole prompt alone")
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
