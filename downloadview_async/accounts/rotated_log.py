"""Reading logs, each line once: `RotatedLog`, which is renamed or truncated now and then, and `LogDirectory`."""

import os
import stat
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from operator import itemgetter
from typing import Self

from downloadview_async.accounts.completion_store import Place

_BLOCK = 1 << 17
_HEAD = 256
_GRACE = 60.0  # seconds; the processes of a proxy write to a renamed log for a while
_WEEK = 7 * 86_400.0
_PACKED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(slots=True)
class _File:
    """One file of the log. offset: up to where it was read. size: up to where it is read next. seen: its length."""

    descriptor: int
    device: int
    inode: int
    offset: int = 0
    size: int = 0
    seen: int = 0
    is_current: bool = True
    written_at: int = 0
    grew_at: float = field(default_factory=time.monotonic)


class RotatedLog:
    """The log at a path, and the files that it was renamed to: those beside it with names such as its own.

    Beside `downloads.log` these are `downloads.log.1` and `downloads-2026-11-29.log`, for example.

    poll: seconds between two looks. places: up to where they were read. A file that is read for the first time is read
    from its beginning. Renamed files are read if they were changed after the places, or, without places, within the
    last day. Compressed files are not read. reads_renamed: whether those are read that were renamed before the first
    look.

    A log that is copied and truncated, instead of renamed, is read as well, and so is the copy from where the log was
    read up to. But lines that are written between the copy and the truncation are lost.
    """

    poll = 0.25

    def __init__(
        self, path: str | os.PathLike[str], places: Sequence[Place] = (), *, reads_renamed: bool = True
    ) -> None:
        self.path = os.path.abspath(path)
        self._places = {(place.device, place.inode): place for place in places}
        self._oldest = min((place.time for place in places), default=time.time() - 86_400)
        self._files: list[_File] = []
        self._has_renamed = not reads_renamed

    @classmethod
    def from_end(cls, path: str, count: int) -> Self:
        """Return a log whose last `count` bytes are read, and what follows, but no file that was renamed before.

        The first line is read from its middle. Raises `OSError`.
        """
        log = cls(path, reads_renamed=False)
        log._oldest = time.time()
        log._open_current()
        (file,) = log._files
        file.offset = max(0, os.fstat(file.descriptor).st_size - count)
        return log

    def open(self) -> None:
        """Open the files that are not open yet, before they are compressed or removed. Raises `OSError`."""
        if not self._has_renamed:
            self._open_renamed()
            self._has_renamed = True
        if self._open_current():
            self._open_renamed()  # it may have been rotated several times since the last look
        for file in [*self._files]:
            if self._is_truncated(file):
                self._open_renamed()  # it may have been copied before
                file.offset = 0

    def look(self) -> float | None:
        """Find out what there is to read, and return when the last of it was written; None if there is nothing.

        The time is in seconds since 1970 UTC. Raises `OSError` if a file cannot be read.
        """
        self.open()
        written_at = None
        for file in [*self._files]:
            status = os.fstat(file.descriptor)
            file.size = status.st_size
            if file.size > file.offset:
                written_at = max(written_at or 0.0, status.st_mtime)
            elif not file.is_current and time.monotonic() - file.grew_at > _GRACE:
                self._close(file)
        return written_at

    def read(self) -> Generator[tuple[list[str], Place]]:
        """Yield the lines that the last look has found, and the place after them.

        They are read again later if the caller stops at them, as by an exception. A line without its end is not read.
        """
        for file in [*self._files]:
            while file.offset < file.size:
                block = os.pread(file.descriptor, min(_BLOCK, file.size - file.offset), file.offset)
                if not _has_head(file.descriptor, self._place_of(file)):
                    break  # it has been truncated since the last look
                whole = block.rfind(b"\n") + 1
                if not whole:
                    if len(block) < _BLOCK:
                        break
                    whole = len(block)  # no proxy writes such a long line
                before, file.offset = file.offset, file.offset + whole
                is_taken = False
                try:
                    yield block[:whole].decode("utf-8", "replace").split("\n")[:-1] or [""], self._place_of(file)
                    is_taken = True
                finally:
                    if not is_taken:
                        file.offset = before

    def close(self) -> None:
        """Close the files."""
        for file in [*self._files]:
            self._close(file)

    @property
    def current(self) -> int | None:
        """The descriptor of the file at the path, None if there is none."""
        return next((file.descriptor for file in self._files if file.is_current), None)

    def _open_renamed(self) -> None:
        directory, name = os.path.split(self.path)
        stem, suffix = os.path.splitext(name)
        renamed: list[tuple[float, str]] = []
        for entry in os.scandir(directory):
            is_like = entry.name.startswith(stem) and suffix in entry.name and not entry.name.endswith(_PACKED)
            if is_like and entry.name != name:
                try:
                    status = entry.stat()
                except FileNotFoundError:  # it has been removed, or compressed
                    continue
                if any((file.device, file.inode) == (status.st_dev, status.st_ino) for file in self._files):
                    continue
                is_new = (status.st_dev, status.st_ino) in self._places or status.st_mtime >= self._oldest
                if is_new and stat.S_ISREG(status.st_mode):
                    renamed.append((status.st_mtime, entry.path))
        for _, path in sorted(renamed):
            with suppress(FileNotFoundError):
                self._open(path).is_current = False

    def _open_current(self) -> bool:
        """Open the file at the path, and return whether that is another one than before."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            if not self._files:
                raise
            return False
        current = next((file for file in self._files if file.is_current), None)
        if current is not None:
            if (current.device, current.inode) == (status.st_dev, status.st_ino):
                return False
            current.is_current = False
            current.grew_at = time.monotonic()
        self._open(self.path)
        return current is not None

    def _open(self, path: str) -> _File:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        file = _File(descriptor, status.st_dev, status.st_ino)
        for place in self._places.values():  # also of other files: a copy begins like the log, and inodes are reused
            if file.offset < place.offset <= status.st_size and _has_head(descriptor, place):
                file.offset = file.size = place.offset
        self._files.append(file)
        return file

    def _is_truncated(self, file: _File) -> bool:
        status = os.fstat(file.descriptor)
        if (status.st_mtime_ns, status.st_size) == (file.written_at, file.seen):
            return False
        before, file.seen = file.seen, status.st_size
        file.written_at, file.grew_at = status.st_mtime_ns, time.monotonic()
        return file.seen < max(before, file.offset) or not _has_head(file.descriptor, self._place_of(file))

    def _close(self, file: _File) -> None:
        os.close(file.descriptor)
        self._files.remove(file)

    def _place_of(self, file: _File) -> Place:
        """Return the place at the offset of a file, and keep it."""
        count = min(_HEAD, file.offset)
        known = self._places.get((file.device, file.inode))
        if known is not None and known.offset == file.offset:
            return known
        head = f"{count} {_digest(os.pread(file.descriptor, count, 0))}"
        place = Place(
            path=self.path,
            device=file.device,
            inode=file.inode,
            offset=file.offset,
            head=head,
            time=time.time(),
        )
        self._places[file.device, file.inode] = place
        return place


def _has_head(descriptor: int, place: Place) -> bool:
    """Return whether a file begins as it did when it was read up to a place."""
    count, _, digest = place.head.partition(" ")
    return _digest(os.pread(descriptor, int(count), 0)) == digest


class LogDirectory:
    """The logs below a directory, into which a store delivers one small file after the other.

    poll: seconds between two looks. places: up to where they were read. Files that were written more than a week ago
    are not read, as no answer waits so long. Compressed files, and those whose names begin with a dot, are not read.
    """

    poll = 10.0

    def __init__(self, path: str | os.PathLike[str], places: Sequence[Place] = ()) -> None:
        self.path = os.path.abspath(path)
        self._places = {(place.device, place.inode): place for place in places}
        self._waiting: list[tuple[float, str, tuple[Place, ...]]] = []
        self.current: int | None = None
        """The descriptor of the directory."""

    def open(self) -> None:
        """Open the directory, if it is not open yet. Raises `OSError`."""
        if self.current is None:
            self.current = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def look(self) -> float | None:
        """Do what `RotatedLog.look` does."""
        self.open()
        self._waiting = sorted(self._unread(time.time() - _WEEK), key=itemgetter(0, 1))
        return self._waiting[-1][0] if self._waiting else None

    def _unread(self, oldest: float) -> Iterator[tuple[float, str, tuple[Place, ...]]]:
        """Yield when each file that has to be read was written, its path, and the place in it, if it has one."""
        for directory, _, names in os.walk(self.path):
            for name in names:
                if name.startswith(".") or name.endswith(_PACKED):
                    continue
                path = os.path.join(directory, name)
                try:
                    status = os.stat(path)
                except OSError:  # it has been removed
                    continue
                place = self._places.get((status.st_dev, status.st_ino))
                is_read = place is not None and place.offset == status.st_size and place.time > status.st_mtime
                if stat.S_ISREG(status.st_mode) and not is_read and status.st_size and status.st_mtime >= oldest:
                    yield status.st_mtime, path, () if place is None else (place,)

    def read(self) -> Generator[tuple[list[str], Place]]:
        """Do what `RotatedLog.read` does."""
        for _, path, places in self._waiting:
            log = RotatedLog(path, places, reads_renamed=False)
            try:
                with suppress(FileNotFoundError):
                    log.look()
                for lines, place in log.read():
                    yield lines, replace(place, path=self.path)
                    self._places[place.device, place.inode] = place
            finally:
                log.close()

    def close(self) -> None:
        """Close the directory."""
        if self.current is not None:
            os.close(self.current)
            self.current = None


def open_log(path: str, places: Sequence[Place]) -> RotatedLog | LogDirectory:
    """Return what reads the log, or the directory of logs, at a path."""
    return (LogDirectory if os.path.isdir(path) else RotatedLog)(path, places)


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
