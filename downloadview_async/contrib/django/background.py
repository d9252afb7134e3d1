"""One event loop in a thread of its own, for code that blocks: under WSGI, and in tests with Django's `Client`."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from downloadview_async.contrib.django.calling import has_running_loop

T = TypeVar("T")

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork has the dictionary, but not the thread
# What is iterated: garbage collection would close the generators within it one by one, and all at the same time.
_iterated: set[AsyncIterator[bytes]] = set()


def background_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process. Its thread is started with the first call and ends with the process."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            # a task, not run_forever: anyio keeps its worker threads as long as the loop's first task runs
            threading.Thread(
                target=loop.run_until_complete, args=(_never_ends(),), name="downloadview-async", daemon=True
            ).start()
        return loop


async def _never_ends() -> None:
    await asyncio.Event().wait()


def run_in_background(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine that runs in the background loop, and return what it returns. Raises what it raises."""
    return asyncio.run_coroutine_threadsafe(coroutine, background_loop()).result()


def iterate_in_background(chunks: AsyncIterator[bytes]) -> Iterator[bytes]:
    """Yield what an asynchronous iterator yields, which runs in the background loop, one item at a time."""

    async def following() -> bytes | None:
        with suppress(StopAsyncIteration):
            return await anext(chunks)
        return None

    _iterated.add(chunks)
    try:
        while (chunk := run_in_background(following())) is not None:
            yield chunk
    finally:
        # Whoever collects garbage may be the one who ends this: the loop's own thread, which must not wait for itself,
        # or the interpreter at its end, when that thread does not run any more.
        if not sys.is_finalizing():
            closing = asyncio.run_coroutine_threadsafe(_close(chunks), background_loop())
            if not has_running_loop():
                closing.result()


async def _close(chunks: AsyncIterator[bytes]) -> None:
    try:
        if (close := getattr(chunks, "aclose", None)) is not None:
            await close()
    finally:
        _iterated.discard(chunks)
