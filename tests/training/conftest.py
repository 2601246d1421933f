"""A tiny model and examples that the tests of a file share."""

import pytest

from helpers.training import save_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))
