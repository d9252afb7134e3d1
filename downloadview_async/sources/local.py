"""`OpenLocalFile`: a regular file on a local disk, described and read by one descriptor."""

import errno
import os
from collections.abc import AsyncIterator

from downloadview_async.errors import SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import ByteRange, FileMetadata, stat_validators
from downloadview_async.sources.workers import Workers

CHUNK_SIZE = 256 * 1024
"""Bytes read, and sent, at a time."""

_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)


class OpenLocalFile:
    """An open descriptor, which whoever opened the file closes. Everything sent comes from it, the description too."""

    def __init__(self, descriptor: int, found: os.stat_result, *, workers: Workers) -> None:
        self.descriptor = descriptor
        self._workers = workers
        self._read_cached_pages = _RWF_NOWAIT is not None
        etag, last_modified = stat_validators(found.st_size, found.st_mtime_ns)
        self.metadata = FileMetadata(size=found.st_size, etag=etag, last_modified=last_modified)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def read_cached(self, span: ByteRange) -> bytes | None:
        """Return all bytes of a short span if the page cache has them, without ever waiting for the disk; else None."""
        chunk = self._cached(memoryview(bytearray(len(span))), span.start)
        return chunk if chunk is not None and len(chunk) == len(span) else None

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span: from the page cache at once, from the disk by way of a worker."""
        assert self.metadata.size is not None
        position, stop = (span.start, span.stop) if span is not None else (0, self.metadata.size)
        buffer = memoryview(bytearray(min(CHUNK_SIZE, stop - position)))
        while position < stop:
            length = min(CHUNK_SIZE, stop - position)
            try:
                chunk = self._cached(buffer[:length], position)
                if chunk is None:
                    chunk = await self._workers.run_or_abandon(os.pread, self.descriptor, length, position)
            except (OSError, SourceUnavailable) as exc:
                raise TransferAborted(f"reading failed at byte {position}: {exc}") from exc
            if not chunk:
                return  # the file is shorter than it was; whoever counts the bytes aborts
            position += len(chunk)
            yield chunk

    def _cached(self, buffer: memoryview, position: int) -> bytes | None:
        """Return what the page cache has of it, without ever waiting for the disk; None if that is nothing."""
        if not self._read_cached_pages:
            return None
        assert _RWF_NOWAIT is not None
        try:
            return bytes(buffer[: os.preadv(self.descriptor, [buffer], position, _RWF_NOWAIT)])
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            self._read_cached_pages = False  # tmpfs, FUSE and others cannot tell: always ask a worker
            return None
