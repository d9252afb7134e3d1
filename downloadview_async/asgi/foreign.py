"""Path sends of responses that are not ours: offloaded, or sent by who can."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import anyio.to_thread
from starlette.types import Message, Receive, Scope, Send

from downloadview_async.asgi.response import RawHeaders, error_response
from downloadview_async.asgi.transfer import PATHSEND, SETTLED, send_plan, until_the_client_leaves
from downloadview_async.errors import FileError, TransferAborted
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.plan import Plan
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.offload.base import OFFLOAD_HEADERS, OffloadBackend, signed
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.local import OpenLocalFile
from downloadview_async.sources.path import LocalFile

logger = logging.getLogger("downloadview_async")

# Those that name a file. What else nginx does with an answer, such as X-Accel-Buffering, any application may say.
_ORDERS = frozenset(
    name.encode() for name in OFFLOAD_HEADERS if name == "x-accel-redirect" or not name.startswith("x-accel-")
)
_OF_THE_FRAMING = frozenset({b"accept-ranges", b"content-length", b"content-range", b"transfer-encoding"})


PATIENCE = 0.1
"""Seconds that an offloaded answer waits for the application to return, and for its background task, so, to end."""


class Offer:
    """A backend, as it is offered for one request, that remembers which headers it has made for that."""

    __slots__ = ("_backend", "made")

    def __init__(self, backend: OffloadBackend, made: set[tuple[bytes, bytes]]) -> None:
        self._backend = backend
        self.made = made

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

    def _remember(self, headers: Mapping[str, str]) -> None:
        self.made.update((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items())


class _Named:
    """A file by the path that a path send has, as it is given."""

    def __init__(self, path: str) -> None:
        self.name = os.path.basename(path)
        self.location: str | None = path

    def open(self, request: DownloadRequest = GET) -> AbstractAsyncContextManager[OpenLocalFile]:
        assert self.location is not None
        return LocalFile(self.location).open(request)


class ForeignResponse:
    """One response on its way out, whose start may have to wait until it is known how its file is sent.

    path_send: whether whoever gets its messages takes a path send.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, offer: Offer, *, path_send: bool) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._offer = offer
        self._path_send = path_send
        self._held: Message | None = None
        self._waiting: tuple[Message, Message, str, AsyncExitStack] | None = None
        self._offloaded_file: OpenLocalFile | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._settling: asyncio.Future[None] | None = None

    async def send(self, message: Message) -> None:
        """Send what the application says, and a path send in the way that is best."""
        if message["type"] == "http.response.start":
            message = self._without_orders(message)
            # Without a length it may be a stream that begins long before its first byte does.
            if _length_of(message) is not None:
                self._held = message
                return
        elif message["type"] == PATHSEND and "descriptor" not in message:
            start, self._held = self._held, None
            await self._send_file(start, os.fsdecode(message["path"]), message)
            return
        await self.end()
        await self._send(message)

    async def end(self) -> None:
        """Send the start, if it still waits."""
        if self._held is not None:
            held, self._held = self._held, None
            await self._send(held)

    @asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """Send what waits for the application to return when it has, also where its background task fails."""
        try:
            yield
        except Exception:
            await self._end_of_waiting()
            raise
        except BaseException:  # cancelled
            if self._waiting is not None:
                with anyio.CancelScope(shield=True):
                    await self._waiting[3].aclose()
            raise
        await self._end_of_waiting()

    async def _end_of_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._settling is not None:
            await self._settling
        await self._settle()

    async def _offer_and_hold(self, offloaded: Message, start: Message, path: str) -> None:
        """Have a proxy send a file as soon as it is known that the application does not delete it first."""
        stack = AsyncExitStack()
        try:
            self._offloaded_file = await stack.enter_async_context(_Named(path).open())
        except FileError as exc:  # the proxy would find no file either
            await error_response(exc, self._scope)(self._scope, self._receive, self._send)
            return
        self._waiting = offloaded, start, path, stack
        with suppress(RuntimeError):  # not asyncio: then it leaves when the application has returned
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(PATIENCE, self._begin_to_settle)

    def _begin_to_settle(self) -> None:
        self._settling = asyncio.ensure_future(self._settle())

    async def _settle(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        offloaded, start, path, stack = waiting
        async with stack:
            opened = self._offloaded_file
            assert opened is not None
            # a proxy makes a strong validator of any time, also of one that says nothing
            if opened.is_telling and await anyio.to_thread.run_sync(_is_at, path, opened.descriptor):
                await self._send(offloaded)
                await self._send({"type": "http.response.body", "body": b""})
                return
            if self._scope["method"] == "HEAD":
                await self._send(start)
                await self._send({"type": "http.response.body", "body": b""})
                return
            stream = partial(self._stream_opened, start, opened)
            await until_the_client_leaves(stream, self._receive, self._send)

    def _without_orders(self, start: Message) -> Message:
        """Return the start of a response with no offload header but one that a backend has made, and that on a 200."""
        headers: RawHeaders = [(bytes(name), bytes(value)) for name, value in start.get("headers", ())]
        kept = [
            (name, value)
            for name, value in headers
            if name.lower() not in _ORDERS or (start["status"] == 200 and (name.lower(), value) in self._offer.made)
        ]
        if len(kept) == len(headers):
            return start
        dropped = sorted({name.decode("latin-1") for name, _ in headers} - {name.decode("latin-1") for name, _ in kept})
        logger.warning(
            "%s %s: %s of the application is dropped: only a backend may set it, and on a 200 alone",
            escaped(self._scope["method"]),
            shown(self._scope["path"]),
            escaped(", ".join(dropped)),
        )
        return {**start, "headers": kept}

    async def _send_file(self, start: Message | None, path: str, message: Message) -> None:
        # A middleware further in, or a response of ours, may have decided that no proxy sends this one.
        if SETTLED not in message and start is not None and (offloaded := self._offloaded(start, path)) is not None:
            await self._offer_and_hold(offloaded, start, path)
            return
        if self._scope["method"] == "HEAD":
            if start is not None:
                await self._send(start)
            await self._send({"type": "http.response.body", "body": b""})
            return
        if not os.path.isabs(path):
            path = os.path.join(os.getcwd(), path)
        if ".." in path.split("/"):
            path = await anyio.to_thread.run_sync(os.path.realpath, path)  # as the kernel has it: not by spelling
        if self._path_send:
            if start is not None:
                await self._send(start)
            await self._send({**message, "path": path, SETTLED: True})
            return
        try:
            await until_the_client_leaves(partial(self._stream, start, _Named(path)), self._receive, self._send)
        except FileError as exc:
            if start is None:
                raise TransferAborted(f"a file that was promised cannot be sent: {exc}") from exc
            await error_response(exc, self._scope)(self._scope, self._receive, self._send)

    def _offloaded(self, start: Message, path: str) -> Message | None:
        """Return the start that has a proxy send the file, or None if none can."""
        headers: RawHeaders = list(start["headers"])
        names = {name.lower() for name, _ in headers}
        if (
            start["status"] != 200
            or self._scope["method"] not in ("GET", "HEAD")
            or names & {b"content-encoding", b"content-range"}
            or names & _ORDERS
            or not os.path.isabs(path)
            or ".." in path.split("/")
            or (order := self._offer.headers_for(_Named(path))) is None
        ):
            return None
        made = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in order.items()]
        replaced = _OF_THE_FRAMING.union(name for name, _ in made)
        kept = [header for header in headers if header[0].lower() not in replaced]
        return {**start, "headers": [*kept, *made, (b"content-length", b"0")]}

    async def _stream(self, start: Message | None, file: _Named, send: Send) -> None:
        async with file.open() as opened:
            await self._stream_opened(start, opened, send)

    async def _stream_opened(self, start: Message | None, opened: OpenLocalFile, send: Send) -> None:
        length = opened.metadata.size or 0 if start is None else _length_of(start)
        assert length is not None
        plan = Plan(200, {}, (ByteRange(0, length),) if length else ())
        if start is not None:
            await send_plan(plan, opened, start, send)
            return

        async def send_the_rest(message: Message) -> None:
            if message["type"] != "http.response.start":  # which has been sent already
                await send(message)

        await send_plan(plan, opened, {"type": "http.response.start"}, send_the_rest)


def _is_at(path: str, descriptor: int) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _length_of(start: Message) -> int | None:
    """Return the Content-Length of a response, if it has one that is good."""
    values = [bytes(value) for name, value in start.get("headers", ()) if name.lower() == b"content-length"]
    return int(values[0]) if len(values) == 1 and values[0].isdigit() and len(values[0]) < 20 else None
