"""`StorageSource`, and the storages that come with the library."""

import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote, urlsplit

from downloadview_async.errors import AccessDenied, ConfigurationError, DownloadError, FileMissing, SourceUnavailable
from downloadview_async.http.dates import http_seconds
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata, is_telling, unsettled_seconds
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import OpenFile, Storage
from downloadview_async.sources.file_objects import Extent, OpenFileObject, close, closing_in_thread, extent_of
from downloadview_async.sources.local.open_file import CHUNK_SIZE, OpenLocalFile
from downloadview_async.sources.local.open_file_cache import OpenFileCache
from downloadview_async.sources.local.path import FileBeneath
from downloadview_async.sources.local.root import Root, Symlinks
from downloadview_async.sources.names import Names, canonical_name, check_names_option
from downloadview_async.sources.object_store import SCHEMES, ObjectStorage
from downloadview_async.sources.workers import Workers


class StorageFile:
    """A file of a storage, by its key."""

    def __init__(self, storage: Storage, key: str, *, name: str | None = None, location: str | None = None) -> None:
        self.storage = storage
        self.key = key
        self.name = key.rpartition("/")[2] if name is None else name
        self.location = location

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Open one version of the bytes that the storage has under the key."""
        async with self.storage.open(self.key, request) as opened:
            yield opened

    def open_nowait(self, request: DownloadRequest) -> OpenLocalFile | None:
        """Open the file without waiting, if the storage is a local directory: see `OpensNowait`."""
        # not for a subclass, which may open files differently
        return self.storage.open_nowait(self.key) if type(self.storage) is DirectoryStorage else None


class StorageSource:
    """The files of a storage, by their names in it.

    names: "portable" refuses names with a backslash or a colon and those of Windows devices, such as `aux.txt`; "any"
    accepts them; with "exact" a name is the unchanged key of the storage, with any slash at its beginning.
    The default is "any" for an `ObjectStorage` and a `MemoryStorage`, the option `names` of a `DirectoryStorage`, and
    "portable" for others.

    Raises `ConfigurationError` for a storage that is not one.
    """

    def __init__(self, storage: Storage, *, names: Names | None = None) -> None:
        if not hasattr(storage, "locate") or isinstance(storage, type):
            raise ConfigurationError(
                f"StorageSource takes a storage, such as DirectoryStorage('files'), not {storage!r}"
            )
        self.storage = storage
        self.names: Names = _names_of(storage) if names is None else names
        check_names_option(self.names)

    def canonical(self, name: str) -> str:
        """Return the key in the storage for a name from a request: see `HasCanonicalNames`."""
        return canonical_name(name, self.names)

    async def resolve(self, name: str, /) -> StorageFile:
        """Return the file called `name`. Raises `FileMissing` for a name that no file may have."""
        name = self.canonical(name)
        return StorageFile(self.storage, name, location=await self.storage.locate(name))


def _names_of(storage: Storage) -> Names:
    if isinstance(storage, DirectoryStorage):
        return storage.root.names
    return "any" if isinstance(storage, ObjectStorage | MemoryStorage) else "portable"


class DirectoryStorage:
    """A local directory as a storage: names are opened beneath it exactly as `PathSource` does."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        symlinks: Symlinks = "inside",
        threads: int = 40,
        names: Names = "portable",
    ) -> None:
        self.root = Root(root, symlinks=symlinks, names=names)
        self._workers = Workers(threads)
        self._cache = OpenFileCache(self.root, self._workers)

    @asynccontextmanager
    async def open(self, name: str, request: DownloadRequest = GET) -> AsyncIterator[OpenLocalFile]:
        """Open the file called `name` beneath the directory."""
        async with FileBeneath(self.root, name, workers=self._workers).open(request) as opened:
            yield opened

    def open_nowait(self, name: str) -> OpenLocalFile | None:
        """Open the file called `name` without waiting, or return None: see `OpensNowait`."""
        return self._cache.open(name)

    async def locate(self, name: str) -> str | None:
        """Return the absolute path of `name`."""
        return self.root.locate(name)


class MemoryStorage:
    """A storage in memory, for tests and small fixed content. Putting a key again makes a new version."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self._files: dict[str, tuple[bytes, FileMetadata]] = {}
        for name, content in (files or {}).items():
            self.put(name, content)

    def put(self, name: str, content: bytes) -> None:
        """Store `content`. Downloads that have begun go on with the version that they have."""
        content = bytes(content)
        self._files[name] = (
            content,
            FileMetadata(size=len(content), etag=content_etag(content), last_modified=int(time.time())),
        )

    def delete(self, name: str) -> None:
        """Remove what is stored under `name`. Raises `FileMissing`."""
        if self._files.pop(name, None) is None:
            raise FileMissing(f"nothing is stored as {name!r}")

    @asynccontextmanager
    async def open(self, name: str, request: DownloadRequest = GET) -> AsyncIterator["OpenBytes"]:
        """Open the current version of `name`."""
        try:
            content, metadata = self._files[name]
        except KeyError:
            raise FileMissing(f"nothing is stored as {name!r}") from None
        yield OpenBytes(content, metadata)

    async def locate(self, name: str) -> None:
        """Return None: no proxy can read the memory of this process."""


class OpenBytes:
    """Bytes in memory as an open file."""

    def __init__(self, content: bytes, metadata: FileMetadata) -> None:
        self.metadata = metadata
        self._content = content

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, `CHUNK_SIZE` at a time."""
        start, stop = (span.start, span.stop) if span is not None else (0, len(self._content))
        for position in range(start, stop, CHUNK_SIZE):
            yield self._content[position : min(position + CHUNK_SIZE, stop)]


def content_etag(content: bytes | bytearray | memoryview) -> ETag:
    """Return a strong entity tag: a hash of the content."""
    return ETag(blake2b(content, digest_size=16).hexdigest())


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
    """

    def __init__(self, storage: Any, *, threads: int = 40) -> None:
        if not callable(getattr(storage, "open", None)):
            raise ConfigurationError(f"{storage!r} is not a storage: it has no method open(name, mode)")
        self._storage = storage
        self._workers = Workers(threads)

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
        return None if size is None or int(size) < 0 else int(size)

    def _modified(self, name: str) -> float | None:
        """Return the time of the last change in seconds since the epoch, or None if it is not known."""
        modified = self._ask("modified", name) or self._ask("get_modified_time", name)
        if isinstance(modified, datetime):
            return (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp()
        return None if modified is None else float(modified)

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
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
        raise FileMissing(f"the storage has no {name!r}: {exc}") from exc
    except PermissionError as exc:
        raise AccessDenied(f"the storage denies {name!r}: {exc}") from exc
    except Exception as exc:  # storages raise errors of any class
        raise SourceUnavailable(f"the storage failed on {name!r}: {type(exc).__name__}: {exc}") from exc


def storage_from_url(url: str, /, *, names: Names = "portable", **options: Any) -> Storage:
    """Return the storage that a URL names: `file:///srv/media`, `memory://`, or an object store (see `ObjectStorage`).

    names: which names a directory accepts, as in `DirectoryStorage`. options: those of `ObjectStorage`, only for object
    stores.

    Raises `ConfigurationError` for any other scheme, and for a directory that cannot be opened.
    """
    parts = urlsplit(url)
    if parts.scheme in SCHEMES:
        return ObjectStorage(url, **options)
    if options:
        raise ConfigurationError(
            f"{url!r} is not an object store and takes no options: remove {', '.join(sorted(options))}"
        )
    if parts.scheme == "memory" and not (parts.netloc or parts.path.strip("/")):
        return MemoryStorage()
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return DirectoryStorage(unquote(parts.path), names=names)
    raise ConfigurationError(
        f"{url!r} is not the URL of a storage: give file:///ABSOLUTE/DIRECTORY, memory://, s3://BUCKET/PREFIX, "
        "gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, or make a StorageSource of an object"
    )
