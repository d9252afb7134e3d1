"""`OpenFileCache`: files that are asked for again and again stay open for a second, as in nginx's `open_file_cache`."""

import asyncio
import os
import threading

from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.root import Root
from downloadview_async.sources.workers import Workers

KEEP_SECONDS = 1.0
"""How long a file is kept at most. A deleted one gives its space back no later than that."""

MAX_FILES = 64
"""Files of one directory, and one event loop, that are kept at a time."""


class OpenFileCache:
    """Opens files beneath a root. One that is opened for the second time within `KEEP_SECONDS` is kept until they end.

    Unlike nginx's, it never gives away what has been replaced or changed: each time, `stat` has to find the very
    inode that is open, of the same size and times. That waits for no disk: an open file holds the directory entries
    that lead to it in memory. Only when a directory on the way has become a link to where it was moved, policies
    for links are up to `KEEP_SECONDS` late: the file is still the same one.
    """

    def __init__(self, root: Root, workers: Workers) -> None:
        self._root = root
        self._workers = workers
        self._of_thread = _OfThread()

    def open(self, name: str) -> OpenLocalFile | None:
        """Open a file, which the caller then closes, as `Root.open_nowait` does."""
        kept = self._of_thread.kept
        is_forgotten = kept.is_forgotten_in_time()
        if (found := kept.files.get(name)) is not None:
            if self._identity(name) == found[1]:
                return found[0].shared()
            kept.files.pop(name)[0].close()
        opened = self._root.open_nowait(name)
        if opened is None:
            return None
        file = OpenLocalFile(*opened, workers=self._workers)
        if not is_forgotten:
            return file
        if name not in kept.opened_once:
            if len(kept.opened_once) < 16 * MAX_FILES:
                kept.opened_once.add(name)
        elif len(kept.files) < MAX_FILES and (identity := _identity(opened.found)) == self._identity(name):
            kept.files[name] = file.shared(), identity
        return file

    def _identity(self, name: str) -> tuple[int, ...] | None:
        try:
            return _identity(os.stat(name, dir_fd=self._root.descriptor, follow_symlinks=False))
        except OSError:
            return None


class _OfThread(threading.local):
    """What each thread keeps. It ends with the thread."""

    def __init__(self) -> None:
        self.kept = _Kept()


class _Kept:
    """What one thread, and so one event loop, keeps."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[OpenLocalFile, tuple[int, ...]]] = {}
        self.opened_once: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def is_forgotten_in_time(self) -> bool:
        """Have the loop that runs forget all of it in `KEEP_SECONDS`, and return whether there is one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if self._loop is not loop:  # the one before may have ended without a word
            self._forget()
            self._loop = loop
            loop.call_later(KEEP_SECONDS, self._forget)
        return True

    def _forget(self) -> None:
        self._loop = None
        self.opened_once.clear()
        while self.files:
            self.files.popitem()[1][0].close()

    def __del__(self) -> None:
        self._forget()


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns
