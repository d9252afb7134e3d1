"""One set of promises, kept by every storage there is: by name, by span, by version."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
import pytest

from downloadview_async import (
    ByteRange,
    DirectoryStorage,
    Download,
    DownloadRequest,
    FileMissing,
    MemoryStorage,
    ObjectStorage,
    Storage,
    StorageSource,
    SyncStorage,
    TransferAborted,
)
from downloadview_async.http.ranges import parse_range, select_ranges
from downloadview_async.testing import call
from tests.gcs import GCS
from tests.odd_names import ODD_NAMES
from tests.s3 import S3

pytestmark = pytest.mark.asyncio
CONTENT = os.urandom(3 << 20)
HEAD = DownloadRequest(method="HEAD")
NAMES = [
    *ODD_NAMES,
    "trailing ",
    " leading",
    "*'(x)!&=;~[1]{2}^|`.txt",
    "a/deep/name.txt",
    "-",
    "...",
    "x" * 200,
]


@dataclass(frozen=True)
class Place:
    """A storage, and how its files are changed."""

    storage: Storage
    put: Callable[[str, bytes], None]
    delete: Callable[[str], None]

    async def read(self, name: str, span: ByteRange | None = None, request: DownloadRequest | None = None) -> bytes:
        async with self.storage.open(name, request or DownloadRequest()) as opened:
            return b"".join([chunk async for chunk in opened.stream(span)])


class _Blocking:
    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, mode: str) -> Any:
        return (self.root / name).open("rb")

    def modified(self, name: str) -> datetime:
        return datetime.fromtimestamp((self.root / name).stat().st_mtime, UTC)


def _in_directory(root: Path, storage: Storage) -> Place:
    def put(name: str, content: bytes) -> None:
        """As one does: under another name first, so that no reader sees half of it."""
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = root / ".fresh"
        fresh.write_bytes(content)
        fresh.rename(path)

    return Place(storage, put, lambda name: (root / name).unlink())


def _in_obstore(storage: ObjectStorage) -> Place:
    return Place(
        storage,
        lambda name, content: obstore.put(storage.store, name, content) and None,
        lambda name: obstore.delete(storage.store, name),
    )


STORES = ["object store: memory", "object store: file", "object store: s3", "object store: gs"]
KINDS = ["directory", "memory", "sync", *STORES]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    match request.param:
        case "directory":
            yield _in_directory(tmp_path, DirectoryStorage(tmp_path))
        case "memory":
            memory = MemoryStorage()
            yield Place(memory, memory.put, memory.delete)
        case "sync":
            yield _in_directory(tmp_path, SyncStorage(_Blocking(tmp_path)))
        case "object store: memory":
            yield _in_obstore(ObjectStorage("memory:///"))
        case "object store: file":
            yield _in_directory(tmp_path, ObjectStorage(tmp_path.as_uri()))
        case "object store: gs":
            gcs: GCS = request.getfixturevalue("gcs")
            prefix = f"every storage/{tmp_path.name}"
            yield Place(
                gcs.storage(prefix),
                lambda name, content: gcs.put(f"{prefix}/{name}", content),
                lambda name: gcs.delete(f"{prefix}/{name}"),
            )
        case _:
            s3: S3 = request.getfixturevalue("s3")
            yield _in_obstore(s3.storage(f"every storage/{tmp_path.name}"))


@pytest.mark.parametrize("name", ["none", "sub", "sub/none", "sub/file.bin/x", "sub/FILE.bin"])
async def test_what_is_no_file_is_missing(place: Place, name: str) -> None:
    place.put("sub/file.bin", b"x")
    for request in (DownloadRequest(), HEAD, DownloadRequest(range="bytes=0-0")):
        with pytest.raises(FileMissing):
            await place.read(name, request=request)
    assert (await call(Download(StorageSource(place.storage)), f"/{name}")).status == 404


@pytest.mark.parametrize(
    "name", ["", "/", ".", "./", "../x", "a/", "a/.", "a/./", "a/..", "a/../b", "./../a", "//..//a", "a\0b", "x" * 5000]
)
async def test_what_no_file_is_called_is_missing(place: Place, name: str) -> None:
    place.put("a", b"x")
    with pytest.raises(FileMissing):
        await StorageSource(place.storage).resolve(name)


@pytest.mark.parametrize(
    "name", ["sub/file.bin", "/sub/file.bin", "./sub/file.bin", "sub//file.bin", "//sub/././/file.bin"]
)
async def test_single_dots_and_empty_segments_are_dropped(place: Place, name: str) -> None:
    place.put("sub/file.bin", CONTENT)
    answer = await call(Download(StorageSource(place.storage), key=lambda request: name))
    assert (answer.status, answer.body) == (200, CONTENT)
    assert (await StorageSource(place.storage).resolve(name)).location == await place.storage.locate("sub/file.bin")


@pytest.mark.parametrize("name", ["a:b.txt", "a\\b.txt", "aux.notes", "sub/nul.txt", "12:30.log"])
async def test_names_that_windows_refuses_are_for_who_asks_for_them(place: Place, name: str) -> None:
    try:
        place.put(name, b"x")
    except OSError:
        pytest.fail(f"{name!r} can be stored on every system that this runs on")
    with pytest.raises(FileMissing):
        await StorageSource(place.storage, names="portable").resolve(name)
    if isinstance(place.storage, ObjectStorage | MemoryStorage):
        file = await StorageSource(place.storage).resolve(name)
        async with file.open() as opened:
            assert [chunk async for chunk in opened.stream(None)] == [b"x"]
    else:
        with pytest.raises(FileMissing):
            await StorageSource(place.storage).resolve(name)


@pytest.mark.parametrize("request_of_it", [DownloadRequest(), HEAD, DownloadRequest(range="bytes=0-9")])
async def test_an_empty_file(place: Place, request_of_it: DownloadRequest) -> None:
    place.put("empty", b"")
    async with place.storage.open("empty", request_of_it) as opened:
        assert opened.metadata.size == 0
        assert [chunk async for chunk in opened.stream(None) if chunk] == []
        assert [chunk async for chunk in opened.stream(ByteRange(0, 0)) if chunk] == []


SPANS = [(0, 10), (0, len(CONTENT)), (1000, 2_600_000), (len(CONTENT) - 1, len(CONTENT)), (5, 5), (0, 300_000)]


@pytest.mark.parametrize("request_of_it", [DownloadRequest(), HEAD, DownloadRequest(range="bytes=7-9")])
async def test_any_span_however_it_was_opened(place: Place, request_of_it: DownloadRequest) -> None:
    """What is asked for at opening is a hint: any spans can be read, in any order, and again."""
    place.put("file.bin", CONTENT)
    async with place.storage.open("file.bin", request_of_it) as opened:
        assert opened.metadata.size == len(CONTENT)
        for start, stop in [*SPANS, *reversed(SPANS)]:
            assert b"".join([chunk async for chunk in opened.stream(ByteRange(start, stop))]) == CONTENT[start:stop]
    assert await place.read("file.bin", request=request_of_it) == CONTENT


@pytest.mark.parametrize("value", ["0-0", "5-2000000", "2000000-", "-1", "-99999999", "0-99999999"])
async def test_a_range_that_is_asked_for_at_opening(place: Place, value: str) -> None:
    place.put("file.bin", CONTENT)
    spans = select_ranges(parse_range(f"bytes={value}") or [], len(CONTENT))
    assert isinstance(spans, list)
    [span] = spans
    read = await place.read("file.bin", span, DownloadRequest(range=f"bytes={value}"))
    assert read == CONTENT[span.start : span.stop]


async def test_metadata_is_the_same_however_it_is_asked_for(place: Place) -> None:
    place.put("file.txt", b"0123456789")
    found = []
    for request in (DownloadRequest(), HEAD, DownloadRequest(range="bytes=2-3"), DownloadRequest(range="bytes=99-")):
        async with place.storage.open("file.txt", request) as opened:
            found.append(opened.metadata)
    assert found == [found[0]] * 4
    assert found[0].size == 10
    assert found[0].etag is not None
    assert not found[0].etag.weak
    assert abs((found[0].last_modified or 0) - datetime.now(UTC).timestamp()) < 3600


@pytest.mark.parametrize("name", NAMES)
async def test_odd_names(place: Place, name: str) -> None:
    place.put(name, json.dumps(name).encode())
    source = StorageSource(place.storage)
    async with (await source.resolve(name)).open() as opened:
        assert b"".join([chunk async for chunk in opened.stream(None)]) == json.dumps(name).encode()


async def test_a_new_version_has_another_tag(place: Place) -> None:
    tags = set()
    for content in (b"0123456789", b"9876543210", b"01234567890"):
        place.put("file.txt", content)
        async with place.storage.open("file.txt") as opened:
            tags.add(opened.metadata.etag)
    assert len(tags) == 3


@pytest.mark.parametrize("request_of_it", [DownloadRequest(), DownloadRequest(range="bytes=0-"), HEAD])
async def test_a_file_that_is_replaced_while_it_is_read_is_never_mixed(
    place: Place, request_of_it: DownloadRequest
) -> None:
    place.put("file.bin", CONTENT)
    received = bytearray()
    async with place.storage.open("file.bin", request_of_it) as opened:
        chunks = opened.stream(ByteRange(0, len(CONTENT)))
        received += await anext(chunks)
        place.put("file.bin", CONTENT[::-1])
        try:
            async for chunk in chunks:
                received += chunk
        except TransferAborted:
            assert len(received) < len(CONTENT)
        else:
            assert len(received) == len(CONTENT)
    assert CONTENT.startswith(received)
    assert await place.read("file.bin") == CONTENT[::-1]


async def test_a_file_that_is_replaced_between_two_spans_is_never_mixed(place: Place) -> None:
    place.put("file.bin", CONTENT)
    async with place.storage.open("file.bin", HEAD) as opened:
        assert b"".join([chunk async for chunk in opened.stream(ByteRange(0, 10))]) == CONTENT[:10]
        place.put("file.bin", CONTENT[::-1])
        try:
            later = b"".join([chunk async for chunk in opened.stream(ByteRange(10, 20))])
        except TransferAborted:
            return
        assert later == CONTENT[10:20]


async def test_a_file_that_is_deleted_while_it_is_read(place: Place) -> None:
    place.put("file.bin", CONTENT)
    received = bytearray()
    async with place.storage.open("file.bin") as opened:
        chunks = opened.stream(None)
        received += await anext(chunks)
        place.delete("file.bin")
        try:
            async for chunk in chunks:
                received += chunk
        except TransferAborted:
            assert len(received) < len(CONTENT)
    assert CONTENT.startswith(received)
    with pytest.raises(FileMissing):
        await place.read("file.bin")


async def test_a_download_by_http(place: Place) -> None:
    place.put("sub/file.bin", CONTENT)
    app = Download(StorageSource(place.storage))
    whole = await call(app, "/sub/file.bin")
    assert (whole.status, whole.body) == (200, CONTENT)
    assert whole.headers["content-disposition"] == 'attachment; filename="file.bin"'
    tag = whole.headers["etag"]
    table: list[tuple[dict[str, str], int, bytes]] = [
        ({"Range": "bytes=5-9"}, 206, CONTENT[5:10]),
        ({"Range": "bytes=-2", "If-Range": tag}, 206, CONTENT[-2:]),
        ({"Range": "bytes=-2", "If-Range": '"other"'}, 200, CONTENT),
        ({"Range": "bytes=99999999-"}, 416, b""),
        ({"If-None-Match": tag}, 304, b""),
        ({"If-Match": '"other"'}, 412, b""),
    ]
    for headers, status, body in table:
        answer = await call(app, "/sub/file.bin", headers=headers)
        assert (answer.status, answer.body) == (status, body), headers
    head = await call(app, "/sub/file.bin", method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(CONTENT)))


async def test_clients_that_leave_keep_nothing(place: Place) -> None:
    """More of them than there are workers or connections."""
    place.put("file.bin", CONTENT)
    app = Download(StorageSource(place.storage))
    for _ in range(60):
        await call(app, "/file.bin", leave_after_bytes=1)
        await call(app, "/file.bin", cancel_after_bytes=1)
    assert (await call(app, "/file.bin")).body == CONTENT
