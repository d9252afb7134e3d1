"""All settings, as types. The description of a field says which values it takes.

Error messages repeat it, as do the help of `downloadview serve` and the reference in the documentation.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, Struct

from downloadview_async import ConfigurationError, ProxyOption, Rule, proxy_kinds

_YEAR = 365 * 86_400
_LONGEST_AGE = 100 * _YEAR
_MOST_BYTES = 2**63 - 1

_Seconds = Annotated[float, Meta(gt=0, le=_YEAR)]
_Count = Annotated[int, Meta(ge=1)]
_FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"


def _choice(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


class Unavailable(ConfigurationError):
    """Something is not available now but may be later, so that starting again can help."""


class DatabaseUnavailable(Unavailable):
    """A database does not answer."""


class ServerSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[server]`: options of uvicorn, with the same names and meanings. `downloadview serve` has an option for each."""

    host: Annotated[str, Meta(min_length=1, description="the address to listen on, such as 127.0.0.1 or 0.0.0.0")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(ge=0, le=65535, description="a TCP port, 0 to 65535; 0 chooses a free one")] = 8000
    uds: Annotated[str, Meta(min_length=1, description="the path of a Unix socket, instead of a port")] | None = None
    fd: (
        Annotated[int, Meta(ge=0, le=2**31 - 1, description="the number of an open socket, instead of a port")] | None
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
    forwarded_allow_ips: (
        Annotated[str, Meta(description="trusted addresses, separated by commas, or *; by default, this machine")]
        | None
    ) = None
    log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug", "trace"],
        Meta(description="the least severe messages to log: critical, error, warning, info, debug or trace"),
    ] = "info"
    access_log: Annotated[bool, Meta(description="true to log every request")] = True
    use_colors: (
        Annotated[bool, Meta(description="true to use colours in the log; by default, on a terminal only")] | None
    ) = None
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
    stall_timeout: Annotated[
        _Seconds,
        Meta(description="seconds that a client may receive less than minimum_rate, at most a year; needs http = auto"),
    ] = 60.0
    minimum_rate: Annotated[
        int, Meta(ge=1, le=10**9, description="bytes per second that a client must receive, 1 to 1000000000")
    ] = 64
    backlog: Annotated[
        int, Meta(ge=1, le=2**31 - 1, description="connections that may wait to be accepted, 1 or more")
    ] = 2048
    limit_concurrency: (
        Annotated[_Count, Meta(description="concurrent requests, above which new ones get 503")] | None
    ) = None
    limit_max_requests: Annotated[_Count, Meta(description="requests after which a worker is replaced")] | None = None
    timeout_keep_alive: Annotated[
        int, Meta(ge=0, le=_YEAR, description="seconds that an idle connection stays open, at most a year")
    ] = 5
    timeout_graceful_shutdown: Annotated[
        int, Meta(ge=0, le=_YEAR, description="seconds that running downloads have to finish, at most a year")
    ] = 30
    server_header: Annotated[bool, Meta(description="true to send a Server header")] = True
    date_header: Annotated[bool, Meta(description="true to send a Date header")] = True
    ssl_keyfile: Annotated[str, Meta(description="the path of a private key, for HTTPS")] | None = None
    ssl_certfile: Annotated[str, Meta(description="the path of a certificate, for HTTPS")] | None = None
    ssl_keyfile_password: Annotated[str, Meta(description="the password of the private key")] | None = None

    @property
    def address(self) -> str:
        """HOST:PORT at which a process on this machine reaches the service, if it listens on TCP."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


_MaxRequests = Annotated[_Count, Meta(description="requests that may use the source at once in a worker")] | None
_QueueTimeout = Annotated[_Seconds, Meta(description="seconds that further requests wait before they get 503")]
DigestMode = Annotated[Literal["off", "known", "background"], Meta(description="off, known or background")]


class PathSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="path"):
    """`type = "path"`: a directory."""

    root: Annotated[str, Meta(min_length=1, description="a directory, absolute or relative to the settings file")]
    symlinks: Annotated[Literal["deny", "inside", "follow"], Meta(description="deny, inside or follow")] = "inside"
    names: Annotated[Literal["portable", "any"], Meta(description="portable or any")] = "portable"
    threads: Annotated[_Count, Meta(description="calls that may wait for the disk at once, 1 or more")] = 40
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    precompressed: Annotated[
        list[Literal["br", "zstd", "gzip"]], Meta(description='a list of "br", "zstd" and "gzip"')
    ] = []
    digests: DigestMode = "off"
    sidecars: Annotated[bool, Meta(description="true to read digests from files NAME.sha256")] = False


class PresignSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[sources.NAME.presign]`: presigned URLs, by which clients fetch files from an S3 store directly."""

    expires: Annotated[
        str,
        Meta(
            pattern=r"^[1-9][0-9]{0,6}[smhd]\Z",
            description="how long a URL is valid, at most 7 days, such as 30s, 10m, 1h or 7d",
        ),
    ] = "10m"
    public_endpoint: (
        Annotated[str, Meta(description="the URL of the store for clients, if it is not the same as `endpoint`")] | None
    ) = None


class CacheSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[sources.NAME.cache]`: a directory that caches the files of a source."""

    path: Annotated[str, Meta(min_length=1, description="a directory, absolute or relative to the settings file")]
    max_bytes: Annotated[
        int | str,
        Meta(description="the maximum size of all cached files: a number of bytes, or a size such as 500MB or 10GiB"),
    ] = "10GiB"
    max_age: Annotated[
        float | str,
        Meta(description="how long a cached file is sent without revalidation: seconds, or such as 90s, 10m, 2h, 1d"),
    ] = "1d"


_CACHE = "a [sources.NAME.cache] table"


class StorageSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="storage"):
    """`type = "storage"`: a storage, named by its URL."""

    url: Annotated[
        str,
        Meta(
            min_length=1,
            description="file:///absolute/directory, file:directory relative to the settings file, memory://, "
            "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
        ),
    ]
    options: Annotated[
        dict[str, str | bool | int],
        Meta(description="a table of options for an object store, with the names that obstore uses"),
    ] = {}
    presign: (
        Annotated[PresignSettings, Meta(description='a table, for routes with send = "redirect"; s3:// only')] | None
    ) = None
    max_connections: (
        Annotated[_Count, Meta(description="concurrent requests to an object store, by default 100")] | None
    ) = None
    names: Annotated[Literal["portable", "any", "exact"], Meta(description="portable, any or exact")] | None = None
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    digests: DigestMode = "off"
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class ObjectSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="object"):
    """`type = "object"`: rows of a database table, each with a file from another source."""

    database: Annotated[str, Meta(min_length=1, description="an SQLAlchemy URL with an asynchronous driver")]
    table: Annotated[str, Meta(min_length=1, description="a table or view, or schema.table")]
    key: Annotated[str, Meta(min_length=1, description="the column that is compared with the key in the URL")]
    file: Annotated[str, Meta(min_length=1, description="the column with the file's name in `source`")]
    source: Annotated[str, Meta(min_length=1, description="the name of the source that holds the files")]
    filename: Annotated[str, Meta(description="the column with the file name for clients")] | None = None
    content_type: Annotated[str, Meta(description="the column with the media type")] | None = None
    list: Annotated[bool, Meta(description="true to list the rows, with the slashes in their keys between folders")] = (
        False
    )
    parent: Annotated[str, Meta(description="the column with the folder before the key in the URL")] | None = None
    size: Annotated[str, Meta(description="the column with the size in bytes, for listings")] | None = None
    modified: Annotated[str, Meta(description="the column with the time of the last change, for listings")] | None = (
        None
    )
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0


class RemoteSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="remote"):
    """`type = "remote"`: the files below a URL."""

    url: Annotated[str, Meta(min_length=1, description="an http or https URL to which file names are appended")]
    allow_hosts: Annotated[
        list[
            Annotated[
                str, Meta(pattern=r"^(([\w.-]|[^\x00-\x7f\s])+|\[?[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f.:]*\]?)\Z")
            ]
        ],
        Meta(description="a list of hosts that may be reached at private addresses or through a redirect"),
    ] = []
    max_connections: Annotated[_Count, Meta(description="concurrent upstream requests, 1 or more")] = 100
    connect_timeout: Annotated[_Seconds, Meta(description="seconds, more than 0 and at most a year")] = 10.0
    read_timeout: Annotated[_Seconds, Meta(description="seconds, more than 0 and at most a year")] = 30.0
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    names: Annotated[Literal["portable", "any", "exact"], Meta(description="portable, any or exact")] = "portable"
    list: Annotated[bool, Meta(description="true if the other server is such a service, and lists its folders")] = False
    digests: DigestMode = "off"
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class VirtualSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="virtual"):
    """`type = "virtual"`: files that a function generates."""

    factory: Annotated[
        str,
        Meta(
            pattern=rf"^{_FUNCTION}\Z",
            description='"module:function"; the directory of the settings file is on the import path',
        ),
    ]
    max_requests: _MaxRequests = None
    queue_timeout: _QueueTimeout = 2.0
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class ChosenSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="chosen"):
    """`type = "chosen"`: some files and directories, each under its name."""

    paths: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(min_length=1, description="a list of files and directories, absolute or relative to the settings file"),
    ]


SourceSettings = PathSettings | StorageSettings | ObjectSettings | RemoteSettings | VirtualSettings | ChosenSettings


class LinksSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[links]`: the keys of links, for routes with `access = ["signed"]` or `["secure_link"]`."""

    keys: Annotated[
        str,
        Meta(
            min_length=1,
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


class DigestsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[digests]`: where the digests of files are kept."""

    store: Annotated[str, Meta(min_length=1, description="an SQLite file, absolute or relative to the settings file")]


class UsersSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[users]`: the users of routes with `access = ["user:NAME"]`. It has either `file` or `header`."""

    file: (
        Annotated[
            str,
            Meta(min_length=1, description="a file of `htpasswd -B`, absolute or relative to the settings file"),
        ]
        | None
    ) = None
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
        list[Annotated[str, Meta(pattern=rf"^hook:{_FUNCTION}\Z")]],
        Meta(description='a list of "hook:module:function", each of which gets the outcome of each answer'),
    ] = []
    traces: Annotated[bool, Meta(description="true to make a span of OpenTelemetry for each request")] = False
    database: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="where downloads are counted: an SQLAlchemy URL, such as sqlite+aiosqlite:///accounts.db "
                "or postgresql+asyncpg://host/name",
            ),
        ]
        | None
    ) = None
    min_share: Annotated[
        float, Meta(gt=0, le=1, description="the share of a file that makes a download, above 0 and at most 1")
    ] = 1.0
    keep: Annotated[float | str, Meta(description="how long the counts of a day are kept: seconds, or such as 90d")] = (
        "400d"
    )
    max_rows: Annotated[_Count, Meta(description="rows of each table in the database, 1 or more")] = 1_000_000
    proxy_log: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="the log in which the proxy writes what it has sent, absolute or relative to the settings "
                "file",
            ),
        ]
        | None
    ) = None


class LogSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[log]`: a line for each answer. `server.access_log` and `--no-access-log` turn it off."""

    format: Annotated[
        Literal["text", "json", "combined"],
        Meta(description="text for people, json for programs, or combined as Apache and nginx write it"),
    ] = "text"
    path: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="a file, absolute or relative to the settings file; by default, the standard error",
            ),
        ]
        | None
    ) = None


class MetricsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[metrics]`: the page /-/metrics for Prometheus."""

    public: Annotated[bool, Meta(description="true to let clients request it through the printed configurations")] = (
        False
    )
    directory: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="a directory in which several processes add up their numbers, absolute or relative to the "
                "settings file; by default, `downloadview serve` makes one for its workers",
            ),
        ]
        | None
    ) = None


class ArchivesSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[archives]`: limits of the archives of folders, for routes with `archive = true`."""

    max_files: Annotated[_Count, Meta(description="files and folders in an archive, 1 or more")] = 100_000
    max_bytes: (
        Annotated[
            int | str,
            Meta(description="the maximum size of an archive: a number of bytes, or a size such as 500MB or 10GiB"),
        ]
        | None
    ) = None
    max_depth: Annotated[_Count, Meta(description="folders within folders, 1 or more")] = 32
    per_client: Annotated[
        int,
        Meta(ge=0, description="archives that a client may get at the same time from a worker; 0: any number"),
    ] = 1
    checksums: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="an SQLite file that keeps the CRC-32s of files over restarts and for all workers, such as "
                "checksums.db; by default, each worker keeps them in memory",
            ),
        ]
        | None
    ) = None


_Client = Annotated[
    str,
    Meta(
        pattern=rf"^(address|user|link|header:[A-Za-z0-9]+(-[A-Za-z0-9]+)*|hook:{_FUNCTION})\Z",
        description='what counts as one client: "address", "user", "link", "header:NAME" from forwarded_allow_ips, or '
        '"hook:module:function"',
    ),
]


class RouteLimitsSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`limits` of a route: they hold beside those in `[limits]`."""

    client: _Client = "address"
    concurrent: Annotated[_Count, Meta(description="transfers of a client at once, 1 or more")] | None = None
    rate: (
        Annotated[str, Meta(description="bytes per second of a client, all its transfers together, such as 20MB/s")]
        | None
    ) = None
    requests: Annotated[str, Meta(description="requests of a client, such as 600/minute")] | None = None
    quota: Annotated[
        list[str], Meta(description='a list of amounts for a client, such as "50GB/day" and "1000 downloads/day"')
    ] = []
    total_rate: (
        Annotated[str, Meta(description="bytes per second of all clients together in one worker, such as 1GB/s")] | None
    ) = None
    mode: Annotated[
        Literal["refuse", "queue"], Meta(description="refuse (429) or queue: what is beyond `concurrent`")
    ] = "refuse"
    queue_timeout: Annotated[_Seconds, Meta(description="seconds that a request may wait in the queue")] = 10.0


class LimitsSettings(RouteLimitsSettings, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[limits]`: what each client may have of all routes together, and where that is counted."""

    store: Annotated[
        str,
        Meta(
            pattern=r"^(memory|(redis|rediss|unix)://.+)\Z",
            description="where clients are counted: memory, for each worker by itself, or redis://127.0.0.1:6379/0",
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


_Access = Annotated[str, Meta(pattern=rf"^(signed|secure_link|user:[^:]+|hook:{_FUNCTION})\Z")]
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
    cors: (
        Annotated[
            CorsSettings,
            Meta(description='a table, such as { origins = ["https://app.example.org"] }; omit it to allow none'),
        ]
        | None
    ) = None
    limits: (
        Annotated[
            RouteLimitsSettings,
            Meta(description='a table of limits for this route, such as { rate = "5MB/s" }, beside those in [limits]'),
        ]
        | None
    ) = None
    archive: Annotated[bool, Meta(description="true to send folders as ZIP archives, for ?archive=zip")] = False
    send: Annotated[Literal["redirect", "proxy", "stream"], Meta(description="redirect, proxy or stream")] | None = None
    name: Annotated[str, Meta(min_length=1, description="the name of the route on the page at /")] | None = None
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
        str,
        Meta(
            min_length=1,
            description="the name of a source, a directory, absolute or relative to the settings file, or a URL such "
            "as https://host/path/ or s3://bucket/prefix",
        ),
    ]
    target: (
        Annotated[str, Meta(min_length=1, description="where the proxy finds the source, such as /_files/")] | None
    ) = None


PROXY_OPTIONS: dict[str, ProxyOption] = {
    name: option for kind in proxy_kinds().values() for name, option in kind.options.items()
}
"""The keys of `[offload]` that some backend accepts."""

if TYPE_CHECKING:
    _Backend = str
else:
    _Backend = Literal[tuple(proxy_kinds())]


class _OffloadSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    backend: Annotated[_Backend, Meta(description=_choice(proxy_kinds()))] | None = None
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
    logo: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="an image of at most 64 KiB, absolute or relative to the settings file; it is sent inside "
                "each page",
            ),
        ]
        | None
    ) = None
    templates: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="a directory with any of page.css, page.js, index.html, listing.html, view.html and "
                "error.html, which replace those of the service",
            ),
        ]
        | None
    ) = None
    footer: Annotated[str, Meta(max_length=2000, description="a text at the end of each page")] = ""


Routes = Annotated[list[RouteSettings], Meta(description="tables, each written as [[routes]]")]
ContentTypes = Annotated[
    dict[str, str], Meta(description='a table of suffixes and media types, such as ".gcode" = "text/x-gcode"')
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked as far as possible without opening files or connections. Directories are absolute.

    directory: relative paths begin there, and it is on the import path. origins: where each key was set, for messages;
    a key that is missing there comes from `file`. content_types: media types by suffix; they override the library's.
    """

    file: str
    directory: Path
    origins: Mapping[str, str]
    server: ServerSettings
    sources: Mapping[str, SourceSettings]
    routes: Sequence[RouteSettings]
    offload: OffloadSettings
    links: LinksSettings | None = None
    users: UsersSettings | None = None
    limits: LimitsSettings | None = None
    archives: ArchivesSettings = field(default_factory=ArchivesSettings)
    digests: DigestsSettings | None = None
    accounts: AccountsSettings = field(default_factory=AccountsSettings)
    log: LogSettings | None = None
    metrics: MetricsSettings | None = None
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

        Another server usually writes a log by itself. Under it, the service writes one only if there is a `[log]`.
        """
        log = self.log
        if log is None and self.server.log_level in ("info", "debug", "trace"):
            log = LogSettings()
        return replace(self, log=log if self.server.access_log else None)

    def error(self, key: str, problem: str) -> ConfigurationError:
        """Return the error for a key such as `sources.files.root`."""
        return configuration_error(self.file, self.origins, key, problem)

    @contextmanager
    def blaming(self, key: str) -> Iterator[None]:
        """Add the key to a `ConfigurationError` raised inside, and turn errors of other libraries into one."""
        try:
            yield
        except ConfigurationError as exc:
            raise type(exc)(str(self.error(key, str(exc)))) from exc
        except (OSError, OverflowError, TypeError, ValueError) as exc:
            raise self.error(key, f"{type(exc).__name__}: {exc}: correct it") from exc


def parts_of(kind: Any) -> Iterator[Any]:
    """Yield the type of a setting and, recursively, its arguments."""
    yield kind
    for part in get_args(kind):
        yield from parts_of(part)


def description_of(kind: Any) -> str | None:
    """Return which values a setting of this type takes, or None if the type does not say it."""
    return next((part.description for part in parts_of(kind) if isinstance(part, Meta) and part.description), None)


def configuration_error(file: str, origins: Mapping[str, str], key: str, problem: str) -> ConfigurationError:
    """Return an error with one line: where the mistake is, in which key, what is wrong and what to do."""
    origin, part = file, key
    while part:
        if part in origins:
            origin = origins[part]
            break
        part = part[: max(part.rfind("."), part.rfind("["), 0)]
    return ConfigurationError(f"{origin}: {key}: {problem}" if key else f"{origin}: {problem}")


_UNITS = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB"))},
    "KB": 1000,
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB"))},
}
_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def bytes_of(value: int | str) -> int | None:
    """Return the bytes of a size such as 4096, "500MB" or "10GiB"; None for any other text, and from 2^63 on."""
    if isinstance(value, str):
        match = re.fullmatch("([0-9]{1,19})[ ]?([A-Za-z]*)", value)
        if match is None or match[2] not in _UNITS:
            return None
        number = int(match[1]) * _UNITS[match[2]]
    else:
        number = value
    return number if 0 <= number <= _MOST_BYTES else None


def seconds_of(value: float | str) -> float | None:
    """Return the seconds of a time such as 90, "90s", "10m", "2h" or "1d"; None for other text, and above 100 years."""
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)[ ]?([a-z]?)", value)
        if match is None or match[2] not in _TIMES:
            return None
        number = float(match[1]) * _TIMES[match[2]]
    else:
        number = float(value)
    return number if 0 <= number <= _LONGEST_AGE else None


def cache_of(source: SourceSettings) -> CacheSettings | None:
    """Return the cache of a source, or None."""
    cache: CacheSettings | None = getattr(source, "cache", None)
    return cache


def digests_mode(source: SourceSettings) -> Literal["off", "known", "background"]:
    """Return whether the digests of a source's files are sent and computed. Some kinds of source have none."""
    return source.digests if isinstance(source, PathSettings | StorageSettings | RemoteSettings) else "off"


def directory_of(source: SourceSettings) -> str | None:
    """Return the local directory that a source serves, or None if its files are not local."""
    if isinstance(source, PathSettings):
        return source.root
    if isinstance(source, StorageSettings) and (parts := urlsplit(source.url)).scheme == "file":
        return unquote(parts.path).rstrip("/") or "/"
    return None


def rules_of(settings: "Settings") -> list[Rule]:
    """Return the rules for the proxy. Without a target, the proxy finds a directory at the same path."""
    return [Rule(rule.source, rule.target or rule.source) for rule in settings.offload.rules]


def options_of(offload: OffloadSettings) -> dict[str, Any]:
    """Return those options of the backend that are set."""
    return {name: value for name in PROXY_OPTIONS if (value := getattr(offload, name)) is not None}


def source_of_files(name: str, sources: Mapping[str, SourceSettings]) -> tuple[str, SourceSettings]:
    """Return the name and the settings of the source that holds the files; an object source refers to another."""
    source = sources[name]
    return (source.source, sources[source.source]) if isinstance(source, ObjectSettings) else (name, source)
