"""`MemoryLimitStore`: counts in this process alone."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from downloadview_async.policy.limits.amounts import Quota, Window
from downloadview_async.policy.limits.coverage import MAX_EDGES, Coverage, Parts
from downloadview_async.policy.limits.store import (
    ALLOWED,
    RESERVED_SECONDS,
    SESSION_SECONDS,
    Costs,
    Verdict,
    period_of,
    window_wait,
)

MAX_CLIENTS = 100_000
"""How many clients are remembered: those that came last, and those with transfers under way."""

MAX_SESSIONS = 1000
"""How many downloads of a client are remembered. A request of an older one counts as a new download."""

MAX_ALL_SESSIONS = 1_000_000
"""How many downloads of all clients are remembered. Beyond, the clients that came first are forgotten."""

_NOTHING = (0, 0)


@dataclass(slots=True)
class _Session:
    """The bytes of one version of a file that a client has. charged: the downloads that its quotas are charged with."""

    size: int
    coverage: Coverage = field(default_factory=Coverage)
    charged: int = 0
    charged_at: float = 0.0
    running: int = 0  # transfers
    used_at: float = 0.0

    @property
    def downloads(self) -> int:
        """The downloads that count: those that are complete, or will be; at least one if there is any byte."""
        return max(1, self.coverage.least(self.size)) if self.coverage.edges else 0


@dataclass(slots=True)
class _Client:
    began: float = 0.0
    current: int = 0
    previous: int = 0
    leases: set[str] = field(default_factory=set)
    spent: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # a period, and what was spent in it
    sessions: OrderedDict[str, _Session] = field(default_factory=OrderedDict)  # the one that was used last is last


class MemoryLimitStore:
    """Counts in this process. No method waits, so a request costs no more than a few microseconds."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._sessions = 0

    async def admit(self, client: str, *, window: Window | None, most: int | None, lease: str | None) -> Verdict:
        """Count a request, and hold a lease for its transfer."""
        return self.admit_nowait(client, window, most, lease)

    def admit_nowait(self, client: str, window: Window | None, most: int | None, lease: str | None) -> Verdict:
        """Do the same as `admit`, without a coroutine."""
        known = self._known(client)
        if window is not None:
            if wait := _wait_of(known, window):
                return Verdict("requests", wait)
            known.current += 1
        if lease is not None:
            if most is not None and len(known.leases) >= most:
                return Verdict("concurrent", 1.0)
            known.leases.add(lease)
        return ALLOWED

    def has_room(self, client: str, window: Window | None, most: int | None) -> bool:
        """Return whether `admit_nowait` would allow a request now, and count nothing."""
        known = self._known(client)
        if most is not None and len(known.leases) >= most:
            return False
        return window is None or not _wait_of(known, window)

    async def spend(self, client: str, costs: Costs, *, parts: Parts | None, now: float) -> Quota | None:
        """Add the costs to their quotas, or return a quota that is used up."""
        return self.spend_nowait(client, costs, parts, now)

    def spend_nowait(self, client: str, costs: Costs, parts: Parts | None, now: float) -> Quota | None:
        """Do the same as `spend`, without a coroutine."""
        known = self._known(client)
        session, more = None, 0
        spans: tuple[tuple[int, int], ...] = ()
        if parts is not None:
            session = known.sessions.get(parts.session)
            if session is None or now - session.used_at > SESSION_SECONDS:
                session = _Session(parts.size)
            spans = parts.spans if len(session.coverage.edges) < MAX_EDGES else ((0, parts.size),)
            session.coverage.add(spans)
            more = max(0, session.downloads - session.charged)
        used_up = _used_up(known, costs, more, now)
        if used_up is not None and used_up.unit == "downloads" and _give_back_idle(known, costs, session, now):
            used_up = _used_up(known, costs, more, now)
        if used_up is not None:
            if session is not None:
                session.coverage.add(spans, -1)
            return used_up
        for quota, cost in costs:
            _spend(known, quota, more if quota.unit == "downloads" else cost, now)
        if parts is not None and session is not None:
            session.charged += more
            session.charged_at = now if more else session.charged_at
            session.used_at = now
            session.running += 1
            before = len(known.sessions)
            known.sessions[parts.session] = session
            known.sessions.move_to_end(parts.session)
            if len(known.sessions) > MAX_SESSIONS:
                known.sessions.popitem(last=False)
            self._sessions += len(known.sessions) - before
            if self._sessions > MAX_ALL_SESSIONS:
                self._forget()
        return None

    def release(self, client: str, lease: str | None, refunds: Costs, *, spent_at: float, unsent: Parts | None) -> None:
        """End a lease, and give back what was not sent."""
        known = self._clients.get(client)
        if known is None:
            return
        if lease is not None:
            known.leases.discard(lease)
        back, session = 0, None if unsent is None else known.sessions.get(unsent.session)
        if unsent is not None and session is not None:
            if len(session.coverage.edges) < MAX_EDGES:
                session.coverage.add(unsent.spans, -1)
            session.running -= 1
            session.used_at = time.time()
            back = max(0, session.charged - session.downloads)
            session.charged -= back
            if not session.coverage.edges and not session.running:
                del known.sessions[unsent.session]
                self._sessions -= 1
        for quota, refund in refunds:
            _spend(known, quota, -(back if quota.unit == "downloads" else refund), spent_at)

    def transfers(self, client: str) -> int:
        """Return how many leases the client holds."""
        known = self._clients.get(client)
        return 0 if known is None else len(known.leases)

    async def check(self) -> None:
        """Return."""

    async def aclose(self) -> None:
        """Return: there is nothing to close."""

    def _known(self, client: str) -> _Client:
        known = self._clients.get(client)
        if known is None:
            known = self._clients[client] = _Client()
            for _ in range(min(2, len(self._clients) - MAX_CLIENTS)):
                self._forget()
        else:
            self._clients.move_to_end(client)
        return known

    def _forget(self) -> None:
        """Forget the client that came first. One with a transfer becomes the one that came last."""
        client, known = self._clients.popitem(last=False)
        if known.leases:
            self._clients[client] = known
        else:
            self._sessions -= len(known.sessions)


def _used_up(known: _Client, costs: Costs, more: int, now: float) -> Quota | None:
    """Return a quota that is used up. more: downloads."""
    for quota, _ in costs:
        period, used = known.spent.get((quota.unit, quota.seconds), _NOTHING)
        if period != period_of(quota, now):
            used = 0
        is_full = used + more > quota.amount if quota.unit == "downloads" else used >= quota.amount
        if is_full and (more or quota.unit == "bytes"):
            return quota
    return None


def _spend(known: _Client, quota: Quota, amount: int, then: float) -> None:
    """Add an amount to a quota. A negative one counts only if the period has not ended."""
    key, current = (quota.unit, quota.seconds), period_of(quota, then)
    period, used = known.spent.get(key, _NOTHING)
    if period == current:
        known.spent[key] = period, max(0, used + amount)
    elif amount >= 0:
        known.spent[key] = current, amount


def _give_back_idle(known: _Client, costs: Costs, but: _Session | None, now: float) -> bool:
    """Give back what downloads that nobody continues have reserved, and return whether there was any."""
    idle = [
        one
        for one in known.sessions.values()
        if one.charged == 1
        and not one.running
        and one is not but
        and now - one.used_at > RESERVED_SECONDS
        and one.coverage.least(one.size) == 0
    ]
    for one in idle:
        one.charged = 0
        for quota, _ in costs:
            if quota.unit == "downloads":
                _spend(known, quota, -1, one.charged_at)
    return bool(idle)


def _wait_of(known: _Client, window: Window) -> float:
    """Return the seconds until one more request is allowed, 0 if it is allowed now."""
    now = time.monotonic()
    if now - known.began >= window.seconds:
        _turn(known, window, now)
    if known.current + known.previous < window.amount:
        return 0.0
    return window_wait(window, now - known.began, known.current, known.previous)


def _turn(known: _Client, window: Window, now: float) -> None:
    """Begin the next window: the current one is over. One that is long over does not count any more."""
    elapsed = now - known.began
    is_next = elapsed < 2 * window.seconds and known.current
    known.previous = known.current if is_next else 0
    known.began = known.began + window.seconds if is_next else now
    known.current = 0
