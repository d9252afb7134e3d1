"""Exactly the promised bytes, or an aborted connection; and nothing left open, whatever the client does."""

import asyncio
import gc
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.asgi.uvicorn import protocol
from downloadview_async.asgi.zero_copy import send_zero_copy
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.local import open_file
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.local.root import has_openat2
from downloadview_async.testing import call
from tests.live import ask, live, parse

MIB = 1 << 20
BIG = 32 * MIB  # more than the socket buffers of both sides take

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("files_are_kept_briefly")]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def back_to(count: int) -> None:
    """Wait until no more descriptors are open than `count`."""
    for _ in range(500):
        if descriptors() <= count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{descriptors()} descriptors are open, {count} were")


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(MIB) * (BIG // MIB))
    return path


@pytest.fixture(params=["httptools", DownloadProtocol], ids=["chunks", "zero-copy"])
def http(request: pytest.FixtureRequest) -> Any:
    """Give the way of sending."""
    return request.param


def serving(root: Path) -> Starlette:
    return Starlette(routes=[Route("/{path:path}", dv.Download(dv.PathSource(root)))])


async def begun(
    port: int, path: str, *, buffer: int = 4096
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """Ask for a file with small buffers, and stop reading after the first bytes."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=buffer)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    return reader, writer, await reader.read(1000)


async def rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Read on to the end, with buffers that make it quick."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
    reader._limit = MIB  # type: ignore[attr-defined]
    received = bytearray()
    try:
        while block := await reader.read(1 << 20):
            received += block
    except ConnectionError:
        pass
    return bytes(received)


async def test_a_file_that_grows_is_cut_at_the_promise(big: Path, http: Any) -> None:
    content = big.read_bytes()
    async with live(serving(big.parent), http=http) as port:
        reader, writer, first = await begun(port, "/big.bin")
        with big.open("ab") as file:
            file.write(b"more")
        answer = parse(first + await rest(reader, writer))
        writer.close()
    assert answer.complete
    assert answer.body == content


async def test_a_file_that_shrinks_aborts_after_an_exact_prefix(
    big: Path, caplog: pytest.LogCaptureFixture, http: Any
) -> None:
    content = big.read_bytes()
    async with live(serving(big.parent), http=http) as port:
        reader, writer, first = await begun(port, "/big.bin")
        os.truncate(big, BIG // 2)
        answer = parse(first + await rest(reader, writer))
        writer.close()
    assert not answer.complete
    assert answer.body == content[: len(answer.body)]
    assert len(answer.body) >= BIG // 2 - 8 * MIB
    assert "before the end of the promised content" in caplog.text


async def test_a_file_that_is_rewritten_in_place_aborts(big: Path, caplog: pytest.LogCaptureFixture, http: Any) -> None:
    content = big.read_bytes()
    async with live(serving(big.parent), http=http) as port:
        reader, writer, first = await begun(port, "/big.bin")
        with big.open("r+b") as file:
            file.seek(BIG - 1)
            file.write(b"!")
        answer = parse(first + await rest(reader, writer))
        writer.close()
    assert not answer.complete
    assert content.startswith(answer.body)
    assert "written to while it was sent" in caplog.text


@pytest.mark.parametrize("way", ["zero-copy", "chunks"])
async def test_a_last_part_of_a_shorter_version_aborts_a_zero_copy_send(tmp_path: Path, way: str) -> None:
    """The file is written to and cut, but not to less than the end of the range."""
    (path := tmp_path / "file.bin").write_bytes(b"old " * MIB)
    received = b""

    async def send(message: Any) -> None:
        nonlocal received
        if message["type"] == "http.response.body":
            received += message["body"]
        elif way == "chunks":
            return  # a middleware that does not know the message drops it
        else:
            received += os.pread(message["file"].fileno(), message["count"], message["offset"])
        if received and path.stat().st_size == 4 * MIB:
            path.write_bytes(b"new " * (MIB - 1))

    async with dv.LocalFile(path).open() as file:
        span = ByteRange(0, 2 * MIB if way == "zero-copy" else 2 * CHUNK_SIZE)
        with pytest.raises(dv.TransferAborted, match="written to"):
            await send_zero_copy(file, span, send, lambda: None)
    if way == "chunks":
        assert received == b"old " * (CHUNK_SIZE // 4)


@pytest.mark.parametrize("how", ["renamed over", "unlinked"])
async def test_a_file_that_is_replaced_is_sent_to_its_old_end(big: Path, how: str, http: Any) -> None:
    content = big.read_bytes()
    async with live(serving(big.parent), http=http) as port:
        reader, writer, first = await begun(port, "/big.bin")
        if how == "unlinked":
            big.unlink()
        else:
            (big.parent / "new").write_bytes(b"new" * MIB)
            (big.parent / "new").rename(big)
        answer = parse(first + await rest(reader, writer))
        writer.close()
    assert answer.complete
    assert answer.body == content


@pytest.mark.slow
async def test_headers_and_bytes_are_of_one_version(tmp_path: Path) -> None:
    """A file is replaced by rename all the time: its length and its tag always are those of its bytes."""
    stop = threading.Event()

    def replace() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (tmp_path / "new").write_bytes(b"%d" % (number % 10) * (1 + number % 1000))
            (tmp_path / "new").rename(tmp_path / "file")

    (tmp_path / "file").write_bytes(b"0")
    thread = threading.Thread(target=replace)
    app = serving(tmp_path)
    thread.start()
    try:
        for _ in range(1000):
            answer = await call(app, "/file", scope={"path_params": {"path": "file"}})
            assert len(answer.body) == int(answer.headers["content-length"])
            assert answer.headers["etag"].strip('"').endswith(f"-{len(answer.body):x}")
            assert len(set(answer.body)) == 1
    finally:
        stop.set()
        thread.join()


class Failing:
    """A file whose disk fails at the 20th read; an `AsyncFile` as a user would write it."""

    name = "failing.bin"
    location = None

    def __init__(self, fail_at: int = 20) -> None:
        self.fail_at = fail_at
        self.open_now = 0

    @asynccontextmanager
    async def open(self, request: Any = None) -> AsyncIterator["Failing"]:
        self.open_now += 1
        try:
            yield self
        finally:
            self.open_now -= 1

    metadata = dv.FileMetadata(size=BIG)

    async def stream(self, span: Any) -> AsyncIterator[bytes]:
        for number in range(BIG // CHUNK_SIZE):
            if number == self.fail_at:
                raise dv.TransferAborted("reading failed: [Errno 5] Input/output error")
            yield b"x" * CHUNK_SIZE


class Awaited:
    """A file that awaits when it is closed, as a user's storage might: a session to give back, say."""

    name = "awaited"
    location = None
    metadata = dv.FileMetadata(size=MIB)

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.stop = asyncio.Event()

    @asynccontextmanager
    async def open(self, request: Any = None) -> AsyncIterator["Awaited"]:
        try:
            yield self
        finally:
            self.closed.append("begun")
            for _ in range(20):
                await asyncio.sleep(0)
            self.closed.append("ended")
            self.stop.set()

    async def stream(self, span: Any) -> AsyncIterator[bytes]:
        for _ in range(MIB // CHUNK_SIZE):
            yield b"x" * CHUNK_SIZE


@pytest.mark.parametrize("parser", ["httptools", "h11"])
async def test_the_end_of_a_response_does_not_cancel_the_closing_of_the_file(parser: str) -> None:
    for _ in range(5):
        file = Awaited()
        async with live(Starlette(routes=[Route("/", dv.DownloadResponse(file))]), http=parser) as port:
            assert (await ask(port, "/")).complete
            await asyncio.wait_for(file.stop.wait(), 5)
        assert file.closed == ["begun", "ended"]


@pytest.mark.parametrize("error", [dv.UpstreamError, dv.SourceUnavailable, dv.FileMissing])
async def test_an_error_with_a_status_is_an_abort_once_bytes_have_left(error: type[dv.FileError]) -> None:
    async def late() -> AsyncIterator[bytes]:
        yield b"x" * MIB
        raise error("late")

    async def early() -> AsyncIterator[bytes]:
        for _ in range(3):
            raise error("early")
        yield b""

    def early_plain() -> Any:
        for _ in range(3):
            raise error("early")
        yield b""

    with pytest.raises(dv.TransferAborted, match="late"):
        await call(dv.DownloadResponse(dv.VirtualFile(late, name="x")))
    for made in (early, early_plain):
        answer = await call(dv.DownloadResponse(dv.VirtualFile(made, name="x")))
        assert answer.status == error.status


async def test_a_disk_that_fails_amid_aborts_and_before_the_first_byte_is_a_503(http: Any) -> None:
    amid, first = Failing(), Failing(fail_at=0)
    app = Starlette(routes=[Route("/amid", dv.DownloadResponse(amid)), Route("/first", dv.DownloadResponse(first))])
    async with live(app, http=http) as port:
        answer = await ask(port, "/amid")
        assert not answer.complete
        assert len(answer.body) == 20 * CHUNK_SIZE
        answer = await ask(port, "/first")
        assert (answer.status, answer.body) == (503, b"Service Unavailable")
        assert answer.headers["retry-after"]
    assert (amid.open_now, first.open_now) == (0, 0)


async def test_a_generator_that_raises_amid_aborts_and_before_the_first_byte_is_a_500(http: Any) -> None:
    def amid() -> Any:
        yield b"x" * MIB
        raise RuntimeError("amid")

    def first() -> Any:
        yield 1 // 0

    def make(name: str) -> dv.VirtualFile:
        return dv.VirtualFile({"amid": amid, "first": first}[name], name=name)

    app = Starlette(routes=[Route("/{name}", dv.Download(dv.VirtualSource(make)))])
    async with live(app, http=http) as port:
        answer = await ask(port, "/amid")
        assert (answer.status, len(answer.body), answer.complete) == (200, MIB, False)
        assert (await ask(port, "/first")).status == 500


async def test_a_client_that_leaves_closes_the_file_at_once(big: Path, http: Any) -> None:
    async with live(serving(big.parent), http=http) as port:
        await ask(port, "/none")
        before = descriptors()
        _, writer, _ = await begun(port, "/big.bin")
        assert descriptors() > before
        writer.transport.abort()
        await back_to(before)


@pytest.mark.slow
async def test_hundreds_of_resets_leave_nothing_open(big: Path, http: Any) -> None:
    async with live(serving(big.parent), http=http) as port:
        await ask(port, "/none")
        before, tasks = descriptors(), len(asyncio.all_tasks())
        clients = [await begun(port, "/big.bin") for _ in range(200)]
        for _, writer, _ in clients:
            client = writer.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        del clients
        await back_to(before)
        for _ in range(100):
            if len(asyncio.all_tasks()) <= tasks:
                break
            await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) <= tasks


async def test_cancelled_inside_send_closes_the_file(big: Path) -> None:
    app = dv.Download(dv.PathSource(big.parent))
    before = descriptors()
    for _ in range(20):
        answer = await call(app, "/big.bin", cancel_after_bytes=CHUNK_SIZE)
        assert answer.cancelled
        assert not answer.complete
    gc.collect()
    await back_to(before)


async def test_a_client_that_leaves_before_the_first_byte_or_twice_is_served_nothing(big: Path) -> None:
    app = dv.Download(dv.PathSource(big.parent))
    before = descriptors()
    for _ in range(5):
        answer = await call(app, "/big.bin", leave_after_messages=0)
        assert len(answer.body) == 0
        assert not answer.complete
    await back_to(before)


async def test_a_body_sent_with_a_get_is_not_read(tmp_path: Path, http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)
    (tmp_path / "ten.txt").write_bytes(b"0123456789")
    async with live(serving(tmp_path), http=http) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ten.txt HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
        sent = 0
        try:
            while sent < 100 * MIB:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent += 65536
        except ConnectionError:  # the server closes while we send
            writer.close()
        assert sent < 50 * MIB


def what_waits(source: dv.PathSource, name: str) -> str:
    """Return what the system says when a file is opened and read without waiting."""
    root = source.root
    try:
        opened = root.open_nowait(name)
        if opened is None:
            return f"open_nowait gives None: openat2 {root.use_openat2}, quick {root.is_quick}"
        try:
            count = os.preadv(opened.descriptor, [bytearray(10)], 0, os.RWF_NOWAIT)
        finally:
            os.close(opened.descriptor)
    except OSError as exc:
        return f"reading is refused: {exc!r}"
    return f"it can be opened, and {count} bytes read; refused so far: {open_file._reads_of_cached_pages.devices}"


async def test_a_small_cached_file_is_answered_without_listening_or_a_worker(tmp_path: Path) -> None:
    if not has_openat2():
        pytest.skip("openat2: this kernel or sandbox has none")
    (tmp_path / "ten.txt").write_bytes(b"0123456789")
    (tmp_path / "empty.txt").write_bytes(b"")
    for name in ("ten.txt", "empty.txt"):
        os.utime(tmp_path / name, (1_700_000_000, 1_700_000_000))  # not just now: that is waited for

    listened = []

    async def client_stays() -> Any:
        listened.append(True)
        await anyio.sleep_forever()

    source = dv.PathSource(tmp_path)
    before = descriptors()
    for name, headers, status, body in (
        ("ten.txt", [], 200, b"0123456789"),
        ("ten.txt", [(b"range", b"bytes=2-4")], 206, b"234"),
        ("ten.txt", [(b"if-none-match", b"*")], 304, b""),
        ("ten.txt", [(b"range", b"bytes=10-")], 416, b""),
        ("empty.txt", [], 200, b""),
    ):
        scope = {"type": "http", "method": "GET", "path": f"/{name}", "headers": headers}
        deadline = time.monotonic() + 20
        while True:  # a mount anywhere on the machine makes the kernel refuse now and then
            listened.clear()
            threads = threading.active_count()
            messages: list[Any] = []

            async def send(message: Any, messages: list[Any] = messages) -> None:
                messages.append(message)

            await dv.Download(source)(scope, client_stays, send)
            assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]
            assert (messages[0]["status"], messages[1]["body"]) == (status, body)
            if not listened or time.monotonic() > deadline:
                break
        assert not listened, what_waits(source, name)
        assert threading.active_count() == threads
    await back_to(before)


async def test_one_request_after_the_other_on_one_connection(tmp_path: Path, http: Any) -> None:
    (tmp_path / "ten.txt").write_bytes(b"0123456789")
    async with live(serving(tmp_path), http=http) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET /ten.txt HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 OK" in head
            assert await reader.readexactly(10) == b"0123456789"
        writer.close()


async def test_descriptors_exhausted_are_a_503_and_recover(tmp_path: Path) -> None:
    (tmp_path / "ten.txt").write_bytes(b"0123456789")
    app = dv.Download(dv.PathSource(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (await call(app, "/ten.txt")).status == 200
    gc.collect()  # files of other tests must not be closed meanwhile
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        refused = await call(app, "/ten.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refused.status == 503
    assert (await call(app, "/ten.txt")).status == 200
