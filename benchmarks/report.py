"""From rounds to medians, ratios, the goals, what is worse than before, and the page that shows it all."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.goals import GOALS, LIBRARY, PRODUCT, Goal, Rounds, Row
from benchmarks.measures import FIGURES, FULL
from benchmarks.servers import SERVERS

ENOUGH_ROUNDS = 3
"""With fewer, nothing is known of the spread, and nothing is said to be worse."""

_LEAST_TOLERANCE = 0.03
_MISSED = "**no**"


@dataclass(frozen=True, slots=True)
class Worse:
    """A row that is worse than it was, by more than the rounds of both runs explain."""

    row: Row
    before: float
    now: float
    tolerance: float


def compared_rows() -> Iterator[Row]:
    """Yield what is compared with an earlier run: the goals, and every figure of ours as a multiple of nginx's."""
    yield from (goal.row for goal in GOALS)
    known = {(goal.row.value, goal.row.base) for goal in GOALS}
    for figure, about in FIGURES.items():
        for server in SERVERS.values():
            value, base = (figure, server.key), (figure, "nginx")
            if server.ours and (value, base) not in known:
                yield Row(f"{about.title}: {server.title}, against nginx", value, base, about.more_is_better)


def spread(rounds: Sequence[float]) -> float:
    """Return the width of the middle half of the rounds, so that one round gone wrong does not count."""
    first, _, third = statistics.quantiles(rounds, n=4, method="inclusive")
    return third - first


def worse_than_before(now: Rounds, before: Rounds, rows: Iterable[Row] | None = None) -> list[Worse]:
    """Return the rows whose median is worse by more than both spreads together, and by more than 3 %."""
    worse = []
    for row in compared_rows() if rows is None else rows:
        then, here = row.rounds(before), row.rounds(now)
        if min(len(then), len(here)) < ENOUGH_ROUNDS:
            continue
        was, is_now = statistics.median(then), statistics.median(here)
        tolerance = max(spread(then) + spread(here), _LEAST_TOLERANCE * abs(was))
        if (was - is_now if row.more_is_better else is_now - was) > tolerance:
            worse.append(Worse(row, was, is_now, tolerance))
    return worse


def median(measured: Rounds, figure: str, server: str) -> float | None:
    """Return the median of the rounds, or None where nothing was measured."""
    values = [value for value in measured.get(figure, {}).get(server, []) if value is not None]
    return statistics.median(values) if values else None


def goals_table(measured: Rounds, goals: Sequence[Goal] = GOALS) -> str:
    """Return goals as a Markdown table, those that are missed in bold.

    Beside each median is half the width of the middle half of the rounds, and the same ratio of CPU times.
    """
    has_floors = any(goal.floor is not None for goal in goals)
    lines = []
    for goal in goals:
        rounds = goal.row.rounds(measured)
        title, shown, met = goal.row.title, "not measured", "not measured"
        if rounds:
            value = statistics.median(rounds)
            met = goal.met(value)
            shown = f"{value:,.2f}{'x' if goal.row.base else ''}"
            if met == _MISSED:
                title, shown = f"**{title}**", f"**{shown}**"
            if len(rounds) > 1:
                shown += f" (± {spread(rounds) / 2:,.2f})"
        cpu = goal.row.in_cpu.rounds(measured) if goal.row.in_cpu else []
        in_cpu = f"{statistics.median(cpu):.2f}x" if cpu else ""
        floor = ""
        if goal.floor is not None and (least := goal.floor.rounds(measured)):
            value = statistics.median(least)
            floor = f"{value:,.2f}{'x' if goal.row.base else ''}"
            if met == _MISSED and goal.met(value) == _MISSED:
                met += ", nor by the floor"
        floors = [floor] if has_floors else []
        lines.append([title, shown, in_cpu, *floors, goal.show(goal.reach), goal.show(goal.goal), met])
    floors = ["floor"] if has_floors else []
    return table(["measure", "this run", "CPU of a request", *floors, "reach", "go for", "met"], lines)


def reached(measured: Rounds) -> Iterator[tuple[Goal, float]]:
    """Yield the goals of the product that were measured, each with its median."""
    for goal in PRODUCT:
        if rounds := goal.row.rounds(measured):
            yield goal, statistics.median(rounds)


def figures_table(measured: Rounds, figures: Sequence[str], servers: Sequence[str]) -> str:
    """Return medians as a Markdown table: a line for each server that has one of the figures."""
    lines = []
    for server in servers:
        medians = [median(measured, figure, server) for figure in figures]
        if any(value is not None for value in medians):
            shown = [
                "" if value is None else FIGURES[figure].show(value)
                for figure, value in zip(figures, medians, strict=True)
            ]
            lines.append([SERVERS[server].title, *shown])
    return table(["server", *(FIGURES[figure].title for figure in figures)], lines) if lines else ""


def growth_table(measured: Rounds) -> str:
    """Return what a request costs with 1, 100 and 1,000 rules or routes, as multiples of the cost with one."""
    lines = []
    for kind, title in [
        ("rules", "offload rules of one application"),
        ("routes", "routes of `downloadview serve`, each to a separate source"),
        ("bare-routes", "routes of a bare Starlette application"),
    ]:
        cells = [
            Row("", ("rps_10k", f"{kind}-1"), ("rps_10k", f"{kind}-{number}"), more_is_better=False).rounds(measured)
            for number in (1, 100, 1000)
        ]
        if any(cells):
            lines.append([title, *(f"{statistics.median(cell):.2f}x" if cell else "" for cell in cells)])
    return table(["cost of a request", "1", "100", "1,000"], lines) if lines else ""


_GIB = 1 << 30
_HOLDING = ("nginx", "ours", "ours-chunks", "ours-nginx")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine of the model: bytes per second of its network, bytes of memory for clients, descriptors of a process.

    A process serves on each core.
    """

    cores: int
    network: float
    memory: int
    descriptors: int


@dataclass(frozen=True, slots=True)
class Load:
    """What clients ask of a machine: files of `size` as fast as they come, or one large file each at a slow pace."""

    title: str
    unit: str
    figure: str
    size: int
    """Bytes of a file; of a slow client, bytes per second."""
    slow: bool = False


EXAMPLE = Machine(cores=4, network=10e9 / 8, memory=4 * _GIB, descriptors=65_536)
"""10 Gbit/s and 8 GiB, of which the page cache has half; as many descriptors as deploy/systemd allows."""

LOADS = (
    Load("files of 10 KiB", "requests/s", "rps_10k", 10 << 10),
    Load("files of 1 MiB", "requests/s", "rps_1m", 1 << 20),
    Load("large files, to clients that take 64 KiB/s each", "clients", "cpu_per_gib", 64 << 10, slow=True),
)


def limits(measured: Rounds, server: str, load: Load, machine: Machine) -> dict[str, float]:
    """Return how much of a load each resource of a machine allows, as far as it was measured."""
    speed = median(measured, load.figure, server)
    if not speed:
        return {}
    allowed = {
        "cores": machine.cores * (_GIB / speed / load.size if load.slow else speed),
        "network": machine.network / load.size,
    }
    if load.slow:
        memory = median(measured, "rss_per_client", server) or 0.0
        descriptors = median(measured, "descriptors_per_client", server) or 0.0
        if memory > 0:  # a short run may find less than nothing
            allowed["memory"] = machine.memory / memory
        if descriptors > 0:
            allowed["descriptors"] = machine.cores * machine.descriptors / descriptors
    return allowed


def core_table(measured: Rounds) -> str:
    """Return what one core does, and how many clients one GiB of memory and one process hold."""
    lines = []
    for server in _HOLDING:
        cpu, memory, descriptors = (
            median(measured, figure, server) or 0.0
            for figure in ("cpu_per_gib", "rss_per_client", "descriptors_per_client")
        )
        cells = [
            *((median(measured, figure, server) or 0.0, 0) for figure in ("rps_10k", "rps_1m")),
            (1 / cpu if cpu > 0 else 0.0, 2),
            (_GIB / memory if memory > 0 else 0.0, 0),
            (EXAMPLE.descriptors / descriptors if descriptors > 0 else 0.0, 0),
        ]
        if any(value for value, _ in cells):
            lines.append([SERVERS[server].title, *(f"{value:,.{digits}f}" if value else "" for value, digits in cells)])
    head = [
        "server",
        "10 KiB, requests/s per core",
        "1 MiB, requests/s per core",
        "GiB/s per core",
        "stalled clients per GiB of memory",
        f"clients per {EXAMPLE.descriptors:,} descriptors",
    ]
    return table(head, lines) if lines else ""


def example_table(measured: Rounds, machine: Machine = EXAMPLE) -> str:
    """Return how much of each load a machine holds, and what of it runs out first."""
    resources = ("cores", "network", "memory", "descriptors")
    lines = []
    for load in LOADS:
        for server in _HOLDING:
            if allowed := limits(measured, server, load, machine):
                first = min(allowed, key=lambda resource: allowed[resource])
                cells = [f"{allowed[resource]:,.0f}" if resource in allowed else "" for resource in resources]
                holds = f"{allowed[first]:,.0f} {load.unit}: {first}"
                lines.append([load.title, SERVERS[server].title, *cells, holds])
    return table(["load", "server", *resources, "holds, and what runs out first"], lines) if lines else ""


REACH = "reach"
"""The picture with which the page begins."""


def page(results: Mapping[str, Any], compared: str, pictures: Mapping[str, str]) -> str:
    """Return the page of a run in Markdown.

    compared: what `comparison` says. pictures: the names of files, by the figures that they show.
    """
    measured: Rounds = results["figures"]
    scale = asdict(FULL) | results["scale"]
    main = [key for key in SERVERS if not key.startswith(("rules-", "routes-", "bare-routes-"))]
    django = (
        "Django reads the whole file into memory first, so its file is one of 64 MiB, and its CPU is scaled to a GiB."
    )
    sections: list[tuple[str, list[str], str]] = [
        (
            "Requests per second",
            ["rps_10k", "cpu_10k", "cpu_connect", "rps_1m", "cpu_1m", "range_1m", "whole_1m"],
            "16 connections that are kept. CPU is user and system time of the whole server. The range is 1 MiB of the "
            "large file, in each turn another one; it takes turns with a whole file of 1 MiB, of 32 such files.",
        ),
        (
            "One large download",
            ["cpu_per_gib", "peak_growth", "first_byte"],
            f"A file of {_size(scale['large_bytes'])}. CPU is user and system time of the whole server. {django}",
        ),
        (
            "Several large downloads",
            ["cpu_per_gib_4", "cpu_per_gib_64", "cpu_per_gib_paced"],
            "CPU of the whole server, with 4 and 64 clients that read as fast as they can, and with 64 clients that "
            "each take 2 MB/s.",
        ),
        (
            "Ranges, cold files, fills of the cache, and listings",
            [
                *("rps_ranges", "cpu_ranges", "cpu_per_gib_cold", "seconds_per_gib_cold"),
                *("cpu_per_gib_fill", "rps_listing", "cpu_listing"),
            ],
            "Each range is 64 KiB from another byte of the large file on. A cold file is one of 64 MiB that is not in "
            "the page cache.",
        ),
        (
            "Clients that stop reading",
            ["rss_per_client", "descriptors_per_client"],
            f"{scale['stalled_clients']:,} clients of nginx and of `downloadview serve`, and a quarter as many of the "
            "others, that take the first bytes of the large file and no more.",
        ),
        (
            "A small request beside large downloads",
            ["p50", "p99", "p99_many"],
            f"10 KiB on one connection, while {scale['downloads']} clients, in the last column "
            f"{scale['many_downloads']}, read the large file as fast as it comes.",
        ),
        (
            "Start and memory",
            ["start", "idle"],
            "The time from the start of the process to its first connection, and its memory after 200 small requests.",
        ),
        (
            "Two workers",
            ["rps_workers", "cpu_workers", "balance"],
            "64 connections, on all cores, which wrk shares. The share of the busier worker is 0.5 if both do as much.",
        ),
        (
            "Facts in Redis",
            ["cpu_shared", "redis_ops", "redis_cpu", "redis_memory"],
            f"{scale['shared_requests']:,} downloads of 10 KiB, 8 at once. Operations are commands that the service "
            "sends. CPU of a download is that of the service, CPU of an operation that of Redis.",
        ),
    ]
    failures = results["failures"]
    parts = [
        "# Results of a run",
        "`make bench` writes this page; do not edit it. [Performance](../performance.md) explains what is measured.",
    ]
    if REACH in pictures:
        parts.append(f"![How much of its reach each row of the product has]({pictures[REACH]})")
    parts += [
        compared,
        "## The product",
        "`downloadview serve` as people run it. Rows in bold miss their reach. Ratios are of one round. The floor is "
        "what the least program in Python has: see [](../performance.md#floors).",
        goals_table(measured, PRODUCT),
    ]
    for title, figures, text in sections:
        shown = figures_table(measured, figures, main)
        if shown:
            parts += [f"## {title}", text]
            parts += [f"![{FIGURES[figure].title}]({pictures[figure]})" for figure in figures if figure in pictures]
            parts.append(shown)
    if growth := growth_table(measured):
        parts += [
            "## Rules and routes",
            "The cost of a request for 10 KiB, as a multiple of the cost with one. Starlette looks at one route "
            "after the other, and the one that is asked for is the last.",
            growth,
        ]
    if cores := core_table(measured):
        parts += [
            "## What one machine holds",
            "The medians above for one core, one GiB of memory and one process. GiB/s is 1 / CPU seconds per GiB.",
            cores,
            f"A machine with {EXAMPLE.cores} cores and a process on each, {EXAMPLE.network * 8e-9:.0f} Gbit/s, "
            f"{EXAMPLE.memory / _GIB:.0f} GiB for clients beside the page cache, and {EXAMPLE.descriptors:,} "
            "descriptors for each process would hold the least of what its resources allow. This is arithmetic: it "
            "takes for granted that every core does what the measured one did, and counts bodies alone.",
            example_table(measured),
        ]
    parts += ["## The run", _machine(results)]
    parts += [f"{len(failures)} turns failed: {'; '.join(failures)}."] if failures else []
    parts += ["## Goals of the library", goals_table(measured, LIBRARY)]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Return a paragraph, or a table, on what is worse than in an earlier run."""
    if before is None:
        return "There is no earlier run to compare with."
    if min(now["rounds"], before["rounds"]) < ENOUGH_ROUNDS:
        return f"Not compared with the earlier run: that takes {ENOUGH_ROUNDS} rounds of both."
    changed = {name for name in now["scale"] if now["scale"][name] != before["scale"].get(name)}
    everything = [row for row in compared_rows() if row.rounds(now["figures"]) and row.rounds(before["figures"])]
    rows = [row for row in everything if not changed & set(FIGURES[row.value[0]].depends)]
    date = before["machine"]["date"]
    if everything and not rows:
        return "Not compared with the earlier run: it measured with other sizes."
    rest = f" {len(everything) - len(rows)} rows were measured with other sizes." if len(everything) > len(rows) else ""
    worse = worse_than_before(now["figures"], before["figures"], rows)
    if not worse:
        return f"No row is worse than in the run of {date}, by more than what the rounds of both differ.{rest}"
    cpu = before["machine"]["cpu"]
    if cpu != now["machine"]["cpu"]:
        rest += f" That run was on another processor ({cpu}), which has a part in the differences."
    lines = [[row.row.title, f"{row.before:.2f}", f"{row.now:.2f}", f"{row.tolerance:.2f}"] for row in worse]
    return f"Worse than in the run of {date}:{rest}\n\n" + table(["row", "before", "now", "tolerance"], lines)


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    rounds = results["rounds"]
    return table(
        ["machine", ""],
        [
            ["date", machine["date"]],
            ["processor", f"{machine['cpu']}, {machine['cores']} cores: one for the server, another for the clients"],
            ["memory", f"{machine['memory'] / (1 << 30):.0f} GiB"],
            ["kernel", machine["kernel"]],
            ["Python", machine["python"]],
            ["versions", packages],
            ["other work", f"{results['busy']:.0%} of the processors at most, before each round"],
            [
                "rounds",
                f"{rounds} for what the product has to reach, {min(rounds, ENOUGH_ROUNDS)} for the rest; medians, and "
                "ratios within a round",
            ],
        ],
    )


def _size(size: int) -> str:
    return f"{size >> 30} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    align = ["---", *("---:" if len(head) > 2 else "---" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, align, *lines])
