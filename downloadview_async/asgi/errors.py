"""Answers to requests whose file cannot be sent, and the log lines that tell why."""

import codecs
import inspect
import logging
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, note_facts, request_id_of
from downloadview_async.asgi.delivery import Empty, Inline, deliver
from downloadview_async.asgi.disconnect import close_after_body, listened_to_elsewhere
from downloadview_async.asgi.extensions import RAISES, raises_errors
from downloadview_async.errors import DownloadError, FileError
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.plan import Headers
from downloadview_async.offload.decision import Refusal

logger = logging.getLogger("downloadview_async")
codecs.lookup("unicode_escape")  # load it now: when it is first needed, the process may have no descriptor left

# Frameworks find the answer to an error by its base classes. `errors.py` must not know a framework.
FileError.__bases__ = (DownloadError, HTTPException)


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
    return exc.headers


def error_response(exc: FileError, scope: Scope) -> Response:
    """Return the answer to a request whose file cannot be sent. The reason goes to the log, `detail` to the client.

    A file that the client may not see and a file that does not exist give exactly the same 404.
    """
    status = exc.status
    headers = {**failed(exc, scope["method"], scope["path"], request_id_of(scope)), **close_after_body(scope)}
    if status == 412:
        return Response(status_code=status, headers=headers)  # as if the condition had failed here: no body
    return Response(exc.text, status_code=status, headers=headers, media_type="text/plain")


async def send_error(exc: FileError, scope: Scope, send: Send) -> None:
    """Send the answer to a request whose file cannot be sent.

    In an application that answers `HTTPException` in its own way, as FastAPI does, the file is refused in that way too:
    else a client could tell a file that is missing from a name that the application refuses. Litestar and Quart get the
    error, and answer it.
    """
    if exc.status != 412:
        if (handler := _handler_of(exc, scope)) is not None:
            failed(exc, scope["method"], scope["path"], request_id_of(scope))
            await _send_answer_of(handler, exc, scope, send)
            return
        if raises_errors(scope):
            if RAISES not in scope:  # there, the caller logs it
                failed(exc, scope["method"], scope["path"], request_id_of(scope))
            note_facts(scope, kind="error")
            raise exc
    response = error_response(exc, scope)
    start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    delivery = Empty() if scope["method"] == "HEAD" else Inline(bytes(response.body))
    await deliver(delivery, start, send, facts=scope.get(ACCOUNT))


def _handler_of(exc: FileError, scope: Scope) -> Callable[..., Any] | None:
    """Return what answers an error in an application of Starlette's kind; None if that would be our own answer."""
    if (handlers := scope.get("starlette.exception_handlers")) is None:
        return None
    by_class, by_status = handlers
    handler = by_status.get(exc.status_code)
    if handler is None:
        handler = next((by_class[cls] for cls in type(exc).__mro__ if cls in by_class), None)
    is_ours = handler is download_error or getattr(handler, "__func__", None) is ExceptionMiddleware.http_exception
    return None if is_ours else handler


async def _send_answer_of(handler: Callable[..., Any], exc: FileError, scope: Scope, send: Send) -> None:
    request = Request(scope)
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__):
        response = await handler(request, exc)
    else:
        response = await run_in_threadpool(handler, request, exc)
        if inspect.isawaitable(response):  # of a partial of an async function
            response = await response
    if isinstance(response, Response):
        response.headers.update(close_after_body(scope))
    note_facts(scope, kind="error")
    await response(scope, listened_to_elsewhere, send)


async def download_error(request: Request, exc: Exception) -> Response:
    """Answer a `FileError`, as an exception handler: `Starlette(exception_handlers={FileError: download_error})`.

    Without it, the application answers a `FileError` as it answers its own `HTTPException`. With it, the answer is
    plain text, and the reason is logged, also for an error of `source.resolve` in an endpoint.
    """
    if not isinstance(exc, FileError):
        raise DownloadError(f"register download_error for FileError: it got {type(exc).__name__}") from exc
    return error_response(exc, request.scope)


async def refuse_websocket(scope: Scope, send: Send) -> None:
    """Close a WebSocket before it is accepted: servers answer with 403. Raises `AssertionError` for other scopes."""
    assert scope["type"] == "websocket", "a download is an answer to an HTTP request"
    await send({"type": "websocket.close", "code": 1000})
