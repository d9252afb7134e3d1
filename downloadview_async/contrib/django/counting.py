"""Notes what Django's servers have taken of a download that is counted, because its link has `uses`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.types import Message

from downloadview_async.accounts.outcome import CLIENT_LEFT, Outcome
from downloadview_async.asgi.uses import Counted
from downloadview_async.http.plan import Plan
from downloadview_async.policy.uses import Use

_notes: set[asyncio.Task[Any]] = set()


async def note(answer: Counted) -> None:
    """Note what was sent of an answer, also if this task is cancelled: Django does that when the client has left."""
    task = asyncio.ensure_future(answer.note())
    _notes.add(task)  # the event loop has only a weak reference
    task.add_done_callback(_notes.discard)
    await asyncio.shield(task)


async def counted(body: AsyncIterator[bytes], plan: Plan, use: Use) -> AsyncGenerator[bytes]:
    """Yield the chunks of a body to a server that takes one after the other, and note at the end what it has taken."""
    answer, sent, aborted = Counted(use, None, _nowhere), 0, CLIENT_LEFT
    try:
        async for chunk in body:
            if sent + len(chunk) == plan.length:
                use.end()
            yield chunk
            await asyncio.sleep(0)  # lets Django cancel this, since servers drop what is sent after the client has left
            sent += len(chunk)
        aborted = ""
    finally:
        spans = tuple(piece for piece in plan.body if not isinstance(piece, bytes))
        answer.observe(Outcome(status=plan.status, how="chunks", spans=spans, sent=sent, aborted=aborted or None))
        await note(answer)


async def _nowhere(message: Message) -> None:
    """Send nothing."""
