"""What is measured: each function takes a server that has just been started, and returns figures in base units."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import proc
from benchmarks.load import LoadError, ask, connect, downloading, first_byte_seconds, read_body, run_wrk, stalled
from benchmarks.servers import FILE_SIZES, MEGABYTES, Running

_GIB = 1 << 30
_MIB = 1 << 20
_CONNECTIONS = 16
_WARM_REQUESTS = 200
_TURNS = 3
_QUIET = 0.25  # seconds in which a server that has no more to do uses no processor


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done. Ratios of two runs are comparable if this is the same."""

    large_bytes: int = _GIB
    seconds: int = 3
    """How long each load of wrk lasts."""
    cpu_seconds: float = 0.8
    """How much of the processor downloads of the large file have to use, for a clock of 10 ms."""
    stalled_clients: int = 500
    downloads: int = 50


FULL = Scale()
QUICK = Scale(large_bytes=128 * _MIB, seconds=1, cpu_seconds=0.05, stalled_clients=100, downloads=10)


@dataclass(frozen=True, slots=True)
class Figure:
    """One kind of number: how it is shown, as a multiple of `unit` with so many digits, and which way is better."""

    title: str
    unit: float = 1.0
    digits: int = 0
    more_is_better: bool = False

    def show(self, value: float) -> str:
        """Return a value in base units as it is shown."""
        return f"{value / self.unit:,.{self.digits}f}"


FIGURES = {
    "rps_10k": Figure("10 KiB, requests/s", more_is_better=True),
    "rps_1m": Figure("1 MiB, requests/s", more_is_better=True),
    "range_1m": Figure("Range of 1 MiB, requests/s", more_is_better=True),
    "whole_1m": Figure("1 MiB in turns with the Range, requests/s", more_is_better=True),
    "cpu_per_gib": Figure("CPU seconds per GiB", digits=3),
    "peak_growth": Figure("growth of the peak RSS, MiB", _MIB, 1),
    "first_byte": Figure("time to the first byte, ms", 1e-3, 2),
    "rss_per_client": Figure("RSS per stalled client, KiB", 1024, 1),
    "descriptors_per_client": Figure("descriptors per stalled client", digits=2),
    "p50": Figure("p50 beside downloads, ms", 1e-3, 2),
    "p99": Figure("p99 beside downloads, ms", 1e-3, 2),
}


def warm(server: Running) -> None:
    """Ask for the small file as often as it takes to have everything loaded. Raises `LoadError` for a wrong answer."""
    with connect(server.port) as connection:
        for _ in range(_WARM_REQUESTS):
            head = ask(connection, server.path("10k.bin"))
            expected = FILE_SIZES["10k.bin"] if server.server.bodies else 0
            if (head.status, head.length) != (200, expected):
                raise LoadError(f"{head.status} with {head.length} bytes, not 200 with {expected}")
            if not server.server.bodies and "x-accel-redirect" not in head.headers:
                raise LoadError("an answer without X-Accel-Redirect")
            read_body(connection, head)


def rps_10k(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for a file of 10 KiB."""
    url = server.url("10k.bin")
    return {"rps_10k": run_wrk(url, seconds=scale.seconds, connections=_CONNECTIONS, core=core).rate}


def rps_1m(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for a file of 1 MiB."""
    _expect(server, "1m.bin", status=200)
    url = server.url("1m.bin")
    return {"rps_1m": run_wrk(url, seconds=scale.seconds, connections=_CONNECTIONS, core=core).rate}


def range_1m(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Count requests per second for a Range of 1 MiB of a large file, and in turns with it for a file of 1 MiB.

    From one turn to the next, both vary by more than what they differ by. So they do with the pages of the page cache
    that a megabyte is in: each turn takes others. A turn is as long as other loads, since the first half second of
    a load is slower.
    """
    rates: dict[str, list[float]] = {"range_1m": [], "whole_1m": []}
    for _ in range(_TURNS):
        start = random.randrange(0, scale.large_bytes, _MIB)
        header = f"Range: bytes={start}-{start + _MIB - 1}"
        for figure, name, headers in (
            ("range_1m", server.server.large, [header]),
            ("whole_1m", random.choice(MEGABYTES), []),
        ):
            _expect(server, name, *headers, status=206 if headers else 200)
            url = server.url(name)
            result = run_wrk(url, seconds=scale.seconds, connections=_CONNECTIONS, core=core, headers=headers)
            rates[figure].append(result.rate)
    return {figure: statistics.mean(values) for figure, values in rates.items()}


def _expect(server: Running, name: str, *headers: str, status: int) -> None:
    """Ask for a MiB once. Raises `LoadError` for a wrong answer."""
    with connect(server.port) as connection:
        head = ask(connection, server.path(name), *headers)
        if (head.status, head.length) != (status, _MIB):
            raise LoadError(f"{name} was answered with {head.status} and {head.length} bytes, not {status} and {_MIB}")
        read_body(connection, head)


def large(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what a large download costs: processor time, memory, and the time to its first byte."""
    path = server.path(server.server.large)
    processes = proc.of_sessions(server.leaders)
    before = proc.resident(processes)
    proc.reset_peak(processes)
    with connect(server.port) as connection:
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
        times.append(first_byte_seconds(server.port, path))
    return {"cpu_per_gib": used * _GIB / sent, "peak_growth": growth, "first_byte": statistics.median(times)}


def stalled_clients(server: Running, scale: Scale, core: int) -> dict[str, float]:
    """Find what a client costs that has asked for a large file and does not read on."""
    processes = proc.of_sessions(server.leaders)
    memory, descriptors = proc.resident(processes), proc.descriptors(processes)
    with stalled(server.port, server.path(server.server.large), scale.stalled_clients):
        _wait_until_quiet(server)
        processes = proc.of_sessions(server.leaders)
        return {
            "rss_per_client": (proc.resident(processes) - memory) / scale.stalled_clients,
            "descriptors_per_client": (proc.descriptors(processes) - descriptors) / scale.stalled_clients,
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
    with downloading(server.port, server.path(server.server.large), scale.downloads, core=core):
        result = run_wrk(server.url("10k.bin"), seconds=scale.seconds, connections=1, core=core)
    return {"p50": result.p50, "p99": result.p99}


MEASURES: Mapping[str, Callable[[Running, Scale, int], dict[str, float]]] = {
    "stalled": stalled_clients,
    "large": large,
    "beside": beside,
    "rps_10k": rps_10k,
    "rps_1m": rps_1m,
    "range_1m": range_1m,
}
