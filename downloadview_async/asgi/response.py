"""`DownloadResponse`: one file as one response, sent by a proxy where one is offered, else by us."""

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
from downloadview_async.errors import DownloadError, FileError
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
codecs.lookup("unicode_escape")  # now: when it is first needed, there may be no descriptor left to load it by

# Made here from the file itself. An application that could set them could promise what is not sent.
_MADE_HERE = FRAMING | {"etag", "last-modified"}


RawHeaders = list[tuple[bytes, bytes]]
"""Headers as ASGI wants them."""

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class DownloadResponse(Response):
    """Sends `file` to the client. It may be returned from any Starlette or FastAPI endpoint, and is an ASGI app.

    filename: what the client should call it; default: the file's own name. It is made safe for clients.
    attachment: to be saved (the default), or to be shown inline.
    content_type: the whole Content-Type; default: the file's own, or by its name.
    headers: further headers. Those that describe the framing, validators and offloads are made here: `ValueError`.
    status_code: with anything but 200 the whole file is sent, without conditions, ranges and offload. Not one that has
    no body: `ValueError`, as for a content type that is none and a header with a control character.
    redirect: sends a GET on to where else the file is, such as a `PresignedRedirect`; what it does not know is sent as
    ever. HEAD is answered here.
    offload: whether a proxy may send the file, if one is offered. By default it may, but not where there is a
    `background` task, and only after the application has returned: both may delete the file before a proxy has opened
    it. True says that the file stays where it is, so that the answer waits for nothing.

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
        redirect: Redirect | None = None,
        offload: bool | None = None,
    ) -> None:
        if content_type is not None and valid_content_type(content_type) is None:
            raise ValueError(f"not a content type: {content_type!r}")
        if status_code < 200 or status_code in (204, 205, 304):
            raise ValueError(f"a response with the status {status_code} has no body to send a file in")
        self.file = file
        self.presentation = _presentation(file.name if filename is None else filename, attachment, content_type)
        self.status_code = status_code
        self.background = background
        self.redirect = redirect if status_code == 200 else None
        self.offload = offload
        self.raw_headers = list(_checked_headers(tuple(headers.items()))) if headers else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request: offloaded, or as its method, conditions and ranges want it."""
        if not await self._answer_at_once(scope, receive, send):
            await until_the_client_leaves(partial(self._answer_or_error, scope, receive), receive, send)
        if self.background is not None:
            await self.background()

    async def _answer_or_error(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, send)
        except FileError as exc:
            await error_response(exc, scope)(scope, receive, send)

    async def _answer_at_once(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer with a local file that the kernel has at hand, and return whether it was one.

        It is offloaded, small and in the page cache, or the server's to send. Nobody has to listen for a client that
        leaves: nothing is waited for but the server, who knows.
        """
        if scope["method"] not in ("GET", "HEAD") or self.redirect is not None:
            return False
        order = self._order(scope)
        offload = None if isinstance(order, Refusal) else order
        if is_remote_order(offload):
            return False  # it may have to be signed, and that may take a while
        # conditions and ranges are for who sends the bytes
        request = DownloadRequest.from_headers(scope["method"], scope["headers"]) if offload is None else HEAD
        try:
            opened = open_nowait(self.file, request)
        except FileError:
            return False  # found again, and answered, by who waits
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
                return False
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
        # An endpoint may answer a POST with a file, too; conditions and ranges are not for that.
        readable = scope["method"] in ("GET", "HEAD")
        request = DownloadRequest.from_headers(scope["method"], scope["headers"]) if readable else GET
        # A POST would be repeated there, a HEAD is not what is signed.
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
            # One that is kept in a cache may be known to be there only when it is open.
            if refused is not None and not is_offered:
                refused = await self._hand_over(opened, request, scope, send)
                if refused is None:
                    return
            if refused is not None:
                note_refusal(refused, scope["method"], scope["path"])
            answer = self._answer_to(request, opened.metadata, None).aged(age_of(opened))
            path_send = (scope.get("extensions") or {}).get(PATHSEND)
            await send_plan(answer.plan, opened, self._start(answer, scope), send, path_send=path_send)

    async def _redirection(self) -> Plan | None:
        """Return the answer that sends the client where else the file is, or None. Raises `FileError`."""
        assert self.redirect is not None
        own = _text(header for header in self.raw_headers if header[0] != b"set-cookie")
        async with self.file.open(HEAD) as opened:
            described = describe(opened.metadata, self.presentation, own)
            if getattr(opened, "hides_coding", False):
                described.setdefault("content-encoding", "identity")  # else the store says what no client can use
        headers = await self.redirect.headers_for(self.file, described)
        return None if headers is None else make_redirect_plan(own, headers)

    async def _hand_over(self, opened: OpenFile, request: DownloadRequest, scope: Scope, send: Send) -> Refusal | None:
        """Answer with headers for a proxy, or return why none may send the file now that it is open."""
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
        """Keep the file open for as long as the answer waits for the application, which may delete it."""
        offer = scope["extensions"][EXTENSION]
        if self.offload or not isinstance(offer, Offer):
            return  # the application says that the file stays

        async def stream(receive: Receive, send: Send) -> None:
            request = DownloadRequest.from_headers(scope["method"], scope["headers"])
            answer = self._answer_to(request, local.metadata, None).aged(age_of(opened))
            work = partial(send_plan, answer.plan, local, self._start(answer, scope))
            await until_the_client_leaves(work, receive, send)

        path = self.file.location
        path = path if path is not None and os.path.isabs(path) else None
        offer.lend(Lent(local.shared(), path, start, stream))

    def _order(self, scope: Scope) -> Mapping[str, str] | Refusal | None:
        """Return the headers that have a proxy send the file, or why none may; None where none is offered."""
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
        """Return the answer to a request; keep it for the next time where that is allowed."""
        own = tuple(header for header in self.raw_headers if header[0] != b"set-cookie") if self.raw_headers else ()
        offered = None if offload is None else tuple(offload.items())
        if not keep or self.status_code != 200 or not is_shown_for_good(metadata.last_modified, time.time()):
            plan = _plan(request, metadata, self.presentation, own, offered, status=self.status_code)
            return _Answer(plan, _raw(plan.headers))
        if offered is not None or request.unconditional:
            return _kept_answer(request.method, metadata, self.presentation, own, offered)
        if (part := request.lone_part) is not None:
            return _kept_part(part, metadata, self.presentation, own)
        return _narrowed(_kept_answer(request.method, metadata, self.presentation, own, None), request, metadata)

    def _start(self, answer: "_Answer", scope: Scope) -> Message:
        headers = answer.headers.copy()  # the answer may be kept, and the message is anybody's to change
        if close := close_after_body(scope):
            headers += _raw(close)
        if self.raw_headers:
            headers += [header for header in self.raw_headers if header[0] == b"set-cookie"]
        return {"type": "http.response.start", "status": answer.plan.status, "headers": headers}


@dataclass(frozen=True, slots=True)
class _Answer:
    """A plan, its headers as ASGI wants them, and as HTTP/1.1 does if it is an answer to keep."""

    plan: Plan
    headers: RawHeaders
    head: PreparedHead | None = None

    def aged(self, age: str | None) -> "_Answer":
        """Return the answer with an Age, if there is one: every second another, so never a part of what is kept."""
        if age is None or self.plan.status not in (200, 206, 304) or "age" in self.plan.headers:
            return self
        field = (b"age", age.encode())
        head = None if self.head is None else self.head.with_field(field)
        return _Answer(self.plan, [*self.headers, field], head)


@lru_cache(maxsize=1024)
def _presentation(filename: str, attachment: bool, content_type: str | None) -> Presentation:
    return Presentation(filename=filename, attachment=attachment, content_type=content_type)


def _is_reserved(name: str) -> bool:
    return name in _MADE_HERE or name in OFFLOAD_HEADERS


@lru_cache(maxsize=256)
def _checked_headers(headers: tuple[tuple[str, str], ...]) -> RawHeaders:
    if reserved := {name.lower() for name, _ in headers if _is_reserved(name.lower())}:
        raise ValueError(f"a DownloadResponse makes these headers itself: {', '.join(sorted(reserved))}")
    if bad := [name for name, value in headers if _CONTROL.search(name + value)]:
        raise ValueError(f"a control character in a header: {bad!r}")
    return _raw({name.lower(): value for name, value in headers})


def _plan(
    request: DownloadRequest,
    metadata: FileMetadata,
    presentation: Presentation,
    own: tuple[tuple[bytes, bytes], ...],
    offload: tuple[tuple[str, str], ...] | None,
    *,
    status: int = 200,
) -> Plan:
    if offload is None:
        return make_plan(request, metadata, presentation, status=status, headers=_text(own))
    return make_offload_plan(metadata, presentation, dict(offload), headers=_text(own))


@lru_cache(maxsize=1024)  # nothing of it changes until the file does
def _kept_answer(
    method: str,
    metadata: FileMetadata,
    presentation: Presentation,
    own: tuple[tuple[bytes, bytes], ...],
    offload: tuple[tuple[str, str], ...] | None,
) -> _Answer:
    """Return the answer to a request that asks for nothing special."""
    plan = _plan(DownloadRequest(method=method), metadata, presentation, own, offload)
    headers = _raw(plan.headers)
    return _Answer(plan, headers, PreparedHead.of(headers))


@lru_cache(maxsize=256)  # not among the others: there are many more ranges than files
def _kept_part(
    part: str, metadata: FileMetadata, presentation: Presentation, own: tuple[tuple[bytes, bytes], ...]
) -> _Answer:
    """Return the answer to a GET of one part: players and viewers ask for the same ones again and again."""
    whole = _kept_answer("GET", metadata, presentation, own, None)
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
    """Return the Age of an answer with this file, or None where the origin was asked for this request."""
    made_at: float | None = getattr(opened, "made_at", None)
    return None if made_at is None else str(max(0, int(time.time() - made_at)))


def close_after_body(scope: Mapping[str, Any]) -> Headers:
    """Return the header that closes the connection after a request whose body is too long to be read for nothing."""
    fields = dict(scope["headers"])
    if b"content-length" not in fields and b"transfer-encoding" not in fields:
        return {}
    length = fields.get(b"content-length", b"0")
    endless = b"transfer-encoding" in fields or not length.isdigit() or len(length) > 9 or int(length) > MAX_UNREAD_BODY
    return {"connection": "close"} if endless and scope.get("http_version", "1.1").startswith("1") else {}


def note_refusal(refused: Refusal, method: str, path: str) -> None:
    """Log why no proxy sends a file, for an application that has offered one."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s %s: sent without the proxy, %s", escaped(method), shown(path), refused.value)


def failed(exc: FileError, method: str, path: str) -> Headers:
    """Log why a file cannot be sent, and return the headers of the answer that tells nobody."""
    level = logging.INFO if exc.status < 500 else logging.WARNING
    if logger.isEnabledFor(level):
        logger.log(level, "%s %s: %d, %s", escaped(method), shown(path), exc.status, escaped(str(exc)))
    headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
    return headers if exc.retry_after is None else {**headers, "Retry-After": exc.retry_after}


def error_response(exc: FileError, scope: Scope) -> Response:
    """Return the answer to a request whose file cannot be sent; why it cannot is logged, and told to nobody else.

    What a client may not see and what does not exist are one 404, to the letter.
    """
    status = exc.status
    headers = {**failed(exc, scope["method"], scope["path"]), **close_after_body(scope)}
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
