"""`Limits`: what each client may have. `Transfer`: what one request takes of it."""

import asyncio
import hashlib
import inspect
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache
from itertools import count, islice
from secrets import token_hex
from types import TracebackType
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import anyio
from starlette.requests import Request
from starlette.types import Receive, Scope

from downloadview_async.errors import ConfigurationError, LimitExceeded, SourceUnavailable
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.policy.addresses import network_of
from downloadview_async.policy.cancellation import is_cancelled
from downloadview_async.policy.limits.amounts import Quota, Window, quota_of, rate_of, window_of
from downloadview_async.policy.limits.clients import ClientOf, address_client, client_function
from downloadview_async.policy.limits.coverage import Parts
from downloadview_async.policy.limits.guarded import GuardedLimitStore, WhenStoreFails
from downloadview_async.policy.limits.memory import MAX_CLIENTS, MemoryLimitStore
from downloadview_async.policy.limits.pace import SharedRate
from downloadview_async.policy.limits.redis import Follower, RedisLimitStore
from downloadview_async.policy.limits.store import ALLOWED, Costs, LimitStore, NotCounted, Verdict, seconds_left

if TYPE_CHECKING:
    from downloadview_async.policy.limits.source import SourceLimit

TRANSFERS = "downloadview_async.transfers"
"""The key of the `Transfers` of a request in its ASGI scope: `DownloadResponse` keeps to them."""

QUEUE_SECONDS = 10.0
"""Seconds that a request waits for a transfer of its client to end, with `mode="queue"`."""

MAX_WAITING = 32
"""How many requests of one client may wait."""

_LONG = 200  # characters of a client's name; a longer one would take much memory
_POLL_SECONDS = 0.25  # how often the first one asks a store that other processes use

WhenHalfClosed = Callable[[Callable[[], None] | None], None]
"""Calls a function when a client closes its side of the connection, or at once if it has; None ends that."""

logger = logging.getLogger("downloadview_async")

_process = token_hex(8)
_numbers = count()
_names = count()
_stores: WeakValueDictionary[tuple[str, str, str], GuardedLimitStore] = WeakValueDictionary()


class Limits:
    """The limits of each client: `Download(source, limits=Limits(concurrent=8, rate="20MB/s"))`.

    client: what counts as one: "address" (of IPv6, the /64), "user", "link", "header:NAME" as a proxy in `trusted`
    sends it, or a function, sync or async, that gets the request and returns a text. A request without a user, a link,
    or a header that is trusted, and one for which the function returns None, counts by its address.
    concurrent: transfers at once. requests: such as "600/minute". rate: bytes per second of all transfers of a client
    together, such as "20MB/s". quota: amounts such as "50GB/day" and "1000 downloads/day"; days begin at 00:00 UTC.
    total_rate: bytes per second of all clients together, in this process.
    mode: "refuse" answers 429 to a client that has `concurrent` transfers. "queue" lets at most 32 requests of a client
    wait for `queue_seconds` at most, in their order.
    store: "memory", for this process alone, or a URL such as "redis://127.0.0.1:6379/0", for all that use it.
    prefix: the beginning of all keys in that store, for applications that share it.
    when_store_fails: "allow" or "refuse" (503), while the store does not answer.
    name: tells these limits from others in the same store. The processes of one application give the same name.
    proxy_log: the log of the proxy, as in `ProxyLog`. With it, and with `Accounts(..., sends_request_id=True)` around
    the application, a transfer that the proxy sends ends with its line there, and quotas count the bytes in that line.
    Without, it ends when it is handed over.

    One object may limit several `Download` applications together. Sizes are decimal: 1MB is 1,000,000 bytes.

    Raises `ConfigurationError` for an invalid value, and if Redis is used without its package.
    """

    def __init__(
        self,
        *,
        client: str | ClientOf = "address",
        concurrent: int | None = None,
        rate: str | None = None,
        requests: str | None = None,
        quota: str | Sequence[str] = (),
        total_rate: str | None = None,
        mode: Literal["refuse", "queue"] = "refuse",
        queue_seconds: float = QUEUE_SECONDS,
        store: str = "memory",
        prefix: str = "downloadview",
        when_store_fails: WhenStoreFails = "allow",
        trusted: Iterable[str] = ("127.0.0.1", "::1"),
        name: str = "",
        proxy_log: str | None = None,
    ) -> None:
        if concurrent is not None and (not isinstance(concurrent, int) or isinstance(concurrent, bool)):
            raise ConfigurationError(f"concurrent is {concurrent!r}: give a number of transfers")
        if concurrent is not None and concurrent < 1:
            raise ConfigurationError(f"concurrent is {concurrent}: give 1 or more")
        if mode not in ("refuse", "queue"):
            raise ConfigurationError(f'mode is {mode!r}: give "refuse" or "queue"')
        if mode == "queue" and concurrent is None:
            raise ConfigurationError('mode is "queue": give concurrent, which is what requests wait for')
        if not isinstance(queue_seconds, (int, float)) or not queue_seconds > 0:
            raise ConfigurationError(f"queue_seconds is {queue_seconds!r}: give more than 0")
        if when_store_fails not in ("refuse", "allow"):
            raise ConfigurationError(f'when_store_fails is {when_store_fails!r}: give "refuse" or "allow"')
        self._client_of = client_function(client, trusted)
        self.concurrent = concurrent
        """How many transfers a client may have at once; None: any number."""
        self._window: Window | None = None if requests is None else window_of(requests)
        if not isinstance(quota, Iterable):
            raise ConfigurationError(f'quota is {quota!r}: give such as "50GB/day" or "1000 downloads/day", or a list')
        self._quotas: tuple[Quota, ...] = tuple(map(quota_of, [quota] if isinstance(quota, str) else quota))
        if len({(one.unit, one.seconds) for one in self._quotas}) < len(self._quotas):
            raise ConfigurationError("quota has two amounts of the same unit and period: remove one")
        self._counts_downloads = any(one.unit == "downloads" for one in self._quotas)
        self.rate = None if rate is None else rate_of(rate)
        self.total = None if total_rate is None else SharedRate(rate_of(total_rate))
        self.counts_bytes = bool(self._quotas)
        """Whether the bytes that were sent, or their end, have to be known."""
        self.is_paced = rate is not None or total_rate is not None
        """Whether transfers have a rate."""
        self.proxy_log = proxy_log
        """The log of the proxy, which tells the end of transfers that it sends; None: they end when handed over."""
        self.queues = mode == "queue"
        self._queue_seconds = queue_seconds
        self._holds_leases = concurrent is not None or (rate is not None and store != "memory")
        self._name = name or f"{next(_names)}"
        self.hits: Counter[str] = Counter()
        """How many requests each of the limits has refused in this process, by its text."""
        self._key_of = lru_cache(maxsize=4096)(lambda address: f"{self._name} address {network_of(address)}")
        # Transfers keep the rates that they share. Those used last are kept too: small answers may be ahead of them.
        self._rates: WeakValueDictionary[str, SharedRate] = WeakValueDictionary()
        self._last_rates: OrderedDict[str, SharedRate] = OrderedDict()
        self._queues: dict[str, deque[_Place]] = {}
        self.is_shared = store != "memory"
        """Whether other processes use the store too."""
        self._memory = MemoryLimitStore() if store == "memory" else None  # which needs no `await`, as costs time
        self._store: LimitStore = self._memory or _in_redis(store, prefix, when_store_fails, self)

    async def client_of(self, request: Request) -> str:
        """Return the key of the client that sends a request. If a function fails, that raises `SourceUnavailable`."""
        try:
            client = self._client_of(request)
            if inspect.isawaitable(client):
                client = await client
            if client is not None and not isinstance(client, str):
                raise TypeError(f"the function for the client gave {client!r}, not a text")
        except ConfigurationError:
            raise
        except (Exception, asyncio.CancelledError) as exc:
            if is_cancelled(exc):
                raise
            logger.exception("the function for the client of limits has failed")
            raise SourceUnavailable("the function for the client of limits has failed") from exc
        peer = request.scope.get("client")
        if client is None:
            return self._key_of(peer[0] if peer else None)
        return f"{self._name} {client if len(client) <= _LONG else _short(client)}"

    async def begin(self, scope: Scope, receive: Receive, *, is_transfer: bool) -> "Transfer":
        """Count a request, and return what it takes. `is_transfer`: it holds a lease, unless it has to wait for one.

        Raises `LimitExceeded`, and `SourceUnavailable` if the store has failed.
        """
        if self._client_of is address_client:
            peer = scope.get("client")
            client = self._key_of(peer[0] if peer else None)
        else:
            client = await self.client_of(Request(scope, receive))
        transfer, lease = self._new(client, is_transfer)
        if self._window is not None or lease is not None:
            admit = self._store.admit(client, window=self._window, most=self.concurrent, lease=lease)
            self._judge(transfer, lease, await admit)
        return transfer

    def begin_nowait(self, scope: Scope, *, is_transfer: bool) -> "Transfer | None":
        """Return what `begin` returns, or None if it may have to wait. Raises `LimitExceeded`."""
        if self._memory is None or self._client_of is not address_client:
            return None
        peer = scope.get("client")
        client = self._key_of(peer[0] if peer else None)
        transfer, lease = self._new(client, is_transfer)
        if self._window is not None or lease is not None:
            self._judge(transfer, lease, self._memory.admit_nowait(client, self._window, self.concurrent, lease))
        return transfer

    @property
    def is_immediate(self) -> bool:
        """Whether an answer that leaves at once is counted without a wait, and has no rate: see `count_at_once`."""
        return self._memory is not None and self._client_of is address_client and not (self.is_paced or self.queues)

    def has_room(self, address: str | None) -> bool:
        """Return whether a client at an address may send one more request now, apart from quotas. Count nothing."""
        assert self._memory is not None
        return self._memory.has_room(self._key_of(address), self._window, self.concurrent)

    def charge_at_once(self, address: str | None, version: str, size: int) -> "Transfer | None":
        """Charge the quotas for an answer, a whole file, that leaves at once. Return None if one of them is used up.

        Then nothing is charged. `settle` follows, or `end`.
        """
        memory, transfer = self._memory, Transfer(self, self._key_of(address))
        assert memory is not None
        if self._quotas and size:
            costs = self._costs(transfer, version, size, (ByteRange(0, size),), size)
            if memory.spend_nowait(transfer.client, costs, transfer.parts, transfer.spent_at) is not None:
                return None
            transfer.is_charged = True
        return transfer

    def settle(self, transfer: "Transfer") -> None:
        """Count a request for which `charge_at_once` has charged the quotas: its answer leaves."""
        assert self._memory is not None
        if self._window is not None:
            self._memory.admit_nowait(transfer.client, self._window, None, None)
        self.end(transfer, None, is_complete=True)

    @property
    def redis(self) -> RedisLimitStore | None:
        """The store, if requests can be counted there once their file is open; None: before that, or it fails."""
        return self._store.redis if isinstance(self._store, GuardedLimitStore) and not self.queues else None

    async def begin_later(self, scope: Scope, receive: Receive) -> "Transfer":
        """Return what a request takes, of which nothing is counted or held before `enter`."""
        return Transfer(self, await self.client_of(Request(scope, receive)))

    async def enter(
        self,
        transfer: "Transfer",
        gate: str,
        version: str,
        size: int | None,
        spans: Sequence[ByteRange | None] | None,
        file: int | None,
    ) -> None:
        """Do what `begin` and `spend` do, in one step. spans: None for an answer without bytes of the file.

        gate: see `RedisLimitStore.enter`. Raises `LimitExceeded` and `SourceUnavailable`.
        """
        assert isinstance(self._store, GuardedLimitStore)
        has_bytes = spans is not None
        if has_bytes and self._holds_leases:
            transfer.lease = f"{_process}.{next(_numbers)}"
        else:
            transfer.is_held = True
        lease = transfer.lease or None
        costs = self._costs(transfer, version, size, spans, file) if spans is not None else ()
        if not (self._window or lease or costs):
            return
        try:
            verdict, used_up = await self._store.enter(
                transfer.client,
                window=self._window,
                most=self.concurrent,
                lease=lease,
                costs=costs,
                parts=transfer.parts,
                now=transfer.spent_at,
                gate=gate,
            )
        except NotCounted:
            transfer.is_held = True
            return
        self._judge(transfer, lease, verdict)
        if costs:
            self._charge(transfer, used_up)

    def _new(self, client: str, is_transfer: bool) -> "tuple[Transfer, str | None]":
        """Return a transfer, and the lease that it asks for."""
        transfer = Transfer(self, client)
        if not self._holds_leases:
            transfer.is_held = True
            return transfer, None
        transfer.lease = f"{_process}.{next(_numbers)}"
        if is_transfer and self._queues and client in self._queues:
            transfer.waits = True  # behind those that wait already
            return transfer, None
        return transfer, transfer.lease if is_transfer else None

    def _judge(self, transfer: "Transfer", lease: str | None, verdict: Verdict) -> None:
        if verdict is ALLOWED or verdict.refused is None:
            transfer.is_held = transfer.is_held or lease is not None
        elif verdict.refused == "concurrent" and self.queues:
            transfer.waits = True
        else:
            raise self._refusal(verdict)

    async def hold(self, transfer: "Transfer") -> None:
        """Hold a lease for a transfer that has none, or note that it has to wait in the queue.

        Raises `LimitExceeded` and `SourceUnavailable`.
        """
        if self._queues.get(transfer.client):
            transfer.waits = True  # behind those that wait already
            return
        verdict = await self._take(transfer)
        if verdict.refused is not None:
            if not self.queues:
                raise self._refusal(verdict)
            transfer.waits = True

    async def _take(self, transfer: "Transfer") -> Verdict:
        verdict = await self._store.admit(transfer.client, window=None, most=self.concurrent, lease=transfer.lease)
        transfer.is_held = verdict.refused is None
        return verdict

    async def wait(self, transfer: "Transfer", when_half_closed: "WhenHalfClosed | None" = None) -> None:
        """Wait in the queue until the transfer holds a lease. Raises `LimitExceeded` and `SourceUnavailable`.

        when_half_closed: calls a function when the client closes its side, which ends the wait.
        """
        queue = self._queues.setdefault(transfer.client, deque())
        if len(queue) >= MAX_WAITING:
            raise self._refusal(Verdict("concurrent", 1.0))
        place = _Place()
        queue.append(place)
        try:
            with anyio.move_on_after(self._queue_seconds) as patience:
                if when_half_closed is not None:
                    when_half_closed(patience.cancel)
                while queue[0] is not place:
                    await place.wait(self._queue_seconds)
                while (await self._take(transfer)).refused is not None:
                    await place.wait(_POLL_SECONDS if self.is_shared else self._queue_seconds)
        finally:
            if when_half_closed is not None:
                when_half_closed(None)
            queue.remove(place)
            if queue:
                queue[0].wake()
            else:
                self._queues.pop(transfer.client, None)
        if not transfer.is_held:
            raise self._refusal(Verdict("concurrent", 1.0))

    def spend(
        self, transfer: "Transfer", version: str, size: int | None, spans: Sequence[ByteRange | None], file: int | None
    ) -> Awaitable[None] | None:
        """Add the bytes and the download to the quotas of the client. Return what has to be awaited, if anything.

        version: the path and the version of the file. size: of the body in bytes, None if it is not known before it
        ends. spans: the parts of the file that it has. file: the size of the file in bytes. Raises `LimitExceeded` and
        `SourceUnavailable`.
        """
        if not self._quotas:
            return None
        if transfer.is_charged:  # for a version of the file of which nothing was sent
            refunds, unsent = self._refunds(transfer, 0, is_complete=False)
            self._store.release(transfer.client, None, refunds, spent_at=transfer.spent_at, unsent=unsent)
            transfer.is_charged = False
        costs = self._costs(transfer, version, size, spans, file)
        if self._memory is None:
            return self._spend(transfer, costs)
        self._charge(transfer, self._memory.spend_nowait(transfer.client, costs, transfer.parts, transfer.spent_at))
        return None

    def _costs(
        self, transfer: "Transfer", version: str, size: int | None, spans: Sequence[ByteRange | None], file: int | None
    ) -> Costs:
        """Return what an answer costs, and note it in its transfer."""
        if self._counts_downloads:
            known = tuple((span.start, span.stop) for span in spans if span is not None)
            transfer.parts = Parts(_short(version), known or ((0, 1),), file if known and file is not None else 1)
        transfer.spent, transfer.spent_at = size, time.time()
        return [(quota, (size or 0) if quota.unit == "bytes" else 0) for quota in self._quotas]

    async def _spend(self, transfer: "Transfer", costs: Costs) -> None:
        try:
            used_up = await self._store.spend(transfer.client, costs, parts=transfer.parts, now=transfer.spent_at)
        except NotCounted:
            return
        self._charge(transfer, used_up)

    def _charge(self, transfer: "Transfer", used_up: Quota | None) -> None:
        if used_up is not None:
            raise self._exceeded(used_up.text, seconds_left(used_up, transfer.spent_at))
        transfer.is_charged = True

    def let_go(self, transfer: "Transfer") -> None:
        """Give back the lease of a transfer that waits for another one first. `hold` takes it again."""
        if transfer.is_held and self._holds_leases:
            transfer.is_held = False
            self._store.release(transfer.client, transfer.lease, (), spent_at=0.0, unsent=None)
            self._wake(transfer.client)

    def end(self, transfer: "Transfer", sent: int | None, *, is_complete: bool) -> None:
        """Give back what a transfer holds. sent: bytes of its body, None if all of what it was to have."""
        refunds, unsent = self._refunds(transfer, sent, is_complete=is_complete)
        lease = transfer.lease if transfer.is_held and self._holds_leases else None
        transfer.is_held = transfer.is_charged = False
        if lease is not None or refunds:
            self._store.release(transfer.client, lease, refunds, spent_at=transfer.spent_at, unsent=unsent)
        if self._queues:
            self._wake(transfer.client)

    def _refunds(self, transfer: "Transfer", sent: int | None, *, is_complete: bool) -> tuple[Costs, Parts | None]:
        """Return what the quotas get back, and which parts were not sent, of a transfer that was charged."""
        if not transfer.is_charged:
            return (), None
        unsent = None
        parts, back = transfer.parts, 0 if sent is None else (transfer.spent or 0) - sent
        if parts is not None:
            has_all = is_complete or sent is None
            unsent = parts.after(parts.size if has_all else 0 if sent is None or transfer.spent is None else sent)
        if not back and unsent is None:
            return (), None
        return [(quota, back if quota.unit == "bytes" else 0) for quota in self._quotas], unsent

    def _wake(self, client: str) -> None:
        """Have the one that waits first ask for a lease: one has become free."""
        if queue := self._queues.get(client):
            queue[0].wake()

    def rates_of(self, transfer: "Transfer") -> tuple[SharedRate, ...]:
        """Return the rates that a transfer shares with others."""
        total = () if self.total is None else (self.total,)
        if self.rate is None:
            return total
        client, last = transfer.client, self._last_rates
        shared = self._rates.get(client)
        if shared is None:
            store = self._store
            shared = SharedRate(self.rate, (lambda: store.transfers(client)) if self.is_shared else lambda: 0)
            self._rates[client] = shared
            for first in list(islice(last, 2)):  # two for each one that is new, so that they become fewer
                if last[first].is_idle or last[first].paces or len(last) >= MAX_CLIENTS:
                    del last[first]
        last[client] = shared
        last.move_to_end(client)
        return (shared, *total)

    def follow(self, client: str) -> None:
        """Set the rates of the client's transfers: other processes have begun or ended some."""
        if (shared := self._rates.get(client)) is not None:
            shared.change()

    @property
    def uncounted(self) -> int:
        """How many requests were allowed without being counted in this process, because the store did not answer.

        Limits with the same store have one number together.
        """
        return self._store.uncounted if isinstance(self._store, GuardedLimitStore) else 0

    def _refusal(self, verdict: Verdict) -> LimitExceeded:
        if verdict.refused == "requests":
            assert self._window is not None
            return self._exceeded(self._window.text, verdict.wait)
        transfers = "1 transfer" if self.concurrent == 1 else f"{self.concurrent} transfers"
        return self._exceeded(f"at most {transfers} at once", verdict.wait)

    def _exceeded(self, limit: str, wait: float) -> LimitExceeded:
        """Count that a limit was hit, and return the error."""
        self.hits[limit] += 1
        return LimitExceeded(limit, wait=wait)

    async def check(self) -> None:
        """Return if the store answers. Raises whatever the library of the store raises."""
        await self._store.check()

    async def aclose(self) -> None:
        """Close the connections of the store in the running event loop."""
        await self._store.aclose()


class _Place:
    """A place in a queue. It is woken when a transfer has ended, or when it is the first one."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def wake(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Return when `wake` is called, or was called since the last wait, or after some seconds."""
        with anyio.move_on_after(seconds):
            await self._event.wait()
        self._event = anyio.Event()


class Transfer:
    """The part of some `Limits` that one request takes.

    client: its key. is_held: whether it holds a lease. waits: whether it has to wait for one in the queue. spent,
    spent_at, parts: the bytes that its quotas were charged with, None if their number was not known, when, and the
    parts of the file. is_charged: whether they were.
    """

    __slots__ = ("client", "is_charged", "is_held", "lease", "limits", "parts", "spent", "spent_at", "waits")

    def __init__(self, limits: "Limits | SourceLimit", client: str) -> None:
        self.limits = limits
        self.client = client
        self.lease = ""
        self.is_held = False
        self.waits = False
        self.spent: int | None = None
        self.spent_at = 0.0
        self.parts: Parts | None = None
        self.is_charged = False


class Transfers:
    """The parts of all its limits that one request takes. A context manager, which gives them back."""

    __slots__ = (
        "_all",
        "_before",
        "_by_proxy",
        "_is_at_once",
        "_is_complete",
        "_lasts",
        "_of_client",
        "_sent",
        "counts_bytes",
        "is_held",
        "is_ours",
        "keeper",
        "may_last",
        "rates",
        "waits",
    )

    def __init__(self) -> None:
        self._all: list[Transfer] = []
        self._before = 0
        self._sent: int | None = None
        self._is_complete = False
        self._is_at_once = False
        self.counts_bytes = False
        self._of_client: tuple[SharedRate, ...] = ()
        self._by_proxy: tuple[SharedRate, ...] = ()
        self.rates: tuple[SharedRate, ...] = ()
        """The rates that the transfer shares with others."""
        self.waits = False
        """Whether a lease may have to be waited for."""
        self.is_held = True
        """Whether all leases are held."""
        self.keeper: Callable[[Transfers], None] | None = None
        """Gets what the transfer holds of limits with a `proxy_log`, when the answer has been handed over."""
        self.is_ours = False
        """Whether our own response keeps to them, so that `LimitsMiddleware` has nothing to do."""
        self.may_last = False
        """Whether they may be given back after the end of the context, if that is by no error: see `last`."""
        self._lasts = False

    def __enter__(self) -> "Transfers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._lasts:
            self._lasts = False
            return
        if kind is not None and self._is_at_once:
            self._sent, self._is_complete = 0, False
        if kind is not None:
            self.keeper = None
        self.end()

    def last(self) -> "Transfers":
        """Have the end of the context leave everything to another context with the same object, which ends later."""
        self._lasts = True
        return self

    @property
    def limits(self) -> "list[Limits | SourceLimit]":
        """The limits of which the request takes something."""
        return [one.limits for one in self._all]

    @property
    def proxy_log(self) -> str | None:
        """The log of the proxy, if some of the limits know one."""
        return next((one.limits.proxy_log for one in self._all if one.limits.proxy_log is not None), None)

    def end(self) -> None:
        """Give back what is held, once, or leave it to the keeper."""
        ended, self._all = self._all, []
        if (keeper := self.keeper) is not None:
            self.keeper = None
            self._all = [one for one in ended if one.limits.proxy_log is not None]
            ended = [one for one in ended if one.limits.proxy_log is None]
            keeper(self)
        else:
            by_proxy, self._by_proxy = self._by_proxy, ()
            for shared in by_proxy:
                shared.end_by_proxy()
        for transfer in ended:
            transfer.limits.end(transfer, self._sent, is_complete=self._is_complete)

    def let_go(self) -> None:
        """Give back the leases. The quotas get at the end what was not sent."""
        for transfer in self._all:
            transfer.limits.let_go(transfer)

    def begin_nowait(self, limits: "Sequence[Limits | SourceLimit]", scope: Scope, *, is_transfer: bool) -> bool:
        """Count a request in the first of some limits that do not have to wait for anything.

        Return whether these are all, and hold all leases. If not, go on with `begin`. Raises `LimitExceeded`.
        """
        self._before = len(self._all)
        for one in limits:
            transfer = one.begin_nowait(scope, is_transfer=is_transfer)
            if transfer is None:
                return False
            self._add(one, transfer)
        return not self.waits

    async def begin(
        self, limits: "Sequence[Limits | SourceLimit]", scope: Scope, receive: Receive, *, is_transfer: bool
    ) -> None:
        """Count a request in the limits that hold for it, but not in those that `begin_nowait` has counted it in.

        Raises `LimitExceeded` and `SourceUnavailable`.
        """
        for one in limits[len(self._all) - self._before :]:
            self._add(one, await one.begin(scope, receive, is_transfer=is_transfer))
        if self.waits:
            self.let_go()  # while the request waits, others may have what it does not use

    async def begin_later(self, limits: "Sequence[Limits]", scope: Scope, receive: Receive) -> None:
        """Take note of the limits that hold for a request. Nothing is counted before `enter`."""
        for one in limits:
            transfer = await one.begin_later(scope, receive)
            transfer.is_held = True  # as far as others may ask before `enter`
            self._add(one, transfer)
            transfer.is_held = False

    def enter(
        self, gate: str, path: str, metadata: FileMetadata, size: int | None, spans: Sequence[ByteRange | None] | None
    ) -> list[Awaitable[None]]:
        """Return what counts the request in each of the limits, and adds its answer to the quotas.

        To be awaited at the same time, and in this order. The arguments are those of `Limits.enter` and of `spend`.
        """
        if spans is not None:
            self._sent = 0
        named = version_name(path, metadata)
        each: list[Awaitable[None]] = []
        for transfer in self._all:
            assert isinstance(transfer.limits, Limits)
            each.append(transfer.limits.enter(transfer, gate, named, size, spans, metadata.size))
        return each

    def _add(self, limits: "Limits | SourceLimit", transfer: Transfer) -> None:
        self._all.append(transfer)
        if transfer.waits:
            self.waits = True
        if not transfer.is_held:
            self.is_held = False
        if limits.counts_bytes:
            self.counts_bytes = True
        if limits.is_paced:
            rates = limits.rates_of(transfer)
            self.rates += rates
            if limits.rate is not None:
                self._of_client += rates[:1]

    @property
    def may_wait(self) -> bool:
        """Whether `hold` may have to wait for another transfer to end."""
        return not self.is_held and any(transfer.limits.queues for transfer in self._all)

    async def hold(self, when_half_closed: WhenHalfClosed | None = None) -> None:
        """Hold the leases that are not held yet. Those that have to be waited for come first.

        when_half_closed: calls a function when the client closes its side: then nothing is waited for.

        Raises `LimitExceeded` and `SourceUnavailable`.
        """
        while True:
            for transfer in self._all:
                if transfer.waits and not transfer.is_held:
                    await transfer.limits.wait(transfer, when_half_closed)
            for transfer in self._all:
                if not transfer.is_held:
                    await transfer.limits.hold(transfer)
                    if not transfer.is_held:
                        break
            else:
                self.is_held = True
                return
            self.let_go()

    def spend(
        self, path: str, metadata: FileMetadata, size: int | None, spans: Sequence[ByteRange | None]
    ) -> Awaitable[None] | None:
        """Add an answer to the quotas. Until `sent` is called, none of it counts as sent.

        Return what has to be awaited, if anything. Raises `LimitExceeded` and `SourceUnavailable`.

        path: of the URL. size: of the body in bytes, None if it is not known. spans: the parts of the file that it has,
        None for all of a file of unknown size.
        """
        self._sent = 0
        named, rest = version_name(path, metadata), iter(self._all)
        for transfer in rest:
            if (spending := transfer.limits.spend(transfer, named, size, spans, metadata.size)) is not None:
                return self._spend_rest(spending, rest, named, size, spans, metadata.size)
        return None

    async def _spend_rest(
        self,
        spending: Awaitable[None],
        rest: Iterable[Transfer],
        version: str,
        size: int | None,
        spans: Sequence[ByteRange | None],
        file: int | None,
    ) -> None:
        await spending
        for transfer in rest:
            if (following := transfer.limits.spend(transfer, version, size, spans, file)) is not None:
                await following

    def sent(self, size: int | None, *, is_complete: bool = False, is_at_once: bool = False) -> None:
        """Note the bytes of the body that were sent, None: all. is_complete: whether nothing is missing.

        is_at_once: these leave now. If the answer fails, they have not left.
        """
        self._sent, self._is_complete, self._is_at_once = size, is_complete, is_at_once

    @property
    def rate(self) -> int | None:
        """The rate in bytes per second at which a proxy may send the file; None: any.

        It is the least part of all rates of the client. They know of transfers that a proxy sends if `hand_over` is
        called for them.
        """
        return min((shared.part_of_next for shared in self._of_client), default=None)

    def hand_over(self, keeper: "Callable[[Transfers], None]") -> None:
        """Have `keeper` get what is held of limits with a `proxy_log`: a proxy sends the file until `end` is called."""
        self.keeper = keeper
        if not self._by_proxy:
            self._by_proxy = self._of_client
            for shared in self._by_proxy:
                shared.begin_by_proxy()


def version_name(path: str, metadata: FileMetadata) -> str:
    """Return a text for a version of a file."""
    version = metadata.etag if metadata.etag is not None else f"{metadata.last_modified} {metadata.size}"
    return f"{path} {version}"


def _in_redis(url: str, prefix: str, when_it_fails: WhenStoreFails, follower: Follower) -> LimitStore:
    """Return the store at a URL. All limits with the same URL share one, and the knowledge that it has failed."""
    if not isinstance(url, str) or url.partition("://")[0] not in ("redis", "rediss", "unix"):
        # the URL may have a password, so it is not shown
        raise ConfigurationError('store is not a store: give "memory" or a URL such as redis://127.0.0.1:6379/0')
    guarded = _stores.get((url, prefix, when_it_fails))
    if guarded is None:
        guarded = GuardedLimitStore(RedisLimitStore(url, prefix=prefix), when_it_fails=when_it_fails)
        _stores[url, prefix, when_it_fails] = guarded
    guarded.followers.add(follower)
    return guarded


@lru_cache(maxsize=1024)
def _short(session: str) -> str:
    return hashlib.sha256(session.encode(errors="surrogatepass")).hexdigest()[:32]
