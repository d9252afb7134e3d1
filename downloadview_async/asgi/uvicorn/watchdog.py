"""The watchdog: it resets the connections of clients that have stopped reading."""

import asyncio
import logging
from time import monotonic
from typing import Protocol

from downloadview_async.asgi.uvicorn.sockets import (
    Connection,
    acknowledged_bytes,
    paced_packet_bytes,
    reset,
    untaken_bytes,
)
from downloadview_async.sources.per_loop import PerLoop

MINIMUM_RATE = 64
"""Bytes per second that a client has to take, on the average of `STALL_SECONDS`.

Bytes count as taken when the kernel of the client acknowledges them. Some kernels do so in steps, so a client needs
several times this rate to be safe.
"""

_LOOK_SECONDS = 2.0  # at most twice so long after its time has passed, a client is dropped

_GOES_ON = 1 / 60  # the part of its time in which a watch that was stopped goes on without a look at the client

_AT_ONCE = 50  # clients that are looked at before other work has its turn


class Watched(Connection, Protocol):
    """A connection that can be watched.

    stall_seconds, minimum_rate (bytes per second): the connection is reset if the client takes less than this rate on
    the average of so many seconds. is_stalled: whether that has happened. is_waiting: whether something still waits for
    the client. last_watch: the last watch that was stopped, see `start_watching`. paced_at: the bytes per second that
    the kernel sends at most, or None; slowest_pace: the least of them since the watch began. request_id: for the log,
    if it is known.
    """

    loop: asyncio.AbstractEventLoop
    logger: logging.Logger
    is_stalled: bool
    stall_seconds: float
    minimum_rate: int
    last_watch: "Watch | None"
    paced_at: int | None
    slowest_pace: int | None
    request_id: str | None

    @property
    def is_waiting(self) -> bool:
        """See the class."""


# When it began (seconds of the monotonic clock), and the untaken and the acknowledged bytes at that moment.
Watch = tuple[float, int, int]
_Watches = dict[Watched, Watch]

# One timer for all connections of a loop, instead of one that each pause of a client makes and cancels.
_watched = PerLoop[_Watches]()


def start_watching(connection: Watched) -> None:
    """Watch a client that something waits for.

    A watch that was stopped goes on if it is new, or if the client has not taken anything to speak of meanwhile. The
    transport stopped waiting then because the buffer of the kernel had grown, or because there is room again for the
    queues of others. On a Unix socket, where nothing is acknowledged, each watch is new.
    """
    watches = _watched.get(connection.loop)
    if watches is None:
        watches = _watched.set(connection.loop, {})
        interval = min(connection.stall_seconds / 4, _LOOK_SECONDS)
        connection.loop.call_later(interval, _look_at, watches, connection.loop, interval)
    last, connection.last_watch = connection.last_watch, None
    if last is not None and _goes_on(connection, last):
        watches[connection] = last
    else:
        connection.slowest_pace = connection.paced_at
        watches[connection] = monotonic(), untaken_bytes(connection), acknowledged_bytes(connection)


def _goes_on(connection: Watched, watch: Watch) -> bool:
    since, untaken, acknowledged = watch
    if not acknowledged:  # a Unix socket: what was sent since then would count as not taken
        return False
    if monotonic() - since < _GOES_ON * connection.stall_seconds:
        return True
    return acknowledged_bytes(connection) - acknowledged < min(quota_of(connection), untaken)


def stop_watching(connection: Watched) -> None:
    """End the watch over a client, if there is one."""
    if (watches := _watched.get(connection.loop)) is not None:
        connection.last_watch = watches.pop(connection, connection.last_watch)


def _look_at(
    watches: _Watches,
    loop: asyncio.AbstractEventLoop,
    interval: float,
    rest: list[tuple[Watched, Watch]] | None = None,
) -> None:
    """Look at some clients. With thousands of them, looking at all would make other requests wait.

    rest: those that are still to be looked at; None at the beginning.
    """
    if rest is None:
        rest = list(watches.items())
    for connection, watch in rest[-_AT_ONCE:]:
        if watches.get(connection) is watch:
            check(connection, watch)
    del rest[-_AT_ONCE:]
    if rest:
        loop.call_soon(_look_at, watches, loop, interval, rest)
    elif watches:
        loop.call_later(interval, _look_at, watches, loop, interval)
    else:
        _watched.drop(loop)  # a loop has a timer as long as it has a value here


def check(connection: Watched, watch: Watch) -> None:
    """Begin a new watch over a client that has taken enough, and reset the connection of one that has stalled."""
    since, untaken_then, acknowledged_then = watch
    if acknowledged_then:
        taken = acknowledged_bytes(connection) - acknowledged_then
    else:  # a Unix socket
        taken = untaken_then - untaken_bytes(connection)
    if taken >= quota_of(connection):
        start_watching(connection)
    elif monotonic() - since >= patience_with(connection):
        if connection.is_waiting:
            drop_client(connection)
        else:
            stop_watching(connection)


def quota_of(connection: Watched) -> float:
    """Return how many bytes a client has to take in the time of `patience_with`."""
    return _rate_for(connection) * patience_with(connection)


def patience_with(connection: Watched) -> float:
    """Return in how many seconds a client is to take its quota: two packets have to leave in it, whatever the pace."""
    if connection.slowest_pace is None:
        return connection.stall_seconds
    return max(connection.stall_seconds, 2 * paced_packet_bytes(connection) / connection.slowest_pace)


def _rate_for(connection: Watched) -> float:
    """Return the bytes per second that a client has to take: it cannot take more than the kernel sends."""
    if connection.slowest_pace is None:
        return connection.minimum_rate
    return min(connection.minimum_rate, connection.slowest_pace / 4)


def drop_client(connection: Watched) -> None:
    """Reset the connection of a client that takes too little, and log that."""
    of = "" if connection.request_id is None else f" (request {connection.request_id})"
    connection.logger.warning(
        "Transfer aborted: the client took less than %d bytes a second%s", _rate_for(connection), of
    )
    connection.is_stalled = True
    reset(connection)
