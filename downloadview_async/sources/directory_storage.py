"""`DirectoryStorage`: a local directory as a storage."""

import os
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager

from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.listing import Entry
from downloadview_async.sources.local.folder import describe_entries, folder_identity, list_batches, list_folder
from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.open_file_cache import OpenFileCache
from downloadview_async.sources.local.path import FileBeneath
from downloadview_async.sources.local.root import Root, Symlinks
from downloadview_async.sources.names import Names
from downloadview_async.sources.workers import STUCK_DISK, Slots, Workers


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
        self._workers = Workers(threads, stuck=STUCK_DISK)
        self._cache = OpenFileCache(self.root, self._workers)

    @property
    def slots(self) -> Slots:
        """The threads that read files which are not in memory."""
        return self._workers.slots

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

    def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        """Yield the files and folders of a folder, as `PathSource.list` does."""
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
