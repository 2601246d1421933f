"""The default attention, by modality, equals `eager`, the definition; and the cache that keeps text and images apart."""

import copy
import functools
import random

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from helpers.tiny import TOKENS_PER_IMAGE, make_inputs, make_model
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from modeling_visualchat import decoder_visualchat, kernels_visualchat, layout_visualchat, visibility_visualchat
from modeling_visualchat.cache_visualchat import ModalitiesLayer, StaticModalitiesLayer, get_places


drawn = functools.partial(settings, deadline=None, derandomize=True)
MODELS = st.tuples(st.sampled_from(["mmca", "mmca_merged"]), st.booleans(), st.sampled_from([1, 2, 4]))
ROWS = st.text(alphabet="sti", max_size=5)  # also rows of padding alone: who says nothing in a round
LAYOUTS = st.lists(ROWS, min_size=1, max_size=3).filter(any)
SIDES = st.sampled_from(["left", "right"])
EDGES = [["iss"], ["tti"], ["i", "s"], ["s"], ["ii", "titit", "iitt"], ["ss", "tt"]]


# What hypothesis draws is compared in double precision, so that no rounding is taken for an error
DOUBLE = torch.float64


@functools.cache
def make_pair(variant="mmca", numbered=True, kv_heads=2, dtype=torch.float32, trains=False, attention="sdpa"):
    """The same weights by modality and as the definition. The tower is the same on both sides."""
    text = {"num_key_value_heads": kv_heads}
    options = {"multimodal_attention": variant, "image_number_keys": numbered, "text": text}
    pair = [
        make_model({"text_config": decoder, "vision_config": "sdpa"}, **copy.deepcopy(options)).to(dtype).train(trains)
        for decoder in (attention, "eager")
    ]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def with_edges(**others):
    """A batch of each kind that is easily forgotten, and those that hypothesis draws."""

    def decorate(test):
        for layout in EDGES:
            test = example(layout=layout, **others)(test)
        return test

    return decorate


def forward(model, inputs, **kwargs):
    if "pixel_values" in inputs:
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(next(model.parameters()).dtype)}
    with torch.no_grad():
        return model(**inputs, **kwargs)


def assert_equal_where_kept(ours, expected, inputs, atol=1e-5):
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[kept], expected[kept], atol=atol, rtol=1e-5)


class TestForward:
    @pytest.mark.parametrize("watched", ["gate_proj", "act_fn", "up_proj"])
    def test_what_hooks_were_given_is_not_overwritten(self, watched):
        model, seen = make_pair()[0], []
        part = getattr(model.model.language_model.layers[0].mlp, watched)
        handle = part.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
        try:
            forward(model, make_inputs(["titit"], model))
        finally:
            handle.remove()
        assert len(seen) == 1 and torch.equal(*seen[0])

    @drawn(max_examples=40)
    @with_edges(key=("mmca", True, 2), side="left")
    @given(key=MODELS, layout=LAYOUTS, side=SIDES)
    def test_logits_and_the_hidden_states_of_every_layer_equal_eager(self, key, layout, side):
        fast, eager = make_pair(*key, dtype=DOUBLE)
        inputs = make_inputs(layout, fast, padding_side=side)
        expected = forward(eager, inputs, output_hidden_states=True)
        recorded = forward(fast, inputs, output_hidden_states=True)
        assert_equal_where_kept(forward(fast, inputs).logits, expected.logits, inputs)
        assert_equal_where_kept(recorded.logits, expected.logits, inputs)
        assert len(recorded.hidden_states) == len(expected.hidden_states)
        for ours, theirs in zip(recorded.hidden_states, expected.hidden_states):
            assert_equal_where_kept(ours, theirs, inputs)
        if inputs.pop("attention_mask").all():
            torch.testing.assert_close(forward(fast, inputs).logits, expected.logits, atol=1e-5, rtol=1e-5)

    @drawn(max_examples=20)
    @with_edges(key=("mmca", True, 2), side="left", supervised=1.0)
    @given(key=MODELS, layout=LAYOUTS, side=SIDES, supervised=st.sampled_from([0.3, 1.0]))
    def test_gradients_of_all_weights_equal_eager(self, key, layout, side, supervised):
        pair = make_pair(*key, dtype=DOUBLE, trains=True)
        inputs = make_inputs(layout, pair[0], padding_side=side)
        assume(inputs["input_ids"].shape[1] > 1)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        learned = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1)) <= supervised
        learned[:, 1:] &= inputs["attention_mask"][:, :-1].bool()  # no loss at what a padding row predicts
        labels = inputs["input_ids"].masked_fill(~learned | (inputs["attention_mask"] == 0), -100)
        assume((labels[:, 1:] != -100).any())
        losses, gradients = [], []
        for model in pair:
            model.zero_grad()
            losses.append(model(**inputs, labels=labels).loss)
            losses[-1].backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)
        if any(part in row for row in layout for part in "st"):
            assert set(gradients[0]) == set(gradients[1])
        for name, expected in gradients[1].items():
            ours = gradients[0].get(name, torch.zeros(()).expand_as(expected))
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4, check_dtype=False, msg=name)

    def test_a_batch_without_any_supervised_position_gives_every_weight_a_gradient(self):
        fast, eager = make_pair(trains=True)
        inputs = make_inputs(["tit", "tt"], fast)
        labels = torch.full_like(inputs["input_ids"], -100)
        names = []
        for model in (eager, fast):
            model.zero_grad()
            model(**inputs, labels=labels, logits_to_keep=labels != -100, num_items_in_batch=3).loss.backward()
            names.append({name for name, p in model.named_parameters() if p.grad is not None})
        assert names[0] == names[1]

    def test_gradients_in_double_precision_are_finite_where_the_longest_text_is_one_token(self):
        model = make_pair("mmca_merged", dtype=DOUBLE, trains=True)[0]
        inputs = make_inputs(["i", "s"], model, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model.zero_grad()
        model(**{**inputs, "pixel_values": inputs["pixel_values"].double()}, labels=labels).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    @drawn(max_examples=12)
    @given(key=MODELS, layout=LAYOUTS, side=SIDES, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def test_half_precision_is_finite_and_near(self, key, layout, side, dtype):
        exact = make_pair(*key, dtype=DOUBLE)[0]
        inputs = make_inputs(layout, exact, padding_side=side)
        half = make_pair(*key, dtype=dtype)[0]
        logits = forward(half, inputs).logits
        assert logits.isfinite().all()
        kept = inputs["attention_mask"].bool()
        expected = forward(exact, inputs).logits[kept]
        error = (logits[kept].double() - expected).norm() / expected.norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02)

    @drawn(max_examples=25)
    @given(data=st.data(), key=MODELS, layout=LAYOUTS, side=SIDES)
    def test_logits_to_keep_gives_the_slices_of_the_full_logits(self, data, key, layout, side):
        model = make_pair(*key, dtype=DOUBLE)[0]
        inputs = make_inputs(layout, model, padding_side=side)
        full = forward(model, inputs).logits
        batch, length = inputs["input_ids"].shape
        kept = inputs["attention_mask"].bool()

        last = data.draw(st.integers(1, length + 1))
        ours = forward(model, inputs, logits_to_keep=last).logits
        assert ours.shape[1] == min(last, length)
        torch.testing.assert_close(ours[kept[:, -last:]], full[:, -last:][kept[:, -last:]], atol=1e-5, rtol=1e-5)

        index = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4)))
        ours = forward(model, inputs, logits_to_keep=index).logits
        torch.testing.assert_close(ours[kept[:, index]], full[:, index][kept[:, index]], atol=1e-5, rtol=1e-5)

        flags = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
        mask = torch.tensor(data.draw(flags)).view(batch, length) & kept
        ours = forward(model, inputs, logits_to_keep=mask).logits
        torch.testing.assert_close(ours, full[mask], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "logits_to_keep",
        [
            torch.tensor([-1, 0]),
            pytest.param(
                torch.tensor([[0, 3], [5, 1]]),
            ),
            pytest.param(
                torch.arange(9) % 2 == 0,
            ),
        ],
        ids=["from the end", "by row", "one mask for all rows"],
    )
    def test_logits_to_keep_is_what_transformers_slices(self, logits_to_keep):
        fast, eager = make_pair()
        inputs = make_inputs(["tit", "itt"], fast)
        expected = forward(eager, inputs, logits_to_keep=logits_to_keep).logits
        torch.testing.assert_close(
            forward(fast, inputs, logits_to_keep=logits_to_keep).logits, expected, atol=1e-5, rtol=1e-5
        )

    @drawn(max_examples=12)
    @given(key=MODELS, layout=LAYOUTS, side=SIDES)
    def test_the_loss_of_supervised_positions_alone_is_the_full_one(self, key, layout, side):
        model = make_pair(*key, dtype=DOUBLE)[0]
        inputs = make_inputs(layout, model, padding_side=side)
        is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
        labels = inputs["input_ids"].masked_fill(~is_text, -100)
        supervised = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        assume(supervised.any())
        full = forward(model, inputs, labels=labels).loss
        kept = forward(model, inputs, labels=labels, logits_to_keep=supervised).loss
        torch.testing.assert_close(kept, full, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


class TestCost:
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_nothing_of_the_sequence_by_itself_is_made(self, variant):
        vision = {"patch_size": 2}
        largest = {}
        for decoder in ("sdpa", "eager"):
            model = make_model(
                {"text_config": decoder, "vision_config": "sdpa"}, multimodal_attention=variant, vision=vision
            )
            inputs = make_inputs(["t" + "i" * 8 + "t"], model)
            length = inputs["input_ids"].shape[1]
            assert length == 8 * 65 + 4
            with Largest() as largest[decoder]:
                model(**inputs, labels=inputs["input_ids"], use_cache=decoder == "sdpa").loss.backward()
        assert largest["sdpa"].numel < length**2 <= largest["eager"].numel

    def test_equal_pictures_go_through_the_tower_once_and_have_the_gradients_of_copies(self):
        fast, eager = make_pair(dtype=DOUBLE, trains=True)
        inputs = make_inputs(["tiit", "it"], fast)
        labels = inputs["input_ids"].clone()
        labels[1, : -TOKENS_PER_IMAGE - 1] = -100  # padding, and what it predicts
        pictures = inputs["pixel_values"].double()
        pictures[2] = pictures[0]
        # Copies that differ by less than any result shows are encoded one by one
        apart = pictures + 1e-13 * torch.arange(3)[:, None, None, None]
        rows, results = [], []
        for model, pixel_values in ((fast, pictures), (eager, apart)):
            hook = model.model.vision_tower.register_forward_hook(
                lambda module, args, output: rows.append(len(output.last_hidden_state))
            )
            model.zero_grad()
            outputs = model(**{**inputs, "pixel_values": pixel_values}, labels=labels)
            outputs.loss.backward()
            hook.remove()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append((outputs, gradients))
        assert rows == [2, 3]
        (ours, our_gradients), (theirs, their_gradients) = results
        assert_equal_where_kept(ours.logits, theirs.logits, inputs)
        torch.testing.assert_close(ours.image_hidden_states, theirs.image_hidden_states, atol=1e-6, rtol=1e-6)
        assert torch.equal(ours.image_hidden_states[0], ours.image_hidden_states[2])
        for name, expected in their_gradients.items():
            torch.testing.assert_close(our_gradients[name], expected, atol=2e-5, rtol=1e-4, msg=name)

    def test_pictures_that_differ_in_one_pixel_are_two(self):
        model = make_pair()[0]
        inputs = make_inputs(["itit"], model)
        inputs["pixel_values"][1] = inputs["pixel_values"][0]
        same = forward(model, inputs).logits
        # The sum of all pixels stays
        inputs["pixel_values"][1, 0, 0, 0], inputs["pixel_values"][1, 0, 0, 1] = 3.0, -3.0
        inputs["pixel_values"][0, 0, 0, 0], inputs["pixel_values"][0, 0, 0, 1] = -3.0, 3.0
        assert not torch.allclose(same, forward(model, inputs).logits, atol=1e-3)
        pair = make_pair()[1]
        torch.testing.assert_close(forward(model, inputs).logits, forward(pair, inputs).logits, atol=1e-5, rtol=1e-5)


class Conversations:
    """
    A batch that grows by rounds, each row with the pictures of its own, and the cache of it. `say` compares with a run from
    scratch.
    """

    def __init__(self, model, reference, batch_size, cache=None, seed=0):
        self.model, self.reference, self.seed = model, reference, seed
        self.cache = DynamicCache() if cache is None else cache
        self.input_ids = self.attention_mask = torch.empty(batch_size, 0, dtype=torch.long)
        self.pictures = [[] for _ in range(batch_size)]  # of each row, (place, pixels)

    def say(self, layout, side="left", in_pieces_of=None):
        self.seed += 1
        new = make_inputs(layout, self.model, self.seed, side)
        past, pixels = self.length, iter(new.get("pixel_values", ()))
        for row, parts in enumerate(layout):
            first_rows = (new["input_ids"][row] == self.model.config.image_token_id).nonzero()[::TOKENS_PER_IMAGE, 0]
            self.pictures[row] = self.pictures[row] + [(past + int(place), next(pixels)) for place in first_rows]
            assert len(first_rows) == parts.count("i")
        self.input_ids = torch.cat([self.input_ids, new["input_ids"]], dim=1)
        self.attention_mask = torch.cat([self.attention_mask, new["attention_mask"]], dim=1)
        expected = forward(self.reference, self.everything()).logits[:, past:]
        if in_pieces_of is None:
            logits = forward(self.model, {**new, "attention_mask": self.attention_mask}, past_key_values=self.cache).logits
        else:
            logits = self._say_in_pieces(new, past, in_pieces_of)
        assert_equal_where_kept(logits, expected, new)
        assert self.cache.get_seq_length() == self.length

    def _say_in_pieces(self, new, past, size):
        is_image = new["input_ids"] == self.model.config.image_token_id
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(new["input_ids"])
            if is_image.any():
                embeds[is_image] = torch.cat(
                    self.model.get_image_features(new["pixel_values"].to(embeds.dtype)).pooler_output
                )
        pieces = []
        for start in range(0, is_image.shape[1], size):
            piece = slice(start, start + size)
            inputs = {"inputs_embeds": embeds[:, piece], "mm_token_type_ids": is_image[:, piece].long()}
            inputs["attention_mask"] = self.attention_mask[:, : past + start + size]
            pieces.append(forward(self.model, inputs, past_key_values=self.cache).logits)
        return torch.cat(pieces, dim=1)

    @property
    def length(self):
        return self.input_ids.shape[1]

    def everything(self):
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        pixels = [picture for row in self.pictures for _, picture in row]
        return {**inputs, "pixel_values": torch.stack(pixels)} if pixels else inputs

    def places_between_images(self):
        """Lengths to which the cache can be cropped without cutting through an image."""
        inside = {place + k for row in self.pictures for place, _ in row for k in range(1, TOKENS_PER_IMAGE)}
        return [place for place in range(1, self.length + 1) if place not in inside]

    def crop_to(self, length):
        self.cache.crop(length - self.length)
        self.input_ids, self.attention_mask = self.input_ids[:, :length], self.attention_mask[:, :length]
        self.pictures = [[(place, picture) for place, picture in row if place < length] for row in self.pictures]

    def take_rows(self, rows):
        self.input_ids, self.attention_mask = self.input_ids[rows], self.attention_mask[rows]
        self.pictures = [self.pictures[row] for row in rows]

    def reset(self):
        self.cache.reset()
        self.input_ids = self.attention_mask = self.input_ids[:, :0]
        self.pictures = [[] for _ in self.pictures]


def layouts_of(batch_size):
    return st.lists(ROWS.filter(lambda row: row.count("i") <= 2), min_size=batch_size, max_size=batch_size).filter(any)


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

        assert [type(layer) for layer in cache.layers] == [ModalitiesLayer] * layers
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
        places = get_places(cache)
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
        operations = ["crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "deepcopy", "reset"]
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

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
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

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_a_static_cache_is_filled_to_its_end_and_begins_again_after_a_reset(self, variant):
        pair = make_pair(variant, dtype=DOUBLE)
        conversations = Conversations(*pair, 2, StaticCache(config=pair[0].config.text_config, max_cache_len=40))
        for layout in (["titt", "s"], ["t", "itst"], ["t", "t"], ["iitst", "ts"], ["t", "s"]):
            conversations.say(layout)
        assert conversations.length == 40
        conversations.reset()
        conversations.say(["it", "iti"])

    @pytest.mark.parametrize("static", [False, True])
    def test_a_compiled_model_brings_new_images_into_a_cached_conversation(self, static):
        model = make_pair()[0]
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
            assert [type(layer).__name__ for layer in cache.layers] == ["ModalitiesLayer"] * layers
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

    def test_beams_and_batches_leave_the_images_where_they_are(self):
        """Beam search reorders and repeats rows that hold different numbers of images."""
        fast, eager = make_pair()
        inputs = make_inputs(["titit", "ts", "iit"], fast)
        beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "eos_token_id": None}
        assert torch.equal(fast.generate(**inputs, **beams), eager.generate(**inputs, **beams))


def compute_all_by_flex(monkeypatch):
    """On a CPU too, and however few the queries."""
    monkeypatch.setattr(decoder_visualchat, "computes_by_flex", lambda device: True)
    monkeypatch.setattr(visibility_visualchat, "BLOCK_SIZE", 1)
    monkeypatch.setattr(visibility_visualchat, "MIN_FLEX_SCORES", 1)


@pytest.fixture(params=["sdpa", "flex_attention"])
def on_a_gpu(request, monkeypatch):
    """What a GPU computes: a masked call for every few queries, or one by flex attention, whose masks are here applied."""
    monkeypatch.setattr(visibility_visualchat, "runs_by_images", lambda device: False)
    monkeypatch.setattr(visibility_visualchat, "QUERIES_PER_CALL", 3)
    if request.param == "flex_attention":
        compute_all_by_flex(monkeypatch)
        monkeypatch.setattr(kernels_visualchat, "_flex", apply_block_mask)
    return request.param


def apply_block_mask(query, key, value, block_mask, **settings):
    assert block_mask.shape == (len(query), 1, query.shape[2], key.shape[2])
    visible = create_mask(block_mask.mask_mod, len(query), 1, query.shape[2], key.shape[2], query.device)
    sees = visible.any(-1, keepdim=True)
    return scaled_dot_product_attention(query, key, value, visible | ~sees, **settings) * sees


class TestMaskedCalls:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("layout", [*EDGES, ["ttititst"], ["titsit", "ttt", "iitti"]], ids=str)
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_logits_and_gradients_equal_eager(self, on_a_gpu, variant, layout, side):
        pair = make_pair(variant, dtype=DOUBLE, trains=True, attention=on_a_gpu)
        inputs = make_inputs(layout, pair[0], padding_side=side)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100
        outputs, gradients = [], []
        for model in pair:
            model.zero_grad()
            outputs.append(model(**inputs, labels=labels))
            if outputs[-1].loss.isfinite():  # not where nothing is learned
                outputs[-1].loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert_equal_where_kept(outputs[0].logits, outputs[1].logits, inputs)
        for name, expected in gradients[1].items():
            ours = gradients[0].get(name, torch.zeros_like(expected))
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4, msg=name)

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_rounds_equal_a_run_from_scratch(self, on_a_gpu, variant):
        conversations = Conversations(*make_pair(variant, attention=on_a_gpu), 2)
        for layout in (["titt", "s"], ["", "itst"], ["t", "t"], ["iitst", "ts"]):
            conversations.say(layout)


class TestFlexAttention:
    @drawn(max_examples=40)
    @given(data=st.data(), batch_size=st.integers(1, 3), images=st.integers(1, 4), in_one_sequence=st.booleans())
    def test_a_block_is_computed_if_it_holds_something_and_without_a_mask_if_all_of_it_is_seen(
        self, data, batch_size, images, in_one_sequence
    ):
        """Compared with the masks of torch, which looks at each key of each query."""
        rows = []
        for _ in range(batch_size):
            texts = [data.draw(st.integers(0, 200)) for _ in range(images + 1)]
            tokens = [False] * texts[0] + [token for text in texts[1:] for token in [True] * 150 + [False] * text]
            rows.append(torch.tensor(tokens))
        is_image = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        kept = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        places = torch.arange(is_image.shape[1]).expand(batch_size, -1)
        keys, last = places.masked_fill(~is_image, -1), places.masked_fill(~kept | is_image, -1)
        first = torch.zeros_like(last)
        if in_one_sequence:
            first = (torch.arange(batch_size) * places.shape[1])[:, None].expand_as(last)
            keys, last = (torch.where(part < 0, -1, part + first).reshape(1, -1) for part in (keys, last))
            first = first.reshape(1, -1)
        mask = kernels_visualchat.make_block_mask(keys, first, last)
        exact = create_block_mask(mask.mask_mod, len(keys), None, last.shape[1], keys.shape[1], device="cpu")
        assert (mask.shape, mask.BLOCK_SIZE) == (exact.shape, exact.BLOCK_SIZE)
        assert torch.equal(mask.full_kv_num_blocks, exact.full_kv_num_blocks)
        held, computed = (one.to_dense() != 0 for one in (exact, mask))
        assert computed[held].all()
        of_blocks = create_mask(mask.mask_mod, len(keys), 1, last.shape[1], keys.shape[1], "cpu")
        for row, query, key in zip(*torch.where(_full_blocks(mask))):
            block = of_blocks[row, 0, 128 * query : 128 * (query + 1), 128 * key : 128 * (key + 1)]
            assert block.shape == (128, 128) and block.all()

    def test_the_kernel_itself_equals_eager(self, monkeypatch):
        """As compiled for a CPU, which has no backward pass of it: training is tested on a GPU."""
        compute_all_by_flex(monkeypatch)
        calls, attend = [], kernels_visualchat._flex
        monkeypatch.setattr(
            kernels_visualchat, "_flex", lambda *args, **kwargs: calls.append(args) or attend(*args, **kwargs)
        )
        flex, eager = make_pair(attention="flex_attention")
        inputs = make_inputs(["titit", "ts", "iit"], flex)
        assert_equal_where_kept(forward(flex, inputs).logits, forward(eager, inputs).logits, inputs)
        assert len(calls) > 0

    def test_on_a_cpu_it_trains_and_decodes_as_sdpa_does(self):
        flex, eager = make_pair(trains=True, attention="flex_attention")
        inputs = make_inputs(["titit", "ts"], flex, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        losses = [model(**inputs, labels=labels).loss for model in (flex, eager)]
        torch.testing.assert_close(*losses)
        losses[0].backward()
        greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        flex, eager = (copy.deepcopy(model).eval() for model in (flex, eager))
        for layout in (["titit", "ts"], ["tst", "tt"]):
            for cache in ({}, {"cache_implementation": "static"}):
                inputs = make_inputs(layout, flex)
                assert torch.equal(flex.generate(**inputs, **greedy, **cache), eager.generate(**inputs, **greedy))

    def test_text_alone_is_left_to_sdpa_and_gives_the_numbers_a_gradient(self, on_a_gpu):
        """Each process of a distributed run has gradients of the same weights, whatever its batch holds."""
        flex, eager = make_pair(trains=True, attention="flex_attention")
        inputs = make_inputs(["tst", "tt"], flex, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        results = []
        for model in (flex, eager):
            model.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)

    def test_it_computes_what_is_large_enough(self, monkeypatch):
        def takes_blocks(images, text_tokens, batch_size=1):
            is_image = torch.tensor([([True] * 257 + [False] * text_tokens) * images]).expand(batch_size, -1)
            rotary = (torch.ones(1, is_image.shape[1], 2),) * 2
            layout = layout_visualchat.ModalityLayout(is_image, None, rotary, is_image.shape, 257, uses_flex=True)
            return isinstance(layout.image_calls[0][1][0].mask, BlockMask)

        assert not takes_blocks(8, 32) and takes_blocks(8, 32, batch_size=4) and takes_blocks(16, 32)
        assert not takes_blocks(100, 1)

    def test_few_kinds_of_shapes_are_compiled(self, monkeypatch):
        """Batches of one and of several, of equal and unequal rows, of any size. On a GPU, so many with gradients again."""
        compute_all_by_flex(monkeypatch)
        torch._dynamo.reset()
        counter, limit = CompileCounter(), torch._dynamo.config.recompile_limit
        compiled = torch.compile(flex_attention, backend=counter, fullgraph=True)
        monkeypatch.setattr(kernels_visualchat, "_compile_flex", lambda: compiled)
        flex, eager = make_pair(attention="flex_attention")
        generator = random.Random(0)
        for _ in range(24):
            length = generator.randint(1, 4)
            equal = ["it" + "".join(generator.choice("its") for _ in range(length))] * generator.randint(1, 3)
            unequal = ["it" + "".join(generator.choice("its") for _ in range(generator.randint(0, 4))) for _ in range(3)]
            inputs = make_inputs(generator.choice([equal, unequal]), flex)
            assert_equal_where_kept(forward(flex, inputs).logits, forward(eager, inputs).logits, inputs)
        assert 0 < counter.frame_count <= 6
        assert torch._dynamo.config.recompile_limit == limit

    def test_attention_dropout_is_refused(self, on_a_gpu):
        model = make_model({"text_config": on_a_gpu, "vision_config": "sdpa"}, text={"attention_dropout": 0.1}).train()
        inputs = make_inputs(["titit"], model)
        if on_a_gpu == "sdpa":
            model(**inputs)
            return
        with pytest.raises(ValueError, match="no dropout: set attention_dropout=0 or attn_implementation='sdpa'"):
            model(**inputs)
        model.eval()(**inputs)

    def test_a_layout_that_is_moved_masks_what_it_did(self, on_a_gpu):
        """As accelerate does where layers are spread over devices."""
        flex, eager = make_pair(attention=on_a_gpu)
        inputs = make_inputs(["titit", "ts"], flex)
        hook = functools.partial(_move_layouts, device="cpu")
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in flex.model.language_model.layers]
        try:
            assert_equal_where_kept(forward(flex, inputs).logits, forward(eager, inputs).logits, inputs)
        finally:
            for handle in handles:
                handle.remove()


def _full_blocks(mask):
    only_full = BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    return only_full.to_dense()[:, 0] != 0


def _move_layouts(module, args, kwargs, device):
    moved = kwargs["attention_mask"]._moved(torch.device(device))
    assert kwargs["attention_mask"].to(device) is kwargs["attention_mask"]
    return args, {**kwargs, "attention_mask": moved}


def test_cudnn_is_left_out_and_let_in_again_as_the_user_has_it():
    cuda = torch.backends.cuda
    assert cuda.cudnn_sdp_enabled()
    with pytest.raises(ZeroDivisionError), kernels_visualchat.without_cudnn():
        assert not cuda.cudnn_sdp_enabled() and cuda.flash_sdp_enabled()
        _ = 1 / 0
    assert cuda.cudnn_sdp_enabled()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION), kernels_visualchat.without_cudnn():
        assert cuda.cudnn_sdp_enabled()  # the user allows nothing else
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with kernels_visualchat.without_cudnn():
            assert not cuda.cudnn_sdp_enabled()
        assert not cuda.cudnn_sdp_enabled()


@pytest.fixture
def without_the_dense_path(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("computed in the order of the sequence")

    monkeypatch.setattr(decoder_visualchat, "create_multimodal_mask", refuse)


@pytest.mark.usefixtures("without_the_dense_path")
class TestGraphs:
    """In one graph without breaks. What inductor makes of it is tested in `test_placement.py`, and on a GPU."""

    @pytest.mark.parametrize("variant, side", [("mmca", "left"), ("mmca_merged", "right")])
    def test_a_compiled_training_step_has_the_losses_and_gradients_of_one_that_is_not(self, variant, side):
        model = make_pair(variant, dtype=DOUBLE, trains=True)[0]
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

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
    def test_decoding_from_a_static_cache_is_one_graph_for_all_steps(self, variant):
        model = make_pair(variant, dtype=DOUBLE)[0]
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

    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
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
            assert [type(layer) for layer in cache.layers] == [StaticModalitiesLayer] * layers
            # The longest text and the most images may be of different rows
            assert cache.layers[0].buffer.keys.shape[2] == 40 + more
            assert cache.is_compileable and cache.get_max_length() == 40
            with pytest.raises(NotImplementedError, match="use a dynamic one"):
                cache.crop(-1)
            cache.reset()
            assert cache.get_seq_length() == 0


class TestMasksOfACache:
    @pytest.mark.parametrize("variant", ["mmca", "mmca_merged"])
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

    def test_rounds_of_generate_from_a_static_cache(self):
        model = make_pair(dtype=DOUBLE)[0]
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
        ours = model.generate(**inputs, **settings, cache_implementation="static", prefill_chunk_size=3)
        assert torch.equal(ours, model.generate(**inputs, **settings))
