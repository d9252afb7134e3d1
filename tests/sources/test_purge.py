"""Purging a cache: by name and by prefix, in all processes, and while files arrive or are sent."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import downloadview_async as dv
from downloadview_async import Cache, CachedSource
from downloadview_async.sources.cache import purges
from downloadview_async.sources.cache.purges import Purge, PurgeLog
from tests.servers import PROJECT
from tests.sources.test_cached import BIG, Origin, Served, origin, remote, serving

__all__ = ["origin"]  # a fixture

pytestmark = pytest.mark.asyncio
HIT = "downloadview; hit"
MISS = "downloadview; fwd=miss; stored"


@pytest_asyncio.fixture
async def served(origin: Origin, tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(remote(origin), tmp_path / "cache") as served:
        yield served


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


async def filled(served: Served, *names: str) -> None:
    for name in names:
        assert (await served.get(f"/{name}")).status == 200
    await served.settled()


async def test_a_name_and_a_prefix(origin: Origin, served: Served) -> None:
    origin.content = b"content"
    await filled(served, "a/1", "a/2", "ab/3", "b", "b/c")
    assert await served.source.purge("a/1") == 1
    assert await served.source.purge("a/1") == 0
    assert await served.source.purge("./b") == 1  # another spelling of it
    assert await served.source.purge("/a", is_prefix=True) == 2
    assert await served.source.purge("", is_prefix=True) == 1
    assert not served.data()
    assert served.cache.counters.bytes == 0
    assert len(origin.requests) == 5
    await filled(served, "a/1")
    assert len(origin.requests) == 6
    with pytest.raises(dv.FileMissing):
        await served.source.purge("../x")


class Named:
    """A source without canonical names."""

    async def resolve(self, name: str) -> dv.AsyncFile:
        """Return a file for any name."""
        return dv.VirtualFile(b"content", name="a", max_age=3600)


@pytest.mark.parametrize("kind", ["no canonical names", "exact"])
async def test_a_prefix_of_keys_with_a_leading_slash(tmp_path: Path, kind: str) -> None:
    storage = dv.StorageSource(dv.MemoryStorage(dict.fromkeys(("/pub/a", "pub/b"), b"content")), names="exact")
    async with serving(Named() if kind != "exact" else storage, tmp_path) as served:
        await filled(served, "/pub/a", "pub/b")
        assert await served.source.purge("/pub/", is_prefix=True) == 1
        assert await served.source.purge("pub/", is_prefix=True) == 1


async def test_other_spellings_of_a_prefix(served: Served) -> None:
    await filled(served, "a/1", "a/.b", "com/1")
    assert await served.source.purge("./a//.", is_prefix=True) == 1
    assert await served.source.purge("com", is_prefix=True) == 1  # alone, it is the name of a device with a digit
    with pytest.raises(dv.FileMissing):
        await served.source.purge("a/../", is_prefix=True)
    assert await served.source.purge("/", is_prefix=True) == 1


async def test_other_sources_of_the_directory_keep_their_files(origin: Origin, served: Served) -> None:
    other = CachedSource(remote(origin), served.cache, name="another source")
    await filled(served, "a")
    assert await other.purge("", is_prefix=True) == 0
    assert len(served.data()) == 1


async def test_an_answer_that_is_being_sent_keeps_its_bytes(origin: Origin, served: Served) -> None:
    await filled(served, "a.bin")
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 16)
    writer.write(b"GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    assert await served.source.purge("a.bin") == 1
    origin.content, origin.headers[0] = BIG[::-1], 'ETag: "v2"'
    assert (await served.get()).body == BIG[::-1]
    assert await reader.readexactly(len(BIG)) == BIG
    writer.close()


@pytest.mark.parametrize("is_prefix", [True, False])
async def test_a_fill_that_began_before_is_not_kept(origin: Origin, served: Served, is_prefix: bool) -> None:
    origin.held_from = 1_000_000
    old = asyncio.create_task(served.get())
    await origin.has_open(1)
    assert await served.source.purge("a" if is_prefix else "a.bin", is_prefix=is_prefix) == 0
    origin.content, origin.headers[0], origin.held_from = BIG[::-1], 'ETag: "v2"', None
    assert (await served.get()).body == BIG[::-1]  # it does not join the old one
    origin.gate.set()
    assert (await old).body == BIG
    await served.settled()
    again = await served.get()
    assert (again.body, again.headers["cache-status"]) == (BIG[::-1], HIT)
    assert len(origin.requests) == 2


@pytest.mark.parametrize("is_by_another_process", [True, False])
async def test_a_purged_fill_leaves_nothing(origin: Origin, served: Served, is_by_another_process: bool) -> None:
    origin.held_from = 1_000_000
    old = asyncio.create_task(served.get())
    await origin.has_open(1)
    source = served.source
    if is_by_another_process:  # one that has its own view of the directory
        source = CachedSource(remote(origin), Cache(served.cache.path), name="the source")
    await source.purge("a.bin")
    origin.gate.set()
    assert (await old).body == BIG
    await served.settled()
    assert not served.data()
    # nor does it count as uncacheable
    assert (await served.get()).headers["cache-status"] == MISS


async def test_a_revalidation_that_began_before_puts_nothing_back(origin: Origin, tmp_path: Path) -> None:
    async with serving(remote(origin), tmp_path, max_age=0) as served:
        await filled(served, "a.bin")
        origin.held_from, origin.headers[0] = 1_000_000, 'ETag: "v2"'
        old = asyncio.create_task(served.get())
        await origin.has_open(1)
        (fill,) = served.cache._running
        kept = await served.cache.find(served.source.name, "a.bin")
        assert kept is not None
        assert await served.source.purge("a.bin") == 1
        assert await served.cache.renew(fill, kept.entry) is None
        assert (served.source.name, "a.bin") not in served.cache.kept
        origin.gate.set()
        assert (await old).body == BIG
        await served.settled()
        assert not served.data()


class Slow(dv.VirtualSource):
    """A source whose files take long to be described, once there is a gate. content: of the files."""

    def __init__(self) -> None:
        self.content = b"old"
        self.gate: asyncio.Event | None = None
        self.began = asyncio.Event()
        self.count = 0
        super().__init__(self._make)

    async def _make(self, name: str) -> dv.VirtualFile:
        self.count += 1
        content, gate = self.content, self.gate
        if gate is not None:
            self.began.set()
            await gate.wait()
        return dv.VirtualFile(content, name=name, max_age=3600)


@pytest.mark.parametrize("way", ["new", "gone", "stale"])
@pytest.mark.parametrize("is_first", [True, False])
async def test_a_source_that_was_asked_for_the_name_before(tmp_path: Path, way: str, is_first: bool) -> None:
    """What it gives is not kept, and is sent to no later client."""
    slow = Slow()
    async with serving(slow, tmp_path, stale_while_revalidate=3600) as served:
        if way != "new":
            await filled(served, "a")
        if way == "gone":  # behind the cache's back
            for name in served.data():
                (tmp_path / name).unlink()
        if way == "stale":
            kept = await served.cache.find(served.source.name, "a")
            assert kept is not None
            entry = replace(kept.entry, validated=kept.entry.validated - 3700)
            served.cache.directory.renew(served.source.name, "a", entry)
            served.cache.remember(served.source.name, "a", entry)
        slow.gate = gate = asyncio.Event()
        old = asyncio.create_task(served.get("/a"))
        await slow.began.wait()
        slow.content, slow.gate = b"new", None
        await served.source.purge("a")
        if is_first:
            gate.set()
            assert (await old).body == b"old"
        assert (await served.get("/a")).body == b"new"
        gate.set()
        assert (await old).body == (b"old" if is_first or way == "stale" else b"new")  # it may join the later fill
        while tasks := list(served.cache._revalidating.values()):
            await asyncio.wait(tasks)
        await served.settled()
        answer = await served.get("/a")
        assert (answer.body, answer.headers["cache-status"]) == (b"new", HIT)


async def test_a_fill_that_was_purged_before_it_began_is_not_joined(tmp_path: Path) -> None:
    slow = Slow()
    async with serving(slow, tmp_path) as served:
        slow.gate = asyncio.Event()
        resolving = asyncio.create_task(served.source.resolve("a"))
        await slow.began.wait()
        slow.content, gate, slow.gate = b"new", slow.gate, None
        await served.source.purge("a")
        gate.set()
        async with (await resolving).open() as old:
            assert (await served.get("/a")).body == b"new"
            assert [chunk async for chunk in old.stream(None)] == [b"old"]


async def test_a_purge_while_a_stale_file_is_confirmed(origin: Origin, tmp_path: Path) -> None:
    """The client whose request asked the source gets the file of the source, although nothing is kept."""
    async with serving(remote(origin), tmp_path, max_age=0) as served:
        await filled(served, "a.bin")
        looked, overtaken = asyncio.Event(), threading.Event()
        loop, renew = asyncio.get_running_loop(), served.cache.directory.renew

        def slow_renew(*arguments: Any, **options: Any) -> bool:
            loop.call_soon_threadsafe(looked.set)
            assert overtaken.wait(30)
            return renew(*arguments, **options)

        served.cache.directory.renew = slow_renew  # type: ignore[method-assign]
        answer = asyncio.create_task(served.get())
        await looked.wait()
        assert await served.source.purge("a.bin") == 1
        overtaken.set()
        assert (await answer).body == BIG
        await served.settled()
        assert (served.source.name, "a.bin") not in served.cache.kept


@pytest.mark.parametrize("step", ["commit", "renew"])
async def test_a_purge_right_after_a_file_was_kept(origin: Origin, tmp_path: Path, step: str) -> None:
    async with serving(remote(origin), tmp_path, max_age=0 if step == "renew" else 3600) as served:
        if step == "renew":
            await filled(served, "a.bin")
        done, overtaken = asyncio.Event(), threading.Event()
        loop, directory = asyncio.get_running_loop(), served.cache.directory
        call = getattr(directory, step)

        def slow(*arguments: Any, **options: Any) -> bool:
            result: bool = call(*arguments, **options)
            loop.call_soon_threadsafe(done.set)
            assert overtaken.wait(30)
            return result

        setattr(directory, step, slow)
        answer = asyncio.create_task(served.get())
        await done.wait()
        assert await served.source.purge("a.bin") == 1
        overtaken.set()
        assert (await answer).body == BIG
        await served.settled()
        assert (served.source.name, "a.bin") not in served.cache.kept


@pytest.mark.parametrize("is_prefix", [True, False])
async def test_a_request_during_a_purge(
    origin: Origin, served: Served, monkeypatch: pytest.MonkeyPatch, is_prefix: bool
) -> None:
    """It may get the file, as the purge has not returned; the requests after the purge do not."""
    await filled(served, *["a.bin"] * 3)
    loop, unlink = asyncio.get_running_loop(), os.unlink
    requests: list[asyncio.Future[Any]] = []
    has_answer = threading.Event()

    async def request() -> None:
        await served.get()
        has_answer.set()

    def slow_unlink(path: str, *arguments: Any, **options: Any) -> None:
        if path.endswith(".meta") and not requests:
            requests.append(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(request(), loop), loop=loop))
            assert has_answer.wait(30)
        unlink(path, *arguments, **options)

    monkeypatch.setattr(os, "unlink", slow_unlink)
    assert await served.source.purge("a" if is_prefix else "a.bin", is_prefix=is_prefix) == 1
    origin.content, origin.headers[0] = BIG[::-1], 'ETag: "v2"'
    assert (await served.source.resolve("a.bin")).location is None
    answer = await served.get()
    assert (answer.body, answer.headers["cache-status"]) == (BIG[::-1], MISS)


@pytest.mark.parametrize("is_filled", [False, True])
async def test_a_look_into_the_directory_that_is_overtaken(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_filled: bool
) -> None:
    """A file that was kept during the look is not fetched again, and one that was purged is not sent."""
    async with serving(remote(origin), tmp_path, max_age=3600) as served:
        if is_filled:
            await filled(served, *["a.bin"] * 3)  # so that it is kept open
            served.cache.kept.clear()  # so that the next request looks
        looked, overtaken = asyncio.Event(), threading.Event()
        loop, gates = asyncio.get_running_loop(), [overtaken]

        def hold() -> None:
            if gates:
                gate = gates.pop()
                loop.call_soon_threadsafe(looked.set)
                assert gate.wait(30)

        open_, utime = os.open, os.utime

        def slow_open(path: str, *arguments: Any, **options: Any) -> int:
            try:
                return open_(path, *arguments, **options)
            except FileNotFoundError:
                hold()
                raise

        def slow_utime(*arguments: Any, **options: Any) -> None:
            utime(*arguments, **options)
            hold()

        monkeypatch.setattr(os, "open", slow_open)
        monkeypatch.setattr(os, "utime", slow_utime)
        first = asyncio.create_task(served.get())
        await looked.wait()
        if is_filled:
            assert await served.source.purge("a.bin") == 1
            origin.content, origin.headers[0] = BIG[::-1], 'ETag: "v2"'
        else:
            await filled(served, "a.bin")
        overtaken.set()
        assert (await first).body == origin.content
        assert (await served.get()).body == origin.content
        assert len(origin.requests) == (2 if is_filled else 1)


async def test_another_process_learns_of_it_at_once(origin: Origin, served: Served) -> None:
    await filled(served, "a.bin", "b.bin")
    for _ in range(3):  # so that it is kept open
        assert (await served.get()).headers["cache-status"] == HIT
    code = (
        "import asyncio, sys, downloadview_async as dv\n"
        "source = dv.CachedSource(dv.VirtualSource(print), dv.Cache(sys.argv[1]), name='the source')\n"
        "print(asyncio.run(source.purge('a.bin')))\n"
    )
    command = [sys.executable, "-c", code, served.cache.path]
    process = await asyncio.create_subprocess_exec(*command, cwd=PROJECT, stdout=subprocess.PIPE)
    assert (await process.communicate())[0] == b"1\n"
    origin.content, origin.headers[0] = BIG[::-1], 'ETag: "v2"'
    answer = await served.get()
    assert (answer.body, answer.headers["cache-status"]) == (BIG[::-1], MISS)
    assert (await served.get("/b.bin")).headers["cache-status"] == HIT


async def test_a_file_that_a_proxy_may_still_open_is_not_sent_again(served: Served) -> None:
    await filled(served, "a.bin")
    location = (await served.source.resolve("a.bin")).location
    assert location is not None
    await served.source.purge("a.bin")
    assert Path(location).read_bytes() == BIG
    assert (await served.source.resolve("a.bin")).location is None
    assert (await served.get()).headers["cache-status"] == MISS


async def test_the_log_is_replaced_when_it_is_long(directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = PurgeLog(directory), PurgeLog(directory)
    start = other.position()
    assert other.since(start) == ()
    one.add(Purge("s", "a"))
    assert other.since(start) == [Purge("s", "a")]
    middle = other.position()
    one.add(Purge("s", "\udcff\n", is_prefix=True))
    assert other.since(middle) == [Purge("s", "\udcff\n", is_prefix=True)]
    assert PurgeLog(directory).since(other.position()) == ()
    monkeypatch.setattr(purges, "MAX_BYTES", 10)
    one.add(Purge("s", "b"))
    assert other.since(middle) is None
    assert other.since(start) is None
    last = other.position()
    monkeypatch.undo()
    one.add(Purge("s", "c"))
    assert other.since(last) == [Purge("s", "c")]


@pytest.mark.parametrize("is_long", [True, False])
async def test_a_log_that_is_gone_is_made_again(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    one, other = PurgeLog(directory), PurgeLog(directory)
    one.add(Purge("s", "a"))
    before = other.position()
    (tmp_path / "purges").unlink()
    monkeypatch.setattr(purges, "MAX_BYTES", 0 if is_long else 1 << 20)
    one.add(Purge("s", "b"))
    assert other.since(before) is None
    last = other.position()
    monkeypatch.undo()
    one.add(Purge("s", "c"))
    assert other.since(last) == [Purge("s", "c")]


async def test_a_log_that_is_lost_means_that_anything_was_purged(served: Served) -> None:
    await served.source.purge("b.bin")
    await filled(served, "a.bin")
    assert (served.source.name, "a.bin") in served.cache.kept
    (Path(served.cache.path) / "purges").unlink()
    await served.source.purge("c.bin")
    assert (served.source.name, "a.bin") not in served.cache.kept
    assert (await served.get()).headers["cache-status"] == HIT  # it is still on the disk


async def test_a_disk_that_fails_is_an_error(served: Served) -> None:
    await filled(served, "a.bin")
    usage = Path(served.cache.path) / "usage"
    usage.unlink()
    usage.mkdir()
    with pytest.raises(dv.SourceUnavailable, match="cannot be purged"):
        await served.source.purge("a.bin")


async def test_without_a_purge_there_is_no_log(served: Served) -> None:
    await filled(served, "a.bin")
    assert served.cache.directory.purges.position() == (0, 0)
    assert not (Path(served.cache.path) / "purges").exists()
