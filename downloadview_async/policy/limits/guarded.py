"""`GuardedLimitStore`: a store with a circuit breaker, and what holds while it does not answer."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from downloadview_async.errors import SourceUnavailable
from downloadview_async.http.log_text import escaped
from downloadview_async.policy.limits.amounts import Quota, Window
from downloadview_async.policy.limits.coverage import Parts
from downloadview_async.policy.limits.redis import RedisLimitStore
from downloadview_async.policy.limits.store import ALLOWED, Costs, NotCounted, Verdict
from downloadview_async.sources.per_loop import PerLoop

logger = logging.getLogger("downloadview_async")

WhenStoreFails = Literal["refuse", "allow"]
S = TypeVar("S")
T = TypeVar("T")

LOG_SECONDS = 60.0
"""Seconds in which at most one failure is logged."""

PAUSE = 1.0
"""Seconds between two checks, by a task for which no request waits, whether a store that has failed works again."""


class GuardedLimitStore:
    """Asks a store, and decides what holds while it does not answer.

    when_it_fails: "refuse" raises `SourceUnavailable`; "allow" counts nothing. After a failure no request waits for the
    store until it has answered a check. A task checks it until it does, also while there are no requests.
    """

    def __init__(self, store: RedisLimitStore, *, when_it_fails: WhenStoreFails) -> None:
        self._store = store
        self.followers = store.followers
        self._is_allowed = when_it_fails == "allow"
        self._has_failed = False
        self._is_logged = False  # the failure that began last
        self._check_at = 0.0
        self._checks: PerLoop[asyncio.Task[None]] = PerLoop()
        self._held: set[str] = set()  # the leases that the store has given
        self.uncounted = 0
        """How many requests were allowed without being counted."""
        self._logged_at = -LOG_SECONDS

    async def admit(self, client: str, *, window: Window | None, most: int | None, lease: str | None) -> Verdict:
        """Count a request, and hold a lease for its transfer. Raises `SourceUnavailable`."""
        verdict = await self._ask(
            lambda: self._store.admit(client, window=window, most=most, lease=lease), Verdict("requests", -1.0)
        )
        if verdict.wait < 0:
            return ALLOWED
        if lease is not None and verdict.refused is None:
            self._held.add(lease)
        return verdict

    async def spend(self, client: str, costs: Costs, *, parts: Parts | None, now: float) -> Quota | None:
        """Add the costs to their quotas, or return a quota that is used up.

        Raises `NotCounted` and `SourceUnavailable`.
        """
        used_up: Quota | NotCounted | None = await self._ask(
            lambda: self._store.spend(client, costs, parts=parts, now=now), NotCounted()
        )
        if isinstance(used_up, NotCounted):
            raise used_up
        return used_up

    async def enter(
        self,
        client: str,
        *,
        window: Window | None,
        most: int | None,
        lease: str | None,
        costs: Costs,
        parts: Parts | None,
        now: float,
        gate: str,
    ) -> tuple[Verdict, Quota | None]:
        """Do what `admit` and `spend` do, in one step: see `RedisLimitStore.enter`.

        Raises `NotCounted` and `SourceUnavailable`.
        """
        entered: tuple[Verdict, Quota | None] | NotCounted = await self._ask(
            lambda: self._store.enter(
                client, window=window, most=most, lease=lease, costs=costs, parts=parts, now=now, gate=gate
            ),
            NotCounted(),
        )
        if isinstance(entered, NotCounted):
            raise entered
        if lease is not None and entered[0].refused is None:
            self._held.add(lease)
        return entered

    @property
    def redis(self) -> RedisLimitStore | None:
        """The store itself; None while it fails."""
        return None if self._has_failed else self._store

    def release(self, client: str, lease: str | None, refunds: Costs, *, spent_at: float, unsent: Parts | None) -> None:
        """End a lease, and give back what was not sent, unless the store has failed."""
        held = lease if lease in self._held else None
        self._held.discard(lease or "")
        if held is not None or ((refunds or unsent) and not self._has_failed):
            self._store.release(client, held, refunds, spent_at=spent_at, unsent=unsent)

    def transfers(self, client: str) -> int:
        """Return how many leases the client holds in all processes, as far as this process knows."""
        return self._store.transfers(client)

    async def check(self) -> None:
        """Return if the store answers."""
        await self._store.check()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if (checks := self._checks.get(loop)) is not None:
            self._checks.drop(loop)
            checks.cancel()
        await self._store.aclose()

    async def _ask(self, call: Callable[[], Awaitable[T]], otherwise: S) -> T | S:
        if not self._has_failed:
            try:
                return await call()
            except Exception as exc:  # whatever the library of the store raises
                self._break(exc)
        loop = asyncio.get_running_loop()
        if time.monotonic() >= self._check_at and self._checks.get(loop) is None:
            self._checks.set(loop, loop.create_task(self._check_until_it_works()))
        if self._is_allowed:
            self.uncounted += 1
            return otherwise
        raise SourceUnavailable("the store of limits has failed")

    def _break(self, exc: Exception) -> None:
        if self._has_failed:  # another request was waiting for the store, too
            return
        self._has_failed = True
        self._check_at = time.monotonic()
        self._is_logged = time.monotonic() - self._logged_at >= LOG_SECONDS
        if self._is_logged:
            self._logged_at = time.monotonic()
            verdict = "nothing is limited until it works again" if self._is_allowed else "requests get 503 until then"
            logger.warning(
                "the store of limits has failed (%s: %s): %s", type(exc).__name__, escaped(str(exc)), verdict
            )

    async def _check_until_it_works(self) -> None:
        """Ask the store again and again whether it works."""
        try:
            while self._has_failed:
                try:
                    await self._store.check()
                except Exception:  # whatever the library raises; that the store fails is logged already
                    self._check_at = time.monotonic() + PAUSE
                    await asyncio.sleep(PAUSE)
                else:
                    self._works_again()
        finally:
            self._checks.drop(asyncio.get_running_loop())

    def _works_again(self) -> None:
        self._has_failed = False
        if self._is_logged:
            logger.warning("the store of limits works again: %d requests were not counted so far", self.uncounted)
