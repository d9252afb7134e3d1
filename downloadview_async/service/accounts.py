"""`Service`: the application with `Accounts` around it, and the database in which downloads are counted."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import anyio
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async import (
    AccessLog,
    Accounts,
    Completions,
    CompletionStore,
    ConfigurationError,
    Metrics,
    Outcome,
    ProxyLog,
    Traces,
)
from downloadview_async.service.access import trusted_proxies
from downloadview_async.service.dispatch import Dispatch
from downloadview_async.service.functions import function_of
from downloadview_async.service.logs import one_line
from downloadview_async.service.settings import DatabaseUnavailable, Settings

if TYPE_CHECKING:
    from downloadview_async.asgi.server import KeptAnswers  # needs uvicorn

_PATIENCE = 10.0  # seconds that a database may take at the start

logger = logging.getLogger("downloadview_async")


class Service(Starlette):
    """The service as an ASGI application. Its outermost middleware is `Accounts`, so each error is accounted for too.

    observers: those of `Accounts`, besides the metrics.

    Raises `ConfigurationError` for a listener that cannot be imported, and for a log that cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics | None = None,
        observers: Sequence[Callable[[Outcome], None]] = (),
        **options: Any,
    ) -> None:
        self._observers = observers
        self._settings = settings
        self._metrics = metrics
        self._listeners: list[Callable[[Outcome], Any]] = [
            function_of(settings, f"accounts.listeners[{index}]", name)
            for index, name in enumerate(settings.accounts.listeners)
        ]
        if (log := settings.log) is not None:
            with settings.blaming("log.path"):
                self._listeners.append(AccessLog(log.path, format=log.format))
        self._accounts: Accounts | None = None
        self.kept_answers: KeptAnswers | None = None
        """Where the server keeps answers that it gives again, if the server of this application does that."""
        self._traces: Traces | None = None
        if settings.accounts.traces:
            with settings.blaming("accounts.traces"):
                self._traces = Traces()
        super().__init__(**options)

    @property
    def in_progress(self) -> int:
        """How many answers have not ended, of which the client may still take the last bytes; 0 without listeners."""
        return 0 if self._accounts is None else self._accounts.in_progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or run the lifespan."""
        await self.answer(scope, receive, send)

    def answer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Return a coroutine that does what a call does, without one more coroutine for each request."""
        scope["app"] = self
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        return self.middleware_stack(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """Return the application with its middleware around it."""
        app: ASGIApp = Dispatch(self.router, self.exception_handlers)
        for kind, args, kwargs in reversed(self.user_middleware):
            app = kind(app, *args, **kwargs)
        if not self._settings.listens:
            return app
        trusted = list(_addresses_of(self._settings))
        metrics, observers = self._metrics, [*self._observers]
        if metrics is not None:
            observers.append(metrics.observe)
        if self._traces is not None:
            app = self._traces.around(app)
            observers.append(self._traces.observe)
        self._accounts = accounts = Accounts(
            app, self._listeners, observers=observers, trusted_proxies=trusted, sends_request_id=True
        )
        if self.kept_answers is not None:
            self.kept_answers.accounts = accounts
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


def store_of_completions(settings: Settings) -> CompletionStore | None:
    """Return the store in which downloads are counted; None if they are not.

    Raises `ConfigurationError` for a URL that cannot be used, and for a missing package.
    """
    accounts = settings.accounts
    if accounts.database is None:
        return None
    assert not isinstance(accounts.keep, str)  # the settings have been checked
    with settings.blaming("accounts.database"):
        return CompletionStore(
            accounts.database,
            directory=settings.origin.directory,
            min_share=accounts.min_share,
            keep=timedelta(seconds=accounts.keep),
            max_rows=accounts.max_rows,
        )


def completions_of(settings: Settings) -> Completions | None:
    """Return what counts downloads; None if nothing does. Raises `ConfigurationError` as `store_of_completions`."""
    store = store_of_completions(settings)
    return None if store is None else Completions(store)


@asynccontextmanager
async def opened_completions(settings: Settings, completions: Completions | None) -> AsyncIterator[None]:
    """Open the database in which downloads are counted, and follow the log of the proxy meanwhile.

    Downloads wait for a database that does not answer now, with a line in the log. Raises `ConfigurationError` if it
    can never be used.
    """
    if completions is None:
        yield
        return
    try:
        await check_completions(settings, completions.store)
    except DatabaseUnavailable as exc:
        logger.warning("%s; downloads are counted as soon as it answers", one_line(str(exc)))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(completions)
        if settings.accounts.proxy_log is None:
            yield
            return
        task = asyncio.create_task(ProxyLog(settings.accounts.proxy_log, completions.store).follow())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def check_completions(settings: Settings, store: CompletionStore) -> None:
    """Raise `ConfigurationError` if the database cannot be used; `DatabaseUnavailable` if that may change."""
    key = "accounts.database"
    try:
        with anyio.fail_after(_PATIENCE):
            await store.check()
    except ConfigurationError as exc:
        error = settings.error(key, str(exc))
        raise (DatabaseUnavailable(str(error)) if store.may_recover(exc) else error) from exc
    except TimeoutError as exc:
        problem = f"the database cannot be used (no answer in {_PATIENCE:g} seconds): start it, or correct the URL"
        raise DatabaseUnavailable(str(settings.error(key, problem))) from exc
    finally:
        with anyio.CancelScope(shield=True):
            await store.aclose()


def required_store(settings: Settings) -> CompletionStore:
    """Return the store in which downloads are counted. Raises `ConfigurationError`, also if the settings have none."""
    store = store_of_completions(settings)
    if store is None:
        raise settings.error("accounts.database", "downloads are counted in a database: set it")
    return store
