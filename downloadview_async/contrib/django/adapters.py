"""Adapts Django's files to this library: which bytes a file has, where they are, and how they are read."""

import io
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from django.core.exceptions import SuspiciousOperation
from django.core.files import base
from django.core.files.storage import FileSystemStorage
from django.db.models.fields.files import FieldFile
from django.utils.functional import LazyObject
from django.utils.timezone import is_naive, make_aware

from downloadview_async.contrib.django.s3 import streamed
from downloadview_async.errors import ConfigurationError, FileMissing, UpstreamError
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import AsyncFile, OpenFile
from downloadview_async.sources.file_objects import READS, close, home_of, is_read_by, reads_a_descriptor
from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.path import LocalFile, PathSource
from downloadview_async.sources.local.root import Symlinks, file_error, settled_stat
from downloadview_async.sources.names import canonical_name
from downloadview_async.sources.remote.client import Upstream
from downloadview_async.sources.remote.source import RemoteFile
from downloadview_async.sources.storage import StorageFile as AsyncStorageFile
from downloadview_async.sources.sync_storage import SyncStorage, tells_of_what_it_opens
from downloadview_async.sources.virtual import VirtualFile as AsyncVirtualFile
from downloadview_async.sources.workers import Workers

if TYPE_CHECKING:
    File = base.File[bytes]  # only the stubs have it generic
else:
    File = base.File

_KEPT = 64  # directories and storages
_KNOWN_STORAGES = ("django.core.files.storage.", "django.contrib.staticfiles.storage.", "storages.backends.")
_WAYS_OF_ITERATING = ("open", "chunks", "__iter__")
OURS = ("django.", "downloadview_async.")
_SEEKS_AS_IT_READS = (*OURS, "_io.", "io.", "tempfile.", "storages.backends.")
_MAX_WRAPPERS = 4
_workers = Workers()

STORED: list[Any] = [FieldFile]
"""The classes of files that are in a storage. `StorageFile` adds itself."""


class FileOfURL:
    """A remote file with a separate HTTP client, because an event loop of Django may end with the request."""

    def __init__(self, url: str, name: str, headers: dict[str, str], allow_hosts: tuple[str, ...]) -> None:
        self.name = name or unquote(urlsplit(url).path).rpartition("/")[2]
        self.location: str | None = url
        self._url = url
        self._headers = headers
        self._allow_hosts = allow_hosts

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Fetch the file."""
        host = urlsplit(self._url).hostname
        if host is None:
            raise ConfigurationError(f"{self._url!r} is not the http or https URL of a server")
        async with (
            Upstream(host, allow_hosts=self._allow_hosts, headers=self._headers) as upstream,
            RemoteFile(self._url, upstream=upstream, name=self.name).open(request) as opened,
        ):
            yield opened


class FetchedFile:
    """A remote file that a function of the project fetches."""

    location: str | None = None

    def __init__(self, file: Any) -> None:
        self._file = file
        self.name = file.name or ""

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Fetch the file in a worker thread."""
        response = await _workers.run(lambda: self._file.request)
        if (status := getattr(response, "status_code", 200)) != 200:
            raise (FileMissing if status in (404, 410) else UpstreamError)(f"{self._file.url!r} answered {status}")
        # a subclass that overrides `file` and inherits `size` does not know the size of its content
        is_size_known = "Content-Encoding" not in response.headers and tells_of_what_it_opens(
            self._file, "size", opening=("file", *READS)
        )
        content = AsyncVirtualFile(
            self._file.file if is_read_as_django_does(self._file) else _content_of(self._file),
            name=self.name,
            size=getattr(self._file, "size", None) if is_size_known else None,
            content_type=valid_content_type(getattr(self._file, "content_type", None)),
        )
        try:
            async with content.open(request) as opened:
                yield opened
        finally:
            await _workers.run(close, self._file)


class _OpenedElsewhere:
    """A file that the project has already opened. It is sent by its descriptor, from the first byte on.

    is_lasting: whether the file stays at its path when it is closed.
    """

    def __init__(self, file: Any, name: str, *, is_lasting: bool) -> None:
        self.name = os.path.basename(name)
        self._file = file
        self.location = name if is_lasting and self._is_at(name) else None

    def _is_at(self, path: str) -> bool:
        """Return whether the path leads to the open file, so that a proxy would send the same file."""
        try:
            return os.path.isabs(path) and os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))
        except (OSError, ValueError):
            return False

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenLocalFile]:
        """Duplicate the descriptor. The project closes the file that it has opened."""
        if self._file.closed:
            raise FileMissing(f"{self.name!r} is closed")
        try:
            descriptor = os.dup(self._file.fileno())
        except OSError as exc:
            raise file_error(exc) from exc
        try:
            status = await _workers.run(settled_stat, descriptor)
        except OSError as exc:
            os.close(descriptor)
            raise file_error(exc) from exc
        except BaseException:
            os.close(descriptor)
            raise
        file = OpenLocalFile(descriptor, status, False, workers=_workers)
        try:
            yield file
        finally:
            await file.aclose()


def async_file_of(file: Any, name: str = "") -> AsyncFile:
    """Return a Django file as an `AsyncFile`. A local file is opened like the files of this library.

    file: a FieldFile, a StorageFile, any `File`, file object or iterable of bytes or text, or an `AsyncFile`.
    name: the name of a file that has none.
    """
    if (async_file := getattr(file, "async_file", None)) is not None:
        return async_file  # type: ignore[no-any-return]
    if hasattr(file, "location") and hasattr(file, "open"):
        return file  # type: ignore[no-any-return]
    is_file = isinstance(file, base.File)
    own_name = name_of(file)
    name = own_name or name
    if _is_of_storage(file) and not is_stored(file):
        return AsyncVirtualFile(iter(file), name=os.path.basename(name))
    if is_file and not is_read_as_django_does(file):
        return read_in_its_own_way(file, name)
    if is_file and hasattr(file, "storage") and getattr(file, "_committed", True) and not _has_another_file(file):
        return _stored_file(file.storage, own_name)
    raw: Any = file.file if is_file else file
    if _is_on_disk(raw):
        return _OpenedElsewhere(raw, name, is_lasting=is_left_by_closing(raw))
    return read_in_its_own_way(raw, name)


def name_of(file: Any) -> str:
    """Return the name of a file, or "" if it has none: a file without a path has the number of its descriptor."""
    name = getattr(file, "name", None)
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ""


def _is_of_storage(file: Any) -> bool:
    return isinstance(file, tuple(STORED))


def is_stored(file: Any) -> bool:
    """Return whether a file is a `FieldFile` or `StorageFile` that overrides none of the methods that read it."""
    known = next((kind for kind in STORED if isinstance(file, kind)), FieldFile)
    return (
        isinstance(file, known)
        and is_read_as_django_does(file)
        and all(
            getattr(type(file), method) is getattr(known, method)
            for method in ("open", "chunks", "__iter__", "read", "file")
        )
        and home_of(file, "_opened") in ("", f"{known.__module__}.")
    )


def is_sent_as_stored(file: Any) -> bool:
    """Return whether a file has the same bytes as the file at its path or URL.

    False where a class outside Django overrides how a `File` is read, and where the project has given a file of a
    storage another `file`. Otherwise only files of storages are examined; the answer is True for others.

    That is known for the storages of Django and django-storages, unless a subclass overrides how files are opened. Any
    other storage tells it by its attribute `is_sent_as_stored`: a storage that decrypts or decompresses sends other
    bytes than it stores.
    """
    if isinstance(file, base.File) and not is_read_as_django_does(file):
        return False
    if not hasattr(file, "storage"):
        return True
    if _is_of_storage(file) and (not is_stored(file) or _has_another_file(file)):
        return False
    told = told_of(file.storage)
    return opens_as_stored(file.storage) if told is None else told


def _has_another_file(file: Any) -> bool:
    """Return whether the project has given a file of a storage another `file`, such as a wrapper that decrypts.

    The file that the storage has opened is known by its class, or by its path on a disk. A file of another class counts
    as another one, even if the storage has opened it: then its own bytes are sent.
    """
    opened = vars(file).get("_file", vars(file).get("file"))
    if opened is None:
        return False
    storage, name = unwrapped(file.storage), str(file.name)
    module = f"{type(opened).__module__}."
    if module.startswith(_KNOWN_STORAGES) and module == home_of(storage, "_open"):
        told, full = f"/{getattr(opened, 'name', None) or name}", f"/{name}"
        is_same = told.endswith(full) or full.endswith(told)  # one of them may be within a directory of the storage
        return not is_same or getattr(opened, "_storage", storage) is not storage
    try:
        return not was_opened_at(opened, storage.path(name))
    except (NotImplementedError, SuspiciousOperation, ValueError):
        return True


def was_opened_at(file: Any, path: str) -> bool:
    """Return whether a file object reads the very bytes of the file that was opened at a path."""
    raw: Any = file.file if isinstance(file, base.File) and is_read_as_django_does(file) else file
    return reads_a_descriptor(raw) and raw.name == path


def told_of(storage: Any) -> bool | None:
    """Return the attribute `is_sent_as_stored` of a storage, or None if it has none."""
    told = getattr(unwrapped(storage), "is_sent_as_stored", None)
    return told if isinstance(told, bool) else None


def opens_as_stored(storage: Any) -> bool:
    """Return whether a storage is known to open files as they are stored."""
    storage = unwrapped(storage)
    # with `gzip`, django-storages decompresses objects when it reads them
    return not getattr(storage, "gzip", False) and all(
        home_of(storage, method).startswith(_KNOWN_STORAGES) for method in ("open", "_open")
    )


def is_left_by_closing(closed: Any) -> bool:
    """Return whether a file or a response has no `close` of the project, which might delete the file."""
    return home_of(closed, "close").startswith(("_io.", "io.", *OURS)) or not hasattr(closed, "close")


def _is_on_disk(file: Any) -> bool:
    """Return whether a file object reads the very bytes of a regular file.

    Django's and `tempfile`'s wrappers are looked through. A class that overrides reading ends the search with False.
    """
    for _ in range(_MAX_WRAPPERS):
        if reads_a_descriptor(file):
            return bool(file.closed or stat.S_ISREG(os.fstat(file.fileno()).st_mode))  # a device has the size 0
        is_temporary = home_of(file, "__getattr__") == "tempfile."
        if not (is_temporary or isinstance(file, base.File)) or not is_read_by(file, (*OURS, "tempfile.")):
            return False
        file = file.file
    return False


def is_read_as_django_does(file: Any) -> bool:
    """Return whether reading a `File` reads its `file`, because no class outside Django overrides that."""
    return is_read_by(file, OURS)


def read_in_its_own_way(file: Any, name: str, size: int | None = None) -> AsyncFile:
    """Return a file whose content is what the file object's `read` returns. size: bytes, where known."""
    return AsyncVirtualFile(_content_of(file), name=os.path.basename(name), size=size)


def _content_of(file: Any) -> Any:
    """Return the content to send for a file object, or for anything else that `VirtualFile` accepts."""
    if isinstance(file, base.File) and any(not home_of(file, way).startswith(OURS) for way in _WAYS_OF_ITERATING):
        return iter(file)
    return file if _seeks_in_what_it_reads(file) else _ReadThrough(file)


def _seeks_in_what_it_reads(file: Any) -> bool:
    """Return whether the positions of a file object may be those of what it reads.

    They are not where a class overrides `read`, and has `seek` from Django or Python: that goes to a place in the
    stored bytes, and there may be more or fewer of them.
    """
    if isinstance(file, io.BufferedReader | io.BufferedRandom) and not _seeks_in_what_it_reads(file.raw):
        return False
    reads = [home for method in READS if (home := home_of(file, method))]
    if all(home.startswith(_SEEKS_AS_IT_READS) for home in reads):
        return True
    seeks = home_of(file, "seek")
    return bool(seeks) and not seeks.startswith(_SEEKS_AS_IT_READS)


class _ReadThrough:
    """A file object without its positions: what it reads, from its beginning on."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._has_begun = False

    @property
    def closed(self) -> bool:
        """Whether nothing is open."""
        return getattr(self._file, "closed", False) is True

    def read(self, size: int) -> Any:
        """Return what comes next. Nothing is read for 0 bytes: the end of what it wraps may change what reads it."""
        if not self._has_begun:
            self._has_begun = True
            with suppress(AttributeError, io.UnsupportedOperation):  # as Django's `chunks` does
                self._file.seek(0)
        return self._file.read(size) if size else b""

    def close(self) -> None:
        """Close the file object."""
        close(self._file)


def _stored_file(storage: Any, name: str) -> AsyncFile:
    storage = unwrapped(storage)
    if _is_plain_directory(storage):
        try:
            return file_beneath(storage.location, name, symlinks="follow")  # as Django does
        except FileMissing:
            pass  # a name that is invalid on other systems may exist on this disk
        try:
            return LocalFile(storage.path(name))
        except (SuspiciousOperation, ValueError) as exc:
            raise FileMissing(str(exc)) from exc
    try:
        kept = _sync_storage(storage)
    except TypeError:  # the storage is not hashable
        kept = SyncStorage(_Storage(storage))
    return AsyncStorageFile(kept, name, location=_vouched_path(storage, name))


def _vouched_path(storage: Any, name: str) -> str | None:
    """Return the path of a file if its storage overrides how files are opened, but promises `is_sent_as_stored`."""
    if not told_of(storage):
        return None
    try:
        return os.path.abspath(str(storage.path(name)))
    except (NotImplementedError, SuspiciousOperation, ValueError):
        return None


def file_beneath(root: str | os.PathLike[str], name: str, *, symlinks: Symlinks = "inside") -> AsyncFile:
    """Return a file beneath a directory. Raises `FileMissing` if there is no such directory, and for an invalid name.

    The directory stays open for later calls, as long as its path leads to it: a deployment may replace it.
    """
    name = canonical_name(name)
    try:
        source = _directory(os.fspath(root), symlinks)
        if not os.path.samestat(os.fstat(source.root.descriptor), os.stat(root)):
            _directory.cache_clear()
            source = _directory(os.fspath(root), symlinks)
    except (ConfigurationError, OSError) as exc:
        raise FileMissing(str(exc)) from exc
    return source.file(name)


@lru_cache(maxsize=_KEPT)
def _directory(root: str, symlinks: Symlinks) -> PathSource:
    return PathSource(root, symlinks=symlinks)


@lru_cache(maxsize=_KEPT)
def _sync_storage(storage: Any) -> SyncStorage:
    return SyncStorage(_Storage(storage))


def unwrapped(storage: Any) -> Any:
    """Return the storage behind a lazy one, such as `default_storage`."""
    while issubclass(type(storage), LazyObject):
        storage.__class__  # noqa: B018 - makes it load the storage
        storage = storage._wrapped  # noqa: SLF001
    return storage


def _is_plain_directory(storage: Any) -> bool:
    """Return whether a storage opens the file at its path, as Django's does."""
    return isinstance(storage, FileSystemStorage) and all(
        getattr(type(storage), method) is getattr(FileSystemStorage, method) and method not in vars(storage)
        for method in ("open", "_open", "path")
    )


class _Storage:
    """Adapts a Django storage to `SyncStorage`."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def open(self, name: str, mode: str) -> Any:
        try:
            return streamed(self._storage.open(name, mode))
        except SuspiciousOperation as exc:
            raise FileNotFoundError(str(exc)) from exc

    def size(self, name: str) -> Any:
        if not tells_of_what_it_opens(self._storage, "size"):
            raise NotImplementedError
        return self._storage.size(name)

    def get_modified_time(self, name: str) -> datetime | None:
        time: datetime = self._storage.get_modified_time(name)
        return make_aware(time) if is_naive(time) else time  # without USE_TZ, it is in the project's time zone
