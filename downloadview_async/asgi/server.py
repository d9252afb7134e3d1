"""A uvicorn protocol that sends files by `sendfile`, and drops clients that have stopped reading.

    uvicorn app:app --http downloadview_async.asgi.server:DownloadProtocol

It offers ASGI's path send (`http.response.pathsend`), so Starlette's FileResponse and StaticFiles become zero-copy as
they are. To a `DownloadResponse` it says that it takes more than the specification has: an open descriptor, an offset
and a count, and heads that are prepared. TLS, and whatever else has no plain socket, is served in chunks as before.
"""

import asyncio
import fcntl
import logging
import os
import re
import socket
import struct
import termios
from collections import deque
from contextlib import suppress
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn
from starlette.types import Message
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from downloadview_async.asgi.response import close_after_body
from downloadview_async.asgi.transfer import PATHSEND, PREPARED, LentFile, PreparedHead, is_ordinary
from downloadview_async.errors import FileError, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.local import REWRITTEN, OpenLocalFile
from downloadview_async.sources.path import LocalFile
from downloadview_async.sources.workers import MID_TRANSFER

KNOWN_UVICORN = ("0.38.0", "0.54.0")
"""The oldest and the newest uvicorn that all of this has been tested with."""

STALL_SECONDS = 60.0
"""How long a client may take less than `MINIMUM_RATE` before its connection is reset."""

MINIMUM_RATE = 64
"""Bytes per second that a client has to take, on the average of `STALL_SECONDS`.

What it takes is what its kernel says it has: some do so in steps, so a client needs several times this rate to be safe.
"""

MAX_HEAD_BYTES = 64 * 1024
"""The longest head of a request: its first line and its header fields."""

_WINDOW = 256 << 10  # bytes that are looked for in the page cache, and sent, at a time: others wait so long
_FEW = 128

_OFFER: dict[object, object] = {"descriptor": True, PREPARED: True}
_CLOSE = (b"connection", b"close")
_server_lines: tuple[list[tuple[bytes, bytes]], bytes | None] = [], b""


def uvicorn_warning(version: str) -> str | None:
    """Return what to say at start-up about a version of uvicorn: None if it is between those that have been tested."""
    oldest, newest, found = ([int(n) for n in re.findall("[0-9]+", text)[:2]] for text in (*KNOWN_UVICORN, version))
    if oldest <= found <= newest:
        return None
    return (
        f"uvicorn {version} is not known to DownloadProtocol, which is tested with {KNOWN_UVICORN[0]} to "
        f"{KNOWN_UVICORN[1]} and builds on their inner parts. If downloads fail, install one of these, or let uvicorn "
        "send by itself: --http httptools"
    )


if (_warning := uvicorn_warning(uvicorn.__version__)) is not None:
    logging.getLogger("downloadview_async").warning(_warning)


class DownloadCycle(RequestResponseCycle):
    """uvicorn's own request and response, which can send files too, and a head that was prepared for it."""

    _held: bytes | None = None  # a head that goes out in one piece with its body

    def send(self, message: Any) -> Any:  # not `async`: another coroutine around uvicorn's own would cost every message
        """Send what the application says, as uvicorn does where it is nothing of ours."""
        if PREPARED in message and self._takes_head(message):
            return _done()
        if self._held is not None:
            held, self._held = self._held, None
            if self._takes_body(held, message):
                return _done()
            if not self.disconnected:
                self.transport.write(held)
        if message["type"] == PATHSEND:
            protocol: DownloadProtocol = self.on_response.__self__  # type: ignore[attr-defined]
            return (protocol.send_file if "descriptor" in message else protocol.send_path)(self, message)
        return super().send(message)

    def _takes_head(self, message: Message) -> bool:
        """Return whether the head of a response is one that was prepared, and is now held until its body comes."""
        prepared: PreparedHead = message[PREPARED]
        if (
            self.response_started
            or self.disconnected
            or self.access_log
            or self.flow.write_paused
            or not self.keep_alive
            or self.scope["method"] == "HEAD"
            or _CLOSE in self.scope["headers"]
            or not isinstance(headers := message.get("headers"), list)
            or tuple(headers) != prepared.headers
            or (lines := _lines_of_server(self.default_headers)) is None
        ):
            return False
        self.response_started = True
        self.waiting_for_100_continue = False
        self.chunked_encoding = False
        self.expected_content_length = prepared.length
        self._held = b"".join((STATUS_LINE[message["status"]], lines, prepared.lines, b"\r\n"))
        return True

    def _takes_body(self, head: bytes, message: Message) -> bool:
        """Send a body that is whole, and return whether it is."""
        body = message.get("body", b"")
        if (
            message["type"] != "http.response.body"
            or message.get("more_body", False)
            or len(body) != self.expected_content_length
            or self.disconnected
        ):
            return False
        self.transport.write(head + body)
        self.expected_content_length = 0
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True


async def _done() -> None:
    """Return at once."""


# What uvicorn does when a head has been read, but with a cycle of ours: it makes one in the midst of it, by this name.
_on_headers_complete = FunctionType(
    HttpToolsProtocol.on_headers_complete.__code__,
    {**vars(httptools_impl), "RequestResponseCycle": DownloadCycle},
)


class _Pipeline(list[Any]):
    """The requests that wait, which uvicorn has in a deque: an empty one weighs 760 bytes, with each connection."""

    def appendleft(self, item: Any) -> None:
        self.insert(0, item)


class DownloadProtocol(HttpToolsProtocol):
    """uvicorn's own protocol on httptools, with path send and a watch over clients that do not read.

    stall_seconds, minimum_rate (bytes per second): a client that takes less on the average of so many seconds is
    dropped, and so is one that has not sent the whole head of a request in that time. Other values go in by
    `functools.partial(DownloadProtocol, stall_seconds=...)` as uvicorn's `http`.
    """

    # Not in the instance's dictionary: it would no longer share its keys with the others', and weigh twice as much.
    __slots__ = (
        "_drained",
        "_head_bytes",
        "_head_deadline",
        "_idle_since",
        "_idle_with",
        "_is_plain",
        "_lost",
        "_read",
        "minimum_rate",
        "stall_seconds",
    )

    def __init__(
        self, *args: Any, stall_seconds: float = STALL_SECONDS, minimum_rate: int = MINIMUM_RATE, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.pipeline: Any = _Pipeline()
        self.stall_seconds = stall_seconds
        self.minimum_rate = minimum_rate
        self._lost = False
        self._is_plain = False
        self._drained: asyncio.Future[None] | None = None  # what waits until the transport has sent all, or is lost
        self._read: Any = None  # the scope of the request whose head was read last
        self._head_bytes = 0
        self._head_deadline: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self._idle_with: tuple[float, int] | None = None  # when, and what the client had not taken yet then

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._is_plain = (
            transport.get_extra_info("socket") is not None and transport.get_extra_info("sslcontext") is None
        )
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read on, but not a request head without end: httptools itself has no limit."""
        idle_since, self._idle_since = self._idle_since, None
        self._head_bytes += len(data)
        super().data_received(data)
        if self.scope is self._read:  # no further head has begun
            if self.cycle is not None and self.cycle.response_complete:
                self._idle_since = idle_since  # empty lines are no request
            return
        self._await_head()
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.logger.warning("A request head of more than %d bytes was refused", MAX_HEAD_BYTES)
            self.send_400_response("Request header fields too large.")

    def on_message_begin(self) -> None:
        """Begin to count the bytes of a request head: those of the next packet on."""
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Offer path send to the application where the connection has a plain socket."""
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None
        self._read = scope = self.scope
        if self._is_plain:
            scope["extensions"] = {PATHSEND: _OFFER}
        _on_headers_complete(self)

    def on_response_complete(self) -> None:
        """Go on to the next request, unless a body that nobody has asked for is still coming."""
        if self.cycle.response_complete and self.cycle.more_body and close_after_body(self.cycle.scope):
            self.transport.close()
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            if self.transport.get_write_buffer_size():  # it closes when the client has taken that
                self._start_watching()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        # One timer for many requests: it looks at how long the connection has been idle when it rings.
        self._idle_since, self._idle_with = self.loop.time(), None
        if self.timeout_keep_alive_task is None:
            self._ring_after(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection holds."""
        self._stop_timers()
        self._lost = True
        self._resume()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to another protocol, without timers of ours."""
        self._stop_timers()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """Watch the client while something waits for it."""
        super().pause_writing()
        self._start_watching()

    def resume_writing(self) -> None:
        """Stop watching: the client has taken what was there."""
        super().resume_writing()
        self._stop_watching()
        self._resume()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, but not while the client still takes what the kernel has for it."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        now, left = self.loop.time(), self._waiting()
        idle = now - self._idle_since
        if idle < self.timeout_keep_alive:
            self._ring_after(self.timeout_keep_alive - idle)
        elif left == 0 or self.transport.is_closing():
            super().timeout_keep_alive_handler()
        else:
            since, before = self._idle_with = self._idle_with or (now, left)
            if now - since < self.stall_seconds:
                self._ring_after(min(self.timeout_keep_alive, self.stall_seconds))
            elif before - left < self.minimum_rate * self.stall_seconds:
                self._reset()
            else:
                self._idle_with = None
                self._ring_after(0)

    def _stop_timers(self) -> None:
        self._stop_watching()
        for timer in (self._head_deadline, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()

    def _ring_after(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        """Let the timer ring: see `on_response_complete`."""

    def _await_head(self) -> None:
        """Close the connection if the head of a request does not come to its end in time."""
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(self.stall_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # it is pipelined: while it waits behind another answer, it may not even be read
            self._await_head()

    async def send_path(self, cycle: DownloadCycle, message: Message) -> None:
        """Send the file that the message names by its path."""
        try:
            async with LocalFile(message["path"]).open() as file:
                await self.send_file(cycle, {**message, "descriptor": LentFile(file)})
        except FileError as exc:
            raise TransferAborted(f"opening a file failed: {exc}") from exc

    async def send_file(self, cycle: DownloadCycle, message: Message) -> None:
        """Send the span of an open file that is lent by the message.

        All in one coroutine: it is what waits with each of thousands of clients. Raises `TransferAborted` if the file
        has less than was promised of it, or cannot be read.
        """
        lent: LentFile = message["descriptor"]
        file = lent.take()
        try:
            if cycle.disconnected:
                return
            if not cycle.response_started:
                raise RuntimeError("a path send before the start of its response")
            offset = message.get("offset", 0)
            count = 0
            if cycle.scope["method"] == "HEAD":
                pass
            elif cycle.chunked_encoding:
                await _send_in_chunks(file, offset, message.get("count"), cycle)
            else:
                count = message.get("count", cycle.expected_content_length)
                if count > cycle.expected_content_length:
                    raise RuntimeError("a path send of more than Content-Length has promised")
                cycle.expected_content_length -= count  # which it counts down by what it sends itself
            while count and not self._lost:
                if self.transport.get_write_buffer_size():
                    await self._flushed()
                    await _turn(self.loop)
                    continue
                try:
                    length = min(count, _WINDOW)
                    if file.is_rewritten():
                        raise TransferAborted(REWRITTEN)
                    if file.is_cached(offset, length):
                        sent = os.sendfile(self._fileno(), file.descriptor, offset, length)
                        if sent < count:
                            await _turn(self.loop)
                    else:
                        sent = await self._sendfile_in_worker(file, offset, length)
                except BlockingIOError:
                    # Only the transport may wait for its socket. It does so for a few bytes.
                    few = await file.read(ByteRange(offset, offset + min(count, _FEW)))
                    if self.transport.is_closing():
                        break
                    self.transport.write(few)
                    sent = len(few)
                except ConnectionError:
                    if not self._lost:  # a worker may hear of it after uvicorn has
                        self._drained = self.loop.create_future()
                        self.transport.abort()
                        await self._drained  # until uvicorn knows, and does not take the answer for a broken one
                    break
                if sent == 0:
                    raise TransferAborted(f"the file ended {count} bytes before what was promised of it")
                offset += sent
                count -= sent
            if self._lost:
                cycle.disconnected = True  # uvicorn tells only the last of those that are pipelined
                return
            await cycle.send({"type": "http.response.body", "body": b""})
        except (OSError, FileError) as exc:
            raise TransferAborted(f"sending a file failed: {exc}") from exc
        finally:
            lent.give_back()

    async def _sendfile_in_worker(self, file: OpenLocalFile, offset: int, length: int) -> int:
        connection = os.dup(self._fileno())  # the number itself may become another connection's
        try:
            return await file.workers.run(
                os.sendfile, connection, file.descriptor, offset, length, patience=MID_TRANSFER
            )
        finally:
            os.close(connection)

    def _fileno(self) -> int:
        if self._lost:
            raise ConnectionResetError
        number: int = self.transport.get_extra_info("socket").fileno()
        return number

    def _flushed(self) -> "asyncio.Future[None]":
        """Wait until the transport has sent what it holds: what the kernel sends from a file comes after it."""
        self._drained = self.loop.create_future()
        self.transport.set_write_buffer_limits(high=0)  # pauses writing now, and resumes it when all has been sent
        return self._drained

    def _resume(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None:
            if not self._lost:
                self.transport.set_write_buffer_limits()
            if not drained.done():
                drained.set_result(None)

    def _start_watching(self) -> None:
        watched = _watched.get(self.loop)
        if watched is None:
            watched = _watched[self.loop] = {}
            self.loop.call_later(self.stall_seconds / 4, _look_at, watched, self.loop, self.stall_seconds / 4)
        watched[self] = self.loop.time(), self._waiting()

    def _stop_watching(self) -> None:
        _watched.get(self.loop, {}).pop(self, None)

    def _waiting(self) -> int:
        """Return the bytes that the client has not taken yet: the transport's, and the kernel's."""
        queued = self.transport.get_write_buffer_size()
        with suppress(OSError):  # no plain socket
            queued += struct.unpack("i", fcntl.ioctl(self._fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
        return queued

    def check(self, since: float, before: int) -> None:
        """Reset the connection of a client that has taken too little of what waited for it."""
        if self.loop.time() - since < self.stall_seconds:
            return
        if before - self._waiting() < self.minimum_rate * self.stall_seconds:
            self._reset()
        else:
            self._start_watching()

    def _reset(self) -> None:
        self.logger.warning("Transfer aborted: the client took less than %d bytes a second", self.minimum_rate)
        with suppress(OSError), socket.socket(fileno=os.dup(self._fileno())) as connection:
            # A reset, not a polite close: what the kernel still holds for the client goes too.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


_queues: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[asyncio.Future[None]]] = WeakKeyDictionary()


def _turn(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    """Wait until it is one's turn to send a window of a file: there is one each time the loop looks at its sockets.

    All downloads that can go on would else do so before it looks again, and a small request would wait for each.
    """
    queue = _queues.setdefault(loop, deque())
    if not queue:
        loop.call_soon(_give_turn, loop, queue)
    turn = loop.create_future()
    queue.append(turn)
    return turn


def _give_turn(loop: asyncio.AbstractEventLoop, queue: "deque[asyncio.Future[None]]") -> None:
    while queue:
        turn = queue.popleft()
        if not turn.done():  # as it is when who waits for it has been cancelled
            turn.set_result(None)
            break
    if queue:
        loop.call_soon(_give_turn, loop, queue)


# One timer for all clients of a loop that are waited for, instead of one that is made and cancelled at each wait.
_Watched = dict[DownloadProtocol, tuple[float, int]]
_watched: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watched] = WeakKeyDictionary()


def _look_at(watched: _Watched, loop: asyncio.AbstractEventLoop, every: float) -> None:
    for protocol, since_and_before in list(watched.items()):
        protocol.check(*since_and_before)
    if not watched:
        del _watched[loop]  # which says that no timer runs
    else:
        loop.call_later(every, _look_at, watched, loop, every)


def _lines_of_server(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Return the lines that begin the head of every response, or None if they say more than uvicorn's usual ones.

    uvicorn makes a new list each second.
    """
    global _server_lines
    made_of, lines = _server_lines
    if made_of is not headers:
        lines = None
        if all(name != b"content-length" and is_ordinary(name, value) for name, value in headers):
            lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        _server_lines = headers, lines
    return lines


async def _send_in_chunks(file: OpenLocalFile, offset: int, count: int | None, cycle: DownloadCycle) -> None:
    """Send a file without a Content-Length: a path send that promised none has to be framed."""
    size = file.metadata.size or 0
    async for chunk in file.stream(ByteRange(min(offset, size), size if count is None else offset + count)):
        await cycle.send({"type": "http.response.body", "body": chunk, "more_body": True})
