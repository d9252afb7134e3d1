"""`Arriving`: writes a file to disk as its bytes arrive, and feeds them to any number of readers meanwhile.

When nothing more can be written, the bytes go to the readers through a window in memory. A reader that holds up others
there is detached, and gets the rest from a separate read of the source.
"""

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from copy import copy
from dataclasses import replace

import anyio
import anyio.abc

from downloadview_async.errors import DownloadError, FileError, SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import MAX_READS, ByteRange, FileMetadata
from downloadview_async.http.upstream import Received
from downloadview_async.sources.local.open_file import CHUNK_SIZE, OpenLocalFile

MAX_WAITING = 1 << 18
"""The most bytes that wait to be written, and the most in the window; one chunk may exceed it.

For blocks of 1 MiB the kernel gives the process new pages each time, which costs five times as much as the writing.
"""

LAGGARD_SECONDS = 1.0
"""Seconds, in total, that a reader may hold up others before it is detached."""

Again = Callable[[ByteRange], AsyncGenerator[bytes, None]]
"""Reads a span of the same version from the source itself. Raises `TransferAborted` if that fails."""


class Arriving:
    """One file, from its first byte to its last. It belongs to one event loop.

    The fill calls `describe` once, then `take` for each chunk in the context of `writing`, then `finish` or `fail`, and
    `aclose` at the end.
    """

    def __init__(self) -> None:
        self.metadata: FileMetadata | None = None
        self.arrived = 0
        """Bytes that readers can get."""
        self.is_complete = False
        self.failure: BaseException | None = None
        self.is_on_disk = True
        """Whether all bytes that have arrived are on the disk. Once False, it stays False."""
        self.received: Received | None = None
        """When the source has described the file: see `Dated`."""
        self.ends_with_connection = False
        """See `Unframed`."""
        self.readers: set[ArrivingFile] = set()
        self._file: OpenLocalFile | None = None
        self._write: Callable[[memoryview], Awaitable[int]] | None = None
        self._reserve: Callable[[int], Awaitable[bool]] | None = None
        self._complain: Callable[[BaseException], None] = lambda exc: None
        self._written = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._tasks: anyio.abc.TaskGroup
        self._is_writing = False
        self._window: deque[tuple[int, bytes]] = deque()
        self._progress = anyio.Event()

    def describe(
        self,
        metadata: FileMetadata,
        *,
        file: OpenLocalFile | None = None,
        write: Callable[[memoryview], Awaitable[int]] | None = None,
        reserve: Callable[[int], Awaitable[bool]] | None = None,
        complain: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Set the metadata, and begin. Without `file` and `write`, nothing is written to disk.

        file: the file on disk, to read from; `aclose` closes it. write: appends bytes to it, and returns how many.
        reserve: returns whether the file may grow to a length. complain: is called with an error of the disk.
        """
        self.metadata = metadata
        self._file, self._write, self._reserve = file, write, reserve
        self._complain = complain or self._complain
        self.is_on_disk = write is not None
        self.notify()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Write what `take` gets. The context ends when readers can get all of it, or at once after an error."""
        failure: Exception | None = None
        async with anyio.create_task_group() as self._tasks:
            try:
                yield
            except Exception as exc:  # raised below, so that it is not wrapped in an ExceptionGroup
                failure = exc
                self._tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def take(self, chunk: bytes) -> None:
        """Take the next bytes, and wait while too many bytes wait to be written."""
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        if not self._is_writing:
            self._is_writing = True
            self._tasks.start_soon(self._write_out)
        while self._waiting_bytes >= MAX_WAITING:
            await self.wait()

    def finish(self) -> None:
        """Mark the file as complete."""
        self.is_complete = True
        if self.metadata is not None and self.metadata.size is None and self.is_on_disk:
            self.metadata = _sized(self.metadata, self.arrived)
        self.notify()

    def fail(self, exc: BaseException) -> None:
        """End without the rest of the file: readers that need it raise this error."""
        if not self.is_complete and self.failure is None:
            self.failure = exc
            self.notify()

    async def aclose(self) -> None:
        """Close the file. Readers that have it open keep it open."""
        file, self._file = self._file, None
        if file is not None:
            await file.aclose()

    def open(self, *, again: Again | None = None, max_reads: int = MAX_READS) -> "ArrivingFile":
        """Return the file for one more reader, which closes it. Call it only after `describe`.

        again: reads bytes from the source that are no longer kept here. max_reads: how often it may be called.
        """
        assert self.metadata is not None
        file = None if self._file is None else self._file.shared()
        return ArrivingFile(self, self.metadata, file, again, max_reads)

    @property
    def has_all(self) -> bool:
        """Whether nothing more is to come."""
        return self.is_complete or (self.metadata is not None and self.arrived == self.metadata.size)

    @property
    def is_given_up(self) -> bool:
        """Whether there are readers, and all of them are detached."""
        return bool(self.readers) and all(reader.is_detached for reader in self.readers)

    async def wait(self) -> None:
        """Wait for the next change of state."""
        await self._progress.wait()

    def notify(self) -> None:
        """Wake everything that waits for a change."""
        event, self._progress = self._progress, anyio.Event()
        event.set()

    def failure_again(self) -> BaseException:
        """Return the failure, as a copy where possible, for one more reader to raise."""
        exc = self.failure
        if isinstance(exc, DownloadError):
            again = copy(exc)
            again.__cause__ = exc
            return again
        return exc or SourceUnavailable("the file is not being fetched any more")

    def chunk_at(self, position: int) -> bytes | None:
        """Return bytes of the window from a position on, or None if they have left the window."""
        for start, block in self._window:
            if start <= position < start + len(block):
                return block[position - start : position - start + CHUNK_SIZE]
        return None

    @property
    def written(self) -> int:
        """Bytes that can be read from the file. Those that arrived after them are in the window."""
        return self._written

    def trim(self) -> None:
        """Drop the bytes from the window that every reader has got."""
        needed = min((position for _, position in self._positions()), default=self.arrived)
        dropped = False
        while self._window and self._window[0][0] + len(self._window[0][1]) <= needed:
            self._window.popleft()
            dropped = True
        if dropped:
            self.notify()

    def _positions(self) -> list[tuple["ArrivingFile", int]]:
        """Return the readers that use the window, with the position that each needs next."""
        readers = [reader for reader in self.readers if not reader.is_detached]
        return [(reader, reader.position) for reader in readers if reader.position is not None]

    async def _write_out(self) -> None:
        while self._waiting:
            block = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            if self.is_on_disk:
                block = await self._to_disk(block)
            if block:
                await self._hand_on(block)
            self.notify()
        self._is_writing = False

    async def _to_disk(self, block: bytes) -> bytes:
        """Write a block, and return the bytes that could not be written."""
        assert self._write is not None
        left = memoryview(block)
        try:
            if self._reserve is not None and not await self._reserve(self._written + len(block)):
                self.is_on_disk = False
                return block
            while left:
                with anyio.CancelScope(shield=True):  # a thread writes, and the file must not be closed meanwhile
                    count = await self._write(left)
                left = left[count:]
                self._written += count
            self.arrived = self._written
        except (OSError, ValueError, SourceUnavailable) as exc:
            self._complain(exc)
            self.is_on_disk = False
            self.arrived = self._written
        return bytes(left)

    async def _hand_on(self, block: bytes) -> None:
        self._window.append((self.arrived, block))
        self.arrived += len(block)
        self.notify()
        self.trim()
        while sum(len(block) for _, block in self._window) >= MAX_WAITING:
            await self._wait_for_the_slowest()

    async def _wait_for_the_slowest(self) -> None:
        """Wait for the next change, and detach the readers that have held up others for too long."""
        start, oldest = self._window[0]
        slowest = [reader for reader, position in self._positions() if position < start + len(oldest)]
        if not any(reader.is_waiting for reader in self.readers):
            await self.wait()
            return
        began = time.monotonic()
        with anyio.move_on_after(min(reader.patience for reader in slowest)):
            await self.wait()
        for reader in slowest:
            reader.patience -= time.monotonic() - began
            reader.is_detached = reader.is_detached or reader.patience <= 0
        self.trim()


class ArrivingFile:
    """A file that arrives, open for one reader. It gets the bytes of a span as soon as they have arrived."""

    def __init__(
        self,
        arriving: Arriving,
        metadata: FileMetadata,
        file: OpenLocalFile | None,
        again: Again | None = None,
        max_reads: int = MAX_READS,
    ) -> None:
        self.metadata = metadata
        self.made_at: float | None = None
        """See `Aged`."""
        self.position: int | None = 0
        """The position from which on this reader needs bytes; None if it is not reading."""
        self.is_satisfied = False
        """Whether the reader has got a whole span."""
        self.is_waiting = False
        """Whether this reader waits for bytes that have not arrived."""
        self.patience = LAGGARD_SECONDS
        """Seconds that it may still hold up others."""
        self.is_detached = False
        """Whether the window no longer keeps bytes for this reader."""
        self._arriving = arriving
        self._file = file
        self._again = again
        self._reads_left = max_reads
        arriving.readers.add(self)

    @property
    def received(self) -> Received | None:
        """When the source has described the file: see `Dated`."""
        return self._arriving.received

    @property
    def ends_with_connection(self) -> bool:
        """That of the source: see `Unframed`."""
        return self._arriving.ends_with_connection

    async def aclose(self) -> None:
        """Close the file for this reader."""
        self._arriving.readers.discard(self)
        self._arriving.trim()
        if self._file is not None:
            await self._file.aclose()

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, or of the whole file, and wait for those that have not arrived."""
        arriving = self._arriving
        position, stop = (0, None) if span is None else (span.start, span.stop)
        self.position = position
        try:
            while stop is None or position < stop:
                if position < arriving.written:
                    end = min(position + CHUNK_SIZE, arriving.written)
                    chunk = await self._read(position, end if stop is None else min(end, stop))
                elif position < arriving.arrived:
                    in_window = arriving.chunk_at(position)
                    if in_window is None:
                        break
                    chunk = in_window if stop is None else in_window[: stop - position]
                elif arriving.is_complete:
                    self.is_satisfied = True
                    return
                elif self.is_detached:
                    break
                elif arriving.failure is not None:
                    raise arriving.failure_again()
                else:
                    if not self.is_waiting:
                        self.is_waiting = True
                        if not arriving.is_on_disk:
                            arriving.notify()  # other readers may hold this one up
                    await arriving.wait()
                    continue
                self.is_waiting = False
                position += len(chunk)
                self.position = position
                arriving.trim()
                self.is_satisfied = self.is_satisfied or position == stop
                yield chunk
            if stop is None or position < stop:
                async with aclosing(self._rest(position, stop)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            self.position, self.is_waiting = None, False
            arriving.trim()

    async def _rest(self, position: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes up to `stop`, or the end, that are no longer kept here, from the source itself."""
        stop = self.metadata.size if stop is None else stop
        if self._again is None or stop is None:
            raise TransferAborted(f"byte {position} is not kept any more, as the cache cannot take the file")
        if not self._reads_left:
            raise TransferAborted(
                f"byte {position} is not kept any more, as the cache cannot take the file, and there are too many "
                "parts to read each of them from the source"
            )
        self._reads_left -= 1
        self.position, self.is_detached = None, True
        self._arriving.trim()
        async with aclosing(self._again(ByteRange(position, stop))) as chunks:
            async for chunk in chunks:
                yield chunk
        self.is_satisfied = True

    async def _read(self, start: int, stop: int) -> bytes:
        assert self._file is not None
        try:
            chunk = await self._file.read(ByteRange(start, stop))
        except (OSError, FileError) as exc:
            raise TransferAborted(f"reading failed at byte {start}: {exc}") from exc
        if not chunk:
            raise TransferAborted(f"byte {start} is missing in the file of the cache")
        return chunk


def _sized(metadata: FileMetadata, size: int) -> FileMetadata:
    return replace(metadata, size=size, accept_ranges=True)
