"""Checks the sources of the settings, and makes their paths absolute."""

import os
import re
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import msgspec

from downloadview_async import signer_kinds
from downloadview_async.service.origin import Origin
from downloadview_async.service.schema import converted, fields_of, instead_of
from downloadview_async.service.source_settings import (
    SOURCE_TYPES,
    CacheSettings,
    ChosenSettings,
    EdgeSettings,
    ObjectSettings,
    PathSettings,
    RemoteSettings,
    SourceSettings,
    StorageSettings,
    cache_of,
    directory_of,
    edge_of,
    options_of_edge,
    overlap,
)
from downloadview_async.service.values import CONTROL, bytes_of, seconds_of

_OBJECT_STORE = re.compile("(?:s3|gs|az)://")


def checked_sources(origin: Origin, tables: Mapping[str, Any]) -> dict[str, SourceSettings]:
    """Return the `[sources.NAME]` tables as their types. Raises `ConfigurationError`."""
    sources = {name: _source(origin, name, table) for name, table in tables.items()}
    for name, source in sources.items():
        _check_reference(origin, f"sources.{name}", source, sources)
    _check_caches(origin, sources)
    return sources


def _source(origin: Origin, name: str, table: Any) -> SourceSettings:
    key = f"sources.{name}"
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise origin.error(key, "not a valid source name: use letters, digits, - and _")
    if not isinstance(table, dict):
        problem = f"write it as [{key}]"
        if any(name in fields_of(kind) for kind in SOURCE_TYPES.values()):
            problem = "a source has a name: write its keys below such as [sources.files]"
        raise origin.error(key, f"must be a table: {problem}")
    if "type" not in table:
        raise origin.error(f"{key}.type", f"missing: give one of {', '.join(SOURCE_TYPES)}")
    kind = SOURCE_TYPES.get(str(table["type"]))
    if kind is None:
        raise origin.error(
            f"{key}.type", f"unknown type {table['type']!r}: {instead_of(str(table['type']), SOURCE_TYPES)}"
        )
    source = cast("SourceSettings", converted(origin, key, table, kind, because=f"{key}.type"))
    if isinstance(source, StorageSettings | RemoteSettings):
        _check_url(origin, f"{key}.url", source.url)
    if (cache := cache_of(source)) is not None:
        source = msgspec.structs.replace(source, cache=_cache(origin, f"{key}.cache", cache))
    if (edge := edge_of(source)) is not None:
        source = msgspec.structs.replace(source, edge=_edge(origin, f"{key}.edge", edge, source))
    if isinstance(source, PathSettings):
        return msgspec.structs.replace(source, root=origin.absolute(f"{key}.root", source.root))
    if isinstance(source, ChosenSettings):
        return ChosenSettings(paths=[origin.absolute(f"{key}.paths", path) for path in source.paths])
    if isinstance(source, StorageSettings) and re.match("file:[^/]", source.url):
        path = os.fsdecode(unquote_to_bytes(os.fsencode(source.url.removeprefix("file:"))))
        path = origin.absolute(f"{key}.url", path)
        source = msgspec.structs.replace(source, url=f"file://{quote(os.fsencode(path))}")
    if isinstance(source, StorageSettings) and not _OBJECT_STORE.match(source.url):
        for option in ("options", "presign", "max_connections"):
            if getattr(source, option):
                raise origin.error(f"{key}.{option}", f"only s3://, gs:// and az:// storages have it: remove {option}")
    presign = source.presign if isinstance(source, StorageSettings) else None
    if presign is not None and seconds_of(presign.expires) is None:
        raise origin.error(f"{key}.presign.expires", f"{presign.expires!r} is too long: give at most 7d")
    if isinstance(source, StorageSettings) and source.presign is not None and source.cache is not None:
        raise origin.error(
            f"{key}.presign",
            "a source cannot have both presign and cache: remove one of them, or define two sources",
        )
    for option in ("max_connections", "names"):
        if isinstance(source, StorageSettings) and option in source.options:
            raise origin.error(f"{key}.options.{option}", f"not an option of obstore: write it in [{key}] itself")
    return source


def _edge(origin: Origin, key: str, edge: EdgeSettings, source: SourceSettings) -> EdgeSettings:
    """Return the table with its time in seconds and with absolute paths. Raises `ConfigurationError`."""
    kind = signer_kinds()[edge.kind]
    for other, needed in (("presign", "two sources"), ("cache", "two sources, of which one has the cache")):
        if getattr(source, other, None) is not None:
            raise origin.error(
                key, f"a source cannot have both edge and {other}: remove one of them, or define {needed}"
            )
    if isinstance(source, StorageSettings) and source.url.startswith("memory:"):
        raise origin.error(key, "no other server has the files in this memory: name another storage")
    changed: dict[str, Any] = {"expires": seconds_of(edge.expires)}
    if not changed["expires"]:
        raise origin.error(f"{key}.expires", f"{edge.expires!r} is not a time: give such as 30s, 10m, 1h or 7d")
    for name, value in options_of_edge(edge).items():
        if (option := kind.options.get(name)) is None:
            raise origin.error(f"{key}.{name}", f"{kind.title} has no such option: {instead_of(name, kind.options)}")
        if option.is_path and "-----BEGIN" not in value:
            changed[name] = origin.absolute(f"{key}.{name}", value)
    return msgspec.structs.replace(edge, **changed)


def _check_url(origin: Origin, key: str, url: str) -> None:
    try:
        port = urlsplit(url).port
    except ValueError as exc:
        raise origin.error(key, f"{url!r} is not a URL ({exc}): correct it") from exc
    if port == 0:
        raise origin.error(key, f"{url!r} has the port 0: give the port that the server listens on")
    if CONTROL.search(unquote(url)):
        raise origin.error(key, f"a control character in {url!r}: remove it")


def _cache(origin: Origin, key: str, cache: CacheSettings) -> CacheSettings:
    size = bytes_of(cache.max_bytes)
    if not size:
        raise origin.error(
            f"{key}.max_bytes",
            f"{cache.max_bytes!r} is not a size: give a number of bytes, or a size such as 10GiB",
        )
    times: dict[str, float] = {}
    for name in ("max_age", "stale_while_revalidate", "stale_if_error"):
        value = getattr(cache, name)
        seconds = seconds_of(value)
        if seconds is None:
            raise origin.error(
                f"{key}.{name}", f"{value!r} is not a time: give a number of seconds, or a time such as 10m or 1d"
            )
        times[name] = seconds
    return CacheSettings(path=origin.absolute(f"{key}.path", cache.path), max_bytes=size, **times)


def _check_caches(origin: Origin, sources: Mapping[str, SourceSettings]) -> None:
    """Refuse a cache in a directory that is served, and two caches in the same directory with different limits."""
    first: dict[str, tuple[str, CacheSettings]] = {}
    for name, source in sources.items():
        if (cache := cache_of(source)) is None:
            continue
        key = f"sources.{name}.cache"
        for other, served in sources.items():
            directory = directory_of(served)
            paths = (os.path.realpath(cache.path), os.path.realpath(directory or ""))
            if directory and overlap(*paths):
                raise origin.error(
                    f"{key}.path", f"the source {other!r} serves {directory!r}: give the cache another directory"
                )
        known, settings = first.setdefault(cache.path, (name, cache))
        if settings != cache:
            raise origin.error(
                key,
                f"the cache {cache.path!r} of {known!r} has different limits: give both the same, or another path",
            )


def _check_reference(origin: Origin, key: str, source: SourceSettings, sources: Mapping[str, SourceSettings]) -> None:
    if not isinstance(source, ObjectSettings):
        return
    check_known_source(origin, f"{key}.source", source.source, sources)
    if isinstance(sources[source.source], ObjectSettings):
        raise origin.error(
            f"{key}.source", f"{source.source!r} is an object source too: name the source that holds the files"
        )


def check_known_source(origin: Origin, key: str, name: str, sources: Mapping[str, SourceSettings]) -> None:
    """Raise `ConfigurationError` if there is no source of this name."""
    if name not in sources:
        raise origin.error(key, f"there is no source {name!r}: {instead_of(name, sources)}")
