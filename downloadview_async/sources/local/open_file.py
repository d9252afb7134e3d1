"""`OpenLocalFile`: a regular file on a local disk, described and read by one descriptor."""

import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import lru_cache
from typing import Self

import anyio
import anyio.to_thread

from downloadview_async.errors import SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import ByteRange, FileMetadata, is_telling, stat_validators
from downloadview_async.http.request import DownloadRequest
from downloadview_async.sources.base import AsyncFile, OpenFile
from downloadview_async.sources.local.refused_calls import Refusals
from downloadview_async.sources.workers import MID_TRANSFER, Workers, unlimited

CHUNK_SIZE = 256 * 1024
"""Bytes read, and sent, at a time."""

_SECOND = 1_000_000_000
REWRITTEN = "the file was written to while it was sent"
"""Why a transfer is aborted whose bytes may be of two versions of a file."""

_PROBE = 128 * 1024  # what a disk is usually read by
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)
_reads_of_cached_pages = Refusals("preadv2 with RWF_NOWAIT")


class _Buffers(threading.local):
    """One buffer for a thread, so for an event loop: between reading and copying nobody else runs in it."""

    def __init__(self) -> None:
        self.of_this_thread = memoryview(bytearray(CHUNK_SIZE))


_buffers = _Buffers()


@lru_cache(maxsize=1024)
def _metadata(size: int, mtime_ns: int, is_telling: bool) -> FileMetadata:
    if not is_telling:
        return FileMetadata(size=size)
    etag, last_modified = stat_validators(size, mtime_ns)
    return FileMetadata(size=size, etag=etag, last_modified=last_modified)


def _is_telling(found: os.stat_result) -> bool:
    # A file system that keeps fractions of a second has one in the time of the last change of the inode.
    is_coarse = not found.st_mtime_ns % _SECOND and not found.st_ctime_ns % _SECOND
    return is_telling(found.st_mtime_ns, time.time_ns() if is_coarse else 0, is_coarse=is_coarse)


class OpenLocalFile:
    """An open descriptor, which whoever opened the file closes. Everything sent comes from it, the description too.

    workers: for what may wait for the disk. quick: whether closing is nothing that may.
    """

    def __init__(self, descriptor: int, found: os.stat_result, quick: bool = True, *, workers: Workers) -> None:
        self.descriptor = descriptor
        self.is_quick = quick
        self._users = 1
        self.workers = workers
        self.device = found.st_dev
        self._read_cached_pages = _RWF_NOWAIT is not None and self.device not in _reads_of_cached_pages.devices
        self.size = found.st_size
        self._mtime_ns = found.st_mtime_ns
        self.made_at: float | None = None
        """For one that a cache has kept: see `Aged`."""
        self.is_telling = _is_telling(found)
        """Whether the time of the file would be another one if its bytes were: a proxy makes validators of it."""
        self.metadata = _metadata(found.st_size, found.st_mtime_ns, self.is_telling)

    @property
    def local(self) -> "OpenLocalFile":
        """The file itself: see `Local`."""
        return self

    def shared(self) -> Self:
        """Return the file for one more to use, and to close: the last one does. In one thread only."""
        self._users += 1
        return self

    def close(self) -> None:
        """Close the descriptor. Where the file system wants to hear of that (FUSE, NFS), this waits for it."""
        self._users -= 1
        if self._users:
            return
        with suppress(OSError):  # it is closed in any case, and nothing was written
            os.close(self.descriptor)

    async def aclose(self) -> None:
        """Close the descriptor, in a thread where that may wait."""
        if self.is_quick:
            self.close()
            return
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close, limiter=unlimited())

    def read_nowait(self, span: ByteRange) -> bytes | None:
        """Return all bytes of a short span if the page cache has them, without ever waiting for the disk; else None."""
        chunk = self._cached(len(span), span.start)
        return chunk if chunk is not None and len(chunk) == len(span) else None

    def is_rewritten(self) -> bool:
        """Return whether the file is known to have been written to in place since it was opened.

        Its bytes may then be of two versions. One that has grown may have been appended to, like a log: what was
        promised of it is still there. Where the file system is not this kernel's alone, nobody asks.
        """
        return self.is_quick and self._has_other_times()

    def _has_other_times(self) -> bool:
        now = os.fstat(self.descriptor)
        return now.st_mtime_ns != self._mtime_ns and now.st_size == self.size

    def is_cached(self, offset: int, length: int) -> bool:
        """Return whether all bytes of a span can be read without waiting for a disk, by one of every `_PROBE`."""
        if not self._read_cached_pages:
            return False
        for position in (*range(offset, offset + length, _PROBE), offset + length - 1):
            if self._cached(1, position) is None:
                return False
        return True

    async def read(self, span: ByteRange) -> bytes:
        """Return the bytes of a short span in the midst of a transfer: fewer only where the file ends."""
        chunk = self.read_nowait(span)
        if chunk is None:
            chunk = await self.workers.run(os.pread, self.descriptor, len(span), span.start, patience=MID_TRANSFER)
        return chunk

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span: from the page cache at once, from the disk by way of a worker."""
        assert self.metadata.size is not None
        position, stop = (span.start, span.stop) if span is not None else (0, self.metadata.size)
        patience = None  # until the first byte has been sent, the answer can be another one
        while position < stop:
            length = min(CHUNK_SIZE, stop - position)
            try:
                chunk = self._cached(length, position)
                if chunk is None:
                    chunk = await self.workers.run_or_abandon(self._pread, length, position, patience=patience)
                elif self.is_rewritten():
                    raise OSError(errno.ESTALE, REWRITTEN)
            except (OSError, SourceUnavailable) as exc:
                raise TransferAborted(f"reading failed at byte {position}: {exc}") from exc
            if not chunk:
                return  # the file is shorter than it was; whoever counts the bytes aborts
            position += len(chunk)
            patience = MID_TRANSFER
            yield chunk

    def _pread(self, length: int, position: int) -> bytes:
        chunk = os.pread(self.descriptor, length, position)
        if self._has_other_times():
            raise OSError(errno.ESTALE, REWRITTEN)
        return chunk

    def _cached(self, length: int, position: int) -> bytes | None:
        """Return what the page cache has of it, without ever waiting for the disk; None if that is nothing."""
        if not self._read_cached_pages:
            return None
        assert _RWF_NOWAIT is not None
        try:
            buffer = _buffers.of_this_thread[:length]
            return bytes(buffer[: os.preadv(self.descriptor, [buffer], position, _RWF_NOWAIT)])
        except BlockingIOError:
            return None
        except OSError as exc:
            # tmpfs, FUSE and others cannot tell, or the call is not allowed here: always ask a worker. One that fails
            # to read for another reason gets the same error, where an error can be answered.
            self._read_cached_pages = False
            _reads_of_cached_pages.note(self.device, exc)
            return None


def local_of(opened: OpenFile) -> OpenLocalFile | None:
    """Return the open local file with the bytes of `opened`, for a server to send from; else None: see `Local`."""
    return getattr(opened, "local", None)


def open_nowait(file: AsyncFile, request: DownloadRequest) -> OpenFile | None:
    """Open a local file if that waits for nothing; else return None: see `OpensNowait`.

    The caller closes the `local_of` of what this returns. Raises what `file.open` raises.
    """
    opens: Callable[[DownloadRequest], OpenFile | None] | None = getattr(file, "open_nowait", None)
    return None if opens is None else opens(request)
