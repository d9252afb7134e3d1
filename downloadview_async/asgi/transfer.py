"""Sends the body of a plan: exactly the promised bytes, to a client that may leave at any time."""

import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.lowlevel import checkpoint
from starlette.types import Message, Receive, Send

from downloadview_async.asgi.descriptor_paths import LastingPaths
from downloadview_async.errors import FileError, SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.plan import Plan
from downloadview_async.sources.base import OpenFile
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of

PATHSEND = "http.response.pathsend"
"""The ASGI extension by which a server sends a file itself."""

PREPARED = "downloadview_async.prepared"
"""The key of a `PreparedHead` in the start of a response, for a server that wants it. The whole body follows."""

FOREIGN = "downloadview_async.foreign"
"""Marks a path-send offer in the scope that `OffloadMiddleware` made for responses that are not ours."""

SETTLED = "downloadview_async.settled"
"""Marks a path-send message whose file no proxy may send: that has been decided already."""

SMALL = 64 * 1024
"""Up to this many bytes, one message is less work than having the kernel send the file."""

MAX_UNREAD_BODY = 1 << 20
"""Up to this many bytes of a request body are read and dropped: closing earlier could cost the client the answer."""


_NAME = re.compile(rb"(?!(?:connection|transfer-encoding)$)[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")


class _OfThread(threading.local):
    """Values that each thread, and so each event loop, has for itself."""

    def __init__(self) -> None:
        self.lasting_paths = LastingPaths()


_of_thread = _OfThread()


def is_ordinary(name: bytes, value: bytes) -> bool:
    """Return whether a header is valid, in lower case [RFC 9110 5.1, 5.5], and not about the connection."""
    return bool(_NAME.fullmatch(name) and _VALUE.fullmatch(value))


@dataclass(frozen=True, slots=True)
class PreparedHead:
    """The headers of a response that is sent often, with their lines in HTTP/1.1. length: the Content-Length.

    It may be used only if the start of the response still has exactly these headers: middleware may have added some.
    """

    headers: tuple[tuple[bytes, bytes], ...]
    lines: bytes
    length: int

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> "PreparedHead | None":
        """Return the prepared head, or None if a header is not ordinary: the server then checks the headers itself."""
        headers = tuple(headers)
        lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        lengths = [int(value) for name, value in headers if name == b"content-length" and value.isdigit()]
        if len(lengths) != 1 or not all(is_ordinary(name, value) for name, value in headers):
            return None
        return cls(headers, lines, lengths[0])

    def with_field(self, field: tuple[bytes, bytes]) -> "PreparedHead":
        """Return the head with one more field, which has to be ordinary."""
        return PreparedHead((*self.headers, field), self.lines + b"%s: %s\r\n" % field, self.length)


class LentFile:
    """An open file in a path send. The server takes it, and gives it back after sending it.

    Only the message refers to this object. So if a middleware drops the message, the loan ends too.
    """

    __slots__ = ("_file", "loan")

    def __init__(self, file: OpenLocalFile, loan: "Loan | None" = None) -> None:
        self._file = file
        self.loan = Loan(file) if loan is None else loan

    def take(self) -> OpenLocalFile:
        """Return the file, which has to be given back. Raises `TransferAborted` if the response has already ended."""
        if self.loan.is_over:
            raise TransferAborted("the response ended before its file was sent")
        self.loan.is_taken = True
        return self._file

    def give_back(self) -> None:
        """Let the file be closed."""
        self.loan.settle()

    def __del__(self) -> None:
        self.loan.settle()


class Loan:
    """Lends an open file to the server for a path send. The context ends when the server has given the file back.

    is_taken: whether the server has taken the file. is_settled: whether it has given the file back, or will never take
    it. is_over: whether the context has ended, so that the file cannot be taken any more.
    """

    __slots__ = ("_file", "_settled", "is_over", "is_settled", "is_taken")

    def __init__(self, file: OpenLocalFile) -> None:
        self._file = file
        self._settled: anyio.Event | None = None
        self.is_over = False
        self.is_settled = False
        self.is_taken = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_over = True
        if self.is_taken and not self.is_settled:
            with anyio.CancelScope(shield=True):
                await self._wait()

    def settle(self) -> None:
        """End the wait for the server."""
        self.is_settled = True
        if self._settled is not None:
            self._settled.set()

    async def returned(self, receive: Receive | None = None, send: Send | None = None) -> bool:
        """Wait until the server has given the file back: middleware may take our message long before the server does.

        With `receive` and `send`, also stop waiting when the client leaves, for callers that do not listen for that.
        Return False if a middleware that does not know path sends has dropped the message: the body is still unsent.
        """
        if not self.is_settled:
            if receive is None or send is None:
                await self._wait()
            else:
                await until_the_client_leaves(lambda _: self._wait(), receive, send)
        return self.is_taken or not self.is_settled

    async def _wait(self) -> None:
        if not self.is_settled:
            self._settled = self._settled or anyio.Event()
            await self._settled.wait()

    def message(self, span: ByteRange) -> Message:
        """Return the path-send message for a span of the file. Call this once."""
        return {
            "type": PATHSEND,
            "path": f"/dev/fd/{self._file.descriptor}",
            "descriptor": LentFile(self._file, self),
            "offset": span.start,
            "count": len(span),
        }


async def send_plan(
    plan: Plan,
    file: OpenFile,
    start: Message,
    send: Send,
    *,
    path_send: Mapping[str, Any] | None = None,
) -> None:
    """Send the answer of a plan, which begins with `start`.

    path_send: the server's entry for path sends in the scope, None if it has none. With "descriptor" in it, the server
    takes an open descriptor, an offset and a count. Without, it takes a path, and only whole files are sent that way.

    Raises `SourceUnavailable` if the file cannot be read and nothing has been sent yet, so that another status can
    still be sent; else `TransferAborted`, and the server has to abort the connection.
    """
    if plan.length == 0:
        await send(start)
        await send({"type": "http.response.body", "body": b""})
        return
    span, local = only_span(plan), local_of(file)
    if path_send is None or FOREIGN in path_send or span is None or local is None:
        pass
    elif path_send.get("descriptor"):
        await send(start)
        async with Loan(local) as loan:
            await send(loan.message(span))
            if await loan.returned():
                return
        await send_in_chunks(plan, file, send)
        return
    elif len(span) == file.metadata.size:
        with _of_thread.lasting_paths.path_of(local.descriptor) as path:
            if path is not None:
                # The server does not tell when it has opened the file. It sends Content-Length bytes of it.
                await send(start)
                await send({"type": PATHSEND, "path": path, SETTLED: True})
                return
    await send_in_chunks(plan, file, send, start)


async def send_in_chunks(plan: Plan, file: OpenFile, send: Send, start: Message | None = None) -> None:
    """Send the body of a plan in chunks, after `start` if that is still unsent. Raises what `send_plan` raises."""
    left, started = plan.length, start is None
    async with aclosing(body_of(plan, file)) as chunks:
        try:
            async for chunk in chunks:
                if not started and start is not None:
                    started = True
                    await send(start)
                if left is not None:
                    left -= len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": left != 0})
                if left == 0:
                    return
                # A read from the page cache does not wait, nor does a send that drops its chunk because the client has
                # left: let other tasks run, and the one that listens for the disconnect among them.
                await checkpoint()
        except (TransferAborted, FileError) as exc:
            if started:
                raise TransferAborted(str(exc)) from exc
            if isinstance(exc, FileError):
                raise
            raise SourceUnavailable(str(exc)) from exc
    if not started and start is not None:
        await send(start)
    await send({"type": "http.response.body", "body": b""})


def only_span(plan: Plan) -> ByteRange | None:
    """Return the span if the body is a single one of more than `SMALL` bytes, else None."""
    piece = plan.body[0] if len(plan.body) == 1 else None
    return piece if isinstance(piece, ByteRange) and len(piece) > SMALL else None


def body_at_once(plan: Plan, file: OpenLocalFile) -> bytes | None:
    """Return the whole body if it has at most `SMALL` bytes and can be read without waiting, else None."""
    if not plan.body:
        return b""
    piece = plan.body[0] if len(plan.body) == 1 else None
    return file.read_nowait(piece) if isinstance(piece, ByteRange) and len(piece) <= SMALL else None


async def body_of(plan: Plan, file: OpenFile) -> AsyncGenerator[bytes, None]:
    """Yield the body of a plan: exactly the promised bytes. Raises `TransferAborted` if the file has fewer."""
    for piece in plan.body:
        if isinstance(piece, bytes):
            yield piece
            continue
        async with aclosing(_exactly(piece, file)) as chunks:
            async for chunk in chunks:
                yield chunk


async def _exactly(span: ByteRange | None, file: OpenFile) -> AsyncGenerator[bytes, None]:
    """Yield exactly the bytes of a span. Raises `TransferAborted` if the file shrank."""
    left = None if span is None else len(span)
    chunks = file.stream(span)
    try:
        async for chunk in chunks:
            yield chunk if left is None else chunk[:left]
            if left is not None and (left := left - len(chunk)) <= 0:
                return
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
    if left:
        raise TransferAborted(f"the file ended {left} bytes before the end of the promised content")


async def until_the_client_leaves(work: Callable[[Send], Awaitable[None]], receive: Receive, send: Send) -> None:
    """Run `work`, and cancel it if the client disconnects before the end of the response. Raises what `work` raises.

    Most servers do not raise from `send` when the client has left. They drop the messages, so a download that does not
    listen for the disconnect reads its file to the end for nothing.
    """
    failure: Exception | None = None
    end: bool | Loan = False  # not the message itself, so that a `LentFile` can end

    async def send_watched(message: Message) -> None:
        nonlocal end
        end = _end_of_response(message)
        await send(message)

    def has_ended() -> bool:
        return end if isinstance(end, bool) else end.is_settled and end.is_taken

    async with anyio.create_task_group() as tasks:

        async def listen() -> None:
            nonlocal failure
            # Servers send "http.disconnect" after the end of a response too. Only the closing of the file is left
            # then, and must not be cancelled.
            try:
                if not await _client_leaves(receive) or has_ended():
                    return
            except Exception as exc:  # from middleware, such as one that limits the body and answers this itself
                if has_ended():
                    return
                while isinstance(exc, ExceptionGroup) and len(exc.exceptions) == 1:  # as BaseHTTPMiddleware wraps it
                    exc = exc.exceptions[0]
                failure = failure or exc
            tasks.cancel_scope.cancel()

        tasks.start_soon(listen)
        try:
            await work(send_watched)
        except Exception as exc:
            failure = failure or exc  # raised below, so that it is not wrapped in an ExceptionGroup
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _end_of_response(message: Message) -> "bool | Loan":
    """Return whether a message ends its response. For a file that is lent: the loan, which tells when it ends."""
    if message["type"] == PATHSEND:
        lent: LentFile | None = message.get("descriptor")
        return True if lent is None else lent.loan
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def _client_leaves(receive: Receive) -> bool:
    """Return True when the client disconnects, False when it sends more than `MAX_UNREAD_BODY` bytes."""
    unread = 0
    while unread <= MAX_UNREAD_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return True
        unread += len(message.get("body", b""))
    return False
