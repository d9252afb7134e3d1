"""`LastingPaths`: gives an open file a path, so that a server that opens the path later gets the same file."""

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize

KEEP_SECONDS = 5.0
"""Seconds that a path is valid after its last use. A server usually opens it within a millisecond, a busy one later."""

MAX_KEPT = 64
"""How many files have such a path at the same time."""


@dataclass(slots=True)
class _Kept:
    path: str
    descriptor: int
    uses: int = 0


class LastingPaths:
    """Gives an open file a path for a server that opens it some time later, and does not tell when it has done so.

    By then, the file's name may belong to another file, and so may the number in `/proc/self/fd/` once it is closed.
    A path from here is a symbolic link to such a number, in a private directory. No name is used twice, and the link is
    removed well before the descriptor is closed: a server that opens the path too late gets ENOENT, never another file.

    keep_seconds: how long a path is valid after its last use. max_kept: how many files have one at the same time.
    """

    def __init__(self, *, keep_seconds: float = KEEP_SECONDS, max_kept: int = MAX_KEPT) -> None:
        self._keep_seconds = keep_seconds
        self._max_kept = max_kept
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._names = itertools.count()
        self._directory: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def path_of(self, descriptor: int) -> Iterator[str | None]:
        """Give a path that is valid in the context, and for `keep_seconds` after it.

        None if there are `max_kept` already, if the system does not allow it, or outside asyncio.
        """
        try:
            loop = asyncio.get_running_loop()
            if self._loop is not loop:  # the loop before it may have ended before it could remove its paths
                self._end()
                self._loop = loop
            status = os.fstat(descriptor)
            key = status.st_dev, status.st_ino
            kept = self._kept.get(key)
            if kept is None and len(self._kept) < self._max_kept:
                kept = self._kept[key] = self._keep(descriptor)
        except (OSError, RuntimeError):
            kept = None
        if kept is None:
            yield None
            return
        kept.uses += 1
        try:
            yield kept.path
        finally:
            loop.call_later(self._keep_seconds, self._used, loop, key)

    def _keep(self, descriptor: int) -> _Kept:
        if self._directory is None:
            self._directory = tempfile.mkdtemp(prefix="downloadview-")
            # Not `atexit`: the workers of servers do not run it, since multiprocessing ends them by `os._exit`.
            Finalize(None, shutil.rmtree, (self._directory, True), exitpriority=0)
        duplicate = os.dup(descriptor)
        path = os.path.join(self._directory, str(next(self._names)))
        try:
            os.symlink(f"/proc/self/fd/{duplicate}", path)
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))  # may we open it again?
        except OSError:
            os.close(duplicate)
            self._directory = None  # it may have been cleaned up: the next call makes a new one
            raise
        return _Kept(path, duplicate)

    def _end(self) -> None:
        while self._kept:
            _, kept = self._kept.popitem()
            with suppress(FileNotFoundError):
                os.unlink(kept.path)
            os.close(kept.descriptor)

    def _used(self, loop: asyncio.AbstractEventLoop, key: tuple[int, int]) -> None:
        kept = self._kept[key]
        kept.uses -= 1
        if kept.uses == 0:
            del self._kept[key]
            with suppress(FileNotFoundError):
                os.unlink(kept.path)
            # A server that is following the link right now has opened the file by then.
            loop.call_later(self._keep_seconds, os.close, kept.descriptor)
