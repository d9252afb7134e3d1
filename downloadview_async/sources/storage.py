"""`StorageSource`: the files of a storage, by their names in it."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from downloadview_async.errors import ConfigurationError, wrong_type
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import IdentifiesFolders, OpenFile, Storage, SupportsListing, pass_listing_on
from downloadview_async.sources.directory_storage import DirectoryStorage
from downloadview_async.sources.listing import accepted_entries
from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.memory_storage import MemoryStorage
from downloadview_async.sources.names import Names, canonical_name, check_names_option
from downloadview_async.sources.object_options import SCHEMES
from downloadview_async.sources.object_store import ObjectStorage


class StorageFile:
    """A file of a storage, by its key."""

    def __init__(self, storage: Storage, key: str, *, name: str | None = None, location: str | None = None) -> None:
        if not hasattr(storage, "locate"):
            raise wrong_type("StorageFile takes a storage, such as DirectoryStorage('files'), and a key", storage)
        if not isinstance(key, str):
            raise wrong_type("the key of a StorageFile is text, such as 'a.txt'", key)
        self.storage = storage
        self.key = key
        self.name = key.rpartition("/")[2] if name is None else name
        self.location = location

    @property
    def object_url(self) -> str | None:
        """The store's own URL of the file, such as `gs://bucket/name`: see `HasObjectURL`."""
        return self.storage.object_url(self.key) if isinstance(self.storage, ObjectStorage) else None

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

    It lists folders if the storage does: see `SupportsListing`.

    Raises `ConfigurationError` for an invalid storage.
    """

    def __init__(self, storage: Storage, *, names: Names | None = None) -> None:
        if not hasattr(storage, "locate") or isinstance(storage, type):
            raise wrong_type("StorageSource takes a storage, such as DirectoryStorage('files')", storage)
        self.storage = storage
        self.names: Names = _names_of(storage) if names is None else names
        check_names_option(self.names)
        if isinstance(storage, DirectoryStorage) and storage.root.names == self.names:
            pass_listing_on(self, storage)
        elif isinstance(storage, SupportsListing):
            pass_listing_on(self, SimpleNamespace(list=partial(accepted_entries, storage.list, self.names)))
            if isinstance(storage, IdentifiesFolders):
                self.folder_identity = storage.folder_identity

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


def storage_from_url(url: str, /, *, names: Names = "portable", **options: Any) -> Storage:
    """Return the storage that a URL names: `file:///srv/media`, `memory://`, or an object store (see `ObjectStorage`).

    names: which names a directory accepts, as in `DirectoryStorage`. options: those of `ObjectStorage`, only for object
    stores.

    Raises `ConfigurationError` for any other scheme, and for a directory that cannot be opened.
    """
    if not isinstance(url, str):
        raise wrong_type("storage_from_url takes a URL, such as 's3://bucket/prefix'", url)
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
        return DirectoryStorage(os.fsdecode(unquote_to_bytes(os.fsencode(parts.path))), names=names)
    raise ConfigurationError(
        f"{url!r} is not the URL of a storage: give file:///ABSOLUTE/DIRECTORY, memory://, s3://BUCKET/PREFIX, "
        "gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, or make a StorageSource of an object"
    )
