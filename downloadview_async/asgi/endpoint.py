"""`Download`: a source as an ASGI application, for a Starlette `Route` or `Mount`."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Host, Mount, Route
from starlette.types import Receive, Scope, Send

from downloadview_async.asgi.checksum import checksum_response, wanted_checksum
from downloadview_async.asgi.disconnect import close_after_body
from downloadview_async.asgi.errors import refuse_websocket, send_error
from downloadview_async.asgi.response import DownloadResponse, checked_headers
from downloadview_async.errors import ConfigurationError, FileError, FileMissing
from downloadview_async.offload.base import Redirect
from downloadview_async.policy.access import Access, access_of, allow
from downloadview_async.policy.grants import Grant
from downloadview_async.policy.hiding import Hidden
from downloadview_async.sources.base import AsyncFile, Source, check_source
from downloadview_async.sources.digests.known import Digests

_ALLOW = {"Allow": "GET, HEAD, OPTIONS", "X-Content-Type-Options": "nosniff"}


class Download:
    """Answers GET and HEAD with the file that `source` resolves, OPTIONS with 204, and every other method with 405.

    key: what `source.resolve` gets. None: the route's only path parameter, or below a `Mount` the rest of the path.
    A string: the name of a path parameter, for a route with several. A function: it gets the request, and returns the
    value. A request whose key cannot be determined fails with `ConfigurationError`.
    attachment, headers, redirect: as in `DownloadResponse`. offload: likewise, but by default the answer to a file of a
    directory does not wait for the application, because the file stays where it is.
    cache_control: the Cache-Control header.
    access: who may have a file: an async function that gets the request and the key, `SignedLinks`, or a list of them,
    of which one suffices. It is asked before any file is opened. None: everyone. See `Access` and `Grant`.
    hide: patterns as in `fnmatch` for names of files and directories that do not exist for clients, such as `.*` or
    `*.key`. One that matches a segment of the name hides it; upper and lower case are the same.
    digests: the digests of the source's files, for Repr-Digest, and for `?checksum=sha256`, whose answer is the line of
    `sha256sum` about the file.

    Raises `ConfigurationError` for a source, an access or a pattern that is not one, and `ValueError` for a header that
    is refused.
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
        offload: bool | None = None,
        access: Access | Sequence[Access] | None = None,
        hide: Sequence[str] = (),
        digests: Digests | None = None,
    ) -> None:
        check_source(source, "Download")
        self.source = source
        self.attachment = attachment
        self.headers = dict(headers or {})
        if cache_control is not None:
            self.headers["Cache-Control"] = cache_control
        checked_headers(tuple(self.headers.items()))
        self.redirect = redirect
        self.offload = offload
        self.access = access_of(access)
        self._hidden = Hidden(hide) if hide else None
        self._cache_control = {name.lower(): value for name, value in self.headers.items()}.get("cache-control")
        self._key = key
        self.digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. A WebSocket, which a `Mount` passes on too, is refused."""
        if scope["type"] != "http":
            await refuse_websocket(scope, send)
            return
        response: Response
        if scope["method"] == "OPTIONS":
            response = Response(status_code=204, headers=_ALLOW | close_after_body(scope))
        elif scope["method"] not in ("GET", "HEAD"):
            response = Response("Method Not Allowed", 405, _ALLOW | close_after_body(scope), "text/plain")
        else:
            try:
                key = self._key_of(scope)
                if self._hidden is not None:
                    self._hidden.check(key)
                grant = await allow(self.access, Request(scope, receive), key) if self.access else None
                file = await self.source.resolve(key)
                response = self._response(file, grant, key)
                if (
                    response.digests is not None
                    and scope["query_string"]
                    and (wanted := wanted_checksum(scope["query_string"])) is not None
                ):
                    response = await checksum_response(wanted, response.digests, key, file, scope)
            except FileError as exc:
                await send_error(exc, scope, send)
                return
        await response(scope, receive, send)

    def _response(self, file: AsyncFile, grant: Grant | None, key: Any) -> DownloadResponse:
        filename, attachment, content_type, headers = None, self.attachment, None, self.headers
        if grant is not None:
            filename, content_type = grant.filename, grant.content_type
            attachment = attachment if grant.attachment is None else grant.attachment
            headers = {**headers, "Cache-Control": grant.cache_control(self._cache_control, time.time())}
        response = DownloadResponse(
            file,
            filename=filename,
            attachment=attachment,
            content_type=content_type,
            headers=headers,
            redirect=self.redirect,
            offload=self.offload,
        )
        response.ends_request = True
        if self.digests is not None and isinstance(key, str):
            response.digests, response.digest_name = self.digests, key
        return response

    def _key_of(self, scope: Scope) -> Any:
        _check_is_decoded(scope)
        if callable(self._key):
            return self._key(Request(scope))
        parameters = scope.get("path_params") or {}
        if self._key is not None:
            if self._key not in parameters:
                names = f"use one of {', '.join(parameters)}" if parameters else "the route has none"
                raise ConfigurationError(f"Download has key={self._key!r}, which is not a path parameter: {names}")
            return str(parameters[self._key])
        if not parameters:
            return path_below(scope).removeprefix("/")
        names_of_route = _parameters_of_route(scope, parameters)
        if len(names_of_route) > 1:
            raise ConfigurationError(f"Download needs key=, one of the route's parameters: {', '.join(names_of_route)}")
        return str(parameters[names_of_route[0]]) if names_of_route else path_below(scope).removeprefix("/")


def _check_is_decoded(scope: Mapping[str, Any]) -> None:
    """Raise `FileMissing` for a path that is not UTF-8.

    Servers replace what they cannot decode by U+FFFD, which the name of another file may have.
    """
    if "\ufffd" not in scope["path"] or (raw := scope.get("raw_path")) is None:
        return
    try:
        unquote_to_bytes(raw.partition(b"?")[0]).decode()
    except UnicodeDecodeError:
        raise FileMissing(f"not valid UTF-8: {raw!r}") from None


def path_below(scope: Mapping[str, Any]) -> str:
    """Return the path of a request below the application's `root_path`: empty, or with a slash at its beginning.

    `root_path` is removed by whole segments. ASGI puts it before `path`. If a server or a framework has removed it
    already, which `raw_path` shows, nothing more is removed. Hypercorn and granian never put their `root_path` there:
    below a mount of Starlette, the path then begins with only the mount's part of `root_path`.
    """
    path: str = scope["path"]
    root: str = (scope.get("root_path") or "").rstrip("/")
    if not root and not path.endswith("/"):
        return path
    raw = scope.get("raw_path")
    sent = None if raw is None else unquote(raw.partition(b"?")[0].decode("latin-1"))
    if sent is not None and path.endswith("/") and not sent.endswith("/"):
        path = path[:-1]  # Litestar adds a slash below a mount
    if root and not f"{path}/".startswith(f"{root}/"):
        root = root.removeprefix((scope.get("app_root_path") or "").rstrip("/"))
    if not root or not f"{path}/".startswith(f"{root}/"):
        return path
    if sent is not None and sent != path and sent.endswith(path):
        return path
    return path[len(root) :]


def _parameters_of_route(scope: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters of the route itself, without those of the mounts around it.

    Raises `ConfigurationError` if the request does not tell them.
    """
    route, endpoint = scope.get("route"), scope.get("endpoint")
    # An application around ours may have left its own route in the scope: a route counts only if it has called us.
    if isinstance(route, Route) and route.endpoint is endpoint:
        return list(route.param_convertors)
    if isinstance(route, Mount | Host) and route.app is endpoint:
        return []
    # FastAPI does not put the route into the scope.
    candidates = list(_routes_to(endpoint, getattr(scope.get("router"), "routes", None) or ()))
    if len({tuple(names) for names in candidates}) == 1:
        return candidates[0]
    if "app_root_path" not in scope:
        return list(parameters)  # there is no mount
    # A mount adds the segments that it has matched to `root_path`, after those of the server.
    mounted = f"{(scope.get('root_path') or '').removeprefix(scope['app_root_path'] or '')}/"
    below = f"{path_below(scope)}/"
    names_of_route = []
    for name, value in parameters.items():
        segments = f"/{str(value).strip('/')}/"
        if (segments in mounted) == (segments in below):
            raise ConfigurationError(
                f"Download cannot tell whether {name!r} is a parameter of its route or of a mount around it: pass "
                "key=, the name of the parameter or a function that gets the request"
            )
        if segments in below:
            names_of_route.append(name)
    return names_of_route


def _routes_to(endpoint: Any, routes: Iterable[Any]) -> Iterator[list[str]]:
    """Yield the parameters of each route that leads to an endpoint."""
    for route in routes:
        if isinstance(route, Route) and route.endpoint is endpoint:
            yield list(route.param_convertors)
        elif isinstance(route, Mount | Host) and route.app is endpoint:
            yield []
        else:
            yield from _routes_to(endpoint, getattr(route, "routes", None) or ())
