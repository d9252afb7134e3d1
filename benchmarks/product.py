"""The product in the comparison: the settings of each row, and `downloadview serve` with them."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.load import HOST
from benchmarks.nginx import PROXY, certificate_in, nginx_command
from benchmarks.running import SECRET, Command, Place, which

_LINKS = f"""
[links]
keys = "benchmark {SECRET}"
max_age = "7d"
"""
_METRICS = "\n[metrics]\n"
_LIMITS = """
[limits]
requests = "1000000000/minute"
concurrent = 1000000
quota = ["1000000GB/day"]
"""
_ACCOUNTS = """
[accounts]
database = "sqlite+aiosqlite:///accounts.db"
"""
_JSON = '\n[log]\nformat = "json"\n'
_HIDE = 'hide = [".*", "*.tmp", "secret-*"]\n'
_COUNTED = _JSON + _METRICS + _LIMITS + _ACCOUNTS
_ORIGIN = 'type = "remote"\nurl = "http://{host}:{behind}/files/"\nallow_hosts = ["{host}"]\nmax_connections = 5000\n'
_CACHE = '[sources.files.cache]\npath = "cache"\n'
_HOOK = "async def allowed(request, name):\n    return True\n"
_EDGE = """
[sources.files.edge]
kind = "hmac"
url = "https://files.example.org/"
secret = "a secret of the benchmark"
text = "{{path}}{{expires}}"
token = "{{expires}}~{{signature}}"
parameter = "token"
origin = "other"
checks = false
"""
REDIS = "redis://{host}:{behind}/0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What the settings of a row have: the source, tables, lines of the route, options of the command.

    Braces in the texts are the values of `_settings`.
    """

    source: str = 'type = "path"\nroot = "{files}"\n'
    tables: str = ""
    route: str = ""
    options: tuple[str, ...] = ()
    routes: int = 1
    tls: bool = False


SERVE = Product()
PRODUCTS: Mapping[str, tuple[str, Product]] = {
    "serve": ("its defaults", SERVE),
    "serve-quiet": ("without a log", Product(options=("--no-access-log",))),
    "serve-json": ("a log in JSON", Product(tables=_JSON)),
    "serve-metrics": ("metrics", Product(tables=_METRICS)),
    "serve-limits": ("limits", Product(tables=_LIMITS)),
    "serve-accounts": ("counted downloads", Product(tables=_ACCOUNTS)),
    "serve-counted": ("JSON log, metrics, limits, counts", Product(tables=_COUNTED)),
    "serve-hide": ("names that are hidden", Product(route=_HIDE)),
    "serve-signed": ("a signed link", Product(tables=_LINKS, route='access = ["signed"]\n')),
    "serve-hooked": ("behind a function", Product(route='access = ["hook:rules:allowed"]\n')),
    "serve-all": ("all of these on", Product(tables=_LINKS + _COUNTED, route=_HIDE + 'access = ["signed"]\n')),
}
"""The rows that differ from the defaults by their settings alone, with what is particular to them."""

REDIRECT = Product(
    source='type = "path"\nroot = "{files}"\n' + _EDGE,
    tables=_LINKS,
    route='access = ["signed"]\nsend = "redirect"\n',
)
OFFLOAD = Product(tables='[offload]\nbackend = "nginx"\n[[offload.rules]]\nsource = "files"\ntarget = "/_files/"\n')
REMOTE = Product(source=_ORIGIN)
CACHED = Product(source=_ORIGIN + _CACHE)
ARCHIVE = Product(route="archive = true\n", tables="[archives]\nper_client = 0\n")
LISTING = Product(route="list = true\n")
TLS = Product(tls=True)
SHARED_LINKS = Product(tables=_LINKS + f'store = "{REDIS}"\n', route='access = ["signed"]\n')
SHARED_LIMITS = Product(tables=_LIMITS + f'store = "{REDIS}"\n')
SHARED = Product(
    tables=_LINKS + f'store = "{REDIS}"\n' + _LIMITS + f'store = "{REDIS}"\n', route='access = ["signed"]\n'
)


def serve(product: Product, place: Place, *, port: int | None = None) -> Command:
    """Return the command of `downloadview serve` with the settings of a row, which it writes."""
    port = port or place.port
    options = [*product.options]
    if product.tls:
        certificate, key = certificate_in(place.scratch)
        options += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    config = place.scratch / "downloadview.toml"
    config.write_text(_settings(product, place))
    Path(place.scratch, "rules.py").write_text(_HOOK)
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", str(config), "--port", str(port)]
    return Command([*command, *options], port)


def _settings(product: Product, place: Place) -> str:
    values = {"host": HOST, "behind": place.behind, "files": place.files}
    source = product.source.format(**values)
    parts = [f"[sources.files]\n{source}"]
    for number in range(product.routes - 1):  # the one that is asked for comes last
        parts.append(f"[sources.tenant-{number}]\n{source}")
        parts.append(f'[[routes]]\npath = "/tenants/{number}/{{path:path}}"\nsource = "tenant-{number}"\n')
    parts.append(f'[[routes]]\npath = "/files/{{path:path}}"\nsource = "files"\n{product.route}')
    parts.append(product.tables.format(**values))
    return "\n".join(parts)


def alone(product: Product) -> Callable[[Place], list[Command]]:
    """Return the commands of the service that clients reach directly."""
    return lambda place: [serve(product, place)]


def twice(product: Product) -> Callable[[Place], list[Command]]:
    """Return the commands of two services that share a port by SO_REUSEPORT."""
    return lambda place: [serve(replace(product, options=(*product.options, "--reuse-port")), place)] * 2


def behind_nginx(product: Product) -> Callable[[Place], list[Command]]:
    """Return the commands of the service behind nginx, which sends the files."""

    def commands(place: Place) -> list[Command]:
        locations = f"location /files/ {{ {PROXY} }} location /_files/ {{ internal; alias {place.files}/; }}"
        return [nginx_command(place, locations), serve(product, place, port=place.behind)]

    return commands


def proxied(product: Product) -> Callable[[Place], list[Command]]:
    """Return the commands of the service behind an nginx that passes its bytes on, and is not measured."""

    def commands(place: Place) -> list[Command]:
        # the buffers are those of the printed configuration
        buffers = "proxy_buffer_size 32k; proxy_buffers 8 32k; proxy_max_temp_file_size 0;"
        client = "proxy_set_header X-Forwarded-For $http_x_forwarded_for;"
        location = f"location /files/ {{ {PROXY} {buffers} {client} }}"
        return [nginx_command(place, location, measured=False), serve(product, place, port=place.behind)]

    return commands


def before_nginx(product: Product) -> Callable[[Place], list[Command]]:
    """Return the commands of the service and of the nginx from which it fetches files, which is not measured."""

    def commands(place: Place) -> list[Command]:
        location = f"location /files/ {{ alias {place.files}/; }}"
        return [serve(product, place), nginx_command(place, location, port=place.behind, measured=False)]

    return commands


def beside_redis(product: Product) -> Callable[[Place], list[Command]]:
    """Return the commands of the service and of its Redis, whose cost is measured separately."""

    def commands(place: Place) -> list[Command]:
        redis = [which("redis-server") or "redis-server", "--port", str(place.behind), "--bind", HOST, "--save", ""]
        return [
            Command([*redis, "--dir", str(place.scratch)], place.behind, measured=False),
            serve(product, place),
        ]

    return commands
