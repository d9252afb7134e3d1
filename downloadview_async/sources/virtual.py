"""Generated content as files: `VirtualFile` is one, `VirtualSource` makes them from names."""

import inspect
import io
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Self

import anyio

from downloadview_async.errors import FileMissing, TransferAborted, wrong_type
from downloadview_async.http.content_types import content_type_for, valid_content_type, with_charset
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import AsyncFile, OpenFile, check_function
from downloadview_async.sources.file_objects import (
    AT_ONCE,
    OpenFileObject,
    OpenIterator,
    as_bytes,
    closing_in_thread,
    extent_of,
    longer_than,
    note_close_failure,
    pieces,
)
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.memory_storage import OpenBytes, content_etag
from downloadview_async.sources.names import without_empty_segments
from downloadview_async.sources.workers import Workers

Content = bytes | str | io.IOBase | Iterable[bytes | str] | AsyncIterable[bytes | str]
"""The content of a virtual file. Text is sent as UTF-8."""

_workers = Workers()
_LARGE = 1 << 20  # bytes: larger content is not hashed on the event loop


class VirtualFile:
    """A file whose bytes are made on demand.

    content: bytes or text; a file object with a blocking or an asynchronous `read`; an iterable or asynchronous
    iterable of bytes or text; or a function without arguments, plain or asynchronous, that returns one of these. Code
    that blocks runs in a worker thread, including generators. A function makes new content for every download; an
    iterator or a file object itself can be sent only once. A file object that can seek is sent from its beginning,
    wherever it was; one that cannot seek is sent from where it is.
    size: bytes, if known beforehand. It is not needed for bytes, text and binary file objects that can seek. If the
    content is longer, the transfer is aborted before its last bytes: they wait up to half a second for a further read
    or item. 0 means unknown.
    etag, last_modified (seconds since the epoch, UTC): validators. Bytes and text get a tag from their content.
    max_age: seconds for which a `CachedSource` may send a copy. The default is that of the cache, for a file that has a
    validator; without a validator, the file is not kept. A time that cannot be the time of a change, such as 0 or the
    first day of 1980, does not count as one.

    Raises `ValueError` for an invalid content type.
    """

    location: str | None = None

    def __init__(
        self,
        content: Content | Callable[[], Any],
        *,
        name: str,
        content_type: str | None = None,
        size: int | None = None,
        etag: ETag | None = None,
        last_modified: int | None = None,
        max_age: float | None = None,
    ) -> None:
        if not isinstance(content, bytes | str) and not _is_content(content):
            raise wrong_type(
                "the content must be bytes, text, a file object, an iterable, or a function that returns one",
                content,
            )
        if not isinstance(name, str):
            raise wrong_type("name takes the name of the file, such as 'report.csv'", name)
        if content_type is not None and (not isinstance(content_type, str) or valid_content_type(content_type) is None):
            raise ValueError(f"not a content type: {content_type!r}")
        if etag is not None and not isinstance(etag, ETag):
            raise wrong_type("etag takes an ETag, such as ETag('v1')", etag)
        if last_modified is not None and not isinstance(last_modified, int | float):
            raise wrong_type("last_modified takes seconds since the epoch, such as time.timestamp()", last_modified)
        if size is not None and not isinstance(size, int):
            raise wrong_type("size takes a number of bytes", size)
        self.name = name
        self.max_age = max_age
        self._content = content
        self._content_type = content_type
        self._size = size
        self._etag = etag
        self._last_modified = last_modified

    @property
    def on_demand(self) -> Self:
        """The file itself: see `MadeOnDemand`."""
        return self

    @property
    def is_keepable(self) -> bool:
        """Whether a copy may be kept, as far as that is known before the content is made: see `max_age`."""
        return (
            self.max_age is not None
            or self._etag is not None
            or self.validators.changed_at is not None
            or isinstance(self._content, bytes | bytearray | memoryview | str)
        )

    @property
    def validators(self) -> FileMetadata:
        """The size and the validators that were passed to the constructor: nothing is made for them."""
        return FileMetadata(size=self._size, etag=self._etag, last_modified=self._last_modified)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Make the content. A generator does not run before it is streamed."""
        content = self._content
        if callable(content) and (isinstance(content, type) or not hasattr(content, "read")):
            content = await _call(content)
        if content is None:
            raise FileMissing(f"there is no content for {self.name!r}")
        if isinstance(content, str):
            content = content.encode()
        async with _opened(content, await self._metadata(content)) as opened:
            yield opened

    async def _metadata(self, content: Any) -> FileMetadata:
        size, etag = self._size, self._etag
        whole = isinstance(content, bytes | bytearray | memoryview)
        if whole:
            size = memoryview(content).nbytes
            if etag is None:  # hashing large content takes a while
                etag = content_etag(content) if size < _LARGE else await _workers.run(content_etag, content)
        return FileMetadata(
            size=size,
            etag=etag,
            last_modified=self._last_modified,
            content_type=with_charset(self._content_type) if self._content_type else content_type_for(self.name),
            accept_ranges=whole,
        )


def _is_content(value: object) -> bool:
    if isinstance(value, Mapping) or hasattr(value, "__await__") or hasattr(value, "__fspath__"):
        return False
    return callable(value) or any(hasattr(value, name) for name in ("__iter__", "__aiter__", "read", "__buffer__"))


@asynccontextmanager
async def _opened(content: Any, metadata: FileMetadata) -> AsyncIterator[OpenFile]:
    """Give an open file over content of any kind, and close the content afterwards."""
    if isinstance(content, bytes | bytearray | memoryview):
        yield OpenBytes(bytes(content), metadata)
        return
    if metadata.size == 0:
        metadata = replace(metadata, size=None)
    if hasattr(content, "__aiter__") or inspect.iscoroutinefunction(getattr(content, "read", None)):
        async with _closing_async(content):
            yield OpenAsyncIterable(content, metadata)
    elif hasattr(content, "read"):
        async with closing_in_thread(content) as in_use:
            extent = await _workers.run(extent_of, content, metadata.size)
            described = replace(metadata, size=extent.size, accept_ranges=extent.has_parts)
            yield OpenFileObject(content, described, extent, workers=_workers, in_use=in_use)
    elif hasattr(content, "__iter__"):
        iterator = iter(content)
        async with closing_in_thread(iterator) as in_use:
            yield OpenIterator(iterator, metadata, workers=_workers, in_use=in_use)
    else:
        raise TypeError(f"the content must be bytes, text, a file object or an iterable, not {content!r}")


class OpenAsyncIterable:
    """An asynchronous iterable, or a file object with an asynchronous `read`, as an open file without ranges."""

    def __init__(self, content: Any, metadata: FileMetadata) -> None:
        self.metadata = metadata
        self._content = content

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the content, from its beginning.

        Raises `TransferAborted` instead of the last bytes if there are more than the stated size.
        """
        items = aiter(_blocks(self._content) if hasattr(self._content, "read") else self._content)
        left = self.metadata.size
        async for item in items:
            if item is None:
                raise TransferAborted("the file object is in non-blocking mode and has no data yet")
            chunk = as_bytes(item)
            if left is not None:
                left -= len(chunk)
                if left < 0 or (not left and await _goes_on(items)):
                    raise longer_than(self.metadata.size)
            for piece in pieces(chunk):
                yield piece
            if left == 0:
                return


async def _goes_on(items: AsyncIterator[Any]) -> bool:
    """Return whether there is more, as far as that is known at once."""
    with anyio.move_on_after(AT_ONCE):
        async for item in items:
            if item is None:
                return False
            if as_bytes(item):
                return True
    return False


async def _blocks(file: Any) -> AsyncIterator[Any]:
    """Yield the content of a file object, from its beginning if it can seek; None where it has no data yet."""
    if hasattr(file, "seek"):
        with suppress(Exception):  # a pipe, a stream of HTTP: it stays where it is
            if not hasattr(file, "seekable") or await _call(file.seekable):
                await _call(file.seek, 0)
    # iterating over a file object gives lines, and one line may be as long as the file
    while (block := await file.read(CHUNK_SIZE)) is None or block:
        yield block


@asynccontextmanager
async def _closing_async(content: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if (close := getattr(content, "aclose", None) or getattr(content, "close", None)) is not None:
            with anyio.CancelScope(shield=True):
                try:
                    await close()
                except Exception as exc:
                    note_close_failure(content, exc)


async def _call(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a plain or asynchronous function returns; a plain one runs in a worker thread."""
    if inspect.iscoroutinefunction(function):
        return await function(*args)
    result = await _workers.run(function, *args)
    return await result if inspect.isawaitable(result) else result


class VirtualSource:
    """Files that a function makes from their names.

    make: a plain or asynchronous function that gets a name and returns an `AsyncFile`, any content for a `VirtualFile`,
    or None if there is no such file. It may raise `FileMissing` instead. Names have no `.` and no empty segments,
    unless they have a segment `..`, which the function must refuse. If nothing is made for a name that begins with a
    slash, the function is called again without the slash.

    Raises `ConfigurationError` for what cannot be called with one name.
    """

    def __init__(self, make: Callable[[str], Any]) -> None:
        check_function(make, "VirtualSource takes a function of one argument, the name")
        self.make = make

    def canonical(self, name: str) -> str:
        """Return the canonical form of a name from a request: see `HasCanonicalNames`."""
        return without_empty_segments(name) if isinstance(name, str) else name

    async def resolve(self, name: str, /) -> AsyncFile:
        """Return the file made for `name`. Raises `FileMissing`."""
        name = self.canonical(name)
        is_rooted = isinstance(name, str) and name.startswith("/")
        try:
            made = await _call(self.make, name)
        except FileMissing:
            if not is_rooted:
                raise
            made = None
        if made is None and is_rooted:
            made = await _call(self.make, name.removeprefix("/"))
        if made is None:
            raise FileMissing(f"nothing is made for {name!r}")
        if hasattr(made, "location"):
            file: AsyncFile = made
            return file
        return VirtualFile(made, name=name.rpartition("/")[2])
