"""`MemoryStorage`: a storage in memory, and bytes in memory as an open file."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b

from downloadview_async.errors import FileMissing, wrong_type
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.listing import DescribedEntry, Entry
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.names import canonical_folder


class MemoryStorage:
    """A storage in memory, for tests and small fixed content. Putting a key again makes a new version."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self._files: dict[str, tuple[bytes, FileMetadata]] = {}
        if files is not None and not hasattr(files, "items"):
            raise wrong_type("MemoryStorage takes a dictionary, such as {'a.txt': b'content'}", files)
        for name, content in (files or {}).items():
            self.put(name, content)

    def put(self, name: str, content: bytes) -> None:
        """Store `content`. Downloads that have begun go on with the version that they have."""
        if not isinstance(content, bytes | bytearray | memoryview):
            raise wrong_type("MemoryStorage takes content as bytes, such as text.encode()", content)
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

    async def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        """Yield the files and folders whose names begin with that of the folder: see `SupportsListing`."""
        folder = canonical_folder(folder, "exact")
        prefix = folder and f"{folder}/"
        folders: set[str] = set()
        is_empty = True
        for key, (_, metadata) in list(self._files.items()):
            if not key.startswith(prefix):
                continue
            is_empty = False
            name, slash, rest = key[len(prefix) :].partition("/")
            if not name or (slash and not rest):
                continue
            if not slash:
                assert metadata.last_modified is not None
                modified = datetime.fromtimestamp(metadata.last_modified, UTC)
                entry = Entry(name, size=metadata.size, modified=modified)
                yield DescribedEntry.of(entry, partial(replace, metadata))
            elif name not in folders:
                folders.add(name)
                yield Entry(name, is_folder=True)
        if is_empty and prefix:
            raise FileMissing(f"nothing is stored below {prefix!r}")


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
