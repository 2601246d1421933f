"""Models that the tests of a file share."""

import pytest

from helpers.tiny import make_model


@pytest.fixture(scope="module", params=["mmca", "mmca_merged", "causal"])
def model(request):
    return make_model(multimodal_attention=request.param, image_number_keys=True)


@pytest.fixture(scope="module", params=["mmca", "mmca_merged", "causal", "cross"])
def any_model(request):
    return make_model(multimodal_attention=request.param, image_number_keys=True)


@pytest.fixture(scope="module")
def mmca():
    return make_model(image_number_keys=True)
