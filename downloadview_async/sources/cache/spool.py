"""`Arriving`: bytes that are written to disk as they come, and that any number of readers are fed while they do.

When the disk takes no more, what comes is handed on through a window in memory. A reader that holds up others there
is detached, and gets the rest by a read of the source that is for it alone.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from copy import copy
from dataclasses import replace

import anyio

from downloadview_async.errors import DownloadError, FileError, SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import MAX_READS, ByteRange, FileMetadata
from downloadview_async.sources.local.open_file import CHUNK_SIZE, OpenLocalFile

MAX_WAITING = 1 << 18
"""Bytes that wait to be written, and bytes in the window, at most; one chunk may exceed it.

With blocks of 1 MiB the kernel gives the process new pages for each, which costs five times what writing them does.
"""

LAGGARD_SECONDS = 1.0
"""For how long, all in all, a reader may hold up others before it is detached."""

Again = Callable[[ByteRange], AsyncGenerator[bytes, None]]
"""Reads a span of the same version from the source itself. Raises `TransferAborted` where that cannot be done."""


class Arriving:
    """One file, from its first byte to its last. It belongs to one event loop.

    Whoever makes it calls `describe` once, `take` for each chunk, and `finish` or `fail`, and closes it.
    """

    def __init__(self) -> None:
        self.metadata: FileMetadata | None = None
        self.arrived = 0
        """Bytes that readers can have."""
        self.is_complete = False
        self.failure: BaseException | None = None
        self.is_on_disk = True
        """Whether all that has arrived is on the disk; once it is not, it never is again."""
        self.readers: set[ArrivingFile] = set()
        self._file: OpenLocalFile | None = None
        self._write: Callable[[memoryview], Awaitable[int]] | None = None
        self._reserve: Callable[[int], Awaitable[bool]] | None = None
        self._complain: Callable[[BaseException], None] = lambda exc: None
        self._written = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._writing: asyncio.Task[None] | None = None
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
        """Say what it is, and begin. Without `file` and `write` nothing goes to disk.

        file: what is written, to read from; it is closed with us. write: writes at its end, and returns how much.
        reserve: returns whether the file may get that long. complain: is told what the disk refused.
        """
        self.metadata = metadata
        self._file, self._write, self._reserve = file, write, reserve
        self._complain = complain or self._complain
        self.is_on_disk = write is not None
        self.notify()

    async def take(self, chunk: bytes) -> None:
        """Take the next bytes, and wait while many of them wait to be written."""
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_out())
        while self._waiting_bytes >= MAX_WAITING and self._writing is not None:
            await self.wait()

    async def flush(self) -> None:
        """Wait until readers can have all that was taken."""
        while self._writing is not None:
            await self.wait()

    def finish(self) -> None:
        """Say that this is all."""
        self.is_complete = True
        if self.metadata is not None and self.metadata.size is None and self.is_on_disk:
            self.metadata = _sized(self.metadata, self.arrived)
        self.notify()

    def fail(self, exc: BaseException) -> None:
        """Say that no more will come, and why: readers who want more get that."""
        if not self.is_complete and self.failure is None:
            self.failure = exc
            self.notify()

    async def aclose(self) -> None:
        """Wait for what is being written, and close the file; readers keep what they need of it."""
        with anyio.CancelScope(shield=True):
            while (writing := self._writing) is not None:
                self._waiting.clear()
                self._waiting_bytes = 0
                if not self.is_on_disk:
                    writing.cancel()  # it waits for readers, and has nothing in a thread
                await asyncio.wait([writing])
            file, self._file = self._file, None
            if file is not None:
                await file.aclose()

    def open(self, *, again: Again | None = None, max_reads: int = MAX_READS) -> "ArrivingFile":
        """Return the file for one more reader, which closes it. After `describe` only.

        again: reads what the reader needs and is not here any more. max_reads: how often it may be called, at most.
        """
        assert self.metadata is not None
        file = None if self._file is None else self._file.shared()
        return ArrivingFile(self, self.metadata, file, again, max_reads)

    @property
    def is_given_up(self) -> bool:
        """Whether there are readers, and all of them are detached."""
        return bool(self.readers) and all(reader.is_detached for reader in self.readers)

    async def wait(self) -> None:
        """Wait until something is different."""
        await self._progress.wait()

    def notify(self) -> None:
        """Wake all who wait."""
        event, self._progress = self._progress, anyio.Event()
        event.set()

    def failure_again(self) -> BaseException:
        """Return the failure for one more to raise."""
        exc = self.failure
        if isinstance(exc, DownloadError):
            again = copy(exc)
            again.__cause__ = exc
            return again
        return exc or SourceUnavailable("the file is not being fetched any more")

    def chunk_at(self, position: int) -> bytes | None:
        """Return bytes in the window from a position on, or None where the window has gone past it."""
        for start, block in self._window:
            if start <= position < start + len(block):
                return block[position - start : position - start + CHUNK_SIZE]
        return None

    @property
    def written(self) -> int:
        """Bytes that can be read from the file; what has arrived beyond is in the window."""
        return self._written

    def trim(self) -> None:
        """Drop from the window what every reader has had."""
        needed = min((position for _, position in self._positions()), default=self.arrived)
        dropped = False
        while self._window and self._window[0][0] + len(self._window[0][1]) <= needed:
            self._window.popleft()
            dropped = True
        if dropped:
            self.notify()

    def _positions(self) -> list[tuple["ArrivingFile", int]]:
        """Return the readers that what is in the window is kept for, and from where on they need it."""
        readers = [reader for reader in self.readers if not reader.is_detached]
        return [(reader, reader.position) for reader in readers if reader.position is not None]

    async def _write_out(self) -> None:
        try:
            while self._waiting:
                block = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
                self._waiting.clear()
                self._waiting_bytes = 0
                if self.is_on_disk:
                    block = await self._to_disk(block)
                if block:
                    await self._hand_on(block)
                self.notify()
        finally:
            self._writing = None
            self.notify()

    async def _to_disk(self, block: bytes) -> bytes:
        """Write a block, and return what of it could not be written."""
        assert self._write is not None
        left = memoryview(block)
        try:
            if self._reserve is not None and not await self._reserve(self._written + len(block)):
                self.is_on_disk = False
                return block
            while left:
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
        """Wait until something is different, and detach the readers that have held up others for too long."""
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
    """A file that arrives, as one of its readers has it open. A span is sent as soon as its bytes are there."""

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
        """From where on this reader needs bytes, as far as is known."""
        self.is_satisfied = False
        """Whether a reader has been given all of a span that was asked for."""
        self.is_waiting = False
        """Whether this reader has had all that has arrived, and wants more."""
        self.patience = LAGGARD_SECONDS
        """For how many seconds it may still hold up others."""
        self.is_detached = False
        """Whether nothing is kept for it any more that is not on the disk."""
        self._arriving = arriving
        self._file = file
        self._again = again
        self._reads_left = max_reads
        arriving.readers.add(self)

    async def aclose(self) -> None:
        """Let go of the file."""
        self._arriving.readers.discard(self)
        self._arriving.trim()
        if self._file is not None:
            await self._file.aclose()

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, or of the whole, and wait for those that are not there yet."""
        arriving = self._arriving
        position, stop = (0, None) if span is None else (span.start, span.stop)
        self.position = position
        try:
            while stop is None or position < stop:
                if position < arriving.written:
                    end = min(position + CHUNK_SIZE, arriving.written)
                    chunk = await self._read(position, end if stop is None else min(end, stop))
                elif position < arriving.arrived:
                    found = arriving.chunk_at(position)
                    if found is None:
                        break
                    chunk = found if stop is None else found[: stop - position]
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
                            arriving.notify()  # others may hold this one up
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
        """Yield what is not here any more, up to `stop` or the end, from the source itself."""
        stop = self.metadata.size if stop is None else stop
        if self._again is None or stop is None:
            raise TransferAborted(f"byte {position} is not kept, as the cache takes no more")
        if not self._reads_left:
            raise TransferAborted(
                f"byte {position} is not kept, as the cache takes no more, and the parts are too many to read each of "
                "them from the source"
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
            raise TransferAborted(f"the cache has lost byte {start}")
        return chunk


def _sized(metadata: FileMetadata, size: int) -> FileMetadata:
    return replace(metadata, size=size, accept_ranges=True)
