"""Models of the tests of image memory, and a count of what their tower sees."""

import copy

import pytest

from helpers.image_memory import shared_model


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
