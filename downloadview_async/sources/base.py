"""The seams between the rooms: `Source`, `AsyncFile`, `OpenFile`, `Storage`, and what files may offer as well."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import Received


class OpenFile(Protocol):
    """One version of a file, held until the context that gave it ends."""

    @property
    def metadata(self) -> FileMetadata:
        """What is known of this very version."""
        ...

    def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of a span of the file, or with None all there is; never more than the span.

        Fewer bytes than the span has mean that the file shrank; whoever sends them must abort. The iterator borrows
        the file's handle, and is of no use after the context ends.

        Raises `TransferAborted` where the rest cannot be read; a `FileError` counts as that once bytes have been sent.
        """
        ...


class Aged(Protocol):
    """What an open file may offer as well: one that was kept, and not asked for by this request."""

    @property
    def made_at(self) -> float | None:
        """When the origin made or confirmed this version, in seconds since the epoch; None: for this very request.

        The answer says by Age how long ago that was [RFC 9111 5.1].
        """
        ...


class Dated(Protocol):
    """What an open file may offer as well: one that another server has described, perhaps some time ago."""

    @property
    def received(self) -> Received:
        """When the description was made."""
        ...


class Recoded(Protocol):
    """What an open file may offer as well: one of another server that says too much of its coding."""

    @property
    def hides_coding(self) -> bool:
        """Whether that server would send a Content-Encoding that no client can use, and the description has not."""
        ...


class AsyncFile(Protocol):
    """A file that someone may send. It holds nothing until it is opened, so one that is never sent leaks nothing."""

    @property
    def name(self) -> str:
        """What the client should call it, before it is made safe for clients."""
        ...

    @property
    def location(self) -> str | None:
        """The absolute path or the URL by which a proxy could fetch it; None if there is none."""
        ...

    def open(self, request: DownloadRequest = GET) -> AbstractAsyncContextManager[OpenFile]:
        """Open one version of the file.

        `request` says what will be asked of it, so that a remote file costs one upstream request: a HEAD will not
        read, a Range will probably read just that. It is a hint: any span of the open file can still be streamed.

        When a client leaves, the context ends while its task is cancelled: what is awaited then has to be shielded.

        Raises `FileMissing`, `AccessDenied`, `SourceUnavailable`, `UpstreamError`.
        """
        ...


class Source(Protocol):
    """Finds the file that a name stands for. Raises `FileError` where it finds none."""

    async def resolve(self, name: Any, /) -> AsyncFile:
        """Return the file. Whether it exists may be found out only when it is opened."""
        ...


@runtime_checkable
class HasCanonicalNames(Protocol):
    """What a source may also be: one that knows which of its names stand for the same file."""

    def canonical(self, name: str) -> str:
        """Return the one name for `./a//b`, `/a/b` and `a/b`. Raises `FileMissing` where none is."""
        ...


class Storage(Protocol):
    """Named bytes. A name is a relative path with `/` between its segments, checked before it gets here."""

    def open(self, name: str, request: DownloadRequest = GET) -> AbstractAsyncContextManager[OpenFile]:
        """Open one version of what is stored under `name`, as `AsyncFile.open` does."""
        ...

    async def locate(self, name: str) -> str | None:
        """Return the absolute path or the URL by which a proxy could fetch it, or None."""
        ...
