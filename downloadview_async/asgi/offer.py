"""`Offer`: a backend, as it is offered for one request; `Holding`: an answer that waits for its application.

The proxy opens the file after the answer has left, and the application may delete the file when it has answered: in a
background task, or at the end of a dependency with `yield`. So an offloaded answer leaves when the application has
returned. Until then the file is held open, and is sent from here if it has been deleted, or if the wait takes long.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import anyio
from starlette.types import Message, Send

from downloadview_async.offload.base import OffloadBackend, signed
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.local.open_file import OpenLocalFile

PATIENCE = 0.1
"""Seconds that an offloaded answer waits for the application to return. Then the file is sent without a proxy."""


@dataclass(slots=True)
class Lent:
    """An open file that an answer for a proxy is about.

    file: shared, so that whoever takes this closes it. start: the answer for the proxy. stream: sends the file itself.
    """

    file: OpenLocalFile
    start: Message
    stream: Callable[[Send], Awaitable[None]]

    async def stream_with_what_was_added(self, start: Message, send: Send) -> None:
        """Send the file itself, with the header fields that middleware has added to the start of the other answer."""
        added = [header for header in start["headers"] if header not in self.start["headers"]]

        async def send_with_added(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.stream(send_with_added)


class Offer:
    """A backend, as it is offered for one request, that remembers which headers it has made for that."""

    __slots__ = ("_backend", "lent", "made")

    def __init__(self, backend: OffloadBackend, made: set[tuple[bytes, bytes]]) -> None:
        self._backend = backend
        self.made = made
        self.lent: Lent | None = None
        """What the response lends for as long as its answer waits for the application."""

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return what the backend does."""
        headers = self._backend.headers_for(file)
        if headers is not None:
            self._remember(headers)
        return headers

    async def signed(self, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return what the backend does."""
        headers = await signed(self._backend, file, headers)
        self._remember(headers)
        return headers

    def withdrawn_from(self, start: Message) -> Message:
        """Return the start of a response without the headers that were made for another status than it has now."""
        headers = [
            (name, value) for name, value in start.get("headers", ()) if (bytes(name).lower(), value) not in self.made
        ]
        return {**start, "headers": headers}

    def take_lent(self, start: Message) -> Lent | None:
        """Return what is lent for the answer that begins so; close what is lent for one that has been replaced."""
        lent, self.lent = self.lent, None
        if lent is None or start is lent.start or (start["status"] == 200 and self._is_made_for(start)):
            return lent
        lent.file.close()
        return None

    def _is_made_for(self, start: Message) -> bool:
        return any((bytes(name).lower(), value) in self.made for name, value in start.get("headers", ()))

    def _remember(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.made.add((name.lower().encode("latin-1"), value.encode("latin-1")))


Decide = Callable[[bool], Awaitable[None]]
"""Sends an answer in the way that is right. It is told whether the application has returned by now."""


class Holding:
    """Holds one answer back until the application has returned, or for `PATIENCE`, and owns its file meanwhile."""

    __slots__ = ("_deadlines", "_deciding", "_held")

    def __init__(self) -> None:
        self._held: tuple[OpenLocalFile | None, Decide] | None = None
        self._deadlines: _Deadlines | None = None
        self._deciding: asyncio.Future[None] | None = None

    def hold(self, file: OpenLocalFile | None, decide: Decide) -> None:
        """Hold an answer. `file` is closed when it has been sent."""
        self._held = file, decide
        with suppress(RuntimeError):  # not asyncio: then it leaves when the application has returned
            self._deadlines = _deadlines_of(asyncio.get_running_loop())
            self._deadlines.set(self)

    def lose_patience(self) -> None:
        """Decide now: the application has not returned in time."""
        self._deciding = asyncio.ensure_future(self._decide(False))

    async def end(self) -> None:
        """Send what is held: the application has returned, or raised. Raises what sending raises."""
        if self._deciding is not None:
            await self._deciding
        elif self._held is not None:
            if self._deadlines is not None:
                self._deadlines.drop(self)
            await self._decide(True)

    async def cancel(self) -> None:
        """Send nothing more: the application has been cancelled."""
        if self._deadlines is not None:
            self._deadlines.drop(self)
        with anyio.CancelScope(shield=True):
            if self._deciding is not None:
                self._deciding.cancel()
                await asyncio.wait([self._deciding])
            elif self._held is not None:
                await self._close()

    async def _decide(self, has_returned: bool) -> None:
        assert self._held is not None
        try:
            await self._held[1](has_returned)
        finally:
            await self._close()

    async def _close(self) -> None:
        assert self._held is not None
        file, self._held = self._held[0], None
        if file is not None:
            await file.aclose()


class _Deadlines:
    """When each answer that an event loop holds has to leave, the first one first. One timer is for all of them.

    Most leave within microseconds, and a timer for each would cost more than all else that is done for them here.
    """

    __slots__ = ("_has_timer", "_times")

    def __init__(self) -> None:
        self._times: dict[Holding, float] = {}
        self._has_timer = False

    def set(self, holding: Holding) -> None:
        """Have an answer decided in `PATIENCE` from now."""
        loop = asyncio.get_running_loop()
        self._times[holding] = loop.time() + PATIENCE
        if not self._has_timer:
            self._has_timer = True
            loop.call_later(PATIENCE, self._look, loop)

    def drop(self, holding: Holding) -> None:
        """Forget an answer."""
        self._times.pop(holding, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._has_timer = False
        while self._times:
            holding, deadline = next(iter(self._times.items()))
            if deadline > (now := loop.time()):
                self._has_timer = True
                loop.call_later(deadline - now, self._look, loop)
                return
            del self._times[holding]
            holding.lose_patience()


_deadlines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Deadlines] = WeakKeyDictionary()


def _deadlines_of(loop: asyncio.AbstractEventLoop) -> _Deadlines:
    found = _deadlines.get(loop)
    if found is None:
        found = _deadlines[loop] = _Deadlines()
    return found


def is_deleted(file: OpenLocalFile) -> bool:
    """Return whether no path leads to an open file any more."""
    return not os.fstat(file.descriptor).st_nlink
