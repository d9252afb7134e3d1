"""Creates the demo's generated content, at the first start or by `python -m app.demo`: a large file and a database."""

import contextlib
import hashlib
import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from downloadview_async import ConfigurationError

HERE = Path(__file__).parent
LARGE_SIZE = 24 * 1024 * 1024  # bytes
_BLOCK = 1024 * 1024

DOCUMENTS = [
    # key, path, title, content_type
    ("greeting", "hello.txt", "A greeting.txt", "text/plain"),
    ("report", "report.pdf", "Annual report.pdf", "application/pdf"),
    ("picture", "picture.png", "Colours.png", "image/png"),
    ("menu", "naïve café.txt", "Menu of the naïve café.txt", "text/plain"),
    ("sources", "archive.tar.gz", "Sources.tar.gz", "application/gzip"),
    ("draft", "", "Draft.txt", "text/plain"),  # has no file yet: 404
]


def make(directory: Path = HERE) -> None:
    """Create `files/large.bin` and `demo.db` in a directory, atomically, unless they exist with the right content.

    Raises `ConfigurationError` if they cannot be written.
    """
    large, database = directory / "files" / "large.bin", directory / "demo.db"
    try:
        if not large.exists() or large.stat().st_size != LARGE_SIZE:
            with _replacing(large) as temporary, temporary.open("wb") as file:
                for number in range(LARGE_SIZE // _BLOCK):
                    file.write(hashlib.shake_128(b"large.bin %d" % number).digest(_BLOCK))
        if not database.exists() or _documents(database) != DOCUMENTS:
            with _replacing(database) as temporary:
                _write_documents(temporary)
    except OSError as exc:
        raise ConfigurationError(
            f"the demo's content cannot be created: {exc}: make the directory writable, or run python -m app.demo as a "
            "user who may write to it"
        ) from exc


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file, which replaces `path` if the block succeeds."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # the proxy runs as another user
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _documents(database: Path) -> list[tuple[str, ...]] | None:
    try:
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT key, path, title, content_type FROM documents ORDER BY rowid").fetchall()
    except sqlite3.Error:
        return None


def _write_documents(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute(
            "CREATE TABLE documents (key TEXT PRIMARY KEY, path TEXT NOT NULL, title TEXT NOT NULL, "
            "content_type TEXT NOT NULL)"
        )
        connection.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", DOCUMENTS)
        connection.commit()


if __name__ == "__main__":
    try:
        make()
    except ConfigurationError as exc:
        sys.exit(f"app.demo: {exc}")
