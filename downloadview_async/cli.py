"""The command `downloadview`."""

import contextlib
import errno
import functools
import json
import os
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Any, NoReturn

from downloadview_async import ConfigurationError, __version__, proxy_kinds

try:
    import click
    import msgspec
except ModuleNotFoundError as exc:
    sys.exit(f"downloadview: the service needs {exc.name}: install downloadview_async with its extra `server`")

from downloadview_async.service.logs import one_line

_WRONG_SETTINGS = 2  # a supervisor need not try again

try:
    from downloadview_async.service.config_loader import CONFIG, load_settings
    from downloadview_async.service.settings import Settings, Unavailable
except ConfigurationError as exc:  # of a proxy that an installed package adds
    click.echo(f"downloadview: {one_line(str(exc))}", err=True)
    sys.exit(_WRONG_SETTINGS)

_CONFIGURED = [name for name, kind in proxy_kinds().items() if kind.configuration is not None]
_DEFAULT_CONFIG = "downloadview.toml"
_STARTUP_FAILURE = 3  # as uvicorn: another try may go better
_LONGEST_SOCKET_PATH = 107  # bytes; Linux has room for 108, with a NUL
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="downloadview")
def main() -> None:
    """Serve downloads: of directories, storages, databases, other servers and code."""


@main.command()
@click.argument("path", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="The settings, a TOML file.")
@click.option("--host", help="The address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="The port to listen on; 0 takes a free one.  [default: 8000]")
@click.option("--uds", help="Listen on a Unix socket instead.")
@click.option("--fd", type=int, help="Listen on an open socket, by the number of its descriptor, instead.")
@click.option("--workers", type=int, help="How many processes serve.  [default: 1]")
@click.option("--root-path", help="The path that a proxy serves this below.")
@click.option("--proxy-headers/--no-proxy-headers", default=None, help="Believe X-Forwarded-*.  [default: believe]")
@click.option(
    "--forwarded-allow-ips", help="Whose X-Forwarded-* to believe: addresses, or *.  [default: 127.0.0.1,::1]"
)
@click.option("--log-level", help="critical, error, warning, info, debug or trace.  [default: info]")
@click.option("--access-log/--no-access-log", default=None, help="Log every request.  [default: log]")
@click.option("--use-colors/--no-use-colors", default=None, help="Colours in the log.  [default: on a terminal]")
@click.option("--loop", help="auto, asyncio or uvloop.  [default: auto]")
@click.option("--http", help="auto (sendfile), h11 or httptools.  [default: auto]")
@click.option("--stall-timeout", type=float, help="Seconds a client may take almost nothing.  [default: 60]")
@click.option("--minimum-rate", type=int, help="Bytes per second that a client has to take.  [default: 64]")
@click.option("--backlog", type=int, help="Connections that wait to be taken.  [default: 2048]")
@click.option("--limit-concurrency", type=int, help="Requests at once before 503 is answered.")
@click.option("--limit-max-requests", type=int, help="Requests after which a worker is replaced.")
@click.option("--timeout-keep-alive", type=int, help="Seconds an idle connection is kept.  [default: 5]")
@click.option("--timeout-graceful-shutdown", type=int, help="Seconds that downloads have to end.  [default: 30]")
@click.option("--server-header/--no-server-header", default=None, help="Send a Server header.  [default: send]")
@click.option("--date-header/--no-date-header", default=None, help="Send a Date header.  [default: send]")
@click.option("--ssl-keyfile", help="The private key for HTTPS.")
@click.option("--ssl-certfile", help="The certificate for HTTPS.")
@click.option("--ssl-keyfile-password", help="The password of the private key.")
def serve(path: Path | None, config: Path | None, **options: Any) -> None:
    """Serve what the settings say, or the directory PATH alone: its files are at /files/.

    The settings are those of --config, of the file that DOWNLOADVIEW_CONFIG names, or of downloadview.toml in the
    current directory. Variables such as DOWNLOADVIEW_SERVER__PORT win over the file, options win over both. The
    options are uvicorn's. The page at / lists what is served; /-/livez and /-/readyz tell how the service is.
    """
    if path is not None and config is not None:
        raise click.UsageError("PATH and --config exclude each other: PATH is for a directory without settings")
    try:
        _choose(path, config, "nothing to serve: give a directory, or ")
        given = {name: value for name, value in options.items() if value is not None}
        if given.keys() & {"host", "port"} and not given.keys() & {"uds", "fd"}:
            given |= {"uds": None, "fd": None}  # uvicorn would prefer what the file says of those
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ, options=given)
        run(settings)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_STARTUP_FAILURE if isinstance(exc, Unavailable) else _WRONG_SETTINGS)


@main.command("config")
@click.argument("proxy", type=click.Choice(_CONFIGURED))
@click.option("--config", type=click.Path(path_type=Path), help="The settings, a TOML file.")
@click.option("--listen", default="127.0.0.1:8080", show_default=True, help="The address that the proxy listens on.")
@click.option(
    "--service",
    help="Where the proxy finds the service: HOST:PORT, or unix:/PATH.  [default: where the settings let it listen]",
)
@click.option(
    "--relative-to",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write what is below this directory as it is seen from there, for a proxy that is started in it.",
)
def print_config(proxy: Any, config: Path | None, listen: str, service: str | None, relative_to: Path | None) -> None:
    """Print the configuration of a proxy that sends the files of the settings' rules: nginx, for example.

    The settings are those that `serve` reads, variables included; their backend has to be this proxy. The proxy can be
    started with it as it is. "TLS:" marks where TLS goes.
    """
    from downloadview_async.service.proxy_config import config_for

    try:
        _choose(None, config, "no proxy to configure: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        text = config_for(settings, proxy, listen=listen, service=service, relative_to=relative_to)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    click.echo(text.encode(), nl=False)


@main.command()
@click.argument("url", required=False)
@click.option("--config", type=click.Path(path_type=Path), help="The settings, a TOML file.")
@click.option("--direct", metavar="URL", help="Where the service itself listens.  [default: as the settings say]")
@click.option("--file", "files", multiple=True, metavar="PATH", help="The path of a URL to ask for; may be repeated.")
@click.option("--only", is_flag=True, help="Ask for the paths of --file alone.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=10.0, help="Seconds for each.  [default: 10]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(url: str | None, config: Path | None, as_json: bool, **options: Any) -> None:
    """Check a running service against its settings, and with URL the proxy in front of it.

    URL is where clients reach it. Each line says pass, FAIL or skip, which step, what was asked and what came, and for
    a failure what mends it. The status is 0 if nothing fails, 1 if something does, 2 if nothing can be checked.

    The settings are those of `downloadview serve`. Each route is asked for the `example`s that they give, for the paths
    of --file, or for the first file of a local directory.
    """
    import anyio

    from downloadview_async.service.check.run import Line
    from downloadview_async.service.check.run import check as checks

    lines: list[Line] = []

    async def run_checks() -> None:
        _choose(None, config, "nothing to check: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        async with contextlib.aclosing(checks(settings, url=url, **options)) as found:
            async for line in found:
                lines.append(line)
                if not as_json:
                    click.echo(one_line(f"{line.result}  {line.step}  {line.route}  {line.request}: {line.outcome}"))
                    if line.remedy:
                        click.echo(one_line(f"      {line.remedy}"))

    try:
        anyio.run(run_checks)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    counts = {result: sum(line.result == result for line in lines) for result in ("pass", "FAIL", "skip")}
    if as_json:
        click.echo(json.dumps({**counts, "checks": [line.as_json() for line in lines]}, indent=1))
    else:
        click.echo(", ".join(f"{count} {result}" for result, count in counts.items()))
    sys.exit(1 if counts["FAIL"] else 0)


def _say(exc: ConfigurationError) -> None:
    """Say on one line what is wrong, whatever the settings have in their texts."""
    click.echo(f"downloadview: {one_line(str(exc))}", err=True)


def _choose(path: Path | None, config: Path | None, lacking: str) -> None:
    """Put what is to be served into the environment, where worker processes find it too.

    lacking: what to say before "settings with --config" where there is nothing. Raises `ConfigurationError`.
    """
    if path is not None:
        os.environ.pop(CONFIG, None)
        os.environ["DOWNLOADVIEW_SOURCES"] = json.dumps({"files": {"type": "path", "root": str(path.absolute())}})
        os.environ["DOWNLOADVIEW_ROUTES"] = json.dumps([{"path": "/files/{path:path}", "source": "files"}])
    elif config is not None:
        os.environ[CONFIG] = str(config)
    elif CONFIG not in os.environ:
        if not os.path.exists(_DEFAULT_CONFIG):
            raise ConfigurationError(
                f"{lacking}settings with --config, {CONFIG} or a file {_DEFAULT_CONFIG} in the current directory"
            )
        os.environ[CONFIG] = _DEFAULT_CONFIG


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, after which downloads have `timeout_graceful_shutdown` seconds to end.

    Raises `ConfigurationError`.
    """
    # imported here so that --help and a refusal need none of it
    import anyio
    import uvicorn

    from downloadview_async.asgi.server import DownloadProtocol
    from downloadview_async.service.app import build, check_databases, worker_app
    from downloadview_async.service.logs import log_config
    from downloadview_async.service.shutdown import EndsInTime, ignore_hangup
    from downloadview_async.service.workers import Workers

    # uvicorn passes the signal on when all has ended: that is a success, not a death by signal
    signal.signal(signal.SIGTERM, _end)
    ignore_hangup()
    # also with several workers: what is wrong is said once, before any of them starts
    _check_server(settings)
    app = build(settings)
    anyio.run(check_databases, settings)
    server = settings.server
    options = msgspec.structs.asdict(server)
    watch = {"stall_seconds": options.pop("stall_timeout"), "minimum_rate": options.pop("minimum_rate")}
    if server.http == "auto":
        options["http"] = functools.partial(DownloadProtocol, **watch)
    vars(sys.modules[uvicorn.run.__module__])["Multiprocess"] = Workers  # uvicorn.run finds its class by this name
    uvicorn.run(
        EndsInTime(app) if server.workers == 1 else f"{worker_app.__module__}:{worker_app.__name__}",
        factory=server.workers > 1,
        lifespan="on",
        ws="none",
        log_config=log_config(server.log_level),
        **options,
    )


def _check_server(settings: Settings) -> None:
    """Raise `ConfigurationError` for what uvicorn would say with a traceback."""
    server = settings.server
    if server.uds is not None:
        _check_unix_socket(settings, server.uds)
    elif server.fd is None:
        _check_address(settings)
    if server.fd is not None:
        try:
            problem = None if stat.S_ISSOCK(os.fstat(server.fd).st_mode) else "it is something else"
        except OSError as exc:
            problem = str(exc.strerror)
        if problem is not None:
            raise settings.error(
                "server.fd",
                f"{server.fd} is no open socket ({problem}): give the number of one that this process inherits",
            )
    if server.ssl_certfile or server.ssl_keyfile:
        _check_certificate(settings)


def _check_unix_socket(settings: Settings, path: str) -> None:
    """Raise `ConfigurationError` where a Unix socket cannot be made, and remove one that nobody listens on."""
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise settings.error("server.uds", f"the directory of {path!r} is missing: create it")
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise settings.error("server.uds", f"{path!r} is longer than {_LONGEST_SOCKET_PATH} bytes: give a shorter path")
    if not os.path.lexists(path):
        _try_to_bind(settings, path)
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise settings.error("server.uds", f"{path!r} exists and is not a socket: give another path")
    if settings.server.workers == 1:
        return  # a single process takes the place of the one before
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            problem = f"another process listens on {path!r}: stop it, or give another path"
            raise Unavailable(str(settings.error("server.uds", problem)))
    os.unlink(path)


def _try_to_bind(settings: Settings, path: str) -> None:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        os.unlink(path)
    except OSError as exc:
        problem = f"{path!r} cannot be made a socket ({exc.strerror}): give a path where this user may make files"
        raise settings.error("server.uds", problem) from exc


def _check_address(settings: Settings) -> None:
    """Raise `ConfigurationError` for an address that cannot be listened on; `Unavailable` where it may be later."""
    server = settings.server
    try:
        found = socket.getaddrinfo(server.host or None, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as exc:  # ValueError: what cannot be a name, such as one of 300 characters
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        problem = f"{server.host!r} has no address ({reason}): give one of this machine, such as 127.0.0.1"
        error = settings.error("server.host", problem)
        raise (Unavailable(str(error)) if isinstance(exc, OSError) else error) from exc
    problems: list[OSError] = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as exc:
            problems.append(exc)
    # a name may have an address of a family that this machine does not have
    failed = [exc for exc in problems if exc.errno not in _NO_SUCH_ADDRESS] or problems[len(found) - 1 :]
    if not failed:
        return
    reason = os.strerror(failed[0].errno or 0).lower()
    key = "server.host" if failed[0].errno in _NO_SUCH_ADDRESS else "server.port"
    error = settings.error(
        key, f"{server.host}:{server.port} cannot be listened on ({reason}): give another, or stop what listens there"
    )
    if failed[0].errno in (errno.EADDRINUSE, *_NO_SUCH_ADDRESS):
        raise Unavailable(str(error)) from failed[0]
    raise error from failed[0]


def _check_certificate(settings: Settings) -> None:
    import ssl

    server = settings.server
    if not server.ssl_certfile:
        raise settings.error("server.ssl_keyfile", "a key without a certificate: give ssl_certfile too")
    for key, path in (("ssl_certfile", server.ssl_certfile), ("ssl_keyfile", server.ssl_keyfile)):
        try:
            if path:
                open(path, "rb").close()
        except OSError as exc:  # which of them it is, load_cert_chain does not tell
            raise settings.error(
                f"server.{key}", f"{path!r} cannot be read ({exc.strerror}): give a file that this user may read"
            ) from exc
    password = server.ssl_keyfile_password or ""  # a text in any case: OpenSSL would ask at the terminal
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile or None, password)
    except (OSError, ValueError) as exc:  # ValueError: a password that is too long
        reason = getattr(exc, "reason", None) or str(exc)
        raise settings.error(
            "server.ssl_certfile",
            f"the certificate and its key are of no use ({reason}): give a pair in PEM format, and "
            "ssl_keyfile_password if the key has one",
        ) from exc


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    main()
