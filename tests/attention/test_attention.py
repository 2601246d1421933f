"""What must be true of multi-modal causal attention."""

import json
import math

import pytest
import torch
from transformers import AutoModel, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from helpers.tiny import copy_llama_weights, make_inputs, make_model
from modeling_visualchat import decoder_visualchat
from modeling_visualchat.sequence_attention_visualchat import SequencePlan


VARIANTS = ["mmca", "mmca_merged", "causal"]
LAYOUTS = {
    "image first": ["itt"],
    "image last": ["tti"],
    "adjacent images": ["tiit"],
    "images apart": ["titittit"],
    "only an image": ["i"],
    "text only": ["ttt"],
    "unequal rows": ["tt", "titit", "iit", "ti"],
}


def naive_attention(q_BHD, k_BHD, v_BHD, is_image, is_padding, variant, scaling):
    """The definition (arXiv 2309.14327, section 4.1), query by query and key by key. Lists of vectors: q[b][h][i]."""
    output = torch.zeros_like(q_BHD)
    batch, heads, length, _ = q_BHD.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                if is_image[b, i] and variant != "causal":
                    output[b, h, i] = v_BHD[b, h, i]
                    continue
                visible = [j for j in range(i + 1) if not is_padding[b, j]]
                if variant == "mmca":
                    parts = [[j for j in visible if not is_image[b, j]], [j for j in visible if is_image[b, j]]]
                else:
                    parts = [visible]
                for keys in parts:
                    scores = [math.exp(float(q_BHD[b, h, i] @ k_BHD[b, h, j]) * scaling) for j in keys]
                    for score, j in zip(scores, keys):
                        output[b, h, i] += score / sum(scores) * v_BHD[b, h, j]
    return output


def prepare_attention(model, layout):
    """One attention layer of the model, and what it needs for a batch of this layout."""
    inputs = make_inputs(layout, model)
    config = model.config.text_config
    is_image = inputs["input_ids"] == model.config.image_token_id
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    position_ids = torch.arange(is_image.shape[1])[None]
    plan = SequencePlan(
        model.config.multimodal_attention,
        config,
        embeds,
        inputs["attention_mask"],
        position_ids,
        None,
        is_image,
        model.config.image_seq_length,
    )
    rotary = model.model.language_model.rotary_emb(embeds, position_ids)
    attention = model.model.language_model.layers[1].self_attn.requires_grad_(False)
    return attention, is_image, inputs["attention_mask"] == 0, rotary, plan


@pytest.mark.parametrize("bias", ["no bias", "bias", "bias twice", "bias, normalized"])
@pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_eager_is_the_definition(layout, variant, numbered, bias):
    settings = {"text": {"attention_bias": bias != "no bias"}, "image_number_key_bias": bias == "bias twice"}
    settings["decoder"] = "qwen3" if bias == "bias, normalized" else "llama"
    model = make_model("eager", multimodal_attention=variant, image_number_keys=numbered, **settings).double()
    attention, is_image, is_padding, rotary, plan = prepare_attention(model, layout)
    batch, length = is_image.shape
    torch.manual_seed(1)
    hidden_states = torch.randn(batch, length, 64, dtype=torch.float64)
    number_states = torch.randn(12, 64, dtype=torch.float64) if numbered else None
    output, weights = attention(hidden_states, rotary, plan, number_states_NC=number_states)

    def heads(states):
        return states.view(batch, length, -1, attention.head_dim).transpose(1, 2)

    keys = attention.k_proj(hidden_states)
    if numbered:
        for b in range(batch):
            image_rows = is_image[b].nonzero()[:, 0].tolist()
            for rank, row in enumerate(image_rows):
                keys[b, row] += number_states[rank // model.config.image_seq_length] @ attention.k_proj.weight.T
                if bias == "bias twice":
                    keys[b, row] += attention.k_proj.bias
    q, k = heads(attention.q_proj(hidden_states)), heads(keys)
    if bias == "bias, normalized":
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
            for x, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    v = heads(attention.v_proj(hidden_states))
    groups = attention.num_key_value_groups
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    expected = naive_attention(q, k, v, is_image, is_padding, variant, attention.head_dim**-0.5)
    expected = attention.o_proj(expected.transpose(1, 2).flatten(2))

    kept = ~is_padding
    torch.testing.assert_close(output[kept], expected[kept], atol=1e-10, rtol=0)
    from_weights = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(from_weights[kept], expected[kept], atol=1e-10, rtol=0)


def test_weights_of_a_text_row_sum_to_two_after_the_first_image():
    model = make_model("eager")
    inputs = make_inputs(["titt"], model)
    attentions = model(**inputs, output_attentions=True).attentions
    tokens = model.config.image_seq_length
    expected = torch.tensor([1.0] * (2 + tokens) + [2.0] * 4)
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1)[0], expected.expand(weights.shape[1], -1))


@pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
@pytest.mark.parametrize(
    ("implementation", "variant"),
    [
        *(("sdpa", variant) for variant in VARIANTS),
        ("flex_attention", "mmca"),
        ("flex_attention", "mmca_merged"),
        pytest.param("flex_attention", "causal", marks=pytest.mark.slow),  # transformers compiles it for a minute or two
    ],
)
def test_backends_equal_eager(implementation, variant, numbered, monkeypatch):
    monkeypatch.setattr(decoder_visualchat, "computes_by_flex", lambda device: True)  # on a CPU too
    # The tower is the same on both sides: its rounding is not what is compared
    settings = {"multimodal_attention": variant, "image_number_keys": numbered}
    eager = make_model({"text_config": "eager", "vision_config": "sdpa"}, **settings)
    other = make_model({"text_config": implementation, "vision_config": "sdpa"}, **settings)
    names = LAYOUTS if implementation == "sdpa" else ["images apart", "unequal rows"]  # flex compiles every shape
    for layout in (LAYOUTS[name] for name in names):
        inputs = make_inputs(layout, eager)
        kept = inputs["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(
                other(**inputs).logits[kept], eager(**inputs).logits[kept], atol=1e-5, rtol=1e-5, msg=str(layout)
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_flex_attention_trains_on_a_cpu(variant):
    sdpa = make_model("sdpa", multimodal_attention=variant).train()
    flex = make_model({"text_config": "flex_attention", "vision_config": "sdpa"}, multimodal_attention=variant).train()
    for layout in (["titit", "iit"], ["tt"]):
        inputs = make_inputs(layout, sdpa, padding_side="right")
        for model in (sdpa, flex):
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
        for (name, expected), ours in zip(sdpa.named_parameters(), flex.parameters()):
            torch.testing.assert_close(ours.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_bias_of_keys_counts_once_and_as_trained_in_folders_of_earlier_versions(tmp_path):
    settings = {"image_number_keys": True, "text": {"attention_bias": True}}
    model = make_model(**settings)
    inputs = make_inputs(["titit"], model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert reloaded.config.image_number_key_bias is False

    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["image_number_key_bias"]  # a field that such folders lack
    (tmp_path / "config.json").write_text(json.dumps(saved))
    earlier = AutoModel.from_pretrained(tmp_path)
    assert earlier.config.image_number_key_bias is True
    reference = make_model("eager", **settings, image_number_key_bias=True)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = reference(**inputs).logits
        torch.testing.assert_close(earlier(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        assert (reloaded(**inputs).logits - expected).abs().max() > 0.1


def test_an_unsupported_backend_says_what_to_use(tmp_path):
    message = r"flash_attention_\d.*'eager', 'sdpa', 'flex_attention'"
    model = make_model()
    with pytest.raises(ValueError, match=message):
        make_model("flash_attention_2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path, attn_implementation="flash_attention_3")
    model.config.text_config._attn_implementation = "flash_attention_3"
    with pytest.raises(ValueError, match=message):
        model(**make_inputs(["tit"], model))


@pytest.mark.parametrize("variant", [*VARIANTS, "cross"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "padded"])
def test_without_images_every_variant_is_llama(implementation, variant, padded):
    model = make_model(implementation, multimodal_attention=variant, image_number_keys=True)
    llama = LlamaForCausalLM._from_config(model.config.text_config, attn_implementation=implementation)
    llama = copy_llama_weights(model, llama)
    inputs = make_inputs(["tttt", "tt" if padded else "tttt"], model)
    with torch.no_grad():
        ours, stock = model(**inputs).logits, llama(**inputs).logits
    assert torch.equal(ours[inputs["attention_mask"].bool()], stock[inputs["attention_mask"].bool()])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_causal_is_llama_over_the_same_embeddings(implementation):
    model = make_model(implementation, multimodal_attention="causal")
    llama = LlamaModel._from_config(model.config.text_config, attn_implementation=implementation).eval()
    llama.load_state_dict(model.model.language_model.state_dict())
    inputs = make_inputs(["titit", "ti"], model)
    with torch.no_grad():
        outputs = model.model(**inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        is_image = inputs["input_ids"] == model.config.image_token_id
        embeds[is_image] = outputs.image_hidden_states.flatten(0, 1)
        stock = llama(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.last_hidden_state[kept], stock[kept], atol=1e-5, rtol=1e-5)


def test_merged_text_rows_are_one_softmax_over_all_visible_keys():
    # The weights of a text row equal those of causal attention with the same queries and keys: in the first layer
    merged = make_model("eager", multimodal_attention="mmca_merged")
    causal = make_model("eager", multimodal_attention="causal")
    inputs = make_inputs(["titit"], merged)
    is_text = inputs["input_ids"][0] != merged.config.image_token_id
    ours = merged(**inputs, output_attentions=True).attentions[0][0][:, is_text]
    theirs = causal(**inputs, output_attentions=True).attentions[0][0][:, is_text]
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))


@pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
@pytest.mark.parametrize("variant", [*VARIANTS, "cross"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_change_reaches_no_earlier_row(implementation, variant, numbered):
    model = make_model(implementation, multimodal_attention=variant, image_number_keys=numbered)
    inputs = make_inputs(["titit"], model)
    tokens = model.config.image_seq_length
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True).hidden_states
        for image, first_row in ((0, 2), (1, 4 + tokens)):
            pixel_values = inputs["pixel_values"].clone()
            pixel_values[image] = 1.0
            after = model(**{**inputs, "pixel_values": pixel_values}, output_hidden_states=True).hidden_states
            for old, new in zip(before, after):
                assert torch.equal(old[:, :first_row], new[:, :first_row])
            assert not torch.equal(before[-1][:, first_row:], after[-1][:, first_row:])
        for row in (0, 2 + tokens, inputs["input_ids"].shape[1] - 1):
            input_ids = inputs["input_ids"].clone()
            input_ids[0, row] = 300
            after = model(**{**inputs, "input_ids": input_ids}, output_hidden_states=True).hidden_states
            for old, new in zip(before, after):
                assert torch.equal(old[:, :row], new[:, :row])


@pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
@pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_images_hidden_states_depend_on_the_image_alone(implementation, variant, numbered):
    model = make_model(implementation, multimodal_attention=variant, image_number_keys=numbered)
    inputs = make_inputs(["i"], model)
    picture = inputs["pixel_values"]
    tokens = model.config.image_seq_length
    others = torch.randn(2, *picture.shape[1:])
    with torch.no_grad():
        alone = model(**inputs, output_hidden_states=True).hidden_states
        for layout, index, first_row in (("ttit", 0, 4), ("tiit", 1, 2 + tokens), ("tiiit", 2, 2 + 2 * tokens)):
            conversation = make_inputs([layout], model, seed=5)
            conversation["pixel_values"] = torch.cat([others[:index], picture])
            elsewhere = model(**conversation, output_hidden_states=True).hidden_states
            for one, other in zip(alone, elsewhere):
                torch.testing.assert_close(other[:, first_row : first_row + tokens], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_text_before_the_first_image_gets_exactly_nothing_from_images(implementation):
    model = make_model({"text_config": implementation, "vision_config": "sdpa"})

    def with_image_rows(value):
        attention, is_image, _, rotary, plan = prepare_attention(model, ["ttitit", "tti"])
        torch.manual_seed(0)
        hidden_states = torch.randn(*is_image.shape, 64).masked_fill(is_image[..., None], value)
        return attention(hidden_states, rotary, plan)[0]

    nothing, huge = with_image_rows(0.0), with_image_rows(1e18)
    padding = nothing.shape[1] - 4 - model.config.image_seq_length
    assert torch.equal(nothing[0, :4], huge[0, :4])
    assert torch.equal(nothing[1, padding : padding + 4], huge[1, padding : padding + 4])
    assert not torch.equal(nothing[0, 4 + model.config.image_seq_length :], huge[0, 4 + model.config.image_seq_length :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [*VARIANTS, "cross"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_half_precision_has_no_nan(implementation, variant, dtype):
    model = make_model(
        implementation, multimodal_attention=variant, image_number_keys=True, text={"initializer_range": 0.05}
    )
    inputs = make_inputs(["tt", "titit", "iit", "ti"], model)
    reference = model(**inputs).logits
    model = model.to(dtype).train()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    outputs = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
    kept = inputs["attention_mask"].bool()
    assert outputs.logits.isfinite().all()
    torch.testing.assert_close(outputs.logits[kept].float(), reference[kept], atol=0.3, rtol=0.3)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
