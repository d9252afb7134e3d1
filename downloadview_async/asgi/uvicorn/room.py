"""Room in the kernel: a path send waits here until the kernel takes more bytes of a file for its client.

Only a transport may wait for its socket in the event loop. It does so while it holds bytes, so a path send would have
to read some of the file, write them to the transport, and wait until these have left: that takes many more system
calls. So each event loop has one `epoll` of ours beside its own while anything waits, which reports sockets with room.
"""

import asyncio
import select
from typing import Protocol

from downloadview_async.asgi.uvicorn.sockets import Connection, socket_number
from downloadview_async.asgi.uvicorn.turns import take_turn
from downloadview_async.sources.per_loop import PerLoop

_EPOLLOUT = getattr(select, "EPOLLOUT", 0) | getattr(select, "EPOLLONESHOT", 0)

_KEPT = 1.0  # seconds for which the `epoll` stays open although nothing waits
_AT_ONCE = 64  # the event loop looks again if there are more


class Waiting(Connection, Protocol):
    """A connection that can wait for room.

    flushed: a future that is done when the wait may end, or the connection is lost. pause_writing, resume_writing: as
    the transport calls them when it begins and ends to wait.
    """

    loop: asyncio.AbstractEventLoop
    flushed: "asyncio.Future[bool] | None"

    def pause_writing(self) -> None:
        """Note that the client is waited for."""

    def resume_writing(self) -> None:
        """Note that the client has taken something."""


class _Room:
    """The sockets of an event loop that wait for room. Raises `OSError` if `epoll` gets no descriptor."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._is_used = False  # since the last `_close_if_unused`
        loop.add_reader(self._epoll.fileno(), self._look)
        loop.call_later(_KEPT, self._close_if_unused)

    def wait(self, number: int) -> "asyncio.Future[bool]":
        try:
            self._epoll.modify(number, _EPOLLOUT)
        except FileNotFoundError:  # the first time for this socket: the number may have been that of another one
            self._epoll.register(number, _EPOLLOUT)
        self._is_used = True
        future = self._waiting[number] = self._loop.create_future()
        return future

    def forget(self, number: int, future: "asyncio.Future[bool]") -> None:
        if self._waiting.get(number) is future:
            del self._waiting[number]

    def _look(self) -> None:
        for number, _ in self._epoll.poll(0, _AT_ONCE):
            future = self._waiting.pop(number, None)
            if future is not None:
                take_turn(self._loop, future)

    def _close_if_unused(self) -> None:
        if self._waiting or self._is_used:
            self._is_used = False
            self._loop.call_later(_KEPT, self._close_if_unused)
            return
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        if _rooms.get(self._loop) is self:
            _rooms.drop(self._loop)


_rooms = PerLoop[_Room]()


def begin_to_wait(connection: Waiting) -> "tuple[int, asyncio.Future[bool]] | None":
    """Return a future that is done when the kernel may have room for more of a file, or the connection is lost.

    It is done when it is the turn of this connection: see `turn`. The number before it is for `end_wait`. Return None
    if the connection has to wait by its transport, which holds nothing now.
    """
    if not _EPOLLOUT:
        return None
    loop = connection.loop
    try:
        number = socket_number(connection)
        if (room := _rooms.get(loop)) is None:
            room = _rooms.set(loop, _Room(loop))
        future = room.wait(number)
    except OSError:  # there is no descriptor for it, or the connection has ended
        return None
    connection.pause_writing()
    connection.flushed = future
    return number, future


def end_wait(connection: Waiting, number: int, future: "asyncio.Future[bool]") -> None:
    """End what `begin_to_wait` has begun. Call it in any case, even if the wait is cancelled."""
    if (room := _rooms.get(connection.loop)) is not None:
        room.forget(number, future)
    if not connection.is_lost:
        connection.resume_writing()
