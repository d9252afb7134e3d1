"""Notes what Django's servers have taken of a download that is counted, because its link has `uses`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from downloadview_async.asgi.uses import note_sent
from downloadview_async.http.plan import Plan
from downloadview_async.policy.uses import Use

_notes: set[asyncio.Task[Any]] = set()


async def shielded(work: Coroutine[Any, Any, None]) -> None:
    """Do some work, also if this task is cancelled: Django does that when the client has left."""
    task = asyncio.ensure_future(work)
    _notes.add(task)  # the event loop has only a weak reference
    task.add_done_callback(_notes.discard)
    await asyncio.shield(task)


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
