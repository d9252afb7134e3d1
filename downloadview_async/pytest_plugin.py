"""The pytest plugin. pytest loads it at every start, so it imports nothing that a test has not asked for."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from downloadview_async.testing import Recording


@pytest.fixture
def download_call() -> "Callable[..., Awaitable[Recording]]":
    """`downloadview_async.testing.call`: send one request to an ASGI application, and get a `Recording`."""
    from downloadview_async.testing import call

    return call
