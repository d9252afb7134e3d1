"""What can be set, as types. A field's description says what it takes, and is what a wrong value is answered with."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, Struct

from downloadview_async import ConfigurationError, ProxyOption, Rule, proxy_kinds

_YEAR = 365 * 86_400
_LONGEST_AGE = 100 * _YEAR
_MOST_BYTES = 2**63 - 1

_Seconds = Annotated[float, Meta(gt=0, le=_YEAR)]
_Count = Annotated[int, Meta(ge=1)]


def _choice(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


class Unavailable(ConfigurationError):
    """Something is not there now, but may be later: unlike other errors, it is worth starting again for."""


class DatabaseUnavailable(Unavailable):
    """A database does not answer."""


class ServerSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[server]`: options of uvicorn, under uvicorn's own names and with its meanings."""

    host: Annotated[str, Meta(description="the address to listen on, such as 127.0.0.1 or 0.0.0.0")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="a TCP port, 0 to 65535")] = 8000
    uds: Annotated[str, Meta(min_length=1, description="the path of a Unix socket to listen on")] | None = None
    fd: Annotated[int, Meta(ge=0, le=2**31 - 1, description="the number of an open socket to listen on")] | None = None
    workers: Annotated[int, Meta(ge=1, le=1024, description="how many processes serve, 1 or more, at most 1024")] = 1
    root_path: Annotated[
        str,
        Meta(
            pattern=r"^(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]+)*\Z",
            description="the path a proxy serves this below, such as /downloads, of ASCII characters that a URL need "
            "not encode, or empty",
        ),
    ] = ""
    proxy_headers: Annotated[bool, Meta(description="true to believe X-Forwarded-* of forwarded_allow_ips")] = True
    forwarded_allow_ips: (
        Annotated[str, Meta(description="addresses of trusted proxies, separated by commas, or *")] | None
    ) = None
    log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug", "trace"],
        Meta(description="critical, error, warning, info, debug or trace"),
    ] = "info"
    access_log: Annotated[bool, Meta(description="true to log every request")] = True
    use_colors: Annotated[bool, Meta(description="true or false; without it, colours on a terminal only")] | None = None
    loop: Annotated[Literal["auto", "asyncio", "uvloop"], Meta(description="auto, asyncio or uvloop")] = "auto"
    http: Annotated[
        Literal["auto", "h11", "httptools"],
        Meta(description="auto (sendfile, and stalled clients are dropped), or uvicorn's own h11 or httptools"),
    ] = "auto"
    stall_timeout: Annotated[
        _Seconds,
        Meta(description="seconds a client may take less than minimum_rate, at most a year; needs http = auto"),
    ] = 60.0
    minimum_rate: Annotated[int, Meta(ge=1, description="bytes per second that a client has to take")] = 64
    backlog: Annotated[int, Meta(ge=1, le=2**31 - 1, description="connections that wait to be taken, 1 or more")] = 2048
    limit_concurrency: Annotated[_Count, Meta(description="requests at once before 503 is answered")] | None = None
    limit_max_requests: Annotated[_Count, Meta(description="requests after which a worker is replaced")] | None = None
    timeout_keep_alive: Annotated[
        int, Meta(ge=0, le=_YEAR, description="seconds an idle connection is kept, at most a year")
    ] = 5
    timeout_graceful_shutdown: Annotated[
        int, Meta(ge=0, le=_YEAR, description="seconds that downloads have to end, at most a year")
    ] = 30
    server_header: Annotated[bool, Meta(description="true to send a Server header")] = True
    date_header: Annotated[bool, Meta(description="true to send a Date header")] = True
    ssl_keyfile: Annotated[str, Meta(description="the path of a private key")] | None = None
    ssl_certfile: Annotated[str, Meta(description="the path of a certificate")] | None = None
    ssl_keyfile_password: Annotated[str, Meta(description="the password of the private key")] | None = None

    @property
    def address(self) -> str:
        """HOST:PORT by which a process on this machine reaches the service, if it listens on TCP."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class PathSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="path"):
    """`type = "path"`: a directory."""

    root: Annotated[str, Meta(min_length=1, description="a directory, absolute or relative to the settings file")]
    symlinks: Annotated[Literal["deny", "inside", "follow"], Meta(description="deny, inside or follow")] = "inside"
    names: Annotated[Literal["portable", "any"], Meta(description="portable or any")] = "portable"
    precompressed: Annotated[
        list[Literal["br", "zstd", "gzip"]], Meta(description='a list of "br", "zstd" and "gzip"')
    ] = []


class PresignSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[sources.NAME.presign]`: URLs by which clients fetch from an S3 store themselves."""

    expires: Annotated[
        str,
        Meta(
            pattern=r"^[1-9][0-9]{0,6}[smhd]\Z",
            description="how long a URL is good for, at most 7 days, such as 30s, 10m, 1h or 7d",
        ),
    ] = "10m"
    public_endpoint: (
        Annotated[str, Meta(description="the URL of the store for clients, if it is not that of `endpoint`")] | None
    ) = None


class CacheSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[sources.NAME.cache]`: a directory that the files of a source are kept in."""

    path: Annotated[str, Meta(min_length=1, description="a directory, absolute or relative to the settings file")]
    max_bytes: Annotated[
        int | str, Meta(description="what all files in it may take: a number of bytes, or such as 500MB or 10GiB")
    ] = "10GiB"
    max_age: Annotated[
        float | str,
        Meta(
            description="how long a file is sent without asking for a newer one: seconds, or such as 90s, 10m, 2h, 1d"
        ),
    ] = "1d"


_CACHE = "a [sources.NAME.cache] table"


class StorageSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="storage"):
    """`type = "storage"`: a storage by its URL."""

    url: Annotated[
        str,
        Meta(
            min_length=1,
            description="file:///absolute/directory, file:directory beside this file, memory://, s3://bucket/prefix, "
            "gs://bucket/prefix or az://container/prefix",
        ),
    ]
    options: Annotated[
        dict[str, str | bool | int],
        Meta(description="a table of options of an object store, under the names that obstore has for them"),
    ] = {}
    presign: (
        Annotated[PresignSettings, Meta(description='a table, for routes with send = "redirect"; s3:// only')] | None
    ) = None
    max_connections: (
        Annotated[_Count, Meta(description="requests to an object store at once, 100 without it")] | None
    ) = None
    names: Annotated[Literal["portable", "any", "exact"], Meta(description="portable, any or exact")] | None = None
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class ObjectSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="object"):
    """`type = "object"`: rows of a database table, each with a file of another source."""

    database: Annotated[str, Meta(min_length=1, description="an SQLAlchemy URL with an asynchronous driver")]
    table: Annotated[str, Meta(min_length=1, description="a table or view, or schema.table")]
    key: Annotated[str, Meta(min_length=1, description="the column that a URL's key is looked up in")]
    file: Annotated[str, Meta(min_length=1, description="the column with the file's name in `source`")]
    source: Annotated[str, Meta(min_length=1, description="the name of the source where the files live")]
    filename: Annotated[str, Meta(description="the column with the name for clients")] | None = None
    content_type: Annotated[str, Meta(description="the column with the media type")] | None = None


class RemoteSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="remote"):
    """`type = "remote"`: the files below a URL."""

    url: Annotated[str, Meta(min_length=1, description="an http or https URL that names are appended to")]
    allow_hosts: Annotated[
        list[str], Meta(description="a list of hosts that may be reached at private addresses or by a redirect")
    ] = []
    max_connections: Annotated[_Count, Meta(description="upstream requests at once, 1 or more")] = 100
    connect_timeout: Annotated[_Seconds, Meta(description="seconds, more than 0 and at most a year")] = 10.0
    read_timeout: Annotated[_Seconds, Meta(description="seconds, more than 0 and at most a year")] = 30.0
    names: Annotated[Literal["portable", "any", "exact"], Meta(description="portable, any or exact")] = "portable"
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


class VirtualSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="type", tag="virtual"):
    """`type = "virtual"`: files that a function makes."""

    factory: Annotated[
        str,
        Meta(
            pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*\Z",
            description='"module:function"; the directory of the settings file is on the import path',
        ),
    ]
    cache: Annotated[CacheSettings | None, Meta(description=_CACHE)] = None


SourceSettings = PathSettings | StorageSettings | ObjectSettings | RemoteSettings | VirtualSettings


class RouteSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[[routes]]`: which URLs are answered by which source."""

    path: Annotated[str, Meta(description="a path with one parameter, such as /files/{path:path}")]
    source: Annotated[str, Meta(description="the name of one of the sources")]
    disposition: Annotated[Literal["attachment", "inline"], Meta(description="attachment or inline")] = "attachment"
    cache_control: (
        Annotated[
            str,
            Meta(
                pattern=r"^[ -~]+\Z",
                max_length=1024,
                description="a Cache-Control header, such as private; leave it out to send none",
            ),
        ]
        | None
    ) = None
    send: Annotated[Literal["redirect", "proxy", "stream"], Meta(description="redirect, proxy or stream")] | None = None
    name: Annotated[str, Meta(min_length=1, description="what the page at / calls the route")] | None = None
    example: Annotated[
        str | list[str], Meta(description="a file, or a list of files, that the page at / links to")
    ] = []

    @property
    def examples(self) -> list[str]:
        """The examples as a list."""
        return [self.example] if isinstance(self.example, str) else self.example


class RuleSettings(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`[[offload.rules]]`: what a proxy can reach, and where it finds it."""

    source: Annotated[
        str,
        Meta(
            min_length=1,
            description="a directory, absolute or relative to the settings file, or a URL such as https://host/path/ "
            "or s3://bucket/prefix",
        ),
    ]
    target: (
        Annotated[str, Meta(min_length=1, description="what the source is for the proxy, such as /_files/")] | None
    ) = None


PROXY_OPTIONS: dict[str, ProxyOption] = {
    name: option for kind in proxy_kinds().values() for name, option in kind.options.items()
}
"""The keys of `[offload]` that some backend takes."""

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


class OffloadSettings(_WithOptions):  # type: ignore[misc]  # its options are those of the installed proxies
    """`[offload]`: the proxy that sends files for us, if there is one, and the options of its backend."""


ContentTypes = Annotated[
    dict[str, str], Meta(description='a table of suffixes and media types, such as ".gcode" = "text/x-gcode"')
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked as far as they can be without opening anything; directories are absolute.

    directory: where relative paths begin, and modules are imported from. origins: where a key was written, for
    messages; what is not in there comes from `file`. content_types: by suffix, over the library's own table.
    """

    file: str
    directory: Path
    origins: Mapping[str, str]
    server: ServerSettings
    sources: Mapping[str, SourceSettings]
    routes: Sequence[RouteSettings]
    offload: OffloadSettings
    content_types: Mapping[str, str] = field(default_factory=dict)

    def error(self, key: str, problem: str) -> ConfigurationError:
        """Return the error for a key such as `sources.files.root`."""
        return configuration_error(self.file, self.origins, key, problem)

    @contextmanager
    def blaming(self, key: str) -> Iterator[None]:
        """Say which key a `ConfigurationError` raised inside is of, or a value that another library refuses."""
        try:
            yield
        except ConfigurationError as exc:
            raise type(exc)(str(self.error(key, str(exc)))) from exc
        except (OSError, OverflowError, TypeError, ValueError) as exc:
            raise self.error(key, f"{type(exc).__name__}: {exc}: correct it") from exc


def configuration_error(file: str, origins: Mapping[str, str], key: str, problem: str) -> ConfigurationError:
    """Return the error of one line: where it is written, which key, what is wrong and what to do."""
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
    """Return a number of bytes such as 4096, "500MB" or "10GiB"; None for any other text, and from 2^63 on."""
    if isinstance(value, str):
        match = re.fullmatch("([0-9]{1,19})[ ]?([A-Za-z]*)", value)
        if match is None or match[2] not in _UNITS:
            return None
        number = int(match[1]) * _UNITS[match[2]]
    else:
        number = value
    return number if 0 <= number <= _MOST_BYTES else None


def seconds_of(value: float | str) -> float | None:
    """Return a time such as 90, "90s", "10m", "2h" or "1d" in seconds; None for any other text, and above a century."""
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


def directory_of(source: SourceSettings) -> str | None:
    """Return the local directory that a source serves, or None if it serves none."""
    if isinstance(source, PathSettings):
        return source.root
    if isinstance(source, StorageSettings) and (parts := urlsplit(source.url)).scheme == "file":
        return unquote(parts.path).rstrip("/") or "/"
    return None


def rules_of(settings: "Settings") -> list[Rule]:
    """Return the rules for the proxy; a directory without a target is the same for both."""
    return [Rule(rule.source, rule.target or rule.source) for rule in settings.offload.rules]


def options_of(offload: OffloadSettings) -> dict[str, Any]:
    """Return the options of the backend that are set."""
    return {name: value for name in PROXY_OPTIONS if (value := getattr(offload, name)) is not None}


def source_of_files(name: str, sources: Mapping[str, SourceSettings]) -> tuple[str, SourceSettings]:
    """Return the source where the files themselves are, with its name: that of an object source is another one."""
    source = sources[name]
    return (source.source, sources[source.source]) if isinstance(source, ObjectSettings) else (name, source)
