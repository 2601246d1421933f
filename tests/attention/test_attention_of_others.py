"""Attention functions that others register with transformers: `causal` takes them, and everything else refuses them."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.tiny import DECODERS, make_inputs, make_model


OTHERS = {"text_config": "others", "vision_config": "sdpa"}
ENGINE = {"text_config": "engine", "vision_config": "sdpa"}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def attend_as_engines_do(module, query, key, value, attention_mask, scaling, position_ids, attention_instances, **kwargs):
    """
    The tokens of several conversations come in one sequence and without a mask. What keeps them apart is the engine's own:
    here the positions. The output has the shape (tokens, heads * head_size).
    """
    assert attention_mask is None
    attention_instances[module.layer_idx].append(query.shape)
    owner = (position_ids[0] == 0).cumsum(0)
    mask = (owner[:, None] == owner).tril()
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).reshape(query.shape[2], -1), None


AttentionInterface.register("others", sdpa_attention_forward)
AttentionMaskInterface.register("others", sdpa_mask)
AttentionInterface.register("engine", attend_as_engines_do)


@pytest.mark.parametrize("decoder", DECODERS)
def test_causal_gives_the_numbers_of_the_function(decoder):
    models = [make_model(name, decoder=decoder, multimodal_attention="causal") for name in ("sdpa", OTHERS)]
    inputs = make_inputs(["titit", "ti", "tt"], models[0])
    with torch.no_grad():
        expected, given = (model(**inputs).logits for model in models)
        assert torch.equal(given, expected)
        expected, given = (model.generate(**inputs, **GREEDY) for model in models)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_causal_can_be_called_as_engines_call_it(decoder):
    """The model without its head, image features in place, and whatever the function needs among the arguments."""
    plain, served = (make_model(name, decoder=decoder, multimodal_attention="causal").model for name in ("sdpa", ENGINE))
    conversations = [make_inputs([layout], plain, seed) for seed, layout in enumerate(["titit", "tt", "iit"])]
    embeds = []
    for one in conversations:
        embeds.append(served.get_input_embeddings()(one["input_ids"]))
        if "pixel_values" in one:
            features = served.get_image_features(one["pixel_values"], return_dict=True).pooler_output
            embeds[-1][one["input_ids"] == served.config.image_token_id] = torch.cat(features)
    instances = {layer: [] for layer in range(served.config.text_config.num_hidden_layers)}
    with torch.no_grad():
        expected = torch.cat([plain(**one).last_hidden_state for one in conversations], dim=1)
        given = served(
            input_ids=None,
            inputs_embeds=torch.cat(embeds, dim=1),
            position_ids=torch.cat([torch.arange(one.shape[1]) for one in embeds])[None],
            use_cache=False,
            return_dict=False,
            attention_instances=instances,
        )[0]
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    assert all(len(calls) == 1 for calls in instances.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"multimodal_attention": "mmca"},
        {"multimodal_attention": "mmca_merged"},
        {"multimodal_attention": "mmca_released"},
        {"multimodal_attention": "causal", "image_number_keys": True},
        {"multimodal_attention": "causal", "learned_image_numbers": 4},
    ],
    ids=["mmca", "merged", "released", "numbered", "learned"],
)
def test_all_else_is_refused(settings):
    message = "attn_implementation='others'.* would compute plain causal attention.* 'sdpa'.* the package visualchat"
    with pytest.raises(ValueError, match=message):
        make_model(OTHERS, **settings)
    model = make_model(**settings)
    model.config.text_config._attn_implementation = "others"
    with pytest.raises(ValueError, match=message):
        model(**make_inputs(["tit"], model))


@pytest.mark.parametrize("name", ["flash_attention_3", "paged|eager", "nobody's"])
def test_causal_takes_nothing_that_is_not_registered_by_others(name):
    model = make_model(multimodal_attention="causal")
    model.config.text_config._attn_implementation = name
    with pytest.raises(ValueError, match="choose one of 'eager', 'sdpa', 'flex_attention'"):
        model(**make_inputs(["tit"], model))


@pytest.mark.parametrize("variant", ["causal", "mmca"])
def test_the_decoder_takes_tokens_in_place_of_embeddings(variant):
    decoder = make_model(multimodal_attention=variant).model.language_model
    input_ids = torch.tensor([[5, 9, 17, 40]])
    embeds = decoder.get_input_embeddings()(input_ids)
    with torch.no_grad():
        given, expected = (
            decoder(**given).last_hidden_state for given in ({"input_ids": input_ids}, {"inputs_embeds": embeds})
        )
    assert torch.equal(given, expected)
    for wrong in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            decoder(**wrong)
