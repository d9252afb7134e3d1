"""Listings of folders: the same tree in every source and storage that can list."""

import asyncio
import json
import os
import socket
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import msgspec
import obstore
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from downloadview_async import (
    Cache,
    CachedSource,
    Download,
    MemoryStorage,
    ObjectSource,
    ObjectStorage,
    PathSource,
    RemoteSource,
    StorageSource,
    SyncStorage,
    VirtualSource,
)
from downloadview_async.errors import (
    AccessDenied,
    ConfigurationError,
    FileMissing,
    TransferAborted,
    UpstreamError,
    UpstreamTimeout,
)
from downloadview_async.service.chosen_files import ChosenFiles
from downloadview_async.service.database import Documents
from downloadview_async.service.source_settings import ObjectSettings
from downloadview_async.sources.base import ListsBatches, SupportsListing
from downloadview_async.sources.bucket_listing import ListedObject, page_of
from downloadview_async.sources.directory_storage import DirectoryStorage
from downloadview_async.sources.listing import Entry, closing_entries
from downloadview_async.sources.local.folder import BATCH, NAMES, FolderReader
from downloadview_async.sources.local.root import Root
from downloadview_async.testing import call
from tests.descriptors import open_paths
from tests.live import live
from tests.s3 import BUCKET, DENIED_ID, KEY_ID, REGION, S3, SECRET, serving_store
from tests.servers import free_port

pytestmark = pytest.mark.asyncio
LONG = "é" * 125 + "n.txt"  # 255 bytes
TREE = {
    "one.txt": b"1",
    "empty": b"",
    ".hidden": b"hidden",
    "Case": b"upper",
    "case": b"lower",
    "שלום עולם.txt": b"right to left",
    "日本語 🎉.bin": b"wide",
    LONG: b"long",
    "a b%2Fc?#&;'\"<i>.txt": b"hostile",
    "reports/2026/q1.pdf": b"first",
    "reports/2026/q2.pdf": b"second",
    "reports/readme.md": b"read",
    "a/b/c/d/e/f.txt": b"deep",
}
FOLDERS = {
    "": {*(name for name in TREE if "/" not in name), "reports/", "a/"},
    "reports": {"readme.md", "2026/"},
    "reports/2026": {"q1.pdf", "q2.pdf"},
    "a/b/c/d/e": {"f.txt"},
}
MISSING = (
    "nothing",
    "report",
    "one.txt",
    "reports/readme.md",
    "a/..",
    "..",
    "../a",
    "a/../a",
    "a\0b",
    "a/\udcff",
    "\n",
)


def directory_with_tree(path: Path) -> Path:
    for name, content in TREE.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


async def entries_of(source: Any, folder: str = "") -> dict[str, Entry]:
    """Return the entries of a folder by their names; those of folders end with a slash."""
    assert isinstance(source, SupportsListing)
    entries = [entry async for entry in source.list(folder)]
    named = {f"{entry.name}/" if entry.is_folder else entry.name: entry for entry in entries}
    assert len(named) == len(entries)
    return named


def _of_path(path: Path) -> Any:
    return PathSource(directory_with_tree(path))


def _of_directory_storage(path: Path) -> Any:
    return StorageSource(DirectoryStorage(directory_with_tree(path)))


def _of_memory(path: Path) -> Any:
    return StorageSource(MemoryStorage(TREE))


def _of_cache(path: Path) -> Any:
    return CachedSource(StorageSource(MemoryStorage(TREE)), Cache(path / "cache"), name="memory")


def _of_sync(storage: Any) -> Any:
    return StorageSource(SyncStorage(storage), names="any")


def _set_django_up() -> None:
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.contrib.django.project")
    django.setup()


def _of_django_directory(path: Path) -> Any:
    _set_django_up()
    from django.core.files.storage import FileSystemStorage

    return _of_sync(FileSystemStorage(directory_with_tree(path)))


def _of_django_memory(path: Path) -> Any:
    _set_django_up()
    from django.core.files.base import ContentFile
    from django.core.files.storage import InMemoryStorage

    storage = InMemoryStorage()
    for name, content in TREE.items():
        storage.save(name, ContentFile(content))
    return _of_sync(storage)


class FileSystem:
    """What fsspec's `DirFileSystem` looks like."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, path: str, mode: str) -> Any:
        return (self.root / path).open(mode)

    def isdir(self, path: str) -> bool:
        return (self.root / path).is_dir()

    def info(self, path: str) -> dict[str, Any]:
        status = (self.root / path).stat()
        kind = "directory" if self.isdir(path) else "file"
        return {"name": path, "size": status.st_size, "type": kind, "mtime": status.st_mtime}

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        assert detail
        return [self.info(str(inner.relative_to(self.root))) for inner in (self.root / path).iterdir()]


def _of_fsspec(path: Path) -> Any:
    return _of_sync(FileSystem(directory_with_tree(path)))


def _of_chosen(path: Path) -> Any:
    directory_with_tree(path)
    return ChosenFiles([str(inner) for inner in path.iterdir()])


def _of_obstore(path: Path) -> Any:
    return StorageSource(ObjectStorage(f"file://{quote(str(directory_with_tree(path)))}"))


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": _of_path,
    "directory": _of_directory_storage,
    "memory": _of_memory,
    "cached": _of_cache,
    "django-directory": _of_django_directory,
    "django-memory": _of_django_memory,
    "fsspec": _of_fsspec,
    "obstore": _of_obstore,
    "chosen": _of_chosen,
}


@pytest.fixture(scope="module")
def bucket(s3: S3) -> ObjectStorage:
    """The tree below a prefix of a bucket."""
    for name, content in TREE.items():
        s3.put(f"a listing/{name}", content)
    return s3.storage("a listing")


BY_OBSTORE: dict[str, Any] = {"user_agent": "a client with this option is that of obstore"}


@pytest_asyncio.fixture(params=[*SOURCES, "s3", "s3-by-obstore", "remote"])
async def source(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    if request.param == "remote":
        async with live(Starlette(routes=[Mount("/up", Download(_of_path(tmp_path), listing=True))])) as port:
            url = f"http://127.0.0.1:{port}/up"
            remote = RemoteSource(url, allow_hosts=["127.0.0.1"], names="any", lists=True)
            yield remote
            await remote.aclose()
    else:
        yield _source_of(request, tmp_path)


def _source_of(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param.startswith("s3"):
        bucket = request.getfixturevalue("bucket")
        if request.param == "s3":
            return StorageSource(bucket)
        return StorageSource(request.getfixturevalue("s3").storage("a listing", **BY_OBSTORE))
    return SOURCES[request.param](tmp_path)


@pytest.mark.parametrize("folder", FOLDERS)
async def test_a_folder_is_listed(source: Any, folder: str) -> None:
    for spelling in (folder, f"{folder}/", f"/{folder}", f"./{folder}"):
        entries = await entries_of(source, spelling)
        assert set(entries) == FOLDERS[folder]
    for name, entry in entries.items():
        if not entry.is_folder:
            assert entry.size == len(TREE[f"{folder}/{name}".removeprefix("/")])
            assert entry.modified is not None
            assert entry.modified.tzinfo is not None
        else:
            assert entry.size is None


@pytest.mark.parametrize("folder", MISSING)
async def test_a_folder_that_does_not_exist_is_missing(source: Any, folder: str) -> None:
    with pytest.raises(FileMissing):
        await entries_of(source, folder)


async def test_every_file_that_is_listed_can_be_opened(source: Any) -> None:
    async def walk(folder: str) -> None:
        for name, entry in (await entries_of(source, folder)).items():
            if entry.is_folder:
                await walk(folder + name)
            else:
                async with (await source.resolve(folder + name)).open() as opened:
                    assert opened.metadata.size == entry.size
                names.append(folder + name)

    names: list[str] = []
    await walk("")
    assert sorted(names) == sorted(TREE)


@pytest.mark.parametrize("use_openat2", [True, False])
@pytest.mark.parametrize(
    ("symlinks", "expected"),
    [
        ("deny", {"folder/", "one.txt"}),
        ("inside", {"folder/", "one.txt", "to-file", "to-folder/", "up", "here/"}),
        ("follow", {"folder/", "one.txt", "to-file", "to-folder/", "up", "here/", "outside", "absolute"}),
    ],
)
async def test_links_are_listed_as_they_are_opened(
    tmp_path: Path, symlinks: Any, expected: set[str], use_openat2: bool
) -> None:
    (tmp_path / "outside.txt").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "one.txt").write_bytes(b"12345")
    for name, target in {
        "to-file": "one.txt",
        "to-folder": "folder",
        "up": "folder/../one.txt",
        "here": ".",
        "outside": "../outside.txt",
        "absolute": str(tmp_path / "outside.txt"),
        "dangling": "nothing",
        "loop": "loop",
        "magic": "/proc/self/root",
    }.items():
        (root / name).symlink_to(target)
    source = PathSource(root, symlinks=symlinks)
    source.root.use_openat2 = use_openat2
    entries = await entries_of(source)
    entries.pop("magic/", None)  # openat replaces openat2 only where the kernel is old, and it follows this link
    assert set(entries) == expected
    if symlinks != "deny":
        assert entries["to-file"].size == entries["up"].size == 5
        for folder in ("to-folder", "here"):
            await entries_of(source, folder)
    if symlinks == "inside":
        for folder in ("outside", "magic", "here/magic"):
            with pytest.raises((FileMissing, AccessDenied)):
                await entries_of(source, f"{folder}/x")


async def test_what_cannot_be_downloaded_is_left_out(tmp_path: Path) -> None:
    for name in ("good", "aux.txt", "back\\slash", "co:lon", "new\nline", "del\x7f"):
        (tmp_path / name).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.bin")).write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    assert set(await entries_of(PathSource(tmp_path, symlinks="follow"))) == {"good", "folder/"}
    any_names = {"good", "folder/", "aux.txt", "back\\slash", "co:lon"}
    assert set(await entries_of(PathSource(tmp_path, names="any"))) == any_names


class Upstream:
    """A server that answers with these bytes, and may break off before the end."""

    def __init__(
        self, body: bytes, *, status: int = 200, media_type: str = "application/x-ndjson", more: int = 0
    ) -> None:
        self.response = Response(body, status, media_type=media_type)
        self.response.headers["content-length"] = str(len(body) + more)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["query_string"] == b"format=ndjson"
        await self.response(scope, receive, send)


LINE = b'{"name":"a.txt","kind":"file","size":3,"modified":"2026-01-02T03:04:05Z","type":"text/plain","url":"x"}'


@pytest.mark.parametrize("size", [b"true", b"false", b"-1", b"1.5", b'"3"', b"null", b"[]"])
async def test_a_size_that_is_not_a_number_of_bytes_is_not_passed_on(size: bytes) -> None:
    async with live(Upstream(LINE.replace(b":3,", b":" + size + b","))) as port:
        remote = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"], lists=True)
        answer = await call(Download(remote, listing=True), "/", query="format=json")
        await remote.aclose()
    (entry,) = json.loads(answer.body)["entries"]
    assert (entry["name"], entry["size"]) == ("a.txt", None)


@pytest.mark.parametrize(
    ("upstream", "error"),
    [
        (Upstream(b"", status=404), FileMissing),
        (Upstream(b"", status=403), FileMissing),
        (Upstream(b"", status=500), UpstreamError),
        (Upstream(b"[]", media_type="application/json"), UpstreamError),
        (Upstream(b"[]\n"), UpstreamError),
        (Upstream(b"null\n"), UpstreamError),
        (Upstream(b"not JSON\n"), UpstreamError),
        (Upstream(LINE.replace(b'"file"', b'"device"')), UpstreamError),
        (Upstream(LINE.replace(b"2026", b"year")), UpstreamError),
        (Upstream(LINE.replace(b"05Z", b"05")), UpstreamError),
        (Upstream(b" " * 100_000), UpstreamError),
        (Upstream(LINE.replace(b"2026-01-02T03:04:05Z", b"9999-12-31T03:04:05-23:59")), UpstreamError),
        (Upstream(LINE.replace(b"2026-01-02T03:04:05Z", b"0001-01-01T03:04:05+23:59")), UpstreamError),
        (Upstream(LINE + b"\n", more=10), TransferAborted),
    ],
)
async def test_an_upstream_that_does_not_list_fails(upstream: Upstream, error: type[Exception]) -> None:
    async with live(upstream) as port:
        remote = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"], lists=True)
        with pytest.raises(error):
            await entries_of(remote)
        await remote.aclose()


async def test_an_upstream_cannot_add_names_that_are_refused() -> None:
    names = [b"../up", b"..", b"", b"a/b", b"c:", b"\\u0000", b"\\ud800"]
    lines = [LINE.replace(b"a.txt", name) for name in names]
    async with live(Upstream(b"\n".join([*lines, LINE]))) as port:
        remote = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"], lists=True)
        modified = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        assert await entries_of(remote) == {"a.txt": Entry("a.txt", False, 3, modified, "text/plain")}
        await remote.aclose()


class Sealed:
    """A storage that cannot list."""

    def __init__(self) -> None:
        self.open = MemoryStorage({"a.txt": b"a"}).open

    async def locate(self, name: str) -> None:
        return None


@pytest.mark.parametrize("wraps", [False, True])
async def test_a_source_that_cannot_list_does_not_claim_it(tmp_path: Path, wraps: bool) -> None:
    inner: list[Any] = [
        StorageSource(Sealed()),
        VirtualSource(lambda name: b"made"),
        RemoteSource("http://127.0.0.1:9/files/"),
    ]
    cache = Cache(tmp_path)
    for number, source in enumerate(inner):
        asked = CachedSource(source, cache, name=str(number)) if wraps else source
        assert not isinstance(asked, SupportsListing)
        assert not isinstance(asked, ListsBatches)


async def test_a_subclass_may_list_in_another_way(tmp_path: Path) -> None:
    class Listed(StorageSource):
        async def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
            yield Entry("of-the-subclass")

    assert set(await entries_of(Listed(MemoryStorage(TREE)))) == {"of-the-subclass"}
    assert set(await entries_of(Listed(DirectoryStorage(tmp_path)))) == {"of-the-subclass"}


async def test_batches_have_the_entries_of_the_listing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    root = directory_with_tree(tmp_path / "root")
    (root / "link").symlink_to("reports")
    (root / "dangling").symlink_to("nothing")
    (root / "outside").symlink_to("../out")
    sources: list[Any] = [PathSource(root), StorageSource(DirectoryStorage(root)), DirectoryStorage(root)]
    sources.append(CachedSource(PathSource(root), Cache(tmp_path / "cache"), name="path"))
    for source in sources:
        assert isinstance(source, ListsBatches)
        for folder in ("", "reports"):
            whole = [entry async for entry in source.list(folder)]
            batches = [batch async for batch in source.list_batches(folder)]
            assert [entry for batch in batches for entry in batch] == whole
            named = [entry async for batch in source.list_batches(folder, described=0) for entry in batch]
            assert [(entry.name, entry.is_folder) for entry in named] == [(e.name, e.is_folder) for e in whole]
            assert all((entry.size, entry.modified) == (None, None) for entry in named)
            assert await source.describe(folder, [entry.name for entry in named]) == whole
        refused = ("dangling", "outside", "nothing", "../out", "reports/readme.md", "..", "", "a\0", "/etc")
        assert await source.describe("", refused) == []
        with pytest.raises(FileMissing):
            await source.describe("nothing", ["one.txt"])


async def test_the_first_entries_of_a_large_folder_are_described(tmp_path: Path) -> None:
    expected = [f"{number}.txt" for number in range(2 * BATCH + NAMES + 10)]
    for name in (*expected, "aux.txt", "back\\slash", "new\nline"):
        (tmp_path / name).touch()
    names: list[str] = []
    async for batch in PathSource(tmp_path).list_batches("", described=BATCH + 1):
        assert {entry.size is None for entry in batch} == {len(names) > BATCH}
        names += [entry.name for entry in batch]
    assert sorted(names) == sorted(expected)


def open_times(path: Path) -> int:
    """Return how many descriptors of a directory are open: a source keeps one."""
    return open_paths().count(str(path))


@pytest.mark.parametrize(("count", "calls"), [(0, 1), (1, 1), (BATCH - 1, 1), (BATCH, 2), (2 * BATCH + 1, 3)])
async def test_a_folder_takes_no_call_of_a_worker_to_see_its_end(tmp_path: Path, count: int, calls: int) -> None:
    for number in range(count):
        (tmp_path / f"{number}").touch()
    source, taken = PathSource(tmp_path), 0
    take = source.slots.take

    async def counted(**options: Any) -> Any:
        nonlocal taken
        taken += 1
        return await take(**options)

    source.slots.take = counted  # type: ignore[method-assign]
    assert {entry.name async for entry in source.list()} == {f"{number}" for number in range(count)}
    assert taken == calls


async def test_chosen_files_have_batches(tmp_path: Path) -> None:
    source = _of_chosen(tmp_path)
    for folder in FOLDERS:
        whole = [entry async for entry in source.list(folder)]
        assert [entry async for batch in source.list_batches(folder) for entry in batch] == whole
        named = [entry.name async for batch in source.list_batches(folder, described=0) for entry in batch]
        assert list(await source.describe(folder, [*named, "nothing"])) == whole
    with pytest.raises(FileMissing):
        await source.describe("nothing", [])


@pytest.mark.parametrize("fails", [False, True])
async def test_a_listing_that_is_left_early_closes_its_directory(tmp_path: Path, fails: bool) -> None:
    for number in range(BATCH + 1):
        (tmp_path / f"{number}.txt").touch()
    source = PathSource(tmp_path)
    with suppress(ZeroDivisionError):
        async with closing_entries(source.list()) as entries:
            async for _ in entries:
                assert open_times(tmp_path) > 1
                if fails:
                    raise ZeroDivisionError
                break
    assert open_times(tmp_path) == 1


async def test_a_listing_that_is_cancelled_closes_its_directory(tmp_path: Path) -> None:
    for number in range(4 * BATCH):
        (tmp_path / f"{number}.txt").touch()
    source = PathSource(tmp_path)

    async def read(entries: AsyncIterator[Entry], count: int) -> None:
        async with closing_entries(entries):
            async for _ in entries:
                count -= 1
                if not count:
                    reached.set()

    for count in (1, BATCH - 1, BATCH, 3 * BATCH):
        reached = asyncio.Event()
        task = asyncio.create_task(read(source.list(), count))
        await reached.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.done()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await read(source.list(), 1)
    while open_times(tmp_path) != 1:  # a worker that was reading closes it a moment later
        await asyncio.sleep(0)


async def test_a_reader_that_is_closed_while_it_reads_closes_its_directory_at_the_end(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").touch()
    root = Root(tmp_path)
    reader = FolderReader(root, "")
    with reader._in_use:
        reader.close()
        assert open_times(tmp_path) > 1
    assert reader.read() is None
    reader.close()
    assert open_times(tmp_path) == 1


async def test_a_directory_may_change_while_it_is_listed(tmp_path: Path) -> None:
    for number in range(3 * BATCH):
        (tmp_path / f"{number}.txt").touch()
    listed: list[str] = []
    async for entry in PathSource(tmp_path).list():
        if not listed:
            for number in range(0, 3 * BATCH, 2):
                (tmp_path / f"{number}.txt").unlink()
            tmp_path.rename(tmp_path.with_name("renamed"))
        listed.append(entry.name)
    assert {f"{number}.txt" for number in range(1, 3 * BATCH, 2)} <= set(listed)
    assert len(listed) == len(set(listed))


async def test_a_marker_of_a_folder_in_a_bucket_is_the_folder_itself(s3: S3) -> None:
    import botocore.session

    keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET}
    client = botocore.session.get_session().create_client("s3", region_name=REGION, endpoint_url=s3.url, **keys)
    with closing(client):
        for name in ("", "empty/", "full/", "full/x.txt"):
            client.put_object(Bucket=BUCKET, Key=f"marked/{name}", Body=b"x" if name.endswith("t") else b"")
        for key in ("marked/both", "marked/both/y.txt"):
            client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    for options in ({}, BY_OBSTORE):
        source = StorageSource(s3.storage(**options))
        assert set(await entries_of(source, "marked")) == {"empty/", "full/", "both", "both/"}
        assert set(await entries_of(source, "marked/empty")) == set()
        assert set(await entries_of(source, "marked/full")) == {"x.txt"}


async def test_a_key_with_a_control_character_is_left_out_or_fails_obstore(s3: S3) -> None:
    import botocore.session

    keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET}
    client = botocore.session.get_session().create_client("s3", region_name=REGION, endpoint_url=s3.url, **keys)
    with closing(client):
        for key in ("unreadable/a\nb", "unreadable/c+d e%20.txt"):
            client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    assert set(await entries_of(StorageSource(s3.storage()), "unreadable")) == {"c+d e%20.txt"}
    with pytest.raises(UpstreamError, match="a key that obstore cannot read"):
        await entries_of(StorageSource(s3.storage(**BY_OBSTORE)), "unreadable")


class Pages:
    """A store whose bucket has a folder with any number of keys, of which each answer has two. It counts its answers.

    failures: how many answers are errors before the first page.
    """

    def __init__(self, *, failures: int = 0) -> None:
        self.queries: list[dict[str, str]] = []
        self.failures = failures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = dict(parse_qsl(scope["query_string"].decode()))
        self.queries.append(query)
        number = int(query.get("continuation-token", "0"))
        keys = "".join(
            f"<Contents><Key>{query['prefix']}{number}{letter}</Key><LastModified>2026-01-02T03:04:05.000Z"
            f"</LastModified><ETag>&quot;e{number}&quot;</ETag><Size>{number}</Size></Contents>"
            for letter in "ab"
        )
        body = (
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{keys}'
            f"<CommonPrefixes><Prefix>{query['prefix']}sub{number}/</Prefix></CommonPrefixes><IsTruncated>true"
            f"</IsTruncated><NextContinuationToken>{number + 1}</NextContinuationToken></ListBucketResult>"
        )
        self.failures -= 1
        await Response(body, 500 if self.failures >= 0 else 200)(scope, receive, send)


async def test_a_folder_of_a_bucket_is_read_page_by_page() -> None:
    pages = Pages(failures=1)
    async with live(pages) as port:
        storage = ObjectStorage(
            f"s3://{BUCKET}/top", endpoint=f"http://127.0.0.1:{port}", access_key_id=KEY_ID, secret_access_key=SECRET
        )
        names = []
        source: Any = StorageSource(storage)
        async with closing_entries(source.list("folder")) as entries:
            async for entry in entries:
                names.append(entry.name)
                if len(names) == 7:
                    break
    assert names == ["0a", "0b", "sub0", "1a", "1b", "sub1", "2a"]
    assert [query.get("continuation-token") for query in pages.queries] == [None, None, "1", "2"]
    assert {(query["prefix"], query["delimiter"]) for query in pages.queries} == {("top/folder/", "/")}
    assert {"X-Amz-Signature"} < set(pages.queries[0])


async def test_a_store_that_keeps_failing_is_asked_three_times() -> None:
    pages = Pages(failures=100)
    async with live(pages) as port:
        storage = ObjectStorage(f"s3://{BUCKET}/", endpoint=f"http://127.0.0.1:{port}", skip_signature="true")
        with pytest.raises(UpstreamError, match="status code: 500"):
            await entries_of(StorageSource(storage))
    assert len(pages.queries) == 3
    assert not any("X-Amz-Signature" in query for query in pages.queries)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"<Error/>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>",
        *(
            f"<ListBucketResult><Contents><Key>a</Key><Size>{size}</Size><LastModified>{time}</LastModified></Contents>"
            "</ListBucketResult>".encode()
            for size, time in [
                ("1", "y"),
                *((size, "2026-01-02T03:04:05Z") for size in ("x", "-1", "1_0", " 1", "", "9" * 19, "\u0663")),
            ]
        ),
    ],
)
async def test_an_answer_that_is_not_a_listing_fails(content: bytes) -> None:
    with pytest.raises(UpstreamError, match="does not answer with a listing"):
        await page_of(content, "")


@pytest.mark.parametrize("is_encoded", [False, True])
async def test_keys_are_decoded_if_the_store_has_encoded_them(is_encoded: bool) -> None:
    encoding = "<EncodingType>url</EncodingType>" if is_encoded else ""
    page = await page_of(
        f"<ListBucketResult>{encoding}<Contents><Key>f/a+b%2B.txt</Key><LastModified>2026-01-02T03:04:05Z</LastModified>"
        "<Size>3</Size></Contents></ListBucketResult>".encode(),
        "f/",
    )
    modified = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert page.objects == [ListedObject("a b+.txt" if is_encoded else "a+b%2B.txt", 3, modified)]
    assert page.following is None


async def test_a_store_that_does_not_answer_or_refuses_fails(s3: S3) -> None:
    keys: dict[str, Any] = {"access_key_id": KEY_ID, "secret_access_key": SECRET}
    for options in ({}, BY_OBSTORE):
        with pytest.raises(AccessDenied):
            await entries_of(StorageSource(s3.storage(access_key_id=DENIED_ID, **options)))
        endpoint = f"http://127.0.0.1:{free_port()}"
        refusing = ObjectStorage(
            "s3://nothing/", endpoint=endpoint, retry_config={"max_retries": 0}, **(keys | options)
        )
        with pytest.raises(UpstreamError):
            await entries_of(StorageSource(refusing))
        async with serving_store(silent=True) as store:
            with pytest.raises(UpstreamTimeout):
                await entries_of(StorageSource(store.storage_with(answer_timeout=0.01, **options)))


async def test_a_folder_of_a_bucket_may_have_more_keys_than_one_answer(s3: S3) -> None:
    names = {f"{number}.txt" for number in range(1001)}
    store = s3.storage("many").store
    await asyncio.gather(*(obstore.put_async(store, name, b"x") for name in names))
    for options in ({}, BY_OBSTORE):
        assert set(await entries_of(StorageSource(s3.storage(**options)), "many")) == names


async def test_a_django_storage_may_leave_sizes_and_times_out(tmp_path: Path) -> None:
    _set_django_up()
    from django.core.files.storage import FileSystemStorage

    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "one.txt").write_bytes(b"12345")
    described = await entries_of(SyncStorage(FileSystemStorage(tmp_path)))
    assert [entry.size for entry in described.values()] == [5]
    bare = await entries_of(SyncStorage(FileSystemStorage(tmp_path), describes=False))
    assert bare["one.txt"] == Entry("one.txt")


async def rows_of(path: Path, keys: Iterable[str], **options: Any) -> AsyncIterator[Documents]:
    """Open a table with these keys, whose rows have the size and the time of a row's number."""
    with closing(sqlite3.connect(path)) as database:
        kind = options.pop("kind", "TEXT")
        columns = "file TEXT, size INTEGER, changed TIMESTAMP, type TEXT"
        database.execute(f"CREATE TABLE rows (key {kind} PRIMARY KEY, {columns})")
        rows = [(key, f"{key}.bin", len(TREE.get(key, b"")), "2026-03-01 12:00:00", "text/plain") for key in keys]
        database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", rows)
        database.commit()
    named = {"key": "key", "file": "file", "size": "size", "modified": "changed", "content_type": "type"}
    settings = ObjectSettings(
        database=f"sqlite+aiosqlite:///{path}", table="rows", source="files", list=True, **(named | options)
    )
    documents = Documents(settings, directory=path.parent)
    async with documents.opened():
        yield documents


def source_of(documents: Documents) -> ObjectSource:
    return ObjectSource(documents.get, source=StorageSource(MemoryStorage()), list_folder=documents.list_folder)


async def test_rows_are_listed_like_files(tmp_path: Path) -> None:
    async for documents in rows_of(tmp_path / "rows.db", TREE):
        source = source_of(documents)
        for folder, names in FOLDERS.items():
            for spelling in (folder, f"{folder}/", f"/{folder}"):
                assert set(await entries_of(source, spelling)) == names
        for folder in MISSING:
            with pytest.raises(FileMissing):
                await entries_of(source, folder)
        modified = datetime(2026, 3, 1, 12, tzinfo=UTC)
        assert (await entries_of(source))["Case"] == Entry("Case", False, 5, modified, "text/plain")


async def test_rows_of_a_large_folder_are_read_batch_by_batch(tmp_path: Path) -> None:
    folders = ("", "a%_/", "a%_/b/", "axy/", "b/", "b/c/d/")
    keys = [f"{folder}{number:04}" for folder in folders for number in range(1200)]
    async for documents in rows_of(tmp_path / "rows.db", keys):
        source = source_of(documents)
        plain = {f"{number:04}" for number in range(1200)}
        assert set(await entries_of(source)) == plain | {"a%_/", "axy/", "b/"}
        assert set(await entries_of(source, "a%_")) == plain | {"b/"}
        assert set(await entries_of(source, "b")) == plain | {"c/"}
        assert set(await entries_of(source, "b/c")) == {"d/"}


async def test_rows_are_in_the_folders_of_a_column(tmp_path: Path) -> None:
    folders = ["reports/2026", "reports", "reports/2026/a%_", "reports2", "Reports/x", "reports/2025/deep/er", "", None]
    folders += [f"reports/many/{number:04}" for number in range(1200)]
    with closing(sqlite3.connect(tmp_path / "rows.db")) as database:
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, folder TEXT, file TEXT)")
        database.executemany("INSERT INTO rows (folder, file) VALUES (?, 'f')", [(folder,) for folder in folders])
        database.executemany("INSERT INTO rows (folder, file) VALUES ('large', 'f')", [()] * 1200)
        database.execute("INSERT INTO rows (folder, file) VALUES ('reports', NULL)")
        database.commit()
    settings = ObjectSettings(
        database=f"sqlite+aiosqlite:///{tmp_path / 'rows.db'}",
        table="rows",
        key="id",
        file="file",
        source="files",
        parent="folder",
        list=True,
    )
    documents = Documents(settings, directory=tmp_path)
    async with documents.opened():
        source = source_of(documents)
        for folder, names in {
            "": {"7", "8", "reports/", "reports2/", "Reports/", "large/"},
            "reports": {"2", "2025/", "2026/", "many/"},
            "reports/2026": {"1", "a%_/"},
            "reports/2026/a%_": {"3"},
            "reports/2025": {"deep/"},
            "reports/many": {f"{number:04}/" for number in range(1200)},
            "large": {str(number) for number in range(1209, 2409)},
        }.items():
            assert set(await entries_of(source, folder)) == names
        for folder in ("report", "reports/20", "nothing", "2", "reports/2026/a"):
            with pytest.raises(FileMissing):
                await entries_of(source, folder)
        for key in ("7", "8", "reports/2", "reports/2026/1", "reports/2026/a%_/3"):
            assert await documents.get(key) is not None
        for key in ("1", "reports/1", "REPORTS/2", "reports/x", "reports2/2", "reports/\udcff/1", "/7"):
            assert await documents.get(key) is None
    for parent, problem in (("none", "no column 'none'"), ("id", "has no text")):
        with pytest.raises(ConfigurationError, match=problem):
            async with Documents(msgspec.structs.replace(settings, parent=parent), directory=tmp_path).opened():
                pass


async def test_a_folder_that_no_url_stands_for_is_not_listed(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "rows.db")) as database:
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, folder TEXT, file TEXT)")
        folders = ["trailing/", "two//slashes", "/leading", "good", "good/inner/", "good//inner"]
        database.executemany("INSERT INTO rows (folder, file) VALUES (?, 'f')", [(folder,) for folder in folders])
        database.commit()
    database_url = f"sqlite+aiosqlite:///{tmp_path / 'rows.db'}"
    settings = ObjectSettings(
        database=database_url, table="rows", key="id", file="file", source="files", parent="folder", list=True
    )
    documents = Documents(settings, directory=tmp_path)
    async with documents.opened():
        source = source_of(documents)
        assert set(await entries_of(source)) == {"good/"}
        assert set(await entries_of(source, "good")) == {"4"}


async def test_rows_may_have_numbers_as_keys_and_no_files(tmp_path: Path) -> None:
    async for documents in rows_of(tmp_path / "rows.db", ["1", "20", "3"], kind="INTEGER", size=None, modified=None):
        source = source_of(documents)
        assert set(await entries_of(source)) == {"1", "20", "3"}
        with pytest.raises(FileMissing):
            await entries_of(source, "1")
    with closing(sqlite3.connect(tmp_path / "rows.db")) as database:
        database.execute("UPDATE rows SET file = NULL WHERE key = 3")
        database.execute("UPDATE rows SET file = '', size = 'large', type = 'not a type' WHERE key = 20")
        database.execute("UPDATE rows SET size = 'large', type = 'not a type' WHERE key = 1")
        database.commit()
        settings = documents._settings
    again = Documents(settings, directory=tmp_path)
    async with again.opened():
        assert await entries_of(source_of(again)) == {"1": Entry("1")}


async def test_rows_may_have_times_as_text(tmp_path: Path) -> None:
    times = {
        "a": "2026-03-01 12:00:00",
        "b": "2026-03-01T12:00:00Z",
        "c": "2026-03-01T13:00:00.000+01:00",
        "d": "2026-03-01",
        "e": "yesterday",
        "f": "",
        "g": "0001-01-01T00:00:00+14:00",
    }
    async for documents in rows_of(tmp_path / "rows.db", times, size=None, content_type=None, modified="type"):
        with closing(sqlite3.connect(tmp_path / "rows.db")) as database:
            database.executemany("UPDATE rows SET type = ? WHERE key = ?", [(times[key], key) for key in times])
            database.commit()
        listed = await entries_of(source_of(documents))
        noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
        assert [listed[key].modified for key in times] == [noon, noon, noon, noon.replace(hour=0), None, None, None]


@pytest.mark.parametrize("seconds", [253_402_300_800, 67_768_036_191_676_799, 2**62])
async def test_a_time_that_no_calendar_has_is_left_out(seconds: int, tmp_path: Path) -> None:
    class Late(FileSystem):
        def info(self, path: str) -> dict[str, Any]:
            return super().info(path) | {"mtime": seconds}

    memory = Path("/dev/shm")  # a file system that keeps any time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        (Path(directory) / "late").touch()
        os.utime(Path(directory) / "late", (0, seconds))
        if (Path(directory) / "late").stat().st_mtime >= seconds:
            assert await entries_of(PathSource(directory)) == {"late": Entry("late", size=0)}
        assert await entries_of(StorageSource(SyncStorage(Late(Path(directory))))) == {"late": Entry("late", size=0)}
    async for documents in rows_of(tmp_path / "rows.db", ["late"], size=None, content_type=None, modified="size"):
        with closing(sqlite3.connect(tmp_path / "rows.db")) as database:
            database.execute("UPDATE rows SET size = ?", (seconds,))
            database.commit()
        assert await entries_of(source_of(documents)) == {"late": Entry("late")}


async def test_objects_are_listed_by_a_function_of_the_application(tmp_path: Path) -> None:
    async def get(key: str) -> None:
        return None

    async def list_folder(folder: str) -> AsyncIterator[Entry]:
        if folder not in ("", "sub"):
            raise FileMissing(folder)
        yield Entry("a.txt", content_type="text/plain")
        yield Entry("a/b")
        yield Entry("..", is_folder=True)

    assert not isinstance(ObjectSource(get), SupportsListing)
    source = ObjectSource(get, list_folder=list_folder)
    assert set(await entries_of(source)) == set(await entries_of(source, "/sub/")) == {"a.txt"}
    with pytest.raises(FileMissing):
        await entries_of(source, "other")
    with pytest.raises(ConfigurationError, match="list_folder takes a function"):
        ObjectSource(get, list_folder="no function")  # type: ignore[arg-type]
