"""Blocking file objects and iterators as open files: every call to them runs in a worker thread.

A file object that can seek is sent from its beginning, wherever it was, because ranges count from there. One that
cannot seek is sent from where it is, without ranges.

Content that is longer than its stated size is never sent as if it were complete. The end of a file object that can
seek is read when it is opened; if the file grows later, it is cut there. From a stream that cannot seek, and from an
iterator, one more byte or item is read before the last bytes are sent. A live source may block in that read. So the
read is skipped if a socket has nothing to read now, and given up after `AT_ONCE` seconds. Then the stated size counts,
and the answer is complete.
"""

import io
import logging
import os
import select
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from threading import Lock, Thread
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from downloadview_async.errors import FileMissing, SourceUnavailable, TransferAborted
from downloadview_async.http.log_text import escaped
from downloadview_async.http.metadata import MAX_READS, ByteRange, FileMetadata
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.workers import Workers, unlimited

logger = logging.getLogger("downloadview_async")

AT_ONCE = 0.5
"""Seconds that the last bytes of a stream are held back while one more read shows whether they are the last."""

_BATCH_SECONDS = 0.05  # after this time, the items that a slow iterator has yielded are sent
_DONE = object()
_WRAPPERS = ("tempfile", "django.")
_MAX_WRAPPERS = 4
_FAR = 1 << 40  # bytes by which no file grows while it is asked for its size
_IO = ("_io.", "io.")
READS = ("read", "readinto", "readall")
"""The methods that return the bytes of a file object, for Python's own classes and for this library."""
_READING = (
    *READS,
    *("__getattribute__", "__iter__", "__next__", "chunks", "open", "peek", "read1", "readinto1"),
    *("readline", "readlines", "seek", "tell"),
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Extent:
    """Facts about the content of an object with `read`.

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

    known: its size in bytes from elsewhere. The end of the file object itself takes precedence, except for text. 0
    counts as unknown: some libraries return it for a size that they have not measured.

    Raises `FileMissing` for a closed object, and `SourceUnavailable` for one that seeks to its end and not back, and
    for an object without a `read` that takes a size.
    """
    if not callable(getattr(file, "read", None)):
        raise SourceUnavailable(f"not a file object, it has no read(size): {type(file).__name__}")
    known = known or None
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
        if isinstance(exc, TypeError):
            raise SourceUnavailable(f"the read(size) of a file object fails: {exc}") from exc
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
    beyond = _read_beyond(file)
    if beyond and not end:
        # It has not moved, so it may not be able to go back, and the byte that was read is its first.
        return Extent(known, head=as_bytes(beyond), is_text=isinstance(beyond, str))
    if beyond and (head := _read_in_place(file, beyond, end or 0)) is not None:
        return Extent(known, head=as_bytes(head), is_text=isinstance(head, str))
    told = known if end is None else end
    if not beyond and told and _goes(file, told):  # its end may be further on than it says
        beyond = _read_beyond(file) or beyond
    _seek(file, 0)
    if isinstance(beyond, str):
        return Extent(known, is_text=True)  # its positions do not count bytes
    if end == 0 and file.read(1):
        beyond = True  # it reports 0 at every position
        _seek(file, 0)
    if beyond:
        return Extent(can_seek=True)
    return Extent(told, can_seek=True)


def _read_beyond(file: Any) -> Any:
    """Return what a file object reads at its end: nothing, or else that is not its end."""
    try:
        return file.read(1)
    except TypeError:
        raise  # it takes no size
    except Exception:  # a store may refuse to read beyond the end
        return b""


def _read_in_place(file: Any, beyond: Any, end: int) -> Any:
    """Return all that has been read of a file object that reads on wherever it goes; None for one that moves.

    beyond: what it has read at its end, which it had not reached, or has got since. The object is anywhere.
    """
    far: Any = beyond[:0]
    with suppress(Exception):  # it may refuse to go there
        file.seek(end + _FAR)
        far = file.read(1)
    if far:
        return beyond + far if isinstance(beyond, str) else as_bytes(beyond) + as_bytes(far)
    _seek(file, 0)
    return None if file.read(1) else beyond


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


class Use:
    """Lets one call at a time use a resource.

    is_left: whether a call has been abandoned, which may never end.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.is_left = False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *args: object) -> None:
        self._lock.release()


class OpenFileObject:
    """An object with `read`, and its extent. The caller that opened it closes it. in_use: see `closing_in_thread`."""

    def __init__(self, file: Any, metadata: FileMetadata, extent: Extent, *, workers: Workers, in_use: Use) -> None:
        self._in_use = in_use
        self.metadata = metadata if seeks_cheaply(file) else replace(metadata, max_reads=MAX_READS)
        self._file = file
        self._workers = workers
        self._can_seek = extent.can_seek
        self._is_measured = extent.has_parts
        self._head = extent.head

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, or all bytes for None, at most `CHUNK_SIZE` at a time.

        Raises `TransferAborted` instead of the last bytes if there are more than the stated size.
        """
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
            is_last = left is not None and len(chunk) >= left
            if is_last and not self._is_measured and (len(chunk) != left or await self._goes_on()):
                raise longer_than(self.metadata.size)
            for piece in pieces(chunk if left is None else chunk[:left]):  # `read` may return more than requested
                yield piece
            left = None if left is None else left - len(chunk)
            chunk = b""

    async def _goes_on(self) -> bool:
        """Return whether there is more to read, as far as that is known at once."""
        if not _is_pipe(self._file) and _has_nothing(self._file):
            return False
        return bool(await at_once(self._read_on, self._in_use))

    def _read_on(self) -> Any:
        try:
            # The writer of a pipe may be about to write more, or to close it. No thread is left waiting for that.
            return b"" if _is_pipe(self._file) and _has_nothing(self._file, AT_ONCE * 0.9) else self._file.read(1)
        except Exception:  # what is closed at its end may say so
            return b""

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

    def __init__(self, items: Iterator[Any], metadata: FileMetadata, *, workers: Workers, in_use: Use) -> None:
        self._in_use = in_use
        self.metadata = metadata
        self._items = items
        self._workers = workers
        self._first = True

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the items from the beginning: there are no ranges.

        Raises `TransferAborted` instead of the last bytes if there are more than the stated size.
        """
        more, left = True, self.metadata.size
        while more:
            chunk, more = await self._workers.run(self._gather)
            if left is not None:
                left -= len(chunk)
                if left < 0 or (not left and more and await at_once(self._goes_on, self._in_use)):
                    raise longer_than(self.metadata.size)
                more = more and left > 0
            for piece in pieces(chunk):
                yield piece

    def _goes_on(self) -> bool:
        return any(as_bytes(item) for item in self._items)

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


def longer_than(size: int | None) -> TransferAborted:
    """Return what to raise where there is more content than its size."""
    return TransferAborted(f"there is more content than its size says, which is {size} bytes", reason="file-changed")


def _is_pipe(file: Any) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    except Exception:  # it has no descriptor
        return False


def _has_nothing(file: Any, seconds: float = 0.0) -> bool:
    """Return whether the descriptor of a file object, if it has one, has neither bytes nor an end for some seconds."""
    try:
        ready = select.poll()
        ready.register(file.fileno(), select.POLLIN)
        return not ready.poll(seconds * 1000)
    except Exception:  # it has no descriptor
        return False


async def at_once(call: Callable[[], T], in_use: Use) -> T | None:
    """Return what a call returns in a worker thread; None if it takes more than `AT_ONCE` seconds and is abandoned."""

    def used() -> T:
        with in_use:
            return call()

    has_ended = False
    try:
        with anyio.move_on_after(AT_ONCE):
            try:
                result = await anyio.to_thread.run_sync(used, limiter=unlimited(), abandon_on_cancel=True)
            except Exception:
                has_ended = True
                raise
            has_ended = True
            return result
    finally:
        if not has_ended:
            in_use.is_left = True
    return None


def seeks_cheaply(file: Any) -> bool:
    """Return whether a file object, or the one in wrappers such as Django's, is known to be local or in memory.

    To seek, others may read everything before the position (gzip), or send a request to another server.
    """
    for _ in range(_MAX_WRAPPERS):
        if isinstance(file, io.BytesIO) and is_read_by(file, _IO):
            return True
        if reads_a_descriptor(file):
            return True
        if not type(file).__module__.startswith(_WRAPPERS):
            return False  # an unknown wrapper may do more than pass calls on
        file = getattr(file, "file", None)
    return False


def reads_a_descriptor(file: Any) -> bool:
    """Return whether a file object is Python's, and reads what is behind its descriptor, byte for byte.

    A class derived from Python's that overrides how it reads does not: it may decrypt.
    """
    if isinstance(file, io.BufferedReader | io.BufferedRandom) and is_read_by(file, _IO):
        file = file.raw  # which may be something else, such as a member of an archive
    return isinstance(file, io.FileIO) and is_read_by(file, _IO)


def is_read_by(file: Any, packages: tuple[str, ...]) -> bool:
    """Return whether the classes of these packages define how a file object is read, and nobody has overridden that.

    packages: the beginnings of the names of modules, each with a dot at its end.
    """
    homes = {home_of(file, method) for method in _READING}
    return all(home.startswith((*packages, "builtins.")) for home in homes if home)


def home_of(file: Any, method: str) -> str:
    """Return the module of the class that defines a method of an object, with a dot at its end.

    That is "." where the object itself has it, and nothing where it does not define it.
    """
    kept = getattr(file, "__dict__", {}).get(method)
    if kept is not None and not _is_kept_by_tempfile(file, method, kept):
        return "."
    return home_of_class(type(file), method)


def home_of_class(cls: type, method: str) -> str:
    """Return the module of the class that a method of a class is of, with a dot at its end; nothing without one."""
    return next((f"{base.__module__}." for base in cls.__mro__ if method in vars(base)), "")


def _is_kept_by_tempfile(file: Any, method: str, kept: Any) -> bool:
    """Return whether a temporary file has kept a method of the file that it wraps, as it does when it is called."""
    if not home_of_class(type(file), "__getattr__").startswith("tempfile."):
        return False
    return bool(getattr(kept, "__wrapped__", None) == getattr(file.file, method, None))


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
async def closing_in_thread(resource: Any) -> AsyncIterator[Use]:
    """Call `resource.close()`, if there is one, in a thread when the context ends, even when cancelled.

    The context gives a lock, which each call to the resource must hold: a task that asyncio cancels does not wait for
    the call that it has begun, so `close` waits for the lock. It does not wait for an abandoned call: see `at_once`.
    """
    in_use, begun = Use(), Lock()

    def close_once() -> None:
        if begun.acquire(blocking=False):
            # closing a file object may be what ends a read, but an iterator cannot be closed while it runs
            with nullcontext() if in_use.is_left and hasattr(resource, "read") else in_use:
                close(resource)

    try:
        yield in_use
    finally:
        if not hasattr(resource, "close"):
            pass
        elif in_use.is_left:
            Thread(target=close_once, daemon=True).start()
        else:
            with anyio.CancelScope(shield=True):
                try:
                    await anyio.to_thread.run_sync(close_once, limiter=unlimited())
                except anyio.get_cancelled_exc_class():
                    # Cancelled by asyncio, which ignores the shield. A worker that has not begun never will.
                    Thread(target=close_once).start()
                    raise


def close(resource: Any) -> None:
    """Call `resource.close()`, if it has one. An error of it is logged: all bytes to send have been read."""
    if (method := getattr(resource, "close", None)) is None:
        return
    try:
        method()
    except Exception as exc:
        note_close_failure(resource, exc)


def note_close_failure(resource: Any, exc: Exception) -> None:
    """Log that closing something failed."""
    problem = escaped(f"{type(exc).__name__}: {exc}")
    logger.warning("closing a %s failed: %s", escaped(type(resource).__qualname__), problem)
