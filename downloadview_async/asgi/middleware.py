"""`OffloadMiddleware`: offers a reverse proxy to every download response inside it."""

from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.asgi.holding import Holding
from downloadview_async.asgi.offer import Offer
from downloadview_async.asgi.pathsend import ForeignResponse
from downloadview_async.asgi.transfer import FOREIGN, PATHSEND
from downloadview_async.errors import ConfigurationError
from downloadview_async.offload.base import EXTENSION, OffloadBackend


class OffloadMiddleware:
    """Puts `backend` into the scope, where a `DownloadResponse` finds it; the innermost middleware wins.

    A response that is not ours, or is replaced by another, never carries an offload header. And if middleware inside
    changes the status of one that does, the header is dropped: it was made for a 200. So this belongs around whatever
    may change a status.

    pathsend: to have the proxy send the files of other responses, too. ASGI's path send is then advertised to the
    application, whatever the server has. A path send becomes the offload header if the backend has a rule for the
    path, as it is given (links are not resolved), and the response is a 200 to GET or HEAD with a Content-Length and
    no Content-Encoding; a relative path, and one with `..` in it, is no file of any rule. All other headers stay, but
    for those of ranges. A file that is not offloaded is sent by the server's own path send, or else by us in chunks:
    exactly Content-Length bytes, or the connection is aborted. For a HEAD no byte is read.

    An offloaded answer leaves when the application has returned, unless it says `offload=True`. A background task, or
    what follows the `yield` of a dependency, may have deleted the file by then: it has been held open, and is sent by
    us. So is one whose application takes longer than `holding.PATIENCE`, for it may still delete it.

    And any offload header that no backend has made for this very request is dropped, with a warning in the log: with
    `pathsend` an application's own X-Accel-Redirect does nothing.
    """

    def __init__(self, app: ASGIApp, backend: OffloadBackend, pathsend: bool = False) -> None:
        if not hasattr(backend, "headers_for") or isinstance(backend, type):
            raise ConfigurationError(
                "OffloadMiddleware takes a backend, such as XAccelRedirect([Rule('/srv/files', '/_files/')]), not "
                f"{backend!r}"
            )
        self.app = app
        self.backend = backend
        self.pathsend = pathsend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the offer in its scope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        extensions = dict(scope.get("extensions") or {})
        outer = extensions.get(EXTENSION)
        outer = outer if isinstance(outer, Offer) else None
        # A middleware further out that drops what no backend has made has to know what ours makes.
        offer = Offer(self.backend, set() if outer is None else outer.made)
        extensions[EXTENSION] = offer
        holding = Holding(offer, receive, send, outer)
        foreign = None
        if self.pathsend:
            server_can = PATHSEND in extensions and FOREIGN not in (extensions[PATHSEND] or {})
            foreign = ForeignResponse(scope, receive, holding.send, offer, path_send=PATHSEND in extensions)
            if not server_can:
                extensions[PATHSEND] = {FOREIGN: True}
        try:
            inner_send = holding.send if foreign is None else foreign.send
            await self.app({**scope, "extensions": extensions}, receive, inner_send)
        except Exception:
            await holding.end()
            raise
        except BaseException:  # cancelled
            await holding.cancel()
            raise
        if foreign is not None:
            await foreign.end()
        await holding.end()
