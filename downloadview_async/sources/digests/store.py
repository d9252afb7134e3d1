"""`DigestStore`: the digests of files, kept in an SQLite file that the processes of one machine share."""

import os

from downloadview_async.http.digest import ALGORITHMS, Digests
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.sqlite_file import SQLiteFile

_TABLES = (
    """CREATE TABLE IF NOT EXISTS digests (
        source TEXT NOT NULL, name TEXT NOT NULL, tag TEXT NOT NULL, size INTEGER NOT NULL, algorithm TEXT NOT NULL,
        value BLOB NOT NULL, PRIMARY KEY (source, name, tag, size, algorithm)) WITHOUT ROWID""",
)
_GET = "SELECT algorithm, value FROM digests WHERE source = ? AND name = ? AND tag = ? AND size = ?"
_PUT = "INSERT OR REPLACE INTO digests (source, name, tag, size, algorithm, value) VALUES (?, ?, ?, ?, ?, ?)"
_FORGET = "DELETE FROM digests WHERE source = ? AND name = ? AND NOT (tag = ? AND size = ?)"


class DigestStore:
    """Keeps the digests of one version of each file: the version that was hashed last.

    path: the file, which is created when it is missing. It must be on a local file system. Needs the package aiosqlite.

    Raises `ConfigurationError` if aiosqlite is missing, and later if the file is of a newer version of this library.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SQLiteFile(path, tables=_TABLES, version=1, user="DigestStore")

    async def get(self, source: str, name: str, version: FileMetadata) -> Digests:
        """Return what is known of a version, which has a strong entity tag and a size. Raises `sqlite3.Error`."""
        rows = dict(await self._file.rows(_GET, *_key(source, name, version)))
        return tuple((algorithm, rows[algorithm]) for algorithm in ALGORITHMS if algorithm in rows)

    async def put(self, source: str, name: str, version: FileMetadata, digests: Digests) -> None:
        """Keep digests of a version, and forget those of other versions. Raises `sqlite3.Error`."""
        key = _key(source, name, version)
        for algorithm, value in digests:
            await self._file.rows(_PUT, *key, algorithm, value)
        await self._file.rows(_FORGET, *key)

    async def aclose(self) -> None:
        """Close the connection of the running event loop."""
        await self._file.aclose()


def _key(source: str, name: str, version: FileMetadata) -> tuple[str, str, str, int]:
    assert version.etag is not None
    assert version.size is not None
    return source, name, version.etag.value, version.size
