"""Answers to requests whose file cannot be sent, and the log lines that tell why."""

import codecs
import logging

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, request_id_of
from downloadview_async.asgi.delivery import Empty, Inline, deliver
from downloadview_async.asgi.disconnect import close_after_body
from downloadview_async.errors import DownloadError, FileError
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.plan import Headers
from downloadview_async.offload.decision import Refusal

logger = logging.getLogger("downloadview_async")
codecs.lookup("unicode_escape")  # load it now: when it is first needed, the process may have no descriptor left


def note_refusal(refused: Refusal, method: str, path: str) -> None:
    """Log at DEBUG why no proxy sends a file, although one was offered."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s %s: sent without the proxy, %s", escaped(method), shown(path), refused.value)


def failed(exc: FileError, method: str, path: str, request_id: str | None = None) -> Headers:
    """Log why a file cannot be sent, and return the headers of the answer, which does not tell the reason."""
    level = logging.INFO if exc.status < 500 else logging.WARNING
    if logger.isEnabledFor(level):
        end = "" if request_id is None else f" (request {request_id})"
        logger.log(level, "%s %s: %d, %s%s", escaped(method), shown(path), exc.status, escaped(str(exc)), end)
    headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
    if exc.challenge is not None:
        headers["WWW-Authenticate"] = exc.challenge
    return headers if exc.retry_after is None else {**headers, "Retry-After": exc.retry_after}


def error_response(exc: FileError, scope: Scope) -> Response:
    """Return the answer to a request whose file cannot be sent. The reason goes to the log, `detail` to the client.

    A file that the client may not see and a file that does not exist give exactly the same 404.
    """
    status = exc.status
    headers = {**failed(exc, scope["method"], scope["path"], request_id_of(scope)), **close_after_body(scope)}
    if status == 412:
        return Response(status_code=status, headers=headers)  # as if the condition had failed here: no body
    text = status.phrase if exc.detail is None else f"{status.phrase}: {exc.detail}"
    return Response(text, status_code=status, headers=headers, media_type="text/plain")


async def send_error(exc: FileError, scope: Scope, send: Send) -> None:
    """Send the answer to a request whose file cannot be sent."""
    response = error_response(exc, scope)
    start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    delivery = Empty() if scope["method"] == "HEAD" else Inline(bytes(response.body))
    await deliver(delivery, start, send, facts=scope.get(ACCOUNT))


async def download_error(request: Request, exc: Exception) -> Response:
    """Answer a `FileError`, as an exception handler: `Starlette(exception_handlers={FileError: download_error})`.

    With it, an endpoint that calls `source.resolve` itself gives the same answers as `Download`.
    """
    if not isinstance(exc, FileError):
        raise DownloadError(f"register download_error for FileError: it got {type(exc).__name__}") from exc
    return error_response(exc, request.scope)


async def refuse_websocket(scope: Scope, send: Send) -> None:
    """Close a WebSocket before it is accepted: servers answer with 403. Raises `AssertionError` for other scopes."""
    assert scope["type"] == "websocket", "a download is an answer to an HTTP request"
    await send({"type": "websocket.close", "code": 1000})
