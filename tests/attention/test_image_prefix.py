"""The image prefix: a constant text that image tokens attend to, compared with a loop over single tokens and keys."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from helpers.image_memory import logits_of, pictures, split, text_rows
from helpers.modality import (
    DOUBLE,
    EDGES,
    LAYOUTS,
    SIDES,
    Conversations,
    assert_equal_where_kept,
    drawn,
    forward,
    layouts_of,
    make_pair,
)
from helpers.tiny import TOKENS_PER_IMAGE, make_inputs, make_model
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


PREFIX = (5, 300, 7)
VARIANTS = ["mmca", "mmca_merged"]
DECODERS = ["llama", "qwen3"]
LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"

pair_with_prefix = functools.partial(make_pair, dtype=DOUBLE, prefix=PREFIX)


def rotated(states, cos, sin):
    return apply_rotary_pos_emb(states[None, None], states[None, None], cos[None], sin[None])[0][0, 0]


@torch.no_grad()
def naive_logits(model, input_ids, images):
    """
    The logits of one conversation, query by query and key by key. `images` are the projected features of its image tokens.
    """
    decoder, config = model.model.language_model, model.config
    embed = decoder.embed_tokens
    is_image = (input_ids == config.image_token_id).tolist()
    states = embed(input_ids)
    states[torch.tensor(is_image)] = images
    prefix, length = embed(torch.tensor(config.image_prefix_ids)), len(config.image_prefix_ids)
    ranks, number = [], 0
    for one in is_image:
        number += one
        ranks.append((number - 1) // config.image_seq_length if one else None)
    numbers = [embed(torch.tensor(ids)).mean(0) for ids in config.image_number_token_ids]
    cos, sin = (part[0] for part in decoder.rotary_emb(states, torch.arange(100)[None]))

    def softmax_over(query, keys, values, scaling):
        scores = [math.exp(float(query @ key) * scaling) for key in keys]
        return sum(score / sum(scores) * value for score, value in zip(scores, values))

    for layer in decoder.layers:
        attention, norm = layer.self_attn, layer.input_layernorm

        def heads(rows, attention=attention):
            return rows.view(len(rows), -1, attention.head_dim)

        def keys_of(rows, attention=attention):
            return attention.k_norm(rows) if attention.normalizes_heads else rows

        both = torch.cat([prefix, states])
        k, v = heads(attention.k_proj(norm(both))), heads(attention.v_proj(norm(both)))
        q = heads(attention.q_proj(norm(both)))
        q = attention.q_norm(q) if attention.normalizes_heads else q
        own_k, numbered_k = keys_of(k), k.clone()
        for i, rank in enumerate(ranks):
            if rank is not None:
                numbered_k[length + i] += heads((norm(numbers[rank]) @ attention.k_proj.weight.T)[None])[0]
        numbered_k = keys_of(numbered_k)
        output = torch.zeros_like(q)
        for h in range(q.shape[1]):
            g = h // attention.num_key_value_groups

            def at(states, i, position, h=h):
                return rotated(states[i : i + 1, h], cos[position], sin[position])[0]

            def see(i, seen, query_position, keys, h=h, g=g, v=v, q=q, attention=attention):
                """`seen` holds the rows and positions of the keys."""
                query = at(q, i, query_position, h)
                found = [at(keys, j, position, g) for j, position in seen]
                return softmax_over(query, found, [v[j, g] for j, _ in seen], attention.scaling)

            before = [(j, j) for j in range(length)]
            for i in range(length):
                output[i, h] = see(i, before[: i + 1], i, own_k)
            for i, one in enumerate(is_image):
                if one:
                    output[length + i, h] = see(length + i, [*before, (length + i, length)], length, own_k)
                    continue
                seen = [(length + j, j) for j in range(i + 1)]
                parts = [seen]
                if config.multimodal_attention == "mmca":
                    parts = [[s for s in seen if is_image[s[1]] == kind] for kind in (False, True)]
                output[length + i, h] = sum(see(length + i, part, i, numbered_k) for part in parts if part)
        both = both + attention.o_proj(output.flatten(1))
        both = both + layer.mlp(layer.post_attention_layernorm(both))
        prefix, states = both[:length], both[length:]
    return model.lm_head(decoder.norm(states))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_every_attention_is_the_naive_definition(attention, decoder, variant):
    text = {"attention_bias": True}
    model = make_model(
        {"text_config": attention, "vision_config": "sdpa"},
        multimodal_attention=variant,
        image_number_keys=True,
        image_prefix_ids=list(PREFIX),
        decoder=decoder,
        text=text,
    ).double()
    # On the right: padding on the left moves positions, whose cos and sin are rounded to single precision
    inputs = make_inputs(["stis", "iis"], model, padding_side="right")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
    logits, first = forward(model, inputs).logits, 0
    for row, kept in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row, kept]
        count = int((ids == model.config.image_token_id).sum())
        expected = naive_logits(model, ids, features[first : first + count])
        torch.testing.assert_close(logits[row, kept], expected, atol=1e-9, rtol=1e-9)
        first += count


@pytest.mark.parametrize("decoder", DECODERS)
class TestFastPath:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_logits_and_hidden_states_are_the_definitions(self, decoder, variant):
        @drawn(max_examples=8)
        @given(layout=LAYOUTS, side=SIDES, last=st.integers(1, 8))
        def compare(layout, side, last):
            inputs = make_inputs(layout, fast, padding_side=side)
            expected = forward(eager, inputs, output_hidden_states=True)
            recorded = forward(fast, inputs, output_hidden_states=True)
            assert_equal_where_kept(forward(fast, inputs).logits, expected.logits, inputs)
            for ours, theirs in zip(recorded.hidden_states, expected.hidden_states):
                assert_equal_where_kept(ours, theirs, inputs)
            kept = inputs["attention_mask"][:, -last:].bool()
            ours = forward(fast, inputs, logits_to_keep=last).logits
            torch.testing.assert_close(ours[kept], expected.logits[:, -last:][kept], atol=1e-9, rtol=1e-9)

        fast, eager = pair_with_prefix(variant, decoder=decoder)
        for layout in EDGES:
            compare.hypothesis.inner_test(layout, "left", 1)
        compare()

    @pytest.mark.parametrize("supervised", ["all", "last"])
    def test_gradients_of_all_weights_are_the_definitions(self, decoder, supervised):
        fast, eager = pair_with_prefix(trains=True, decoder=decoder)
        inputs = make_inputs(["titit", "iss"], fast)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        inputs["pixel_values"][1] = inputs["pixel_values"][0]  # computed once on the fast path
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100
        settings = {}
        if supervised == "last":
            labels[:, :-1] = -100
            settings["logits_to_keep"] = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        for model in (fast, eager):
            model.zero_grad()
            model(**inputs, labels=labels, **(settings if model is fast else {})).loss.backward()
        for (name, ours), theirs in zip(fast.named_parameters(), eager.parameters()):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7, msg=name)
        assert fast.get_input_embeddings().weight.grad[300].abs().max() > 0  # which the prefix alone holds

    def test_image_memory_is_exact(self, decoder):
        model = pair_with_prefix(decoder=decoder)[0]
        album, shown = pictures(3).double(), [2, 0, 2]
        memory = model.encode_images(album)
        text, _ = split(make_inputs(["titit", "tti"], model))
        kept = text_rows(model, text)
        expected = logits_of(model, {**text, "pixel_values": album[shown]})[kept]
        some = {"image_memory": [memory[2], None, memory[2]], "pixel_values": album[[0]]}
        for images in ({"image_memory": memory[shown]}, some):
            torch.testing.assert_close(logits_of(model, {**text, **images})[kept], expected, atol=1e-9, rtol=1e-9)

    def test_a_batch_calls_the_same_modules_with_and_without_images(self, decoder):
        """As ZeRO-3 needs it in training, also of modules without weights."""
        model = make_model(decoder=decoder, image_number_keys=True, image_prefix_ids=list(PREFIX)).train()
        calls, orders = [], []
        for name, module in model.model.language_model.named_modules():
            if not any(module.children()):
                module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
            if not any(module.children()) and any(True for _ in module.parameters()):
                module.register_full_backward_hook(lambda module, *gradients, name=name: calls.append(f"back {name}"))
        for layout in (["titit"], ["tt"], ["it"]):
            inputs = make_inputs(layout, model)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            orders.append(list(calls))
            calls.clear()
        assert orders[0] == orders[1] == orders[2]
        assert orders[0].count("embed_tokens") == orders[0].count("back embed_tokens") == 3


@drawn(max_examples=8)
@given(data=st.data(), variant=st.sampled_from(VARIANTS), kind=st.sampled_from(["dynamic", "static", "eager"]))
def test_rounds_from_a_cache_equal_a_run_from_scratch(data, variant, kind):
    fast, eager = pair_with_prefix(variant)
    cache = StaticCache(config=fast.config.text_config, max_cache_len=120) if kind == "static" else DynamicCache()
    talk = Conversations(eager if kind == "eager" else fast, eager, 2, cache)
    for round_ in range(3):
        talk.say(data.draw(layouts_of(2), f"round {round_}"), data.draw(SIDES))


def test_rounds_in_pieces_that_cut_through_an_image():
    fast, eager = pair_with_prefix()
    talk = Conversations(fast, eager, 1)
    talk.say(["tit"])
    talk.say(["titt"], in_pieces_of=4)


class TestWithoutNewImages:
    def test_text_is_to_the_bit_what_it_is_without_a_prefix(self):
        for attention in ("sdpa", "eager"):
            model, without = (make_model(attention, **more) for more in ({"image_prefix_ids": list(PREFIX)}, {}))
            inputs = make_inputs(["tttt", "tt"], model)
            assert torch.equal(forward(model, inputs).logits, forward(without, inputs).logits)
            losses = [one.train()(**inputs, labels=inputs["input_ids"]).loss for one in (model, without)]
            assert torch.equal(*losses)

    def test_nothing_of_the_prefix_is_computed_or_cached(self):
        model = pair_with_prefix()[0]
        lengths, queries = [], []
        layers = model.model.language_model.layers
        hooks = [
            layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1])),
            layers[-1].self_attn.q_proj.register_forward_pre_hook(lambda module, args: queries.append(args[0].shape[1])),
        ]
        inputs = make_inputs(["titit"], model)
        length = inputs["input_ids"].shape[1]
        cache = DynamicCache()
        forward(model, inputs, past_key_values=cache, logits_to_keep=1)
        assert cache.get_seq_length() == length
        forward(model, {"input_ids": torch.tensor([[9]])}, past_key_values=cache)
        pixel_values = inputs.pop("pixel_values").double()
        memory = model.encode_images(pixel_values)
        forward(model, inputs, image_memory=memory, logits_to_keep=1)
        forward(model, {**inputs, "pixel_values": pixel_values}, logits_to_keep=torch.tensor([0, 3]))
        for hook in hooks:
            hook.remove()
        with_images, images = length + len(PREFIX), 2 * TOKENS_PER_IMAGE
        assert lengths == [with_images, 1, images + len(PREFIX), length - images, with_images]
        # Of the last layer: a token that is read; none; and where an image is read, all of them, but not the prefix
        assert queries == [1, 1, 0, 1, 1 + images]


def test_the_weights_of_an_image_token_leave_out_those_of_the_prefix():
    model = make_model("eager", image_prefix_ids=list(PREFIX))
    inputs = make_inputs(["sits"], model)
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    attentions = model(**inputs, output_attentions=True).attentions
    length = len(is_image)
    for weights in attentions:
        assert weights.shape[-2:] == (length, length)
        own = weights[0].diagonal(dim1=-2, dim2=-1)[:, is_image]
        torch.testing.assert_close(weights[0][:, is_image].sum(-1), own)
        assert (own > 0).all() and (own < 1).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_conversations_and_adapters_of_sequences_equal_each_alone(attention):
    attention = {"text_config": attention, "vision_config": "sdpa"}
    settings = {"image_prefix_ids": list(PREFIX), "multimodal_attention": "mmca_merged"}
    torch.manual_seed(1)
    lora = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": LINEARS, "init_lora_weights": False}
    model = get_peft_model(make_model(attention, **settings), LoraConfig(**lora), "first")
    model.add_adapter("second", LoraConfig(**lora))
    model.eval()
    conversations = [make_inputs([layout], model, seed) for seed, layout in enumerate(["titit", "tt", "iitt"])]
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in conversations], dim=1),
        "position_ids": torch.cat([torch.arange(one["input_ids"].shape[1]) for one in conversations])[None],
        "pixel_values": torch.cat([one["pixel_values"] for one in conversations if "pixel_values" in one]),
    }
    alone = torch.cat([logits_of(model, one) for one in conversations], dim=1)
    torch.testing.assert_close(logits_of(model, packed), alone, atol=1e-4, rtol=1e-4)

    inputs = make_inputs(["titit", "iit"], model)
    together = logits_of(model, inputs, adapter_names=["first", "second"])
    for row, name in enumerate(["first", "second"]):
        model.set_adapter(name)
        kept = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][kept], logits_of(model, inputs)[row][kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_has_the_same_gradients(reentrant):
    model = copy.deepcopy(pair_with_prefix()[0]).train()
    inputs = make_inputs(["titit", "tt"], model, padding_side="right")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_an_image_is_the_same_where_rotation_depends_on_the_length(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + k for k in range(8)]}
        rope |= {"original_max_position_embeddings": 16, **factors}
    text = {"rope_parameters": rope, "max_position_embeddings": 16 if rope_type == "dynamic" else 64}
    model = make_model(image_prefix_ids=list(PREFIX), text=text).double()
    album = pictures(2).double()
    memory = model.encode_images(album)
    for layout in (["it"], ["titttttttit"], ["tit"]):
        inputs, pixel_values = split(make_inputs(layout, model))
        count = len(pixel_values)
        expected = logits_of(model, {**inputs, "pixel_values": album[:count]})
        kept = text_rows(model, inputs)
        torch.testing.assert_close(
            logits_of(model, inputs, image_memory=memory[:count])[kept], expected[kept], atol=1e-9, rtol=1e-9
        )


class TestFingerprint:
    def test_covers_ids_and_embeddings_of_the_prefix(self, tmp_path):
        model = make_model(image_prefix_ids=list(PREFIX))
        prints = {make_model().image_fingerprint(), model.image_fingerprint()}
        prints.add(make_model(image_prefix_ids=[5, 7]).image_fingerprint())
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        prints.add(make_model(image_prefix_ids=list(PREFIX), text=rope).image_fingerprint())
        assert len(prints) == 4

        model.resize_token_embeddings(model.config.text_config.vocab_size + 3)
        assert model.image_fingerprint() in prints
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert again.config.image_prefix_ids == list(PREFIX)
        assert again.image_fingerprint() == model.image_fingerprint()

        with torch.no_grad():
            model.get_input_embeddings().weight[9] += 1.0  # of another token
            assert model.image_fingerprint() in prints
            model.get_input_embeddings().weight[PREFIX[1]] += 1.0
        assert model.image_fingerprint() not in prints

    def test_a_store_encodes_again_when_the_prefix_has_learned(self):
        model = make_model(image_prefix_ids=list(PREFIX))
        store = ImageMemoryStore(model, max_bytes=2**20)
        before = store.get(pictures(1))[0]
        with torch.no_grad():
            model.get_input_embeddings().weight[PREFIX[1]] += 1.0
        assert not torch.equal(store.get(pictures(1))[0].keys, before.keys)
        assert store.misses == 2
