"""`ErrorPages`: errors as pages, for browsers."""

from collections.abc import Awaitable, Mapping
from functools import lru_cache
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.service.pages import ServicePages


class ErrorPages:
    """A middleware that sends errors as pages to browsers. All errors with the same status and text have the same page.

    The answer to a HEAD stays as it is if its text is more than the phrase of the status: only a body tells that text.
    """

    def __init__(self, app: ASGIApp, pages: ServicePages) -> None:
        self._app = app
        self._headers = pages.headers
        self._page = lru_cache(maxsize=64)(lambda status, detail: pages.error(status, detail).encode())

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass on a request, and replace the body of an error that is its phrase, or that and a detail."""
        has_pages = scope["type"] == "http" and _is_browser(scope)
        return (self._answer if has_pages else self._app)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: Message | None = None  # the start of an error, until its body shows whether it is one of ours

        async def send_page(message: Message) -> None:
            nonlocal error
            if message["type"] == "http.response.start" and _is_short_text(message):
                error = message
                return
            if error is not None:
                start, error = error, None
                text = _text_of(start, message, is_head=scope["method"] == "HEAD")
                if text is not None:
                    page = self._page(start["status"], text)
                    start = {**start, "headers": [*self._replaced(start, page)]}
                    message = {**message, "body": b"" if scope["method"] == "HEAD" else page}
                await send(start)
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


def _is_short_text(start: Message) -> bool:
    if start["status"] < 400:
        return False
    headers = _headers_of(start)
    if not headers.get(b"content-type", b"").startswith(b"text/plain"):
        return False
    length = headers.get(b"content-length", b"")
    return length.isdigit() and len(length) < 5


def _text_of(start: Message, message: Message, *, is_head: bool) -> str | None:
    """Return what an error says after the phrase of its status; None if it is not such an error, as a whole."""
    phrase = HTTPStatus(start["status"]).phrase
    if is_head:
        return "" if _headers_of(start)[b"content-length"] == str(len(phrase)).encode() else None
    if message["type"] != "http.response.body" or message.get("more_body", False):
        return None
    text: str = bytes(message.get("body", b"")).decode(errors="replace")
    if text == phrase:
        return ""
    begin = f"{phrase}: "
    return text.removeprefix(begin) if text.startswith(begin) else None


def _headers_of(start: Message) -> Mapping[bytes, bytes]:
    return {name.lower(): value for name, value in start["headers"]}
