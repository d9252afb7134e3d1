"""The files that `downloadview check` requests from a directory, and the pieces of them that it compares."""

import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from downloadview_async import AsyncFile, ByteRange, FileMetadata, TransferAborted
from downloadview_async.check.http import MOST, PIECE

_MOST_ENTRIES = 1000  # how many directory entries the search for a file may read


@dataclass(frozen=True, slots=True)
class Content:
    """Pieces of a file, each with its offset. size: bytes, or None if unknown."""

    size: int | None
    pieces: tuple[tuple[int, bytes], ...]

    def part(self, start: int, stop: int) -> bytes | None:
        """Return the bytes from `start` up to `stop`, or None if they have not been read."""
        for offset, piece in self.pieces:
            if offset <= start and stop <= offset + len(piece):
                return piece[start - offset : stop - offset]
        return None

    def begins(self, body: bytes) -> bool:
        """Return whether this body, of up to `MOST` bytes, can be that of an answer with the whole file."""
        known = self.pieces[0][1]
        length = min(len(known), len(body))
        whole = self.size is None or len(body) == min(self.size, MOST)
        return whole and known[:length] == body[:length] and (self.size == 0 or length > 0)


async def content_of(file: AsyncFile) -> tuple[FileMetadata, Content]:
    """Open a file and read up to `MOST` bytes: all of it, or pieces from the start, the middle and the end.

    Raises `FileError` and `TransferAborted`.
    """
    async with file.open() as opened:
        size = opened.metadata.size
        if size is None or not opened.metadata.accept_ranges:  # it can be read from the start only
            read = await _read(opened.stream(None))
            if size is None and len(read) < MOST:
                size = len(read)
            return opened.metadata, Content(size, ((0, read[:MOST]),))
        if size <= MOST:
            spans = [ByteRange(0, size)]
        else:
            spans = [ByteRange(start, start + PIECE) for start in (0, size // 2, size - PIECE)]
        pieces = [(span.start, await _read(opened.stream(span)) if len(span) else b"") for span in spans]
        for span, (_, read) in zip(spans, pieces, strict=True):
            if len(read) != len(span):
                raise TransferAborted(f"only {len(read)} of the bytes from {span.start} to {span.stop} could be read")
        return opened.metadata, Content(size, tuple(pieces))


async def _read(blocks: AsyncIterator[bytes]) -> bytes:
    read = bytearray()
    try:
        async for block in blocks:
            read += block
            if len(read) >= MOST:
                break
    finally:
        close = getattr(blocks, "aclose", None)
        if close is not None:
            await close()
    return bytes(read)


def names_in(directory: Path, deep: bool) -> list[str]:
    """Return the names of regular files that are not empty; deep: search subdirectories too. The search is bounded."""
    names: list[str] = []
    waiting, left = [""], _MOST_ENTRIES
    while waiting and left > 0:
        below = waiting.pop(0)
        try:
            with os.scandir(directory / below) as entries:
                batch = sorted(islice(entries, left), key=lambda entry: entry.name)
        except OSError:
            continue
        left -= max(len(batch), 1)
        for entry in batch:
            if not entry.name.isprintable() or entry.name.startswith(".") or {"\\", ":"} & {*entry.name}:
                continue  # sources refuse the name, or clients rarely request it
            if entry.is_file(follow_symlinks=False) and entry.stat().st_size:
                names.append(below + entry.name)
            elif deep and entry.is_dir(follow_symlinks=False):
                waiting.append(f"{below}{entry.name}/")
    return names


def closed_to_others(path: str) -> tuple[str, str] | None:
    """Return the first part of a local path that is not open to all users, and the mode for chmod; None if all are."""
    parts = [*reversed(Path(path).parents), Path(path)]
    for part in parts:
        try:
            mode = part.stat().st_mode
        except OSError:
            return None
        if stat.S_ISDIR(mode) and not mode & stat.S_IXOTH:
            return str(part), "o+x"
        if stat.S_ISREG(mode) and not mode & stat.S_IROTH:
            return str(part), "o+r"
    return None
