"""`hash_file`: hashes an open file in a thread, and leaves the page cache as it was."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio.to_thread

from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.base import OpenFile, closing_stream
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of
from downloadview_async.sources.workers import unlimited

_PART = 16 << 20  # bytes that are hashed before a cancellation is noticed
_READ = 1 << 20  # bytes of one read
_PROBE = 128 * 1024  # bytes that a disk usually reads at once


async def hash_file(opened: OpenFile, hashes: list[Any], progress: Callable[[int], object]) -> bool:
    """Update the hashes with the whole file, and return whether it was read as one version. Raises `FileError`."""
    size = opened.metadata.size
    assert size is not None
    if (local := local_of(opened)) is not None:
        before = os.fstat(local.descriptor)
        if before.st_size != size or local.is_rewritten():  # since it was opened, which may be a second ago
            return False
        descriptor = await anyio.to_thread.run_sync(_reopened, local, limiter=unlimited())
        try:
            for start in range(0, size, _PART):
                part = ByteRange(start, min(start + _PART, size))
                hash_part = partial(_hash_part, descriptor, part, hashes)
                if not await anyio.to_thread.run_sync(hash_part, limiter=unlimited()):
                    return False
                progress(len(part))
        finally:
            os.close(descriptor)
        after = os.fstat(local.descriptor)
        return all(getattr(before, name) == getattr(after, name) for name in ("st_size", "st_mtime_ns", "st_ctime_ns"))
    done = 0
    async with closing_stream(opened.stream(ByteRange(0, size))) as chunks:
        async for chunk in chunks:
            await anyio.to_thread.run_sync(partial(_update, hashes, chunk), limiter=unlimited())
            done += len(chunk)
            progress(len(chunk))
    return done == size


def _reopened(local: OpenLocalFile) -> int:
    """Return a new descriptor of a file, which the caller closes. Blocks.

    On Linux it does not read ahead: the pages after a read are then cached only if others have read them. A duplicate
    of the descriptor, which is used elsewhere, would switch that off for downloads too.
    """
    try:
        descriptor = os.open(f"/proc/self/fd/{local.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(local.descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _hash_part(descriptor: int, part: ByteRange, hashes: list[Any]) -> bool:
    """Update the hashes with a part of a file, and return whether the file still had all of it. Blocks.

    Pages that were not in the page cache before are dropped again, as no client has requested them.
    """
    buffer = memoryview(bytearray(_READ))
    position = part.start
    while position < part.stop:
        wanted = min(_READ, part.stop - position)
        was_cached = _is_cached(descriptor, position, wanted)
        count = os.preadv(descriptor, [buffer[:wanted]], position)
        if not count:
            return False
        _update(hashes, buffer[:count])
        if not was_cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
        position += count
    return True


def _is_cached(descriptor: int, offset: int, length: int) -> bool:
    """Return whether the page cache has a span, judged by one byte of every `_PROBE`; True if nobody can tell."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return True
    try:
        for position in (*range(offset, offset + length, _PROBE), offset + length - 1):
            os.preadv(descriptor, [bytearray(1)], position, nowait)
    except OSError:
        return False
    return True


def _update(hashes: list[Any], chunk: bytes | memoryview) -> None:
    for value in hashes:
        value.update(chunk)
