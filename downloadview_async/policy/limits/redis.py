"""`RedisLimitStore`: counts in Redis or Valkey, for the processes of several machines together.

A client has these keys, which begin with `downloadview:limits:2:`, where 2 is the version of this format, and expire:
a hash with its requests, a sorted set with its leases by the time of their end, a number for each quota and period, a
hash for each version of a file of which it has got some, and a sorted set with those that are not complete.
The server's clock counts; what it wrote before it was set back counts as written now. A lease is renewed while its
transfer lasts, so those of a dead process end in time.

Each operation is one script. All calls that the requests of an event loop make at the same time are sent as one
pipeline: under load this takes a third of the CPU time of one call after another.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from secrets import token_hex
from typing import Any, Protocol
from weakref import WeakSet

from downloadview_async.errors import ConfigurationError
from downloadview_async.policy.limits.amounts import Quota, Window
from downloadview_async.policy.limits.coverage import MAX_EDGES, Parts
from downloadview_async.policy.limits.store import ALLOWED, RESERVED_SECONDS, SESSION_SECONDS, Costs, Verdict
from downloadview_async.policy.stores.redis import LINK_SCRIPTS, check_url, script_digest
from downloadview_async.sources.per_loop import PerLoop

LEASE_SECONDS = 30.0
"""Seconds after which the leases of a dead process end."""

GATE_SECONDS = 60
"""Seconds after which a gate is forgotten: all that it is for is in the same round trip."""

_RENEW_SECONDS = LEASE_SECONDS / 3
_MOST_IN_A_BATCH = 200
_CLOSING_SECONDS = 2.0
_CONNECT_SECONDS = 2.0  # for `check`, for which no request waits: a new connection may take its time
_ROUNDS = 20  # of the loop
_PARTS = 10  # in which the time for an answer is counted
_LATE_SECONDS = 0.003
_STARVED_SECONDS = 0.5  # the most that a busy process gets beyond that

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
# The session of a version of a file is a hash: by how much the number of parts changes at each place where it does, and
# `charged`, `charged_at` and `running`, as in `MemoryLimitStore`.
_SESSION = f"""
local function add(session, first, last, times)
    for at = first, last do
        local change = (at - first) % 2 == 0 and times or -times
        if redis.call('HINCRBY', session, ARGV[at], change) == 0 then redis.call('HDEL', session, ARGV[at]) end
    end
end
local function downloads(session, size)
    local kept, edges, changes = redis.call('HGETALL', session), {{}}, {{}}
    for at = 1, #kept, 2 do
        local edge = tonumber(kept[at])
        if edge then
            edges[#edges + 1] = edge
            changes[edge] = tonumber(kept[at + 1])
        end
    end
    if #edges == 0 then return 0, 0 end
    table.sort(edges)
    if edges[1] > 0 then return 1, 0 end
    local depth, least = 0, nil
    for _, edge in ipairs(edges) do
        if edge >= size then break end
        depth = depth + changes[edge]
        least = least and math.min(least, depth) or depth
    end
    return math.max(1, least or 0), least or 0
end
local function is_large(session) return redis.call('HLEN', session) >= {MAX_EDGES + 3} end
local function key(at, time)
    return KEYS[1] .. ARGV[at] .. ':' .. ARGV[at + 1] .. ':' .. string.format('%.0f', math.floor(time / ARGV[at + 1]))
end
local function give_back(at, time, amount)
    local spent = redis.call('GET', key(at, time))
    if spent and amount ~= 0 then
        redis.call('DECRBY', key(at, time), string.format('%.0f', math.min(spent, amount)))
    end
end
"""
# The arguments: the session, its size, the time, the number of numbers in its spans, the spans. Then for each quota its
# unit, seconds, cost and amount.
_SPEND = f"""{_SESSION}
local session, size, now, quotas = KEYS[1] .. 'session:' .. ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), 5 + ARGV[4]
local more, last = 0, quotas - 1
if ARGV[1] ~= '' then
    if is_large(session) then ARGV[5], ARGV[6], last = '0', ARGV[2], 6 end
    add(session, 5, last, 1)
    more = math.max(0, downloads(session, size) - tonumber(redis.call('HGET', session, 'charged') or '0'))
end
local function used_up()
    for at = quotas, #ARGV, 4 do
        local used = tonumber(redis.call('GET', key(at, now)) or '0')
        if ARGV[at] == 'downloads' then
            if more > 0 and used + more > tonumber(ARGV[at + 3]) then return at end
        elseif used >= tonumber(ARGV[at + 3]) then
            return at
        end
    end
end
local full = used_up()
if full and ARGV[full] == 'downloads' then
    local reserved = KEYS[1] .. 'reserved'
    for _, name in ipairs(redis.call('ZRANGEBYSCORE', reserved, '-inf', now - {RESERVED_SECONDS}, 'LIMIT', 0, 1000)) do
        local idle = KEYS[1] .. 'session:' .. name
        local at = redis.call('HGET', idle, 'charged_at')
        if name ~= ARGV[1] then
            redis.call('ZREM', reserved, name)
            if at then
                redis.call('HSET', idle, 'charged', 0)
                for quota = quotas, #ARGV, 4 do
                    if ARGV[quota] == 'downloads' then give_back(quota, at, 1) end
                end
            end
        end
    end
    full = used_up()
end
if full then
    if ARGV[1] ~= '' then add(session, 5, last, -1) end
    return (full - quotas) / 4 + 1
end
for at = quotas, #ARGV, 4 do
    local cost = ARGV[at] == 'downloads' and more or ARGV[at + 2]
    redis.call('INCRBY', key(at, now), cost)
    redis.call('EXPIRE', key(at, now), 2 * ARGV[at + 1])
end
if ARGV[1] ~= '' then
    redis.call('HINCRBY', session, 'charged', more)
    redis.call('HINCRBY', session, 'running', 1)
    if more > 0 then redis.call('HSET', session, 'charged_at', ARGV[3]) end
    redis.call('EXPIRE', session, {SESSION_SECONDS})
    redis.call('ZREM', KEYS[1] .. 'reserved', ARGV[1])
end
return 0
"""
# The same arguments, with what was not sent. Then the lease.
_RELEASE = f"""{_SESSION}
local lease, session, quotas, back = ARGV[#ARGV], KEYS[1] .. 'session:' .. ARGV[1], 5 + ARGV[4], 0
if lease ~= '' then redis.call('ZREM', KEYS[1] .. 'leases', lease) end
if ARGV[1] ~= '' and redis.call('HEXISTS', session, 'running') == 1 then
    if not is_large(session) then add(session, 5, quotas - 1, -1) end
    local running = redis.call('HINCRBY', session, 'running', -1)
    local charged = tonumber(redis.call('HGET', session, 'charged'))
    local due, complete = downloads(session, tonumber(ARGV[2]))
    back = math.max(0, charged - due)
    if due == 0 and running <= 0 then
        redis.call('DEL', session)
    else
        redis.call('HSET', session, 'charged', charged - back)
        redis.call('EXPIRE', session, {SESSION_SECONDS})
        if running <= 0 and complete == 0 and charged - back == 1 then
            redis.call('ZADD', KEYS[1] .. 'reserved', redis.call('TIME')[1], ARGV[1])
            redis.call('EXPIRE', KEYS[1] .. 'reserved', {SESSION_SECONDS})
        end
    end
end
for at = quotas, #ARGV - 1, 4 do
    local amount = ARGV[at] == 'downloads' and back or tonumber(ARGV[at + 2])
    give_back(at, tonumber(ARGV[3]), amount)
end
"""
# Both, unless the gate is closed: another limit has then refused the same request in the same round trip. A limit that
# refuses it closes the gate.
_ENTER = f"""
local function admit(KEYS, ARGV) {_ADMIT} end
local function spend(KEYS, ARGV) {_SPEND} end
if redis.call('EXISTS', KEYS[2]) == 1 then return {{-1, 0}} end
local held, full = admit(KEYS, {{ARGV[1], ARGV[2]}}), 0
if held >= 0 and #ARGV > 2 then full = spend(KEYS, {{unpack(ARGV, 3)}}) end
if held < 0 or full > 0 then redis.call('SET', KEYS[2], '1', 'EX', {GATE_SECONDS}) end
return {{held, full}}
"""
_CHECK = "return 1"
_SCRIPTS = (_ADMIT, _END, _RENEW, _SPEND, _RELEASE, _ENTER, _CHECK, *LINK_SCRIPTS)

_Call = tuple[str, Sequence[str], Sequence[object], "asyncio.Future[Any] | None"]  # a script, its keys and its values


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
        self.url = url
        self._prefix = f"{prefix}:limits:2:"
        self._timeout = timeout
        self._name = lru_cache(maxsize=4096)(self._name_of)
        self._batches: PerLoop[_Batches] = PerLoop()
        self.followers: WeakSet[Follower] = WeakSet()
        """These learn when other processes have begun or ended transfers of a client."""
        check_url(connect)

    async def admit(self, client: str, *, window: Window | None, most: int | None, lease: str | None) -> Verdict:
        """Count a request, and hold a lease for its transfer."""
        batches, name = self._running(), self._name(client)
        try:
            held: int = await batches.call(_ADMIT, (name,), (_terms(window, most), lease or ""))
        except BaseException:  # the server may have counted it all the same
            if lease is not None:
                batches.post(_END, (name,), (lease,))
            raise
        if held < 0:
            return Verdict("requests", (-1 - held) / 1000) if held < -1 else Verdict("concurrent", 1.0)
        if lease is not None:
            batches.hold(client, lease, held)
        return ALLOWED

    async def enter(
        self,
        client: str,
        *,
        window: Window | None,
        most: int | None,
        lease: str | None,
        costs: Costs,
        parts: Parts | None,
        now: float,
        gate: str,
    ) -> tuple[Verdict, Quota | None]:
        """Do what `admit` and `spend` do, in one step. gate: from `new_gate`; see `Ride`."""
        batches, name = self._running(), self._name(client)
        spent = [] if not costs else _arguments(costs, parts, now)
        entering = batches.call(_ENTER, (name, gate), (_terms(window, most), lease or "", *spent))
        try:
            held, number = await asyncio.shield(entering)
        except BaseException:  # the server may have counted it all the same
            if lease is not None:
                batches.post(_END, (name,), (lease,))

            def give_back(entered: "asyncio.Future[list[int]]") -> None:
                if costs and not entered.cancelled() and entered.exception() is None:
                    held, number = entered.result()
                    if held >= 0 and not number:
                        self.release(client, None, costs, spent_at=now, unsent=parts)

            entering.add_done_callback(give_back)
            raise
        if held < 0:
            return Verdict("requests", (-1 - held) / 1000) if held < -1 else Verdict("concurrent", 1.0), None
        if lease is not None:
            batches.hold(client, lease, held)
        return ALLOWED, costs[number - 1][0] if number else None

    def new_gate(self) -> str:
        """Return a new key, which a limit that refuses a request closes for what is asked after it."""
        return f"{self._prefix}gate:{token_hex(8)}"

    def call(self, script: str, keys: Sequence[str], values: Sequence[object]) -> "asyncio.Future[Any]":
        """Return what another script will return, which runs in the next round trip."""
        return self._running().call(script, keys, values)

    async def spend(self, client: str, costs: Costs, *, parts: Parts | None, now: float) -> Quota | None:
        """Add the costs to their quotas, or return a quota that is used up."""
        spending = self._running().call(_SPEND, (self._name(client),), _arguments(costs, parts, now))
        try:
            number: int = await asyncio.shield(spending)
        except asyncio.CancelledError:

            def give_back(spent: "asyncio.Future[int]") -> None:
                if not spent.cancelled() and spent.exception() is None and not spent.result():
                    self.release(client, None, costs, spent_at=now, unsent=parts)

            spending.add_done_callback(give_back)
            raise
        return costs[number - 1][0] if number else None

    def release(self, client: str, lease: str | None, refunds: Costs, *, spent_at: float, unsent: Parts | None) -> None:
        """End a lease, and give back what was not sent, soon after this returns."""
        batches, name = self._running(), self._name(client)
        if lease is not None:
            batches.drop(client, lease)
        if not refunds:
            batches.post(_END, (name,), (lease,))
            return
        batches.post(_RELEASE, (name,), (*_arguments(refunds, unsent, spent_at), lease or ""))

    def transfers(self, client: str) -> int:
        """Return how many leases the client holds, at the time of the last answer about it."""
        return self._running().transfers(client)

    async def check(self) -> None:
        """Return if the server answers."""
        await self._running().call(_CHECK, (f"{self._prefix}check",), ())

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

        The braces keep the keys of one client in one slot. The gate has another, so Redis Cluster is not supported.
        """
        return f"{self._prefix}{{{hashlib.sha256(client.encode(errors='surrogatepass')).hexdigest()[:32]}}}:"

    @property
    def timeout(self) -> float:
        """Seconds for an answer."""
        return self._timeout

    def renewal(self, client: str, leases: Iterable[str]) -> tuple[str, Sequence[str], Sequence[object]]:
        """Return the call that renews the leases of a client."""
        return _RENEW, (self._name(client),), (int(LEASE_SECONDS * 1000), *leases)


def _arguments(costs: Costs, parts: Parts | None, time: float) -> list[object]:
    """Return the arguments of the scripts that count downloads and bytes."""
    values: list[object] = ["", 0, int(time), 0]
    if parts is not None:
        edges = [edge for span in parts.spans for edge in span]
        values = [parts.session, parts.size, int(time), len(edges), *edges]
    for quota, cost in costs:
        values += [quota.unit, quota.seconds, cost, quota.amount]
    return values


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

    def call(self, script: str, keys: Sequence[str], values: Sequence[object]) -> "asyncio.Future[Any]":
        """Return what a script will return."""
        future = self._loop.create_future()
        self._add((script, keys, values, future))
        return future

    def post(self, script: str, keys: Sequence[str], values: Sequence[object]) -> None:
        """Have a script run soon. If the server fails, it does not run."""
        self._add((script, keys, values, None))

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
        now = self._loop.time()
        self._count_time(now, seconds / _PARTS, _PARTS + 1, now + seconds + _STARVED_SECONDS)
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

    def _count_time(self, due: float, part: float, left: int, latest: float) -> None:
        """Cancel the calls that are under way when their time is over, which is counted in some parts.

        A part counts only if its timer was punctual. Else this process was busy itself, and may have been what the
        calls have waited for.

        due: when the timer was to ring. left: how many parts are left. latest: when the calls are cancelled even so.
        """
        now = self._loop.time()
        left -= now - due <= _LATE_SECONDS
        if left and now < latest:
            self._deadline = self._loop.call_later(part, self._count_time, now + part, part, left, latest)
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
            for text in _SCRIPTS:  # all of them: one that is unknown later would run after those that follow it
                await self._client.script_load(text)
            for number, result in zip(unknown, await self._pipeline([batch[one] for one in unknown]), strict=True):
                results[number] = result
        return results

    async def _pipeline(self, batch: Sequence[_Call]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for script, keys, values, _ in batch:
            pipeline.evalsha(script_digest(script), len(keys), *keys, *values)
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
