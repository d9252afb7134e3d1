"""Memory that many clients have needed, given back to the system when most of them have left.

CPython and the C library keep memory that is free, in case it is needed again. After thousands of clients this is tens
of megabytes, which other processes could use. Objects of CPython keep some of it in any case: docs/performance.md has
the figures, and what helps.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable

_MANY = 256
"""Fewer clients do not need enough memory for it to matter."""


def give_back() -> None:
    """Give memory that is free back to the system, as far as the C library can: glibc's can, musl's does it anyway."""
    gc.collect()  # this empties the lists of objects that CPython keeps for later
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class SpareMemory:
    """Looks how many clients there are, and gives memory back when three of four have left and no more are leaving."""

    def __init__(self, give_back: Callable[[], None] = give_back) -> None:
        self._give_back = give_back
        self._most = self._last = 0

    def look(self, clients: int) -> None:
        """Take note of the number of clients now."""
        self._most = max(self._most, clients)
        if self._most >= _MANY and self._last <= clients <= self._most // 4:
            self._most = clients
            self._give_back()
        self._last = clients
