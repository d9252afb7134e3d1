"""`DownloadProtocol`: uvicorn's protocol for one connection, with bounds on the input, path sends and an orderly close.

    uvicorn app:app --http downloadview_async.asgi.server:DownloadProtocol

Theory of operation
===================

Input. httptools cannot stop between two requests: it reads all bytes that it is given. So `_parse` gives it pieces that
end where a request may end, and stops after each request until its answer is complete. What the client sends by then
waits as unparsed bytes: one request at a time is parsed, and one application runs. Beyond `MAX_WAITING_BYTES` the
transport reads no more. `MAX_HEAD_BYTES` bounds a head, and what surrounds the data of a chunked body. While too much
of a body waits for the application, uvicorn reads no more. `heads` refuses heads that httptools lets pass. Trailers are
dropped.

Output. If the answer to a request is kept (`KeptAnswers`) and small, the protocol sends it at once, and no cycle is
made. If, besides, all fields of the head are those of an earlier request byte by byte, it is not parsed. Else the
application, or a kept answer in its place, sends messages to its `DownloadCycle`. A prepared head waits for its body,
and one write sends both. A path send makes the kernel copy a file to the socket (`sendfile`); it first waits until the
transport has sent all that it holds. The scope offers these two where the socket is plain: to Starlette path sends, to
`DownloadResponse` also a descriptor with an offset and a count, a body in pieces of which some are files, and prepared
heads. Everything else is sent by uvicorn: by Content-Length, in chunks, or, to HTTP/1.0 without a length, until the
connection ends.

The end. The protocol closes the connection, not uvicorn's cycle: after a refusal, and after the last answer. An answer
is the last one if the client or the application says so, if the request is HTTP/1.0, if the server shuts down, if its
head leaves while the server drains, if the client has half-closed and no further request waits, or if it begins before
the application has read a body that is long, or that waits for 100 (Continue). A shorter or chunked body is dropped
after the answer. A chunked one that turns out to be long closes the connection: a client cannot use it for its next
request before it has sent all of the body.
To close a socket while bytes come from the client resets the connection, and the client may lose the answer [RFC 9112
9.6]. So `_close` closes this side alone and drops what comes, until the client closes or `LINGER_SECONDS` are over. It
closes the socket at once where the client has nothing more to send and has taken all, and where the socket is not
plain. A client that has half-closed after a whole request gets its answer. Nothing is ever written into another answer:
the connection is reset instead.
Linux keeps what a closed socket has not sent for as long as the client's machine answers, even if the client reads
nothing. So over TCP the socket stays open, and the client is watched, until it has taken the last byte; TLS ends only
then. Where the socket has to be closed before, the kernel gets `stall_seconds` for it (`limit_queue`). What is sent
over a Unix socket belongs to the client's socket at once, and cannot be dropped.

Timers. The loop calls a protocol, which has no coroutine that could hold a task group, so these are `call_later`.

- The head timer, `stall_seconds`: from the connection to the end of its first head, and from the first byte of a later
  head to its end. Then the connection is closed.
- The idle timer, uvicorn's `timeout_keep_alive`: from the end of an answer to the first byte of the next request. While
  closing it has `LINGER_SECONDS`, or `GRACE_SECONDS` when the server shuts down. It is not set anew for each request:
  when it rings, it looks at `_idle_since`. The connection stays open while the client still takes bytes that were sent,
  at `minimum_rate` or faster. While closing it rings up to every second, and sees whether the client has taken all; a
  client of TLS that does not confirm the end has `LINGER_SECONDS` for that.
- The grace timer, `GRACE_SECONDS`: from the shutdown of the server to the end of a head that may be on its way.
- The hang-up timer, every second: after a half-close nothing is read, so a reset by the client would go unnoticed.
- The timer of the watchdog, one for all connections of a loop: it runs while something waits for a client, or the
  client has not taken all of its last answer.

States
======

A state is the phase of the input, and whether an answer is under way. Each request passes through HEAD and BODY, also
one without a body.

    state    | phase   | answer    | bytes                          | unreadable bytes        | end of the input
    ---------+---------+-----------+--------------------------------+-------------------------+------------------
    NEW      | BETWEEN | none      | parsed: HEAD                   | refused: CLOSING        | CLOSING
    IDLE     | BETWEEN | complete  | parsed: HEAD                   | refused: CLOSING        | CLOSING
    HEAD     | HEAD    | none yet  | parsed: BODY, after its end    | refused: CLOSING        | CLOSING
    BODY     | BODY    | under way | for the application: ANSWER,   | reset                   | closed
             |         |           | after the end of the body      |                         |
    ANSWER   | BETWEEN | under way | wait                           | wait                    | half-closed
    REST     | BODY    | complete  | dropped: IDLE, after the end   | CLOSING                 | CLOSING
             |         |           | of the body; CLOSING, if it is |                         |
             |         |           | longer than `MAX_UNREAD_BODY`  |                         |
    CLOSING  | CLOSING | complete  | dropped                        | dropped                 | half-closed
             |         | or none   |                                |                         |

    state    | the answer is complete   | head timer | idle timer | the server shuts down
    ---------+--------------------------+------------+------------+-----------------------------------------------
    NEW      |                          | closed     |            | CLOSING after the grace, unless a head comes
    IDLE     |                          |            | closed     | closed; as NEW if the kernel has unread bytes
    HEAD     |                          | closed     |            | CLOSING after the grace, unless its end comes
    BODY     | REST or CLOSING          |            |            | this answer becomes the last one
    ANSWER   | IDLE or CLOSING, or what |            |            | this answer becomes the last one
             | the waiting bytes begin  |            |            |
    REST     |                          |            | closed     | CLOSING after the grace, unless a head comes
    CLOSING  |                          |            | closed     | closed after the grace

- "refused": answered by 400, 501 or 505. A head that is complete may be refused, too.
- "closed": by the transport, when it has sent what it holds. Where a client does not take that, it is watched. If the
  head is late and the client has not taken all of an answer before it, CLOSING.
- "dropped": beyond `MAX_UNREAD_BODY`, CLOSING pauses reading.
- "half-closed": remains in its state where the socket is plain, until the client has taken all; else closed.
- "CLOSING" at the end of the input: closed at once if the client has taken all, or where the socket is not plain.

Empty lines before a head leave NEW and IDLE as they are. An upgrade leaves the transport to another protocol, and the
phase is CLOSING, in which nothing more is done here. In any state, the loss of the connection ends all timers and a
path send, and the application gets `http.disconnect`.
"""

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from httptools import HttpRequestParser

from downloadview_async.asgi.deadline import STALL_SECONDS
from downloadview_async.asgi.disconnect import MAX_UNREAD_BODY
from downloadview_async.asgi.extensions import CONNECTION, PACE, PATHSEND, PREPARED, REQUEST_ID
from downloadview_async.asgi.kept_answers import DECIDING, KEPT_ANSWERS, KeptAnswer, KeptAnswers, KnownFields
from downloadview_async.asgi.uvicorn.cycle import CONNECTION_CLOSE, DownloadCycle, lines_of
from downloadview_async.asgi.uvicorn.encrypted import MOST_HELD, CountingTransport, EncryptedStream
from downloadview_async.asgi.uvicorn.flow import Flow, Signal
from downloadview_async.asgi.uvicorn.heads import Refused, read_head
from downloadview_async.asgi.uvicorn.internals import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
    ServerState,
)
from downloadview_async.asgi.uvicorn.sendfile import end_flush, flush
from downloadview_async.asgi.uvicorn.sockets import (
    acknowledged_bytes,
    has_hung_up,
    has_socket,
    has_taken_all,
    has_unread_bytes,
    is_on_unix_socket,
    limit_queue,
    reset,
    set_pace,
    unpaced_segments,
    untaken_bytes,
)
from downloadview_async.asgi.uvicorn.watchdog import (
    MINIMUM_RATE,
    Watch,
    drop_client,
    patience_with,
    quota_of,
    start_watching,
    stop_watching,
)

if TYPE_CHECKING:
    from downloadview_async.asgi.accounts import Account

MAX_HEAD_BYTES = 80 * 1024
"""The longest head of a request: its first line and its header fields, one of which may have 64 KiB.

Chunk extensions, trailers and whatever else surrounds a chunked body may be as long.
"""

MAX_WAITING_BYTES = 16 * 1024
"""Bytes of pipelined requests after which no more is read until the answer before them is complete."""

LINGER_SECONDS = 5.0
"""How long a client may go on sending, or reading, after the last byte of its connection was sent."""

GRACE_SECONDS = 0.5
"""How long a connection may take to begin its first request when the server shuts down; also `LINGER_SECONDS` then."""

_END_OF_HEAD = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"  # of a chunked body, without data [RFC 9112 7.1]

_FIRST_LOOK, _LAST_LOOK = 0.01, 1.0  # seconds: how often it is asked whether a client has taken its last answer

_PACE_SECONDS = 0.1  # how often it is asked whether a client has taken the last byte of a paced answer

_FEW_HELD = 4096  # up to so many bytes in the transport, asking the kernel costs more than it tells

_OF_CYCLES = ("method", "http_version", "headers")  # of a scope, what a cycle needs to the end

_PATH_SEND: Any = {"descriptor": True, PREPARED: True}  # what this server's path send takes


class _Phase(Enum):
    """Which part of the connection's input is being read."""

    BETWEEN = 0
    HEAD = 1
    BODY = 2
    CLOSING = 3


_BETWEEN, _HEAD, _BODY, _CLOSING = _Phase  # a global name is faster than an attribute of the class

# The servers that are shutting down, or that drain: connections that they still accept end after one request.
_shutting_down: WeakSet[ServerState] = WeakSet()
_draining: WeakSet[ServerState] = WeakSet()


def _split(head: bytes) -> tuple[bytes, bytes]:
    """Return the first line of a head, and the header section, which begins with the end of that line."""
    end = head.index(b"\r\n")
    return head[:end], head[end:]


class _Trailers:
    """Replaces the list of headers while a body is read: trailers are not headers [RFC 9110 6.5.1]."""

    def append(self, field: tuple[bytes, bytes]) -> None:
        """Drop a field."""


_TRAILERS: Any = _Trailers()


class DownloadProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with path sends and a watch over clients that do not read.

    stall_seconds, minimum_rate (bytes per second): a client that takes less on the average of so many seconds is
    dropped, and so is one that has not sent the whole head of a request in that time. To set other values, give uvicorn
    `functools.partial(DownloadProtocol, stall_seconds=...)` as `http`.
    kept_answers: returns where the application may keep answers for the server to give again, or None: see
    `KeptAnswers`. uvicorn has no part in these, so not with its `root_path`, `limit_concurrency` or access log.
    """

    # Not in the dictionary of the instance: with more keys it would weigh twice as much.
    __slots__ = (
        "_body_left",
        "_cycle",
        "_dropped_bytes",
        "_encrypted",
        "_framing_bytes",
        "_has_plain_socket",
        "_head_timer",
        "_held",
        "_idle_since",
        "_is_draining",
        "_is_half_closed",
        "_is_on_unix_socket",
        "_is_shutting_down",
        "_kept_answers",
        "_may_be_paced",
        "_on_half_close",
        "_on_loss",
        "_pace_timer",
        "_paused",
        "_phase",
        "_tail",
        "_unparsed",
        "_unparsed_from",
        "_untaken_at_loss",
        "_untaken_since",
        "_whole_head",
        "file_sent",
        "flushed",
        "is_lost",
        "is_stalled",
        "last_watch",
        "minimum_rate",
        "paced_at",
        "request_id",
        "slowest_pace",
        "stall_seconds",
    )

    def __init__(
        self,
        *args: Any,
        stall_seconds: float = STALL_SECONDS,
        minimum_rate: int = MINIMUM_RATE,
        kept_answers: Callable[[], KeptAnswers | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.pipeline: Any = ()  # stays empty: requests wait as bytes. uvicorn's deque weighs 760 bytes
        self.parser: Any = self.parser  # None while it is not needed: see `pause_writing`
        self._set_leniencies()
        self.stall_seconds = stall_seconds
        self.minimum_rate = minimum_rate
        self._kept_answers = kept_answers
        self.is_lost = False
        self.is_stalled = False
        self.last_watch: Watch | None = None
        self.file_sent = 0
        self.request_id: str | None = None
        self._paused: tuple[int, int] | None = None  # the untaken bytes, and those acknowledged, when writing paused
        self._held = 0  # bytes in the transport when writing paused
        self._untaken_at_loss = 0
        self._encrypted: EncryptedStream | None = None
        self.flushed: asyncio.Future[bool] | None = None
        self._has_plain_socket = False
        self._is_on_unix_socket = False
        self._phase = _BETWEEN
        self._unparsed = b""  # from `_unparsed_from` on, bytes that wait until the answer before them is complete
        self._unparsed_from = 0
        self._tail = b""  # the last three bytes of a head, or of a chunked body, that is not complete
        self._framing_bytes = 0  # bytes of a head, or of what surrounds the data of a body
        self._body_left: int | None = 0  # bytes of a body that are still to come, None if it is chunked
        self._dropped_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self._untaken_since: tuple[float, int] | None = None  # a time, and how many bytes the client had not taken then
        self._whole_head: bytes | None = None  # the head that is being read, if it may get a kept answer
        self._is_half_closed = False
        self._on_half_close: Callable[[], None] | None = None
        self._on_loss: Callable[[], None] | None = None
        self._is_draining = False
        self._is_shutting_down = False
        self.paced_at: int | None = None
        self.slowest_pace: int | None = None
        self._pace_timer: asyncio.TimerHandle | None = None
        self._may_be_paced = False

    @property
    def cycle(self) -> Any:
        """The request that is being answered, or the last one: a `DownloadCycle`.

        None before the first, and after an answer that was kept.
        """
        return self._cycle

    @cycle.setter
    def cycle(self, cycle: RequestResponseCycle | None) -> None:
        """Give uvicorn's cycle our class, as soon as uvicorn assigns it.

        Later would be too late for eager tasks: `super().on_headers_complete()` begins to run the application.
        """
        if cycle is not None:
            cycle.__class__ = DownloadCycle
            cycle.message_event = Signal()  # type: ignore[assignment]
        self._cycle: Any = cycle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        if transport.get_extra_info("sslcontext"):
            counting = CountingTransport(transport, self._look_for_reset)
            self._encrypted = EncryptedStream(counting)
            transport = counting.as_transport()
        super().connection_made(transport)
        self.flow: Any = Flow(transport)
        self._has_plain_socket = has_socket(self) and not transport.get_extra_info("sslcontext")
        self._is_on_unix_socket = is_on_unix_socket(self)
        self._may_be_paced = has_socket(self) and not self._is_on_unix_socket and sys.platform == "linux"
        if self._has_plain_socket:
            # While the transport holds anything, writing is paused: so it is known what a loss drops.
            transport.set_write_buffer_limits(high=0)
        elif self._encrypted is not None:
            transport.set_write_buffer_limits(high=MOST_HELD)
        self._is_shutting_down = self.server_state in _shutting_down
        self._is_draining = self._is_shutting_down or self.server_state in _draining
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Parse what the client sends, keep it until an answer is complete, or drop it while closing."""
        if self._phase is _CLOSING:
            self._drop_input(data)
        elif self._unparsed:
            self._let_wait(self._unparsed[self._unparsed_from :] + data, 0)
        else:
            idle_since, self._idle_since = self._idle_since, None
            if self._is_one_head(data):
                if has_answered := self._has_answered_known(data):
                    return
                self._framing_bytes += len(data)
                if self.parser is None:
                    self._make_parser()
                if has_answered is None:  # else the application has to answer
                    self._whole_head = data
                super().data_received(data)
                self._whole_head = None
                if self._phase is _HEAD:
                    self._start_head_timer()
            else:
                self._parse(data, 0)
            is_idle = self._idle_since is None and not self._is_answering() and self._phase in (_BETWEEN, _BODY)
            if idle_since is not None and is_idle:
                self._idle_since = idle_since  # empty lines and the rest of a body do not begin a request

    def _set_leniencies(self) -> None:
        # uvicorn sets the first one, too, and `read_head` checks the version
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True, lenient_version=True)

    def _make_parser(self) -> None:
        """Make another parser in place of the one that was dropped while the client stalled."""
        self.parser = HttpRequestParser(self)
        self._set_leniencies()

    def forget_scope(self) -> None:
        """Forget what only the application needs of the scope, when it has returned or the answer is complete.

        The scope refers to the connection: without this, only the garbage collector would free both.
        """
        cycle = self._cycle
        if cycle is not None and self.scope is cycle.scope:
            scope: Any = {name: self.scope[name] for name in _OF_CYCLES}
            self.scope = cycle.scope = scope

    def _is_answering(self) -> bool:
        cycle = self._cycle
        return cycle is not None and not cycle.response_complete

    def _is_one_head(self, data: bytes) -> bool:
        """Return whether the data is the next head as a whole, as nearly always: then it needs no search for pieces."""
        return (
            self._phase is _BETWEEN
            and 0 <= data.find(_END_OF_HEAD) == len(data) - len(_END_OF_HEAD)
            and self._framing_bytes + len(data) <= MAX_HEAD_BYTES
            and not self._tail
            and not self._is_answering()
        )

    def _parse(self, data: bytes, start: int) -> None:
        """Give the parser the bytes from `start` on, piece by piece, until an answer has to be completed."""
        size = len(data)
        while start < size:
            phase = self._phase
            if phase is _CLOSING:
                return
            if phase is _BETWEEN and self._is_answering():
                self._let_wait(data, start)
                return
            end = self._end_of_piece(data, start)
            piece = data if end - start == size else data[start:end]
            start = end
            self._framing_bytes += len(piece)
            if self.parser is None:
                self._make_parser()
            super().data_received(piece)
            if self._framing_bytes > MAX_HEAD_BYTES:
                self._refuse_excess()
        if self._phase is _HEAD:
            self._start_head_timer()
            if self._is_http_09(data):
                self._refuse(505, "HTTP Version Not Supported")

    def _end_of_piece(self, data: bytes, start: int) -> int:
        """Return where a message may end, or the end of the data."""
        if self._phase is _BODY and self._body_left is not None:
            end = min(start + self._body_left, len(data))
            self._body_left -= end - start
            return end
        most = start + max(1, MAX_HEAD_BYTES + 1 - self._framing_bytes)
        tail, self._tail = self._tail, b""
        if tail:  # the end of the head may be split over two pieces or more
            across = (tail + data[start : start + 3]).find(_END_OF_HEAD)
            end = start + across + len(_END_OF_HEAD) - len(tail)
            if across >= 0:
                return end
        end = data.find(_END_OF_HEAD, start, most)
        if end >= 0:
            return end + len(_END_OF_HEAD)
        end = min(most, len(data))
        self._tail = (tail + data[max(start, end - 3) : end])[-3:]
        return end

    def _let_wait(self, data: bytes, start: int) -> None:
        """Keep the bytes from `start` on until the answer before them is complete. Pause reading if they are many."""
        self._unparsed, self._unparsed_from = data, start
        if len(data) - start > MAX_WAITING_BYTES:
            self.flow.pause_reading()
            self.flow.is_full = True

    def _is_http_09(self, data: bytes) -> bool:
        """Return whether the client has sent one line without a version: in HTTP/0.9 nothing follows it."""
        return data.endswith(b"\r\n") and self._framing_bytes == len(self.parser.get_method()) + len(self.url) + 3

    def on_message_begin(self) -> None:
        """Begin to count the bytes of a request head."""
        super().on_message_begin()
        self._phase = _HEAD

    def on_headers_complete(self) -> None:
        """Refuse the head, or let uvicorn start the application."""
        self._end_head_timer()
        version = self.parser.get_http_version()
        try:
            self.url, self._body_left = read_head(
                self.headers,
                self.url,
                version,
                is_on_unix_socket=self._is_on_unix_socket,
                is_upgrade=self.parser.should_upgrade(),
            )
        except Refused as refused:
            self._refuse(refused.status, refused.text)
            return
        answers = None if self._kept_answers is None or not self._has_plain_socket else self._kept_answers()
        # of requests in one packet, each waits for its turn: a client that sends thousands would hold up all others
        if answers is not None and self._whole_head is not None and self._may_be_given_again(version):
            target, headers = self.url, self.headers
            if self._has_given_again(answers, answers.get(target)):
                first, section = _split(self._whole_head)
                if not self._is_on_unix_socket and first == b"GET %s HTTP/1.1" % target:
                    answers.keep_fields(section, headers)
                self._phase = _BODY
                self._framing_bytes = 0
                self.headers = _TRAILERS
                return
        scope = self.scope
        extensions: Any = {PATHSEND: _PATH_SEND, CONNECTION: self} if self._has_plain_socket else {}
        if answers is not None:
            extensions[KEPT_ANSWERS] = answers
        if self._may_be_paced:
            extensions[PACE] = self
            if self.paced_at is not None and self._pace_timer is None:
                self._end_pace(acknowledged_bytes(self) + untaken_bytes(self))
            if not self._has_plain_socket:
                extensions[CONNECTION] = self
                if self._encrypted is not None:
                    with suppress(OSError):  # without one more descriptor, all that the transport has accepted counts
                        self._encrypted.open(self)
        if extensions:
            scope["extensions"] = extensions
        super().on_headers_complete()  # an invalid target raises an error here, while the phase is still HEAD
        self._phase = _BODY
        self._framing_bytes = 0
        if version != "1.1" and version != "1.0":  # a later minor version [RFC 9110 2.5]
            scope["http_version"] = "1.1"
        if self.parser.should_upgrade():
            return  # uvicorn looks at these headers again
        self.headers = _TRAILERS
        if self._is_draining:
            self._cycle.keep_alive = False

    def _has_answered_known(self, data: bytes) -> bool | None:
        """Answer a request whose header section is, byte by byte, that of an earlier one which got a kept answer.

        Otherwise it has to be parsed. Return None if it is not known, and False if the application has to answer it.
        """
        if self._kept_answers is None or self._is_on_unix_socket or not self._has_plain_socket:
            return None
        if (answers := self._kept_answers()) is None:
            return None
        first, section = _split(data)
        target = first[4:-9]
        if (
            (known := answers.known_fields(section)) is None
            or first != b"GET %s HTTP/1.1" % target
            or (answer := answers.get(target)) is None
        ):
            return None
        super().on_message_begin()
        self.url, self.scope["headers"] = target, known.headers
        if not self._has_given_again(answers, answer, known):
            return False
        self._end_head_timer()
        self._framing_bytes = 0
        return True

    def _may_be_given_again(self, version: str) -> bool:
        """Return whether the head that has been read is one whose answer may be a kept one."""
        return (
            version == "1.1"
            and self.parser.get_method() == b"GET"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
            and self._body_left == 0
            and DECIDING.isdisjoint(dict(self.headers))
        )

    def _has_given_again(
        self, answers: KeptAnswers, answer: KeptAnswer | None, known: KnownFields | None = None
    ) -> bool:
        """Give the answer that is kept for this request, and return True; or return False: the application answers."""
        if (
            answer is None
            or self._is_draining
            or self.paced_at is not None
            or self.flow.write_paused
            or (lines := lines_of(self.server_state.default_headers)) is None
        ):
            return False
        began = monotonic()
        scope: Any = self.scope
        before = scope["client"], scope["scheme"]
        request_id = answers.identify(scope, known)
        if (
            (grant := answer.grant_for(self.url[len(answer.target) + 1 :], scope)) is None
            or not answer.may_be_had(scope)
            or (response := answers.response_of(answer)) is None
            or not answer.is_counted(scope)
        ):
            scope["client"], scope["scheme"] = before  # the application believes the proxy anew
            return False
        answer.note_grant()
        lines_of_head, body = response
        self.request_id = request_id
        line = b""
        if request_id is not None and answers.sends_request_id:
            line = b"%s: %s\r\n" % (REQUEST_ID, request_id.encode())
        self.transport.write(b"".join((STATUS_LINE[answer.status], lines, lines_of_head, line, b"\r\n", body)))
        self.server_state.total_requests += 1
        if request_id is not None:
            answers.count(answer, grant, scope, self, request_id, began, body)
        # The last answer has no cycle. The scope refers to this connection, and the cycle before it may do so.
        nothing: Any = None
        self.scope = self._cycle = nothing
        self._begin_to_wait()
        return True

    def pace(self, rate: int) -> None:
        """Have the kernel send at a rate, in bytes per second, until the next request."""
        if self._pace_timer is not None:
            self._pace_timer.cancel()
            self._pace_timer = None
        self.slowest_pace = rate if self.slowest_pace is None else min(rate, self.slowest_pace)
        self.paced_at = rate
        set_pace(self, rate)
        if self._has_plain_socket and not self._cycle.response_started and (count := unpaced_segments(self)):
            self._cycle.begin_in_segments(count)

    def _end_pace(self, end: int) -> None:
        """End the pace of an answer when the client has taken its last byte: the next answer must not keep it.

        end: the bytes of the connection up to that one.
        """
        self._pace_timer = None
        if acknowledged_bytes(self) < end and not self.is_lost:
            self._pace_timer = self.loop.call_later(_PACE_SECONDS, self._end_pace, end)
        else:
            self.paced_at = self.slowest_pace = None
            set_pace(self, None)

    def acknowledged(self) -> int:
        """Return how many bytes the client has taken since the connection began."""
        return acknowledged_bytes(self)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body, which allows for what surrounds it: even a chunk of one byte needs six more."""
        self._framing_bytes = max(0, self._framing_bytes - 16 - 2 * len(body))
        if not self._is_answering() and self._phase is _BODY:
            self._dropped_bytes += len(body)
            if self._dropped_bytes > MAX_UNREAD_BODY:
                self._close(is_expecting=True)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Go on to the next request when this one is answered."""
        if self._phase is _BODY:
            self._phase = _BETWEEN
            self._framing_bytes = self._dropped_bytes = 0
            if self._is_answering():
                super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not a request, in uvicorn's words."""
        is_other_version = self._phase is _HEAD and self.parser.get_http_version()[0] not in "01"
        self._refuse(505 if is_other_version else 400, msg)

    def _refuse_excess(self) -> None:
        """Refuse a head that is too long, or a body with too much around its data."""
        if self._phase is _BODY:
            self.logger.warning("A request with more than %d bytes around its body was refused", MAX_HEAD_BYTES)
            self._refuse(400, "Chunk extensions or trailers too large.")
        elif self._phase is not _CLOSING:
            self.logger.warning("A request head of more than %d bytes was refused", MAX_HEAD_BYTES)
            self._refuse(400, "Request header fields too large.")

    def _refuse(self, status: int, text: str) -> None:
        """Answer a request that cannot be read, and close the connection. Reset it if an answer is under way."""
        if self._phase is _CLOSING or self.transport.is_closing():
            return
        if self._is_answering():
            self._phase = _CLOSING
            reset(self)
            return
        if self._phase is not _BODY:  # a request whose body cannot be read has been answered already
            lines = [b"%s: %s\r\n" % header for header in self.server_state.default_headers]
            body = text.encode("ascii")
            lines.append(b"content-type: text/plain; charset=utf-8\r\n")
            if self._phase is _HEAD and self.parser.get_method() == b"HEAD":
                # "the server MUST NOT send content in the response" [RFC 9110 9.3.2]. The parser may have the method of
                # the request before. So there is no length either, and the end of the connection is that of the body.
                body = b""
            else:
                lines.append(b"content-length: %d\r\n" % len(body))
            self.transport.write(b"".join((STATUS_LINE[status], *lines, b"connection: close\r\n\r\n", body)))
        self._close(is_expecting=True)

    def on_response_complete(self) -> None:
        """Go on to the next request, unless this answer is the last one."""
        self.server_state.total_requests += 1
        cycle: Any = self._cycle
        if self._encrypted is not None and not self.transport.get_write_buffer_size():
            self._encrypted.close()
        if self.transport.is_closing():
            self._watch_end()
            return
        if cycle.closes or not cycle.keep_alive:
            is_last_request = cycle.scope["http_version"] == "1.0" or CONNECTION_CLOSE in cycle.scope["headers"]
            self._close(is_expecting=not is_last_request)
            return
        if self._unparsed:
            data, self._unparsed = self._unparsed, b""
            self._parse(data, self._unparsed_from)
        if self._phase is _CLOSING:
            return
        if not self._unparsed:
            self.flow.is_full = False
            self.flow.resume_reading()
        if self._is_answering():
            return
        if self._is_half_closed:
            self._close(is_expecting=False)
        elif self._phase is not _HEAD:
            self._begin_to_wait()

    def _begin_to_wait(self) -> None:
        """Wait for the next request. One timer is for many: when it rings, it looks at how long this has taken."""
        self._idle_since, self._untaken_since = monotonic(), None
        if self.timeout_keep_alive_task is None:
            self._set_idle_timer(self.timeout_keep_alive)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return True to keep the connection open: a client that has half-closed waits for its answer."""
        if self._has_plain_socket and self._phase is _BETWEEN and self._is_answering():
            if not self._is_half_closed:
                self._is_half_closed = True
                self._look_for_hangup()
                if self._on_half_close is not None:
                    self._on_half_close()
            return True
        if self._has_plain_socket and not (self._is_answering() or self._has_passed_on()):
            self._is_half_closed = True
            if self._phase is not _CLOSING:
                self._close(is_expecting=False)
            elif self._idle_since is not None:
                self._set_idle_timer(_FIRST_LOOK)
            return True
        self._watch_end()
        return False

    def _has_passed_on(self) -> bool:
        """Return whether no more can be done for the client: it has taken all, or its own socket holds the bytes."""
        return self._is_on_unix_socket or has_taken_all(self)

    @property
    def is_waiting(self) -> bool:
        """Whether the client is waited for, or has not taken all of its last answer."""
        return self.flow.write_paused or untaken_bytes(self) > 0

    def _end(self) -> None:
        """Close the transport. Over TLS, the client has some time to say that it has seen the end."""
        self._phase = _CLOSING
        self.transport.close()
        self._watch_end()
        if self._encrypted is not None and not self.is_lost:
            self._idle_since = monotonic()
            self._set_idle_timer(LINGER_SECONDS)

    def _watch_end(self) -> None:
        """Watch the client of a transport that closes when it has sent all, and limit the time of the kernel then.

        An answer that is under way may put more into the kernel's queue, until it notices the end.
        """
        limit_queue(self, self.stall_seconds)
        if untaken_bytes(self):
            start_watching(self)

    def _look_for_hangup(self) -> None:
        """Abort the transport if a client that has half-closed has left: no read is under way that would show it."""
        if self.is_lost or self.transport.is_closing() or self._phase is _CLOSING:
            return
        if has_hung_up(self):
            self.transport.abort()
        else:
            self.loop.call_later(1, self._look_for_hangup)

    def _look_for_reset(self) -> None:
        """Abort a transport of TLS whose client has reset the connection: it does not tell that it drops all bytes.

        The application waits then, as for a slow client, and the loop can tell it of the loss.
        """
        if not self.is_lost and self.has_failed():
            self.pause_writing()
            self.transport.abort()

    def _close(self, *, is_expecting: bool) -> None:
        """Close the connection when all is sent, and the client has taken it.

        is_expecting: whether the client may still be sending. Then only this side is closed, since a socket that is
        closed while bytes come is reset, and the client loses what it has not read yet [RFC 9112 9.6].
        """
        is_between = self._phase is _BETWEEN and not self._unparsed
        self._phase = _CLOSING
        self._unparsed = b""
        has_finished = is_between and not is_expecting and not has_unread_bytes(self)
        if (not self._has_plain_socket or self._is_half_closed or has_finished) and self._has_passed_on():
            self._end()
            return
        if self._has_plain_socket:
            try:
                self.transport.write_eof()
            except OSError:  # the client has reset the connection
                self.transport.abort()
                return
        self.flow.is_full = False
        self.flow.resume_reading()
        self._idle_since, self._untaken_since = monotonic(), None
        if untaken_bytes(self):
            start_watching(self)
        self._set_idle_timer(self._idle_limit() if self._awaits_eof() else _FIRST_LOOK)

    def _awaits_eof(self) -> bool:
        """Return whether the client is to close its side of the connection, which ends the closing at once."""
        return self._has_plain_socket and not self._is_half_closed

    def _look_at_end(self, idle: float) -> None:
        """Go on closing a connection, which began `idle` seconds ago: end it if the client has taken all."""
        if self.transport.is_closing():
            if self._has_passed_on():
                self.transport.abort()  # of TLS, whose client does not say that it has seen the end
            else:
                self._set_idle_timer(LINGER_SECONDS)
        elif self._has_passed_on():
            stop_watching(self)
            limit = self._idle_limit() if self._awaits_eof() else 0
            if idle < limit:
                self._set_idle_timer(limit - idle)
            else:
                self._end()
        elif self._is_shutting_down and idle >= GRACE_SECONDS and not self.transport.get_write_buffer_size():
            self._end()  # the kernel sends the rest without us
        else:
            self._set_idle_timer(min(max(idle, _FIRST_LOOK), _LAST_LOOK))

    def _drop_input(self, data: bytes) -> None:
        """Drop what a client sends while closing. Beyond `MAX_UNREAD_BODY`, pause reading, so that it has to wait."""
        self._dropped_bytes += len(data)
        if self._dropped_bytes > MAX_UNREAD_BODY:
            self.flow.pause_reading()

    def _idle_limit(self) -> float:
        """Return for how many seconds the connection may be idle."""
        if self._phase is not _CLOSING:
            return self.timeout_keep_alive
        return GRACE_SECONDS if self._is_shutting_down else LINGER_SECONDS

    @staticmethod
    def drain_server(state: ServerState) -> None:
        """Make the next answer of each connection its last one, also of connections that are still to come.

        state: `server_state` of the `uvicorn.Server`. Connections of other protocols are left alone.
        """
        _draining.add(state)
        for connection in state.connections:
            if isinstance(connection, DownloadProtocol):
                connection.drain()

    def drain(self) -> None:
        """Make the next answer whose head has not left the last one: it says `Connection: close`.

        Without that, the client may send another request, and would lose it. For the same reason, an idle connection
        stays open until its idle timer rings.
        """
        self._is_draining = True
        if self._is_answering() and not self._cycle.response_started:
            self._cycle.keep_alive = False

    def shutdown(self) -> None:
        """End the connection after the answer that is under way, or after one request that is about to come."""
        _shutting_down.add(self.server_state)
        self._is_draining = self._is_shutting_down = True
        if self._phase is _CLOSING:
            if self._idle_since is not None:
                self._set_idle_timer(0)
        elif self._is_answering():
            self._cycle.keep_alive = False
        elif self._phase is _BETWEEN and self._is_idle():
            self._end()
        else:  # a request may be on its way
            self.loop.call_later(GRACE_SECONDS, self._grace_is_over)

    def _is_idle(self) -> bool:
        """Return whether no request is on its way: a client connects to send one, so a new connection is not idle."""
        has_answered = self.cycle is not None or self._idle_since is not None
        return (not has_socket(self) or has_answered) and not has_unread_bytes(self)

    def _grace_is_over(self) -> None:
        if self._phase is not _CLOSING and not self._is_answering() and not self.transport.is_closing():
            self._close(is_expecting=self._phase is _BODY)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timers and the path send of the connection."""
        self._stop_timers()
        self.note_untaken_bytes()
        self.is_lost = True
        if self._encrypted is not None:
            self._encrypted.close()
        end_flush(self)
        super().connection_lost(exc)
        if self._on_loss is not None:
            self._on_loss()
        if not self._is_answering():
            self.forget_scope()

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to another protocol, and end the timers."""
        self._stop_timers()
        self._phase = _CLOSING
        if self._encrypted is not None:
            self._encrypted.close()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """Watch the client while the transport, or a path send, waits for it."""
        super().pause_writing()
        start_watching(self)
        if not self._has_plain_socket:
            return
        if self._phase is _BETWEEN and self._is_answering():
            self.parser = None  # with its methods it has 1.3 KiB, which a client that stalls would hold
        self._held = held = self.transport.get_write_buffer_size()
        if held > _FEW_HELD and (acknowledged := acknowledged_bytes(self)):
            self._paused = untaken_bytes(self), acknowledged

    def resume_writing(self) -> None:
        """Stop watching: the client has taken something. At the end it has to take the rest, too."""
        super().resume_writing()
        self._paused, self._held = None, 0
        if self._phase is not _CLOSING:
            stop_watching(self)
        end_flush(self)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, but not while the client still takes what the kernel holds for it."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        now, limit = monotonic(), self._idle_limit()
        idle = now - self._idle_since
        if self._phase is _CLOSING:
            self._look_at_end(idle)
        elif idle < limit:
            self._set_idle_timer(limit - idle)
        elif self._phase is _BETWEEN and has_unread_bytes(self):
            self._set_idle_timer(limit)  # the transport is about to read the next request
        elif (untaken := untaken_bytes(self)) == 0 or self.transport.is_closing():
            self._end()
        else:
            since, untaken_then = self._untaken_since = self._untaken_since or (now, untaken)
            left = since + patience_with(self) - now
            if untaken_then - untaken >= quota_of(self):
                self._untaken_since = None
                self._set_idle_timer(0)
            elif left > 0:
                self._set_idle_timer(min(limit, left))
            else:
                drop_client(self)

    def note_untaken_bytes(self) -> None:
        """Note how many bytes the end of the connection drops.

        A transport that is aborted drops its bytes before it tells. So while it waited for the client, their number is
        that at the beginning of the wait, without what the client has acknowledged since. A path send may notice the
        end before the transport does, and an application may return in between. The kernel still tells then.
        """
        untaken = untaken_bytes(self)
        if self._paused is not None:
            untaken_then, acknowledged_then = self._paused
            untaken = max(untaken, untaken_then - (acknowledged_bytes(self) - acknowledged_then))
        elif self._held and not self.transport.get_write_buffer_size():
            untaken += self._held  # few bytes, which go at once or not at all; a Unix socket does not tell
        self._untaken_at_loss = max(self._untaken_at_loss, untaken)

    @property
    def position(self) -> int:
        """Where the next answer begins in the stream of all answers over TLS. See `taken`."""
        return 0 if self._encrypted is None else self._encrypted.position

    def taken(self, sent: int, head: int, position: int) -> int:
        """Return how many bytes of an answer's body, of which `sent` have been passed on, the client has taken.

        head: the bytes of the header fields of the application. position: the property, when the answer began. A
        connection that has not failed delivers all.
        """
        if not self.has_failed():
            return sent
        if not self.is_lost:
            self.note_untaken_bytes()
        end = None if self._encrypted is None else self._encrypted.taken()
        if end is None:
            cycle: Any = self._cycle
            is_chunked = cycle is not None and cycle.chunked_encoding and cycle.response_complete
            framing = len(_LAST_CHUNK) if is_chunked else 0
            return max(0, sent - max(0, self._untaken_at_loss - framing))
        head += (
            len(STATUS_LINE[200])
            + 2
            + sum(len(name) + len(value) + 4 for name, value in self.server_state.default_headers)
        )
        return max(0, min(sent, end - position - head))

    @property
    def is_broken(self) -> bool:
        """Whether the connection has ended, or is about to, but not because its last answer is complete."""
        return self.is_lost or (self.transport.is_closing() and self._phase is not _CLOSING)

    def has_failed(self) -> bool:
        """Return whether the connection has ended, or was reset, which the loop may not have seen yet."""
        if self.is_lost or self.is_stalled:
            return True
        try:
            return has_hung_up(self)
        except OSError:  # the loop has closed the socket
            return True

    def counting_send(self, send: Any, account: "Account") -> Any:
        """See `Connection` in `asgi.accounts`."""
        cycle = self._cycle
        if cycle.account is not None or send != cycle.send:
            return None
        cycle.account = account
        return cycle.send_and_count

    def end_counting(self, account: "Account") -> None:
        """See `Connection` in `asgi.accounts`."""
        if self._cycle is not None and self._cycle.account is account:
            self._cycle.account = None

    @property
    def is_flushed(self) -> bool:
        """Whether the connection is open, and the transport has passed everything on. See `when_flushed`."""
        return not (
            self.is_lost
            or self.flow.write_paused
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size()
        )

    def when_flushed(self, callback: Callable[[bool], None]) -> bool:
        """Return True if nothing waits in the transport; else call `callback` with the result of `flush`."""
        if self.is_lost or not (self.flow.write_paused or self.transport.get_write_buffer_size()):
            return True
        flush(self).add_done_callback(lambda flushed: callback(flushed.result()))
        return False

    def when_half_closed(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when the client closes its side of the connection, or now if it has; None: call nothing."""
        self._on_half_close = callback
        if callback is not None and self._is_half_closed:
            callback()

    def tells_what(self, receive: Any) -> bool:
        """See `Connection` in `asgi.accounts`."""
        return self._on_loss is None and bool(receive == self._cycle.receive)

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback`, instead of an earlier one, when the connection is lost, or now if it is."""
        self._on_loss = callback
        if self.is_lost:
            callback()

    def forget_when_lost(self, callback: Callable[[], None]) -> None:
        """Do not call `callback`, unless another one has replaced it: the next request may have begun."""
        if self._on_loss == callback:
            self._on_loss = None

    def _stop_timers(self) -> None:
        stop_watching(self)
        for timer in (self._head_timer, self.timeout_keep_alive_task, self._pace_timer):
            if timer is not None:
                timer.cancel()

    def _set_idle_timer(self, seconds: float) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        """Let the idle timer ring: it looks at `_idle_since`."""

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_head_timer(self) -> None:
        """Close the connection if the client does not complete the head of a request in time."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.stall_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._has_passed_on():
            self._end()
        else:
            self._close(is_expecting=True)
