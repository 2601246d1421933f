"""Decoders of every family: alone they are the stock model's, with images MMCA holds, and they join, save and train."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionModel, MistralConfig, Qwen3Config

from helpers.image_memory import logits_of, pictures, split, text_rows
from helpers.modality import DOUBLE, EDGES, LAYOUTS, SIDES, assert_equal_where_kept, drawn, forward, make_pair
from helpers.tiny import DECODERS, copy_llama_weights, make_config, make_inputs, make_model
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM
from modeling_visualchat import decoders_visualchat as families
from visualchat.training.train import LORA_TARGETS


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def make_stock(model: VisualChatForCausalLM, implementation: str = "sdpa") -> torch.nn.Module:
    """The family's own model, with the decoder's weights."""
    kind = families.find_decoder_family(model.config.text_config).causal_lm_class
    return copy_llama_weights(model, kind._from_config(model.config.text_config, attn_implementation=implementation))


def test_every_family_has_a_tiny_decoder():
    assert set(DECODERS) == set(families.DECODERS)


@pytest.mark.parametrize("decoder", DECODERS)
class TestFamilies:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_text_alone_is_the_stock_models(self, decoder, implementation, tied):
        rope = {**ROPE, "original_max_position_embeddings": 256}
        text = {"tie_word_embeddings": tied, "rope_parameters": rope}
        model = make_model(implementation, decoder=decoder, text=text, image_number_keys=True)
        stock = make_stock(model, implementation)
        inputs = make_inputs(["tttt", "tt"], model)
        kept = inputs["attention_mask"].bool()
        ours, theirs = (forward(one, inputs, use_cache=True) for one in (model, stock))
        torch.testing.assert_close(ours.logits[kept], theirs.logits[kept], atol=1e-5, rtol=1e-5)
        more = make_inputs(["tt", "tt"], model, seed=1)
        more["attention_mask"] = torch.cat([inputs["attention_mask"], more["attention_mask"]], dim=1)
        following = (
            forward(one, more, past_key_values=output.past_key_values).logits
            for one, output in ((model, ours), (stock, theirs))
        )
        torch.testing.assert_close(*following, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    @pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
    def test_the_fast_path_is_the_definition(self, decoder, variant, numbered):
        @drawn(max_examples=6)
        @given(layout=LAYOUTS, side=SIDES)
        def compare(layout, side):
            inputs = make_inputs(layout, fast, padding_side=side)
            assert_equal_where_kept(forward(fast, inputs).logits, forward(eager, inputs).logits, inputs)

        fast, eager = make_pair(variant, numbered, dtype=DOUBLE, decoder=decoder)
        for layout in EDGES:
            inputs = make_inputs(layout, fast)
            assert_equal_where_kept(forward(fast, inputs).logits, forward(eager, inputs).logits, inputs)
        compare()

    def test_gradients_of_the_fast_path_are_the_definitions(self, decoder):
        pair = make_pair(dtype=DOUBLE, trains=True, decoder=decoder)
        inputs = make_inputs(["titit", "iss"], pair[0])
        inputs["pixel_values"] = inputs["pixel_values"].double()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100
        for model in pair:
            model.zero_grad()
            model(**inputs, labels=labels).loss.backward()
        for (name, ours), theirs in zip(pair[0].named_parameters(), pair[1].parameters()):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-6, msg=name)

    @drawn(max_examples=6)
    @given(shown=st.lists(st.integers(0, 2), min_size=3, max_size=3), known=st.lists(st.booleans(), min_size=3, max_size=3))
    def test_image_memory_is_exact(self, decoder, shown, known):
        model = make_pair(dtype=DOUBLE, decoder=decoder)[0]
        album = pictures(3).double()
        memory = model.encode_images(album)
        text, _ = split(make_inputs(["titit", "tti"], model))
        expected = logits_of(model, {**text, "pixel_values": album[shown]})
        mixed = {"image_memory": [memory[k] if is_known else None for k, is_known in zip(shown, known)]}
        if not all(known):
            mixed["pixel_values"] = album[[k for k, is_known in zip(shown, known) if not is_known]]
        kept = text_rows(model, text)
        torch.testing.assert_close(logits_of(model, {**text, **mixed})[kept], expected[kept], atol=1e-9, rtol=1e-9)

    def test_a_conversation_goes_on_from_its_cache(self, decoder):
        model = make_pair(dtype=DOUBLE, decoder=decoder)[0]
        whole = make_inputs(["titittit"], model)
        whole["pixel_values"] = whole["pixel_values"].double()
        expected, length = forward(model, whole).logits, whole["input_ids"].shape[1]
        cut = length - 9  # the last image and the text around it
        first = {"input_ids": whole["input_ids"][:, :cut], "pixel_values": whole["pixel_values"][:2]}
        cache = forward(model, first, use_cache=True).past_key_values
        rest = {"input_ids": whole["input_ids"][:, cut:], "pixel_values": whole["pixel_values"][2:]}
        logits = forward(model, rest, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, cut:], atol=1e-9, rtol=1e-9)

    def test_saved_and_loaded_it_is_the_same(self, decoder, tmp_path):
        model = make_model(decoder=decoder, image_number_keys=True)
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert type(again.config.text_config) is families.DECODERS[decoder].config_class
        inputs = make_inputs(["titit", "tt"], model)
        kept = inputs["attention_mask"].bool()
        assert torch.equal(forward(again, inputs).logits[kept], forward(model, inputs).logits[kept])
        for cache in ("dynamic", "static"):
            tokens = again.generate(**inputs, **GREEDY, cache_implementation=cache)
            assert torch.equal(tokens, model.generate(**inputs, **GREEDY))

    def test_a_folder_of_the_stock_model_joins(self, decoder, tmp_path):
        config = make_config(decoder=decoder, text={"vocab_size": 300})
        stock = families.DECODERS[decoder].causal_lm_class(config.text_config)
        stock.save_pretrained(tmp_path / "text")
        CLIPVisionModel(config.vision_config).save_pretrained(tmp_path / "vision")
        joined = VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))
        inputs = make_inputs(["tttt"], joined)
        torch.testing.assert_close(forward(joined, inputs).logits[..., :300], forward(stock.eval(), inputs).logits)
        assert joined.config.image_token_id == 300
        assert stock.config.vocab_size == 300

    def test_lora_tensor_parallelism_and_placement_find_the_modules(self, decoder):
        model = make_model(decoder=decoder)
        stock = make_stock(model)
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        found = {name for name in linears if re.fullmatch(LORA_TARGETS["decoder"], name)}
        assert found == {name for name in linears if ".language_model.layers." in name}
        prefix = "language_model."
        plan = {name.removeprefix(prefix) for name in model.model.tp_plan if name.startswith(prefix)}
        assert plan == set(stock.model.tp_plan) >= set(families.DECODERS[decoder].config_class.base_model_tp_plan)
        assert [name for name, _ in model.model.language_model.named_parameters()] == [
            name for name, _ in stock.model.named_parameters()
        ]

    def test_a_batch_calls_the_same_modules_with_and_without_images(self, decoder):
        """As ZeRO-3 needs it: the processes gather each module's weights together, in the order of calls."""
        model = make_model(decoder=decoder, image_number_keys=True).train()
        calls = []
        for name, module in model.model.language_model.named_modules():
            if not any(module.children()) and any(True for _ in module.parameters()):
                module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        orders = []
        for layout in (["titit"], ["tt"], ["ii"]):
            inputs = make_inputs(layout, model)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            orders.append([name for name in calls if name != "embed_tokens"])
            calls.clear()
        assert orders[0] == orders[1] == orders[2]


class TestSlidingWindows:
    def test_one_that_hides_nothing_is_left_out(self):
        text = make_config(decoder="mistral").text_config.to_dict()
        for fields in ({**text, "sliding_window": 1024}, {**text, "sliding_window": 4096}):
            assert VisualChatConfig(text_config=fields).text_config.sliding_window is None
        theirs = MistralConfig(sliding_window=8, max_position_embeddings=8)
        assert VisualChatConfig(text_config=theirs).text_config.sliding_window is None
        assert theirs.sliding_window == 8
        unused = Qwen3Config(use_sliding_window=True, sliding_window=8, num_hidden_layers=2, max_window_layers=2)
        config = VisualChatConfig(text_config=unused).text_config
        assert (config.sliding_window, config.use_sliding_window) == (None, False)
        assert config.layer_types == ["full_attention"] * 2
        assert type(config).from_dict(config.to_dict()).layer_types == config.layer_types

    @pytest.mark.parametrize(
        ("text", "layers"),
        [
            (MistralConfig(sliding_window=8, num_hidden_layers=2), "2 of the 2 layers of this 'mistral' decoder.* layer 0"),
            (
                Qwen3Config(use_sliding_window=True, sliding_window=8, num_hidden_layers=3, max_window_layers=1),
                "2 of the 3 layers of this 'qwen3' decoder.* layer 1",
            ),
        ],
        ids=["mistral", "qwen3"],
    )
    def test_one_that_hides_tokens_is_refused_by_name(self, text, layers, tmp_path):
        message = f"{layers}, attend to the last 8 tokens only .*`max_position_embeddings` is {text.max_position_embeddings}"
        with pytest.raises(ValueError, match=f"`text_config`: {message}"):
            VisualChatConfig(text_config=text)
        text.save_pretrained(tmp_path / "text")  # no weights: they are not looked for
        make_model().model.vision_tower.save_pretrained(tmp_path / "vision")
        with pytest.raises(ValueError, match=f"`text`: {tmp_path / 'text'}: {message}"):
            VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))


def test_other_models_are_refused_with_the_names_of_those_that_join():
    config = make_config()
    tower = CLIPVisionModel(config.vision_config)
    with pytest.raises(TypeError, match=r"`text` must be a LlamaForCausalLM or MistralForCausalLM or .*, got CLIPVision"):
        VisualChatForCausalLM.from_vision_text_pretrained(tower, tower)
    decoder = AutoModelForCausalLM.from_config(config.text_config)
    with pytest.raises(ValueError, match=r"`gguf_file` \(x.gguf\) needs `text`, a folder or a Hub id"):
        VisualChatForCausalLM.from_vision_text_pretrained(tower, decoder, gguf_file="x.gguf")
