"""A real uvicorn in the test's own event loop, and a raw client that sees every byte of an answer."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send


def make_old(directory: Path) -> None:
    """Give all files below a directory a time of long ago: one of this very second has no Last-Modified yet."""
    for file in directory.rglob("*"):
        if file.is_file():
            os.utime(file, (1_700_000_000,) * 2)


@dataclass(frozen=True)
class Answer:
    """One response as it came over the socket."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    """Whether the body has all that its framing promised."""


class _Server(uvicorn.Server):
    """uvicorn's server, without its naps of 0.1 s: it ends as soon as its last connection and its last task have."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._end = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._end.set()

    async def main_loop(self) -> None:
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), 0.1)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in (*self.servers, *(sockets or ())):
            listening.close()
        if await self._ended(10):  # the loop notices in its next rounds what a client has closed
            return
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if not await self._ended(1000):
            await super().shutdown(sockets)

    async def _ended(self, rounds: int) -> bool:
        """Return whether nothing is left of any connection after at most so many rounds of the loop."""
        for _ in range(rounds):
            if not (self.server_state.connections or self.server_state.tasks):
                return True
            await asyncio.sleep(0)
        return False


@contextlib.asynccontextmanager
async def uvicorn_for(
    app: ASGIApp, *, sockets: list[socket.socket] | None = None, **options: Any
) -> AsyncIterator[uvicorn.Server]:
    """Serve `app` on open sockets, or where the options of uvicorn say, and give the server."""
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, **{"lifespan": "off", **options}))
    task = asyncio.create_task(server.serve(sockets=sockets))
    while not server.started:
        await asyncio.sleep(0)
        if task.done():
            task.result()
    try:
        yield server
    finally:
        server.end()
        await task


@contextlib.asynccontextmanager
async def live(app: ASGIApp, **options: Any) -> AsyncIterator[int]:
    """Serve `app` on a free port of the loopback, and give the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with uvicorn_for(app, sockets=[listener], **options):
            yield int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """Serve the service by our protocol on a free port, within its lifespan, and give the port."""
    from downloadview_async.asgi.server import DownloadProtocol

    async with app.router.lifespan_context(app), live(app, http=DownloadProtocol) as port:
        yield port


@contextlib.asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **options: Any
) -> AsyncIterator[int]:
    """Give each connection to a free port of the loopback to `serve`, and give the port.

    A connection is closed when `serve` returns, or when the client leaves while it reads or writes.
    """

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0, **options) as server:
        yield int(server.sockets[0].getsockname()[1])


async def ask(port: int, path: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> Answer:
    """Send one request and read the whole answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return await ask_raw(port, ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape"), method=method)


class Watched:
    """An application whose answer to one client is seen to end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            self._ended.set()

    async def ends_when_the_client_leaves(self, port: int, path: str) -> None:
        """Begin a download that is larger than all buffers, leave, and wait for the application to end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        await reader.readexactly(1 << 20)
        assert not self._ended.is_set()
        writer.close()
        await asyncio.wait_for(self._ended.wait(), 20)


async def resumes_only_what_was_begun(port: int, path: str, content: bytes) -> None:
    """Ask for the rest of a file, of which `content` is all, by its own validator and by those of other versions."""
    etag = (await ask(port, path)).headers["etag"]
    part = await ask(port, path, headers={"Range": "bytes=4-", "If-Range": etag})
    assert (part.status, part.body, part.headers["etag"]) == (206, content[4:], etag)
    for other in ('"another"', f"W/{etag}", "Mon, 01 Jan 2001 00:00:00 GMT"):
        whole = await ask(port, path, headers={"Range": "bytes=4-", "If-Range": other})
        assert (whole.status, whole.body) == (200, content), other


async def ask_raw(port: int, request: bytes, *, method: str = "GET") -> Answer:
    """Send bytes, and read until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        received = bytearray()
        with contextlib.suppress(ConnectionError):
            while block := await reader.read(1 << 16):
                received += block
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return parse(bytes(received), method=method)


async def ask_in_a_row(port: int, paths: Sequence[str]) -> list[int]:
    """Send requests for files one after another, without waiting for the answers, and return their statuses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    statuses = []
    try:
        writer.write("".join(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n" for path in paths).encode())
        for _ in paths:
            head = await reader.readuntil(b"\r\n\r\n")
            answer = parse(head)
            await reader.readexactly(int(answer.headers["content-length"]))
            statuses.append(answer.status)
    finally:
        writer.close()
    return statuses


def parse(received: bytes, *, method: str = "GET") -> Answer:
    """Read an answer by its framing."""
    head, _, body = received.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        assert name.lower() not in headers, f"two {name} fields"
        headers[name.lower()] = value.strip()
    status = int(status_line.split(" ")[1])
    if method == "HEAD" or status in (204, 304):
        return Answer(status, headers, body, body == b"")
    if headers.get("transfer-encoding") == "chunked":
        return Answer(status, headers, *_dechunked(body))
    return Answer(status, headers, body, len(body) == int(headers.get("content-length", -1)))


def _dechunked(body: bytes) -> tuple[bytes, bool]:
    whole, place = bytearray(), 0
    while (end := body.find(b"\r\n", place)) >= 0:
        start, size = end + 2, int(body[place:end], 16)
        if size == 0:
            return bytes(whole), body[start:] == b"\r\n"
        whole += body[start : start + size]
        place = start + size + 2
    return bytes(whole), False
