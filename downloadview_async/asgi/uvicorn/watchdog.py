"""The watchdog: it resets the connections of clients that have stopped reading."""

import asyncio
import logging
from time import monotonic
from typing import Protocol

from downloadview_async.asgi.uvicorn.sockets import Connection, reset, untaken_bytes
from downloadview_async.sources.per_loop import PerLoop

STALL_SECONDS = 60.0
"""How long a client may take less than `MINIMUM_RATE` before its connection is reset."""

MINIMUM_RATE = 64
"""Bytes per second that a client has to take, on the average of `STALL_SECONDS`.

Bytes count as taken when the kernel of the client acknowledges them. Some kernels do so in steps, so a client needs
several times this rate to be safe.
"""

_LOOK_SECONDS = 2.0  # at most so long after its time has passed, a client is dropped


class Watched(Connection, Protocol):
    """A connection that can be watched.

    stall_seconds, minimum_rate (bytes per second): the connection is reset if the client takes less than this rate on
    the average of so many seconds. is_stalled: whether that has happened. is_waiting: whether something still waits for
    the client. request_id: for the log, if it is known.
    """

    loop: asyncio.AbstractEventLoop
    logger: logging.Logger
    is_stalled: bool
    stall_seconds: float
    minimum_rate: int
    request_id: str | None

    @property
    def is_waiting(self) -> bool:
        """See the class."""


# When the watch over a connection began (seconds of the monotonic clock), and its untaken bytes at that moment.
_Watches = dict[Watched, tuple[float, int]]

# One timer for all connections of a loop, instead of one that each pause of a client makes and cancels.
_watched = PerLoop[_Watches]()


def start_watching(connection: Watched) -> None:
    """Watch a client that something waits for. If it is watched already, begin again."""
    watches = _watched.get(connection.loop)
    if watches is None:
        watches = _watched.set(connection.loop, {})
        interval = min(connection.stall_seconds / 4, _LOOK_SECONDS)
        connection.loop.call_later(interval, _look_at, watches, connection.loop, interval)
    watches[connection] = monotonic(), untaken_bytes(connection)


def stop_watching(connection: Watched) -> None:
    """End the watch over a client, if there is one."""
    if (watches := _watched.get(connection.loop)) is not None:
        watches.pop(connection, None)


def _look_at(watches: _Watches, loop: asyncio.AbstractEventLoop, interval: float) -> None:
    for connection, (since, untaken_then) in list(watches.items()):
        check(connection, since, untaken_then)
    if watches:
        loop.call_later(interval, _look_at, watches, loop, interval)
    else:
        _watched.drop(loop)  # a loop has a timer as long as it has a value here


def check(connection: Watched, since: float, untaken_then: int) -> None:
    """Begin a new watch over a client that has taken enough, and reset the connection of one that has stalled.

    since: when the watch began. untaken_then: the bytes that the client had not taken yet then.
    """
    if untaken_then - untaken_bytes(connection) >= connection.minimum_rate * connection.stall_seconds:
        start_watching(connection)
    elif monotonic() - since >= connection.stall_seconds:
        if connection.is_waiting:
            drop_client(connection)
        else:
            stop_watching(connection)


def drop_client(connection: Watched) -> None:
    """Reset the connection of a client that takes too little, and log that."""
    of = "" if connection.request_id is None else f" (request {connection.request_id})"
    connection.logger.warning(
        "Transfer aborted: the client took less than %d bytes a second%s", connection.minimum_rate, of
    )
    connection.is_stalled = True
    reset(connection)
