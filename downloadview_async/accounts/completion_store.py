"""`CompletionStore`: parts of downloads, and how many were completed, in a database that processes share."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from downloadview_async.accounts.completion import Delivered, Session, Span, Whole, digest_of, stored
from downloadview_async.accounts.proxy_log import LogLine
from downloadview_async.errors import ConfigurationError
from downloadview_async.sources.per_loop import PerLoop
from downloadview_async.sources.sqlite_file import check_place

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

By = Literal["file", "route", "user", "client", "link", "day"]
"""By what a report counts."""

_BUSY_SECONDS = 5.0
_LOCK = 0x646F776E6C6F6164  # of the transactions that write to PostgreSQL; any number that no other program uses
_PASSING = ("database is locked", "database or disk is full", "disk I/O error")  # of the messages of SQLite
_WRONG_STATES = ("28", "3D", "42")  # of PostgreSQL: wrong password, no such database, not permitted
_MANY = 500  # values in one statement
_TRIM_SECONDS = 600.0
_DAY = 86_400.0
_WRITES = "downloadview_writes"
_PLACE = ("path", "device", "inode", "offset", "head", "time")
_LINE = ("request_id", "status", "sent", "content_range", "requested", "is_cut", "object_size")

_COUNTS = ("downloads", "answers", "bytes")
Counts = tuple[int, int, int]
"""Completed downloads, answers, and bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a log of a proxy was read up to.

    path: of the log, or of the directory of logs. device, inode: of the file, which another process may have renamed.
    offset: bytes. head: the digest of its first bytes, by which a new file with the same inode is known. time: when it
    was read, in seconds since 1970 UTC.
    """

    path: str
    device: int
    inode: int
    offset: int
    head: str
    time: float


@dataclass(slots=True)
class Batch:
    """The rows that are written in one transaction.

    writer: identifies the writer. number: of the batch among those of the writer, in their order. If a batch with this
    number or a higher one has been written, it is not written again: a connection may end between a transaction and the
    answer to it.
    """

    writer: str = ""
    number: int = 0
    parts: list[Delivered] = field(default_factory=list)
    delegated: list[Delivered] = field(default_factory=list)
    totals: dict[tuple[str, ...], Counts] = field(default_factory=dict)
    clients: dict[tuple[str, ...], Counts] = field(default_factory=dict)

    def add(self, delivered: Delivered) -> None:
        """Add what an answer has delivered."""
        if delivered.by:
            self.delegated.append(delivered)
        elif delivered.is_whole or not (delivered.spans or delivered.loose):
            self.count(delivered, int(delivered.is_whole))
        else:
            self.parts.append(delivered)

    def add_whole(self, key: Whole, answers: int, sent: int) -> None:
        """Count answers that have delivered a whole file each."""
        day, *texts = key
        source, file, route, user, link, client = (stored(text or "") for text in texts)
        self._count((day_of(day * _DAY), source, file, route, user, link), client, (answers, answers, sent))

    def count(self, delivered: Delivered, downloads: int) -> None:
        """Count one answer, and the downloads that it completes."""
        one = delivered
        key = day_of(one.time), one.source, one.file, one.route, one.user, one.link
        self._count(key, one.client, (downloads, 1, one.sent))

    def _count(self, key: tuple[str, ...], client: str, counts: Counts) -> None:
        for counted, by in ((self.totals, key), (self.clients, (key[0], client))):
            before = counted.get(by, (0, 0, 0))
            counted[by] = before[0] + counts[0], before[1] + counts[1], before[2] + counts[2]


class CompletionStore:
    """Sessions and totals in an SQLite file or a PostgreSQL database, which several processes and machines share.

        store = CompletionStore("sqlite+aiosqlite:///accounts.db")

    url: an SQLAlchemy URL with an asynchronous driver: sqlite+aiosqlite or postgresql+asyncpg. The tables are created
    when they are missing; their names begin with `downloadview_`.
    directory: where the path of an SQLite file begins; by default, the current directory.
    min_share: the share of a file that makes a download, more than 0 and at most 1.
    keep: how long the totals of a day are kept. An unfinished download, and one whose proxy has not logged it, is kept
    for a week after its last answer, or for `keep`, if that is shorter.
    max_rows: of each table; the oldest are removed first.

    Raises `ConfigurationError` for a URL that cannot be used, a missing driver, and options out of bounds.
    """

    def __init__(
        self,
        url: str,
        *,
        directory: str | os.PathLike[str] = ".",
        min_share: float = 1.0,
        keep: timedelta = timedelta(days=400),
        max_rows: int = 1_000_000,
    ) -> None:
        if not 0 < min_share <= 1:
            raise ConfigurationError(f"min_share is {min_share!r}: give a number above 0, and at most 1")
        if keep <= timedelta() or max_rows < 1:
            raise ConfigurationError("keep and max_rows have to be more than 0")
        try:
            import sqlalchemy
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                f"a CompletionStore needs {exc.name}: install downloadview_async with its extra `sqlalchemy`"
            ) from exc
        try:
            self._url = sqlalchemy.make_url(url)
            self._dialect = self._url.get_backend_name()
            self._url.get_dialect().import_dbapi()
        except ModuleNotFoundError as exc:
            raise ConfigurationError(f"the database needs {exc.name}: install it") from exc
        except (sqlalchemy.exc.SQLAlchemyError, ValueError) as exc:
            raise ConfigurationError(f"the database URL cannot be used ({exc}): correct it") from exc
        if self._dialect not in ("sqlite", "postgresql") or not self._url.get_dialect().is_async:
            raise ConfigurationError(
                "the database URL has to name SQLite or PostgreSQL and an asynchronous driver, such as "
                "sqlite+aiosqlite:///accounts.db or postgresql+asyncpg://host/name"
            )
        if self._dialect == "sqlite" and self._url.database in (None, "", ":memory:"):
            raise ConfigurationError("an SQLite database has to be a file, such as sqlite+aiosqlite:///accounts.db")
        if self._dialect == "sqlite":
            self._url = self._url.set(database=os.path.abspath(os.path.join(directory, self._url.database or "")))
        self.min_share = min_share
        self.keep = keep
        self.max_rows = max_rows
        self._tables = _Tables()
        self._engines: PerLoop[AsyncEngine] = PerLoop()
        self._is_created = False
        self._trimmed_at = -_TRIM_SECONDS

    def may_recover(self, error: ConfigurationError) -> bool:
        """Return whether what `check` has raised may go away: the database does not answer, is locked, or is full."""
        cause = error.__cause__
        if self._is_sqlite:
            return any(text in str(cause) for text in _PASSING)
        state = getattr(getattr(cause, "orig", cause), "sqlstate", None) or ""
        return not state.startswith(_WRONG_STATES)

    async def check(self) -> None:
        """Open the database, and create the tables that are missing. Raises `ConfigurationError`."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                async with self._writing():
                    return
            except Exception as exc:  # whatever the driver raises
                # SQLite does not wait for another process that begins to use the write-ahead log
                if not self._is_sqlite or "locked" not in str(exc) or time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"the database cannot be used ({_reason(exc)}): start it, create it, or correct the URL"
                    ) from exc
            await asyncio.sleep(0.02)

    async def write(self, batch: Batch) -> None:
        """Write a batch in one transaction. Raises what the database raises: write the same batch again then."""
        async with self._writing() as connection:
            if not batch.writer or await self._is_next(connection, batch):
                await self._write(connection, batch)

    async def close_delegated(
        self, lines: Iterable[LogLine], place: Place | None = None, *, keeps_unknown: bool = True
    ) -> set[str]:
        """Count what a proxy has sent of delegated answers, each once, and return the ids of those that were known.

        place: up to where the log has been read then. It is kept in the same transaction.
        keeps_unknown: keep a line for a day if its answer is not known yet, because the process that has delegated it
        may be slower than the proxy. It counts as soon as that process has written the answer.
        """
        # S3 logs each request of a client that asks it for several parts: the longest counts.
        by_id = {line.request_id: line for line in sorted(lines, key=lambda line: line.sent)}
        pending, early = self._tables.delegated, self._tables.lines
        closed: set[str] = set()
        async with self._writing() as connection:
            batch = Batch()
            for ids in _parts_of([*by_id], _MANY):
                rows = await connection.execute(pending.select().where(pending.c.request_id.in_(ids)))
                for row in rows.mappings():
                    delivered = Delivered(**row)
                    closed.add(delivered.request_id)
                    if (sent := by_id[delivered.request_id].closing(delivered)) is not None:
                        batch.add(sent)
                await connection.execute(pending.delete().where(pending.c.request_id.in_(ids)))
            unknown = [line for line in by_id.values() if line.has_file and line.request_id not in closed]
            if unknown and keeps_unknown:
                insert, now = self._insert(early).on_conflict_do_nothing(), time.time()
                kept = [{"time": now, **{name: getattr(line, name) for name in _LINE}} for line in unknown]
                await connection.execute(insert, kept)
            await self._write(connection, batch)
            if place is not None:
                await self._keep_place(connection, place)
        return closed

    async def places(self, path: str) -> list[Place]:
        """Return the place up to which each file of a log was read."""
        table = self._tables.places
        columns = [table.c[name] for name in _PLACE]
        async with self._reading() as connection:
            rows = await connection.execute(_select(*columns).where(table.c.path == path).order_by(table.c.time))
            return [Place(**row) for row in rows.mappings()]

    async def report(
        self, by: By | Sequence[By], *, since: timedelta | None = None, top: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the completed downloads, the answers and the bytes by something, the most downloads first.

        by: one, or several, such as ("user", "file") for the files of each user. Clients are counted by day alone.
        since: of the last time, by whole days (UTC). top: how many rows. Each row has a key for each of `by`, and
        `downloads`, `answers` and `bytes`. Days are in their order, the last one first.

        Raises `ConfigurationError` for clients by anything but the day.
        """
        from sqlalchemy import func

        units = (by,) if isinstance(by, str) else tuple(by)
        table = self._tables.clients if "client" in units else self._tables.totals
        if "client" in units and not {"client", "day"}.issuperset(units):
            raise ConfigurationError("clients are counted alone, or by day: leave out the others, or client")
        keys = [table.c[name] for unit in units for name in (("source", "file") if unit == "file" else (unit,))]
        sums = [func.sum(table.c[name]).label(name) for name in _COUNTS]
        selected = _select(*keys, *sums).group_by(*keys)
        if since is not None:
            selected = selected.where(table.c.day >= day_of(time.time() - since.total_seconds()))
        for unit in {"user", "link"}.intersection(units):
            selected = selected.where(table.c[unit] != "")
        days = [table.c.day.desc()] if "day" in units else []
        order = [*days, sums[0].desc(), sums[2].desc(), *keys]
        async with self._reading() as connection:
            rows = (await connection.execute(selected.order_by(*order).limit(top))).mappings().all()
        return [
            {
                **{unit: _file_of(row["source"], row["file"]) if unit == "file" else row[unit] for unit in units},
                **{name: int(row[name]) for name in _COUNTS},
            }
            for row in rows
        ]

    async def downloads_of(self, source: str, files: Sequence[str]) -> dict[str, int]:
        """Return how often each of some files of a source was downloaded, without those that never were."""
        from sqlalchemy import func

        table = self._tables.totals
        names = {_file_id(stored(source), stored(file)): file for file in files}
        counts: dict[str, int] = {}
        async with self._reading() as connection:
            for ids in _parts_of([*names], _MANY):
                selected = _select(table.c.file_id, func.sum(table.c.downloads)).group_by(table.c.file_id)
                rows = await connection.execute(selected.where(table.c.file_id.in_(ids)))
                counts |= {names[file_id]: int(count) for file_id, count in rows if count}
        return counts

    async def trim(self) -> None:
        """Remove rows that are too old, and the oldest if a table has too many. `write` does so every 10 minutes."""
        async with self._writing() as connection:
            await self._trim(connection)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if (engine := self._engines.get(loop)) is not None:
            self._engines.drop(loop)
            await engine.dispose()

    async def _write(self, connection: "AsyncConnection", batch: Batch) -> None:
        tables = self._tables
        await self._close_known(connection, batch)
        await self._write_parts(connection, batch)
        if batch.delegated:
            rows = [_row(one, tables.delegated) for one in batch.delegated]
            insert = self._insert(tables.delegated).on_conflict_do_nothing()
            await connection.execute(insert, rows)
        for table, names, counted in (
            (tables.totals, ("day", "source", "file", "route", "user", "link"), batch.totals),
            (tables.clients, ("day", "client"), batch.clients),
        ):
            if not counted:
                continue
            insert = self._insert(table)
            insert = insert.on_conflict_do_update(
                index_elements=[table.c.id],
                set_={name: table.c[name] + insert.excluded[name] for name in _COUNTS},
            )
            await connection.execute(
                insert,
                [
                    {
                        "id": digest_of(*key),
                        **dict(zip(names, key, strict=True)),
                        **({"file_id": _file_id(*key[1:3])} if table is tables.totals else {}),
                        **dict(zip(_COUNTS, counts, strict=True)),
                    }
                    for key, counts in sorted(counted.items())
                ],
            )
        if time.monotonic() - self._trimmed_at > _TRIM_SECONDS:
            self._trimmed_at = time.monotonic()
            await self._trim(connection)

    async def _is_next(self, connection: "AsyncConnection", batch: Batch) -> bool:
        """Note the number of a batch of a writer, and return whether it is a new one."""
        table = self._tables.writers
        number = await connection.scalar(_select(table.c.number).where(table.c.writer == batch.writer))
        if number is not None and number >= batch.number:
            return False
        insert = self._insert(table)
        row = {"writer": batch.writer, "time": time.time(), "number": batch.number}
        changed = {name: insert.excluded[name] for name in ("time", "number")}
        await connection.execute(insert.on_conflict_do_update(index_elements=[table.c.writer], set_=changed), row)
        return True

    async def _close_known(self, connection: "AsyncConnection", batch: Batch) -> None:
        """Count those delegated answers of a batch whose lines have been read before, instead of keeping them."""
        early = self._tables.lines
        by_id = {delegated.request_id: delegated for delegated in batch.delegated}
        for ids in _parts_of([*by_id], _MANY):
            rows = (await connection.execute(early.select().where(early.c.request_id.in_(ids)))).mappings().all()
            for row in rows:
                line = LogLine(**{name: row[name] for name in _LINE})
                if (sent := line.closing(by_id.pop(line.request_id))) is not None:
                    batch.add(sent)
            if rows:
                await connection.execute(early.delete().where(early.c.request_id.in_(ids)))
        batch.delegated = [*by_id.values()]

    async def _write_parts(self, connection: "AsyncConnection", batch: Batch) -> None:
        table = self._tables.sessions
        sessions: dict[str, Session] = {}
        for ids in _parts_of(list({part.session for part in batch.parts}), _MANY):
            rows = await connection.execute(table.select().where(table.c.session.in_(ids)))
            sessions |= {row.session: _session_of(row) for row in rows}
        known = {*sessions}
        times: dict[str, float] = {}
        for part in batch.parts:
            assert part.size
            before = sessions.get(part.session, Session())
            downloads, after = before.after(part.spans, part.size, self.min_share, loose=part.loose)
            sessions[part.session] = after
            if part.spans or downloads:
                batch.count(part, downloads)
            times[part.session] = max(part.time, times.get(part.session, 0))
        kept = [
            {
                "session": one,
                "time": times[one],
                "counted": session.counted,
                "layers": json.dumps(session.layers),
                "loose": json.dumps(session.loose),
            }
            for one, session in sessions.items()
            if session.layers or session.loose
        ]
        ended = known.difference(row["session"] for row in kept)
        for ids in _parts_of([*ended], _MANY):
            await connection.execute(table.delete().where(table.c.session.in_(ids)))
        if kept:
            insert = self._insert(table)
            columns = ("time", "counted", "layers", "loose")
            await connection.execute(
                insert.on_conflict_do_update(
                    index_elements=[table.c.session], set_={name: insert.excluded[name] for name in columns}
                ),
                kept,
            )

    async def _keep_place(self, connection: "AsyncConnection", place: Place) -> None:
        table = self._tables.places
        insert = self._insert(table)
        row = {name: getattr(place, name) for name in _PLACE}
        row["id"] = digest_of(place.path, str(place.device), str(place.inode))
        changed = {name: insert.excluded[name] for name in ("offset", "head", "time")}
        await connection.execute(insert.on_conflict_do_update(index_elements=[table.c.id], set_=changed), row)

    async def _trim(self, connection: "AsyncConnection") -> None:
        """Remove rows that are too old or too many."""
        now, tables, keep = time.time(), self._tables, self.keep.total_seconds()
        oldest = now - min(keep, 7 * _DAY)
        for table in (tables.sessions, tables.delegated, tables.places, tables.writers):
            await connection.execute(table.delete().where(table.c.time < oldest))
        await connection.execute(tables.lines.delete().where(tables.lines.c.time < now - _DAY))
        for table in (tables.totals, tables.clients):
            await connection.execute(table.delete().where(table.c.day < day_of(now - keep)))
        for table, age in (
            (tables.sessions, tables.sessions.c.time),
            (tables.delegated, tables.delegated.c.time),
            (tables.lines, tables.lines.c.time),
            (tables.totals, tables.totals.c.day),
            (tables.clients, tables.clients.c.day),
        ):
            (key,) = table.primary_key.columns
            superfluous = _select(key).order_by(age.desc(), key).offset(self.max_rows)
            await connection.execute(table.delete().where(key.in_(superfluous)))

    @property
    def _is_sqlite(self) -> bool:
        return self._dialect == "sqlite"

    def _insert(self, table: Any) -> Any:
        if self._is_sqlite:
            from sqlalchemy.dialects.sqlite import insert

            return insert(table)
        from sqlalchemy.dialects.postgresql import insert as insert_into

        return insert_into(table)

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator["AsyncConnection"]:
        """Give a connection in a transaction. Only one of these runs at a time, so the rows that it reads stay true."""
        from sqlalchemy import text

        if self._is_sqlite and not self._is_created:
            check_place(self._url.database or "")
        async with self._engine().connect() as connection:
            await connection.execution_options(**{_WRITES: True})
            async with connection.begin():
                if not self._is_sqlite:
                    await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
                if not self._is_created:
                    await connection.run_sync(self._tables.metadata.create_all)
                yield connection
        self._is_created = True

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator["AsyncConnection"]:
        if not self._is_created:
            await self.check()
        async with self._engine().connect() as connection:
            yield connection

    def _engine(self) -> "AsyncEngine":
        loop = asyncio.get_running_loop()
        return self._engines.get(loop) or self._engines.set(loop, self._new_engine())

    def _new_engine(self) -> "AsyncEngine":
        from sqlalchemy import event
        from sqlalchemy.ext.asyncio import create_async_engine
        from sqlalchemy.pool import AsyncAdaptedQueuePool  # some versions have another one for SQLite

        options: Mapping[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS}} if self._is_sqlite else {}
        engine = create_async_engine(
            self._url, poolclass=AsyncAdaptedQueuePool, pool_size=2, pool_pre_ping=not self._is_sqlite, **options
        )
        if self._is_sqlite:
            event.listen(engine.sync_engine, "connect", _prepare)
            event.listen(engine.sync_engine, "begin", _begin)
        return engine


class _Tables:
    """The tables."""

    def __init__(self) -> None:
        from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

        self.metadata = MetaData()

        def table(name: str, *columns: Any) -> Any:
            return Table(f"downloadview_{name}", self.metadata, *columns)

        def texts(*names: str) -> list[Any]:
            return [Column(name, Text, nullable=False) for name in names]

        def numbers() -> list[Any]:
            return [Column(name, BigInteger, nullable=False) for name in _COUNTS]

        def moment(name: str) -> list[Any]:
            return [Column("time", Float(53), nullable=False), Index(f"downloadview_{name}_time", "time")]

        self.sessions = table(
            "sessions",
            Column("session", String(32), primary_key=True),
            *moment("sessions"),
            Column("counted", Integer, nullable=False),
            *texts("layers", "loose"),
        )
        self.delegated = table(
            "delegated",
            Column("request_id", String(128), primary_key=True),
            *moment("delegated"),
            *texts("session", "source", "file", "route", "user", "link", "client", "by"),
            Column("size", BigInteger),
        )
        self.lines = table(
            "lines",
            Column("request_id", String(128), primary_key=True),
            *moment("lines"),
            Column("status", Integer, nullable=False),
            Column("sent", BigInteger, nullable=False),
            *texts("content_range", "requested"),
            Column("is_cut", Boolean, nullable=False),
            Column("object_size", BigInteger),
        )
        self.totals = table(
            "totals",
            Column("id", String(32), primary_key=True),
            Column("day", String(10), nullable=False),
            Column("file_id", String(32), nullable=False),  # an index of PostgreSQL cannot have long names
            *texts("source", "file", "route", "user", "link"),
            *numbers(),
            Index("downloadview_totals_day", "day"),
            Index("downloadview_totals_file", "file_id"),
        )
        self.clients = table(
            "clients",
            Column("id", String(32), primary_key=True),
            Column("day", String(10), nullable=False),
            *texts("client"),
            *numbers(),
            Index("downloadview_clients_day", "day"),
        )
        self.places = table(
            "places",
            Column("id", String(32), primary_key=True),
            Column("time", Float(53), nullable=False),
            *texts("path", "head"),
            Column("device", BigInteger, nullable=False),
            Column("inode", BigInteger, nullable=False),
            Column("offset", BigInteger, nullable=False),
        )
        self.writers = table(
            "writers",
            Column("writer", String(32), primary_key=True),
            Column("time", Float(53), nullable=False),
            Column("number", BigInteger, nullable=False),
        )


def day_of(seconds: float) -> str:
    """Return the day (UTC) of a time in seconds since 1970, such as 2026-11-29."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def _file_of(source: str, file: str) -> str:
    """Return a file as a report has it: its source and its name, or the path of the request."""
    return "/".join(filter(None, (source, file)))


def _prepare(connection: Any, record: object) -> None:
    """Prepare a new connection to SQLite: this module begins the transactions, and processes read while one writes."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _begin(connection: Any) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _select(*columns: Any) -> Any:
    from sqlalchemy import select

    return select(*columns)


def _row(delivered: Delivered, table: Any) -> dict[str, Any]:
    return {column.name: getattr(delivered, column.name) for column in table.columns}


def _file_id(source: str, file: str) -> str:
    return digest_of(source, file)


def _session_of(row: Any) -> Session:
    layers = tuple(_spans_of(layer) for layer in json.loads(row.layers))
    return Session(layers, row.counted, _spans_of(json.loads(row.loose)))


def _spans_of(pairs: list[list[int]]) -> tuple[Span, ...]:
    return tuple((start, stop) for start, stop in pairs)


def _parts_of(values: Sequence[str], count: int) -> Iterable[Sequence[str]]:
    return (values[start : start + count] for start in range(0, len(values), count))


def _reason(exc: Exception) -> str:
    return f"{type(exc).__name__}: {getattr(exc, 'orig', exc)}"
