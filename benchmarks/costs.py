"""From a run of the benchmark to the costs by which `downloadview plan` computes, and the page that shows them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measures import FIGURES
from benchmarks.report import median, table
from downloadview_async.service.plan.costs import MEASURED, Costs, load_costs, written
from downloadview_async.service.plan.model import NEEDED, WAYS, Load, Machine, plan
from downloadview_async.service.plan.page import amount_text

PAGE = Path(__file__).parent.parent / "docs" / "performance" / "costs.md"
SHOWN = {
    *((row, figure) for row in ("serve-2", "serve-reuse-2") for figure in ("cpu_workers", "balance")),
    *((row, "cpu_shared") for row in ("serve-nginx", "nginx", "nginx-tls")),
    *((row, "cpu_10k") for row in ("serve", "serve-redirect")),
    ("serve-redirect-2", "cpu_workers"),
    *NEEDED,
}
"""The rows and figures that plans need, and those that only the page shows."""

_DIGITS = 4  # more would only say how often the machine was interrupted
_MACHINE = Machine(cores=8, memory=32e9, network=25e9 / 8, descriptors=65_536, use=0.7)
_FLEET_HEAD = ("load", "machines", "requests/s", "downloads at once", "first", "Redis cores", "store")
_SIZES = (10, 100, 1000)
_FLEETS = {
    "files of 100 MB by sendfile": Load(send="zero-copy", clients=50.0, requests=1.0, size=100e6),
    "the same through the cache, 90 % hits": Load(send="cache", clients=50.0, requests=1.0, size=100e6, hit_ratio=0.9),
    "files of 100 kB by sendfile, links and limits": Load(
        send="zero-copy", clients=0.05, requests=1.0, size=100e3, links=True, limits=True
    ),
    "redirects to a store, with links": Load(send="redirect", clients=0.0, requests=1.0, size=100e6, links=True),
}
"""Loads for one request a second. Clients take 2 MB/s."""


def write_costs(results: Mapping[str, Any], path: Path = MEASURED, *, renews_some: bool = False) -> list[str]:
    """Write the medians that plans need. If the run lacks some, return their names and write nothing.

    renews_some: whether a run of some rows replaces these in the file, and the others stay.
    """
    figures = load_costs(path).figures if renews_some else {}
    lacking = []
    for row, figure in sorted(SHOWN):
        value = median(results["figures"], figure, row)
        if value is None and figure in figures.get(row, {}):
            continue
        if value is None:
            lacking.append(f"{figure} of {row}")
        else:
            figures.setdefault(row, {})[figure] = float(f"{value:.{_DIGITS}g}")
    if not lacking:
        path.write_bytes(written(_run(results), figures))
        if path == MEASURED:
            PAGE.write_text(page(load_costs()))
    return lacking


def _run(results: Mapping[str, Any]) -> dict[str, str]:
    machine = results["machine"]
    return {
        "date": machine["date"],
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / (1 << 30):.0f} GiB",
        "kernel": machine["kernel"],
        "python": machine["python"],
        "rounds": str(results["rounds"]),
        "other work": f"{results['busy']:.0%} of the processors at most",
    }


def page(costs: Costs) -> str:
    """Return the page of the costs in Markdown."""
    parts = [
        "# Measured costs",
        "`make costs` and `make bench` write this page; do not edit it. [Scale](../scale.md) explains how "
        "`downloadview plan` computes with these numbers.",
        "## Ways to send",
        "CPU is user and system time of all processes that send, nginx included. In `serve-proxied`, nginx passes the "
        "bytes on and is not counted. A request is one for 10 KiB; the bytes are those of 64 clients that take 2 MB/s "
        "each.",
        _shown(
            costs,
            ["serve", "serve-proxied", *(way.row for way in WAYS.values()), "serve-tls", "nginx", "nginx-tls"],
            ["cpu_shared", "cpu_connect", "cpu_per_gib_paced", "cpu_per_gib_fill", "rss_per_client"],
        ),
        "## Facts in Redis, and counted downloads",
        "For each request of 10 KiB. Its CPU is that of the service; `serve` and `serve-accounts` have no Redis.",
        _shown(
            costs,
            ["serve", "serve-accounts", "shared-links", "shared-limits", "shared-both"],
            ["cpu_shared", "redis_ops", "redis_cpu", "redis_memory"],
        ),
        "## One worker and two",
        "Two workers that share one socket (`--workers 2`), and two services with `--reuse-port`. CPU of a request is "
        "that of both; a share of 0.5 is that of workers that do as much as each other.",
        table(["row", "1 worker, µs", "2 workers, µs", "share of the busier worker"], [*_workers(costs)]),
        "## What 10, 100 and 1,000 machines hold",
        f"Machines with {_MACHINE.cores} cores, {amount_text(_MACHINE.memory, 'bytes')} and "
        f"{amount_text(_MACHINE.network, 'bytes/s')}, of which {_MACHINE.use:.0%} are used, and clients that take "
        "2 MB/s. This is arithmetic with the numbers above.",
        table(
            ["load", "machines", "requests/s", "downloads at once", "first", "Redis cores", "store"], [*_fleets(costs)]
        ),
        "## The run",
        table(["", ""], [[name, value] for name, value in costs.run.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _shown(costs: Costs, rows: Sequence[str], figures: Sequence[str]) -> str:
    lines = []
    for row in dict.fromkeys(rows):
        known = costs.figures.get(row, {})
        lines.append([f"`{row}`", *(FIGURES[name].show(known[name]) if name in known else "" for name in figures)])
    return table(["row", *(FIGURES[name].title for name in figures)], lines)


def _workers(costs: Costs) -> Iterator[list[str]]:
    for row, one in (("serve-2", "serve"), ("serve-reuse-2", "serve"), ("serve-redirect-2", "serve-redirect")):
        share = costs.figures[row].get("balance")
        show = FIGURES["cpu_workers"].show
        cells = [show(costs.of(one, "cpu_10k")), show(costs.of(row, "cpu_workers"))]
        yield [f"`{row}`", *cells, "" if share is None else f"{share:.2f}"]


def _fleets(costs: Costs) -> Iterator[list[str]]:
    for title, load in _FLEETS.items():
        for size in _SIZES:
            made = plan(load, _MACHINE, costs)
            times = size / made.needs[0].machines
            shared = made.shared
            store = f"{shared.store_requests * times:,.0f} requests/s" if shared.store_requests else ""
            redis = f"{shared.redis_share * times:,.1f}" if shared.redis_share else ""
            clients = f"{load.clients * times:,.0f}" if load.clients else ""
            first = "one Redis" if shared.redis_share * times > _MACHINE.use else made.needs[0].resource
            yield [title, f"{size:,}", f"{load.requests * times:,.0f}", clients, first, redis, store]
