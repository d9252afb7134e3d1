"""A uvicorn protocol that sends files by `sendfile`, and drops clients that have stopped reading.

    uvicorn app:app --http downloadview_async.asgi.server:DownloadProtocol

It offers ASGI's path send (`http.response.pathsend`), so Starlette's FileResponse and StaticFiles become zero-copy as
they are. To a `DownloadResponse` it says that it takes more than the specification has: an open descriptor, an offset
and a count. TLS, and whatever else has no plain socket, is served in chunks as before.
"""

import asyncio
import fcntl
import functools
import os
import socket
import struct
import termios
from typing import Any

import anyio.to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from downloadview_async.asgi.response import close_after_body
from downloadview_async.asgi.transfer import PATHSEND, LentDescriptor
from downloadview_async.errors import SourceUnavailable, TransferAborted
from downloadview_async.sources.workers import Workers

STALL_SECONDS = 60.0
"""How long a client may take less than `MINIMUM_RATE` before its connection is reset."""

MINIMUM_RATE = 64
"""Bytes per second that a client has to take, on the average of `STALL_SECONDS`."""

MAX_HEAD_BYTES = 64 * 1024
"""The longest head of a request: its first line and its header fields."""

_WINDOW = 1 << 20  # bytes that are looked for in the page cache, and sent, at a time
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)
_workers = Workers()


class DownloadProtocol(HttpToolsProtocol):
    """uvicorn's own protocol on httptools, with path send and a watch over clients that do not read.

    stall_seconds, minimum_rate (bytes per second): a client that takes less on the average of so many seconds is
    dropped. Other values go in by `functools.partial(DownloadProtocol, stall_seconds=...)` as uvicorn's `http`.
    """

    def __init__(
        self, *args: Any, stall_seconds: float = STALL_SECONDS, minimum_rate: int = MINIMUM_RATE, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.stall_seconds = stall_seconds
        self.minimum_rate = minimum_rate
        self._lost = False
        self._watch: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._socket: socket.socket | None = None
        self._in_worker = False
        self._in_head, self._head_bytes = True, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Offer path send to the application where the connection has a plain socket."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is None or transport.get_extra_info("sslcontext") is not None:
            return
        try:
            # An event loop does not let anyone else write to a transport's own descriptor.
            self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        except OSError:
            return  # no descriptor is left: in chunks, then
        self.app = functools.partial(self._with_path_send, self.app)

    def data_received(self, data: bytes) -> None:
        """Read on, but not a request head without end: httptools itself has no limit."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.logger.warning("A request head of more than %d bytes was refused", MAX_HEAD_BYTES)
            self.send_400_response("Request header fields too large.")

    def on_message_begin(self) -> None:
        """Begin to count the bytes of a request head."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Go on to the body, which is not counted."""
        self._in_head = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Go on to the next request, unless a body that nobody has asked for is still coming."""
        if self.cycle.more_body and close_after_body(dict(self.cycle.scope)):
            self.transport.close()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection holds."""
        self._stop_watching()
        self._lost = True
        if self._waiter is not None:
            _resolve(self._waiter)
        super().connection_lost(exc)
        self._close_socket()

    def _close_socket(self) -> None:
        # While a worker uses it, its number must not become another connection's.
        if self._socket is not None and not self._in_worker:
            self.loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None

    def pause_writing(self) -> None:
        """Watch the client while something waits for it."""
        super().pause_writing()
        self._start_watching()

    def resume_writing(self) -> None:
        """Stop watching: the client has taken what was there."""
        super().resume_writing()
        self._stop_watching()

    async def _with_path_send(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_files(message: Message) -> None:
            if message["type"] == PATHSEND:
                await self._send_file(message, scope["method"], send)
            else:
                await send(message)

        scope["extensions"] = {**scope.get("extensions", {}), PATHSEND: {"descriptor": True}}
        await app(scope, receive, send_files)

    async def _send_file(self, message: Message, method: str, send: Send) -> None:
        """Send the body that the message names. Raises `TransferAborted` if the file has less than was promised."""
        # The cycle counts down what Content-Length promised, of bytes that it sends itself.
        cycle: Any = send.__self__  # type: ignore[attr-defined]
        lent: LentDescriptor | None = message.get("descriptor")
        # Our own from the first moment: the response may be cancelled at any other.
        descriptor: int | None = None
        try:
            descriptor = await anyio.to_thread.run_sync(_open, message["path"]) if lent is None else lent.dup()
            offset = message.get("offset", 0)
            if method == "HEAD":
                pass
            elif cycle.chunked_encoding:
                await self._send_in_chunks(descriptor, offset, message.get("count"), send)
            else:
                count = message.get("count", cycle.expected_content_length)
                await self._sendfile(descriptor, offset, count)
                cycle.expected_content_length -= count
            await send({"type": "http.response.body", "body": b""})
        except (OSError, SourceUnavailable) as exc:
            raise TransferAborted(f"sending a file failed: {exc}") from exc
        finally:
            if descriptor is not None:
                os.close(descriptor)
            if lent is not None:
                lent.returned.set()

    async def _send_in_chunks(self, descriptor: int, offset: int, count: int | None, send: Send) -> None:
        """Send a file without a Content-Length: a path send that promised none has to be framed."""
        stop = os.fstat(descriptor).st_size if count is None else offset + count
        while offset < stop:
            chunk = await _workers.run(os.pread, descriptor, min(_WINDOW, stop - offset), offset)
            if not chunk:
                return
            offset += len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _sendfile(self, descriptor: int, offset: int, count: int) -> None:
        """Send a part of a file, or return when the client has left. Raises `TransferAborted` where the file ends."""
        await self._flushed()
        while count and not self._lost:
            length = min(count, _WINDOW)
            try:
                if await self._is_cached(descriptor, offset, length):
                    sent = self._send_some(descriptor, offset, length)
                    await asyncio.sleep(0)
                else:
                    sent = await self._send_some_in_worker(descriptor, offset, length)
            except BlockingIOError:
                await self._writable()
                continue
            except ConnectionError:
                await self._abort()
                return
            if sent == 0:
                raise TransferAborted(f"the file ended {count} bytes before what was promised of it")
            offset += sent
            count -= sent

    async def _abort(self) -> None:
        """Close the connection and wait until uvicorn knows, so that it does not take the answer for a broken one."""
        self._waiter = self.loop.create_future()
        self.transport.abort()
        if not self._lost:
            await self._waiter

    def _send_some(self, descriptor: int, offset: int, length: int) -> int:
        if self._socket is None:
            raise ConnectionResetError
        return os.sendfile(self._socket.fileno(), descriptor, offset, length)

    async def _send_some_in_worker(self, descriptor: int, offset: int, length: int) -> int:
        self._in_worker = True
        try:
            return await _workers.run(self._send_some, descriptor, offset, length)
        finally:
            self._in_worker = False
            if self._lost:
                self._close_socket()

    async def _flushed(self) -> None:
        """Wait until the transport has sent what it holds: the headers come before the file."""
        while self.transport.get_write_buffer_size() and not self._lost:
            self.transport.set_write_buffer_limits(high=0)
            try:
                await self.flow.drain()
            finally:
                if not self.transport.is_closing():
                    self.transport.set_write_buffer_limits()

    async def _is_cached(self, descriptor: int, offset: int, length: int) -> bool:
        """Return whether `sendfile` will find the bytes without waiting for a disk; read them first if it can."""
        if _RWF_NOWAIT is None:
            return False
        buffer = [bytearray(1)]
        try:
            os.preadv(descriptor, buffer, offset, _RWF_NOWAIT)
            os.preadv(descriptor, buffer, offset + length - 1, _RWF_NOWAIT)
        except BlockingIOError:
            await _workers.run(os.pread, descriptor, length, offset)
        except OSError:
            return False  # a file system that cannot tell, such as FUSE or tmpfs
        return True

    async def _writable(self) -> None:
        """Wait until the socket takes more, or the connection is lost."""
        if self._socket is None:
            return
        self._waiter = self.loop.create_future()
        self.loop.add_writer(self._socket, _resolve, self._waiter)
        self._start_watching()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._stop_watching()
            if self._socket is not None:
                self.loop.remove_writer(self._socket)

    def _start_watching(self) -> None:
        self._stop_watching()
        self._watch = self.loop.call_later(self.stall_seconds, self._check, self._waiting())

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _waiting(self) -> int:
        """Return the bytes that the client has not taken yet: the transport's, and the kernel's."""
        queued = self.transport.get_write_buffer_size()
        if self._socket is not None:
            queued += struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
        return queued

    def _check(self, before: int) -> None:
        """Reset the connection of a client that has taken too little since the watch began."""
        if before - self._waiting() >= self.minimum_rate * self.stall_seconds:
            self._start_watching()
            return
        self.logger.warning("Transfer aborted: the client took less than %d bytes a second", self.minimum_rate)
        if self._socket is not None:
            # A reset, not a polite close: what the kernel still holds for the client goes too.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
