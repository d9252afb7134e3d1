"""Memory that many clients have needed, given back to the system when most of them have left.

CPython and the C library keep memory that is free, in case it is needed again. After thousands of clients this is tens
of megabytes, which other processes could use. Objects of CPython keep some of it in any case: docs/performance.md has
the figures, and what helps.
"""

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable

_MANY = 256
"""Fewer clients do not need enough memory for it to matter."""

_SECONDS = 10.0
"""The shortest time from one look that gives memory back to the next: the event loop waits meanwhile.

This takes less than a millisecond at first, and some tenths of a second if the limits know 100,000 clients.
"""


def give_back() -> None:
    """Give memory that is free back to the system, as far as the C library can: glibc's can, musl's does it anyway."""
    gc.collect()  # this empties the lists of objects that CPython keeps for later
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class SpareMemory:
    """Watches the number of clients, and gives memory back when three of four have left and no more are leaving.

    clock: gives a time in seconds.
    """

    def __init__(
        self, give_back: Callable[[], None] = give_back, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._give_back = give_back
        self._clock = clock
        self._given_at = -math.inf
        self._most = self._last = 0

    def look(self, clients: int) -> None:
        """Take note of the number of clients now."""
        self._most = max(self._most, clients)
        have_left = self._most >= _MANY and self._last <= clients <= self._most // 4
        if have_left and self._clock() - self._given_at >= _SECONDS:
            self._most = clients
            self._give_back()
            self._given_at = self._clock()
        self._last = clients
