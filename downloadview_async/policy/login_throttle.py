"""`LoginThrottle`: passwords from one address are checked one after another, and wait longer after each failure."""

import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from downloadview_async.errors import SourceUnavailable

FIRST_DELAY = 0.5
"""Seconds between the first failure of an address and its next try. Each further failure doubles them."""

LONGEST_DELAY = 16.0
"""Seconds between two tries of an address at most."""

FORGET_AFTER = 600.0
"""Seconds without a failure after which those of an address are forgotten."""

MAX_WAITING = 32
"""How many requests of one address may wait."""

PATIENCE = 30.0
"""Seconds that a request waits for its turn at most."""

MAX_ADDRESSES = 4096
"""How many addresses with failures are remembered: those with the latest."""


@dataclass(slots=True)
class _Turns:
    requests: int = 0
    lock: anyio.Lock = field(default_factory=anyio.Lock)


class LoginThrottle:
    """Remembers the failures of client addresses, in this process."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._turns: dict[str, _Turns] = {}

    @asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[None]:
        """Return a context in which no other request of an address is.

        Raises `SourceUnavailable` if too many requests of the address wait, or if its turn takes too long.
        """
        turns = self._turns.setdefault(address, _Turns())
        if turns.requests > MAX_WAITING:
            raise SourceUnavailable(f"{MAX_WAITING} requests of {address} wait for their passwords to be checked")
        turns.requests += 1
        try:
            with anyio.move_on_after(PATIENCE) as wait:
                await turns.lock.acquire()
            if wait.cancelled_caught:
                raise SourceUnavailable(f"a request of {address} has waited too long for its password to be checked")
            try:
                yield
            finally:
                turns.lock.release()
        finally:
            turns.requests -= 1
            if not turns.requests:
                del self._turns[address]

    async def begin(self, address: str) -> None:
        """Wait as long as the failures of an address require, and count one more, until `succeeded` is called.

        Call it inside `turn`. A client that leaves while its password is checked has failed, too.
        """
        now = time.monotonic()
        failures, last = self._failures.get(address, (0, -FORGET_AFTER))
        if now - last >= FORGET_AFTER:
            failures = 0
        if failures:
            delay = min(FIRST_DELAY * 2.0 ** (min(failures, 64) - 1), LONGEST_DELAY)
            await anyio.sleep(max(0.0, last + delay - now))
        self._failures[address] = failures + 1, time.monotonic()
        self._failures.move_to_end(address)
        while len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """Remove the failure that `begin` has counted. Earlier ones stay: one valid password must not allow guesses."""
        failures, last = self._failures.pop(address, (0, 0.0))
        if failures > 1:
            self._failures[address] = failures - 1, last
