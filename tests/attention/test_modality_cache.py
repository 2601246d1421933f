"""The cache that keeps text and images apart: a conversation equals a run from scratch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from helpers.modality import DOUBLE, MODELS, SIDES, Conversations, drawn, forward, layouts_of, make_pair
from helpers.tiny import TOKENS_PER_IMAGE, make_inputs
from modeling_visualchat.generation_visualchat import CUTS_IMAGES
from modeling_visualchat.modality_cache_visualchat import ModalityLayer, get_modality_positions


def resets_to_empty() -> bool:
    """Whether a `DynamicCache` of this version of transformers, which holds text alone, is empty after a reset."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    cache.reset()
    return cache.get_seq_length() == 0


class TestCache:
    @pytest.mark.parametrize("numbered", [False, True], ids=["plain", "numbered"])
    def test_text_and_images_are_kept_apart_and_decoding_adds_to_text_alone(self, numbered):
        model = make_pair(numbered=numbered)[0]
        inputs = make_inputs(["titit", "ts"], model)
        cache = forward(model, inputs, use_cache=True).past_key_values
        tokens, layers = 2 * TOKENS_PER_IMAGE, model.config.text_config.num_hidden_layers
        length = inputs["input_ids"].shape[1]

        def lengths():
            return [(layer.text.keys.shape[2], layer.images.keys.shape[2]) for layer in cache.layers]

        assert [type(layer) for layer in cache.layers] == [ModalityLayer] * layers
        assert lengths() == [(6, tokens)] * layers
        assert all(cache.get_seq_length(k) == length for k in range(layers))
        of_images = cache.layers[0].images.keys.data_ptr()
        for step in range(1, 4):
            ones = torch.ones(2, length + step, dtype=torch.long)
            ones[:, :length] = inputs["attention_mask"]
            forward(model, {"input_ids": torch.tensor([[7], [8]]), "attention_mask": ones}, past_key_values=cache)
            assert lengths() == [(6 + step, tokens)] * layers
            assert cache.get_seq_length() == length + step
            assert cache.layers[0].images.keys.data_ptr() == of_images  # not even copied
        places = get_modality_positions(cache)
        assert places.of_text[0].tolist() == [0, 1, 7, 8, 14, 15, 16, 17, 18]
        assert places.of_text[1, :3].tolist() == [13, 14, 15]
        assert places.of_images[0].tolist() == [*range(2, 7), *range(9, 14)]
        assert places.of_images[1].tolist() == [-1] * tokens

    @drawn(max_examples=40)
    @given(data=st.data(), key=MODELS, batch_size=st.integers(1, 3), static=st.booleans())
    def test_rounds_of_text_and_images_equal_a_run_from_scratch(self, data, key, batch_size, static):
        pair = make_pair(*key, dtype=DOUBLE)
        # Four rounds of at most two images and three single tokens or pairs, or five of these
        cache = StaticCache(config=pair[0].config.text_config, max_cache_len=4 * 16) if static else None
        conversations = Conversations(*pair, batch_size, cache)
        for layout in data.draw(st.lists(layouts_of(batch_size), min_size=2, max_size=4), "rounds"):
            conversations.say(layout, data.draw(SIDES, "side"), data.draw(st.sampled_from([None, None, 1, 3]), "pieces"))

    @drawn(max_examples=30)
    @given(data=st.data(), key=MODELS, batch_size=st.integers(1, 3))
    def test_whatever_is_done_to_the_cache_is_done_to_text_images_and_places(self, data, key, batch_size):
        conversations = Conversations(*make_pair(*key, dtype=DOUBLE), batch_size)
        conversations.say(data.draw(layouts_of(batch_size), "layout"), data.draw(SIDES, "side"))
        operations = ["crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "deepcopy"]
        operations += ["reset"] if resets_to_empty() else []
        for operation in data.draw(st.lists(st.sampled_from(operations), min_size=1, max_size=3), "operations"):
            rows = range(len(conversations.pictures))
            if operation == "crop":
                conversations.crop_to(data.draw(st.sampled_from(conversations.places_between_images()), "length"))
            elif operation == "reorder_cache":
                order = data.draw(st.lists(st.sampled_from(rows), min_size=len(rows), max_size=len(rows)), "order")
                conversations.cache.reorder_cache(torch.tensor(order))
                conversations.take_rows(order)
            elif operation == "batch_repeat_interleave" and len(rows) < 3:
                conversations.cache.batch_repeat_interleave(2)
                conversations.take_rows([row for row in rows for _ in range(2)])
            elif operation == "batch_select_indices":
                selected = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=3), "selected")
                conversations.cache.batch_select_indices(torch.tensor(selected))
                conversations.take_rows(selected)
            elif operation == "deepcopy":
                original, conversations.cache = conversations.cache, copy.deepcopy(conversations.cache)
                original.crop(-1)
            elif operation == "reset":
                conversations.reset()
                conversations.say(data.draw(layouts_of(len(rows)), "layout"))
            if data.draw(st.booleans(), "says more"):
                conversations.say(data.draw(layouts_of(len(conversations.pictures)), "layout"))
        conversations.say(data.draw(layouts_of(len(conversations.pictures)), "layout"))

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "cross"])
    def test_cropping_back_through_an_image_and_bringing_another(self, variant):
        conversations = Conversations(*make_pair(variant), 2)
        conversations.say(["tit", "ts"])
        conversations.say(["siti", "t"])
        conversations.crop_to(10)
        assert [len(row) for row in conversations.pictures] == [1, 0]
        conversations.say(["its", "ii"])
        conversations.crop_to(1)
        conversations.say(["it", "s"])

    @pytest.mark.parametrize("empty", ["reset", "crop"])
    @pytest.mark.parametrize(
        "layout",
        [
            ["sit", "t"],
            ["iti", "tit"],
            ["ts", "st"],
            pytest.param(
                ["tt", "s"],
            ),
        ],
        ids=str,
    )
    def test_a_cache_emptied_by_reset_or_crop_begins_again(self, layout, empty):
        conversations = Conversations(*make_pair(), 2)
        conversations.say(["tit", "s"])
        conversations.reset() if empty == "reset" else conversations.crop_to(0)
        conversations.say(layout)
        conversations.say(["it", "t"])

    def test_cropping_within_an_image_keeps_its_first_rows(self):
        fast, eager = make_pair()
        inputs = make_inputs(["tiit"], fast)
        caches = []
        for model in (fast, eager):
            cache = DynamicCache()
            forward(model, inputs, past_key_values=cache)
            cache.crop(-2 - 3)  # three rows of the second image go
            caches.append(cache)
        more = make_inputs(["tit"], fast, seed=1)
        more["attention_mask"] = torch.ones(1, 9 + 9, dtype=torch.long)
        ours, theirs = (forward(model, more, past_key_values=cache) for model, cache in zip((fast, eager), caches))
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "cross"])
    def test_a_static_cache_is_filled_to_its_end_and_begins_again_after_a_reset(self, variant):
        pair = make_pair(variant, dtype=DOUBLE)
        conversations = Conversations(*pair, 2, StaticCache(config=pair[0].config.text_config, max_cache_len=40))
        for layout in (["titt", "s"], ["t", "itst"], ["t", "t"], ["iitst", "ts"], ["t", "s"]):
            conversations.say(layout)
        assert conversations.length == 40
        conversations.reset()
        conversations.say(["it", "iti"])

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("variant", ["mmca", "cross"])
    def test_a_compiled_model_brings_new_images_into_a_cached_conversation(self, variant, static):
        model = make_pair(variant)[0]
        torch._dynamo.reset()
        first, second = make_inputs(["titit", "ts"], model), make_inputs(["it", "tt"], model, seed=3)
        second["attention_mask"] = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
        logits = []
        for one in (model, torch.compile(model, backend="eager")):
            cache = StaticCache(config=model.config.text_config, max_cache_len=60) if static else DynamicCache()
            forward(model, first, past_key_values=cache)
            logits.append(forward(one, second, past_key_values=cache).logits)
        assert torch.equal(*logits)

    def test_cropping_by_a_positive_number_is_refused_as_in_transformers(self):
        model = make_pair()[0]
        cache = forward(model, make_inputs(["tit"], model), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="negative"):
            cache.crop(2)

    def test_a_users_cache_stays_the_same_object_and_learns_of_images_when_they_come(self):
        fast, eager = make_pair()
        for cache in (DynamicCache(), DynamicCache(config=fast.config), DynamicCache(config=fast.config.text_config)):
            conversations = Conversations(fast, eager, 2, cache)
            layers = fast.config.text_config.num_hidden_layers
            conversations.say(["ts", "s"])
            assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * layers
            conversations.say(["sit", "tt"])
            assert [type(layer).__name__ for layer in cache.layers] == ["ModalityLayer"] * layers
            outputs = forward(fast, {"input_ids": torch.tensor([[5], [6]])}, past_key_values=cache)
            assert outputs.past_key_values is cache

    def test_a_conversation_begun_by_modality_and_continued_with_eager_says_why_not(self):
        fast, eager = make_pair()
        cache = forward(fast, make_inputs(["tit"], fast), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"begun with attn_implementation='sdpa'.*go on with both"):
            forward(eager, {"input_ids": torch.tensor([[5]])}, past_key_values=cache)
        mask = torch.ones(1, 1, 1, 10, dtype=torch.bool)
        with pytest.raises(ValueError, match="2-dimensional attention_mask"):
            forward(fast, {"input_ids": torch.tensor([[5]]), "attention_mask": mask}, past_key_values=cache)
        assert cache.get_seq_length() == 9  # a refused call leaves no trace

    def test_a_conversation_begun_with_eager_goes_on_with_sdpa(self):
        fast, eager = make_pair()
        conversations = Conversations(eager, eager, 2)
        conversations.say(["tit", "s"])
        conversations.model = fast
        conversations.say(["it", "ts"])

    @pytest.mark.parametrize("variant", ["mmca", "cross"])
    def test_beams_and_batches_leave_the_images_where_they_are(self, variant):
        """Beam search reorders and repeats rows that hold different numbers of images."""
        fast, eager = make_pair(variant)
        inputs = make_inputs(["titit", "ts", "iit"], fast)
        beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "eos_token_id": None}
        assert torch.equal(fast.generate(**inputs, **beams), eager.generate(**inputs, **beams))


class TestMasksOfACache:
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged", "cross"])
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (["tttt", "t"], ["its", "its"]),  # padding of a round of text alone
            (["titt", "it"], ["ts", "its"]),
            (["titt", "it"], ["s", "t"]),
        ],
    )
    def test_cached_padding_is_not_seen_while_decoding(self, variant, first, second):
        """Also what followed the end of an answer that was shorter than others, and images that a mask hides."""
        model = make_pair(variant, dtype=DOUBLE)[0]
        rounds = [make_inputs(layout, model, seed) for seed, layout in enumerate((first, second))]
        answers = torch.tensor([[5, 6, 7], [8, 2, 0]])  # the second ends after two tokens
        cache = StaticCache(config=model.config.text_config, max_cache_len=60)
        ids, mask = rounds[0]["input_ids"], rounds[0]["attention_mask"]
        mask[0, (ids[0] == model.config.image_token_id).nonzero()[:2, 0]] = 0
        forward(model, rounds[0], past_key_values=cache, logits_to_keep=1)
        for k in range(answers.shape[1]):
            token = answers[:, k : k + 1]
            ids, mask = torch.cat([ids, token], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
            # As `generate` does: no mask where text and images are kept apart
            own = {"attention_mask": mask} if "pixel_values" not in rounds[0] else {}
            forward(model, {"input_ids": token, **own}, past_key_values=cache)
        mask[1, -1] = 0
        ids = torch.cat([ids, rounds[1]["input_ids"]], 1)
        mask = torch.cat([mask, rounds[1]["attention_mask"]], 1)
        pixels = [one["pixel_values"] for one in rounds if "pixel_values" in one]
        # Rows of a batch come one after another, rounds of a row too
        if len(pixels) == 2:
            counts = [[row.count("i") for row in layout] for layout in (first, second)]
            parts = [one.split(count) for one, count in zip(pixels, counts)]
            pixels = [part for row in zip(*parts) for part in row]
        new = {**rounds[1], "attention_mask": mask}
        for k in range(3):
            ours = forward(model, new, past_key_values=cache, logits_to_keep=1).logits
            whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels)}
            expected = forward(model, whole, logits_to_keep=1).logits
            torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8, msg=lambda text, k=k: f"token {k}: {text}")
            new = {"input_ids": ours[:, -1:].argmax(-1)}
            ids, mask = torch.cat([ids, new["input_ids"]], 1), torch.nn.functional.pad(mask, (0, 1), value=1)

    @pytest.mark.parametrize("variant", ["mmca", "cross"])
    def test_rounds_of_generate_from_a_static_cache(self, variant):
        model = make_pair(variant, dtype=DOUBLE)[0]
        settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
        rounds = [make_inputs(layout, model, seed) for seed, layout in enumerate((["tttt", "t"], ["its", "its"]))]
        rounds[1]["pixel_values"] = rounds[1]["pixel_values"].double()
        cache = StaticCache(config=model.config.text_config, max_cache_len=60)
        ids = model.generate(**rounds[0], **settings, max_new_tokens=2, past_key_values=cache).sequences
        mask = torch.nn.functional.pad(rounds[0]["attention_mask"], (0, 2), value=1)
        whole = {
            **rounds[1],
            "input_ids": torch.cat([ids, rounds[1]["input_ids"]], 1),
            "attention_mask": torch.cat([mask, rounds[1]["attention_mask"]], 1),
        }
        expected = model.generate(**whole, **settings, max_new_tokens=5)
        ours = model.generate(**whole, **settings, max_new_tokens=5, past_key_values=cache)
        torch.testing.assert_close(ours.logits, expected.logits, atol=1e-8, rtol=1e-8)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_a_mask_may_be_as_wide_as_a_static_cache(self, attention):
        model = make_pair(dtype=DOUBLE)[attention == "eager"]
        inputs = make_inputs(["tit", "it"], model)
        expected = forward(model, inputs).logits[:, -1]
        for future in (0, 1):
            cache = StaticCache(config=model.config.text_config, max_cache_len=32)
            wide = torch.nn.functional.pad(inputs["attention_mask"], (0, 32 - inputs["input_ids"].shape[1]), value=future)
            ours = forward(model, {**inputs, "attention_mask": wide}, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-8)

    def test_a_mask_that_leaves_out_the_cache_is_an_error(self):
        model = make_pair()[0]
        cache = DynamicCache(config=model.config)
        forward(model, make_inputs(["tit", "it"], model), past_key_values=cache)
        more = {"input_ids": torch.tensor([[7, 8], [9, 1]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
        with pytest.raises(ValueError, match="has 2 columns, but 11 tokens have been seen: the 9 of the cache and 2 new"):
            forward(model, more, past_key_values=cache)

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_the_definition_with_a_static_cache(self, variant):
        """New pictures in a cached conversation, a prefill in chunks, and a cache that is used again."""
        model = make_pair(variant, dtype=DOUBLE)[1]
        rounds = [make_inputs(layout, model, seed) for seed, layout in enumerate((["titit"], ["sit"]))]
        cache = StaticCache(config=model.config.text_config, max_cache_len=60)
        for _ in range(2):
            forward(model, rounds[0], past_key_values=cache)
            both = {name: torch.cat([one[name] for one in rounds], dim=1) for name in ("input_ids", "attention_mask")}
            new = {**rounds[1], "attention_mask": both["attention_mask"]}
            ours = forward(model, new, past_key_values=cache).logits[:, -1]
            both["pixel_values"] = torch.cat([one["pixel_values"] for one in rounds])
            torch.testing.assert_close(ours, forward(model, both).logits[:, -1], atol=1e-8, rtol=1e-8)
            cache.reset()
        inputs = {**rounds[0], "pixel_values": rounds[0]["pixel_values"].double()}
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        chunks = {"prefill_chunk_size": 3} if CUTS_IMAGES else {}
        ours = model.generate(**inputs, **settings, cache_implementation="static", **chunks)
        assert torch.equal(ours, model.generate(**inputs, **settings))
