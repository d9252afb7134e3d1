"""The command line: `python -m benchmarks --help`."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import proc, report
from benchmarks.costs import SHOWN, write_costs
from benchmarks.goals import PRODUCT, Rounds
from benchmarks.load import LoadError, wrk_program
from benchmarks.measures import FIGURES, FULL, MEASURE_OF, MEASURES, QUICK, Scale, warm
from benchmarks.nginx import nginx_program
from benchmarks.pictures import Bar, bar_chart
from benchmarks.running import FILE_SIZES, MEGABYTES, Server, running
from benchmarks.servers import SERVERS
from downloadview_async.service.plan.costs import MEASURED

_RESULTS = Path(__file__).parent.parent / "docs" / "performance"
_PACKAGES = (
    "downloadview_async",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "granian",
    "aiohttp",
    "django",
    "django-downloadview",
)
_LOOK = 0.5  # seconds before each round in which other work on this machine is noticed
_BUSY = 0.1
_LISTED = 100
_PICTURES = ("rps_10k", "rps_1m", "cpu_per_gib", "rss_per_client", "p99")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0, 1 if something could not be measured, or 2 if nothing could be started."""
    options = _options(arguments)
    if options.page:
        results = json.loads(options.before.read_text())
        print(_write(results, None, options.output or _RESULTS))
        return 0
    if wrk_program() is None:
        print("The load comes from wrk, which is not installed: apt-get install wrk", file=sys.stderr)
        return 2
    scale = QUICK if options.quick else FULL
    rounds = options.rounds or (1 if options.quick else 3 if options.costs else 5)
    everything = not (options.only or options.servers or options.quick or options.product or options.costs)
    output: Path | None = options.output or (_RESULTS if everything else None)
    servers = [server for server in SERVERS.values() if not options.servers or server.key in options.servers]
    measures = options.only or list(MEASURES)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers that run are killed then, too
    needed = (
        _of_product()
        if options.product
        else _measures_of((figure, row) for row, figure in SHOWN)
        if options.costs
        else None
    )
    present = [server for server in servers if not server.missing]
    for server in servers:
        if server.missing:
            _say(f"NOT MEASURED: {server.title}: {', '.join(server.missing)} is not installed (make bench installs it)")
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="benchmarks-") as scratch:
        turns = [
            (measure, server)
            for measure in MEASURES
            for server in present
            if measure in measures
            and measure in server.measures
            and (needed is None or (measure, server.key) in needed)
        ]
        measured, failures, busy = _run(turns, rounds, scale, Path(scratch))
    results = {
        "machine": _machine(),
        "rounds": rounds,
        "scale": asdict(scale),
        "figures": measured,
        "failures": failures,
        "busy": busy,
    }
    before = json.loads(options.before.read_text()) if options.before.exists() else None
    text = _write(results, before, output)
    if everything or options.costs:
        path = options.output / "costs.json" if options.output else MEASURED
        lacking = write_costs(results, path, renews_some=bool(options.only or options.servers))
        _say(f"NOT WRITTEN: the costs lack {', '.join(lacking)}" if lacking else "the costs are written")
    print(report.goals_table(measured, PRODUCT) if options.product else text)
    return 1 if failures or len(present) < len(servers) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare this library with other servers, in one run on this machine: each server on one core, "
        "the clients on another, all servers in each round.",
        epilog="Servers: " + ", ".join(SERVERS),
    )
    parser.add_argument("--rounds", type=int, help="how often each server has its turn (5; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small sizes and one short round: does it work at all?")
    parser.add_argument(
        "--product", action="store_true", help="measure only what the table of the product needs, and print that table"
    )
    parser.add_argument(
        "--costs", action="store_true", help="measure only what `downloadview plan` computes with, and write that"
    )
    parser.add_argument(
        "--page", action="store_true", help="measure nothing: write the page and the pictures of the results again"
    )
    parser.add_argument(
        "--only", type=_names(MEASURES), metavar="NAME,...", help=f"measure only some of: {', '.join(MEASURES)}"
    )
    parser.add_argument("--servers", type=_names(SERVERS), metavar="NAME,...", help="only some of the servers below")
    parser.add_argument(
        "--output",
        type=Path,
        help="the directory for results.json, results.md and the pictures (docs/performance for a whole run; one with "
        "--quick, --only or --servers writes nothing without it)",
    )
    parser.add_argument(
        "--before",
        type=Path,
        default=_RESULTS / "results.json",
        help="the results to compare with (docs/performance/results.json)",
    )
    parser.add_argument(
        "--scratch", type=Path, default="/var/tmp", help="where the files are made; on a disk, not tmpfs (/var/tmp)"
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    return options


def _of_product() -> set[tuple[str, str]]:
    """Return the measures and servers that the goals of the product need."""
    return _measures_of(pair for goal in PRODUCT for pair in goal.pairs)


def _measures_of(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(MEASURE_OF.get(figure, figure), server) for figure, server in pairs}


def _names(known: Collection[str]) -> Any:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return names


def _run(
    turns: Sequence[tuple[str, Server]], rounds: int, scale: Scale, scratch: Path
) -> tuple[dict[str, dict[str, list[float | None]]], list[str], float]:
    """Measure, round by round. After the first rounds, what the product has to reach is measured alone.

    Returns the figures of each round, what could not be measured, and how busy the machine was with other things.
    """
    cores = sorted(os.sched_getaffinity(0))
    of_product = _of_product()
    load_core, server_core = cores[0], cores[-1]
    if load_core == server_core:
        _say("ONE CORE ONLY: servers and clients share it, and what is measured is both of them")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    os.sched_setaffinity(0, {load_core})
    files = _make_files(scratch, scale)
    os.environ["BENCH_FILES"] = str(files)
    start = time.monotonic()
    main = [turn for turn in turns if (turn[0], turn[1].key) in of_product]
    total = sum(len(turns if number < report.ENOUGH_ROUNDS else main) for number in range(rounds))
    done = 0
    measured: dict[str, dict[str, list[float | None]]] = {}
    failures: list[str] = []
    busy = 0.0
    try:
        for number in range(rounds):
            busy = max(busy, proc.busy_share(_LOOK))
            if busy > _BUSY:
                _say(f"BUSY MACHINE: {busy:.0%} of its processors are in use before anything is measured")
            for measure, server in turns if number < report.ENOUGH_ROUNDS else main:
                done += 1
                prefix = f"{time.monotonic() - start:5.0f} s, {done}/{total}: {measure} {server.key}"
                try:
                    with running(
                        server, files=files, scratch=scratch / f"{done}", core=server_core, other_core=load_core
                    ) as process:
                        warm(process)
                        figures = MEASURES[measure](process, scale, load_core)
                except (LoadError, OSError) as exc:
                    failures.append(f"{measure} of {server.key}, round {number + 1}")
                    _say(f"{prefix}: FAILED: {exc}")
                    continue
                finally:
                    shutil.rmtree(scratch / f"{done}", ignore_errors=True)
                _say(
                    f"{prefix}: " + ", ".join(f"{name} {FIGURES[name].show(value)}" for name, value in figures.items())
                )
                for name, value in figures.items():
                    values = measured.setdefault(name, {}).setdefault(server.key, [])
                    values += [None] * (number - len(values))  # rounds that failed
                    values.append(value)
    finally:
        os.sched_setaffinity(0, cores)
    return measured, failures, busy


def _make_files(scratch: Path, scale: Scale) -> Path:
    # written, not sparse: it is in the page cache then, in the pages that a real file has
    scratch.chmod(0o755)
    files = scratch / "files"
    files.mkdir()
    block = os.urandom(10 << 10)
    sizes = {**FILE_SIZES, "large.bin": scale.large_bytes}
    _say(f"making {len(sizes)} files of {sum(sizes.values()):,} bytes")
    for name, size in sizes.items():
        with (files / name).open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.write(block[: size % len(block)])
            file.flush()
            os.fsync(file.fileno())  # nothing is written back while we measure
        os.utime(files / name, (1_700_000_000,) * 2)  # the last bytes of a new file are copied
    (files / "set").mkdir()
    for name in MEGABYTES:
        (files / "set" / name).hardlink_to(files / name)
    (files / "folder").mkdir()
    for number in range(_LISTED):
        (files / "folder" / f"report-{number}.pdf").write_bytes(bytes(number))
    return files


def _write(results: Mapping[str, Any], before: Mapping[str, Any] | None, output: Path | None) -> str:
    """Write the results to a directory, if there is one, and return the page."""
    charts = {figure: _picture(results["figures"], figure) for figure in _PICTURES}
    charts[report.REACH] = _reached(results["figures"])
    pictures = {figure: f"{figure.replace('_', '-')}.svg" for figure, chart in charts.items() if chart is not None}
    text = report.page(results, report.comparison(results, before), pictures)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "results.md").write_text(text)
        for figure, name in pictures.items():
            (output / name).write_text(charts[figure] or "")
        _say(f"written to {output}")
    return text


def _picture(measured: Rounds, figure: str) -> str | None:
    bars = []
    for server in SERVERS.values():
        value = report.median(measured, figure, server.key)
        if value is not None and server.bodies and not re.search("routes-", server.key):
            bars.append(Bar(server.title, value, FIGURES[figure].show(value), server.ours))
    bars.sort(key=lambda bar: bar.value, reverse=FIGURES[figure].more_is_better)
    better = "more" if FIGURES[figure].more_is_better else "less"
    return bar_chart(f"{FIGURES[figure].title} ({better} is better)", bars) if bars else None


def _reached(measured: Rounds) -> str | None:
    bars = []
    for goal, value in report.reached(measured):
        shown = f"{value:,.2f}{'x' if goal.row.base else ''}"
        bars.append(Bar(goal.row.title, goal.share(value), shown, goal.share(value) >= 1))
    return bar_chart("The product: how much of its reach each row has (green: all)", bars) if bars else None


def _machine() -> dict[str, Any]:
    """Describe this machine without its name."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        nginx = subprocess.run([nginx_program(), "-v"], capture_output=True, text=True, check=False).stderr
        versions["nginx"] = nginx.strip().rpartition("/")[2]
    except ImportError:
        pass
    wrk = subprocess.run([wrk_program() or "wrk", "-v"], capture_output=True, text=True, check=False).stdout
    versions["wrk"] = wrk.split()[1]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": proc.processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
