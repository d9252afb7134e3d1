"""`SQLiteGrantStore`: uses and revocations in a file that the processes of one machine share.

Each change is one SQL statement, which SQLite runs as one transaction in the thread of aiosqlite. So no await is inside
a transaction: a request that is cancelled leaves no lock behind, and no other request uses a half-done transaction.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.stores.base import DownloadSession, is_whole, with_span
from downloadview_async.sources.per_loop import PerLoop

if TYPE_CHECKING:
    import aiosqlite

_BUSY_SECONDS = 5.0
_SWEPT_EVERY = 60.0  # seconds
_VERSION = 1  # of the tables below
_TABLES = (
    """CREATE TABLE IF NOT EXISTS sessions (
        id INTEGER PRIMARY KEY, link TEXT NOT NULL, session TEXT NOT NULL, ends REAL NOT NULL, until REAL,
        sent TEXT NOT NULL DEFAULT '', is_complete INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX IF NOT EXISTS sessions_by_link ON sessions (link, session)",
    "CREATE INDEX IF NOT EXISTS sessions_by_until ON sessions (until)",
    "CREATE TABLE IF NOT EXISTS revoked (id TEXT PRIMARY KEY, until REAL) WITHOUT ROWID",
    f"PRAGMA user_version = {_VERSION}",
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
        try:
            import aiosqlite
        except ModuleNotFoundError as exc:
            raise ConfigurationError(f"SQLiteGrantStore needs {exc.name}: install it") from exc
        self._connect = aiosqlite.connect
        self._path = os.path.abspath(path)
        self._connections: PerLoop[tuple[aiosqlite.Connection, tuple[int, int] | None]] = PerLoop()
        self._opening: PerLoop[asyncio.Lock] = PerLoop()
        self._sweep_at = 0.0

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
        await self._rows("DELETE FROM revoked WHERE until <= ?", time.time())

    async def aclose(self) -> None:
        """Close the connection of the running event loop."""
        loop = asyncio.get_running_loop()
        if (kept := self._connections.get(loop)) is not None:
            self._connections.drop(loop)
            with anyio.CancelScope(shield=True):
                await kept[0].close()

    async def _sweep(self, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEPT_EVERY
            await self._rows("DELETE FROM sessions WHERE until <= ?", now)
            await self._rows("DELETE FROM revoked WHERE until <= ?", now)

    async def _rows(self, statement: str, *values: Any) -> list[Any]:
        connection = await self._connection()
        return list(await connection.execute_fetchall(statement, values))

    async def _connection(self) -> "aiosqlite.Connection":
        loop = asyncio.get_running_loop()
        if (connection := self._current(loop)) is not None:
            return connection
        opening = self._opening.get(loop) or self._opening.set(loop, asyncio.Lock())
        async with opening:
            if (connection := self._current(loop)) is not None:
                return connection
            await self.aclose()
            identity = _identity(self._path)  # before it is opened: one that replaces it meanwhile is noticed
            connection = await self._opened()
            self._connections.set(loop, (connection, identity or _identity(self._path)))
            return connection

    def _current(self, loop: asyncio.AbstractEventLoop) -> "aiosqlite.Connection | None":
        """Return the connection to the file that is at the path now, or None.

        A revocation that another process writes into a new file would never be read from the old one.

        Raises `sqlite3.OperationalError` if the file has been removed: in a new one, no link is used up or revoked.
        """
        if (kept := self._connections.get(loop)) is None:
            return None
        if (identity := _identity(self._path)) is None:
            raise sqlite3.OperationalError(f"{self._path!r} has been removed: restore it, or restart the service")
        return kept[0] if kept[1] == identity else None

    async def _opened(self) -> "aiosqlite.Connection":
        _check_place(self._path)
        pending = self._connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        # A server without a lifespan, as under WSGI, never closes the store, and a process waits for other threads.
        vars(pending).get("_thread", pending).daemon = True
        connection = await pending
        try:
            ((version,),) = await connection.execute_fetchall("PRAGMA user_version")
            if version > _VERSION:
                raise ConfigurationError(f"{self._path!r} is of a newer version: update downloadview_async")
            await _use_wal(connection)
            if version < _VERSION:
                for statement in _TABLES:
                    await connection.execute_fetchall(statement)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await connection.close()
            raise
        return connection


def _identity(path: str) -> tuple[int, int] | None:
    """Return the device and the number of a file, or None if it is missing."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _check_place(path: str) -> None:
    """Raise `sqlite3.OperationalError` if the file can certainly not be opened.

    If the opening fails in aiosqlite, its thread may end after the event loop, and with an error. Opening the file here
    instead would release the locks that this process has on it.
    """
    directory = os.path.dirname(os.path.abspath(path))
    is_usable = os.access(path, os.R_OK | os.W_OK) and not os.path.isdir(path)
    if not os.access(directory, os.W_OK | os.X_OK) or (os.path.lexists(path) and not is_usable):
        raise sqlite3.OperationalError(f"unable to open database file {path!r}")


async def _use_wal(connection: "aiosqlite.Connection") -> None:
    """Let processes read while another writes. Raises `sqlite3.OperationalError`."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            await connection.execute_fetchall("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            # For this statement SQLite does not wait for another process that runs it, whatever the timeout.
            if time.monotonic() >= deadline:
                raise
            await anyio.sleep(0.01)
        else:
            return
