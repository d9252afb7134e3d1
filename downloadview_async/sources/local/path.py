"""Local files: `PathSource` finds them beneath a root, `LocalFile` is one of them."""

import os
import threading
import weakref
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial

from downloadview_async.errors import AccessDenied, ConfigurationError, FileMissing, wrong_type
from downloadview_async.http.content_types import content_type_for
from downloadview_async.http.metadata import stat_version
from downloadview_async.http.negotiation import preferred_encodings
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.listing import Entry, Version
from downloadview_async.sources.local.folder import (
    describe_entries,
    folder_identity,
    list_batches,
    list_folder,
    list_versions,
)
from downloadview_async.sources.local.open_file import OpenLocalFile, tag_time
from downloadview_async.sources.local.open_file_cache import OpenFileCache
from downloadview_async.sources.local.root import (
    Opened,
    Root,
    Symlinks,
    Validators,
    close_unwritten,
    file_error,
    open_trusted,
)
from downloadview_async.sources.names import Names, canonical_name
from downloadview_async.sources.workers import OPENING, STUCK_DISK, Slots, Workers

SUFFIXES = {"br": ".br", "zstd": ".zst", "gzip": ".gz"}
"""Content codings, and the suffix that the name of a precompressed sibling has for each."""

_KEPT = 1024  # names requested last, each with its `FileBeneath`, which is small until it is opened
_trusted_workers = Workers(stuck=STUCK_DISK)
_removing = ThreadPoolExecutor(1, "downloadview removal")


class LocalFile:
    """A file on a local disk, by a path that the application's own code has chosen.

    Never pass a name from a request: `PathSource` opens those beneath a root.

    delete: True removes a temporary file as soon as it is open, so that it is gone however the answer ends, also if the
    client has left before that. Its bytes stay until this object is freed. No proxy sends such a file. A file that is
    never opened is not removed, nor is a symbolic link, or another file that has taken the path.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None, delete: bool = False) -> None:
        try:
            self._path = os.path.abspath(path)
        except TypeError as exc:
            raise wrong_type("LocalFile takes the path of a file, such as 'files/a.txt'", path) from exc
        self.location: str | None = None if delete else self._path
        self.name = os.path.basename(self._path) if name is None else name
        self._delete = delete
        self._lock = threading.Lock()
        self._kept: int | None = None  # the descriptor of a file that has been removed

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenLocalFile]:
        """Open the file, following links. Raises `FileMissing`, `AccessDenied` or `SourceUnavailable`."""
        opening = self._open_and_remove if self._delete else partial(open_trusted, self._path)
        try:
            opened = await _trusted_workers.run_or_abandon(opening, discard=_close, longest=OPENING)
        except FileMissing:
            raise
        except BaseException:  # perhaps before a thread was free
            if self._delete:
                _removing.submit(self._remove)
            raise
        async with aclosing(OpenLocalFile(*opened, workers=_trusted_workers)) as file:
            yield file

    def _remove(self) -> None:
        _close(self._open_and_remove())

    def _open_and_remove(self) -> Opened:
        with self._lock:  # another request for this object would not find the file any more
            return self._open_and_remove_once()

    def _open_and_remove_once(self) -> Opened:
        if self._kept is not None:
            return open_trusted(f"/dev/fd/{self._kept}")
        opened = open_trusted(self._path)
        try:
            with suppress(OSError):
                if os.path.samestat(os.lstat(self._path), opened.status):
                    os.unlink(self._path)
            self._kept = os.dup(opened.descriptor)
            weakref.finalize(self, os.close, self._kept)
        except OSError as exc:
            _close(opened)
            raise file_error(exc) from exc
        except BaseException:
            _close(opened)
            raise
        return opened


class FileBeneath:
    """A file beneath a root, and its precompressed siblings if the source uses them."""

    __slots__ = ("_cache", "_path", "_precompressed", "_root", "_workers", "location", "name")

    def __init__(
        self,
        root: Root,
        name: str,
        *,
        workers: Workers,
        precompressed: tuple[str, ...] = (),
        cache: OpenFileCache | None = None,
    ) -> None:
        self.name = name.rpartition("/")[2]
        self.location: str | None = root.locate(name)  # as a proxy on the same machine would open it
        self._root = root
        self._path = name
        self._workers = workers
        self._precompressed = precompressed
        self._cache = cache

    def open_nowait(self, request: DownloadRequest = GET) -> OpenLocalFile | None:
        """Open the file without waiting, or return None: see `OpensNowait`."""
        if not self._precompressed and self._cache is not None:
            return self._cache.open(self._path)
        for encoding in preferred_encodings(request.accept_encoding, self._precompressed):
            try:
                sibling = self._root.open_nowait(self._path + SUFFIXES[encoding])
            except (FileMissing, AccessDenied):
                continue
            if sibling is None:
                return None
            try:
                itself = self._root.open_nowait(self._path)
            except (FileMissing, AccessDenied):
                return self._opened(sibling, encoding)
            except BaseException:
                _close(sibling)
                raise
            if itself is None:
                _close(sibling)
                return None
            return self._opened(*_newer(sibling, encoding, itself))
        opened = self._root.open_nowait(self._path)
        return None if opened is None else self._opened(opened, None)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenLocalFile]:
        """Open the file, or the sibling that the request prefers, beneath the root."""
        async with aclosing(self._opened(*await self._open_best(request))) as file:
            yield file

    def _opened(self, opened: Opened, encoding: str | None) -> OpenLocalFile:
        file = OpenLocalFile(*opened, workers=self._workers, validators=self._root.validators)
        if self._precompressed:
            _describe_encoding(file, encoding, content_type_for(self.name))
        return file

    async def _open_best(self, request: DownloadRequest) -> tuple[Opened, str | None]:
        for encoding in preferred_encodings(request.accept_encoding, self._precompressed):
            try:
                sibling = await self._open(self._path + SUFFIXES[encoding])
            except (FileMissing, AccessDenied):
                continue
            try:
                itself = await self._open(self._path)
            except (FileMissing, AccessDenied):
                return sibling, encoding
            except BaseException:
                _close(sibling)
                raise
            return _newer(sibling, encoding, itself)
        return await self._open(self._path), None

    async def _open(self, path: str) -> Opened:
        if (opened := self._root.open_nowait(path)) is not None:
            return opened
        return await self._workers.run_or_abandon(self._root.open, path, discard=_close, longest=OPENING)


class PathSource:
    """Files of a directory, by their path beneath it.

    root: the directory. It is opened now, and every file is opened beneath it (`Root`).
    symlinks: "deny" refuses every link, "inside" (the default) follows links that stay beneath the root, "follow"
    follows every link.
    precompressed: content codings ("br", "zstd", "gzip"). Clients that accept one get `NAME.br`, `NAME.zst` or
    `NAME.gz` instead of NAME if it exists.
    threads: how many blocking calls to this directory may run at once.
    names: "portable" refuses names with a backslash or a colon and those of Windows devices, such as `aux.txt`; "any"
    accepts them.
    etag: how entity tags are made. "nanoseconds" (the default): of the size and the modification time, which copies
    have in common if their file systems keep it to the nanosecond. "seconds": of the size and the time in whole
    seconds, for copies whose nanoseconds differ; a file has no tag in the first two seconds after a change, which may
    not show in its time. "inode": of the inode and its times, which no copy has in common: for `Digests(etags=True)`.

    Raises `ConfigurationError` if root is not a readable directory or an option has an invalid value.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        symlinks: Symlinks = "inside",
        precompressed: Sequence[str] = (),
        threads: int = 40,
        names: Names = "portable",
        etag: Validators = "nanoseconds",
    ) -> None:
        if etag not in ("nanoseconds", "seconds", "inode"):
            raise ConfigurationError(f'etag is {etag!r}: give "nanoseconds", "seconds" or "inode"')
        if unknown := set(precompressed) - set(SUFFIXES):
            raise ConfigurationError(f"precompressed takes {', '.join(SUFFIXES)}, not {', '.join(sorted(unknown))}")
        self.root = beneath = Root(root, symlinks=symlinks, names=names, validators=etag)
        if not isinstance(threads, int) or threads < 1:
            raise ConfigurationError(f"threads is {threads!r}: give a number of calls, 1 or more")
        workers, codings = Workers(threads, stuck=STUCK_DISK), tuple(precompressed)
        cache = OpenFileCache(beneath, workers)

        @lru_cache(_KEPT)
        def file(name: str) -> FileBeneath:
            return FileBeneath(beneath, self.canonical(name), workers=workers, precompressed=codings, cache=cache)

        self._file = file
        self._workers = workers
        cls = type(self)  # a subclass may have other files
        self._is_plain = cls.resolve is PathSource.resolve and cls.list is PathSource.list

    @property
    def slots(self) -> Slots:
        """The threads that read files which are not in memory."""
        return self._workers.slots

    def canonical(self, name: str) -> str:
        """Return the name beneath the root for a name from a request: see `HasCanonicalNames`."""
        return canonical_name(name, self.root.names)

    async def resolve(self, name: str, /) -> FileBeneath:
        """Return the file called `name`. Raises `FileMissing` for a name that no file may have."""
        return self._file(name)

    def file(self, name: str) -> FileBeneath:
        """Do what `resolve` does, without await."""
        return self._file(name)

    def open_nowait(self, name: str, size: int, version: str, /) -> OpenLocalFile | None:
        """Open a file without waiting, or return None: see `HasManyFiles`."""
        if not self._is_plain or (opened := self.root.open_listed(name)) is None:
            return None
        descriptor, status = opened
        validators = self.root.validators
        is_same = version and stat_version(status.st_size, tag_time(status.st_mtime_ns, validators)) == version
        is_telling = True if is_same and validators != "inode" else None
        file = OpenLocalFile(descriptor, status, workers=self._workers, is_telling=is_telling, validators=validators)
        if is_telling:
            return file
        if (file.size, file.version) == (size, version):
            return file
        file.close()
        return None

    def list_versions(self, folder: str = "", /) -> AsyncIterator[Sequence[Version]] | None:
        """Yield what `list` does, with the versions of the files: see `HasManyFiles`."""
        return list_versions(self.root, folder, self._workers) if self._is_plain else None

    def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        """Yield the files and folders of a folder that can be downloaded or listed: see `SupportsListing`.

        A link counts as what it leads to. Left out are links that the option `symlinks` refuses, dangling links,
        files that this process may not read, sockets, devices, and names that are not UTF-8 or that the option `names`
        refuses.
        """
        return list_folder(self.root, folder, self._workers)

    def list_batches(self, folder: str = "", /, *, described: int | None = None) -> AsyncIterator[Sequence[Entry]]:
        """Yield what `list` does, in batches: see `ListsBatches`."""
        return list_batches(self.root, folder, self._workers, described=described)

    async def describe(self, folder: str, names: Sequence[str], /) -> Sequence[Entry]:
        """Return the entries of a folder with these names: see `ListsBatches`."""
        return await describe_entries(self.root, folder, names, self._workers)

    async def folder_identity(self, folder: str = "", /) -> Hashable:
        """Return a value that is equal for all paths of one folder: see `IdentifiesFolders`."""
        return await folder_identity(self.root, folder, self._workers)


def _describe_encoding(file: OpenLocalFile, encoding: str | None, content_type: str) -> None:
    metadata = replace(file.metadata, headers=(("vary", "Accept-Encoding"),))
    if encoding is not None:
        tag = metadata.etag
        metadata = replace(
            metadata,
            etag=None if tag is None else replace(tag, value=f"{tag.value}-{encoding}"),
            content_type=content_type,
            headers=(("content-encoding", encoding), *metadata.headers),
        )
    file.metadata = metadata


def _newer(sibling: Opened, encoding: str, itself: Opened) -> tuple[Opened, str | None]:
    """Return the precompressed file and its coding, or the file itself if it is newer; close the other one."""
    made, changed = sibling.status.st_mtime_ns, itself.status.st_mtime_ns
    # some tools set the time of the compressed file to that of the file, in whole seconds
    if made < changed and made != changed // 1_000_000_000 * 1_000_000_000:
        _close(sibling)
        return itself, None
    _close(itself)
    return sibling, encoding


def _close(opened: Opened) -> None:
    close_unwritten(opened.descriptor)
