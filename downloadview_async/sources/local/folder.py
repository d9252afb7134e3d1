"""Lists a directory beneath a root: `list_folder` yields its entries in batches, which worker threads read.

Only the files are left in that `Root.open` would open, as far as their status tells, and only the folders that can be
listed in turn. A link counts as what it leads to, where the policy follows it.
"""

import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import islice

from downloadview_async.errors import FileError
from downloadview_async.sources.listing import DescribedEntry, Entry
from downloadview_async.sources.local.open_file import metadata_of
from downloadview_async.sources.local.root import Root, file_error
from downloadview_async.sources.names import canonical_folder, entry_check
from downloadview_async.sources.workers import MID_TRANSFER, Workers

BATCH = 500
"""Entries that one call of a worker reads: it takes some milliseconds, and others run in between."""

_READABLE = 0o444  # by everybody
_KIND_AND_READABLE = 0o170_000 | _READABLE
_READABLE_FILE = stat.S_IFREG | _READABLE


async def list_folder(root: Root, folder: str, workers: Workers, *, only_names: bool = False) -> AsyncIterator[Entry]:
    """Yield the entries of a folder beneath a root: see `SupportsListing`. Only one batch is in memory.

    only_names: whether entries have neither a size nor a time, and files that cannot be read are yielded, too.
    """
    reader = await workers.run_or_abandon(FolderReader, root, folder, discard=FolderReader.close)
    read = reader.read_names if only_names else reader.read
    try:
        while (batch := await workers.run_or_abandon(read, patience=MID_TRANSFER)) is not None:
            for entry in batch:
                yield entry
    finally:
        reader.close()


async def describe_entries(root: Root, folder: str, names: Sequence[str], workers: Workers) -> list[Entry]:
    """Return the entries of a folder with these names, in this order, without those that do not exist any more."""

    def described() -> list[Entry]:
        with closing(FolderReader(root, folder)) as reader:
            return reader.describe(names)

    return await workers.run_or_abandon(described)


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
        return self._read(self._described)

    def read_names(self) -> list[Entry] | None:
        """Return what `read` does, without sizes and times, and without asking whether a file can be read."""
        return self._read(self._named)

    def describe(self, names: Sequence[str]) -> list[Entry]:
        """Return the entries with these names that exist, with sizes and times."""
        entries = (self._entry(name) for name in names if self._is_valid(name))
        return [entry for entry in entries if entry is not None]

    def _read(self, entries_of: Callable[[list[os.DirEntry[str]]], list[Entry]]) -> list[Entry] | None:
        with self._in_use:
            try:
                items = [] if self._is_closing else list(islice(self._items, BATCH))
            except OSError as exc:
                raise file_error(exc) from exc
            entries = entries_of(items)
        if self._is_closing:
            self.close()
        return entries if items else None

    def _described(self, items: list[os.DirEntry[str]]) -> list[Entry]:
        entries: list[Entry] = []
        is_valid = self._is_valid
        for item in items:
            name = item.name
            if not is_valid(name):
                continue
            try:
                status = item.stat(follow_symlinks=False)
            except OSError:  # it has been removed
                continue
            if status.st_mode & _KIND_AND_READABLE == _READABLE_FILE:
                entries.append(_file(name, status))
            elif (entry := self._entry(name, status)) is not None:
                entries.append(entry)
        return entries

    def _named(self, items: list[os.DirEntry[str]]) -> list[Entry]:
        entries: list[Entry] = []
        is_valid = self._is_valid
        for item in items:
            name = item.name
            if not is_valid(name):
                continue
            if item.is_file(follow_symlinks=False):
                entries.append(Entry(name))
            elif (entry := self._entry(name)) is not None:
                entries.append(Entry(name, entry.is_folder))
        return entries

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

    def _entry(self, name: str, status: os.stat_result | None = None) -> Entry | None:
        """Return the entry with a valid name; None if it cannot be downloaded or listed.

        status: of the item itself, not of what it links to, if that is known.
        """
        try:
            if status is None:
                status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                if self._root.symlinks == "deny":
                    return None
                status = self._root.status(self._prefix + name)
        except (OSError, FileError):  # it has been removed, or the policy refuses the link
            return None
        is_folder = stat.S_ISDIR(status.st_mode)
        if not (is_folder or stat.S_ISREG(status.st_mode)):
            return None
        readable, access = (0o555, os.R_OK | os.X_OK) if is_folder else (_READABLE, os.R_OK)
        # most are readable by everybody, and then the system need not be asked about this process
        if status.st_mode & readable != readable and not os.access(name, access, dir_fd=self._descriptor):
            return None
        if is_folder:
            return Entry(name, True, None, _time_of(status))
        return _file(name, status)


def _file(name: str, status: os.stat_result) -> Entry:
    entry = Entry(name, False, status.st_size, _time_of(status))
    return DescribedEntry.of(entry, partial(metadata_of, status))


def _time_of(status: os.stat_result) -> datetime | None:
    try:
        return datetime.fromtimestamp(status.st_mtime, UTC)
    except (OSError, OverflowError, ValueError):  # some file systems have times after the year 9999
        return None
