"""Times that say nothing: no validator of them ever names two versions, whichever source has the file."""

import io
import os
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.routing import Route

import downloadview_async as dv
from downloadview_async import Download
from downloadview_async.sources.local.path import FileBeneath
from downloadview_async.sources.local.root import Root
from downloadview_async.sources.workers import Workers
from downloadview_async.testing import call
from tests.live import ask, live

pytestmark = pytest.mark.asyncio
ONE, TWO = b"0123456789" * 20_000, b"9876543210" * 20_000
SMALL_ONE, SMALL_TWO = b"0123456789", b"9876543210"
SOME_TIME_AGO = 1_700_000_000


class _Blocking:
    """What fsspec and other synchronous storages look like."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, name: str, mode: str) -> Any:
        return (self._root / name).open(mode)

    def modified(self, name: str) -> datetime:
        return datetime.fromtimestamp((self._root / name).stat().st_mtime, UTC)


class _Each:
    """A source made of a function."""

    def __init__(self, make: Callable[[str], dv.AsyncFile]) -> None:
        self._make = make

    async def resolve(self, name: str) -> dv.AsyncFile:
        return self._make(name)


class _Row:
    file = "file.bin"
    changed = 0


async def _row(key: str) -> _Row:
    return _Row()


def sources(root: Path) -> dict[str, dv.Source]:
    portable, workers = Root(root, use_openat2=False), Workers()
    files = dv.PathSource(root)
    return {
        "path": files,
        "portable": _Each(lambda name: FileBeneath(portable, name, workers=workers)),
        "trusted": _Each(lambda name: dv.LocalFile(root / name)),
        "precompressed": dv.PathSource(root, precompressed=["gzip"]),
        "directory": dv.StorageSource(dv.DirectoryStorage(root)),
        "sync": dv.StorageSource(dv.SyncStorage(_Blocking(root))),
        "object": dv.ObjectSource(_row, source=files),
        "dated object": dv.ObjectSource(_row, source=files, modification_time_field="changed"),
        "file URL": dv.StorageSource(dv.ObjectStorage(f"file://{root}")),
    }


KINDS = [
    "path",
    "portable",
    "trusted",
    "precompressed",
    "directory",
    "sync",
    "object",
    "dated object",
    "file URL",
]


@pytest_asyncio.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    found = sources(tmp_path)
    assert list(found) == KINDS
    routes = [Route(f"/{kind.replace(' ', '-')}/{{name}}", Download(source)) for kind, source in found.items()]
    async with live(Starlette(routes=routes)) as port:
        yield port


def put(root: Path, content: bytes, mtime_ns: int) -> None:
    """Write the file in place, and its sibling, so that no inode is another one."""
    for name in ("file.bin", "file.bin.gz"):
        (root / name).write_bytes(content)
        os.utime(root / name, ns=(mtime_ns, mtime_ns))


def of(answer: Any) -> dict[str, str]:
    return {name: answer.headers[name] for name in ("etag", "last-modified") if name in answer.headers}


@pytest.mark.parametrize("one, two", [(SMALL_ONE, SMALL_TWO), (ONE, TWO)], ids=["small", "large"])
@pytest.mark.parametrize("mtime", [0, 1, -1, 315532800, 499162500])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_of_a_normalised_time_is_sent_whole_to_whoever_has_another_version(
    tmp_path: Path, port: int, kind: str, mtime: int, one: bytes, two: bytes
) -> None:
    path = f"/{kind.replace(' ', '-')}/file.bin"
    put(tmp_path, one, mtime * 10**9)
    for _ in range(3):  # the file is kept open, and its answer is kept, from the second time on
        first = await ask(port, path, headers={"Accept-Encoding": "gzip"})
    assert (first.status, first.body) == (200, one)
    assert of(first) == {}
    head = await ask(port, path, method="HEAD")
    assert (head.status, of(head), head.headers["content-length"]) == (200, {}, str(len(one)))
    part = await ask(port, path, headers={"Range": "bytes=4-7"})
    assert (part.status, part.body, part.headers["accept-ranges"]) == (206, one[4:8], "bytes")
    put(tmp_path, two, mtime * 10**9)
    date = "Thu, 01 Jan 1970 00:00:01 GMT"
    for headers in (
        {},
        {"If-Modified-Since": date},
        {"If-None-Match": f'"{mtime * 10**9:x}-{len(one):x}"'},
        {"If-None-Match": f'W/"{mtime * 10**9:x}-{len(one):x}"'},
        {"Range": "bytes=4-", "If-Range": date},
        {"Range": "bytes=4-", "If-Range": f'"{mtime * 10**9:x}-{len(one):x}"'},
    ):
        again = await ask(port, path, headers=headers)
        assert (again.status, again.body) == (200, two), headers
    assert (await ask(port, path, headers={"If-Match": '"0-a"'})).status == 412


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("path", "sync") else pytest.mark.slow) for kind in KINDS]
)
async def test_a_file_that_changes_as_fast_as_it_can_never_gets_a_stale_304_nor_another_ones_rest(
    tmp_path: Path, port: int, kind: str
) -> None:
    path = f"/{kind.replace(' ', '-')}/file.bin"
    for number in range(20):
        one, two = (bytes([number, number + other]) * 5 for other in (1, 2))
        (tmp_path / "file.bin").write_bytes(one)
        first = await ask(port, path)
        (tmp_path / "file.bin").write_bytes(two)
        assert first.body == one
        told = of(first)
        assert "etag" in told  # it has been waited for
        asked = {"If-None-Match": told["etag"], "If-Modified-Since": told.get("last-modified", "")}
        for headers in (asked, {"If-Modified-Since": asked["If-Modified-Since"]}):
            again = await ask(port, path, headers=headers)
            assert (again.status, again.body) == (200, two), headers
        for validator in told.values():
            rest = await ask(port, path, headers={"Range": "bytes=4-", "If-Range": validator})
            assert (rest.status, rest.body) == (200, two), validator


@pytest.mark.parametrize("kind", ["sync", "file URL"])
async def test_whole_seconds_are_believed_when_they_are_over(tmp_path: Path, port: int, kind: str) -> None:
    path = f"/{kind.replace(' ', '-')}/file.bin"
    coming = int(time.time()) + 1  # as a file system with a grain of two seconds rounds it up
    put(tmp_path, SMALL_ONE, coming * 10**9)
    for _ in range(3):
        assert "etag" not in (await ask(port, path)).headers
    put(tmp_path, SMALL_ONE, SOME_TIME_AGO * 10**9)
    told = of(await ask(port, path))
    assert told["last-modified"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    assert (await ask(port, path, headers={"If-None-Match": told["etag"]})).status == 304
    assert (await ask(port, path, headers={"If-Modified-Since": told["last-modified"]})).status == 304


async def test_a_second_version_in_memory_within_one_second_is_no_304() -> None:
    storage = dv.MemoryStorage({"a": SMALL_ONE})
    async with live(Starlette(routes=[Route("/{name}", Download(dv.StorageSource(storage)))])) as port:
        first = await ask(port, "/a")
        storage.put("a", SMALL_TWO)
        for headers in (
            {"If-Modified-Since": first.headers.get("last-modified", "")},
            {"If-None-Match": first.headers["etag"]},
        ):
            assert (await ask(port, "/a", headers=headers)).body == SMALL_TWO


async def test_a_kept_answer_gets_its_date_when_the_second_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock alone moves: the file is open all the time, and its answer would be kept."""
    put(tmp_path, SMALL_ONE, SOME_TIME_AGO * 10**9 + 1)
    source = dv.PathSource(tmp_path)
    now = SOME_TIME_AGO + 0.5
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now * 10**9))
    async with live(Starlette(routes=[Route("/{name}", Download(source))])) as port:
        for _ in range(3):
            assert set(of(await ask(port, "/file.bin"))) == {"etag"}
        now += 2
        told = await ask(port, "/file.bin")
        assert set(of(told)) == {"etag", "last-modified"}
        assert datetime.fromtimestamp(SOME_TIME_AGO, UTC).strftime("%H:%M:%S") in told.headers["last-modified"]


class _Telling:
    """A storage that reports any time at all."""

    def __init__(self, modified: Any) -> None:
        self._modified = modified

    def open(self, name: str, mode: str) -> Any:
        return io.BytesIO(SMALL_ONE)

    def modified(self, name: str) -> Any:
        return self._modified


@pytest.mark.parametrize(
    "modified",
    [float("nan"), float("inf"), float("-inf"), 10**400, "yesterday", "2023-11-14T22:13:20Z", date(2023, 11, 14), {}],
    ids=lambda modified: repr(modified)[:12],
)
async def test_a_time_that_is_not_one_is_no_validator_and_no_error(modified: Any) -> None:
    """Drivers of fsspec report what their server has sent."""
    app = Download(dv.StorageSource(dv.SyncStorage(_Telling(modified))))
    answer = await call(app, "/x", headers={"Range": "bytes=2-4"})
    assert (answer.status, answer.body, of(answer)) == (206, b"234", {})
