"""A server that the tests of a file share."""

import pytest

from helpers.server import Server


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server
        assert server.service.taken == server.service.running == 0
