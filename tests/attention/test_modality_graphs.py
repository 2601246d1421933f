"""The attention by modality in one graph, for training and for decoding from a static cache."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from helpers.modality import DOUBLE, forward, make_pair
from helpers.tiny import make_inputs
from modeling_visualchat import decoder_visualchat
from modeling_visualchat.modality_cache_visualchat import StaticModalityLayer


@pytest.fixture
def without_the_dense_path(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("computed in the order of the sequence")

    monkeypatch.setattr(decoder_visualchat, "SequencePlan", refuse)


@pytest.mark.usefixtures("without_the_dense_path")
class TestGraphs:
    """In one graph without breaks. What inductor makes of it is tested in `test_placement.py`, and on a GPU."""

    @pytest.mark.parametrize(
        "variant, side, prefix", [("mmca", "left", None), ("mmca_merged", "right", (5, 7)), ("cross", "left", None)]
    )
    def test_a_compiled_training_step_has_the_losses_and_gradients_of_one_that_is_not(self, variant, side, prefix):
        model = make_pair(variant, dtype=DOUBLE, trains=True, prefix=prefix)[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for layout in (["titit"], ["iit", "ttsi", "tt"]):
            inputs = make_inputs(layout, model, padding_side=side)
            inputs["pixel_values"] = inputs["pixel_values"].double()
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100
            losses, gradients = [], []
            for one in (model, compiled):
                model.zero_grad()
                losses.append(one(**inputs, labels=labels, use_cache=False).loss)
                losses[-1].backward()
                gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            torch.testing.assert_close(*losses, atol=1e-9, rtol=1e-9)
            for name, expected in gradients[0].items():
                torch.testing.assert_close(gradients[1][name], expected, atol=1e-7, rtol=1e-6, msg=name)

    @pytest.mark.slow
    def test_image_memory_of_one_image_and_of_several(self):
        model = make_pair()[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")  # the fingerprint of the weights is no part of a graph
        for layout in (["tit"], ["titit"], ["iitit"]):
            inputs = make_inputs(layout, model)
            expected = forward(model, inputs).logits
            memory = model.encode_images(inputs.pop("pixel_values"))
            ours = forward(compiled, inputs, image_memory=memory, use_cache=False).logits
            is_text = inputs["input_ids"] != model.config.image_token_id
            torch.testing.assert_close(ours[is_text], expected[is_text], atol=1e-5, rtol=1e-5)

    def test_a_wrong_number_of_images_is_an_error_in_a_graph_too(self):
        model = make_pair()[0]
        inputs = make_inputs(["titit"], model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(RuntimeError, match="image placeholder tokens are not those of the images that were given"):
            forward(compiled, {**inputs, "pixel_values": inputs["pixel_values"][:1]}, use_cache=False)

    @pytest.mark.parametrize("variant, prefix", [("mmca", (5, 7)), ("mmca_merged", None), ("cross", None)])
    def test_decoding_from_a_static_cache_is_one_graph_for_all_steps(self, variant, prefix):
        model = make_pair(variant, dtype=DOUBLE, prefix=prefix)[0]
        for layout in (["titit"], ["titit", "ts", "iit"]):
            torch._dynamo.reset()
            graphs = CompileCounter()
            compiled = torch.compile(model.forward, fullgraph=True, backend=graphs)
            inputs = make_inputs(layout, model)
            cache = StaticCache(config=model.config.text_config, max_cache_len=inputs["input_ids"].shape[1] + 5)
            outputs = forward(model, inputs, past_key_values=cache, logits_to_keep=1)
            for _ in range(5):
                token = outputs.logits[:, -1:].argmax(-1)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
                inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
                with torch.no_grad():
                    outputs = compiled(input_ids=token, past_key_values=cache)
                expected = forward(model, inputs, logits_to_keep=1).logits
                torch.testing.assert_close(outputs.logits, expected, atol=1e-8, rtol=1e-8)
            assert graphs.frame_count == 1

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "cross"])
    def test_padding_of_a_later_round_of_text_is_not_seen_while_decoding(self, variant):
        model = make_pair(variant, dtype=DOUBLE)[0]
        rounds = [make_inputs(layout, model, seed) for seed, layout in enumerate((["tit", "it"], ["s", "ttt"]))]
        cache = StaticCache(config=model.config.text_config, max_cache_len=40)
        forward(model, rounds[0], past_key_values=cache)
        both = {name: torch.cat([one[name] for one in rounds], dim=1) for name in ("input_ids", "attention_mask")}
        new = {"input_ids": rounds[1]["input_ids"], "attention_mask": both["attention_mask"]}
        forward(model, new, past_key_values=cache)
        token = torch.tensor([[5], [6]])
        ours = forward(model, {"input_ids": token}, past_key_values=cache).logits
        both["input_ids"] = torch.cat([both["input_ids"], token], dim=1)
        both["attention_mask"] = torch.nn.functional.pad(both["attention_mask"], (0, 1), value=1)
        expected = forward(model, {**both, "pixel_values": rounds[0]["pixel_values"]}, logits_to_keep=1).logits
        torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_a_static_cache_has_the_size_of_one_that_knows_no_images(self, variant):
        model = make_pair(variant)[0]
        layers = model.config.text_config.num_hidden_layers
        for layout, more in ((["titit"], 0), (["titit", "tit"], 0), (["titit", "tttttt"], 6)):
            cache = StaticCache(config=model.config.text_config, max_cache_len=40)
            forward(model, make_inputs(layout, model), past_key_values=cache)
            assert [type(layer) for layer in cache.layers] == [StaticModalityLayer] * layers
            # The longest text and the most images may be of different rows
            assert cache.layers[0].buffer.keys.shape[2] == 40 + more
            assert cache.is_compileable and cache.get_max_length() == 40
            with pytest.raises(NotImplementedError, match="use a dynamic one"):
                cache.crop(-1)
            cache.reset()
            assert cache.get_seq_length() == 0
