"""The page at `/`, which lists the routes for people. It uses no scripts, no cookies and no other resources."""

import base64
import hashlib
import re
from importlib.resources import files
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from downloadview_async.service.settings import RouteSettings, Settings

_PARAMETER = re.compile("{[^}]*}")
_KINDS = {
    "path": "a directory",
    "storage": "a storage",
    "object": "rows of a database",
    "remote": "another server",
    "virtual": "generated on request",
}


class IndexPage:
    """Answers with a list of the routes, and links to the examples of each route."""

    def __init__(self, settings: Settings) -> None:
        style = files(__name__).joinpath("index.css").read_text(encoding="utf-8")
        template = files(__name__).joinpath("index.html").read_text(encoding="utf-8")
        self._template = Environment(autoescape=True, trim_blocks=True).from_string(template)
        self._style = Markup(style)  # noqa: S704 - a file of this package
        self._routes = [(route, _KINDS[_type_of(settings, route)]) for route in settings.routes]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self._headers = {
            "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    async def answer(self, request: Request) -> Response:
        """Answer GET and HEAD."""
        root = quote(request.scope.get("root_path", ""))
        routes = [
            {
                "name": route.name or route.source,
                "path": route.path,
                "parameter": _PARAMETER.findall(route.path)[0],
                "kind": kind,
                # without an access: a link that is not signed would be refused
                "links": [
                    {"name": name, "href": root + _link(route, name)} for name in route.examples if route.access is None
                ],
            }
            for route, kind in self._routes
        ]
        return HTMLResponse(self._template.render(routes=routes, style=self._style, root=root), headers=self._headers)


def _type_of(settings: Settings, route: RouteSettings) -> str:
    return str(settings.sources[route.source].__struct_config__.tag)


def _link(route: RouteSettings, name: str) -> str:
    before, after = _PARAMETER.split(route.path)
    return quote(before) + quote(name) + quote(after)
