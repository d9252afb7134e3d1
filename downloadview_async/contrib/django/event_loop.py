"""An event loop in a background thread, for synchronous code: under WSGI, and in tests with Django's `Client`."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest

from downloadview_async.contrib.django.dual import has_running_loop

T = TypeVar("T")

_NO_LOOP: tuple[asyncio.AbstractEventLoop | None, Any] = (None, (None, None))  # and no hooks for generators
_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a forked process has the dictionary, but not the thread
# Iterators in use. Garbage collection would close the nested generators of one separately and concurrently.
_iterated: set[AsyncIterator[bytes]] = set()


def background_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process. The first call starts its thread, which ends with the process."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop, starter = asyncio.new_event_loop(), threading.get_native_id()
            try:
                threading.Thread(target=_run, args=(loop, starter), name="downloadview-async", daemon=True).start()
            except RuntimeError:  # no thread can be started now: the next call tries it again
                loop.close()
                raise
            _loops[os.getpid()] = loop
        return loop


def _run(loop: asyncio.AbstractEventLoop, starter: int) -> None:
    """Run the loop for ever. `starter` is the native id of the thread that has started this one."""
    if threading.get_native_id() == starter:
        _keep_running_loops_apart()
    # a task, not run_forever: anyio keeps its worker threads while the loop's first task runs
    loop.run_until_complete(_never_ends())


async def _never_ends() -> None:
    await asyncio.Event().wait()


def _keep_running_loops_apart() -> None:
    """Make asyncio's running loop, and its hooks for generators, a property of each greenlet in this thread.

    If gevent or eventlet has patched `threading`, the loop's thread and the threads of the requests are greenlets of
    one native thread. asyncio stores the running loop by native thread, so without this every request would seem to
    run in our loop: Django would refuse to use the ORM, and our views would return coroutines. A loop that Django runs
    for an asynchronous view would take our generators for its own, and end them when it is closed.
    """
    from greenlet import gettrace, settrace  # gevent and eventlet both install it

    if not isinstance(previous := gettrace(), _Apart):  # a forked process has it already
        settrace(_Apart(previous))


class _Apart:
    """Keeps the running loop of each greenlet, and the hooks that this loop has set for asynchronous generators.

    It is called after each switch to another greenlet.
    """

    def __init__(self, previous: Callable[[str, tuple[Any, Any]], object] | None) -> None:
        self._previous = previous
        self._loops: WeakKeyDictionary[Any, tuple[asyncio.AbstractEventLoop, Any]] = WeakKeyDictionary()

    def __call__(self, event: str, greenlets: tuple[Any, Any]) -> None:
        """Store the running loop of the greenlet that was left, and set that of the one that resumes."""
        left, resumed = greenlets
        running = asyncio._get_running_loop()  # noqa: SLF001 - documented for implementers of event loops
        if running is not None:
            self._loops[left] = running, sys.get_asyncgen_hooks()
        loop, hooks = self._loops.pop(resumed, _NO_LOOP) if self._loops else _NO_LOOP
        if loop is not running:
            asyncio._set_running_loop(loop)  # noqa: SLF001
            sys.set_asyncgen_hooks(*hooks)
        if self._previous is not None:
            self._previous(event, greenlets)


def run_in_background(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the background loop, wait for it, and return its result. Raises what it raises."""
    return asyncio.run_coroutine_threadsafe(coroutine, background_loop()).result()


async def for_request(request: HttpRequest, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that uses connections of the event loop: in a loop that lasts longer than the request.

    Under WSGI, the loop of an asynchronous view ends with it. Then this is the background loop.
    """
    if isinstance(request, ASGIRequest) or asyncio.get_running_loop() is background_loop():
        return await coroutine
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, background_loop()))


def iterate_in_background(chunks: AsyncIterator[bytes]) -> Iterator[bytes]:
    """Yield the items of an asynchronous iterator, which runs in the background loop."""

    async def following() -> bytes | None:
        with suppress(StopAsyncIteration):
            return await anext(chunks)
        return None

    _iterated.add(chunks)
    try:
        while (chunk := run_in_background(following())) is not None:
            yield chunk
    finally:
        # Garbage collection may end this generator: in the loop's own thread, which must not wait for itself, or at
        # the end of the interpreter, when that thread no longer runs.
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


def _threads_are_greenlets() -> bool:
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return bool(
        (gevent and gevent.is_module_patched("threading")) or (eventlet and eventlet.is_monkey_patched("thread"))
    )


if _threads_are_greenlets():
    # Now, as no loop runs yet: while an asynchronous view waits in its loop, no other greenlet could run ours.
    _keep_running_loops_apart()
