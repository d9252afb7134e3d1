"""What each kind of request costs: CPU seconds of the replicas, commands of Redis, and requests to the store."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count

from benchmarks.load import read_body, read_head
from tests.cluster.contents import SHARED
from tests.cluster.driver import Download, Driver
from tests.cluster.invariants import Logs
from tests.cluster.nodes import PATIENCE
from tests.cluster.site import Site

GIB = 1 << 30
AT_ONCE = 8
"""Requests that are made together, for each replica."""
_TURNS = 900  # requests on a connection: nginx closes one after 1,000


@dataclass(frozen=True)
class Cost:
    """What requests of one kind have cost. CPU seconds are those of all replicas together, less those of idle ones."""

    kind: str
    replicas: int
    requests: int
    bytes: int
    seconds: float
    replica_cpu: float
    front_cpu: float
    cache_cpu: float
    redis_cpu: float
    redis_commands: int
    redis_reads: int
    """How often Redis has read from a connection: a pipeline is read at once, so it is the number of round trips."""
    store_requests: int
    shares: Sequence[float]
    """The share of each replica in the CPU seconds."""

    @property
    def milliseconds(self) -> float:
        """CPU milliseconds of the replicas for a request."""
        return self.replica_cpu / self.requests * 1000

    @property
    def per_gib(self) -> float:
        """CPU seconds of the replicas for a GiB."""
        return self.replica_cpu / self.bytes * GIB


Make = Callable[[Driver, int, Callable[..., str]], Download]


def _plain(kind: str, path: str, name: str) -> tuple[str, Make]:
    return kind, lambda driver, number, sign: driver.download("cost", path, name)


KINDS: list[tuple[str, Make]] = [
    _plain("files, 20 kB, by nginx", "/files/a.bin", "a.bin"),
    _plain("files, 1 MB, by nginx", "/files/b.bin", "b.bin"),
    _plain("files, 20 kB, streamed", "/stream/a.bin", "a.bin"),
    _plain("files, 1 MB, streamed", "/stream/b.bin", "b.bin"),
    _plain("files, 24 MB, streamed", "/stream/large.bin", "large.bin"),
    (
        "signed link, 20 kB, by nginx",
        lambda driver, number, sign: driver.download("cost", sign("/signed/a.bin"), "a.bin"),
    ),
    (
        "link for one download, 20 kB, streamed",
        lambda driver, number, sign: driver.download("cost", sign("/once/a.bin", uses=1), "a.bin"),
    ),
    (
        "quota of downloads, 20 kB, streamed",
        lambda driver, number, sign: driver.download("cost", "/quota/a.bin", "a.bin", address=driver.address()),
    ),
    _plain("store, 30 kB", "/store/small.bin", "small.bin"),
    _plain("store, 24 MB", "/store/object.bin", "object.bin"),
    _plain("cached, 2 MB", "/cold/warm.bin", "warm.bin"),
    (
        "range of 100 kB, streamed",
        lambda driver, number, sign: driver.download(
            "cost", "/stream/b.bin", "b.bin", first=number * 1000 % 900_000, last=number * 1000 % 900_000 + 99_999
        ),
    ),
]
assert SHARED["b.bin"] == 1_000_000


async def redis_info(port: int) -> dict[str, str]:
    """Return what Redis says of itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"INFO stats\r\n")
    size = int((await reader.readline())[1:])
    text = (await reader.readexactly(size)).decode()
    writer.close()
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


async def measure(site: Site, seconds: float) -> list[Cost]:
    """Return what each kind of request costs, each measured for so many seconds."""
    site.put("warm.bin")
    _separate(site)
    driver = Driver(site.port)
    await driver.fetch(driver.download("cost", "/cold/warm.bin", "warm.bin"))
    idle = await _idle(site, 4.0)
    costs = []
    for kind, make in KINDS:
        await _run(driver, make, site, 0.5)
        costs.append(await _measure(site, kind, make, seconds, driver, idle))
    return costs


def _separate(site: Site) -> None:
    """Give the replicas one core and all else, which includes this process, the others.

    The benchmark measures in the same way. A process that moves between cores which others use, too, takes more of
    their time for the same work.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    for node in site.nodes.values():
        node.pin({first} if node in site.replicas or not others else others)
    os.sched_setaffinity(0, others or {first})


async def _run(driver: Driver, make: Make, site: Site, seconds: float) -> list[int]:
    """Have clients ask for so long, and return how many bytes each answer has had."""
    return await asyncio.to_thread(_ask, driver, make, site, seconds)


def _ask(driver: Driver, make: Make, site: Site, seconds: float) -> list[int]:
    """Ask several times at once, so that a replica is as busy as a server of the benchmark."""
    ends, numbers, sign = time.monotonic() + seconds, count(), site.signer().sign
    sizes: list[int] = []
    while time.monotonic() < ends:
        with ExitStack() as stack:
            sockets = [stack.enter_context(_connection(site, "127.0.0.1")) for _ in range(AT_ONCE * site.size)]
            for _ in range(_TURNS):
                sizes += _ask_at_once(site, sockets, [make(driver, next(numbers), sign) for _ in sockets])
                if time.monotonic() >= ends:
                    break
    return sizes


def _ask_at_once(site: Site, sockets: Sequence[socket.socket], downloads: Sequence[Download]) -> list[int]:
    """Send a request on each connection, or on a new one for another address, and then read the answers."""
    sizes = []
    with ExitStack() as stack:
        asked = []
        for kept, wanted in zip(sockets, downloads, strict=True):
            is_new = wanted.address != "127.0.0.1"
            sock = stack.enter_context(_connection(site, wanted.address)) if is_new else kept
            sock.sendall(_request(wanted))
            asked.append((sock, wanted))
        for sock, wanted in asked:
            head = read_head(sock, wanted.path)
            assert head.status == (200 if wanted.is_whole else 206), (wanted, head)
            read_body(sock, head)
            sizes.append(head.length)
    return sizes


def _connection(site: Site, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", site.port), PATIENCE, source_address=(address, 0))


def _request(wanted: Download) -> bytes:
    fields = [f"GET {wanted.path} HTTP/1.1", "Host: cluster", f"User-Agent: {wanted.agent}"]
    if not wanted.is_whole:
        fields.append(f"Range: bytes={wanted.first}-{wanted.last}")
    return "\r\n".join([*fields, "", ""]).encode()


def _cpu(site: Site) -> dict[str, float]:
    return {name: node.cpu_seconds() for name, node in site.nodes.items()}


async def _idle(site: Site, seconds: float) -> dict[str, float]:
    """Return the CPU seconds that each process takes in a second without requests."""
    await asyncio.sleep(1.0)
    before = _cpu(site)
    await asyncio.sleep(seconds)
    return {name: (now - before[name]) / seconds for name, now in _cpu(site).items()}


async def _measure(site: Site, kind: str, make: Make, seconds: float, driver: Driver, idle: dict[str, float]) -> Cost:
    await asyncio.sleep(1.0)  # what is written in the background, such as completions
    logs, before, info, began = Logs(site), _cpu(site), await redis_info(site["redis"].port), time.monotonic()
    sizes = await _run(driver, make, site, seconds)
    took = time.monotonic() - began
    await asyncio.sleep(1.0)
    after, now = _cpu(site), await redis_info(site["redis"].port)
    whole = time.monotonic() - began
    used = {name: max(0.0, after[name] - before[name] - idle[name] * whole) for name in before}
    replicas = [used[node.name] for node in site.replicas]
    return Cost(
        kind,
        site.size,
        len(sizes),
        sum(sizes),
        took,
        sum(replicas),
        used["front"],
        sum(used[node.name] for node in site.caches),
        used["redis"],
        # without the INFO that has read the first number
        int(now["total_commands_processed"]) - int(info["total_commands_processed"]) - 1,
        int(now["total_reads_processed"]) - int(info["total_reads_processed"]) - 1,
        len(logs.store()),
        [round(one / (sum(replicas) or 1), 2) for one in replicas],
    )


def table(costs: Sequence[Cost]) -> str:
    """Return the costs as a table of Markdown."""
    lines = [
        "| requests | CPU ms of the service | CPU s/GiB | ms of the front | ms of the caches "
        "| Redis commands | Redis reads | store requests |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in costs:
        each = one.requests
        lines.append(
            f"| {one.kind} | {one.milliseconds:.2f} | {one.per_gib:.2f} | {one.front_cpu / each * 1000:.2f} "
            f"| {one.cache_cpu / each * 1000:.2f} | {one.redis_commands / each:.2f} | {one.redis_reads / each:.2f} "
            f"| {one.store_requests / each:.2f} |"
        )
    return "\n".join(lines)


def as_rows(costs: Sequence[Cost]) -> list[dict[str, object]]:
    """Return the costs for a file of JSON."""
    return [asdict(one) for one in costs]
