"""Builds the ASGI application from the settings: sources, routes, the offload backend and the service's pages."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from downloadview_async import (
    CachedSource,
    FileError,
    FileMissing,
    ObjectStorage,
    OffloadBackend,
    OffloadMiddleware,
    RemoteSource,
    Source,
    StorageSource,
    add_content_types,
    download_error,
    proxy_kinds,
)
from downloadview_async.service.access import opened_store, signer_of, store_of
from downloadview_async.service.accounts import (
    Service,
    check_completions,
    completions_of,
    opened_completions,
    store_of_completions,
)
from downloadview_async.service.config_loader import CONFIG, load_settings
from downloadview_async.service.digests import digests_of
from downloadview_async.service.health import PRIVATE, CachePage, Health, check_directory, check_store
from downloadview_async.service.limits import opened_limits, service_limits
from downloadview_async.service.logs import OneLineFailures, log_in_single_lines, one_line
from downloadview_async.service.metrics import PAGE as METRICS
from downloadview_async.service.metrics import MetricsPage, metrics_of
from downloadview_async.service.own_files import served_files
from downloadview_async.service.pages import ServicePages, unused_templates
from downloadview_async.service.pages.errors import ErrorPages
from downloadview_async.service.pages.index import IndexPage, folder_of
from downloadview_async.service.purge import PAGE as PURGE
from downloadview_async.service.purge import purge_page
from downloadview_async.service.routes import routes_of
from downloadview_async.service.settings import DatabaseUnavailable, Settings, options_of, rules_of
from downloadview_async.service.source_settings import StorageSettings, directory_of
from downloadview_async.service.sources import caches_of, databases_of, opened_databases, sources_of, storage_of

_NO_MATCH: tuple[Match, Scope] = Match.NONE, {}

_logger = logging.getLogger("downloadview_async")


class _Page(Route):
    """A page of the service at one path. Requests for files, which come after it, look at its end alone."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether this page answers a request."""
        return super().matches(scope) if scope["path"].endswith(self.path) else _NO_MATCH


def build(settings: Settings) -> Service:
    """Return the service as an ASGI application. Its lifespan opens and closes caches, stores and databases.

    Raises `ConfigurationError` if something that the settings name does not exist.
    """
    for suffix, content_type in settings.content_types.items():
        try:
            add_content_types({suffix: content_type})
        except ValueError as exc:
            raise settings.error(f'content_types."{suffix}"', str(exc)) from exc
    databases = databases_of(settings)
    caches = caches_of(settings)
    sources = sources_of(settings, databases, caches)
    digests = digests_of(settings, sources)
    checks: dict[str, Callable[[], Awaitable[None]]] = {}
    for name, source in settings.sources.items():
        if (directory := directory_of(source)) is not None:
            checks[name] = check_directory(directory)
        if (cache := caches.get(name)) is not None:
            checks[f"{name}.cache"] = check_directory(cache.path, written=True)
    probes: dict[str, ObjectStorage] = {}
    for name, source in settings.sources.items():
        if isinstance(source, StorageSettings) and isinstance(storage_of(sources[name]), ObjectStorage):
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
                _logger.warning(
                    "No route is configured, so every download gives 404: add [[routes]] tables and [sources.NAME] "
                    "tables to %s, or serve a directory without settings: downloadview serve DIRECTORY",
                    one_line(settings.origin.file),
                )
            for problem in (*served_files(settings), *unused_templates(settings)):
                _logger.warning("%s", one_line(problem))
            for cache in caches.values():
                await cache.sweep()
            storages = [storage_of(source) for source in sources.values()]
            for storage in [*storages, *probes.values()]:
                if isinstance(storage, ObjectStorage):
                    stack.push_async_callback(storage.aclose)
            for source in sources.values():
                if isinstance(source, RemoteSource | CachedSource):
                    stack.push_async_callback(source.aclose)
            for cache in caches.values():
                stack.push_async_callback(cache.aclose)
            await stack.enter_async_context(opened_databases(settings, databases))
            await stack.enter_async_context(opened_store(settings, store, signer))
            await stack.enter_async_context(opened_limits(settings, limits))
            await stack.enter_async_context(opened_completions(settings, completions))
            for known in digests.values():
                await stack.enter_async_context(known.running())
            if metrics is not None:
                await stack.enter_async_context(metrics.running())
            yield

    metrics = metrics_of(settings, sources, caches, signer, limits)
    purge = purge_page(settings, sources)
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
                else [_Page("/", IndexPage(settings, pages, sources).answer)]
            ),
            _Page("/-/livez", health.livez),
            _Page("/-/readyz", health.readyz),
            *([] if metrics is None else [_Page(f"{PRIVATE}{METRICS}", MetricsPage(metrics).answer)]),
            *([] if purge is None else [_Page(f"{PRIVATE}{PURGE}", purge.answer, methods=["POST"])]),
            *([_Page("/-/cache", CachePage(caches).answer)] if caches else []),
            *routes_of(settings, sources, signer, caches, digests, limits, completions),
            Route("/favicon.ico", pages.favicon),
        ],
        middleware=middleware,
        exception_handlers={FileError: download_error, HTTPException: _without_file},
        lifespan=lifespan,
    )
    # /files gives 404 like any unknown path: a redirect to /files/ would reveal that it exists
    app.router.redirect_slashes = False
    app.state.health = health
    return app


def app_from_environment(default: Path | None = None) -> Starlette:
    """Return the service for the settings file that DOWNLOADVIEW_CONFIG names, and the variables that override it.

    default: the settings file if DOWNLOADVIEW_CONFIG is not set. Raises `ConfigurationError`.
    """
    return build(load_settings(os.environ.get(CONFIG) or default, environ=os.environ))


async def check_databases(settings: Settings) -> None:
    """Open and close each database and store, so that errors show before the server and its workers start.

    Raises `ConfigurationError`, as the start of the application would.
    """
    async with (
        opened_databases(settings, databases_of(settings)),
        opened_store(settings, store_of(settings)),
        opened_limits(settings, service_limits(settings), warns=False),  # the application does that
    ):
        if (counted := store_of_completions(settings)) is not None:
            with contextlib.suppress(DatabaseUnavailable):  # the application warns of that, and serves
                await check_completions(settings, counted)


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


async def _without_file(request: Request, exc: Exception) -> Response:
    """Answer an error that is not about a file: a URL without a route, or a method that the route does not have."""
    assert isinstance(exc, HTTPException)
    if exc.status_code == 404:
        return await download_error(request, FileMissing("there is no such route"))
    headers = {**(exc.headers or {}), "X-Content-Type-Options": "nosniff"}
    return Response(exc.detail, exc.status_code, headers, "text/plain")
