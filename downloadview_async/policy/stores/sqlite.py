"""`SQLiteGrantStore`: uses and revocations in a file that the processes of one machine share.

Each change is one SQL statement, which SQLite runs as one transaction in the thread of aiosqlite. So no await is inside
a transaction: a request that is cancelled leaves no lock behind, and no other request uses a half-done transaction.
"""

import os
import time
from collections.abc import Sequence

from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.stores.base import DownloadSession, is_whole, with_span
from downloadview_async.policy.stores.steady import SteadyClock
from downloadview_async.sources.sqlite_file import SQLiteFile

_SWEPT_EVERY = 60.0  # seconds
_VERSION = 1  # of the tables below
_TABLES = (
    """CREATE TABLE IF NOT EXISTS sessions (
        id INTEGER PRIMARY KEY, link TEXT NOT NULL, session TEXT NOT NULL, ends REAL NOT NULL, until REAL,
        sent TEXT NOT NULL DEFAULT '', is_complete INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX IF NOT EXISTS sessions_by_link ON sessions (link, session)",
    "CREATE INDEX IF NOT EXISTS sessions_by_until ON sessions (until)",
    "CREATE TABLE IF NOT EXISTS revoked (id TEXT PRIMARY KEY, until REAL) WITHOUT ROWID",
)
_OPEN = "SELECT 1 FROM sessions WHERE link = ? AND session = ? AND ends > ? AND NOT (is_complete AND ?)"
# A row stays until the link has expired, so the rows of a link are all sessions that were ever opened.
_CLAIM = f"""INSERT INTO sessions (link, session, ends, until) SELECT ?, ?, ?, ?
    WHERE NOT EXISTS ({_OPEN}) AND (SELECT count(*) FROM sessions WHERE link = ?) < ? RETURNING id"""  # noqa: S608
_PROGRESS = "SELECT id, sent FROM sessions WHERE link = ? AND session = ? ORDER BY id DESC LIMIT 1"
_NOTE = "UPDATE sessions SET sent = ?, is_complete = is_complete OR ? WHERE id = ? AND sent = ? RETURNING id"
_REVOKE = "INSERT OR REPLACE INTO revoked (id, until) VALUES (?, ?)"


class SQLiteGrantStore:
    """Keeps the uses and revocations of links in an SQLite file, for any number of processes on one machine.

    path: the file, which is created when it is missing. It must be on a local file system. If it is replaced while it
    is used, as by a backup, the new one is used from then on. If it is removed, the store fails until there is a file
    again. Needs the package aiosqlite.

    Raises `ConfigurationError` if aiosqlite is missing, and later if the file is of a newer version of this library.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SQLiteFile(path, tables=_TABLES, version=_VERSION, user="SQLiteGrantStore")
        self._rows = self._file.rows
        self._sweep_at = 0.0
        self._clock = SteadyClock()

    async def claim(
        self, session: DownloadSession, *, uses: int, wants_all: bool, now: float, ends: float, until: float | None
    ) -> bool:
        """Return whether a request belongs to an open session, or to one that this call has opened."""
        await self._sweep(now)
        link, digest = session.link_id, session.digest
        is_open = (link, digest, now, wants_all)
        if await self._rows(_OPEN, *is_open):
            return True
        if await self._rows(_CLAIM, link, digest, ends, until, *is_open, link, uses):
            return True
        # Another request of this client may have opened the session between the two statements.
        return bool(await self._rows(_OPEN, *is_open))

    async def note(self, session: DownloadSession, span: ByteRange, size: int) -> None:
        """Note a part of the file that was sent."""
        while rows := await self._rows(_PROGRESS, session.link_id, session.digest):
            number, sent = rows[0]
            more = with_span(sent, span)
            if await self._rows(_NOTE, more, is_whole(more, size), number, sent):
                return  # else another process has noted a part in the meantime

    async def revoke(self, identifier: str, until: float | None) -> None:
        """Revoke a link or a key."""
        await self._sweep(time.time())
        await self._rows(_REVOKE, identifier, until)

    async def is_revoked(self, identifiers: Sequence[str], now: float) -> bool:
        """Return whether one of the ids is revoked."""
        marks = ", ".join("?" * len(identifiers))
        query = f"SELECT 1 FROM revoked WHERE id IN ({marks}) AND (until IS NULL OR until > ?)"  # noqa: S608
        return bool(await self._rows(query, *identifiers, now))

    async def check(self) -> None:
        """Return if the file can be read and written."""
        await self._rows("DELETE FROM revoked WHERE until <= ?", self._clock.at_most(time.time()))

    async def aclose(self) -> None:
        """Close the connection of the running event loop."""
        await self._file.aclose()

    async def _sweep(self, now: float) -> None:
        if not 0 < self._sweep_at - now <= _SWEPT_EVERY:  # the clock may have been set back
            self._sweep_at, ended = now + _SWEPT_EVERY, self._clock.at_most(now)
            await self._rows("DELETE FROM sessions WHERE until <= ?", ended)
            await self._rows("DELETE FROM revoked WHERE until <= ?", ended)
