"""What the ASGI handler uses of Django and asgiref that nobody has promised: a release that changes it fails here."""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, ThreadSensitiveContext, iscoroutinefunction, sync_to_async
from django.core import signals
from django.core.asgi import get_asgi_application as get_plain_application
from django.core.cache import caches, close_caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.files.storage import FileSystemStorage, default_storage
from django.core.handlers.base import reset_urlconf
from django.db import close_old_connections, reset_queries
from django.dispatch import Signal
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path

from downloadview_async.contrib.django import get_asgi_application
from downloadview_async.contrib.django.adapters import unwrapped
from downloadview_async.contrib.django.asgi import DownloadASGIHandler
from downloadview_async.contrib.django.disposition import content_disposition
from downloadview_async.contrib.django.dual import DualView
from downloadview_async.contrib.django.responses import DownloadResponse
from tests.live import ask, live

HANDLERS: dict[str, Any] = {"ours": get_asgi_application, "stock": get_plain_application}
each_handler = pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)


class Urls:
    """A URLconf of the test's own, which counts."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.threads: set[int] = set()
        self.urlpatterns = [path("plain", self.plain), path("blocking", self.blocking), path("cached", self.cached)]

    async def plain(self, request: HttpRequest) -> HttpResponse:
        """Answer with something to close."""
        response = HttpResponse(b"plain")
        response._resource_closers.append(lambda: self.happened.append("closed"))  # type: ignore[attr-defined]
        return response

    def blocking(self, request: HttpRequest) -> HttpResponse:
        """Answer from a thread."""
        self.threads.add(threading.get_ident())
        return HttpResponse(b"blocking")

    async def cached(self, request: HttpRequest) -> HttpResponse:
        """Use a cache."""
        await caches["counting"].aset("key", "value")
        return HttpResponse(b"cached")


@contextmanager
def connected(signal: Signal, receiver: Callable[..., Any]) -> Iterator[None]:
    signal.connect(receiver, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver)


# --- the private names


def test_a_signal_tells_its_receivers_for_a_sender() -> None:
    signal = Signal()

    def blocking(**kwargs: Any) -> None: ...

    async def asynchronous(**kwargs: Any) -> None: ...

    assert tuple(map(list, signal._live_receivers(DownloadASGIHandler))) == ([], [])
    signal.connect(blocking)
    signal.connect(asynchronous)
    signal.connect(blocking, sender=HttpResponse, dispatch_uid="another's")
    assert tuple(map(list, signal._live_receivers(DownloadASGIHandler))) == ([blocking], [asynchronous])


def test_django_s_own_receivers_are_those_that_are_idle() -> None:
    """Another one in a new release may have something to do in the thread of a request: look at it."""
    known: dict[Signal, list[Any]] = {
        signals.request_started: [reset_queries, close_caches, close_old_connections],
        signals.request_finished: [close_old_connections, close_caches, reset_urlconf],
    }
    for signal, expected in known.items():
        synchronous, asynchronous = signal._live_receivers(DownloadASGIHandler)
        own = [receiver for receiver in synchronous if receiver.__module__.startswith("django.")]
        assert set(own) <= set(expected)
        assert [receiver for receiver in asynchronous if receiver.__module__.startswith("django.")] == []
    assert close_old_connections in signals.request_finished._live_receivers(DownloadASGIHandler)[0]


@pytest.mark.asyncio
async def test_a_context_has_an_executor_exactly_when_a_thread_was_needed() -> None:
    async with ThreadSensitiveContext() as context:
        assert context not in SyncToAsync.context_to_thread_executor
        thread = await sync_to_async(threading.get_ident)()
        assert context in SyncToAsync.context_to_thread_executor
        assert await sync_to_async(threading.get_ident)() == thread != threading.get_ident()
    assert context not in SyncToAsync.context_to_thread_executor


def test_a_response_closes_its_resources_and_says_that_it_is_closed() -> None:
    happened: list[str] = []
    response = HttpResponse()
    response._resource_closers.append(lambda: happened.append("closed"))  # type: ignore[attr-defined]
    with connected(signals.request_finished, lambda **kwargs: happened.append("finished")):
        response.close()
    assert happened == ["closed", "finished"]
    assert response.closed
    names = set(inspect.unwrap(HttpResponse.close).__code__.co_names)
    # all that it does, which `DownloadASGIHandler._close` does in its place
    assert names == {"_resource_closers", "Exception", "clear", "closed", "signals", "request_finished", "send",
                     "_handler_class"}  # fmt: skip
    assert HttpResponse.close is StreamingHttpResponse.close
    assert DownloadResponse.close is not HttpResponse.close


def test_a_streaming_response_takes_its_content_by_one_method() -> None:
    response = StreamingHttpResponse()
    response._set_streaming_content([b"a", b"b"])  # type: ignore[attr-defined]
    assert list(response) == [b"a", b"b"]
    assert response.is_async is False


def test_a_lazy_storage_has_what_it_stands_for() -> None:
    found = unwrapped(default_storage)
    assert type(found) is FileSystemStorage
    assert vars(default_storage)["_wrapped"] is found


@pytest.mark.asyncio
async def test_the_mark_of_a_coroutine_function_is_seen_by_all() -> None:
    def view(request: Any) -> Any: ...

    dual = DualView(view)
    for ask_about in (iscoroutinefunction, asyncio.iscoroutinefunction, inspect.iscoroutinefunction):
        if ask_about is inspect.iscoroutinefunction and not hasattr(inspect, "markcoroutinefunction"):
            continue  # before Python 3.12, no mark could tell it
        assert ask_about(dual)
        assert not await asyncio.to_thread(ask_about, dual)


def test_the_handler_has_the_methods_that_ours_takes_the_place_of() -> None:
    for method, arguments in {
        "handle": ["self", "scope", "receive", "send"],
        "listen_for_disconnect": ["self", "receive"],
        "run_get_response": ["self", "request"],
        "read_body": ["self", "receive"],
        "create_request": ["self", "scope", "body_file"],
        "send_response": ["self", "response", "send"],
    }.items():
        assert list(inspect.signature(getattr(DownloadASGIHandler.__mro__[1], method)).parameters) == arguments


# --- what follows from them


@pytest.mark.asyncio
@each_handler
async def test_a_receiver_of_a_project_is_called_in_a_thread_once_for_each_request(handler: Any) -> None:
    urls, loop_thread = Urls(), threading.get_ident()

    def finished(sender: Any, **kwargs: Any) -> None:
        assert issubclass(sender, DownloadASGIHandler.__mro__[1])
        urls.happened.append("finished" if threading.get_ident() != loop_thread else "on the loop")

    with override_settings(ROOT_URLCONF=urls):
        async with live(handler()) as port:
            with connected(signals.request_finished, finished):
                for _ in range(3):
                    assert (await ask(port, "/plain")).body == b"plain"
                await _until(lambda: len(urls.happened) == 6)
    assert urls.happened == ["closed", "finished"] * 3


@pytest.mark.asyncio
@each_handler
async def test_signals_fire_for_whoever_listens(handler: Any) -> None:
    urls = Urls()
    scopes: list[str] = []

    async def started(sender: Any, scope: Any, **kwargs: Any) -> None:
        scopes.append(scope["path"])
        urls.happened.append("started")

    async def finished(sender: Any, **kwargs: Any) -> None:
        urls.happened.append("finished")

    with override_settings(ROOT_URLCONF=urls):
        async with live(handler()) as port:
            with connected(signals.request_started, started), connected(signals.request_finished, finished):
                for name in ("plain", "blocking", "missing"):
                    await ask(port, f"/{name}")
                    await _until(lambda: urls.happened[-1:] == ["finished"])
                    urls.happened = ["".join(urls.happened)]
    assert scopes == ["/plain", "/blocking", "/missing"]
    assert urls.happened == ["startedclosedfinishedstartedfinishedstartedfinished"]


@pytest.mark.asyncio
async def test_without_listeners_a_request_has_no_thread_and_its_response_is_closed() -> None:
    urls = Urls()
    for alias in caches.settings:  # while a cache is in use, each request has a thread that closes it
        with contextlib.suppress(AttributeError):
            del caches[alias]
    with override_settings(ROOT_URLCONF=urls):
        async with live(get_asgi_application()) as port:
            before = set(threading.enumerate())
            assert (await ask(port, "/plain")).body == b"plain"
            await _until(lambda: urls.happened == ["closed"])
            started = {thread.name for thread in set(threading.enumerate()) - before}
            assert {name for name in started if not name.startswith("asyncio_")} == set()  # asyncio's own, for clients
            assert (await ask(port, "/blocking")).body == b"blocking"
    assert urls.threads.isdisjoint({threading.get_ident()})


class CountingCache(LocMemCache):
    """A cache that is told when it is closed."""

    closed = 0

    def close(self, **kwargs: Any) -> None:
        """Count."""
        CountingCache.closed += 1


@pytest.mark.asyncio
async def test_a_cache_that_only_a_view_uses_is_closed_as_often_as_by_django_s_own_handler() -> None:
    backend = {"BACKEND": f"{__name__}.CountingCache", "LOCATION": "counting"}
    closed = []
    for handler in HANDLERS.values():
        CountingCache.closed = 0
        with override_settings(ROOT_URLCONF=Urls(), CACHES={"default": backend, "counting": backend}):
            async with live(handler()) as port:
                assert (await ask(port, "/cached")).body == b"cached"
        closed.append(CountingCache.closed)
    assert closed[0] == closed[1]


async def _until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not happened():
            await asyncio.sleep(0.005)


@pytest.mark.timeout(20)
def test_a_huge_name_with_a_quote_is_decided() -> None:
    """Normalizing takes quadratic time if one character has very many accents."""
    value = content_disposition('"a' + "\u0327\u0301" * 100_000)
    assert len(value) < 2000
