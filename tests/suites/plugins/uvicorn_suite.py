"""Has uvicorn's own tests of its httptools protocol test ours."""

from types import ModuleType
from typing import Any

import pytest
from uvicorn.protocols.http import httptools_impl

from downloadview_async.asgi.server import DownloadProtocol


class HttpToolsProtocol(DownloadProtocol):
    """Ours, under the name by which the tests know what httptools does differently from h11."""

    __slots__ = ()


httptools_impl.HttpToolsProtocol = HttpToolsProtocol  # type: ignore[misc]

_OTHERS = ("h11_impl", "zttp_impl", "websockets_sansio_impl")
"""Modules of uvicorn that other parameters of the same tests are about."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other protocols, and complete the stand-ins for a loop and for a transport."""
    others = [item for item in items if _is_about_another(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for module in {item.getparent(pytest.Module).obj for item in items}:  # type: ignore[union-attr]
        _complete(module)


def _is_about_another(item: pytest.Item) -> bool:
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    chosen = f"{parameters.get('http_protocol_cls')} {parameters.get('ws_protocol_cls')}"
    return any(name in chosen for name in _OTHERS)


def _complete(module: ModuleType) -> None:
    loop: Any = module.MockLoop
    transport: Any = module.MockTransport

    class Loop(loop):  # type: ignore[misc]
        """A loop whose clock goes as far as its timers are said to."""

        def __init__(self) -> None:
            super().__init__()
            self._now = 0.0

        def time(self) -> float:
            return self._now

        def run_later(self, with_delay: float) -> None:
            self._now += with_delay
            super().run_later(with_delay)

    class Transport(transport):  # type: ignore[misc]
        """A transport without a socket, which has always sent what it was given."""

        def get_write_buffer_size(self) -> int:
            return 0

    module.MockLoop, module.MockTransport = Loop, Transport  # type: ignore[attr-defined]
