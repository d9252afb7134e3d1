"""Turns: one download sends a part of its file each time the event loop has looked at its sockets."""

import asyncio
from collections import deque

from downloadview_async.sources.per_loop import PerLoop

_Queue = deque["asyncio.Future[bool]"]

_queues = PerLoop[_Queue]()


def turn(loop: asyncio.AbstractEventLoop) -> "asyncio.Future[bool]":
    """Return a future that is done when the caller may send its next part.

    Without turns, every download that can go on would send a part before the loop looks at its sockets again, and a
    small request would wait for all of them.
    """
    future = loop.create_future()
    take_turn(loop, future)
    return future


def has_waiting(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether anything waits for a turn."""
    return _queues.get(loop) is not None


def take_turn(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[bool]") -> None:
    """Queue a future, whose result becomes True when its owner may send its next part."""
    queue = _queues.get(loop)
    if queue is None:
        queue = _queues.set(loop, deque())
        loop.call_soon(_give_turn, loop, queue)
    queue.append(future)


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
