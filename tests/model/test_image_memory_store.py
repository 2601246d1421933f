"""The store of image memories, and the fingerprint of the weights that made them."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale

from helpers.image_memory import fill_by_counting, logits_of, pictures, split, text_rows
from helpers.tiny import make_inputs, make_model
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from modeling_visualchat.weight_fingerprint_visualchat import ModelWeights, fingerprint_weights


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
