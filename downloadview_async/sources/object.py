"""Files of objects (database rows, models): `ObjectSource` reads what it needs from their attributes."""

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from downloadview_async.errors import ConfigurationError, FileMissing, wrong_type
from downloadview_async.http.content_types import content_type_for, valid_content_type, with_charset
from downloadview_async.http.dates import http_seconds
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import Received
from downloadview_async.sources.base import (
    AsyncFile,
    OpenFile,
    Source,
    cache_status_of,
    check_async,
    check_function,
    check_source,
    is_file,
    object_url_of,
    pass_listing_on,
)
from downloadview_async.sources.listing import Entry, accepted_entries
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of, open_nowait
from downloadview_async.sources.names import without_empty_segments

_CODING = re.compile("[0-9A-Za-z._-]+")


class ObjectSource:
    """Finds an object, and the file that it has.

    get: an asynchronous function that gets the key (or anything else that the endpoint passes, such as a request) and
    returns an object or None. It may raise `FileMissing` instead of returning None. It should close its database
    session before it returns, as the bytes are sent long after that.
    source: the source for the names in `file_field`: a `PathSource`, a `StorageSource` ... Not needed if the attribute
    holds an `AsyncFile`.
    file_field: the attribute with the file: its name, or an `AsyncFile`. If it is empty or None, the file is missing.
    basename_field, mime_type_field, encoding_field (Content-Encoding), charset_field, size_field (bytes, for files
    that do not know their size), modification_time_field (a datetime, or seconds since the epoch, UTC): attributes that
    describe the file. An empty value counts as absent.
    list_folder: a function that gets a folder, such as `reports/2026`, or the empty string for the top, and returns an
    asynchronous iterator of its entries: see `SupportsListing`. Without it, the source lists no folders.

    Raises `ConfigurationError` for a `get` that cannot be called with one key, and for an invalid `source`.
    """

    def __init__(
        self,
        get: Callable[[Any], Awaitable[Any]],
        *,
        source: Source | None = None,
        file_field: str = "file",
        basename_field: str | None = None,
        mime_type_field: str | None = None,
        encoding_field: str | None = None,
        charset_field: str | None = None,
        size_field: str | None = None,
        modification_time_field: str | None = None,
        list_folder: Callable[[str], AsyncIterator[Entry]] | None = None,
    ) -> None:
        check_function(get, "ObjectSource takes an asynchronous function of one argument, the key")
        check_async(get, "the function of ObjectSource")
        if source is not None:
            check_source(source, "ObjectSource")
        self._get = get
        self._source = source
        self._file_field = file_field
        self._fields = {
            "name": basename_field,
            "mime_type": mime_type_field,
            "encoding": encoding_field,
            "charset": charset_field,
            "size": size_field,
            "modified": modification_time_field,
        }
        if list_folder is not None:
            check_function(list_folder, "list_folder takes a function of one argument, the folder")
            pass_listing_on(self, SimpleNamespace(list=partial(accepted_entries, list_folder, "any")))

    async def resolve(self, key: Any, /) -> AsyncFile:
        """Return the file of the object that `get` finds. Raises `FileMissing` if there is no object or no file."""
        plain = without_empty_segments(key).removeprefix("/") if isinstance(key, str) else None
        has_other = plain is not None and plain != key  # a key may have empty segments, a path may not
        try:
            record = await self._get(key)
        except FileMissing:
            if not has_other:
                raise
            record = None
        if record is None and has_other:
            record = await self._get(plain)
        if record is None:
            raise FileMissing(f"there is no object {key!r}")
        file = getattr(record, self._file_field)
        if not file:
            raise FileMissing(f"the object {key!r} has no file")
        if isinstance(file, str | os.PathLike):
            if self._source is None:
                raise ConfigurationError(
                    f"{self._file_field!r} holds a name, {file!r}: give ObjectSource the source= that has this name"
                )
            file = await self._source.resolve(os.fspath(file))
        described = {name: getattr(record, field) for name, field in self._fields.items() if field is not None}
        return ObjectFile(file, **{name: value for name, value in described.items() if value not in (None, "")})


class ObjectFile:
    """A file with the description that an object has of it."""

    def __init__(
        self,
        file: AsyncFile,
        *,
        name: str | None = None,
        mime_type: str | None = None,
        encoding: str | None = None,
        charset: str | None = None,
        size: int | None = None,
        modified: datetime | float | None = None,
    ) -> None:
        if not is_file(file):
            raise wrong_type("ObjectFile takes a file, such as LocalFile('a.txt')", file)
        self.name = file.name if name is None else str(name)
        self.location = file.location
        self.object_url = object_url_of(file)
        self._file = file
        self._mime_type = valid_content_type(mime_type if isinstance(mime_type, str) else None)
        self._encoding = encoding if isinstance(encoding, str) and _CODING.fullmatch(encoding) else None
        self._charset = charset if isinstance(charset, str) else None
        # A database may have invalid values. The values of the file itself are used instead.
        self._size = size if isinstance(size, int) and size >= 0 else None
        self._modified = modified if isinstance(modified, datetime | int | float) else None

    @property
    def cache_status(self) -> str | None:
        """That of the file itself: see `HasCacheStatus`."""
        return cache_status_of(self._file)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator["OpenObjectFile"]:
        """Open the file itself."""
        async with self._file.open(request) as opened:
            yield OpenObjectFile(opened, self._metadata(opened.metadata))

    def open_nowait(self, request: DownloadRequest) -> "OpenObjectFile | None":
        """Open the file itself without waiting, if it is local: see `OpensNowait`."""
        opened = open_nowait(self._file, request)
        return None if opened is None else OpenObjectFile(opened, self._metadata(opened.metadata))

    def _metadata(self, metadata: FileMetadata) -> FileMetadata:
        content_type = self._mime_type or metadata.content_type or content_type_for(self.name)
        changed = replace(metadata, content_type=with_charset(content_type, self._charset))
        if metadata.size is None:
            changed = replace(changed, size=self._size, accept_ranges=False)
        if self._encoding is not None:
            changed = replace(changed, headers=(*changed.headers, ("content-encoding", self._encoding)))
        if self._modified is not None:
            changed = replace(changed, last_modified=http_seconds(self._modified))
        return changed


class OpenObjectFile:
    """An open file with metadata that its object completes."""

    def __init__(self, opened: OpenFile, metadata: FileMetadata) -> None:
        self.metadata = metadata
        self._opened = opened

    @property
    def local(self) -> OpenLocalFile | None:
        """That of the file itself: see `Local`."""
        return local_of(self._opened)

    @property
    def made_at(self) -> float | None:
        """That of the file itself: see `Aged`."""
        return getattr(self._opened, "made_at", None)

    @property
    def received(self) -> Received | None:
        """That of the file itself, or None: see `Dated`."""
        return getattr(self._opened, "received", None)

    @property
    def ends_with_connection(self) -> bool:
        """That of the file itself: see `Unframed`."""
        return getattr(self._opened, "ends_with_connection", False)

    @property
    def hides_coding(self) -> bool:
        """That of the file itself: see `Recoded`."""
        return getattr(self._opened, "hides_coding", False)

    @property
    def reads_over(self) -> bool:
        """That of the file itself: see `ReadsOver`."""
        return getattr(self._opened, "reads_over", False)

    def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the file itself."""
        return self._opened.stream(span)
