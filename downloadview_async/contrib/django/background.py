"""One event loop in a thread of its own, for code that blocks: under WSGI, and in tests with Django's `Client`."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

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
            threading.Thread(
                target=_run, args=(loop, threading.get_native_id()), name="downloadview-async", daemon=True
            ).start()
        return loop


def _run(loop: asyncio.AbstractEventLoop, starter: int) -> None:
    """Run the loop for ever. `starter` is the system's number of the thread that has started this one."""
    if threading.get_native_id() == starter:
        _keep_running_loops_apart()
    # a task, not run_forever: anyio keeps its worker threads as long as the loop's first task runs
    loop.run_until_complete(_never_ends())


async def _never_ends() -> None:
    await asyncio.Event().wait()


def _keep_running_loops_apart() -> None:
    """Make asyncio's running loop one of each greenlet in this thread.

    Where gevent or eventlet has patched `threading`, the loop's thread and those of the requests are greenlets of one
    thread of the system. asyncio notes for that thread which loop runs in it, so without this every request would seem
    to run in our loop: Django then refuses to use the ORM, and our views return coroutines.
    """
    from greenlet import gettrace, settrace  # installed, since one of the two is

    if not isinstance(previous := gettrace(), _Apart):  # a forked process has it already
        settrace(_Apart(previous))


class _Apart:
    """Keeps the running loop of each greenlet while another one runs. It is called after each switch of greenlets."""

    def __init__(self, previous: Callable[[str, tuple[Any, Any]], object] | None) -> None:
        self._previous = previous
        self._loops: WeakKeyDictionary[Any, asyncio.AbstractEventLoop] = WeakKeyDictionary()

    def __call__(self, event: str, greenlets: tuple[Any, Any]) -> None:
        """Put the running loop of the greenlet that has been left away, and set that of the one that goes on."""
        left, resumed = greenlets
        running = asyncio._get_running_loop()  # noqa: SLF001 - documented, for those who implement event loops
        if running is not None:
            self._loops[left] = running
        own = self._loops.pop(resumed, None) if self._loops else None
        if own is not running:
            asyncio._set_running_loop(own)  # noqa: SLF001
        if self._previous is not None:
            self._previous(event, greenlets)


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
