"""Cached files, against an upstream whose every byte waits for the test's word where it matters."""

import asyncio
import errno
import hashlib
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async import Cache, CachedSource, ConfigurationError, Download, ETag, RemoteSource, VirtualFile
from downloadview_async.http.digest import repr_digest
from downloadview_async.sources.cache import index
from downloadview_async.sources.cache import source as cached
from downloadview_async.sources.cache.directory import CacheDirectory
from downloadview_async.sources.cache.entry import key_hash
from tests.descriptors import open_paths
from tests.live import Answer, ask, listening, live

pytestmark = pytest.mark.asyncio
BIG = os.urandom(3_000_001)
DAY = 86_400.0


class Origin:
    """An upstream with one file at every path. Whatever it sends beyond `held_from` waits for `gate`."""

    def __init__(self) -> None:
        self.content = BIG
        self.headers = ['ETag: "v1"', "Content-Type: text/x-log"]
        self.status = "200 OK"
        self.requests: list[str] = []
        self.ranges = True
        self.held_from: int | None = None
        self.cut_at: int | None = None
        self.has_length = True
        self.is_chunked = False
        self.gate = asyncio.Event()
        self.open = 0
        self.changed = asyncio.Condition()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
            self.requests.append(head)
            await self._count(1)
            try:
                if not await self._answer(head, reader, writer):
                    return
            finally:
                await self._count(-1)

    async def _count(self, change: int) -> None:
        async with self.changed:
            self.open += change
            self.changed.notify_all()

    async def has_open(self, count: int) -> None:
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(lambda: self.open == count)

    async def _answer(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
        fields = {name.lower(): value for name, value in fields.items()}
        tag = next((line[6:] for line in self.headers if line.startswith("ETag")), None)
        date = next((line[15:] for line in self.headers if line.startswith("Last-Modified")), None)
        if (tag and fields.get("if-none-match") == tag) or (date and fields.get("if-modified-since") == date):
            writer.write("\r\n".join(["HTTP/1.1 304 Not Modified", *self.headers, "\r\n"]).encode())
            return True
        content, status, more = self.content, self.status, list(self.headers)
        offset = 0
        if self.ranges and "range" in fields:
            first, last = fields["range"].removeprefix("bytes=").split("-")
            offset = int(first) if first else len(content) - int(last)
            stop = int(last) + 1 if first and last else len(content)
            status = "206 Partial Content"
            more.append(f"Content-Range: bytes {offset}-{stop - 1}/{len(content)}")
            content = content[offset:stop]
        more.append(f"Content-Length: {len(content)}" if self.has_length else "Connection: close")
        if self.is_chunked:
            more[-1] = "Transfer-Encoding: chunked"
            content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        writer.write("\r\n".join([f"HTTP/1.1 {status}", *more, "\r\n"]).encode())
        if head.startswith("HEAD"):
            return True
        held = len(content) if self.held_from is None or offset else self.held_from
        writer.write(content[:held])
        if held < len(content) or self.held_from is not None:
            waiting = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(reader.read(1))]
            await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
            for task in waiting:
                task.cancel()
        if self.cut_at is not None:
            writer.write(content[held : self.cut_at])
            return False
        writer.write(content[held:])
        await writer.drain()
        return self.has_length


@pytest_asyncio.fixture
async def origin() -> AsyncIterator[Origin]:
    origin = Origin()
    async with listening(origin.serve) as origin.port:
        yield origin
        origin.gate.set()


def remote(origin: Origin) -> RemoteSource:
    return RemoteSource(f"http://127.0.0.1:{origin.port}/pub", allow_hosts=["127.0.0.1"])


class Served:
    """A server of one cached source."""

    def __init__(self, source: CachedSource, port: int) -> None:
        self.source = source
        self.port = port

    @property
    def cache(self) -> Cache:
        return self.source.cache

    async def get(self, path: str = "/a.bin", method: str = "GET", **headers: str) -> Answer:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return await ask(self.port, path, method=method, headers=fields)

    async def settled(self) -> None:
        """Wait until nothing is being fetched."""
        while fetches := list(self.cache._running):
            await asyncio.wait([fetch.task for fetch in fetches])

    def files(self) -> list[Path]:
        return sorted(path for path in Path(self.cache.path).iterdir() if path.name not in ("usage", "purges"))

    def data(self) -> list[Path]:
        return [path for path in self.files() if not path.suffix]


@asynccontextmanager
async def serving(source: dv.Source, directory: Path, **options: Any) -> AsyncIterator[Served]:
    cached_source = CachedSource(source, Cache(directory, **options), name="the source")
    app = Starlette(routes=[Route("/{path:path}", Download(cached_source))])
    async with live(app) as port:
        yield Served(cached_source, port)
    await cached_source.aclose()
    await cached_source.cache.aclose()


@pytest_asyncio.fixture
async def served(origin: Origin, tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(remote(origin), tmp_path / "cache") as served:
        yield served


def no_parts(directory: str) -> bool:
    return not [name for name in os.listdir(directory) if name.endswith(".part")]


# Once, and for all


async def test_a_hundred_clients_cost_one_upstream_request(origin: Origin, served: Served) -> None:
    answers = await asyncio.gather(*[served.get() for _ in range(100)])
    assert all(answer.status == 200 and answer.complete and answer.body == BIG for answer in answers)
    assert len(origin.requests) == 1
    await served.settled()
    again = await served.get()
    assert (again.body, again.headers["etag"], again.headers["content-type"]) == (BIG, '"v1"', "text/x-log")
    apart = {(name, again.headers[name]) for name in ("date", "age", "cache-status")}
    assert again.headers.items() - apart <= answers[0].headers.items()
    assert len(origin.requests) == 1
    counters = served.cache.counters
    assert (counters.hits, counters.misses, counters.revalidated, counters.passed) == (1, 100, 0, 0)
    assert counters.bytes == sum(-(-path.stat().st_size // 4096) * 4096 for path in served.files())


async def test_clients_are_fed_while_it_arrives(origin: Origin, served: Served) -> None:
    origin.held_from = 1_000_000
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(1_000_000) == BIG[:1_000_000]
    # a part that is there already, and one that is not
    part = await served.get(Range="bytes=5-999999")
    assert (part.status, part.body) == (206, BIG[5:1_000_000])
    later = asyncio.create_task(served.get(Range="bytes=999990-1000009"))
    several = asyncio.create_task(served.get(Range="bytes=2000000-2000009,5-6"))
    origin.gate.set()
    assert (await later).body == BIG[999_990:1_000_010]
    assert BIG[2_000_000:2_000_010] in (await several).body
    assert await reader.readexactly(len(BIG) - 1_000_000) == BIG[1_000_000:]
    writer.close()
    assert len(origin.requests) == 1


async def test_a_range_far_ahead_is_asked_of_the_upstream(
    origin: Origin, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "MAX_AHEAD", 100_000)
    for value in ("bytes=2000000-2000009", "bytes=-10"):
        part = await served.get(Range=value)
        assert part.status == 206
        assert part.body in (BIG[2_000_000:2_000_010], BIG[-10:])
    assert [request.lower().count("\r\nrange: bytes=") for request in origin.requests] == [1, 1]
    assert served.files() == []
    assert served.cache.counters.passed == 2
    origin.ranges = False  # then it is fetched, and the range comes when it is there
    part = await served.get(Range="bytes=2000000-2000009")
    assert (part.status, part.body) == (206, BIG[2_000_000:2_000_010])
    await served.settled()
    assert len(origin.requests) == 4
    assert (await served.get()).body == BIG
    assert len(origin.requests) == 4


# Clients that leave


async def leave(port: int, origin: Origin, *, after: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
    if after:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(after)
    else:
        await origin.has_open(1)
    writer.transport.abort()


@pytest.mark.parametrize("after", [0, 1, 900_000])
async def test_the_last_client_that_breaks_off_ends_the_fetch(origin: Origin, served: Served, after: int) -> None:
    origin.held_from = 1_000_000 if after else 0
    await leave(served.port, origin, after=after)
    await origin.has_open(0)
    await served.settled()
    assert served.files() == []
    assert served.cache.counters.bytes == 0
    origin.held_from = None
    assert (await served.get()).body == BIG


async def test_a_client_that_leaves_while_its_file_is_opened_to_write_leaves_no_descriptor(
    origin: Origin, served: Served
) -> None:
    free, executor = threading.Event(), served.cache._executor
    busy = [executor.submit(free.wait) for _ in range(index._THREADS)]
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(30):
            while not (all(call.running() for call in busy) and executor._work_queue.qsize()):
                await asyncio.sleep(0)
        writer.transport.abort()
        await served.settled()
    finally:
        free.set()
    assert served.files() == []
    assert not [path for path in open_paths() if path.startswith(f"{served.cache.path}/")]


async def test_one_that_leaves_does_not_end_it_for_others(origin: Origin, served: Served) -> None:
    origin.held_from = 1_000_000
    stays = asyncio.create_task(served.get())
    await leave(served.port, origin, after=900_000)
    origin.gate.set()
    assert (await stays).body == BIG
    assert len(origin.requests) == 1


async def test_it_goes_on_after_one_who_got_what_it_asked_for(origin: Origin, served: Served) -> None:
    origin.held_from = 1_000_000
    assert (await served.get(Range="bytes=0-9")).body == BIG[:10]
    origin.gate.set()
    await served.settled()
    assert (await served.get()).body == BIG
    assert len(origin.requests) == 1


async def test_few_go_on_without_anybody_who_waits(origin: Origin, served: Served) -> None:
    """A byte of each of many files would hold all connections to the upstream, for nobody."""
    origin.held_from = 1_000_000
    for number in range(10):
        assert (await served.get(f"/{number}", Range="bytes=0-0")).body == BIG[:1]
    await origin.has_open(index._MAX_UNATTENDED)
    origin.gate.set()
    await served.settled()
    assert len(served.data()) == index._MAX_UNATTENDED


@pytest.mark.parametrize("first", ["bytes=0-9", None])
async def test_files_that_only_wait_for_the_disk_do_not_keep_others_from_it(
    origin: Origin, served: Served, monkeypatch: pytest.MonkeyPatch, first: str | None
) -> None:
    """They need no connection to the upstream any more."""
    free, begun, fdatasync = threading.Event(), threading.Semaphore(0), os.fdatasync

    def slow(descriptor: int) -> None:
        begun.release()
        free.wait()
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    try:
        for number in range(index._MAX_UNATTENDED):
            assert (await served.get(f"/{number}")).body == BIG
            await asyncio.to_thread(begun.acquire)
        origin.held_from = 1_000_000
        if first is not None:
            assert (await served.get(Range=first)).body == BIG[:10]
        else:
            origin.gate.set()
            assert (await served.get()).body == BIG
        origin.gate.set()
        assert (await served.get()).body == BIG
    finally:
        free.set()
    await served.settled()
    assert len(origin.requests) == len(served.data()) == index._MAX_UNATTENDED + 1


async def test_closing_ends_what_is_fetched(origin: Origin, tmp_path: Path) -> None:
    origin.held_from = 1_000_000
    async with serving(remote(origin), tmp_path) as served:
        client = asyncio.create_task(served.get())
        await origin.has_open(1)
        await served.source.aclose()
        answer = await client
        assert not answer.complete or answer.status == 503
        assert no_parts(served.cache.path)
    await origin.has_open(0)


# Failures


@pytest.mark.parametrize("status, expected", [("404 Not Found", 404), ("410 Gone", 404), ("500 Oops", 502)])
async def test_a_fetch_that_fails_gives_all_who_wait_its_status(
    origin: Origin, served: Served, status: str, expected: int
) -> None:
    origin.status = status
    answers = await asyncio.gather(*[served.get() for _ in range(10)])
    assert {answer.status for answer in answers} == {expected}
    assert served.files() == []
    origin.status = "200 OK"
    assert (await served.get()).body == BIG


async def test_an_upstream_that_breaks_off_aborts_all_and_leaves_nothing(origin: Origin, served: Served) -> None:
    origin.held_from, origin.cut_at = 1_000_000, 1_500_000
    clients = [asyncio.create_task(served.get()) for _ in range(5)]
    late = asyncio.create_task(served.get(Range="bytes=2000000-"))
    await origin.has_open(1)
    origin.gate.set()
    for client in clients:
        answer = await client
        assert not answer.complete
        assert answer.body == BIG[: len(answer.body)]
    assert (await late).status in (502, 503)  # it had not got a byte
    await served.settled()
    assert served.files() == []
    assert served.cache.counters.bytes == 0
    origin.held_from = origin.cut_at = None
    assert (await served.get()).body == BIG


class _BreaksOff:
    """A file object of unknown size that cannot seek, and fails after its first bytes."""

    def __init__(self) -> None:
        self._left = [b"", b"01234"]

    def read(self, size: int) -> bytes:
        if not self._left:
            raise OSError("the disk is gone")
        return self._left.pop(0)


async def test_a_range_of_what_breaks_off_while_it_is_fetched_is_a_503(tmp_path: Path) -> None:
    """Its size is not known before the end, and so nothing has been sent."""
    source = dv.VirtualSource(lambda name: VirtualFile(_BreaksOff, name=name, max_age=DAY))
    async with serving(source, tmp_path) as served:
        part = await served.get(Range="bytes=2-4")
        assert (part.status, part.headers.get("retry-after")) == (503, "5")
        assert not (await served.get()).complete


async def test_the_error_of_a_generator_is_no_whole_file(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield BIG
        raise ValueError("no more")

    source = dv.VirtualSource(lambda name: VirtualFile(broken, name=name, max_age=DAY))
    async with serving(source, tmp_path) as served:
        answers = await asyncio.gather(*[served.get() for _ in range(3)])
        assert not any(answer.complete for answer in answers)
        await served.settled()
        assert served.files() == []


# Staying current


@pytest.mark.parametrize("validator", ['ETag: "v1"', 'ETag: W/"v1"', "Last-Modified: Tue, 14 Nov 2023 22:13:20 GMT"])
async def test_what_is_stale_is_asked_for_once_and_renewed(origin: Origin, tmp_path: Path, validator: str) -> None:
    origin.headers = [validator]
    async with serving(remote(origin), tmp_path, max_age=0) as served:
        await served.get()
        await served.settled()
        answers = await asyncio.gather(*[served.get() for _ in range(20)])
        assert all(answer.body == BIG for answer in answers)
        assert 2 <= len(origin.requests) <= 21
        assert all("\r\nif-" in request.lower() for request in origin.requests[1:])
        assert served.cache.counters.revalidated == 20
        with pytest.warns(DeprecationWarning, match=r"use CacheCounters\.revalidated"):
            assert served.cache.counters.stale == 20
        assert len(served.data()) == 1
        origin.content, origin.headers = b"other", [validator.replace("v1", "v2").replace(":20", ":21")]
        answer = await served.get()
        assert answer.body == b"other"
        await served.settled()
        assert (await served.get()).body == b"other"
        assert b"other" in [path.read_bytes() for path in served.data()]  # the other one may still be open


async def test_within_max_age_nothing_is_asked(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_age=DAY) as served:
        await served.get()
        await served.settled()
        origin.content, origin.headers = b"other", ['ETag: "v2"']
        assert (await served.get()).body == BIG
        kept = await served.cache.find(served.source.name, "a.bin")
        assert kept is not None
        old = replace(kept.entry, validated=kept.entry.validated - 2 * DAY)
        served.cache.remember(served.source.name, "a.bin", old)
        assert (await served.get()).body == b"other"
        assert len(origin.requests) == 2


async def test_an_upstream_that_fails_gives_no_stale_answer(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_age=0) as served:
        await served.get()
        await served.settled()
        origin.status, origin.headers = "500 Oops", []
        assert (await served.get()).status == 502
        assert len(served.data()) == 1
        origin.status = "404 Not Found"
        assert (await served.get()).status == 404
        assert served.data() == []


@pytest.mark.parametrize(
    "header", ["Cache-Control: no-store", "Cache-Control: max-age=5, private", "Cache-Control: Private", "Vary: *"]
)
async def test_what_must_not_be_kept_is_not(origin: Origin, served: Served, header: str) -> None:
    origin.headers.append(header)
    for number in (1, 2):
        answer = await served.get()
        assert answer.body == BIG
        assert len(origin.requests) == number
        part = await served.get(Range="bytes=2000000-2000009")
        assert part.body == BIG[2_000_000:2_000_010]
        origin.requests.pop()
    assert served.files() == []


async def test_what_is_not_kept_is_for_one_alone(origin: Origin, served: Served) -> None:
    origin.headers.append("Cache-Control: private, no-store")
    origin.held_from = 0
    clients = [asyncio.create_task(served.get()) for _ in range(4)]
    await origin.has_open(4)
    origin.gate.set()
    assert all(answer.body == BIG for answer in await asyncio.gather(*clients))
    assert len(origin.requests) == 4


@pytest.mark.parametrize(
    "header, asked",
    [
        ("Cache-Control: no-cache", 2),
        ("Cache-Control: max-age=0", 2),
        ("Cache-Control: max-age=60", 1),
        ("Cache-Control: s-maxage=0", 2),
        ("Cache-Control: max-age=100, max-age=0", 2),
        ("Cache-Control: max-age=-1", 2),
        ("Cache-Control: max-age=soon", 2),
        ("Expires: 0", 2),
        ("Expires: Thu, 01 Jan 2015 00:00:00 GMT", 2),
        ("Expires: Thu, 01 Jan 2099 00:00:00 GMT", 1),
    ],
)
async def test_an_upstream_may_shorten_the_time(origin: Origin, served: Served, header: str, asked: int) -> None:
    origin.headers.append(header)
    await served.get()
    await served.settled()
    assert (await served.get()).body == BIG
    assert len(origin.requests) == asked


async def test_a_restart_finds_what_is_there(origin: Origin, tmp_path: Path) -> None:
    for _ in range(2):
        async with serving(remote(origin), tmp_path) as served:
            answer = await served.get()
            assert (answer.body, answer.headers["etag"]) == (BIG, '"v1"')
            await served.settled()
    assert len(origin.requests) == 1


async def test_the_headers_that_describe_a_file_are_kept_with_it(origin: Origin, served: Served) -> None:
    origin.headers += ["Content-Encoding: gzip", "Vary: Accept-Encoding", "Set-Cookie: a=b", "X-Accel-Redirect: /x"]
    first = await served.get()
    await served.settled()
    second = await served.get()
    assert len(origin.requests) == 1
    for answer in (first, second):
        assert (answer.headers["content-encoding"], answer.headers["vary"]) == ("gzip", "Accept-Encoding")
        assert "set-cookie" not in answer.headers
        assert "x-accel-redirect" not in answer.headers


async def test_an_upstream_without_a_length_gets_one(origin: Origin, served: Served) -> None:
    origin.is_chunked = True
    assert (await served.get()).body == BIG
    await served.settled()
    assert len(served.data()) == 1
    part = await served.get(Range="bytes=-5")
    assert (part.status, part.headers["content-range"]) == (206, f"bytes {len(BIG) - 5}-{len(BIG) - 1}/{len(BIG)}")


async def test_what_ends_where_the_connection_does_is_not_kept(origin: Origin, served: Served) -> None:
    """Nobody can tell the end of the file from that of a connection that was cut."""
    origin.has_length = False
    origin.held_from, origin.cut_at = 1_000_000, 1_500_000
    origin.gate.set()
    assert (await served.get()).body == BIG[:1_500_000]
    await served.settled()
    assert served.files() == []


async def test_an_empty_file(origin: Origin, served: Served) -> None:
    origin.content = b""
    for _ in range(2):
        answer = await served.get()
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
        await served.settled()


async def test_a_file_that_somebody_has_damaged_is_fetched_again(origin: Origin, served: Served) -> None:
    await served.get()
    await served.settled()
    served.data()[0].write_bytes(b"short")
    assert (await served.get()).body == BIG
    await served.settled()
    served.data()[0].unlink()
    assert (await served.get()).body == BIG
    assert len(origin.requests) == 3


async def test_head_of_what_is_not_there_costs_a_head(origin: Origin, served: Served) -> None:
    answer = await served.get(method="HEAD")
    assert (answer.status, answer.headers["content-length"]) == (200, str(len(BIG)))
    assert [request[:4] for request in origin.requests] == ["HEAD"]
    await served.get()
    await served.settled()
    assert (await served.get(method="HEAD")).headers["etag"] == '"v1"'
    assert len(origin.requests) == 2


@pytest.mark.parametrize("path", ["/../x", "/a%00b", "/CON", "/" + "x" * 5000, "/a%5Cb"])
async def test_names_are_the_sources_to_refuse(origin: Origin, served: Served, path: str) -> None:
    assert (await served.get(path)).status == 404
    assert origin.requests == []


async def test_two_names_are_two_files(origin: Origin, served: Served) -> None:
    await served.get("/a")
    origin.content = b"other"
    assert (await served.get("/b")).body == b"other"
    assert (await served.get("/a")).body == BIG


# Generated files


def counted(made: list[str], **options: Any) -> Callable[[str], Any]:
    def rows(name: str) -> Iterator[str]:
        for number in range(1000):
            yield f"{name} {len(made)} {number}\n"

    def make(name: str) -> VirtualFile:
        def content() -> Iterator[str]:
            made.append(name)
            return rows(name)

        return VirtualFile(content, name="rows.csv", **options)

    return make


async def test_a_generated_file_has_ranges_and_a_tag_once_it_is_kept(tmp_path: Path) -> None:
    made: list[str] = []
    async with serving(dv.VirtualSource(counted(made, max_age=DAY)), tmp_path) as served:
        part = await served.get("/x", Range="bytes=5-9")  # even before
        assert (part.status, len(part.body)) == (206, 5)
        whole = await served.get("/x")
        assert whole.body[5:10] == part.body
        assert whole.headers["content-disposition"] == 'attachment; filename="rows.csv"'
        assert whole.headers["etag"] == part.headers["etag"]
        assert int(whole.headers["content-length"]) == len(whole.body)
        assert made == ["x"]
        resumed = await served.get("/x", Range="bytes=100-", If_Range=whole.headers["etag"])
        assert resumed.body == whole.body[100:]


async def test_a_hundred_clients_make_a_generated_file_once(tmp_path: Path) -> None:
    made: list[str] = []
    async with serving(dv.VirtualSource(counted(made, etag=ETag("v1"))), tmp_path) as served:
        answers = await asyncio.gather(*[served.get("/x") for _ in range(100)])
        assert {answer.body for answer in answers} == {answers[0].body}
        assert all(answer.complete for answer in answers)
        assert made == ["x"]


@pytest.mark.parametrize(
    "options, times",
    [
        *[({"max_age": DAY}, 1), ({"max_age": 0}, 3), ({"etag": ETag("v1"), "max_age": 0}, 1)],
        *[({}, 3), ({"etag": ETag("v1")}, 1), ({"last_modified": 1_700_000_000, "max_age": 0}, 1)],
    ],
)
async def test_generated_files_choose_their_own_validity(tmp_path: Path, options: Any, times: int) -> None:
    made: list[str] = []
    async with serving(dv.VirtualSource(counted(made, **options)), tmp_path) as served:
        for _ in range(3):
            answer = await served.get("/x")
            assert answer.complete
            await served.settled()
        assert len(made) == times


async def test_a_new_tag_makes_a_new_file(tmp_path: Path) -> None:
    tags = iter("aab")
    source = dv.VirtualSource(lambda name: VirtualFile(lambda: iter([name]), name=name, etag=ETag(tag), max_age=0))
    async with serving(source, tmp_path) as served:
        for expected in "aab":
            tag = next(tags)
            assert (await served.get("/x")).headers["etag"] == f'"{expected}"'
            await served.settled()
        assert len(served.data()) == 1


async def test_an_iterator_that_can_be_sent_once_is_sent_once(tmp_path: Path) -> None:
    async with serving(dv.VirtualSource(lambda name: iter(["a", "b"])), tmp_path) as served:
        assert (await served.get("/x")).body == b"ab"
        assert served.files() == []


async def test_local_files_are_not_kept_again(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.bin").write_bytes(b"local")
    async with serving(dv.PathSource(tmp_path / "files"), tmp_path / "cache") as served:
        assert (await served.get()).body == b"local"
        assert served.files() == []


# The disk


async def test_larger_than_the_cache_is_streamed(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_bytes=1_000_000) as served:
        answers = await asyncio.gather(*[served.get() for _ in range(5)])
        assert all(answer.body == BIG for answer in answers)
        assert served.files() == []
        asked = len(origin.requests)
        assert (await served.get(Range="bytes=2000000-2000009")).body == BIG[2_000_000:2_000_010]
        assert "range: bytes=2000000-" in origin.requests[-1].lower()
        assert len(origin.requests) == asked + 1


@pytest.mark.parametrize("clients", [1, 5])
async def test_a_generated_file_that_outgrows_the_cache_is_streamed_to_its_end(tmp_path: Path, clients: int) -> None:
    def content() -> Iterator[bytes]:
        for position in range(0, len(BIG), 50_000):
            yield BIG[position : position + 50_000]

    source = dv.VirtualSource(lambda name: VirtualFile(content, name=name, max_age=DAY))
    async with serving(source, tmp_path, max_bytes=1_000_000) as served:
        answers = await asyncio.gather(*[served.get("/x") for _ in range(clients)])
        assert all(answer.body == BIG and answer.complete for answer in answers)
        await served.settled()
        assert served.files() == []
        assert served.cache.counters.bytes == 0


async def test_a_range_of_what_outgrows_the_cache_is_answered(tmp_path: Path) -> None:
    """By a stream of its own, from when that is known: the content has no end."""
    closed = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(65536)
        finally:
            closed.set()

    source = dv.VirtualSource(lambda name: VirtualFile(content, name=name, max_age=DAY))
    async with serving(source, tmp_path, max_bytes=20_000_000) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /x HTTP/1.1\r\nHost: x\r\nRange: bytes=5-9\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)).startswith(b"HTTP/1.1 200 ")
        await served.settled()
        assert served.files() == []
        closed.clear()
        writer.transport.abort()
        await asyncio.wait_for(closed.wait(), 30)


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    yield 1_000_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


@pytest.mark.usefixtures("file_size_limit")
@pytest.mark.parametrize("clients", [1, 10])
async def test_a_disk_that_takes_no_more_does_not_stop_a_download(
    origin: Origin, tmp_path: Path, clients: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(remote(origin), tmp_path) as served:
        answers = await asyncio.gather(*[served.get() for _ in range(clients)])
        assert all(answer.body == BIG and answer.complete for answer in answers)
        await served.settled()
        assert served.files() == []
    assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk needs root")
@pytest.mark.parametrize("clients, is_chunked", [(1, False), (5, False), (5, True)])
async def test_a_full_disk_does_not_stop_a_download(
    origin: Origin, tmp_path: Path, clients: int, is_chunked: bool
) -> None:
    origin.is_chunked = is_chunked
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed: {mounted.stderr.decode()}")
    try:
        async with serving(remote(origin), disk / "cache") as served:
            answers = await asyncio.gather(*[served.get() for _ in range(clients)])
            assert all(answer.body == BIG and answer.complete for answer in answers)
            await served.settled()
            assert served.files() == []
            origin.content = b"fits"
            assert (await served.get("/b")).body == b"fits"
            assert len(await asyncio.gather(*[served.get("/b") for _ in range(3)])) == 3
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


async def test_a_directory_that_is_gone_does_not_stop_a_download(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    os.rmdir(served.cache.path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (await served.get()).body == BIG
    assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1


async def test_who_comes_after_the_cache_took_no_more_has_a_stream_of_their_own(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    made: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        made.append("again")
        yield b"a" * 1000
        await asyncio.wait_for(go_on.wait(), 30)
        yield b"b" * 1000

    source = dv.VirtualSource(lambda name: VirtualFile(pieces, name=name, max_age=60))
    async with serving(source, tmp_path / "cache", max_bytes=8192) as served:  # there is no room for it to grow
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /a.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await reader.readuntil(b"a" * 1000)
        late = asyncio.create_task(served.get())
        while len(made) < 2 and not late.done():
            await asyncio.sleep(0)
        go_on.set()
        assert (await late).body == b"a" * 1000 + b"b" * 1000
        assert (await reader.read()).count(b"b") == 1000
        writer.close()


async def test_a_failing_end_is_no_failed_download(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fails)
        assert (await served.get()).body == BIG
        await served.settled()
        assert served.files() == []
    assert (await served.get()).body == BIG


async def test_eviction_under_load(origin: Origin, tmp_path: Path) -> None:
    limit = 2_000_000
    origin.content = BIG[:300_000]

    async def client(served: Served, number: int) -> None:
        for turn in range(12):
            answer = await served.get(f"/{(number * 7 + turn * turn) % 17}")
            assert answer.complete
            assert answer.body == origin.content

    async with serving(remote(origin), tmp_path, max_bytes=limit) as served:
        await asyncio.gather(*[client(served, number) for number in range(8)])
        await served.settled()
        used = sum(path.stat().st_size for path in served.files())
        assert 0 < used <= limit
        assert served.cache.counters.hits > 0
        assert no_parts(served.cache.path)


async def test_the_last_that_was_used_stays(origin: Origin, tmp_path: Path) -> None:
    origin.content = BIG[:300_000]
    async with serving(remote(origin), tmp_path, max_bytes=1_000_000) as served:
        for name in ("/a", "/b", "/c", "/a", "/d"):
            await served.get(name)
            await served.settled()
        asked = len(origin.requests)
        await served.get("/a")
        await served.get("/d")
        assert len(origin.requests) == asked
        await served.get("/b")
        assert len(origin.requests) == asked + 1


# For proxies


async def test_a_complete_file_has_a_location_and_no_other_has(origin: Origin, tmp_path: Path) -> None:
    cached_source = CachedSource(remote(origin), Cache(tmp_path / "cache", max_age=0))
    app: Any = Starlette(routes=[Route("/{path:path}", Download(cached_source))])
    app = dv.OffloadMiddleware(app, backend=dv.XAccelRedirect([dv.Rule(cached_source.cache.path, "/_cache/")]))
    async with live(app) as port:
        first = await ask(port, "/a.bin")
        assert first.body == BIG
        assert "x-accel-redirect" not in first.headers
        for fetch in list(cached_source.cache._running):
            await asyncio.wait([fetch.task])
        for expected in (2, 3):  # found to be current, when it is opened
            second = await ask(port, "/a.bin", headers={"Range": "bytes=0-1"})
            assert (second.status, second.body) == (200, b"")
            name = second.headers["x-accel-redirect"].removeprefix("/_cache/")
            assert (tmp_path / "cache" / name).read_bytes() == BIG
            assert second.headers["content-type"] == "text/x-log"
            assert len(origin.requests) == expected
        # what a proxy was just told of cannot be evicted
        for path in (tmp_path / "cache").glob("*.meta"):
            assert path.stat().st_atime > path.stat().st_mtime - 5
        (tmp_path / "cache" / name).unlink()
        third = await ask(port, "/a.bin")
        assert third.body == BIG
    await cached_source.aclose()


async def test_no_offload_to_a_file_that_has_vanished(origin: Origin, tmp_path: Path) -> None:
    cached_source = CachedSource(remote(origin), Cache(tmp_path / "cache"))
    app: Any = Starlette(routes=[Route("/{path:path}", Download(cached_source))])
    app = dv.OffloadMiddleware(app, backend=dv.XSendfile([dv.Rule(cached_source.cache.path, "/c")], encoding="raw"))
    async with live(app) as port:
        await ask(port, "/a.bin")
        for fetch in list(cached_source.cache._running):
            await asyncio.wait([fetch.task])
        assert "x-sendfile" in (await ask(port, "/a.bin")).headers
        for path in (tmp_path / "cache").glob("*-*"):
            path.unlink()
        answer = await ask(port, "/a.bin")
        assert answer.body == BIG
        assert "x-sendfile" not in answer.headers
        counters = cached_source.cache.counters
        assert (counters.hits, counters.misses) == (2, 2)  # the last answer is one of both
    await cached_source.aclose()


async def read_all(file: dv.AsyncFile) -> bytes:
    async with file.open() as opened:
        assert opened.metadata.size is not None
        return b"".join([chunk async for chunk in opened.stream(dv.ByteRange(0, opened.metadata.size))])


async def test_a_source_that_is_closed_is_not_asked_by_the_next_one_of_its_name(origin: Origin, served: Served) -> None:
    cache = served.cache
    first = CachedSource(remote(origin), cache, name="again")
    await read_all(await first.resolve("a.bin"))
    await served.settled()
    await first.resolve("a.bin")
    await first.aclose()
    second = CachedSource(remote(origin), cache, name="again")
    file = await second.resolve("a.bin")
    for path in served.data():
        path.unlink()
    assert await read_all(file) == BIG
    await second.aclose()


async def test_who_holds_a_version_that_is_gone_leaves_the_next_one_alone(origin: Origin, served: Served) -> None:
    await served.get()
    await served.settled()
    held = [await served.source.resolve("a.bin") for _ in range(3)]
    for path in served.data():
        path.unlink()
    origin.content, origin.headers = b"the next", ['ETag: "v2"']
    assert await read_all(await served.source.resolve("a.bin")) == b"the next"
    await served.settled()
    asked = len(origin.requests)
    for file in held:
        assert await read_all(file) == b"the next"
    assert len(origin.requests) == asked
    assert len(served.data()) == 1


async def test_a_file_that_has_just_come_is_leased_before_a_proxy_is_told(served: Served) -> None:
    for name in ("a.bin", "b.bin"):
        await read_all(await served.source.resolve(name))
        await served.settled()
        location = (await served.source.resolve(name)).location
    assert location is not None
    directory = CacheDirectory(served.cache.path, max_bytes=1, max_unused=3600.0)
    assert directory.begin(key_hash("s", "k"), None) is None  # though there is no room but that of others
    assert os.path.exists(location)


async def test_several_parts_of_a_file_that_is_not_kept(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_bytes=8192) as served:
        answer = await served.get(Range="bytes=2000000-2000001,5-9")
        assert (answer.status, answer.complete) == (206, True)
        assert BIG[5:10] in answer.body
        assert BIG[2_000_000:2_000_002] in answer.body


# Names and settings


async def test_sources_of_one_cache_need_names_of_their_own(origin: Origin, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = CachedSource(remote(origin), cache)
    with pytest.raises(ConfigurationError, match="name="):
        CachedSource(remote(origin), cache)
    second = CachedSource(remote(origin), cache, name="second")
    assert first.name != second.name
    assert first.name == f"RemoteSource http://127.0.0.1:{origin.port}/pub/"


def made_here(name: str) -> VirtualFile:
    return VirtualFile("here", name=name)


@pytest.mark.parametrize(
    "source, name",
    [
        (dv.StorageSource(dv.MemoryStorage()), None),
        (dv.VirtualSource(lambda name: made_here(name)), None),
        (dv.VirtualSource(partial(made_here)), None),
        (dv.VirtualSource(made_here), f"VirtualSource {__file__} {__name__}.made_here"),
        (
            dv.StorageSource(dv.ObjectStorage("s3://box/a", endpoint="http://one.example", skip_signature=True)),
            "StorageSource http://one.example/box/a",
        ),
        (
            dv.StorageSource(dv.ObjectStorage("az://box/a", account_name="me", account_key="QUJD")),
            "StorageSource az://box/a account_name=me",
        ),
        (dv.StorageSource(dv.ObjectStorage("memory:///")), None),
    ],
)
async def test_the_name_tells_a_source_from_all_others(source: Any, name: str | None, tmp_path: Path) -> None:
    """Or else who comes later, or from another process, would get the files of another source."""
    if name is None:
        with pytest.raises(ConfigurationError, match="give CachedSource a name="):
            CachedSource(source, Cache(tmp_path))
    else:
        assert CachedSource(source, Cache(tmp_path)).name == name


@pytest.mark.parametrize(
    "options",
    [
        *[{"max_bytes": 0}, {"max_bytes": "1"}, {"max_bytes": True}, {"max_age": -1}, {"max_age": "1d"}],
        *[{"max_age": float("nan")}, {"max_bytes": 1.5}],
    ],
)
async def test_limits_that_are_none_are_refused(tmp_path: Path, options: Any) -> None:
    with pytest.raises(ConfigurationError):
        Cache(tmp_path, **options)


# Processes


def filler(directory: Path, origin_port: int, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.sources.cache_filler", str(directory), str(origin_port), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def content_of(name: str) -> bytes:
    """What the filler's upstream has under a name: it depends on the name alone."""
    length = 1 + hash_of(name) % 400_000
    return (f"{name} ".encode() * (length // len(name) + 1))[:length]


def hash_of(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big")


class Named(Origin):
    """An upstream with another file at every path."""

    async def _answer(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        name = head.split(" ")[1].rpartition("/")[2]
        self.content, self.headers = content_of(name), [f'ETag: "{hash_of(name):x}"']
        return await super()._answer(head, reader, writer)


async def run_kills(directory: Path, times: int) -> None:
    """Kill a process that fills a cache, again and again; afterwards all that is there is right, and counted."""
    origin = Named()
    limit = 4_000_000
    async with listening(origin.serve) as origin.port:
        for turn in range(times):
            process = filler(directory, origin.port, str(turn))
            assert process.stdout is not None
            # after some number of files, or in the midst of the next one
            lines = hash_of(f"turn {turn}") % 12
            for _ in range(lines):
                await asyncio.to_thread(process.stdout.readline)
            for _ in range(hash_of(f"yields {turn}") % 300):
                await asyncio.sleep(0)
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
            process.stdout.close()
        cache = Cache(directory, max_bytes=limit)
        await cache.sweep()
        assert no_parts(cache.path)
        files = [path for path in directory.iterdir() if path.name != "usage"]
        assert cache.counters.bytes == sum(-(-path.stat().st_size // 4096) * 4096 for path in files) <= limit
        origin.requests.clear()
        source = CachedSource(
            RemoteSource(f"http://127.0.0.1:{origin.port}/", allow_hosts=["127.0.0.1"]), cache, name="x"
        )
        hits = 0
        for number in range(40):
            assert await read_all(await source.resolve(f"{number}")) == content_of(f"{number}"), number
            hits = cache.counters.hits
        await source.aclose()
        await cache.aclose()
        assert hits > 0


KILLS = int(os.environ.get("CACHE_KILLS", "50"))


@pytest.mark.slow
@pytest.mark.timeout(60 + 5 * KILLS)
async def test_kill_at_any_moment(tmp_path: Path) -> None:
    await run_kills(tmp_path, KILLS)


@pytest.mark.slow
async def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    origin = Named()
    async with listening(origin.serve) as origin.port:
        processes = [filler(tmp_path, origin.port, str(seed), "60") for seed in (1, 2, 3)]
        ends: list[Awaitable[Any]] = [asyncio.to_thread(process.communicate) for process in processes]
        outputs = await asyncio.gather(*ends)
    for process, (output, _) in zip(processes, outputs, strict=True):
        assert process.returncode == 0
        assert output.count(b"right") == 60
        assert b"wrong" not in output
    files = [path for path in tmp_path.iterdir() if path.name != "usage"]
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    assert int((tmp_path / "usage").read_bytes().split()[0]) == used <= 4_000_000
    assert no_parts(str(tmp_path))


# Digests


SHA256 = ("sha-256", hashlib.sha256(BIG).digest())
SHA512 = ("sha-512", hashlib.sha512(BIG).digest())


async def test_a_digest_of_the_upstream_is_passed_on_and_kept(origin: Origin, served: Served) -> None:
    field = repr_digest((SHA256,))
    origin.headers.append(f"Repr-Digest: {field}")
    for _ in range(2):
        assert (await served.get()).headers["repr-digest"] == field
        assert (await served.get(Range="bytes=1-5")).headers["repr-digest"] == field
        await served.settled()
    assert len(origin.requests) == 1
    async with serving(remote(origin), Path(served.cache.path).with_name("another")) as other:
        assert (await other.get(method="HEAD")).headers["repr-digest"] == field  # without a fill
        served.cache.kept.clear()
        assert (await served.get()).headers["repr-digest"] == field  # from the file K.meta


async def test_digests_are_computed_while_a_file_is_fetched(origin: Origin, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    source = CachedSource(remote(origin), cache, name="x", digests=["sha-256", "sha-512"])
    digests = dv.Digests(source, background=True, algorithms=["sha-512", "sha-256"])
    app = Starlette(routes=[Route("/{path:path}", Download(source, digests=digests))])
    async with live(app) as port:
        served = Served(source, port)
        first = await served.get()
        assert (first.body, "repr-digest" in first.headers) == (BIG, False)
        await served.settled()
        assert (await served.get()).headers["repr-digest"] == repr_digest((SHA256,))
        described = await digests.compute("a.bin", progress=lambda size: None)
        assert described is not None
        assert described.digests == (SHA256, SHA512)
        cache.kept.clear()
        assert (await served.get(Want_Repr_Digest="sha-512=5")).headers["repr-digest"] == repr_digest((SHA512,))
    assert len(origin.requests) == 1
    await source.aclose()
    await cache.aclose()


@pytest.mark.parametrize("coding", ["gzip", None])
async def test_a_file_with_another_digest_is_not_kept(
    origin: Origin, tmp_path: Path, coding: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    origin.headers.append(f"Repr-Digest: {repr_digest((('sha-256', bytes(32)),))}")
    if coding is not None:  # it is about the coded bytes then, and is not passed on
        origin.headers.append(f"Content-Encoding: {coding}")
    cache = Cache(tmp_path / "cache")
    source = CachedSource(remote(origin), cache, name="x", digests=["sha-256"])
    async with live(Starlette(routes=[Route("/{path:path}", Download(source))])) as port:
        served = Served(source, port)
        answer = await served.get()
        assert (answer.body, "repr-digest" in answer.headers) == (BIG, coding is None)
        await served.settled()
        assert bool(served.data()) == (coding is not None)
        assert ("sha-256 digest" in caplog.text) == (coding is None)
        assert (await served.get()).body == BIG
        await served.settled()
        assert len(origin.requests) == (2 if coding is None else 1)
    await source.aclose()
    await cache.aclose()


@pytest.mark.parametrize("digests", ["sha-256", ["md5"], ["sha-256", "sha256"]])
async def test_algorithms_that_are_refused(origin: Origin, tmp_path: Path, digests: Any) -> None:
    with pytest.raises(ConfigurationError, match="digests takes some of sha-256, sha-512"):
        CachedSource(remote(origin), Cache(tmp_path), name="x", digests=digests)
