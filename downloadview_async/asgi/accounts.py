"""`Accounts`: counts what is sent of each answer, and gives its `Outcome` to listeners."""

import asyncio
import logging
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from inspect import iscoroutinefunction
from time import monotonic, time
from types import TracebackType
from typing import Any, Protocol, Self

import anyio
from anyio.lowlevel import checkpoint
from starlette.requests import ClientDisconnect
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts
from downloadview_async.accounts.listeners import MAX_WAITING, Listeners
from downloadview_async.accounts.outcome import Header, Listener, Observer, Outcome, Reason, Result
from downloadview_async.asgi.delivery import (
    Delivery,
    Descriptor,
    Inline,
    Offloaded,
    Path,
    Pieces,
    Redirected,
    kind_of,
    spans_of,
)
from downloadview_async.asgi.departures import stems_from
from downloadview_async.asgi.extensions import CONNECTION, PATHSEND, PREPARED, REQUEST_ID, ZERO_COPY, raises_errors
from downloadview_async.asgi.loan import Loan
from downloadview_async.asgi.zero_copy import LentDescriptor, NotingReceive
from downloadview_async.errors import FileError, WrongType, abort_reason, wrong_type
from downloadview_async.http.fields import length_of
from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.ranges import parse_content_range
from downloadview_async.policy.addresses import TrustedAddresses, peer_of

ENDING_SECONDS = 0.5
"""Seconds that the shutdown waits for answers that are ending, at most: the server has waited for them before."""

DRAIN_SECONDS = 5.0
"""Seconds that the shutdown waits for listeners after that, at most."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,128}")
_RANDOM_BYTES = 4096
_ID = re.compile("[0-9a-f]{32}")
_PROXIES = {
    "x-accel-redirect": "nginx",
    "x-sendfile": "apache",
    "x-reproxy-url": "h2o",
    "x-litespeed-location": "litespeed",
}

_NO_SCOPE: Scope = {"method": ""}

logger = logging.getLogger("downloadview_async")

_new = object.__new__


class Connection(Protocol):
    """A connection that the server knows, and puts into the scope under `CONNECTION`.

    is_lost: whether the connection has ended. is_broken: whether it has ended, or is about to, although an answer is
    not complete. is_stalled: whether the server has ended it, because the client took too little. file_sent: the bytes
    of the last file that the kernel has sent. request_id: the id of the request that is being answered, for log lines;
    `Account` puts it there.
    """

    is_lost: bool
    is_stalled: bool
    file_sent: int
    request_id: str | None

    @property
    def is_broken(self) -> bool:
        """See the class."""

    def has_failed(self) -> bool:
        """Return whether it has ended, or the client has reset it, which `is_broken` may tell later."""

    @property
    def position(self) -> int:
        """Where the next answer begins in the stream of all answers on the connection, if the server counts that."""

    def taken(self, sent: int, head: int, position: int) -> int:
        """Return how many of the `sent` bytes of the body, after a head of so many, arrive if it fails, or has.

        position: the property, when the answer began.
        """

    @property
    def is_flushed(self) -> bool:
        """Whether the connection is open, and the transport has passed everything on."""

    def when_flushed(self, callback: Callable[[bool], None]) -> bool:
        """Return True if nothing waits in the transport; else call `callback` when that is so, or when it is lost.

        The callback gets whether the transport has passed everything on.
        """

    def when_half_closed(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when the client closes its side of the connection, or now if it has; None: call nothing."""

    def tells_what(self, receive: Receive) -> bool:
        """Return whether `when_lost` tells of everything of which `receive` does.

        It does not if middleware has replaced `receive`, or if other code of the same request uses `when_lost`.
        """

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback`, instead of an earlier one, when the connection is lost, or now if it is."""

    def forget_when_lost(self, callback: Callable[[], None]) -> None:
        """Do not call `callback`, unless another one has replaced it."""

    def counting_send(self, send: Send, account: "Account") -> Send | None:
        """Return the server's own function that sends as `send` does, and tells the account what it has sent.

        Return None if `send` is not the function that the server gave the application for this answer.
        """

    def end_counting(self, account: "Account") -> None:
        """Tell the account nothing more."""


class Account(Facts):
    """Counts what is sent of one answer, and makes its `Outcome`.

    is_held: whether the answer waits in an `OffloadMiddleware` further out, which ends this account.
    """

    status = 0
    sent = 0
    is_complete = False
    is_held = False
    sends_id = False
    """Whether the answer gets the id of the request as a field."""
    among: "set[Account] | None" = None
    """The accounts that have not ended, of which this is one."""
    _first: float | None = None
    _headers: Iterable[Header] = ()
    _loan: Loan | None = None
    _promised = 0  # bytes of the file that is lent
    _position = 0  # of the answer, in the stream of all answers on the connection
    _is_dropped = False
    _is_path_send = False
    _is_ending = False  # whether the server has got the last message, after which many report a disconnect
    _left_at_end = False
    _is_ended = False
    _failure: OSError | None = None
    """The error that the server has raised from `send`."""

    def __init__(
        self,
        scope: Scope,
        send: Send,
        observers: tuple[Observer, ...],
        request_id: str,
        outer: Facts | None = None,
    ) -> None:
        self.request_id = request_id
        self.outer = outer
        self._scope = scope
        self._send = send
        self._observers = observers
        self._connection: Connection | None = None
        if (extensions := scope.get("extensions")) and (connection := extensions.get(CONNECTION)) is not None:
            self._connection = connection
            connection.request_id = request_id
            self._position = connection.position
        self._began = monotonic()

    def send(self, message: Message) -> Awaitable[None]:  # not `async`: another coroutine would cost every message
        """Pass a message on, and count what the server takes."""
        kind = message["type"]
        if kind == "http.response.body":
            return self._send_body(message)
        if kind == "http.response.start":
            headers = message.get("headers", ())
            if type(headers) is not list:  # they may be such as can be read only once, and the server reads them, too
                headers = list(headers)
                message = {**message, "headers": headers}
            if self.sends_id:
                message = self._with_id(message)
                headers = message["headers"]
            self.begin(message["status"], headers)
            if self._connection is None:
                return self._pass_on(message)
        elif kind == PATHSEND:
            return self._send_file(message)
        elif kind == ZERO_COPY:
            return self._send_zero_copy(message)
        return self._send(message)

    def sending(self) -> Send:
        """Return the function by which the application sends: that of the server, if it counts for this account."""
        connection = self._connection
        return self.send if connection is None else connection.counting_send(self._send, self) or self.send

    def receiving(self, receive: Receive) -> Receive:
        """Return a function that receives messages, and notes that the client has left, if the server does not."""
        if self._connection is not None:
            return receive

        return NotingReceive(receive, self.drop)

    def drop(self) -> None:
        """Note that the client has left, if the server does not tell that by its connection."""
        if self._connection is not None or self.is_complete:
            return
        if self._is_ending:
            self._left_at_end = True
        else:
            self._is_dropped = True

    def has_failed_with(self, exc: BaseException) -> bool:
        """Return whether an error of the application is the one by which the server has told that the client left."""
        return stems_from(exc, self._failure)

    def begin(self, status: int, headers: Iterable[Header]) -> None:
        """Note the head of the answer, which leaves now."""
        self.status = status if isinstance(status, int) else 0  # no server takes another type
        self._headers, self._first = headers, monotonic()

    def count(self, length: int) -> None:
        """Count bytes of the body that the server has taken."""
        self.sent += length

    async def _send_body(self, message: Message) -> None:
        length, is_last = len(message.get("body", b"")), not message.get("more_body", False)  # middleware may change it
        if self._connection is not None:
            await self._send(message)
            self.take(length, is_last=is_last)
            return
        # Many servers report a disconnect after the end, be it that of the message or of Content-Length.
        has_all = (promised := self._length()) is not None and self.sent + length >= promised
        if is_last and length and self.sent and not has_all:  # then a disconnect tells nothing: separate the two
            await self._send_part({**message, "more_body": True}, length)
            message, length = {**message, "body": b""}, 0
        if not is_last:
            self._is_ending = has_all
            await self._send_part(message, length)
            return
        self._is_ending = True
        try:
            await self._pass_on(message)
        except BaseException:
            if self._left_at_end:  # the application may be cancelled for that, as Starlette's responses are
                self.take(length, is_last=True)
            raise
        self.take(length, is_last=True)

    async def _send_part(self, message: Message, length: int) -> None:
        """Send a part of a body, and count it unless the client has left: most servers drop it then."""
        await self._pass_on(message)
        await checkpoint()  # lets `receive` tell it
        self.take(length, is_last=False)

    async def _send_zero_copy(self, message: Message) -> None:
        file, is_last = message["file"], not message.get("more_body", False)
        await self._pass_on({**message, "more_body": True} if is_last else message)
        await checkpoint()
        if not isinstance(file, LentDescriptor) or file.is_taken:
            self.take(_length_of(message), is_last=False)
        if is_last:
            await self._send_body({"type": "http.response.body", "body": b""})

    async def _pass_on(self, message: Message) -> None:
        """Send a message. ASGI 2.4: an `OSError` tells that the client has left."""
        try:
            await self._send(message)
        except OSError as exc:
            self._is_dropped, self._failure = True, exc
            if message["type"] == "http.response.start":
                self._first = None
            raise

    def take_whole(self, length: int) -> Outcome | None:
        """Count a whole body that the server has sent at once, and end. Return the outcome if it was made now."""
        connection = self._connection
        if connection is None or self.is_held or not connection.is_flushed:
            self.take(length, is_last=True)
            return None
        self.sent += length
        self.is_complete = True
        return self.end()

    def take(self, length: int, *, is_last: bool) -> None:
        """Count bytes of a body that the server has sent, unless the client has left."""
        if (connection := self._connection) is not None:
            self._is_dropped = connection.is_broken
        if self._is_dropped:
            return
        if self._scope["method"] != "HEAD":
            self.sent += length
        if is_last:
            self._complete()

    async def _send_file(self, message: Message) -> None:
        self._is_path_send = True
        if self.name is None:
            self.name = os.path.basename(os.fsdecode(message["path"]))
        if "descriptor" in message:
            loan = self._loan = message["descriptor"].loan
            self._promised = message["count"]
            await self._send(message)
            if loan.is_taken and loan.sent == self._promised:
                self._complete()
            return
        if self._connection is None:
            self._is_ending = True
            await self._pass_on(message)
            self.sent += self._length() or 0  # the server does not tell how much it sends
            self._complete()
            return
        try:
            await self._send(message)
        finally:
            self.sent += self._connection.file_sent
        if self._connection.is_lost:
            self._is_dropped = True
            return
        self._complete()

    def _length(self) -> int | None:
        return length_of(self._fields())

    def _fields(self) -> list[Header]:
        """Return the header fields of the answer, with names in lower case; nothing if no server would take them."""
        with suppress(TypeError, ValueError):
            return [(bytes(name).lower(), bytes(value)) for name, value in self._headers]
        return []

    def _with_id(self, start: Message) -> Message:
        field = (REQUEST_ID, self.request_id.encode("latin-1"))
        made = start.get("headers", ())
        if (head := start.get(PREPARED)) is not None and REQUEST_ID not in head.lines:
            made.append(field)  # the message of `DownloadResponse`, which is made for this answer alone
            start[PREPARED] = head.with_fields([field])
            return start
        headers = [header for header in made if bytes(header[0]).lower() != REQUEST_ID]
        changed = {**start, "headers": [*headers, field]}
        changed.pop(PREPARED, None)
        return changed

    def _complete(self) -> None:
        """Note that the server has the whole answer, and end once it has left the process."""
        self.is_complete = True
        if not self.is_held and (self._connection is None or self._connection.when_flushed(self._flushed)):
            self.end()

    def _flushed(self, is_flushed: bool) -> None:
        self.is_complete = False
        self.is_complete = is_flushed or self._taken == self._passed_on
        self.end()

    @classmethod
    def within(cls, scope: Scope, send: Send, *observers: Observer) -> Self:
        """Return a further account of a request, which knows what another one around it knows."""
        outer: Facts | None = scope.get(ACCOUNT)
        if outer is None:
            return cls(scope, send, observers, new_request_id())
        account = cls(scope, send, observers, outer.request_id, outer)
        account.know(outer)
        return account

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(exc)

    @property
    def _passed_on(self) -> int:
        """Bytes of the body that the server has taken."""
        return self.sent if self._loan is None else self.sent + self._loan.sent

    @property
    def _taken(self) -> int:
        """Bytes of the body that the server has taken, without those that the end of the connection has dropped."""
        connection = self._connection
        if self.is_complete or connection is None:
            return self._passed_on
        head = sum(len(name) + len(value) + 4 for name, value in self._fields())
        return connection.taken(self._passed_on, head, self._position)

    def progress(self) -> tuple[tuple[ByteRange | None, ...], int, bool]:
        """Return the parts of a file that our answer has, the bytes that were taken, and whether these are all."""
        delivery = self.delivery if self.status == self.status_of_delivery else None
        return () if delivery is None else spans_of(delivery), self._taken, self.is_complete

    def restarted(self, send: Send) -> Send:
        """Return a function that sends another answer in place of the one that was held, and counts that."""
        self._send = send
        self.sent, self.is_held, self.is_complete = 0, False, False
        return self.send

    def leave(self, exc: BaseException | None = None) -> None:
        """End, unless the answer is complete or held: the application has returned, or raised `exc`."""
        if not self._is_ended and not self.is_complete and not self.is_held:
            # a middleware further out may have kept the path send, and passed it on later
            if self._loan is not None and self._loan.is_taken and self._loan.sent == self._promised:
                self._complete()
            else:
                self.end(exc)

    def end(self, exc: BaseException | None = None) -> Outcome | None:
        """Make the outcome, once, and return it. exc: the error that has ended the answer, if one has."""
        if self._is_ended:
            return None
        self._is_ended = True
        if self.among is not None:
            self.among.discard(self)
        outcome = self._outcome(exc)
        # All of these refer to this account: without this, only the garbage collector would free them.
        self._scope, self.inside = _NO_SCOPE, None
        if self._connection is not None:
            self._connection.end_counting(self)
        _tell(self._observers, outcome)
        return outcome

    def _outcome(self, exc: BaseException | None) -> Outcome:
        scope, status, delivery = self._scope, self.status, self.delivery
        if status != self.status_of_delivery:
            delivery = None
        spans: tuple[ByteRange | None, ...] = ()
        reason: Reason | None = None
        detail: str | None = None
        delegated_to: str | None = None
        if type(delivery) is Inline and status < 300 and self.is_complete:  # nearly all answers where each µs counts
            kind: str | None = self.kind or "inline"
            result: Result = "completed"
            sent, unacknowledged = self.sent, 0
            if delivery.span is not None:
                spans = (delivery.span,)
        else:
            kind, spans, delegated_to = self._way(delivery)
            status, result, reason, detail = self._end_of(exc, is_delegated=delegated_to is not None)
            if status >= 400:
                kind = "error" if delivery is not None or kind is not None else "other"
            sent = self._taken
            unacknowledged = self._passed_on - sent
        client, etag, first, ended = scope.get("client"), self.etag, self._first, monotonic()
        outcome = _new(Outcome)  # its `__init__` would take twice as long
        outcome.request_id = self.request_id
        outcome.time = time()
        outcome.method = scope["method"]
        outcome.path = scope["path"]
        outcome.http_version = scope.get("http_version", "1.1")
        outcome.client = client[0] if client else None
        outcome.route = self.route or route_of(scope if self.inside is None else self.inside)
        outcome.source = self.source
        outcome.name = self.name
        outcome.etag = None if etag is None else str(etag)
        outcome.size = self.size
        outcome.user = self.user
        outcome.link_id = self.link_id
        outcome.status = int(status)
        outcome.kind = kind or "other"
        outcome.spans = spans
        outcome.sent = sent
        outcome.first_byte = None if first is None else first - self._began
        outcome.seconds = ended - self._began
        outcome.result = result
        outcome.reason = reason
        outcome.detail = detail
        outcome.delegated_to = delegated_to
        outcome.headers = scope["headers"]
        outcome.unacknowledged = unacknowledged
        return outcome

    def _way(self, delivery: Delivery | None) -> tuple[str | None, tuple[ByteRange | None, ...], str | None]:
        """Return the kind, the spans, and what the answer is delegated by."""
        kind, status = self.kind, self.status
        if delivery is None:
            if self.etag is not None or not (self._is_path_send or status in (200, 206)):
                return kind, (), None
            spans = self._look_at_head()
            return self._kind_of_path() if self._is_path_send else kind, spans, None
        way = type(delivery)
        if isinstance(delivery, Offloaded):
            by = delivery.by.encode("latin-1")
            if status != 200 or all(name != by for name, _ in self._fields()):
                return kind, (), None
            return f"offloaded:{self.proxy or _PROXIES.get(delivery.by, delivery.by)}", (), delivery.by
        if way is Redirected:
            return "redirected", (), "location"
        if way is Pieces and not (self._loan is not None and self._loan.has_files):
            kind = kind or "chunks"
        elif kind is None:
            by_path = way is Descriptor or way is Pieces or way is Path
            kind = self._kind_of_path() if by_path else kind_of(delivery)
        return kind, spans_of(delivery), None

    def _end_of(
        self, exc: BaseException | None, *, is_delegated: bool
    ) -> tuple[int, Result, Reason | None, str | None]:
        """Return the status, the result, and for an aborted answer its reason and the text of the error."""
        status = self.status
        if not self.is_complete:
            if status == 0 and isinstance(exc, FileError) and raises_errors(self._scope):
                return exc.status_code, "refused", None, None
            reason, detail = self._why(exc)
            if status == 0 and reason == "failed" and exc is not None:
                status = 500  # so answers the server
            elif reason != "client-left" or not self._has_all():
                return status, "aborted", reason, detail
            else:
                detail = None
        else:
            detail = None
        if status >= 400:
            return status, "refused", None, detail
        if status == 304:
            return status, "not-modified", None, None
        return status, "delegated" if is_delegated else "completed", None, None

    def _has_all(self) -> bool:
        """Return whether a client that has left before the end of the application has its whole answer."""
        if self._first is None:
            return False
        return self._scope["method"] == "HEAD" or self.status in (204, 304) or self._taken == self._length()

    def _look_at_head(self) -> tuple[ByteRange | None, ...]:
        """Note the file of an answer that is not ours, if its head has an ETag, and return which part of it is sent."""
        fields = dict(self._fields())
        if b"etag" not in fields:
            return ()
        self.etag = fields[b"etag"].decode("latin-1")
        length = self._length()
        named = parse_content_range(fields.get(b"content-range", b"").decode("latin-1"))
        if self.status == 206 and named is not None:
            part, self.size = named
            return (part,)
        if self.status != 200 or length is None:
            return ()
        self.size = length
        return (ByteRange(0, length),) if self._scope["method"] != "HEAD" else ()

    def _kind_of_path(self) -> str:
        """Return how a file left that was to be sent by its descriptor or path: middleware may drop such a message."""
        if not self._is_path_send or (self._loan is not None and not self._loan.is_taken):
            return "chunks"
        return "path" if self._connection is None else "zero-copy"

    def _why(self, exc: BaseException | None) -> tuple[Reason, str | None]:
        """Return why the answer is incomplete."""
        connection = self._connection
        is_lost = self._is_dropped or (connection is not None and (connection.is_broken or connection.has_failed()))
        if connection is not None and connection.is_stalled:
            return "stalled", None
        if exc is not None and not isinstance(exc, Exception):  # cancelled
            return ("client-left" if is_lost else "server-stopped"), None
        if isinstance(exc, ClientDisconnect):
            return "client-left", None
        detail = None if exc is None else _text_of(exc)
        if is_lost and (exc is None or isinstance(exc, OSError)):
            return "client-left", detail
        if exc is None:
            return "failed", None
        reason = "source-failed" if isinstance(exc, OSError) else abort_reason(exc)
        if is_lost and reason in (None, "source-failed"):
            return "client-left", detail
        return reason or "failed", detail


def hold_accounts(facts: Facts | None, outside: Facts | None) -> list[Account]:
    """Hold the accounts of an answer that waits in an `OffloadMiddleware`, and return them, the innermost first.

    facts: those of the request where it is answered. outside: those outside of the middleware, which count later.
    """
    held = []
    while facts is not None and facts is not outside:
        if isinstance(facts, Account):
            facts.is_held = True
            held.append(facts)
        facts = facts.outer
    return held


class Accounts:
    """Gives the `Outcome` of each HTTP request that `app` answers to listeners: exactly one, however the answer ends.

        async def note(outcome):
            print(outcome.name, outcome.result, outcome.sent)

        app = Accounts(app, listeners=[note])

    Put it around all other middleware, `OffloadMiddleware` too, so that it sees what leaves.

    listeners: async or plain functions. Each gets the outcomes in order, one after the other: an async one in a task, a
    plain one in a thread. A listener that is slow, hangs or raises delays no answer and no other listener.
    observers: plain functions that are called at once, in the event loop, when the answer has ended. They must neither
    block nor raise.
    max_waiting: how many outcomes wait for one listener. Further ones are dropped, and a line in the log tells how
    many, at most once a minute.
    trusted_proxies: the addresses and networks whose `X-Request-Id` is the id of the request; `*` for all. Other
    requests get a random id.
    sends_request_id: whether each answer gets the id as its `X-Request-Id`.

    When the server shuts down, `Accounts` waits up to half a second for the answers that are ending, and then up to 5
    seconds for the listeners, before the application shuts down. Without a lifespan, outcomes that wait then are lost.

    Raises `ConfigurationError` for listeners that are not functions, and for an invalid address.
    """

    def __init__(
        self,
        app: ASGIApp,
        listeners: Sequence[Listener] = (),
        *,
        observers: Sequence[Observer] = (),
        max_waiting: int = MAX_WAITING,
        trusted_proxies: Iterable[str] = (),
        sends_request_id: bool = False,
    ) -> None:
        if not callable(app):
            raise wrong_type("Accounts takes an ASGI application", app)
        if not isinstance(observers, Iterable) or not all(callable(observer) for observer in observers):
            raise WrongType(f"observers is {observers!r}: give a list of functions that take an Outcome")
        if waiting := [one for one in observers if iscoroutinefunction(one) or iscoroutinefunction(type(one).__call__)]:
            raise WrongType(f"observers has {waiting[0]!r}, which is async: give it as a listener")
        self.app = app
        self._open: set[Account] = set()
        self._listeners = Listeners(listeners, max_waiting)
        self._trusted = TrustedAddresses(trusted_proxies)
        self._trusts = bool(self._trusted)
        self.sends_request_id = sends_request_id
        self._observers = (*observers, *([self._listeners.put] if listeners else []))

    async def __call__(self, scope: Scope, receive: Receive, send: Send, app: ASGIApp | None = None) -> None:
        """Pass the request on, and report its outcome. app: answers this request in place of the application."""
        if scope["type"] != "http":
            await (self._live(scope, receive, send) if scope["type"] == "lifespan" else self.app(scope, receive, send))
            return
        outer: Facts | None = scope.get(ACCOUNT)
        scope = {**scope}
        scope[ACCOUNT] = account = self.begin(scope, send, outer)
        if outer is not None:
            outer.enter(scope)
        try:
            await (app or self.app)(scope, account.receiving(receive), account.sending())
        except BaseException as exc:
            account.leave(exc)
            if account.has_failed_with(exc):
                return  # the server would log it
            if isinstance(exc, Exception) and outer is None:
                with suppress(TypeError):  # for an exception with notes of another type
                    exc.add_note(f"request {account.request_id}")
            raise
        account.leave()

    def begin(self, scope: Scope, send: Send, outer: Facts | None = None, request_id: str | None = None) -> Account:
        """Return the account of one more request, whose outcome the listeners get when it ends.

        request_id: what `identify` has returned for the request, if it has.
        """
        if request_id is None:
            request_id = self.identify(scope) if outer is None else outer.request_id
        account = Account(scope, send, self._observers, request_id, outer)
        account.sends_id = self.sends_request_id
        self._open.add(account)
        account.among = self._open
        return account

    def identify(self, scope: Scope) -> str:
        """Return the id of a request: that of a trusted proxy, or a new one."""
        if self._trusts and REQUEST_ID in dict(scope["headers"]):
            return self._request_id(scope)
        return new_request_id()

    def report(self, outcome: Outcome) -> None:
        """Give the listeners the outcome of an answer that has no account, because it ended as soon as it began."""
        _tell(self._observers, outcome)

    @property
    def in_progress(self) -> int:
        """How many requests have been received whose answers have not ended."""
        return len(self._open)

    def _request_id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == REQUEST_ID and _REQUEST_ID.fullmatch(value) and self._trusted.has(peer_of(scope)):
                return str(value, "ascii")
        return new_request_id()

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_and_drain() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                deadline = monotonic() + ENDING_SECONDS
                while self._open and monotonic() < deadline:  # noqa: ASYNC110
                    await anyio.sleep(0.005)  # an event would cost each request something
                for account in [*self._open]:
                    account.is_complete = False
                    account.end(asyncio.CancelledError())
                await self._listeners.drain(DRAIN_SECONDS)
            return message

        async def end_and_send(message: Message) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self._listeners.drain(1)
                self._listeners.end()
            await send(message)

        await self.app(scope, receive_and_drain, end_and_send)


def _tell(observers: tuple[Observer, ...], outcome: Outcome) -> None:
    for observer in observers:
        try:
            observer(outcome)
        except Exception:
            logger.exception("an observer of outcomes has raised")


def route_of(scope: Mapping[str, Any]) -> str | None:
    """Return the path of the route, with those of the mounts around it; None if no router has put it into the scope.

    Starlette does not tell the paths of mounts, but what they have matched. So the parameters there are replaced by
    their names, and if these cannot be told from the rest, the path of the route stays alone.
    """
    route = scope.get("route")
    path: str | None = getattr(route, "path", None)
    if path is None or "app_root_path" not in scope:
        return path
    segments = scope["root_path"].removeprefix(scope["app_root_path"]).split("/")
    is_mount = isinstance(route, Mount)
    for name, value in scope["path_params"].items():
        if is_mount or name not in getattr(route, "param_convertors", ()):
            if segments.count(str(value)) != 1:
                return path
            segments[segments.index(str(value))] = f"{{{name}}}"
    return "/".join(segments) + ("" if is_mount else path)


def _length_of(message: Message) -> int:
    """Return how many bytes a Zero Copy Send has: without a count, all to the end of the file."""
    if (count := message.get("count")) is not None:
        return int(count)
    number, offset = message["file"], message.get("offset")
    if hasattr(number, "fileno"):
        number = number.fileno()
    try:
        start = os.lseek(number, 0, os.SEEK_CUR) if offset is None else offset
        return max(0, os.fstat(number).st_size - int(start))
    except OSError:  # it is closed, or a pipe
        return 0


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc) or type(exc).__name__
    except Exception:  # of an application, whose error must not cost the outcome
        return type(exc).__name__


# Read in blocks: each id is as hard to guess as one that is read alone.
_ids: deque[str] = deque()
os.register_at_fork(after_in_child=_ids.clear)  # else both processes would give the same ids


def new_request_id() -> str:
    """Return a new random id: 32 hexadecimal digits."""
    try:
        return _ids.popleft()  # so two threads never get the same
    except IndexError:
        first, *others = _ID.findall(os.urandom(_RANDOM_BYTES).hex())
        _ids.extend(others)
        return str(first)
