"""`Metrics`: counts what `Accounts` tells, and gives it as text for Prometheus."""

import asyncio
import os
import resource
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Protocol

import anyio

from downloadview_async.accounts.outcome import Outcome
from downloadview_async.accounts.samples import LAGS, SECONDS, Histogram, Labels, Samples, families
from downloadview_async.accounts.shared_samples import SharedSamples
from downloadview_async.errors import ConfigurationError, SourceUnavailable
from downloadview_async.policy.limits.limits import Limits
from downloadview_async.policy.signing import URLSigner
from downloadview_async.sources.cache.index import Cache
from downloadview_async.sources.workers import Slots, Workers, slots_of

MAX_SERIES = 2_000
"""The most combinations of labels that are counted separately. Further ones are counted with the route "other"."""

_TICK = 0.25  # seconds between two looks at the event loop
_MANY = 100  # times that wait to be added to a histogram, all at once
_OTHER: Labels = ("other",) * 5


class Answering(Protocol):
    """`Accounts`, which knows how many requests are being answered."""

    @property
    def in_progress(self) -> int:
        """How many requests have been received whose answers have not ended."""


class _Row:
    """The counts for one combination of labels. times: the seconds of answers that are in no histogram yet."""

    __slots__ = ("bytes", "first", "requests", "seconds", "times", "times_of_first")

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0
        self.seconds = Histogram(SECONDS)
        self.first = Histogram(SECONDS)
        self.times: list[float] = []
        self.times_of_first: list[float] = []

    def fold(self) -> None:
        """Add the times to the histograms."""
        times, self.times = self.times, []
        self.requests += len(times)
        self.seconds.add_all(times)
        times, self.times_of_first = self.times_of_first, []
        self.first.add_all(times)


class Metrics:
    """Counts outcomes, and what sources, caches and links have done: `Accounts(app, observers=[metrics.observe])`.

    directory: an existing directory in which several processes add up their numbers. Only they may use it. Without it,
    each process has its own numbers.

    No label comes from the path of a request.

    Raises `ConfigurationError` if prometheus_client is not installed, or if the directory is missing.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        try:
            import prometheus_client  # noqa: F401
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "metrics need prometheus-client: install downloadview_async with its extra `metrics`"
            ) from exc
        if directory is not None and not os.path.isdir(directory):
            raise ConfigurationError(f"the directory {os.fspath(directory)!r} of the metrics is missing: create it")
        self._shared = None if directory is None else SharedSamples(directory)
        self._rows: dict[tuple[Any, ...], _Row] = {}
        self._aborted: Counter[Labels] = Counter()
        self._refused: Counter[Labels] = Counter()
        self._lag = Histogram(LAGS)
        self._accounts: list[Answering] = []
        self._slots: dict[str, Slots] = {}
        self._caches: dict[str, Cache] = {}
        self._signers: list[URLSigner] = []
        self._limits: dict[str, Limits] = {}
        self._workers = Workers(1)  # one at a time writes the file of this process

    def observe(self, outcome: Outcome) -> None:
        """Count an outcome. This is an observer of `Accounts`."""
        result, first = outcome.result, outcome.first_byte
        row = self._rows.get(key := (outcome.route, outcome.source, outcome.kind, outcome.status // 100, result))
        if row is None:
            row = self._rows.setdefault(key if len(self._rows) < MAX_SERIES else _OTHER, _Row())
        row.bytes += outcome.sent
        row.times.append(outcome.seconds)
        if first is not None:
            row.times_of_first.append(first)
        if len(row.times) >= _MANY:
            row.fold()
        if result == "completed":
            return
        if result == "aborted":
            self._count(self._aborted, (outcome.route or "", outcome.source or "", outcome.reason or ""))
        elif result == "refused":
            self._count(self._refused, (outcome.route or "", str(outcome.status)))

    def add_accounts(self, accounts: Answering) -> None:
        """Tell how many requests an `Accounts` is answering."""
        self._accounts.append(accounts)

    def add_source(self, name: str, source: object) -> None:
        """Tell how many threads or connections of a source are in use, and how many requests wait for one.

        Sources whose reading never blocks have none. name: the value of the label `source`.
        """
        if (slots := slots_of(source)) is not None:
            self._slots[name] = slots

    def add_cache(self, name: str, cache: Cache) -> None:
        """Tell what a cache has done. name: the value of the label `source`."""
        self._caches[name] = cache

    def add_links(self, signer: URLSigner) -> None:
        """Tell how many links a signer has verified and refused."""
        self._signers.append(signer)

    def add_limits(self, name: str, limits: Limits) -> None:
        """Tell how many requests each limit has refused. name: the value of the label `limits`."""
        self._limits[name] = limits

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Measure the event loop, and write the numbers for other processes, four times a second, until the end."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if self._shared is not None:
                with anyio.CancelScope(shield=True), suppress(OSError, SourceUnavailable):
                    await self._workers.run(self._end, self.samples())

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the numbers of all processes as text, and its media type.

        accept: the header of the request; OpenMetrics is returned if it is accepted, else the text of Prometheus.
        """
        return await self._workers.run(self._render, self.samples(), accept)

    def samples(self) -> Samples:
        """Return the numbers of this process as they are now."""
        requests: dict[Labels, Any] = {}
        sent: dict[Labels, Any] = {}
        seconds: dict[Labels, Any] = {}
        first: dict[Labels, Any] = {}
        for (route, source, kind, status, result), row in self._rows.items():
            row.fold()
            of_status = status if isinstance(status, str) else f"{status}xx" if status else "none"
            labels = (route or "", source or "", kind, of_status, result)
            requests[labels] = requests.get(labels, 0) + row.requests
            sent[labels] = sent.get(labels, 0) + row.bytes
            for into, values in ((seconds, row.seconds.values), (first, row.first.values)):
                before = into.get(labels[:1])
                into[labels[:1]] = [*values] if before is None else [a + b for a, b in zip(before, values, strict=True)]
        return {
            "requests": requests,
            "sent_bytes": sent,
            "request_seconds": seconds,
            "first_byte_seconds": first,
            "aborted": dict(self._aborted),
            "refused": dict(self._refused),
            "requests_in_progress": {(): sum(accounts.in_progress for accounts in self._accounts)},
            "event_loop_lag_seconds": {(): [*self._lag.values]},
            "processes": {(): 1},
            **self._of_sources(),
            **self._of_caches(),
            **self._of_links(),
            "limits_hit": {
                (name, limit): count for name, limits in self._limits.items() for limit, count in limits.hits.items()
            },
            "limits_uncounted": {(): max((limits.uncounted for limits in self._limits.values()), default=0)},
            **_of_process(),
        }

    def _of_sources(self) -> Samples:
        slots = {(name,): one for name, one in self._slots.items()}
        return {
            "source_in_use": {name: one.in_use for name, one in slots.items()},
            "source_waiting": {name: one.waiting for name, one in slots.items()},
            "source_waits": {name: one.waits for name, one in slots.items()},
            "source_wait_seconds": {name: one.wait_seconds for name, one in slots.items()},
            "source_refusals": {name: one.refusals for name, one in slots.items()},
            "upstream_connections": {name: one.in_use for name, one in slots.items() if one.are_connections},
        }

    def _of_caches(self) -> Samples:
        counters = {(name,): cache.counters for name, cache in self._caches.items()}
        counts = ("hits", "misses", "revalidated", "passed", "evictions", "bytes")
        return {
            **{f"cache_{count}": {name: getattr(one, count) for name, one in counters.items()} for count in counts},
            "cache_limit_bytes": {(name,): cache.max_bytes for name, cache in self._caches.items()},
        }

    def _of_links(self) -> Samples:
        total: Counter[str] = Counter()
        for signer in self._signers:
            total.update(signer.counts)
        return {"links": {(event,): count for event, count in total.items()}}

    def _count(self, counter: Counter[Labels], labels: Labels) -> None:
        if labels not in counter and len(counter) >= MAX_SERIES:
            labels = _OTHER[: len(labels)]
        counter[labels] += 1

    async def _run(self) -> None:
        while True:
            began = monotonic()
            await anyio.sleep(_TICK)
            self._lag.add(max(0.0, monotonic() - began - _TICK))
            if self._shared is not None:
                with suppress(OSError, SourceUnavailable):  # a full or a hung disk: the next look tries it again
                    await self._workers.run(self._shared.write, self.samples())

    def _render(self, samples: Samples, accept: str) -> tuple[bytes, str]:
        from prometheus_client.exposition import choose_encoder

        if self._shared is not None:
            self._shared.write(samples)
            samples = self._shared.total()
        encode, media_type = choose_encoder(accept)
        text: bytes = encode(_Collected(samples))  # type: ignore[no-untyped-call,arg-type,unused-ignore]
        return text, media_type

    def _end(self, samples: Samples) -> None:
        assert self._shared is not None
        self._shared.write(samples)
        self._shared.close()


class _Collected:
    """Samples as the registry that prometheus_client's encoders take."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def collect(self) -> Any:
        """Return the metric families."""
        return families(self._samples)


def _of_process() -> Samples:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        count = len(os.listdir("/proc/self/fd"))
    except OSError:  # another system than Linux, or no descriptor is left to look
        return {"descriptors_limit": {(): limit}}
    return {"open_descriptors": {(): count}, "descriptors_limit": {(): limit}}
