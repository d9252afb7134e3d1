"""Every error this library raises.

    DownloadError
    ├── ConfigurationError         a setting or an argument is wrong; says what to do, at start-up if it is known then
    │   └── WrongType                   an argument has the wrong type, such as a path in place of a source
    ├── FileError                  no byte of the file has left yet: becomes a status
    │   ├── FileMissing            404  there is no such file
    │   ├── AccessDenied           404  there is one, but not for this client (never told apart from missing)
    │   ├── AuthenticationRequired 401  a user name and a password would help
    │   ├── LinkInvalid            403  the link is not one, was changed, or is not for this client
    │   ├── LinkExpired            410  the link was valid until some time ago
    │   ├── LinkUsedUp             410  the link was valid for fewer downloads
    │   ├── ArchiveTooLarge        413  the archive of a folder would have too many files, bytes or folders
    │   ├── TooManyArchives        429  this client already gets as many archives as it may get at once
    │   ├── LimitExceeded          429  this client has had what its limits allow for now
    │   ├── PreconditionFailed     412  the origin of a remote file refused If-Match or If-Unmodified-Since
    │   ├── SourceUnavailable      503  the disk, the storage or this process is overloaded; try again
    │   │   └── UpstreamBusy       503  or 429: as a remote server answered; its Retry-After is passed on
    │   └── UpstreamError          502  a remote server failed or broke the protocol
    │       ├── UpstreamTimeout    504  a remote server did not answer in time
    │       └── UpstreamRefused    502  a remote server refused us, or leads to a host that may not be requested
    └── TransferAborted            bytes have left already: the connection is aborted, never ended cleanly

The message of an error is for the log. No response ever shows it; what the client may know is in `detail`.

`asgi/errors.py` makes each `FileError` an `HTTPException` of Starlette, too, so that Starlette, FastAPI and Litestar
answer with its status without a handler.
"""

import errno
from http import HTTPStatus
from math import ceil
from typing import Any, Literal

AbortReason = Literal["file-changed", "upstream-failed", "source-failed", "stalled"]
"""Why the promised bytes cannot be delivered.

The file has changed, a remote server failed, another source did, or the client takes too little.
"""


class DownloadError(Exception):
    """The root of the tree. Each error can be copied and pickled, whatever arguments its class takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_init, (type(self), self.args), self.__dict__


def _without_init(cls: type[DownloadError], args: tuple[Any, ...]) -> DownloadError:
    """Return an error with the message in `args`. Its attributes are those that a copy gets later."""
    return cls.__new__(cls, *args)


class ConfigurationError(DownloadError, ValueError):
    """A setting or an argument is wrong. The message says which, and what to do about it."""


class WrongType(ConfigurationError, TypeError):
    """An argument has the wrong type. The message says what to write instead."""


def wrong_type(takes: str, value: object) -> WrongType:
    """Return the error for a value of the wrong type. takes: such as `Download takes a source, such as ...`."""
    if isinstance(value, type):
        return WrongType(f"{takes}, not the class {value.__name__}: write {value.__name__}(...)")
    if hasattr(value, "__await__"):
        return WrongType(f"{takes}, not a coroutine: write `await` before the call")
    return WrongType(f"{takes}, not {value!r}")


class _PhraseUnlessSet:
    """The phrase of the status of an error, as long as the error, or its class, has no other text."""

    def __get__(self, error: "FileError | None", owner: object) -> str:
        return "" if error is None else error.status.phrase


class FileError(DownloadError):
    """A file cannot be sent, and no byte of it has been sent: the client gets `status`.

    Starlette, FastAPI and Litestar answer it as they answer their own `HTTPException`, by `status_code`, `detail` and
    `headers`.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    retry_after: str | None = None
    """The value of Retry-After that the client gets: seconds, or an HTTP date."""
    challenge: str | None = None
    """The value of WWW-Authenticate that the client gets."""
    detail = _PhraseUnlessSet()
    """The text for the client, by default the phrase of `status`. It must not tell what the client may not see."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Take a plain number for the status of a class, such as 402."""
        super().__init_subclass__(**options)
        cls.status = HTTPStatus(cls.status)

    def __init__(self, *args: object) -> None:
        Exception.__init__(self, *args)  # not that of Starlette's `HTTPException`, which takes a status

    __str__ = Exception.__str__
    __repr__ = Exception.__repr__

    @property
    def status_code(self) -> int:
        """The status as a number, for frameworks."""
        return self.status.value

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer, which are the same for a missing and for a forbidden file."""
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        if self.challenge is not None:
            headers["WWW-Authenticate"] = self.challenge
        return headers if self.retry_after is None else {**headers, "Retry-After": self.retry_after}

    @property
    def text(self) -> str:
        """The text of a plain answer: the phrase of the status, and the detail if there is one."""
        phrase = self.status.phrase
        return phrase if self.detail == phrase else f"{phrase}: {self.detail}"


class FileMissing(FileError):
    """There is no such file."""

    status = HTTPStatus.NOT_FOUND


class AccessDenied(FileError):
    """There is such a file, but this client or this process may not read it. The answer is that of `FileMissing`."""

    status = HTTPStatus.NOT_FOUND


class AuthenticationRequired(FileError):
    """The request has no valid user name and password, and could succeed with them.

    challenge: the value of WWW-Authenticate, such as `Basic realm="downloads", charset="UTF-8"` [RFC 7617].
    """

    status = HTTPStatus.UNAUTHORIZED

    def __init__(self, reason: str, *, challenge: str) -> None:
        super().__init__(reason)
        self.challenge = challenge


class LinkInvalid(FileError):
    """The URL is not a link that this application has signed, or it is not for this client."""

    status = HTTPStatus.FORBIDDEN


class LinkExpired(FileError):
    """The link has expired."""

    status = HTTPStatus.GONE


class LinkUsedUp(FileError):
    """All downloads that the link allows have been begun, and this request does not belong to one of them."""

    status = HTTPStatus.GONE


class PreconditionFailed(FileError):
    """The origin server of a remote file answered 412 to the client's own preconditions."""

    status = HTTPStatus.PRECONDITION_FAILED


class ArchiveTooLarge(FileError):
    """The archive of a folder would have too many files, bytes or folders within folders. Nothing has been read.

    detail: the limit, for the client.
    """

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.detail = detail


class TooManyArchives(FileError):
    """The client already gets as many archives as it may get at the same time."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    retry_after = "10"


class LimitExceeded(FileError):
    """The client has had what its limits allow for now.

    detail: the limit, for the client. wait: seconds after which the request may succeed.
    """

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, detail: str, *, wait: float) -> None:
        super().__init__(f"the limit is {detail}")
        self.detail = detail
        self.retry_after = str(max(1, ceil(wait)))


class SourceUnavailable(FileError):
    """The file may exist, but cannot be opened now: no worker, no descriptor, no connection free."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after = "5"


class UpstreamBusy(SourceUnavailable):
    """A remote server answered 429 or 503. The client gets the same status, and the Retry-After if one was sent."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, reason: str, *, status: int = 503, retry_after: str | None = None) -> None:
        super().__init__(reason)
        self.status = HTTPStatus(status)
        self.retry_after = retry_after or self.retry_after


class UpstreamError(FileError):
    """A remote server failed or broke the protocol."""

    status = HTTPStatus.BAD_GATEWAY


class UpstreamTimeout(UpstreamError):
    """A remote server did not answer in time."""

    status = HTTPStatus.GATEWAY_TIMEOUT


class UpstreamRefused(UpstreamError):
    """A remote server has not failed, but gives no file: a cache sends no stale copy instead of it.

    answered: the status of its answer, such as 403. None: it leads to a host or an address that may not be requested.
    """

    def __init__(self, reason: str, *, answered: int | None = None) -> None:
        super().__init__(reason)
        self.answered = answered


class TransferAborted(DownloadError):
    """The promised bytes cannot be delivered any more: the file shrank, the disk or the upstream failed.

    The ASGI application raises it so that the server aborts the connection: the client must not take what it has
    received for the whole file.
    """

    def __init__(self, message: str, *, reason: AbortReason | None = None) -> None:
        super().__init__(message)
        self.reason = reason


def abort_reason(exc: BaseException) -> AbortReason | None:
    """Return why a transfer was aborted by an error; None if that is not an error about a file."""
    chain: BaseException | None = exc
    for _ in range(20):
        if isinstance(chain, TransferAborted) and chain.reason is not None:
            return chain.reason
        if isinstance(chain, UpstreamError | UpstreamBusy):
            return "upstream-failed"
        if isinstance(chain, OSError) and chain.errno == errno.ESTALE:
            return "file-changed"
        if chain is None or chain.__cause__ is None:
            break
        chain = chain.__cause__
    return "source-failed" if isinstance(exc, TransferAborted | FileError) else None
