"""`LastingPaths`: paths by which a server opens, some time later, the very file that is open here."""

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
"""How long a path is good after it was last given away. A server opens it within a millisecond, a busy one later."""

MAX_KEPT = 64
"""Files that have such a path at a time."""


@dataclass(slots=True)
class _Kept:
    path: str
    descriptor: int
    uses: int = 0


class LastingPaths:
    """Gives an open file a path for a server that opens it after it was told to, and never says that it has.

    The file's own name may have become another file's by then, and so may the number behind `/proc/self/fd/`, once it
    is closed. A path from here is a link to such a number in a private directory. It is this file's alone: its name is
    not used twice, and it is removed well before its descriptor is closed. Who comes too late finds no file, but never
    another.

    keep_seconds: how long a path is good after its last use. max_kept: how many files have one at a time.
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
        """Give a path that is good in the context, and for `keep_seconds` after it.

        None where there can be none: not so many, not from this system, or not outside asyncio.
        """
        try:
            loop = asyncio.get_running_loop()
            if self._loop is not loop:  # the one before may have ended with paths that it would have removed
                self._end()
                self._loop = loop
            found = os.fstat(descriptor)
            key = found.st_dev, found.st_ino
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
            # Not `atexit`, which the workers of servers do not come by: multiprocessing ends them by `os._exit`.
            Finalize(None, shutil.rmtree, (self._directory, True), exitpriority=0)
        own = os.dup(descriptor)
        path = os.path.join(self._directory, str(next(self._names)))
        try:
            os.symlink(f"/proc/self/fd/{own}", path)
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))  # may we open it a second time?
        except OSError:
            os.close(own)
            self._directory = None  # somebody may have tidied up: the next one tries in a new place
            raise
        return _Kept(path, own)

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
            # Whoever has followed the link by now will have got to the file by then.
            loop.call_later(self._keep_seconds, os.close, kept.descriptor)
