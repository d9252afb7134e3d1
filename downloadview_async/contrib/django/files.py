"""Adapts Django's files to this library, and has the file wrappers of django-downloadview."""

import io
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured, SuspiciousOperation
from django.core.files import base
from django.core.files.storage import FileSystemStorage
from django.db.models.fields.files import FieldFile
from django.utils.encoding import force_bytes, force_str
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
from downloadview_async.sources.local.root import Symlinks, settled_stat
from downloadview_async.sources.names import canonical_name
from downloadview_async.sources.remote.client import Upstream
from downloadview_async.sources.remote.source import RemoteFile
from downloadview_async.sources.storage import StorageFile as AsyncStorageFile
from downloadview_async.sources.storage import SyncStorage, tells_of_what_it_opens
from downloadview_async.sources.virtual import VirtualFile as AsyncVirtualFile
from downloadview_async.sources.workers import Workers

if TYPE_CHECKING:
    File = base.File[bytes]  # only the stubs have it generic
else:
    File = base.File

_KEPT = 64  # directories and storages
_KNOWN_STORAGES = ("django.core.files.storage.", "django.contrib.staticfiles.storage.", "storages.backends.")
_WAYS_OF_ITERATING = ("open", "chunks", "__iter__")
_OURS = ("django.", "downloadview_async.")
_SEEKS_AS_IT_READS = (*_OURS, "_io.", "io.", "tempfile.", "storages.backends.")
_MAX_WRAPPERS = 4
_workers = Workers()


class FileNotFound(OSError):
    """There is no such file. A view whose `get_file` raises this answers 404."""


class _IteratorIO:
    """Shared by `TextIteratorIO` and `BytesIteratorIO`: reads from an iterator, and consumes no more than needed."""

    _empty: Any
    _newline: Any
    _convert: Callable[[Any], Any]

    def __init__(self, iterator: Iterable[Any]) -> None:
        self._iterator = iter(iterator)
        self._left = self._empty

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return False: an iterator cannot go back."""
        return False

    def close(self) -> None:
        """Close the file and its iterator. A generator ends at its current `yield`."""
        if (close := getattr(self._iterator, "close", None)) is not None:
            close()
        super().close()  # type: ignore[misc]

    def read(self, size: int | None = None, /) -> Any:
        """Return `size` bytes or characters, fewer only at the end. Without a size, return the rest."""
        pieces, wanted = [], -1 if size is None or size < 0 else size
        while wanted and self._fill():
            piece = self._left if wanted < 0 else self._left[:wanted]
            pieces.append(piece)
            self._left = self._left[len(piece) :]
            wanted = wanted if wanted < 0 else wanted - len(piece)
        return self._empty.join(pieces)

    def readline(self, size: int | None = None, /) -> Any:
        """Return the next line with its line end, which the last line may lack: at most `size` bytes or characters."""
        pieces, wanted = [], -1 if size is None or size < 0 else size
        while wanted and self._fill():
            end = self._left.find(self._newline) + 1 or len(self._left)
            piece = self._left[: end if wanted < 0 else min(end, wanted)]
            pieces.append(piece)
            self._left = self._left[len(piece) :]
            wanted = wanted if wanted < 0 else wanted - len(piece)
            if piece.endswith(self._newline):
                break
        return self._empty.join(pieces)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not (line := self.readline()):
            raise StopIteration
        return line

    def _fill(self) -> bool:
        while not self._left:
            try:
                self._left = self._convert(next(self._iterator))
            except StopIteration:
                return False
        return True


class TextIteratorIO(_IteratorIO, io.TextIOBase):
    """A text file that reads from an iterator of text or bytes (UTF-8)."""

    _empty, _newline, _convert = "", "\n", staticmethod(force_str)


class BytesIteratorIO(_IteratorIO, io.RawIOBase):
    """A binary file that reads from an iterator of bytes or text (encoded as UTF-8)."""

    _empty, _newline, _convert = b"", b"\n", staticmethod(force_bytes)


class _OpenedLate(File):
    """A file that is opened at the first read."""

    _file: Any = None

    def _opened(self) -> Any:
        raise NotImplementedError

    @property
    def file(self) -> Any:
        """The open file. The first access opens it."""
        if self._file is None:
            self._file = self._opened()
        return self._file

    @file.setter
    def file(self, file: Any) -> None:
        self._file = file

    @file.deleter
    def file(self) -> None:
        self._file = None

    @property
    def closed(self) -> bool:
        """Whether the file is not open."""
        return self._file is None or bool(self._file.closed)

    def close(self) -> None:
        """Close the file if it is open."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class StorageFile(_OpenedLate):
    """A file in a Django storage, by its name there: like a `FieldFile`, but without a model."""

    def __init__(self, storage: Any, name: str, file: Any = None) -> None:
        self.storage = storage
        self.name = name
        self._file = file

    def _opened(self) -> Any:
        return self.open()

    def open(self, mode: str | None = "rb", *args: Any, **kwargs: Any) -> Any:
        """Return `storage.open(name, mode)`: a new file object."""
        return self.storage.open(self.name, mode or "rb")

    def save(self, content: Any) -> str:
        """Store `content` under the name, and return the name that the storage chose."""
        return str(self.storage.save(self.name, content))

    def delete(self) -> None:
        """Delete the file from the storage."""
        self.storage.delete(self.name)

    def exists(self) -> bool:
        """Return whether the storage has the file."""
        return bool(self.storage.exists(self.name))

    @property
    def path(self) -> str:
        """The path on a local disk. Raises `NotImplementedError` if the storage has no paths."""
        return str(self.storage.path(self.name))

    @property
    def url(self) -> str:
        """The URL that the storage gives."""
        return str(self.storage.url(self.name))

    @property
    def size(self) -> int:
        """The size in bytes, from the storage."""
        return int(self.storage.size(self.name))

    @property
    def accessed_time(self) -> datetime:
        """When the file was last read, from the storage."""
        return self._time("accessed_time")

    @property
    def created_time(self) -> datetime:
        """When the file was created, from the storage."""
        return self._time("created_time")

    @property
    def modified_time(self) -> datetime:
        """When the file was last changed, from the storage."""
        return self._time("modified_time")

    def _time(self, which: str) -> datetime:
        ask = getattr(self.storage, f"get_{which}", None) or getattr(self.storage, which)
        time: datetime = ask(self.name)
        return time


class PathFile(_OpenedLate):
    """A file on a local disk, which is opened at the first read.

    path: a path that the project's own code has chosen. root: a directory. With it, `path` is a name beneath that
    directory and may come from a request, and symbolic links cannot lead out of the directory.

    Raises `FileNotFound` for an invalid name.
    """

    def __init__(self, path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> None:
        try:
            self._async_file = LocalFile(path) if root is None else file_beneath(root, os.fspath(path))
        except FileMissing as exc:
            raise FileNotFound(str(exc)) from exc
        assert self._async_file.location is not None
        self.name = self.path = self._async_file.location
        self.mode = "rb"

    @property
    def async_file(self) -> AsyncFile:
        """The same file for this library."""
        if not _is_read_as_django_does(self):
            return _read_in_its_own_way(self, self.path)
        if self._file is not None and not _was_opened_at(self._file, self.path):
            return _read_in_its_own_way(self._file, self.path)
        if any(not home_of(self, method).startswith(_OURS) for method in ("file", "_opened")):
            return AsyncVirtualFile(self._opened_or_missing, name=os.path.basename(self.path))
        return self._async_file

    @async_file.setter
    def async_file(self, file: AsyncFile) -> None:
        self._async_file = file

    def _opened_or_missing(self) -> Any:
        try:
            return self.file
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
            raise FileMissing(str(exc)) from exc

    def exists(self) -> bool:
        """Return whether there is such a file."""
        return os.path.isfile(self.path)

    def _opened(self) -> Any:
        return open(self.path, "rb")

    @property
    def size(self) -> int:
        """The size in bytes."""
        return os.path.getsize(self.path)


class VirtualFile(File):
    """A file object of bytes or text with a name, for content that is generated or in memory.

    size: in bytes, if it is known and the file object does not have it.
    """

    def __init__(self, file: Any = None, name: str = "", url: str = "", size: int | None = None) -> None:
        super().__init__(file, name)
        self.url = url
        self._size = size

    @property
    def size(self) -> int:
        """The size in bytes. Raises `AttributeError` if it is unknown before all has been read."""
        if self._size is not None:
            return self._size
        # Not stored: `async_file` promises only the size of the constructor. That of a file object may be wrong.
        content: Any = self.file
        size: int | None = getattr(content, "size", None)
        return len(force_bytes(content.getvalue())) if size is None else size

    @size.setter
    def size(self, size: int | None) -> None:
        self._size = size

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks():
            yield from io.BytesIO(force_bytes(chunk))

    @property
    def async_file(self) -> AsyncFile:
        """The same file for this library."""
        if not _is_read_as_django_does(self):
            return _read_in_its_own_way(self, self.name or "", self._size)
        content: Any = self.file
        return AsyncVirtualFile(content, name=self.name or "", size=self._size)


class HTTPFile(File):
    """A file of another HTTP server, at a URL that the project's own code has chosen.

    This library fetches it: in one request that passes ranges and conditions on, and only from public addresses and
    those of `allow_hosts`, see `Upstream`. headers: further headers of the request.
    request_factory: a function such as `requests.get`, which fetches the file instead. It is called in a thread with
    the URL, stream=True and all other arguments.

    Raises `ImproperlyConfigured` for other arguments without a `request_factory`.
    """

    def __init__(
        self,
        request_factory: Callable[..., Any] | None = None,
        url: str = "",
        name: str | None = "",
        *,
        headers: Mapping[str, str] | None = None,
        allow_hosts: Iterable[str] = (),
        **kwargs: Any,
    ) -> None:
        if kwargs and request_factory is None:
            raise ImproperlyConfigured(
                f"an HTTPFile takes headers and allow_hosts. For {', '.join(sorted(kwargs))}, let get_request_factory "
                "return the function of a client that takes them, such as requests.get"
            )
        self.request_factory = request_factory
        self.url = url
        if name is None:
            parts = urlsplit(url)
            name = unquote(parts.path.strip("/").rpartition("/")[2]) or parts.netloc
        self.name = name
        self.request_kwargs = {**kwargs, "stream": True}
        if headers is not None:
            self.request_kwargs["headers"] = headers
        self._headers = dict(headers or {})
        self._allow_hosts = tuple(allow_hosts)
        self._request: Any = None
        self._file: Any = None

    @property
    def request(self) -> Any:
        """The response that `request_factory` returns. The first access makes the request."""
        if self.request_factory is None:
            raise AttributeError("an HTTPFile without a request_factory has no request: it is fetched when it is sent")
        if self._request is None:
            self._request = self.request_factory(self.url, **self.request_kwargs)
        return self._request

    @property
    def file(self) -> Any:  # type: ignore[override]
        """The content, as a file object."""
        if self._file is None:
            self._file = BytesIteratorIO(self.request.iter_content(chunk_size=65536, decode_unicode=False))
        return self._file

    @property
    def closed(self) -> bool:
        """Whether no request is open."""
        return self._request is None

    def close(self) -> None:
        """Close the response of `request_factory`."""
        request, self._request, self._file = self._request, None, None
        if request is not None:
            request.close()

    @property
    def size(self) -> int:
        """The Content-Length of the response. Raises `AttributeError` if it has none."""
        length = self.request.headers.get("Content-Length")
        if length is None or not (length.isascii() and length.isdigit()):
            raise AttributeError("the response has no Content-Length")
        return int(length)

    @property
    def content_type(self) -> str:
        """The Content-Type of the response. Raises `AttributeError` if it has none."""
        value = self.request.headers.get("Content-Type")
        if value is None:
            raise AttributeError("the response has no Content-Type")
        return str(value)

    @property
    def async_file(self) -> AsyncFile:
        """The same file for this library."""
        if self.request_factory is not None:
            return _Fetched(self)
        if not _is_read_as_django_does(self) or not home_of(self, "file").startswith(_OURS):
            return _read_in_its_own_way(self, self.name or "")
        return _Remote(self.url, self.name or "", self._headers, self._allow_hosts)


class _Remote:
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


class _Fetched:
    """A remote file that a function of the project fetches."""

    location: str | None = None

    def __init__(self, file: HTTPFile) -> None:
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
            self._file.file if _is_read_as_django_does(self._file) else _content_of(self._file),
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
        descriptor = os.dup(self._file.fileno())
        try:
            status = await _workers.run(settled_stat, descriptor)
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
    if isinstance(file, FieldFile | StorageFile) and not is_stored(file):
        return AsyncVirtualFile(iter(file), name=os.path.basename(name))
    if is_file and not _is_read_as_django_does(file):
        return _read_in_its_own_way(file, name)
    if is_file and hasattr(file, "storage") and getattr(file, "_committed", True) and not _has_another_file(file):
        return _stored_file(file.storage, own_name)
    raw: Any = file.file if is_file else file
    if _is_on_disk(raw):
        return _OpenedElsewhere(raw, name, is_lasting=is_left_by_closing(raw))
    return _read_in_its_own_way(raw, name)


def name_of(file: Any) -> str:
    """Return the name of a file, or "" if it has none: a file without a path has the number of its descriptor."""
    name = getattr(file, "name", None)
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ""


def is_stored(file: Any) -> bool:
    """Return whether a file is a `FieldFile` or `StorageFile` that overrides none of the methods that read it."""
    known = FieldFile if isinstance(file, FieldFile) else StorageFile
    return (
        isinstance(file, known)
        and _is_read_as_django_does(file)
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
    if isinstance(file, base.File) and not _is_read_as_django_does(file):
        return False
    if not hasattr(file, "storage"):
        return True
    if isinstance(file, FieldFile | StorageFile) and (not is_stored(file) or _has_another_file(file)):
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
        return not _was_opened_at(opened, storage.path(name))
    except (NotImplementedError, SuspiciousOperation, ValueError):
        return True


def _was_opened_at(file: Any, path: str) -> bool:
    """Return whether a file object reads the very bytes of the file that was opened at a path."""
    raw: Any = file.file if isinstance(file, base.File) and _is_read_as_django_does(file) else file
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
    return home_of(closed, "close").startswith(("_io.", "io.", *_OURS)) or not hasattr(closed, "close")


def _is_on_disk(file: Any) -> bool:
    """Return whether a file object reads the very bytes of a regular file.

    Django's and `tempfile`'s wrappers are looked through. A class that overrides reading ends the search with False.
    """
    for _ in range(_MAX_WRAPPERS):
        if reads_a_descriptor(file):
            return bool(file.closed or file.seekable())
        is_temporary = home_of(file, "__getattr__") == "tempfile."
        if not (is_temporary or isinstance(file, base.File)) or not is_read_by(file, (*_OURS, "tempfile.")):
            return False
        file = file.file
    return False


def _is_read_as_django_does(file: Any) -> bool:
    """Return whether reading a `File` reads its `file`, because no class outside Django overrides that."""
    return is_read_by(file, _OURS)


def _read_in_its_own_way(file: Any, name: str, size: int | None = None) -> AsyncFile:
    """Return a file whose content is what the file object's `read` returns. size: bytes, where known."""
    return AsyncVirtualFile(_content_of(file), name=os.path.basename(name), size=size)


def _content_of(file: Any) -> Any:
    """Return the content to send for a file object, or for anything else that `VirtualFile` accepts."""
    if isinstance(file, base.File) and any(not home_of(file, way).startswith(_OURS) for way in _WAYS_OF_ITERATING):
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
