"""`Use`: what one request takes of a link that allows a number of downloads."""

import time
from collections.abc import Mapping
from secrets import token_hex
from typing import Any

import anyio

from downloadview_async.errors import LinkUsedUp
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.policy.addresses import network_of
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.stores.base import DownloadSession
from downloadview_async.policy.stores.guarded import GuardedStore
from downloadview_async.policy.stores.redis import Ride

USE = "downloadview_async.use"
"""The key of a `Use` in an ASGI scope: `URLSigner.verify` puts it there, and `DownloadResponse` claims it."""

TOGETHER = "downloadview_async.together"
"""The key of a `Together` in an ASGI scope: what it asks later need not be asked at once."""

MARGIN = 3600.0
"""Seconds that an entry in a store is kept after its link has expired: the clocks of machines differ."""


class Use:
    """Claims a download for one request, and notes what was sent of it."""

    def __init__(self, store: GuardedStore, grant: Grant, client: str, session_seconds: float) -> None:
        assert grant.link_id is not None
        assert grant.uses is not None
        self._store = store
        self._link_id = grant.link_id
        self._uses = grant.uses
        self._until = None if grant.expires is None else grant.expires + MARGIN
        self._client = client
        self._seconds = session_seconds
        self._session: DownloadSession | None = None
        self._size: int | None = None
        self._noted: anyio.Event | None = None
        self.ride: Ride | None = None
        """Set if the limits of the request are asked in the same round trip: see `Together`."""

    async def claim(self, metadata: FileMetadata, *, wants_all: bool) -> None:
        """Count the request, once, before anything is sent. wants_all: whether it is for all bytes of the file.

        Such a request begins a new download if the last one is complete. A request for a part belongs to the last one
        even then: what the kernel took may not have arrived, and a client that has the file gets nothing new.

        Raises `LinkUsedUp`, or `SourceUnavailable` if the store does not answer.
        """
        if self._session is not None:
            return
        session = DownloadSession(link_id=self._link_id, client=self._client, version=_version_of(metadata))
        await self._store.wait_for_notes(session)
        now = time.time()
        is_claimed = await self._store.claim(
            session,
            uses=self._uses,
            wants_all=wants_all,
            now=now,
            ends=now + self._seconds,
            until=None if self._until is None else max(self._until, now + self._seconds),
            ride=self.ride,
        )
        if not is_claimed:
            raise LinkUsedUp(f"the link {self._link_id} has been used for {self._uses} downloads")
        self._session, self._size = session, metadata.size

    def end(self) -> None:
        """Have further requests of the session in this process wait until `close` is called: the answer has left."""
        if self._session is not None and self._noted is None:
            self._noted = anyio.Event()
            self._store.notes.setdefault(self._session, []).append(self._noted)

    def close(self) -> None:
        """Let further requests of the session go on: what was sent has been noted."""
        if self._session is not None and self._noted is not None:
            self._noted.set()
            running = self._store.notes[self._session]
            running.remove(self._noted)
            if not running:
                del self._store.notes[self._session]

    async def note(self, span: ByteRange, *, is_whole: bool = False) -> None:
        """Note a part of the file that was sent. is_whole: it is all of a file whose size was unknown."""
        size = len(span) if is_whole else self._size
        if self._session is not None and size is not None:
            await self._store.note(self._session, span, size, ride=self.ride)


def client_network(scope: Mapping[str, Any]) -> str:
    """Return the address of a request's client, or its /64 network with IPv6, which is what one person usually has.

    A request without an address, as over a Unix socket, is a separate client.
    """
    client = scope.get("client")
    return network_of(client[0]) if client and client[0] else token_hex(16)


def _version_of(metadata: FileMetadata) -> str:
    if metadata.etag is not None:
        return str(metadata.etag)
    return f"{metadata.last_modified} {metadata.size}"
