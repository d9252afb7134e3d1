"""`SyncStorage`: a storage whose methods block, such as those of fsspec and Django."""

import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from types import SimpleNamespace
from typing import Any

from downloadview_async.errors import AccessDenied, DownloadError, FileMissing, SourceUnavailable, WrongType
from downloadview_async.http.dates import http_seconds
from downloadview_async.http.metadata import ETag, FileMetadata, is_telling, unsettled_seconds
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import pass_listing_on
from downloadview_async.sources.file_objects import Extent, OpenFileObject, close, closing_in_thread, extent_of
from downloadview_async.sources.listing import Entry
from downloadview_async.sources.names import canonical_folder
from downloadview_async.sources.workers import MID_TRANSFER, Slots, Workers

_BATCH = 100  # entries that one call of a worker gets
_TIMES = ("mtime", "LastModified", "last_modified", "modified")
"""The keys under which file systems of fsspec have the time of the last change."""


class SyncStorage:
    """Makes a storage out of any object with a blocking `open(name, "rb")`: fsspec file systems, Django's storages.

    The open file is read by `seek` and `read` in a worker thread, `CHUNK_SIZE` bytes at a time.
    The size comes from seeking to the end of the open file, else from `size(name)`, or for fsspec's file systems from
    the "size" of `info(name)`. If the file is longer than that, the transfer is aborted before its last bytes. A file
    that cannot seek has no ranges. Text has no size, because `size(name)` does not count the bytes that are sent.
    The time of the last change comes from `modified(name)` or `get_modified_time(name)`. A file with neither has no
    validators. A time in whole seconds makes a weak tag, as two versions may share a second. The time is read before
    and after `open`: if it differs, the file is opened once more, and if it differs again, there are no validators.
    The location comes from `path(name)`, else from `url(name)` if that is an absolute URL. There must be the same bytes
    as `open` gives. A class that overrides `open` and only inherits these methods is not trusted in this: a subclass
    that decrypts would have the encrypted bytes sent. So `path`, `url`, `size` and `info` are not called for it.
    `is_sent_as_stored = True` in a storage declares that the bytes are the same, False that they are not.
    It lists folders if the object has `listdir(path)`, as Django's storages have, or `ls(path, detail=True)`, as those
    of fsspec have: see `SupportsListing`.

    describes: whether the files that `listdir` lists get a size and a time, by one call of the storage for each. On a
    remote storage these are requests: then False may be the better choice.
    """

    def __init__(self, storage: Any, *, threads: int = 40, describes: bool = True) -> None:
        if not callable(getattr(storage, "open", None)) or hasattr(storage, "__fspath__") or isinstance(storage, type):
            raise WrongType(f"{storage!r} is not a storage: it has no method open(name, mode)")
        if hasattr(storage, "locate"):
            raise WrongType(f"{storage!r} is asynchronous already: write StorageSource(storage), without SyncStorage")
        self._storage = storage
        self._workers = Workers(threads)
        self._describes = describes
        if self._has("ls") or self._has("listdir"):
            pass_listing_on(self, SimpleNamespace(list=self._list))

    @property
    def slots(self) -> Slots:
        """The threads in which the storage is called."""
        return self._workers.slots

    @asynccontextmanager
    async def open(self, name: str, request: DownloadRequest = GET) -> AsyncIterator[OpenFileObject]:
        """Open the file in a worker thread, with its size and its time."""
        file, metadata, extent = await self._workers.run_or_abandon(
            self._open, name, discard=lambda opened: close(opened[0])
        )
        async with closing_in_thread(file) as in_use:
            yield OpenFileObject(file, metadata, extent, workers=self._workers, in_use=in_use)

    def _open(self, name: str) -> tuple[Any, FileMetadata, Extent]:
        with _as_file_errors(name):
            try:
                modified = self._modified(name)
            except Exception:  # `open` raises the better error, and else the time is read again
                modified = None
            return self._open_version(name, modified)

    def _open_version(
        self, name: str, modified: float | None, *, is_last: bool = False
    ) -> tuple[Any, FileMetadata, Extent]:
        """Open a file whose time was just `modified`, and open it once more if the time has changed meanwhile.

        If the time changes again, the metadata has no validators, and only a size that comes from the open file: the
        values of the storage may be those of another version.
        """
        if seconds := _unsettled(modified):
            time.sleep(seconds)  # then a further change shows in the time
        opened_ns = time.time_ns()
        file = self._storage.open(name, "rb")
        try:
            extent = extent_of(file)
            # 0 may be what has not been measured, and is known only of what has an end
            size = self._size(name) or None if extent.size is None and not extent.is_text else extent.size
            now_modified = self._modified(name)
            is_same = now_modified == modified
            metadata = _dated_metadata(size, modified, opened_ns) if is_same else FileMetadata(size=extent.size)
        except BaseException:
            close(file)
            raise
        if not is_same and not is_last:
            close(file)
            return self._open_version(name, now_modified, is_last=True)
        return file, replace(metadata, accept_ranges=extent.has_parts), extent

    async def locate(self, name: str) -> str | None:
        """Return the path or the absolute URL that the storage gives for `name`, or None."""
        return await self._workers.run_or_abandon(self._locate, name)

    def _locate(self, name: str) -> str | None:
        with _as_file_errors(name):
            if tells_of_what_it_opens(self._storage, "path") and (path := self._ask("path", name)):
                return str(os.path.abspath(path))
            url = self._ask("url", name) if tells_of_what_it_opens(self._storage, "url") else None
        return url if isinstance(url, str) and "://" in url else None

    def _size(self, name: str) -> int | None:
        """Return the number of bytes that `open` gives, from the storage, or None if the storage does not tell it."""
        if tells_of_what_it_opens(self._storage, "size"):
            size = self._ask("size", name)
        elif any(tells_of_what_it_opens(self._storage, method) for method in ("info", "_info")):
            info = self._ask("info", name)  # fsspec defines size() once for all file systems: it calls their info()
            size = info.get("size") if isinstance(info, Mapping) else None
        else:
            size = None
        return _size_of(size)

    def _modified(self, name: str) -> float | None:
        """Return the time of the last change in seconds since the epoch, or None if it is not known."""
        return _seconds_of(self._ask("modified", name) or self._ask("get_modified_time", name))

    async def _list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        """Yield the entries of a folder, which worker threads get from the storage: see `SupportsListing`."""
        folder = canonical_folder(folder, "exact")
        entries = self._files_of_info(folder) if self._has("ls") else self._files_of_names(folder)
        patience = None
        while batch := await self._workers.run_or_abandon(lambda: list(islice(entries, _BATCH)), patience=patience):
            patience = MID_TRANSFER
            for entry in batch:
                yield entry

    def _files_of_names(self, folder: str) -> Iterator[Entry]:
        """Yield the entries of a folder of a storage like Django's. Calls the storage between them."""
        with _as_file_errors(folder):
            try:
                folders, files = self._storage.listdir(folder)
            except (DownloadError, OSError):
                raise
            except Exception:  # Django's storage in memory raises an AttributeError
                if self._ask("exists", folder) is not False:
                    raise
                folders, files = [], []
            # a store of objects lists nothing for a folder that does not exist
            if folder and not (folders or files) and self._ask("exists", folder) is False:
                raise FileMissing(f"the storage has no folder {folder!r}")
        for name in folders:
            yield Entry(name, is_folder=True)
        for name in files:
            key = f"{folder}/{name}" if folder else name
            try:
                with _as_file_errors(key):
                    size, modified = (self._size(key), self._modified(key)) if self._describes else (None, None)
            except (FileMissing, AccessDenied):  # removed meanwhile, or a link that leads nowhere
                continue
            yield Entry(name, size=size, modified=_datetime_of(modified))

    def _files_of_info(self, folder: str) -> Iterator[Entry]:
        """Yield the entries of a folder of a file system like those of fsspec, which tells all of them at once."""
        with _as_file_errors(folder):
            if folder and self._ask("isdir", folder) is False:
                raise FileMissing(f"the file system has no folder {folder!r}")
            infos = self._storage.ls(folder, detail=True)
        for info in infos:
            path = str(info["name"]).rstrip("/")
            if path.strip("/") == folder:  # an empty object that stands for the folder
                continue
            if info.get("type") == "directory":
                yield Entry(path.rpartition("/")[2], is_folder=True)
            elif info.get("type") == "file":
                modified = next((info[key] for key in _TIMES if info.get(key) is not None), None)
                size = _size_of(info.get("size"))
                yield Entry(path.rpartition("/")[2], size=size, modified=_datetime_of(_seconds_of(modified)))

    def _has(self, method: str) -> bool:
        return callable(getattr(self._storage, method, None))

    def _ask(self, method: str, name: str) -> Any:
        """Return what a method of the storage returns for `name`, or None if the storage does not implement it."""
        function = getattr(self._storage, method, None)
        if not callable(function):
            return None
        try:
            return function(name)
        except NotImplementedError:
            return None


def tells_of_what_it_opens(storage: Any, method: str, *, opening: tuple[str, ...] = ("open", "_open")) -> bool:
    """Return whether a method of a storage tells about the bytes that its `open` gives.

    It does not if a class overrides how files are opened, but inherits the method.
    opening: the names of the methods or properties that open a file.
    """
    if isinstance(told := getattr(storage, "is_sent_as_stored", None), bool):
        return told
    # __class__: a lazy storage of Django has that of the real storage
    defined = [getattr(storage, "__dict__", {}), *(vars(base) for base in storage.__class__.__mro__)]
    opens = next((index for index, names in enumerate(defined) if any(name in names for name in opening)), None)
    defining = [index for index, names in enumerate(defined) if method in names]
    return opens in defining or (opens is not None and bool(defining) and max(defining) < opens)


def _size_of(size: Any) -> int | None:
    return None if size is None or int(size) < 0 else int(size)


def _seconds_of(modified: Any) -> float | None:
    """Return a time of a storage in seconds since the epoch, or None if it is none."""
    if isinstance(modified, datetime):
        return (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp()
    try:
        seconds = float(modified)
    except (TypeError, ValueError, OverflowError):  # some drivers report what their server has sent
        return None
    return seconds if math.isfinite(seconds) else None


def _datetime_of(seconds: float | None) -> datetime | None:
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OSError, OverflowError, ValueError):
        return None


def _unsettled(modified: float | None) -> float:
    return 0.0 if modified is None else unsettled_seconds(int(modified * 1_000_000) * 1000, time.time_ns())


def _dated_metadata(size: int | None, modified: float | None, opened_ns: int) -> FileMetadata:
    if modified is None or size is None or _unsettled(modified):
        return FileMetadata(size=size)
    is_coarse = modified.is_integer()
    # a change after opening must show in the time, even if much time has passed since
    if not is_telling(int(modified * 1_000_000) * 1000, opened_ns, is_coarse=is_coarse):
        return FileMetadata(size=size)
    etag = ETag(f"{int(modified * 1_000_000):x}-{size:x}", weak=is_coarse)
    return FileMetadata(size=size, etag=etag, last_modified=http_seconds(modified))


@contextmanager
def _as_file_errors(name: str) -> Iterator[None]:
    try:
        yield
    except DownloadError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError) as exc:
        # FileExistsError: Django's storage in memory raises it for a name below that of a file
        raise FileMissing(f"the storage has no {name!r}: {exc}") from exc
    except PermissionError as exc:
        raise AccessDenied(f"the storage denies {name!r}: {exc}") from exc
    except Exception as exc:  # storages raise errors of any class
        raise SourceUnavailable(f"the storage failed on {name!r}: {type(exc).__name__}: {exc}") from exc
