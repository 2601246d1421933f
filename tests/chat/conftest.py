"""Models and a session that the tests of a file share."""

import pytest

from helpers.chat import PROCESSOR
from helpers.tiny import make_model


@pytest.fixture(scope="module")
def models():
    variants = ("mmca", "mmca_merged", "causal", "cross")
    return {name: make_model(multimodal_attention=name, image_number_keys=True) for name in variants}


@pytest.fixture
def model(models):
    return models["mmca"]


@pytest.fixture
def chat(model):
    """Greedy, unless told otherwise."""
    return model.start_chat(PROCESSOR)
