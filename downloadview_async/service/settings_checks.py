"""Turns the tables of the settings into their types, with absolute paths, and refuses what does not fit together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from downloadview_async.service.offload_checks import check_sending, checked_offload
from downloadview_async.service.origin import COMMAND_LINE, Origin
from downloadview_async.service.route_checks import check_limits, checked_routes
from downloadview_async.service.schema import converted, fields_of, instead_of
from downloadview_async.service.settings import (
    TABLES,
    AccountsSettings,
    ArchivesSettings,
    DigestsSettings,
    LimitsSettings,
    LinksSettings,
    PurgeSettings,
    ServerSettings,
    Settings,
    UsersSettings,
)
from downloadview_async.service.source_checks import checked_sources
from downloadview_async.service.source_settings import (
    SOURCE_TYPES,
    PathSettings,
    SourceSettings,
    cache_of,
    digests_mode,
)
from downloadview_async.service.values import CONTROL, KEY_LINE, bytes_of, is_server, seconds_of

_Table = TypeVar("_Table", bound=Struct)

_SERVER_PATHS = ("uds", "pid_file", "ssl_keyfile", "ssl_certfile")
_MAY_HAVE_LINES = re.compile(r"sources\.[^.]+\.(options|edge)\..+|server\.ssl_keyfile_password|(links|purge)\.keys")


def checked_settings(origin: Origin, data: Mapping[str, Any]) -> Settings:
    """Return the settings that all tables together give. Raises `ConfigurationError`."""
    _check_texts(origin, data)
    for key, value in data.items():
        if key not in TABLES:
            place = None if isinstance(value, dict | list) else _place_for(key)
            raise origin.error(key, f"unknown key: {place or instead_of(key, TABLES)}")
    if isinstance(data.get("routes"), dict):
        problem = (
            "expected array, got object: give tables, each written as [[routes]] with two brackets, even a single one"
        )
        raise origin.error("routes", problem)
    tables = _Tables(origin, data)
    server = _server(origin, tables.read("server"))
    sources = checked_sources(origin, tables.read("sources"))
    routes = checked_routes(origin, converted(origin, "routes", data.get("routes", []), TABLES["routes"]), sources)
    links = _links(origin, tables.read("links"), server) if "links" in data else None
    users = _users(origin, tables.read("users")) if "users" in data else None
    limits: LimitsSettings | None = tables.read("limits") if "limits" in data else None
    if limits is not None:
        check_limits(origin, "limits", limits)
    digests: DigestsSettings | None = tables.read("digests") if "digests" in data else None
    if digests is not None and not is_server(digests.store):
        digests = _with_paths(origin, "digests", digests, "store")
    _check_digests(origin, digests, sources)
    settings = Settings(
        origin=origin,
        server=server,
        sources=sources,
        routes=routes,
        offload=checked_offload(origin, tables.read("offload"), sources),
        links=links,
        users=users,
        limits=limits,
        archives=_archives(origin, tables.read("archives")),
        accounts=_accounts(origin, tables.read("accounts")),
        log=_with_paths(origin, "log", tables.read("log"), "path") if "log" in data else None,
        metrics=_with_paths(origin, "metrics", tables.read("metrics"), "directory") if "metrics" in data else None,
        purge=_purge(origin, tables.read("purge"), sources) if "purge" in data else None,
        pages=_with_paths(origin, "pages", tables.read("pages"), "logo", "templates"),
        digests=digests,
        shared=tables.read("shared"),
        content_types=tables.read("content_types"),
    )
    _check_needs_of_routes(settings)
    return settings


def _place_for(key: str) -> str | None:
    """Return the end of an error about a key that belongs into a table, or None if no table has it."""
    kinds = {f"[{table}]": kind for table, kind in TABLES.items() if table != "routes"}
    kinds["[[routes]]"] = TABLES["routes"]
    tables = [table for table, kind in kinds.items() if key in fields_of(kind)]
    if any(key in fields_of(kind) for kind in SOURCE_TYPES.values()):
        tables.append("[sources.NAME]")
    return f"write it below {' or '.join(tables)}" if tables else None


@dataclass(frozen=True, slots=True)
class _Tables:
    """The tables of the settings as they were written."""

    origin: Origin
    data: Mapping[str, Any]

    def read(self, key: str) -> Any:
        """Return a table as its type; one that is not given has its defaults. Raises `ConfigurationError`."""
        table = self.data.get(key, {})
        if not isinstance(table, dict):
            problem = f"must be a table: write it as [{key}] in TOML, or as a JSON object in a variable"
            raise self.origin.error(key, problem)
        return converted(self.origin, key, table, TABLES[key])


def _with_paths(origin: Origin, key: str, table: _Table, *names: str) -> _Table:
    """Return a table whose paths are absolute. key: that of the table. names: those of the paths, which may be None."""
    paths = {name: origin.absolute(f"{key}.{name}", path) for name in names if (path := getattr(table, name))}
    return msgspec.structs.replace(table, **paths)


def _check_needs_of_routes(settings: Settings) -> None:
    """Refuse a route that needs a table which is missing."""
    for index, route in enumerate(settings.routes):
        key, access = f"routes[{index}]", route.access or ()
        check_sending(f"{key}.send", route, settings)
        if settings.links is None and {"signed", "secure_link"} & {*access}:
            raise settings.error(f"{key}.access", "links need keys: add a [links] table with keys")
        if route.downloads and not route.list:
            raise settings.error(f"{key}.downloads", "listings show them: set list, or remove it")
        if route.downloads and settings.accounts.database is None:
            raise settings.error(f"{key}.downloads", "no downloads are counted: set accounts.database, or remove it")
        if settings.users is None and any(one.startswith("user:") for one in access):
            raise settings.error(f"{key}.access", "there are no users: add a [users] table with a file or a header")


def _check_texts(origin: Origin, data: Mapping[str, Any]) -> None:
    """Refuse control characters. In options of a store and in the password of a key, refuse only NUL."""
    left: list[tuple[str, Any]] = [("", data)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                if CONTROL.search(name):
                    raise origin.error(key, f"a control character in the key {name!r}: remove it")
                left.append((f"{key}.{name}".lstrip("."), inner))
        elif isinstance(value, list):
            left += [(f"{key}[{index}]", inner) for index, inner in enumerate(value)]
        elif isinstance(value, str):
            forbidden = "\0" if _MAY_HAVE_LINES.fullmatch(key) else CONTROL
            if (match := re.search(forbidden, value)) is not None:
                is_path = re.match("[A-Za-z]:", value) is not None
                instead = "write the backslashes in single quotes" if is_path else "remove it"
                raise origin.error(key, f"a control character ({match[0]!r}): {instead}")


def _server(origin: Origin, server: ServerSettings) -> ServerSettings:
    """Return the table with absolute paths; those from the command line stay relative to the current directory."""
    names = [name for name in _SERVER_PATHS if origin.keys.get(f"server.{name}") != COMMAND_LINE]
    return _with_paths(origin, "server", server, *names)


def _links(origin: Origin, links: LinksSettings, server: ServerSettings) -> LinksSettings:
    ages = {}
    for name in ("max_age", "session_age"):
        value = getattr(links, name)
        age = seconds_of(value)
        if not age or age < 1:
            raise origin.error(
                f"links.{name}", f"{value!r} is not a time of a second or more: give such as 10m, 2h or 7d"
            )
        ages[name] = age
    store = links.store
    if store == "memory:" and server.workers > 1:
        raise origin.error(
            "links.store",
            f"memory: is for one worker, and there are {server.workers}: give such as sqlite:links.db",
            because="server.workers",
        )
    if store is not None and store.startswith("sqlite:"):
        store = f"sqlite:{origin.absolute('links.store', store.removeprefix('sqlite:'))}"
    return msgspec.structs.replace(links, keys=_keys(origin, "links.keys", links.keys), store=store, **ages)


def _keys(origin: Origin, key: str, keys: str) -> str:
    """Return keys as they are, or the absolute path of their file."""
    return keys if KEY_LINE.search(keys) else origin.absolute(key, keys)


def _purge(origin: Origin, purge: PurgeSettings, sources: Mapping[str, SourceSettings]) -> PurgeSettings:
    if not any(map(cache_of, sources.values())):
        raise origin.error("purge", "no source has a cache: add a [sources.NAME.cache] table, or remove this one")
    return msgspec.structs.replace(purge, keys=_keys(origin, "purge.keys", purge.keys))


def _check_digests(origin: Origin, digests: DigestsSettings | None, sources: Mapping[str, SourceSettings]) -> None:
    """Refuse a source whose digests would be kept nowhere, and one whose sidecars would not be read."""
    for name, source in sources.items():
        sidecars, mode = isinstance(source, PathSettings) and source.sidecars, digests_mode(source)
        if mode != "off" and digests is None and not (sidecars and mode == "known"):
            raise origin.error(f"sources.{name}.digests", "there is no store: add a [digests] table with a store")
        if sidecars and mode == "off":
            raise origin.error(f"sources.{name}.sidecars", 'digests are off: set digests = "known" too')
        if isinstance(source, PathSettings) and source.etag == "digest" and mode == "off":
            raise origin.error(f"sources.{name}.etag", 'digests are off: set digests = "background" too')


def _users(origin: Origin, users: UsersSettings) -> UsersSettings:
    if (users.file is None) == (users.header is None):
        raise origin.error("users", "give either a file or a header, and not both")
    return _with_paths(origin, "users", users, "file")


def _archives(origin: Origin, archives: ArchivesSettings) -> ArchivesSettings:
    size = None if archives.max_bytes is None else bytes_of(archives.max_bytes)
    if archives.max_bytes is not None and not size:
        raise origin.error(
            "archives.max_bytes",
            f"{archives.max_bytes!r} is not a size: give a number of bytes, or a size such as 10GiB",
        )
    if not is_server(archives.checksums or ""):
        archives = _with_paths(origin, "archives", archives, "checksums")
    return msgspec.structs.replace(archives, max_bytes=size)


def _accounts(origin: Origin, accounts: AccountsSettings) -> AccountsSettings:
    keep = seconds_of(accounts.keep)
    if not keep:
        raise origin.error("accounts.keep", f"{accounts.keep!r} is not a time: give such as 90d or 24h")
    if accounts.proxy_log is not None and accounts.database is None:
        raise origin.error("accounts.database", "missing: the log of the proxy is counted in a database")
    return msgspec.structs.replace(_with_paths(origin, "accounts", accounts, "proxy_log"), keep=keep)
