"""Connections to upstreams that read from the kernel only the bytes that are needed.

The transport of an event loop reads ahead: uvloop's drains the whole buffer of the kernel, several MiB for each
download whose client is slower than its upstream. Here, a slow client slows the upstream down through TCP.

Each deadline is a time of `time.monotonic`.
"""

import asyncio
import math
import socket
import ssl
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import anyio
import anyio.abc
from anyio.streams.tls import TLSAttribute, TLSStream

from downloadview_async.errors import UpstreamError, UpstreamTimeout

_BROKEN = (
    OSError,
    OverflowError,
    ssl.SSLError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
)


class SocketStream(anyio.abc.ByteStream):
    """A connected, non-blocking socket as a stream of bytes. deadline: after it, nothing is waited for any more."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.deadline = math.inf

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Return nothing: callers have the socket itself."""
        return {}

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return the next bytes. Raises `EndOfStream`, `UpstreamTimeout`, or `OSError` from the socket."""
        while True:
            await _wait(self.raw, self.deadline)
            try:
                received = self.raw.recv(max_bytes)
            except BlockingIOError:
                continue
            if not received:
                raise anyio.EndOfStream
            return received

    async def send(self, item: bytes) -> None:
        """Send all the bytes. Raises `UpstreamTimeout`, or `OSError` from the socket."""
        left = memoryview(item)
        while left:
            try:
                left = left[self.raw.send(left) :]
            except BlockingIOError:
                await _wait(self.raw, self.deadline, to_write=True)

    async def send_eof(self) -> None:
        """Shut down the sending side."""
        self.raw.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        """Close the socket."""
        self.raw.close()


class Connection:
    """A connected socket, or TLS over one."""

    def __init__(self, raw: socket.socket) -> None:
        self._socket = SocketStream(raw)
        self._stream: SocketStream | TLSStream = self._socket
        self.has_answered = False
        """Whether a byte was received after the last one was sent."""

    async def start_tls(self, context: ssl.SSLContext, host: str, deadline: float) -> None:
        """Begin TLS, and check the certificate against the name of the host."""
        self._socket.deadline = deadline
        try:
            self._stream = await TLSStream.wrap(
                self._socket, ssl_context=context, hostname=host, standard_compatible=False, server_side=False
            )
        except _BROKEN as exc:
            raise UpstreamError(f"TLS with {host!r} failed: {type(exc).__name__}: {exc}") from exc

    async def send(self, data: bytes, deadline: float) -> None:
        """Send all the bytes. Raises `UpstreamError`, and `UpstreamTimeout` at the deadline."""
        self._socket.deadline = deadline
        self.has_answered = False
        try:
            await self._stream.send(data)
        except _BROKEN as exc:
            raise UpstreamError(f"the connection broke: {type(exc).__name__}: {exc}") from exc

    async def receive(self, max_bytes: int, deadline: float) -> bytes:
        """Return the next bytes; b"" at the end. Raises `UpstreamError`, and `UpstreamTimeout` at the deadline."""
        self._socket.deadline = deadline
        try:
            received = await self._stream.receive(max_bytes)
        except anyio.EndOfStream:
            return b""
        except _BROKEN as exc:
            raise UpstreamError(f"the connection broke: {type(exc).__name__}: {exc}") from exc
        self.has_answered = True
        return received

    def receive_nowait(self, max_bytes: int) -> bytes:
        """Return what has arrived; b"" if that is nothing, if the connection has ended, or for TLS."""
        if self._stream is not self._socket:
            return b""
        try:
            return self._socket.raw.recv(max_bytes)
        except OSError:
            return b""

    @property
    def is_quiet(self) -> bool:
        """Whether the other side has neither closed the connection nor sent bytes that were not received."""
        try:
            self._socket.raw.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            pass
        except OSError:
            return False
        else:
            return False
        if isinstance(self._stream, TLSStream):
            try:
                self._stream.extra(TLSAttribute.ssl_object).read(1)  # noqa: S610
            except ssl.SSLWantReadError:
                return True
            except (OSError, ssl.SSLError):
                pass
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self._socket.raw.close()


async def connect(address: str, port: int, *, family: int, deadline: float) -> Connection:
    """Return a connection to a literal address. Raises `UpstreamError`, and `UpstreamTimeout` at the deadline."""
    try:
        raw = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:  # there is no free descriptor
        raise UpstreamError(f"{type(exc).__name__}: {exc}") from exc
    raw.setblocking(False)
    try:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            raw.connect((address, port))
        except BlockingIOError:
            await _wait(raw, deadline, to_write=True)
        if code := raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, f"cannot connect to {address} port {port}")
    except BaseException as exc:
        raw.close()
        if isinstance(exc, _BROKEN):
            raise UpstreamError(f"{type(exc).__name__}: {exc}") from exc
        raise
    return Connection(raw)


async def _wait(raw: socket.socket, deadline: float, *, to_write: bool = False) -> None:
    """Wait until a socket can be read or written. Raises `UpstreamTimeout` at the deadline.

    On asyncio, this costs a third of what `anyio.wait_readable` and `anyio.fail_after` do.
    """
    seconds = deadline - monotonic()
    if _is_asyncio():
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        (loop.add_writer if to_write else loop.add_reader)(raw, _end, waiter, True)
        timer = loop.call_later(max(seconds, 0), _end, waiter, False)
        try:
            is_ready = await waiter
        finally:
            timer.cancel()
            (loop.remove_writer if to_write else loop.remove_reader)(raw)
    else:
        with anyio.move_on_after(seconds) as scope:
            await (anyio.wait_writable if to_write else anyio.wait_readable)(raw)
        is_ready = not scope.cancelled_caught
    if not is_ready:
        raise UpstreamTimeout(f"the upstream {'takes' if to_write else 'sends'} nothing")


def _is_asyncio() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


def _end(waiter: "asyncio.Future[bool]", is_ready: bool) -> None:
    if not waiter.done():
        waiter.set_result(is_ready)
