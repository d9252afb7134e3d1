"""`SharedRate`: bytes per second that some transfers share. `Pace`: the part of one transfer."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import anyio

LEAST_PACE = 1000
"""The least rate of a transfer, in bytes per second: a server drops clients that take much less."""

BURST_SECONDS = 1.0
"""Small answers of a client may be ahead of its rate by what it gets in this time."""

MOST_SECONDS = 60.0
"""Seconds that a small answer waits at most."""

_SHARES_FROM = BURST_SECONDS / 2  # ahead of the rate: small answers then have a part of it, as one more transfer

LOOK_SECONDS = 0.5
"""How often the parts of transfers are made to fit what their clients take."""

_EXACT = 20  # transfers; with more, those that share a rate follow when their number has changed by this part
_PIECES = 10  # per second: a chunk that takes longer than a piece is split
_MOST_LOOKS = 200  # transfers that are looked at each time
_LEAST_LOOK = 300_000  # bytes: the packets of the loopback device, on which a proxy may be, have up to 128 KiB
_SLOW = 0.9  # of its part: a client that takes less is slow
_ROOM = 1.25  # times what a slow client takes: its part
_LEAST_PART = 0.1  # of an equal part


class Paced(Protocol):
    """A connection whose rate can be set."""

    def pace(self, rate: int) -> None:
        """Send at a rate from now on, in bytes per second."""
        ...

    def acknowledged(self) -> int:
        """Return how many bytes the client has taken since the connection began."""
        ...


class SharedRate:
    """A rate in bytes per second, which all `paces` share.

    The parts are equal, but a transfer whose client takes less than its part gets little more than that, and the others
    share the rest. A transfer that a proxy sends keeps the part that it has at its start.

    Small answers have the whole rate while there are no transfers, and beside those the part of one more.

    everywhere: returns how many transfers share it in all processes, as far as this one knows.
    """

    __slots__ = ("__weakref__", "_by_proxy", "_everywhere", "_free_at", "_number", "_timer", "paces", "rate")

    def __init__(self, rate: int, everywhere: Callable[[], int] = lambda: 0) -> None:
        self.rate = rate
        self.paces: dict[Pace, float | None] = {}
        """The transfers, and what each of the slow ones needs at most, in bytes per second."""
        self._everywhere = everywhere
        self._by_proxy = 0  # transfers that a proxy sends
        self._number = 0  # of the transfers when the paces were last set
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def part_of(self, pace: "Pace") -> float:
        """Return the bytes per second of one transfer."""
        need = self.paces[pace]
        return self._share() if need is None else need

    def _share(self) -> float:
        """Return the bytes per second of a transfer that is not slow."""
        number, others = len(self.paces), self._others()
        needs = [need for need in self.paces.values() if need is not None]
        here = self.rate * number / (number + others) if others else self.rate
        return max(here - sum(needs), here / number) / max(1, number - len(needs))

    def _others(self) -> int:
        """Return how many share the rate that have no pace here: transfers elsewhere, and all small answers as one."""
        return max(self._by_proxy, self._everywhere() - len(self.paces)) + self._has_small_answers()

    def _has_small_answers(self) -> bool:
        return self._free_at - time.monotonic() > _SHARES_FROM

    @property
    def is_idle(self) -> bool:
        """Whether nothing would change if this were forgotten."""
        return not self.paces and not self._by_proxy and self._free_at <= time.monotonic()

    @property
    def part_of_next(self) -> int:
        """The bytes per second of one more transfer."""
        return max(LEAST_PACE, self.rate // (len(self.paces) + self._others() + 1))

    def begin_by_proxy(self) -> None:
        """Have a transfer that a proxy sends share the rate, until `end_by_proxy`."""
        self._by_proxy += 1
        self.change()

    def end_by_proxy(self) -> None:
        """End the part of a transfer that a proxy has sent."""
        self._by_proxy -= 1
        self.change()

    def join(self, pace: "Pace") -> None:
        """Have one more transfer share the rate."""
        self.paces[pace] = None
        self._look_soon()

    def _look_soon(self) -> None:
        if self._timer is None and self.paces and (len(self.paces) > 1 or self._has_small_answers()):
            with suppress(RuntimeError):  # without asyncio, the parts are equal
                self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def leave(self, pace: "Pace") -> None:
        """End the part of a transfer."""
        self.paces.pop(pace, None)

    def change(self) -> None:
        """Set the rate of each transfer, if their number has changed enough."""
        number = len(self.paces) + self._others()
        if abs(number - self._number) * _EXACT >= self._number:
            self._set_all()

    def _set_all(self) -> None:
        self._number = len(self.paces) + self._others()
        for pace in self.paces:
            pace.set()

    def _look(self) -> None:
        """Look at what the clients take, and make their parts fit."""
        self._timer = None
        number = len(self.paces) + self._others()
        if len(self.paces) < 2:
            for pace in self.paces:
                self.paces[pace] = None
            self._set_all()
            self._look_soon()
            return
        self._look_soon()
        now, changed = time.monotonic(), number != self._number
        for pace in list(self.paces)[:_MOST_LOOKS]:
            looked = pace.look(now)
            if looked is not None:
                taken, allowed = looked
                need = self.paces.pop(pace)  # it becomes the one that is looked at last
                is_slow = taken < _SLOW * allowed
                self.paces[pace] = max(_ROOM * taken, _LEAST_PART * self.rate / number) if is_slow else None
                changed = changed or is_slow or need is not None
        if changed:
            self._set_all()

    def take(self, size: int) -> float:
        """Take a small answer of so many bytes, and return the seconds after which it may leave."""
        now, parts = time.monotonic(), len(self.paces) + 1
        self._free_at = min(max(now, self._free_at) + size * parts / self.rate, now + BURST_SECONDS + MOST_SECONDS)
        if parts > 1 and self._timer is None and self._free_at - now > _SHARES_FROM:
            self.change()
            self._look_soon()
        return max(0.0, self._free_at - now - BURST_SECONDS)


class Pace:
    """The rate of one transfer: the least of its parts of all the rates that it shares. A context manager.

    connection: of the client. None: `wait` keeps the rate.
    """

    __slots__ = (
        "_allowed",
        "_connection",
        "_free_at",
        "_looked_at",
        "_rates",
        "_set_at",
        "_taken_then",
        "_waited",
        "rate",
    )

    def __init__(self, rates: tuple[SharedRate, ...], connection: Paced | None) -> None:
        self._rates = rates
        self._connection = connection
        self._free_at = self._looked_at = self._set_at = time.monotonic()
        self._allowed = 0.0  # bytes, up to `_set_at`
        self._waited = 0  # bytes
        self._taken_then = self._taken()
        self.rate = 0

    def __enter__(self) -> "Pace":
        for shared in self._rates:
            shared.join(self)
        for shared in self._rates:
            shared.change()
        self.set()
        return self

    def __exit__(self, *_: object) -> None:
        for shared in self._rates:
            shared.leave(self)
        for shared in self._rates:
            shared.change()

    def set(self) -> None:
        """Set the rate, because the number of transfers has changed."""
        rate = max(LEAST_PACE, int(min(shared.part_of(self) for shared in self._rates)))
        if rate != self.rate:
            now = time.monotonic()
            self._allowed += self.rate * (now - self._set_at)
            self.rate, self._set_at = rate, now
            if self._connection is not None:
                self._connection.pace(rate)

    def look(self, now: float) -> tuple[float, float] | None:
        """Return the bytes per second that the client has taken since the last look, and those that it could have.

        Return None, and go on counting, if it could have too few to tell: the kernel sends them in large packets.
        """
        seconds = now - self._looked_at
        allowed = self._allowed + self.rate * (now - self._set_at)
        if seconds < LOOK_SECONDS / 2 or allowed < _LEAST_LOOK:
            return None
        taken, before = self._taken(), self._taken_then
        self._looked_at = self._set_at = now
        self._taken_then, self._allowed = taken, 0.0
        return (taken - before) / seconds, allowed / seconds

    def _taken(self) -> int:
        return self._waited if self._connection is None else self._connection.acknowledged()

    @property
    def piece(self) -> int:
        """How many bytes may be sent at once."""
        return max(4096, self.rate // _PIECES)

    async def wait(self, size: int) -> None:
        """Wait for as long as so many bytes take, less the time that has passed since the last ones."""
        now = time.monotonic()
        self._waited += size
        self._free_at = max(self._free_at, now - 1 / _PIECES) + size / self.rate
        if self._free_at > now:
            await anyio.sleep(self._free_at - now)
