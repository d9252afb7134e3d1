"""Blocking file objects and iterators as open files: every call to them runs in a worker thread.

A file object that can seek is sent from its beginning, wherever it was, because ranges count from there. One that
cannot seek is sent from where it is, without ranges.
"""

import io
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from threading import Lock, Thread
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from downloadview_async.errors import FileMissing, SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import MAX_READS, ByteRange, FileMetadata
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.workers import Workers, unlimited

_BATCH_SECONDS = 0.05  # after this time, the items that a slow iterator has yielded are sent
_DONE = object()
_WRAPPERS = ("tempfile", "django.")
_MAX_WRAPPERS = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Extent:
    """What is known about the content of an object with `read`.

    size: bytes, or None if it is not known before the end. can_seek: whether its parts can be read in any order.
    head: bytes that were read to find this out, and have to be sent first. is_text: whether it yields text, which is
    sent as UTF-8, so that neither its characters nor its stored bytes tell how many bytes are sent.
    """

    size: int | None = None
    can_seek: bool = False
    head: bytes = b""
    is_text: bool = False

    @property
    def has_parts(self) -> bool:
        """Whether ranges can be sent."""
        return self.can_seek and self.size is not None


def extent_of(file: Any, known: int | None = None) -> Extent:
    """Return the extent of a file object, which then is at its beginning if it can seek, else where it was. It blocks.

    known: its size in bytes from elsewhere. The end of the file object itself takes precedence, except for text.

    Raises `FileMissing` for a closed object, and `SourceUnavailable` for one that seeks to its end and not back.
    """
    try:
        if (extent := _seekable_extent(file, known)) is not None:
            return extent
    except Exception as exc:
        raise SourceUnavailable(f"seeking in a file object failed: {type(exc).__name__}: {exc}") from exc
    try:
        head = file.read(0)  # shows whether it is text; an object that ignores the size returns its first block
    except Exception as exc:
        if getattr(file, "closed", False) is True:
            raise FileMissing(f"the file object is closed: {file!r}") from exc
        return Extent(known)  # the next read raises the error again
    return Extent(known, head=as_bytes(head or b""), is_text=isinstance(head, str))


def _seekable_extent(file: Any, known: int | None) -> Extent | None:
    """Return the extent of a file object that can seek. None: it cannot, and is where it was."""
    if not _goes(file, 0):
        return None
    try:
        end = _seek(file, 0, os.SEEK_END)
    except Exception:  # it cannot seek from the end, or not at all: some streams only allow their current position
        if known is None or not _goes(file, known):
            return None
        end = known
    # Believe the position only if a read confirms that it is the end.
    beyond: Any = b""
    with suppress(Exception):  # a store may refuse to read beyond the end
        beyond = file.read(1)
    if beyond and not end:
        # It has not moved, so it may not be able to go back, and the byte that was read is its first.
        return Extent(known, head=as_bytes(beyond), is_text=isinstance(beyond, str))
    _seek(file, 0)
    if isinstance(beyond, str):
        return Extent(known, is_text=True)  # its positions do not count bytes
    if end == 0 and file.read(1):
        beyond = True  # it reports 0 at every position
        _seek(file, 0)
    if beyond:
        return Extent(can_seek=True)
    return Extent(known if end is None else end, can_seek=True)


def _goes(file: Any, position: int) -> bool:
    """Return whether a file object claims to be able to seek, and goes to a position."""
    try:
        if not hasattr(file, "seek") or (hasattr(file, "seekable") and not file.seekable()):
            return False
        return _seek(file, position) in (position, None)
    except Exception:  # a stream of HTTP, a pipe, a closed file
        return False


def _seek(file: Any, offset: int, whence: int = os.SEEK_SET) -> int | None:
    """Go to a position and return it, by `tell` if `seek` returns none; None if neither tells."""
    position = file.seek(offset, whence) if whence else file.seek(offset)
    if position is None and callable(tell := getattr(file, "tell", None)):
        position = tell()
    return position if isinstance(position, int) and position >= 0 else None


class OpenFileObject:
    """An object with `read`, and its extent. The caller that opened it closes it. in_use: see `closing_in_thread`."""

    def __init__(self, file: Any, metadata: FileMetadata, extent: Extent, *, workers: Workers, in_use: Lock) -> None:
        self._in_use = in_use
        self.metadata = metadata if seeks_cheaply(file) else replace(metadata, max_reads=MAX_READS)
        self._file = file
        self._workers = workers
        self._can_seek = extent.can_seek
        self._head = extent.head

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, or all bytes for None, at most `CHUNK_SIZE` at a time."""
        if span is None and self.metadata.size is not None:
            span = ByteRange(0, self.metadata.size)
        left = None if span is None else len(span)
        if span is not None and span.start and not self._can_seek:
            raise TransferAborted("the file object cannot seek to the requested part")
        if self._can_seek:
            await self._in_worker(self._go_to, 0 if span is None else span.start)
        chunk, self._head = self._head, b""
        while left is None or left > 0:
            if not chunk and not (chunk := await self._in_worker(self._read, min(CHUNK_SIZE, left or CHUNK_SIZE))):
                return
            for piece in pieces(chunk if left is None else chunk[:left]):  # `read` may return more than requested
                yield piece
            left = None if left is None else left - len(chunk)
            chunk = b""

    def _go_to(self, start: int) -> None:
        with self._in_use:
            position = _seek(self._file, start)
        if position not in (start, None):
            raise OSError(f"it does not seek to byte {start}")

    def _read(self, size: int) -> bytes:
        with self._in_use:
            chunk = self._file.read(size)
        if chunk is None:
            raise OSError("it is in non-blocking mode and has no data yet")
        return as_bytes(chunk)

    async def _in_worker(self, method: Callable[[int], T], argument: int) -> T:
        try:
            return await self._workers.run(method, argument)
        except Exception as exc:
            raise TransferAborted(f"reading a file object failed: {exc}") from exc


class OpenIterator:
    """A blocking iterator of bytes or text. Small items are gathered, so that each does not cost a thread hop.

    in_use: see `closing_in_thread`.
    """

    def __init__(self, items: Iterator[Any], metadata: FileMetadata, *, workers: Workers, in_use: Lock) -> None:
        self._in_use = in_use
        self.metadata = metadata
        self._items = items
        self._workers = workers
        self._first = True

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the items from the beginning: there are no ranges."""
        more = True
        while more:
            chunk, more = await self._workers.run(self._gather)
            for piece in pieces(chunk):
                yield piece

    def _gather(self) -> tuple[bytes, bool]:
        with self._in_use:
            return self._gathered()

    def _gathered(self) -> tuple[bytes, bool]:
        gathered: list[bytes] = []
        size = 0
        if self._first:  # it is sent at once, so that the client gets the head of the answer
            self._first = False
            item = next(self._items, _DONE)
            return (b"", False) if item is _DONE else (as_bytes(item), True)
        deadline = time.monotonic() + _BATCH_SECONDS
        while size < CHUNK_SIZE // 4 and time.monotonic() < deadline:
            item = next(self._items, _DONE)
            if item is _DONE:
                return b"".join(gathered), False
            gathered.append(as_bytes(item))
            size += len(gathered[-1])
        return b"".join(gathered), True


def seeks_cheaply(file: Any) -> bool:
    """Return whether a file object, or the one in wrappers such as Django's, is known to be local or in memory.

    To seek, others may read everything before the position (gzip), or send a request to another server.
    """
    for _ in range(_MAX_WRAPPERS):
        if isinstance(file, io.BufferedReader | io.BufferedRandom):
            return isinstance(file.raw, io.FileIO)
        if isinstance(file, io.BytesIO | io.FileIO):
            return True
        if not type(file).__module__.startswith(_WRAPPERS):
            return False  # an unknown wrapper may do more than pass calls on
        file = getattr(file, "file", None)
    return False


def as_bytes(item: Any) -> bytes:
    """Return bytes, or text as UTF-8. Raises `TypeError` for anything else."""
    if isinstance(item, bytes):
        return item
    # not bytes(item), which makes zeros of a number
    return item.encode() if isinstance(item, str) else bytes(memoryview(item))


def pieces(chunk: bytes) -> Iterator[bytes]:
    """Yield a chunk in pieces of `CHUNK_SIZE`, the most that a slow client may leave in a buffer."""
    for position in range(0, len(chunk), CHUNK_SIZE):
        yield chunk[position : position + CHUNK_SIZE]


@asynccontextmanager
async def closing_in_thread(resource: Any) -> AsyncIterator[Lock]:
    """Call `resource.close()`, if there is one, in a thread when the context ends, even when cancelled.

    The context gives a lock, which each call to the resource must hold: a task that asyncio cancels does not wait for
    the call that it has begun, so `close` waits for the lock.
    """
    in_use, begun = Lock(), Lock()

    def close_once() -> None:
        if begun.acquire(blocking=False):
            with in_use:
                close(resource)

    try:
        yield in_use
    finally:
        if hasattr(resource, "close"):
            with anyio.CancelScope(shield=True):
                try:
                    await anyio.to_thread.run_sync(close_once, limiter=unlimited())
                except anyio.get_cancelled_exc_class():
                    # Cancelled by asyncio, which ignores the shield. A worker that has not begun never will.
                    Thread(target=close_once).start()
                    raise


def close(resource: Any) -> None:
    """Call `resource.close()`, if it has one."""
    if (method := getattr(resource, "close", None)) is not None:
        method()
