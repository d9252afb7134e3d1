"""Threads for calls that block, limited for each source, so that a hung disk does not hold up other sources."""

import math
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, TypeVarTuple, runtime_checkable

import anyio
import anyio.from_thread
import anyio.to_thread

from downloadview_async.errors import SourceUnavailable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def unlimited() -> anyio.CapacityLimiter:
    """Return a new limiter without a limit, for one call: `Workers` has its own limit, and closing must never wait.

    A limiter works only in the library, asyncio or trio, of the first event loop that uses it, so it is not kept.
    """
    return anyio.CapacityLimiter(math.inf)


MID_TRANSFER = 60.0
"""Seconds that a transfer which has begun waits for a worker: a slow transfer is better than an aborted one."""


STUCK_DISK = 0.8
"""Seconds in which one of the calls to a disk has to end. If none does, and all workers are in use, the disk hangs."""


class Longest(NamedTuple):
    """For how many seconds a call to a disk may go on before an answer has begun. After that, the call hangs.

    If no such call has ended meanwhile, the disk hangs: later ones get `stuck` seconds each, until one of them ends. A
    disk that spins up needs the many seconds; a disk that has not answered in them does not need them once more for
    each request.
    """

    call: str
    seconds: float


OPENING = Longest("open", 10.0)
READING = Longest("read", 10.0)
LISTING = Longest("list", 60.0)  # a call may describe a thousand files


class Slots:
    """At most `limit` holders at once. A caller that gets no slot within `patience` seconds is turned away.

    They may be used in one event loop after another, of asyncio or trio.

    stuck: seconds after which a caller is turned away unless a slot has become free in them. Where no holder leaves,
    because a disk hangs, waiting longer does not help. It does not apply to a caller that gives its own patience.
    are_connections: whether each slot is a request to another server, and not a thread.
    waits, refusals: how many callers had to wait so far, and how many of these were turned away. wait_seconds: how long
    all have waited.
    """

    def __init__(
        self, limit: int, *, patience: float = 2.0, stuck: float = math.inf, are_connections: bool = False
    ) -> None:
        self.are_connections = are_connections
        self._limit = limit
        self._patience = patience
        self._stuck = stuck
        self._freed_at = -math.inf
        self._holders: set[object] = set()
        self._waiting: deque[tuple[object, anyio.Event]] = deque()
        self.waits = 0
        self.refusals = 0
        self.wait_seconds = 0.0

    @property
    def in_use(self) -> int:
        """How many slots are held."""
        return len(self._holders)

    @property
    def waiting(self) -> int:
        """How many callers wait for a slot."""
        return len(self._waiting)

    async def take(self, *, patience: float | None = None) -> ExitStack:
        """Return a context that holds a slot: `with await slots.take():`. Raises `SourceUnavailable` if none is free.

        The context has to end in the thread of the event loop.
        """
        slot, held = object(), ExitStack()
        held.callback(self._free, slot)
        if len(self._holders) < self._limit and not self._waiting:
            self._holders.add(slot)
            return held
        place = slot, anyio.Event()
        self._waiting.append(place)
        self.waits += 1
        began = monotonic()
        try:
            if patience is None:
                await self._wait_while_it_helps(place[1], began)
            else:
                with anyio.move_on_after(patience):
                    await place[1].wait()
        except BaseException:
            if slot in self._holders:  # the slot was given to a caller that is being cancelled
                self._free(slot)
            raise
        finally:
            self.wait_seconds += monotonic() - began
            if place in self._waiting:
                self._waiting.remove(place)
        if slot not in self._holders:
            self.refusals += 1
            raise SourceUnavailable(f"all {self._limit} slots of this source are in use: try again, or raise its limit")
        return held

    async def _wait_while_it_helps(self, given: anyio.Event, began: float) -> None:
        while not given.is_set():
            until = min(began + self._patience, max(began, self._freed_at) + self._stuck)
            if monotonic() >= until:
                return
            with anyio.move_on_after(until - monotonic()):
                await given.wait()

    def _free(self, slot: object) -> None:
        self._holders.remove(slot)
        self._freed_at = monotonic()
        if self._waiting:
            following, given = self._waiting.popleft()
            self._holders.add(following)
            given.set()


@runtime_checkable
class UsesSlots(Protocol):
    """A source or a storage whose requests wait for one of its slots: for a thread, or for a connection."""

    @property
    def slots(self) -> Slots:
        """The slots."""


@runtime_checkable
class _OverSource(Protocol):
    source: object


@runtime_checkable
class _OverStorage(Protocol):
    storage: object


def slots_of(source: object) -> Slots | None:
    """Return the slots of a source; None if it has none.

    A source may get its files from another source, as a cache does, or from a storage.
    """
    if isinstance(source, UsesSlots):
        return source.slots
    if isinstance(source, _OverStorage):
        return slots_of(source.storage)
    return slots_of(source.source) if isinstance(source, _OverSource) else None


class Workers:
    """At most `limit` blocking calls at once. A caller that gets no worker within `patience` seconds is turned away.

    stuck: see `Slots`.

    anyio's shared limiter is never used: forty calls that hang there would stop every other thread of the process.
    """

    def __init__(self, limit: int = 40, *, patience: float = 2.0, stuck: float = math.inf) -> None:
        self.slots = Slots(limit, patience=patience, stuck=stuck)
        self._stuck = stuck
        self._hung: set[Longest] = set()
        self._ended: Counter[Longest] = Counter()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts, patience: float | None = None) -> T:
        """Return what `function(*args)` returns in a worker thread. A cancelled caller waits for the call to end.

        patience: seconds to wait for a free worker, instead of those of the `Workers`.

        Raises `SourceUnavailable` if no worker is free in time, and the errors of the function.
        """
        with await self.slots.take(patience=patience):
            return await anyio.to_thread.run_sync(function, *args, limiter=unlimited())

    async def run_or_abandon(
        self,
        function: Callable[[*Ts], T],
        *args: *Ts,
        discard: Callable[[T], object] = lambda result: None,
        patience: float | None = None,
        longest: Longest | None = None,
    ) -> T:
        """Like `run`, but a cancelled caller leaves at once.

        The worker stays in use until the call ends, and `discard` gets its result.

        longest: how long the call may go on. After that, the caller gets `SourceUnavailable`.
        """
        with await self.slots.take(patience=patience) as slot:
            call = _Call(function, args, discard)
            if longest is None:
                seconds = math.inf
            else:
                seconds = min(longest.seconds, self._stuck) if longest in self._hung else longest.seconds
                slot.callback(self._note_end, call, longest)  # when the call has ended, even if nobody waits any more
            ended = self._ended[longest] if longest is not None else 0
            with anyio.move_on_after(seconds):
                try:
                    await anyio.to_thread.run_sync(call.work, limiter=unlimited(), abandon_on_cancel=True)
                except anyio.get_cancelled_exc_class():
                    call.abandon(slot)
                    raise
                return call.results[0]
            if longest is not None and self._ended[longest] == ended:
                self._hung.add(longest)
            raise SourceUnavailable(f"the disk has not answered for {seconds:g} seconds: look at what it waits for")

    def _note_end(self, call: "_Call[Any]", longest: Longest) -> None:
        """Note that a call has ended, so the disk does not hang, unless the call was left before it had begun."""
        if call.has_begun:
            self._ended[longest] += 1
            self._hung.discard(longest)


class _Call(Generic[T]):
    """A blocking call, whose caller may leave at any moment. The last of the two cleans up."""

    def __init__(self, function: Callable[..., T], args: tuple[Any, ...], discard: Callable[[T], object]) -> None:
        self.results: list[T] = []
        self.has_begun = False
        self._function = function
        self._args = args
        self._discard = discard
        self._slot = ExitStack()
        self._lock = threading.Lock()
        self._state: Literal["waiting", "running", "ended", "abandoned"] = "waiting"

    def work(self) -> None:
        """Make the call. Runs in a worker thread."""
        if not self._moves_on("waiting", "running"):
            return
        self.has_begun = True
        try:
            self.results.append(self._function(*self._args))
        finally:
            if not self._moves_on("running", "ended"):
                self._discard_results()
                anyio.from_thread.run_sync(self._slot.close)

    def abandon(self, slot: ExitStack) -> None:
        """Leave the call. If it is running, its slot is in use until it ends. Runs in the thread of the event loop."""
        with self._lock:
            before, self._state = self._state, "abandoned"
            if before == "running":  # the worker cleans up
                self._slot = slot.pop_all()
                return
        self._discard_results()

    def _moves_on(self, before: str, after: Literal["running", "ended"]) -> bool:
        with self._lock:
            if self._state != before:
                return False
            self._state = after
            return True

    def _discard_results(self) -> None:
        for result in self.results:
            self._discard(result)
