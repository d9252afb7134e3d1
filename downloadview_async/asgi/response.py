"""`DownloadResponse`: one file as one response, sent by a proxy where one is offered, else by us."""

import codecs
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from downloadview_async.asgi.transfer import MAX_UNREAD_BODY, PATHSEND, SMALL, send_plan, until_the_client_leaves
from downloadview_async.errors import DownloadError, FileError
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.plan import Headers, Plan, Presentation, make_offload_plan, make_plan
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.offload.base import EXTENSION, OFFLOAD_HEADERS, OffloadBackend
from downloadview_async.sources.base import AsyncFile

logger = logging.getLogger("downloadview_async")
codecs.lookup("unicode_escape")  # now: when it is first needed, there may be no descriptor left to load it by

# Made here from the file itself. An application that could set them could promise what is not sent.
_RESERVED = OFFLOAD_HEADERS | {
    "accept-ranges",
    "connection",
    "content-length",
    "content-range",
    "etag",
    "last-modified",
    "transfer-encoding",
}


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class DownloadResponse(Response):
    """Sends `file` to the client. It may be returned from any Starlette or FastAPI endpoint, and is an ASGI app.

    filename: what the client should call it; default: the file's own name. It is made safe for clients.
    attachment: to be saved (the default), or to be shown inline.
    content_type: the whole Content-Type; default: the file's own, or by its name.
    headers: further headers. Those that describe the framing, validators and offloads are made here: `ValueError`.
    status_code: with anything but 200 the whole file is sent, without conditions, ranges and offload. Not one that has
    no body: `ValueError`, as for a content type that is none and a header with a control character.

    The file is opened when the response is sent, and not at all where something else answers first. One that turns
    out to be missing then is a 404, as in `error_response`.
    """

    def __init__(
        self,
        file: AsyncFile,
        *,
        filename: str | None = None,
        attachment: bool = True,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
        status_code: int = 200,
        background: BackgroundTask | None = None,
    ) -> None:
        if reserved := _RESERVED.intersection(name.lower() for name in headers or ()):
            raise ValueError(f"a DownloadResponse makes these headers itself: {', '.join(sorted(reserved))}")
        if bad := [name for name, value in (headers or {}).items() if _CONTROL.search(name + value)]:
            raise ValueError(f"a control character in a header: {bad!r}")
        if content_type is not None and valid_content_type(content_type) is None:
            raise ValueError(f"not a content type: {content_type!r}")
        if status_code < 200 or status_code in (204, 205, 304):
            raise ValueError(f"a response with the status {status_code} has no body to send a file in")
        self.file = file
        self.presentation = Presentation(
            filename=file.name if filename is None else filename, attachment=attachment, content_type=content_type
        )
        self.status_code = status_code
        self.background = background
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request: offloaded, or as its method, conditions and ranges want it."""

        async def answer(send: Send) -> None:
            try:
                await self._answer(scope, send)
            except FileError as exc:
                await error_response(exc, scope)(scope, receive, send)

        if not await self._answer_at_once(scope, send):
            await until_the_client_leaves(answer, receive, send)
        if self.background is not None:
            await self.background()

    async def _answer_at_once(self, scope: Scope, send: Send) -> bool:
        """Answer with a small local file that is in the page cache, and return whether it was one.

        Nothing is waited for, so nobody has to listen for a client that leaves.
        """
        open_cached: Callable[[DownloadRequest], Any] | None = getattr(self.file, "open_cached", None)
        if (
            open_cached is None
            or scope["method"] not in ("GET", "HEAD")
            or EXTENSION in (scope.get("extensions") or {})
        ):
            return False
        request = DownloadRequest.from_headers(scope["method"], scope["headers"])
        try:
            opened = open_cached(request)
        except FileError:
            return False  # found again, and answered, by who waits
        if opened is None:
            return False
        with closing(opened):
            plan = self._plan(request, opened.metadata)
            body: bytes | None = b""
            if plan.length:
                match plan.body:
                    case (ByteRange() as span,) if len(span) <= SMALL:
                        body = opened.read_cached(span)
                    case _:
                        body = None
        if body is None:
            return False
        await send({"type": "http.response.start", "status": plan.status, "headers": self._raw(plan, scope)})
        await send({"type": "http.response.body", "body": body})
        return True

    async def _answer(self, scope: Scope, send: Send) -> None:
        # An endpoint may answer a POST with a file, too; conditions and ranges are not for that.
        readable = scope["method"] in ("GET", "HEAD")
        request = DownloadRequest.from_headers(scope["method"], scope["headers"]) if readable else GET
        backend: OffloadBackend | None = (scope.get("extensions") or {}).get(EXTENSION)
        if backend is not None and readable and self.status_code == 200:
            offload = backend.headers_for(self.file)
            if offload is not None:
                async with self.file.open(request.describing()) as opened:
                    plan = make_offload_plan(opened.metadata, self.presentation, offload, headers=self._own_headers())
                # Apache drops Content-Encoding: an encoded file would arrive as if it were none.
                if "content-encoding" not in plan.headers:
                    start = {"type": "http.response.start", "status": plan.status, "headers": self._raw(plan, scope)}
                    await send(start)
                    await send({"type": "http.response.body", "body": b""})
                    return
        async with self.file.open(request) as opened:
            plan = self._plan(request, opened.metadata)
            server = (scope.get("extensions") or {}).get(PATHSEND) or {}
            raw = self._raw(plan, scope)
            await send_plan(plan, opened, raw, send, by_descriptor=bool(server.get("descriptor")))

    def _plan(self, request: DownloadRequest, metadata: FileMetadata) -> Plan:
        return make_plan(request, metadata, self.presentation, status=self.status_code, headers=self._own_headers())

    def _own_headers(self) -> Headers:
        return {name: value for name, value in self.headers.items() if name not in _RESERVED and name != "set-cookie"}

    def _raw(self, plan: Plan, scope: Scope) -> list[tuple[bytes, bytes]]:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in plan.headers.items()]
        raw += [header for header in self.raw_headers if header[0] == b"set-cookie"]
        raw += [(name.encode(), value.encode()) for name, value in close_after_body(scope).items()]
        return raw


def close_after_body(scope: Mapping[str, Any]) -> Headers:
    """Return the header that closes the connection after a request whose body is too long to be read for nothing."""
    fields = dict(scope["headers"])
    length = fields.get(b"content-length", b"0")
    endless = b"transfer-encoding" in fields or not length.isdigit() or len(length) > 9 or int(length) > MAX_UNREAD_BODY
    return {"connection": "close"} if endless and scope.get("http_version", "1.1").startswith("1") else {}


def error_response(exc: FileError, scope: Scope) -> Response:
    """Return the answer to a request whose file cannot be sent; why it cannot is logged, and told to nobody else.

    What a client may not see and what does not exist are one 404, to the letter.
    """
    status = exc.status
    reason = str(exc).encode("unicode_escape").decode()
    logger.log(
        logging.INFO if status < 500 else logging.WARNING,
        "%s %a: %d, %s",
        scope["method"],
        scope["path"],
        status,
        reason,
    )
    headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff", **close_after_body(scope)}
    if status == 503:
        headers["Retry-After"] = "5"
    if status == 412:
        return Response(status_code=status, headers=headers)  # as when the condition fails here: no body, so no type
    return Response(status.phrase, status_code=status, headers=headers, media_type="text/plain")


async def download_error(request: Request, exc: Exception) -> Response:
    """Answer for an exception handler: `Starlette(exception_handlers={FileError: download_error})`.

    An endpoint that calls `source.resolve` itself then gives the answers that `Download` gives.
    """
    if not isinstance(exc, FileError):
        raise DownloadError(f"download_error answers FileError, not {type(exc).__name__}") from exc
    return error_response(exc, request.scope)
