"""The pytest plugin. pytest loads it at every start, so it imports the library only for a test that uses it."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from downloadview_async.testing import Recording


@pytest.fixture
def download_call() -> "Callable[..., Awaitable[Recording]]":
    """Return `downloadview_async.testing.call`, which sends one request to an ASGI application."""
    from downloadview_async.testing import call

    return call
