"""Which event loops a test runs on: those that its module names, else asyncio's own."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import uvloop

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Any]:
    """Give the loops of the module's `LOOPS`."""
    names = getattr(item.getparent(pytest.Module).obj, "LOOPS", ["asyncio"])  # type: ignore[union-attr]
    return {name: LOOPS[name] for name in names}
