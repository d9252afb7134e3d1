"""Reads the settings from a TOML file, DOWNLOADVIEW_* environment variables and the command line.

Variables override the file, and the command line overrides both. Every mistake raises a `ConfigurationError` of one
line, which says where the mistake is, in which key, what is wrong and what to do.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

import msgspec
from msgspec import Struct

from downloadview_async import ConfigurationError, Limits, ProxyKind, proxy_kinds
from downloadview_async.service.settings import (
    PROXY_OPTIONS,
    AccountsSettings,
    ArchivesSettings,
    CacheSettings,
    ChosenSettings,
    ContentTypes,
    CorsSettings,
    DigestsSettings,
    LimitsSettings,
    LinksSettings,
    LogSettings,
    MetricsSettings,
    ObjectSettings,
    OffloadSettings,
    PagesSettings,
    PathSettings,
    RemoteSettings,
    RouteLimitsSettings,
    Routes,
    RouteSettings,
    RuleSettings,
    ServerSettings,
    Settings,
    SourceSettings,
    StorageSettings,
    UsersSettings,
    VirtualSettings,
    bytes_of,
    cache_of,
    configuration_error,
    description_of,
    digests_mode,
    directory_of,
    options_of,
    parts_of,
    seconds_of,
    source_of_files,
)

PREFIX = "DOWNLOADVIEW_"
CONFIG = "DOWNLOADVIEW_CONFIG"
"""The environment variable with the path of the settings file."""

_SOURCE_TYPES: dict[str, type[Struct]] = {
    "path": PathSettings,
    "storage": StorageSettings,
    "object": ObjectSettings,
    "remote": RemoteSettings,
    "virtual": VirtualSettings,
    "chosen": ChosenSettings,
}
_TABLES: dict[str, Any] = {
    "server": ServerSettings,
    "sources": dict[str, Any],
    "routes": Routes,
    "offload": OffloadSettings,
    "content_types": ContentTypes,
    "links": LinksSettings,
    "digests": DigestsSettings,
    "users": UsersSettings,
    "limits": LimitsSettings,
    "accounts": AccountsSettings,
    "log": LogSettings,
    "metrics": MetricsSettings,
    "archives": ArchivesSettings,
    "pages": PagesSettings,
}
_PARAMETER = re.compile(r"{([a-zA-Z_]\w*)(:[a-zA-Z_]\w*)?}")  # a path parameter, as Starlette parses it
_Shape = tuple[str, str, str]
_WITHOUT_SLASH = (":str", ":int", ":float", ":uuid")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_MAY_HAVE_LINES = re.compile(r"sources\.[^.]+\.options\..+|server\.ssl_keyfile_password|links\.keys")
KEY_LINE = re.compile(r"^\s*([A-Za-z0-9_.-]{1,64})\s+(\S{32,})\s*$", re.MULTILINE)
"""A line of a keys file: the id of a key and its secret."""
_HEADER = re.compile("[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_HEADER_VALUE = re.compile("[!-~](?:[ -~]{0,4094}[!-~])?")
_NOT_OF_A_ROUTE = {
    **dict.fromkeys(
        (
            *("accept-ranges", "age", "connection", "content-digest", "content-encoding", "content-length"),
            *("content-location", "content-md5", "content-range", "date", "digest", "etag", "keep-alive"),
            *("last-modified", "location", "proxy-authenticate", "proxy-connection", "repr-digest", "server", "te"),
            *("trailer", "transfer-encoding", "upgrade", "x-offload-target"),
        ),
        "it describes one file or one message, and is made from it: remove it",
    ),
    **dict.fromkeys(
        (name.lower() for kind in proxy_kinds().values() for name in kind.headers),
        "it is an order for a proxy, which the service gives itself: remove it",
    ),
    "cache-control": "write it as cache_control of the route",
    "content-disposition": "write disposition of the route",
    "content-type": "write the type of a suffix in [content_types]",
}
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_COMMAND_LINE = "the command line"
_OBJECT_STORE = re.compile("(?:s3|gs|az)://")
_SERVER_PATHS = ("uds", "ssl_keyfile", "ssl_certfile")


def load_settings(
    file: str | os.PathLike[str] | None,
    *,
    environ: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings of a TOML file, overridden by DOWNLOADVIEW_* variables in `environ` and by `options`.

    file: None to use only variables and options. environ: in the name of a variable, `__` separates the parts of a key,
    as in DOWNLOADVIEW_SERVER__PORT; its value is text, or JSON for a whole table or list. options: keys of `[server]`
    from the command line.

    Relative paths begin at the directory of the file, or without a file at the current directory; those in `options`
    always begin at the current directory. No file or directory in the settings is opened.

    Raises `ConfigurationError`.
    """
    label = "settings" if file is None else os.fspath(file)
    directory = Path.cwd() if file is None else Path(file).absolute().parent
    data = {} if file is None else _read(label)
    origins = _apply_variables(data, environ)
    if options and isinstance(server := data.setdefault("server", {}), dict):  # another type is refused below
        server |= options
        origins |= dict.fromkeys((f"server.{name}" for name in options), _COMMAND_LINE)
    return _Draft(label, directory, origins).settings(data)


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            return tomllib.load(opened)
    except OSError as exc:
        raise ConfigurationError(
            f"{file or repr(file)}: the settings file cannot be read ({exc.strerror}): give the path of a readable "
            f"TOML file with --config or {CONFIG}"
        ) from exc
    except RecursionError as exc:
        raise ConfigurationError(f"{file}: tables or lists are nested too deeply: write them flat") from exc
    except ValueError as exc:  # invalid TOML or UTF-8, or an integer with thousands of digits
        raise ConfigurationError(f"{file}: not valid TOML: {exc}: correct the file") from exc


def _apply_variables(data: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Write the variables into `data`, and return the variable that set each key."""
    origins: dict[str, str] = {}
    tables = {**_TABLES, "routes": None}  # a list is set as a whole
    if isinstance(sources := data.get("sources"), dict):
        tables |= {f"sources__{name}": _kind_of_source(source) for name, source in sources.items()}
    known = [variable for key, kind in tables.items() for variable in _variables_of(key, kind)]
    names = [name for name in environ if name.startswith(PREFIX) and name != CONFIG]
    for name in sorted(names, key=lambda name: (name.count("__"), name)):  # whole tables first, then their keys
        *parents, last = name.removeprefix(PREFIX).split("__")
        table: Any = data
        keys: list[str] = []
        meant = [other for other in known if re.sub("_+", "_", other) == re.sub("_+", "_", name)]
        if meant and name not in meant and not environ[name].lstrip().startswith("{"):  # not a whole new source
            raise ConfigurationError(f"{name}: unknown key: did you mean {meant[0]}?")
        for part in parents:
            keys.append(_spelled(part, table))
            if keys[-1] not in table and len(keys) == (2 if keys[0] in _TABLES else 1):
                origins[".".join(keys)] = name  # the file has no such table: the variable makes it
            table = table.setdefault(keys[-1], {})
            if not isinstance(table, dict):
                whole = PREFIX + "__".join(keys).upper()
                raise ConfigurationError(f"{name}: {'.'.join(keys)} is not a table: set all of it, as JSON, in {whole}")
        keys.append(_spelled(last, table))
        table[keys[-1]] = _value(name, environ[name], _kind_of(keys, data))
        origins[".".join(keys)] = name
    return origins


def _variables_of(key: str, kind: Any) -> Iterator[str]:
    """Yield the names of the variables for a key of this type and, if it is a table, for the keys in it."""
    yield PREFIX + key.upper().replace("-", "_")
    for name, inner in _fields(kind).items():
        yield from _variables_of(f"{key}__{name}", inner)


def _kind_of_source(source: Any) -> type[Struct] | None:
    return _SOURCE_TYPES.get(str(source.get("type"))) if isinstance(source, dict) else None


def _spelled(part: str, table: Mapping[str, Any]) -> str:
    """Return the key of a table that matches a part of a variable's name: MY_FILES matches `my-files`."""
    for key in table:
        if key.upper().replace("-", "_") == part.upper():
            return key
    return part.lower()


def _value(name: str, text: str, kind: Any) -> Any:
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except RecursionError as exc:
            raise ConfigurationError(f"{name}: objects or lists are nested too deeply: write them flat") from exc
        except ValueError as exc:
            raise ConfigurationError(f"{name}: not valid JSON: {exc}: correct it") from exc
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError:
        return text  # refused later, like any other wrong value


def _kind_of(keys: Sequence[str], data: Mapping[str, Any]) -> Any:
    """Return the type of a setting, by which the text of its variable is parsed; str if the setting is unknown."""
    kind = _TABLES.get(keys[0])
    names = list(keys[1:])
    if keys[0] == "sources" and names:
        kind = _kind_of_source(data["sources"].get(names.pop(0)))
    for name in names:
        kind = _fields(kind).get(name)
    return str if kind is None else kind


@dataclass(frozen=True, slots=True)
class _Draft:
    """Settings while they are checked, and where they come from, for error messages."""

    file: str
    directory: Path
    origins: Mapping[str, str]

    def error(self, key: str, problem: str) -> ConfigurationError:
        return configuration_error(self.file, self.origins, key, problem)

    def settings(self, data: Mapping[str, Any]) -> Settings:
        self._check_texts(data)
        for key in data:
            if key not in _TABLES:
                raise self.error(key, f"unknown key: {_instead_of(key, _TABLES)}")
        server = self._server(self._converted("server", self._table("server", data), ServerSettings))
        sources = {name: self._source(name, table) for name, table in self._table("sources", data).items()}
        for name, source in sources.items():
            self._check_reference(f"sources.{name}", source, sources)
        self._check_caches(sources)
        routes = self._routes(self._converted("routes", data.get("routes", []), Routes), sources)
        links = (
            self._links(self._converted("links", self._table("links", data), LinksSettings), server)
            if "links" in data
            else None
        )
        users = (
            self._users(self._converted("users", self._table("users", data), UsersSettings))
            if "users" in data
            else None
        )
        limits: LimitsSettings | None = None
        if "limits" in data:
            limits = self._converted("limits", self._table("limits", data), LimitsSettings)
            self._check_limits("limits", limits)
        digests = self._digests(data, sources)
        settings = Settings(
            file=self.file,
            directory=self.directory,
            origins=self.origins,
            server=server,
            sources=sources,
            routes=routes,
            offload=self._offload(self._converted("offload", self._table("offload", data), OffloadSettings), sources),
            links=links,
            users=users,
            limits=limits,
            archives=self._archives(self._converted("archives", self._table("archives", data), ArchivesSettings)),
            accounts=self._accounts(self._converted("accounts", self._table("accounts", data), AccountsSettings)),
            log=self._log(data),
            metrics=self._metrics(data),
            pages=self._pages(self._converted("pages", self._table("pages", data), PagesSettings)),
            digests=digests,
            content_types=self._converted("content_types", self._table("content_types", data), ContentTypes),
        )
        for index, route in enumerate(routes):
            self._check_sending(f"routes[{index}].send", route, settings)
            if links is None and {"signed", "secure_link"} & {*(route.access or ())}:
                raise self.error(f"routes[{index}].access", "links need keys: add a [links] table with keys")
            if route.downloads and not route.list:
                raise self.error(f"routes[{index}].downloads", "listings show them: set list, or remove it")
            if route.downloads and settings.accounts.database is None:
                raise self.error(
                    f"routes[{index}].downloads", "no downloads are counted: set accounts.database, or remove it"
                )
            if users is None and any(one.startswith("user:") for one in route.access or ()):
                raise self.error(
                    f"routes[{index}].access", "there are no users: add a [users] table with a file or a header"
                )
        return settings

    def _check_texts(self, data: Mapping[str, Any]) -> None:
        """Refuse control characters. In options of a store and in the password of a key, refuse only NUL."""
        left: list[tuple[str, Any]] = [("", data)]
        while left:
            key, value = left.pop()
            if isinstance(value, dict):
                for name, inner in value.items():
                    if _CONTROL.search(name):
                        raise self.error(key, f"a control character in the key {name!r}: remove it")
                    left.append((f"{key}.{name}".lstrip("."), inner))
            elif isinstance(value, list):
                left += [(f"{key}[{index}]", inner) for index, inner in enumerate(value)]
            elif isinstance(value, str):
                forbidden = "\0" if _MAY_HAVE_LINES.fullmatch(key) else _CONTROL
                if (match := re.search(forbidden, value)) is not None:
                    raise self.error(key, f"a control character ({match[0]!r}): remove it")

    def _table(self, key: str, data: Mapping[str, Any]) -> dict[str, Any]:
        table = data.get(key, {})
        if not isinstance(table, dict):
            raise self.error(key, f"must be a table: write it as [{key}] in TOML, or as a JSON object in a variable")
        return table

    def _converted(self, key: str, value: Any, kind: Any) -> Any:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as exc:
            raise self.error(*_explained(key, str(exc), kind)) from None
        except RecursionError:
            raise self.error(key, "tables or lists are nested too deeply: write them flat") from None

    def _server(self, server: ServerSettings) -> ServerSettings:
        paths = {
            name: self._absolute(path)
            for name in _SERVER_PATHS
            if (path := getattr(server, name)) and self.origins.get(f"server.{name}") != _COMMAND_LINE
        }
        return msgspec.structs.replace(server, **paths)

    def _log(self, data: Mapping[str, Any]) -> LogSettings | None:
        if "log" not in data:
            return None
        log: LogSettings = self._converted("log", self._table("log", data), LogSettings)
        return log if log.path is None else msgspec.structs.replace(log, path=self._absolute(log.path))

    def _metrics(self, data: Mapping[str, Any]) -> MetricsSettings | None:
        if "metrics" not in data:
            return None
        metrics: MetricsSettings = self._converted("metrics", self._table("metrics", data), MetricsSettings)
        if metrics.directory is None:
            return metrics
        return msgspec.structs.replace(metrics, directory=self._absolute(metrics.directory))

    def _source(self, name: str, table: Any) -> SourceSettings:
        key = f"sources.{name}"
        if not re.fullmatch("[A-Za-z0-9_-]+", name):
            raise self.error(key, "not a valid source name: use letters, digits, - and _")
        if not isinstance(table, dict):
            raise self.error(key, f"must be a table: write it as [{key}]")
        if "type" not in table:
            raise self.error(f"{key}.type", f"missing: give one of {', '.join(_SOURCE_TYPES)}")
        kind = _SOURCE_TYPES.get(str(table["type"]))
        if kind is None:
            raise self.error(
                f"{key}.type", f"unknown type {table['type']!r}: {_instead_of(str(table['type']), _SOURCE_TYPES)}"
            )
        source = cast("SourceSettings", self._converted(key, table, kind))
        if isinstance(source, StorageSettings | RemoteSettings):
            self._check_url(f"{key}.url", source.url)
        if (cache := cache_of(source)) is not None:
            source = msgspec.structs.replace(source, cache=self._cache(f"{key}.cache", cache))
        if isinstance(source, PathSettings):
            return msgspec.structs.replace(source, root=self._absolute(source.root))
        if isinstance(source, ChosenSettings):
            return ChosenSettings(paths=[self._absolute(path) for path in source.paths])
        if isinstance(source, StorageSettings) and re.match("file:[^/]", source.url):
            path = self._absolute(unquote(source.url.removeprefix("file:")))
            source = msgspec.structs.replace(source, url=f"file://{quote(path)}")
        if isinstance(source, StorageSettings) and not _OBJECT_STORE.match(source.url):
            for option in ("options", "presign", "max_connections"):
                if getattr(source, option):
                    raise self.error(
                        f"{key}.{option}", f"only s3://, gs:// and az:// storages have it: remove {option}"
                    )
        presign = source.presign if isinstance(source, StorageSettings) else None
        if presign is not None and seconds_of(presign.expires) is None:
            raise self.error(f"{key}.presign.expires", f"{presign.expires!r} is too long: give at most 7d")
        if isinstance(source, StorageSettings) and source.presign is not None and source.cache is not None:
            raise self.error(
                f"{key}.presign",
                "a source cannot have both presign and cache: remove one of them, or define two sources",
            )
        for option in ("max_connections", "names"):
            if isinstance(source, StorageSettings) and option in source.options:
                raise self.error(f"{key}.options.{option}", f"not an option of obstore: write it in [{key}] itself")
        return source

    def _check_url(self, key: str, url: str) -> None:
        try:
            port = urlsplit(url).port
        except ValueError as exc:
            raise self.error(key, f"{url!r} is not a URL ({exc}): correct it") from exc
        if port == 0:
            raise self.error(key, f"{url!r} has the port 0: give the port that the server listens on")
        if _CONTROL.search(unquote(url)):
            raise self.error(key, f"a control character in {url!r}: remove it")

    def _cache(self, key: str, cache: CacheSettings) -> CacheSettings:
        size, age = bytes_of(cache.max_bytes), seconds_of(cache.max_age)
        if not size:
            raise self.error(
                f"{key}.max_bytes",
                f"{cache.max_bytes!r} is not a size: give a number of bytes, or a size such as 10GiB",
            )
        if age is None:
            raise self.error(
                f"{key}.max_age",
                f"{cache.max_age!r} is not a time: give a number of seconds, or a time such as 10m or 1d",
            )
        return CacheSettings(path=self._absolute(cache.path), max_bytes=size, max_age=age)

    def _links(self, links: LinksSettings, server: ServerSettings) -> LinksSettings:
        ages = {}
        for name in ("max_age", "session_age"):
            value = getattr(links, name)
            age = seconds_of(value)
            if not age or age < 1:
                raise self.error(
                    f"links.{name}", f"{value!r} is not a time of a second or more: give such as 10m, 2h or 7d"
                )
            ages[name] = age
        store = links.store
        if store == "memory:" and server.workers > 1:
            raise self.error(
                "links.store",
                f"memory: is for one worker, and there are {server.workers}: give such as sqlite:links.db",
            )
        if store is not None and store.startswith("sqlite:"):
            store = f"sqlite:{self._absolute(store.removeprefix('sqlite:'))}"
        keys = links.keys if KEY_LINE.search(links.keys) else self._absolute(links.keys)
        return msgspec.structs.replace(links, keys=keys, store=store, **ages)

    def _digests(self, data: Mapping[str, Any], sources: Mapping[str, SourceSettings]) -> DigestsSettings | None:
        digests: DigestsSettings | None = None
        if "digests" in data:
            digests = self._converted("digests", self._table("digests", data), DigestsSettings)
            digests = msgspec.structs.replace(digests, store=self._absolute(digests.store))
        for name, source in sources.items():
            sidecars, mode = getattr(source, "sidecars", False), digests_mode(source)
            if mode != "off" and digests is None and not (sidecars and mode == "known"):
                raise self.error(f"sources.{name}.digests", "there is no store: add a [digests] table with a store")
            if sidecars and mode == "off":
                raise self.error(f"sources.{name}.sidecars", 'digests are off: set digests = "known" too')
        return digests

    def _users(self, users: UsersSettings) -> UsersSettings:
        if (users.file is None) == (users.header is None):
            raise self.error("users", "give either a file or a header, and not both")
        if users.file is None:
            return users
        return msgspec.structs.replace(users, file=self._absolute(users.file))

    def _check_limits(self, key: str, limits: RouteLimitsSettings) -> None:
        """Refuse an amount that is not one, and a queue for nothing."""
        for name in ("rate", "requests", "quota", "total_rate"):
            amount: Any = {name: getattr(limits, name)}
            try:
                Limits(**amount)
            except ConfigurationError as exc:
                raise self.error(f"{key}.{name}", str(exc)) from exc
        if limits.mode == "queue" and limits.concurrent is None:
            raise self.error(f"{key}.mode", "requests wait for `concurrent`: set it, or remove mode")

    def _archives(self, archives: ArchivesSettings) -> ArchivesSettings:
        size = None if archives.max_bytes is None else bytes_of(archives.max_bytes)
        if archives.max_bytes is not None and not size:
            raise self.error(
                "archives.max_bytes",
                f"{archives.max_bytes!r} is not a size: give a number of bytes, or a size such as 10GiB",
            )
        checksums = None if archives.checksums is None else self._absolute(archives.checksums)
        return msgspec.structs.replace(archives, max_bytes=size, checksums=checksums)

    def _pages(self, pages: PagesSettings) -> PagesSettings:
        paths = {name: self._absolute(path) for name in ("logo", "templates") if (path := getattr(pages, name))}
        return msgspec.structs.replace(pages, **paths)

    def _check_caches(self, sources: Mapping[str, SourceSettings]) -> None:
        first: dict[str, tuple[str, CacheSettings]] = {}
        for name, source in sources.items():
            if (cache := cache_of(source)) is None:
                continue
            key = f"sources.{name}.cache"
            for other, served in sources.items():
                directory = directory_of(served)
                paths = (os.path.realpath(cache.path), os.path.realpath(directory or ""))
                if directory and (_is_within(*paths) or _is_within(*reversed(paths))):
                    raise self.error(
                        f"{key}.path", f"the source {other!r} serves {directory!r}: give the cache another directory"
                    )
            known, settings = first.setdefault(cache.path, (name, cache))
            if settings != cache:
                raise self.error(
                    key,
                    f"the cache {cache.path!r} of {known!r} has different limits: give both the same, or another path",
                )

    def _accounts(self, accounts: AccountsSettings) -> AccountsSettings:
        keep = seconds_of(accounts.keep)
        if not keep:
            raise self.error("accounts.keep", f"{accounts.keep!r} is not a time: give such as 90d or 24h")
        if accounts.proxy_log is None:
            return msgspec.structs.replace(accounts, keep=keep)
        if accounts.database is None:
            raise self.error("accounts.database", "missing: the log of the proxy is counted in a database")
        return msgspec.structs.replace(accounts, keep=keep, proxy_log=self._absolute(accounts.proxy_log))

    def _absolute(self, path: str) -> str:
        return os.path.normpath(self.directory / path)

    def _check_reference(self, key: str, source: SourceSettings, sources: Mapping[str, SourceSettings]) -> None:
        if not isinstance(source, ObjectSettings):
            return
        self._check_known_source(f"{key}.source", source.source, sources)
        if isinstance(sources[source.source], ObjectSettings):
            raise self.error(
                f"{key}.source", f"{source.source!r} is an object source too: name the source that holds the files"
            )

    def _check_known_source(self, key: str, name: str, sources: Mapping[str, SourceSettings]) -> None:
        if name not in sources:
            raise self.error(key, f"there is no source {name!r}: {_instead_of(name, sources)}")

    def _routes(self, routes: list[RouteSettings], sources: Mapping[str, SourceSettings]) -> list[RouteSettings]:
        shapes: list[_Shape] = []
        for index, route in enumerate(routes):
            key = f"routes[{index}]"
            self._check_known_source(f"{key}.source", route.source, sources)
            if not route.path.startswith("/") or len(_PARAMETER.findall(route.path)) != 1:
                raise self.error(
                    f"{key}.path",
                    f"{route.path!r} is not a path with one parameter: begin it with a slash, and write the "
                    "parameter as {path:path} (it matches slashes) or {name} (it does not)",
                )
            if route.list and not route.path.endswith(":path}"):
                raise self.error(
                    f"{key}.list",
                    "folders need a path that ends with a parameter like {path:path}: change the path, or do not list",
                )
            if route.path.startswith("/-/"):
                raise self.error(f"{key}.path", "/-/ is reserved for the pages of the service: choose another path")
            shape = _shape(route.path)
            for first, other in enumerate(shapes):
                if other == shape:
                    raise self.error(
                        f"{key}.path", f"{route.path!r} is the path of routes[{first}] too: remove one or change it"
                    )
                if _shadows(other, shape):
                    raise self.error(
                        f"{key}.path",
                        f"{route.path!r} is never reached, because {routes[first].path!r} in routes[{first}] matches "
                        "the same paths: write this route before that one, or remove it",
                    )
            shapes.append(shape)
            self._check_headers(f"{key}.headers", route.headers)
            if route.limits is not None:
                self._check_limits(f"{key}.limits", route.limits)
        return [
            route
            if route.cors is None
            else msgspec.structs.replace(route, cors=self._cors(f"routes[{index}].cors", route.cors))
            for index, route in enumerate(routes)
        ]

    def _check_headers(self, key: str, headers: Mapping[str, str]) -> None:
        first: dict[str, str] = {}
        for name, value in headers.items():
            lower = name.lower()
            if not _HEADER.fullmatch(name):
                raise self.error(key, f"{name!r} is not the name of a header: write one such as X-Robots-Tag")
            if first.setdefault(lower, name) != name:
                raise self.error(f"{key}.{name}", f"the same as {first[lower]}: remove one of them")
            if lower.startswith("access-control-"):
                raise self.error(f"{key}.{name}", "it depends on the request: write cors of the route")
            if lower in _NOT_OF_A_ROUTE:
                raise self.error(f"{key}.{name}", _NOT_OF_A_ROUTE[lower])
            if not _HEADER_VALUE.fullmatch(value):
                raise self.error(f"{key}.{name}", f"{value!r}: give 1 to 4,096 printable characters of ASCII")

    def _cors(self, key: str, cors: CorsSettings) -> CorsSettings:
        for index, origin in enumerate(cors.origins):
            place = f"{key}.origins[{index}]"
            if origin == "*":
                if len(cors.origins) > 1:
                    raise self.error(place, "* allows all origins: remove the others, or this one")
                if cors.credentials:
                    raise self.error(
                        place, "browsers refuse * together with credentials: list the origins, or remove credentials"
                    )
                continue
            match = _ORIGIN.fullmatch(origin)
            if match is None or int(match[2] or 1) > 65_535:
                raise self.error(
                    place,
                    f"{origin!r} is not an origin: write it as browsers do, in lower case and without a path, such as "
                    "https://app.example.org or http://localhost:3000",
                )
            if match[2] and match[2] == _DEFAULT_PORTS.get(match[1]):
                raise self.error(place, f"browsers leave out the port {match[2]}: write {origin.rpartition(':')[0]}")
        age = seconds_of(cors.max_age)
        if age is None:
            raise self.error(f"{key}.max_age", f"{cors.max_age!r} is not a time: give such as 600, 10m or 1h")
        return msgspec.structs.replace(cors, max_age=age)

    def _check_sending(self, key: str, route: RouteSettings, settings: Settings) -> None:
        """Refuse a `send` that the source or the proxy in the settings does not support."""
        name, source = source_of_files(route.source, settings.sources)
        if route.send == "redirect" and not (isinstance(source, StorageSettings) and source.presign is not None):
            raise self.error(
                key,
                f"{name!r} has no presigned URLs to redirect to: add [sources.{name}.presign] to an s3:// storage, or "
                "choose proxy or stream",
            )
        if route.send == "proxy":
            if settings.offload.backend is None:
                raise self.error(key, "no proxy is configured: set offload.backend, or choose stream")
            places = _places_of(source)
            fetches = proxy_kinds()[settings.offload.backend].fetches_urls
            if not fetches and any("://" in place for place in places):
                raise self.error(
                    key,
                    f"{settings.offload.backend} sends only local files, and those of {name!r} are not local: add "
                    f"[sources.{name}.cache] and a rule whose source is the path of the cache, or choose stream",
                )
            if not any(
                _is_within(place, rule.source) or _is_within(rule.source, place)
                for place in places
                for rule in settings.offload.rules
            ):
                raise self.error(
                    key,
                    f"no rule tells the proxy where the files of {name!r} are: add one to [[offload.rules]]"
                    + (f" with the source {places[0]!r}" if places else "")
                    + ", or choose stream",
                )

    def _offload(self, offload: OffloadSettings, sources: Mapping[str, SourceSettings]) -> OffloadSettings:
        rules = []
        kind = None if offload.backend is None else proxy_kinds()[offload.backend]
        places = [place for source in sources.values() for place in _places_of(source)]
        for index, rule in enumerate(offload.rules):
            key = f"offload.rules[{index}]"
            if rule.source in sources:
                rule = self._rule_of_source(key, rule, sources[rule.source], kind)
            source = rule.source if "://" in rule.source else self._absolute(rule.source)
            if not any(_is_within(place, source) or _is_within(source, place) for place in places):
                raise self.error(
                    f"{key}.source",
                    f"no source has files below {source!r}: give a directory or URL of a source "
                    f"({', '.join(dict.fromkeys(places)) or 'there is none'}), or remove the rule",
                )
            if rule.target is None and kind is not None and kind.targets == "uri":
                raise self.error(f"{key}.target", f"missing: {kind.name} needs an internal location, such as /_files/")
            rules.append(RuleSettings(source=source, target=rule.target))
        if kind is not None:
            self._check_options(kind, options_of(offload))
            if kind.folds_case:
                self._check_folded_targets(kind, rules)
        if kind is not None and not rules:
            rules = _rules_for_all(kind, sources)
        if kind is not None and not rules:
            raise self.error(
                "offload.rules", "no source is local, so the proxy sends nothing: add a rule, or remove the backend"
            )
        return msgspec.structs.replace(offload, rules=rules)

    def _rule_of_source(
        self, key: str, rule: RuleSettings, source: SourceSettings, kind: ProxyKind | None
    ) -> RuleSettings:
        """Return a rule whose `source` is the name of a source with the place of the source's files."""
        places = _places_of(source)
        if not places:
            return rule
        directory = self._absolute(rule.source)
        if places[0] != directory and os.path.isdir(directory):
            raise self.error(
                f"{key}.source",
                f"{rule.source!r} is a directory, and a source with files in {places[0]!r}: write './{rule.source}' "
                "for the directory, or rename one of them",
            )
        return RuleSettings(source=places[0], target=rule.target or _target_for(rule.source, kind))

    def _check_options(self, kind: ProxyKind, given: Iterable[str]) -> None:
        for name in given:
            if name not in kind.options:
                raise self.error(f"offload.{name}", f"{kind.name} has {PROXY_OPTIONS[name].lacking}: remove it")

    def _check_folded_targets(self, kind: ProxyKind, rules: Sequence[RuleSettings]) -> None:
        """Refuse targets that differ only in case."""
        first: dict[str, str] = {}
        for index, rule in enumerate(rules):
            target = rule.target or ""
            if first.setdefault(target.lower(), target) != target:
                raise self.error(
                    f"offload.rules[{index}].target",
                    f"{kind.title} ignores case, so {target!r} is the same as {first[target.lower()]!r}: choose "
                    "another target",
                )


def _shape(path: str) -> _Shape:
    """Return the part of a path before its parameter, the convertor, and the part after."""
    before, _, convertor, after = _PARAMETER.split(path)
    return before, convertor or ":str", after


def _shadows(first: _Shape, second: _Shape) -> bool:
    """Return whether the first path certainly matches all that the second matches, line breaks in names aside."""
    (before, convertor, after), (inner_before, inner_convertor, inner_after) = first, second
    if not inner_before.startswith(before) or not inner_after.endswith(after):
        return False
    rest = inner_before.removeprefix(before) + inner_after.removesuffix(after)
    return convertor == ":path" or (convertor == ":str" and inner_convertor in _WITHOUT_SLASH and "/" not in rest)


def _places_of(source: SourceSettings) -> list[str]:
    """Return the directory or the URLs that a rule may name for the files of a source."""
    if (cache := cache_of(source)) is not None:
        return [cache.path]
    if isinstance(source, RemoteSettings):
        return [source.url.rstrip("/")]
    if isinstance(source, StorageSettings) and (parts := urlsplit(source.url)).scheme == "s3":
        places = [source.url.rstrip("/")]
        endpoint = source.options.get("endpoint")
        if endpoint and not source.options.get("virtual_hosted_style_request"):
            places.append(f"{str(endpoint).rstrip('/')}/{parts.netloc}{quote(unquote(parts.path))}".rstrip("/"))
        return places
    directory = directory_of(source)
    return [] if directory is None else [directory]


def _rules_for_all(kind: ProxyKind, sources: Mapping[str, SourceSettings]) -> list[RuleSettings]:
    """Return a rule for each directory from which a source sends files."""
    names: dict[str, str] = {}
    for name, source in sources.items():
        for place in _places_of(source):
            if "://" not in place:
                names.setdefault(place, name)
    return [RuleSettings(source=place, target=_target_for(name, kind)) for place, name in names.items()]


def _target_for(name: str, kind: ProxyKind | None) -> str | None:
    """Return the target of a rule for a source that gives none. None: the proxy finds the files at the same path."""
    return f"/_offload/{name}/" if kind is not None and kind.targets == "uri" else None


def _is_within(inner: str, outer: str) -> bool:
    """Return whether a directory or URL is the same as another or below it, comparing whole segments."""
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def _instead_of(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, 1):
        return f"did you mean {close[0]!r}?"
    return f"use one of {', '.join(known)}" if known else "none is defined yet, so add one"


def _fields(kind: Any) -> dict[str, Any]:
    """Return the names and types of the fields of the Struct in a type, its tag among them, or an empty dict."""
    struct = next((part for part in parts_of(kind) if isinstance(part, type) and issubclass(part, Struct)), None)
    if struct is None:
        return {}
    tag = struct.__struct_config__.tag_field
    return {field.name: field.type for field in msgspec.structs.fields(struct)} | ({tag: str} if tag else {})


def _explained(key: str, message: str, kind: Any) -> tuple[str, str]:
    """Return the full key and the problem for an error message of msgspec."""
    problem, _, place = message.partition(" - at `$")
    place = place.rstrip("`")
    if missing := re.fullmatch("Object missing required field `(.*)`", problem):
        problem, place = "missing", f"{place}.{missing[1]}"
    for name in re.findall(r"\w*[a-z_]\w*", place):
        kind = _fields(kind).get(name)
    if unknown := re.fullmatch("Object contains unknown field `(.*)`", problem):
        return f"{key}{place}.{unknown[1]}", f"unknown key: {_instead_of(unknown[1], _fields(kind))}"
    problem = re.sub("Expected `str` matching regex .*", "the text has the wrong form", problem)
    problem = (problem[:1].lower() + problem[1:]).replace("`", "")
    takes = description_of(kind)
    return key + place, f"{problem}: give {takes}" if takes else f"{problem}: correct it"
