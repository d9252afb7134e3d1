"""`PerLoop`: a value that each event loop of asyncio has for itself."""

import asyncio
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(threading.local, Generic[T]):
    """A value for each event loop, which runs in one thread. A loop has no value before `set` and after `drop`.

    The value is also dropped when its thread ends, and when the next loop in this thread sets its value: a loop may end
    before its timers ring. What has to be closed then, the `__del__` of the value closes.
    """

    _loop: asyncio.AbstractEventLoop | None = None
    _value: T | None = None

    def get(self, loop: asyncio.AbstractEventLoop) -> T | None:
        """Return the value of the loop that runs in this thread, or None."""
        return self._value if self._loop is loop else None

    def set(self, loop: asyncio.AbstractEventLoop, value: T) -> T:
        """Set the value of the loop that runs in this thread, and return it."""
        self._loop, self._value = loop, value
        return value

    def drop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drop the value of the loop that runs in this thread."""
        if self._loop is loop:
            self._loop = self._value = None
