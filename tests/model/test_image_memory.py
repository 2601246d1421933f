"""Image memory: what is known of an image equals the image, wherever it is used."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import DynamicCache, TextIteratorStreamer

from helpers.image_memory import NEW, drawn, logits_of, pictures, shared_model, split, text_rows
from helpers.tiny import TOKENS_PER_IMAGE, make_inputs, make_tokenizer
from modeling_visualchat.image_memory_visualchat import ImageMemory


class TestForward:
    @drawn(max_examples=30)
    @given(
        data=st.data(),
        variant=st.sampled_from(["mmca", "mmca_merged"]),
        numbered=st.booleans(),
        layout=st.lists(st.text(alphabet="sti", min_size=1, max_size=5), min_size=1, max_size=3),
        side=st.sampled_from(["left", "right"]),
    )
    def test_any_pictures_in_any_order_and_place_known_or_new_equal_pixel_values(
        self, data, variant, numbered, layout, side
    ):
        model = shared_model(variant, numbered, torch.float64)
        album = pictures(4).double()
        memory = model.encode_images(album)
        text, pixel_values = split(make_inputs(layout, model, padding_side=side))
        shown = (
            []
            if pixel_values is None
            else data.draw(
                st.lists(st.integers(0, 3), min_size=len(pixel_values), max_size=len(pixel_values)), "pictures shown"
            )
        )
        known = data.draw(st.lists(st.booleans(), min_size=len(shown), max_size=len(shown)), "known") if shown else []
        images = {"pixel_values": album[shown]} if shown else {}
        expected = logits_of(model, {**text, **images})
        mixed = {"image_memory": [memory[k] if is_known else None for k, is_known in zip(shown, known)]}
        if not all(known):
            mixed["pixel_values"] = album[[k for k, is_known in zip(shown, known) if not is_known]]
        kept = text_rows(model, text)
        torch.testing.assert_close(logits_of(model, {**text, **mixed})[kept], expected[kept], atol=1e-5, rtol=1e-5)
        if shown:
            for memories in (memory[shown], [memory[k] for k in shown], ImageMemory.cat([memory[[k]] for k in shown])):
                ours = logits_of(model, {**text, "image_memory": memories})
                torch.testing.assert_close(ours[kept], expected[kept], atol=1e-5, rtol=1e-5)

    def test_one_memory_serves_another_conversation_and_costs_no_tower_and_no_image_row(self, mmca, tower_rows):
        memory = mmca.encode_images(pictures(2))
        assert tower_rows == [2]
        rows = []
        layer = mmca.model.language_model.layers[0]
        hook = layer.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
        for layout in (["titit"], ["ttttiis"]):
            text, _ = split(make_inputs(layout, mmca))
            logits_of(mmca, text, image_memory=memory)
        hook.remove()
        assert tower_rows == [2]
        assert rows == [6, 9]

    def test_logits_at_the_placeholders_of_remembered_images_are_those_of_zeros(self, mmca):
        text, pixel_values = split(make_inputs(["tit"], mmca))
        logits = logits_of(mmca, text, image_memory=mmca.encode_images(pixel_values))
        assert (logits[0, 2 : 2 + TOKENS_PER_IMAGE] == 0).all()

    @pytest.mark.parametrize(
        "known",
        [
            [True, True, True],
            pytest.param(
                [True, False, True],
            ),
        ],
        ids=["all", "some"],
    )
    def test_hidden_states_of_text_rows_equal_those_with_pixel_values(self, mmca, known):
        text, pixel_values = split(make_inputs(["titit", "it"], mmca))
        memory = mmca.encode_images(pixel_values)
        images = {"image_memory": [memory[k] if is_known else None for k, is_known in enumerate(known)]}
        if not all(known):
            images["pixel_values"] = pixel_values[[not is_known for is_known in known]]
        with torch.no_grad():
            expected = mmca(**text, pixel_values=pixel_values, output_hidden_states=True).hidden_states
            ours = mmca(**text, **images, output_hidden_states=True).hidden_states
        kept = text_rows(mmca, text)
        for one, other in zip(ours, expected):
            torch.testing.assert_close(one[kept], other[kept], atol=1e-5, rtol=1e-5)

    def test_gradients_of_the_text_weights_equal_those_with_pixel_values(self, own):
        """A memory is a constant: what trains on it are the weights that text goes through."""
        own.get_input_embeddings().requires_grad_(True)
        text, pixel_values = split(make_inputs(["titit", "it"], own))
        memory = own.encode_images(pixel_values)
        labels = text["input_ids"].masked_fill(~text_rows(own, text), -100)
        kept = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)) & text_rows(own, text)
        labels = labels.masked_fill(~torch.nn.functional.pad(kept[:, :-1], (1, 0)), -100)
        gradients = []
        for images in ({"pixel_values": pixel_values}, {"image_memory": memory}):
            own.zero_grad()
            own(**text, **images, labels=labels).loss.backward()
            gradients.append(own.get_input_embeddings().weight.grad.clone())
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    "without a cache": {"use_cache": False},
}


class TestGenerate:
    @pytest.mark.parametrize("mode", MODES)
    def test_tokens_equal_those_with_pixel_values(self, model, mode):
        layout = ["titit", "ts", "iit"]
        text, pixel_values = split(make_inputs(layout, model))
        memory = model.encode_images(pixel_values)
        new = {"image_memory": [memory[0], None, memory[2], None], "pixel_values": pixel_values[[1, 3]]}
        results = []
        for images in ({"pixel_values": pixel_values}, {"image_memory": memory}, new):
            torch.manual_seed(0)
            results.append(model.generate(**text, **images, **{**NEW, **MODES[mode]}))
        assert torch.equal(results[1], results[0])
        assert torch.equal(results[2], results[0])

    def test_prompt_lookup(self, mmca):
        inputs = make_inputs(["tiittt"], mmca)
        text, pixel_values = split(inputs)
        memory = mmca.encode_images(pixel_values)
        ours = mmca.generate(**text, image_memory=memory, **NEW, prompt_lookup_num_tokens=4)
        assert torch.equal(ours, mmca.generate(**inputs, **NEW))

    def test_streaming(self, mmca):
        tokenizer = make_tokenizer()
        inputs = make_inputs(["titit"], mmca)
        text, pixel_values = split(inputs)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        mmca.generate(**text, image_memory=mmca.encode_images(pixel_values), **NEW, streamer=streamer)
        tokens = mmca.generate(**inputs, **NEW)[0, text["input_ids"].shape[1] :]
        assert "".join(streamer) == tokenizer.decode(tokens)

    @pytest.mark.parametrize("given", ["all", "the new ones", "all in one memory", "new pictures in later rounds"])
    def test_a_conversation_goes_on_from_its_cache(self, model, given):
        past = DynamicCache()
        input_ids = torch.empty(1, 0, dtype=torch.long)
        album, shown = pictures(3), 0
        memory = model.encode_images(album)
        for round_, layout in enumerate(["tit", "tt", "itit"]):
            new = layout.count("i")
            new_ids = make_inputs([layout], model, seed=round_)["input_ids"]
            input_ids = torch.cat([input_ids, new_ids], dim=1)
            shown += new
            text = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
            images = {"image_memory": [memory[k] for k in range(shown)]}
            if given == "the new ones":
                images = {"image_memory": [memory[k] for k in range(shown - new, shown)]}
            elif given == "all in one memory":
                images = {"image_memory": memory[:shown]}
            elif given == "new pictures in later rounds" and round_ == 2:
                images = {"image_memory": [memory[0], None, None], "pixel_values": album[1:]}
            tokens = model.generate(**text, **images, **NEW, past_key_values=past)
            assert torch.equal(tokens, model.generate(**text, pixel_values=album[:shown], **NEW))
            input_ids = tokens


class TestMemory:
    def test_a_memory_is_sliced_joined_cast_and_counted(self, mmca):
        text_config = mmca.config.text_config
        memory = mmca.encode_images(pictures(4))
        shape = (text_config.num_hidden_layers, 4, TOKENS_PER_IMAGE, text_config.num_key_value_heads, text_config.head_dim)
        assert memory.keys.shape == memory.values.shape == shape
        assert len(memory) == 4
        per_image = 2 * shape[0] * shape[2] * shape[3] * shape[4] * 4
        assert memory.nbytes == 4 * per_image == 4 * mmca.image_memory_nbytes
        assert memory.to(torch.bfloat16).nbytes == 2 * per_image
        assert memory.to("cpu").keys.device.type == "cpu"

        assert len(memory[0]) == len(memory[-1]) == 1
        assert torch.equal(memory[-1].keys, memory.keys[:, 3:])
        assert torch.equal(memory[[2, 0]].values, memory.values[:, [2, 0]])
        assert torch.equal(memory[torch.tensor([1, 1])].keys, memory.keys[:, [1, 1]])
        again = ImageMemory.cat([memory[:1], memory[1:3], memory[3]])
        assert torch.equal(again.keys, memory.keys)
        assert torch.equal(again.values, memory.values)
        assert [len(one) for one in memory] == [1] * 4
        assert len(memory[torch.tensor([True, False, True, False])]) == 2
        for index in (4, -5):
            with pytest.raises(IndexError, match=f"image {index} of a memory of 4 images"):
                memory[index]

    @pytest.mark.parametrize("index", [np.int64(1), torch.tensor(1)], ids=["numpy", "torch"])
    def test_numbers_of_other_libraries_are_numbers(self, mmca, index):
        memory = mmca.encode_images(pictures(3))
        assert torch.equal(memory[index].keys, memory[1].keys)

    def test_a_memory_is_printed_in_a_line_and_found_in_a_list(self, mmca):
        one, other = mmca.encode_images(pictures(1)), mmca.encode_images(pictures(1, seed=1))
        assert other in [one, other]
        assert len(repr(one)) < 300

    def test_no_pictures_make_a_memory_of_none(self, mmca):
        memory = mmca.encode_images(pictures(0))
        assert len(memory) == memory.nbytes == 0

    def test_equal_images_are_encoded_once_and_alone_is_as_in_company(self, mmca, tower_rows):
        album = pictures(3)
        memory = mmca.encode_images(album[[0, 1, 0, 2]])
        assert tower_rows == [3]
        assert len(memory) == 4
        assert torch.equal(memory.keys[:, 0], memory.keys[:, 2])
        torch.testing.assert_close(mmca.encode_images(album[2:]).keys, memory.keys[:, 3:], atol=1e-5, rtol=1e-5)

    def test_half_precision_memories_are_used_in_the_models_dtype(self, mmca):
        text, pixel_values = split(make_inputs(["titit"], mmca))
        memory = mmca.encode_images(pixel_values)
        exact = logits_of(mmca, text, image_memory=memory)
        rounded = logits_of(mmca, text, image_memory=memory.to(torch.bfloat16))
        assert rounded.dtype == exact.dtype
        assert not torch.equal(rounded, exact)
        assert (rounded - exact).norm() / exact.norm() < 0.05

    def test_saved_and_loaded(self, mmca, tmp_path):
        memory = mmca.encode_images(pictures(3))
        memory[1:].save(tmp_path / "memory.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]
        loaded = ImageMemory.load(tmp_path / "memory.safetensors")
        assert torch.equal(loaded.keys, memory.keys[:, 1:])
        assert torch.equal(loaded.values, memory.values[:, 1:])
        assert loaded.fingerprint == memory.fingerprint == mmca.image_fingerprint()
        text, _ = split(make_inputs(["titt"], mmca))
        ours = logits_of(mmca, text, image_memory=loaded[0])
        assert torch.equal(ours, logits_of(mmca, text, image_memory=memory[1]))

    def test_a_file_that_holds_something_else_is_named(self, tmp_path):
        path = tmp_path / "other.safetensors"
        save_file({"weight": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} holds weight, which is not an image memory"):
            ImageMemory.load(path)
