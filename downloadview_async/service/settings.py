"""All settings, as types. The description of a field says which values it takes.

Error messages repeat it, as do the help of `downloadview serve` and the reference in the documentation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from downloadview_async import ConfigurationError, ProxyOption, Rule, proxy_kinds
from downloadview_async.service.origin import Origin
from downloadview_async.service.source_settings import SourceSettings
from downloadview_async.service.values import FUNCTION, YEAR, Count, Seconds, Text


def _choice(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


class Unavailable(ConfigurationError):
    """Something is not available now but may be later, so that starting again can help."""


class DatabaseUnavailable(Unavailable):
    """A database does not answer."""


class ServerSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[server]`: options of uvicorn, and some others. `downloadview serve` has an option for each."""

    host: Annotated[Text, Meta(description="the address to listen on, such as 127.0.0.1 or 0.0.0.0")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="a TCP port, 0 to 65535; 0 chooses a free one")] = 8000
    uds: Annotated[Text | None, Meta(description="the path of a Unix socket, instead of a port")] = None
    fd: (
        Annotated[int, Meta(ge=0, le=2**31 - 1, description="the number of an open socket, instead of a port")] | None
    ) = None
    reuse_port: Annotated[
        bool,
        Meta(
            description="true to share the port with another process that has this, too (SO_REUSEPORT), or take the "
            "place of another process at uds"
        ),
    ] = False
    pid_file: (
        Annotated[str, Meta(min_length=1, description="a file for the number of the process, for downloadview reload")]
        | None
    ) = None
    workers: Annotated[int, Meta(ge=1, le=1024, description="the number of worker processes, 1 to 1024")] = 1
    root_path: Annotated[
        str,
        Meta(
            pattern=r"^(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]+)*\Z",
            description="the path below which a proxy serves this, such as /downloads, without characters that need "
            "percent-encoding, or empty",
        ),
    ] = ""
    proxy_headers: Annotated[bool, Meta(description="true to trust X-Forwarded-* from forwarded_allow_ips")] = True
    forwarded_allow_ips: Annotated[
        str | None, Meta(description="trusted addresses, separated by commas, or *; by default, this machine")
    ] = None
    log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug", "trace"],
        Meta(description="the least severe messages to log: critical, error, warning, info, debug or trace"),
    ] = "info"
    access_log: Annotated[bool, Meta(description="true to log every request")] = True
    use_colors: Annotated[
        bool | None, Meta(description="true to use colours in the log; by default, on a terminal only")
    ] = None
    loop: Annotated[
        Literal["auto", "asyncio", "uvloop"], Meta(description="the event loop: auto, asyncio or uvloop")
    ] = "auto"
    http: Annotated[
        Literal["auto", "h11", "httptools"],
        Meta(
            description="the HTTP protocol: auto (with sendfile, and stalled clients are disconnected), or uvicorn's "
            "h11 or httptools"
        ),
    ] = "auto"
    http2: Annotated[
        bool,
        Meta(description="true to serve HTTP/2 too, which is experimental; needs the package zttp, and http = auto"),
    ] = False
    stall_timeout: Annotated[
        Seconds,
        Meta(description="seconds that a client may receive less than minimum_rate, at most a year; needs http = auto"),
    ] = 60.0
    minimum_rate: Annotated[
        int, Meta(ge=1, le=10**9, description="bytes per second that a client must receive, 1 to 1000000000")
    ] = 64
    backlog: Annotated[
        int, Meta(ge=1, le=2**31 - 1, description="connections that may wait to be accepted, 1 or more")
    ] = 2048
    limit_concurrency: Annotated[
        Count | None, Meta(description="concurrent requests, above which new ones get 503")
    ] = None
    limit_max_requests: Annotated[Count | None, Meta(description="requests after which a worker is replaced")] = None
    timeout_keep_alive: Annotated[
        int, Meta(ge=0, le=YEAR, description="seconds that an idle connection stays open, at most a year")
    ] = 5
    drain_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=YEAR,
            description="seconds in which a service that is told to end still accepts connections, while /-/readyz "
            "gives 503",
        ),
    ] = 0.0
    timeout_graceful_shutdown: Annotated[
        int, Meta(ge=0, le=YEAR, description="seconds that running downloads have to finish, at most a year")
    ] = 30
    server_header: Annotated[bool, Meta(description="true to send a Server header")] = True
    date_header: Annotated[bool, Meta(description="true to send a Date header")] = True
    ssl_keyfile: Annotated[str | None, Meta(description="the path of a private key, for HTTPS")] = None
    ssl_certfile: Annotated[str | None, Meta(description="the path of a certificate, for HTTPS")] = None
    ssl_keyfile_password: Annotated[str | None, Meta(description="the password of the private key")] = None

    @property
    def address(self) -> str:
        """HOST:PORT at which a process on this machine reaches the service, if it listens on TCP."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class LinksSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[links]`: the keys of links, for routes with `access = ["signed"]` or `["secure_link"]`."""

    keys: Annotated[
        Text,
        Meta(
            description="a file with a line `id secret` for each key, as `downloadview keys` prints it; or such a line",
        ),
    ]
    max_age: Annotated[
        float | str, Meta(description="the longest life of a link, and its default: seconds, or such as 10m, 2h, 7d")
    ] = "7d"
    store: (
        Annotated[
            str,
            Meta(
                pattern=r"^(memory:|sqlite:(?!//).*[^/].*|(redis|rediss|unix)://.+)\Z",
                description="where uses and revocations are kept: sqlite:links.db, redis://127.0.0.1:6379/0, or "
                "memory: for one worker",
            ),
        ]
        | None
    ) = None
    when_store_fails: Annotated[
        Literal["refuse", "allow"], Meta(description="refuse (503) or allow, while the store does not answer")
    ] = "refuse"
    session_age: Annotated[
        float | str,
        Meta(description="how long one download of a link may take with its pauses: seconds, or such as 2h, 1d"),
    ] = "1d"


_FACTS = r"^(?!(redis|rediss|unix|postgresql\+asyncpg):(?!//.)).+\Z"  # a path, or the URL of a server


class SharedSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[shared]`: what all stores that several services share have in common."""

    prefix: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9_.-]{1,64}\Z",
            description="the beginning of all keys in Redis and PostgreSQL: letters, digits, dots, _ and -, at most 64",
        ),
    ] = "downloadview"


class DigestsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[digests]`: where the digests of files are kept."""

    store: Annotated[
        str,
        Meta(
            pattern=_FACTS,
            description="an SQLite file, absolute or relative to the settings file; or for several machines "
            "redis://127.0.0.1:6379/0 or postgresql+asyncpg://host/name",
        ),
    ]


class UsersSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[users]`: the users of routes with `access = ["user:NAME"]`. It has either `file` or `header`."""

    file: Annotated[
        Text | None, Meta(description="a file of `htpasswd -B`, absolute or relative to the settings file")
    ] = None
    realm: Annotated[
        str,
        Meta(
            pattern=r"^[ !#-\[\]-~]+\Z",
            max_length=256,
            description="the text with which browsers ask for the password, in ASCII without quotes and backslashes",
        ),
    ] = "downloads"
    header: (
        Annotated[
            str,
            Meta(
                pattern=r"^[A-Za-z0-9]+(-[A-Za-z0-9]+)*\Z",
                description="the header with the name that a proxy in forwarded_allow_ips has checked, such as "
                "X-Remote-User",
            ),
        ]
        | None
    ) = None


class AccountsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[accounts]`: what is told about each answer."""

    listeners: Annotated[
        list[Annotated[str, Meta(pattern=rf"^hook:{FUNCTION}\Z")]],
        Meta(description='a list of "hook:module:function", each of which gets the outcome of each answer'),
    ] = []
    traces: Annotated[bool, Meta(description="true to make a span of OpenTelemetry for each request")] = False
    database: Annotated[
        Text | None,
        Meta(
            description="where downloads are counted: an SQLAlchemy URL, such as sqlite+aiosqlite:///accounts.db "
            "or postgresql+asyncpg://host/name"
        ),
    ] = None
    min_share: Annotated[
        float, Meta(gt=0, le=1, description="the share of a file that makes a download, above 0 and at most 1")
    ] = 1.0
    keep: Annotated[float | str, Meta(description="how long the counts of a day are kept: seconds, or such as 90d")] = (
        "400d"
    )
    max_rows: Annotated[Count, Meta(description="rows of each table in the database, 1 or more")] = 1_000_000
    proxy_log: Annotated[
        Text | None,
        Meta(
            description="the log in which the proxy writes what it has sent, or a directory of server access logs of "
            "S3, absolute or relative to the settings file"
        ),
    ] = None


class LogSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[log]`: a line for each answer. `server.access_log` and `--no-access-log` turn it off."""

    format: Annotated[
        Literal["text", "json", "combined"],
        Meta(description="text for people, json for programs, or combined as Apache and nginx write it"),
    ] = "text"
    path: Annotated[
        Text | None,
        Meta(description="a file, absolute or relative to the settings file; by default, the standard error"),
    ] = None


class MetricsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[metrics]`: the page /-/metrics for Prometheus."""

    public: Annotated[bool, Meta(description="true to let clients request it through the printed configurations")] = (
        False
    )
    directory: Annotated[
        Text | None,
        Meta(
            description="a directory in which several processes add up their numbers, absolute or relative to the "
            "settings file; by default, `downloadview serve` makes one for its workers"
        ),
    ] = None


class PurgeSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[purge]`: the page /-/purge, which removes files from caches."""

    keys: Annotated[
        Text,
        Meta(
            description="a file with a line `id secret` for each key, as `downloadview keys` prints it; or such a "
            "line. Requests have to carry one of the secrets",
        ),
    ]
    public: Annotated[bool, Meta(description="true to let clients request it through the printed configurations")] = (
        False
    )


class ArchivesSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[archives]`: limits of the archives of folders, for routes with `archive = true`."""

    max_files: Annotated[Count, Meta(description="files and folders in an archive, 1 or more")] = 100_000
    max_bytes: Annotated[
        int | str | None,
        Meta(description="the maximum size of an archive: a number of bytes, or a size such as 500MB or 10GiB"),
    ] = None
    max_depth: Annotated[Count, Meta(description="folders within folders, 1 or more")] = 32
    per_client: Annotated[
        int,
        Meta(ge=0, description="archives that a client may get at the same time from a worker; 0: any number"),
    ] = 1
    checksums: (
        Annotated[
            str,
            Meta(
                pattern=_FACTS,
                description="an SQLite file that keeps the CRC-32s of files over restarts and for all workers, such as "
                "checksums.db; or for several machines redis://127.0.0.1:6379/0 or postgresql+asyncpg://host/name; by "
                "default, each worker keeps them in memory",
            ),
        ]
        | None
    ) = None


_Client = Annotated[
    str,
    Meta(
        pattern=rf"^(address|user|link|header:[A-Za-z0-9]+(-[A-Za-z0-9]+)*|hook:{FUNCTION})\Z",
        description='what counts as one client: "address", "user", "link", "header:NAME" from forwarded_allow_ips, or '
        '"hook:module:function"',
    ),
]


class RouteLimitsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`limits` of a route: they hold beside those in `[limits]`."""

    client: _Client = "address"
    concurrent: Annotated[Count | None, Meta(description="transfers of a client at once, 1 or more")] = None
    rate: Annotated[
        str | None, Meta(description="bytes per second of a client, all its transfers together, such as 20MB/s")
    ] = None
    requests: Annotated[str | None, Meta(description="requests of a client, such as 600/minute")] = None
    quota: Annotated[
        list[str], Meta(description='a list of amounts for a client, such as "50GB/day" and "1000 downloads/day"')
    ] = []
    total_rate: Annotated[
        str | None, Meta(description="bytes per second of all clients together in one worker, such as 1GB/s")
    ] = None
    mode: Annotated[
        Literal["refuse", "queue"], Meta(description="refuse (429) or queue: what is beyond `concurrent`")
    ] = "refuse"
    queue_timeout: Annotated[Seconds, Meta(description="seconds that a request may wait in the queue")] = 10.0


class LimitsSettings(RouteLimitsSettings, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[limits]`: what each client may have of all routes together, and where that is counted."""

    store: Annotated[
        str,
        Meta(
            pattern=r"^(memory|(redis|rediss|unix)://.+)\Z",
            description="where clients are counted: memory, for each worker separately, or redis://127.0.0.1:6379/0",
        ),
    ] = "memory"
    when_store_fails: Annotated[
        Literal["refuse", "allow"], Meta(description="refuse (503) or allow, while the store does not answer")
    ] = "allow"


CORS_HEADERS = (
    "Access-Control-Allow-Origin",
    "Access-Control-Allow-Credentials",
    "Access-Control-Expose-Headers",
    "Vary",
)
"""The headers that an answer of a route with `cors` may have."""


class CorsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`cors` of a route: the other web sites whose scripts may read the files and the statuses of errors."""

    origins: Annotated[
        list[str],
        Meta(min_length=1, description='a list of origins, such as "https://app.example.org", or only "*" for all'),
    ]
    credentials: Annotated[
        bool, Meta(description="true to let them send cookies and passwords; not with all origins")
    ] = False
    max_age: Annotated[
        float | str,
        Meta(description="how long a browser keeps the answer to a preflight: seconds, or such as 90s, 10m, 1h"),
    ] = "10m"


_Access = Annotated[str, Meta(pattern=rf"^(signed|secure_link|user:[^:]+|hook:{FUNCTION})\Z")]
_Hidden = Annotated[str, Meta(pattern=r"^[^/]+\Z")]


class RouteSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[[routes]]`: which source serves which URLs."""

    path: Annotated[str, Meta(description="a path with one parameter, such as /files/{path:path}")]
    source: Annotated[str, Meta(description="the name of one of the sources")]
    disposition: Annotated[Literal["attachment", "inline"], Meta(description="attachment or inline")] = "attachment"
    cache_control: (
        Annotated[
            str,
            Meta(
                pattern=r"^[ -~]+\Z",
                max_length=1024,
                description="a Cache-Control header, such as private; omit it to send none",
            ),
        ]
        | None
    ) = None
    access: (
        Annotated[
            list[_Access],
            Meta(
                min_length=1,
                description='a list of "signed" (links), "secure_link" (links for nginx), "user:NAME" ("user:*": all '
                'users) and "hook:module:function", of which one suffices; omit it to let everyone have the files',
            ),
        ]
        | None
    ) = None
    hide: Annotated[
        list[_Hidden],
        Meta(description='a list of patterns for names of files and directories that are hidden, such as ".*"'),
    ] = []
    headers: Annotated[
        dict[str, str],
        Meta(description='a table of further response headers, such as { X-Robots-Tag = "noindex" }'),
    ] = {}
    cors: Annotated[
        CorsSettings | None,
        Meta(description='a table, such as { origins = ["https://app.example.org"] }; omit it to allow none'),
    ] = None
    limits: Annotated[
        RouteLimitsSettings | None,
        Meta(description='a table of limits for this route, such as { rate = "5MB/s" }, beside those in [limits]'),
    ] = None
    archive: Annotated[bool, Meta(description="true to send folders as ZIP archives, for ?archive=zip")] = False
    send: Annotated[Literal["redirect", "proxy", "stream"] | None, Meta(description="redirect, proxy or stream")] = None
    name: Annotated[Text | None, Meta(description="the name of the route on the page at /")] = None
    example: Annotated[
        str | list[str], Meta(description="a file, or a list of files, that the page at / links to")
    ] = []

    list: Annotated[bool, Meta(description="true to list the folders, for a path that ends in {path:path}")] = False
    downloads: Annotated[
        bool, Meta(description="true to show in listings how often files were downloaded; needs accounts.database")
    ] = False

    @property
    def examples(self) -> Sequence[str]:
        """The examples as a list."""
        return [self.example] if isinstance(self.example, str) else self.example


class RuleSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[[offload.rules]]`: which files a proxy can reach, and where."""

    source: Annotated[
        Text,
        Meta(
            description="the name of a source, a directory, absolute or relative to the settings file, or a URL such "
            "as https://host/path/ or s3://bucket/prefix",
        ),
    ]
    target: Annotated[Text | None, Meta(description="where the proxy finds the source, such as /_files/")] = None


PROXY_OPTIONS: dict[str, ProxyOption] = {
    name: option for kind in proxy_kinds().values() for name, option in kind.options.items()
}
"""The keys of `[offload]` that some backend accepts."""

if TYPE_CHECKING:
    _Backend = str
else:
    _Backend = Literal[tuple(proxy_kinds())]


class _OffloadSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    backend: Annotated[_Backend | None, Meta(description=_choice(proxy_kinds()))] = None
    rules: Annotated[list[RuleSettings], Meta(description="[[offload.rules]] tables")] = []


_WithOptions: Any = msgspec.defstruct(
    "_WithOptions",
    [
        (name, Annotated[option.type, Meta(ge=option.at_least, description=option.takes)] | None, None)
        for name, option in PROXY_OPTIONS.items()
    ],
    bases=(_OffloadSettings,),
    kw_only=True,
)


class OffloadSettings(_WithOptions):  # type: ignore[misc]  # the options depend on the installed proxies
    """`[offload]`: the proxy that sends the files, if any, and the options of its backend."""


class PagesSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[pages]`: how the pages for people look."""

    title: Annotated[str, Meta(min_length=1, max_length=200, description="the title of the page at /")] = "Downloads"
    logo: Annotated[
        Text | None,
        Meta(
            description="an image of at most 64 KiB, absolute or relative to the settings file; it is sent inside "
            "each page"
        ),
    ] = None
    templates: Annotated[
        Text | None,
        Meta(
            description="a directory with any of page.css, page.js, index.html, listing.html, view.html and "
            "error.html, which replace those of the service"
        ),
    ] = None
    footer: Annotated[str, Meta(max_length=2000, description="a text at the end of each page")] = ""


Routes = Annotated[list[RouteSettings], Meta(description="tables, each written as [[routes]]")]
ContentTypes = Annotated[
    dict[str, str], Meta(description='a table of suffixes and media types, such as ".gcode" = "text/x-gcode"')
]

TABLES: dict[str, Any] = {
    "server": ServerSettings,
    "sources": dict[str, Any],
    "routes": Routes,
    "offload": OffloadSettings,
    "content_types": ContentTypes,
    "links": LinksSettings,
    "digests": DigestsSettings,
    "shared": SharedSettings,
    "users": UsersSettings,
    "limits": LimitsSettings,
    "accounts": AccountsSettings,
    "log": LogSettings,
    "metrics": MetricsSettings,
    "purge": PurgeSettings,
    "archives": ArchivesSettings,
    "pages": PagesSettings,
}
"""The type of each table in the settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked as far as possible without opening files or connections. Directories are absolute.

    origin: where the settings come from. Its directory is on the import path. content_types: media types by suffix,
    which override the library's.
    """

    origin: Origin
    server: ServerSettings
    sources: Mapping[str, SourceSettings]
    routes: Sequence[RouteSettings]
    offload: OffloadSettings
    links: LinksSettings | None = None
    users: UsersSettings | None = None
    limits: LimitsSettings | None = None
    archives: ArchivesSettings = field(default_factory=ArchivesSettings)
    digests: DigestsSettings | None = None
    shared: SharedSettings = field(default_factory=SharedSettings)
    accounts: AccountsSettings = field(default_factory=AccountsSettings)
    log: LogSettings | None = None
    metrics: MetricsSettings | None = None
    purge: PurgeSettings | None = None
    content_types: Mapping[str, str] = field(default_factory=dict)
    pages: PagesSettings = field(default_factory=PagesSettings)

    @property
    def listens(self) -> bool:
        """Whether something listens to the outcomes of answers."""
        accounts = self.accounts
        is_accounted = bool(accounts.listeners or accounts.database) or accounts.traces
        return is_accounted or self.log is not None or self.metrics is not None

    def of_own_server(self) -> "Settings":
        """Return the settings with the log of answers that `[server]` wants, for `downloadview serve`.

        Another server usually writes a log already. Under it, the service writes one only if there is a `[log]`.
        """
        log = self.log
        if log is None and self.server.log_level in ("info", "debug", "trace"):
            log = LogSettings()
        return replace(self, log=log if self.server.access_log else None)

    def error(self, key: str, problem: str, *, because: str = "") -> ConfigurationError:
        """Return the error for a key such as `sources.files.root`, as `Origin.error` does."""
        return self.origin.error(key, problem, because=because)

    @contextmanager
    def blaming(self, key: str) -> Iterator[None]:
        """Add the key to a `ConfigurationError` raised inside, and turn errors of other libraries into one."""
        try:
            yield
        except ConfigurationError as exc:
            raise type(exc)(str(self.error(key, str(exc)))) from exc
        except (OSError, OverflowError, TypeError, ValueError) as exc:
            raise self.error(key, f"{type(exc).__name__}: {exc}: correct it") from exc


def rules_of(settings: "Settings") -> list[Rule]:
    """Return the rules for the proxy. Without a target, the proxy finds a directory at the same path."""
    return [Rule(rule.source, rule.target or rule.source) for rule in settings.offload.rules]


def options_of(offload: OffloadSettings) -> dict[str, Any]:
    """Return those options of the backend that are set."""
    return {name: value for name in PROXY_OPTIONS if (value := getattr(offload, name)) is not None}
