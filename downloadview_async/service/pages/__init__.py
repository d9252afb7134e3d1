"""`ServicePages`: how the pages of the service look, by the settings and by templates."""

import base64
import mimetypes
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from jinja2 import Environment, FileSystemLoader, Template, TemplateError
from jinja2.meta import find_referenced_templates
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from downloadview_async import ConfigurationError, Entry, ListingPage, Pages, ViewPage
from downloadview_async.service.schema import instead_of
from downloadview_async.service.settings import Settings

MAX_LOGO = 64 * 1024
"""The largest logo, in bytes, because each page has it inside."""

TEMPLATES = ("index.html", "listing.html", "view.html", "error.html")
"""The pages that a template may replace."""

_TEXTS = ("page.css", "page.js")
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
"""The values with which the templates are tried when the service starts, besides those of each template."""

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

    Raises `ConfigurationError` for a logo or a directory that cannot be read, and for a template that is invalid or
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

    def rows(self, page: ListingPage) -> Iterator[str]:
        """Yield the HTML of each entry; nothing if a template makes it."""
        return super().rows(page) if self.template("listing.html") is None else iter(())

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

    def error(self, status: int, detail: str = "") -> str:
        """Return the page of an error. It depends on the status, and on what the client may know besides: `detail`."""
        phrase = HTTPStatus(status).phrase
        explanation = f"{detail[:1].upper()}{detail[1:]}." if detail else _EXPLANATIONS.get(status, "")
        template = self.template("error.html")
        if template is not None:
            return template.render(status=status, phrase=phrase, explanation=explanation, **self.values())
        return self.page(phrase, f"<main><h1>{phrase}</h1><p>{escape(explanation)}</main>")

    async def favicon(self, request: Request) -> Response:
        """Answer with the icon of the pages."""
        headers = {"Cache-Control": "max-age=86400", "X-Content-Type-Options": "nosniff"}
        return Response(unquote(self.icon.partition(",")[2]), headers=headers, media_type="image/svg+xml")

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
            "icon": self.icon,
        }


def unused_templates(settings: Settings) -> Iterator[str]:
    """Yield a sentence for each file among the templates that is neither a page of the service nor used by one."""
    if (templates := settings.pages.templates) is None:
        return
    pages = [*TEMPLATES, *_TEXTS]
    used, left = {*pages}, [*TEMPLATES]
    while left:
        names = _names_in(Path(templates, left.pop()))
        left += names - used
        used |= names
    for path in sorted(Path(templates).iterdir()):
        if path.is_file() and path.name not in used and not path.name.startswith("."):
            yield f"pages.templates: {str(path)!r} is not used: {instead_of(path.name, pages)}"


def _names_in(path: Path) -> set[str]:
    """Return the names of the files that a template includes or extends, as far as it says them; none without one."""
    try:
        parsed = Environment(autoescape=True).parse(path.read_text(encoding="utf-8"))
    except (OSError, TemplateError, UnicodeDecodeError):  # one that is used, and wrong, is refused elsewhere
        return set()
    return {name for name in find_referenced_templates(parsed) if name is not None}


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
