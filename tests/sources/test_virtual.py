"""Generated content of every kind: what is known of it, that it is closed, and that nothing of it blocks the loop."""

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiofiles
import aiofiles.tempfile
import anyio
import pytest
from starlette.datastructures import UploadFile

from downloadview_async import (
    AccessDenied,
    ByteRange,
    Download,
    ETag,
    FileMissing,
    LocalFile,
    VirtualFile,
    VirtualSource,
)
from downloadview_async.testing import call

pytestmark = pytest.mark.asyncio
TEN = b"0123456789"
LOOP_THREAD = threading.main_thread()


class Generated:
    """Plain and asynchronous generators that know whether they were closed, and in which thread they ran."""

    def __init__(self) -> None:
        self.closed = 0
        self.started = 0
        self.threads: set[threading.Thread] = set()

    def plain(self) -> Iterator[bytes]:
        self.started += 1
        try:
            for n in range(10):
                self.threads.add(threading.current_thread())
                yield b"%d" % n
        finally:
            self.threads.add(threading.current_thread())
            self.closed += 1

    async def asynchronous(self) -> AsyncIterator[bytes]:
        self.started += 1
        try:
            for n in range(10):
                yield b"%d" % n
        finally:
            await asyncio.sleep(0)
            self.closed += 1

    def text(self) -> Iterator[str]:
        yield from ("0123", "456789")

    def endless(self) -> Iterator[bytes]:
        try:
            while True:
                self.threads.add(threading.current_thread())
                yield b"x" * 100_000
        finally:
            self.closed += 1

    async def endless_asynchronous(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 100_000
        finally:
            self.closed += 1


async def test_every_kind_of_content_gives_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ten"
    path.write_bytes(TEN)
    made = Generated()

    async def opened() -> Any:
        return await aiofiles.open(path, "rb")

    async def text() -> str:
        return TEN.decode()

    sized: list[Any] = [
        TEN,
        bytearray(TEN),
        memoryview(TEN),
        TEN.decode(),
        lambda: TEN,
        text,
        io.BytesIO(TEN),
        lambda: path.open("rb"),
    ]
    unsized: list[Any] = [
        made.plain,
        made.asynchronous,
        made.text,
        opened,
        iter([TEN]),
        [TEN[:5], TEN[5:]],
        io.StringIO(TEN.decode()),
    ]
    for contents, known in ((sized, True), (unsized, False)):
        for content in contents:
            answer = await call(_app(VirtualFile(content, name="x.txt")), "/x", headers={"Range": "bytes=2-4"})
            assert answer.complete
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            if known:
                assert (answer.status, answer.body, answer.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
            else:
                assert (answer.status, answer.body) == (200, TEN)
                assert not {"content-length", "accept-ranges", "content-range"} & set(answer.headers)


def _app(file: Any) -> Download:
    async def make(name: str) -> Any:
        return file

    return Download(VirtualSource(make))


async def test_a_known_size_of_generated_content_is_promised_and_kept() -> None:
    made = Generated()
    answer = await call(_app(VirtualFile(made.plain, name="x", size=10)), "/x", headers={"Range": "bytes=0-1"})
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, TEN, "10")
    assert "accept-ranges" not in answer.headers
    longer = await call(_app(VirtualFile(made.plain, name="x", size=4)), "/x", raise_errors=False)
    assert (TEN[:4].startswith(longer.body), longer.complete) == (True, False)
    shorter = await call(_app(VirtualFile(made.plain, name="x", size=11)), "/x", raise_errors=False)
    assert not shorter.complete
    assert made.closed == made.started == 3


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
async def test_a_generator_runs_once_for_each_download_and_not_for_a_head(kind: str) -> None:
    made = Generated()
    app = _app(VirtualFile(getattr(made, kind), name="x"))
    assert (await call(app, "/x", method="HEAD")).body == b""
    assert made.started == 0
    for turn in (1, 2):
        assert (await call(app, "/x")).body == TEN
        assert (made.started, made.closed) == (turn, turn)


@pytest.mark.parametrize("kind", ["endless", "endless_asynchronous"])
async def test_a_generator_is_closed_when_the_client_leaves_or_the_server_cancels(kind: str) -> None:
    made = Generated()
    app = _app(VirtualFile(getattr(made, kind), name="x"))
    assert not (await call(app, "/x", leave_after_bytes=1_000_000)).complete
    assert made.closed == 1
    assert (await call(app, "/x", cancel_after_bytes=1_000_000)).cancelled
    assert made.closed == 2


async def test_plain_code_never_runs_in_the_event_loops_thread() -> None:
    made = Generated()

    def make(name: str) -> VirtualFile:
        made.threads.add(threading.current_thread())
        return VirtualFile(lambda: made.plain(), name=name)

    assert (await call(Download(VirtualSource(make)), "/x")).body == TEN
    assert made.threads
    assert LOOP_THREAD not in made.threads


async def test_a_slow_generator_is_sent_on_as_it_yields() -> None:
    go_on = threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"first"
        threading.Event().wait(0.1)  # longer than a batch
        yield b"second"
        assert go_on.wait(30)
        yield b"third"

    got: list[bytes] = []
    async with VirtualFile(slow, name="x").open() as opened:
        async for chunk in opened.stream(None):
            got.append(chunk)
            if b"second" in b"".join(got):
                go_on.set()
    assert b"".join(got) == b"firstsecondthird"
    assert len(got) >= 2


async def test_what_make_may_return() -> None:
    local = LocalFile("/etc/hostname")

    async def make(name: str) -> Any:
        return {"file": local, "bytes": b"x", "text": "é"}.get(name)

    source = VirtualSource(make)
    assert await source.resolve("file") is local
    assert (await call(Download(source), "/text")).body == "é".encode()
    assert (await call(Download(source), "/none")).status == 404
    with pytest.raises(FileMissing):
        await source.resolve("none")
    with pytest.raises(TypeError, match="content must be bytes"):
        await call(_app(VirtualFile(5, name="x")), "/x")  # type: ignore[arg-type]
    with pytest.raises(FileMissing):
        async with VirtualFile(lambda: None, name="x").open():
            pass


@pytest.mark.parametrize("raises", [False, True])
async def test_a_name_with_a_leading_slash_is_tried_without_it_where_nothing_is_made(raises: bool) -> None:
    asked = []

    def make(name: str) -> bytes | None:
        asked.append(name)
        if name == "a":
            return b"a"
        if raises:
            raise FileMissing(f"no {name}")
        return None

    source = VirtualSource(make)
    assert (await call(Download(source), "/a")).body == b"a"
    asked.clear()
    assert (await source.resolve("/a")).name == "a"
    with pytest.raises(FileMissing, match="no b" if raises else "nothing is made"):
        await source.resolve("/b")
    with pytest.raises(FileMissing, match="no c" if raises else "nothing is made"):
        await source.resolve("c")
    assert asked == ["/a", "a", "/b", "b", "c"]


async def test_what_else_make_raises_is_not_tried_again() -> None:
    asked = []

    async def make(name: str) -> bytes:
        asked.append(name)
        raise AccessDenied("not for you")

    with pytest.raises(AccessDenied):
        await VirtualSource(make).resolve("/a")
    assert asked == ["/a"]


async def test_validators_of_generated_content() -> None:
    made = VirtualFile(Generated().plain, name="x", etag=ETag("v1"), last_modified=1_700_000_000)
    assert (await call(_app(made), "/x", headers={"If-None-Match": '"v1"'})).status == 304
    one, two = [(await call(_app(VirtualFile(c, name="x")), "/x")).headers["etag"] for c in (b"one", b"two")]
    assert one != two


class Reader:
    """A file object that can read, and nothing else."""

    def __init__(self) -> None:
        self.closed = False
        self.left = [TEN[:4], TEN[4:], b""]

    def read(self, size: int) -> bytes:
        return self.left.pop(0)

    def close(self) -> None:
        self.closed = True


class AsyncReader(Reader):
    """What Starlette's UploadFile looks like."""

    async def read(self, size: int) -> bytes:  # type: ignore[override]
        return super().read(size)

    async def close(self) -> None:  # type: ignore[override]
        super().close()


@pytest.mark.parametrize("kind", [Reader, AsyncReader])
async def test_a_file_object_that_can_only_read(kind: type[Reader]) -> None:
    made: Any = kind()
    answer = await call(_app(VirtualFile(made, name="x")), "/x")
    assert (answer.body, answer.complete, made.closed) == (TEN, True, True)


async def _uploaded(path: Path) -> Any:
    upload = UploadFile(path.open("rb"), filename="x")
    await upload.read()  # the application has looked at it
    return upload


async def _aiofile(path: Path) -> Any:
    file = await aiofiles.open(path, "rb")
    await file.read(4)
    return file


async def _aio_temporary(path: Path) -> Any:
    file = await aiofiles.tempfile.TemporaryFile("w+b")
    await file.write(path.read_bytes())
    return file


async def _anyio_file(path: Path) -> Any:
    file = await anyio.open_file(path, "rb")
    await file.read()
    return file


async def _anyio_text(path: Path) -> Any:
    file = await anyio.open_file(path)
    await file.read()
    return file


async def _anyio_spooled(path: Path) -> Any:
    file = await anyio.SpooledTemporaryFile().__aenter__()
    await file.write(path.read_bytes())
    return file


@pytest.mark.parametrize("make", [_uploaded, _aiofile, _aio_temporary, _anyio_file, _anyio_text, _anyio_spooled])
@pytest.mark.parametrize("size", [None, len(TEN)])
async def test_an_asynchronous_file_object_that_can_seek_is_sent_from_its_beginning(
    make: Callable[[Path], Any], size: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "ten"
    path.write_bytes(TEN)
    answer = await call(_app(VirtualFile(lambda: make(path), name="x", size=size)), "/x")
    assert (answer.status, answer.complete, answer.body) == (200, True, TEN)


async def test_an_asynchronous_file_object_that_cannot_seek_is_sent_from_where_it_is() -> None:
    ends = os.pipe()
    os.write(ends[1], b"lost" + TEN)
    os.close(ends[1])
    with open(ends[0], "rb", buffering=0) as pipe:
        pipe.read(4)
        answer = await call(_app(VirtualFile(anyio.wrap_file(pipe), name="x")), "/x")
    assert (answer.complete, answer.body) == (True, TEN)


async def test_an_asynchronous_file_object_that_has_nothing_now_is_not_at_its_end() -> None:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    os.write(ends[1], TEN)
    with open(ends[0], "rb", buffering=0) as pipe:
        answer = await call(_app(VirtualFile(anyio.wrap_file(pipe), name="x")), "/x", raise_errors=False)
    assert not answer.complete
    os.close(ends[1])


async def test_an_asynchronous_file_object_that_has_its_size_and_nothing_more_now_is_complete() -> None:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    os.write(ends[1], TEN)
    with open(ends[0], "rb", buffering=0) as pipe:
        answer = await call(_app(VirtualFile(anyio.wrap_file(pipe), name="x", size=len(TEN))), "/x")
    assert (answer.complete, answer.body) == (True, TEN)
    os.close(ends[1])


async def test_items_that_are_no_bytes_are_an_error_and_not_zeros() -> None:
    with pytest.raises(TypeError):
        await call(_app(VirtualFile(lambda: [1, 2, 3], name="x")), "/x")


async def test_large_content_is_not_hashed_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def hashed(content: Any) -> ETag:
        threads.append(threading.current_thread())
        return ETag("x")

    monkeypatch.setattr("downloadview_async.sources.virtual.content_etag", hashed)
    for size in (10, 2 << 20):
        assert (await call(_app(VirtualFile(b"x" * size, name="x")), "/x")).headers["etag"] == '"x"'
    assert threads[0] is LOOP_THREAD
    assert threads[1] is not LOOP_THREAD


async def test_a_content_type_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="content type"):
        VirtualFile(b"", name="x", content_type="text/html\r\nX: 1")


async def test_file_objects_are_closed() -> None:
    file = io.BytesIO(TEN)
    async with VirtualFile(file, name="x").open() as opened:
        assert [chunk async for chunk in opened.stream(ByteRange(3, 5))] == [b"34"]
    assert file.closed
