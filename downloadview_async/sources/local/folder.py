"""Lists a directory beneath a root: `list_folder` yields its entries, which worker threads read in batches.

Only the files are left in that `Root.open` would open, as far as their status tells, and only the folders that can be
listed in turn. A link counts as what it leads to, where the policy follows it.
"""

import os
import stat
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, closing
from datetime import UTC, datetime
from functools import cache, partial
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from downloadview_async.errors import AccessDenied, FileError, FileMissing
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.listing import DescribedEntry, Entry, Version
from downloadview_async.sources.local.open_file import metadata_of, version_of
from downloadview_async.sources.local.root import Root, Validators, close_unwritten, file_error
from downloadview_async.sources.names import canonical_folder, entries_check, entry_check
from downloadview_async.sources.workers import LISTING, MID_TRANSFER, OPENING, Workers

BATCH = 250
"""Entries that one call of a worker reads with their sizes and times.

It takes about a millisecond.
"""

NAMES = 1000
"""Entries that one call of a worker reads by their names, which takes as long."""

_entry = partial(tuple.__new__, Entry)  # takes half the time of `Entry(...)`
_READABLE = 0o444  # by everybody
_KIND_AND_READABLE = 0o170_000 | _READABLE
_READABLE_FILE = stat.S_IFREG | _READABLE
_FIRST_SECOND = int(datetime(1, 1, 1, tzinfo=UTC).timestamp())
_LAST_SECOND = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())
T = TypeVar("T")


async def list_folder(root: Root, folder: str, workers: Workers) -> AsyncIterator[Entry]:
    """Yield the entries of a folder beneath a root: see `SupportsListing`. Only one batch is in memory."""
    async with aclosing(_batches(root, folder, workers, FolderReader.read_described)) as batches:
        async for batch in batches:
            for entry in batch:
                yield entry


async def list_versions(root: Root, folder: str, workers: Workers) -> AsyncIterator[list[Version]]:
    """Yield the entries of a folder beneath a root in batches, for an archive: see `HasManyFiles`."""
    async with aclosing(_batches(root, folder, workers, FolderReader.read_versions)) as batches:
        async for batch in batches:
            yield batch


async def list_batches(
    root: Root, folder: str, workers: Workers, *, described: int | None = None
) -> AsyncIterator[list[Entry]]:
    """Yield the entries of a folder beneath a root in batches: see `ListsBatches`."""
    count = 0

    def read(reader: FolderReader) -> list[Entry] | None:
        return reader.read_names() if described is not None and count >= described else reader.read()

    async with aclosing(_batches(root, folder, workers, read)) as batches:
        async for batch in batches:
            yield batch
            count += len(batch)


async def _batches(
    root: Root, folder: str, workers: Workers, read: "Callable[[FolderReader], list[T] | None]"
) -> AsyncGenerator[list[T], None]:
    """Yield what a function reads, until the end of the folder. A small folder takes one call of a worker."""

    def begin() -> tuple[FolderReader, list[T] | None]:
        reader = FolderReader(root, folder)
        try:
            return reader, read(reader)
        except BaseException:
            reader.close()
            raise

    reader, batch = await workers.run_or_abandon(begin, discard=lambda begun: begun[0].close(), longest=LISTING)
    try:
        while batch is not None:
            yield batch
            if reader.has_ended:
                return
            batch = await workers.run_or_abandon(read, reader, patience=MID_TRANSFER)
    finally:
        reader.close()


async def describe_entries(root: Root, folder: str, names: Sequence[str], workers: Workers) -> list[Entry]:
    """Return the entries of a folder with these names, in this order, without those that do not exist any more."""

    def described() -> list[Entry]:
        with closing(FolderReader(root, folder)) as reader:
            return reader.describe(names)

    return await workers.run_or_abandon(described, longest=LISTING)


async def folder_identity(root: Root, folder: str, workers: Workers) -> tuple[int, int] | None:
    """Return what identifies a folder beneath a root: see `IdentifiesFolders`."""
    if root.symlinks == "deny":
        return None

    def identity() -> tuple[int, int]:
        name = canonical_folder(folder, root.names)
        try:
            status = root.status(name) if name else os.fstat(root.descriptor)
        except OSError as exc:
            raise file_error(exc) from exc
        return status.st_dev, status.st_ino

    return await workers.run_or_abandon(identity, longest=OPENING)


class FolderReader:
    """An open directory beneath a root, which is read batch by batch. Opening and reading it may block on a disk.

    Raises `FileMissing`, `AccessDenied` or `SourceUnavailable`.
    """

    def __init__(self, root: Root, folder: str) -> None:
        name = canonical_folder(folder, root.names)
        self._root = root
        self._prefix = f"{name}/" if name else ""
        self._is_valid = entry_check(name, root.names)
        self._are_valid = entries_check(name, root.names)
        self._descriptor = root.open_folder(name)
        try:
            self._items = os.scandir(self._descriptor)  # it reads a duplicate of the descriptor
        except OSError as exc:
            close_unwritten(self._descriptor)
            raise file_error(exc) from exc
        self.has_ended = False
        """Whether the last call of a method that reads has got the last items."""
        self._in_use = threading.Lock()
        self._is_closing = self._is_closed = False

    def read(self) -> list[Entry] | None:
        """Return the entries among the next `BATCH` items of the directory; None at its end."""
        return self._read(partial(self._described, _LISTED), BATCH)

    def read_described(self) -> list[Entry] | None:
        """Return what `read` does; files are `DescribedEntry` objects."""
        return self._read(partial(self._described, _described(self._root.validators)), BATCH)

    def read_versions(self) -> list[Version] | None:
        """Return what `read` does, for an archive."""
        return self._read(partial(self._described, _versions(self._root.validators)), BATCH)

    def read_names(self) -> list[Entry] | None:
        """Return what `read` does, without sizes and times, and without asking whether a file can be read."""
        return self._read(self._named, NAMES)

    def describe(self, names: Sequence[str]) -> list[Entry]:
        """Return the entries with these names that exist, with sizes and times."""
        entries = (self._entry(name, None, _LISTED) for name in names if self._is_valid(name))
        return [entry for entry in entries if entry is not None]

    def _read(self, entries_of: Callable[[list[os.DirEntry[str]]], list[T]], count: int) -> list[T] | None:
        with self._in_use:
            try:
                items = [] if self._is_closing else list(islice(self._items, count))
                self.has_ended = len(items) < count
                if items and not self._are_valid([item.name for item in items]):
                    entries = entries_of([item for item in items if self._is_valid(item.name)])
                else:
                    entries = entries_of(items)
            except OSError as exc:
                raise file_error(exc) from exc
        if self._is_closing:
            self.close()
        return entries if items else None

    def _described(self, makes: "_Makes[T]", items: list[os.DirEntry[str]]) -> list[T]:
        entries: list[T] = []
        for item in items:
            name = item.name
            try:
                status = item.stat(follow_symlinks=False)
            except OSError as exc:
                if not _is_gone(exc):
                    entries.append(makes.unknown(name, item.is_dir(follow_symlinks=False)))
                continue
            if status.st_mode & _KIND_AND_READABLE == _READABLE_FILE:
                entries.append(makes.file(name, status))
            elif (entry := self._entry(name, status, makes)) is not None:
                entries.append(entry)
        return entries

    def _named(self, items: list[os.DirEntry[str]]) -> list[Entry]:
        entries: list[Entry] = []
        for item in items:
            if item.is_file(follow_symlinks=False):
                entries.append(_entry((item.name, False, None, None, None)))
            elif (entry := self._entry(item.name, None, _LISTED)) is not None:
                entries.append(Entry(item.name, entry.is_folder))
        return entries

    def close(self) -> None:
        """Close the directory, or leave that to the call of `read` that is running: this never waits for a disk."""
        self._is_closing = True
        if self._in_use.acquire(blocking=False):
            try:
                if not self._is_closed:
                    self._is_closed = True
                    self._items.close()
                    close_unwritten(self._descriptor)
            finally:
                self._in_use.release()

    def _entry(self, name: str, status: os.stat_result | None, makes: "_Makes[T]") -> T | None:
        """Return the entry with a valid name; None if it cannot be downloaded or listed.

        status: of the item itself, not of what it links to, if that is known. makes: makes the entry.
        """
        try:
            if status is None:
                status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                if self._root.symlinks == "deny":
                    return None
                status = self._root.status(self._prefix + name)
        except (OSError, FileError) as exc:
            return None if _is_gone(exc) else makes.unknown(name, False)
        is_folder = stat.S_ISDIR(status.st_mode)
        if not (is_folder or stat.S_ISREG(status.st_mode)):
            return None
        readable, access = (0o555, os.R_OK | os.X_OK) if is_folder else (_READABLE, os.R_OK)
        # most are readable by everybody, and then the system need not be asked about this process
        if status.st_mode & readable != readable and not os.access(name, access, dir_fd=self._descriptor):
            return None
        return (makes.folder if is_folder else makes.file)(name, status)


class _Makes(NamedTuple, Generic[T]):
    """The functions that make an entry of a name and a status.

    unknown: makes one of a name, and of whether it is a folder, for an entry that the disk fails to describe. It must
    not be left out: an archive would lack it without a sign. Opening it raises the error.
    """

    file: Callable[[str, os.stat_result], T]
    folder: Callable[[str, os.stat_result], T]
    unknown: Callable[[str, bool], T]


def _is_gone(exc: OSError | FileError) -> bool:
    """Return whether an entry has been removed, or the policy for links or the system refuses it."""
    return isinstance(file_error(exc) if isinstance(exc, OSError) else exc, FileMissing | AccessDenied)


def _folder(name: str, status: os.stat_result) -> Entry:
    return Entry(name, True, None, _time_of(status))


def _file(name: str, status: os.stat_result) -> Entry:
    return _entry((name, False, status.st_size, _time_of(status), None))


def _version_of_folder(name: str, status: os.stat_result) -> Version:
    return name, True, None, _seconds_of(status), None


def _unknown_version(name: str, is_folder: bool) -> Version:
    return name, is_folder, None, None, None


class _LocalFileEntry(DescribedEntry):
    """The entry of a file with a status."""

    status: os.stat_result
    validators: Validators

    def describe(self) -> FileMetadata:
        return metadata_of(self.status, self.validators)

    def identity(self) -> tuple[int | None, str]:
        return self.status.st_size, version_of(self.status, self.validators)


_LISTED = _Makes[Entry](_file, _folder, Entry)


@cache
def _described(validators: Validators) -> _Makes[Entry]:
    def file(name: str, status: os.stat_result) -> Entry:
        entry = _LocalFileEntry(name, False, status.st_size, _time_of(status))
        entry.status, entry.validators = status, validators
        return entry

    return _Makes[Entry](file, _folder, Entry)


@cache
def _versions(validators: Validators) -> _Makes[Version]:
    def version(name: str, status: os.stat_result) -> Version:
        return name, False, status.st_size, _seconds_of(status), version_of(status, validators)

    return _Makes[Version](version, _version_of_folder, _unknown_version)


def _seconds_of(status: os.stat_result) -> int | None:
    """Return the time of `_time_of` in seconds since the epoch, UTC."""
    seconds = status.st_mtime_ns // 1_000_000_000
    return seconds if _FIRST_SECOND <= seconds <= _LAST_SECOND else None


def _time_of(status: os.stat_result) -> datetime | None:
    try:
        return datetime.fromtimestamp(status.st_mtime, UTC)
    except (OSError, OverflowError, ValueError):  # some file systems have times after the year 9999
        return None
