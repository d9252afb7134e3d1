"""Threads for calls that block: bounded for each source, so that a hung disk holds up nothing but itself."""

import math
import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.from_thread
import anyio.to_thread

from downloadview_async.errors import SourceUnavailable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

UNLIMITED = anyio.CapacityLimiter(math.inf)  # `Workers` counts for itself; closing is never refused


class Slots:
    """At most `limit` holders at once; who waits `patience` seconds for a slot is turned away."""

    def __init__(self, limit: int, *, patience: float = 2.0) -> None:
        self._limiter = anyio.CapacityLimiter(limit)
        self._patience = patience

    async def take(self) -> object:
        """Return a slot, to be given to `free` once. Raises `SourceUnavailable` if none is free in time."""
        slot = object()
        try:
            self._limiter.acquire_on_behalf_of_nowait(slot)
        except anyio.WouldBlock:
            with anyio.move_on_after(self._patience) as waiting:
                await self._limiter.acquire_on_behalf_of(slot)
            if waiting.cancelled_caught:
                raise SourceUnavailable(f"all {self._limiter.total_tokens} slots of this source are taken") from None
        return slot

    def free(self, slot: object) -> None:
        """Give a slot back. Only in the event loop's thread."""
        self._limiter.release_on_behalf_of(slot)


class Workers:
    """At most `limit` blocking calls at once; who waits `patience` seconds for a free worker is turned away.

    Never anyio's shared limiter: forty calls that hang there would stop every other thread of the process.
    """

    def __init__(self, limit: int = 40, *, patience: float = 2.0) -> None:
        self._slots = Slots(limit, patience=patience)

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what `function(*args)` returns in a worker thread. A cancelled caller waits for the call to end.

        Raises `SourceUnavailable` if no worker is free in time, and whatever the function raises.
        """
        slot = await self._slots.take()
        try:
            return await anyio.to_thread.run_sync(function, *args, limiter=UNLIMITED)
        finally:
            self._slots.free(slot)

    async def run_or_abandon(
        self, function: Callable[[*Ts], T], *args: *Ts, discard: Callable[[T], object] = lambda result: None
    ) -> T:
        """Like `run`, but a cancelled caller leaves at once.

        The worker stays taken until the call ends; what it returns then goes to `discard`.
        """
        slot = await self._slots.take()
        results: list[T] = []
        taken = threading.Lock()  # whoever takes it first, caller or worker, decides what becomes of the call

        def work() -> None:
            try:
                results.append(function(*args))
            finally:
                if not taken.acquire(blocking=False):
                    for result in results:
                        discard(result)
                    anyio.from_thread.run_sync(self._slots.free, slot)

        try:
            await anyio.to_thread.run_sync(work, limiter=UNLIMITED, abandon_on_cancel=True)
        except anyio.get_cancelled_exc_class():
            if taken.acquire(blocking=False):
                raise  # the call goes on: its worker cleans up
            for result in results:
                discard(result)
            self._slots.free(slot)
            raise
        except BaseException:
            self._slots.free(slot)
            raise
        self._slots.free(slot)
        return results[0]
