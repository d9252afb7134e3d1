"""Clients that leave while they are answered, where the server tells that by an `OSError` from `send` (ASGI 2.4)."""

from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.asgi.extensions import CONNECTION


class Departures:
    """Passes the messages of an answer on. failure: what `send` has raised because the client has left."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.failure: OSError | None = None

    async def send(self, message: Message) -> None:
        """Pass a message on. Raises what the server raises."""
        try:
            await self._send(message)
        except OSError as exc:
            self.failure = exc
            raise


def is_followed(send: Send) -> bool:
    """Return whether a caller drops the `OSError` of a client that leaves."""
    return isinstance(getattr(send, "__self__", None), Departures)


async def answer_until_departure(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Call an application, and drop the `OSError` by which the server tells that the client has left.

    The server knows it, so nobody has to be told; it would log the error as one of the application.
    """
    if is_followed(send) or CONNECTION in (scope.get("extensions") or {}):
        await app(scope, receive, send)  # our server raises no `OSError`
        return
    departures = Departures(send)
    try:
        await app(scope, receive, departures.send)
    except Exception as exc:
        if not stems_from(exc, departures.failure):
            raise


def stems_from(exc: BaseException | None, failure: OSError | None) -> bool:
    """Return whether an error is `failure`, or was raised because of it. failure: None if there was none."""
    if failure is None:
        return False
    waiting: list[Any] = [exc]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is failure or isinstance(one, ClientDisconnect):  # Starlette raises this in its place
            return True
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
    return False
