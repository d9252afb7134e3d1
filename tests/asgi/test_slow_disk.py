"""A slow or hanging disk holds up nobody but those who wait for it: a real server, on a real slow file system."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path

import pytest

from downloadview_async.sources.workers import OPENING
from tests.live import Answer, ask, parse
from tests.servers import Server, free_port, serving
from tests.slow_fs import DELAY, SlowDisk, content_of, mounted, why_not

KIB = 1 << 10
HUGE, BIG, SMALL = 8192 * KIB, 1024 * KIB, 10 * KIB
ALL_AT_ONCE = 50
PATIENCE = 10.0  # seconds; only what hangs takes as long
OPERATIONS = ["lookup", "getattr", "open", "read", "flush", "release"]
FILES = {"big": BIG, "small": SMALL, **{f"big-{n}": BIG for n in range(ALL_AT_ONCE)}}
ZERO_COPY = "downloadview_async.asgi.server:DownloadProtocol"
SERVERS = {
    "zero-copy, asyncio": ["--loop", "asyncio", "--http", ZERO_COPY],
    "zero-copy, uvloop": ["--loop", "uvloop", "--http", ZERO_COPY],
    "chunks": ["--loop", "uvloop", "--http", "httptools"],
}
QUICK_FOR_ONE = [pytest.param(how, marks=[] if how == "zero-copy, asyncio" else pytest.mark.slow) for how in SERVERS]


@cache
def reason() -> str | None:
    """Return why there can be no slow disk; asked for once."""
    return why_not()


@pytest.fixture(autouse=True)
def _a_slow_disk_is_possible() -> None:
    if (missing := reason()) is not None:
        pytest.skip(missing)


@contextmanager
def server_on(
    disks: Mapping[str, SlowDisk], tmp_path: Path, how: str, *, threads: int = 40, options: tuple[str, ...] = ()
) -> Iterator[Server]:
    """Serve each disk below its own name, and the file `/fast/tiny` of the local disk."""
    (fast := tmp_path / "fast").mkdir()
    (fast / "tiny").write_bytes(content_of("tiny", SMALL))
    roots = {"fast": str(fast)}
    command: list[str] = []
    with ExitStack() as stack:
        pass_fds: list[int] = []
        for name, disk in disks.items():
            (path := tmp_path / name).mkdir()
            roots[name] = str(path)
            mount = stack.enter_context(mounted(disk, path))
            command += mount.prefix
            pass_fds += mount.pass_fds
        port = free_port()
        command += [sys.executable, "-m", "uvicorn", "tests.asgi.slow_app:app", "--port", str(port)]
        command += ["--no-access-log", "--timeout-graceful-shutdown", "1", *SERVERS[how], *options]
        env = {"SLOW_APP_ROOTS": json.dumps(roots), "SLOW_APP_THREADS": str(threads)}
        server = stack.enter_context(serving(command, port, env=env, log=tmp_path / "log", pass_fds=pass_fds))
        for disk in disks.values():
            stack.callback(disk.release)  # before the server is stopped, which might wait for it
        yield server


class Connection:
    """A connection that is kept for one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def get(self, path: str) -> bytes:
        """Return the body of a whole answer."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return await self._reader.readexactly(int(length))


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def others_are_served(port: int) -> None:
    """Fail if a client that wants nothing of the disk has to wait for it."""
    try:
        async with asyncio.timeout(PATIENCE), connected(port) as other:
            for _ in range(10):
                assert await other.get("/fast/tiny") == content_of("tiny", SMALL)
    except TimeoutError:
        pytest.fail("the event loop waits for the disk")


def log(server: Server) -> str:
    """Return the end of the server's log."""
    return server.log[-2000:]


def all_are_whole(answers: list[Answer], server: Server) -> None:
    """Fail if an answer is not the whole of the file `big-N`, N being its place."""
    found = {(answer.status, len(answer.body), answer.complete) for answer in answers}
    assert found == {(200, BIG, True)}, log(server)
    assert all(answer.body == content_of(f"big-{n}", BIG) for n, answer in enumerate(answers))


async def held(disk: SlowDisk, operation: str, count: int = 1) -> None:
    await asyncio.to_thread(disk.wait_until_held, operation, count)


def descriptors(server: Server, path: Path) -> int:
    """Return how many descriptors the server holds of files below `path`."""
    count = 0
    for entry in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(entry).startswith(f"{path}/")
    return count


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize(
    "slow, direct",
    [(["read"], False), (["read"], True), (OPERATIONS, True)],
    ids=["page cache", "direct", "everything"],
)
@pytest.mark.parametrize("how", SERVERS)
async def test_tiny_requests_beside_fifty_slow_downloads(
    tmp_path: Path, how: str, slow: list[str], direct: bool
) -> None:
    disk = SlowDisk(FILES, direct=direct, names_seconds=3600, delays=dict.fromkeys(slow, DELAY))
    times: list[float] = []

    async def tiny_requests(port: int) -> None:
        async with connected(port) as client:
            while True:
                begin = time.perf_counter()
                assert await client.get("/fast/tiny") == content_of("tiny", SMALL)
                times.append(time.perf_counter() - begin)

    with server_on({"slow": disk}, tmp_path, how) as server:
        assert isinstance(server.address, int)
        tiny = asyncio.create_task(tiny_requests(server.address))
        begin = time.perf_counter()
        for _ in range(2):  # the second time with names that are known
            asked = [ask(server.address, f"/slow/big-{n}") for n in range(ALL_AT_ONCE)]
            all_are_whole(await asyncio.gather(*asked), server)
        took = time.perf_counter() - begin
        tiny.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tiny
    assert took > DELAY
    times.sort()
    p99 = times[len(times) * 99 // 100]
    print(
        f"{len(times)} tiny requests in {took:.2f} s: p50 {times[len(times) // 2] * 1e3:.1f} ms, "
        f"p99 {p99 * 1e3:.1f} ms, longest {times[-1] * 1e3:.1f} ms"
    )
    assert p99 < DELAY / 2
    # A client that waits asks for less meanwhile, so the few that waited count by how long they did.
    assert sum(spent for spent in times if spent >= DELAY) < took / 3


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("how", SERVERS)
async def test_a_client_that_does_not_read_from_a_disk_that_hangs(tmp_path: Path, how: str) -> None:
    """With its socket full, too, nothing of the file is read on the event loop."""
    disk = SlowDisk({"huge": HUGE}, direct=True)
    with server_on({"slow": disk}, tmp_path, how) as server, socket.socket() as client:
        assert isinstance(server.address, int)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.address))
        client.sendall(b"GET /slow/huge HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received: list[bytes] = []

        def receive() -> None:
            client.settimeout(PATIENCE)
            while block := client.recv(1 << 20):
                received.append(block)

        disk.hang("read")
        reading: asyncio.Task[None] | None = None
        while reading is None or not reading.done():
            if disk.held("read"):
                await others_are_served(server.address)
                disk.step()
            elif reading is None:
                with contextlib.suppress(AssertionError):
                    await asyncio.to_thread(disk.wait_until_held, "read", 1, 0.5)
                    continue
                reading = asyncio.create_task(asyncio.to_thread(receive))  # the server waits for us now
            else:
                await asyncio.sleep(0.001)
        await reading
    assert parse(b"".join(received)).body == content_of("huge", HUGE)


REQUESTS: dict[str, tuple[str, str, dict[str, str], int, bytes]] = {
    "small": ("GET", "/slow/small", {}, 200, content_of("small", SMALL)),
    "big": ("GET", "/slow/big", {}, 200, content_of("big", BIG)),
    "range": ("GET", "/slow/big", {"Range": "bytes=300000-599999"}, 206, content_of("big", BIG)[300000:600000]),
    "ranges": ("GET", "/slow/big", {"Range": "bytes=0-9,300000-399999"}, 206, b""),
    "head": ("HEAD", "/slow/big", {}, 200, b""),
    "FileResponse": ("GET", "/response/slow/big", {}, 200, content_of("big", BIG)),
}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "operation, names_seconds",
    # With the name in the kernel's cache, even openat2's RESOLVE_CACHED asks the file system to open the file.
    [("lookup", 0), ("open", 0), ("open", 3600), ("getattr", 0), ("getattr", 3600), ("read", 0), ("flush", 0)],
)
@pytest.mark.parametrize("how", QUICK_FOR_ONE)
async def test_no_operation_of_the_disk_is_waited_for_by_others(
    tmp_path: Path, how: str, operation: str, names_seconds: int
) -> None:
    disk = SlowDisk(FILES, direct=True, names_seconds=names_seconds)
    with server_on({"slow": disk}, tmp_path, how) as server:
        assert isinstance(server.address, int)
        for name, (method, path, headers, status, body) in REQUESTS.items():
            if (name, operation) == ("head", "read"):
                continue
            for _ in range(2):  # the second time with all that the kernel remembers of the first
                disk.hang(operation)
                asked = asyncio.create_task(ask(server.address, path, method=method, headers=headers))
                await held(disk, operation)
                await others_are_served(server.address)
                disk.release()
                answer = await asked
                assert (answer.status, answer.complete) == (status, True), (name, log(server))
                assert body in answer.body, name


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("operation", ["open", "read"])
@pytest.mark.parametrize("how", SERVERS)
async def test_a_hung_root_takes_its_own_workers_and_no_others(tmp_path: Path, how: str, operation: str) -> None:
    hung, healthy = SlowDisk(FILES, direct=True), SlowDisk(FILES, direct=True, delays={"read": DELAY / 10})
    threads = 4
    with server_on({"hung": hung, "healthy": healthy}, tmp_path, how, threads=threads) as server:
        assert isinstance(server.address, int)
        port = server.address
        hung.hang(operation)
        async with AsyncExitStack() as stack:
            for n in range(ALL_AT_ONCE):
                client = await stack.enter_async_context(connected(port))
                client.writer.write(f"GET /hung/big-{n} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await held(hung, operation, threads)
            await others_are_served(port)
            for path in ("/healthy/big", "/healthy/small"):
                name = path.rpartition("/")[2]
                answer = await ask(port, path)
                assert answer.complete, log(server)
                assert answer.body == content_of(name, FILES[name])
            assert hung.held(operation) == threads
            if operation == "open":
                assert (await ask(port, "/hung/small")).status == 503
            hung.release()
        assert (await ask(port, "/hung/big")).body == content_of("big", BIG)


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("operation", ["lookup", "open", "getattr", "read"])
@pytest.mark.parametrize("how", QUICK_FOR_ONE)
async def test_a_request_for_a_file_that_hangs_gets_an_answer(tmp_path: Path, how: str, operation: str) -> None:
    disk = SlowDisk(FILES, direct=True)
    with server_on({"slow": disk}, tmp_path, how) as server:
        assert isinstance(server.address, int)
        disk.hang(operation)
        began = time.monotonic()
        names = ("small",) if operation == "read" else ("small", "big", "big-1")  # the head of a large file has left
        answers = await asyncio.gather(*(ask(server.address, f"/slow/{name}") for name in names))
        assert {answer.status for answer in answers} == {503}, log(server)
        assert OPENING.seconds <= time.monotonic() - began < OPENING.seconds + PATIENCE
        assert disk.held(operation)
        for name in ("small", "big-2", "big-3") if operation != "read" else ("small",):
            began = time.monotonic()
            assert (await ask(server.address, f"/slow/{name}")).status == 503
            assert time.monotonic() - began < OPENING.seconds / 2  # it is known that the disk hangs
        disk.release()
        assert (await ask(server.address, "/slow/big")).body == content_of("big", BIG)
        async with asyncio.timeout(PATIENCE):
            while descriptors(server, tmp_path / "slow"):
                await asyncio.sleep(0.01)
    assert "Traceback" not in log(server)


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("how", SERVERS)
async def test_more_slow_downloads_than_workers_are_slow_and_whole(tmp_path: Path, how: str) -> None:
    disk = SlowDisk(FILES, direct=True, delays={"read": DELAY})
    with server_on({"slow": disk}, tmp_path, how, threads=2) as server:
        assert isinstance(server.address, int)
        answers = await asyncio.gather(*(ask(server.address, f"/slow/big-{n}") for n in range(8)))
    all_are_whole(answers, server)


@pytest.mark.asyncio
@pytest.mark.parametrize("operation", ["lookup", "open", "read"])
@pytest.mark.parametrize("how", QUICK_FOR_ONE)
async def test_clients_that_leave_a_hanging_disk_leave_nothing_behind(tmp_path: Path, how: str, operation: str) -> None:
    disk = SlowDisk(FILES, direct=True)
    with server_on({"slow": disk}, tmp_path, how) as server:
        assert isinstance(server.address, int)
        disk.hang(operation)
        async with AsyncExitStack() as stack:
            for n in range(20):
                client = await stack.enter_async_context(connected(server.address))
                client.writer.write(f"GET /slow/big-{n} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await held(disk, operation, 20)
        await others_are_served(server.address)
        disk.release()
        assert (await ask(server.address, "/slow/big")).body == content_of("big", BIG)
        async with asyncio.timeout(PATIENCE):
            while descriptors(server, tmp_path / "slow"):
                await asyncio.sleep(0.01)
    assert "Traceback" not in log(server)


@contextmanager
def service_on(disk: SlowDisk, tmp_path: Path, *settings: str) -> Iterator[Server]:
    """Serve the disk by the service itself, which has a second to end."""
    (path := tmp_path / "slow").mkdir()
    port = free_port()
    config = tmp_path / "downloadview.toml"
    config.write_text(
        "\n".join(
            [
                f"[server]\nport = {port}\ntimeout_graceful_shutdown = 1",
                *settings,
                f"[sources.slow]\ntype = 'path'\nroot = {json.dumps(str(path))}",
                "[[routes]]\npath = '/slow/{path:path}'\nsource = 'slow'",
            ]
        )
    )
    with mounted(disk, path) as mount:
        command = [*mount.prefix, sys.executable, "-m", "downloadview_async.cli", "serve", "--config", str(config)]
        with serving(command, port, log=tmp_path / "log", pass_fds=mount.pass_fds) as server:
            try:
                yield server
            finally:
                disk.release()


@pytest.mark.slow
@pytest.mark.asyncio
# Not "flush": the kernel itself waits for that when a process ends, for all of its descriptors.
@pytest.mark.parametrize("operation", ["open", "read"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("http", ["auto", "httptools"])
async def test_the_service_ends_while_the_disk_hangs(tmp_path: Path, http: str, loop: str, operation: str) -> None:
    disk = SlowDisk(FILES, direct=True)
    with service_on(disk, tmp_path, f"http = '{http}'", f"loop = '{loop}'") as server:
        assert isinstance(server.address, int)
        disk.hang(operation)
        async with connected(server.address) as client:
            client.writer.write(b"GET /slow/big HTTP/1.1\r\nHost: x\r\n\r\n")
            await held(disk, operation)
            assert await asyncio.to_thread(server.stop) == 0, log(server)
