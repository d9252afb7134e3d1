"""One set of promises, kept by every storage."""

import asyncio
import io
import os
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from downloadview_async import (
    AccessDenied,
    ByteRange,
    ConfigurationError,
    DirectoryStorage,
    Download,
    FileMissing,
    MemoryStorage,
    ObjectStorage,
    SourceUnavailable,
    Storage,
    StorageFile,
    StorageSource,
    SyncStorage,
    TransferAborted,
    storage_from_url,
)
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.memory_storage import OpenBytes
from downloadview_async.testing import call

pytestmark = pytest.mark.asyncio
CONTENT = bytes(range(256)) * 4096  # 1 MiB: several chunks


class FileSystem:
    """What fsspec's local file system looks like, with a count of what is open and the largest read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open_now = 0
        self.largest = 0

    def open(self, path: str, mode: str) -> Any:
        assert mode == "rb"
        outer = self

        class File:
            def __init__(self) -> None:
                self.raw = (outer.root / path).open("rb")
                outer.open_now += 1

            def read(self, size: int) -> bytes:
                outer.largest = max(outer.largest, size)
                return self.raw.read(size)

            def seek(self, *args: int) -> int:
                return self.raw.seek(*args)

            def close(self) -> None:
                outer.open_now -= 1
                self.raw.close()

        return File()

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp((self.root / path).stat().st_mtime, UTC)

    def url(self, path: str) -> str:
        return f"https://files.test/{path}"


class Django:
    """What a Django storage looks like: no size without a stat, a path, a URL that is only a path."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, mode: str = "rb") -> Any:
        return (self.root / name).open("rb")

    def path(self, name: str) -> str:
        return str(self.root / name)

    def url(self, name: str) -> str:
        return f"/media/{name}"

    def get_modified_time(self, name: str) -> datetime:
        return datetime.fromtimestamp((self.root / name).stat().st_mtime)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.bin").write_bytes(CONTENT)
    (tmp_path / "empty").write_bytes(b"")
    return tmp_path


@pytest.fixture(params=["directory", "memory", "fsspec", "django", "url"])
def storage(request: pytest.FixtureRequest, root: Path) -> Storage:
    makers: dict[str, Callable[[], Storage]] = {
        "directory": lambda: DirectoryStorage(root),
        "memory": lambda: MemoryStorage({"sub/file.bin": CONTENT, "empty": b""}),
        "fsspec": lambda: SyncStorage(FileSystem(root)),
        "django": lambda: SyncStorage(Django(root)),
        "url": lambda: storage_from_url(f"file://{root}"),
    }
    return makers[request.param]()


async def read(storage: Storage, name: str, span: ByteRange | None = None) -> bytes:
    async with storage.open(name) as opened:
        return b"".join([chunk async for chunk in opened.stream(span)])


SPANS = [(0, 10), (0, len(CONTENT)), (1000, 600_000), (len(CONTENT) - 1, len(CONTENT)), (5, 5), (0, 300_000)]


@pytest.mark.parametrize("start, stop", SPANS)
async def test_any_span_is_exactly_that(storage: Storage, start: int, stop: int) -> None:
    assert await read(storage, "sub/file.bin", ByteRange(start, stop)) == CONTENT[start:stop]


async def test_several_spans_of_one_open_file_in_any_order(storage: Storage) -> None:
    async with storage.open("sub/file.bin") as opened:
        for start, stop in ((700_000, 700_010), (0, 3), (500, 300_000)):
            assert b"".join([c async for c in opened.stream(ByteRange(start, stop))]) == CONTENT[start:stop]


async def test_the_whole_and_the_empty_file(storage: Storage) -> None:
    answer = await call(Download(StorageSource(storage)), "/sub/file.bin")
    assert answer.body == CONTENT
    assert (answer.headers["content-length"], answer.headers["accept-ranges"]) == (str(len(CONTENT)), "bytes")
    assert answer.headers["content-disposition"] == 'attachment; filename="file.bin"'
    assert (await call(Download(StorageSource(storage)), "/empty")).headers["content-length"] == "0"


async def test_validators_change_with_the_file(storage: Storage, root: Path) -> None:
    app = Download(StorageSource(storage))
    before = (await call(app, "/sub/file.bin")).headers["etag"]
    assert (await call(app, "/sub/file.bin", headers={"If-None-Match": before})).status == 304
    if isinstance(storage, MemoryStorage):
        storage.put("sub/file.bin", CONTENT[::-1])
    else:
        (root / "sub" / "file.bin").write_bytes(CONTENT[::-1])
        os.utime(root / "sub" / "file.bin", ns=(0, 1_700_000_000_000_000_001))
    assert (await call(app, "/sub/file.bin")).headers["etag"] != before


@pytest.mark.parametrize("name", ["none", "sub", "sub/none", "sub/file.bin/x"])
async def test_what_is_no_file_is_missing(storage: Storage, name: str) -> None:
    with pytest.raises(FileMissing):
        await read(storage, name)


@pytest.mark.parametrize("name", ["", "../x", "/etc/../passwd", "a/", "a/.", "a\\b", "CON", "a:b", "a\0b"])
async def test_a_name_that_no_file_has_never_reaches_a_storage(name: str) -> None:
    class Untouchable:
        def open(self, name: str, request: Any = None) -> Any:
            raise AssertionError("asked")

        async def locate(self, name: str) -> str | None:
            raise AssertionError("asked")

    with pytest.raises(FileMissing):
        await StorageSource(Untouchable()).resolve(name)


async def test_locations(root: Path) -> None:
    table: list[tuple[Storage, str | None]] = [
        (DirectoryStorage(root), f"{root}/sub/file.bin"),
        (MemoryStorage(), None),
        (SyncStorage(Django(root)), f"{root}/sub/file.bin"),
        (SyncStorage(FileSystem(root)), "https://files.test/sub/file.bin"),
    ]
    for storage, location in table:
        assert (await StorageSource(storage).resolve("sub/file.bin")).location == location


async def test_a_synchronous_storage_is_read_in_pieces_and_closed(root: Path) -> None:
    files = FileSystem(root)
    app = Download(StorageSource(SyncStorage(files)))
    assert (await call(app, "/sub/file.bin")).body == CONTENT
    await call(app, "/sub/file.bin", leave_after_bytes=1)
    await call(app, "/sub/file.bin", cancel_after_bytes=1)
    await call(app, "/sub/file.bin", method="HEAD")
    assert files.open_now == 0
    assert 0 < files.largest <= 256 * 1024


ERRORS = [
    (FileNotFoundError(2, "x"), FileMissing),
    (IsADirectoryError(21, "x"), FileMissing),
    (PermissionError(13, "x"), AccessDenied),
    (OSError(5, "x"), SourceUnavailable),
    (FileMissing("x"), FileMissing),
]


@pytest.mark.parametrize("error, ours", ERRORS)
@pytest.mark.parametrize("where", ["open", "modified"])
async def test_errors_of_a_synchronous_storage(root: Path, error: Exception, ours: type[Exception], where: str) -> None:
    files = FileSystem(root)

    def fail(*args: Any) -> Any:
        raise error

    setattr(files, where, fail)
    with pytest.raises(ours):
        await read(SyncStorage(files), "sub/file.bin")
    assert files.open_now == 0


async def test_a_read_that_fails_aborts(root: Path) -> None:
    class Failing(FileSystem):
        def open(self, path: str, mode: str) -> Any:
            file = super().open(path, mode)

            def fail(size: int) -> bytes:
                raise OSError(5, "Input/output error")

            file.read = fail
            return file

    with pytest.raises(TransferAborted, match="Input/output"):
        await read(SyncStorage(Failing(root)), "sub/file.bin", ByteRange(0, 10))


async def test_an_object_that_can_say_less(root: Path) -> None:
    class Bare:
        def open(self, name: str, mode: str) -> Any:
            return (root / name).open(mode)

        def path(self, name: str) -> str:
            raise NotImplementedError

    answer = await call(Download(StorageSource(SyncStorage(Bare()))), "/sub/file.bin", headers={"Range": "bytes=-2"})
    assert (answer.status, answer.body) == (206, CONTENT[-2:])
    assert not {"etag", "last-modified"} & set(answer.headers)
    assert (await StorageSource(SyncStorage(Bare())).resolve("x")).location is None
    with pytest.raises(ConfigurationError, match="no method open"):
        SyncStorage(object())


async def test_a_stream_that_cannot_seek_is_sent_whole() -> None:
    class Stream:
        def __init__(self) -> None:
            self.left = [b"01234", b"56789", b""]

        def read(self, size: int) -> bytes:
            return self.left.pop(0)

        def close(self) -> None:
            pass

    class Streams:
        def open(self, name: str, mode: str) -> Stream:
            return Stream()

        def size(self, name: str) -> int:
            return 10

    answer = await call(Download(StorageSource(SyncStorage(Streams()))), "/x", headers={"Range": "bytes=2-3"})
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"0123456789", "10")
    assert "accept-ranges" not in answer.headers


class Stored:
    """A storage of deflated files: `open` gives the stored bytes, and `size` counts them."""

    stored = zlib.compress(CONTENT)

    def open(self, name: str, mode: str = "rb") -> Any:
        return Unseekable(self.stored)

    def size(self, name: str) -> int:
        return len(self.stored)


class Inflating(Stored):
    def open(self, name: str, mode: str = "rb") -> Any:
        return Unseekable(zlib.decompress(self.stored))


class Counting(Stored):
    def open(self, name: str, mode: str = "rb") -> Any:
        return Unseekable(zlib.decompress(self.stored))

    def size(self, name: str) -> int:
        return len(CONTENT)


class Unseekable(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *args: Any) -> int:
        raise io.UnsupportedOperation("seek")


class AbstractFiles:
    """What fsspec's base class looks like: `open` calls `_open`, and `size` calls `info`."""

    def open(self, path: str, mode: str = "rb") -> Any:
        return self._open(path, mode)

    def _open(self, path: str, mode: str) -> Any:
        raise NotImplementedError

    def info(self, path: str) -> Any:
        raise NotImplementedError

    def size(self, path: str) -> Any:
        return self.info(path).get("size")


class HTTPFiles(AbstractFiles):
    """What a file system of fsspec looks like."""

    stored = zlib.compress(CONTENT)

    def _open(self, path: str, mode: str) -> Any:
        return Unseekable(self.stored)

    def info(self, path: str) -> Any:
        return {"name": path, "size": len(self.stored)}


class AsyncFiles(AbstractFiles):
    """What fsspec's asynchronous file systems look like: `info` and `size` of an instance run its `_info`."""

    stored = zlib.compress(CONTENT)

    def __init__(self) -> None:
        vars(self).update(info=self._info_now, size=lambda path: self._info_now(path)["size"])

    def _open(self, path: str, mode: str) -> Any:
        return Unseekable(self.stored)

    async def _info(self, path: str) -> Any:
        return {"name": path, "size": len(self.stored)}

    def _info_now(self, path: str) -> Any:
        return asyncio.run(self._info(path))


class Streaming(HTTPFiles):
    """A server that does not tell the size."""

    def info(self, path: str) -> Any:
        return {"name": path, "size": None}

    def _open(self, path: str, mode: str) -> Any:
        return Unseekable(self.stored)


class InflatingHTTPFiles(HTTPFiles):
    def _open(self, path: str, mode: str) -> Any:
        return Unseekable(zlib.decompress(self.stored))


class InflatingAsyncFiles(AsyncFiles):
    def _open(self, path: str, mode: str) -> Any:
        return Unseekable(zlib.decompress(self.stored))


SIZES = [
    (Stored, Stored.stored, True),
    (Inflating, CONTENT, False),
    (Counting, CONTENT, True),
    (HTTPFiles, Stored.stored, True),
    (AsyncFiles, Stored.stored, True),
    (Streaming, Stored.stored, False),
    (InflatingHTTPFiles, CONTENT, False),
    (InflatingAsyncFiles, CONTENT, False),
]


@pytest.mark.parametrize("kind, content, is_known", SIZES)
async def test_a_size_is_told_only_where_it_counts_the_bytes_that_open_gives(
    kind: Callable[[], Any], content: bytes, is_known: bool
) -> None:
    answer = await call(Download(StorageSource(SyncStorage(kind()))), "/x", headers={"Range": "bytes=2-3"})
    assert (answer.status, answer.body == content) == (200, True)
    assert answer.headers.get("content-length") == (str(len(content)) if is_known else None)
    assert "accept-ranges" not in answer.headers


@pytest.mark.parametrize("is_same, size", [(None, None), (True, len(Stored.stored)), (False, None)])
async def test_a_storage_says_itself_whether_its_size_counts_what_it_opens(
    is_same: bool | None, size: int | None
) -> None:
    class Logging(Stored):
        is_sent_as_stored = is_same

        def open(self, name: str, mode: str = "rb") -> Any:
            return super().open(name, mode)

    async with SyncStorage(Logging()).open("x") as opened:
        assert opened.metadata.size == size


@pytest.mark.parametrize(
    "modified, tag",
    [
        (1_700_000_000, 'W/"60a24181e4000-0"'),
        (1_700_000_000.25, '"60a2418221090-0"'),
        (datetime(2023, 11, 14, 22, 13, 20, 250_000), '"60a2418221090-0"'),
        (datetime(2023, 11, 14, 22, 13, 20, 250_000, tzinfo=UTC), '"60a2418221090-0"'),
    ],
)
async def test_a_time_in_whole_seconds_makes_a_weak_tag(root: Path, modified: Any, tag: str) -> None:
    files = FileSystem(root)
    files.modified = lambda path: modified  # type: ignore[method-assign]
    answer = await call(Download(StorageSource(SyncStorage(files))), "/empty")
    assert answer.headers["etag"] == tag
    assert answer.headers["last-modified"] == "Tue, 14 Nov 2023 22:13:20 GMT"


class Versions:
    """A storage whose file is replaced by a longer one, right before or right after the first times it is opened."""

    def __init__(self, *, replacements: int, when: str = "after", can_seek: bool = True, step: float = 60.0) -> None:
        self.version = 0
        self.replacements = replacements
        self.when = when
        self.can_seek = can_seek
        self.step = step
        self.opened: list[io.BytesIO] = []

    def content(self) -> bytes:
        return b"%d" % self.version * (10 + self.version)

    def open(self, name: str, mode: str) -> io.BytesIO:
        if self.when == "before":
            self.replace()
        self.opened.append((io.BytesIO if self.can_seek else Unseekable)(self.content()))
        if self.when == "after":
            self.replace()
        return self.opened[-1]

    def size(self, name: str) -> int:
        return len(self.content())

    def modified(self, name: str) -> float:
        return 1_700_000_000.25 + self.step * self.version

    def replace(self) -> None:
        if self.replacements:
            self.replacements -= 1
            self.version += 1


@pytest.mark.parametrize("can_seek", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("replacements", [0, 1])
async def test_validators_are_those_of_the_version_that_is_sent(replacements: int, when: str, can_seek: bool) -> None:
    files = Versions(replacements=replacements, when=when, can_seek=can_seek)
    app = Download(StorageSource(SyncStorage(files)))
    first = await call(app, "/x")
    settled = await call(app, "/x")
    assert (first.status, first.body, first.headers["content-length"]) == (200, files.content(), str(len(first.body)))
    assert first.headers["etag"] == settled.headers["etag"]
    assert first.headers["last-modified"] == settled.headers["last-modified"]
    assert len(files.opened) == 2 + replacements
    assert all(file.closed for file in files.opened)


@pytest.mark.parametrize("can_seek", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [60.0, -60.0])
async def test_a_file_that_is_replaced_whenever_it_is_opened_has_no_validators(
    when: str, can_seek: bool, step: float
) -> None:
    files = Versions(replacements=9, when=when, can_seek=can_seek, step=step)
    answer = await call(Download(StorageSource(SyncStorage(files))), "/x")
    version = 2 if when == "before" else 1
    assert (answer.status, answer.body) == (200, b"%d" % version * (10 + version))
    assert not {"etag", "last-modified"} & set(answer.headers)
    assert answer.headers.get("content-length") == (str(10 + version) if can_seek else None)
    assert len(files.opened) == 2
    assert all(file.closed for file in files.opened)


async def test_a_time_in_whole_seconds_has_to_be_over_before_the_file_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock moves while the file is opened: a change in the same second would not have shown."""
    now = 1_700_000_000.5
    monkeypatch.setattr(time, "time_ns", lambda: int(now * 10**9))

    class Slow:
        def open(self, name: str, mode: str) -> Any:
            nonlocal now
            now += 60
            return io.BytesIO(CONTENT)

        def modified(self, name: str) -> int:
            return 1_700_000_000

    async with SyncStorage(Slow()).open("x") as opened:
        assert (opened.metadata.etag, opened.metadata.last_modified) == (None, None)
    async with SyncStorage(Slow()).open("x") as opened:
        assert opened.metadata.last_modified == 1_700_000_000


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "x"), KeyError("x")])
async def test_a_missing_file_is_missing_whatever_its_time_says(error: Exception) -> None:
    class Empty:
        def open(self, name: str, mode: str) -> Any:
            raise FileNotFoundError(2, "told by open")

        def modified(self, name: str) -> float:
            raise error

    with pytest.raises(FileMissing, match="told by open"):
        await read(SyncStorage(Empty()), "x")


async def test_a_time_that_is_told_only_once_a_file_was_opened_is_told() -> None:
    class Lazy(Versions):
        def modified(self, name: str) -> float:
            if not self.opened:
                raise OSError(5, "not loaded")
            return super().modified(name)

    answer = await call(Download(StorageSource(SyncStorage(Lazy(replacements=0)))), "/x")
    assert (answer.body, answer.headers["last-modified"]) == (b"0" * 10, "Tue, 14 Nov 2023 22:13:20 GMT")


async def test_errors_that_a_storage_has_of_its_own_are_a_503() -> None:
    class Odd:
        def open(self, name: str, mode: str) -> Any:
            raise KeyError(name)

    assert (await call(Download(StorageSource(SyncStorage(Odd()))), "/x")).status == 503


async def test_memory_is_a_new_version_with_each_put() -> None:
    storage = MemoryStorage({"x": b"old"})
    async with storage.open("x") as opened:
        storage.put("x", b"new!")
        assert [chunk async for chunk in opened.stream(None)] == [b"old"]
    assert await read(storage, "x") == b"new!"
    storage.delete("x")
    with pytest.raises(FileMissing):
        await read(storage, "x")
    with pytest.raises(FileMissing):
        storage.delete("x")


@pytest.mark.parametrize(
    "url", ["", "/srv", "file:srv", "file://host/srv", "s3://", "memory://x", "file:///nothing/here", "ftp://x"]
)
async def test_a_url_that_is_no_storage_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        storage_from_url(url)


async def test_storages_by_url(root: Path) -> None:
    assert isinstance(storage_from_url("memory://"), MemoryStorage)
    assert isinstance(storage_from_url("s3://bucket/prefix", region="eu-west-1"), ObjectStorage)
    with pytest.raises(ConfigurationError, match="region"):
        storage_from_url("memory://", region="eu-west-1")
    (root / "a b").mkdir()
    (root / "a b" / "x").write_bytes(b"x")
    assert await read(storage_from_url(f"file://{root}/a%20b"), "x") == b"x"


async def test_a_storage_file_by_key() -> None:
    file = StorageFile(MemoryStorage({"k/1": b"x"}), "k/1", name="one.txt")
    async with file.open() as opened:
        assert opened.metadata.size == 1
    assert (file.name, file.location) == ("one.txt", None)


class Shouting(DirectoryStorage):
    """A storage that gives its files away in its own way."""

    @asynccontextmanager
    async def open(self, name: str, request: DownloadRequest = GET) -> AsyncIterator[Any]:
        async with super().open(name, request) as opened:
            content = b"".join([chunk async for chunk in opened.stream(None)]).upper()
        yield OpenBytes(content, FileMetadata(size=len(content)))


async def test_a_storage_that_opens_in_its_own_way_is_never_bypassed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"quiet")
    app = Download(StorageSource(Shouting(tmp_path)))
    for _ in range(5):
        assert (await call(app, "/a.txt")).body == b"QUIET"
