"""`OffloadMiddleware`: offers a reverse proxy to every download response inside it."""

from starlette.types import ASGIApp, Receive, Scope, Send

from downloadview_async.offload.base import EXTENSION, OffloadBackend


class OffloadMiddleware:
    """Puts `backend` into the scope, where a `DownloadResponse` finds it; the innermost middleware wins.

    It changes no message. A response that is not ours, or is replaced by another, never carries an offload header.
    """

    def __init__(self, app: ASGIApp, backend: OffloadBackend) -> None:
        self.app = app
        self.backend = backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the offer in its scope."""
        if scope["type"] == "http":
            scope = {**scope, "extensions": {**(scope.get("extensions") or {}), EXTENSION: self.backend}}
        await self.app(scope, receive, send)
