"""`DownloadCycle`: one request and its answer, which may be a prepared head with its body, or a file."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.types import Message

from downloadview_async.asgi.disconnect import close_after_body
from downloadview_async.asgi.extensions import PATHSEND, PREPARED, REQUEST_ID, SEND_LATER
from downloadview_async.asgi.prepared_head import PreparedHead, is_ordinary
from downloadview_async.asgi.uvicorn.internals import STATUS_LINE, RequestResponseCycle, protocol_of
from downloadview_async.asgi.uvicorn.sendfile import send_file, send_path, send_pieces
from downloadview_async.asgi.uvicorn.sockets import Connection, reset

if TYPE_CHECKING:
    from downloadview_async.asgi.accounts import Account

CONNECTION_CLOSE = (b"connection", b"close")

_REFUSED = -1  # bytes that are still expected: any body is too long then

_PIECE = 8  # bytes of each but the first segment of a head

_default_lines: tuple[list[tuple[bytes, bytes]], bytes | None] = [], b""


class DownloadCycle(RequestResponseCycle):
    """uvicorn's request and response, with path sends and with heads that were prepared.

    closes: whether the connection ends with this answer, and the protocol closes it. is_unframed: whether the end of
    the connection is the end of the body, as for HTTP/1.0 without a length.

    uvicorn makes its own class. The protocol then changes the class of the object, so there is no constructor here.
    """

    closes = False
    is_unframed = False
    transport: Any
    _held_head: bytes | None = None  # a prepared head that waits for its body: one write sends both
    _expected_later = 0
    account: "Account | None" = None
    """Counts the answer, if the application sends by `send_and_count`."""

    def send(self, message: Any) -> Any:  # not `async`: another coroutine around uvicorn's would cost every message
        """Send a message of the application. What is not a path send or a prepared head, uvicorn sends."""
        if self.more_body and not self.response_started and self._leaves_the_body():
            self.keep_alive = False
        if PREPARED in message and self._hold_prepared_head(message):
            return _done()
        if self._held_head is not None:
            head, self._held_head = self._held_head, None
            if self._send_whole_body(head, message):
                return _done()
            if not self.disconnected:
                self.transport.write(head)
        if not self.keep_alive or self.closes:
            message = self._prepare_last_answer(message)
        if message["type"] == PATHSEND:
            return self._send_path(message)
        return super().send(message)

    def _send_path(self, message: Message) -> Awaitable[None]:
        if (later := message.get(SEND_LATER)) is None or not later.take(message, self):
            return _path_send_of(message)(protocol_of(self), self, message)
        # uvicorn refuses what an application sends after that, as it does after a path send
        self._expected_later, self.expected_content_length = self.expected_content_length, _REFUSED
        return _done()

    def send_now(self, message: Message) -> Awaitable[None]:
        """Send a path send that a `SendLater` has kept."""
        protocol_of(self).forget_scope()
        self.expected_content_length = self._expected_later
        return _path_send_of(message)(protocol_of(self), self, message)

    def begin_in_segments(self, count: int) -> None:
        """Send the beginning of the head in so many segments: the kernel paces only what comes after them.

        Each of them may have up to 64 KiB on the loopback device, on which a proxy may be.
        """
        self.transport = _SegmentingTransport(protocol_of(self), self, count)

    def send_and_count(self, message: Any) -> Any:
        """Send a message. `account` sends and counts all but prepared heads with their bodies, which it only counts."""
        account: Any = self.account
        if account is None:
            return self.send(message)
        if PREPARED in message:
            if not self.more_body and self._hold_prepared_head(message, account):
                account.begin(message["status"], message["headers"])
                return _done()
        elif self._held_head is not None and self._send_whole_body(self._held_head, message):
            self._held_head = self.account = None  # they refer to each other
            account.take_whole(len(message.get("body", b"")))
            return _done()
        return account.send(message)

    def _leaves_the_body(self) -> bool:
        """Return whether the answer begins before a body that is too long to be read, or that may never come.

        A client that waits for 100 (Continue) need not send its body after another answer. If it did not, its next
        request would be read as that body [RFC 9110 10.1.1].
        """
        return self.waiting_for_100_continue or bool(close_after_body(self.scope))

    def _prepare_last_answer(self, message: Message) -> Message:
        """Prepare a message of the last answer of a connection, and return it.

        uvicorn would close the transport with the last message. A client that is still sending would lose the end of
        the answer to a reset, so the protocol closes it, in `on_response_complete`.
        """
        if not self.response_started:
            return (self._without_chunks if self.scope["http_version"] == "1.0" else _with_close)(message)
        self.closes = self.keep_alive = True
        if self.is_unframed and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))  # uvicorn compares the two
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
            self.transport = _UnframedTransport(protocol_of(self))
        return {**start, "headers": headers}

    def _hold_prepared_head(self, message: Message, account: "Account | None" = None) -> bool:
        """Hold the head of a response until its body comes, and return True, if it is the one that was prepared.

        account: may add the id of the request to the head.
        """
        prepared: PreparedHead = message[PREPARED]
        if (
            self.response_started
            or self.disconnected
            or self.access_log
            or self.flow.write_paused
            or not self.keep_alive
            or self.scope["method"] == "HEAD"
            or CONNECTION_CLOSE in self.scope["headers"]
            or not isinstance(headers := message.get("headers"), list)
            or tuple(headers) != prepared.headers
            or (lines := lines_of(self.default_headers)) is None
        ):
            return False
        made = prepared.lines
        if account is not None and account.sends_id:
            if REQUEST_ID in made:
                return False
            made += b"%s: %s\r\n" % (REQUEST_ID, account.request_id.encode())
        self.response_started = True
        self.waiting_for_100_continue = False
        self.chunked_encoding = False
        self.expected_content_length = prepared.length
        self._held_head = b"".join((STATUS_LINE[message["status"]], lines, made, b"\r\n"))
        return True

    def _send_whole_body(self, head: bytes, message: Message) -> bool:
        """Send a head together with its body, and return True, if the message has the whole body."""
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


class _UnframedTransport:
    """The transport of an answer that ends with its connection: an early close would look like that end."""

    __slots__ = ("_connection", "is_closing", "write")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.is_closing = connection.transport.is_closing
        self.write = connection.transport.write

    def close(self) -> None:
        """Reset the connection: uvicorn calls this for answers that fail."""
        reset(self._connection)


class _SegmentingTransport:
    """The transport of an answer whose beginning is sent in some segments. It leaves the rest to the true one."""

    __slots__ = ("_connection", "_count", "_cycle", "close", "is_closing")

    def __init__(self, connection: Connection, cycle: DownloadCycle, count: int) -> None:
        self._connection = connection
        self._cycle = cycle
        self._count = count
        self.is_closing = connection.transport.is_closing
        self.close = connection.transport.close

    def write(self, data: bytes) -> None:
        """Send the head of the answer. A transport that holds nothing makes a segment of each piece."""
        transport = self._cycle.transport = self._connection.transport
        first = max(1, len(data) - _PIECE * (self._count - 1))  # clients look at the status line first
        transport.write(data[:first])
        for start in range(first, len(data), _PIECE):
            transport.write(data[start : start + _PIECE])


def _path_send_of(message: Message) -> Callable[..., Awaitable[None]]:
    """Return the function that sends what a path send names, or lends."""
    if (lent := message.get("descriptor")) is None:
        return send_path
    return send_pieces if lent.is_in_pieces else send_file


async def _done() -> None:
    """Return at once."""


def _with_close(start: Message) -> Message:
    """Return the start of the last answer of a connection, which says so: before 0.53, uvicorn does not add that."""
    headers = list(start.get("headers", ()))
    if not any(name.lower() == b"connection" for name, _ in headers):
        headers.append(CONNECTION_CLOSE)
    return {**start, "headers": headers}


def lines_of(default_headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Return the lines that begin the head of every response, or None if uvicorn has to look at them.

    uvicorn makes a new list each second, so the lines are kept until the next one.
    """
    global _default_lines
    made_of, lines = _default_lines
    if made_of is not default_headers:
        lines = None
        if all(name != b"content-length" and is_ordinary(name, value) for name, value in default_headers):
            lines = b"".join([b"%s: %s\r\n" % header for header in default_headers])
        _default_lines = default_headers, lines
    return lines
