"""How an answer leaves: one `Delivery`, made by `delivery_of`, sent by `deliver`, and noted for its `Outcome`."""

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import Message, Receive, Send

from downloadview_async.accounts.facts import Facts
from downloadview_async.asgi.descriptor_paths import LastingPaths
from downloadview_async.asgi.disconnect import until_the_client_leaves
from downloadview_async.asgi.extensions import FOREIGN, PATHSEND, SEND_LATER, SETTLED, ZERO_COPY
from downloadview_async.asgi.loan import Batches, Lendable, Loan
from downloadview_async.asgi.send_later import SendLater
from downloadview_async.asgi.transfer import send_in_chunks
from downloadview_async.asgi.zero_copy import send_zero_copy
from downloadview_async.errors import SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.plan import Plan
from downloadview_async.sources.base import OpenFile, Piece, arrived, pieces_of
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of

SMALL = 64 * 1024
"""Up to this many bytes, one message is less work than having the kernel send the file."""


@dataclass(slots=True)
class Offloaded:
    """A proxy sends the file, by the header named `by`, in lower case."""

    by: str


@dataclass(slots=True)
class Redirected:
    """The client gets the file from the place in Location."""


@dataclass(slots=True)
class Empty:
    """The answer has a head alone, as to a HEAD or with the status 304."""


@dataclass(slots=True)
class Inline:
    """The whole body is in one message. span: the part of the file that it is; None for another text."""

    body: bytes
    span: ByteRange | None = None


@dataclass(slots=True)
class Descriptor:
    """The server sends a span of an open file by its descriptor, or we do if a middleware drops its message.

    later: given if the server may send it when the application has returned.
    """

    file: OpenLocalFile
    span: ByteRange
    otherwise: "Chunks"
    later: SendLater | None = None


@dataclass(slots=True)
class Pieces:
    """The server sends a span of a file that consists of bytes and of local files: see `InPieces`.

    batches: the pieces. The file leaves otherwise if there are none, or if a middleware drops their message.
    """

    batches: AsyncGenerator[Sequence[Piece], None]
    span: ByteRange
    otherwise: "Chunks"


@dataclass(slots=True)
class ZeroCopy:
    """The server sends a span of an open file by ASGI's Zero Copy Send. is_used: whether it has done so."""

    file: OpenLocalFile
    span: ByteRange
    is_used: bool = False

    def use(self) -> None:
        """Note that it has done so."""
        self.is_used = True


@dataclass(slots=True)
class Path:
    """The server sends a whole file by a path. size: bytes, None if unknown.

    otherwise: how the file leaves if the context gives no path.
    """

    path: AbstractContextManager[str | None]
    size: int | None
    otherwise: "Chunks | None" = None


@dataclass(slots=True)
class Chunks:
    """We send the body, a chunk at a time."""

    plan: Plan
    file: OpenFile


Delivery = Offloaded | Redirected | Empty | Inline | Descriptor | Pieces | ZeroCopy | Path | Chunks
"""Each way in which an answer can leave."""

_KINDS: dict[type[Any], str] = {
    Redirected: "redirected",
    Empty: "empty",
    Inline: "inline",
    Descriptor: "zero-copy",
    Pieces: "zero-copy",
    ZeroCopy: "zero-copy",
    Path: "path",
    Chunks: "chunks",
}


class _OfThread(threading.local):
    """Values that each thread, and so each event loop, has for itself."""

    def __init__(self) -> None:
        self.lasting_paths = LastingPaths()


_of_thread = _OfThread()


def delivery_of(
    plan: Plan, opened: OpenFile, path_send: Mapping[str, Any] | None = None, *, is_fresh: bool = False
) -> Delivery:
    """Return how the body of a plan leaves when no proxy sends the file.

    path_send: the server's entry for path sends in the scope, None if it has none. With "descriptor" in it, the server
    takes an open descriptor, an offset and a count, or pieces. With `ZERO_COPY`, it takes Zero Copy Sends. Else it
    takes a path, and only whole files are sent that way.
    is_fresh: whether the file has been opened just now. Unless it was changed recently, nobody has written to it since.
    """
    if not plan.body:
        return Empty()
    span, local = plan.body[0], local_of(opened)
    if not isinstance(span, ByteRange) or len(plan.body) > 1:
        return Chunks(plan, opened)
    takes_descriptors = path_send is not None and FOREIGN not in path_send and path_send.get("descriptor")
    if local is None:
        if takes_descriptors and len(span) > SMALL and (batches := pieces_of(opened, span)) is not None:
            return Pieces(batches, span, Chunks(plan, opened))
        if len(span) <= SMALL and (body := arrived(opened, span)) is not None:
            return Inline(body, span)
        return Chunks(plan, opened)
    if len(span) <= SMALL:
        body = bytes_of(local, span, is_fresh=is_fresh)
        return Chunks(plan, opened) if body is None else Inline(body, span)
    if path_send is None or FOREIGN in path_send:
        return Chunks(plan, opened)
    if takes_descriptors:
        return Descriptor(local, span, Chunks(plan, opened))
    if ZERO_COPY in path_send:
        return ZeroCopy(local, span) if local.is_quick else Chunks(plan, opened)
    if len(span) == opened.metadata.size:
        return Path(_of_thread.lasting_paths.path_of(local.descriptor), len(span), Chunks(plan, opened))
    return Chunks(plan, opened)


def bytes_of(local: OpenLocalFile, span: ByteRange, *, is_fresh: bool) -> bytes | None:
    """Return the bytes of a short span if they are here, and of one version; else None: `Chunks` waits, or aborts.

    is_fresh: as in `delivery_of`. Raises `SourceUnavailable` if the disk fails.
    """
    body = local.read_nowait(span)
    if body is None or ((not is_fresh or local.is_recent()) and local.is_rewritten(is_last=True)):
        return None
    return body


def deliver(
    delivery: Delivery,
    start: Message | None,
    send: Send,
    *,
    receive: Receive | None = None,
    facts: Facts | None = None,
    status: int = 200,
) -> Awaitable[None]:
    """Send an answer, which begins with `start`; None: its start has been sent already, with `status`.

    receive: given if nothing else listens for the client to leave; sending then stops when it does.
    facts: those of the request, in which the delivery is noted.

    Raises `SourceUnavailable` if the file cannot be read and nothing has been sent yet, so that another status can
    still be sent; else `TransferAborted`, and the server has to abort the connection.
    """
    if facts is not None:
        facts.deliver(delivery, status if start is None else start["status"])
    return _send(delivery, start, send, receive)


async def _send(delivery: Delivery, start: Message | None, send: Send, receive: Receive | None) -> None:
    match delivery:
        case Inline() | Offloaded() | Redirected() | Empty():
            if start is not None:
                await send(start)
            await send({"type": "http.response.body", "body": delivery.body if isinstance(delivery, Inline) else b""})
        case Descriptor():
            if not await _lend(delivery.file, delivery.span, start, send, receive, delivery.later):
                await _send(delivery.otherwise, None, send, receive)
        case Pieces():
            async with aclosing(delivery.batches) as batches:
                first = await _first(batches)
                if first is not None:
                    if await _lend(Batches(first, batches), delivery.span, start, send, receive):
                        return
                    start = None
            await _send(delivery.otherwise, start, send, receive)
        case ZeroCopy():
            if start is not None:
                await send(start)
            await _listening(partial(_send_zero_copy, delivery), send, receive)
        case Path():
            with delivery.path as path:
                if path is not None:
                    if start is not None:
                        await send(start)
                    # The server does not tell when it has opened the file. It sends Content-Length bytes of it.
                    await send({"type": PATHSEND, "path": path, SETTLED: True})
                    return
            assert delivery.otherwise is not None
            await _send(delivery.otherwise, start, send, receive)
        case Chunks():
            await _listening(partial(send_in_chunks, delivery.plan, delivery.file, start=start), send, receive)


async def _send_zero_copy(delivery: ZeroCopy, send: Send) -> None:
    await send_zero_copy(delivery.file, delivery.span, send, delivery.use)


async def _lend(
    lent: Lendable,
    span: ByteRange,
    start: Message | None,
    send: Send,
    receive: Receive | None,
    later: SendLater | None = None,
) -> bool:
    """Send the start, and have the server send a span. Return False if a middleware has dropped the message for it."""
    if start is not None:
        await send(start)
    async with Loan(lent) as loan:
        await send(loan.message(span) if later is None else {**loan.message(span), SEND_LATER: later})
        if not loan.is_settled:
            await _listening(lambda _: loan.wait(), send, receive)
        return not loan.is_dropped


async def _first(batches: AsyncGenerator[Sequence[Piece], None]) -> Sequence[Piece] | None:
    """Return the first pieces, or None without any. Raises `FileError`, since nothing has been sent yet."""
    try:
        return await anext(batches, None)
    except TransferAborted as exc:
        raise SourceUnavailable(str(exc)) from exc


async def _listening(work: Callable[[Send], Awaitable[None]], send: Send, receive: Receive | None) -> None:
    if receive is None:
        await work(send)
    else:
        await until_the_client_leaves(work, receive, send)


def kind_of(delivery: Delivery) -> str:
    """Return the name of the way in which an answer leaves, as in `Outcome`."""
    return "chunks" if isinstance(delivery, ZeroCopy) and not delivery.is_used else _KINDS[type(delivery)]


def spans_of(delivery: Delivery) -> tuple[ByteRange | None, ...]:
    """Return the parts of the file that an answer has; None for a file of unknown size."""
    match delivery:
        case Descriptor() | Pieces() | ZeroCopy():
            return (delivery.span,)
        case Inline():
            return () if delivery.span is None else (delivery.span,)
        case Path():
            return () if delivery.size is None else (ByteRange(0, delivery.size),)
        case Chunks():
            return tuple(piece for piece in delivery.plan.body if not isinstance(piece, bytes))
        case _:
            return ()
