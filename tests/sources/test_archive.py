"""Archives of folders and of given files: any span of them, their tags, and the CRC-32s that are not computed again."""

import gc
import io
import logging
import os
import sqlite3
import threading
import zipfile
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing, nullcontext
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
from django.core.files import File
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import downloadview_async as dv
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources import archive as archive_module
from downloadview_async.sources import checksums as checksums_module
from downloadview_async.sources.archive import (
    Archive,
    ArchiveEntry,
    ArchiveLimits,
    ArchiveSource,
    OpenArchive,
    selection,
)
from downloadview_async.sources.checksums import Checksums, MemoryChecksums, SQLiteChecksums
from downloadview_async.sources.listing import Entry
from downloadview_async.sources.local.open_file import OpenLocalFile
from tests.descriptors import open_paths

pytestmark = pytest.mark.asyncio

TREE = {"reports/2026/june.pdf": b"june" * 999, "reports/2026/none": b"", "reports/a.txt": b"a", "b.txt": b"bb"}


@pytest.fixture(autouse=True)
def no_layout_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "SHARED_SECONDS", 0.0)


def make_tree(root: Path, files: dict[str, bytes] = TREE) -> dv.PathSource:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000,) * 2)
    return dv.PathSource(root)


async def read(file: Archive, span: ByteRange | None = None) -> bytes:
    async with file.open() as opened:
        return await stream(opened, span)


async def stream(opened: OpenArchive, span: ByteRange | None = None) -> bytes:
    async with aclosing(chunks_of(opened, span)) as chunks:
        return b"".join([chunk async for chunk in chunks])


def chunks_of(opened: OpenArchive, span: ByteRange | None = None) -> AsyncGenerator[bytes, None]:
    chunks = opened.stream(span)
    assert isinstance(chunks, AsyncGenerator)
    return chunks


async def used(batches: AsyncGenerator[Any, None]) -> None:
    async with aclosing(batches):
        async for _ in batches:
            pass


def unpacked(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert len(names) == len({*names})
        return {name: archive.read(name) for name in names}


def directory_of(content: bytes) -> ByteRange:
    """The span of what follows the files."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return ByteRange(archive.start_dir, len(content))


class Counting:
    """A source that counts how often each file is opened."""

    def __init__(self, source: dv.PathSource) -> None:
        self.source = source
        self.opened: list[str] = []

    async def resolve(self, name: str, /) -> dv.AsyncFile:
        return _Counted(await self.source.resolve(name), name, self.opened)

    def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        return self.source.list(folder)


class _Counted:
    location = None

    def __init__(self, file: dv.AsyncFile, name: str, opened: list[str]) -> None:
        self.name = name
        self.file = file
        self.opened = opened

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[dv.OpenFile]:
        self.opened.append(f"{self.name} {request.range}" if request.range else self.name)
        async with self.file.open(request) as opened:
            yield opened


async def test_a_folder(tmp_path: Path) -> None:
    file = await ArchiveSource(make_tree(tmp_path)).resolve("reports")
    assert file.name == "reports.zip"
    assert file.location is None
    async with file.open() as opened:
        assert opened.metadata.content_type == "application/zip"
        assert opened.metadata.accept_ranges
        content = await stream(opened)
        assert opened.metadata.size == len(content)
    names = ["reports/", "reports/2026/", "reports/2026/june.pdf", "reports/2026/none", "reports/a.txt"]
    assert unpacked(content) == {name: TREE.get(name, b"") for name in names}
    assert [*unpacked(content)] == names
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        expected = int((tmp_path / "reports/a.txt").stat().st_mtime)
        assert int.from_bytes(archive.getinfo("reports/a.txt").extra[5:9], "little") == expected


async def test_an_inner_folder_has_its_last_name(tmp_path: Path) -> None:
    file = await ArchiveSource(make_tree(tmp_path)).resolve("reports/2026/")
    assert file.name == "2026.zip"
    assert [*unpacked(await read(file))] == ["2026/", "2026/june.pdf", "2026/none"]


@pytest.mark.parametrize("name", ["", "/", "./"])
async def test_the_whole_source(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    file = await ArchiveSource(make_tree(tmp_path)).resolve(name)
    assert file.name == "archive.zip"
    names = [*unpacked(await read(file))]
    assert names == ["b.txt", "empty/", "reports/", "reports/2026/", *names[4:]]


async def test_a_selection(tmp_path: Path) -> None:
    source = ArchiveSource(make_tree(tmp_path))
    file = await source.resolve(selection("reports", ["2026", "a.txt", "a.txt"]))
    assert file.name == "reports.zip"
    assert [*unpacked(await read(file))] == ["2026/", "2026/june.pdf", "2026/none", "a.txt"]
    assert source.canonical(selection("/reports//", ["b", "a"])) == selection("reports", ["a", "b"])


@pytest.mark.parametrize(
    "folder, names",
    [("nothing", []), ("reports/a.txt", []), ("reports", ["a.txt", "b.txt"]), ("reports", ["../b.txt"]), ("", [".."])],
)
async def test_what_is_not_there(tmp_path: Path, folder: str, names: list[str]) -> None:
    source = ArchiveSource(make_tree(tmp_path))
    with pytest.raises(dv.FileMissing):
        await read(await source.resolve(selection(folder, names)))


@pytest.mark.parametrize("folder", ["..", "../x", "reports/../../x", "a\x01b"])
async def test_a_name_that_no_folder_has(tmp_path: Path, folder: str) -> None:
    source = ArchiveSource(make_tree(tmp_path))
    with pytest.raises(dv.FileMissing):
        await read(await source.resolve(folder))


async def test_what_is_left_out(tmp_path: Path) -> None:
    source = make_tree(tmp_path, {"d/.git/config": b"x", "d/.env": b"x", "d/a": b"a", "d/e/.env": b"x"})
    hidden = ArchiveSource(source, leave_out=lambda name: "/." in name)
    assert [*unpacked(await read(await hidden.resolve("d")))] == ["d/", "d/a", "d/e/"]
    with pytest.raises(dv.FileMissing):
        await read(await hidden.resolve(selection("d", [".env"])))


async def test_what_a_request_may_have(tmp_path: Path) -> None:
    async def not_x(name: str) -> bool:
        return not name.startswith("d/x")

    source = ArchiveSource(make_tree(tmp_path, {"d/a": b"a", "d/x/b": b"b", "d/e/c": b"c", "d/xy": b"x"}))
    allowed = await source.allowed("/d//", not_x)
    assert allowed.entries == {"d/a", "d/e/", "d/e/c"}
    archive = await source.resolve(allowed.name)
    assert archive.name == "d.zip"
    assert (await source.allowed("d", not_x)) is allowed  # the same key of a cache
    (tmp_path / "d/new").write_bytes(b"nobody has decided about it")
    (tmp_path / "d/a").unlink()
    (tmp_path / "d/a").mkdir()  # nor about a folder of this name
    assert [*unpacked(await read(archive))] == ["d/", "d/e/", "d/e/c"]
    assert "d/new" in unpacked(await read(await source.resolve("d")))
    assert (await source.allowed("d", not_x)).name != allowed.name
    chosen = await source.allowed(selection("d", ["e"]), not_x)
    assert [*unpacked(await read(await source.resolve(chosen.name)))] == ["e/", "e/c"]
    with pytest.raises(dv.FileMissing):
        await source.allowed(selection("d", ["xy"]), not_x)
    name = allowed.name
    del allowed, archive
    gc.collect()
    with pytest.raises(dv.FileMissing):
        await source.resolve(name)


async def test_links_that_lead_back_count_as_names_that_were_asked_about(tmp_path: Path) -> None:
    async def all_of_them(name: str) -> bool:
        return True

    folder = make_tree(tmp_path, {"d/a": b"a", "d/e/c": b"c"})
    (tmp_path / "d/e/back").symlink_to("..")
    for files, is_allowed in ((5, True), (4, False)):
        source = ArchiveSource(folder, limits=ArchiveLimits(files=files))
        with nullcontext() if is_allowed else pytest.raises(dv.ArchiveTooLarge):
            assert "d/e/back/" not in (await source.allowed("d", all_of_them)).entries


async def test_links_obey_the_policy_of_the_source(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_tree(root, {"d/a": b"a"})
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "d/outside").symlink_to(tmp_path / "secret")
    (root / "d/inside").symlink_to("a")
    for symlinks, names in (("deny", ["d/", "d/a"]), ("inside", ["d/", "d/a", "d/inside"])):
        source = ArchiveSource(dv.PathSource(root, symlinks=symlinks))  # type: ignore[arg-type]
        assert [*unpacked(await read(await source.resolve("d")))] == names


async def test_links_that_lead_back_are_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path, {"debian/a": b"a", "debian/pool/b": b"b"})
    (tmp_path / "debian/debian").symlink_to(".")
    (tmp_path / "debian/pool/back").symlink_to("../../debian")
    (tmp_path / "debian/stable").symlink_to("pool")  # the same folder once more, and not above itself
    below = ["debian/", "debian/a", "debian/pool/", "debian/pool/b", "debian/stable/", "debian/stable/b"]
    for source in (
        dv.PathSource(tmp_path),
        dv.StorageSource(dv.DirectoryStorage(tmp_path)),
        dv.StorageSource(dv.DirectoryStorage(tmp_path), names="any"),
        dv.CachedSource(dv.PathSource(tmp_path), dv.Cache(tmp_path / ".cache"), name="files"),
    ):
        archives = ArchiveSource(source, leave_out=lambda name: name.startswith("."))
        assert [*unpacked(await read(await archives.resolve("debian")))] == below, source
        assert [*unpacked(await read(await archives.resolve("")))] == below, source
        chosen = await archives.resolve(selection("debian", ["debian"]))
        assert [*unpacked(await read(chosen))] == below, source


async def test_sources_that_do_not_know_their_folders_end_at_a_depth(tmp_path: Path) -> None:
    class Endless:
        async def resolve(self, name: str, /) -> dv.AsyncFile:
            raise dv.FileMissing(name)

        async def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
            yield Entry("loop", is_folder=True)

    with pytest.raises(dv.ArchiveTooLarge):
        await read(await ArchiveSource(Endless()).resolve("d"))


@pytest.mark.parametrize(
    "limits, detail",
    [
        (ArchiveLimits(files=4), "it would have more than 4 files and folders, the limit"),
        (ArchiveLimits(size=4000), "it would have more than 4000 bytes, the limit"),
        (ArchiveLimits(depth=1), None),
        (ArchiveLimits(depth=0), "it would have more than 0 folders within folders, the limit"),
        (ArchiveLimits(files=5, size=6000), None),
        (ArchiveLimits(files=None, size=None, depth=None), None),
    ],
)
async def test_limits(tmp_path: Path, limits: ArchiveLimits, detail: str | None) -> None:
    source = Counting(make_tree(tmp_path))
    file = await ArchiveSource(source, limits=limits).resolve("reports")
    if detail is None:
        assert unpacked(await read(file))
        return
    with pytest.raises(dv.ArchiveTooLarge) as refused:
        await read(file)
    assert refused.value.detail == detail
    assert refused.value.status == 413
    assert source.opened == []


async def test_the_tag_is_that_of_the_names_the_sizes_and_the_tags_of_the_files(tmp_path: Path) -> None:
    async def tag() -> str:
        file = await ArchiveSource(dv.PathSource(tmp_path)).resolve("")
        async with file.open() as opened:
            assert opened.metadata.etag is not None
            assert not opened.metadata.etag.weak
            return opened.metadata.etag.value

    make_tree(tmp_path, {"d/a": b"a", "d/b": b"b"})
    tags = [await tag()]
    assert await tag() == tags[0]
    os.utime(tmp_path / "d/a", (1_600_000_000,) * 2)
    tags.append(await tag())
    (tmp_path / "d/a").rename(tmp_path / "d/c")
    tags.append(await tag())
    (tmp_path / "d/b").unlink()
    tags.append(await tag())
    (tmp_path / "d/empty").mkdir()
    os.utime(tmp_path / "d", (1_600_000_000,) * 2)
    tags.append(await tag())
    assert len({*tags}) == len(tags)


names = st.text("ab.", min_size=1, max_size=2).filter(lambda name: name not in (".", ".."))
trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), st.binary(max_size=40), max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees, st.data())
async def test_any_span_is_that_slice_of_the_whole(tree: dict[str, bytes], data: st.DataObject) -> None:
    storage = dv.MemoryStorage(tree)
    whole = await read(await ArchiveSource(dv.StorageSource(storage)).resolve(""))
    contents = [content for name, content in unpacked(whole).items() if not name.endswith("/")]
    assert sorted(contents) == sorted(tree.values())
    source = ArchiveSource(dv.StorageSource(storage))  # as after a restart
    for _ in range(3):
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        assert await read(await source.resolve(""), ByteRange(start, stop)) == whole[start:stop]


async def test_large_files_pass_in_chunks(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    file = await ArchiveSource(make_tree(tmp_path, {"large": content, "small": b"x"})).resolve("")
    async with file.open() as opened:
        chunks = [chunk async for chunk in opened.stream(None)]
        assert max(map(len, chunks)) < 400_000
        whole = b"".join(chunks)
        assert unpacked(whole) == {"large": content, "small": b"x"}
        middle = ByteRange(1 << 20, (2 << 20) + 5)
        assert await stream(opened, middle) == whole[middle.start : middle.stop]


async def test_a_range_opens_only_the_files_that_it_has_parts_of(tmp_path: Path) -> None:
    source = Counting(make_tree(tmp_path))
    archives = ArchiveSource(source)
    whole = await read(await archives.resolve("reports"))
    assert source.opened == ["reports/2026/june.pdf", "reports/a.txt"]
    source.opened.clear()
    # the directory at the end, and the descriptors, need no second reading
    at = whole.index(TREE["reports/2026/june.pdf"])
    for span in (directory_of(whole), ByteRange(at + 3996, at + 3996 + 16)):
        assert await read(await archives.resolve("reports"), span) == whole[span.start : span.stop]
    assert source.opened == []
    assert await read(await archives.resolve("reports"), ByteRange(at, at + 10)) == whole[at : at + 10]
    assert source.opened == ["reports/2026/june.pdf bytes=0-9"]


async def test_ranges_that_need_the_same_checksum_read_the_file_once(tmp_path: Path) -> None:
    whole = await read(await ArchiveSource(make_tree(tmp_path)).resolve("reports"))
    source = Counting(dv.PathSource(tmp_path))
    archives = ArchiveSource(source)
    parts: dict[int, bytes] = {}

    async def fetch(number: int) -> None:
        parts[number] = await read(await archives.resolve("reports"), directory_of(whole))

    async with anyio.create_task_group() as group:
        for number in range(16):
            group.start_soon(fetch, number)
    assert {*parts.values()} == {whole[directory_of(whole).start :]}
    assert sorted(source.opened) == ["reports/2026/june.pdf", "reports/a.txt"]


async def test_files_with_the_same_name_size_and_time_in_two_folders_are_two_files(tmp_path: Path) -> None:
    """The tag of a local file is its size and its time."""
    files = {"a/d/f": b"one", "b/d/f": b"two"}
    archives = ArchiveSource(make_tree(tmp_path, files))
    for folder in ("a/d", "b/d"):
        assert unpacked(await read(await archives.resolve(folder))) == {"d/": b"", "d/f": files[f"{folder}/f"]}


@pytest.mark.parametrize("is_described", [True, False])
async def test_a_file_that_changes_aborts_the_archive(tmp_path: Path, is_described: bool) -> None:
    path_source = make_tree(tmp_path)
    source = path_source if is_described else Counting(path_source)
    for change in (b"other, longer", b"z", None):
        make_tree(tmp_path)
        file = await ArchiveSource(source).resolve("reports")
        async with file.open() as opened:
            if change is None:
                (tmp_path / "reports/a.txt").unlink()
            else:
                (tmp_path / "reports/a.txt").write_bytes(change)
            with pytest.raises((dv.TransferAborted, dv.FileMissing)):
                await stream(opened)
            size = opened.metadata.size
            assert size is not None
            with pytest.raises((dv.TransferAborted, dv.FileMissing)):
                await stream(opened, ByteRange(size - 100, size))


class Fixed:
    """A file that is described as a test says, and has the content that it says."""

    location = None
    name = "fixed"

    def __init__(self, metadata: FileMetadata, content: bytes) -> None:
        self.metadata = metadata
        self.content = content

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[dv.OpenFile]:
        yield self

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        yield self.content if span is None else self.content[span.start : span.stop]


async def test_a_file_that_is_shorter_than_described_aborts_the_archive() -> None:
    file = Archive([("a", Fixed(FileMetadata(size=9, etag=ETag("x")), b"short"))])
    async with file.open() as opened:
        for span in (None, ByteRange(31 + 9, 31 + 9 + 16)):
            with pytest.raises(dv.TransferAborted):
                await stream(opened, span)


@pytest.mark.parametrize(
    "metadata, has_ranges",
    [
        (FileMetadata(size=4), False),
        (FileMetadata(size=4, etag=ETag("x", weak=True)), False),
        (FileMetadata(size=4, last_modified=1), False),
        (FileMetadata(size=4, last_modified=1_700_000_001), True),
        (FileMetadata(size=4, etag=ETag("x")), True),
    ],
)
async def test_without_a_strong_validator_of_each_file_there_are_no_ranges(
    metadata: FileMetadata, has_ranges: bool
) -> None:
    file = Archive([("a", Fixed(metadata, b"1234")), ("b", Fixed(FileMetadata(size=1, etag=ETag("y")), b"5"))])
    async with file.open() as opened:
        assert (opened.metadata.etag is not None) == opened.metadata.accept_ranges == has_ranges
        whole = await stream(opened)
        assert unpacked(whole) == {"a": b"1234", "b": b"5"}
        assert await stream(opened, ByteRange(5, 90)) == whole[5:90]
    async with file.open() as opened:  # a caller may stream a part nevertheless
        assert await stream(opened, ByteRange(len(whole) - 150, len(whole))) == whole[-150:]


async def test_a_file_without_a_size_has_no_place() -> None:
    file = Archive([("a", dv.VirtualFile(iter([b"a"]), name="a"))])
    with pytest.raises(dv.ArchiveTooLarge) as refused:
        await read(file)
    assert refused.value.detail == "a file has no known size"


async def test_given_files(tmp_path: Path) -> None:
    made = dv.VirtualFile(lambda: iter([b"ge", b"nerated"]), name="x", size=9, etag=ETag("v1"))
    make_tree(tmp_path)
    local = dv.LocalFile(tmp_path / "b.txt")
    file = Archive(
        [
            ("made/x", made),
            ArchiveEntry("run.sh", local, modified=1_600_000_000, mode=0o755),
            ("run.sh", local),
            ("../../etc/passwd", local),
            ArchiveEntry("empty/"),
            ArchiveEntry("empty/"),
            ("made", local),
        ],
        name="everything.zip",
    )
    assert file.name == "everything.zip"
    content = await read(file)
    assert unpacked(content) == {
        "made/x": b"generated",
        "run.sh": b"bb",
        "run (2).sh": b"bb",
        "_/_/etc/passwd": b"bb",
        "empty/": b"",
        "made (2)": b"bb",
    }
    info = zipfile.ZipFile(io.BytesIO(content)).getinfo("run.sh")
    assert info.external_attr >> 16 == 0o100755
    assert info.date_time == (2020, 9, 13, 12, 26, 40)


@pytest.mark.parametrize("entry", [ArchiveEntry("a"), ("a/", dv.VirtualFile(b"x", name="x"))])
async def test_a_file_is_needed_except_for_a_folder(entry: ArchiveEntry | tuple[str, dv.AsyncFile]) -> None:
    with pytest.raises(dv.ConfigurationError, match="give it a file, or a slash"):
        Archive([entry])


@pytest.mark.parametrize("entry", [("a.txt", "/srv/a.txt"), (5, dv.VirtualFile(b"x", name="x"))])
async def test_what_is_no_entry_is_refused(entry: Any) -> None:
    with pytest.raises(dv.ConfigurationError, match="is not an entry of an archive: give a path and a file"):
        Archive([entry])


async def test_a_file_of_django_is_no_entry_and_the_message_names_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    says = r"or \('a.txt', async_file_of\(file\)\) for a file of Django"
    with (tmp_path / "a.txt").open("rb") as file, pytest.raises(dv.ConfigurationError, match=says):
        Archive([("a.txt", File(file))])  # type: ignore[list-item]


async def test_a_source_that_lists_nothing_is_refused() -> None:
    with pytest.raises(dv.ConfigurationError, match="lists its folders"):
        ArchiveSource(dv.VirtualSource(lambda name: b"x"))


async def test_the_first_error_of_a_file_that_cannot_be_described_is_raised_as_it_is(tmp_path: Path) -> None:
    files = [(f"{number}", dv.LocalFile(tmp_path / f"{number}")) for number in range(30)]
    with pytest.raises(dv.FileMissing):
        await read(Archive(files))


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_checksums_that_are_kept_elsewhere_serve_another_archive(tmp_path: Path, kind: str) -> None:
    checksums: Checksums = MemoryChecksums() if kind == "memory" else SQLiteChecksums(tmp_path / "crc.db")
    make_tree(tmp_path / "t")
    whole = await read(await ArchiveSource(dv.PathSource(tmp_path / "t"), checksums=checksums, name="t").resolve(""))
    again: Checksums = checksums if kind == "memory" else SQLiteChecksums(tmp_path / "crc.db")
    for name, count in (("t", 0), ("other", 3)):
        source = Counting(dv.PathSource(tmp_path / "t"))
        file = await ArchiveSource(source, checksums=again, name=name).resolve("")
        assert await read(file, directory_of(whole)) == whole[directory_of(whole).start :]
        assert len(source.opened) == count


async def test_given_files_keep_their_checksums_under_a_name() -> None:
    checksums = MemoryChecksums()
    metadata = FileMetadata(size=4, etag=ETag("x"))
    opened: list[str] = []
    for _ in range(2):
        counted = _Counted(Fixed(metadata, b"1234"), "a", opened)
        file = Archive([("a", counted)], checksums=checksums, name_in_checksums="fixed")
        async with file.open() as archive:
            size = archive.metadata.size
            assert size is not None
            await stream(archive, ByteRange(size - 60, size))
    assert opened == ["a", "a", "a"]  # described twice, read once


async def test_checksums_in_memory_are_bounded() -> None:
    checksums = MemoryChecksums(max_entries=2)
    await checksums.put({b"a": 1, b"b": 2})
    await checksums.put({b"c": 3})
    assert await checksums.get([b"a", b"b", b"c"]) == {b"b": 2, b"c": 3}


async def test_checksums_in_sqlite_are_bounded(tmp_path: Path) -> None:
    checksums = SQLiteChecksums(tmp_path / "crc.db", max_entries=700)
    keys = [number.to_bytes(2, "big") for number in range(1200)]
    await checksums.put(dict.fromkeys(keys, 2**32 - 1))
    kept = await SQLiteChecksums(tmp_path / "crc.db").get(keys)
    assert len(kept) == 700
    assert {*kept.values()} == {2**32 - 1}


async def test_a_file_of_checksums_that_cannot_be_used_costs_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "crc.db").write_bytes(b"not a database" * 99)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "crc.db").execute("CREATE TABLE x (y)")
    archives = ArchiveSource(make_tree(tmp_path / "t"), checksums=SQLiteChecksums(tmp_path / "crc.db"), name="t")
    with caplog.at_level(logging.WARNING):
        assert unpacked(await read(await archives.resolve("")))
    assert {record.message.partition(" CRC-32s")[0] for record in caplog.records} == {"reading", "writing"}
    assert "crc.db" in caplog.text


async def test_a_file_of_checksums_that_is_locked_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checksums_module, "_BUSY_SECONDS", 0.05)
    checksums = dv.SQLiteChecksums(tmp_path / "crc.db")
    await checksums.put({b"a": 1})
    with closing(sqlite3.connect(tmp_path / "crc.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for _ in range(20):
            assert await checksums.get([b"a"]) == {}
            await checksums.put({b"a": 2})
    assert sorted(record.message.partition(" CRC-32s")[0] for record in caplog.records) == ["reading", "writing"]
    assert await checksums.get([b"a"]) == {}
    monkeypatch.setattr(checksums, "_resume_at", {"reading": 0.0, "writing": 0.0})
    assert await checksums.get([b"a"]) == {b"a": 1}


async def test_connections_that_begin_together_share_a_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "SHARED_SECONDS", 60.0)
    listed: list[str] = []

    class Listing(Counting):
        def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
            listed.append(folder)
            return super().list(folder)

    archives = ArchiveSource(Listing(make_tree(tmp_path)))
    async with (
        (await archives.resolve("reports")).open() as first,
        (await archives.resolve("reports/")).open() as second,
    ):
        assert first.metadata is second.metadata
        await read(await archives.resolve("reports/2026"))
    assert listed == ["reports", "reports/2026", "reports/2026"]
    del first, second
    await read(await archives.resolve("reports"))  # nothing keeps a layout that no connection uses
    assert listed[3:] == ["reports", "reports/2026"]


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("change", ["other bytes", "removed"])
async def test_a_layout_is_not_shared_after_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    monkeypatch.setattr(archive_module, "SHARED_SECONDS", 60.0)
    archives = ArchiveSource(make_tree(tmp_path, {"a": b"a" * 300_000, "b": b"b"}))
    async with (await archives.resolve("")).open() as opened:  # it is being sent all the time
        if change == "removed":
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(b"other")
        with pytest.raises(dv.DownloadError):
            await read(await archives.resolve(""))
        assert unpacked(await read(await archives.resolve(""))).get(name) == (None if change == "removed" else b"other")
        assert opened.metadata.size


@pytest.mark.parametrize("kind", ["local", "ranges", "no ranges"])
async def test_a_client_that_gives_up_leaves_how_far_a_file_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content = bytes(range(256)) * 4096
    half = len(content) // 2
    monkeypatch.setattr(archive_module, "_READ", quarter := half // 2)
    read_from: list[int] = []
    waits, scope = True, anyio.CancelScope()
    crc_of_span = archive_module._crc_of_span

    def counted(local: OpenLocalFile, position: int, length: int, crc: int) -> tuple[int, int]:
        read_from.append(position)
        if position and waits:
            anyio.from_thread.run_sync(scope.cancel)
        return crc_of_span(local, position, length, crc)

    class Half:
        """A file whose second half waits for ever at first."""

        metadata = FileMetadata(size=len(content), etag=ETag("x"), accept_ranges=kind == "ranges")
        name = "x"
        location = None

        @asynccontextmanager
        async def open(self, request: DownloadRequest = GET) -> AsyncIterator[dv.OpenFile]:
            yield self

        async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
            start = 0 if span is None else span.start
            read_from.append(start)
            if start < half:
                yield content[start:half]
                if waits:
                    scope.cancel()
                    await anyio.sleep_forever()
            yield content[max(start, half) :]

    monkeypatch.setattr(archive_module, "_crc_of_span", counted)
    (tmp_path / "x").write_bytes(content)
    file = await dv.PathSource(tmp_path).resolve("x") if kind == "local" else Half()
    archive = Archive([("x", file)])
    async with archive.open() as opened:
        end = ByteRange(opened.metadata.size - 70, opened.metadata.size) if opened.metadata.size else None
        with scope:
            await stream(opened, end)
    assert scope.cancelled_caught
    waits = False
    told = await read(archive, end)
    assert zlib.crc32(content).to_bytes(4, "little") in told
    assert read_from == {"local": [0, quarter, half, half + quarter], "ranges": [0, half], "no ranges": [0, 0]}[kind]


async def test_only_some_archives_are_laid_out_at_the_same_time(tmp_path: Path) -> None:
    running, most, others = 0, 0, anyio.Event()

    class Listing(Counting):
        async def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == archive_module._LAID_OUT:
                others.set()
            await others.wait()
            async for entry in super().list(folder):
                yield entry
            running -= 1

    make_tree(tmp_path, {f"{number}/file": b"x" for number in range(20)})
    archives = ArchiveSource(Listing(dv.PathSource(tmp_path)))
    tags = set()

    async def describe(folder: str) -> None:
        async with (await archives.resolve(folder)).open() as opened:
            tags.add(opened.metadata.etag)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(describe, str(number))
    assert len(tags) == 20
    assert most == archive_module._LAID_OUT


async def test_the_layout_of_many_files_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    entries = [ArchiveEntry(f"{number}/") for number in range(archive_module._MANY)]
    seen: list[tuple[str, int]] = []

    class Seen(ArchiveLimits):
        """Limits that notice in which thread the size of the archive is compared with them."""

        def __getattribute__(self, name: str) -> object:
            seen.append((name, threading.get_ident()))
            return super().__getattribute__(name)

    async with Archive(entries, limits=Seen()).open() as opened:
        assert opened.metadata.size
    assert ("size", threading.get_ident()) not in seen
    assert "size" in {name for name, _ in seen}


async def test_a_path_that_is_too_long_for_an_archive() -> None:
    with pytest.raises(dv.ArchiveTooLarge) as refused:
        await read(Archive([("a" * 65_536, dv.VirtualFile(b"x", name="x"))]))
    assert refused.value.detail == "a path would be too long"


async def test_a_client_that_leaves_does_not_lose_the_checksums(tmp_path: Path) -> None:
    source = Counting(make_tree(tmp_path, {"a": b"a" * 300_000, "b": b"b"}))
    archives = ArchiveSource(source)
    whole = await read(await ArchiveSource(dv.PathSource(tmp_path)).resolve(""))
    async with (await archives.resolve("")).open() as opened, aclosing(chunks_of(opened)) as chunks:
        received = 0
        async for chunk in chunks:
            received += len(chunk)
            if received > 300_050:
                break
    source.opened.clear()
    assert await read(await archives.resolve(""), ByteRange(300_040, len(whole))) == whole[300_040:]
    assert source.opened == ["b"]


async def test_pieces_are_the_bytes_of_the_stream_and_their_files_are_open_until_the_next_ones(tmp_path: Path) -> None:
    sizes = [70_000, 3, 65_537, 65_536, 900_000, 0, *[100_000] * 9]
    files = {f"d/{number:02}": os.urandom(size) for number, size in enumerate(sizes)}
    source = ArchiveSource(make_tree(tmp_path, files))
    whole = await read(await source.resolve("d"))
    async with (await source.resolve("d")).open() as opened:
        for start, stop in ((0, len(whole)), (9, len(whole) - 9), (69_000, 70_100), (300_000, 1_200_000)):
            content, lent = b"", 0
            async with aclosing(opened.pieces(ByteRange(start, stop))) as batches:
                async for batch in batches:
                    names = [path for path in open_paths() if path.startswith(f"{tmp_path}/d/")]
                    assert len(names) == sum(isinstance(piece, tuple) for piece in batch) <= 4
                    for piece in batch:
                        if not isinstance(piece, tuple):
                            content += piece
                        else:
                            file, span = piece
                            assert len(span) > 65_536
                            content += os.pread(file.descriptor, len(span), span.start)
                            lent += len(span)
            assert content == whole[start:stop]
            assert (lent > 0.8 * (stop - start)) == (stop - start > 2000)
            assert not [path for path in open_paths() if path.startswith(f"{tmp_path}/d/")]


async def test_a_file_that_grows_while_it_is_lent_ends_the_pieces(tmp_path: Path) -> None:
    source = ArchiveSource(make_tree(tmp_path, {"d/a": bytes(100_000), "d/b": bytes(600_000)}))
    await read(await source.resolve("d"))
    async with (await source.resolve("d")).open() as opened:
        async with aclosing(opened.pieces(ByteRange(0, opened.metadata.size or 0))) as batches:
            assert [isinstance(piece, tuple) for piece in await anext(batches)] == [False, True, False, True, False]
            with (tmp_path / "d/a").open("ab") as file:
                file.write(b"more")
            with pytest.raises(dv.TransferAborted):
                await anext(batches)
        assert not [path for path in open_paths() if path.startswith(f"{tmp_path}/d/")]


async def test_an_archive_that_does_not_begin_in_a_local_file_has_no_pieces(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(100_000))
    made = dv.VirtualFile(b"x" * 100_000, name="a")
    local: dv.AsyncFile = dv.LocalFile(tmp_path / "b")
    for files in ([ArchiveEntry("a", made)], [ArchiveEntry("a", made), ArchiveEntry("b", local)]):
        async with Archive(files).open() as opened, aclosing(opened.pieces(ByteRange(0, 100_030))) as batches:
            assert [batch async for batch in batches] == []


async def test_a_subclass_of_a_path_source_that_returns_other_files_is_asked_for_them(tmp_path: Path) -> None:
    class Other(dv.PathSource):
        async def resolve(self, name: str, /) -> Any:
            return await super().resolve(name + ".real")

        async def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
            yield Entry("a")

    (tmp_path / "a").write_bytes(b"wrong")
    (tmp_path / "a.real").write_bytes(b"right")
    assert unpacked(await read(await ArchiveSource(Other(tmp_path)).resolve(""))) == {"a": b"right"}


async def test_an_unchanged_folder_keeps_its_layout_and_a_changed_one_does_not(tmp_path: Path) -> None:
    source = make_tree(tmp_path, {"d/a": b"a", "d/e/b": b"b"})
    archives = ArchiveSource(source)

    async def tag_and_names() -> tuple[str, list[str]]:
        async with (await archives.resolve("d")).open() as opened:
            assert opened.metadata.etag is not None
            content = await stream(opened)
            fresh = await ArchiveSource(source).resolve("d")
            async with fresh.open() as other:
                assert other.metadata == opened.metadata
                assert await stream(other) == content
            return opened.metadata.etag.value, [*unpacked(content)]

    def layout() -> object:
        ((_, laid_out),) = archives.kept.values()
        return laid_out.layout

    tags = [await tag_and_names()]
    first = layout()
    assert await tag_and_names() == tags[0]
    assert layout() is first
    other_time = (1_600_000_000,) * 2
    for change in (
        lambda: os.utime(tmp_path / "d/a", other_time),
        lambda: (tmp_path / "d/a").write_bytes(b"longer"),
        lambda: (tmp_path / "d/e/b").rename(tmp_path / "d/e/c"),
        lambda: (tmp_path / "d/e/new").write_bytes(b"new"),
        lambda: (tmp_path / "d/e/new").unlink(),
        lambda: os.utime(tmp_path / "d/e", other_time),
        lambda: (tmp_path / "d/e/empty").mkdir(),
    ):
        before = layout()
        change()
        tags.append(await tag_and_names())
        assert layout() is not before
        assert tags[-1][0] != tags[-2][0]


async def test_a_link_whose_target_changes_changes_the_archive(tmp_path: Path) -> None:
    archives = ArchiveSource(make_tree(tmp_path, {"d/a": b"a", "x/target": b"one"}))
    (tmp_path / "d/link").symlink_to("../x/target")
    assert unpacked(await read(await archives.resolve("d")))["d/link"] == b"one"
    (tmp_path / "x/target").write_bytes(b"other")
    assert unpacked(await read(await archives.resolve("d")))["d/link"] == b"other"


async def test_layouts_that_are_kept_are_bounded_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "_KEPT", 9)
    make_tree(tmp_path, {f"{folder}/{number}": b"x" for folder in "abcd" for number in range(3)})
    archives = ArchiveSource(dv.PathSource(tmp_path))
    for folder in "abcadc":
        await read(await archives.resolve(folder))
    assert [key[0] for key in archives.kept] == ["d", "c"]
    await read(await archives.resolve(""))  # one that is larger than all is kept alone
    assert [key[0] for key in archives.kept] == [""]


async def test_a_folder_with_a_file_that_may_change_without_a_sign_is_laid_out_anew(tmp_path: Path) -> None:
    archives = ArchiveSource(make_tree(tmp_path, {"d/a": b"one"}))
    for content in (b"one", b"two"):
        (tmp_path / "d/a").write_bytes(content)
        os.utime(tmp_path / "d/a", (1, 1))
        assert unpacked(await read(await archives.resolve("d")))["d/a"] == content
    assert not archives.kept


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("change", ["grows", "shrinks", "rewritten", "a folder", "a link", "a pipe", "removed"])
async def test_a_small_file_that_changes_after_the_layout_aborts_the_archive(
    tmp_path: Path, change: str, is_known: bool
) -> None:
    archives = ArchiveSource(make_tree(tmp_path, {"d/a": b"a" * 999, "d/b": b"b" * 999, "x": b"x" * 998}))
    if is_known:
        await read(await archives.resolve("d"))
    path = tmp_path / "d/b"
    async with (await archives.resolve("d")).open() as opened:
        if change in ("grows", "shrinks", "rewritten"):
            path.write_bytes(b"c" * {"grows": 1000, "shrinks": 998, "rewritten": 999}[change])
        else:
            path.unlink()
        match change:
            case "a folder":
                path.mkdir()
            case "a link":
                path.symlink_to("../x")
            case "a pipe":
                os.mkfifo(path)
        size = opened.metadata.size
        assert size is not None
        for batches in (opened.pieces(ByteRange(0, size)), opened.pieces(ByteRange(1100, size))):
            with pytest.raises((dv.TransferAborted, dv.FileMissing)):
                await used(batches)
        with pytest.raises((dv.TransferAborted, dv.FileMissing)):
            await stream(opened)
    assert not [path for path in open_paths() if path.startswith(f"{tmp_path}/d/")]


async def test_a_small_file_is_not_read_through_a_link_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    for name in ("root/d/a", "secret/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"hidden" if "secret" in name else b"public")
        os.utime(tmp_path / name, (1_700_000_000,) * 2)  # the same version
    async with (await ArchiveSource(dv.PathSource(tmp_path / "root")).resolve("")).open() as opened:
        (tmp_path / "root/d").rename(tmp_path / "root/before")
        (tmp_path / "root/d").symlink_to(tmp_path / "secret")
        with pytest.raises((dv.TransferAborted, dv.FileError)):
            await stream(opened)


async def test_files_that_are_not_in_the_page_cache_are_read_by_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"d/{number}": os.urandom(size) for number, size in enumerate((10, 40_000, 100_000, 300_000))}
    archives = ArchiveSource(make_tree(tmp_path, files))
    whole = await read(await archives.resolve("d"))
    readers: list[int] = []
    pread = os.pread

    def cold(descriptor: int, buffers: Any, offset: int, flags: int) -> int:
        raise BlockingIOError  # as if the pages were dropped, which a process cannot do in a file system in memory

    def noted(descriptor: int, length: int, offset: int) -> bytes:
        readers.append(threading.get_ident())
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "preadv", cold)
    monkeypatch.setattr(os, "pread", noted)
    for source in (archives, ArchiveSource(dv.PathSource(tmp_path))):
        readers.clear()
        assert await read(await source.resolve("d")) == whole
        assert len(readers) >= len(files)
        assert threading.get_ident() not in readers


async def test_the_versions_of_a_listing_are_those_of_its_files(tmp_path: Path) -> None:
    source = make_tree(tmp_path, {"d/a": b"a", "d/e/b": b"bb", "d/old": b"old"})
    os.utime(tmp_path / "d/old", (1, 1))  # a constant of a tool
    (tmp_path / "d/link").symlink_to("e/b")
    (tmp_path / "d/dangling").symlink_to("nothing")
    batches = source.list_versions("d")
    assert batches is not None
    listed = sorted([entry async for batch in batches for entry in batch])
    expected = []
    async for entry in source.list("d"):
        assert entry.modified is not None
        version = None
        if isinstance(entry, dv.DescribedEntry):
            version = entry.describe().version
        expected.append((entry.name, entry.is_folder, entry.size, int(entry.modified.timestamp()), version))
    assert listed == sorted(expected)
    assert [entry[0] for entry in listed] == ["a", "e", "link", "old"]


async def test_a_file_of_a_listing_is_opened_only_in_its_version(tmp_path: Path) -> None:
    source = make_tree(tmp_path, {"a": b"a", "old": b"old", "d/b": b"b"})
    os.utime(tmp_path / "old", (1, 1))
    batches = source.list_versions()
    assert batches is not None
    versions = {name: (size, version) async for batch in batches for name, _, size, _, version in batch}
    for name, size, version, is_opened in (
        ("a", *versions["a"], True),
        ("old", *versions["old"], True),
        ("old", 4, "", False),
        ("old", 3, versions["a"][1], False),
        ("a", 1, "", False),
        ("d", 1, versions["a"][1], False),
        ("nothing", 1, versions["a"][1], False),
    ):
        assert size is not None
        assert version is not None
        file = source.open_nowait(name, size, version)
        assert (file is not None) == is_opened, name
        if file is not None:
            with closing(file):
                assert (file.size, file.version) == (size, version)
    assert not [path for path in open_paths() if path.startswith(f"{tmp_path}/")]
