"""`Outcome`: what became of one answer. It is made once for each request, when the answer has ended."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import time
from typing import Any, Literal, Protocol, runtime_checkable

from downloadview_async.http.metadata import ByteRange

Result = Literal["completed", "delegated", "not-modified", "refused", "aborted"]
"""How an answer ended.

completed: all bytes that it promised have left the process. delegated: a proxy or another server sends the file.
not-modified: 304. refused: a status of 400 or more, sent as a whole. aborted: it is incomplete, see `Reason`.
"""

Reason = Literal[
    "client-left", "stalled", "file-changed", "upstream-failed", "source-failed", "server-stopped", "failed"
]
"""Why an answer is incomplete.

client-left: the client has closed the connection. stalled: the client took too little, and the server has reset the
connection, or the answer was aborted. file-changed: the file has fewer bytes than were promised, or was written to.
upstream-failed: a remote server or a store failed. source-failed: another source, such as a disk, failed.
server-stopped: the server has shut down. failed: the application raised another error, or returned before the end of
its answer.
"""

Header = tuple[bytes, bytes]

_new = object.__new__


@dataclass(slots=True, eq=False)  # frozen, it would cost each answer four times as much
class Outcome:
    """One ended answer to an HTTP request. All listeners get the same object, so none may change it.

    request_id: of the request, see `Accounts`. time: when the answer ended, in seconds since 1970 UTC.
    method, path, http_version: of the request. The path has no query, and no percent-encoding.
    client: the address of the client, None if the server does not know it.
    route, source: the path of the route with those of the mounts around it, and the name of the source, if known.
    name: what the source was asked for, `a/b` for `./a//b` too, or the name of the file. etag, size: of the file, if it
    was opened; the ETag is that of the header, the size is in bytes.
    user, link_id: of the grant by which the request was allowed.
    status: of the answer; 0 if none was begun.
    kind: how the answer left. For files: `offloaded:` and the name of the proxy, `redirected`, `zero-copy` by the
    kernel, `path` by a server that does not say what it has sent, `chunks`, `inline` in one message, `archive`. For
    others: `listing`, `view`, `share`, `checksum`, `empty` without a body, `error` for a file that cannot be sent, and
    `other` for all answers of an application that are not ours.
    spans: the parts of the file that were to be sent; None for a file of unknown size.
    sent: the bytes of the body that the server took. If the connection was reset, and the server is uvicorn with
    `DownloadProtocol`, without those that the client's machine has not acknowledged.
    unacknowledged: the bytes of the body that were subtracted from `sent`. The client may have some of them.
    first_byte: seconds from the request to the head of the answer; None if there was none. seconds: to its end.
    result, reason: see `Result` and `Reason`; `reason` is None unless the answer was aborted. detail: the text of the
    error that ended the answer, for logs alone.
    delegated_to: the header field, in lower case, by which a proxy or the client gets the file elsewhere.
    """

    request_id: str
    time: float
    method: str
    path: str
    http_version: str
    client: str | None = None
    route: str | None = None
    source: str | None = None
    name: str | None = None
    etag: str | None = None
    size: int | None = None
    user: str | None = None
    link_id: str | None = None
    status: int = 0
    kind: str = "other"
    spans: tuple[ByteRange | None, ...] = ()
    sent: int = 0
    first_byte: float | None = None
    seconds: float = 0.0
    result: Result = "aborted"
    reason: Reason | None = None
    detail: str | None = field(default=None, repr=False)  # an application may write the query into its errors
    delegated_to: str | None = None
    headers: tuple[Header, ...] | list[Header] = field(default=(), repr=False)
    """The header fields of the request, as in its ASGI scope. Among them are passwords and cookies: never log them."""
    unacknowledged: int = 0

    def again(
        self,
        request_id: str,
        *,
        client: str | None,
        link_id: str | None,
        headers: tuple[Header, ...] | list[Header],
        first_byte: float,
        seconds: float,
    ) -> "Outcome":
        """Return the outcome of an answer that has ended now. Apart from the values that are given, it is this one."""
        outcome = _new(Outcome)  # its `__init__` would take twice as long
        outcome.request_id = request_id
        outcome.time = time()
        outcome.method = self.method
        outcome.path = self.path
        outcome.http_version = self.http_version
        outcome.client = client
        outcome.route = self.route
        outcome.source = self.source
        outcome.name = self.name
        outcome.etag = self.etag
        outcome.size = self.size
        outcome.user = self.user
        outcome.link_id = link_id
        outcome.status = self.status
        outcome.kind = self.kind
        outcome.spans = self.spans
        outcome.sent = self.sent
        outcome.first_byte = first_byte
        outcome.seconds = seconds
        outcome.result = self.result
        outcome.reason = self.reason
        outcome.detail = self.detail
        outcome.delegated_to = self.delegated_to
        outcome.headers = headers
        outcome.unacknowledged = self.unacknowledged
        return outcome

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer was sent. For a delegated answer: whether the proxy has its headers."""
        return self.result != "aborted"

    def header(self, name: str) -> str | None:
        """Return the value of a header field of the request, such as "user-agent"; None if it does not have it."""
        wanted = name.lower().encode("latin-1")
        return next((value.decode("latin-1") for field, value in self.headers if field.lower() == wanted), None)


Listener = Callable[[Outcome], Awaitable[None] | None]
"""An async or plain function that gets each `Outcome`, after the answer, in its own task or thread."""


@runtime_checkable
class BatchListener(Protocol):
    """A listener that takes what it needs from each outcome at once, and writes that for many outcomes together.

    `AccessLog` is one: with the lines made in the event loop, its thread does not contend for the interpreter.
    """

    def __call__(self, outcome: Outcome, /) -> None:
        """Write one outcome now. `Accounts` does not call this."""

    def prepare(self, outcome: Outcome, /) -> Any:
        """Return what `write` gets. This is called in the event loop, when the answer has ended: it must not block."""

    def write(self, prepared: list[Any], /) -> None:
        """Write what `prepare` has returned for up to 500 outcomes. This is called in a thread."""


Observer = Callable[[Outcome], None]
"""A function that gets each `Outcome` at once, in the event loop: it must neither block nor raise."""
