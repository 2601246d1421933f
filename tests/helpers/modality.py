"""Pairs of models with the same weights, by modality and as the definition, and what is drawn to compare them."""

import copy
import functools

import torch
from hypothesis import example, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from helpers.tiny import TOKENS_PER_IMAGE, make_inputs, make_model


drawn = functools.partial(settings, deadline=None, derandomize=True)


# With cross attention, whose text and images are apart too. There, `eager` is not another path, but writes the scores out
MODELS = st.tuples(st.sampled_from(["mmca", "mmca_merged", "cross"]), st.booleans(), st.sampled_from([1, 2, 4]))


ROWS = st.text(alphabet="sti", max_size=5)  # also rows of padding alone: who says nothing in a round


LAYOUTS = st.lists(ROWS, min_size=1, max_size=3).filter(any)


SIDES = st.sampled_from(["left", "right"])


EDGES = [["iss"], ["tti"], ["i", "s"], ["s"], ["ii", "titit", "iitt"], ["ss", "tt"]]


# What hypothesis draws is compared in double precision, so that no rounding is taken for an error
DOUBLE = torch.float64


@functools.cache
def make_pair(
    variant="mmca",
    numbered=True,
    kv_heads=2,
    dtype=torch.float32,
    trains=False,
    attention="sdpa",
    decoder="llama",
    prefix=None,
):
    """The same weights by modality and as the definition. The tower is the same on both sides."""
    text = {"num_key_value_heads": kv_heads}
    options = {"multimodal_attention": variant, "image_number_keys": numbered, "text": text, "decoder": decoder}
    if prefix is not None:
        options["image_prefix_ids"] = list(prefix)
    pair = [
        make_model({"text_config": backend, "vision_config": "sdpa"}, **copy.deepcopy(options)).to(dtype).train(trains)
        for backend in (attention, "eager")
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
