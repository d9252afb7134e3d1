"""The seams between the rooms: `Source`, `AsyncFile`, `OpenFile` and `Storage`, and what a file may offer besides.

`Local`, `InPieces`, `Aged`, `Dated`, `Recoded`, `Unframed` and `ReadsOver` are optional for an open file, `OpensNowait`
and `MadeOnDemand` are optional for a file. No class has to inherit from them: an attribute with that name is enough. A
wrapper around a file should pass on those that still hold for what it sends; without them, it is sent correctly, but
more slowly.
"""

import inspect
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from downloadview_async.errors import WrongType, wrong_type
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import Received
from downloadview_async.sources.listing import Entry, Version

if TYPE_CHECKING:
    from downloadview_async.sources.local.open_file import OpenLocalFile


class OpenFile(Protocol):
    """One version of a file, held open until the context of `AsyncFile.open` ends."""

    @property
    def metadata(self) -> FileMetadata:
        """The metadata of this version."""
        ...

    def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of a span of the file, or the whole file for None; never more than the span.

        Fewer bytes than the span mean that the file has shrunk: the sender must abort the connection. The iterator
        borrows the file's handle, so it cannot be used after the context has ended.

        Raises `TransferAborted` where the rest cannot be read. A `FileError` counts as that once bytes have been sent.
        """
        ...


class Local(Protocol):
    """Optional for an open file: the local file that has its bytes, for the kernel to send."""

    @property
    def local(self) -> "OpenLocalFile | None":
        """The open local file with the same bytes at the same offsets, or None.

        A server that can send from a descriptor sends from this one, and `stream` is not called. A wrapper that changes
        the bytes must not offer it. The headers come from the metadata of the wrapper, which must have the same size.
        """
        ...


Piece: TypeAlias = "bytes | memoryview | tuple[OpenLocalFile, ByteRange]"
"""A part of a body: bytes, or a span of an open local file, for the kernel to send."""


class InPieces(Protocol):
    """Optional for an open file: its body as bytes and as spans of local files, for the kernel to send."""

    def pieces(self, span: ByteRange) -> AsyncGenerator[Sequence[Piece], None]:
        """Yield the pieces of a span, some at a time, in order. Without any, `stream` has to be called instead.

        The local files among them are open, and the memory of the others is not used again, until the generator goes
        on, or is closed. It may go on in another task than the one in which it has begun. Raises what `stream` does.
        """
        ...


class Aged(Protocol):
    """Optional for an open file: the age of a copy that was kept."""

    @property
    def made_at(self) -> float | None:
        """When the origin made or confirmed this version, in seconds since the epoch; None if it was just now.

        The answer tells the seconds since then in Age [RFC 9111 5.1].
        """
        ...


class Dated(Protocol):
    """Optional for an open file: the time of its description, which another server may have made earlier."""

    @property
    def received(self) -> Received | None:
        """When the description was made, and how old it was then; None if it was made just now."""
        ...


class Recoded(Protocol):
    """Optional for an open file: whether its metadata leaves out a Content-Encoding of the origin server."""

    @property
    def hides_coding(self) -> bool:
        """Whether the origin server would send a Content-Encoding that no client can use, and the metadata has none.

        A client or a proxy must not get such a file from the origin server directly.
        """
        ...


class Arriving(Protocol):
    """An open file whose bytes arrive from elsewhere: optional for an `OpenFile`."""

    def arrived(self, span: ByteRange) -> bytes | None:
        """Return exactly the bytes of a span, once, if they are here already and are the rest of what arrives.

        None: stream them.
        """


class Unframed(Protocol):
    """Optional for an open file: whether only the end of a connection marks the end of the file."""

    @property
    def ends_with_connection(self) -> bool:
        """Whether the file may have been cut off without anybody noticing [RFC 9112 8]. No cache keeps such a file."""
        ...


class ReadsOver(Protocol):
    """Optional for an open file: whether it reads the file from its beginning to get to a range."""

    @property
    def reads_over(self) -> bool:
        """Whether a range was requested, but the origin server sends the whole file.

        A cache then reads the file once for everybody instead of opening it again for each range.
        """
        ...


class AsyncFile(Protocol):
    """A file that may be sent. It holds no handle until it is opened, so a file that is never sent leaks nothing."""

    @property
    def name(self) -> str:
        """The file name for the client, before it is made safe for clients."""
        ...

    @property
    def location(self) -> str | None:
        """The absolute path or the URL by which a proxy could fetch the file; None if there is none."""
        ...

    def open(self, request: DownloadRequest = GET) -> AbstractAsyncContextManager[OpenFile]:
        """Open one version of the file.

        `request` tells what will be read, so that a remote file costs one upstream request: a HEAD reads nothing, a
        Range probably reads only that range. It is a hint: any span of the open file can still be streamed.

        When a client leaves, the context ends while its task is being cancelled: shield whatever is awaited then.

        Raises `FileMissing`, `AccessDenied`, `SourceUnavailable`, `UpstreamError`.
        """
        ...


class OpenLocalBytes(OpenFile, Local, Protocol):
    """An open file that also offers `Local`."""


class OpensNowait(Protocol):
    """Optional for a file: opening without waiting, for local files."""

    def open_nowait(self, request: DownloadRequest) -> OpenLocalBytes | None:
        """Open the file if that waits for neither a disk nor another server; else return None, and `open` is called.

        It runs on the event loop. The caller closes the `local` of what it returns, so a file without a `local`
        must not be returned. Raises what `AsyncFile.open` raises.
        """
        ...


class OnDemand(Protocol):
    """Facts about content before it is made: see `MadeOnDemand`."""

    @property
    def max_age(self) -> float | None:
        """Seconds for which a cache may send a copy; None: as long as the cache says, if there is a validator."""
        ...

    @property
    def is_keepable(self) -> bool:
        """Whether a cache may keep a copy, as far as that is known before the content is made."""
        ...

    @property
    def validators(self) -> FileMetadata:
        """The size and the validators that the content will have, or None where they are not known yet."""
        ...


class MadeOnDemand(Protocol):
    """Optional for a file: its content is made anew each time it is opened.

    A cache then opens it once and makes all ranges from that. It asks for the validators before it has content made,
    and the content, not header fields, says for how long a copy may be sent.
    """

    @property
    def on_demand(self) -> OnDemand | None:
        """Facts about the content, or None: it is read like any other file."""
        ...


class HasObjectURL(Protocol):
    """Optional for a file: it is in an object store, and its URL there is known although no proxy can fetch that."""

    @property
    def object_url(self) -> str | None:
        """The store's own URL of the file, such as `gs://bucket/name`, percent-encoded; None for another file."""
        ...


class HasCacheStatus(Protocol):
    """Optional for a file: a cache has decided where it comes from."""

    @property
    def cache_status(self) -> str | None:
        """The value of Cache-Status for this request [RFC 9211], known once the file is open; None without it."""
        ...


def cache_status_of(file: AsyncFile) -> str | None:
    """Return the value of Cache-Status for an open file; None if no cache was asked: see `HasCacheStatus`."""
    return getattr(file, "cache_status", None)


def object_url_of(file: AsyncFile) -> str | None:
    """Return the store's own URL of a file; None if it has none: see `HasObjectURL`."""
    return getattr(file, "object_url", None)


def pieces_of(opened: OpenFile, span: ByteRange) -> AsyncGenerator[Sequence[Piece], None] | None:
    """Return the pieces of a span of an open file, which the caller closes; None if it has none: see `InPieces`."""
    pieces: Callable[[ByteRange], AsyncGenerator[Sequence[Piece], None]] | None = getattr(opened, "pieces", None)
    return None if pieces is None else pieces(span)


def arrived(opened: OpenFile, span: ByteRange) -> bytes | None:
    """Return the bytes of a span of an open file if they are here already: see `Arriving`."""
    read: Callable[[ByteRange], bytes | None] | None = getattr(opened, "arrived", None)
    return None if read is None else read(span)


def on_demand_of(file: AsyncFile) -> OnDemand | None:
    """Return what is known about content that is made on demand; None for other files: see `MadeOnDemand`."""
    return getattr(file, "on_demand", None)


class Source(Protocol):
    """Finds the file that a name stands for. Raises `FileError` if there is none."""

    async def resolve(self, name: Any, /) -> AsyncFile:
        """Return the file. A missing file may not be noticed before it is opened."""
        ...


@runtime_checkable
class HasCanonicalNames(Protocol):
    """Optional for a source: it knows which of its names stand for the same file."""

    def canonical(self, name: str) -> str:
        """Return the one name for `./a//b`, `/a/b` and `a/b`. Raises `FileMissing` for a name no file can have."""
        ...


@runtime_checkable
class HasManyFiles(Protocol):
    """Optional for a source: listing and opening many files, of which each is sent once."""

    def open_nowait(self, name: str, size: int, version: str, /) -> "OpenLocalFile | None":
        """Open the file that `resolve` would return for a name from a listing, or return None: see `OpensNowait`.

        None is also returned for a file that has another size or version (`FileMetadata.version`). Nothing is kept
        about the file, and no encoded form of it is opened.
        """
        ...

    def list_versions(self, folder: str = "", /) -> AsyncIterator[Sequence[Version]] | None:
        """Yield what `SupportsListing.list` does, in batches and with the versions; or return None."""
        ...


@runtime_checkable
class SupportsListing(Protocol):
    """Optional for a source or a storage: it lists the files and folders of a folder.

    A wrapper has `list` only if what it wraps has it.
    """

    def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        """Yield each file and each folder that is directly in a folder, in any order.

        folder: its path, such as `reports/2026`, with or without a slash at its end; the empty string is the top. Only
        entries that `resolve` (or `open`) would accept are yielded, each once.

        Raises `FileMissing`, before the first entry, if the folder does not exist, and `AccessDenied`,
        `SourceUnavailable`, `UpstreamError` as `AsyncFile.open` does. An iterator with `aclose`, as a generator has, is
        closed by its reader (`closing_entries`).
        """
        ...


@runtime_checkable
class ListsBatches(SupportsListing, Protocol):
    """Optional for a source or a storage that lists: its entries in batches, which take less time.

    A page that shows a few entries of a large folder in the order of their names describes only those.
    """

    def list_batches(self, folder: str = "", /, *, described: int | None = None) -> AsyncIterator[Sequence[Entry]]:
        """Yield what `list` does, in batches.

        described: a batch before which so many entries have been yielded has neither sizes nor times, and a file that
        cannot be read may be in it. None: all have them.
        """
        ...

    async def describe(self, folder: str, names: Sequence[str], /) -> Sequence[Entry]:
        """Return the entries of a folder with these names, complete, in their order.

        Those that do not exist any more, and files that cannot be read, are left out. Raises what `list` raises.
        """
        ...


@runtime_checkable
class IdentifiesFolders(Protocol):
    """Optional for a source or a storage that lists: it knows which of its folders are the same.

    Links may lead to one folder by several paths, and by endlessly many if it has a link to itself.
    """

    async def folder_identity(self, folder: str = "", /) -> Hashable:
        """Return a value that is equal for all paths of one folder; None if no other path leads to it.

        Raises what `list` raises.
        """
        ...


def pass_listing_on(wrapper: Any, inner: object) -> None:
    """Give a wrapper the methods that what it wraps has for listing (`SupportsListing` and what may be besides it).

    They become attributes of the object, so that `isinstance` tells the truth about it. Methods that a subclass of the
    wrapper defines stay.
    """
    for method in ("list", "list_batches", "describe", "folder_identity"):
        if not hasattr(wrapper, method) and hasattr(inner, method):
            setattr(wrapper, method, getattr(inner, method))


def is_file(value: object) -> bool:
    """Return whether a value can be an `AsyncFile`: it can be opened, and is neither a path nor a class."""
    return hasattr(value, "open") and not hasattr(value, "__fspath__") and not isinstance(value, type)


def check_source(value: object, taker: str) -> None:
    """Raise `WrongType` if a value is not a source. taker: the name of the class that takes it."""
    if not hasattr(value, "resolve") or hasattr(value, "__fspath__") or isinstance(value, type):
        example = "StorageSource(storage)" if hasattr(value, "locate") else "PathSource('files')"
        raise wrong_type(f"{taker} takes a source, such as {example}", value)


def check_function(value: Any, takes: str) -> None:
    """Raise `WrongType` if a value cannot be called with one argument. takes: what is needed instead."""
    try:
        inspect.signature(value).bind(None)
    except TypeError as exc:
        raise WrongType(f"{takes}, not {value!r}") from exc
    except ValueError:  # a function in C may have no signature
        return


def check_async(value: Any, what: str) -> None:
    """Raise `WrongType` for a plain function whose result cannot be awaited. what: what the function is for.

    A lambda, and a function whose annotation says so, may return an awaitable.
    """
    function = value.func if isinstance(value, partial) else value
    if not inspect.isroutine(function) or inspect.iscoroutinefunction(inspect.unwrap(function)):
        return
    returned = str(getattr(function, "__annotations__", {}).get("return", ""))
    if inspect.isbuiltin(function) or function.__name__ == "<lambda>" or re.search("Awaitable|Coroutine", returned):
        return
    raise WrongType(f"{what} is {value!r}, which is not async: write `async def {function.__name__}`")


@asynccontextmanager
async def closing_stream(chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """Give what `OpenFile.stream` has returned, and close it before the file that it borrows, if it is a generator."""
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


class Storage(Protocol):
    """Named bytes. A name is a relative path with `/` between its segments, checked before it gets here."""

    def open(self, name: str, request: DownloadRequest = GET) -> AbstractAsyncContextManager[OpenFile]:
        """Open one version of what is stored under `name`, as `AsyncFile.open` does."""
        ...

    async def locate(self, name: str) -> str | None:
        """Return the absolute path or the URL by which a proxy could fetch it, or None."""
        ...
