"""Connections to upstreams that read from the kernel only the bytes that are needed.

The transport of an event loop reads ahead: uvloop's drains the whole buffer of the kernel, several MiB for each
download whose client is slower than its upstream. Here, a slow client slows the upstream down through TCP.
"""

import select
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.abc
import httpcore2
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSAttribute, TLSStream

_BROKEN = (
    OSError,
    OverflowError,
    ssl.SSLError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
)


class SocketStream(anyio.abc.ByteStream):
    """A connected, non-blocking socket as a stream of bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Return nothing: callers have the socket itself."""
        return {}

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return the next bytes. Raises `EndOfStream`, or `OSError` from the socket."""
        await checkpoint()
        while True:
            try:
                received = self.connection.recv(max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self.connection)
                continue
            if not received:
                raise anyio.EndOfStream
            return received

    async def send(self, item: bytes) -> None:
        """Send all the bytes. Raises `OSError` from the socket."""
        await checkpoint()
        left = memoryview(item)
        while left:
            try:
                left = left[self.connection.send(left) :]
            except BlockingIOError:
                await anyio.wait_writable(self.connection)

    async def send_eof(self) -> None:
        """Shut down the sending side."""
        self.connection.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        """Close the socket."""
        if self.connection.fileno() >= 0:
            anyio.notify_closing(self.connection)
            self.connection.close()


class Connection(httpcore2.AsyncNetworkStream):
    """A `SocketStream`, or TLS over one, with the interface, timeouts (seconds) and errors of httpcore."""

    def __init__(self, stream: anyio.abc.ByteStream, raw: socket.socket) -> None:
        self._stream = stream
        self._raw = raw
        self.has_answered = False
        """Whether a byte was received after the last one was sent."""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return the next bytes; b"" at the end."""
        with _as_httpcore_errors(httpcore2.ReadTimeout, httpcore2.ReadError), anyio.fail_after(timeout):
            try:
                received = await self._stream.receive(max_bytes)
            except anyio.EndOfStream:
                return b""
        self.has_answered = True
        return received

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all the bytes."""
        self.has_answered = False
        with _as_httpcore_errors(httpcore2.WriteTimeout, httpcore2.WriteError), anyio.fail_after(timeout):
            await self._stream.send(buffer)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "Connection":
        """Return the same connection with TLS, after the certificate was checked against the name of the server."""
        with _as_httpcore_errors(httpcore2.ConnectTimeout, httpcore2.ConnectError):
            try:
                with anyio.fail_after(timeout):
                    secured = await TLSStream.wrap(
                        self._stream,
                        ssl_context=ssl_context,
                        hostname=server_hostname,
                        standard_compatible=False,
                        server_side=False,
                    )
                # If the request has just been cancelled, it ends here, where the socket is closed. In httpcore's next
                # step, the connection would stay in the pool for ever, open and unusable.
                await checkpoint()
            except BaseException:
                self._raw.close()
                raise
        return Connection(secured, self._raw)

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore needs to know: whether an idle connection has bytes to read, and its TLS object."""
        if info == "is_readable":
            return _is_readable(self._raw)
        if info == "ssl_object":
            return self._stream.extra(TLSAttribute.ssl_object, None)  # noqa: S610
        return None


def _is_readable(raw: socket.socket) -> bool:
    if raw.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(raw, select.POLLIN)
    return bool(poll.poll(0))


async def connect(address: str, port: int, *, family: int, timeout: float | None, options: Iterable[Any]) -> Connection:
    """Return a connection to a literal address. Raises `httpcore2.ConnectError` or `httpcore2.ConnectTimeout`."""
    with _as_httpcore_errors(httpcore2.ConnectTimeout, httpcore2.ConnectError):
        raw = socket.socket(family, socket.SOCK_STREAM)
        raw.setblocking(False)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in options:
                raw.setsockopt(*option)
            with anyio.fail_after(timeout):
                try:
                    raw.connect((address, port))
                except BlockingIOError:
                    await anyio.wait_writable(raw)
            if code := raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, f"cannot connect to {address} port {port}")
            await checkpoint()  # see `Connection.start_tls`
        except BaseException:
            raw.close()
            raise
    return Connection(SocketStream(raw), raw)


@contextmanager
def _as_httpcore_errors(timed_out: type[Exception], broken: type[Exception]) -> Iterator[None]:
    try:
        yield
    except TimeoutError as exc:
        raise timed_out(str(exc)) from exc
    except _BROKEN as exc:
        raise broken(f"{type(exc).__name__}: {exc}") from exc
