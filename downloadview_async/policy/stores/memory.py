"""`MemoryGrantStore`: uses and revocations in this process alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.stores.base import DownloadSession, is_whole, with_span
from downloadview_async.policy.stores.steady import SteadyClock

_SWEPT_EVERY = 60.0  # seconds


@dataclass(slots=True)
class _Progress:
    ends: float
    sent: str = ""
    is_complete: bool = False


@dataclass(slots=True)
class _Link:
    until: float | None
    opened: int = 0
    sessions: dict[str, _Progress] = field(default_factory=dict)


class MemoryGrantStore:
    """Keeps the uses and revocations of links in this process, for tests and for services with one process.

    They are lost when the process ends: a link that was used up then works again.
    """

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}
        self._revoked: dict[str, float | None] = {}
        self._sweep_at = 0.0
        self._clock = SteadyClock()

    async def claim(
        self, session: DownloadSession, *, uses: int, wants_all: bool, now: float, ends: float, until: float | None
    ) -> bool:
        """Return whether a request belongs to an open session, or to one that this call has opened."""
        self._sweep(now)
        link = self._links.setdefault(session.link_id, _Link(until))
        progress = link.sessions.get(session.digest)
        if progress is not None and progress.ends > now and not (progress.is_complete and wants_all):
            return True
        if link.opened >= uses:
            return False
        link.opened += 1
        link.sessions[session.digest] = _Progress(ends)
        return True

    async def note(self, session: DownloadSession, span: ByteRange, size: int) -> None:
        """Note a part of the file that was sent."""
        link = self._links.get(session.link_id)
        progress = None if link is None else link.sessions.get(session.digest)
        if progress is not None:
            progress.sent = with_span(progress.sent, span)
            progress.is_complete = progress.is_complete or is_whole(progress.sent, size)

    async def revoke(self, identifier: str, until: float | None) -> None:
        """Revoke a link or a key."""
        self._sweep(time.time())
        self._revoked[identifier] = until

    async def is_revoked(self, identifiers: Sequence[str], now: float) -> bool:
        """Return whether one of the ids is revoked."""
        return any(
            identifier in self._revoked and _is_kept(self._revoked[identifier], now) for identifier in identifiers
        )

    async def check(self) -> None:
        """Return at once."""

    async def aclose(self) -> None:
        """Do nothing: there are no connections."""

    def _sweep(self, now: float) -> None:
        if not 0 < self._sweep_at - now <= _SWEPT_EVERY:  # the clock may have been set back
            self._sweep_at, then = now + _SWEPT_EVERY, self._clock.at_most(now)
            self._links = {name: link for name, link in self._links.items() if _is_kept(link.until, then)}
            self._revoked = {name: until for name, until in self._revoked.items() if _is_kept(until, then)}


def _is_kept(until: float | None, now: float) -> bool:
    return until is None or until > now
