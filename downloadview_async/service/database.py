"""Reads the rows of a database table as objects with a file. No other module needs SQLAlchemy."""

import datetime
import os
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
from sqlalchemy import (
    BigInteger,
    Enum,
    Float,
    Integer,
    MetaData,
    Numeric,
    Select,
    String,
    Table,
    collate,
    func,
    literal,
    null,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, NoSuchTableError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from downloadview_async import ConfigurationError, Entry, FileMissing, SourceUnavailable
from downloadview_async.service.settings import DatabaseUnavailable
from downloadview_async.service.source_settings import ObjectSettings

_BATCH = 500  # rows that one statement of a listing reads
_PATIENCE = 5.0  # seconds that a statement may take


@dataclass(frozen=True, slots=True)
class Document:
    """A row: the name of its file in the source, and the file name and media type for clients."""

    file: str | None
    filename: str | None
    content_type: str | None


class Documents:
    """The rows of one table, which can be read while the context of `opened` lasts.

    Raises `ConfigurationError` for a database URL that no installed driver can open.
    """

    def __init__(self, settings: ObjectSettings, *, directory: Path) -> None:
        self._settings = settings
        try:
            self._engine: AsyncEngine = create_async_engine(_located(make_url(settings.database), directory))
        except ModuleNotFoundError as exc:
            raise ConfigurationError(f"the database needs {exc.name}: install it") from exc
        except (SQLAlchemyError, ValueError) as exc:  # ValueError: a bad port or driver option
            if isinstance(exc, ConfigurationError):
                raise
            raise ConfigurationError(
                f"the database URL cannot be used ({str(exc).partition('(Background')[0].strip()}): give one with an "
                "asynchronous driver, such as sqlite+aiosqlite:///demo.db or postgresql+asyncpg://host/name"
            ) from exc

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Read the columns of the table, and close all connections at the end.

        Raises `ConfigurationError` if the database, the table or a column does not exist, and its subclass
        `DatabaseUnavailable` if the database does not answer.
        """
        try:
            self._table = await self._reflected()
            self._statement = self._select(self._table)
            yield
        finally:
            await self._engine.dispose()

    async def _reflected(self) -> Table:
        schema, _, name = self._settings.table.rpartition(".")
        try:
            async with self._engine.connect() as connection:
                return await connection.run_sync(
                    lambda sync: Table(name, MetaData(), schema=schema or None, autoload_with=sync)
                )
        except NoSuchTableError as exc:
            raise ConfigurationError(
                f"the database has no table {self._settings.table!r}: create it, or correct `table`"
            ) from exc
        except (SQLAlchemyError, OSError) as exc:
            later = isinstance(exc, OperationalError | InterfaceError | OSError)
            raise (DatabaseUnavailable if later else ConfigurationError)(
                f"the database cannot be read ({type(exc).__name__}: {getattr(exc, 'orig', exc)}): create it, start "
                "it, or correct `database`"
            ) from exc

    def _select(self, table: Table) -> Select[Any]:
        settings = self._settings
        for option in ("key", "file", "filename", "content_type", "size", "modified", "parent"):
            column = getattr(settings, option)
            if column is not None and column not in table.c:
                raise ConfigurationError(
                    f"the table {settings.table!r} has no column {column!r}: correct `{option}`, one of "
                    f"{', '.join(table.c.keys())}"
                )
        if settings.parent is not None and not isinstance(table.c[settings.parent].type, String):
            raise ConfigurationError(
                f"the column {settings.parent!r} of {settings.table!r} has no text: `parent` is the path of a folder, "
                "such as reports/2026"
            )
        return self._columns(table, "file", "filename", "content_type").limit(1)

    def _columns(self, table: Table, *options: str) -> Select[Any]:
        """Return a SELECT of the columns that the settings have for these options; NULL where they have none."""
        columns = {option: getattr(self._settings, option) for option in options}
        return select(
            *((null() if column is None else table.c[column]).label(option) for option, column in columns.items())
        )

    async def get(self, key: str) -> Document | None:
        """Return the row for a key, or None. The connection is returned to the pool first.

        key: after the folder of the row and a slash, if the settings have a `parent`.

        Raises `SourceUnavailable` if the database does not answer.
        """
        column = self._table.c[self._settings.key]
        statement = self._statement
        if self._settings.parent is not None:
            folder, slash, key = key.rpartition("/")
            if (slash and not folder) or "\0" in folder or _SURROGATES.search(folder):
                return None
            statement = statement.where(func.coalesce(self._table.c[self._settings.parent], "") == folder)
        value = key_as(column.type, key)
        if value is None:
            return None
        rows = await self._rows(statement.where(column == literal(value, _comparable(column.type))))
        return Document(*(None if value is None else str(value) for value in rows[0])) if rows else None

    async def list_folder(self, folder: str) -> AsyncIterator[Entry]:
        """Yield the rows whose keys begin with that of a folder, and the folders below it: see `SupportsListing`.

        The rows are read in the order of their keys, `_BATCH` at a time. SQLite skips those in the folders below;
        other databases, whose order of text may be any, read them, too. A row without a file is left out.

        With a `parent`, they are the rows and the folders in which that column puts them.

        Raises `FileMissing`, `SourceUnavailable`.
        """
        if self._settings.parent is not None:
            async with aclosing(self._children(folder, self._table.c[self._settings.parent])) as entries:
                async for entry in entries:
                    yield entry
            return
        column = self._table.c[self._settings.key]
        prefix = folder and f"{folder}/"
        is_text = isinstance(column.type, String)
        skips = is_text and self._engine.dialect.name == "sqlite"
        ordered = collate(column, "BINARY") if skips else column
        selected = self._columns(self._table, "key", "file", "size", "modified", "content_type")
        selected = selected.where(column.is_not(None)).order_by(ordered).limit(_BATCH)
        if prefix:
            if not is_text:
                raise FileMissing(f"there is no row below {prefix!r}")
            is_below = ordered.between(prefix, f"{folder}0") if skips else column.startswith(prefix, autoescape=True)
            selected = selected.where(is_below)  # 0 comes after the slash
        folders: set[str] = set()
        is_empty = True
        batch = await self._rows(selected)
        while batch:
            for row in batch:
                key = text_of(column.type, row.key)
                if key is None or not key.startswith(prefix):  # LIKE may ignore case
                    continue
                is_empty = False
                name, slash, _ = key[len(prefix) :].partition("/")
                if not row.file:
                    continue
                if not slash:
                    yield Entry(name, False, *_described(row))
                elif name not in folders:
                    folders.add(name)
                    yield Entry(name, is_folder=True)
            last = batch[-1].key
            inner, slash, _ = last[len(prefix) :].partition("/") if skips else ("", "", "")
            following = ordered >= f"{prefix}{inner}0" if slash else ordered > last
            batch = await self._rows(selected.where(following)) if len(batch) == _BATCH else []
        if is_empty and prefix:
            raise FileMissing(f"there is no row below {prefix!r}")

    async def _children(self, folder: str, parent: Any) -> AsyncGenerator[Entry, None]:
        key = self._table.c[self._settings.key]
        is_empty = True
        selected = self._columns(self._table, "key", "file", "size", "modified", "content_type")
        selected = selected.where(func.coalesce(parent, "") == folder, key.is_not(None)).order_by(key).limit(_BATCH)
        batch = await self._rows(selected)
        while batch:
            is_empty = False
            for row in batch:
                name = text_of(key.type, row.key)
                if name is not None and row.file and "/" not in name:
                    yield Entry(name, False, *_described(row))
            batch = await self._rows(selected.where(key > batch[-1].key)) if len(batch) == _BATCH else []
        prefix = folder and f"{folder}/"
        below = select(parent.label("parent")).distinct().where(parent != "").order_by(parent).limit(_BATCH)
        if prefix:
            below = below.where(parent.startswith(prefix, autoescape=True))
        folders: set[str] = set()
        batch = await self._rows(below)
        while batch:
            for row in batch:
                below_here = row.parent[len(prefix) :].split("/")
                name = below_here[0]
                if not all(below_here):
                    continue  # such as `a//b` or `a/`, which no URL of a folder stands for
                if row.parent.startswith(prefix) and name not in folders:  # LIKE may ignore case
                    is_empty = False
                    folders.add(name)
                    yield Entry(name, is_folder=True)
            batch = await self._rows(below.where(parent > batch[-1].parent)) if len(batch) == _BATCH else []
        if is_empty and folder:
            raise FileMissing(f"there is no row in {folder!r}")

    async def check(self) -> None:
        """Read one row of the table. Raises `SourceUnavailable` if that fails."""
        await self._rows(self._statement)  # SQLite would answer SELECT 1 without reading the file

    async def _rows(self, statement: Any) -> Sequence[Any]:
        try:
            with anyio.fail_after(_PATIENCE):
                async with self._engine.connect() as connection:
                    return (await connection.execute(statement)).all()
        except TimeoutError as exc:
            raise SourceUnavailable(f"the database has not answered in {_PATIENCE:g} seconds") from exc
        except (SQLAlchemyError, OSError, ValueError) as exc:  # ValueError: an invalid time
            raise SourceUnavailable(f"the database failed: {type(exc).__name__}: {exc}") from exc


def _located(url: URL, directory: Path) -> URL:
    """Return the URL; for SQLite, with an absolute path and read-only mode.

    Raises `ConfigurationError` for an SQLite file that cannot be read: the message of SQLite is less clear.
    """
    name = url.database
    if url.get_backend_name() != "sqlite" or name in (None, "", ":memory:") or name.startswith("file:"):
        return url
    path = directory / name
    try:
        path.open("rb").close()
    except OSError as exc:
        raise ConfigurationError(
            f"the database {str(path)!r} cannot be read ({exc.strerror}): create it, or correct `database`"
        ) from exc
    return url.set(database=f"file:{quote(os.fsencode(path))}").update_query_dict({"mode": "ro", "uri": "true"})


def _comparable(kind: Any) -> Any:
    """Return the SQL type for a key: a number too large for the column must match no row, not raise an error."""
    match kind:
        case Integer():
            return BigInteger()
        case Float():
            return kind
        case Numeric():
            return Numeric()
    return kind


def _described(row: Any) -> tuple[int | None, datetime.datetime | None, str | None]:
    """Return the size, the time and the media type of a row, without values of other types."""
    modified = row.modified
    if isinstance(modified, int | float | Decimal):
        try:
            modified = datetime.datetime.fromtimestamp(float(modified), datetime.UTC)
        except (OSError, OverflowError, ValueError):
            modified = None
    elif isinstance(modified, str):  # SQLite has no type for times
        try:
            modified = datetime.datetime.fromisoformat(modified)
            modified = modified.astimezone(datetime.UTC) if modified.tzinfo else modified
        except (OverflowError, ValueError):
            modified = None
    if isinstance(modified, datetime.datetime):
        modified = modified if modified.tzinfo else modified.replace(tzinfo=datetime.UTC)
    else:
        modified = None
    size = int(row.size) if isinstance(row.size, int | Decimal) and row.size >= 0 else None
    return size, modified, row.content_type if isinstance(row.content_type, str) else None


_SURROGATES = re.compile("[\ud800-\udfff]")
# How each type is written in a URL: each value in one way only, which every driver accepts.
_INTEGER = "-?[0-9]{1,18}"
_NUMBER = r"-?[0-9]{1,30}(\.[0-9]{1,30})?"
_DAY = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{6})?(Z|[+-][0-9]{2}:[0-9]{2})?"
_READERS: Mapping[type, tuple[str, Callable[[str], Any]]] = {
    int: (_INTEGER, int),
    float: (_NUMBER, float),
    Decimal: (_NUMBER, Decimal),
    bool: ("true|false", lambda key: key == "true"),
    datetime.date: (_DAY, datetime.date.fromisoformat),
    datetime.time: (_CLOCK, datetime.time.fromisoformat),
    datetime.datetime: (f"{_DAY}T{_CLOCK}", datetime.datetime.fromisoformat),
    uuid.UUID: ("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", uuid.UUID),
}


def key_as(kind: Any, key: str) -> Any:
    """Return a key from a URL as a value of the column's type, or None if no row can have it."""
    try:
        python_type = kind.python_type
    except NotImplementedError:
        python_type = str
    if python_type in (str, object):  # object: a type unknown to SQLAlchemy
        possible = key in kind.enums if isinstance(kind, Enum) else "\0" not in key and not _SURROGATES.search(key)
        return key if possible else None
    pattern, read = _READERS.get(python_type, (None, str))
    if pattern is None or not re.fullmatch(pattern, key):
        return None
    try:
        value = read(key)
    except ValueError:  # such as February 30
        return None
    if isinstance(value, datetime.datetime | datetime.time) and (value.tzinfo is not None) != kind.timezone:
        return None
    return value


def text_of(kind: Any, value: Any) -> str | None:
    """Return the key in a URL for a value of a column, or None if there is none."""
    text = ("true" if value else "false") if isinstance(value, bool) else str(value)
    return text if key_as(kind, text) == value else None
