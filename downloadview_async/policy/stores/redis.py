"""`RedisGrantStore`: uses and revocations in Redis or Valkey, which the processes of several machines share.

A link has one key, a hash: the field `opened` counts its sessions, and each other field is the state of one session, as
`end complete parts`. A revoked id has another key. All keys begin with `downloadview:1:`, where 1 is the version of
this format, and expire with the link.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from downloadview_async.errors import ConfigurationError, LinkInvalid
from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.stores.base import MOST_SPANS, DownloadSession
from downloadview_async.sources.per_loop import PerLoop

_MOST_CONNECTIONS = 16  # of one event loop; further calls wait for one
_PATIENCE = 5.0  # seconds

# Each script gets the key of a link, a gate and the keys of revocations. A gate is a key that exists if a limit has
# refused the same request, a moment ago in the same round trip: see `Ride`.
_VERDICTS = """
if redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
for number = 3, #KEYS do if redis.call('EXISTS', KEYS[number]) == 1 then return -2 end end
"""
_CHECK = f"{_VERDICTS} return 1"
_CLAIM = f"""{_VERDICTS}
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
# `with_span` and `is_whole` in Lua.
_NOTE = f"""
local state = redis.call('HGET', KEYS[1], ARGV[1])
if not state then return 0 end
local ends, complete, sent = string.match(state, '^(%S+) (%d) (.*)$')
local start, stop, parts = tonumber(ARGV[2]), tonumber(ARGV[3]), {{}}
for first, last in string.gmatch(sent, '(%d+)-(%d+)') do
    first, last = tonumber(first), tonumber(last)
    if last < start or first > stop then
        parts[#parts + 1] = {{first, last}}
    else
        start, stop = math.min(start, first), math.max(stop, last)
    end
end
if #parts < {MOST_SPANS} then
    parts[#parts + 1] = {{start, stop}}
    table.sort(parts, function(one, other) return one[1] < other[1] end)
    for number, part in ipairs(parts) do parts[number] = string.format('%.0f-%.0f', part[1], part[2]) end
    sent = table.concat(parts, ' ')
end
if ARGV[4] == '0' or sent == '0-' .. ARGV[4] then complete = '1' end
redis.call('HSET', KEYS[1], ARGV[1], ends .. ' ' .. complete .. ' ' .. sent)
return 1
"""
LINK_SCRIPTS = (_CHECK, _CLAIM, _NOTE)
"""The scripts that may ride with those of the limits."""

_REFUSED_BY_A_LIMIT, _REVOKED = -1, -2


@dataclass(frozen=True, slots=True)
class Ride:
    """Has a script run with those of the limits of the same request, in one round trip.

    call: runs a script with keys and values, soon. gate: a key that exists if a limit has refused the request.
    revocable: the ids of the link and its key; the script refuses the request if one of them is revoked.
    """

    call: Callable[[str, Sequence[str], Sequence[object]], Awaitable[Any]]
    gate: str
    revocable: Sequence[str]


class RefusedByLimit(Exception):
    """A limit has refused the request, so no download was claimed."""


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
        self.url = url
        self._prefix = f"{prefix}:1:"
        self._no_gate = f"{self._prefix}gate:"  # no such key is ever written
        check_url(connect)

    async def claim(
        self,
        session: DownloadSession,
        *,
        uses: int,
        wants_all: bool,
        now: float,
        ends: float,
        until: float | None,
        ride: Ride | None = None,
    ) -> bool:
        """Return whether a request belongs to an open session, or to one that this call has opened.

        ride: asks in the round trip of the limits, and whether the link is revoked. Raises `RefusedByLimit` and
        `LinkInvalid` then.
        """
        expires = "" if until is None else math.ceil(until)
        values = (session.digest, uses, int(wants_all), repr(now), repr(ends), expires)
        verdict = await self._run(_CLAIM, self._key_of(session), values, ride)
        return bool(self._judged(verdict, ride))

    async def note(self, session: DownloadSession, span: ByteRange, size: int, *, ride: Ride | None = None) -> None:
        """Note a part of the file that was sent. ride: in the round trip that ends the transfer."""
        await self._run(_NOTE, self._key_of(session), (session.digest, span.start, span.stop, size), ride)

    async def refuse_revoked(self, ride: Ride) -> None:
        """Ask in the round trip of the limits whether the link is revoked.

        Raises `LinkInvalid` if it is, and `RefusedByLimit`.
        """
        self._judged(await self._run(_CHECK, self._no_gate, (), ride), ride)

    def _judged(self, verdict: int, ride: Ride | None) -> int:
        if verdict == _REFUSED_BY_A_LIMIT:
            raise RefusedByLimit
        if verdict == _REVOKED:
            assert ride is not None
            raise LinkInvalid(f"the link {ride.revocable[0]}, or its key, is revoked")
        return verdict

    async def _run(self, script: str, key: str, values: Sequence[object], ride: Ride | None) -> int:
        """Return what a script returns. If the round trip of the limits fails, another one follows."""
        revocable = () if ride is None else map(self._revoked, ride.revocable)
        if ride is not None:
            keys = (key, ride.gate, *revocable)
            try:
                return int(await ride.call(script, keys, values))
            except Exception:  # whatever the library raises: the next attempt tells
                revocable = keys[2:]
        keys = (key, self._no_gate, *revocable)
        return int(await self._client().eval(script, len(keys), *keys, *values))

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
