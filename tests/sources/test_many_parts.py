"""Many parts of files whose reads are dear: file objects that seek by reading, and those of storages."""

import gzip
import io
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest

from downloadview_async import Download, StorageSource, SyncStorage, VirtualFile, VirtualSource
from downloadview_async.http.ranges import NEAR
from downloadview_async.sources.file_objects import seeks_cheaply
from downloadview_async.testing import call

CONTENT = bytes(n % 251 for n in range(251)) * 80_000  # 20 MB


class Emulating(io.RawIOBase):
    """A file object that seeks by reading all that comes before, from the beginning: it counts what it reads."""

    def __init__(self) -> None:
        self.position = 0
        self.bytes_read = 0
        self.seeks = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            self.position = len(CONTENT) + offset
            return self.position
        if offset:
            self.seeks += 1
            self.bytes_read += offset if offset < self.position else offset - self.position
        self.position = offset
        return offset

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        block = CONTENT[self.position :][: size if size >= 0 else None]
        self.position += len(block)
        self.bytes_read += len(block)
        return block


class OfOne:
    """A blocking storage of one file object."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def open(self, name: str, mode: str = "rb") -> Any:
        return self.file


def spec(*starts: int) -> dict[str, str]:
    return {"Range": "bytes=" + ",".join(f"{start}-{start + 1}" for start in starts)}


FAR = [n * 1_000_000 for n in range(20)]


@pytest.mark.asyncio
@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize(
    "starts, status",
    [
        (FAR, 200),
        (FAR[::-1], 200),
        ([9_000_000, 6_000_000, 3_000_000, 0], 206),
        ([n * 1000 for n in range(50)], 206),
        ([0, NEAR, 2 * NEAR], 206),
    ],
    ids=["far", "backwards", "four", "near", "next"],
)
async def test_parts_of_an_object_that_may_seek_by_reading(is_stored: bool, starts: list[int], status: int) -> None:
    file = Emulating()
    source: Any = VirtualSource(lambda name: VirtualFile(lambda: file, name=name))
    if is_stored:
        source = StorageSource(SyncStorage(OfOne(file)))
    answer = await call(Download(source), "/a.bin", headers=spec(*starts))
    assert (answer.status, answer.complete) == (status, True)
    assert file.bytes_read < 2 * len(CONTENT)
    if status == 200:
        assert answer.body == CONTENT
    for start in starts if status == 206 else []:
        assert f"bytes {start}-{start + 1}/{len(CONTENT)}\r\n\r\n".encode() + CONTENT[start : start + 2] in answer.body


@pytest.mark.asyncio
async def test_parts_of_a_local_file_object_are_as_many_as_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    endpoint = Download(VirtualSource(lambda name: VirtualFile(lambda: path.open("rb"), name=name)))
    assert (await call(endpoint, "/a.bin", headers=spec(*FAR))).status == 206


class Decrypted(io.BytesIO):
    """A class derived from one that seeks cheaply, which may read all that comes before a position to get there."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return super().seek(offset, whence)


class DecryptedFile(io.FileIO):
    def readinto(self, buffer: Any, /) -> int:
        return super().readinto(buffer) or 0


def test_which_objects_seek_cheaply(tmp_path: Path) -> None:
    from django.core.files.base import ContentFile, File

    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"content"))
    with path.open("rb") as local, gzip.open(path) as packed, io.BufferedReader(DecryptedFile(path)) as derived:
        with tempfile.SpooledTemporaryFile() as spooled, tempfile.NamedTemporaryFile() as temporary:
            cheap = [local, io.BytesIO(b""), temporary, spooled, File(local), ContentFile(b""), local.raw]
            assert [seeks_cheaply(file) for file in cheap[:3]] == [True] * 3
            assert [seeks_cheaply(file) for file in cheap[4:]] == [True] * 3
        decrypting = type("Decrypting", (), {"file": local})()
        for dear in (
            decrypting,
            packed,
            Emulating(),
            io.BufferedReader(Emulating()),
            File(cast("Any", packed)),
            object(),
            io.StringIO(""),
            Decrypted(b""),
            derived,
        ):
            assert not seeks_cheaply(dear)
