"""Blocking file objects and iterators as open files: every call to them is made in a worker thread."""

import io
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread

from downloadview_async.errors import TransferAborted
from downloadview_async.http.metadata import MAX_READS, ByteRange, FileMetadata
from downloadview_async.sources.local import CHUNK_SIZE
from downloadview_async.sources.workers import UNLIMITED, Workers

_BATCH_SECONDS = 0.05  # what a slow iterator has yielded by then is sent on
_DONE = object()
_WRAPPERS = ("tempfile", "django.")
_MAX_WRAPPERS = 4


class OpenFileObject:
    """An object with `read`, and `seek` if parts of it are to be sent. Whoever opened it closes it."""

    def __init__(self, file: Any, metadata: FileMetadata, *, workers: Workers) -> None:
        self.metadata = metadata if seeks_cheaply(file) else replace(metadata, max_reads=MAX_READS)
        self._file = file
        self._workers = workers

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, or without one all there is, `CHUNK_SIZE` at a time."""
        if span is None and self.metadata.size is not None:
            span = ByteRange(0, self.metadata.size)  # asking for the size has moved the position
        if span is not None and (span.start or hasattr(self._file, "seek")):
            await self._in_worker(self._file.seek, span.start)
        left = CHUNK_SIZE if span is None else len(span)
        while left:
            chunk = as_bytes(await self._in_worker(self._file.read, min(CHUNK_SIZE, left)))
            if not chunk:
                return
            yield chunk
            if span is not None:
                left -= len(chunk)

    async def _in_worker(self, method: Any, argument: int) -> Any:
        try:
            return await self._workers.run(method, argument)
        except Exception as exc:
            raise TransferAborted(f"reading a file object failed: {exc}") from exc


class OpenIterator:
    """A blocking iterator of bytes or text. Items are gathered, so that small ones do not cost a thread hop each."""

    def __init__(self, items: Iterator[Any], metadata: FileMetadata, *, workers: Workers) -> None:
        self.metadata = metadata
        self._items = items
        self._workers = workers
        self._first = True

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield what the iterator yields, from its beginning: it has no parts."""
        more = True
        while more:
            chunk, more = await self._workers.run(self._gather)
            for piece in pieces(chunk):
                yield piece

    def _gather(self) -> tuple[bytes, bool]:
        gathered: list[bytes] = []
        size = 0
        if self._first:  # goes out at once, and says that there is an answer
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
    """Return whether a file object is known to be local or in memory, as it is or in wrappers such as Django's.

    Others may read all that comes before a position to get there (gzip), or ask another server for what follows it.
    """
    for _ in range(_MAX_WRAPPERS):
        if isinstance(file, io.BufferedReader | io.BufferedRandom):
            return isinstance(file.raw, io.FileIO)
        if isinstance(file, io.BytesIO | io.FileIO):
            return True
        if not type(file).__module__.startswith(_WRAPPERS):
            return False  # whatever it wraps, it may do more than that
        file = getattr(file, "file", None)
    return False


def as_bytes(item: Any) -> bytes:
    """Return bytes, or text as UTF-8. Raises `TypeError` for anything else."""
    if isinstance(item, bytes):
        return item
    # not bytes(item): of a number, that is as many zeros
    return item.encode() if isinstance(item, str) else bytes(memoryview(item))


def pieces(chunk: bytes) -> Iterator[bytes]:
    """Yield a chunk in pieces of `CHUNK_SIZE`: what a slow client leaves in a buffer is never more than that."""
    for position in range(0, len(chunk), CHUNK_SIZE):
        yield chunk[position : position + CHUNK_SIZE]


@asynccontextmanager
async def closing_in_thread(resource: Any) -> AsyncIterator[None]:
    """Call `resource.close()`, if it has one, in a thread when the context ends: always, and to its end."""
    try:
        yield
    finally:
        if (close := getattr(resource, "close", None)) is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(close, limiter=UNLIMITED)
