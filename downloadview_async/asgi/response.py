"""`DownloadResponse`: one file as one response, sent by a proxy if one is offered, else by us."""

import codecs
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from downloadview_async.asgi.offer import Lent, Offer
from downloadview_async.asgi.transfer import (
    MAX_UNREAD_BODY,
    PATHSEND,
    PREPARED,
    Loan,
    PreparedHead,
    body_at_once,
    only_span,
    send_in_chunks,
    send_plan,
    until_the_client_leaves,
)
from downloadview_async.errors import ConfigurationError, DownloadError, FileError, FileMissing
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.fields import OFFLOAD_HEADERS
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.plan import (
    FRAMING,
    Headers,
    Plan,
    Presentation,
    describe,
    is_shown_for_good,
    make_offload_plan,
    make_plan,
    make_redirect_plan,
    narrowed,
)
from downloadview_async.http.request import GET, HEAD, DownloadRequest
from downloadview_async.offload.base import EXTENSION, OffloadBackend, Redirect, signed
from downloadview_async.offload.decision import Refusal, is_remote_order, refusal, refusal_once_open
from downloadview_async.sources.base import AsyncFile, OpenFile
from downloadview_async.sources.local.open_file import OpenLocalFile, local_of, open_nowait

logger = logging.getLogger("downloadview_async")
codecs.lookup("unicode_escape")  # load it now: when it is first needed, the process may have no descriptor left

# Made here from the file itself. An application that set them could promise other bytes than are sent.
_MADE_HERE = FRAMING | {"etag", "last-modified"}


RawHeaders = list[tuple[bytes, bytes]]
"""Headers in the form of an ASGI message."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class DownloadResponse(Response):
    """Sends `file` to the client. Any Starlette or FastAPI endpoint can return it, and it is an ASGI application.

    filename: the name under which the client saves the file, made safe for clients. Default: the file's name.
    attachment: True (the default) has the client save the file, False has it show the file inline.
    content_type: the whole Content-Type. Default: what the file says, else the type for its name.
    headers: further headers. Headers about the framing, the validators or an offload are made here and refused.
    status_code: with a status other than 200 the whole file is sent, without conditions, ranges and offload. A status
    without a body is refused.
    redirect: redirects a GET to another place of the file, such as a `PresignedRedirect`. A file that it does not know
    is sent from here. HEAD is always answered here.
    offload: whether a proxy may send the file, if one is offered. None: it may, but not if there is a `background`
    task, and only after the application has returned, since both may delete the file before the proxy has opened it.
    True: the file stays where it is, so the answer does not wait. False: no proxy sends it.

    The file is opened when the response is sent. If it is missing then, the answer is that of `error_response`: a 404.

    Raises `ConfigurationError` for a `file` that is not one, and `ValueError` for another argument that is refused: an
    invalid content type or status, a reserved header, a header with a control character.
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
        redirect: Redirect | None = None,
        offload: bool | None = None,
    ) -> None:
        if not hasattr(file, "open") or hasattr(file, "__fspath__"):
            raise _not_a_file(file)
        if content_type is not None and valid_content_type(content_type) is None:
            raise ValueError(f"{content_type!r} is not a content type: write one such as 'text/html; charset=utf-8'")
        if status_code < 200 or status_code in (204, 205, 304):
            raise ValueError(f"a response with the status {status_code} has no body, so it cannot send a file")
        self.file = file
        self.presentation = _presentation(file.name if filename is None else filename, attachment, content_type)
        self.status_code = status_code
        self.background = background
        self.redirect = redirect if status_code == 200 else None
        self.offload = offload
        self.raw_headers = list(_checked_headers(tuple(headers.items()))) if headers else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request: with an offload, or by its method, conditions and ranges. A WebSocket is refused."""
        if scope["type"] != "http":
            await refuse_websocket(scope, send)
        elif not await self._answer_at_once(scope, receive, send):
            await until_the_client_leaves(partial(self._answer_or_error, scope, receive), receive, send)
        if self.background is not None:
            await self.background()

    async def _answer_or_error(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, send)
        except FileError as exc:
            await error_response(exc, scope)(scope, receive, send)

    async def _answer_at_once(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer if that waits for nothing but the server, and return whether it did.

        That is so for a local file that can be opened without waiting, and that a proxy sends, that is small and in
        the page cache, or that the server sends by its descriptor. No task has to listen for the client to leave: the
        server notices that.
        """
        if scope["method"] not in ("GET", "HEAD") or self.redirect is not None:
            return False
        order = self._order(scope)
        offload = None if isinstance(order, Refusal) else order
        if is_remote_order(offload):
            return False  # its URL may have to be signed, and that may take a while
        # the proxy that sends the bytes evaluates conditions and ranges
        request = DownloadRequest.from_headers(scope["method"], scope["headers"]) if offload is None else HEAD
        try:
            opened = open_nowait(self.file, request)
        except FileMissing as exc:
            await error_response(exc, scope)(scope, receive, send)
            return True
        except FileError:
            return False  # opened again, with the time that it takes
        if opened is None or (local := local_of(opened)) is None:
            return False
        try:
            if offload is not None and self._refusal(opened, request, offload, scope) is not None:
                return False
            if isinstance(order, Refusal):
                note_refusal(order, scope["method"], scope["path"])
            answer = self._answer_to(request, opened.metadata, offload, keep=True).aged(age_of(opened))
            path_send = (scope.get("extensions") or {}).get(PATHSEND) or {}
            if (body := body_at_once(answer.plan, local)) is not None:
                start = self._start(answer, scope)
                if answer.head is not None and PREPARED in path_send:
                    start[PREPARED] = answer.head
                if offload is not None:
                    self._lend(local, local, start, scope)
                await send(start)
                await send({"type": "http.response.body", "body": body})
                return True
            span = only_span(answer.plan)
            if span is None or "descriptor" not in path_send:
                work = partial(self._send_or_error, answer, opened, scope, receive)
                await until_the_client_leaves(work, receive, send)
                return True
            await send(self._start(answer, scope))
            async with Loan(local) as loan:
                await send(loan.message(span))
                if await loan.returned(receive, send):
                    return True
            await until_the_client_leaves(partial(send_in_chunks, answer.plan, local), receive, send)
            return True
        finally:
            local.close()

    async def _answer(self, scope: Scope, send: Send) -> None:
        # An endpoint may answer a POST with a file too: conditions and ranges do not apply to that.
        readable = scope["method"] in ("GET", "HEAD")
        request = DownloadRequest.from_headers(scope["method"], scope["headers"]) if readable else GET
        # The client would repeat a POST there, and the URL is not signed for a HEAD.
        if scope["method"] == "GET" and self.redirect is not None and (plan := await self._redirection()) is not None:
            await send(self._start(_Answer(plan, _raw(plan.headers)), scope))
            await send({"type": "http.response.body", "body": b""})
            return
        order = self._order(scope)
        refused = order if isinstance(order, Refusal) else None
        is_offered = False
        if order is not None and not isinstance(order, Refusal):
            refused = refusal(method=scope["method"], is_remote=is_remote_order(order))
            is_offered = refused is None
        if is_offered:
            async with self.file.open(HEAD) as opened:
                if (refused := await self._hand_over(opened, request, scope, send)) is None:
                    return
        async with self.file.open(request) as opened:
            # A cached file may get its location only when it is opened.
            if refused is not None and not is_offered:
                refused = await self._hand_over(opened, request, scope, send)
                if refused is None:
                    return
            if refused is not None:
                note_refusal(refused, scope["method"], scope["path"])
            answer = self._answer_to(request, opened.metadata, None).aged(age_of(opened))
            await self._send(answer, opened, scope, send)

    async def _send(self, answer: "_Answer", opened: OpenFile, scope: Scope, send: Send) -> None:
        path_send = (scope.get("extensions") or {}).get(PATHSEND)
        await send_plan(answer.plan, opened, self._start(answer, scope), send, path_send=path_send)

    async def _send_or_error(
        self, answer: "_Answer", opened: OpenFile, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            await self._send(answer, opened, scope, send)
        except FileError as exc:
            await error_response(exc, scope)(scope, receive, send)

    async def _redirection(self) -> Plan | None:
        """Return the answer that redirects the client, or None: send the file. Raises `FileError`."""
        assert self.redirect is not None
        added = _text(header for header in self.raw_headers if header[0] != b"set-cookie")
        async with self.file.open(HEAD) as opened:
            described = describe(opened.metadata, self.presentation, added)
            if getattr(opened, "hides_coding", False):
                described.setdefault("content-encoding", "identity")  # else the store sends a useless coding
        headers = await self.redirect.headers_for(self.file, described)
        return None if headers is None else make_redirect_plan(added, headers)

    async def _hand_over(self, opened: OpenFile, request: DownloadRequest, scope: Scope, send: Send) -> Refusal | None:
        """Answer with headers for the proxy and return None, or return why no proxy may send the open file."""
        order = self._order(scope)
        assert order is not None
        if isinstance(order, Refusal):
            return order
        if (refused := self._refusal(opened, request, order, scope)) is not None:
            return refused
        offload = await signed(scope["extensions"][EXTENSION], self.file, order)
        answer = self._answer_to(HEAD, opened.metadata, offload).aged(age_of(opened))
        start = self._start(answer, scope)
        if (local := local_of(opened)) is not None:
            self._lend(opened, local, start, scope)
        await send(start)
        await send({"type": "http.response.body", "body": b""})
        return None

    def _lend(self, opened: OpenFile, local: OpenLocalFile, start: Message, scope: Scope) -> None:
        """Keep the file open while the answer waits for the application, which may delete the file."""
        offer = scope["extensions"][EXTENSION]
        if self.offload or not isinstance(offer, Offer):
            return  # the application promises that the file stays

        async def stream(receive: Receive, send: Send) -> None:
            request = DownloadRequest.from_headers(scope["method"], scope["headers"])
            answer = self._answer_to(request, local.metadata, None).aged(age_of(opened))
            work = partial(send_plan, answer.plan, local, self._start(answer, scope))
            await until_the_client_leaves(work, receive, send)

        path = self.file.location
        path = path if path is not None and os.path.isabs(path) else None
        offer.lend(Lent(local.shared(), path, start, stream))

    def _order(self, scope: Scope) -> Mapping[str, str] | Refusal | None:
        """Return the headers that have a proxy send the file, or why none may; None if no proxy is offered."""
        backend: OffloadBackend | None = (scope.get("extensions") or {}).get(EXTENSION)
        if backend is None:
            return None
        is_permitted = self.background is None if self.offload is None else self.offload
        refused = refusal(status=self.status_code, method=scope["method"], is_permitted=is_permitted)
        return refused or backend.headers_for(self.file) or Refusal.RULE

    def _refusal(
        self, opened: OpenFile, request: DownloadRequest, order: Mapping[str, str], scope: Scope
    ) -> Refusal | None:
        """Return why the proxy that obeys `order` may not send the open file, or None: it may."""
        is_coded = bool(self.raw_headers) and any(name == b"content-encoding" for name, _ in self.raw_headers)
        return refusal_once_open(
            opened,
            opened.metadata,
            request,
            method=scope["method"],
            is_remote=is_remote_order(order),
            is_coded=is_coded,
        )

    def _answer_to(
        self, request: DownloadRequest, metadata: FileMetadata, offload: Mapping[str, str] | None, *, keep: bool = False
    ) -> "_Answer":
        """Return the answer to a request. keep: whether it may come from, and go to, the cache of answers."""
        added = tuple(header for header in self.raw_headers if header[0] != b"set-cookie") if self.raw_headers else ()
        offered = None if offload is None else tuple(offload.items())
        if not keep or self.status_code != 200 or not is_shown_for_good(metadata.last_modified, time.time()):
            plan = _plan(request, metadata, self.presentation, added, offered, status=self.status_code)
            return _Answer(plan, _raw(plan.headers))
        if offered is not None or request.unconditional:
            return _kept_answer(request.method, metadata, self.presentation, added, offered)
        if (part := request.lone_part) is not None:
            return _kept_part(part, metadata, self.presentation, added)
        return _narrowed(_kept_answer(request.method, metadata, self.presentation, added, None), request, metadata)

    def _start(self, answer: "_Answer", scope: Scope) -> Message:
        headers = answer.headers.copy()  # the answer may be cached, and any middleware may change the message
        if close := close_after_body(scope):
            headers += _raw(close)
        if self.raw_headers:
            headers += [header for header in self.raw_headers if header[0] == b"set-cookie"]
        return {"type": "http.response.start", "status": answer.plan.status, "headers": headers}


@dataclass(frozen=True, slots=True)
class _Answer:
    """A plan and its headers for ASGI. head: the same as lines of HTTP/1.1, for an answer that is cached."""

    plan: Plan
    headers: RawHeaders
    head: PreparedHead | None = None

    def aged(self, age: str | None) -> "_Answer":
        """Return the answer with Age, if there is one. Age changes every second, so it is not in a cached answer."""
        if age is None or self.plan.status not in (200, 206, 304) or "age" in self.plan.headers:
            return self
        field = (b"age", age.encode())
        head = None if self.head is None else self.head.with_field(field)
        return _Answer(self.plan, [*self.headers, field], head)


def _not_a_file(value: object) -> ConfigurationError:
    if hasattr(value, "__await__"):
        return ConfigurationError("DownloadResponse takes a file, not a coroutine: await source.resolve(...) first")
    return ConfigurationError(
        f"DownloadResponse takes a file, such as await source.resolve('a.txt') or LocalFile('a.txt'), not {value!r}"
    )


@lru_cache(maxsize=1024)
def _presentation(filename: str, attachment: bool, content_type: str | None) -> Presentation:
    return Presentation(filename=filename, attachment=attachment, content_type=content_type)


def _is_reserved(name: str) -> bool:
    return name in _MADE_HERE or name in OFFLOAD_HEADERS


@lru_cache(maxsize=256)
def _checked_headers(headers: tuple[tuple[str, str], ...]) -> RawHeaders:
    if reserved := {name.lower() for name, _ in headers if _is_reserved(name.lower())}:
        raise ValueError(f"remove {', '.join(sorted(reserved))} from headers: DownloadResponse makes these itself")
    if bad := [name for name, value in headers if _CONTROL.search(name + value)]:
        raise ValueError(f"remove the control characters from these headers: {', '.join(map(repr, bad))}")
    return _raw({name.lower(): value for name, value in headers})


def _plan(
    request: DownloadRequest,
    metadata: FileMetadata,
    presentation: Presentation,
    added: tuple[tuple[bytes, bytes], ...],
    offload: tuple[tuple[str, str], ...] | None,
    *,
    status: int = 200,
) -> Plan:
    if offload is None:
        return make_plan(request, metadata, presentation, status=status, headers=_text(added))
    return make_offload_plan(metadata, presentation, dict(offload), headers=_text(added))


@lru_cache(maxsize=1024)  # the answer changes only when the file does: `metadata` is part of the key
def _kept_answer(
    method: str,
    metadata: FileMetadata,
    presentation: Presentation,
    added: tuple[tuple[bytes, bytes], ...],
    offload: tuple[tuple[str, str], ...] | None,
) -> _Answer:
    """Return the answer to a request without conditions and ranges."""
    plan = _plan(DownloadRequest(method=method), metadata, presentation, added, offload)
    headers = _raw(plan.headers)
    return _Answer(plan, headers, PreparedHead.of(headers))


@lru_cache(maxsize=256)  # a separate cache: there are many more ranges than files
def _kept_part(
    part: str, metadata: FileMetadata, presentation: Presentation, added: tuple[tuple[bytes, bytes], ...]
) -> _Answer:
    """Return the answer to a GET of one part. Players and viewers request the same parts again and again."""
    whole = _kept_answer("GET", metadata, presentation, added, None)
    return _narrowed(whole, DownloadRequest(range=part), metadata)


def _narrowed(whole: _Answer, request: DownloadRequest, metadata: FileMetadata) -> _Answer:
    plan = narrowed(whole.plan, request, metadata)
    return whole if plan is whole.plan else _Answer(plan, _raw(plan.headers))


def _text(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    text = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return {name: value for name, value in text.items() if not _is_reserved(name)}


def _raw(headers: Mapping[str, str]) -> RawHeaders:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def age_of(opened: OpenFile) -> str | None:
    """Return the value of Age for an open file in seconds, or None if the origin has answered this request itself."""
    made_at: float | None = getattr(opened, "made_at", None)
    return None if made_at is None else str(max(0, int(time.time() - made_at)))


async def refuse_websocket(scope: Scope, send: Send) -> None:
    """Close a WebSocket before it is accepted: servers answer with 403. Raises `AssertionError` for other scopes."""
    assert scope["type"] == "websocket", "a download is an answer to an HTTP request"
    await send({"type": "websocket.close", "code": 1000})


def close_after_body(scope: Mapping[str, Any]) -> Headers:
    """Return `Connection: close` for a request whose body is too long to be read and dropped, else nothing."""
    fields = dict(scope["headers"])
    if b"content-length" not in fields and b"transfer-encoding" not in fields:
        return {}
    length = fields.get(b"content-length", b"0")
    endless = b"transfer-encoding" in fields or not length.isdigit() or len(length) > 9 or int(length) > MAX_UNREAD_BODY
    return {"connection": "close"} if endless and scope.get("http_version", "1.1").startswith("1") else {}


def note_refusal(refused: Refusal, method: str, path: str) -> None:
    """Log at DEBUG why no proxy sends a file, although one was offered."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s %s: sent without the proxy, %s", escaped(method), shown(path), refused.value)


def failed(exc: FileError, method: str, path: str) -> Headers:
    """Log why a file cannot be sent, and return the headers of the answer, which does not tell the reason."""
    level = logging.INFO if exc.status < 500 else logging.WARNING
    if logger.isEnabledFor(level):
        logger.log(level, "%s %s: %d, %s", escaped(method), shown(path), exc.status, escaped(str(exc)))
    headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
    return headers if exc.retry_after is None else {**headers, "Retry-After": exc.retry_after}


def error_response(exc: FileError, scope: Scope) -> Response:
    """Return the answer to a request whose file cannot be sent. The reason goes to the log alone.

    A file that the client may not see and a file that does not exist give exactly the same 404.
    """
    status = exc.status
    headers = {**failed(exc, scope["method"], scope["path"]), **close_after_body(scope)}
    if status == 412:
        return Response(status_code=status, headers=headers)  # as if the condition had failed here: no body
    return Response(status.phrase, status_code=status, headers=headers, media_type="text/plain")


async def download_error(request: Request, exc: Exception) -> Response:
    """Answer a `FileError`, as an exception handler: `Starlette(exception_handlers={FileError: download_error})`.

    With it, an endpoint that calls `source.resolve` itself gives the same answers as `Download`.
    """
    if not isinstance(exc, FileError):
        raise DownloadError(f"register download_error for FileError: it got {type(exc).__name__}") from exc
    return error_response(exc, request.scope)
