"""The file wrappers of django-downloadview: `StorageFile`, `PathFile`, `VirtualFile` and `HTTPFile`."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured
from django.core.files import base
from django.utils.encoding import force_bytes

from downloadview_async.contrib.django.adapters import (
    OURS,
    STORED,
    FetchedFile,
    FileOfURL,
    file_beneath,
    is_read_as_django_does,
    read_in_its_own_way,
    was_opened_at,
)
from downloadview_async.contrib.django.io import BytesIteratorIO
from downloadview_async.errors import FileMissing
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.file_objects import home_of
from downloadview_async.sources.local.path import LocalFile
from downloadview_async.sources.virtual import VirtualFile as AsyncVirtualFile

if TYPE_CHECKING:
    File = base.File[bytes]  # only the stubs have it generic
else:
    File = base.File


class FileNotFound(OSError):
    """There is no such file. A view whose `get_file` raises this answers 404."""


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


STORED.append(StorageFile)


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
        self.name = self.path = self._first_path = self._async_file.location
        self.mode = "rb"

    @property
    def async_file(self) -> AsyncFile:
        """The same file for this library."""
        if not is_read_as_django_does(self):
            return read_in_its_own_way(self, self.path)
        if self._file is not None and not was_opened_at(self._file, self.path):
            return read_in_its_own_way(self._file, self.path)
        if any(not home_of(self, method).startswith(OURS) for method in ("file", "_opened")):
            return AsyncVirtualFile(self._opened_or_missing, name=os.path.basename(self.path))
        # the project may have set another path, and reading this file then opens that one
        return self._async_file if self.path == self._first_path else LocalFile(self.path)

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
        if not is_read_as_django_does(self):
            return read_in_its_own_way(self, self.name or "", self._size)
        content: Any = self.file
        if type(content) is io.StringIO and not content.closed:
            content = content.getvalue()  # its size in bytes was known to django-downloadview, too
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
        if isinstance(allow_hosts, str):  # its letters would be the hosts
            raise ImproperlyConfigured(f"allow_hosts takes a list of hosts, not {allow_hosts!r}")
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
            return FetchedFile(self)
        if not is_read_as_django_does(self) or not home_of(self, "file").startswith(OURS):
            return read_in_its_own_way(self, self.name or "")
        return FileOfURL(self.url, self.name or "", self._headers, self._allow_hosts)
