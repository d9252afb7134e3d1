"""A server of Redis for all tests of this directory."""

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer, redis_server


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running server of Redis or Valkey."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server
