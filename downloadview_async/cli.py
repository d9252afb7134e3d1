"""The command `downloadview`."""

import contextlib
import functools
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from downloadview_async import ConfigurationError, FileError, __version__, balancers, link_formats, proxy_kinds

try:
    import click
    import msgspec
    from click.core import ParameterSource
except ModuleNotFoundError as exc:
    sys.exit(f"downloadview: the service needs {exc.name}: install downloadview_async with its extra `server`")

from downloadview_async.service.command import HELP, Group
from downloadview_async.service.logs import one_line

_WRONG_SETTINGS = 2  # the exit status: trying again does not help

try:
    from downloadview_async.service.config_loader import CONFIG, DEFAULT, load_settings
    from downloadview_async.service.schema import description_of, parts_of
    from downloadview_async.service.settings import ServerSettings, Settings, Unavailable
    from downloadview_async.service.values import seconds_of
except ConfigurationError as exc:  # a mistake in a proxy that an installed package adds
    click.echo(f"downloadview: {one_line(str(exc))}", err=True)
    sys.exit(_WRONG_SETTINGS)

_KINDS = {name: kind for name, kind in proxy_kinds().items() if kind.configuration is not None}
_CONFIGURED = [
    *(name for name, kind in _KINDS.items() if kind.balances),
    *balancers(),
    *(name for name, kind in _KINDS.items() if not kind.balances),
]
"""The proxies that `downloadview config` knows. Those that can choose one of several replicas come first."""

_WAYS = ["zero-copy", "chunks", "nginx", "cache", "remote", "redirect"]
_PROGRAM = "downloadview"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_STARTUP_FAILURE = 3  # the exit status of uvicorn: trying again may help


class _Finite(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):  # nan is in each range
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class _Served(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if os.path.isfile(value) and str(value).endswith(".toml"):
            self.fail(f"{value!r} is a file: for settings use --config {value}, or else give its directory", param, ctx)
        if not os.path.exists(value) and str(value).endswith(".toml"):
            self.fail(f"{value!r} does not exist: for settings use --config, with a file that exists", param, ctx)
        if not os.path.exists(value) and str(value).isdecimal():
            self.fail(f"{value!r} does not exist: for a port use --port {value}", param, ctx)
        return super().convert(value, param, ctx)


class _Choice(click.Choice[str]):
    """Shows and completes the choices, in upper or lower case; another value is refused with the settings."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value).lower()


_SERVE_GROUPS = {
    "Files and directories, without settings": ("hidden", "title", "users", "share", "qr"),
    "Settings": ("config", "watch"),
    "Address": ("host", "port", "root_path", "uds", "fd", "reuse_port"),
    "HTTPS": ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password"),
    "Processes": (
        *("workers", "drain_seconds", "timeout_graceful_shutdown", "limit_max_requests", "pid_file", "loop"),
    ),
    "Clients": (
        *("limit_concurrency", "backlog", "timeout_keep_alive", "stall_timeout", "minimum_rate"),
        *("http", "http2", "server_header", "date_header"),
    ),
    "Proxies in front": ("proxy_headers", "forwarded_allow_ips"),
    "Log": ("log_level", "access_log", "use_colors"),
}
_MEANT = {
    **dict.fromkeys(["-p", "-P"], "--port"),
    **dict.fromkeys(["-b", "-H", "--bind", "--listen", "--address"], "--host, and the port as --port"),
    **dict.fromkeys(["-d", "--directory", "--root", "--path"], "the directory without an option"),
    **dict.fromkeys(["-c", "--settings", "--config-file"], "--config"),
    **dict.fromkeys(["--password", "--auth", "--username"], "--user NAME, or --user NAME:PASSWORD"),
    **dict.fromkeys(["--expires", "--link"], "--share, with a time such as 2h"),
    **dict.fromkeys(["--reload", "--dev"], "--watch"),
    **dict.fromkeys(["-q", "--quiet"], "--log-level warning"),
    **dict.fromkeys(["-v", "--verbose", "--debug"], "--log-level debug"),
    **dict.fromkeys(["--tls", "--https", "--cert", "--certfile"], "--ssl-certfile and --ssl-keyfile"),
    "--browse": "no option: the directory is listed",
}
"""Options of other servers, with those that `serve` has instead."""


_CONFIG_OPTION = click.option("--config", type=click.Path(path_type=Path), help="The settings file, in TOML.")


@click.group(
    cls=Group,
    context_settings=HELP,
    epilog="`downloadview COMMAND --help` has the options of a command, in groups, and examples.",
)
@click.version_option(__version__, prog_name="downloadview")
def main() -> None:
    """Serve downloads from directories, storages, databases, other servers and code."""


@main.command(
    examples=[
        "downloadview serve DIRECTORY",
        "downloadview serve DIRECTORY --share 2h --qr --host 0.0.0.0",
        "downloadview serve --config downloads.toml --workers 4",
    ],
    groups=_SERVE_GROUPS,
    meant=_MEANT,
)
@click.argument("paths", nargs=-1, metavar="[PATH]...", type=_Served(exists=True))
@_CONFIG_OPTION
@click.option("--hidden", is_flag=True, help="With PATH, serve names that begin with a dot, too.")
@click.option("--title", help="With PATH, the title of the pages.")
@click.option(
    "--user",
    "users",
    multiple=True,
    metavar="NAME[:PASSWORD]",
    help="With PATH, ask for this name and password; may be repeated.",
)
@click.option(
    "--share",
    metavar="TIME",
    help="With PATH, print signed links, such as for 2h, and serve nothing else, but to --user.",
)
@click.option("--qr", is_flag=True, help="With PATH, show the last URL as a QR code, on a terminal.")
@click.option("--watch", is_flag=True, help="Reload when the settings or the code change, for development.")
@click.pass_context
def serve(
    context: click.Context,
    /,
    paths: tuple[str, ...],
    config: Path | None,
    hidden: bool,
    title: str | None,
    users: tuple[str, ...],
    share: str | None,
    qr: bool,
    watch: bool,
    **options: Any,
) -> None:
    """Serve the routes in the settings, or files and directories.

    With PATH, only these files and directories are served and listed, at /files/, without those whose path has a name
    that begins with a dot; the URLs that work are printed. The settings file is given by --config or
    DOWNLOADVIEW_CONFIG; the default is downloadview.toml in the current directory. Variables such as
    DOWNLOADVIEW_SERVER__PORT override the file, and options override both. The options are those of uvicorn. The page
    at / lists the routes; /-/livez and /-/readyz answer health probes.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise click.UsageError("the current directory has been removed: change to another") from None
    if paths and config is not None:
        raise click.UsageError("PATH and --config exclude each other: PATH serves files without settings")
    if hidden and not paths:
        raise click.UsageError("--hidden needs PATH; in the settings, a route hides what its `hide` says")
    for option, value in {"--title": title, "--user": users, "--share": share, "--qr": qr}.items():
        if value and not paths:
            raise click.UsageError(f"{option} needs PATH: it is for files without settings")
    try:
        if paths:
            _choose_paths(paths, hidden=hidden, title=title, users=[*map(_with_password, users)], share=share)
        else:
            _choose(config, "nothing to serve: give files or directories, or ")
        given = {
            name: value
            for name, value in options.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        if given.keys() & {"host", "port"} and not given.keys() & {"uds", "fd"}:
            given |= {"uds": None, "fd": None}  # uvicorn would prefer those in the file
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ, options=given)
        if not paths:
            run(settings, options=given, watches=watch)
            return
        if settings.server.port == 0 and settings.server.uds is None and settings.server.fd is None:
            from downloadview_async.service.serve_paths import free_port

            given["port"] = free_port(settings.server.host)
            settings = load_settings(os.environ.get(CONFIG), environ=os.environ, options=given)
        announce = functools.partial(_announce, settings, paths, share=share is not None, qr=qr)
        run(settings, options=given, watches=watch, announce=announce)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_STARTUP_FAILURE if isinstance(exc, Unavailable) else _WRONG_SETTINGS)


def _with_password(user: str) -> str:
    """Return NAME:PASSWORD, and prompt for a password that is missing; a text without a name is refused later."""
    if ":" in user or not user:
        return user
    return f"{user}:{click.prompt(f'Password of {user}', hide_input=True, confirmation_prompt=True, err=True)}"


def _choose_paths(paths: Sequence[str], **options: Any) -> None:
    """Write the settings for files and directories into the environment. Raises `ConfigurationError`."""
    from downloadview_async.service.serve_paths import variables_of

    variables = variables_of(paths, **options)
    os.environ.pop(CONFIG, None)
    os.environ.update(variables)


def _announce(settings: Settings, paths: Sequence[str], *, share: bool, qr: bool) -> None:
    """Print the URLs that work, one on a line."""
    from downloadview_async.service.serve_paths import urls_of

    urls = urls_of(settings, paths, share=share)
    for url in urls:
        click.echo(url)
    if share and urls and settings.server.host in _LOOPBACK and sys.stderr.isatty():
        click.echo("Only this machine can open the link. For others in the network, add --host 0.0.0.0", err=True)
    if qr and urls and sys.stdout.isatty():
        import segno

        segno.make(urls[-1], error="l", micro=False).terminal(compact=True)


_PATHS = ("uds", "pid_file", "ssl_keyfile", "ssl_certfile")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option_of(setting: msgspec.structs.FieldInfo) -> click.Option:
    """Return the option for a setting of the server: its name, type, default and description are the setting's."""
    flag = _flag(setting.name)
    kind: Any = next((part for part in parts_of(setting.type) if part in (bool, int, float)), str)
    if choices := next((get_args(part) for part in parts_of(setting.type) if get_origin(part) is Literal), ()):
        kind = _Choice(choices)
    elif setting.name in _PATHS:
        kind = click.Path()
    text = (description_of(setting.type) or "").removeprefix("true to ")
    # other settings are options here: minimum_rate, http = auto
    text = re.sub(r"\b([a-z]+(?:_[a-z]+)+|[a-z]+(?= = ))\b(?: =)?", lambda match: _flag(match[1]), text)
    return click.Option(
        [f"{flag}/{_flag(f'no_{setting.name}')}" if kind is bool else flag],
        type=kind,
        default=setting.default,
        show_default=setting.default != "",
        help=f"{text[:1].upper()}{text[1:]}.",
    )


serve.params += map(_option_of, msgspec.structs.fields(ServerSettings))


@main.command(
    "reload",
    examples=["downloadview reload --config downloads.toml", "downloadview reload --pid-file /run/downloadview.pid"],
)
@click.argument("process", required=False, type=click.IntRange(min=1), metavar="[PID]")
@_CONFIG_OPTION
@click.option("--pid-file", help="The pid_file of the service.  [default: server.pid_file in the settings]")
@click.option(
    "--timeout",
    type=_Finite(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that the service has to answer.",
)
def reload_settings(process: int | None, config: Path | None, pid_file: str | None, timeout: float) -> None:
    """Have a running service read its settings again.

    It reads the keys, the users and the certificate again, too. No request is refused or cut.

    The service is the process PID, or that of the pid_file, or that of the variable MAINPID, which systemd sets. With a
    pid_file, the command waits until the service uses the new settings. Without one, it checks them itself and sends
    SIGHUP. If the settings are wrong, nothing changes, and the exit status is 2.
    """
    import anyio

    from downloadview_async.service.app import build, check_databases
    from downloadview_async.service.pid_file import hang_up, reload_by_pid_file
    from downloadview_async.service.server_checks import check_certificate

    try:
        if pid_file is None or process is not None:
            _choose(config, "nothing to reload: give --pid-file, or ")
            settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
            pid_file = settings.server.pid_file if process is None else None
            main_process = os.environ.get("MAINPID", "")
            if process is None and pid_file is None:
                if not main_process.isdecimal():
                    raise ConfigurationError("no process: give PID, or set server.pid_file")
                process = int(main_process)
            if process is not None:
                check_certificate(settings)
                build(settings)
                anyio.run(check_databases, settings)
                hang_up(process)
                click.echo(f"told the process {process} to reload")
                return
        assert pid_file is not None
        reload_by_pid_file(pid_file, seconds=timeout)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_STARTUP_FAILURE if isinstance(exc, Unavailable) else _WRONG_SETTINGS)
    click.echo("reloaded")


@main.command(
    "config",
    examples=[
        "downloadview config nginx --config downloads.toml > nginx.conf",
        "downloadview config haproxy --service 10.0.0.5:8000 --service 10.0.0.6:8000 > haproxy.cfg",
    ],
)
@click.argument("proxy", type=click.Choice(_CONFIGURED), metavar="PROXY")
@_CONFIG_OPTION
@click.option("--listen", default="127.0.0.1:8080", show_default=True, help="The address that the proxy listens on.")
@click.option(
    "--service",
    "services",
    multiple=True,
    help="Where the proxy finds the service: HOST:PORT, or unix:/PATH; repeated for several replicas, of which nginx, "
    "haproxy and envoy choose one by the path.  [default: the address in the settings]",
)
@click.option(
    "--bound",
    type=int,
    metavar="PERCENT",
    help="For haproxy and envoy, the most requests of a replica, in percent of the average; 0: any number.  [default: "
    "150]",
)
@click.option(
    "--relative-to",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write paths relative to this directory, for a proxy that is started in it.",
)
@click.option(
    "--link-secrets",
    is_flag=True,
    help="Print instead the file with the secrets by which nginx verifies links. Keep it from everyone else.",
)
def print_config(
    proxy: Any,
    config: Path | None,
    listen: str,
    services: Sequence[str],
    bound: int | None,
    relative_to: Path | None,
    link_secrets: bool,
) -> None:
    """Print the configuration of a proxy, such as nginx.

    PROXY is nginx, apache, lighttpd, caddy or h2o, or one that an installed package adds. It sends the files of the
    settings' rules. The settings are the same as those of `serve`, variables included; offload.backend must be this
    proxy. The proxy can be started with the printed configuration unchanged. "TLS:" marks the place for TLS.

    PROXY may also be haproxy or envoy, which send no files: they only choose one of several replicas.
    """
    from downloadview_async.service.access import link_secrets as link_secrets_of
    from downloadview_async.service.proxy_config import balancer_config_for, config_for

    if link_secrets and (proxy in balancers() or not proxy_kinds()[proxy].verifies_links):
        raise click.UsageError(f"{proxy} does not verify links: --link-secrets is for nginx")
    if bound is not None and proxy not in balancers():
        raise click.UsageError(
            f"{proxy} cannot bound the load of a replica: --bound is for {' and '.join(balancers())}"
        )
    if relative_to is not None and proxy in balancers():
        raise click.UsageError(f"{proxy} sends no files: --relative-to is for proxies that do")
    try:
        _choose(config, "no proxy to configure: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        if proxy in balancers():
            text = balancer_config_for(settings, proxy, listen=listen, services=services, bound=bound)
        else:
            text = config_for(settings, proxy, listen=listen, service=services or None, relative_to=relative_to)
        if link_secrets:
            text = link_secrets_of(settings)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    click.echo(text.encode(), nl=False)


@main.command(
    examples=[
        "downloadview check --config downloads.toml",
        "downloadview check https://files.example.org --file /files/a.txt",
        "downloadview check --app main:app http://127.0.0.1:8080 --file /invoices/1=invoices/a.pdf",
    ]
)
@click.argument("url", required=False)
@_CONFIG_OPTION
@click.option(
    "--direct",
    metavar="URL",
    help="The URL at which the service itself listens.  [default: the address in the settings]",
)
@click.option(
    "--app",
    "app_name",
    metavar="MODULE:APP",
    help="Check this ASGI application, instead of a service with settings.",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="PATH[=FILE]",
    help="A path to request; with --app, also the local file that is sent for it. May be repeated.",
)
@click.option("--only", is_flag=True, help="Request only the paths of --file.")
@click.option(
    "--timeout",
    type=_Finite(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds for each request.",
)
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="'NAME: VALUE'",
    help="A header of every request, such as that of a user who may have the files; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(
    url: str | None,
    config: Path | None,
    app_name: str | None,
    only: bool,
    as_json: bool,
    headers: Sequence[str],
    **options: Any,
) -> None:
    """Check a running service or application, and its proxy.

    The service is checked against its settings, and with URL the proxy too. URL is the address at which clients reach
    the proxy. Each row shows the result (pass, FAIL or skip), the step, the route, the request and the outcome; below a
    FAIL is the remedy. The exit status is 0 if nothing fails, 1 if something fails, and 2 if nothing can be checked.

    The settings are the same as those of `downloadview serve`. The check requests the `example`s of each route, the
    paths of --file, or the first file of a local directory.

    With --app, an ASGI application of any framework is checked in the same way: it is imported from the current
    directory, started, and called in this process, to know what it answers.
    """
    import anyio

    from downloadview_async.check.application import check_application
    from downloadview_async.check.http import headers_of
    from downloadview_async.check.site import Line, counts_of, report_of
    from downloadview_async.service.check.run import check as checks

    lines: list[Line] = []
    if app_name is not None and (config is not None or only):
        raise click.UsageError("--app is for an application without settings: leave out --config and --only")
    try:
        sent = headers_of(headers)
    except ConfigurationError as exc:
        raise click.UsageError(str(exc)) from None

    async def run_checks() -> None:
        if app_name is None:
            _choose(config, "nothing to check: give an application with --app, or ")
            settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
            results = checks(settings, url=url, headers=sent, only=only, **options)
        else:
            results = check_application(_application(app_name), url=url, headers=sent, **options)
        async with contextlib.aclosing(results) as new_lines:
            async for line in new_lines:
                lines.append(line)
                if not as_json:
                    click.echo(line.as_text())

    try:
        anyio.run(run_checks)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    counts = counts_of(lines)
    if as_json:
        click.echo(json.dumps(report_of(lines), indent=1))
    else:
        click.echo(", ".join(f"{count} {result}" for result, count in counts.items()))
    sys.exit(1 if counts["FAIL"] else 0)


@main.command(
    examples=[
        "downloadview purge mirror releases/1.2/app.zip",
        "downloadview purge mirror --prefix releases/ --at http://10.0.0.5:8000 --at http://10.0.0.6:8000",
    ]
)
@click.argument("source")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--prefix", "prefixes", multiple=True, help="Remove all files whose names begin so; may be repeated.")
@click.option("--all", "is_all", is_flag=True, help="Remove all files of the source.")
@click.option(
    "--at",
    "urls",
    multiple=True,
    metavar="URL",
    help="Have the service at this URL do it, by its /-/purge; may be repeated.  [default: the cache on this machine]",
)
@_CONFIG_OPTION
def purge(
    source: str, names: Sequence[str], prefixes: Sequence[str], is_all: bool, urls: Sequence[str], config: Path | None
) -> None:
    """Remove files from the cache of SOURCE.

    SOURCE is the name of a source in the settings, and NAME the path of a file in it, not percent-encoded. Later
    requests fetch the file again. Running downloads get the rest of their file.

    Without --at, this has to run on the machine of the cache, as the user of the service. It holds for all processes
    that use the directory. With --at, each service needs a [purge] table with the keys of these settings. The exit
    status is 0 if everything was done, 1 if a service did not do it, and 2 for wrong settings.
    """
    from downloadview_async.service.purge import purge_at, purge_here

    if not (names or prefixes or is_all):
        raise click.UsageError("nothing to purge: give NAME, --prefix or --all")
    if is_all and (names or prefixes):
        raise click.UsageError("--all excludes NAME and --prefix: it stands for all files")
    if is_all:
        prefixes = ("",)
    is_done = True
    try:
        _choose(config, "no caches: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        if not urls:
            click.echo(f"purged {purge_here(settings, source, names, prefixes)}")
        for url in urls:
            try:
                click.echo(f"{url}: purged {purge_at(settings, url, source, names, prefixes)}")
            except Unavailable as exc:
                is_done = False
                _say(exc)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    sys.exit(0 if is_done else 1)


def _application(name: str) -> Any:
    """Import an object named MODULE:OBJECT, from the current directory too. Raises `ConfigurationError`."""
    from uvicorn.importer import ImportFromStringError, import_from_string

    if (directory := os.getcwd()) not in sys.path:
        sys.path.insert(0, directory)
    try:
        return import_from_string(name)
    except ImportFromStringError as exc:
        reason = str(exc)
    except (Exception, SystemExit) as exc:  # importing a module may raise anything
        reason = f"{type(exc).__name__}: {exc}"
    raise ConfigurationError(
        f"--app {name} cannot be imported ({reason}): give MODULE:APP, of a module in {directory} or an installed one"
    )


@main.command("keys", examples=["downloadview keys >> keys.txt"])
def print_key() -> None:
    """Print a new line for the file of the keys that sign links.

    The first line of the file signs, and all lines verify: to replace a key, put the new line first.
    """
    click.echo(f"{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(2)} {secrets.token_urlsafe(32)}")


@main.command(
    "sign",
    examples=[
        "downloadview sign /files/report.pdf --expires 2h --base https://files.example.org",
        "downloadview sign /files/2026/ --below --expires 7d",
    ],
    groups={
        "How long, and for whom": ("expires", "until", "client", "uses", "below", "shareable"),
        "How the file is presented": ("filename", "inline", "content_type"),
        "The link": ("base", "format"),
    },
)
@click.argument("path")
@_CONFIG_OPTION
@click.option("--expires", help="How long the link is valid, such as 90s, 10m, 2h or 7d.  [default: links.max_age]")
@click.option(
    "--until", type=click.DateTime(), metavar="TIME", help="Until when the link is valid, in UTC, instead of --expires."
)
@click.option("--filename", help="The name under which the client saves the file.")
@click.option("--inline/--attachment", default=None, help="Whether the client shows the file, or saves it.")
@click.option("--content-type", help="The media type of the file.")
@click.option("--client", metavar="CIDR", help="The address or network from which alone the link is valid.")
@click.option("--shareable", is_flag=True, help="Allow shared caches to keep the file until the link expires.")
@click.option("--uses", type=click.IntRange(min=1), metavar="N", help="How many downloads the link allows.")
@click.option("--below", is_flag=True, help="Make the link to a folder one to all that is below it.")
@click.option("--base", default="", metavar="URL", help="The scheme and host of the link, and a prefix.")
@click.option(
    "--format",
    type=click.Choice([*link_formats()]),
    help="The format of the link: secure_link is verified by nginx, and has fewer options.  [default: what the route "
    "takes]",
)
def sign(
    path: str, config: Path | None, expires: str | None, until: datetime | None, inline: bool | None, **options: Any
) -> None:
    """Print a link to the file or folder at PATH.

    PATH is not percent-encoded, such as "/files/Q3 report.pdf" or /files/2026/. The settings are the same as those
    of `serve`. The route of PATH must have "signed" or "secure_link" in its access.
    """
    from downloadview_async.service.access import begin_store, sign_path

    if expires is not None and until is not None:
        raise click.UsageError("--expires and --until exclude each other")
    attachment = None if inline is None else not inline
    try:
        _choose(config, "no keys: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        options |= {"expires_in": _life(expires), "until": until and until.replace(tzinfo=UTC)}
        begin_store(settings)
        link = sign_path(settings, path, attachment=attachment, **options)
    except ValueError as exc:  # ConfigurationError is one
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    click.echo(link)


def _life(expires: str | None, option: str = "--expires") -> timedelta | None:
    if expires is None:
        return None
    seconds = seconds_of(expires)
    if seconds is None:
        raise ConfigurationError(f"{option} is {expires!r}: give a time such as 90s, 10m, 2h or 7d")
    return timedelta(seconds=seconds)


@main.command("verify", examples=["downloadview verify 'https://files.example.org/files/report.pdf?k=...'"])
@click.argument("url")
@_CONFIG_OPTION
@click.option("--client", metavar="ADDRESS", help="The address of the client, for a link that is bound to one.")
@click.option("--base", default="", metavar="URL", help="That of `sign`, if it has a prefix that a proxy removes.")
def verify(url: str, config: Path | None, client: str | None, base: str) -> None:
    """Print what a link grants, whether or not its uses are taken.

    The exit status is 0 for a valid link, 1 for another, 2 if nothing can be checked.
    """
    import anyio

    from downloadview_async.service.access import grant_of

    try:
        _choose(config, "no keys: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        grant = anyio.run(grant_of, settings, url, client, base)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    except FileError as exc:
        click.echo(f"downloadview: {exc.status.value} {exc.status.phrase}: {one_line(str(exc))}", err=True)
        sys.exit(1)
    for name, value in grant.items():
        click.echo(f"{name}: {value}")


@main.command("revoke", examples=["downloadview revoke kGUFLq4Y7xSq"])
@click.argument("identifier", metavar="ID")
@_CONFIG_OPTION
def revoke(identifier: str, config: Path | None) -> None:
    """Revoke a link, or all links of a key, from the next request on.

    ID is that of a link, as `downloadview verify` prints it, or that of a key. Write -- before an ID that begins with a
    dash. The settings need `links.store`.
    """
    import anyio

    from downloadview_async.service.access import revoke as revoke_in_store

    try:
        _choose(config, "no store: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        until, is_known = anyio.run(revoke_in_store, settings, identifier)
    except (ValueError, FileError) as exc:  # ConfigurationError is a ValueError
        _say(exc)
        sys.exit(_STARTUP_FAILURE if isinstance(exc, Unavailable | FileError) else _WRONG_SETTINGS)
    click.echo(f"revoked: {identifier}\nkept until: {until or 'for ever'}")
    if not is_known:
        problem = "is not the id of a key in the settings, and not that of a link: `downloadview verify` prints both"
        click.echo(f"downloadview: {identifier!r} {problem}", err=True)


@main.command("digest", examples=["downloadview digest", "downloadview digest files/2026"])
@click.argument("path", required=False, type=click.Path(exists=True))
@_CONFIG_OPTION
def digest(path: str | None, config: Path | None) -> None:
    """Compute the digests of files, and keep them in the store.

    They are computed for the files at PATH, or for all files, of the sources that have `digests`. Digests that
    the store has are not computed again. PATH is a file or a directory below the root of a source. The exit status
    is 1 if no file at PATH gets a digest.
    """
    import sqlite3

    import anyio

    from downloadview_async.service.digests import digests_of, fill_store, local_files
    from downloadview_async.service.sources import sources_of

    try:
        _choose(config, "no store: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        files = local_files(digests_of(settings, sources_of(settings)), settings, path)
        with click.progressbar(
            length=sum(file.size for file in files), label=f"{len(files)} files", file=sys.stderr
        ) as bar:
            without = anyio.run(fill_store, files, bar.update)
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    except (OSError, sqlite3.Error) as exc:
        _say(exc)
        sys.exit(_STARTUP_FAILURE)
    for name in without:
        click.echo(f"downloadview: no digest: {one_line(name)}", err=True)
    click.echo(f"digests: {len(files) - len(without)} of {len(files)} files")
    if path is not None and without and len(without) == len(files):
        sys.exit(1)


@main.command("account", examples=["downloadview account /var/log/nginx/downloads.log --follow"])
@click.argument("log", required=False, type=click.Path(path_type=Path))
@_CONFIG_OPTION
@click.option("--follow", is_flag=True, help="Go on with the lines that are written, until Ctrl-C.")
def account(log: Path | None, config: Path | None, follow: bool) -> None:
    """Count what the proxy, or S3, has sent, by its LOG.

    LOG is the log of downloads that the printed configuration of the proxy writes, or a directory of server access
    logs of S3. The default is accounts.proxy_log. Each answer is counted once, however often its line is read. Lines
    that were read before are not read again, and renamed logs are read to their end.
    """
    import anyio

    from downloadview_async.service.report import account as account_log

    try:
        _choose(config, "no database: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        path = str(log) if log is not None else settings.accounts.proxy_log
        if path is None:
            raise click.UsageError("no log: give LOG, or accounts.proxy_log in the settings")
        count = anyio.run(functools.partial(account_log, settings, path, follow=follow))
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_STARTUP_FAILURE if isinstance(exc, Unavailable) else _WRONG_SETTINGS)
    except KeyboardInterrupt:
        return
    click.echo(f"counted: {count}")


@main.command(
    "report",
    examples=[
        "downloadview report --config downloads.toml --since 7d --by user",
        "downloadview report --by user --by file --format csv",
    ],
)
@_CONFIG_OPTION
@click.option("--since", metavar="TIME", help="Only the days of the last time (UTC), such as 7d or 24h.")
@click.option(
    "--by",
    type=click.Choice(["file", "route", "user", "client", "link", "day"]),
    default=["file"],
    multiple=True,
    show_default=True,
    help="The unit that a row counts. With user and file, who has downloaded what; client goes with day alone.",
)
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="How many rows.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="How the rows are printed.",
)
def print_report(config: Path | None, since: str | None, by: tuple[str, ...], top: int, form: str) -> None:
    """Print how often files were downloaded.

    A download is a version of a file that was delivered whole to a client. The bytes are all that were sent, in the
    answers that are counted beside them.
    """
    import anyio

    from downloadview_async.service.report import csv_of, report, table_of

    try:
        _choose(config, "no database: give ")
        settings = load_settings(os.environ.get(CONFIG), environ=os.environ)
        rows = anyio.run(functools.partial(report, settings, by=by, since=_life(since, "--since"), top=top))
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_STARTUP_FAILURE if isinstance(exc, Unavailable) else _WRONG_SETTINGS)
    if form == "json":
        click.echo(json.dumps(rows, indent=1))
    else:
        click.echo((csv_of if form == "csv" else table_of)(rows, by), nl=False)


@main.command(
    "plan",
    examples=[
        "downloadview plan --clients 100k --rate 2MB/s --hit-ratio 0.9",
        "downloadview plan --requests 2000 --file-size 10MB --send nginx --tls --cores 16 --network 25Gbit/s",
    ],
    groups={
        "Load": ("clients", "requests", "rate", "file_size", "hit_ratio"),
        "Service": ("send", "tls", "kept", "links", "limits", "completions"),
        "Each machine": ("cores", "memory", "network", "descriptors", "use", "spare"),
    },
)
@click.option("--clients", metavar="NUMBER", help="Downloads at once, such as 100k; or give --requests.")
@click.option("--requests", metavar="NUMBER", help="Downloads that begin in a second; or give --clients.")
@click.option(
    "--rate", default="2MB/s", show_default=True, metavar="RATE", help="Bytes or bits per second of a client."
)
@click.option("--file-size", default="100MB", show_default=True, metavar="SIZE", help="The size of a file.")
@click.option(
    "--hit-ratio",
    type=_Finite(0, 1),
    metavar="SHARE",
    help="The share of the bytes that the cache has, 0 to 1; chooses --send cache.",
)
@click.option("--send", type=click.Choice(_WAYS), help="How files are sent; by default zero-copy.")
@click.option("--tls", is_flag=True, help="The sender of the bytes encrypts them.")
@click.option("--kept", is_flag=True, help="A proxy keeps its connections to the service.")
@click.option("--links", is_flag=True, help="Signed links for one download, counted in Redis.")
@click.option("--limits", is_flag=True, help="Limits of clients, counted in Redis.")
@click.option("--completions", is_flag=True, help="Completed downloads, counted in a database.")
@click.option("--cores", type=click.IntRange(1, 1024), default=4, show_default=True, help="A worker runs on each.")
@click.option("--memory", default="16GB", show_default=True, metavar="SIZE", help="Memory, apart from the page cache.")
@click.option("--network", default="10Gbit/s", show_default=True, metavar="RATE", help="In each direction.")
@click.option(
    "--descriptors", type=click.IntRange(1), default=65_536, show_default=True, help="Descriptors of a process."
)
@click.option(
    "--use",
    type=_Finite(0, 1, min_open=True),
    default=0.7,
    show_default=True,
    metavar="SHARE",
    help="The share of each resource that may be used.",
)
@click.option("--spare", type=click.IntRange(0), default=1, show_default=True, help="Machines that may fail.")
@click.option("--costs", type=click.Path(path_type=Path), help="Other measured costs, which `make costs` has written.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How it is printed.",
)
def print_plan(
    clients: str | None,
    requests: str | None,
    rate: str,
    file_size: str,
    hit_ratio: float | None,
    memory: str,
    network: str,
    costs: Path | None,
    spare: int,
    form: str,
    **options: Any,
) -> None:
    """Compute how many machines a load needs, and what runs out first.

    It prints machines, memory, Redis operations and store requests, the formula of each, and where its costs were
    measured. The costs are those of the machine of the benchmark: measure yours with `make costs`, and leave room.
    """
    from downloadview_async.service.plan.amounts import count_of, rate_of, size_of
    from downloadview_async.service.plan.costs import MEASURED, load_costs
    from downloadview_async.service.plan.model import Load, Machine, plan
    from downloadview_async.service.plan.page import text_of, values_of

    if (clients is None) == (requests is None):
        raise click.UsageError("give one of --clients, the downloads at once, and --requests, those of a second")
    send = options.pop("send") or ("zero-copy" if hit_ratio is None else "cache")
    if hit_ratio is not None and send != "cache":
        raise click.UsageError(f"--hit-ratio is for --send cache, not for --send {send}")
    machine = {name: options.pop(name) for name in ("cores", "descriptors", "use")}
    try:
        size, pace = size_of("--file-size", file_size), rate_of("--rate", rate)
        if clients is not None:
            at_once = count_of("--clients", clients)
            begin = at_once * pace / size
        else:
            begin = count_of("--requests", requests or "", per_second=True)
            at_once = begin * size / pace
        measured = load_costs(costs or MEASURED)
        made = plan(
            Load(send=send, clients=at_once, requests=begin, size=size, hit_ratio=hit_ratio or 0.0, **options),
            Machine(memory=size_of("--memory", memory), network=rate_of("--network", network), **machine),
            measured,
            spare=spare,
        )
    except ConfigurationError as exc:
        _say(exc)
        sys.exit(_WRONG_SETTINGS)
    if form == "json":
        click.echo(json.dumps(values_of(made, measured), indent=1))
    else:
        click.echo(text_of(made, measured), nl=False)


@main.command(
    "completion", examples=["downloadview completion bash > ~/.local/share/bash-completion/completions/downloadview"]
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="SHELL")
def print_completion(shell: str) -> None:
    """Print the script that completes commands, options and their values in a shell.

    SHELL is bash, zsh or fish. Save the script where the shell looks for completions. For the current shell alone: eval
    "$(downloadview completion bash)".
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(main, {}, _PROGRAM, f"_{_PROGRAM.upper()}_COMPLETE").source()
    click.echo(script.replace('string split ","', 'string split -m 1 ","'))  # in fish: a description may have commas


def _say(exc: Exception) -> None:
    """Print the error on one line, whatever characters the settings contain."""
    click.echo(f"downloadview: {one_line(str(exc))}", err=True)


def _choose(config: Path | None, lacking: str) -> None:
    """Write the chosen settings into the environment, where worker processes also read them.

    lacking: how the error begins if no settings are given.

    Raises `ConfigurationError`.
    """
    if config is not None:
        os.environ[CONFIG] = str(config)
    elif not os.environ.get(CONFIG):
        if not DEFAULT.exists():
            raise ConfigurationError(
                f"{lacking}settings with --config, {CONFIG} or a file {DEFAULT} in the current directory"
            )
        os.environ[CONFIG] = str(DEFAULT)
    elif not os.path.exists(os.environ[CONFIG]):
        raise ConfigurationError(
            f"{CONFIG}: {os.environ[CONFIG]!r} does not exist: correct the variable, or unset it, or give --config"
        )


def run(
    settings: Settings,
    *,
    options: Mapping[str, Any] | None = None,
    watches: bool = False,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM; then running downloads have `timeout_graceful_shutdown` seconds to finish.

    options: `[server]` settings of the command line, for reading the settings again. announce: called after all checks,
    just before the server starts.

    Raises `ConfigurationError`.
    """
    # imported here, because --help and errors do not need them
    import anyio

    from downloadview_async.service.app import check_databases
    from downloadview_async.service.serve import serve as serve_until_stopped
    from downloadview_async.service.server_checks import check_server
    from downloadview_async.service.systemd import inherited_sockets

    # with several workers too: report errors once, before any worker starts
    inherited = inherited_sockets()
    check_server(
        replace(settings, server=msgspec.structs.replace(settings.server, uds=None, fd=inherited[0].fileno()))
        if inherited
        else settings
    )
    anyio.run(check_databases, settings)
    options = options or {}

    def load() -> Settings:
        return load_settings(os.environ.get(CONFIG), environ=os.environ, options=options)

    status = serve_until_stopped(settings, load, inherited=inherited, watches=watches, announce=announce)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
