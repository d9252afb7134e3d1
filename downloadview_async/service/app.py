"""Builds the ASGI application from the settings: sources, routes, the offload backend and the service's pages."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from downloadview_async import (
    ArchiveLimits,
    ArchiveOptions,
    Cache,
    CachedSource,
    Completions,
    Digests,
    Download,
    Entry,
    FileError,
    FileMissing,
    MemoryChecksums,
    ObjectSource,
    ObjectStorage,
    OffloadBackend,
    OffloadMiddleware,
    PathSource,
    PresignedRedirect,
    ProxyUsers,
    RemoteSource,
    Source,
    SQLiteChecksums,
    Storage,
    StorageSource,
    SupportsListing,
    URLSigner,
    Users,
    VirtualSource,
    add_content_types,
    download_error,
    proxy_kinds,
    storage_from_url,
)
from downloadview_async.service.access import (
    USER,
    access_of,
    keeping_peers,
    opened_store,
    signer_of,
    store_of,
    users_of,
)
from downloadview_async.service.accounts import (
    Service,
    check_completions,
    completions_of,
    opened_completions,
    store_of_completions,
)
from downloadview_async.service.chosen_files import ChosenFiles
from downloadview_async.service.config_loader import CONFIG, load_settings
from downloadview_async.service.digests import digests_of
from downloadview_async.service.functions import function_of
from downloadview_async.service.health import PRIVATE, CachePage, Health, check_directory, check_store
from downloadview_async.service.limits import ServiceLimits, opened_limits, service_limits
from downloadview_async.service.logs import OneLineFailures, log_in_single_lines
from downloadview_async.service.metrics import PAGE as METRICS
from downloadview_async.service.metrics import MetricsPage, metrics_of
from downloadview_async.service.pages import ServicePages
from downloadview_async.service.pages.errors import ErrorPages
from downloadview_async.service.pages.index import IndexPage, folder_of
from downloadview_async.service.settings import (
    ChosenSettings,
    ObjectSettings,
    PathSettings,
    RemoteSettings,
    RouteSettings,
    Settings,
    StorageSettings,
    VirtualSettings,
    bytes_of,
    cache_of,
    digests_mode,
    directory_of,
    options_of,
    rules_of,
    seconds_of,
    source_of_files,
)
from downloadview_async.service.sharing import Sharing, users_in
from downloadview_async.service.shutdown import EndsInTime, ignore_hangup

_CORS_REQUEST_HEADERS = ["If-Modified-Since", "If-None-Match", "If-Range", "Range", "Want-Repr-Digest"]
_CORS_EXPOSED = [
    "Accept-Ranges",
    "Content-Range",
    "Content-Length",
    "Content-Disposition",
    "ETag",
    "Last-Modified",
    "Repr-Digest",
]

_NOT_OF_THE_SOURCE = frozenset({"cache", "digests", "sidecars", "max_requests", "queue_timeout"})

_logger = logging.getLogger("downloadview_async")


class _Database(Protocol):
    """The interface of `service.database.Documents`, which is imported only if needed: SQLAlchemy is optional."""

    async def get(self, key: str) -> Any: ...
    def list_folder(self, folder: str) -> AsyncIterator[Entry]: ...
    async def check(self) -> None: ...
    def opened(self) -> contextlib.AbstractAsyncContextManager[None]: ...


def build(settings: Settings) -> Starlette:
    """Return the service as an ASGI application. Its lifespan opens and closes caches, stores and databases.

    Raises `ConfigurationError` if something that the settings name does not exist.
    """
    for suffix, content_type in settings.content_types.items():
        try:
            add_content_types({suffix: content_type})
        except ValueError as exc:
            raise settings.error(f'content_types."{suffix}"', str(exc)) from exc
    databases = _databases(settings)
    caches = _caches(settings)
    sources = _sources(settings, databases, caches)
    digests = digests_of(settings, sources)
    checks: dict[str, Callable[[], Awaitable[None]]] = {}
    for name, source in settings.sources.items():
        if (directory := directory_of(source)) is not None:
            checks[name] = check_directory(directory)
        if (cache := caches.get(name)) is not None:
            checks[f"{name}.cache"] = check_directory(cache.path, written=True)
    probes: dict[str, ObjectStorage] = {}
    for name, source in settings.sources.items():
        if isinstance(source, StorageSettings) and isinstance(_storage_of(sources[name]), ObjectStorage):
            options: dict[str, Any] = {**source.options}
            probes[name] = ObjectStorage(source.url, max_connections=1, **options)
    checks |= {name: check_store(storage) for name, storage in probes.items()}
    checks |= {name: database.check for name, database in databases.items()}
    store = store_of(settings)
    signer = signer_of(settings, store)
    completions = completions_of(settings)
    if store is not None and settings.links is not None and settings.links.when_store_fails == "refuse":
        checks["links.store"] = store.check
    limits = service_limits(settings)
    if limits.common is not None and settings.limits is not None and settings.limits.when_store_fails == "refuse":
        checks["limits.store"] = limits.common.check

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            log_in_single_lines()
            if not settings.routes:
                _logger.warning("No route is configured, so every download gives 404: add [[routes]] tables")
            for cache in caches.values():
                await cache.sweep()
            storages = [_storage_of(source) for source in sources.values()]
            for storage in [*storages, *probes.values()]:
                if isinstance(storage, ObjectStorage):
                    stack.push_async_callback(storage.aclose)
            for source in sources.values():
                if isinstance(source, RemoteSource | CachedSource):
                    stack.push_async_callback(source.aclose)
            for cache in caches.values():
                stack.push_async_callback(cache.aclose)
            await stack.enter_async_context(_opened(settings, databases))
            await stack.enter_async_context(opened_store(settings, store))
            await stack.enter_async_context(opened_limits(settings, limits))
            await stack.enter_async_context(opened_completions(settings, completions))
            for known in digests.values():
                await stack.enter_async_context(known.running())
            if metrics is not None:
                await stack.enter_async_context(metrics.running())
            yield

    metrics = metrics_of(settings, sources, caches, signer, limits)
    health = Health(checks)
    pages = ServicePages(settings)
    middleware = [Middleware(OneLineFailures), Middleware(ErrorPages, pages=pages)]
    if (backend := _backend(settings, sources)) is not None:
        middleware.append(Middleware(OffloadMiddleware, backend=backend, proxy=settings.offload.backend))
    app = Service(
        settings,
        metrics,
        [] if completions is None else [completions],
        routes=[
            *(
                []
                if "/" in map(folder_of, settings.routes)
                else [Route("/", IndexPage(settings, pages, sources).answer)]
            ),
            Route("/-/livez", health.livez),
            Route("/-/readyz", health.readyz),
            *([] if metrics is None else [Route(f"{PRIVATE}{METRICS}", MetricsPage(metrics).answer)]),
            *([Route("/-/cache", CachePage(caches).answer)] if caches else []),
            *_routes(settings, sources, signer, caches, digests, limits, completions),
            Route("/favicon.ico", pages.favicon),
        ],
        middleware=middleware,
        exception_handlers={FileError: download_error, 404: _not_found, 405: _method_not_allowed},
        lifespan=lifespan,
    )
    # /files gives 404 like any unknown path: a redirect to /files/ would reveal that it exists
    app.router.redirect_slashes = False
    return app


def app_from_environment(default: Path | None = None) -> Starlette:
    """Return the service for the settings file that DOWNLOADVIEW_CONFIG names, and the variables that override it.

    default: the settings file if DOWNLOADVIEW_CONFIG is not set. Raises `ConfigurationError`.
    """
    return build(load_settings(os.environ.get(CONFIG) or default, environ=os.environ))


def worker_app() -> ASGIApp:
    """Return the service for one of several worker processes, wrapped so that the process ends in time."""
    ignore_hangup()
    settings = load_settings(os.environ.get(CONFIG), environ=os.environ).of_own_server()
    return keeping_peers(EndsInTime(build(settings)), settings)


async def check_databases(settings: Settings) -> None:
    """Open and close each database and store, so that errors show before the server and its workers start.

    Raises `ConfigurationError`, as the start of the application would.
    """
    async with (
        _opened(settings, _databases(settings)),
        opened_store(settings, store_of(settings)),
        opened_limits(settings, service_limits(settings), warns=False),  # the application does that
    ):
        if (counted := store_of_completions(settings)) is not None:
            await check_completions(settings, counted)


@asynccontextmanager
async def _opened(settings: Settings, databases: Mapping[str, _Database]) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for name, database in databases.items():
            with settings.blaming(f"sources.{name}"):
                await stack.enter_async_context(database.opened())
        yield


def _databases(settings: Settings) -> dict[str, _Database]:
    return {
        name: _database(settings, name, source)
        for name, source in settings.sources.items()
        if isinstance(source, ObjectSettings)
    }


def _caches(settings: Settings) -> dict[str, Cache]:
    """Return the cache of each source that has one. Sources with the same directory share a cache."""
    caches: dict[str, Cache] = {}
    of_path: dict[str, Cache] = {}
    for name, source in settings.sources.items():
        if (cache := cache_of(source)) is None:
            continue
        if cache.path not in of_path:
            max_bytes, max_age = bytes_of(cache.max_bytes), seconds_of(cache.max_age)
            assert max_bytes is not None
            assert max_age is not None  # the settings have been checked
            with settings.blaming(f"sources.{name}.cache.path"):
                of_path[cache.path] = Cache(cache.path, max_bytes=max_bytes, max_age=max_age)
        caches[name] = of_path[cache.path]
    return caches


def sources_of(settings: Settings) -> dict[str, Source]:
    """Return the sources in the settings by their names. Raises `ConfigurationError`, as `build` does."""
    return _sources(settings, _databases(settings), _caches(settings))


def _sources(settings: Settings, databases: Mapping[str, _Database], caches: Mapping[str, Cache]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for name, source in settings.sources.items():
        key = f"sources.{name}"
        options = {
            field: value for field, value in msgspec.structs.asdict(source).items() if field not in _NOT_OF_THE_SOURCE
        }
        match source:
            case PathSettings():
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
            name=f"{name} {_place_of(settings, name, sources[name])}",
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


def _storage_of(source: Source) -> Storage | None:
    """Return the storage of a source, whether or not it has a cache; None for other sources."""
    if isinstance(source, CachedSource):
        source = source.source
    return source.storage if isinstance(source, StorageSource) else None


def _database(settings: Settings, name: str, source: ObjectSettings) -> _Database:
    try:
        from downloadview_async.service.database import Documents
    except ModuleNotFoundError as exc:
        raise settings.error(
            f"sources.{name}.type",
            f"an object source needs {exc.name}: install downloadview_async with its extra `sqlalchemy`",
        ) from exc
    with settings.blaming(f"sources.{name}"):
        return Documents(source, directory=settings.directory)


def _routes(
    settings: Settings,
    sources: Mapping[str, Source],
    signer: URLSigner | None,
    caches: Mapping[str, Cache],
    digests: Mapping[str, Digests],
    limits: ServiceLimits,
    completions: Completions | None,
) -> Iterator[Route]:
    redirects = {name: _redirect(settings, name, source) for name, source in sources.items()}
    users = users_of(settings)
    for index, route in enumerate(settings.routes):
        where, _ = source_of_files(route.source, settings.sources)
        sharers = users_in(route.access or ()) if "signed" in (route.access or ()) else []
        counts = completions.store if route.downloads and completions is not None else None
        shown = None if counts is None else partial(counts.downloads_of, route.source)
        pages = ServicePages(settings, route.name, shares=bool(sharers), downloads=shown) if route.list else None
        for option, needs_folders in (("list", route.list), ("archive", route.archive)):
            if needs_folders and not isinstance(sources[route.source], SupportsListing):
                problem = f"the source {route.source!r} cannot list its folders: remove this, or name another source"
                raise settings.error(f"routes[{index}].{option}", problem)
        endpoint: ASGIApp = Download(
            sources[route.source],
            attachment=route.disposition == "attachment",
            cache_control=route.cache_control,
            redirect=redirects[where] if route.send == "redirect" else None,
            offload=route.send != "stream",
            access=access_of(settings, index, route, signer, users),
            headers=route.headers,
            limits=limits.of(index, route.source),
            hide=route.hide,
            listing=pages or False,
            digests=digests.get(route.source),
            archive=_archive(settings, route.source, sources[route.source], caches) if route.archive else False,
            source_name=route.source,
        )
        if pages is not None and sharers:
            endpoint = _sharing(settings, endpoint, pages, sharers, signer, users)
        if (folder := folder_of(route)) is not None and len(folder) > 1 and route.access is None:
            yield Route(unquote(folder[:-1]), _redirect_to_folder)
        try:
            yield Route(route.path, endpoint, middleware=_cors(route, isinstance(users, Users)))
        except (AssertionError, ValueError) as exc:
            raise settings.error(f"routes[{index}].path", f"{exc}: write the parameter as {{path:path}}") from exc


def _archive(settings: Settings, name: str, source: Source, caches: Mapping[str, Cache]) -> ArchiveOptions:
    """Return the options for the archives of a source. They are kept in the cache of the source, if it has one."""
    archives = settings.archives
    assert not isinstance(archives.max_bytes, str)  # the settings have been checked
    return ArchiveOptions(
        limits=ArchiveLimits(files=archives.max_files, size=archives.max_bytes, depth=archives.max_depth),
        checksums=MemoryChecksums() if archives.checksums is None else SQLiteChecksums(archives.checksums),
        cache=caches.get(name),
        name=f"{name} {_place_of(settings, name, source)}",
        per_client=archives.per_client or None,
    )


def _sharing(
    settings: Settings,
    download: ASGIApp,
    pages: ServicePages,
    sharers: list[str],
    signer: URLSigner | None,
    users: Users | ProxyUsers | None,
) -> ASGIApp:
    """Return the endpoint of a route, wrapped so that its users can make links."""
    assert signer is not None
    assert users is not None
    assert settings.links is not None  # the settings have been checked
    max_age = seconds_of(settings.links.max_age)
    assert max_age is not None
    return Sharing(
        download,
        access=users.allow(*sharers),
        signer=signer,
        pages=pages,
        max_age=max_age,
        counts=settings.links.store is not None,
    )


async def _redirect_to_folder(request: Request) -> Response:
    """Redirect from the URL of the top folder without its slash: /files to /files/."""
    query = f"?{request.url.query}" if request.url.query else ""
    location = f"./{quote(request.url.path.rpartition('/')[2], safe='%')}/{query}"
    return Response(status_code=308, headers={"Location": location, "Cache-Control": "no-cache"})


def _cors(route: RouteSettings, has_passwords: bool) -> list[Middleware]:
    """Return the middleware that lets scripts of other web sites read the answers of a route.

    has_passwords: whether the users of the settings have passwords. A script may then send one to a route with users:
    a browser sends `Authorization` of a script only if the answer to the preflight names it.

    It is around `Download`: a preflight has neither cookies nor links, so it is answered before access is decided, and
    the answer to a refused request has the headers too.
    """
    if (cors := route.cors) is None:
        return []
    max_age = seconds_of(cors.max_age)
    assert max_age is not None  # the settings have been checked
    takes_users = any(one.startswith(USER) for one in route.access or ())
    may_log_in = has_passwords and takes_users and cors.credentials
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            allow_methods=["GET", "HEAD"],
            allow_headers=[*_CORS_REQUEST_HEADERS, *(["Authorization"] if may_log_in else [])],
            allow_credentials=cors.credentials,
            expose_headers=_CORS_EXPOSED,
            max_age=int(max_age),
        )
    ]


def _redirect(settings: Settings, name: str, source: Source) -> PresignedRedirect | None:
    wanted = settings.sources[name]
    if not isinstance(wanted, StorageSettings) or wanted.presign is None:
        return None
    assert isinstance(source, StorageSource)
    assert isinstance(source.storage, ObjectStorage)
    expires = seconds_of(wanted.presign.expires)
    assert expires is not None  # the settings have been checked
    with settings.blaming(f"sources.{name}.presign"):
        return PresignedRedirect(
            source.storage,
            expires=expires,
            public_endpoint=wanted.presign.public_endpoint,
        )


def _backend(settings: Settings, sources: Mapping[str, Source]) -> OffloadBackend | None:
    offload = settings.offload
    storages = [
        source.storage
        for source in sources.values()
        if isinstance(source, StorageSource) and isinstance(source.storage, ObjectStorage)
    ]
    if offload.backend is None:
        return None
    with settings.blaming("offload"):
        return proxy_kinds()[offload.backend].make_backend(rules_of(settings), storages=storages, **options_of(offload))


def _place_of(settings: Settings, name: str, source: Source) -> str:
    """Return the place of a source's files, which is part of the key of its cached copies."""
    match settings.sources[name]:
        case PathSettings(root=root):
            return root
        case ChosenSettings(paths=paths):
            return "\n".join(paths)
        case ObjectSettings(table=table):
            return table
        case VirtualSettings(factory=factory):
            return f"{factory} in {settings.directory}"
        case StorageSettings(url=url):
            storage = _storage_of(source)
            return (storage.place if isinstance(storage, ObjectStorage) else None) or url
        case RemoteSettings(url=url):
            return url
    raise AssertionError("there are no other sources")


async def _not_found(request: Request, exc: Exception) -> Response:
    return await download_error(request, FileMissing("there is no such route"))


async def _method_not_allowed(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    headers = {**(exc.headers or {}), "X-Content-Type-Options": "nosniff"}
    return Response("Method Not Allowed", 405, headers, "text/plain")
