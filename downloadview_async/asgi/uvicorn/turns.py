"""Turns: one download sends a window of its file each time the event loop has looked at its sockets."""

import asyncio
from collections import deque

from downloadview_async.sources.per_loop import PerLoop

_Queue = deque["asyncio.Future[bool]"]

_queues = PerLoop[_Queue]()


def turn(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[bool]":
    """Return a future that is done when the caller may send its next window.

    Without turns, every download that can go on would send a window before the loop looks at its sockets again, and a
    small request would wait for all of them.
    """
    future = loop.create_future()
    take_turn(loop, future)
    return future


def take_turn(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[bool]") -> None:
    """Set the result of a future, True, when whoever waits for it may send its next window."""
    queue = _queues.get(loop)
    if queue is None:
        queue = _queues.set(loop, deque())
        loop.call_soon(_give_turn, loop, queue)
    queue.append(future)


def is_awaited(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether a download waits for its turn."""
    return _queues.get(loop) is not None


def _give_turn(loop: asyncio.AbstractEventLoop, queue: _Queue) -> None:
    while queue:
        future = queue.popleft()
        if not future.done():  # it is done if the task that waits for it was cancelled
            future.set_result(True)
            break
    if queue:
        loop.call_soon(_give_turn, loop, queue)
    else:
        _queues.drop(loop)
