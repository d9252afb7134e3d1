"""What a cache does with a disk that fails: one that is full, files that cannot be opened, locks that are refused."""

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async import Cache, CachedSource, ConfigurationError, Download, ETag
from downloadview_async.http.metadata import MAX_READS, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.memory_storage import OpenBytes
from tests.live import ask, live
from tests.refusing import IS_POSSIBLE
from tests.sources.test_cached import BIG, Origin, Served, file_size_limit, origin, remote, served, serving

__all__ = ["file_size_limit", "origin", "served"]  # fixtures

LARGE = os.urandom(1 << 20) * 24


# Readers that hold up others


async def stalled(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Begin a download, and read no more of it than a few KiB."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    writer.write(b"GET /a.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return reader, writer


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.usefixtures("file_size_limit")
@pytest.mark.parametrize("laggards", [1, 3])
async def test_a_slow_reader_does_not_hold_up_others_when_the_cache_is_full(
    origin: Origin, served: Served, laggards: int
) -> None:
    origin.content = LARGE
    origin.held_from = 0
    slow = [await stalled(served.port) for _ in range(laggards)]
    others = [asyncio.create_task(served.get()) for _ in range(3)]
    while sum(fetch._clients for fetch in served.cache._running) < 3 + laggards:
        await asyncio.sleep(0.001)
    origin.gate.set()
    answers = await asyncio.wait_for(asyncio.gather(*others), 60)
    assert [answer.body == LARGE for answer in answers] == [True] * 3
    assert len(origin.requests) <= 1 + laggards
    for reader, writer in slow:  # each gets the rest by itself
        assert (await asyncio.wait_for(reader.read(-1), 60)).partition(b"\r\n\r\n")[2] == LARGE
        writer.close()
    assert len(origin.requests) == 1 + laggards
    assert all("range: bytes=" in request.lower() for request in origin.requests[1:])


@pytest.mark.asyncio
@pytest.mark.usefixtures("file_size_limit")
@pytest.mark.parametrize("change", ["no-validator", "weak", "other"])
async def test_a_slow_reader_never_gets_the_rest_of_another_version(
    origin: Origin, served: Served, change: str
) -> None:
    origin.content = LARGE
    origin.headers = {"no-validator": [], "weak": ['ETag: W/"v1"'], "other": ['ETag: "v1"']}[change]
    origin.held_from = 0
    reader, writer = await stalled(served.port)
    other = asyncio.create_task(served.get())
    while sum(fetch._clients for fetch in served.cache._running) < 2:
        await asyncio.sleep(0.001)
    origin.gate.set()
    assert (await asyncio.wait_for(other, 60)).body == LARGE
    if change == "other":
        origin.content, origin.headers = LARGE[::-1], ['ETag: "v2"']
    await reader.readuntil(b"\r\n\r\n")
    received = b""
    with contextlib.suppress(ConnectionError):
        while block := await asyncio.wait_for(reader.read(1 << 16), 60):
            received += block
    assert len(received) < len(LARGE)
    assert received == LARGE[: len(received)]
    writer.close()


def backwards(count: int) -> list[tuple[int, int]]:
    """Return parts of `BIG` that the disk has not taken, the last one first: all but this one have passed by."""
    return [(start, start + 9) for start in range(2_990_000, 2_990_000 - count * 30_000, -30_000)]


@pytest.mark.asyncio
@pytest.mark.usefixtures("file_size_limit")
@pytest.mark.parametrize("count, is_complete", [(2, True), (1 + MAX_READS, True), (2 + MAX_READS, False), (60, False)])
async def test_parts_that_have_passed_by_cost_few_requests_when_the_cache_is_full(
    origin: Origin, served: Served, count: int, is_complete: bool, caplog: pytest.LogCaptureFixture
) -> None:
    parts = backwards(count)
    answer = await served.get(Range="bytes=" + ",".join(f"{first}-{last}" for first, last in parts))
    assert (answer.status, answer.complete) == (206, is_complete)
    for number, (first, last) in enumerate(parts):
        assert (BIG[first : last + 1] + b"\r\n--" in answer.body) == (number <= MAX_READS)
    assert len(origin.requests) == 1 + min(count - 1, MAX_READS)
    assert ("the cache cannot take the file" in caplog.text) == (not is_complete)


@pytest.mark.asyncio
@pytest.mark.usefixtures("file_size_limit")
@pytest.mark.parametrize("max_reads", [1, 2, None])
async def test_a_source_says_how_many_parts_it_is_asked_for_when_the_cache_is_full(
    tmp_path: Path, max_reads: int | None
) -> None:
    opened: list[DownloadRequest] = []

    class Far:
        name, location = "a.bin", None

        async def resolve(self, name: str) -> "Far":
            return self

        @contextlib.asynccontextmanager
        async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenBytes]:
            opened.append(request)
            yield OpenBytes(BIG, FileMetadata(size=len(BIG), etag=ETag("x"), max_reads=max_reads))

    async with serving(Far(), tmp_path) as served:
        answer = await served.get(Range="bytes=" + ",".join(f"{first}-{last}" for first, last in backwards(60)))
    assert (answer.status, answer.complete) == (206, False)
    assert len(opened) == 1 + (max_reads or MAX_READS)


# Files that cannot be opened


def unlinked(path: Path) -> None:
    path.unlink()


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def in_the_way(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.asyncio
@pytest.mark.parametrize("spoil", [unlinked, linked, looped, piped, grown, in_the_way])
@pytest.mark.parametrize("part", ["data", "meta"])
async def test_a_cache_file_that_cannot_be_opened_is_fetched_again(
    origin: Origin, tmp_path: Path, spoil: Any, part: str
) -> None:
    for is_offloaded in (False, True):
        async with serving(remote(origin), tmp_path / f"cache{is_offloaded}") as served:
            app: Any = Starlette(routes=[Route("/{path:path}", Download(served.source))])
            if is_offloaded:
                app = dv.OffloadMiddleware(app, backend=dv.XAccelRedirect([dv.Rule(served.cache.path, "/_cache/")]))
            async with live(app) as port:
                assert (await ask(port, "/a.bin")).body == BIG
                await served.settled()
                served.cache.kept.clear()
                spoil(next(path for path in served.files() if (path.suffix == ".meta") == (part == "meta")))
                assert (await ask(port, "/a.bin")).body == BIG
                await served.settled()
                again = await ask(port, "/a.bin")
                assert again.status == 200
                if spoil is not in_the_way and is_offloaded:
                    assert "x-accel-redirect" in again.headers
                elif not is_offloaded:
                    assert again.body == BIG


HIDDEN = """
import asyncio, ctypes, os, pathlib, struct, tempfile

if os.geteuid() == 0:  # root may open everything, by a capability
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    assert ctypes.CDLL(None).capset(header, none) == 0

from downloadview_async import Cache, CachedSource, MemoryStorage, StorageSource


async def main():
    with tempfile.TemporaryDirectory() as directory:
        cache = Cache(directory)
        source = CachedSource(StorageSource(MemoryStorage({"a": b"content"})), cache, name="s")

        async def read():
            async with (await source.resolve("a")).open() as opened:
                content = b"".join([chunk async for chunk in opened.stream(None)])
            for fetch in list(cache._running):
                await asyncio.wait([fetch.task])
            return content

        for pattern in ("*-*", "*.meta"):
            assert await read() == b"content"
            cache.kept.clear()
            for path in pathlib.Path(directory).glob(pattern):
                path.chmod(0)
            assert await read() == b"content"
            assert await read() == b"content"
        counters = cache.counters
        print(counters.hits, counters.misses)
        await source.aclose()
        await cache.aclose()


asyncio.run(main())
"""


def test_a_cache_file_that_this_user_may_not_open_is_fetched_again() -> None:
    output = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    hits, misses = map(int, output.stdout.split())
    assert misses == 3  # the first time, and once for each file that cannot be opened
    assert hits >= 3


# Locks


REFUSING = """
import sys
from downloadview_async import Cache, ConfigurationError
from tests.refusing import refuse

try:
    refuse("flock", int(sys.argv[1]))
except OSError:
    print("no seccomp")
    sys.exit(0)
try:
    Cache(sys.argv[2])
except ConfigurationError as exc:
    print(exc)
else:
    print("no error")
"""


def says_at_the_start(refused: int, directory: Path) -> str:
    """Return what a process prints that makes a cache where `flock` fails with an error number."""
    command = [sys.executable, "-c", REFUSING, str(refused), str(directory)]
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    if "no seccomp" in output:
        pytest.skip("seccomp is not allowed here")
    return output


@pytest.mark.skipif(not IS_POSSIBLE, reason="seccomp is Linux's")
@pytest.mark.parametrize("refused", [errno.ENOLCK, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_told_at_the_start(tmp_path: Path, refused: int) -> None:
    output = says_at_the_start(refused, tmp_path / "cache")
    assert "locks" in output
    assert os.strerror(refused) in output
    assert str(tmp_path / "cache") in output


@pytest.mark.skipif(not IS_POSSIBLE, reason="seccomp is Linux's")
def test_a_file_that_another_process_has_locked_shows_that_there_are_locks(tmp_path: Path) -> None:
    assert says_at_the_start(errno.EAGAIN, tmp_path / "cache") == "no error\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a directory that it may not write to")
@pytest.mark.asyncio
async def test_a_directory_that_cannot_be_written_to_is_no_error_at_the_start(origin: Origin, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,mode=755", "tmpfs", str(directory)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed: {mounted.stderr.decode()}")
    try:
        source = CachedSource(remote(origin), Cache(directory), name="x")
        async with live(Starlette(routes=[Route("/{path:path}", Download(source))])) as port:
            assert (await ask(port, "/a.bin")).body == BIG
        await source.aclose()
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def test_the_errors_of_a_cache_are_configuration_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError):
        Cache(tmp_path / "file")
