"""Clients that leave before the end of their answer, or send a body that nobody reads."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from starlette.types import Message, Receive, Send

from downloadview_async.asgi.extensions import PATHSEND, ZERO_COPY
from downloadview_async.asgi.loan import LentFile, Loan
from downloadview_async.http.plan import Headers

if TYPE_CHECKING:
    from downloadview_async.asgi.accounts import Connection

MAX_UNREAD_BODY = 1 << 20
"""Up to this many bytes of a request body are read and dropped: closing earlier could cost the client the answer."""


async def listened_to_elsewhere() -> Message:
    """Receive no message, ever: other code listens to the client, and cancels this when the client leaves."""
    await anyio.sleep_forever()
    raise AssertionError


async def until_the_client_leaves(work: Callable[[Send], Awaitable[None]], receive: Receive, send: Send) -> None:
    """Run `work`, and cancel it if the client disconnects before the end of the response. Raises what `work` raises.

    Most servers do not raise from `send` when the client has left. They drop the messages, so a download that does not
    listen for the disconnect reads its file to the end for nothing.
    """
    failure: Exception | None = None
    end: bool | Loan = False  # not the message itself, so that a `LentFile` can end

    async def send_watched(message: Message) -> None:
        nonlocal end
        end = _end_of_response(message)
        await send(message)

    def has_ended() -> bool:
        return _is_over(end)

    async with anyio.create_task_group() as tasks:

        async def listen() -> None:
            nonlocal failure
            # Servers send "http.disconnect" after the end of a response too. Only the closing of the file is left
            # then, and must not be cancelled.
            try:
                if not await _client_leaves(receive) or has_ended():
                    return
            except Exception as exc:  # from middleware, such as one that limits the body and answers this itself
                if has_ended():
                    return
                while isinstance(exc, ExceptionGroup) and len(exc.exceptions) == 1:  # as BaseHTTPMiddleware wraps it
                    exc = exc.exceptions[0]
                failure = failure or exc
            tasks.cancel_scope.cancel()

        tasks.start_soon(listen)
        try:
            await work(send_watched)
        except Exception as exc:
            failure = failure or exc  # raised below, so that it is not wrapped in an ExceptionGroup
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def until_the_connection_is_lost(
    work: Callable[[Send], Awaitable[None]], connection: "Connection", send: Send
) -> None:
    """Do what `until_the_client_leaves` does, for a request without a body, on a connection that tells of its loss.

    No task has to listen for that, and starting one would cost as much as the rest of a small answer.
    """
    with anyio.CancelScope() as scope:
        cancel = scope.cancel
        connection.when_lost(cancel)
        try:
            await work(calling_at_the_end(send, partial(connection.forget_when_lost, cancel)))
        finally:
            connection.forget_when_lost(cancel)


def calling_at_the_end(send: Send, then: Callable[[], None]) -> Send:
    """Return a `send` that also calls a function when the server has taken the end of the response.

    The next request of the connection may begin right then, before the application has closed its file and returned.
    """

    async def send_and_call(message: Message) -> None:
        end = _end_of_response(message)
        await send(message)
        if _is_over(end):
            then()

    return send_and_call


def _end_of_response(message: Message) -> "bool | Loan":
    """Return whether a message ends its response. For a file that is lent: the loan, which tells when it ends."""
    if message["type"] == PATHSEND:
        lent: LentFile | None = message.get("descriptor")
        return True if lent is None else lent.loan
    return message["type"] in ("http.response.body", ZERO_COPY) and not message.get("more_body", False)


def _is_over(end: "bool | Loan") -> bool:
    return end if isinstance(end, bool) else end.is_settled and end.is_taken


async def _client_leaves(receive: Receive) -> bool:
    """Return True when the client disconnects, False when it sends more than `MAX_UNREAD_BODY` bytes.

    Also return False if a message follows the end of the body: some middleware repeats the body for ever.
    """
    unread, is_complete = 0, False
    while unread <= MAX_UNREAD_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return True
        if is_complete:
            return False
        is_complete = not message.get("more_body", False)
        unread += len(message.get("body", b""))
    return False


def has_body(scope: Mapping[str, Any]) -> bool:
    """Return whether a request of HTTP/1.1 has a body [RFC 9112 6]."""
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def close_after_body(scope: Mapping[str, Any]) -> Headers:
    """Return `Connection: close` for a request whose body is too long to be read and dropped, else nothing.

    A chunked body is read and dropped, too: it shows its length only when it has arrived.
    """
    length = dict(scope["headers"]).get(b"content-length")
    if length is None:
        return {}
    is_short = length.isdigit() and len(length) <= 9 and int(length) <= MAX_UNREAD_BODY
    return {} if is_short or not scope.get("http_version", "1.1").startswith("1") else {"connection": "close"}
