"""`Flow` and `Signal`: what uvicorn's flow control and `asyncio.Event` do, in less memory while nothing waits.

An event has a queue of 760 bytes from the start, and each connection has two events for as long as its client stalls.
"""

import asyncio


class Signal:
    """An `asyncio.Event` that has no queue: it keeps its waiters in a tuple, of which there are few."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: tuple[asyncio.Future[None], ...] = ()

    def set(self) -> None:
        """Wake what waits, and let later calls of `wait` return at once, until `clear`."""
        self._is_set = True
        waiters, self._waiters = self._waiters, ()
        for waiter in waiters:
            if not waiter.done():  # it is done if its task was cancelled
                waiter.set_result(None)

    def clear(self) -> None:
        """Make later calls of `wait` wait."""
        self._is_set = False

    def is_set(self) -> bool:
        """Return whether `set` was called after the last `clear`."""
        return self._is_set

    async def wait(self) -> bool:
        """Wait until the signal is set, and return True."""
        if not self._is_set:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters = (*self._waiters, waiter)
            try:
                await waiter
            finally:
                self._waiters = tuple(one for one in self._waiters if one is not waiter)
        return True


class Flow:
    """Pauses the reading and the writing of a connection, as uvicorn's `FlowControl` does.

    is_full: while it is True, reading does not resume. uvicorn resumes it whenever an application waits for a message.
    """

    __slots__ = ("_transport", "_writable", "is_full", "read_paused", "write_paused")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._writable: Signal | None = None
        self.is_full = False
        self.read_paused = False
        self.write_paused = False

    async def drain(self) -> None:
        """Wait until writing is not paused."""
        if self.write_paused:
            self._writable = self._writable or Signal()
            await self._writable.wait()

    def pause_reading(self) -> None:
        """Have the transport read no more."""
        if not self.read_paused:
            self.read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Have the transport read again, unless too many bytes wait."""
        if self.read_paused and not self.is_full:
            self.read_paused = False
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Make `drain` wait."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """End the wait of `drain`."""
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()
            self._writable = None
