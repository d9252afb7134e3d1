"""`OffloadMiddleware`: offers a reverse proxy to every download response inside it."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.asgi.foreign import ForeignResponse, Offer
from downloadview_async.asgi.transfer import FOREIGN, PATHSEND
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
    exactly Content-Length bytes, or the connection is aborted. For a HEAD no byte is read. An offloaded answer leaves
    when the application has returned, or after `foreign.PATIENCE`: a background task may have deleted the file by then,
    and then we send it, which has been open from the path send on.

    And any offload header that no backend has made for this very request is dropped, with a warning in the log: with
    `pathsend` an application's own X-Accel-Redirect does nothing.
    """

    def __init__(self, app: ASGIApp, backend: OffloadBackend, pathsend: bool = False) -> None:
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
        if not self.pathsend:
            # A middleware further out that drops what no backend has made has to know what ours makes.
            offer = Offer(self.backend, outer.made if isinstance(outer, Offer) else set())
            extensions[EXTENSION] = offer

            async def send_checked(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] != 200 and offer.made:
                    message = offer.withdrawn_from(message)
                await send(message)

            await self.app({**scope, "extensions": extensions}, receive, send_checked)
            return
        offer = Offer(self.backend, outer.made if isinstance(outer, Offer) else set())
        server_can = PATHSEND in extensions and FOREIGN not in (extensions[PATHSEND] or {})
        response = ForeignResponse(scope, receive, send, offer, path_send=PATHSEND in extensions)
        extensions[EXTENSION] = offer
        if not server_can:
            extensions[PATHSEND] = {FOREIGN: True}
        async with response.settled():
            await self.app({**scope, "extensions": extensions}, receive, response.send)
        await response.end()
