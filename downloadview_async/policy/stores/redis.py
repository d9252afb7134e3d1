"""`RedisGrantStore`: uses and revocations in Redis or Valkey, which the processes of several machines share.

A link has one key, a hash: the field `opened` counts its sessions, and each other field is the state of one session, as
`end complete parts`. A revoked id has another key. All keys begin with `downloadview:1:`, where 1 is the version of
this format, and expire with the link.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.stores.base import DownloadSession, is_whole, with_span
from downloadview_async.sources.per_loop import PerLoop

_MOST_CONNECTIONS = 16  # of one event loop; further calls wait for one
_PATIENCE = 5.0  # seconds

_CLAIM = """
local state = redis.call('HGET', KEYS[1], ARGV[1])
if state then
    local ends, complete = string.match(state, '^(%S+) (%d)')
    if tonumber(ends) > tonumber(ARGV[4]) and not (complete == '1' and ARGV[3] == '1') then return 1 end
end
if tonumber(redis.call('HGET', KEYS[1], 'opened') or '0') >= tonumber(ARGV[2]) then return 0 end
redis.call('HINCRBY', KEYS[1], 'opened', 1)
redis.call('HSET', KEYS[1], ARGV[1], ARGV[5] .. ' 0 ')
if ARGV[6] ~= '' then redis.call('EXPIREAT', KEYS[1], ARGV[6]) end
return 1
"""
_REPLACE = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""


def check_url(connect: Callable[[], object]) -> None:
    """Raise `ConfigurationError` if the URL that `connect` uses cannot be one."""
    try:
        connect()
    except ValueError:  # its text may have a part of the password
        raise ConfigurationError(
            "the URL of Redis cannot be used: give such as redis://127.0.0.1:6379/0, with the password percent-encoded"
        ) from None


class RedisGrantStore:
    """Keeps the uses and revocations of links in Redis or Valkey, for any number of machines.

    url: such as `redis://127.0.0.1:6379/0`, `rediss://` for TLS, or `unix://` for a Unix socket. prefix: the beginning
    of all keys, for applications that share a database. Needs the extra `redis`.

    Raises `ConfigurationError` if the package redis is missing, or cannot use the URL.
    """

    def __init__(self, url: str, *, prefix: str = "downloadview") -> None:
        try:
            from redis import asyncio as client
            from redis import backoff
            from redis.asyncio.retry import Retry
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                f"RedisGrantStore needs {exc.name}: install downloadview_async with its extra `redis`"
            ) from exc
        # A connection of the pool may be older than the server: one attempt more, at once.
        options: dict[str, Any] = {"decode_responses": True, "retry": Retry(backoff.NoBackoff(), 1)}

        def connect() -> Any:
            pool = client.BlockingConnectionPool.from_url(
                url, max_connections=_MOST_CONNECTIONS, timeout=_PATIENCE, **options
            )
            return client.Redis.from_pool(pool)

        self._connect = connect
        self._clients: PerLoop[Any] = PerLoop()
        self._prefix = f"{prefix}:1:"
        check_url(connect)

    async def claim(
        self, session: DownloadSession, *, uses: int, wants_all: bool, now: float, ends: float, until: float | None
    ) -> bool:
        """Return whether a request belongs to an open session, or to one that this call has opened."""
        expires = "" if until is None else math.ceil(until)
        values = (session.digest, uses, int(wants_all), repr(now), repr(ends), expires)
        return bool(await self._client().eval(_CLAIM, 1, self._key_of(session), *values))

    async def note(self, session: DownloadSession, span: ByteRange, size: int) -> None:
        """Note a part of the file that was sent."""
        client, key = self._client(), self._key_of(session)
        while (state := await client.hget(key, session.digest)) is not None:
            ends, complete, sent = state.split(" ", 2)
            sent = with_span(sent, span)
            more = f"{ends} {1 if complete == '1' or is_whole(sent, size) else 0} {sent}"
            if await client.eval(_REPLACE, 1, key, session.digest, state, more):
                return  # else another process has noted a part in the meantime

    async def revoke(self, identifier: str, until: float | None) -> None:
        """Revoke a link or a key."""
        await self._client().set(self._revoked(identifier), "1", exat=None if until is None else math.ceil(until))

    async def is_revoked(self, identifiers: Sequence[str], now: float) -> bool:
        """Return whether one of the ids is revoked. The server forgets the entries by its clock."""
        return bool(await self._client().exists(*map(self._revoked, identifiers)))

    async def check(self) -> None:
        """Return if the server answers."""
        await self._client().ping()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if (client := self._clients.get(loop)) is not None:
            self._clients.drop(loop)
            await client.aclose()

    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        return self._clients.get(loop) or self._clients.set(loop, self._connect())

    def _key_of(self, session: DownloadSession) -> str:
        return f"{self._prefix}link:{session.link_id}"

    def _revoked(self, identifier: str) -> str:
        return f"{self._prefix}revoked:{identifier}"
