"""`download_finished`: the signal with the `Outcome` of each answer, and `AccountsMiddleware`, which sends it."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from weakref import finalize

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.handlers.asgi import ASGIRequest
from django.db import connections
from django.dispatch import Signal
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from starlette.requests import ClientDisconnect

from downloadview_async.accounts.facts import ACCOUNT, Facts, note_facts
from downloadview_async.accounts.listeners import Listeners
from downloadview_async.accounts.outcome import Outcome
from downloadview_async.asgi.accounts import Account
from downloadview_async.asgi.delivery import Chunks, Empty, Offloaded
from downloadview_async.contrib.django.counting import each_counted, each_counted_async, in_threads
from downloadview_async.contrib.django.links import link_of
from downloadview_async.contrib.django.proxied import ProxiedDownloadResponse
from downloadview_async.contrib.django.responses import DownloadResponse
from downloadview_async.http.fields import OFFLOAD_ORDERS

download_finished = Signal()
"""Sent with `outcome=` after each answer, from a thread, so that no answer waits for a receiver.

`get_asgi_application` sends it for each request. Under WSGI and Django's own handler, `AccountsMiddleware` sends it.
"""

_COUNTED = "_downloadview_counted"


def _send(outcome: Outcome) -> None:
    try:
        for _, result in download_finished.send_robust(sender=Outcome, outcome=outcome):
            if isinstance(result, Exception):
                raise result  # the log tells it, at most once a minute
    finally:
        connections.close_all()  # the thread ends soon


_listeners = Listeners([_send])


def account_of(scope: dict[str, Any], send: Any) -> Account | None:
    """Return the account of a request under ASGI; None if no receiver listens to the signal."""
    return Account.within(scope, send, _listeners.put) if download_finished.receivers else None


class AccountsMiddleware:
    """Sends `download_finished` after each answer of Django, also those that are not downloads. Put it first.

    An answer has ended when the server closes it, which WSGI servers do also if the client has left. The bytes that
    count are those that the server has taken; of a response that is not streamed, all. Under `get_asgi_application`,
    which sends the signal itself, this does nothing.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        """Answer the request; under ASGI, return a coroutine that does."""
        scope = scope_of(request)
        if not download_finished.receivers or _COUNTED in scope:
            return self.get_response(request)
        account = Account.within(scope, _nowhere, _listeners.put)
        carrier = getattr(request, "scope", None) or request.META
        carrier[ACCOUNT] = account
        if iscoroutinefunction(self.get_response):
            return self._answer(request, account)
        try:
            response = self.get_response(request)
        except BaseException as exc:  # such as a timeout of gevent: Django answers all others
            account.leave(exc)
            raise
        return _counted(request, response, account)

    async def _answer(self, request: HttpRequest, account: Account) -> HttpResponseBase:
        try:
            response: HttpResponseBase = await self.get_response(request)
        except asyncio.CancelledError:
            account.leave(ClientDisconnect())
            raise
        except BaseException as exc:
            account.leave(exc)
            raise
        return _counted(request, response, account)


def mark_counted(scope: dict[str, Any]) -> None:
    """Mark a request whose outcome the handler makes, so that the middleware does not make another one."""
    scope[_COUNTED] = True


def note_response(facts: Facts, request: HttpRequest, response: HttpResponseBase) -> None:
    """Note which file a response sends, by which link, and for which user, if the project has looked at the user."""
    link = link_of(request)
    user = getattr(request, "_cached_user", None) or getattr(request, "_acached_user", None)
    size = response.opened.metadata.size if isinstance(response, DownloadResponse) and response.opened else None
    match = request.resolver_match
    if match is not None and not facts.route:
        note_facts({ACCOUNT: facts}, route=match.route)
    name = response.get_basename() if isinstance(response, DownloadResponse) else getattr(response, "basename", None)
    facts.describe(name, response.headers.get("ETag"), size)
    user_name = user.get_username() if user is not None and user.is_authenticated else None
    facts.allow(user_name, None if link is None else link.grant.link_id)


def scope_of(request: HttpRequest) -> dict[str, Any]:
    """Return the ASGI scope of a request, or what stands for it under WSGI."""
    if (scope := getattr(request, "scope", None)) is not None:
        return cast("dict[str, Any]", scope)
    names = {"CONTENT_TYPE", "CONTENT_LENGTH"}
    fields = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): str(value)
        for name, value in request.META.items()
        if name.startswith("HTTP_") or name in names
    }
    address = request.META.get("REMOTE_ADDR")
    return {
        "type": "http",
        "method": request.method or "GET",
        "path": request.path,
        "http_version": str(request.META.get("SERVER_PROTOCOL", "HTTP/1.1")).rpartition("/")[2],
        "client": (address, 0) if address else None,
        "headers": [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in fields.items()],
    }


def _counted(request: HttpRequest, response: HttpResponseBase, account: Account) -> HttpResponseBase:
    """Return the response, which ends the account when it is closed."""
    note_response(account, request, response)
    account.begin(
        response.status_code, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.items()]
    )
    is_head = request.method == "HEAD"
    if isinstance(response, DownloadResponse):
        if not response.is_replaced and response.plan is not None and response.opened is not None:
            account.deliver(Chunks(response.plan, response.opened), response.status_code)
        response.counter = account
    elif isinstance(response, HttpResponse):
        order = next((name.lower() for name in response.headers if name.lower() in OFFLOAD_ORDERS), None)
        if isinstance(response, ProxiedDownloadResponse) and order is not None and not response.content:
            account.deliver(Offloaded(order), response.status_code)
        elif response.status_code == 304:
            account.deliver(Empty(), 304)
        account.count(0 if is_head else len(response.content))
        account.is_complete = True
    elif response.streaming:
        streaming: Any = response
        chunks = streaming.streaming_content
        if not isinstance(request, ASGIRequest):
            streaming.streaming_content = each_counted(chunks, account)
        else:  # Django would read a synchronous body as a whole before it sends the first byte
            streaming.streaming_content = each_counted_async(
                chunks if streaming.is_async else in_threads(chunks), account
            )
    account.is_complete = account.is_complete or is_head
    closers: list[Any] = response._resource_closers  # type: ignore[attr-defined]  # noqa: SLF001
    closers.append(partial(account.end, ClientDisconnect()))  # if the server closes it before its end
    # Django's handler for ASGI does not close it if `send` raises, as ASGI 2.4 allows when the client has left
    finalize(response, _drop, account, 0 if isinstance(response, HttpResponse) else None).atexit = False
    return response


def _drop(account: Account, sent: int | None) -> None:
    """End the account of a response that was not closed. sent: the bytes that were sent, if they were not counted."""
    account.is_complete = False
    account.sent = account.sent if sent is None else sent
    account.end(ClientDisconnect())


async def _nowhere(message: object) -> None:
    """Send nothing: Django sends the response."""
