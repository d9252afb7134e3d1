"""The pages of the service for people: the list of the routes at `/`, the listings of folders, and errors."""

import base64
import hashlib
import mimetypes
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from functools import lru_cache
from http import HTTPStatus
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import anyio
from jinja2 import Environment, FileSystemLoader, Template, TemplateError
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async import (
    ConfigurationError,
    Entry,
    FileError,
    Hidden,
    ListingPage,
    Pages,
    Source,
    SupportsListing,
    ViewPage,
)
from downloadview_async.service.settings import RouteSettings, Settings

MAX_LOGO = 64 * 1024
"""The largest logo, in bytes, because each page has it inside."""

COUNT_SECONDS = 1.0
"""How long the page at `/` waits for the numbers of all routes: it has none of a source that does not answer."""

MOST_COUNTED = 1000
"""Files and folders up to which those of a route are counted for the page at `/`."""

TEMPLATES = ("index.html", "listing.html", "view.html", "error.html")
"""The pages that a template may replace."""

_PARAMETER = re.compile("{[^}]*}")
_KINDS = {
    "path": "a directory",
    "storage": "a storage",
    "object": "rows of a database",
    "remote": "another server",
    "virtual": "generated on request",
    "chosen": "chosen files",
}
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="M7 1h2v7h3l-4 4-4-4h3zM2 13h12v2H2z" '
    'fill="#0b5cad"/></svg>'
)
_TIME = datetime(2026, 1, 31, tzinfo=UTC)
_ROUTE = {"name": "Files", "path": "/files/{path:path}", "parameter": "{path:path}", "kind": "a directory"}
_SAMPLES: dict[str, dict[str, Any]] = {
    "index.html": {
        "root": ".",
        "routes": [_ROUTE | {"count": "1 file", "folder": "./files/", "links": [{"name": "a", "href": "./files/a"}]}],
    },
    "listing.html": {
        "page": ListingPage(
            path="2026",
            entries=[("more", Entry("more", is_folder=True)), ("a.txt", Entry("a.txt", size=1, modified=_TIME))],
            files=1,
            folders=1,
            size=1,
        ),
        "actions": "",
    },
    "view.html": {
        "page": ViewPage(path="2026/a.txt", kind="text", content_type="text/plain", size=1, modified=_TIME, text="a"),
        "actions": "",
    },
    "error.html": {"status": 404, "phrase": "Not Found", "explanation": "Nothing is here."},
}
"""What the templates are tried with when the service starts, besides the values of each template."""

_SHARE = ' <a href="?share">Share</a>'
_EXPLANATIONS = {
    401: "You need a name and a password.",
    403: "This link is not valid. Ask for a new one.",
    404: "Nothing is here.",
    410: "This link cannot be used any more. Ask for a new one.",
    429: "There are too many requests. Try again later.",
    503: "The file cannot be sent now. Try again later.",
}


class ServicePages(Pages):
    """The pages with what `[pages]` says. The files in its directory `templates` replace those of the service.

    title: instead of that in the settings. shares: whether the pages have a link to share files and folders. downloads:
    as in `Pages`.

    Raises `ConfigurationError` for a logo or a directory that cannot be read, and for a template that is not one or
    fails.
    """

    def __init__(
        self,
        settings: Settings,
        title: str | None = None,
        *,
        shares: bool = False,
        downloads: Callable[[Sequence[str]], Awaitable[Mapping[str, int]]] | None = None,
    ) -> None:
        pages = settings.pages
        self._shares = shares
        with settings.blaming("pages.logo"):
            logo = None if pages.logo is None else _image(Path(pages.logo))
        directory = None if pages.templates is None else Path(pages.templates)
        with settings.blaming("pages.templates"):
            if directory is not None and not directory.is_dir():
                raise ConfigurationError(f"{pages.templates!r} is not a directory: create it, or correct the path")
            super().__init__(
                title=title or pages.title,
                logo=logo,
                footer=pages.footer or None,
                style=_text(directory, "page.css"),
                script=_text(directory, "page.js"),
                downloads=downloads,
            )
            self._templates = _templates(directory)
            self._try_templates()

    def template(self, name: str) -> Template | None:
        """Return the template that replaces a page of the service, or None."""
        return self._templates.get(name)

    def listing(self, page: ListingPage) -> str:
        """Return the page of a folder."""
        template = self.template("listing.html")
        if template is None:
            return super().listing(page)
        return template.render(page=page, actions=Markup(self.folder_actions(page)), **self.values())  # noqa: S704

    def view(self, page: ViewPage) -> str:
        """Return the view page of a file."""
        template = self.template("view.html")
        if template is None:
            return super().view(page)
        return template.render(page=page, actions=Markup(self.actions(page)), **self.values())  # noqa: S704

    def actions(self, page: ViewPage) -> str:
        """Return the links and buttons of a view page."""
        return super().actions(page) + (_SHARE if self._shares and not page.link else "")

    def folder_actions(self, page: ListingPage) -> str:
        """Return the links above the entries of a folder."""
        is_of_user = self._shares and page.can_reorder and not page.query.link
        return super().folder_actions(page) + (_SHARE if is_of_user else "")

    def error(self, status: int) -> str:
        """Return the page of an error. It depends on the status alone."""
        phrase = HTTPStatus(status).phrase
        explanation = _EXPLANATIONS.get(status, "")
        template = self.template("error.html")
        if template is not None:
            return template.render(status=status, phrase=phrase, explanation=explanation, **self.values())
        return self.page(phrase, f"<main><h1>{phrase}</h1><p>{explanation}</main>")

    def _try_templates(self) -> None:
        """Render each template once. Raises `ConfigurationError` for one that fails."""
        for name, template in self._templates.items():
            try:
                template.render(_SAMPLES[name] | self.values())
            except Exception as exc:  # a template may call anything
                problem = f"{type(exc).__name__}: {exc}"
                raise ConfigurationError(f"{name} cannot be rendered ({problem}): correct it") from exc

    def values(self) -> dict[str, Any]:
        """Return the values that each template gets."""
        return {
            "title": self.title,
            "logo": self.logo,
            "footer": self.footer,
            "style": Markup(self.style),  # noqa: S704 - from a file of the service or its administrator
            "script": Markup(self.script),  # noqa: S704
            "quote": quote,
            "icon": f"data:image/svg+xml,{quote(_ICON)}",
        }


class IndexPage:
    """Answers with a list of the routes, and links to their folders or examples; with one listing, it redirects."""

    def __init__(self, settings: Settings, pages: ServicePages, sources: Mapping[str, Source]) -> None:
        style = files(__name__).joinpath("index.css").read_text(encoding="utf-8")
        template = files(__name__).joinpath("index.html").read_text(encoding="utf-8")
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


class ErrorPages:
    """A middleware that sends errors as pages to browsers. All errors with the same status have the same page."""

    def __init__(self, app: ASGIApp, pages: ServicePages) -> None:
        self._app = app
        self._headers = pages.headers
        self._page = lru_cache(maxsize=64)(lambda status: pages.error(status).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, and replace the body of an error that is only its phrase."""
        if scope["type"] != "http" or not _is_browser(scope):
            await self._app(scope, receive, send)
            return
        page: bytes | None = None

        async def send_page(message: Message) -> None:
            nonlocal page
            if message["type"] == "http.response.start" and _is_bare_error(message):
                page = self._page(message["status"])
                message = {**message, "headers": [*self._replaced(message, page)]}
            elif message["type"] == "http.response.body" and page is not None:
                message = {**message, "body": b"" if scope["method"] == "HEAD" else page}
            await send(message)

        await self._app(scope, receive, send_page)

    def _replaced(self, start: Message, page: bytes) -> list[tuple[bytes, bytes]]:
        new = {
            **{name.lower(): value for name, value in self._headers.items()},
            "content-type": "text/html; charset=utf-8",
            "content-length": str(len(page)),
            "vary": "Accept",
        }
        kept = [(name, value) for name, value in start["headers"] if name.decode("latin-1").lower() not in new]
        varies = [value for name, value in start["headers"] if name.lower() == b"vary"]
        new["vary"] = ", ".join(["Accept", *(value.decode("latin-1") for value in varies)])
        return kept + [(name.encode(), value.encode("latin-1")) for name, value in new.items()]


async def favicon(request: Request) -> Response:
    """Answer with the icon of the service."""
    headers = {"Cache-Control": "max-age=86400", "X-Content-Type-Options": "nosniff"}
    return Response(_ICON, headers=headers, media_type="image/svg+xml")


def folder_of(route: RouteSettings) -> str | None:
    """Return the URL of the top folder of a route below the `root_path`, or None if the route has no listing."""
    return quote(_PARAMETER.split(route.path)[0]) if route.list else None


def _is_browser(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _is_bare_error(start: Message) -> bool:
    headers: Mapping[bytes, bytes] = {name.lower(): value for name, value in start["headers"]}
    if start["status"] < 400 or not headers.get(b"content-type", b"").startswith(b"text/plain"):
        return False
    return headers.get(b"content-length") == str(len(HTTPStatus(start["status"]).phrase)).encode()


def _type_of(settings: Settings, route: RouteSettings) -> str:
    return str(settings.sources[route.source].__struct_config__.tag)


def _link(route: RouteSettings, name: str) -> str:
    before, after = _PARAMETER.split(route.path)
    return quote(before) + quote(name) + quote(after)


def _image(path: Path) -> str:
    """Return an image as a `data:` URL."""
    content = path.read_bytes()
    content_type = mimetypes.guess_type(path.name)[0] or ""
    if not content_type.startswith("image/"):
        raise ConfigurationError(f"{str(path)!r} is not an image: give a file such as logo.svg or logo.png")
    if len(content) > MAX_LOGO:
        raise ConfigurationError(f"{str(path)!r} has {len(content):,} bytes: give an image of at most {MAX_LOGO:,}")
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


def _text(directory: Path | None, name: str) -> str | None:
    if directory is None or not (directory / name).is_file():
        return None
    try:
        return (directory / name).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{name} is not UTF-8: save it as such") from None


def _templates(directory: Path | None) -> dict[str, Template]:
    if directory is None:
        return {}
    environment = Environment(autoescape=True, trim_blocks=True, loader=FileSystemLoader(directory))
    found_templates = {}
    for name in TEMPLATES:
        if (directory / name).is_file():
            try:
                found_templates[name] = environment.get_template(name)
            except UnicodeDecodeError:
                raise ConfigurationError(f"{name} is not UTF-8: save it as such") from None
            except TemplateError as exc:
                raise ConfigurationError(f"{name} is not a template of Jinja: {exc}: correct it") from exc
    return found_templates
