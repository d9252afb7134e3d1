"""CRC-32s of files that have been read, so that an archive need not read them again.

A key is a digest of the source, the name, the tag and the size of a file. So a file that has changed has another key.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Protocol, TypeVar

from downloadview_async.errors import SourceUnavailable
from downloadview_async.sources.workers import Workers

try:
    from zlib_ng.zlib_ng import crc32 as crc32  # more than ten times as fast as that of zlib
except ImportError:
    from zlib import crc32 as crc32

A = TypeVar("A")
T = TypeVar("T")

logger = logging.getLogger("downloadview_async")

MAX_ENTRIES = 100_000
"""How many CRC-32s are kept in memory. Each takes about 150 bytes."""

_TABLE = "CREATE TABLE IF NOT EXISTS crc32 (key BLOB PRIMARY KEY, crc INTEGER NOT NULL, stored REAL NOT NULL)"
_INDEX = "CREATE INDEX IF NOT EXISTS crc32_by_time ON crc32 (stored)"
_PUT = "INSERT OR REPLACE INTO crc32 (key, crc, stored) VALUES (?, ?, ?)"
_TRIM = """DELETE FROM crc32 WHERE key IN
    (SELECT key FROM crc32 ORDER BY stored LIMIT max(0, (SELECT count(*) FROM crc32) - ?))"""
_TRIMMED_EVERY = 60.0  # seconds
_KEYS_AT_ONCE = 500
_WHERE = {"reading": "from", "writing": "to"}
_BUSY_SECONDS = 5.0
_REST_SECONDS = 10.0  # without a call after one has failed: an archive of many files makes hundreds


class Checksums(Protocol):
    """Keeps CRC-32s by their keys. It may forget any of them: the file is then read again."""

    async def get(self, keys: Sequence[bytes], /) -> Mapping[bytes, int]:
        """Return the CRC-32s that are known of these keys."""
        ...

    async def put(self, known: Mapping[bytes, int], /) -> None:
        """Keep CRC-32s by their keys."""
        ...


class MemoryChecksums:
    """Keeps CRC-32s in memory, in one process. max_entries: those stored first are dropped beyond it."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._known: dict[bytes, int] = {}

    async def get(self, keys: Sequence[bytes], /) -> Mapping[bytes, int]:
        """Return the CRC-32s that are known of these keys."""
        return {key: self._known[key] for key in keys if key in self._known}

    async def put(self, known: Mapping[bytes, int], /) -> None:
        """Keep CRC-32s by their keys."""
        self._known |= known
        while len(self._known) > self._max_entries:
            del self._known[next(iter(self._known))]


class SQLiteChecksums:
    """Keeps CRC-32s in an SQLite file, for all processes of one machine, and over restarts.

    path: the file, which is created when it is missing. It must be on a local file system. max_entries: those stored
    first are removed beyond it, once a minute.

    A file that cannot be used costs time only: the error is logged, the CRC-32s are computed again, and the file is
    tried again after 10 seconds.
    """

    def __init__(self, path: str | os.PathLike[str], max_entries: int = 10_000_000) -> None:
        self._path = os.fspath(path)
        self._max_entries = max_entries
        self._workers = Workers(4)
        self._trim_at = 0.0
        self._resume_at = {"reading": 0.0, "writing": 0.0}

    async def get(self, keys: Sequence[bytes], /) -> Mapping[bytes, int]:
        """Return the CRC-32s that are known of these keys."""
        return await self._attempt("reading", self._get, keys) or {}

    async def put(self, known: Mapping[bytes, int], /) -> None:
        """Keep CRC-32s by their keys."""
        await self._attempt("writing", self._put, known)

    async def _attempt(self, what: str, function: Callable[[A], T], argument: A) -> T | None:
        """Return what a function returns; None if the file cannot be used, or if that has just failed."""
        if time.monotonic() < self._resume_at[what]:
            return None
        try:
            return await self._workers.run(function, argument)
        except (OSError, sqlite3.Error, SourceUnavailable) as exc:
            self._resume_at[what] = time.monotonic() + _REST_SECONDS
            logger.warning("%s CRC-32s %s %r failed: %s", what, _WHERE[what], self._path, exc)
            return None

    # Each call opens the file anew: a connection belongs to one thread, and this takes less than a millisecond.

    def _get(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        known: dict[bytes, int] = {}
        with closing(self._connection()) as connection:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = keys[start : start + _KEYS_AT_ONCE]
                marks = ", ".join("?" * len(some))
                known.update(connection.execute(f"SELECT key, crc FROM crc32 WHERE key IN ({marks})", some))  # noqa: S608
        return known

    def _put(self, known: Mapping[bytes, int]) -> None:
        now = time.time()
        with closing(self._connection()) as connection, connection:
            connection.executemany(_PUT, [(key, crc, now) for key, crc in known.items()])
            if now >= self._trim_at:
                self._trim_at = now + _TRIMMED_EVERY
                connection.execute(_TRIM, (self._max_entries,))

    def _connection(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            # The file may be lost without harm, so no write waits for the disk.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(_TABLE)
            connection.execute(_INDEX)
        except BaseException:
            connection.close()
            raise
        return connection
