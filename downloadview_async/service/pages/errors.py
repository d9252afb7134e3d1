"""`ErrorPages`: errors as pages, for browsers."""

from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.service.pages import ServicePages


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


def _is_browser(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _is_bare_error(start: Message) -> bool:
    headers: Mapping[bytes, bytes] = {name.lower(): value for name, value in start["headers"]}
    if start["status"] < 400 or not headers.get(b"content-type", b"").startswith(b"text/plain"):
        return False
    return headers.get(b"content-length") == str(len(HTTPStatus(start["status"]).phrase)).encode()
