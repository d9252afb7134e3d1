"""The standalone service. For other servers, it is the ASGI application `downloadview_async.service:app`."""

import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from types import ModuleType
from typing import Any

_Message = MutableMapping[str, Any]
_Application = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]],
    Awaitable[None],
]


class _FromEnvironment:
    """The service for DOWNLOADVIEW_CONFIG and the other variables, as `downloadview serve` reads them.

    It is made when the server starts it, so importing this module costs nothing. If the settings are wrong, the start
    fails with one line in the log of the server. A server without a lifespan gets a `ConfigurationError`.
    """

    def __init__(self) -> None:
        self._made: _Application | None = None

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        if self._made is None:
            from downloadview_async import ConfigurationError

            try:
                self._made = _application()
            except ConfigurationError as exc:
                if scope["type"] != "lifespan":
                    raise
                problem = str(exc)
        if self._made is None:
            from downloadview_async.service.logs import one_line

            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"downloadview: {one_line(problem)}"})
            return
        await self._made(scope, receive, send)


def _application() -> _Application:
    from downloadview_async import ConfigurationError
    from downloadview_async.service.app import app_from_environment
    from downloadview_async.service.config_loader import CONFIG, DEFAULT, PREFIX

    if not any(name.startswith(PREFIX) for name in os.environ) and not DEFAULT.exists():
        raise ConfigurationError(
            f"nothing to serve: set {CONFIG} to the path of the settings file, or give a file {DEFAULT} in the current "
            "directory"
        )
    return app_from_environment(DEFAULT if DEFAULT.exists() else None)


class _Package(ModuleType):
    """This package, whose `app` stays the application: importing the module `service/app.py` would replace it."""

    @property
    def app(self) -> _FromEnvironment:
        made: _FromEnvironment = self.__dict__["app"]
        return made

    @app.setter
    def app(self, module: ModuleType) -> None:
        pass


app = _FromEnvironment()
"""The service as an ASGI application."""
sys.modules[__name__].__class__ = _Package
