"""`Offer`: a backend, as it is offered for one request, and the open file that is lent for its answer (`Lent`)."""

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import anyio.to_thread
from starlette.types import Message, Receive, Send

from downloadview_async.offload.base import OffloadBackend, signed
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.local.open_file import OpenLocalFile


@dataclass(slots=True)
class Lent:
    """An open file that an answer for a proxy is about.

    file: shared, so that whoever takes this closes it; None where only the proxy can open it. path: where the proxy
    finds it, as this process sees it. start: the answer for the proxy. stream: sends the file itself.
    """

    file: OpenLocalFile | None
    path: str | None
    start: Message
    stream: Callable[[Receive, Send], Awaitable[None]]
    headers: tuple[tuple[bytes, bytes], ...] = field(init=False)
    """Those of the start as it was made: the message is anybody's to change."""

    def __post_init__(self) -> None:
        self.headers = tuple(self.start["headers"])

    async def is_at_its_place(self) -> bool:
        """Return whether the proxy finds this very file by the path: it may have been deleted, moved or replaced."""
        if self.file is None:
            return True
        if self.file.is_quick:
            return self._is_there()
        return await anyio.to_thread.run_sync(self._is_there)

    def _is_there(self) -> bool:
        assert self.file is not None
        found = os.fstat(self.file.descriptor)
        if self.path is None:
            return found.st_nlink > 0
        try:
            return os.path.samestat(os.stat(self.path), found)
        except OSError:
            return False


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

    def lend(self, lent: Lent | None) -> None:
        """Lend this for the answer that comes next, and close what was lent before it."""
        before, self.lent = self.lent, lent
        if before is not None and before.file is not None:
            before.file.close()

    def take_lent(self, start: Message) -> Lent | None:
        """Return what is lent for the answer that begins so; close what is lent for one that has been replaced."""
        lent = self.lent
        if lent is None or start is lent.start or (start["status"] == 200 and self._is_made_for(start)):
            self.lent = None
            return lent
        self.lend(None)
        return None

    def _is_made_for(self, start: Message) -> bool:
        return any((bytes(name).lower(), value) in self.made for name, value in start.get("headers", ()))

    def _remember(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.made.add((name.lower().encode("latin-1"), value.encode("latin-1")))
