"""The model: what a load takes of each resource, and how many machines have that much.

A resource that a load needs is a sum of terms: an amount, such as requests per second, times a measured cost.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from downloadview_async import ConfigurationError
from downloadview_async.service.plan.costs import Costs

_KEEP_ALIVE = 5.0  # seconds: the default of `timeout_keep_alive`
_KEEP_ALIVE_OF_NGINX = 30.0  # seconds: `keepalive_timeout` of the printed configuration

_GIB = 1 << 30
_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Way:
    """One way to send files.

    row: the row of the benchmark. tls: two rows whose difference is the cost of TLS. holds: whether a download holds a
    connection and sends its bytes here. fetches: whether the bytes for a client may be fetched first. proxied: the row
    in which a proxy passes the bytes on, if there is one. has_proxy: whether clients connect to a proxy that is
    a part of the way, and that keeps its connections to the service; its costs are in the row.
    """

    title: str
    row: str
    tls: tuple[str, str]
    holds: bool = True
    fetches: bool = False
    proxied: str | None = None
    has_proxy: bool = False


WAYS: Mapping[str, Way] = {
    "zero-copy": Way("local files by sendfile", "serve", ("serve-tls", "serve"), proxied="serve-proxied"),
    "chunks": Way("local files in chunks, as under other servers", "serve-chunks", ("serve-tls", "serve-chunks")),
    "nginx": Way(
        "local files by nginx on the same machine, X-Accel-Redirect",
        "serve-nginx",
        ("nginx-tls", "nginx"),
        has_proxy=True,
    ),
    "cache": Way("remote files through the cache", "serve-cached", ("serve-tls", "serve"), fetches=True),
    "remote": Way("remote files without a cache", "serve-remote", ("serve-tls", "serve-chunks"), fetches=True),
    "redirect": Way("redirects to a store or CDN, which sends", "serve-redirect", ("serve-tls", "serve"), holds=False),
}
"""The ways by the names that `--send` takes."""

_LIMITS, _LINKS, _BOTH, _COMPLETIONS = "shared-limits", "shared-links", "shared-both", "serve-accounts"
# ways that have a proxy do not need the first one
_SENDING = ("cpu_shared", "cpu_connect", "cpu_per_gib_paced", "rss_per_client", "descriptors_per_client")
_SHARED = ("cpu_shared", "redis_ops", "redis_cpu", "redis_memory")

NEEDED: frozenset[tuple[str, str]] = frozenset(
    chain(
        ((way.row, figure) for way in WAYS.values() if way.holds for figure in _SENDING[way.has_proxy :]),
        ((row, figure) for way in WAYS.values() for row in way.tls for figure in _SENDING[way.has_proxy : 4]),
        ((row, figure) for row in (_LIMITS, _LINKS, _BOTH) for figure in _SHARED),
        (("serve-redirect", figure) for figure in _SENDING[:2]),
        (
            (way.proxied, figure)
            for way in WAYS.values()
            if way.proxied
            for figure in ("cpu_shared", "cpu_per_gib_paced")
        ),
        [("serve", "idle"), ("serve-cached", "cpu_per_gib_fill"), (_COMPLETIONS, "cpu_shared")],
    )
)
"""Each row and figure that some plan needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The requests of clients to all machines together.

    clients: downloads at once. requests: downloads that begin in a second. size: bytes of a file. hit_ratio: the share
    of the bytes that a cache has. kept: whether a proxy in front keeps its connections to the service. links, limits:
    whether each download has a signed link for one download, and limits of its client, both in Redis. completions:
    whether completed downloads are counted.
    """

    send: str
    clients: float
    requests: float
    size: float
    hit_ratio: float = 0.0
    tls: bool = False
    kept: bool = False
    links: bool = False
    limits: bool = False
    completions: bool = False

    @property
    def connects_anew(self) -> bool:
        """Whether each download has a new connection to the machine. A proxy on another machine may keep its own."""
        return not self.kept or WAYS[self.send].has_proxy

    @property
    def bytes_per_second(self) -> float:
        """The bytes that clients receive in a second."""
        return self.requests * self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine. network: bytes per second in each direction. descriptors: of a process; each core has one.

    use: the share of each resource that a plan may use.
    """

    cores: int
    memory: float
    network: float
    descriptors: int
    use: float


@dataclass(frozen=True, slots=True)
class Term:
    """An amount times a cost, and where the cost was measured: rows and a figure, or nothing for an exact number."""

    amount: float
    of: str
    """The unit of the amount."""
    cost: float
    unit: str
    """The unit of the product."""
    where: str = ""


@dataclass(frozen=True, slots=True)
class Need:
    """How much a load takes of one resource of all machines, and how much a machine has of it."""

    resource: str
    terms: Sequence[Term]
    has: float
    """The amount that one machine has for clients."""
    has_text: str
    """How `has` is computed."""

    @property
    def amount(self) -> float:
        """The sum of the terms."""
        return sum(term.amount * term.cost for term in self.terms)

    @property
    def machines(self) -> float:
        """How many machines have as much, as a fraction."""
        return self.amount / self.has


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The use of servers that all machines share, in a second; memory is for the links and clients of a day."""

    redis_operations: Sequence[Term]
    redis_share: float
    """The share of a Redis, which has one core."""
    redis_memory: float
    store_requests: float
    store_bytes: float
    database_downloads: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many machines a load needs."""

    load: Load
    machine: Machine
    needs: Sequence[Need]
    """The resources, the one that runs out first at the beginning."""
    spare: int
    shared: Shared
    advice: Sequence[str] = field(default_factory=tuple)

    @property
    def for_load(self) -> int:
        """The machines for the load."""
        return max(math.ceil(self.needs[0].machines), 1)

    @property
    def machines(self) -> int:
        """The machines, with those to spare."""
        return self.for_load + self.spare


def plan(load: Load, machine: Machine, costs: Costs, *, spare: int = 0) -> Plan:
    """Return how many machines a load needs. Raises `ConfigurationError` if none of the kind can serve a client."""
    needs = [
        Need("CPU", [*_cpu(load, costs)], machine.cores * machine.use, f"{machine.cores} cores x {machine.use:g}"),
        _network(load, machine),
        _memory(load, machine, costs),
        _descriptors(load, machine, costs),
    ]
    needs.sort(key=lambda need: need.machines, reverse=True)
    shared = _shared(load, costs)
    made = Plan(load=load, machine=machine, needs=needs, spare=spare, shared=shared)
    return Plan(load=load, machine=machine, needs=needs, spare=spare, shared=shared, advice=[*_advice(made)])


def _term(costs: Costs, amount: float, of: str, row: str, figure: str, unit: str) -> Term:
    return Term(amount, of, costs.of(row, figure), unit, f"{row} {figure}")


def _more(costs: Costs, amount: float, of: str, rows: tuple[str, str], figure: str, unit: str) -> Term:
    """Return a term whose cost is what one row costs more than another, at least 0."""
    more = max(costs.of(rows[0], figure) - costs.of(rows[1], figure), 0.0)
    return Term(amount, of, more, unit, f"{rows[0]} {figure} - {rows[1]} {figure}")


def _cpu(load: Load, costs: Costs) -> Iterator[Term]:
    way, per_second = WAYS[load.send], "core-seconds/s"
    row, request = way.row, "cpu_connect" if load.connects_anew else "cpu_shared"
    if not load.connects_anew and way.proxied:
        row = way.proxied
    yield _term(costs, load.requests, "requests/s", row, request, per_second)
    if load.tls:
        yield _more(costs, load.requests, "requests/s", way.tls, request, per_second)
    if way.holds:
        gib = load.bytes_per_second / _GIB
        missed = gib * (1 - load.hit_ratio) if load.send == "cache" else 0.0
        yield _term(costs, gib - missed, "GiB/s", row, "cpu_per_gib_paced", per_second)
        if missed:
            yield _term(costs, missed, "GiB/s", way.row, "cpu_per_gib_fill", per_second)
        if load.tls:
            yield _more(costs, gib, "GiB/s", way.tls, "cpu_per_gib_paced", per_second)
    for more in filter(None, [_shared_row(load), _COMPLETIONS if load.completions else None]):
        yield _more(costs, load.requests, "requests/s", (more, "serve"), "cpu_shared", per_second)


def _shared_row(load: Load) -> str | None:
    if load.links and load.limits:
        return _BOTH
    return _LINKS if load.links else _LIMITS if load.limits else None


def _network(load: Load, machine: Machine) -> Need:
    sent = load.bytes_per_second if WAYS[load.send].holds else 0.0
    terms = [Term(sent, "bytes/s", 1.0, "bytes/s")]
    return Need("network", terms, machine.network * machine.use, f"{machine.network * 8e-9:g} Gbit/s x {machine.use:g}")


def keep_alive(load: Load) -> float:
    """Return for how many seconds a client's connection stays open after its download."""
    return _KEEP_ALIVE_OF_NGINX if load.send == "nginx" else _KEEP_ALIVE


def _connections(load: Load) -> float:
    """Return how many connections are open: those of downloads, and those that wait for another request."""
    idle = load.requests * keep_alive(load) if load.connects_anew else 0.0
    return (load.clients if WAYS[load.send].holds else 0.0) + idle


def _memory(load: Load, machine: Machine, costs: Costs) -> Need:
    way, count = WAYS[load.send], _connections(load)
    row = way.row if way.holds else "serve"
    terms = [_term(costs, count, "connections", row, "rss_per_client", "bytes")]
    if load.tls:
        terms.append(_more(costs, count, "connections", way.tls, "rss_per_client", "bytes"))
    idle = costs.of("serve", "idle")
    has = machine.memory * machine.use - machine.cores * idle
    if has <= 0:
        raise ConfigurationError(
            f"{machine.cores} workers need {machine.cores * idle / 1e9:.2g} GB of memory before the first client: "
            "give more --memory, a larger --use or fewer --cores"
        )
    text = f"{machine.memory / 1e9:g} GB x {machine.use:g} - {machine.cores} workers x {idle / 1e6:.0f} MB (serve idle)"
    return Need("memory", terms, has, text)


def _descriptors(load: Load, machine: Machine, costs: Costs) -> Need:
    way, count = WAYS[load.send], _connections(load)
    row = way.row if way.holds else "serve"
    each = max(costs.of(row, "descriptors_per_client"), 1.0)
    terms = [Term(count, "connections", each, "descriptors", f"{row} descriptors_per_client")]
    has = machine.cores * machine.descriptors * machine.use
    return Need("descriptors", terms, has, f"{machine.cores} workers x {machine.descriptors:,} x {machine.use:g}")


def _shared(load: Load, costs: Costs) -> Shared:
    way, row = WAYS[load.send], _shared_row(load)
    fetched = (1 - load.hit_ratio if load.send == "cache" else 1.0) if way.fetches or not way.holds else 0.0
    operations = [_term(costs, load.requests, "requests/s", row, "redis_ops", "operations/s")] if row else []
    count = sum(term.amount * term.cost for term in operations)
    return Shared(
        redis_operations=operations,
        redis_share=count * costs.of(row, "redis_cpu") if row else 0.0,
        redis_memory=load.requests * _DAY * costs.of(row, "redis_memory") if row else 0.0,
        store_requests=load.requests * fetched,
        store_bytes=load.bytes_per_second * fetched,
        database_downloads=load.requests if load.completions else 0.0,
    )


def _advice(made: Plan) -> Iterator[str]:
    load, machine, shared = made.load, made.machine, made.shared
    if shared.redis_share > machine.use:
        at = load.requests * machine.use / shared.redis_share
        yield f"One Redis is enough up to {at:,.0f} requests/s: give each group of machines a separate one."
    if load.send == "remote":
        each = math.ceil(load.clients / made.for_load / machine.cores)
        yield f"Each worker has {each:,} upstream requests at once: set max_connections of the source (default 100)."
    if made.for_load > 1 and load.send == "cache":
        yield "The hit ratio is that of all machines: route by URL, so that a file is cached on one of them."
    if made.for_load > 1 and not WAYS[load.send].fetches and WAYS[load.send].holds:
        yield "Each machine needs the files: copies that keep their times (rsync --times), or a shared file system."
    if made.needs[0].resource == "memory" and load.send in ("chunks", "remote"):
        yield "Chunks of slow clients fill the memory: send local files by sendfile, by nginx, or through the cache."
