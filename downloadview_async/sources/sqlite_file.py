"""`SQLiteFile`: an SQLite file that the processes of one machine share."""

import asyncio
import os
import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio

from downloadview_async.errors import ConfigurationError
from downloadview_async.sources.per_loop import PerLoop

if TYPE_CHECKING:
    import aiosqlite

_BUSY_SECONDS = 5.0


class SQLiteFile:
    """A file with tables, which is created when it is first used. It must be on a local file system.

    If the file is replaced while it is used, as by a backup, the new one is used from then on. If it is removed, each
    use fails until there is a file again.

    tables: the statements that create them. version: the version of these tables. user: the name of the class that
    keeps its data there, for messages.

    Raises `ConfigurationError` if the package aiosqlite is missing.
    """

    def __init__(self, path: str | os.PathLike[str], *, tables: Sequence[str], version: int, user: str) -> None:
        try:
            import aiosqlite
        except ModuleNotFoundError as exc:
            raise ConfigurationError(f"{user} needs {exc.name}: install it") from exc
        self._connect = aiosqlite.connect
        self._path = os.path.abspath(path)
        self._tables = tables
        self._version = version
        self._connections: PerLoop[tuple[aiosqlite.Connection, tuple[int, int] | None]] = PerLoop()
        self._opening: PerLoop[asyncio.Lock] = PerLoop()

    async def rows(self, statement: str, *values: Any) -> list[Any]:
        """Return the rows that a statement gives, which runs as one transaction.

        Raises `sqlite3.Error`, and `ConfigurationError` if the file is of a newer version of this library.
        """
        connection = await self._connection()
        return list(await connection.execute_fetchall(statement, values))

    async def aclose(self) -> None:
        """Close the connection of the running event loop."""
        loop = asyncio.get_running_loop()
        if (kept := self._connections.get(loop)) is not None:
            self._connections.drop(loop)
            with anyio.CancelScope(shield=True):
                await kept[0].close()

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

        A row that another process writes into a new file, such as a revocation, would never be read from the old one.

        Raises `sqlite3.OperationalError` if the file has been removed: a new one would not have its data.
        """
        if (kept := self._connections.get(loop)) is None:
            return None
        if (identity := _identity(self._path)) is None:
            raise sqlite3.OperationalError(f"{self._path!r} has been removed: restore it, or restart the service")
        return kept[0] if kept[1] == identity else None

    async def _opened(self) -> "aiosqlite.Connection":
        check_place(self._path)
        pending = self._connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        # A server without a lifespan, as under WSGI, never closes the file, and a process waits for other threads.
        vars(pending).get("_thread", pending).daemon = True
        connection = await pending
        try:
            ((version,),) = await connection.execute_fetchall("PRAGMA user_version")
            if version > self._version:
                raise ConfigurationError(f"{self._path!r} is of a newer version: update downloadview_async")
            await _use_wal(connection)
            if version < self._version:
                for statement in (*self._tables, f"PRAGMA user_version = {self._version}"):
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


def check_place(path: str) -> None:
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
