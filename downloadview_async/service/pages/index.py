"""`IndexPage`: the page at `/`, with a list of the routes."""

import base64
import hashlib
import re
from collections.abc import Mapping
from contextlib import aclosing
from importlib.resources import files
from itertools import zip_longest
from typing import Any, cast
from urllib.parse import quote

import anyio
from jinja2 import Environment
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from downloadview_async import FileError, Hidden, Source, SupportsListing
from downloadview_async.service.pages import ServicePages
from downloadview_async.service.settings import RouteSettings, Settings

COUNT_SECONDS = 1.0
"""How long the page at `/` waits for the numbers of all routes: it has none of a source that does not answer."""

MOST_COUNTED = 1000
"""Files and folders up to which those of a route are counted for the page at `/`."""

_PARAMETER = re.compile("{[^}]*}")
_KINDS = {
    "path": "a directory",
    "storage": "a storage",
    "object": "rows of a database",
    "remote": "another server",
    "virtual": "generated on request",
    "chosen": "chosen files",
}


class IndexPage:
    """Answers with a list of the routes, and links to their folders or examples; with one listing, it redirects."""

    def __init__(self, settings: Settings, pages: ServicePages, sources: Mapping[str, Source]) -> None:
        style = files(__package__).joinpath("index.css").read_text(encoding="utf-8")
        template = files(__package__).joinpath("index.html").read_text(encoding="utf-8")
        self._template = pages.template("index.html") or Environment(autoescape=True, trim_blocks=True).from_string(
            template
        )
        self._style = Markup(style)  # noqa: S704 - a file of this package
        self._pages = pages
        self._sources = sources
        self._routes = [(route, _KINDS[_type_of(settings, route)]) for route in settings.routes]
        self._folder = folder_of(settings.routes[0]) if len(settings.routes) == 1 else None
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self._headers = {
            "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self' data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    async def answer(self, request: Request) -> Response:
        """Answer GET and HEAD."""
        root = "."  # relative, so that a proxy may remove a prefix that this service does not know
        if self._folder is not None:
            return Response(status_code=307, headers={"Location": root + self._folder, "Cache-Control": "no-cache"})
        counts: list[str | None] = []
        with anyio.move_on_after(COUNT_SECONDS):
            for route, _ in self._routes:
                counts.append(await _count(self._sources[route.source], route))
        routes = [
            {
                "name": route.name or route.source,
                "path": route.path,
                "parameter": _PARAMETER.findall(route.path)[0],
                "kind": kind,
                "count": count,
                "folder": None if (folder := folder_of(route)) is None else root + folder,
                # without an access: a link that is not signed would be refused
                "links": [
                    {"name": name, "href": root + _link(route, name)} for name in route.examples if route.access is None
                ],
            }
            for (route, kind), count in zip_longest(self._routes, counts)
        ]
        values = self._pages.values() | {"style": self._style, "script": ""}
        page = self._template.render(values, routes=routes, root=root)
        return HTMLResponse(page, headers=self._headers)


async def _count(source: Source, route: RouteSettings) -> str | None:
    """Return how many files and folders the top folder of a route has; None if that is not for everyone to know."""
    if not route.list or route.access is not None or not isinstance(source, SupportsListing):
        return None
    hidden, folders, total = Hidden(route.hide), 0, 0
    try:
        async with aclosing(cast("Any", source.list())) as entries:
            async for entry in entries:
                if not hidden.hides(entry.name):
                    total += 1
                    folders += entry.is_folder
                if total > MOST_COUNTED:
                    return f"more than {MOST_COUNTED:,} files and folders"
    except FileError:
        return None
    counts = [(total - folders, "file"), (folders, "folder")]
    return ", ".join(f"{number:,} {thing}{'' if number == 1 else 's'}" for number, thing in counts if number) or "empty"


def folder_of(route: RouteSettings) -> str | None:
    """Return the URL of the top folder of a route below the `root_path`, or None if the route has no listing."""
    return quote(_PARAMETER.split(route.path)[0]) if route.list else None


def _type_of(settings: Settings, route: RouteSettings) -> str:
    return str(settings.sources[route.source].__struct_config__.tag)


def _link(route: RouteSettings, name: str) -> str:
    before, after = _PARAMETER.split(route.path)
    return quote(before) + quote(name) + quote(after)
