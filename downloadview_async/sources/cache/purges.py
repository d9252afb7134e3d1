"""`PurgeLog`: what was purged from a cache. All processes and running fills learn of a purge from this file.

At each request, a process compares the length of the file with the one that it has read up to: this costs one `fstat`.
A fill knows the length from before its source was asked, and what it has fetched is not kept if a later line covers the
file.
"""

import errno
import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

MAX_BYTES = 1 << 20
"""A longer log is replaced by an empty one. Then all that processes know of files is forgotten."""

_NAME = "purges"
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW

Position = tuple[int, int]
"""A position in the log: the inode of the file and an offset in bytes."""

_NOTHING: Position = 0, 0
"""The position before the first purge."""

_REPLACED = b"null\n"
"""The first line of a log that has replaced another one, whose lines are lost."""


@dataclass(frozen=True, slots=True)
class Purge:
    """Files of one source: the one called `name`, or with `is_prefix` all whose names begin with it."""

    source: str
    name: str
    is_prefix: bool = False

    def covers(self, source: str, name: str) -> bool:
        """Return whether a file of a source was purged."""
        return source == self.source and (name.startswith(self.name) if self.is_prefix else name == self.name)


class PurgeLog:
    """The log in a directory, which the first purge makes. directory: a descriptor of it, which stays open."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._turn = threading.Lock()
        self._descriptor: int | None = None

    def position(self) -> Position:
        """Return the end of the log."""
        if self._descriptor is None:
            if not os.access(_NAME, os.F_OK, dir_fd=self._directory):
                return _NOTHING
            self._reopen()
            if self._descriptor is None:
                return _NOTHING
        status = os.fstat(self._descriptor)
        if not status.st_nlink:  # another process has replaced it
            self._reopen()
            status = os.fstat(self._descriptor)
        return status.st_ino, status.st_size

    def since(self, position: Position) -> Sequence[Purge] | None:
        """Return what was purged after a position; None if that is not known, so that it may be anything."""
        inode, end = self.position()
        if (inode, end) == position or self._descriptor is None:
            return ()
        if position not in (_NOTHING, (inode, position[1])):
            return None
        try:
            lines = os.pread(self._descriptor, end - position[1], position[1]).splitlines()
            return [_purge_in(line) for line in lines]
        except (OSError, ValueError, TypeError):
            return None

    def add(self, purge: Purge) -> None:
        """Add a line. Only the holder of the directory's lock may call it. Raises `OSError`."""
        line = json.dumps([purge.source, purge.name, purge.is_prefix]).encode() + b"\n"
        if self.position()[1] > MAX_BYTES:
            self._remove()
            line = _REPLACED + line
        with self._turn:
            self._open(os.O_CREAT)
            assert self._descriptor is not None
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(_NAME, dir_fd=self._directory)

    def _reopen(self) -> None:
        with self._turn, suppress(OSError):
            self._open()

    def _open(self, create: int = 0) -> None:
        """Open the log that has the name now. Raises `OSError`."""
        try:
            descriptor = os.open(_NAME, _FLAGS | create, 0o600, dir_fd=self._directory)
        except PermissionError:  # another user made it
            self._remove()
            descriptor = os.open(_NAME, _FLAGS | os.O_CREAT, 0o600, dir_fd=self._directory)
            os.write(descriptor, _REPLACED)
        if self._descriptor is None:
            self._descriptor = descriptor
        else:  # in the place of the old one, which another thread may be using
            os.dup2(descriptor, self._descriptor, inheritable=False)
            os.close(descriptor)


def _purge_in(line: bytes) -> Purge:
    """Return the purge in a line. Raises `ValueError` or `TypeError` for another line, such as `_REPLACED`."""
    source, name, is_prefix = json.loads(line)
    return Purge(str(source), str(name), bool(is_prefix))
