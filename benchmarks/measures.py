"""What is measured: each function takes a server that has just been started, and returns figures in base units."""

import contextlib
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import proc
from benchmarks.load import (
    HOST,
    LoadError,
    Wrk,
    ask,
    ask_each,
    connect,
    downloading,
    first_byte_seconds,
    read_body,
    run_wrk,
    stalled,
)
from benchmarks.running import FILE_SIZES, MEGABYTES, Running

_GIB = 1 << 30
_MIB = 1 << 20
_CONNECTIONS = 16
_WARM_REQUESTS = 200
_COLD_TURNS = 2
_QUIET = 0.25  # seconds in which a server that has no more to do uses no processor
_RANGE = 64 << 10
_PACE = 2e6  # bytes per second of each client of `paced`
_PACED_CLIENTS = 64
_LEAST_SHARE = 0.8  # of their rate, which paced clients have to receive
_COUNTED = 100  # downloads whose operations of Redis are counted

_RANGES = """
math.randomseed({seed})
request = function()
  local start = math.random(0, {last})
  return wrk.format("GET", nil, {{ Range = string.format("bytes=%d-%d", start, start + {length} - 1) }})
end
"""
"""A script for wrk whose ranges begin at any byte."""

_MANY_LINKS = 50_000  # when one comes again, the signer no longer remembers that it is valid

_PATHS = """
local requests = {{}}
local last = 0
init = function()
  for path in io.lines("{file}") do requests[#requests + 1] = wrk.format("GET", path) end
end
request = function()
  last = last % #requests + 1
  return requests[last]
end
"""
"""A script for wrk that asks for each path in a file."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done. Ratios of two runs are comparable if the sizes on which they depend are the same."""

    large_bytes: int = _GIB
    seconds: int = 2
    """How long each load of wrk lasts."""
    cpu_seconds: float = 0.4
    """How much of the processor downloads of the large file have to use."""
    stalled_clients: int = 2000
    downloads: int = 50
    many_downloads: int = 500
    shared_requests: int = 1000
    connections: int = 500


FULL = Scale()
QUICK = Scale(
    large_bytes=128 * _MIB,
    seconds=1,
    cpu_seconds=0.05,
    stalled_clients=200,
    downloads=10,
    many_downloads=50,
    shared_requests=100,
    connections=50,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One kind of number: how it is shown, as a multiple of `unit` with so many digits, and which way is better."""

    title: str
    unit: float = 1.0
    digits: int = 0
    more_is_better: bool = False
    depends: tuple[str, ...] = ()
    """The members of `Scale` that have to be the same in two runs that are compared."""

    def show(self, value: float) -> str:
        """Return a value in base units as it is shown."""
        return f"{value / self.unit:,.{self.digits}f}"


_LARGE = ("large_bytes",)
_STALLED = ("stalled_clients",)
_BESIDE = ("downloads",)

FIGURES = {
    "rps_10k": Figure("10 KiB, requests/s", more_is_better=True),
    "cpu_10k": Figure("10 KiB, CPU of a request, µs", 1e-6, 1),
    "cpu_connect": Figure("10 KiB on a new connection, CPU, µs", 1e-6, 1),
    "rps_1m": Figure("1 MiB, requests/s", more_is_better=True),
    "cpu_1m": Figure("1 MiB, CPU of a request, µs", 1e-6, 1),
    "range_1m": Figure("Range of 1 MiB, requests/s", more_is_better=True),
    "whole_1m": Figure("1 MiB in turns with the Range, requests/s", more_is_better=True),
    "rps_ranges": Figure("ranges that never repeat, requests/s", more_is_better=True),
    "cpu_ranges": Figure("ranges that never repeat, CPU of a request, µs", 1e-6, 1),
    "rps_listing": Figure("listing, pages/s", more_is_better=True),
    "cpu_listing": Figure("listing, CPU of a page, µs", 1e-6, 1),
    "cpu_per_gib": Figure("CPU seconds per GiB", digits=3, depends=_LARGE),
    "peak_growth": Figure("growth of the peak RSS, MiB", _MIB, 1, depends=_LARGE),
    "first_byte": Figure("time to the first byte, ms", 1e-3, 2),
    "cpu_per_gib_4": Figure("CPU seconds per GiB, 4 clients", digits=3, depends=_LARGE),
    "cpu_per_gib_64": Figure("CPU seconds per GiB, 64 clients", digits=3, depends=_LARGE),
    "cpu_per_gib_paced": Figure("CPU seconds per GiB, 64 clients at 2 MB/s", digits=3, depends=_LARGE),
    "cpu_per_gib_cold": Figure("CPU seconds per GiB, cold", digits=3),
    "seconds_per_gib_cold": Figure("seconds per GiB, cold", digits=2),
    "cpu_per_gib_fill": Figure("CPU seconds per GiB of a fill", digits=3, depends=_LARGE),
    "rss_per_client": Figure("RSS per stalled client, KiB", 1024, 1, depends=_STALLED),
    "descriptors_per_client": Figure("descriptors per stalled client", digits=2, depends=_STALLED),
    "p50": Figure("p50 beside downloads, ms", 1e-3, 2, depends=_BESIDE),
    "p99": Figure("p99 beside downloads, ms", 1e-3, 2, depends=_BESIDE),
    "p99_many": Figure("p99 beside many downloads, ms", 1e-3, 2, depends=("many_downloads",)),
    "start": Figure("start-up, s", digits=2),
    "idle": Figure("idle RSS, MiB", _MIB, 1),
    "cpu_workers": Figure("CPU of a request, 2 workers, µs", 1e-6, 1),
    "rps_workers": Figure("requests/s, 2 workers", more_is_better=True),
    "balance": Figure("share of the busier worker", digits=2),
    "cpu_shared": Figure("10 KiB, 8 at once, CPU of a request, µs", 1e-6, 1),
    "redis_ops": Figure("Redis operations of a download", digits=2),
    "redis_cpu": Figure("CPU of a Redis operation, µs", 1e-6, 2),
    "redis_memory": Figure("memory of Redis for a download, bytes"),
}


def warm(server: Running) -> None:
    """Ask for the small file as often as it takes to have everything loaded. Raises `LoadError` for a wrong answer."""
    answer = server.server.answer
    expected = (307 if answer == "redirect" else 200, FILE_SIZES["10k.bin"] if answer == "body" else 0)
    requests = 20 if server.server.links == "once" else _WARM_REQUESTS
    with connect(server.port, tls=server.tls) as connection:
        for _ in range(requests):
            head = ask(connection, server.path("10k.bin"))
            if (head.status, head.length) != expected:
                raise LoadError(f"{head.status} with {head.length} bytes, not {expected[0]} with {expected[1]}")
            if answer == "offload" and "x-accel-redirect" not in head.headers:
                raise LoadError("an answer without X-Accel-Redirect")
            read_body(connection, head)


def idle(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find how long the start took, and the memory after it and after the first requests."""
    return {"start": server.start_seconds, "idle": proc.resident(proc.of_sessions(server.leaders))}


def _load(
    server: Running,
    name: str,
    scale: Scale,
    core: int,
    *,
    connections: int = _CONNECTIONS,
    headers: Sequence[str] = (),
    script: str | None = None,
) -> tuple[Wrk, float]:
    """Let wrk request a file. Returns its report, and the CPU seconds of a request."""
    processes = proc.of_sessions(server.leaders)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as links:
        if server.server.links == "signed":  # each request has another link
            links.write("\n".join([server.path(name) for _ in range(_MANY_LINKS)]))
            links.flush()
            script = _PATHS.format(file=links.name)
        start = proc.cpu_seconds(processes)
        result = run_wrk(
            server.url(name), seconds=scale.seconds, connections=connections, core=core, headers=headers, script=script
        )
    return result, (proc.cpu_seconds(processes) - start) / result.requests


def rps_10k(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for a file of 10 KiB, and what one costs."""
    result, cpu = _load(server, "10k.bin", scale, core)
    return {"rps_10k": result.rate, "cpu_10k": cpu}


def rps_1m(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for a file of 1 MiB, and what one costs."""
    _expect(server, "1m.bin", status=200)
    result, cpu = _load(server, "1m.bin", scale, core)
    return {"rps_1m": result.rate, "cpu_1m": cpu}


def ranges(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for 64 KiB of the large file, each from another byte on."""
    last = scale.large_bytes - _RANGE
    script = _RANGES.format(seed=random.randrange(1 << 30), last=last, length=_RANGE)
    result, cpu = _load(server, server.server.large, scale, core, script=script)
    return {"rps_ranges": result.rate, "cpu_ranges": cpu}


def connections(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what a small file costs on a new connection."""
    processes, path = proc.of_sessions(server.leaders), server.path("10k.bin")
    start = proc.cpu_seconds(processes)
    for _ in range(scale.connections):
        with connect(server.port, tls=server.tls) as connection:
            read_body(connection, ask(connection, path))
    _wait_until_quiet(server)
    return {"cpu_connect": (proc.cpu_seconds(processes) - start) / scale.connections}


def listing(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for the page of a folder."""
    result, cpu = _load(server, "folder/", scale, core, headers=["Accept: text/html"])
    return {"rps_listing": result.rate, "cpu_listing": cpu}


def workers(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second of several workers on all cores, and how evenly they work."""
    processes = proc.of_sessions(server.leaders)
    before = {process: proc.cpu_seconds([process]) for process in processes}
    result, _ = _load(server, "10k.bin", scale, core, connections=64)
    used = sorted((proc.cpu_seconds([process]) - before[process] for process in processes), reverse=True)
    return {
        "rps_workers": result.rate,
        "cpu_workers": sum(used) / result.requests,
        "balance": used[0] / (used[0] + used[1]),
    }


def range_1m(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for a Range of 1 MiB of a large file, and then for a file of 1 MiB.

    Both vary with the pages of the page cache that a megabyte is in: each round takes others.
    """
    start = random.randrange(0, scale.large_bytes, _MIB)
    header = f"Range: bytes={start}-{start + _MIB - 1}"
    rates = {}
    for figure, name, headers in (
        ("range_1m", server.server.large, [header]),
        ("whole_1m", random.choice(MEGABYTES), []),
    ):
        _expect(server, name, *headers, status=206 if headers else 200)
        rates[figure] = _load(server, name, scale, core, headers=headers)[0].rate
    return rates


def _expect(server: Running, name: str, *headers: str, status: int) -> None:
    """Ask for a MiB once. Raises `LoadError` for a wrong answer."""
    with connect(server.port, tls=server.tls) as connection:
        head = ask(connection, server.path(name), *headers)
        if (head.status, head.length) != (status, _MIB):
            raise LoadError(f"{name} was answered with {head.status} and {head.length} bytes, not {status} and {_MIB}")
        read_body(connection, head)


def large(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what a large download costs: processor time, memory, and the time to its first byte."""
    path = _prime(server)
    with connect(server.port, tls=server.tls) as connection:
        processes = proc.of_sessions(server.leaders)
        before = proc.resident(processes)
        proc.reset_peak(processes)
        start, used, sent, growth = proc.cpu_seconds(processes), 0.0, 0, 0
        while not sent or used < scale.cpu_seconds:
            head = ask(connection, path)
            read_body(connection, head)
            used = proc.cpu_seconds(processes) - start
            if not sent:
                growth = proc.resident_peak(processes) - before
            sent += head.length
    times: list[float] = []
    deadline = time.monotonic() + scale.seconds / 3
    while len(times) < 3 or (len(times) < 50 and time.monotonic() < deadline):
        times.append(first_byte_seconds(server.port, path, server.tls))
    return {"cpu_per_gib": used * _GIB / sent, "peak_growth": growth, "first_byte": statistics.median(times)}


def _prime(server: Running) -> str:
    """Return the path of the large file, which has been downloaded once if the server wants that."""
    path = server.path(server.server.large)
    if server.server.primed:
        with connect(server.port, tls=server.tls) as connection:
            read_body(connection, ask(connection, path))
        _wait_until_kept(server, path)
    return path


def _wait_until_kept(server: Running, path: str) -> None:
    """Return when a cache has the file, which may be a while after the client has it; at once without Cache-Status."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with connect(server.port, tls=server.tls) as connection:
            if "hit" in ask(connection, path).headers.get("cache-status", "hit"):
                return
        time.sleep(0.1)
    raise LoadError(f"{path} was not kept")


def _several(server: Running, scale: Scale, core: int, clients: int, *, rate: float | None = None) -> float:
    """Return the CPU seconds per GiB of several downloads at once."""
    path = _prime(server)
    processes = proc.of_sessions(server.leaders)
    with downloading(server.port, path, clients, core=core, rate=rate, niceness=0, tls=server.tls) as received:
        time.sleep(scale.seconds / 2)  # the first bytes fill the queues of the kernel
        start, begun = proc.cpu_seconds(processes), received()
        time.sleep(scale.seconds)
        used, sent = proc.cpu_seconds(processes) - start, received() - begun
    least = 1 if rate is None else rate * clients * scale.seconds * _LEAST_SHARE
    if sent < least:  # then the bytes that the server has sent are not those that the clients have received
        raise LoadError(f"the clients received {sent:,} bytes, not {least:,.0f}: the machine or the server is too busy")
    return used * _GIB / sent


def large_4(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what the bytes of 4 large downloads at once cost."""
    return {"cpu_per_gib_4": _several(server, scale, core, 4)}


def large_64(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what the bytes of 64 large downloads at once cost."""
    return {"cpu_per_gib_64": _several(server, scale, core, 64)}


def paced(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what the bytes of clients cost that each take 2 MB/s, as over a network."""
    return {"cpu_per_gib_paced": _several(server, scale, core, _PACED_CLIENTS, rate=_PACE)}


def cold(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what a file of 64 MiB costs that is not in the page cache."""
    file = Path(os.environ["BENCH_FILES"], "64m.bin")
    processes, path = proc.of_sessions(server.leaders), server.path("64m.bin")
    used = seconds = 0.0
    with connect(server.port) as connection:
        for _ in range(_COLD_TURNS):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start, cpu = time.monotonic(), proc.cpu_seconds(processes)
            read_body(connection, ask(connection, path))
            used, seconds = used + proc.cpu_seconds(processes) - cpu, seconds + time.monotonic() - start
    gib = _COLD_TURNS * FILE_SIZES["64m.bin"] / _GIB
    return {"cpu_per_gib_cold": used / gib, "seconds_per_gib_cold": seconds / gib}


def fill(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what the first download of a large file costs, which fills the cache."""
    processes = proc.of_sessions(server.leaders)
    start = proc.cpu_seconds(processes)
    with connect(server.port) as connection:
        head = ask(connection, server.path(server.server.large))
        read_body(connection, head)
    return {"cpu_per_gib_fill": (proc.cpu_seconds(processes) - start) * _GIB / head.length}


def shared(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what a request costs if the server is not always busy, and what it takes of Redis, if there is one."""
    processes = proc.of_sessions(server.leaders)
    others = server.others if server.server.shares else []
    redis = [process for process, _ in others]
    paths = [server.path("10k.bin") for _ in range(scale.shared_requests)]
    used, redis_used = proc.cpu_seconds(processes), proc.cpu_seconds(redis)
    memory = sum(_redis_memory(port) for _, port in others)
    ask_each(server.port, paths, connections=8, tls=server.tls)
    _wait_until_quiet(server)
    figures = {"cpu_shared": (proc.cpu_seconds(processes) - used) / len(paths)}
    if redis:
        redis_used = proc.cpu_seconds(redis) - redis_used
        memory = sum(_redis_memory(port) for _, port in others) - memory
        figures["redis_memory"] = memory / scale.shared_requests
        paths = [server.path("10k.bin") for _ in range(_COUNTED)]
        with _operations(others[0][1]) as operations:
            ask_each(server.port, paths, connections=8, tls=server.tls)
            _wait_until_quiet(server)
            figures["redis_ops"] = operations() / len(paths)
        figures["redis_cpu"] = redis_used / (figures["redis_ops"] * scale.shared_requests)
    return figures


def _redis_memory(port: int) -> int:
    """Return the bytes that a Redis has allocated."""
    with socket.create_connection((HOST, port)) as connection:
        connection.sendall(b"INFO memory\r\n")
        return int(connection.recv(1 << 16).partition(b"used_memory:")[2].partition(b"\r")[0])


@contextlib.contextmanager
def _operations(port: int) -> Iterator[Callable[[], int]]:
    """Give a function that returns how many commands clients have sent to a Redis, without those inside of scripts."""
    with socket.create_connection((HOST, port)) as connection:
        connection.sendall(b"MONITOR\r\n")
        connection.recv(5, socket.MSG_WAITALL)  # +OK and the end of the line

        def count() -> int:
            connection.setblocking(False)
            received = b""
            with contextlib.suppress(BlockingIOError):
                while block := connection.recv(1 << 20):
                    received += block
            return sum(b" lua] " not in line for line in received.splitlines())

        yield count


def stalled_clients(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what a client costs that has asked for a large file and does not read on."""
    path = _prime(server)
    processes = proc.of_sessions(server.leaders)
    memory, descriptors = proc.resident(processes), proc.descriptors(processes)
    clients = scale.stalled_clients if server.server.many else scale.stalled_clients // 4
    with stalled(server.port, path, clients, server.tls):
        _wait_until_quiet(server)
        processes = proc.of_sessions(server.leaders)
        return {
            "rss_per_client": (proc.resident(processes) - memory) / clients,
            "descriptors_per_client": (proc.descriptors(processes) - descriptors) / clients,
        }


def _wait_until_quiet(server: Running) -> None:
    """Return when the server has used no processor for a while, or little for long: it has done what it can."""
    processes = proc.of_sessions(server.leaders)
    deadline = time.monotonic() + 20 * _QUIET
    used, now = -1.0, proc.cpu_seconds(processes)
    while now > used and time.monotonic() < deadline:
        time.sleep(_QUIET)
        used, now = now, proc.cpu_seconds(processes)


def beside(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find how long a small request takes while large downloads go on."""
    result = _beside(server, scale, core, scale.downloads)
    return {"p50": result.p50, "p99": result.p99}


def beside_500(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find how long a small request takes while many large downloads go on."""
    return {"p99_many": _beside(server, scale, core, scale.many_downloads).p99}


def _beside(server: Running, scale: Scale, core: int, downloads: int) -> Wrk:
    with downloading(server.port, server.path(server.server.large), downloads, core=core):
        return run_wrk(server.url("10k.bin"), seconds=scale.seconds, connections=1, core=core)


MEASURES: Mapping[str, Callable[[Running, Scale, int], dict[str, float]]] = {
    "idle": idle,
    "stalled": stalled_clients,
    "large": large,
    "large_4": large_4,
    "large_64": large_64,
    "paced": paced,
    "cold": cold,
    "fill": fill,
    "beside": beside,
    "beside_500": beside_500,
    "rps_10k": rps_10k,
    "rps_1m": rps_1m,
    "range_1m": range_1m,
    "ranges": ranges,
    "connections": connections,
    "listing": listing,
    "workers": workers,
    "shared": shared,
}
"""What `--only` takes."""

MEASURE_OF = {
    **dict.fromkeys(["start", "idle"], "idle"),
    **dict.fromkeys(["rss_per_client", "descriptors_per_client"], "stalled"),
    **dict.fromkeys(["cpu_per_gib", "peak_growth", "first_byte"], "large"),
    "cpu_per_gib_4": "large_4",
    "cpu_per_gib_64": "large_64",
    "cpu_per_gib_paced": "paced",
    **dict.fromkeys(["cpu_per_gib_cold", "seconds_per_gib_cold"], "cold"),
    "cpu_per_gib_fill": "fill",
    "p50": "beside",
    "p99": "beside",
    "p99_many": "beside_500",
    "cpu_10k": "rps_10k",
    "cpu_connect": "connections",
    "cpu_1m": "rps_1m",
    "whole_1m": "range_1m",
    **dict.fromkeys(["rps_ranges", "cpu_ranges"], "ranges"),
    **dict.fromkeys(["rps_listing", "cpu_listing"], "listing"),
    **dict.fromkeys(["rps_workers", "cpu_workers", "balance"], "workers"),
    **dict.fromkeys(["cpu_shared", "redis_ops", "redis_cpu", "redis_memory"], "shared"),
}
"""The measure that finds a figure, if it has another name."""
