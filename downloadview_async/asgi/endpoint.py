"""`Download`: a source as an ASGI application, for a Starlette `Route` or `Mount`."""

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from downloadview_async.asgi.response import DownloadResponse, close_after_body, error_response
from downloadview_async.errors import ConfigurationError, FileError
from downloadview_async.offload.base import Redirect
from downloadview_async.sources.base import Source

_ALLOW = {"Allow": "GET, HEAD, OPTIONS", "X-Content-Type-Options": "nosniff"}


class Download:
    """Answers GET and HEAD with the file that `source` finds, OPTIONS with 204, and every other method with 405.

    key: what of the request the source is asked for. By default the route's only path parameter, or below a `Mount`
    the rest of the path. The name of a path parameter, where a route has several; or a function from the request.
    attachment, headers, redirect, offload: as in `DownloadResponse`. cache_control: the Cache-Control header.
    """

    def __init__(
        self,
        source: Source,
        *,
        attachment: bool = True,
        cache_control: str | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | Callable[[Request], Any] | None = None,
        redirect: Redirect | None = None,
        offload: bool = True,
    ) -> None:
        self.source = source
        self.attachment = attachment
        self.headers = dict(headers or {})
        if cache_control is not None:
            self.headers["Cache-Control"] = cache_control
        self.redirect = redirect
        self.offload = offload
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http", "a download is an answer to an HTTP request"
        response: Response
        if scope["method"] == "OPTIONS":
            response = Response(status_code=204, headers=_ALLOW | close_after_body(scope))
        elif scope["method"] not in ("GET", "HEAD"):
            response = Response("Method Not Allowed", 405, _ALLOW | close_after_body(scope), "text/plain")
        else:
            try:
                file = await self.source.resolve(self._key_of(scope))
            except FileError as exc:
                response = error_response(exc, scope)
            else:
                response = DownloadResponse(
                    file,
                    attachment=self.attachment,
                    headers=self.headers,
                    redirect=self.redirect,
                    offload=self.offload,
                )
        await response(scope, receive, send)

    def _key_of(self, scope: Scope) -> Any:
        if callable(self._key):
            return self._key(Request(scope))
        parameters = scope.get("path_params") or {}
        key = self._key
        if key is None:
            route = scope.get("route")
            own = list(route.param_convertors) if isinstance(route, Route) else []
            if not own:  # below a Mount, whose own parameters are none of a file's name
                return str(scope["path"]).removeprefix(scope.get("root_path", "")).removeprefix("/")
            key = own[0] if len(own) == 1 else ""
        if key not in parameters:
            raise ConfigurationError(f"Download needs key=, one of the route's parameters: {', '.join(parameters)}")
        return str(parameters[key])
