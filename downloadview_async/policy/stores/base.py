"""`GrantStore`: the protocol of what processes keep together about links: their uses, and which are revoked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from downloadview_async.http.metadata import ByteRange

MOST_SPANS = 1000
"""The most separate parts of a file that are kept of one session. With more, the session ends by its time alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadSession:
    """One download as people mean it: a client gets one version of the file of one link, in any number of requests."""

    link_id: str
    client: str
    version: str

    @property
    def digest(self) -> str:
        """The client and the version as one short name, which does not show the address of the client."""
        return hashlib.sha256(json.dumps([self.client, self.version]).encode()).hexdigest()


class GrantStore(Protocol):
    """Keeps sessions and revocations for one process or several. Any error that it raises means that it has failed.

    Every method is atomic: no other process sees half of it, and a cancelled call leaves nothing locked. Times are in
    seconds since 1970 UTC.
    """

    async def claim(
        self, session: DownloadSession, *, uses: int, wants_all: bool, now: float, ends: float, until: float | None
    ) -> bool:
        """Return whether a request belongs to a session that is open, or to one that this call has opened.

        uses: how many sessions of the link may be opened in all. wants_all: whether the request is for all bytes of the
        file; such a request does not belong to a session that is complete. ends: the end of a session that is opened
        now. until: when the entry may be forgotten, None: never.
        """
        ...

    async def note(self, session: DownloadSession, span: ByteRange, size: int) -> None:
        """Note a part of the file that was sent. The session is complete when its parts are all `size` bytes."""
        ...

    async def revoke(self, identifier: str, until: float | None) -> None:
        """Revoke a link or all links of a key, by its id. until: when the entry may be forgotten, None: never."""
        ...

    async def is_revoked(self, identifiers: Sequence[str], now: float) -> bool:
        """Return whether one of the ids is revoked."""
        ...

    async def check(self) -> None:
        """Return if the store answers."""
        ...

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        ...


def with_span(sent: str, span: ByteRange) -> str:
    """Return parts such as `0-10 20-30`, sorted and joined where they touch, with another part."""
    start, stop, parts = span.start, span.stop, []
    for part in sent.split():
        first, last = map(int, part.split("-"))
        if last < start or first > stop:
            parts.append((first, last))
        else:
            start, stop = min(start, first), max(stop, last)
    if len(parts) >= MOST_SPANS:
        return sent
    return " ".join(f"{first}-{last}" for first, last in sorted([*parts, (start, stop)]))


def is_whole(sent: str, size: int) -> bool:
    """Return whether parts are all bytes of a file."""
    return size == 0 or sent == f"0-{size}"
