"""Models and images for the tests of image memory."""

import functools

import torch
from hypothesis import settings

from helpers.tiny import make_model


NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


drawn = functools.partial(settings, deadline=None, derandomize=True)


@functools.cache
def shared_model(variant="mmca", numbered=True, dtype=torch.float32):
    """Not to be changed."""
    return make_model(multimodal_attention=variant, image_number_keys=numbered).to(dtype).requires_grad_(False)


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
