"""`SharedFacts`: digests and CRC-32s of files in Redis or PostgreSQL, for the services of several machines.

Any of them may be forgotten: the file is then read again. A key has the kind of a fact, the version of this format and
a digest of the version of a file, so an entry of another format, or of a file that has changed, is never read.
"""

import asyncio
import base64
import contextlib
import hashlib
import importlib.util
import json
import logging
import re
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import anyio

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.digest import ALGORITHMS, Digests
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.sources.per_loop import PerLoop

logger = logging.getLogger("downloadview_async")

T = TypeVar("T")
Kind = Literal["digest", "crc32"]

FACT_SECONDS = 365 * 86_400
"""Seconds after which an entry expires that nobody has asked for."""

_VERSION = 1  # of the keys and values
_PATIENCE = 5.0  # seconds
_REST_SECONDS = 10.0  # without a call after one has failed
_MANY = 500  # keys in one call
_CRC32 = re.compile("[0-9]{1,10}")
_LOCK = 0x6661637473  # of the transaction that creates the table: PostgreSQL fails if two do so at once
_TABLE = (
    "CREATE TABLE IF NOT EXISTS downloadview_facts"
    " (key TEXT PRIMARY KEY, value TEXT NOT NULL, until DOUBLE PRECISION NOT NULL)",
    "CREATE INDEX IF NOT EXISTS downloadview_facts_until ON downloadview_facts (until)",
)
# All statements lock rows in the order of their keys, or wait for none: else two of them could wait for each other.
_GET = (
    "WITH known AS (SELECT key FROM downloadview_facts WHERE key = ANY(:keys) AND until > :now"
    ' ORDER BY key COLLATE "C" FOR UPDATE)'
    " UPDATE downloadview_facts AS facts SET until = :until FROM known WHERE facts.key = known.key"
    " RETURNING facts.key, facts.value"
)
_PUT = (
    "INSERT INTO downloadview_facts (key, value, until) VALUES (:key, :value, :until)"
    " ON CONFLICT (key) DO UPDATE SET value = excluded.value, until = excluded.until"
)
_TRIM = (
    "DELETE FROM downloadview_facts WHERE key IN"
    " (SELECT key FROM downloadview_facts WHERE until <= :now FOR UPDATE SKIP LOCKED)"
)


class SharedFacts:
    """Keeps texts by their keys in Redis, Valkey or PostgreSQL, for a year after their last use.

    url: such as `redis://127.0.0.1:6379/0`, or `postgresql+asyncpg://host/name`, whose table is created when it is
    missing. prefix: the beginning of all keys, for applications that share a database.

    Raises `ConfigurationError` for another URL, and for a missing package.
    """

    def __init__(self, url: str, *, prefix: str = "downloadview") -> None:
        scheme = url.partition(":")[0] if isinstance(url, str) else ""
        self._is_redis = scheme in ("redis", "rediss", "unix")
        if not self._is_redis and scheme != "postgresql+asyncpg":
            # the URL may have a password, so it is not shown
            raise ConfigurationError(
                "there is no such store: give redis://HOST:PORT/NUMBER or postgresql+asyncpg://..."
            )
        for package in ("redis",) if self._is_redis else ("sqlalchemy", "asyncpg"):
            if importlib.util.find_spec(package) is None:
                raise ConfigurationError(f"the store needs {package}: install it")
        self._url = url
        self._prefix = f"{prefix}:facts:{_VERSION}:"
        self._clients: PerLoop[Any] = PerLoop()
        self._is_created = False

    async def get(self, kind: Kind, keys: Sequence[bytes]) -> dict[bytes, str]:
        """Return the values that are known. Raises `OSError` if the store fails."""
        known: dict[bytes, str] = {}
        for start in range(0, len(keys), _MANY):
            some = {self._key(kind, key): key for key in keys[start : start + _MANY]}
            with _failing():
                values = await _in_time(self._get_redis([*some]) if self._is_redis else self._get_sql([*some]))
            known |= {some[name]: value for name, value in values.items()}
        return known

    async def put(self, kind: Kind, values: Mapping[bytes, str]) -> None:
        """Keep values by their keys. Raises `OSError` if the store fails."""
        named = [(self._key(kind, key), value) for key, value in values.items()]
        for start in range(0, len(named), _MANY):
            some = named[start : start + _MANY]
            with _failing():
                await _in_time(self._put_redis(some) if self._is_redis else self._put_sql(some))

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if (client := self._clients.get(loop)) is not None:
            self._clients.drop(loop)
            await (client.aclose() if self._is_redis else client.dispose())

    def _key(self, kind: Kind, key: bytes) -> str:
        return f"{self._prefix}{kind}:{key.hex()}"

    async def _get_redis(self, names: list[str]) -> dict[str, str]:
        pipeline = self._client().pipeline(transaction=False)
        for name in names:
            pipeline.getex(name, ex=FACT_SECONDS)
        values = await pipeline.execute()
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}

    async def _put_redis(self, some: Sequence[tuple[str, str]]) -> None:
        pipeline = self._client().pipeline(transaction=False)
        for name, value in some:
            pipeline.set(name, value, ex=FACT_SECONDS)
        await pipeline.execute()

    async def _get_sql(self, names: list[str]) -> dict[str, str]:
        now = time.time()
        values = {"until": now + FACT_SECONDS, "keys": names, "now": now}
        return dict(await self._execute(_GET, values))

    async def _put_sql(self, some: Sequence[tuple[str, str]]) -> None:
        now = time.time()
        rows = [{"key": name, "value": value, "until": now + FACT_SECONDS} for name, value in sorted(some)]
        await self._execute(_PUT, rows)
        await self._execute(_TRIM, {"now": now})

    async def _execute(self, statement: str, values: Any) -> list[tuple[str, str]]:
        from sqlalchemy import text

        async with self._client().begin() as connection:
            if not self._is_created:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
                for part in _TABLE:
                    await connection.execute(text(part))
            rows = await connection.execute(text(statement), values)
            pairs = [(row[0], row[1]) for row in rows] if rows.returns_rows else []
        self._is_created = True
        return pairs

    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        if (client := self._clients.get(loop)) is not None:
            return client
        if self._is_redis:
            from redis import asyncio as redis

            return self._clients.set(loop, redis.Redis.from_url(self._url, decode_responses=True))
        from sqlalchemy.ext.asyncio import create_async_engine

        return self._clients.set(loop, create_async_engine(self._url, pool_size=2, pool_pre_ping=True))


class SharedDigests:
    """Keeps the digests of files for `Digests`, for any number of machines. facts: where."""

    def __init__(self, facts: SharedFacts) -> None:
        self._facts = facts

    async def get(self, source: str, name: str, version: FileMetadata) -> Digests:
        """Return the digests that are known of a version with a strong entity tag. Raises `OSError`."""
        key = _key_of(source, name, version)
        text = (await self._facts.get("digest", [key])).get(key)
        try:
            known: dict[str, str] = {} if text is None else json.loads(text)
            return tuple((one, base64.b64decode(known[one], validate=True)) for one in ALGORITHMS if one in known)
        except (ValueError, TypeError):  # something else has written it
            return ()

    async def put(self, source: str, name: str, version: FileMetadata, digests: Digests) -> None:
        """Keep digests of a version. Raises `OSError`."""
        values = {algorithm: base64.b64encode(value).decode() for algorithm, value in digests}
        await self._facts.put("digest", {_key_of(source, name, version): json.dumps(values)})

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._facts.aclose()


class SharedChecksums:
    """Keeps the CRC-32s of files for archives, for any number of machines. facts: where.

    A store that fails costs time only: the error is logged, the CRC-32s are computed again, and the store is tried
    again after 10 seconds.
    """

    def __init__(self, facts: SharedFacts) -> None:
        self._facts = facts
        self._resume_at = 0.0

    async def get(self, keys: Sequence[bytes], /) -> Mapping[bytes, int]:
        """Return the CRC-32s that are known of these keys."""
        if time.monotonic() >= self._resume_at:
            try:
                values = await self._facts.get("crc32", keys)
            except OSError as exc:
                self._rest(exc)
            else:
                return {key: int(value) for key, value in values.items() if _CRC32.fullmatch(value)}
        return {}

    async def put(self, known: Mapping[bytes, int], /) -> None:
        """Keep CRC-32s by their keys."""
        if time.monotonic() >= self._resume_at:
            try:
                await self._facts.put("crc32", {key: str(value) for key, value in known.items()})
            except OSError as exc:
                self._rest(exc)

    def _rest(self, exc: OSError) -> None:
        self._resume_at = time.monotonic() + _REST_SECONDS
        logger.warning("the store of CRC-32s has failed: %s", exc)


async def _in_time(call: Awaitable[T]) -> T:
    with anyio.fail_after(_PATIENCE):
        return await call


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Raise an `OSError` for whatever a library raises."""
    try:
        yield
    except Exception as exc:
        reason = str(getattr(exc, "orig", exc)) or f"no answer in {_PATIENCE:g} seconds"
        raise OSError(f"{type(exc).__name__}: {reason}") from exc


def _key_of(source: str, name: str, version: FileMetadata) -> bytes:
    assert version.etag is not None
    text = json.dumps([source, name, version.etag.value, version.size])
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
