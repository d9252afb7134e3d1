"""Which event loops a test runs on: those that its module names, else asyncio's own. The tests on uvloop are slow."""

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


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests on uvloop as slow: what `make test` leaves out is rarely wrong on one loop alone."""
    for item in items:
        if LOOPS["uvloop"] in getattr(getattr(item, "callspec", None), "params", {}).values():
            item.add_marker(pytest.mark.slow)
