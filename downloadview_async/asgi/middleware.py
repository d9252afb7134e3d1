"""`OffloadMiddleware`: offers a reverse proxy to every download response inside it."""

import logging

from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts
from downloadview_async.asgi.direct import seems_direct
from downloadview_async.asgi.extensions import FOREIGN, PATHSEND
from downloadview_async.asgi.holding import Holding
from downloadview_async.asgi.offer import Offer
from downloadview_async.asgi.pathsend import ForeignResponse
from downloadview_async.asgi.zero_copy import is_native
from downloadview_async.errors import wrong_type
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.offload.base import EXTENSION, OffloadBackend
from downloadview_async.offload.proxies import proxy_kinds

logger = logging.getLogger("downloadview_async")

_WATCHED = 1_000  # offloaded answers, the first of a process, that are looked at


class OffloadMiddleware:
    """Offers `backend` to every `DownloadResponse` inside it. The innermost middleware wins.

    A response that is not ours, or that another response replaces, never carries an offload header. If middleware
    inside this one changes the status of an offloaded response, its offload header is dropped, because it was made for
    a 200. So put this middleware around all middleware that may change a status.

    An offloaded answer leaves when the application has returned, unless the response has `offload=True` or is that of
    `Download` to a file of a directory. A background task, or the code after the `yield` of a dependency, may delete
    the file. So the file is held open until then, and we send it ourselves if it has left its path, or if the
    application takes longer than `holding.PATIENCE` seconds.

    pathsend: True has the proxy send the files of other responses too, such as Starlette's `FileResponse`. ASGI's path
    send is then advertised to the application, even if the server does not have it.

    - A path send is offloaded if the backend has a rule for its path, the request is a GET or HEAD, and the response
      has the status 200, a Content-Length and no Content-Encoding. Symbolic links in the path are not resolved. A
      relative path, or one with `..` in it, matches no rule. The headers about ranges are dropped, all others stay.
    - A file that is not offloaded is sent by the server's own path send, or else by us in chunks: exactly
      Content-Length bytes, or the connection is aborted. For a HEAD, no byte is read.
    - Any offload header that no backend has made for this request is dropped, with a warning in the log: an
      application cannot set X-Accel-Redirect itself.

    proxy: the name of the proxy in outcomes, such as "caddy". Default: that of the best-known proxy that obeys the
    header of the backend, such as "nginx".

    A warning in the log tells once if a client gets an offloaded answer without a proxy in between, as it seems.

    Raises `WrongType` for an invalid application or backend.
    """

    def __init__(
        self, app: ASGIApp, backend: OffloadBackend, pathsend: bool = False, *, proxy: str | None = None
    ) -> None:
        if not callable(app):
            raise wrong_type("OffloadMiddleware takes an ASGI application, and then a backend", app)
        if not hasattr(backend, "headers_for") or isinstance(backend, type):
            raise wrong_type(
                "OffloadMiddleware takes a backend, such as XAccelRedirect([Rule('/srv/files', '/_files/')])", backend
            )
        if not isinstance(pathsend, bool):
            raise wrong_type("pathsend takes True or False", pathsend)
        if not (proxy is None or isinstance(proxy, str)):
            raise wrong_type("proxy takes the name of the proxy, such as 'nginx'", proxy)
        self.app = app
        self.backend = backend
        self.pathsend = pathsend
        self.proxy = proxy
        self._watched = _WATCHED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the offer in its scope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        extensions = dict(scope.get("extensions") or {})
        outer = extensions.get(EXTENSION)
        outer = outer if isinstance(outer, Offer) else None
        facts: Facts | None = scope.get(ACCOUNT)
        if facts is not None and self.proxy is not None:
            facts.proxy = self.proxy
        offer = Offer(self.backend, outer, facts)
        extensions[EXTENSION] = offer
        holding = Holding(offer, receive, send, outer)
        foreign = None
        if self.pathsend:
            has_path_send = is_native(extensions)
            is_outermost = FOREIGN not in (extensions.get(PATHSEND) or {})
            foreign = ForeignResponse(scope, receive, holding.send, offer, path_send=has_path_send)
            if not (has_path_send and is_outermost):
                extensions[PATHSEND] = {FOREIGN: True}
        try:
            inner_send = holding.send if foreign is None else foreign.send
            scope = {**scope, "extensions": extensions}
            if facts is not None:
                facts.enter(scope)
            await self.app(scope, receive, inner_send)
        except Exception:
            await holding.end()
            raise
        except BaseException:  # cancelled
            await holding.cancel()
            raise
        if foreign is not None:
            await foreign.end()
        await holding.end()
        if self._watched and offer.orders and not offer.is_withdrawn:
            self._watched -= 1
            if seems_direct(scope):
                self._watched = 0
                self._tell_to_open_the_proxy(scope, offer)

    def _tell_to_open_the_proxy(self, scope: Scope, offer: Offer) -> None:
        order = next(iter(offer.orders[-1])).lower()
        titles = (kind.title for kind in proxy_kinds().values() if order == kind.header.lower())
        proxy = self.proxy or next(titles, "the proxy")
        logger.warning(
            "%s %s: the answer has no body, because files are sent by %s, but the request does not seem to have come "
            "through it: open the address of %s. If it has, let the proxy set X-Forwarded-For",
            escaped(scope["method"]),
            shown(scope["path"]),
            proxy,
            proxy,
        )
