"""Blocking file objects of every kind: what is sent of them, with which length, and whether in parts."""

import array
import asyncio
import codecs
import contextlib
import fcntl
import gzip
import http.client
import io
import os
import tarfile
import tempfile
import termios
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3

from downloadview_async import Cache, CachedSource, Download, StorageSource, SyncStorage, VirtualFile, VirtualSource
from downloadview_async.errors import FileMissing, SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.file_objects import Extent, OpenFileObject, Use, extent_of
from downloadview_async.sources.workers import Workers
from downloadview_async.testing import call

pytestmark = pytest.mark.asyncio

CONTENT = bytes(range(256)) * 2048  # more than one chunk
TEXT = "Grüße, 祝您平安\n" * 30_000


# --- objects as libraries have them


class Wrapped:
    """A file object with `read` and `close` alone, over another one."""

    def __init__(self, content: bytes | str = CONTENT) -> None:
        self.file: Any = io.StringIO(content) if isinstance(content, str) else io.BytesIO(content)

    def read(self, size: int = -1) -> Any:
        return self.file.read(size)

    def close(self) -> None:
        self.file.close()


class SeekReturnsNone(Wrapped):
    """As paramiko's SFTPFile, which is what fsspec's SFTP opens."""

    def seek(self, offset: int, whence: int = 0) -> None:
        self.file.seek(offset, whence)

    def tell(self) -> int:
        return int(self.file.tell())


class SeekTellsNothing(Wrapped):
    def seek(self, offset: int, whence: int = 0) -> None:
        self.file.seek(offset, whence)


class TellRaises(SeekReturnsNone):
    def tell(self) -> int:
        raise OSError("no position")


class TellIsAlwaysZero(SeekReturnsNone):
    def tell(self) -> int:
        return 0


class SeekFromTheBeginningAlone(Wrapped):
    def seek(self, offset: int) -> int:
        return int(self.file.seek(offset))


class SeekIgnoresWhence(Wrapped):
    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset))


class SeekDoesNothing(Wrapped):
    def seek(self, offset: int, whence: int = 0) -> None:
        pass


class SeekIsFalse(Wrapped):
    """As urllib3's responses, which are what minio returns: there is a `seek`, and it is not for use."""

    def seekable(self) -> bool:
        return False

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("seek")


class SeekableRaises(SeekIsFalse):
    def seekable(self) -> bool:
        raise NotImplementedError


class SeekWhereItIs(Wrapped):
    """As fsspec's HTTPStreamFile: it says that it can seek, and then only to where it is."""

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> None:
        if whence != 0 or offset != self.file.tell():
            raise ValueError("Cannot seek streaming HTTP file")


class ReadsBeyondTheEndBadly(SeekReturnsNone):
    """A store that answers 416 to a range that begins at the end."""

    def read(self, size: int = -1) -> Any:
        if self.file.tell() >= len(CONTENT):
            raise OSError("416 Range Not Satisfiable")
        return super().read(size)


class ShortReads(Wrapped):
    def read(self, size: int = -1) -> Any:
        return self.file.read(min(size, 1000))


class ReadsTooMuch(Wrapped):
    """It has blocks of its own, whatever it is asked for."""

    def read(self, size: int = -1) -> Any:
        return self.file.read(100_000)


class ReadsTooMuchAndSeeks(ReadsTooMuch):
    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))


class ReadsBytearrays(SeekReturnsNone):
    def read(self, size: int = -1) -> Any:
        return bytearray(super().read(size))


class ReadsMemoryviews(SeekReturnsNone):
    def read(self, size: int = -1) -> Any:
        return memoryview(super().read(size))


class TextThatSeeks(Wrapped):
    """Opened as binary, and yet it reads text; nothing else says so."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))


class TextWithoutSeek(Wrapped):
    def __init__(self) -> None:
        super().__init__(TEXT)


class WithSize(Wrapped):
    size = 5  # of what, nobody knows


class SizeIsAMethod(Wrapped):
    def size(self) -> int:
        return 5


class WithoutClose:
    def __init__(self) -> None:
        file = io.BytesIO(CONTENT)
        self.read, self.seek = file.read, file.seek


def pipe() -> Any:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as output, contextlib.suppress(BrokenPipeError):
            output.write(CONTENT)

    threading.Thread(target=write, daemon=True).start()
    return open(reading, "rb")


def unbuffered_pipe() -> Any:
    return pipe().detach()


def on_disk(write: Callable[[Any], Any]) -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    write(file)
    file.seek(0)
    return file


def spooled(max_size: int) -> Any:
    file = tempfile.SpooledTemporaryFile(max_size)  # noqa: SIM115
    file.write(CONTENT)  # and its position is the end
    return file


def zipped(compression: int) -> Any:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", compression) as output:
        output.writestr("a.bin", CONTENT)
    return zipfile.ZipFile(archive).open("a.bin")


def tarred(mode: Any) -> Any:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as output:
        member = tarfile.TarInfo("a.bin")
        member.size = len(CONTENT)
        output.addfile(member, io.BytesIO(CONTENT))
    archive.seek(0)
    opened = tarfile.open(fileobj=archive, mode=mode)  # noqa: SIM115
    return opened.extractfile(opened.next() or "")


def gzipped() -> Any:
    return gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(CONTENT, 1)))


def text_file() -> Any:
    file = tempfile.TemporaryFile("w+", encoding="utf-16")  # noqa: SIM115
    file.write(TEXT)
    return file


WHOLE, PARTS = False, True
KINDS: dict[str, tuple[Callable[[], Any], int | None, bool]] = {
    # how it is made; the length that is known; whether in parts
    "BytesIO": (lambda: io.BytesIO(CONTENT), len(CONTENT), PARTS),
    "temporary file": (lambda: on_disk(lambda file: file.write(CONTENT)), len(CONTENT), PARTS),
    "spooled in memory": (lambda: spooled(0), len(CONTENT), PARTS),
    "spooled on disk": (lambda: spooled(1000), len(CONTENT), PARTS),
    "stored in a zip": (lambda: zipped(zipfile.ZIP_STORED), len(CONTENT), PARTS),
    "deflated in a zip": (lambda: zipped(zipfile.ZIP_DEFLATED), len(CONTENT), PARTS),
    "in a tar": (lambda: tarred("r:"), len(CONTENT), PARTS),
    "in a tar stream": (lambda: tarred("r|"), None, WHOLE),
    "gzip": (gzipped, len(CONTENT), PARTS),
    "without close": (WithoutClose, len(CONTENT), PARTS),
    **{
        kind.__name__: (kind, len(CONTENT), PARTS)
        for kind in (SeekReturnsNone, ReadsBeyondTheEndBadly, ReadsBytearrays, ReadsMemoryviews, ReadsTooMuchAndSeeks)
    },
    **{
        kind.__name__: (kind, None, WHOLE)
        for kind in (
            Wrapped,
            SeekTellsNothing,
            TellRaises,
            TellIsAlwaysZero,
            SeekFromTheBeginningAlone,
            SeekIgnoresWhence,
            SeekDoesNothing,
            SeekIsFalse,
            SeekableRaises,
            SeekWhereItIs,
            ShortReads,
            ReadsTooMuch,
            WithSize,
            SizeIsAMethod,
        )
    },
    "pipe": (pipe, None, WHOLE),
    "unbuffered pipe": (unbuffered_pipe, None, WHOLE),
}
TEXTS: dict[str, Callable[[], Any]] = {
    "StringIO": lambda: io.StringIO(TEXT, newline=""),
    "text file": text_file,
    "codecs": lambda: codecs.getreader("utf-8")(io.BytesIO(TEXT.encode())),
    TextThatSeeks.__name__: TextThatSeeks,
    TextWithoutSeek.__name__: TextWithoutSeek,
}


class Opens:
    """A storage that opens what `make` makes, and knows the size of what it has stored."""

    def __init__(self, make: Callable[[], Any], size: int | None = None) -> None:
        self.make = make
        self.stored = size

    def open(self, name: str, mode: str) -> Any:
        return self.make()

    def size(self, name: str) -> int:
        if self.stored is None:
            raise NotImplementedError
        return self.stored


def virtual(make: Callable[[], Any]) -> Download:
    return Download(VirtualSource(lambda name: VirtualFile(make, name="x.bin")))


def stored(make: Callable[[], Any]) -> Download:
    return Download(StorageSource(SyncStorage(Opens(make))))


def sized(make: Callable[[], Any], size: int) -> Download:
    file = VirtualFile(make, name="x.bin", size=size)
    return Download(VirtualSource(lambda name: file))


def stored_sized(make: Callable[[], Any], size: int) -> Download:
    return Download(StorageSource(SyncStorage(Opens(make, size))))


each_source = pytest.mark.parametrize("source", [virtual, stored])


@each_source
@pytest.mark.parametrize("kind", KINDS)
async def test_all_of_a_file_object_is_sent(kind: str, source: Callable[..., Download]) -> None:
    make, length, has_parts = KINDS[kind]
    app = source(make)
    whole = await call(app, "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)
    assert whole.headers.get("content-length") == (None if length is None else str(length))
    assert ("accept-ranges" in whole.headers) is has_parts
    head = await call(app, "/x", method="HEAD")
    assert (head.status, head.headers) == (200, whole.headers)


@each_source
@pytest.mark.parametrize("kind", KINDS)
async def test_a_part_is_that_part_or_the_whole(kind: str, source: Callable[..., Download]) -> None:
    make, length, has_parts = KINDS[kind]
    app = source(make)
    for order, part in (("bytes=300000-300009", CONTENT[300_000:300_010]), ("bytes=-7", CONTENT[-7:])):
        answer = await call(app, "/x", headers={"Range": order})
        if has_parts:
            assert (answer.status, answer.body) == (206, part)
        else:
            assert (answer.status, answer.complete, answer.body == CONTENT) == (200, True, True)
    if has_parts:
        assert (await call(app, "/x", headers={"Range": f"bytes={length}-"})).status == 416


@each_source
@pytest.mark.parametrize("kind", TEXTS)
async def test_text_is_sent_as_utf_8_without_a_length(kind: str, source: Callable[..., Download]) -> None:
    whole = await call(source(TEXTS[kind]), "/x", headers={"Range": "bytes=0-3"})
    assert (whole.status, whole.complete, whole.body == TEXT.encode()) == (200, True, True)
    assert not {"content-length", "accept-ranges"} & set(whole.headers)


@pytest.mark.parametrize("kind", TEXTS)
async def test_the_size_of_stored_text_is_not_that_of_what_is_sent(kind: str) -> None:
    app = Download(StorageSource(SyncStorage(Opens(TEXTS[kind], size=len(TEXT)))))
    whole = await call(app, "/x")
    assert (whole.complete, whole.body == TEXT.encode()) == (True, True)
    assert "content-length" not in whole.headers


async def test_a_size_that_is_said_of_text_counts_its_bytes() -> None:
    file = VirtualFile(TextThatSeeks, name="x.txt", size=len(TEXT.encode()))
    whole = await call(Download(VirtualSource(lambda name: file)), "/x", headers={"Range": "bytes=0-3"})
    assert (whole.status, whole.complete, whole.body == TEXT.encode()) == (200, True, True)
    assert whole.headers["content-length"] == str(len(TEXT.encode()))


@pytest.mark.parametrize("kind", ["SeekFromTheBeginningAlone", "SeekTellsNothing"])
async def test_a_known_size_is_enough_for_parts_where_an_end_cannot_be_told(kind: str) -> None:
    file = VirtualFile(KINDS[kind][0], name="x", size=len(CONTENT))
    answer = await call(Download(VirtualSource(lambda name: file)), "/x", headers={"Range": "bytes=-7"})
    assert (answer.status, answer.body) == (206, CONTENT[-7:])


@pytest.mark.parametrize("kind", ["SeekIsFalse", "SeekWhereItIs", "SeekIgnoresWhence", "Wrapped", "pipe"])
async def test_a_known_size_is_the_length_of_what_cannot_seek(kind: str) -> None:
    app = Download(StorageSource(SyncStorage(Opens(KINDS[kind][0], size=len(CONTENT)))))
    whole = await call(app, "/x", headers={"Range": "bytes=-7"})
    assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)
    assert (whole.headers["content-length"], "accept-ranges" in whole.headers) == (str(len(CONTENT)), False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: io.BytesIO(b""),
        lambda: io.StringIO(""),
        lambda: on_disk(lambda file: None),
        lambda: Wrapped(b""),
        lambda: open(os.devnull, "rb"),  # noqa: SIM115
    ],
)
@each_source
async def test_an_empty_one_is_empty(make: Callable[[], Any], source: Callable[..., Download]) -> None:
    whole = await call(source(make), "/x", headers={"Range": "bytes=0-0"})
    assert (whole.status, whole.complete, whole.body) == (200, True, b"")


# --- positions


@pytest.mark.parametrize("kind", [kind for kind, (_, length, _) in KINDS.items() if length])
async def test_what_can_seek_is_sent_from_its_beginning(kind: str) -> None:
    def make() -> Any:
        file = KINDS[kind][0]()
        file.seek(0)
        assert file.read(1000)
        return file

    whole = await call(virtual(make), "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)


@pytest.mark.parametrize(
    "kind", ["Wrapped", "SeekIsFalse", "SeekableRaises", "SeekWhereItIs", "SeekDoesNothing", "pipe"]
)
async def test_what_cannot_seek_is_sent_from_where_it_is(kind: str) -> None:
    def make() -> Any:
        file = KINDS[kind][0]()
        assert file.read(1000) == CONTENT[:1000]
        return file

    whole = await call(virtual(make), "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT[1000:]) == (200, True, True)


# --- objects that fail


class SeeksInVain(Wrapped):
    """It says where it is to read, and reads on where it was."""

    position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (len(self.file.getvalue()) if whence else 0)
        return self.position

    def tell(self) -> int:
        return self.position


class Grows(Wrapped):
    """A file that gets more while it is asked for its size."""

    def seek(self, offset: int, whence: int = 0) -> int:
        position = int(self.file.seek(offset, whence))
        if whence:
            self.file.write(b"more")
            self.file.seek(position)
        return position


@each_source
@pytest.mark.parametrize("content", [CONTENT, b"a", b"ab", b"aaa", TEXT, "a"])
async def test_what_does_not_move_is_sent_from_its_first_byte(
    content: bytes | str, source: Callable[..., Download]
) -> None:
    expected = content.encode() if isinstance(content, str) else content
    for kind in (SeeksInVain, ReadsMemoryviewsInVain) if isinstance(content, bytes) else (SeeksInVain,):
        whole = await call(source(lambda kind=kind: kind(content)), "/x", headers={"Range": "bytes=1-2"})
        assert (whole.status, whole.complete, whole.body == expected) == (200, True, True)


class ReadsMemoryviewsInVain(SeeksInVain):
    def read(self, size: int = -1) -> Any:
        return memoryview(super().read(size))


@each_source
async def test_a_file_that_grows_while_it_is_opened_is_sent_whole(source: Callable[..., Download]) -> None:
    whole = await call(source(Grows), "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT + b"more") == (200, True, True)


class EndIsFurtherOn(Wrapped):
    """It goes to its end, and says that this is less far."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence)) - (1000 if whence else 0)


@each_source
async def test_an_end_that_is_told_too_early_is_not_the_size(source: Callable[..., Download]) -> None:
    for order in ({}, {"Range": "bytes=-7"}):
        whole = await call(source(EndIsFurtherOn), "/x", headers=order)
        assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)


async def test_a_size_that_is_too_small_is_not_that_of_what_can_seek() -> None:
    for kind in (SeekFromTheBeginningAlone, SeekTellsNothing):
        whole = await call(sized(kind, len(CONTENT) - 1000), "/x")
        assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)


class ReadsAllAtOnce:
    """Its `read` takes no size."""

    def read(self) -> bytes:
        return CONTENT


class ReadsAllAndSeeks(ReadsAllAtOnce):
    def seek(self, offset: int, whence: int = 0) -> int:
        return len(CONTENT) if whence else offset


@pytest.mark.parametrize(
    "make", [lambda: None, lambda: "text", lambda: CONTENT, object, ReadsAllAtOnce, ReadsAllAndSeeks]
)
async def test_what_is_not_a_file_object_is_not_there_for_any_method(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    for method in ("GET", "HEAD"):
        caplog.clear()
        assert (await call(stored(make), "/x", method=method)).status == 503
        assert "read(" in caplog.text or "positional argument" in caplog.text


class WouldBlock(Wrapped):
    """A raw file in non-blocking mode: it has nothing now, which is not its end."""

    def __init__(self, blocks: int = 0) -> None:
        super().__init__()
        self.blocks = blocks

    def read(self, size: int = -1) -> Any:
        if size == 0:
            return b""
        self.blocks -= 1
        return None if self.blocks < 0 else super().read(size)


class DoesNotGoBack(Wrapped):
    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and self.file.tell():
            raise OSError("rewind failed")
        return int(self.file.seek(offset, whence))


class GoesElsewhere(Wrapped):
    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset and whence == 0 and offset // 2, whence))


@each_source
async def test_what_has_nothing_now_is_not_at_its_end(source: Callable[..., Download]) -> None:
    assert (await call(source(WouldBlock), "/x")).status == 503
    with pytest.raises(TransferAborted, match="non-blocking"):
        await call(source(lambda: WouldBlock(1)), "/x")


@each_source
async def test_what_went_to_its_end_and_does_not_come_back_is_not_an_empty_file(
    source: Callable[..., Download],
) -> None:
    assert (await call(source(DoesNotGoBack), "/x")).status == 503


@each_source
async def test_a_part_that_is_another_part_is_not_sent(source: Callable[..., Download]) -> None:
    assert (await call(source(GoesElsewhere), "/x", headers={"Range": "bytes=100-109"})).status == 503


async def test_a_closed_one_is_missing() -> None:
    file = io.BytesIO(CONTENT)
    app = Download(VirtualSource(lambda name: VirtualFile(file, name="x")))
    assert (await call(app, "/x")).body == CONTENT
    for method in ("GET", "HEAD"):
        assert (await call(app, "/x", method=method)).status == 404
    with pytest.raises(FileMissing):
        extent_of(file)


async def test_a_part_of_what_cannot_seek_is_refused() -> None:
    file = Wrapped()
    extent = Extent(len(CONTENT))
    opened = OpenFileObject(file, await _metadata(extent), extent, workers=Workers(), in_use=Use())
    with pytest.raises(TransferAborted):
        [chunk async for chunk in opened.stream(ByteRange(5, 10))]


async def _metadata(extent: Extent) -> Any:
    async with VirtualFile(io.BytesIO(CONTENT), name="x").open() as opened:
        return opened.metadata


async def test_what_cannot_go_back_says_so() -> None:
    with pytest.raises(SourceUnavailable, match="rewind failed"):
        extent_of(DoesNotGoBack())


# --- asyncio's own cancellation, which waits for nothing


@pytest.mark.parametrize("is_generator", [True, False])
async def test_a_cancelled_task_closes_what_a_thread_still_reads(is_generator: bool) -> None:
    reading, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    faults: list[BaseException] = []

    def generate() -> Iterator[bytes]:
        try:
            reading.set()
            go_on.wait(30)
            yield b"x"
        finally:
            closed.set()

    class Slow:
        is_read = False

        def read(self, size: int) -> bytes:
            if size == 0:
                return b""
            self.is_read = True
            reading.set()
            go_on.wait(30)
            self.is_read = False
            return b"x"

        def close(self) -> None:
            if self.is_read:
                faults.append(ValueError("closed while it was read"))
            closed.set()

    content: Any = generate if is_generator else Slow

    async def send() -> None:
        async with VirtualFile(content, name="x").open() as opened:
            async for _ in opened.stream(None):
                pass

    task = asyncio.create_task(send())
    await asyncio.to_thread(reading.wait, 30)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(closed.wait, 30)
    assert faults == []


# --- more content than its size


def in_blocks(content: bytes = CONTENT) -> Iterator[bytes]:
    for start in range(0, len(content), 1024):
        yield content[start : start + 1024]
        yield b""


async def in_blocks_async() -> AsyncIterator[bytes]:
    for block in in_blocks():
        yield block


class Async:
    def __init__(self) -> None:
        self.file = io.BytesIO(CONTENT)

    async def read(self, size: int) -> bytes:
        return self.file.read(size)


STREAMS: dict[str, tuple[Callable[..., Download], Callable[[], Any]]] = {
    **{f"stored {kind}": (stored_sized, KINDS[kind][0]) for kind in ("Wrapped", "SeekIsFalse", "ReadsTooMuch", "pipe")},
    "stored unbuffered pipe": (stored_sized, unbuffered_pipe),
    "Wrapped": (sized, Wrapped),
    "ShortReads": (sized, ShortReads),
    "generator": (sized, in_blocks),
    "one block": (sized, lambda: [CONTENT]),
    "asynchronous generator": (sized, in_blocks_async),
    "asynchronous read": (sized, Async),
}


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) - 1024, 256 * 1024, 1024, 5])
@pytest.mark.parametrize("kind", STREAMS)
async def test_more_content_than_its_size_is_not_complete(kind: str, size: int) -> None:
    app, make = STREAMS[kind]
    for order in ({}, {"Range": "bytes=0-"}):
        longer = await call(app(make, size), "/x", headers=order, raise_errors=False)
        assert longer.status == 503 or (longer.complete, len(longer.body) < size) == (False, True)


@pytest.mark.parametrize("size, length", [(len(CONTENT), str(len(CONTENT))), (0, None)])
@pytest.mark.parametrize("kind", STREAMS)
async def test_a_size_that_is_true_or_0_is_that_of_complete_content(kind: str, size: int, length: str | None) -> None:
    app, make = STREAMS[kind]
    whole = await call(app(make, size), "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)
    assert whole.headers.get("content-length") == length


@pytest.mark.parametrize("kind", ["Wrapped", "generator", "asynchronous generator"])
async def test_a_cache_does_not_keep_what_is_longer_than_its_size(kind: str, tmp_path: Path) -> None:
    _, make = STREAMS[kind]
    file = VirtualFile(make, name="x.bin", size=len(CONTENT) - 1024, max_age=60)
    cache = Cache(tmp_path / "cache")
    source = CachedSource(VirtualSource(lambda name: file), cache, name="made")
    for _ in range(2):
        longer = await call(Download(source), "/x.bin", raise_errors=False)
        assert longer.complete is False
    assert [path for path in Path(cache.path).iterdir() if path.name != "usage"] == []
    await source.aclose()
    await cache.aclose()


class Connected:
    """A source that has sent what it has promised, and waits for what comes next until it is closed."""

    def __init__(self) -> None:
        self.file = io.BytesIO(CONTENT)
        self.closed = threading.Event()

    def read(self, size: int = -1) -> bytes:
        if not (block := self.file.read(size)) and size:
            self.closed.wait(30)
        return block

    def close(self) -> None:
        self.closed.set()


class ConnectedPipe:
    def __init__(self) -> None:
        reading, self.writing = os.pipe()
        os.write(self.writing, CONTENT[:1000])
        self.file = open(reading, "rb")  # noqa: SIM115
        self.read, self.fileno = self.file.read, self.file.fileno
        self.closed = threading.Event()

    def close(self) -> None:
        self.file.close()
        os.close(self.writing)
        self.closed.set()


class LatePipe(ConnectedPipe):
    """A pipe whose writer writes more as soon as everything in it has been read."""

    def __init__(self) -> None:
        super().__init__()
        threading.Thread(target=self._write_more, daemon=True).start()

    def _write_more(self) -> None:
        waiting = array.array("i", [1])
        with contextlib.suppress(OSError):  # it is closed
            while waiting[0] and not self.closed.is_set():
                fcntl.ioctl(self.file.fileno(), termios.FIONREAD, waiting)
            os.write(self.writing, b"more")


async def test_a_pipe_that_gets_more_than_its_size_a_moment_later_is_not_complete() -> None:
    longer = await call(stored_sized(LatePipe, 1000), "/x", raise_errors=False)
    assert longer.status == 503  # the first bytes are the last ones, and they are held back


@pytest.mark.parametrize(
    "make, size", [(Connected, len(CONTENT)), (ConnectedPipe, 1000)], ids=["waiting", "with a descriptor"]
)
async def test_a_source_that_goes_on_waiting_is_complete_and_closed(make: Callable[[], Any], size: int) -> None:
    file = make()
    whole = await call(stored_sized(lambda: file, size), "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT[:size]) == (200, True, True)
    assert await asyncio.to_thread(file.closed.wait, 30)


async def test_a_generator_that_goes_on_waiting_is_complete_and_closed_when_it_has_ended() -> None:
    go_on, closed = threading.Event(), threading.Event()

    def generate() -> Iterator[bytes]:
        try:
            yield CONTENT
            go_on.wait(30)
            yield b"more"
        finally:
            closed.set()

    whole = await call(sized(generate, len(CONTENT)), "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)
    assert not closed.is_set()
    go_on.set()
    assert await asyncio.to_thread(closed.wait, 30)


async def test_an_asynchronous_generator_that_goes_on_waiting_is_complete() -> None:
    ends: list[str] = []

    async def generate() -> AsyncIterator[bytes]:
        try:
            yield CONTENT
            await asyncio.Event().wait()
        finally:
            ends.append("closed")

    whole = await call(sized(generate, len(CONTENT)), "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT, ends) == (200, True, True, ["closed"])


# --- closing


class ClosesBadly(SeekReturnsNone):
    def close(self) -> None:
        raise OSError("the disk is\nfull")


class ClosesBadlyAsync:
    """A file object with an asynchronous `read`."""

    def __init__(self) -> None:
        self.file = io.BytesIO(CONTENT)

    async def read(self, size: int) -> bytes:
        return self.file.read(size)

    async def close(self) -> None:
        raise OSError("the disk is\nfull")


class IteratesAndClosesBadly:
    def __init__(self) -> None:
        self.items = iter([CONTENT])

    def __iter__(self) -> "IteratesAndClosesBadly":
        return self

    def __next__(self) -> bytes:
        return next(self.items)

    def close(self) -> None:
        raise OSError("the disk is\nfull")


@pytest.mark.parametrize(
    "app",
    [virtual(ClosesBadly), stored(ClosesBadly), virtual(ClosesBadlyAsync), virtual(IteratesAndClosesBadly)],
    ids=["virtual", "stored", "asynchronous", "iterator"],
)
async def test_an_answer_is_complete_whatever_closing_raises(app: Download, caplog: pytest.LogCaptureFixture) -> None:
    whole = await call(app, "/x")
    assert (whole.status, whole.complete, whole.body == CONTENT) == (200, True, True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("failed: OSError: the disk is\\nfull")


# --- responses of real HTTP clients


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        content = b"" if self.path == "/empty" else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def _http_client(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    return connection.getresponse()


CLIENTS: dict[str, Callable[[int, str], Any]] = {
    "http.client": _http_client,
    "urllib3": lambda port, path: urllib3.PoolManager().request(
        "GET", f"http://127.0.0.1:{port}{path}", preload_content=False
    ),
    "requests": lambda port, path: requests.get(f"http://127.0.0.1:{port}{path}", stream=True, timeout=30).raw,
}


@each_source
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("path, content", [("/file", CONTENT), ("/empty", b"")])
async def test_the_response_of_an_http_client_is_a_stream(
    port: int, client: str, path: str, content: bytes, source: Callable[..., Download]
) -> None:
    app = source(lambda: CLIENTS[client](port, path))
    whole = await call(app, "/x", headers={"Range": "bytes=5-9"})
    assert (whole.status, whole.complete, whole.body == content) == (200, True, True)
    assert "accept-ranges" not in whole.headers
    assert (await call(app, "/x", method="HEAD")).status == 200


# --- places


class _Files:
    """A storage that has stored what it opens."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, mode: str) -> Any:
        return (self.root / name).open(mode)

    def path(self, name: str) -> str:
        return str(self.root / name)

    def url(self, name: str) -> str:
        return f"https://files.test/{name}"


class _Moved(_Files):
    def path(self, name: str) -> str:
        raise NotImplementedError

    def url(self, name: str) -> str:
        return f"https://moved.test/{name}"


class _Signs:
    def url(self, name: str) -> str:
        return f"{super().url(name)}?signed"  # type: ignore[misc]


class _Decrypts(_Files):
    def open(self, name: str, mode: str) -> Any:
        return io.BytesIO(super().open(name, mode).read().swapcase())


class _DecryptsByAHook(_Files):
    def _open(self, name: str, mode: str) -> Any:
        return io.BytesIO()


class _SignsWhatIsDecrypted(_Signs, _Decrypts):
    pass


class _SignsWhatIsStored(_Signs, _Moved):
    pass


class _Vouched(_Decrypts):
    is_sent_as_stored = True


class _NotVouched(_Files):
    is_sent_as_stored = False


class _Delegates:
    def __init__(self, files: Any) -> None:
        self.files = files

    def open(self, name: str, mode: str) -> Any:
        return self.files.open(name, mode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)


@pytest.mark.parametrize(
    "make, location",
    [
        (_Files, "/root/a.txt"),
        (_Moved, "https://moved.test/a.txt"),
        (_SignsWhatIsStored, "https://moved.test/a.txt?signed"),
        (_Vouched, "/root/a.txt"),
        (_Decrypts, None),
        (_DecryptsByAHook, None),
        (_SignsWhatIsDecrypted, None),
        (_NotVouched, None),
        (lambda root: _Delegates(_Files(root)), None),
    ],
)
async def test_a_place_is_of_the_bytes_that_are_sent(make: Callable[[Path], Any], location: str | None) -> None:
    assert await SyncStorage(make(Path("/root"))).locate("a.txt") == location
