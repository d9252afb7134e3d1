"""`RedisLimitStore`: counts in Redis or Valkey, for the processes of several machines together.

A client has these keys, which begin with `downloadview:limits:1:`, where 1 is the version of this format, and expire:
a hash with its requests, a sorted set with its leases by the time of their end, and a number for each quota and period.
The server's clock counts; what it wrote before it was set back counts as written now. A lease is renewed while its
transfer lasts, so those of a dead process end in time.

Each operation is one script. All calls that the requests of an event loop make at the same time are sent as one
pipeline: under load this takes a third of the CPU time of one call after another.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakSet

from downloadview_async.errors import ConfigurationError
from downloadview_async.policy.limits.amounts import Quota, Window
from downloadview_async.policy.limits.store import ALLOWED, SESSION_SECONDS, Costs, Verdict, period_of
from downloadview_async.sources.per_loop import PerLoop

LEASE_SECONDS = 30.0
"""Seconds after which the leases of a dead process end."""

_RENEW_SECONDS = LEASE_SECONDS / 3
_MOST_IN_A_BATCH = 200
_CLOSING_SECONDS = 2.0
_CONNECT_SECONDS = 2.0  # for `check`, for which no request waits: a new connection may take its time
_ROUNDS = 20  # of the loop
_LATE_SECONDS = 0.01
_STARVED = 3

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# Each script gets the beginning of a client's keys. Few and short arguments: packing them is most of the work here.
_ADMIT = f"""{_NOW}
local amount, length, most, life = string.match(ARGV[1], '(%d+) (%d+) (%d+) (%d+)')
length = tonumber(length)
if length > 0 then
    local key = KEYS[1] .. 'requests'
    local kept = redis.call('HMGET', key, 'began', 'current', 'previous')
    local began, current, previous = tonumber(kept[1] or '0'), tonumber(kept[2] or '0'), tonumber(kept[3] or '0')
    if began > now then began = now end
    if now - began >= length then
        if now - began < 2 * length and current > 0 then
            began, previous = began + length, current
        else
            began, previous = now, 0
        end
        current = 0
    end
    local elapsed, free, wait = now - began, amount - 1, 0
    if current > free then
        wait = length - elapsed + (1 - free / current) * length
    elseif previous * (1 - elapsed / length) + current > free then
        wait = (1 - (free - current) / previous) * length - elapsed
    end
    if wait > 0 then return -1 - math.ceil(wait) end
    redis.call('HSET', key, 'began', began, 'current', current + 1, 'previous', previous)
    redis.call('PEXPIRE', key, 2 * length)
end
if ARGV[2] == '' then return 0 end
local key = KEYS[1] .. 'leases'
redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
redis.call('ZREMRANGEBYSCORE', key, '(' .. now + life, '+inf')
local held = redis.call('ZCARD', key)
if most ~= '0' and held >= tonumber(most) then return -1 end
redis.call('ZADD', key, now + life, ARGV[2])
redis.call('PEXPIRE', key, life)
return held + 1
"""
_END = "redis.call('ZREM', KEYS[1] .. 'leases', ARGV[1])"
_RENEW = f"""{_NOW}
local key = KEYS[1] .. 'leases'
redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
for number = 2, #ARGV do redis.call('ZADD', key, now + ARGV[1], ARGV[number]) end
redis.call('PEXPIRE', key, ARGV[1])
return redis.call('ZCARD', key)
"""
# Then for each quota its unit, amount, cost, seconds and period.
_SPEND = """
local session = KEYS[1] .. 'session:' .. ARGV[1]
local state = ARGV[1] ~= '' and redis.call('GET', session)
local is_open = state and not (state == 'complete' and ARGV[2] == '1')
local function key(at) return KEYS[1] .. ARGV[at] .. ':' .. ARGV[at + 3] .. ':' .. ARGV[at + 4] end
local function is_new(at) return not is_open or ARGV[at] ~= 'downloads' end
for at = 4, #ARGV, 5 do
    if is_new(at) and tonumber(redis.call('GET', key(at)) or '0') >= tonumber(ARGV[at + 1]) then return (at + 1) / 5 end
end
for at = 4, #ARGV, 5 do
    if is_new(at) then
        redis.call('INCRBY', key(at), ARGV[at + 2])
        redis.call('EXPIRE', key(at), 2 * ARGV[at + 3])
    end
end
if ARGV[1] ~= '' and not is_open then redis.call('SET', session, 'open', 'EX', ARGV[3]) end
return 0
"""
_RELEASE = """
if ARGV[1] ~= '' then redis.call('ZREM', KEYS[1] .. 'leases', ARGV[1]) end
if ARGV[2] ~= '' then redis.call('SET', KEYS[1] .. 'session:' .. ARGV[2], 'complete', 'XX', 'KEEPTTL') end
for at = 3, #ARGV, 4 do
    local key = KEYS[1] .. ARGV[at] .. ':' .. ARGV[at + 2] .. ':' .. ARGV[at + 3]
    local spent = redis.call('GET', key)
    if spent then redis.call('DECRBY', key, string.format('%.0f', math.min(spent, tonumber(ARGV[at + 1])))) end
end
"""
_CHECK = "return 1"
_SCRIPTS = {hashlib.sha1(text.encode()).hexdigest(): text for text in (_ADMIT, _END, _RENEW, _SPEND, _RELEASE, _CHECK)}  # noqa: S324
_DIGEST = {text: digest for digest, text in _SCRIPTS.items()}

_Call = tuple[str, str, Sequence[object], "asyncio.Future[Any] | None"]  # a script, its key and its values


class Follower(Protocol):
    """Follows the number of transfers of its clients."""

    def follow(self, client: str) -> None:
        """Take note that other processes have begun or ended transfers of a client."""
        ...


class RedisLimitStore:
    """Counts in Redis or Valkey, for any number of machines.

    url: such as `redis://127.0.0.1:6379/0`, `rediss://` for TLS, or `unix://` for a Unix socket. prefix: the beginning
    of all keys, for applications that share a database. timeout: seconds for an answer. Needs the extra `redis`.

    Raises `ConfigurationError` if the package redis is missing, or cannot use the URL.
    """

    def __init__(self, url: str, *, prefix: str = "downloadview", timeout: float = 0.05) -> None:
        try:
            from redis import asyncio as client
            from redis import backoff
            from redis.asyncio.retry import Retry
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                f"limits in Redis need {exc.name}: install downloadview_async with its extra `redis`"
            ) from exc
        # A connection of the pool may be older than the server: one attempt more, at once.
        options: dict[str, Any] = {"retry": Retry(backoff.NoBackoff(), 1), "max_connections": 2}

        def connect() -> Any:
            return client.Redis.from_pool(client.ConnectionPool.from_url(url, **options))

        self._connect = connect
        self._prefix = f"{prefix}:limits:1:"
        self._timeout = timeout
        self._name = lru_cache(maxsize=4096)(self._name_of)
        self._batches: PerLoop[_Batches] = PerLoop()
        self.followers: WeakSet[Follower] = WeakSet()
        """These learn when other processes have begun or ended transfers of a client."""
        try:
            self._connect()
        except ValueError:  # its text may have a part of the password
            raise ConfigurationError(
                "the URL of Redis cannot be used: give such as redis://127.0.0.1:6379/0, with the password "
                "percent-encoded"
            ) from None

    async def admit(self, client: str, *, window: Window | None, most: int | None, lease: str | None) -> Verdict:
        """Count a request, and hold a lease for its transfer."""
        batches, name = self._running(), self._name(client)
        try:
            held: int = await batches.call(_ADMIT, name, (_terms(window, most), lease or ""))
        except BaseException:  # the server may have counted it all the same
            if lease is not None:
                batches.post(_END, name, (lease,))
            raise
        if held < 0:
            return Verdict("requests", (-1 - held) / 1000) if held < -1 else Verdict("concurrent", 1.0)
        if lease is not None:
            batches.hold(client, lease, held)
        return ALLOWED

    async def spend(self, client: str, costs: Costs, *, session: str, wants_all: bool, now: float) -> Quota | None:
        """Add the costs to their quotas, or return a quota that is used up."""
        values: list[object] = [session, int(wants_all), SESSION_SECONDS]
        for quota, cost in costs:
            values += [quota.unit, quota.amount, cost, quota.seconds, period_of(quota, now)]
        spending = self._running().call(_SPEND, self._name(client), values)
        try:
            number: int = await asyncio.shield(spending)
        except asyncio.CancelledError:

            def give_back(spent: "asyncio.Future[int]") -> None:
                if not spent.cancelled() and spent.exception() is None and not spent.result():
                    bytes_spent = [(quota, cost) for quota, cost in costs if quota.unit == "bytes"]
                    self.release(client, None, bytes_spent, spent_at=now, complete=None)

            spending.add_done_callback(give_back)
            raise
        return costs[number - 1][0] if number else None

    def release(self, client: str, lease: str | None, refunds: Costs, *, spent_at: float, complete: str | None) -> None:
        """End a lease, and give back what was not sent, soon after this returns."""
        batches, name = self._running(), self._name(client)
        if lease is not None:
            batches.drop(client, lease)
        if not refunds and complete is None:
            batches.post(_END, name, (lease,))
            return
        values: list[object] = [lease or "", complete or ""]
        for quota, refund in refunds:
            values += [quota.unit, refund, quota.seconds, period_of(quota, spent_at)]
        batches.post(_RELEASE, name, values)

    def transfers(self, client: str) -> int:
        """Return how many leases the client holds, at the time of the last answer about it."""
        return self._running().transfers(client)

    async def check(self) -> None:
        """Return if the server answers."""
        await self._running().call(_CHECK, f"{self._prefix}check", ())

    async def aclose(self) -> None:
        """Send what is left, and close the connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if (batches := self._batches.get(loop)) is not None:
            self._batches.drop(loop)
            await batches.aclose()

    def _running(self) -> "_Batches":
        loop = asyncio.get_running_loop()
        return self._batches.get(loop) or self._batches.set(loop, _Batches(self, self._connect(), loop))

    def _name_of(self, client: str) -> str:
        """Return the beginning of the client's keys, which does not show an address or a name of a user.

        The braces keep the keys of a client on one server of a cluster.
        """
        return f"{self._prefix}{{{hashlib.sha256(client.encode(errors='surrogatepass')).hexdigest()[:32]}}}:"

    @property
    def timeout(self) -> float:
        """Seconds for an answer."""
        return self._timeout

    def renewal(self, client: str, leases: Iterable[str]) -> tuple[str, str, Sequence[object]]:
        """Return the call that renews the leases of a client."""
        return _RENEW, self._name(client), (int(LEASE_SECONDS * 1000), *leases)


@lru_cache(maxsize=256)
def _terms(window: Window | None, most: int | None) -> str:
    amount, length = (0, 0) if window is None else (window.amount, window.seconds * 1000)
    return f"{amount} {length} {most or 0} {int(LEASE_SECONDS * 1000)}"


class _Batches:
    """The calls of one event loop, sent together, and the leases that it holds."""

    def __init__(self, store: RedisLimitStore, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._client = client
        self._loop = loop
        self._queue: list[_Call] = []
        self._task: asyncio.Task[None] | None = None
        self._leases: dict[str, set[str]] = {}
        self._held: dict[str, int] = {}  # of a client in all processes
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.Handle
        self._is_late = False

    def call(self, script: str, key: str, values: Sequence[object]) -> "asyncio.Future[Any]":
        """Return what a script will return."""
        future = self._loop.create_future()
        self._add((script, key, values, future))
        return future

    def post(self, script: str, key: str, values: Sequence[object]) -> None:
        """Have a script run soon. If the server fails, it does not run."""
        self._add((script, key, values, None))

    def _add(self, call: _Call) -> None:
        self._queue.append(call)
        if self._task is None:
            self._task = self._loop.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue[:_MOST_IN_A_BATCH], self._queue[_MOST_IN_A_BATCH:]
                results: Sequence[Any]
                try:
                    results = await self._execute_in_time(batch)
                except Exception as exc:  # whatever the library raises
                    batch, self._queue = [*batch, *self._queue], []  # no call waits for two failures
                    results = [exc] * len(batch)
                for (_, _, _, future), result in zip(batch, results, strict=True):
                    if future is not None and not future.done():
                        if isinstance(result, Exception):
                            future.set_exception(result)
                        else:
                            future.set_result(result)
        finally:
            self._task = None

    async def _execute_in_time(self, batch: Sequence[_Call]) -> list[Any]:
        """Return the results of some calls. Raises `TimeoutError`, and what the library raises."""
        is_check = any(script is _CHECK for script, _, _, _ in batch)
        seconds = _CONNECT_SECONDS if is_check else self._store.timeout
        self._deadline = self._loop.call_later(seconds, self._be_late, self._loop.time() + seconds, seconds, _STARVED)
        try:
            return await self._execute(batch)
        except asyncio.CancelledError:
            if not self._is_late:
                raise
            if self._task is not None:
                self._task.uncancel()
            raise TimeoutError(f"no answer in {seconds:g} seconds") from None
        finally:
            self._is_late = False
            self._deadline.cancel()

    def _be_late(self, due: float, seconds: float, starved: int) -> None:
        """Cancel the calls that are under way, unless this timer is late itself: then a busy machine may be the reason.

        due: when the timer was to ring. starved: how often the calls may get the time once more.
        """
        now = self._loop.time()
        if starved and now - due > _LATE_SECONDS:
            self._deadline = self._loop.call_later(seconds, self._be_late, now + seconds, seconds, starved - 1)
        else:
            self._cancel(_ROUNDS)

    def _cancel(self, rounds: int) -> None:
        """Cancel the calls some rounds of the loop from now: an answer may have arrived, and not have been read yet."""
        if rounds:
            self._deadline = self._loop.call_soon(self._cancel, rounds - 1)
        elif self._task is not None:
            self._is_late = True
            self._task.cancel()

    async def _execute(self, batch: Sequence[_Call]) -> list[Any]:
        results = await self._pipeline(batch)
        unknown = [number for number, result in enumerate(results) if type(result).__name__ == "NoScriptError"]
        if unknown:  # the server has been started, or has forgotten its scripts; none of these has run
            for text in _SCRIPTS.values():
                await self._client.script_load(text)
            for number, result in zip(unknown, await self._pipeline([batch[one] for one in unknown]), strict=True):
                results[number] = result
        return results

    async def _pipeline(self, batch: Sequence[_Call]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for script, key, values, _ in batch:
            pipeline.evalsha(_DIGEST[script], 1, key, *values)
        results: list[Any] = await pipeline.execute(raise_on_error=False)
        return results

    def hold(self, client: str, lease: str, held: int) -> None:
        """Renew a lease until it is dropped. held: all leases of the client."""
        self._leases.setdefault(client, set()).add(lease)
        self._held[client] = held
        if self._timer is None:
            self._timer = self._loop.call_later(_RENEW_SECONDS, self._renew)

    def drop(self, client: str, lease: str) -> None:
        """Renew a lease no more."""
        leases = self._leases.get(client, set())
        leases.discard(lease)
        self._held[client] = max(len(leases), self._held.get(client, 0) - 1)
        if not leases:
            self._leases.pop(client, None)
            self._held.pop(client, None)

    def transfers(self, client: str) -> int:
        return self._held.get(client, 0)

    def _renew(self) -> None:
        self._timer = None
        if not self._leases:
            return
        self._timer = self._loop.call_later(_RENEW_SECONDS, self._renew)
        for client, leases in self._leases.items():
            self.call(*self._store.renewal(client, leases)).add_done_callback(self._noting(client))

    def _noting(self, client: str) -> "Callable[[asyncio.Future[int]], None]":
        def note(renewed: "asyncio.Future[int]") -> None:
            if renewed.cancelled() or renewed.exception() is not None or client not in self._leases:
                return
            held = max(len(self._leases[client]), renewed.result())
            if held != self._held.get(client):
                self._held[client] = held
                for follower in self._store.followers:
                    follower.follow(client)

        return note

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_CLOSING_SECONDS)
        await self._client.aclose()
