"""The application with `Accounts` around it, if something listens to outcomes."""

from collections.abc import Callable, Iterator
from ipaddress import ip_network
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp

from downloadview_async import AccessLog, Accounts, Metrics, Outcome, Traces
from downloadview_async.service.access import trusted_proxies
from downloadview_async.service.functions import function_of
from downloadview_async.service.settings import Settings

_HOOK = "hook:"


class Service(Starlette):
    """The service as an ASGI application. Its outermost middleware is `Accounts`, so each error is accounted for too.

    Raises `ConfigurationError` for a listener that cannot be imported, and for a log that cannot be written.
    """

    def __init__(self, settings: Settings, metrics: Metrics | None = None, **options: Any) -> None:
        self._settings = settings
        self._metrics = metrics
        self._listeners: list[Callable[[Outcome], Any]] = [
            function_of(settings, f"accounts.listeners[{index}]", name.removeprefix(_HOOK))
            for index, name in enumerate(settings.accounts.listeners)
        ]
        if (log := settings.log) is not None:
            with settings.blaming("log.path"):
                self._listeners.append(AccessLog(log.path, format=log.format))
        self._traces: Traces | None = None
        if settings.accounts.traces:
            with settings.blaming("accounts.traces"):
                self._traces = Traces()
        super().__init__(**options)

    def build_middleware_stack(self) -> ASGIApp:
        """Return the application with its middleware around it."""
        app = super().build_middleware_stack()
        if not self._settings.listens:
            return app
        trusted = list(_addresses_of(self._settings))
        metrics = self._metrics
        observers = [] if metrics is None else [metrics.observe]
        if self._traces is not None:
            app = self._traces.around(app)
            observers.append(self._traces.observe)
        accounts = Accounts(app, self._listeners, observers=observers, trusted_proxies=trusted, sends_request_id=True)
        if metrics is not None:
            metrics.add_accounts(accounts)
        return accounts


def _addresses_of(settings: Settings) -> Iterator[str]:
    """Yield the trusted proxies, without the names by which uvicorn knows other peers."""
    for address in trusted_proxies(settings):
        try:
            if address != "*":
                ip_network(address)
        except ValueError:
            continue
        yield address
