"""`LimitsMiddleware`: keeps the answers of Django within the limits of the setting `DOWNLOADVIEW_LIMITS`."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import isawaitable
from typing import Any
from weakref import finalize

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.module_loading import import_string

from downloadview_async.asgi.limited import file_of
from downloadview_async.asgi.limiting import half_close_of
from downloadview_async.contrib.django.accounts import scope_of
from downloadview_async.contrib.django.counting import LIMITED, each_limited, in_threads, limited
from downloadview_async.contrib.django.event_loop import background_loop, run_in_background
from downloadview_async.contrib.django.file_errors import error_response
from downloadview_async.contrib.django.responses import DownloadResponse
from downloadview_async.errors import ConfigurationError, FileError
from downloadview_async.policy.limits.limits import TRANSFERS, Limits, Transfers

_CLIENT = "downloadview_async.django_client"
_OPTIONS = {
    *("CLIENT", "CONCURRENT", "RATE", "REQUESTS", "QUOTA", "TOTAL_RATE", "MODE", "QUEUE_SECONDS", "STORE"),
    *("WHEN_STORE_FAILS", "TRUSTED", "NAME"),
}


class LimitsMiddleware:
    """Keeps the answers of Django within limits, under ASGI and WSGI.

    The setting `DOWNLOADVIEW_LIMITS` is a dictionary with the arguments of `Limits` in upper case. CLIENT is "address"
    (REMOTE_ADDR), "user", "header:NAME", or a function that gets the request, or its dotted path. For "user", put this
    after `AuthenticationMiddleware`; it comes before the middlewares of this package that have a proxy send files.

    Each request counts for REQUESTS. A transfer is a GET whose answer has the status 200 or 206 and content, so a page
    is one, too. It ends when the server closes the response.

    Raises `ImproperlyConfigured`.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._client, self.limits = limits_of_settings()
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        """Answer the request; under ASGI, return a coroutine that does."""
        if iscoroutinefunction(self.get_response):
            return self._answer(request)
        client = None if self._client is None else self._client(request)
        if isawaitable(client):
            client = async_to_sync(_awaited)(client)
        transfers, scope, loop = Transfers(), {**scope_of(request), _CLIENT: client}, background_loop()
        with _ended_by_errors(transfers, loop):
            try:
                run_in_background(self._begin(request, transfers, scope))
            except FileError as exc:
                return _refused(exc, request, transfers, loop)
            response = self.get_response(request)
            try:
                run_in_background(_spend(request, response, transfers, scope))
            except BaseException as exc:
                response.close()
                if isinstance(exc, FileError):
                    return _refused(exc, request, transfers, loop)
                raise
            return _limited(response, transfers, loop)

    async def _answer(self, request: HttpRequest) -> HttpResponseBase:
        client, function = None, self._client
        if function is not None:
            client = function(request) if iscoroutinefunction(function) else await sync_to_async(function)(request)
            if isawaitable(client):
                client = await client
        transfers, loop = Transfers(), asyncio.get_running_loop()
        scope: dict[str, Any] = {**scope_of(request), _CLIENT: client}
        with _ended_by_errors(transfers, loop):
            try:
                await self._begin(request, transfers, scope)
            except FileError as exc:
                return _refused(exc, request, transfers, loop)
            response: HttpResponseBase = await self.get_response(request)
            try:
                await _spend(request, response, transfers, scope)
            except BaseException as exc:  # Django cancels the request of a client that has left
                await sync_to_async(response.close)()
                if isinstance(exc, FileError):
                    return _refused(exc, request, transfers, loop)
                raise
            return _limited(response, transfers, loop)

    async def _begin(self, request: HttpRequest, transfers: Transfers, scope: dict[str, Any]) -> None:
        """Count the request. Raises `LimitExceeded` and `SourceUnavailable`."""
        limits = (self.limits,)
        if not transfers.begin_nowait(limits, scope, is_transfer=False):
            await transfers.begin(limits, scope, _nothing, is_transfer=False)
        if request.method == "GET":
            scope[TRANSFERS] = transfers
            setattr(request, LIMITED, scope)


def limits_of_settings() -> tuple[Callable[[HttpRequest], Any] | None, Limits]:
    """Return the function for the client of a request, if one is needed, and the limits.

    Raises `ImproperlyConfigured`.
    """
    options = getattr(settings, "DOWNLOADVIEW_LIMITS", None)
    if not isinstance(options, Mapping) or not _OPTIONS.issuperset(options):
        raise ImproperlyConfigured(
            "settings.DOWNLOADVIEW_LIMITS has to be a dictionary with some of these keys: "
            + ", ".join(sorted(_OPTIONS))
        )
    given: dict[str, Any] = {name.lower(): value for name, value in options.items()}
    client, function = given.get("client", "address"), None
    try:
        if client == "user":
            function = _user
        elif callable(client):
            function = client
        elif isinstance(client, str) and "." in client and not client.startswith("header:"):
            function = import_string(client)
        elif client == "link":
            raise ConfigurationError('CLIENT is "link", which is known only in the view: give a function')
        if function is not None:
            given["client"] = lambda request: request.scope[_CLIENT]
        return function, Limits(**{"name": "django", **given})
    except (ConfigurationError, ImportError, TypeError) as exc:
        raise ImproperlyConfigured(f"settings.DOWNLOADVIEW_LIMITS: {exc}") from exc


def _user(request: HttpRequest) -> str | None:
    user = getattr(request, "user", None)
    return f"user {user.get_username()}" if user is not None and user.is_authenticated else None


async def _awaited(value: Any) -> Any:
    return await value


async def _nothing() -> Any:
    """Receive nothing: no client of limits needs the body of a request."""


async def _spend(request: HttpRequest, response: HttpResponseBase, transfers: Transfers, scope: dict[str, Any]) -> None:
    """Hold the lease of a response that is not ours, and add it to the quotas, if it is a transfer.

    A `DownloadResponse` has done that when it was finished. Raises `LimitExceeded` and `SourceUnavailable`.
    """
    if request.method != "GET" or response.status_code not in (200, 206) or isinstance(response, DownloadResponse):
        return
    if transfers.is_ours:
        return
    length: int | None = None
    if isinstance(response, HttpResponse):
        if not response.content:
            return
        length = len(response.content)
    elif (text := response.headers.get("Content-Length", "")).isascii() and text.isdigit():
        length = int(text)
    if not transfers.is_held:
        await transfers.hold(half_close_of(scope))
    metadata, span = file_of(
        response.status_code,
        {name.lower().encode("latin-1"): value.encode("latin-1") for name, value in response.items()},
        length,
    )
    if transfers.counts_bytes and (spending := transfers.spend(request.path, metadata, length, (span,))) is not None:
        await spending
    if isinstance(response, HttpResponse):
        transfers.sent(length, is_complete=True)
        return
    streaming: Any = response
    chunks = streaming.streaming_content
    if hasattr(request, "scope"):  # Django would read a synchronous body as a whole before it sends the first byte
        streaming.streaming_content = limited(chunks if streaming.is_async else in_threads(chunks), transfers, length)
    else:
        let_go = partial(_call_in, asyncio.get_running_loop(), transfers.let_go)
        streaming.streaming_content = each_limited(chunks, transfers, length, let_go)


def _limited(response: HttpResponseBase, transfers: Transfers, loop: asyncio.AbstractEventLoop) -> HttpResponseBase:
    """Return a response that ends its transfer when it is closed, or not used any more: see `AccountsMiddleware`."""
    closers: list[Any] = response._resource_closers  # type: ignore[attr-defined]  # noqa: SLF001
    closers.append(partial(_end, transfers, loop))
    finalize(response, _end, transfers, loop).atexit = False
    return response


def _end(transfers: Transfers, loop: asyncio.AbstractEventLoop) -> None:
    """Give back what a request holds, in the event loop of its limits; this may be called in any thread."""
    _call_in(loop, transfers.end)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)


@contextmanager
def _ended_by_errors(transfers: Transfers, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Give back what a request holds if an error ends it, or if it is cancelled."""
    try:
        yield
    except BaseException:
        _end(transfers, loop)
        raise


def _refused(
    exc: FileError, request: HttpRequest, transfers: Transfers, loop: asyncio.AbstractEventLoop
) -> HttpResponse:
    _end(transfers, loop)
    return error_response(exc, request)
