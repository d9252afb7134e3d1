"""Sends the body of a plan in chunks: exactly the promised bytes."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from anyio.lowlevel import checkpoint
from starlette.types import Message, Send

from downloadview_async.errors import FileError, SourceUnavailable, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.plan import Plan
from downloadview_async.sources.base import OpenFile, Piece


async def send_in_chunks(plan: Plan, file: OpenFile, send: Send, start: Message | None = None) -> None:
    """Send the body of a plan in chunks, after `start` if that is still unsent.

    Raises `SourceUnavailable` if the file cannot be read and nothing has been sent yet, so that another status can
    still be sent; else `TransferAborted`, and the server has to abort the connection.
    """
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


async def body_of(plan: Plan, file: OpenFile) -> AsyncGenerator[bytes, None]:
    """Yield the body of a plan: exactly the promised bytes. Raises `TransferAborted` if the file has fewer."""
    for piece in plan.body:
        if isinstance(piece, bytes):
            yield piece
            continue
        async with aclosing(exactly(piece, file)) as chunks:
            async for chunk in chunks:
                yield chunk


async def exactly(span: ByteRange | None, file: OpenFile) -> AsyncGenerator[bytes, None]:
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
        raise TransferAborted(
            f"the file ended {left} bytes before the end of the promised content", reason="file-changed"
        )


async def chunks_of(first: Sequence[Piece], rest: AsyncIterator[Sequence[Piece]]) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of pieces: see `InPieces`. Raises `TransferAborted` if one of their files shrank."""
    batch: Sequence[Piece] | None = first
    while batch is not None:
        for piece in batch:
            if not isinstance(piece, tuple):
                yield bytes(piece)
                continue
            async with aclosing(exactly(piece[1], piece[0])) as chunks:
                async for chunk in chunks:
                    yield chunk
        batch = await anext(rest, None)
