"""Which caches earn their keep: `python -m benchmarks.caches` writes docs/performance/caches.md.

Each server of `SERVERS` gets the same clients. An argument such as `5` has them come for so many seconds: a quick test
that writes nothing.
"""

import asyncio
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import proc
from benchmarks.counting import Count
from benchmarks.load import HOST, LoadError
from benchmarks.nginx import PROXY, nginx_command
from benchmarks.running import Command, Place, Server, running
from benchmarks.trace import Site, make_repositories, make_site, replay

_PAGE = Path(__file__).parent.parent / "docs" / "performance" / "caches.md"
_SECONDS = 60.0
_VISITS_PER_SECOND = 8.0
_PATIENCE = 60.0  # seconds until a server has measured its caches

_SETTINGS = """
[sources.files]
type = "remote"
url = "http://{host}:{behind}/files/"
allow_hosts = ["{host}"]
[sources.files.cache]
path = "cache"
[[routes]]
path = "/files/{{path:path}}"
source = "files"
cache_control = "no-cache"
"""


_INTRODUCTION = """\
# What caches save

`python -m benchmarks.caches` writes this page; do not edit it. [Performance](../performance.md) explains what is
measured. {date}, {processor}, Python {python}.

Each server had the same clients for {seconds:.0f} seconds, {visits:.0f} visits a second on average. "without" is the
time of a call without the cache, while the caches behind it have their values. "saves" counts hits and misses, and is
divided by all requests of the server."""


def _counted(place: Place, port: int, module: str, *arguments: str, **environment: str) -> Command:
    command = [sys.executable, "-m", "benchmarks.counting", str(place.scratch / "counts.json"), module, *arguments]
    return Command(command, port, environment)


def _serve(place: Place, *what: str, port: int | None = None, **environment: str) -> Command:
    port = port or place.port
    options = ["--port", str(port), "--no-access-log", "--log-level", "error"]
    return _counted(place, port, "downloadview_async.cli", "serve", *what, *options, **environment)


def _direct(place: Place) -> list[Command]:
    return [_serve(place, str(place.files))]


def _behind_nginx(place: Place) -> list[Command]:
    locations = f"location /files/ {{ {PROXY} }} location /_files/ {{ internal; alias {place.files}/; }}"
    rules = json.dumps([{"source": str(place.files), "target": "/_files/"}])
    offload = {"DOWNLOADVIEW_OFFLOAD__BACKEND": "nginx", "DOWNLOADVIEW_OFFLOAD__RULES": rules}
    return [nginx_command(place, locations), _serve(place, str(place.files), port=place.behind, **offload)]


def _cached(place: Place) -> list[Command]:
    settings = place.scratch / "downloadview.toml"
    settings.write_text(_SETTINGS.format(host=HOST, behind=place.behind))
    origin = nginx_command(place, f"location /files/ {{ alias {place.files}/; }}", port=place.behind, measured=False)
    return [_serve(place, "--config", str(settings)), origin]


def _django(place: Place) -> list[Command]:
    options = ["--port", str(place.port), "--no-access-log", "--log-level", "error", "--lifespan", "off"]
    options += ["--http", "downloadview_async.asgi.server:DownloadProtocol"]
    return [_counted(place, place.port, "uvicorn", "benchmarks.apps.ours_django:app", *options)]


_TITLES: Mapping[str, Callable[[Place], list[Command]]] = {
    "`downloadview serve` on a directory": _direct,
    "The same behind nginx, which sends the files": _behind_nginx,
    "`downloadview serve` with a remote source and its cache": _cached,
    "Django with a `PathDownloadView`": _django,
}
SERVERS = [
    Server(key=commands.__name__, title=title, commands=commands, measures=()) for title, commands in _TITLES.items()
]


def main(seconds: float | None = None) -> None:
    """Replay the clients at each server, print the tables, and write them unless the run was a quick test."""
    lasts = seconds or _SECONDS
    machine = {"date": datetime.now(UTC).date(), "processor": proc.processor(), "python": platform.python_version()}
    parts = [_INTRODUCTION.format(seconds=lasts, visits=_VISITS_PER_SECOND, **machine)]
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="caches-") as scratch:
        files = Path(scratch, "files")
        files.mkdir()
        site = make_site(files, random.Random(1))
        make_repositories(files)
        for server in SERVERS:
            parts.append(_part(server, site, files, Path(scratch, server.key), lasts))
            print(parts[-1], flush=True)
    if seconds is None:
        _PAGE.write_text("\n\n".join(parts) + "\n")


def _part(server: Server, site: Site, files: Path, scratch: Path, seconds: float) -> str:
    """Return what the clients make of one server, as a section."""
    with running(
        server, files=files, scratch=scratch, core=max(os.sched_getaffinity(0)), other_core=min(os.sched_getaffinity(0))
    ) as process:
        replayed = replay(site, process.port, seconds=seconds, visits_per_second=_VISITS_PER_SECOND)
        visits, programs = asyncio.run(replayed)
        file = scratch / "counts.json"
        for leader in process.leaders:
            # nginx opens its log anew
            os.kill(leader, signal.SIGUSR1)
        deadline = time.monotonic() + _PATIENCE
        while not file.exists():
            if time.monotonic() > deadline:
                raise LoadError(f"no counts: {(scratch / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
    counted = json.loads(file.read_text())
    requests: int = counted["requests"]
    return section(server.title, visits, requests, programs, [Count(**count) for count in counted["counts"]])


def section(title: str, visits: int, requests: int, programs: Collection[str], counts: Iterable[Count]) -> str:
    """Return the table of one server: the cache that saves most comes first."""
    lines = [
        f"## {title}",
        "",
        f"{requests:,} requests of {visits:,} visits, and of {', '.join(sorted(programs))}.",
        "",
        "| cache | calls | hits | hit rate | without, µs | hit, µs | miss, µs | saves, µs a request |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in sorted(merged(counts), key=lambda count: count.saving(requests), reverse=True):
        times = " | ".join(f"{seconds * 1e6:.2f}" for seconds in (count.direct, count.hit, count.miss))
        rate = f"{count.calls:,} | {count.hits:,} | {count.hits / count.calls:.1%}"
        lines.append(f"| `{count.cache}` | {rate} | {times} | {count.saving(requests) * 1e6:.2f} |")
    return "\n".join(lines)


def merged(counts: Iterable[Count]) -> list[Count]:
    """Return one count for the caches that have the same name: objects of a class may have one each."""
    by_name: dict[str, list[Count]] = {}
    for count in counts:
        by_name.setdefault(count.cache, []).append(count)
    return [
        replace(
            max(same, key=lambda count: count.calls), calls=sum(c.calls for c in same), hits=sum(c.hits for c in same)
        )
        for same in by_name.values()
    ]


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
