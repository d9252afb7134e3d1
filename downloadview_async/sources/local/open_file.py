"""`OpenLocalFile`: a regular file on a local disk, described and read through one descriptor."""

import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import Self

import anyio
import anyio.to_thread

from downloadview_async.errors import SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import (
    ByteRange,
    ETag,
    FileMetadata,
    is_telling,
    stat_validators,
    stat_version,
)
from downloadview_async.http.request import DownloadRequest
from downloadview_async.sources.base import AsyncFile, OpenFile, OpenLocalBytes
from downloadview_async.sources.local.refused_calls import Refusals
from downloadview_async.sources.local.root import Validators, close_unwritten
from downloadview_async.sources.workers import MID_TRANSFER, READING, Longest, Workers, unlimited

CHUNK_SIZE = 256 * 1024
"""Bytes read, and sent, at a time."""

RECENT_SECONDS = 60
"""A file that was written to in so many seconds is sent with more care: somebody may be writing to it now."""

_SECOND = 1_000_000_000
REWRITTEN = "the file was written to while it was sent"
"""Why a transfer is aborted: its bytes may come from two versions of a file."""

_COPIED = 32 * 1024  # up to so many bytes, one more copy of them costs less than a probe
_PROBE = 128 * 1024  # bytes that a disk usually reads at once
_ONE_BYTE = [bytearray(1)]  # nobody looks at it
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)
_reads_of_cached_pages = Refusals("preadv2 with RWF_NOWAIT")


class _Buffers(threading.local):
    """One buffer for each thread, for trio too: nothing else runs in the thread between reading and using the bytes."""

    def __init__(self) -> None:
        self.of_this_thread = memoryview(bytearray(CHUNK_SIZE))


_buffers = _Buffers()


@lru_cache(maxsize=1024)
def _metadata(size: int, mtime_ns: int, is_telling: bool) -> FileMetadata:
    if not is_telling:
        return FileMetadata(size=size)
    etag, last_modified = stat_validators(size, mtime_ns)
    return FileMetadata(size=size, etag=etag, last_modified=last_modified)


def _is_telling(status: os.stat_result, *, in_seconds: bool = False) -> bool:
    # A file system that keeps fractions of a second shows one in the time of the inode's last change.
    changed = status.st_mtime_ns
    is_coarse = in_seconds or (not changed % _SECOND and not status.st_ctime_ns % _SECOND)
    return is_telling(changed, time.time_ns() if is_coarse else 0, is_coarse=is_coarse)


def _of_inode(status: os.stat_result) -> FileMetadata:
    """Return metadata that identifies the bytes on this machine alone: the kernel sets ctime with each change."""
    changed = status.st_ctime_ns
    if not is_telling(changed, time.time_ns(), is_coarse=not changed % _SECOND):
        return FileMetadata(size=status.st_size)
    tag = f"{status.st_mtime_ns:x}-{changed:x}-{status.st_ino:x}-{status.st_size:x}"
    return FileMetadata(size=status.st_size, etag=ETag(tag))


def tag_time(mtime_ns: int, validators: Validators) -> int:
    """Return the modification time in nanoseconds as the entity tag has it."""
    return mtime_ns // _SECOND * _SECOND if validators == "seconds" else mtime_ns


def metadata_of(status: os.stat_result, validators: Validators = "nanoseconds") -> FileMetadata:
    """Return the metadata of a file with this status."""
    if validators == "inode":
        return _of_inode(status)
    is_telling = _is_telling(status, in_seconds=validators == "seconds")
    return _metadata(status.st_size, tag_time(status.st_mtime_ns, validators), is_telling)


def version_of(status: os.stat_result, validators: Validators = "nanoseconds") -> str:
    """Return `metadata_of(status, validators).version`, in less time."""
    if validators != "nanoseconds":
        return metadata_of(status, validators).version
    return stat_version(status.st_size, status.st_mtime_ns) if _is_telling(status) else ""


class OpenLocalFile:
    """An open descriptor, from which both the metadata and the bytes come. The caller that opened the file closes it.

    workers: threads for calls that may wait for the disk. quick: whether closing the file waits for nothing.
    is_telling: given if that is known already. validators: as in `PathSource`.
    """

    __slots__ = (
        "_described",
        "_mtime_ns",
        "_read_cached_pages",
        "_tag_ns",
        "_users",
        "descriptor",
        "device",
        "inode",
        "is_quick",
        "is_telling",
        "made_at",
        "size",
        "workers",
    )

    def __init__(
        self,
        descriptor: int,
        status: os.stat_result,
        quick: bool = True,
        *,
        workers: Workers,
        is_telling: bool | None = None,
        validators: Validators = "nanoseconds",
    ) -> None:
        self.descriptor = descriptor
        self.is_quick = quick
        self._users = 1
        self.workers = workers
        self.device, self.inode = status.st_dev, status.st_ino
        self._read_cached_pages = _RWF_NOWAIT is not None and self.device not in _reads_of_cached_pages.devices
        self.size = status.st_size
        self._mtime_ns = status.st_mtime_ns
        self.made_at: float | None = None
        """Set for a file from a cache: see `Aged`."""
        if is_telling is None:
            is_telling = _is_telling(status, in_seconds=validators == "seconds")
        self.is_telling = is_telling
        """Whether other bytes would have another modification time. A proxy makes validators of this time."""
        self._tag_ns = self._mtime_ns if validators == "nanoseconds" else tag_time(self._mtime_ns, validators)
        self._described: FileMetadata | None = _of_inode(status) if validators == "inode" else None

    @property
    def metadata(self) -> FileMetadata:
        """The metadata of this version: see `OpenFile`."""
        if self._described is None:
            self._described = _metadata(self.size, self._tag_ns, self.is_telling)
        return self._described

    @metadata.setter
    def metadata(self, described: FileMetadata) -> None:
        self._described = described

    @property
    def version(self) -> str:
        """`metadata.version`, in less time if nothing else needs the metadata."""
        if self._described is not None:
            return self._described.version
        return stat_version(self.size, self._tag_ns) if self.is_telling else ""

    @property
    def local(self) -> "OpenLocalFile":
        """The file itself: see `Local`."""
        return self

    def shared(self) -> Self:
        """Return the file for one more user in this thread. The descriptor is closed when the last user closes it."""
        self._users += 1
        return self

    def close(self) -> None:
        """Close the descriptor. This waits for a file system that has to be told (FUSE, NFS)."""
        self._users -= 1
        if self._users:
            return
        close_unwritten(self.descriptor)

    async def aclose(self) -> None:
        """Close the descriptor, in a thread if that may wait."""
        if self.is_quick:
            self.close()
            return
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close, limiter=unlimited())

    def read_nowait(self, span: ByteRange) -> bytes | None:
        """Return the bytes of a short span if the page cache has all of them, without waiting; else None."""
        chunk = self._cached(len(span), span.start)
        return chunk if chunk is not None and len(chunk) == len(span) else None

    def is_recent(self) -> bool:
        """Return whether the file was written to in the last `RECENT_SECONDS`, and perhaps still is."""
        return time.time_ns() - self._mtime_ns < RECENT_SECONDS * _SECOND

    def is_rewritten(self, *, is_last: bool = False) -> bool:
        """Return whether the file is known to have been written to in place since it was opened.

        Its bytes may then come from two versions. A file that has grown does not count: it may be a log, whose promised
        bytes are still the same. On file systems like NFS and FUSE this is not checked, as that may wait.

        is_last: whether the last bytes have just been read. Then a file that was cut counts, too: it may have been
        written to before that. A cut does not count earlier, because the bytes before it are the same.

        Raises `SourceUnavailable`, as `is_same` does, if the disk fails.
        """
        return self.is_quick and self._is_other_version(is_last=is_last)

    def is_same(self) -> bool:
        """Return whether the file has the size and the time with which it was opened: not even a log may grow.

        On file systems like NFS and FUSE this is not checked, as that may wait.
        """
        if not self.is_quick:
            return True
        now = self._status()
        return now.st_mtime_ns == self._mtime_ns and now.st_size == self.size

    def _is_other_version(self, *, is_last: bool) -> bool:
        now = self._status()
        if now.st_mtime_ns == self._mtime_ns:
            return False
        return now.st_size == self.size or (is_last and now.st_size < self.size)

    def _status(self) -> os.stat_result:
        try:
            return os.fstat(self.descriptor)
        except OSError as exc:
            raise SourceUnavailable(f"the open file cannot be described: {exc}") from exc

    def is_cached(self, offset: int, length: int) -> bool:
        """Return whether a span can be read without waiting for a disk, judged by one byte of every `_PROBE`."""
        if not self._read_cached_pages:
            return False
        assert _RWF_NOWAIT is not None
        last = offset + length - 1
        try:
            os.preadv(self.descriptor, _ONE_BYTE, last, _RWF_NOWAIT)
            for position in range(offset, last, _PROBE):
                os.preadv(self.descriptor, _ONE_BYTE, position, _RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._refuse_nowait(exc)
            return False
        return True

    async def read(self, span: ByteRange) -> bytes:
        """Return the bytes of a short span during a transfer; fewer only if the file ends there."""
        if len(span) > _COPIED and self.is_cached(span.start, len(span)):
            return _pread(self.descriptor, span)
        chunk = self.read_nowait(span)
        if chunk is None:
            chunk = await self.workers.run(_pread, self.descriptor, span, patience=MID_TRANSFER)
        return chunk

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span: from the page cache directly, from the disk through a worker."""
        assert self.metadata.size is not None
        position, stop = (span.start, span.stop) if span is not None else (0, self.metadata.size)
        patience: float | None = None
        longest: Longest | None = READING  # until the first byte has been sent, the answer can still become an error
        while position < stop:
            length = min(CHUNK_SIZE, stop - position)
            try:
                chunk = self._cached(length, position)
                if chunk is None:
                    chunk = await self.workers.run_or_abandon(
                        self._pread, length, position, stop, patience=patience, longest=longest
                    )
                elif self.is_rewritten(is_last=position + len(chunk) == stop):
                    raise OSError(errno.ESTALE, REWRITTEN)
            except (OSError, SourceUnavailable) as exc:
                raise TransferAborted(f"reading failed at byte {position}: {exc}") from exc
            if not chunk:
                return  # the file has shrunk; the sender counts the bytes and aborts
            position += len(chunk)
            patience, longest = MID_TRANSFER, None
            yield chunk

    def _pread(self, length: int, position: int, stop: int) -> bytes:
        chunk = os.pread(self.descriptor, length, position)
        if self._is_other_version(is_last=position + len(chunk) == stop):
            raise OSError(errno.ESTALE, REWRITTEN)
        return chunk

    def _cached(self, length: int, position: int) -> bytes | None:
        view = self.view_nowait(length, position)
        return None if view is None else bytes(view)

    def view_nowait(self, length: int, position: int) -> memoryview | None:
        """Return the first bytes of a span if they are in the page cache, without waiting for a disk; else None.

        length: at most `CHUNK_SIZE`. The next read in this thread uses the memory again.
        """
        memory = _buffers.of_this_thread[:length]
        count = self.read_into(memory, position)
        return None if count is None else memory[:count]

    def read_into(self, memory: memoryview, position: int) -> int | None:
        """Read bytes if the page cache has the first of them, without waiting for a disk; else return None.

        Returns how many bytes there were: fewer than the memory has room for if the page cache or the file ends.
        """
        if not self._read_cached_pages:
            return None
        assert _RWF_NOWAIT is not None
        try:
            return os.preadv(self.descriptor, [memory], position, _RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as exc:
            self._refuse_nowait(exc)
            return None

    def _refuse_nowait(self, exc: OSError) -> None:
        # tmpfs, FUSE and others do not support the flag, or the call is not allowed here: from now on a worker reads.
        # After any other error, the worker gets the same error, where it can be handled.
        self._read_cached_pages = False
        _reads_of_cached_pages.note(self.device, exc)


def _pread(descriptor: int, span: ByteRange) -> bytes:
    """Return the bytes of a span; fewer only if the file ends there. On FUSE, one call may return fewer."""
    chunk = os.pread(descriptor, len(span), span.start)
    while len(chunk) < len(span) and (more := os.pread(descriptor, len(span) - len(chunk), span.start + len(chunk))):
        chunk += more
    return chunk


def local_of(opened: OpenFile) -> OpenLocalFile | None:
    """Return the open local file with the bytes of `opened`, for a server to send from; else None: see `Local`."""
    return getattr(opened, "local", None)


def open_nowait(file: AsyncFile, request: DownloadRequest) -> OpenFile | None:
    """Open a local file if that waits for nothing; else return None: see `OpensNowait`.

    The caller closes the `local_of` of what this returns. Raises what `file.open` raises.
    """
    opens: Callable[[DownloadRequest], OpenLocalBytes | None] | None = getattr(file, "open_nowait", None)
    return None if opens is None else opens(request)
