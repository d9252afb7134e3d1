"""The installation that `downloadview check` checks: the service, with its settings."""

import re
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, unquote

from starlette.applications import Starlette
from starlette.routing import Match, Route

from downloadview_async import AsyncFile, Download, FileMissing
from downloadview_async.check import site
from downloadview_async.service.settings import CORS_HEADERS, RouteSettings, RuleSettings, Settings
from downloadview_async.service.sharing import Sharing
from downloadview_async.service.source_settings import (
    PathSettings,
    SourceSettings,
    StorageSettings,
    cache_of,
    edge_of,
    source_of_files,
)

PARAMETER = re.compile("{[^}]*}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted(site.Wanted):
    """A file of a route to request."""

    route: RouteSettings


def wanted_of(route: RouteSettings, target: str, query: str = "", *, thorough: bool) -> Wanted:
    """Return a file of a route to request."""
    origin = None
    if route.cors is not None:
        origin = "https://downloadview-check.example" if "*" in route.cors.origins else route.cors.origins[0]
    return Wanted(
        label=route.path,
        target=target,
        below=quote(PARAMETER.split(route.path)[0]),
        thorough=thorough,
        query=query,
        headers=tuple(route.headers),
        origin=origin,
        cors_headers=CORS_HEADERS,
        route=route,
    )


@dataclass(slots=True)
class File(site.File):
    """A file that the source of a route has returned. is_generated: whether a function makes it."""

    wanted: Wanted
    is_generated: bool = False

    @property
    def route(self) -> RouteSettings:
        """The route that serves it."""
        return self.wanted.route


@dataclass(slots=True)
class Site(site.Site):
    """The installation, with its settings. app: an application with the same settings, in this process."""

    settings: Settings
    app: Starlette

    @property
    def backend(self) -> str | None:
        """The kind of proxy in the settings, or None."""
        backend: str | None = self.settings.offload.backend
        return backend

    def rules_for(self, file: site.File) -> list[RuleSettings]:
        """Return the rules in the settings."""
        rules: list[RuleSettings] = self.settings.offload.rules
        return rules

    def to_use(self, kind: str) -> str:
        """Return the remedy for settings with another kind of proxy."""
        return f'set [offload] backend = "{kind}"'

    def to_know(self, prefix: str) -> str:
        """Return how the proxy and the service agree about a prefix."""
        return f'set root_path = "{prefix}" in [server], and print the configuration of the proxy again'

    def is_of_files(self, target: str) -> bool:
        """Return whether a path belongs to a source of existing files, which does not generate any."""
        answering, _ = self.route_of(target)
        return any(
            isinstance(self.source_of(route)[1], PathSettings | StorageSettings)
            for route in self.settings.routes
            if answering is not None and route.path == answering.path
        )

    def cache_of(self, file: site.File) -> str | None:
        """Return the directory of the cache of a file's source, or None."""
        _, source = self.source_of(_route_of(file))
        cache = cache_of(source)
        return None if cache is None else str(cache.path)

    async def relocate(self, file: site.File) -> None:
        """Set the location of a file again: by now the cache may have it."""
        assert isinstance(file, File)
        with suppress(Exception):  # a source may raise anything
            file.location = (await self.resolve(file.wanted)).location

    def redirect_advice(self, file: site.File) -> str:
        """Return the remedy for a redirect that does not lead to the file."""
        name, source = self.source_of(_route_of(file))
        return self.advice("redirect" if edge_of(source) is None else "edge", None, name=name)

    def route_of(self, target: str) -> tuple[Route | None, str]:
        """Return the route that matches a path, and the name that it passes to its source."""
        scope = {"type": "http", "method": "GET", "path": unquote(target), "root_path": "", "headers": []}
        for route in self.app.router.routes:
            if isinstance(route, Route):
                match, child_scope = route.matches(scope)
                if match is Match.FULL:
                    return route, "".join(str(value) for value in child_scope["path_params"].values())
        return None, ""

    async def resolve(self, wanted: Wanted) -> AsyncFile:
        """Return a file from its source. Raises `FileMissing`, and whatever else the source raises."""
        route, key = self.route_of(wanted.target)
        if route is None or route.path != wanted.route.path:
            raise FileMissing(f"{'no route' if route is None else route.path} answers this path")
        download = download_of(route)
        assert download is not None
        return await download.source.resolve(key)

    def source_of(self, route: RouteSettings) -> tuple[str, SourceSettings]:
        """Return the name and the settings of the source that holds the files of a route."""
        return source_of_files(route.source, self.settings.sources)


def download_of(route: Route) -> Download | None:
    """Return what sends the files of a route, behind its form for links; None for a page of the service."""
    endpoint = route.endpoint
    inner = endpoint.download if isinstance(endpoint, Sharing) else endpoint
    return inner if isinstance(inner, Download) else None


def _route_of(file: site.File) -> RouteSettings:
    assert isinstance(file, File)
    return file.route
