"""Makes the sources that the settings name, with their databases, caches and storages."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from downloadview_async import (
    Cache,
    CachedSource,
    ObjectSource,
    ObjectStorage,
    PathSource,
    RemoteSource,
    Source,
    Storage,
    StorageSource,
    VirtualSource,
    storage_from_url,
)
from downloadview_async.service.chosen_files import ChosenFiles
from downloadview_async.service.functions import function_of
from downloadview_async.service.settings import Settings
from downloadview_async.service.source_settings import (
    ChosenSettings,
    ObjectSettings,
    PathSettings,
    RemoteSettings,
    StorageSettings,
    VirtualSettings,
    cache_of,
    digests_mode,
)
from downloadview_async.service.values import bytes_of, seconds_of

if TYPE_CHECKING:  # it needs SQLAlchemy, which is optional
    from downloadview_async.service.database import Documents

_NOT_OF_THE_SOURCE = frozenset({"cache", "digests", "edge", "sidecars", "max_requests", "queue_timeout"})


def databases_of(settings: Settings) -> dict[str, "Documents"]:
    """Return the database of each source that is a table. Raises `ConfigurationError` without SQLAlchemy."""
    return {
        name: _database(settings, name, source)
        for name, source in settings.sources.items()
        if isinstance(source, ObjectSettings)
    }


def _database(settings: Settings, name: str, source: ObjectSettings) -> "Documents":
    try:
        from downloadview_async.service.database import Documents
    except ModuleNotFoundError as exc:
        raise settings.error(
            f"sources.{name}.type",
            f"an object source needs {exc.name}: install downloadview_async with its extra `sqlalchemy`",
        ) from exc
    with settings.blaming(f"sources.{name}"):
        return Documents(source, directory=settings.origin.directory)


@asynccontextmanager
async def opened_databases(settings: Settings, databases: Mapping[str, "Documents"]) -> AsyncIterator[None]:
    """Open the databases, and close them at the end. Raises `ConfigurationError` for one that cannot be used."""
    async with contextlib.AsyncExitStack() as stack:
        for name, database in databases.items():
            with settings.blaming(f"sources.{name}"):
                await stack.enter_async_context(database.opened())
        yield


def caches_of(settings: Settings) -> dict[str, Cache]:
    """Return the cache of each source that has one. Sources with the same directory share a cache."""
    caches: dict[str, Cache] = {}
    of_path: dict[str, Cache] = {}
    for name, source in settings.sources.items():
        if (cache := cache_of(source)) is None:
            continue
        if cache.path not in of_path:
            max_bytes = bytes_of(cache.max_bytes)
            assert max_bytes is not None  # the settings have been checked
            with settings.blaming(f"sources.{name}.cache.path"):
                of_path[cache.path] = Cache(
                    cache.path,
                    max_bytes=max_bytes,
                    max_age=_seconds(cache.max_age),
                    stale_while_revalidate=_seconds(cache.stale_while_revalidate),
                    stale_if_error=_seconds(cache.stale_if_error),
                )
        caches[name] = of_path[cache.path]
    return caches


def _seconds(value: float | str) -> float:
    seconds = seconds_of(value)
    assert seconds is not None  # the settings have been checked
    return seconds


def sources_of(
    settings: Settings,
    databases: Mapping[str, "Documents"] | None = None,
    caches: Mapping[str, Cache] | None = None,
) -> dict[str, Source]:
    """Return the sources in the settings by their names.

    databases, caches: those that the application opens; by default, others of the same kind.

    Raises `ConfigurationError` for a source that cannot be made.
    """
    databases = databases_of(settings) if databases is None else databases
    caches = caches_of(settings) if caches is None else caches
    sources: dict[str, Source] = {}
    for name, source in settings.sources.items():
        key = f"sources.{name}"
        options = {
            field: value for field, value in msgspec.structs.asdict(source).items() if field not in _NOT_OF_THE_SOURCE
        }
        match source:
            case PathSettings():
                options["etag"] = "inode" if source.etag == "digest" else source.etag
                with settings.blaming(f"{key}.root"):
                    sources[name] = PathSource(options.pop("root"), **options)
            case StorageSettings():
                sources[name] = StorageSource(_storage(settings, name, source), names=source.names)
            case RemoteSettings():
                with settings.blaming(f"{key}.url"):
                    sources[name] = RemoteSource(options.pop("url"), lists=options.pop("list"), **options)
            case ChosenSettings():
                with settings.blaming(f"{key}.paths"):
                    sources[name] = ChosenFiles(source.paths)
            case VirtualSettings():
                factory = function_of(settings, f"{key}.factory", source.factory)
                with settings.blaming(f"{key}.factory"):
                    sources[name] = VirtualSource(factory)
    for name, cache in caches.items():
        sources[name] = CachedSource(
            sources[name],
            cache,
            name=f"{name} {place_of(settings, name, sources[name])}",
            digests=["sha-256"] if digests_mode(settings.sources[name]) == "background" else [],
        )
    for name, source in settings.sources.items():
        if isinstance(source, ObjectSettings):
            sources[name] = ObjectSource(
                databases[name].get,
                source=sources[source.source],
                file_field="file",
                basename_field="filename",
                mime_type_field="content_type",
                list_folder=databases[name].list_folder if source.list else None,
            )
    return sources


def _storage(settings: Settings, name: str, source: StorageSettings) -> Storage:
    """Return the storage of a source. Raises `ConfigurationError`, which names the option that is wrong."""
    limit = {} if source.max_connections is None else {"max_connections": source.max_connections}
    make = partial(storage_from_url, source.url, names=source.names or "portable", **limit)
    options: dict[str, Any] = {**source.options}
    try:
        return make(**options)
    except Exception:
        # errors of obstore rarely name the option: it is the one without which the storage can be made
        wrong = "url"
        others = {f"options.{left}": {key: options[key] for key in options if key != left} for left in options}
        for key, fewer in {"options": dict[str, Any](), **others}.items():
            with contextlib.suppress(Exception):
                make(**fewer)
                wrong = key
        with settings.blaming(f"sources.{name}.{wrong}"):
            raise


def storage_of(source: Source) -> Storage | None:
    """Return the storage of a source, whether or not it has a cache; None for other sources."""
    if isinstance(source, CachedSource):
        source = source.source
    return source.storage if isinstance(source, StorageSource) else None


def place_of(settings: Settings, name: str, source: Source) -> str:
    """Return the place of a source's files, which is part of the key of its cached copies."""
    match settings.sources[name]:
        case PathSettings(root=root):
            return root
        case ChosenSettings(paths=paths):
            return "\n".join(paths)
        case ObjectSettings(table=table):
            return table
        case VirtualSettings(factory=factory):
            return f"{factory} in {settings.origin.directory}"
        case StorageSettings(url=url):
            storage = storage_of(source)
            return (storage.place if isinstance(storage, ObjectStorage) else None) or url
        case RemoteSettings(url=url):
            return url
    raise AssertionError("there are no other sources")
