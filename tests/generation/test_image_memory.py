"""Image memory: what is known of a picture equals the picture, wherever it is used."""

import copy
import functools
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file, save_file
from helpers.tiny import TOKENS_PER_IMAGE, make_inputs, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, TextIteratorStreamer

from modeling_visualchat.image_memory_visualchat import ImageMemory, ImageMemoryStore, ModelWeights, fingerprint_weights


NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
drawn = functools.partial(settings, deadline=None, derandomize=True)


@functools.cache
def shared_model(variant="mmca", numbered=True, dtype=torch.float32):
    """Not to be changed."""
    return make_model(multimodal_attention=variant, image_number_keys=numbered).to(dtype).requires_grad_(False)


@pytest.fixture(params=["mmca", "mmca_merged"])
def model(request):
    return shared_model(request.param)


@pytest.fixture
def mmca():
    return shared_model()


@pytest.fixture
def own():
    """A model that a test may change."""
    return copy.deepcopy(shared_model())


@pytest.fixture
def tower_rows(mmca):
    """Pictures that each call of the vision tower has seen."""
    rows = []
    tower = mmca.model.vision_tower
    hook = tower.register_forward_hook(lambda module, args, kwargs, output: rows.append(len(output[0])), with_kwargs=True)
    yield rows
    hook.remove()


@torch.no_grad()
def fill_by_counting(model):
    """Weights that no random generator makes, the same on every machine."""
    for number, (_, weight) in enumerate(sorted(model.named_parameters())):
        counted = (torch.arange(weight.numel()) * 7 + number) % 251 - 125
        weight.copy_(counted.reshape(weight.shape) / 1024)


def logits_of(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def split(inputs):
    inputs = dict(inputs)
    return inputs, inputs.pop("pixel_values", None)


def text_rows(model, inputs):
    return inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)


def pictures(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


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

    def test_equal_pictures_are_encoded_once_and_alone_is_as_in_company(self, mmca, tower_rows):
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


class TestRefusals:
    @pytest.mark.parametrize("change", ["in place", "replaced", "another model"])
    def test_a_memory_of_other_weights(self, own, change):
        text, pixel_values = split(make_inputs(["tit"], own))
        memory = own.encode_images(pixel_values)
        layer = own.model.language_model.layers[1]
        if change == "in place":
            with torch.no_grad():
                layer.mlp.up_proj.weight[0, 0] += 0.5
        elif change == "replaced":
            layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight + 0.5)
        else:
            own = make_model(seed=1, image_number_keys=True)
        with pytest.raises(ValueError, match=r"made with other weights.*encode the pictures again"):
            own(**text, image_memory=memory)
        own(**text, image_memory=own.encode_images(pixel_values))

    def test_a_memory_from_before_lora_was_merged(self, own):
        text, pixel_values = split(make_inputs(["tit"], own))
        peft_model = get_peft_model(own, LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj"))
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        with peft_model.disable_adapter():
            memory = own.encode_images(pixel_values)
            before = logits_of(own, {**text, "pixel_values": pixel_values})
        peft_model.merge_adapter()
        assert not torch.allclose(logits_of(own, {**text, "pixel_values": pixel_values}), before, atol=1e-2)
        with pytest.raises(ValueError, match="made with other weights"):
            own(**text, image_memory=memory)

    def test_a_memory_from_before_an_adapter_was_switched_off(self, own):
        text, pixel_values = split(make_inputs(["tit"], own))
        peft_model = get_peft_model(
            own, LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj", init_lora_weights=False)
        )
        memory = own.encode_images(pixel_values)
        with peft_model.disable_adapter(), pytest.raises(ValueError, match="made with other weights"):
            own(**text, image_memory=memory)

    def test_a_model_made_in_inference_mode(self):
        with torch.inference_mode():
            model = make_model()
            model.encode_images(pictures(1))

    @pytest.mark.parametrize("change", ["negated", "columns swapped", "constant"])
    def test_weights_that_are_easily_taken_for_equal(self, own, change):
        layer = own.model.language_model.layers[0]
        with torch.no_grad():
            layer.input_layernorm.weight.fill_(1.0)
            before = own.image_fingerprint()
            if change == "negated":
                layer.self_attn.v_proj.weight.neg_()
            elif change == "columns swapped":
                layer.self_attn.v_proj.weight.copy_(layer.self_attn.v_proj.weight.flip(1))
            else:
                layer.input_layernorm.weight.fill_(2.0)
        assert own.image_fingerprint() != before

    @pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-2}, {"hidden_act": "gelu"}], ids=str)
    def test_a_memory_of_another_computation_with_the_same_weights(self, own, change):
        memory = own.encode_images(pictures(1))
        other = make_model(image_number_keys=True, text=dict(change))
        other.load_state_dict(own.state_dict())
        assert other.image_fingerprint() != memory.fingerprint

    def test_a_saved_and_reloaded_model_knows_its_memories(self, mmca, tmp_path):
        text, pixel_values = split(make_inputs(["tit"], mmca))
        memory = mmca.encode_images(pixel_values)
        mmca.save_pretrained(tmp_path / "model")
        memory.save(tmp_path / "memory.safetensors")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        loaded = ImageMemory.load(tmp_path / "memory.safetensors")
        ours = logits_of(reloaded, text, image_memory=loaded)
        torch.testing.assert_close(ours, logits_of(mmca, text, image_memory=memory), atol=1e-5, rtol=1e-5)

    def test_a_model_loaded_from_other_weights_refuses(self, own, tmp_path):
        text, pixel_values = split(make_inputs(["tit"], own))
        own.save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        loaded = model.encode_images(pixel_values)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        again(**text, image_memory=loaded)
        saved = load_file(tmp_path / "model" / "model.safetensors")
        name = next(name for name in saved if "projector" in name and name.endswith("linear.weight"))
        saved[name][0, 0] += 0.5
        save_file(saved, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        changed = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        with pytest.raises(ValueError, match="made with other weights"):
            changed(**text, image_memory=loaded)

    def test_variants_whose_image_rows_look_at_text(self, mmca):
        causal = make_model(multimodal_attention="causal")
        text, pixel_values = split(make_inputs(["tit"], causal))
        message = r"'causal' cannot use image memory: its image rows look at the text"
        with pytest.raises(ValueError, match=message):
            causal.encode_images(pixel_values)
        memory = mmca.encode_images(pixel_values)
        for call in (causal, causal.generate):
            with pytest.raises(ValueError, match=message):
                call(**text, image_memory=memory)

    def test_eager_and_quantized_caches(self, mmca):
        text, pixel_values = split(make_inputs(["tit"], mmca))
        eager = copy.deepcopy(mmca)
        eager.set_attn_implementation("eager")
        memory = eager.encode_images(pixel_values)
        with pytest.raises(ValueError, match="image_memory needs attn_implementation 'sdpa'"):
            eager(**text, image_memory=memory)
        cache = mmca(input_ids=text["input_ids"][:, :1], use_cache=True).past_key_values
        cache.layers.append(copy.deepcopy(cache.layers[0]))  # not what it was made with
        text["attention_mask"] = torch.ones(1, 1 + text["attention_mask"].shape[1], dtype=torch.long)
        with pytest.raises(ValueError, match="a dynamic or static cache or none"):
            mmca(**text, image_memory=mmca.encode_images(pixel_values), past_key_values=cache)

    @pytest.mark.parametrize("given", [1, 3])
    def test_a_wrong_number_of_images_names_both_counts(self, mmca, given):
        text, _ = split(make_inputs(["titit"], mmca))
        memory = mmca.encode_images(pictures(given))
        message = rf"10 image placeholder tokens.*2 images of 5 tokens, but {given} images were given"
        for memories in (memory, list(memory)):
            for call in (mmca, mmca.generate):
                with pytest.raises(ValueError, match=message):
                    call(**text, image_memory=memories)

    def test_no_images_at_all_where_some_are_expected(self, mmca):
        text, _ = split(make_inputs(["titit"], mmca))
        with pytest.raises(ValueError, match="2 images of 5 tokens, but 0 images were given"):
            mmca(**text, image_memory=[])
        with pytest.raises(ValueError, match="0 images of 5 tokens, but 1 images were given"):
            mmca(**make_inputs(["tt"], mmca), image_memory=mmca.encode_images(pictures(1)))

    def test_entries_none_are_as_many_as_new_pictures(self, mmca):
        text, pixel_values = split(make_inputs(["titit"], mmca))
        memory = mmca.encode_images(pixel_values)
        for call in (mmca, mmca.generate):
            with pytest.raises(ValueError, match=r"no entry `None` for the 1 new pictures|0 entries `None`, but 1 new"):
                call(**text, image_memory=memory, pixel_values=pixel_values[:1])
            with pytest.raises(ValueError, match="1 entries `None`, but 2 new pictures"):
                call(**text, image_memory=[memory[0], None], pixel_values=pixel_values)
            with pytest.raises(ValueError, match="1 entries `None`, but 0 new pictures"):
                call(**text, image_memory=[memory[0], None])

    def test_generation_that_cannot_start_from_a_memory(self, mmca):
        ends, pixel_values = split(make_inputs(["ti"], mmca))
        memory = mmca.encode_images(pixel_values)
        with pytest.raises(ValueError, match="ends with a remembered image"):
            mmca.generate(**ends, image_memory=memory)
        text, _ = split(make_inputs(["tit"], mmca))
        with pytest.raises(ValueError, match="`prefill_chunk_size` and `image_memory`"):
            mmca.generate(**text, image_memory=memory, prefill_chunk_size=4)
        with pytest.raises(ValueError, match="`assistant_model`"):
            mmca.generate(**text, image_memory=memory, assistant_model=make_model(seed=3))
        embeds = mmca.get_input_embeddings()(text["input_ids"])
        with pytest.raises(ValueError, match="needs `input_ids`"):
            mmca.generate(inputs_embeds=embeds, image_memory=memory)

    def test_training_the_embedding_keeps_memories_and_training_the_projector_does_not(self, own):
        text, pixel_values = split(make_inputs(["tit"], own))
        memory = own.encode_images(pixel_values)
        own.freeze_for_alignment()
        for part, remains in ((own.get_input_embeddings(), True), (own.model.multi_modal_projector, False)):
            optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
            own(**text, pixel_values=pixel_values, labels=text["input_ids"]).loss.backward()
            optimizer.step()
            if remains:
                kept = text_rows(own, text)
                expected = logits_of(own, {**text, "pixel_values": pixel_values})[kept]
                ours = logits_of(own, text, image_memory=memory)[kept]
                torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
            else:
                with pytest.raises(ValueError, match="made with other weights"):
                    own(**text, image_memory=memory)


class TestStore:
    def counts(self, store):
        return store.hits, store.misses, store.evictions, len(store), store.nbytes

    def test_counts_and_what_was_used_least_recently_goes_first(self, mmca, tower_rows):
        one, album = mmca.image_memory_nbytes, pictures(4)
        store = ImageMemoryStore(mmca, max_bytes=3 * one + 1)
        store.get(album[:3])
        assert self.counts(store) == (0, 3, 0, 3, 3 * one)
        store.get(album[:1])  # picture 1 is now the oldest
        assert self.counts(store) == (1, 3, 0, 3, 3 * one)
        store.get(album[3:])
        assert self.counts(store) == (1, 4, 1, 3, 3 * one)
        store.get(album[[0, 2, 3]])
        assert self.counts(store) == (4, 4, 1, 3, 3 * one)
        store.get(album[1:2])
        assert self.counts(store) == (4, 5, 2, 3, 3 * one)
        assert tower_rows == [3, 1, 1]

    def test_what_a_call_asks_for_is_not_pushed_out_by_it(self, mmca):
        album = pictures(3)
        store = ImageMemoryStore(mmca, max_bytes=2 * mmca.image_memory_nbytes)
        store.get(album[:2])
        store.get(album[[2, 0]])  # picture 1 has to go, and nothing else
        assert self.counts(store) == (1, 3, 1, 2, store.max_bytes)

    def test_more_than_fits_is_returned_all_the_same(self, mmca):
        store = ImageMemoryStore(mmca, max_bytes=2 * mmca.image_memory_nbytes)
        text, pixel_values = split(make_inputs(["tiit", "iit"], mmca))
        memories = store.get(pixel_values)
        assert self.counts(store) == (0, 4, 2, 2, store.max_bytes)
        kept = text_rows(mmca, text)
        expected = logits_of(mmca, {**text, "pixel_values": pixel_values})[kept]
        torch.testing.assert_close(logits_of(mmca, text, image_memory=memories)[kept], expected, atol=1e-5, rtol=1e-5)
        assert len(ImageMemoryStore(mmca, max_bytes=0).get(pixel_values)) == 4

    def test_what_is_kept_is_no_view_of_more(self, mmca):
        store = ImageMemoryStore(mmca, max_bytes=2**30)
        for memory in store.get(pictures(3)):
            assert memory.keys.untyped_storage().nbytes() == memory.keys.nbytes
            assert len(memory) == 1

    def test_the_same_picture_twice_in_one_call_is_one_miss(self, mmca, tower_rows):
        store = ImageMemoryStore(mmca, max_bytes=2**30)
        album = pictures(2)
        memories = store.get(album[[0, 1, 0]])
        assert tower_rows == [2]
        assert store.misses == 2
        assert store.hits == 1
        assert memories[0] is memories[2]

    def test_pictures_are_known_by_content(self, mmca):
        store = ImageMemoryStore(mmca, max_bytes=2**30)
        album = pictures(2)
        store.get(album)
        store.get(album.flip(0).clone())
        assert (store.hits, store.misses) == (2, 2)
        album[0, 0, 0, 0] += 1e-3
        store.get(album)
        assert (store.hits, store.misses) == (3, 3)

    def test_a_folder_serves_the_next_store(self, mmca, tower_rows, tmp_path):
        album = pictures(3)
        first = ImageMemoryStore(mmca, mmca.image_memory_nbytes, tmp_path / "memories").get(album)
        assert tower_rows == [3]
        second = ImageMemoryStore(mmca, mmca.image_memory_nbytes, tmp_path / "memories")
        for one, other in zip(first, second.get(album)):
            assert torch.equal(one.keys, other.keys)
        assert tower_rows == [3]
        assert self.counts(second) == (3, 0, 2, 1, mmca.image_memory_nbytes)
        second.get(album)  # those that went for lack of room are still in the folder
        assert (second.hits, second.misses) == (6, 0)
        assert all(path.suffix == ".safetensors" for path in (tmp_path / "memories").iterdir())

    @pytest.mark.parametrize("with_folder", [False, True])
    def test_changed_weights_are_asked_again(self, own, tmp_path, with_folder):
        store = ImageMemoryStore(own, 2**30, tmp_path if with_folder else None)
        text, pixel_values = split(make_inputs(["tit"], own))
        store.get(pixel_values)
        with torch.no_grad():
            own.model.multi_modal_projector.linear.weight[0, 0] += 0.5
        memories = store.get(pixel_values)
        assert (store.hits, store.misses) == (0, 2)
        kept = text_rows(own, text)
        expected = logits_of(own, {**text, "pixel_values": pixel_values})[kept]
        torch.testing.assert_close(logits_of(own, text, image_memory=memories)[kept], expected, atol=1e-5, rtol=1e-5)

    def test_what_old_weights_knew_takes_no_room(self, own):
        store = ImageMemoryStore(own, max_bytes=2**30)
        store.get(pictures(2))
        with torch.no_grad():
            own.model.multi_modal_projector.linear.weight[0, 0] += 0.5
        store.get(pictures(1))
        assert len(store) == 1
        assert store.nbytes == own.image_memory_nbytes

    def test_several_threads_ask_for_overlapping_pictures(self, mmca, tower_rows):
        store = ImageMemoryStore(mmca, max_bytes=3 * mmca.image_memory_nbytes)
        album = pictures(6)
        expected = mmca.encode_images(album)
        errors = []

        def ask(first):
            try:
                for k in range(first, first + 6):
                    asked = [k % 6, (k + 1) % 6]
                    for index, memory in zip(asked, store.get(album[asked])):
                        torch.testing.assert_close(memory.keys, expected.keys[:, [index]], atol=1e-5, rtol=1e-5)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert store.hits + store.misses == 4 * 6 * 2
        assert store.misses == sum(tower_rows) - 6
        assert len(store) == 3
        assert store.nbytes == 3 * mmca.image_memory_nbytes

    @pytest.mark.parametrize("damage", ["truncated", "empty", "other tensors"])
    def test_a_damaged_file_is_a_miss_and_is_written_anew(self, mmca, tmp_path, damage):
        album = pictures(1)
        expected = ImageMemoryStore(mmca, 2**30, tmp_path).get(album)[0]
        (path,) = tmp_path.iterdir()
        if damage == "other tensors":
            save_file({"weight": torch.zeros(1)}, path)
        else:
            path.write_bytes(path.read_bytes()[: 100 if damage == "truncated" else 0])
        store = ImageMemoryStore(mmca, 2**30, tmp_path)
        torch.testing.assert_close(store.get(album)[0].keys, expected.keys)
        assert (store.hits, store.misses) == (0, 1)
        again = ImageMemoryStore(mmca, 2**30, tmp_path)
        again.get(album)
        assert (again.hits, again.misses) == (1, 0)

    def test_a_bfloat16_model(self, tmp_path):
        model = make_model(text={"initializer_range": 0.05}).bfloat16()
        store = ImageMemoryStore(model, 2**30, tmp_path)
        album = pictures(2).bfloat16()
        store.get(album)
        assert store.nbytes == 2 * model.image_memory_nbytes
        assert ImageMemoryStore(model, 2**30, tmp_path).get(album)[1].keys.dtype == torch.bfloat16

    def test_a_folder_that_cannot_be_written_costs_no_answer(self, mmca, tmp_path, caplog):
        store = ImageMemoryStore(mmca, 2**30, tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        album = pictures(2)
        assert len(store.get(album)) == len(store) == 2
        assert caplog.text.count("cannot be written") == 2
        store.get(album)
        assert (store.hits, store.misses) == (2, 2)


class TestFingerprint:
    def test_the_scale_of_an_adapter_counts(self, own):
        for alpha in (2, 32):
            adapted = get_peft_model(
                copy.deepcopy(own), LoraConfig(r=2, lora_alpha=alpha, target_modules=["v_proj"], init_lora_weights=False)
            )
            with torch.no_grad():
                for name, weight in adapted.named_parameters():
                    if "lora_" in name:
                        weight.fill_(0.01)
            if alpha == 2:
                memory = adapted.encode_images(pictures(1))
        with pytest.raises(ValueError, match="made with other weights"):
            logits_of(adapted, split(make_inputs(["tit"], own))[0], image_memory=memory)
        before = adapted.image_fingerprint()
        with rescale_adapter_scale(adapted, 0.1):
            assert adapted.image_fingerprint() != before
        assert adapted.image_fingerprint() == before

    @pytest.mark.parametrize(
        ("dtype", "changes", "expected"),
        [
            ("float32", {"image_number_keys": True}, "91e8fddbcacd6196dc8f170db4d975574193413a2ea7d58005a777a8734e18d8"),
            ("bfloat16", {}, "ddba75f096793fb594244435b7b8d6bf5007431984f642ed80f7d4fe83392cc8"),
            ("float32", {"projector": "perceiver"}, "51ab2c72c5f38b6d1139f2605daa8fab81dc2a2489acebcc65cbac3f1c056eab"),
            ("float32", {"adapter": True}, "1fd0b5da02f294e4c9158467b13bd695413e492b7e95416f3f5cb5b38fe91916"),
        ],
    )
    def test_files_that_were_written_before_stay_valid(self, dtype, changes, expected):
        """What the code before quantized layers counted (commit 8e454b0) gave to these weights."""
        changes = dict(changes)
        has_adapter = changes.pop("adapter", False)
        model = make_model(**changes)
        if has_adapter:
            get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
        fill_by_counting(model)
        assert model.to(getattr(torch, dtype)).image_fingerprint() == expected

    def test_kept_answers_that_were_written_before_stay_valid(self):
        model = make_model()
        fill_by_counting(model)
        expected = "821c2b7da5ea7160264bae22b3ad8870d10bfa15c5b6bc89d9b6b81981b067dd"
        assert fingerprint_weights(ModelWeights(model), {}) == expected

    def test_buffers_that_are_saved_count(self, own):
        """Quantized layers keep their weights in them."""
        before = own.image_fingerprint()
        projection = own.model.language_model.layers[0].mlp.up_proj
        projection.register_buffer("qweight", torch.ones(3, dtype=torch.int32))
        with_ones = own.image_fingerprint()
        projection.qweight = projection.qweight * 2
        assert len({before, with_ones, own.image_fingerprint()}) == 3

    def test_settings_that_change_later_count(self, own):
        before = own.image_fingerprint()
        own.config.vision_feature_layer = -2
        assert own.image_fingerprint() != before
