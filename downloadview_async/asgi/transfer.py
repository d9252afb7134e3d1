"""Sending the body of a plan: exactly the bytes that were promised, to a client that may leave at any time."""

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Self

import anyio
from anyio.lowlevel import checkpoint
from starlette.types import Message, Receive, Send

from downloadview_async.errors import FileError, SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.plan import Plan
from downloadview_async.sources.base import OpenFile

PATHSEND = "http.response.pathsend"
"""The ASGI extension by which a server sends a file itself."""

SMALL = 64 * 1024
"""Bytes of a file that are sent with less work in one message than by the kernel."""

MAX_UNREAD_BODY = 1 << 20
"""Bytes of a request body that are read and dropped: closing before a client has sent it can cost it the answer."""


class LentDescriptor:
    """An open descriptor that goes to the server in a path send. It cannot be taken for another once it is closed.

    returned: set by the server when it is done with the message.
    """

    def __init__(self, number: int) -> None:
        self._number: int | None = number
        self.returned = anyio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._number = None

    def dup(self) -> int:
        """Return a descriptor of the server's own. Raises `TransferAborted` where the response has ended already."""
        if self._number is None:
            raise TransferAborted("the response ended before its file was sent")
        return os.dup(self._number)


async def send_plan(
    plan: Plan, file: OpenFile, headers: list[tuple[bytes, bytes]], send: Send, *, by_descriptor: bool = False
) -> None:
    """Send the answer that `plan` is, with `headers` as ASGI wants them.

    by_descriptor: whether the server takes an open descriptor, with an offset and a count, in a path send.

    Raises `SourceUnavailable` if the file cannot be read and nothing has been sent yet, so that another status still
    can be; else `TransferAborted`, and the server has to abort the connection.
    """
    start = {"type": "http.response.start", "status": plan.status, "headers": headers}
    left = plan.length
    if left == 0:
        await send(start)
        await send({"type": "http.response.body", "body": b""})
        return
    if by_descriptor and (span := _only_span(plan)) is not None and (descriptor := _descriptor_of(file)) is not None:
        await send(start)
        with LentDescriptor(descriptor) as lent:
            await send(
                {
                    "type": PATHSEND,
                    "path": f"/dev/fd/{descriptor}",
                    "descriptor": lent,
                    "offset": span.start,
                    "count": len(span),
                }
            )
            await lent.returned.wait()  # some middleware takes a message from us long before the server does
        return
    started = False
    async with aclosing(_body(plan, file)) as chunks:
        try:
            async for chunk in chunks:
                if not started:
                    started = True
                    await send(start)
                if left is not None:
                    left -= len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": left != 0})
                if left == 0:
                    return
                # Neither a read from the page cache nor a send that drops what a client who has left would get waits
                # for anything: let the others run, and the listener hear that the client has left.
                await checkpoint()
        except (TransferAborted, FileError) as exc:
            if started:
                raise TransferAborted(str(exc)) from exc
            if isinstance(exc, FileError):
                raise
            raise SourceUnavailable(str(exc)) from exc
    if not started:
        await send(start)
    await send({"type": "http.response.body", "body": b""})


def _only_span(plan: Plan) -> ByteRange | None:
    """Return the span that is the whole body, if it is worth more than one message."""
    match plan.body:
        case (ByteRange() as span,) if len(span) > SMALL:
            return span
    return None


def _descriptor_of(file: OpenFile) -> int | None:
    descriptor: int | None = getattr(file, "descriptor", None)
    return descriptor


async def _body(plan: Plan, file: OpenFile) -> AsyncGenerator[bytes, None]:
    for piece in plan.body:
        if isinstance(piece, bytes):
            yield piece
            continue
        async with aclosing(_exactly(piece, file)) as chunks:
            async for chunk in chunks:
                yield chunk


async def _exactly(span: ByteRange | None, file: OpenFile) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a span: what a file has grown by is cut off, what is missing aborts."""
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
        raise TransferAborted(f"the file ended {left} bytes before what was promised of it")


async def until_the_client_leaves(work: Callable[[Send], Awaitable[None]], receive: Receive, send: Send) -> None:
    """Run `work`, and cancel it if the client disconnects before all is sent. Raises what `work` raises.

    Servers do not raise from `send` when a client has left: they drop what is sent, so a download that did not
    listen would read its file to the end for nobody.
    """
    failure: Exception | None = None
    last: Message = {"type": ""}

    async def send_watched(message: Message) -> None:
        nonlocal last
        last = message
        await send(message)

    async with anyio.create_task_group() as tasks:

        async def listen() -> None:
            # Servers say "http.disconnect" after the end of a response, too. All that is left then is closing the
            # file, which is not to be cancelled.
            if await _client_leaves(receive) and not _ends_the_response(last):
                tasks.cancel_scope.cancel()

        tasks.start_soon(listen)
        try:
            await work(send_watched)
        except Exception as exc:
            failure = exc  # raised below, not as a part of an ExceptionGroup
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _ends_the_response(message: Message) -> bool:
    if message["type"] == PATHSEND:
        lent: LentDescriptor = message["descriptor"]
        return lent.returned.is_set()
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def _client_leaves(receive: Receive) -> bool:
    """Return True when the client disconnects; False when it sends a body that is too large to wait behind."""
    unread = 0
    while unread <= MAX_UNREAD_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return True
        unread += len(message.get("body", b""))
    return False
