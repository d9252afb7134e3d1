"""The protocol that sends by `sendfile`: every loop and socket, cold files, and clients that do not read."""

import asyncio
import contextlib
import errno
import functools
import os
import re
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

import downloadview_async as dv
from downloadview_async.asgi.delivery import SMALL
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.asgi.uvicorn import sendfile
from downloadview_async.asgi.uvicorn.turns import turn
from downloadview_async.sources.local import open_file
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.local.refused_calls import Refusals
from tests.asgi.test_slow_disk import FILES, server_on
from tests.live import ask, ask_raw, live, make_old, parse, uvicorn_for
from tests.servers import Server, free_port, serving
from tests.slow_fs import SlowDisk, why_not

MIB = 1 << 20
LOOPS = ["asyncio", "uvloop"]
pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["disk", "tmpfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    if not Path("/dev/shm").is_dir():
        pytest.skip("tmpfs: there is no /dev/shm")
    path = Path("/dev/shm") / f"downloadview-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


on_disk = pytest.mark.parametrize("root", ["disk"], indirect=True)
"""Where the file system makes no difference."""


@pytest.fixture
def big(root: Path) -> Path:
    path = root / "big.bin"
    path.write_bytes(os.urandom(MIB) * 16 + b"the end")
    return path


async def passed_on(request: Any, call_next: Any) -> Any:
    return await call_next(request)


def app_for(root: Path, *middleware: Middleware) -> Starlette:
    make_old(root)

    async def response(request: Any) -> FileResponse:
        return FileResponse(root / request.path_params["name"])

    async def local(request: Any) -> dv.DownloadResponse:
        return dv.DownloadResponse(dv.LocalFile(root / request.path_params["name"]))

    async def row(name: str) -> SimpleNamespace:
        return SimpleNamespace(file=name, t="application/x-row")

    return Starlette(
        routes=[
            Route("/ours/{path:path}", dv.Download(dv.PathSource(root))),
            Route("/storage/{path:path}", dv.Download(dv.StorageSource(dv.DirectoryStorage(root)))),
            Route(
                "/object/{path:path}",
                dv.Download(dv.ObjectSource(row, source=dv.PathSource(root), mime_type_field="t")),
            ),
            Route("/local/{name}", local),
            Route("/response/{name}", response),
            Mount("/static", StaticFiles(directory=root)),
        ],
        middleware=list(middleware),
    )


WRAPPED = {
    "plain": [],
    "gzip": [Middleware(GZipMiddleware)],
    "basehttp": [Middleware(BaseHTTPMiddleware, dispatch=passed_on)] * 2,
    "all": [Middleware(BaseHTTPMiddleware, dispatch=passed_on), Middleware(GZipMiddleware)],
}


@pytest.mark.parametrize("wrapped", WRAPPED)
async def test_whole_files_and_ranges_of_every_response(big: Path, wrapped: str) -> None:
    content = big.read_bytes()
    async with live(app_for(big.parent, *WRAPPED[wrapped]), http=DownloadProtocol) as port:
        for route in ("ours", "response", "static"):
            whole = await ask(port, f"/{route}/big.bin")
            assert (whole.status, whole.complete, whole.body == content) == (200, True, True), route
            part = await ask(port, f"/{route}/big.bin", headers={"Range": "bytes=1000000-9000000"})
            assert (part.status, part.complete, part.body == content[1000000:9000001]) == (206, True, True), route
            head = await ask(port, f"/{route}/big.bin", method="HEAD")
            assert (head.headers["content-length"], head.body) == (str(len(content)), b""), route


async def test_the_bytes_do_not_come_by_way_of_python(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    original = os.sendfile

    def counted(*args: Any) -> int:
        sent.append(original(*args))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", counted)
    async with live(app_for(big.parent), http=DownloadProtocol) as port:
        for route in ("ours", "storage", "object", "local", "response", "static"):
            sent.clear()
            await ask(port, f"/{route}/big.bin")
            assert sum(sent) > 0.99 * big.stat().st_size  # the transport sends next to nothing
        sent.clear()
        await ask(port, "/ours/big.bin", headers={"Range": "bytes=5-3000004"})
        assert sum(sent) == 3_000_000


async def test_where_sendfile_is_refused_each_byte_is_read_once(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is slow, so that the kernel takes less than what was read."""
    read = largest = 0
    pread = os.pread

    def refuse(*args: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def counted(*args: Any) -> bytes:
        nonlocal read, largest
        read += len(chunk := pread(*args))
        largest = max(largest, len(chunk))
        return chunk

    monkeypatch.setattr(sendfile, "_refusals", Refusals("sendfile"))
    monkeypatch.setattr(os, "sendfile", refuse)
    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(open_file, "_RWF_NOWAIT", None)  # all is read by `pread` then
    os.truncate(big, 4 * MIB)
    async with live(app_for(big.parent), http=DownloadProtocol) as port:
        client = small_buffers(port)
        await asyncio.get_running_loop().sock_sendall(client, get("/ours/big.bin", CLOSE))
        answer = parse(await sipped(client, 1 << 16, 0.001))
    assert answer.body == big.read_bytes()
    assert read == 4 * MIB
    assert largest == CHUNK_SIZE  # which a client that stalls would hold


@on_disk
@pytest.mark.parametrize(("is_recent", "others_wait"), [(False, False), (False, True), (True, False)])
async def test_windows_fit_what_the_socket_takes(
    big: Path, is_recent: bool, others_wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is shorter if other answers wait for their turns. A file that may be changing is copied."""
    app = app_for(big.parent)
    if is_recent:
        os.utime(big)
    lengths: list[int] = []
    original = os.sendfile

    def counted(*args: Any) -> int:
        lengths.append(args[3])
        return original(*args)

    monkeypatch.setattr(os, "sendfile", counted)
    async with live(app, http=DownloadProtocol) as port:
        loop = asyncio.get_running_loop()
        turns = [turn(loop) for _ in range(10_000 if others_wait else 0)]
        assert (await ask(port, "/ours/big.bin")).body == big.read_bytes()
        await asyncio.gather(*turns)
    if is_recent:
        assert not lengths
    else:
        assert lengths[0] == (CHUNK_SIZE if others_wait else sendfile._FIRST)
        assert lengths[0] < max(lengths) <= sendfile._TURN


@on_disk
async def test_a_cold_file_is_sent_by_threads_in_short_windows(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a slow disk reads a long one, no call to the disk ends, so that it would look like one that hangs."""
    content = big.read_bytes()
    with big.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    in_threads: list[int] = []
    original = os.sendfile

    def counted(*args: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            in_threads.append(args[3])
        return original(*args)

    monkeypatch.setattr(os, "sendfile", counted)
    async with live(app_for(big.parent), http=DownloadProtocol) as port:
        assert (await ask(port, "/ours/big.bin")).body == content
    assert in_threads
    assert max(in_threads) <= CHUNK_SIZE


@on_disk
async def test_requests_that_arrive_together_are_answered_in_order(big: Path) -> None:
    content = big.read_bytes()
    request = b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nRange: bytes=%d-%d\r\n%s\r\n"
    requests = [(n * MIB, n * MIB + 100_000 + n) for n in range(8)]
    async with live(app_for(big.parent), http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MIB)
        lines = [request % (start, stop, b"") for start, stop in requests]
        writer.write(b"".join(lines))
        for start, stop in requests:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 206 " in head
            assert await reader.readexactly(stop + 1 - start) == content[start : stop + 1]
        writer.close()


@on_disk
async def test_a_unix_socket(big: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with uvicorn_for(app_for(big.parent), uds=path, http=DownloadProtocol):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = parse(await reader.read())
        writer.close()
    assert answer.complete
    assert answer.body == big.read_bytes()


@on_disk
async def test_tls_is_served_in_chunks(big: Path, certificate: dict[str, str]) -> None:
    async with live(app_for(big.parent), http=DownloadProtocol, **certificate) as port:
        trusting = ssl.create_default_context(cafile=certificate["ssl_certfile"])
        trusting.check_hostname = False
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = parse(await reader.read())
        writer.close()
    assert answer.complete
    assert answer.body == big.read_bytes()


@on_disk
async def test_a_path_send_without_a_length_is_framed(big: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(big)})

    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/")
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.complete
    assert answer.body == big.read_bytes()


@on_disk
async def test_a_path_send_of_less_than_was_promised_aborts(big: Path) -> None:
    length = str(big.stat().st_size + 1).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.pathsend", "path": str(big)})

    async with live(app, http=DownloadProtocol) as port:
        assert not (await ask(port, "/")).complete
        assert not (await ask_raw(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")).complete


@on_disk
async def test_a_response_that_has_ended_lends_nothing(big: Path) -> None:
    """Some middleware cancels the response while its message is still on the way to the server."""
    ended: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        messages: list[Any] = []
        kept = asyncio.Event()

        async def keep(message: Any) -> None:
            messages.append(message)
            kept.set()

        inner = asyncio.create_task(dv.DownloadResponse(dv.LocalFile(big))(scope, receive, keep))
        while len(messages) < 2:
            kept.clear()
            await kept.wait()
        inner.cancel()
        await asyncio.gather(inner, return_exceptions=True)
        other = os.open("/etc/passwd", os.O_RDONLY)  # takes the number that is free now
        try:
            for message in messages:
                await send(message)
        except dv.TransferAborted:
            ended.append(True)
            raise
        finally:
            os.close(other)

    async with live(app, http=DownloadProtocol) as port:
        answer = await ask(port, "/")
    assert not answer.complete
    assert answer.body == b""
    assert ended == [True]


@on_disk
async def test_a_path_that_cannot_be_opened_aborts(big: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.pathsend", "path": f"{big}.none"})

    async with live(app, http=DownloadProtocol) as port:
        assert not (await ask(port, "/")).complete


def small_buffers(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    return client


def endless() -> Any:
    while True:
        yield b"x" * 65536


@on_disk
@pytest.mark.parametrize("path", ["/ours/big.bin", "/endless/x"])
async def test_a_client_that_stops_reading_is_reset_and_holds_nothing(
    big: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_for(big.parent)
    source = dv.VirtualSource(lambda name: dv.VirtualFile(endless, name=name))
    app.router.routes.append(Route("/endless/{name}", dv.Download(source)))
    http = functools.partial(DownloadProtocol, stall_seconds=0.2, minimum_rate=1000)
    async with live(app, http=http) as port:
        await ask(port, "/none")
        before = len(os.listdir("/proc/self/fd"))
        client = small_buffers(port)
        client.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        while "took less than 1000 bytes a second" not in caplog.text:
            await asyncio.sleep(0.01)
        while len(os.listdir("/proc/self/fd")) > before + 1:  # the client's own
            await asyncio.sleep(0.01)
        with pytest.raises(ConnectionResetError):
            await drain(client)
        client.close()


async def drain(client: socket.socket) -> int:
    received = 0
    while block := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
        received += len(block)
    return received


async def sipped(client: socket.socket, size: int, pause: float) -> bytes:
    """Read all that is sent, so many bytes at a time and with a pause after each."""
    received = bytearray()
    while block := await asyncio.get_running_loop().sock_recv(client, size):
        received += block
        await asyncio.sleep(pause)
    client.close()
    return bytes(received)


@on_disk
async def test_a_client_that_reads_slowly_but_enough_gets_everything(big: Path) -> None:
    os.truncate(big, MIB)
    http = functools.partial(DownloadProtocol, stall_seconds=1, minimum_rate=1000)
    async with live(app_for(big.parent), http=http) as port:
        client = small_buffers(port)
        client.send(b"GET /ours/big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = await sipped(client, 1 << 14, 0.005)
    assert parse(received).complete


@pytest.mark.parametrize("asked", ["", "GET /ours/small.bin HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_a_head_that_never_comes_to_its_end(tmp_path: Path, asked: str) -> None:
    (tmp_path / "small.bin").write_bytes(b"the content")
    http = functools.partial(DownloadProtocol, stall_seconds=0.2)
    async with live(app_for(tmp_path), http=http) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if asked:
            writer.write(asked.encode())
            await reader.readuntil(b"the content")
        writer.write(b"GET /ours/small.bin HTTP/1.1\r\nX-Slow: ")
        assert await reader.read() == b""
        writer.close()


async def test_what_an_idle_client_leaves_in_the_kernel_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "small.bin").write_bytes(bytes(SMALL))
    http = functools.partial(DownloadProtocol, stall_seconds=0.3, minimum_rate=1000)
    async with live(app_for(tmp_path), http=http, timeout_keep_alive=0.1) as port:
        client = small_buffers(port)
        client.send(b"GET /ours/small.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        while "took less than 1000 bytes a second" not in caplog.text:
            await asyncio.sleep(0.01)
        with pytest.raises(ConnectionResetError):
            await drain(client)
        client.close()


async def test_an_idle_client_that_takes_its_time_gets_what_it_was_sent(tmp_path: Path) -> None:
    (tmp_path / "small.bin").write_bytes(bytes(SMALL))
    http = functools.partial(DownloadProtocol, stall_seconds=0.3, minimum_rate=1000)
    async with live(app_for(tmp_path), http=http, timeout_keep_alive=0.1) as port:
        client = small_buffers(port)
        client.send(b"GET /ours/small.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        received = await sipped(client, 1 << 10, 0.02)
    assert parse(received).body == bytes(SMALL)


Passing = Callable[[Message, Send], Awaitable[None]]
"""What a middleware does with a message of the application that is on its way to the server."""


class Between:
    """A middleware that does `passing` with each message."""

    def __init__(self, app: ASGIApp, passing: Passing) -> None:
        self.app = app
        self.passing = passing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, functools.partial(self._pass, send))

    async def _pass(self, send: Send, message: Message) -> None:
        await self.passing(message, send)


def in_start(change: Callable[[Message], Any]) -> Passing:
    async def passing(message: Message, send: Send) -> None:
        if message["type"] == "http.response.start":
            change(message)
        await send(message)

    return passing


def in_body(*pieces: Callable[[bytes], bytes]) -> Passing:
    async def passing(message: Message, send: Send) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        for number, piece in enumerate(pieces, 1):
            await send({**message, "body": piece(message["body"]), "more_body": number < len(pieces)})

    return passing


async def in_a_task(message: Message, send: Send) -> None:
    async def sent() -> None:
        await send(message)

    await asyncio.create_task(sent())


async def as_a_coroutine(message: Message, send: Send) -> None:
    await asyncio.create_task(send(message))  # type: ignore[arg-type]


async def late(message: Message, send: Send) -> None:
    if message["type"] == "http.response.body":
        for _ in range(20):
            await asyncio.sleep(0)
    await send(message)


async def raising(message: Message, send: Send) -> None:
    if message["type"] == "http.response.body":
        raise RuntimeError("between start and body")
    await send(message)


async def twice(message: Message, send: Send) -> None:
    await send(message)
    await send(message)


def without(name: bytes) -> Passing:
    return in_start(lambda start: start.update(headers=[pair for pair in start["headers"] if pair[0] != name]))


def with_header(name: bytes, value: bytes) -> Passing:
    return in_start(lambda start: start["headers"].append((name, value)))


def changed(name: bytes, value: bytes) -> Passing:
    return in_start(lambda start: start.update(headers=[(n, value if n == name else v) for n, v in start["headers"]]))


# What a middleware may do with the start and the body of a small file.
PASSING: dict[str, Passing] = {
    "adds a header": with_header(b"x-more", b"1"),
    "adds it to a new list": in_start(lambda start: start.update(headers=[*start["headers"], (b"x-more", b"1")])),
    "adds it with capitals": with_header(b"X-More", b"1"),
    "adds a cookie": with_header(b"set-cookie", b"a=b"),
    "adds to the front": in_start(lambda start: start["headers"].insert(0, (b"x-more", b"1"))),
    "adds Connection: close": with_header(b"connection", b"close"),
    "changes a header": changed(b"content-type", b"text/x-other"),
    "removes a header": without(b"etag"),
    "removes the length": without(b"content-length"),
    "changes the order": in_start(lambda start: start["headers"].reverse()),
    "removes all headers": in_start(lambda start: start.pop("headers")),
    "gives an iterator": in_start(lambda start: start.update(headers=iter(start["headers"]))),
    "gives a generator": in_start(lambda start: start.update(headers=(p for p in start["headers"] if p[0] != b"etag"))),
    "gives a tuple": in_start(lambda start: start.update(headers=tuple(start["headers"]))),
    "gives lists": in_start(lambda start: start.update(headers=[list(pair) for pair in start["headers"]])),
    "changes the status": in_start(lambda start: start.update(status=203)),
    "changes the body": in_body(lambda body: body.swapcase()),
    "splits the body": in_body(lambda body: body[:3], lambda body: body[3:]),
    "ends the body later": in_body(lambda body: body, lambda _: b""),
    "begins the body later": in_body(lambda _: b"", lambda body: body),
    "sends late": late,
    "sends in a task": in_a_task,
    "sends as a coroutine": as_a_coroutine,
}
# All of the head may come, or nothing: what is right about these is that nobody takes the answer for whole.
BREAKING: dict[str, Passing] = {
    "shortens the body": in_body(lambda body: body[:-1]),
    "lengthens the body": in_body(lambda body: body + b"!"),
    "lengthens it later": in_body(lambda body: body, lambda _: b"!"),
    "changes the length": changed(b"content-length", b"7"),
    "raises between": raising,
    "starts twice": twice,
    "adds a line break": with_header(b"x-more", b"1\r\nx-smuggled: 1"),
    "adds a name that is none": with_header(b"x more", b"1"),
}


async def talk(port: int, request: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes, without its dates."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MIB)
    writer.write(request)
    with contextlib.suppress(ConnectionError):
        received = await asyncio.wait_for(reader.read(-1), 30)
        writer.close()
    return dateless(received)


def dateless(received: bytes) -> bytes:
    return re.sub(rb"\r\ndate: [A-Za-z]{3}, [^\r]{20} GMT\r\n", b"\r\ndate: now\r\n", received)


def get(path: str = "/ours/small.bin", *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", *lines, "\r\n"]).encode()


CLOSE = "Connection: close"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.bin"
    path.write_bytes(b"the content")
    return path


@contextlib.asynccontextmanager
async def both(app: ASGIApp, **options: Any) -> AsyncIterator[tuple[int, int]]:
    """Serve by uvicorn's own protocol and by ours."""
    async with live(app, http="httptools", **options) as stock, live(app, http=DownloadProtocol, **options) as ours:
        yield stock, ours


async def as_stock(app: ASGIApp, request: bytes, **options: Any) -> tuple[bytes, bytes]:
    """Return what uvicorn's own protocol answers, and what ours does."""
    async with both(app, **options) as (stock, ours):
        return await talk(stock, request), await talk(ours, request)


def each_below_its_name(root: Path, passing: Mapping[str, Passing]) -> Starlette:
    inner = app_for(root)
    return Starlette(routes=[Mount(f"/{name}", Between(inner, each)) for name, each in passing.items()])


async def test_what_a_middleware_does_is_what_arrives(small: Path) -> None:
    async with both(each_below_its_name(small.parent, PASSING)) as (stock_port, our_port):
        for name in PASSING:
            for route in ("ours", "local"):
                path = f"/{name}/{route}/small.bin".replace(" ", "%20")
                requests = get(path) + get(path) + get(path, CLOSE)
                stock = await talk(stock_port, requests)
                assert stock.startswith(b"HTTP/1.1 20"), name
                assert await talk(our_port, requests) == stock, name


async def test_what_a_middleware_breaks_is_not_whole(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with both(each_below_its_name(small.parent, BREAKING)) as (stock_port, our_port):
        for name in BREAKING:
            path = f"/{name}/ours/small.bin".replace(" ", "%20")
            caplog.clear()
            stock = await talk(stock_port, get(path) + get(path, CLOSE))
            failures = caplog.text.count("Exception in ASGI application")
            assert failures == 1 or name == "adds a name that is none"  # which old versions of uvicorn let pass
            caplog.clear()
            ours = await talk(our_port, get(path) + get(path, CLOSE))
            assert caplog.text.count("Exception in ASGI application") == failures, name
            assert stock.startswith(ours), name  # a head that has not left yet does not leave without its body
            assert b"smuggled" not in ours, name
            assert ours == b"" or parse(ours).complete == parse(stock).complete, name


async def test_heads_are_uvicorns_own_to_the_byte(small: Path) -> None:
    requests = [
        get(),
        get(),
        get(method="HEAD"),
        get("/ours/none"),
        get("/ours/small.bin", "Range: bytes=2-4"),
        get("/local/small.bin", "Connection: keep-alive"),
        get("/static/small.bin"),
        get(method="POST"),
    ]
    last = [
        get("/ours/small.bin", CLOSE),
        get("/ours/small.bin", CLOSE, method="HEAD"),
        get("/ours/small.bin", "Connection: Close"),
        get("/ours/small.bin", version="1.0"),
        get("/ours/small.bin", method="HEAD", version="1.0"),
        get("/ours/small.bin", "Connection: keep-alive", version="1.0"),
    ]
    async with both(app_for(small.parent)) as (stock_port, our_port):
        for end in last:
            stock = await talk(stock_port, b"".join([*requests, end]))
            assert stock.count(b"HTTP/1.1 ") == len(requests) + 1
            assert await talk(our_port, b"".join([*requests, end])) == stock


@pytest.mark.parametrize(
    "options",
    [
        {"server_header": False},
        {"date_header": False, "server_header": False},
        {"headers": [("x-server", "1"), ("x-server", "2")]},
        {"headers": [("connection", "close")]},
        {"limit_concurrency": 1},
    ],
    ids=["no server", "neither", "more", "close", "too many"],
)
async def test_lines_of_the_server_are_uvicorns_own(small: Path, options: dict[str, Any]) -> None:
    stock, ours = await as_stock(app_for(small.parent), get() + get("/ours/small.bin", CLOSE), **options)
    assert stock.startswith(b"HTTP/1.1 ")
    assert ours == stock


@pytest.mark.parametrize("wrapped", WRAPPED)
async def test_small_files_of_every_response(tmp_path: Path, wrapped: str) -> None:
    (tmp_path / "small.txt").write_bytes(b"the content " * 200)  # worth compressing
    (tmp_path / "small.bin").write_bytes(b"the content")
    requests = [get(f"/{route}/small.{kind}") for route in ("ours", "local") for kind in ("txt", "bin")]
    requests += [get("/ours/small.txt", "Accept-Encoding: gzip"), get("/ours/small.bin", "Accept-Encoding: gzip")]
    app = app_for(tmp_path, *WRAPPED[wrapped])
    stock, ours = await as_stock(app, b"".join([*requests, get("/ours/none", CLOSE)]))
    assert stock.count(b"HTTP/1.1 200") == len(requests)
    assert ours == stock


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_offloaded_answer_is_uvicorns_own_to_the_byte(small: Path, method: str) -> None:
    backend = dv.XAccelRedirect([dv.Rule(str(small.parent), "/_files/")])
    app = app_for(small.parent, Middleware(dv.OffloadMiddleware, backend=backend))
    requests = get("/ours/small.bin", method=method) * 2 + get("/ours/small.bin", CLOSE, method=method)
    stock, ours = await as_stock(app, requests)
    assert stock.lower().count(b"x-accel-redirect: /_files/small.bin\r\n") == 3
    assert ours == stock


NO_HEADERS = [
    ("x-more", "1\r\nx-smuggled: 1"),
    ("x-more", "1\nx-smuggled: 1"),
    ("x-more", "\x00smuggled"),
    ("x-more", "smuggled\x7f"),
    ("x-more\r\nx-smuggled", "1"),
    ("x-more: 1\r\nx-smuggled", "1"),
    ("x-smuggled: 1", "2"),
    ("content-length: 5", "smuggled"),
    ("x smuggled", "1"),
]


async def test_what_is_no_header_never_arrives(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = dv.DownloadResponse(dv.LocalFile(small))
        name, value = NO_HEADERS[int(scope["path"][1:])]
        response.headers[name] = value
        await response(scope, receive, send)

    async with both(app) as (stock_port, our_port):
        for number, header in enumerate(NO_HEADERS):
            requests = get(f"/{number}") + get(f"/{number}", CLOSE)
            stock = await talk(stock_port, requests)
            caplog.clear()
            ours = await talk(our_port, requests)
            assert ours == stock, header
            if header[0] == "x-more":  # old versions of uvicorn let any name pass
                assert ours == b"", header
                assert caplog.text.count("Exception in ASGI application") == 1, header


def mixed(size: int) -> bytes:
    return b"".join(
        [
            get("/ours/small.bin"),
            get("/ours/big.bin"),
            get("/ours/small.bin", method="HEAD"),
            get("/response/big.bin"),
            get("/ours/big.bin", "Range: bytes=5-3000004"),
            get("/ours/small.bin"),
            get("/ours/big.bin", method="HEAD"),
            get("/ours/big.bin", f"Range: bytes={size - 5}-"),
            get("/ours/none"),
            get("/local/big.bin"),
            get("/ours/small.bin", CLOSE),
        ]
    )


@pytest.mark.parametrize("pieces", [1, 40])
async def test_small_and_large_answers_come_in_order(tmp_path: Path, pieces: int) -> None:
    (tmp_path / "small.bin").write_bytes(b"the content")
    (tmp_path / "big.bin").write_bytes(os.urandom(4 * MIB) + b"the end")
    for name in ("small.bin", "big.bin"):
        os.utime(tmp_path / name, (1_700_000_000, 1_700_000_000))  # a second that is over: both have a Last-Modified
    requests = mixed(4 * MIB + 7)
    app = app_for(tmp_path)
    async with live(app, http="httptools") as port:
        stock = await talk(port, requests)
    async with live(app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        received = asyncio.create_task(reader.read(-1))
        step = -(-len(requests) // pieces)
        for start in range(0, len(requests), step):
            writer.write(requests[start : start + step])
            await asyncio.sleep(0)  # some come while a file is being sent
        ours = await asyncio.wait_for(received, 30)
        writer.close()
    assert stock.count(b"HTTP/1.1 ") == 11
    assert dateless(ours) == stock


async def test_thousands_of_requests_in_one_packet(small: Path) -> None:
    count = 3000  # longer together than a head may be
    async with live(app_for(small.parent), http=DownloadProtocol) as port:
        received = await talk(port, get() * count + get("/ours/small.bin", CLOSE))
    assert received.count(b"HTTP/1.1 200 OK\r\n") == count + 1
    assert b"HTTP/1.1 4" not in received


async def test_a_request_behind_a_body_is_no_long_head(small: Path) -> None:
    body = b"x" * 200_000
    post = get("/ours/small.bin", f"Content-Length: {len(body)}", method="POST")
    async with live(app_for(small.parent), http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        last = get("/ours/small.bin", CLOSE)
        writer.write(post + body + last[:20])
        first = await reader.readuntil(b"\r\n\r\n")
        writer.write(last[20:])
        received = await asyncio.wait_for(reader.read(-1), 30)
        writer.close()
    assert b" 405 " in first
    assert b"HTTP/1.1 200 OK\r\n" in received


async def test_a_large_body_behind_a_request_is_answered_too(small: Path) -> None:
    async with live(app_for(small.parent), http=DownloadProtocol) as port:
        received = await talk(port, get() + get("/ours/small.bin", "Content-Length: 9000000", method="POST") + b"some")
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"405"]


async def test_the_date_and_the_lines_of_the_server_are_never_old(small: Path) -> None:
    states: list[Any] = []

    class Seen(DownloadProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            states.append(self.server_state)

    async with live(app_for(small.parent), http=Seen) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def date() -> bytes:
            writer.write(get())
            head = await reader.readuntil(b"the content")
            return re.findall(rb"\r\ndate: ([^\r]*)\r\n", head)[0]  # type: ignore[no-any-return]

        first = await date()
        for number in range(100):  # as uvicorn does each second
            states[0].default_headers = [(b"date", b"%d" % number)]
            if await date() == b"%d" % number:
                break
        else:
            pytest.fail("the lines are old")
        async with asyncio.timeout(30):
            while (now := await date()) == first or not now.endswith(b" GMT"):
                await asyncio.sleep(0.05)
        writer.close()


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(small: Path) -> None:
    loop = asyncio.get_running_loop()
    async with live(app_for(small.parent), http=DownloadProtocol, timeout_keep_alive=0.4) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = loop.time()
        while loop.time() - began < 1.2:
            writer.write(get())
            await reader.readuntil(b"the content")
            await asyncio.sleep(0.2)
        assert not reader.at_eof()
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


@pytest.mark.parametrize("asked", [b"", get(), get() * 2])
async def test_empty_lines_keep_no_connection(small: Path, asked: bytes) -> None:
    http = functools.partial(DownloadProtocol, stall_seconds=0.5)
    async with live(app_for(small.parent), http=http, timeout_keep_alive=0.2) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked)
        for _ in range(asked.count(b"GET")):
            await reader.readuntil(b"the content")
        closed = asyncio.create_task(reader.read())
        async with asyncio.timeout(30):
            while not closed.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"\r\n")
                    await writer.drain()
                await asyncio.sleep(0.05)
        with contextlib.suppress(ConnectionError):
            assert closed.result() == b""
        writer.close()


async def test_a_client_that_never_sends_anything_is_closed(small: Path) -> None:
    http = functools.partial(DownloadProtocol, stall_seconds=0.2)
    async with live(app_for(small.parent), http=http) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


@pytest.mark.parametrize("before", [b"", get()], ids=["first", "after a file"])
async def test_no_timer_closes_a_websocket(small: Path, before: bytes) -> None:
    if not (find_spec("websockets") or find_spec("wsproto")):
        pytest.skip("WebSocket: neither websockets nor wsproto is installed")

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    app = app_for(small.parent)
    app.router.routes.append(WebSocketRoute("/echo", echo))
    http = functools.partial(DownloadProtocol, stall_seconds=0.3)
    upgrade = get(
        "/echo",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    async with live(app, http=http, timeout_keep_alive=0.1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if before:
            writer.write(before)
            await reader.readuntil(b"the content")
        writer.write(upgrade)
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        for _ in range(4):
            await asyncio.sleep(0.2)
            writer.write(b"\x81\x82\0\0\0\0hi")
            assert await asyncio.wait_for(reader.readexactly(4), 30) == b"\x81\x02hi"
        writer.write(b"\x88\x82\0\0\0\0\x03\xe8")
        await asyncio.wait_for(reader.read(), 30)
        writer.close()


async def test_half_a_request_does_not_cut_off_the_answer_before_it(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    (tmp_path / "small.bin").write_bytes(b"the content")
    http = functools.partial(DownloadProtocol, stall_seconds=0.3, minimum_rate=1000)
    loop = asyncio.get_running_loop()
    last = get("/ours/small.bin", CLOSE)
    async with live(app_for(tmp_path), http=http) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 14)
        writer.write(get("/ours/big.bin") + get() + last[:20])
        received, began = bytearray(), loop.time()
        while loop.time() - began < 0.9:  # longer than half a request may wait
            received += await reader.read(1 << 14)
            await asyncio.sleep(0.02)
        writer.write(last[20:])
        received += await asyncio.wait_for(reader.read(-1), 30)
        writer.close()
    assert received.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("length", [None, b"5"])
async def test_a_file_that_has_no_room_in_its_answer_is_not_sent(
    tmp_path: Path, length: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def passing(message: Message, send: Send) -> None:
        if message["type"] != "http.response.start":
            await send(message)
        elif length is not None:
            headers = [(name, length if name == b"content-length" else value) for name, value in message["headers"]]
            await send({**message, "headers": headers})

    (tmp_path / "big.bin").write_bytes(bytes(MIB))
    app = app_for(tmp_path, Middleware(Between, passing=passing))
    async with live(app, http=DownloadProtocol) as port:
        received = await talk(port, get("/local/big.bin") + get("/local/big.bin"))
    assert received.startswith(b"HTTP/1.1 500 " if length is None else b"HTTP/1.1 200 ")
    assert len(received) < 1000
    assert "Exception in ASGI application" in caplog.text


async def test_a_client_that_leaves_while_others_wait_behind_it_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    caplog.set_level("ERROR")
    async with live(app_for(tmp_path), http=DownloadProtocol) as port:
        await ask(port, "/none")
        before = len(os.listdir("/proc/self/fd"))
        client = small_buffers(port)
        client.send(get("/ours/big.bin") * 3)
        await asyncio.get_running_loop().sock_recv(client, 100)
        client.close()
        async with asyncio.timeout(30):
            while len(os.listdir("/proc/self/fd")) > before:
                await asyncio.sleep(0.01)
    assert [record.message for record in caplog.records] == []


def how() -> str:
    """Return the name of the loop of this test, for a server of another process."""
    return "uvloop" if "uvloop" in type(asyncio.get_running_loop()).__module__ else "asyncio"


def served_app() -> Starlette:
    return app_for(Path(os.environ["SERVER_ROOT"]))


impatient = functools.partial(DownloadProtocol, stall_seconds=2, minimum_rate=1000)


@contextlib.contextmanager
def served(root: Path, http: str, *options: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", f"{__name__}:served_app", "--no-access-log"]
    command += ["--port", str(port), "--loop", how(), "--http", http, *options]
    with serving(command, port, log=root / "log", env={"SERVER_ROOT": str(root)}) as server:
        yield server


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def stalled(server: Server, count: int) -> list[socket.socket]:
    """Return clients that have got the first bytes of a large file, and read no more."""
    assert isinstance(server.address, int)
    clients = [small_buffers(server.address) for _ in range(count)]
    for client in clients:
        client.setblocking(True)
        client.settimeout(30)
        client.send(get("/ours/big.bin"))
    for client in clients:
        assert client.recv(12) == b"HTTP/1.1 200"
    return clients


@pytest.mark.slow
async def test_two_hundred_stalled_clients_cost_little_and_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    with served(tmp_path, f"{__name__}:impatient") as server:
        idle = descriptors(server)
        assert (await ask(int(server.address), "/ours/big.bin")).complete
        async with asyncio.timeout(60):
            while descriptors(server) > idle:  # the connection is about to end, and the file is kept open for a while
                await asyncio.sleep(0.02)
        clients = stalled(server, 200)
        assert 200 <= descriptors(server) - idle <= 2 * 200 + 1
        async with asyncio.timeout(60):
            while descriptors(server) > idle:
                await asyncio.sleep(0.02)
        for client in clients:
            client.setblocking(False)
            with pytest.raises(ConnectionResetError):
                await drain(client)
            client.close()
        assert server.log.count("took less than 1000 bytes a second") == 200
        assert "Traceback" not in server.log


@pytest.mark.parametrize("slow", [0, 3], ids=["idle", "stalled"])
async def test_the_end_waits_for_nobody_beyond_its_time(tmp_path: Path, slow: int) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(16 * MIB))
    (tmp_path / "small.bin").write_bytes(b"the content")
    # Idle connections are closed at once: without them, nothing needs a limit.
    options = ("--timeout-graceful-shutdown", "1") if slow else ()
    with served(tmp_path, f"{DownloadProtocol.__module__}:{DownloadProtocol.__name__}", *options) as server:
        port = int(server.address)
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        for number, (reader, writer) in enumerate(idle):
            if number:  # the first has not asked for anything yet
                writer.write(get())
                await reader.readuntil(b"the content")
        clients = stalled(server, slow)
        server.stop()  # fails after half of the time that a stalled client has
        for reader, writer in idle:
            assert await reader.read() == b""
            writer.close()
        for client in clients:
            client.close()
        assert "Finished server process" in server.log


@pytest.mark.parametrize("path", ["/response/slow/big", "/slow/big"])
async def test_a_client_that_is_gone_when_the_disk_answers(tmp_path: Path, path: str) -> None:
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    disk = SlowDisk(FILES, direct=True)
    with server_on({"slow": disk}, tmp_path, f"zero-copy, {how()}") as server:
        port = int(server.address)
        await ask(port, "/fast/tiny")
        before = descriptors(server)
        disk.hang("read")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get(path))
        await asyncio.to_thread(disk.wait_until_held, "read")
        writer.transport.abort()
        await ask(port, "/fast/tiny")
        disk.release()
        async with asyncio.timeout(30):
            while descriptors(server) > before + 1:  # the mount's root may be kept
                await asyncio.sleep(0.02)
        assert "Traceback" not in server.log
