"""`MemoryLimitStore`: counts in this process alone."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from downloadview_async.policy.limits.amounts import Quota, Window
from downloadview_async.policy.limits.store import ALLOWED, SESSION_SECONDS, Costs, Verdict, period_of, window_wait

MAX_CLIENTS = 100_000
"""How many clients are remembered: those that came last, and those with transfers under way."""

MAX_SESSIONS = 1000
"""How many downloads of a client are remembered. A request of an older one counts as a new download."""

MAX_ALL_SESSIONS = 1_000_000
"""How many downloads of all clients are remembered. Beyond, the clients that came first are forgotten."""

_NOTHING = (0, 0)


@dataclass(slots=True)
class _Client:
    began: float = 0.0
    current: int = 0
    previous: int = 0
    leases: set[str] = field(default_factory=set)
    spent: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # a period, and what was spent in it
    sessions: dict[str, tuple[float, bool]] = field(default_factory=dict)  # when it ends, whether it is complete


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
            now = time.monotonic()
            if now - known.began >= window.seconds:
                _turn(known, window, now)
            if known.current + known.previous >= window.amount and (
                wait := window_wait(window, now - known.began, known.current, known.previous)
            ):
                return Verdict("requests", wait)
            known.current += 1
        if lease is not None:
            if most is not None and len(known.leases) >= most:
                return Verdict("concurrent", 1.0)
            known.leases.add(lease)
        return ALLOWED

    async def spend(self, client: str, costs: Costs, *, session: str, wants_all: bool, now: float) -> Quota | None:
        """Add the costs to their quotas, or return a quota that is used up."""
        return self.spend_nowait(client, costs, session, wants_all, now)

    def spend_nowait(self, client: str, costs: Costs, session: str, wants_all: bool, now: float) -> Quota | None:
        """Do the same as `spend`, without a coroutine."""
        known = self._known(client)
        ends, is_complete = known.sessions.get(session, (0.0, False)) if session else (0.0, False)
        is_open = ends > now and not (is_complete and wants_all)
        spent, changes = known.spent, []
        for quota, cost in costs:
            if is_open and quota.unit == "downloads":
                continue
            key, current = (quota.unit, quota.seconds), period_of(quota, now)
            period, used = spent.get(key, _NOTHING)
            if period != current:
                used = 0
            if used >= quota.amount:
                return quota
            changes.append((key, (current, used + cost)))
        for key, change in changes:
            spent[key] = change
        if session and not is_open:
            before = len(known.sessions)
            known.sessions[session] = now + SESSION_SECONDS, False
            if len(known.sessions) > MAX_SESSIONS:
                del known.sessions[next(iter(known.sessions))]
            self._sessions += len(known.sessions) - before
            if self._sessions > MAX_ALL_SESSIONS:
                self._forget()
        return None

    def release(self, client: str, lease: str | None, refunds: Costs, *, spent_at: float, complete: str | None) -> None:
        """End a lease, and give back what was not sent."""
        known = self._clients.get(client)
        if known is None:
            return
        if lease is not None:
            known.leases.discard(lease)
        for quota, refund in refunds:
            period, used = known.spent.get((quota.unit, quota.seconds), (0, 0))
            if period == period_of(quota, spent_at):
                known.spent[quota.unit, quota.seconds] = period, max(0, used - refund)
        if complete is not None and (session := known.sessions.get(complete)) is not None and not session[1]:
            known.sessions[complete] = session[0], True

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


def _turn(known: _Client, window: Window, now: float) -> None:
    """Begin the next window: the current one is over. One that is long over does not count any more."""
    elapsed = now - known.began
    is_next = elapsed < 2 * window.seconds and known.current
    known.previous = known.current if is_next else 0
    known.began = known.began + window.seconds if is_next else now
    known.current = 0
