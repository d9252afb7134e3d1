"""Counts what Django's servers have taken of a body: for an `Outcome`, a link that has `uses`, and for limits."""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import contextmanager, nullcontext
from typing import Any

from asgiref.sync import sync_to_async
from django.http import HttpRequest
from starlette.requests import ClientDisconnect

from downloadview_async.asgi.accounts import Account
from downloadview_async.asgi.uses import note_sent
from downloadview_async.http.plan import Plan
from downloadview_async.policy.limits.limits import TRANSFERS, Transfers
from downloadview_async.policy.limits.pace import Pace
from downloadview_async.policy.uses import Use

LIMITED = "_downloadview_limited"
"""The attribute of a request with its scope, where the limits of its client hold."""

_notes: set[asyncio.Task[Any]] = set()


async def shielded(work: Coroutine[Any, Any, None]) -> None:
    """Do some work, also if this task is cancelled: Django does that when the client has left."""
    task = asyncio.ensure_future(work)
    _notes.add(task)  # the event loop has only a weak reference
    task.add_done_callback(_notes.discard)
    await asyncio.shield(task)


@contextmanager
def _taken_as_a_whole(account: Account) -> Iterator[None]:
    """End the account of a body, which was taken as a whole unless an error ends it."""
    try:
        yield
        account.is_complete = True
        account.end()
    except (GeneratorExit, asyncio.CancelledError):  # the server wants no more
        account.end(ClientDisconnect())
        raise
    except BaseException as exc:
        account.end(exc)
        raise


def each_counted(chunks: Iterable[bytes], account: Account) -> Iterator[bytes]:
    """Yield the chunks of a body, and count each of them when the server asks for the next one.

    The end of the body ends the account, however it ends: Django does not close the response if the server raises.
    """
    try:
        with _taken_as_a_whole(account):
            for chunk in chunks:
                yield chunk
                account.count(len(chunk))
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


async def each_counted_async(chunks: AsyncIterable[bytes], account: Account) -> AsyncIterator[bytes]:
    """Do what `each_counted` does, asynchronously."""
    try:
        with _taken_as_a_whole(account):
            async for chunk in chunks:
                yield chunk
                # lets Django cancel this, since servers drop what is sent after the client has left
                await asyncio.sleep(0)
                account.count(len(chunk))
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


async def in_threads(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the chunks of a body that is iterated in Django's thread, one after the other."""
    iterator = iter(chunks)
    while (chunk := await sync_to_async(lambda: next(iterator, None))()) is not None:
        yield chunk


async def counted(body: AsyncIterator[bytes], plan: Plan, use: Use) -> AsyncGenerator[bytes]:
    """Yield the chunks of a body to a server that takes one after the other, and note at the end what it has taken."""
    sent, is_complete = 0, False
    try:
        async for chunk in body:
            if sent + len(chunk) == plan.length:
                use.end()
            yield chunk
            await asyncio.sleep(0)  # lets Django cancel this, since servers drop what is sent after the client has left
            sent += len(chunk)
        is_complete = True
    finally:
        spans = tuple(piece for piece in plan.body if not isinstance(piece, bytes))
        use.end()
        await shielded(note_sent(use, spans, sent, is_complete=is_complete))


def limited_scope(request: HttpRequest) -> dict[str, Any] | None:
    """Return the scope of a GET whose client has limits, or None without limits."""
    scope: dict[str, Any] = getattr(request, LIMITED, None) or getattr(request, "scope", None) or {}
    return scope if TRANSFERS in scope else None


async def limited(body: AsyncIterable[bytes], transfers: Transfers, length: int | None) -> AsyncGenerator[bytes]:
    """Yield the chunks of a body at the rate of its client, and note at the end how many bytes a server has taken.

    length: of the body in bytes, None if it is not known.
    """
    sent, is_complete = 0, False
    try:
        with Pace(transfers.rates, None) if transfers.rates else nullcontext() as pace:
            async for chunk in body:
                for piece in [chunk] if pace is None else _pieces_of(chunk, pace.piece):
                    if pace is not None and sent:
                        await pace.wait(len(piece))
                    if sent + len(piece) == length:
                        transfers.let_go()  # a client that has all may ask again before the server asks for the end
                    yield piece
                    await asyncio.sleep(0)  # lets Django cancel this, since servers drop what comes after the end
                    sent += len(piece)
        is_complete = True
    finally:
        transfers.sent(sent, is_complete=is_complete or sent == length)
        transfers.end()  # the response may be closed much later
        if isinstance(body, AsyncGenerator):
            await body.aclose()


def _pieces_of(chunk: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(chunk), size):
        yield chunk[start : start + size]


def each_limited(
    chunks: Iterable[bytes], transfers: Transfers, length: int | None, let_go: Callable[[], object]
) -> Iterator[bytes]:
    """Yield the chunks of a body, and note at the end how many bytes a server has taken. No rate is kept.

    length: of the body in bytes, None if it is not known. let_go: calls `Transfers.let_go` in its event loop. It is
    called before the last bytes leave: a client that has them may ask again before the server closes the response.
    """
    sent, is_complete = 0, False
    try:
        for chunk in chunks:
            if sent + len(chunk) == length:
                let_go()
            yield chunk
            sent += len(chunk)
        is_complete = True
    finally:
        transfers.sent(sent, is_complete=is_complete)
        if isinstance(chunks, Generator):
            chunks.close()
