"""A uvicorn protocol that sends files by `sendfile`, and drops clients that have stopped reading.

    uvicorn app:app --http downloadview_async.asgi.server:DownloadProtocol

It offers ASGI's path send (`http.response.pathsend`), so Starlette's FileResponse and StaticFiles become zero-copy as
they are. To a `DownloadResponse` it says that it takes more than the specification has: an open descriptor, an offset
and a count, and heads that are prepared. TLS, and whatever else has no plain socket, is served in chunks as before.

Theory of operation. The parser reads all that it is given, so the protocol gives it one message at a time: the input is
in one of four phases, and an answer is under way or not.

    phase    | what comes is                    | no answer under way          | an answer under way
    ---------+----------------------------------+------------------------------+-------------------------------------
    BETWEEN  | the next head, or empty lines    | parsed; the keep-alive timer | kept as bytes; beyond some, no more
             |                                  | runs                         | is read
    HEAD     | the rest of a head               | parsed; the timer of the     | does not occur
             |                                  | head runs                    |
    BODY     | a body, and its trailers         | parsed and dropped           | parsed; trailers are dropped
    CLOSING  | what the client still sends      | dropped; beyond some, not    | does not occur: the connection is
             |                                  | read; the timer runs         | reset

    BETWEEN -> HEAD (a first byte) -> BODY (a head that is not refused) -> BETWEEN (the end of the body)
    any -> CLOSING (the last answer is complete, a refusal, another protocol takes over) -> the socket is closed

What cannot be read is answered by 400, 501 or 505 where no answer is under way. Otherwise the connection is reset:
nothing is ever written into another answer. A head is refused here for its version, its Host and its transfer coding;
the parser refuses the rest, and the tests say what that is. A client that has half-closed is answered to the end.
"""

import asyncio
import errno
import fcntl
import logging
import os
import re
import select
import socket
import struct
import termios
from collections import deque
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from ipaddress import IPv6Address
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import uvicorn
from starlette.types import Message
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from downloadview_async.asgi.response import close_after_body
from downloadview_async.asgi.transfer import MAX_UNREAD_BODY, PATHSEND, PREPARED, LentFile, PreparedHead, is_ordinary
from downloadview_async.errors import FileError, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.local.open_file import REWRITTEN, OpenLocalFile
from downloadview_async.sources.local.path import LocalFile
from downloadview_async.sources.local.refused_calls import Refusals
from downloadview_async.sources.workers import MID_TRANSFER

KNOWN_UVICORN = ("0.38.0", "0.54.0")
"""The oldest and the newest uvicorn that all of this has been tested with."""

STALL_SECONDS = 60.0
"""How long a client may take less than `MINIMUM_RATE` before its connection is reset."""

MINIMUM_RATE = 64
"""Bytes per second that a client has to take, on the average of `STALL_SECONDS`.

What it takes is what its kernel says it has: some do so in steps, so a client needs several times this rate to be safe.
"""

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

_WINDOW = 256 << 10  # bytes that are looked for in the page cache, and sent, at a time: others wait so long
_FEW = 128

_END_OF_HEAD = b"\r\n\r\n"

_OFFER: dict[object, object] = {"descriptor": True, PREPARED: True}
_CLOSE = (b"connection", b"close")
_sendfile = Refusals("sendfile")
_server_lines: tuple[list[tuple[bytes, bytes]], bytes | None] = [], b""


def uvicorn_warning(version: str) -> str | None:
    """Return what to say at start-up about a version of uvicorn: None if it is between those that have been tested."""
    oldest, newest, found = ([int(n) for n in re.findall("[0-9]+", text)[:2]] for text in (*KNOWN_UVICORN, version))
    if oldest <= found <= newest:
        return None
    return (
        f"uvicorn {version} is not known to DownloadProtocol, which is tested with {KNOWN_UVICORN[0]} to "
        f"{KNOWN_UVICORN[1]} and builds on their inner parts. If downloads fail, install one of these, or let uvicorn "
        "send by itself: --http httptools"
    )


if (_warning := uvicorn_warning(uvicorn.__version__)) is not None:
    logging.getLogger("downloadview_async").warning(_warning)


class DownloadCycle(RequestResponseCycle):
    """uvicorn's own request and response, which can send files too, and a head that was prepared for it."""

    _held: bytes | None = None  # a head that goes out in one piece with its body
    closes = False  # whether the connection ends with this answer, which is then the protocol's to do
    is_unframed = False  # whether the end of the connection is the end of the body: HTTP/1.0, and no length

    def send(self, message: Any) -> Any:  # not `async`: another coroutine around uvicorn's own would cost every message
        """Send what the application says, as uvicorn does where it is nothing of ours."""
        if PREPARED in message and self._takes_head(message):
            return _done()
        if self._held is not None:
            held, self._held = self._held, None
            if self._takes_body(held, message):
                return _done()
            if not self.disconnected:
                self.transport.write(held)
        if not self.keep_alive or self.closes:
            message = self._at_the_end(message)
        if message["type"] == PATHSEND:
            protocol: DownloadProtocol = self.on_response.__self__  # type: ignore[attr-defined]
            return (protocol.send_file if "descriptor" in message else protocol.send_path)(self, message)
        return super().send(message)

    def _at_the_end(self, message: Message) -> Message:
        """Prepare a message of the last answer of a connection, and return it.

        uvicorn would close the transport with the last message. A client that is still sending would lose the end of
        the answer to a reset, so the protocol closes instead, in `on_response_complete`.
        """
        if not self.response_started:
            return (self._without_chunks if self.scope["http_version"] == "1.0" else _with_close)(message)
        self.closes = self.keep_alive = True
        if self.is_unframed and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))  # which uvicorn would compare with this
        return message

    def _without_chunks(self, start: Message) -> Message:
        """Return the start of an answer to HTTP/1.0, which knows no transfer coding [RFC 9112 6.1]."""
        if start["type"] != "http.response.start":
            return start
        headers = [header for header in start.get("headers", ()) if header[0].lower() != b"transfer-encoding"]
        has_length = any(name.lower() == b"content-length" for name, _ in headers)
        if not (has_length or self.scope["method"] == "HEAD" or start["status"] in (204, 304)):
            self.is_unframed = True
            self.chunked_encoding = False
            protocol: DownloadProtocol = self.on_response.__self__  # type: ignore[attr-defined]
            self.transport: Any = _Unframed(protocol)
        return {**start, "headers": headers}

    def _takes_head(self, message: Message) -> bool:
        """Return whether the head of a response is one that was prepared, and is now held until its body comes."""
        prepared: PreparedHead = message[PREPARED]
        if (
            self.response_started
            or self.disconnected
            or self.access_log
            or self.flow.write_paused
            or not self.keep_alive
            or self.scope["method"] == "HEAD"
            or _CLOSE in self.scope["headers"]
            or not isinstance(headers := message.get("headers"), list)
            or tuple(headers) != prepared.headers
            or (lines := _lines_of_server(self.default_headers)) is None
        ):
            return False
        self.response_started = True
        self.waiting_for_100_continue = False
        self.chunked_encoding = False
        self.expected_content_length = prepared.length
        self._held = b"".join((STATUS_LINE[message["status"]], lines, prepared.lines, b"\r\n"))
        return True

    def _takes_body(self, head: bytes, message: Message) -> bool:
        """Send a body that is whole, and return whether it is."""
        body = message.get("body", b"")
        if (
            message["type"] != "http.response.body"
            or message.get("more_body", False)
            or len(body) != self.expected_content_length
            or self.disconnected
        ):
            return False
        self.transport.write(head + body)
        self.expected_content_length = 0
        self.response_complete = True
        self.message_event.set()
        self.on_response()
        return True


def _with_close(start: Message) -> Message:
    """Return the start of the last answer of a connection; before 0.53, uvicorn does not say that it is the last."""
    headers = list(start.get("headers", ()))
    if not any(name.lower() == b"connection" for name, _ in headers):
        headers.append(_CLOSE)
    return {**start, "headers": headers}


class _Unframed:
    """The transport of an answer that ends with its connection: to close it before the end would fake that end."""

    __slots__ = ("_protocol", "is_closing", "write")

    def __init__(self, protocol: "DownloadProtocol") -> None:
        self._protocol = protocol
        self.is_closing = protocol.transport.is_closing
        self.write = protocol.transport.write

    def close(self) -> None:
        """Reset the connection: this is called for answers that fail."""
        self._protocol.reset()


async def _done() -> None:
    """Return at once."""


class _Phase(Enum):
    """Which part of the connection's input is being read."""

    BETWEEN = 0
    HEAD = 1
    BODY = 2
    CLOSING = 3


_BETWEEN, _HEAD, _BODY, _CLOSING = _Phase  # looking a member up in its class takes longer

_ending: WeakSet[ServerState] = WeakSet()
"""The servers that are shutting down."""


class _Flow(FlowControl):
    """uvicorn's flow control, but an application that waits for messages does not resume reading while it is full."""

    is_full = False

    def resume_reading(self) -> None:
        if not self.is_full:
            super().resume_reading()


class _Trailers:
    """Takes the place of the list of headers while a body is read: trailers are none of them [RFC 9110 6.5.1]."""

    def append(self, field: tuple[bytes, bytes]) -> None:
        """Drop a field."""


_TRAILERS: Any = _Trailers()


class DownloadProtocol(HttpToolsProtocol):
    """uvicorn's own protocol on httptools, with path send and a watch over clients that do not read.

    stall_seconds, minimum_rate (bytes per second): a client that takes less on the average of so many seconds is
    dropped, and so is one that has not sent the whole head of a request in that time. Other values go in by
    `functools.partial(DownloadProtocol, stall_seconds=...)` as uvicorn's `http`.
    """

    # Not in the instance's dictionary: it would no longer share its keys with the others', and weigh twice as much.
    __slots__ = (
        "_body_left",
        "_cycle",
        "_drained",
        "_dropped",
        "_ends",
        "_head_bytes",
        "_head_deadline",
        "_idle_since",
        "_idle_with",
        "_is_half_closed",
        "_is_plain",
        "_lost",
        "_parsed",
        "_phase",
        "_tail",
        "_unparsed",
        "minimum_rate",
        "stall_seconds",
    )

    def __init__(
        self, *args: Any, stall_seconds: float = STALL_SECONDS, minimum_rate: int = MINIMUM_RATE, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.pipeline: Any = ()  # requests wait as bytes; a deque weighs 760 bytes, with each connection
        self.parser.set_dangerous_leniencies(lenient_version=True)  # versions are looked at in `_refusal`
        self.stall_seconds = stall_seconds
        self.minimum_rate = minimum_rate
        self._lost = False
        self._is_plain = False
        self._drained: asyncio.Future[None] | None = None  # what waits until the transport has sent all, or is lost
        self._phase = _BETWEEN
        self._unparsed = b""  # bytes that wait until the answer before them is complete, from `_parsed` on
        self._parsed = 0
        self._tail = b""  # the last three bytes of a head, or of a chunked body, that is not complete
        self._head_bytes = 0
        self._body_left: int | None = 0  # bytes of a body that are still to come, None if it is chunked
        self._head_deadline: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self._idle_with: tuple[float, int] | None = None  # when, and what the client had not taken yet then
        self._ends = False
        self._is_half_closed = False
        self._dropped = 0

    @property
    def cycle(self) -> Any:
        """The request that is being answered, or the last one that was."""
        return self._cycle

    @cycle.setter
    def cycle(self, cycle: RequestResponseCycle | None) -> None:
        """Make a cycle ours as soon as uvicorn assigns it: an eager task runs the application before it returns."""
        if cycle is not None:
            cycle.__class__ = DownloadCycle
        self._cycle: Any = cycle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport)
        self._is_plain = self._has_socket() and not transport.get_extra_info("sslcontext")
        self._ends = self.server_state in _ending
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read on, unless an answer has to be completed before the next request is looked at."""
        if self._phase is _CLOSING:
            self._drop(data)
        elif self._unparsed:
            self._keep(self._unparsed[self._parsed :] + data, 0)
        else:
            idle_since, self._idle_since = self._idle_since, None
            self._parse(data, 0)
            if (self.cycle is None or self.cycle.response_complete) and self._phase in (_BETWEEN, _BODY):
                self._idle_since = idle_since  # neither empty lines nor the rest of a body are a request

    def _has_socket(self) -> bool:
        return self.transport.get_extra_info("socket") is not None

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _parse(self, data: bytes, start: int) -> None:
        """Feed bytes to the parser, message by message: it cannot stop by itself at the end of one."""
        size = len(data)
        while start < size:
            phase = self._phase
            if phase is _CLOSING:
                return
            if phase is _BETWEEN and self.cycle is not None and not self.cycle.response_complete:
                self._keep(data, start)
                return
            end = self._end_of_piece(data, start)
            piece = data if end - start == size else data[start:end]
            start = end
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_excess()
        if self._phase is _HEAD:
            self._await_head()
            if self._is_http_09(data):
                self._refuse(505, "HTTP Version Not Supported")

    def _end_of_piece(self, data: bytes, start: int) -> int:
        """Return where a message may end, or the end of the data."""
        if self._phase is _BODY and self._body_left is not None:
            end = min(start + self._body_left, len(data))
            self._body_left -= end - start
            return end
        most = start + max(1, MAX_HEAD_BYTES + 1 - self._head_bytes)
        tail, self._tail = self._tail, b""
        if tail:  # an end that is in two pieces, or more
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

    def _keep(self, data: bytes, parsed: int) -> None:
        """Let bytes wait until the answer before them is complete, and read no more if they are many."""
        self._unparsed, self._parsed = data, parsed
        if len(data) - parsed > MAX_WAITING_BYTES:
            self.flow.pause_reading()
            self.flow.is_full = True

    def _is_http_09(self, data: bytes) -> bool:
        """Return whether all that has come is a line without a version: no more of a head will follow."""
        return data.endswith(b"\r\n") and self._head_bytes == len(self.parser.get_method()) + len(self.url) + 3

    def on_message_begin(self) -> None:
        """Begin to count the bytes of a request head."""
        super().on_message_begin()
        self._phase = _HEAD

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the head is not one to answer.

        Path send is offered to the application where the connection has a plain socket.
        """
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None
        version = self.parser.get_http_version()
        if (refusal := self._refusal(version)) is not None:
            self._refuse(*refusal)
            return
        scope = self.scope
        if self._is_plain:
            scope["extensions"] = {PATHSEND: _OFFER}
        super().on_headers_complete()  # which may refuse the target
        self._phase = _BODY
        self._head_bytes = 0
        if version != "1.1" and version != "1.0":  # a minor version that is to come [RFC 9110 2.5]
            scope["http_version"] = "1.1"
        if self.parser.should_upgrade():
            return  # whose headers are looked at again
        self.headers = _TRAILERS
        if self._ends:
            self.cycle.keep_alive = False

    def _refusal(self, version: str) -> tuple[int, str] | None:
        """Return the status and the text of the answer to a head that is refused, or None."""
        if version[0] != "1":
            return 505, "HTTP Version Not Supported"
        names = [name for name, _ in self.headers]
        # "any HTTP/1.1 request message that lacks a Host header field and [...] any request message that contains more
        # than one Host header field line or a Host header field with an invalid field value" [RFC 9112 3.2]
        hosts = names.count(b"host")
        if hosts > 1 or (not hosts and version != "1.0"):
            return 400, "Invalid Host header field."
        if hosts:
            field = names.index(b"host")
            host = self.headers[field][1].strip(b" \t")  # "excluding any leading or trailing whitespace" [9110 5.5]
            if _SOCKET_PATH.fullmatch(host) and self._is_on_unix_socket():
                host = b""  # as for any URL without an authority [9110 7.2]
            self.headers[field] = b"host", host
            if not _is_host(host):
                return 400, "Invalid Host header field."
        if b"://" in self.url and not self._takes_authority():
            return 400, "Invalid request target."
        self._body_left = 0
        if b"transfer-encoding" in names:
            self._body_left = None
            codings = b",".join([value for name, value in self.headers if name == b"transfer-encoding"]).lower()
            *others, last = [coding.strip() for coding in codings.split(b",")]
            if version == "1.0" or last != b"chunked" or b"content-length" in names:
                return 400, "Invalid Transfer-Encoding header field."
            if others:
                return 501, "Transfer coding not implemented."
        elif b"content-length" in names:  # the parser has seen to it that it is one number
            self._body_left = int(self.headers[names.index(b"content-length")][1])
        # The parser takes what follows such a head for no body of it, but for a request.
        if self._body_left != 0 and b"upgrade" in names and self.parser.should_upgrade():
            return 400, "An upgrade of a request with a body is not supported."
        return None

    def _is_on_unix_socket(self) -> bool:
        return isinstance(self.transport.get_extra_info("sockname"), str | bytes)  # of others it is a tuple

    def _takes_authority(self) -> bool:
        """Return whether a target is in origin-form now, its authority in place of Host [RFC 9112 3.2.2]."""
        match = _ABSOLUTE.fullmatch(self.url)
        if match is None:
            return self.url.startswith(b"/")
        if not _is_host(match["authority"]):
            return False
        # The list is the scope's, too.
        self.headers[:] = [field for field in self.headers if field[0] != b"host"]
        self.headers.append((b"host", match["authority"]))
        target = match["target"]
        self.url = target if target.startswith(b"/") else b"/" + target
        return True

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body, which makes up for what surrounds it: even a chunk of one byte needs six."""
        self._head_bytes = max(0, self._head_bytes - 16 - 2 * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Look at the next request when this one is answered."""
        if self._phase is _BODY:
            self._phase = _BETWEEN
            self._head_bytes = 0
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not a request, in uvicorn's words."""
        is_of_another = self._phase is _HEAD and self.parser.get_http_version()[0] not in "01"
        self._refuse(505 if is_of_another else 400, msg)

    def _refuse_excess(self) -> None:
        if self._phase is _BODY:
            self.logger.warning("A request with more than %d bytes around its body was refused", MAX_HEAD_BYTES)
            self._refuse(400, "Chunk extensions or trailers too large.")
        elif self._phase is not _CLOSING:
            self.logger.warning("A request head of more than %d bytes was refused", MAX_HEAD_BYTES)
            self._refuse(400, "Request header fields too large.")

    def _refuse(self, status: int, text: str) -> None:
        """Answer what cannot be read, and close the connection. Not into another answer: reset it then."""
        if self._phase is _CLOSING or self.transport.is_closing():
            return
        if self._is_answering():
            self._phase = _CLOSING
            self.reset()
            return
        if self._phase is not _BODY:  # else the request has been answered already
            lines = [b"%s: %s\r\n" % header for header in self.server_state.default_headers]
            body = text.encode("ascii")
            lines.append(b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n" % len(body))
            self.transport.write(b"".join((STATUS_LINE[status], *lines, b"connection: close\r\n\r\n", body)))
        self._close(is_expecting=True)

    def on_response_complete(self) -> None:
        """Go on to the next request, unless the connection ends, or a body that nobody has asked for is coming."""
        self.server_state.total_requests += 1
        cycle: Any = self.cycle
        if self.transport.is_closing():
            if self._waiting():  # it closes when the client has taken that
                self._start_watching()
            return
        if cycle.closes or not cycle.keep_alive:
            asked = cycle.scope["http_version"] == "1.0" or _CLOSE in cycle.scope["headers"]
            self._close(is_expecting=not asked)
            return
        if cycle.more_body and close_after_body(cycle.scope):
            self._close(is_expecting=True)
            return
        if self._unparsed:
            data, self._unparsed = self._unparsed, b""
            self._parse(data, self._parsed)
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
            # One timer for many requests: it looks at how long the connection has been idle when it rings.
            self._idle_since, self._idle_with = monotonic(), None
            if self.timeout_keep_alive_task is None:
                self._ring_after(self.timeout_keep_alive)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether there is still something to answer: a client that has only finished sending waits for that."""
        if self._is_plain and self._phase is _BETWEEN and self._is_answering():
            if not self._is_half_closed:
                self._is_half_closed = True
                self._look_for_client()
            return True
        if self._waiting():  # the transport closes when the client has taken that
            self._start_watching()
        return False

    def _look_for_client(self) -> None:
        """Notice a reset by a client that has half-closed: nothing is read any more, which would show it."""
        if self._lost or self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self._fileno(), 0)
        if poll.poll(0):  # an error, or closed in both directions
            self.transport.abort()
        else:
            self.loop.call_later(1, self._look_for_client)

    def _close(self, *, is_expecting: bool) -> None:
        """Close the connection when all is sent, and the client has had the time to take it.

        is_expecting: whether the client may still be sending. To close a socket to which bytes come resets it, and the
        client loses what it has not read yet [RFC 9112 9.6]. So this side is closed first, and what comes is dropped.
        """
        was_whole = self._phase is _BETWEEN and not self._unparsed
        self._phase = _CLOSING
        self._unparsed = b""
        if not self._is_plain or self._is_half_closed or (was_whole and not is_expecting and not self._unread()):
            self.transport.close()
            if self._waiting():
                self._start_watching()
            return
        try:
            self.transport.write_eof()
        except OSError:  # the client has reset the connection
            self.transport.abort()
            return
        self.flow.is_full = False
        self.flow.resume_reading()
        self._idle_since, self._idle_with = monotonic(), None
        self._ring_after(self._patience())

    def _drop(self, data: bytes) -> None:
        """Drop what a client sends after its last answer; beyond some amount, let its own buffer fill up."""
        self._dropped += len(data)
        if self._dropped > MAX_UNREAD_BODY:
            self.flow.pause_reading()

    def _unread(self) -> bool:
        """Return whether the kernel has bytes from the client."""
        try:
            return any(fcntl.ioctl(self._fileno(), termios.FIONREAD, b"\0" * 4))
        except OSError:
            return False

    def _patience(self) -> float:
        """Return for how many seconds the connection may be idle."""
        if self._phase is not _CLOSING:
            return self.timeout_keep_alive
        return GRACE_SECONDS if self._ends else LINGER_SECONDS

    def shutdown(self) -> None:
        """End the connection with the answer that is under way, or that a first request is still to get."""
        _ending.add(self.server_state)
        self._ends = True
        if self._phase is _CLOSING:
            if self._idle_since is not None:
                self._ring_after(0)
        elif self._is_answering():
            self.cycle.keep_alive = False
        elif self._phase is _BETWEEN and (not self._has_socket() or self.cycle is not None) and not self._unread():
            self.transport.close()
        else:  # a request is on its way, or may be
            self.loop.call_later(GRACE_SECONDS, self._end_of_grace)

    def _end_of_grace(self) -> None:
        if self._phase is not _CLOSING and not self._is_answering() and not self.transport.is_closing():
            self._close(is_expecting=self._phase is _BODY)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection holds."""
        self._stop_timers()
        self._lost = True
        self._resume()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to another protocol, without timers of ours."""
        self._stop_timers()
        self._phase = _CLOSING
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """Watch the client while something waits for it."""
        super().pause_writing()
        self._start_watching()

    def resume_writing(self) -> None:
        """Stop watching: the client has taken what was there."""
        super().resume_writing()
        self._stop_watching()
        self._resume()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, but not while the client still takes what the kernel has for it."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        now, left, patience = monotonic(), self._waiting(), self._patience()
        idle = now - self._idle_since
        if idle < patience:
            self._ring_after(patience - idle)
        elif self._phase is _BETWEEN and self._unread():
            self._ring_after(patience)  # the next request has come
        elif left == 0 or self.transport.is_closing():
            super().timeout_keep_alive_handler()
        else:
            since, before = self._idle_with = self._idle_with or (now, left)
            if now - since < self.stall_seconds:
                self._ring_after(min(patience, self.stall_seconds))
            elif before - left < self.minimum_rate * self.stall_seconds:
                self._drop_client()
            else:
                self._idle_with = None
                self._ring_after(0)

    def _stop_timers(self) -> None:
        self._stop_watching()
        for timer in (self._head_deadline, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()

    def _ring_after(self, seconds: float) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        """Let the timer ring: see `on_response_complete`."""

    def _await_head(self) -> None:
        """Close the connection if the head of a request does not come to its end in time."""
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(self.stall_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_deadline = None
        self.transport.close()

    async def send_path(self, cycle: DownloadCycle, message: Message) -> None:
        """Send the file that the message names by its path."""
        try:
            async with LocalFile(message["path"]).open() as file:
                await self.send_file(cycle, {**message, "descriptor": LentFile(file)})
        except FileError as exc:
            raise TransferAborted(f"opening a file failed: {exc}") from exc

    async def send_file(self, cycle: DownloadCycle, message: Message) -> None:
        """Send the span of an open file that is lent by the message.

        All in one coroutine: it is what waits with each of thousands of clients. Raises `TransferAborted` if the file
        has less than was promised of it, or cannot be read.
        """
        lent: LentFile = message["descriptor"]
        file = lent.take()
        try:
            if cycle.disconnected:
                return
            if not cycle.response_started:
                raise RuntimeError("a path send before the start of its response")
            offset = message.get("offset", 0)
            count = 0
            if cycle.scope["method"] == "HEAD":
                pass
            elif cycle.chunked_encoding or cycle.is_unframed:
                await _send_in_chunks(file, offset, message.get("count"), cycle)
            else:
                count = message.get("count", cycle.expected_content_length)
                if count > cycle.expected_content_length:
                    raise RuntimeError("a path send of more than Content-Length has promised")
                cycle.expected_content_length -= count  # which it counts down by what it sends itself
            while count and not self._lost:
                if self.transport.get_write_buffer_size():
                    await self._flushed()
                    await _turn(self.loop)
                    continue
                if file.is_rewritten():
                    raise TransferAborted(REWRITTEN)
                length, written = min(count, _WINDOW), 0  # bytes that the transport sends
                if file.device in _sendfile.devices:
                    written = length
                else:
                    try:
                        if file.is_cached(offset, length):
                            sent = os.sendfile(self._fileno(), file.descriptor, offset, length)
                            if sent < count:
                                await _turn(self.loop)
                        else:
                            sent = await self._sendfile_in_worker(file, offset, length)
                    except BlockingIOError:
                        written = min(count, _FEW)  # only the transport may wait for its socket
                    except ConnectionError:
                        if not self._lost:  # a worker may hear of it after uvicorn has
                            self._drained = self.loop.create_future()
                            self.transport.abort()
                            await self._drained  # until uvicorn knows, and does not take the answer for a broken one
                        break
                    except OSError as exc:
                        _sendfile.note(file.device, exc)
                        written = length
                if written:
                    chunk = await file.read(ByteRange(offset, offset + written))
                    if self.transport.is_closing():
                        break
                    self.transport.write(chunk)
                    sent = len(chunk)
                    if sent > _FEW:
                        await _turn(self.loop)
                if sent == 0:
                    raise TransferAborted(f"the file ended {count} bytes before what was promised of it")
                offset += sent
                count -= sent
            if self._lost:
                cycle.disconnected = True  # uvicorn tells only the last of those that are pipelined
                return
            await cycle.send({"type": "http.response.body", "body": b""})
        except (OSError, FileError) as exc:
            raise TransferAborted(f"sending a file failed: {exc}") from exc
        finally:
            lent.give_back()

    async def _sendfile_in_worker(self, file: OpenLocalFile, offset: int, length: int) -> int:
        connection = os.dup(self._fileno())  # the number itself may become another connection's
        try:
            return await file.workers.run(
                os.sendfile, connection, file.descriptor, offset, length, patience=MID_TRANSFER
            )
        finally:
            os.close(connection)

    def _fileno(self) -> int:
        """Return the number of the socket. Raises `OSError`: `ConnectionResetError` if it is closed."""
        connection = self.transport.get_extra_info("socket")
        if connection is None:
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        number: int = connection.fileno()
        if self._lost or number < 0:
            raise ConnectionResetError
        return number

    def _flushed(self) -> "asyncio.Future[None]":
        """Wait until the transport has sent what it holds: what the kernel sends from a file comes after it."""
        self._drained = self.loop.create_future()
        self.transport.set_write_buffer_limits(high=0)  # pauses writing now, and resumes it when all has been sent
        return self._drained

    def _resume(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None:
            if not self._lost:
                self.transport.set_write_buffer_limits()
            if not drained.done():
                drained.set_result(None)

    def _start_watching(self) -> None:
        watched = _watched.get(self.loop)
        if watched is None:
            watched = _watched[self.loop] = {}
            self.loop.call_later(self.stall_seconds / 4, _look_at, watched, self.loop, self.stall_seconds / 4)
        watched[self] = monotonic(), self._waiting()

    def _stop_watching(self) -> None:
        _watched.get(self.loop, {}).pop(self, None)

    def _waiting(self) -> int:
        """Return the bytes that the client has not taken yet: the transport's, and the kernel's.

        0 where there is no socket: what such a transport holds is not known. A kernel that refuses to tell counts as
        one that holds nothing.
        """
        try:
            connection = self._fileno()
        except OSError:
            return 0
        in_kernel = 0
        with suppress(OSError):
            in_kernel = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0]
        return in_kernel + self.transport.get_write_buffer_size()

    def check(self, since: float, before: int) -> None:
        """Reset the connection of a client that has taken too little of what waited for it."""
        if monotonic() - since < self.stall_seconds:
            return
        if before - self._waiting() < self.minimum_rate * self.stall_seconds:
            self._drop_client()
        else:
            self._start_watching()

    def _drop_client(self) -> None:
        self.logger.warning("Transfer aborted: the client took less than %d bytes a second", self.minimum_rate)
        self.reset()

    def reset(self) -> None:
        """Reset the connection."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._fileno())) as connection:
            # A reset, not a polite close: what the kernel still holds for the client goes too.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


_queues: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[asyncio.Future[None]]] = WeakKeyDictionary()


def _turn(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
    """Wait until it is one's turn to send a window of a file: there is one each time the loop looks at its sockets.

    All downloads that can go on would else do so before it looks again, and a small request would wait for each.
    """
    queue = _queues.setdefault(loop, deque())
    if not queue:
        loop.call_soon(_give_turn, loop, queue)
    turn = loop.create_future()
    queue.append(turn)
    return turn


def _give_turn(loop: asyncio.AbstractEventLoop, queue: "deque[asyncio.Future[None]]") -> None:
    while queue:
        turn = queue.popleft()
        if not turn.done():  # as it is when who waits for it has been cancelled
            turn.set_result(None)
            break
    if queue:
        loop.call_soon(_give_turn, loop, queue)


# One timer for all clients of a loop that are waited for, instead of one that is made and cancelled at each wait.
_Watched = dict[DownloadProtocol, tuple[float, int]]
_watched: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watched] = WeakKeyDictionary()


def _look_at(watched: _Watched, loop: asyncio.AbstractEventLoop, every: float) -> None:
    for protocol, since_and_before in list(watched.items()):
        protocol.check(*since_and_before)
    if not watched:
        del _watched[loop]  # which says that no timer runs
    else:
        loop.call_later(every, _look_at, watched, loop, every)


@lru_cache(maxsize=256)  # a server has few names
def _is_host(value: bytes) -> bool:
    """Return whether a value is a valid one of Host: a host, which may be empty, and a port [RFC 9110 7.2]."""
    match = _HOST.fullmatch(value)
    if match is None or match["v6"] is None:
        return match is not None
    try:
        IPv6Address(match["v6"].decode())
    except ValueError:
        return False
    return True


_ABSOLUTE = re.compile(rb"(?i:https?)://(?P<authority>[^/?#:][^/?#]*)(?P<target>.*)", re.DOTALL)

# What a client of a Unix socket, H2O or an older Go, writes for the host that such a URL does not have.
_SOCKET_PATH = re.compile(rb"\[unix:[!-~]+\]|/[!-~]*")

# reg-name or IPv4address, IPvFuture, IPv6address [RFC 3986 3.2.2]
_HOST = re.compile(
    rb"(?:(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[v[0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+\]|"
    rb"\[(?P<v6>[0-9A-Fa-f:.]+)\])(?::[0-9]*)?"
)


def _lines_of_server(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Return the lines that begin the head of every response, or None if they say more than uvicorn's usual ones.

    uvicorn makes a new list each second.
    """
    global _server_lines
    made_of, lines = _server_lines
    if made_of is not headers:
        lines = None
        if all(name != b"content-length" and is_ordinary(name, value) for name, value in headers):
            lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        _server_lines = headers, lines
    return lines


async def _send_in_chunks(file: OpenLocalFile, offset: int, count: int | None, cycle: DownloadCycle) -> None:
    """Send a file without a Content-Length: a path send that promised none has to be framed."""
    size = file.metadata.size or 0
    async for chunk in file.stream(ByteRange(min(offset, size), size if count is None else offset + count)):
        await cycle.send({"type": "http.response.body", "body": chunk, "more_body": True})
