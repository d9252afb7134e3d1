"""`get_asgi_application`: Django on ASGI. It sends files by the server's path send, and avoids needless threads.

Django's own handler uses a separate thread twice for each request, even if the whole project is asynchronous: for the
signals `request_started` and `request_finished`. Their usual receivers close the database connections of that thread,
and a new thread has none. This handler starts the thread only if something needs it.
"""

import asyncio
import io
import logging
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import IO, Any, cast

import django
from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.core import signals
from django.core.cache import caches, close_caches
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, ASGIRequest, get_script_prefix
from django.core.handlers.base import reset_urlconf
from django.core.handlers.exception import response_for_exception
from django.db import close_old_connections, connections, reset_queries
from django.dispatch import Signal
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotModified
from django.http.response import HttpResponseBase
from django.urls import set_script_prefix

from downloadview_async.accounts.facts import ACCOUNT, Facts
from downloadview_async.asgi.deadline import in_time
from downloadview_async.asgi.delivery import Delivery, Empty, Offloaded, deliver, delivery_of
from downloadview_async.asgi.departures import answer_until_departure
from downloadview_async.asgi.extensions import PATHSEND
from downloadview_async.asgi.limiting import deliver_limited, path_send_for
from downloadview_async.asgi.uses import Counted
from downloadview_async.asgi.zero_copy import with_zero_copy
from downloadview_async.contrib.django.accounts import account_of, mark_counted, note_response
from downloadview_async.contrib.django.counting import limited_scope, shielded
from downloadview_async.contrib.django.deferral import note_receivers
from downloadview_async.contrib.django.file_errors import answer_to
from downloadview_async.contrib.django.links import link_of
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse
from downloadview_async.contrib.django.responses import DownloadResponse
from downloadview_async.errors import FileError, SourceUnavailable, abort_reason
from downloadview_async.http.fields import OFFLOAD_ORDERS
from downloadview_async.policy.limits.limits import TRANSFERS

logger = logging.getLogger("downloadview_async")

# Receivers that have nothing to do after a request that used no thread: a new thread has no database connections.
# Caches have no connections either, as long as the request has used none.
_IDLE = {close_caches, close_old_connections, reset_queries, reset_urlconf}
_receivers: dict[Signal, tuple[list[Any], bool]] = {}


def get_asgi_application() -> "DownloadASGIHandler":
    """Return the project as an ASGI application, like Django's function of this name."""
    django.setup(set_prefix=False)
    return DownloadASGIHandler()


class DownloadASGIHandler(ASGIHandler):
    """Django's handler, except that it sends a `DownloadResponse` itself and starts no needless threads."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise ValueError(f"Django answers only HTTP, not {scope['type']}")
        await answer_until_departure(self._serve, with_zero_copy(scope, receive), receive, send)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if (account := account_of(scope, send)) is None:
            await self._handle_in_context(scope, receive, send)
            return
        scope = {**scope, ACCOUNT: account}
        mark_counted(scope)
        with account:
            await self._handle_in_context(scope, account.receiving(receive), account.send)

    async def _handle_in_context(self, scope: Any, receive: Any, send: Any) -> None:
        async with ThreadSensitiveContext() as context:
            try:
                await self._handle(scope, receive, send, context)
            finally:
                _end_thread(context)

    async def _handle(self, scope: Any, receive: Any, send: Any, context: ThreadSensitiveContext) -> None:
        try:
            body = await self.read_body(receive)
        except RequestAborted:
            return
        with body:
            set_script_prefix(get_script_prefix(scope))
            if _somebody_listens(signals.request_started):
                await signals.request_started.asend(sender=type(self), scope=scope)
            request, response = self.create_request(scope, body)
            if request is None:
                assert response is not None
                await self.send_response(response, send)
                await self._close(response, context)
                return
            note_receivers(request)
            answering = asyncio.create_task(self._answer(request, send, context))
            leaving = asyncio.create_task(self.listen_for_disconnect(receive))
            leaving.add_done_callback(partial(_leave, answering))
            try:
                answered = await answering
            except asyncio.CancelledError:  # in the view
                await signals.request_finished.asend(sender=type(self))
                if not leaving.done():
                    raise  # the caller has cancelled this, the client has not left
            else:
                await self._close(answered, context)
            finally:
                leaving.cancel()

    async def _answer(self, request: ASGIRequest, send: Any, context: ThreadSensitiveContext) -> HttpResponseBase:
        response = await self.run_get_response(request)
        try:
            with suppress(asyncio.CancelledError):  # the client has left
                is_long = isinstance(response, DownloadResponse) and response.is_long
                if is_long and (ending := _end_thread(context)) is not None:
                    await asyncio.shield(asyncio.wrap_future(ending))
                await self._send(request, response, send)
        except Exception:  # such as an OSError, which tells in ASGI 2.4 that the client has left
            await self._close(response, context)
            raise
        return response

    async def read_body(self, receive: Any) -> IO[bytes]:
        """Return the body of a request. An empty body needs no temporary file. Raises `RequestAborted`."""
        first = await receive()
        if first["type"] == "http.request" and not first.get("body") and not first.get("more_body", False):
            return io.BytesIO()
        pending = [first]

        async def again() -> Any:
            return pending.pop() if pending else await receive()

        return await super().read_body(again)

    async def run_get_response(self, request: HttpRequest) -> HttpResponseBase:
        """Return the response to a request. Finish it if it is an unfinished download."""
        response: HttpResponseBase = await super().run_get_response(request)
        if isinstance(response, DownloadResponse) and not response.is_finished:
            try:
                response = await response.afinish(request)
            except Exception as exc:
                response = await sync_to_async(response_for_exception)(request, exc)
            vars(response)["_handler_class"] = type(self)  # as Django does
        return response

    def process_exception_by_middleware(self, exception: Exception, request: HttpRequest) -> Any:
        """Return the answer of a middleware to an exception of a view, else that to a `FileError`, else None."""
        response: Any = super().process_exception_by_middleware(exception, request)
        if response is None and isinstance(exception, FileError):
            return answer_to(exception, request)
        return response

    async def _send(self, request: ASGIRequest, response: HttpResponseBase, send: Any) -> None:
        """Send a response. A download, a 304 and an answer that has a proxy send a file end in an `Outcome`."""
        facts: Facts | None = request.scope.get(ACCOUNT)
        if facts is not None:
            note_response(facts, request, response)
        scope = limited_scope(request)
        if (delivery := _delivery_of(request, response)) is None:
            if scope is not None and isinstance(response, DownloadResponse):
                scope[TRANSFERS].sent(None)  # how much of another body is that of the file, nobody knows
            await self.send_response(response, send)
            return
        send = in_time(dict(request.scope), send)
        send_it: Any = deliver
        if scope is not None and isinstance(response, DownloadResponse):
            send_it = partial(deliver_limited, scope=scope)
        link = link_of(request)
        answer = None if link is None or link.use is None else Counted(link.use, dict(request.scope), send)
        send_it = partial(
            send_it,
            send=send if answer is None else answer.send,
            facts=facts if answer is None else answer.scope[ACCOUNT],
        )
        try:
            await self._send_or_fail(delivery, request, response, send_it, send)
        finally:
            if scope is not None:
                scope[TRANSFERS].end()
            if answer is not None:
                await shielded(answer.note())
            if isinstance(response, DownloadResponse):
                await response.release()

    async def _send_or_fail(
        self, delivery: Delivery, request: ASGIRequest, response: HttpResponseBase, send_it: Any, send: Any
    ) -> None:
        """Send a download, once more if its file changes before the first byte, or the answer to a `FileError`."""
        try:
            try:
                await send_it(delivery, _start_of(response))
            except SourceUnavailable as exc:
                if abort_reason(exc) != "file-changed" or not isinstance(response, DownloadResponse):
                    raise
                await response.afinish_again(request)
                await send_it(_delivery_of(request, response), _start_of(response))
        except FileError as exc:  # nothing has been sent
            if not isinstance(response, DownloadResponse):
                raise
            try:
                failure = await response.afail(exc, request)
            except Http404 as error:
                failure = await sync_to_async(response_for_exception)(request, error)
            await self.send_response(failure, send)

    async def _close(self, response: HttpResponseBase, context: ThreadSensitiveContext) -> None:
        """Close a response, and send `request_finished`: in a thread, unless nothing needs one."""
        is_plain = type(response).close in (HttpResponse.close, DownloadResponse.close)
        if (
            not is_plain
            or context in SyncToAsync.context_to_thread_executor
            or _somebody_listens(signals.request_finished)
        ):
            await sync_to_async(response.close)()
            return
        # the same as `close` and its signal would do
        reset_urlconf(sender=type(self))
        closers, response._resource_closers = response._resource_closers, []  # type: ignore[attr-defined]  # noqa: SLF001
        for close in closers:
            with suppress(Exception):
                close()
        response.closed = True


def _delivery_of(request: ASGIRequest, response: HttpResponseBase) -> Delivery | None:
    """Return how a download leaves, also one that has become a 304 or an order to a proxy; None for other responses."""
    if isinstance(response, DownloadResponse) and not response.is_replaced and response.plan is not None:
        assert response.opened is not None
        path_send = (request.scope.get("extensions") or {}).get(PATHSEND)
        if (scope := limited_scope(request)) is not None:
            path_send = path_send_for(scope, path_send)
        return delivery_of(response.plan, response.opened, path_send)
    is_of_proxy = isinstance(response, ProxiedDownloadResponse)
    was_download = isinstance(response, HttpResponseNotModified) and "plan" in vars(response)
    if not (is_of_proxy or was_download) or cast("HttpResponse", response).content:
        return None
    order = next((name.lower() for name in response.headers if name.lower() in OFFLOAD_ORDERS), None)
    return Empty() if order is None else Offloaded(order)


def _start_of(response: HttpResponseBase) -> dict[str, Any]:
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in response.items()]
    cookies = [cookie.output(header="") for cookie in response.cookies.values()]
    headers += [(b"set-cookie", cookie.strip().encode("ascii")) for cookie in cookies]
    return {"type": "http.response.start", "status": response.status_code, "headers": headers}


def _leave(answering: "asyncio.Task[HttpResponseBase]", leaving: "asyncio.Task[None]") -> None:
    """Cancel the answer if the client has left: `leaving` then ends with an exception."""
    if not leaving.cancelled() and leaving.exception() is not None:
        answering.cancel()


def _end_thread(context: ThreadSensitiveContext) -> "Future[None] | None":
    """Have the request's thread close its database connections and end. Return its future, or None without a thread.

    CONN_MAX_AGE would keep the connections for the next request, but that has another thread.
    """
    executor = SyncToAsync.context_to_thread_executor.pop(context, None)
    if executor is None:
        return None
    ending = executor.submit(connections.close_all)
    executor.shutdown(wait=False)
    return ending


def _somebody_listens(signal: Signal) -> bool:
    """Return whether a signal has receivers that have something to do after a request that used no thread."""
    seen, idle = _receivers.get(signal, (None, True))
    if seen != signal.receivers:
        synchronous, asynchronous = signal._live_receivers(DownloadASGIHandler)  # noqa: SLF001
        idle = not asynchronous and _IDLE.issuperset(synchronous)
        _receivers[signal] = list(signal.receivers), idle
    return not idle or (signal is signals.request_finished and bool(caches.all(initialized_only=True)))
