"""Learned numbers of images: with the embeddings that spell the numbers as their values, they are numbered image keys."""

import pytest
import torch
from transformers import AutoModel

from helpers.tiny import make_config, make_inputs, make_model
from modeling_visualchat import VisualChatForCausalLM


NUMBERS = 3
LAYOUT = ["titit", "tiits"]


def make_two(attn_implementation: str, decoder: str = "llama", **overrides) -> list[VisualChatForCausalLM]:
    """A model with numbered image keys, and one whose learned numbers are what that one makes of the token embedding."""
    spelled = make_model(
        attn_implementation, decoder=decoder, image_number_keys=True, image_number_token_ids=[[5], [6], [5, 7]], **overrides
    )
    learned = make_model(attn_implementation, decoder=decoder, learned_image_numbers=NUMBERS, **overrides)
    learned.load_state_dict(spelled.state_dict(), strict=False)
    with torch.no_grad():
        embeds = spelled.model.embed_image_numbers(spelled.get_input_embeddings().weight)
        for layer in learned.model.language_model.layers:
            layer.self_attn.image_numbers.weight[:NUMBERS] = layer.input_layernorm(embeds)
            layer.self_attn.image_numbers.weight[NUMBERS:] = 0  # of the tokens of an image
    return [spelled, learned]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize(
    ("decoder", "overrides"), [("llama", {}), ("qwen3", {"multimodal_attention": "mmca_merged", "image_prefix_ids": [5, 9]})]
)
@torch.no_grad()
def test_they_are_numbered_keys_with_values_of_their_own(attn_implementation, decoder, overrides):
    spelled, learned = make_two(attn_implementation, decoder, **overrides)
    inputs = make_inputs(LAYOUT, spelled)
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(learned(**inputs).logits[is_token], spelled(**inputs).logits[is_token], atol=1e-5, rtol=1e-5)
    generated = [model.generate(**inputs, max_new_tokens=6, do_sample=False) for model in (spelled, learned)]
    assert torch.equal(*generated)


@torch.no_grad()
def test_a_key_is_of_the_number_and_of_the_token():
    model = make_model(learned_image_numbers=NUMBERS)
    attention = model.model.language_model.layers[0].self_attn
    keys = attention.k_proj(attention.image_numbers.weight)
    table = attention._make_learned_keys(keys)
    tokens = model.config.image_seq_length
    assert table.shape == (1 + NUMBERS * tokens, keys.shape[1]) and not table[0].any()
    torch.testing.assert_close(table[1 + 2 * tokens + 4], keys[2] + keys[NUMBERS + 4])


@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
@torch.no_grad()
def test_all_paths_add_the_same_keys(decoder):
    settings = {"decoder": decoder, "learned_image_numbers": NUMBERS, "multimodal_attention": "mmca_merged"}
    models = [make_model(name, **settings).double() for name in ("eager", "sdpa")]
    inputs = make_inputs(LAYOUT, models[0])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != models[0].config.image_token_id)
    expected, logits = (model(**inputs).logits[is_text] for model in models)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # eager takes the softmax in float32
    assert torch.equal(*(model.generate(**inputs, max_new_tokens=6, do_sample=False) for model in models))
    remembered = models[1](**inputs | {"pixel_values": None}, image_memory=models[1].encode_images(inputs["pixel_values"]))
    torch.testing.assert_close(remembered.logits[is_text], logits, atol=1e-9, rtol=1e-9)
    other = make_model("sdpa", **settings).double()
    for layer in other.model.language_model.layers:
        layer.self_attn.image_numbers.weight[NUMBERS:] = 0
    assert not torch.allclose(other(**inputs).logits[is_text], expected, atol=1e-3)


@torch.no_grad()
def test_image_memory_is_numbered_where_it_is_used():
    _, model = make_two("sdpa", image_prefix_ids=[5])
    inputs = make_inputs(LAYOUT, model)
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    expected = model(**inputs).logits[is_text]
    memory = model.encode_images(inputs.pop("pixel_values"))
    torch.testing.assert_close(model(**inputs, image_memory=memory).logits[is_text], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_they_are_nothing_at_the_start(tmp_path):
    model = VisualChatForCausalLM(make_config(learned_image_numbers=NUMBERS)).eval()
    plain = VisualChatForCausalLM(make_config()).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    inputs = make_inputs(LAYOUT, model)
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    # A model that was trained without them gets them so
    plain.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, learned_image_numbers=NUMBERS)
    assert not any(layer.self_attn.image_numbers.weight.any() for layer in loaded.model.language_model.layers)


def test_they_train_with_the_projector_and_the_embedding_need_not():
    _, model = make_two("sdpa")
    model.train().freeze_for_alignment(train_embedding=False)
    inputs = make_inputs(LAYOUT, model)
    model(**inputs, labels=inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    numbers = {name for name in trained if "image_numbers" in name}
    assert len(numbers) == model.config.text_config.num_hidden_layers
    assert trained - numbers == {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in numbers)


def test_a_batch_without_images_gives_them_a_gradient_of_zero():
    """Distributed training waits for one of every parameter that trains."""
    _, model = make_two("sdpa")
    model.train().freeze_for_alignment()
    inputs = make_inputs(["ttt"], model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [layer.self_attn.image_numbers.weight.grad for layer in model.model.language_model.layers]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_more_images_than_numbers_are_refused():
    _, model = make_two("sdpa")
    with pytest.raises(ValueError, match="holds 4 images, but the model has only 3 numbers"):
        model(**make_inputs(["tiiiit"], model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learned_image_numbers": -1}, "`learned_image_numbers` must be 0 or more, got -1"),
        ({"learned_image_numbers": 2, "image_number_keys": True}, "takes the place of `image_number_keys`: set one of them"),
        (
            {"learned_image_numbers": 2, "multimodal_attention": "mmca_released"},
            "`learned_image_numbers` is not for multimodal_attention='mmca_released'",
        ),
    ],
)
def test_configs_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        make_config(**fields)
