"""`Offer`: a backend that is offered for one request. `Lent`: the open file behind the offloaded answer."""

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio.to_thread
from starlette.types import Message, Receive, Send

from downloadview_async.accounts.facts import Facts
from downloadview_async.errors import DownloadError
from downloadview_async.offload.base import OffloadBackend, rated, signed
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.local.open_file import OpenLocalFile

REPLACED = "another answer replaced this one"
"""Why an offloaded answer is incomplete: middleware has sent another one, or has changed the status."""


class Held(Protocol):
    """The account of an answer that waits in an `OffloadMiddleware` further out."""

    def restarted(self, send: Send) -> Send:
        """Return a function that sends another answer in place of the one that was held, and counts that."""

    def end(self, exc: BaseException | None = None) -> object:
        """Make the outcome: the answer has left, or has failed with `exc`."""


@dataclass(slots=True)
class Lent:
    """The open file behind an offloaded answer.

    file: shared, so the code that takes this object closes it. None if only the proxy can open the file.
    path: the path at which the proxy finds the file, as this process sees it.
    start: the first message of the offloaded answer. stream: sends the file without the proxy. accounts: those that
    have counted the answer before it was held, the innermost first.
    """

    file: OpenLocalFile | None
    path: str | None
    start: Message
    stream: Callable[[Receive, Send], Awaitable[None]]
    accounts: Sequence[Held] = ()
    headers: tuple[tuple[bytes, bytes], ...] = field(init=False)
    """The headers of `start` as it was made: middleware may change the message."""

    def __post_init__(self) -> None:
        self.headers = tuple(self.start["headers"])

    async def is_at_its_place(self) -> bool:
        """Return whether the path still leads to this file, which may have been deleted, moved or replaced."""
        if self.file is None:
            return True
        if self.file.is_quick:
            return self._is_there()
        return await anyio.to_thread.run_sync(self._is_there)

    def _is_there(self) -> bool:
        assert self.file is not None
        if self.path is None:
            return os.fstat(self.file.descriptor).st_nlink > 0
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        return there.st_ino == self.file.inode and there.st_dev == self.file.device


class Offer:
    """A backend that is offered for one request, and that remembers the headers that it has made for it.

    outer: the offer of the next middleware outwards. It drops the headers that no backend has made, so it knows these.
    facts: those of the request outside of the outermost middleware.
    """

    __slots__ = ("_backend", "facts", "is_withdrawn", "lent", "orders")

    def __init__(self, backend: OffloadBackend, outer: "Offer | None", facts: Facts | None = None) -> None:
        self._backend = backend
        self.facts: Facts | None = facts if outer is None else outer.facts
        self.orders: list[Mapping[str, str]] = [] if outer is None else outer.orders
        """The headers of each file that was offloaded for this request."""
        self.is_withdrawn = False
        """Whether the headers were removed from an answer, because middleware has changed its status."""
        self.lent: Lent | None = None
        """The open file that the response lends while its answer waits for the application."""

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return the backend's headers for a file, and remember them."""
        headers = self._backend.headers_for(file)
        if headers is not None:
            self.orders.append(headers)
        return headers

    async def signed(self, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers as the backend signs them, and remember them."""
        headers = await signed(self._backend, file, headers)
        self.orders.append(headers)
        return headers

    def rated(self, headers: Mapping[str, str], rate: int) -> Mapping[str, str]:
        """Return the headers with a rate in bytes per second, if the proxy can limit it, and remember them."""
        headers = rated(self._backend, headers, rate)
        self.orders.append(headers)
        return headers

    @property
    def made(self) -> set[tuple[bytes, bytes]]:
        """The headers of `orders` as in an ASGI message, with their names in lower case."""
        pairs = [pair for order in self.orders for pair in order.items()]
        return {(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs}

    def withdrawn_from(self, start: Message) -> Message:
        """Return the start of a response without the headers that this backend has made: its status has changed."""
        self.is_withdrawn = True
        made, headers = self.made, start.get("headers", ())
        kept = [(name, value) for name, value in headers if (bytes(name).lower(), value) not in made]
        return {**start, "headers": kept}

    def lend(self, lent: Lent | None) -> None:
        """Lend a file for the next answer, and close the one that was lent before."""
        before, self.lent = self.lent, lent
        if before is not None:
            for account in before.accounts:
                account.end(DownloadError(REPLACED))
            if before.file is not None:
                before.file.close()

    def take_lent(self, start: Message) -> Lent | None:
        """Return the file that is lent for the answer with this start. Close it if another answer replaced that."""
        lent = self.lent
        if lent is None or start is lent.start or (start["status"] == 200 and self._is_made_for(start)):
            self.lent = None
            return lent
        self.lend(None)
        return None

    def _is_made_for(self, start: Message) -> bool:
        made = self.made
        return any((bytes(name).lower(), value) in made for name, value in start.get("headers", ()))
