"""Lists a directory beneath a root: `list_folder` yields its entries in batches, which worker threads read.

Only the files are left in that `Root.open` would open, as far as their status tells, and only the folders that can be
listed in turn. A link counts as what it leads to, where the policy follows it.
"""

import os
import stat
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from itertools import islice

from downloadview_async.errors import FileError
from downloadview_async.sources.listing import Entry
from downloadview_async.sources.local.open_file import metadata_of
from downloadview_async.sources.local.root import Root, file_error
from downloadview_async.sources.names import canonical_folder, entry_check
from downloadview_async.sources.workers import MID_TRANSFER, Workers

BATCH = 500
"""Entries that one call of a worker reads: it takes some milliseconds, and others run in between."""


async def list_folder(root: Root, folder: str, workers: Workers) -> AsyncIterator[Entry]:
    """Yield the entries of a folder beneath a root: see `SupportsListing`. Only one batch is in memory."""
    reader = await workers.run_or_abandon(FolderReader, root, folder, discard=FolderReader.close)
    try:
        while (batch := await workers.run_or_abandon(reader.read, patience=MID_TRANSFER)) is not None:
            for entry in batch:
                yield entry
    finally:
        reader.close()


class FolderReader:
    """An open directory beneath a root, which is read batch by batch. Opening and reading it may block on a disk.

    Raises `FileMissing`, `AccessDenied` or `SourceUnavailable`.
    """

    def __init__(self, root: Root, folder: str) -> None:
        name = canonical_folder(folder, root.names)
        self._root = root
        self._prefix = f"{name}/" if name else ""
        self._is_valid = entry_check(name, root.names)
        self._descriptor = root.open_folder(name)
        try:
            self._items = os.scandir(self._descriptor)  # it reads a duplicate of the descriptor
        except OSError as exc:
            os.close(self._descriptor)
            raise file_error(exc) from exc
        self._in_use = threading.Lock()
        self._is_closing = self._is_closed = False

    def read(self) -> list[Entry] | None:
        """Return the entries among the next `BATCH` items of the directory; None at its end."""
        with self._in_use:
            try:
                items = [] if self._is_closing else list(islice(self._items, BATCH))
            except OSError as exc:
                raise file_error(exc) from exc
            entries = [entry for item in items if (entry := self._entry_of(item)) is not None]
        if self._is_closing:
            self.close()
        return entries if items else None

    def close(self) -> None:
        """Close the directory, or leave that to the call of `read` that is running: this never waits for a disk."""
        self._is_closing = True
        if self._in_use.acquire(blocking=False):
            try:
                if not self._is_closed:
                    self._is_closed = True
                    self._items.close()
                    os.close(self._descriptor)
            finally:
                self._in_use.release()

    def _entry_of(self, item: os.DirEntry[str]) -> Entry | None:
        """Return the entry for an item of the directory; None if it cannot be downloaded or listed."""
        name = item.name
        if not self._is_valid(name):
            return None
        try:
            status = item.stat(follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                if self._root.symlinks == "deny":
                    return None
                status = self._root.status(self._prefix + name)
        except (OSError, FileError):  # it has been removed, or the policy refuses the link
            return None
        mode = status.st_mode
        is_folder = stat.S_ISDIR(mode)
        if not (is_folder or stat.S_ISREG(mode)):
            return None
        needed, wish = (0o555, os.R_OK | os.X_OK) if is_folder else (0o444, os.R_OK)
        # most files are readable by everybody, so that the system need not be asked about this process
        if mode & needed != needed and not os.access(name, wish, dir_fd=self._descriptor):
            return None
        if is_folder:
            return Entry(name, True, None, _time_of(status))
        return Entry(name, False, status.st_size, _time_of(status), None, partial(metadata_of, status))


def _time_of(status: os.stat_result) -> datetime | None:
    try:
        return datetime.fromtimestamp(status.st_mtime, UTC)
    except (OverflowError, ValueError):  # some file systems have times after the year 9999
        return None
