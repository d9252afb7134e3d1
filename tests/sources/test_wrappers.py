"""Wrappers around our files: those that pass on `local` and `open_nowait` cost no speed, all others are correct."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import downloadview_async as dv
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import (
    Aged,
    Dated,
    Local,
    MadeOnDemand,
    OnDemand,
    OpenLocalBytes,
    OpensNowait,
    ReadsOver,
    Recoded,
    Unframed,
    on_demand_of,
)
from downloadview_async.sources.cache import source as cached
from downloadview_async.sources.cache.source import KeptFile
from downloadview_async.sources.cache.spool import ArrivingFile
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of, open_nowait
from downloadview_async.sources.local.path import FileBeneath
from downloadview_async.sources.local.root import has_openat2
from downloadview_async.sources.object import OpenObjectFile
from downloadview_async.sources.open_object import OpenObject
from downloadview_async.sources.remote.source import OpenRemoteFile
from tests.descriptors import open_paths
from tests.live import ask, live, make_old
from tests.sources.test_cached import BIG, Origin, origin, remote, serving

__all__ = ["origin"]  # a fixture

pytestmark = pytest.mark.asyncio

# The type checker compares our classes with the protocols.
NOWAIT: tuple[type[OpensNowait], ...] = (FileBeneath, dv.StorageFile, dv.ObjectFile, KeptFile)
LOCAL: tuple[type[Local], ...] = (OpenLocalFile, OpenObjectFile)
AGED: tuple[type[Aged], ...] = (OpenLocalFile, OpenObjectFile, ArrivingFile)
DATED: tuple[type[Dated], ...] = (OpenRemoteFile, OpenObjectFile, ArrivingFile)
RECODED: tuple[type[Recoded], ...] = (OpenRemoteFile, OpenObjectFile, OpenObject)
UNFRAMED: tuple[type[Unframed], ...] = (OpenRemoteFile, OpenObjectFile, ArrivingFile)
READS_OVER: tuple[type[ReadsOver], ...] = (OpenRemoteFile, OpenObjectFile)
ON_DEMAND: tuple[type[MadeOnDemand], ...] = (dv.VirtualFile,)

SMALL, LARGE = b"small", bytes(range(256)) * 4096  # one message of ours, and a megabyte for the kernel to send


class Wrapped:
    """A file as an application may wrap it: everything that is optional is left out."""

    def __init__(self, file: dv.AsyncFile) -> None:
        self.name = f"copy of {file.name}"
        self.location: str | None = None
        self.file = file
        self.opened: list[str] = []

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[dv.OpenFile]:
        self.opened.append("open")
        async with self.file.open(request) as opened:
            yield self.wrapped(opened)

    def wrapped(self, opened: dv.OpenFile) -> "WrappedOpen":
        return WrappedOpen(opened)


class WrappedOpen:
    """An open file with the bytes of another one."""

    def __init__(self, opened: dv.OpenFile) -> None:
        self.inner = opened

    @property
    def metadata(self) -> FileMetadata:
        return self.inner.metadata

    def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        return self.inner.stream(span)


class WrappedLocal(Wrapped):
    """As above, but its open files offer `Local`."""

    def wrapped(self, opened: dv.OpenFile) -> "WrappedOpenLocal":
        return WrappedOpenLocal(opened)


class WrappedOpenLocal(WrappedOpen):
    @property
    def local(self) -> OpenLocalFile | None:
        return local_of(self.inner)


class WrappedNowait(WrappedLocal):
    """As above, but it offers `OpensNowait` too."""

    def open_nowait(self, request: DownloadRequest) -> OpenLocalBytes | None:
        opened = open_nowait(self.file, request)
        self.opened.append("wait" if opened is None else "nowait")
        return None if opened is None else self.wrapped(opened)


class WrappedOnDemand(Wrapped):
    """As `Wrapped`, but it offers `MadeOnDemand` too."""

    @property
    def on_demand(self) -> OnDemand | None:
        return on_demand_of(self.file)


def recorded(app: ASGIApp, messages: list[Message]) -> ASGIApp:
    """Return the application, which notes the messages that it sends to the server."""

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            messages.append({name: value for name, value in message.items() if name != "descriptor"})  # a loan ends
            await send(message)

        await app(scope, receive, noting)

    return recording


def kinds(messages: list[Message]) -> list[str]:
    return [message["type"].removeprefix("http.response.") for message in messages]


@pytest.mark.parametrize(
    "wrap, ways, is_sent_by_the_kernel",
    [
        (Wrapped, ["open"], False),
        (WrappedLocal, ["open"], True),
        (WrappedNowait, ["nowait"], True),
    ],
)
@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("fields, first", [({}, 0), ({"Range": "bytes=2-"}, 2)], ids=["whole", "range"])
async def test_a_wrapper_is_sent_as_fast_as_the_protocols_that_it_passes_on(
    tmp_path: Path,
    wrap: Callable[[dv.AsyncFile], Wrapped],
    ways: list[str],
    is_sent_by_the_kernel: bool,
    content: bytes,
    fields: dict[str, str],
    first: int,
) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    make_old(tmp_path)
    source = dv.PathSource(tmp_path)
    if ways == ["nowait"] and not (has_openat2() and source.root.is_quick):
        pytest.skip("a file system or a kernel that always asks for a worker")
    file = wrap(source.file("a.bin"))
    messages: list[Message] = []
    async with live(recorded(dv.DownloadResponse(file), messages), http=DownloadProtocol) as port:
        for _ in range(10):  # the kernel may have to wait for once: for a rename elsewhere, or for a page
            messages.clear()
            file.opened.clear()
            answer = await ask(port, "/", headers=fields)
            if file.opened == ways:
                break
    assert (answer.status, answer.body, answer.complete) == (206 if first else 200, content[first:], True)
    assert "copy of a.bin" in answer.headers["content-disposition"]
    assert file.opened == ways
    if content is LARGE and is_sent_by_the_kernel:
        assert kinds(messages) == ["start", "pathsend"]
        assert (messages[1]["offset"], messages[1]["count"]) == (first, len(content) - first)
    else:
        assert set(kinds(messages)) == {"start", "body"}
        assert len(messages) > (2 if content is LARGE else 1)


async def test_what_a_wrapper_has_opened_without_waiting_is_closed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(LARGE)
    make_old(tmp_path)
    file = WrappedNowait(dv.PathSource(tmp_path).file("a.bin"))
    async with live(dv.DownloadResponse(file), http=DownloadProtocol) as port:
        for _ in range(5):
            assert (await ask(port, "/")).body == LARGE
    assert open_paths().count(os.path.realpath(tmp_path / "a.bin")) <= 1  # one may be in the cache of open files


@pytest.mark.parametrize("optional", [Local, Aged, Dated, Recoded, Unframed, ReadsOver])
async def test_the_file_of_an_object_offers_what_its_file_offers(optional: type) -> None:
    offered: dict[str, Any] = {name: object() for name, value in vars(optional).items() if isinstance(value, property)}
    assert offered
    inner: Any = SimpleNamespace(metadata=FileMetadata(), **offered)
    opened = OpenObjectFile(inner, inner.metadata)
    assert {name: getattr(opened, name) for name in offered} == offered


async def test_a_cache_over_objects_reads_an_upstream_without_ranges_once(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def get(key: str) -> SimpleNamespace:
        return SimpleNamespace(file=key)

    monkeypatch.setattr(cached, "MAX_AHEAD", 100_000)
    origin.ranges = False
    upstream = remote(origin)
    async with serving(dv.ObjectSource(get, source=upstream), tmp_path / "cache") as served:
        for _ in range(3):
            part = await served.get(Range="bytes=2000000-2000009")
            assert (part.status, part.body) == (206, BIG[2_000_000:2_000_010])
            await served.settled()
        assert len(origin.requests) == 2  # the first one shows that there are no ranges
    await upstream.aclose()


async def test_a_cache_over_a_cache_does_not_keep_a_file_that_may_be_cut_off(origin: Origin, tmp_path: Path) -> None:
    origin.has_length = False
    inner = dv.CachedSource(remote(origin), dv.Cache(tmp_path / "inner"), name="inner")
    async with serving(inner, tmp_path / "outer") as served:
        assert (await served.get()).body == BIG
        await served.settled()
        assert served.data() == []


async def test_a_cache_over_a_cache_knows_how_old_a_file_is(origin: Origin, tmp_path: Path) -> None:
    origin.headers.append("Age: 100")
    inner = dv.CachedSource(remote(origin), dv.Cache(tmp_path / "inner"), name="inner")
    async with serving(inner, tmp_path / "outer") as served:
        assert (await served.get()).body == BIG
        await served.settled()
        kept = await served.cache.find(served.source.name, "a.bin")
        assert kept is not None
        assert kept.entry.age >= 100


@pytest.mark.parametrize("max_age, times", [(60, 1), (None, 3)])
async def test_a_cache_over_wrapped_content_keeps_it_as_long_as_the_content_says(
    tmp_path: Path, max_age: float | None, times: int
) -> None:
    made: list[str] = []

    def make(name: str) -> WrappedOnDemand:
        async def content() -> AsyncIterator[bytes]:
            made.append(name)
            yield LARGE

        return WrappedOnDemand(dv.VirtualFile(content, name=name, max_age=max_age))

    async with serving(dv.VirtualSource(make), tmp_path) as served:
        for _ in range(3):
            assert (await served.get("/x")).body == LARGE
            await served.settled()
    assert len(made) == times
