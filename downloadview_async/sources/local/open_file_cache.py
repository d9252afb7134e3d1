"""`OpenFileCache`: files that are requested again and again stay open for a second, as in nginx's `open_file_cache`."""

import asyncio
import os

from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.root import Opened, Root
from downloadview_async.sources.per_loop import PerLoop
from downloadview_async.sources.workers import Workers

KEEP_SECONDS = 1.0
"""How long a file is kept open at most. The space of a deleted file is freed no later than that."""

MAX_FILES = 64
"""Files that are kept open at once, for each directory and event loop."""


class OpenFileCache:
    """Opens files beneath a root. A file that is opened twice within `KEEP_SECONDS` stays open until they end.

    Unlike nginx's, this cache never returns a file that has been replaced or changed: each time, `stat` must find the
    inode that is open, with the same size and times. This waits for no disk, because an open file keeps the directory
    entries that lead to it in memory. Only if a directory on the way is moved and replaced by a link to its new place,
    the policy for links takes effect up to `KEEP_SECONDS` later: the file is still the same.
    """

    def __init__(self, root: Root, workers: Workers) -> None:
        self._root = root
        self._workers = workers
        self._kept = PerLoop[_Kept]()

    def open(self, name: str) -> OpenLocalFile | None:
        """Open a file as `Root.open_nowait` does. The caller closes it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # without asyncio, nothing would close the files in time
            opened = self._root.open_nowait(name)
            return None if opened is None else self._file(opened)
        kept = self._kept.get(loop)
        if kept is None:
            kept = self._kept.set(loop, _Kept())
            loop.call_later(KEEP_SECONDS, self._kept.drop, loop)
        if (known := kept.files.get(name)) is not None:
            if self._identity(name) == known[1]:
                return known[0].shared()
            kept.files.pop(name)[0].close()
        opened = self._root.open_nowait(name)
        if opened is None:
            return None
        file = self._file(opened)
        if name not in kept.opened_once:
            if len(kept.opened_once) < 16 * MAX_FILES:
                kept.opened_once.add(name)
        elif len(kept.files) < MAX_FILES and (identity := _identity(opened.status)) == self._identity(name):
            kept.files[name] = file.shared(), identity
        return file

    def _file(self, opened: Opened) -> OpenLocalFile:
        return OpenLocalFile(*opened, workers=self._workers, validators=self._root.validators)

    def _identity(self, name: str) -> tuple[int, ...] | None:
        try:
            return _identity(os.stat(name, dir_fd=self._root.descriptor, follow_symlinks=False))
        except OSError:
            return None


class _Kept:
    """The files that one event loop keeps open, and the names of those that it has opened once."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[OpenLocalFile, tuple[int, ...]]] = {}
        self.opened_once: set[str] = set()

    def __del__(self) -> None:
        for file, _ in self.files.values():
            file.close()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_dev, status.st_size, status.st_mtime_ns, status.st_ctime_ns
