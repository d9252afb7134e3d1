"""`GuardedStore`: a store with a deadline for its answers. If it fails, requests are refused or allowed."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

import anyio

from downloadview_async.errors import ConfigurationError, FileError, LinkInvalid, SourceUnavailable, WrongType
from downloadview_async.http.log_text import escaped
from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.stores.base import DownloadSession, GrantStore
from downloadview_async.policy.stores.redis import RedisGrantStore, RefusedByLimit, Ride
from downloadview_async.sources.tracing import span

logger = logging.getLogger("downloadview_async")

WhenStoreFails = Literal["refuse", "allow"]
T = TypeVar("T")

_LOGGED_EVERY = 60.0  # seconds
_NOTED_EVERY = 1.0  # seconds between two tries to note what a store that failed does not have
_MOST_OWED = 10_000  # notes


class GuardedStore:
    """Asks a store, and decides what holds if it does not answer in time.

    when_it_fails: "refuse" raises `SourceUnavailable`; "allow" counts nothing, and takes no link for revoked. timeout:
    seconds for one answer.
    """

    def __init__(self, store: GrantStore, *, when_it_fails: WhenStoreFails, timeout: float) -> None:
        if not hasattr(store, "claim") or isinstance(store, type):
            raise WrongType(f"store is {store!r}: give a GrantStore, such as SQLiteGrantStore('links.db')")
        if when_it_fails not in ("refuse", "allow"):
            raise ConfigurationError(f'when_store_fails is {when_it_fails!r}: give "refuse" or "allow"')
        self._store = store
        self._is_allowed = when_it_fails == "allow"
        self._timeout = timeout
        self._log_at = 0.0
        self.counts = {"used": 0, "used-up": 0, "store-failed": 0}
        self.notes: dict[DownloadSession, list[anyio.Event]] = {}
        """The notes that this process is writing now, by the session."""
        self._owed: deque[tuple[DownloadSession, ByteRange, int]] = deque(maxlen=_MOST_OWED)
        self._paying: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def redis(self) -> RedisGrantStore | None:
        """The store itself, if it is Redis."""
        return self._store if isinstance(self._store, RedisGrantStore) else None

    async def claim(
        self,
        session: DownloadSession,
        *,
        uses: int,
        wants_all: bool,
        now: float,
        ends: float,
        until: float | None,
        ride: Ride | None = None,
    ) -> bool:
        """Return whether the request may have the file. ride: as in `RedisGrantStore`.

        Raises `SourceUnavailable`, and with a `ride` `LinkInvalid` and `RefusedByLimit`.
        """
        options: dict[str, Any] = {} if ride is None else {"ride": ride}
        is_allowed = await self._ask(
            lambda: self._store.claim(
                session, uses=uses, wants_all=wants_all, now=now, ends=ends, until=until, **options
            ),
            True,
        )
        self.counts["used" if is_allowed else "used-up"] += 1
        return is_allowed

    async def wait_for_notes(self, session: DownloadSession) -> None:
        """Wait until the store has what this process notes of a session now, so that it knows what is complete."""
        with anyio.move_on_after(self._timeout):
            while running := self.notes.get(session):
                await running[0].wait()

    async def is_revoked(self, identifiers: Sequence[str]) -> bool:
        """Return whether one of the ids is revoked. Raises `SourceUnavailable`."""
        return await self._ask(lambda: self._store.is_revoked(identifiers, time.time()), False)

    async def refuse_revoked(self, ride: Ride) -> None:
        """Raise `LinkInvalid` if the link is revoked, or `SourceUnavailable`. ride: as in `RedisGrantStore`."""
        store = self.redis
        assert store is not None
        try:
            await self._ask(lambda: store.refuse_revoked(ride), None)
        except RefusedByLimit:  # that limit raises its own error, unless its answer was lost: then it does not hold
            if await self.is_revoked(ride.revocable):
                raise LinkInvalid(f"the link {ride.revocable[0]}, or its key, is revoked") from None

    async def note(self, session: DownloadSession, span: ByteRange, size: int, *, ride: Ride | None = None) -> None:
        """Note a part of the file that was sent. If that fails, it is tried again as long as this process runs."""
        options: dict[str, Any] = {} if ride is None else {"ride": ride}
        try:
            await self._ask(lambda: self._store.note(session, span, size, **options), None, is_allowed=False)
        except SourceUnavailable:  # it is logged, and the file has left
            self._owed.append((session, span, size))
            if self._paying is None or self._paying.get_loop() is not asyncio.get_running_loop():
                self._paying = asyncio.create_task(self._note_owed())

    async def aclose(self) -> None:
        """Close the connections of the store in the running event loop. What it does not have yet is noted later."""
        self._is_closed = True
        await self._store.aclose()

    async def _note_owed(self) -> None:
        """Note what the store does not have as soon as it answers again, so that its sessions end.

        If the store has been closed meanwhile, as after a reload, nobody else closes what this opens.
        """
        while self._owed:
            await asyncio.sleep(_NOTED_EVERY)
            while self._owed:
                note = self._owed[0]
                try:
                    with anyio.fail_after(self._timeout):
                        await self._store.note(*note)
                except Exception:  # whatever the library of the store raises: it fails still
                    break
                if self._owed and self._owed[0] is note:
                    self._owed.popleft()
            if self._is_closed:
                with suppress(Exception):
                    await self._store.aclose()
        self._paying = None

    async def revoke(self, identifier: str, until: float | None) -> None:
        """Revoke a link or a key. Raises `SourceUnavailable` if the store fails, whatever is allowed then."""
        await self._ask(lambda: self._store.revoke(identifier, until), None, is_allowed=False)

    async def _ask(self, call: Callable[[], Awaitable[T]], otherwise: T, *, is_allowed: bool | None = None) -> T:
        is_allowed = self._is_allowed if is_allowed is None else is_allowed
        try:
            with span("store of links"), anyio.fail_after(self._timeout):
                return await call()
        except (FileError, RefusedByLimit):  # what the store says
            raise
        except Exception as exc:  # whatever the library of the store raises
            self._log(exc)
            self.counts["store-failed"] += 1
            if is_allowed:
                return otherwise
            raise SourceUnavailable(f"the store of links has failed: {type(exc).__name__}") from exc

    def _log(self, exc: Exception) -> None:
        now = time.monotonic()
        if now >= self._log_at:
            self._log_at = now + _LOGGED_EVERY
            verdict = "requests are allowed without it" if self._is_allowed else "requests that need it get 503"
            reason = str(exc) or f"no answer in {self._timeout:g} seconds"
            logger.warning(
                "the store of links has failed (%s: %s), so %s", type(exc).__name__, escaped(reason), verdict
            )
