"""`OffloadMiddleware`: offers a reverse proxy to every download response inside it."""

from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.asgi.offer import Holding, Lent, Offer, is_deleted
from downloadview_async.asgi.pathsend import ForeignResponse
from downloadview_async.asgi.transfer import FOREIGN, PATHSEND
from downloadview_async.offload.base import EXTENSION, OffloadBackend
from downloadview_async.offload.decision import refusal


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
    us. So is one whose application takes longer than `offer.PATIENCE`, for it may still delete it.

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
        # A middleware further out that drops what no backend has made has to know what ours makes.
        offer = Offer(self.backend, outer.made if isinstance(outer, Offer) else set())
        extensions[EXTENSION] = offer
        holding = Holding()
        foreign = None
        if self.pathsend:
            server_can = PATHSEND in extensions and FOREIGN not in (extensions[PATHSEND] or {})
            foreign = ForeignResponse(scope, receive, send, offer, holding, path_send=PATHSEND in extensions)
            if not server_can:
                extensions[PATHSEND] = {FOREIGN: True}
        sender = _Sender(offer, holding, send if foreign is None else foreign.send)
        try:
            await self.app({**scope, "extensions": extensions}, receive, sender.send)
        except Exception:
            await holding.end()
            raise
        except BaseException:  # cancelled
            await holding.cancel()
            raise
        finally:
            sender.drop()
        await holding.end()
        if foreign is not None:
            await foreign.end()


class _Sender:
    """Sends the answer to one request on: one that a proxy is to send the file for waits for the application."""

    __slots__ = ("_held", "_holding", "_lent", "_offer", "_send")

    def __init__(self, offer: Offer, holding: Holding, send: Send) -> None:
        self._offer = offer
        self._holding = holding
        self._send = send
        self._lent: Lent | None = None
        self._held: list[Message] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] != 200 and self._offer.made:
                message = self._offer.withdrawn_from(message)
            if self._offer.lent is not None and (lent := self._offer.take_lent(message)) is not None:
                self._lent = lent
                self._held.append(message)
                return
        elif self._held:
            self._held.append(message)
            if self._lent is not None:
                lent, self._lent = self._lent, None
                self._holding.hold(lent.file, partial(self._decide, lent))
            return
        await self._send(message)

    async def _decide(self, lent: Lent, has_returned: bool) -> None:
        if refusal(has_returned=has_returned, is_there=not is_deleted(lent.file)) is None:
            for message in self._held:
                await self._send(message)
        else:
            await lent.stream_with_what_was_added(self._held[0], self._send)

    def drop(self) -> None:
        """Close what is lent for an answer of which no more comes."""
        if self._lent is not None:
            self._lent.file.close()
        if self._offer.lent is not None:
            self._offer.lent.file.close()
        self._lent = self._offer.lent = None
