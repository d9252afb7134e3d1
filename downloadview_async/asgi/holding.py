"""`Holding`: holds an offloaded answer back until the application has returned.

The proxy opens the file after the answer has left. The application may delete or move the file once it has answered:
in a background task, or at the end of a dependency with `yield`. So the file is held open until the application has
returned. If the file has left its path by then, or if the wait is too long, we send the file ourselves.
"""

import asyncio
from collections.abc import Awaitable, Iterable
from contextlib import suppress

import anyio
from starlette.types import Message, Receive, Send

from downloadview_async.asgi.offer import Lent, Offer
from downloadview_async.errors import DownloadError
from downloadview_async.http.fields import FRAMING, OFFLOAD_HEADERS
from downloadview_async.offload.decision import refusal
from downloadview_async.sources.per_loop import PerLoop

PATIENCE = 0.1
"""Seconds that an offloaded answer waits for the application to return. Then the file is sent without a proxy."""

_UNSENT = "the answer was not sent"

Headers = Iterable[tuple[bytes, bytes]]


class Holding:
    """Passes the messages of one answer on, but holds them back if the answer is offloaded.

    outer: the offer of the next `OffloadMiddleware` outwards, if there is one: the answer waits there instead.
    """

    __slots__ = ("_deadlines", "_deciding", "_held", "_lent", "_offer", "_outer", "_receive", "_send")

    def __init__(self, offer: Offer, receive: Receive, send: Send, outer: Offer | None) -> None:
        self._offer = offer
        self._receive = receive
        self._send = send
        self._outer = outer
        self._lent: Lent | None = None
        self._held: list[Message] = []
        self._deadlines: _Deadlines | None = None
        self._deciding: asyncio.Future[None] | None = None

    def send(self, message: Message) -> Awaitable[None]:  # not `async`: nearly every message just passes
        """Pass a message on, or hold it back."""
        if self._lent is not None:
            self._held.append(message)
            if self._deadlines is None:
                with suppress(RuntimeError):  # without asyncio, the answer waits without a deadline
                    self._deadlines = _set_deadline(self, asyncio.get_running_loop())
            return _nothing()
        if message["type"] == "http.response.start":
            if message["status"] != 200 and self._offer.orders:
                message = self._offer.withdrawn_from(message)
            if self._offer.lent is None:
                return self._send(message)
            if not isinstance(message.get("headers"), list):  # they may be readable only once
                message = {**message, "headers": list(message.get("headers", ()))}
            if (lent := self._offer.take_lent(message)) is not None:
                if self._outer is None:
                    self._lent = lent
                    self._held.append(message)
                    return _nothing()
                self._outer.lend(lent)
        return self._send(message)

    def lose_patience(self) -> None:
        """Decide now: the application has not returned in time."""
        # A timer calls this, which holds no task group. `end` waits for the task, and `cancel` cancels it.
        self._deciding = asyncio.ensure_future(self._decide(False))

    async def end(self) -> None:
        """Send the messages that are held: the application has returned, or raised. Raises what sending raises."""
        if self._deadlines is not None:
            self._deadlines.pop(self, None)
        self._offer.lend(None)
        if self._deciding is not None:
            await self._deciding
        elif self._lent is not None:
            await self._decide(True)

    async def cancel(self) -> None:
        """Send nothing more: the application has been cancelled."""
        if self._deadlines is not None:
            self._deadlines.pop(self, None)
        self._offer.lend(None)
        with anyio.CancelScope(shield=True):
            if self._deciding is not None:
                self._deciding.cancel()
                await asyncio.wait([self._deciding])
            if self._lent is not None:
                self._end_accounts(asyncio.CancelledError())
            await self._close()  # a task that is cancelled before its first step does not close it

    async def _decide(self, has_returned: bool) -> None:
        assert self._lent is not None
        try:
            if len(self._held) < 2:
                self._end_accounts(DownloadError(_UNSENT))
                return  # the application ended before its answer did: the server handles that
            refused = refusal(has_returned=has_returned or self._lent.file is None)
            if refused is None and self._lent.file is not None:
                refused = refusal(is_there=await self._lent.is_at_its_place())
            if refused is None:
                await self._send_held()
            else:
                send: Send = _Merging(self._lent.headers, self._held[0]["headers"], self._send).send
                for account in reversed(self._lent.accounts):
                    send = account.restarted(send)
                try:
                    # use our own `receive`: a middleware inside may report a disconnect once its application returned
                    await self._lent.stream(self._receive, send)
                except BaseException as exc:
                    self._end_accounts(exc)
                    raise
                self._end_accounts()
        finally:
            await self._close()

    async def _send_held(self) -> None:
        try:
            for message in self._held:
                await self._send(message)
        except BaseException as exc:
            self._end_accounts(exc)
            raise
        self._end_accounts()

    def _end_accounts(self, exc: BaseException | None = None) -> None:
        assert self._lent is not None
        for account in self._lent.accounts:
            account.end(exc)

    async def _close(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None and lent.file is not None:
            await lent.file.aclose()


async def _nothing() -> None:
    """Do nothing: the message is held."""


class _Merging:
    """Sends an answer in place of another one, with the changes that middleware made to the header fields of that one.

    Fields are compared by name. Fields that frame or encode the content, and offload headers, stay those of the answer.
    made: the fields of the replaced answer before the middleware, arrived: after it.
    """

    def __init__(self, made: Headers, arrived: Headers, send: Send) -> None:
        before, after = _by_name(made), _by_name(arrived)
        self._changed = {
            name: after.get(name, [])
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name) and not _is_of_the_content(name)
        }
        self._send = send

    async def send(self, message: Message) -> None:
        """Send a message, with the changed fields if it is the start of the answer."""
        if message["type"] == "http.response.start" and self._changed:
            kept = [header for header in message["headers"] if header[0].lower() not in self._changed]
            changed = [(name, value) for name, values in self._changed.items() for value in values]
            message = {**message, "headers": [*kept, *changed]}
        await self._send(message)


def _by_name(headers: Headers) -> dict[bytes, list[bytes]]:
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(bytes(name).lower(), []).append(bytes(value))
    return values


def _is_of_the_content(name: bytes) -> bool:
    text = name.decode("latin-1")
    return text in FRAMING or text in OFFLOAD_HEADERS or text == "content-encoding"


# The times at which the held answers of one event loop have to leave, in order, with one timer for all of them. Most
# answers leave within microseconds: a timer for each would cost more than everything else that is done here.
_Deadlines = dict[Holding, float]

_deadlines = PerLoop[_Deadlines]()


def _set_deadline(holding: Holding, loop: asyncio.AbstractEventLoop) -> _Deadlines:
    """Have an answer decided `PATIENCE` seconds from now, unless it leaves what this returns before that."""
    deadlines = _deadlines.get(loop)
    if deadlines is None:
        deadlines = _deadlines.set(loop, {})
        loop.call_later(PATIENCE, _look_at, deadlines, loop)
    deadlines[holding] = loop.time() + PATIENCE
    return deadlines


def _look_at(deadlines: _Deadlines, loop: asyncio.AbstractEventLoop) -> None:
    while deadlines:
        holding, deadline = next(iter(deadlines.items()))
        if deadline > (now := loop.time()):
            loop.call_later(deadline - now, _look_at, deadlines, loop)
            return
        del deadlines[holding]
        holding.lose_patience()
    _deadlines.drop(loop)
