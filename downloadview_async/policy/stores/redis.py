"""`RedisGrantStore`: uses and revocations in Redis or Valkey, which the processes of several machines share.

A link has one key, a hash: the field `opened` counts its sessions, and each other field is the state of one session, as
`end complete parts`. A revoked id has another key. All keys begin with `downloadview:1:`, where 1 is the version of
this format, and expire with the link.

The key `began` tells since when the store has everything, in seconds since 1970 UTC. If the store loses its data, it
begins anew, and a link that was made before may have been used or revoked: see `guards_loss`.
"""

import asyncio
import hashlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from downloadview_async.errors import ConfigurationError, LinkInvalid
from downloadview_async.http.metadata import ByteRange
from downloadview_async.policy.link_ids import made_at
from downloadview_async.policy.stores.base import MOST_SPANS, DownloadSession
from downloadview_async.sources.per_loop import PerLoop

logger = logging.getLogger("downloadview_async")

_MOST_CONNECTIONS = 16  # of one event loop; further calls wait for one
_PATIENCE = 5.0  # seconds

# Each script gets the key of a link, a gate, the key `began`, the keys of revocations, and when the link was made, or
# an empty text. A gate is a key that exists if a limit has refused the same request, a moment ago in the same round
# trip: see `Ride`.
_VERDICTS = """
if redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
for number = 4, #KEYS do if redis.call('EXISTS', KEYS[number]) == 1 then return -2 end end
local made = table.remove(ARGV, 1)
if made ~= '' then
    local began = redis.call('GET', KEYS[3])
    if not began then return -3 end
    if tonumber(made) < tonumber(began) then return -4 end
end
"""
_BEGIN = """
local time = redis.call('TIME')
local now = string.format('%.0f.%03.0f', time[1], math.floor(time[2] / 1000))
redis.call('SET', KEYS[1], now, 'NX')
return redis.call('GET', KEYS[1])
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

_REFUSED_BY_A_LIMIT, _REVOKED, _NOT_BEGUN, _LOST = -1, -2, -3, -4


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


@lru_cache(maxsize=32)
def script_digest(script: str) -> str:
    """Return the digest by which the server knows a script."""
    return hashlib.sha1(script.encode()).hexdigest()  # noqa: S324


def check_url(connect: Callable[[], object]) -> None:
    """Raise `ConfigurationError` if the URL that `connect` uses cannot be one."""
    try:
        connect()
    except ValueError:  # its text may have a part of the password
        raise ConfigurationError(
            "the URL of Redis cannot be used: give such as redis://127.0.0.1:6379/0, with the password percent-encoded"
        ) from None


class StoreLost(Exception):
    """The store is new, or it has lost its data, and a link was made before that."""


class RedisGrantStore:
    """Keeps the uses and revocations of links in Redis or Valkey, for any number of machines.

    url: such as `redis://127.0.0.1:6379/0`, `rediss://` for TLS, or `unix://` for a Unix socket. prefix: the beginning
    of all keys, for applications that share a database. Needs the extra `redis`.
    guards_loss: fail for each link that was made before the store has begun, as it may have lost that the link was used
    or revoked. A store begins when `check` is first called: await it when the application starts, before it makes
    links. Links for nginx do not tell when they were made, and are not guarded.

    Raises `ConfigurationError` if the package redis is missing, or cannot use the URL.
    """

    def __init__(self, url: str, *, prefix: str = "downloadview", guards_loss: bool = False) -> None:
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
        self._began = f"{self._prefix}began"
        self._guards_loss = guards_loss
        self._has_told = False
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
        made = self._made(session.link_id)
        return bool(await self._ask(_CLAIM, self._key_of(session), (made, *values), ride))

    async def note(self, session: DownloadSession, span: ByteRange, size: int, *, ride: Ride | None = None) -> None:
        """Note a part of the file that was sent. ride: in the round trip that ends the transfer."""
        await self._run(_NOTE, self._key_of(session), (session.digest, span.start, span.stop, size), ride)

    async def refuse_revoked(self, ride: Ride) -> None:
        """Ask in the round trip of the limits whether the link is revoked.

        Raises `LinkInvalid` if it is, and `RefusedByLimit`.
        """
        await self._ask(_CHECK, self._no_gate, (self._made(ride.revocable[0]),), ride)

    async def _ask(
        self, script: str, key: str, values: Sequence[object], ride: Ride | None, revocable: Sequence[str] = ()
    ) -> int:
        """Return the verdict of a script about a link. revocable: the ids of it and its key, without a `ride`."""
        if ride is not None:
            revocable = ride.revocable
        verdict = await self._run(script, key, values, ride, revocable)
        if verdict == _NOT_BEGUN:
            await self._begin()
            verdict = await self._run(script, key, values, None, revocable)
        if verdict == _REFUSED_BY_A_LIMIT:
            raise RefusedByLimit
        if verdict == _REVOKED:
            raise LinkInvalid(f"the link {revocable[0]}, or its key, is revoked")
        if verdict == _LOST:
            raise StoreLost(
                "it is new, or has lost its data, and may have lost that a link was used or revoked: restore it. Links "
                f"made before are refused, unless you set the key {self._began} to 0"
            )
        return verdict

    def _made(self, link_id: str) -> str:
        """Return when a link was made, as scripts get it; empty if that does not matter, or is not known."""
        made = made_at(link_id) if self._guards_loss else None
        return "" if made is None else repr(made)

    async def _run(
        self, script: str, key: str, values: Sequence[object], ride: Ride | None, revocable: Sequence[str] = ()
    ) -> int:
        """Return what a script returns. If the round trip of the limits fails, another one follows."""
        rest = (self._began, *map(self._revoked, revocable))
        if ride is not None:
            try:
                return int(await ride.call(script, (key, ride.gate, *rest), values))
            except Exception:  # whatever the library raises: the next attempt tells
                logger.debug("the store of links was asked again", exc_info=True)
        # another text, so that none of those that ride is known without the scripts that have to run before it
        keys, script = (key, self._no_gate, *rest), f"-- alone\n{script}"
        try:
            return int(await self._client().evalsha(script_digest(script), len(keys), *keys, *values))
        except Exception as exc:
            if type(exc).__name__ != "NoScriptError":  # the server has been started, or has forgotten its scripts
                raise
        return int(await self._client().eval(script, len(keys), *keys, *values))

    def begin(self) -> None:
        """Do what `check` does, without an event loop: for a command that makes a link."""
        if self._guards_loss:
            import redis

            with redis.Redis.from_url(self.url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE) as client:
                client.eval(_BEGIN, 1, self._began)

    async def _begin(self) -> None:
        await self._client().eval(_BEGIN, 1, self._began)

    async def revoke(self, identifier: str, until: float | None) -> None:
        """Revoke a link or a key."""
        await self._client().set(self._revoked(identifier), "1", exat=None if until is None else math.ceil(until))

    async def is_revoked(self, identifiers: Sequence[str], now: float) -> bool:
        """Return whether one of the ids is revoked. The server forgets the entries by its clock.

        The first one is that of a link. Raises `StoreLost` if the link is guarded.
        """
        try:
            await self._ask(_CHECK, self._no_gate, (self._made(identifiers[0]),), None, identifiers)
        except LinkInvalid:
            return True
        return False

    async def check(self) -> None:
        """Return if the server answers. A store that guards against loss begins, if it has not yet."""
        if not self._guards_loss:
            await self._client().ping()
            return
        await self._begin()
        if not self._has_told:
            self._has_told = True
            memory = await self._client().info("memory")
            policy = memory.get("maxmemory_policy", "noeviction")
            if memory.get("maxmemory") and policy != "noeviction":
                logger.warning(
                    "Redis may forget used and revoked links (maxmemory-policy %s): set it to noeviction", policy
                )

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
