"""`DownloadResponse`: one file as one response, sent by a proxy if one is offered, else by us."""

import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, closing, nullcontext
from functools import lru_cache, partial

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts, request_id_of
from downloadview_async.accounts.listeners import tell
from downloadview_async.accounts.outcome import Listener
from downloadview_async.asgi.accounts import Account, Connection, hold_accounts
from downloadview_async.asgi.answer import Answer, RawHeaders, age_of, answer_to, is_reserved, raw, text_of
from downloadview_async.asgi.deadline import in_time
from downloadview_async.asgi.delivery import (
    Delivery,
    Descriptor,
    Empty,
    Inline,
    Offloaded,
    Redirected,
    deliver,
    delivery_of,
)
from downloadview_async.asgi.departures import answer_until_departure
from downloadview_async.asgi.disconnect import (
    close_after_body,
    has_body,
    until_the_client_leaves,
    until_the_connection_is_lost,
)
from downloadview_async.asgi.errors import note_refusal, refuse_websocket, send_error
from downloadview_async.asgi.extensions import CONNECTION, PATHSEND, PREPARED, SEND_LATER
from downloadview_async.asgi.handed_over import awaits_line, hand_over
from downloadview_async.asgi.kept_answers import KeptAnswers
from downloadview_async.asgi.limiting import ask_together, deliver_limited, path_send_for, spend
from downloadview_async.asgi.offer import Lent, Offer
from downloadview_async.asgi.send_later import SendLater
from downloadview_async.asgi.uses import Counted, claim
from downloadview_async.asgi.zero_copy import with_zero_copy
from downloadview_async.errors import (
    FileError,
    FileMissing,
    SourceUnavailable,
    WrongType,
    abort_reason,
    wrong_type,
)
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.fields import TOKEN_CHAR
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.plan import Plan, Presentation, describe, make_redirect_plan
from downloadview_async.http.request import GET, HEAD, DownloadRequest
from downloadview_async.offload.base import (
    EXTENSION,
    CountedRedirect,
    OffloadBackend,
    Redirect,
    RedirectHeaders,
    is_checked,
    is_quick,
    rated,
    signed,
)
from downloadview_async.offload.decision import Refusal, is_remote_order, refusal, refusal_once_open
from downloadview_async.policy.access import SignedLinks
from downloadview_async.policy.grants import GRANT, Grant
from downloadview_async.policy.limits.limits import TRANSFERS
from downloadview_async.policy.uses import TOGETHER, USE
from downloadview_async.sources.base import AsyncFile, OpenFile, cache_status_of, is_file
from downloadview_async.sources.digests.known import Digests
from downloadview_async.sources.local.open_file import local_of, open_nowait

Order = Mapping[str, str]
"""The headers that have a proxy send a file."""

_KEPT = Inline, Offloaded, Descriptor  # ways in which the answer may leave again: see `KeptAnswers`
_BY_PREPARED_HEAD = (*_KEPT, Empty)  # ways in which the whole body follows at once
_NAME = re.compile(f"{TOKEN_CHAR}+")
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
    background: runs after the answer, as in Starlette: also if the client has left meanwhile, but not after an error.
    on_outcome: gets the `Outcome` of this answer, like a listener of `Accounts`, with or without one around the
    application.

    If the request has come by a link, what that says about the name, the disposition, the type and Cache-Control wins.
    If the link allows a number of downloads, it is counted before the first byte is sent.

    The file is opened when the response is sent. If it is missing then, the answer is that of `error_response`: a 404.

    Raises `WrongType`, which is also a `TypeError`, for an argument of another type, such as a path or a coroutine in
    place of the file, and `ValueError` for another value that is refused: an invalid content type or status, a reserved
    header, a header with a control character or beyond Latin-1.
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
        on_outcome: Listener | None = None,
    ) -> None:
        if not is_file(file):
            raise _not_a_file(file)
        if not (attachment is True or attachment is False):
            raise wrong_type("attachment takes True (save the file) or False (show it)", attachment)
        if content_type is not None and (not isinstance(content_type, str) or valid_content_type(content_type) is None):
            raise ValueError(f"{content_type!r} is not a content type: write one such as 'text/html; charset=utf-8'")
        if headers is not None and not hasattr(headers, "items"):
            raise wrong_type("headers takes a dictionary, such as {'X-Robots-Tag': 'noindex'}", headers)
        if status_code != 200:
            _check_status(status_code)
        if filename is not None and not isinstance(filename, str):
            raise wrong_type("filename takes a str", filename)
        if on_outcome is not None and not callable(on_outcome):
            raise wrong_type("on_outcome takes a function of an Outcome", on_outcome)
        if background is not None and not isinstance(background, BackgroundTask):
            raise wrong_type("background takes a task, such as BackgroundTask(function)", background)
        if redirect is not None or offload is not None:
            check_ways(redirect, offload)
        self.file = file
        self.presentation = _presentation(file.name if filename is None else filename, attachment, content_type)
        self.status_code = status_code
        self.background = background
        self.redirect = redirect if status_code == 200 else None
        self.offload = offload
        self._on_outcome = on_outcome
        self.ends_request = False
        """Whether no code that could delete the file runs after the answer: set by `Download`."""
        self.missing: Callable[[FileMissing, Scope, Send], Awaitable[None]] | None = None
        """Answers instead of the 404 of a file that is missing, if it is set."""
        self.digests: Digests | None = None
        """The digests of the files of `Download`, where this one is called `digest_name`."""
        self.digest_name = ""
        self.kept_answers: KeptAnswers | None = None
        """Where the answer may be kept, because the target of the request and the file decide it: set by `Download`."""
        self.links: SignedLinks | None = None
        """The links without which nobody gets the answer that is kept, if it needs one: set by `Download`."""
        self.raw_headers = list(checked_headers(tuple(headers.items()))) if headers else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request: with an offload, or by its method, conditions and ranges. A WebSocket is refused."""
        if (grant := scope.get(GRANT)) is not None:
            self._follow(grant)
            if ACCOUNT in scope:
                scope[ACCOUNT].allow(grant.user, grant.link_id)
        if scope["type"] != "http":
            await refuse_websocket(scope, send)
        elif not ((extensions := scope.get("extensions")) and CONNECTION in extensions):
            scope, send = with_zero_copy(scope, receive), in_time(scope, send)
            await answer_until_departure(self._respond_and_count, scope, receive, send)
        elif self._on_outcome is not None or USE in scope:
            await self._respond_and_count(scope, receive, send)
        elif not await self._answer_nowait(scope, receive, send):  # the server watches its clients
            await self._answer_or_leave(scope, receive, send)
        if self.background is not None:
            if TRANSFERS in scope:
                scope[TRANSFERS].end()
            await self.background()

    def _follow(self, grant: Grant) -> None:
        """Present the file as the grant says, by which the request has come."""
        shown, before = self.presentation, self.raw_headers
        if not (grant.filename is None and grant.attachment is None and grant.content_type is None):
            self.presentation = _presentation(
                shown.filename if grant.filename is None else grant.filename,
                shown.attachment if grant.attachment is None else grant.attachment,
                grant.content_type or shown.content_type,
            )
        chosen = None
        if before:
            chosen = next((value.decode("latin-1") for name, value in before if name == b"cache-control"), None)
            self.raw_headers = [field for field in before if field[0] != b"cache-control"]
        cache_control = grant.cache_control(chosen, time.time()).encode("latin-1")
        self.raw_headers.append((b"cache-control", cache_control))

    async def _respond_and_count(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            if self._on_outcome is not None:
                account = stack.enter_context(Account.within(scope, send, partial(tell, self._on_outcome)))
                scope, receive, send = {**scope, ACCOUNT: account}, account.receiving(receive), account.send
            if USE in scope:
                counted = await stack.enter_async_context(Counted(scope[USE], scope, send))
                scope, send = counted.scope, counted.send
            if not await self._answer_nowait(scope, receive, send):
                await self._answer_or_leave(scope, receive, send)

    def _answer_or_leave(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer with all the time that it takes, or until the client leaves."""
        work = partial(self._answer_or_error, scope)
        connection: Connection | None = (scope.get("extensions") or {}).get(CONNECTION)
        if connection is None or has_body(scope) or not connection.tells_what(receive):
            return until_the_client_leaves(work, receive, send)
        return until_the_connection_is_lost(work, connection, send)

    async def _answer_nowait(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer if the file can be opened without waiting, and return whether that was so.

        No task has to listen for the client to leave while a server sends such a file: the server notices that.
        """
        if self.redirect is not None:
            return await self._redirect_nowait(scope, send)
        if scope["method"] not in ("GET", "HEAD"):
            return False
        if TRANSFERS in scope and scope[TRANSFERS].may_wait:
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
            if self.missing is not None:
                return False
            await send_error(exc, scope, send)
            return True
        except FileError:
            return False  # opened again, with the time that it takes
        if opened is None or (local := local_of(opened)) is None:
            return False
        with closing(local):
            if offload is not None and self._refusal(opened, request, offload, scope) is not None:
                return False
            metadata = opened.metadata
            if self.digests is not None:
                described = self.digests.kept(self.digest_name, metadata)
                if described is None:
                    return False  # they have to be looked up
                metadata = described
            if isinstance(order, Refusal):
                note_refusal(order, scope["method"], scope["path"])
            try:
                await self._deliver(opened, metadata, request, offload, scope, send, receive)
            except FileError as exc:
                if abort_reason(exc) == "file-changed":
                    return False  # opened again
                await send_error(exc, scope, send)
        return True

    async def _answer_or_error(self, scope: Scope, send: Send) -> None:
        try:
            try:
                await self._answer(scope, send)
            except SourceUnavailable as exc:
                if abort_reason(exc) != "file-changed":
                    raise
                await self._answer(scope, send)  # nothing has been sent yet, and there is a new version to send
        except FileError as exc:
            if self.missing is not None and isinstance(exc, FileMissing):
                await self.missing(exc, scope, send)
            else:
                await send_error(exc, scope, send)

    async def _answer(self, scope: Scope, send: Send) -> None:
        # An endpoint may answer a POST with a file too: conditions and ranges do not apply to that.
        readable = scope["method"] in ("GET", "HEAD")
        request = DownloadRequest.from_headers(scope["method"], scope["headers"]) if readable else GET
        # The client would repeat a POST there, and the URL is not signed for a HEAD.
        if (
            scope["method"] == "GET"
            and self.redirect is not None
            and (redirection := await self._redirection(scope)) is not None
        ):
            start = self._start(redirection, scope)
            await deliver(Redirected(), start, send, facts=scope.get(ACCOUNT))
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
            await self._deliver(opened, await self._described(opened), request, None, scope, send)

    async def _hand_over(self, opened: OpenFile, request: DownloadRequest, scope: Scope, send: Send) -> Refusal | None:
        """Answer with headers for the proxy and return None, or return why no proxy may send the open file."""
        order = self._order(scope)
        assert order is not None
        if isinstance(order, Refusal):
            return order
        if (refused := self._refusal(opened, request, order, scope)) is not None:
            return refused
        offload = await signed(scope["extensions"][EXTENSION], self.file, order)
        await self._deliver(opened, await self._described(opened), HEAD, offload, scope, send)
        return None

    async def _described(self, opened: OpenFile) -> FileMetadata:
        """Return the metadata of the open file, with its digests where they are known."""
        return opened.metadata if self.digests is None else await self.digests.find(self.digest_name, opened)

    async def _deliver(
        self,
        opened: OpenFile,
        metadata: FileMetadata,
        request: DownloadRequest,
        offload: Order | None,
        scope: Scope,
        send: Send,
        receive: Receive | None = None,
    ) -> None:
        """Send the answer to a request for the open file. receive: given if nothing listens for the client to leave."""
        keep = receive is not None
        if metadata.digests and offload is not None and _wants_a_digest(scope):
            request = DownloadRequest.from_headers("HEAD", scope["headers"])  # the proxy evaluates the rest of it
        answer = answer_to(
            request,
            metadata,
            self.presentation,
            self.raw_headers,
            offload,
            status=self.status_code,
            keep=keep or metadata.is_pinned,
        )
        answer = answer.from_cache(age_of(opened), cache_status_of(self.file))
        start = self._start(answer, scope)
        extensions = scope.get("extensions") or {}
        path_send = extensions.get(PATHSEND)
        delivery: Delivery
        if offload is None:
            delivery = delivery_of(answer.plan, opened, path_send_for(scope, path_send), is_fresh=keep)
            if TRANSFERS in scope or USE in scope:
                await _count(scope, metadata, answer.plan)
        else:
            await _count(scope, metadata)
            if TRANSFERS in scope:
                hand_over(scope, offload)
            offer = scope["extensions"][EXTENSION]
            delivery = Offloaded(next(iter(offload)).lower())
            if isinstance(offer, Offer) and not (self.offload or (self.ends_request and keep)):
                self._lend(opened, metadata, offer, start, scope)
        facts: Facts | None = scope.get(ACCOUNT)
        if facts is not None:
            facts.describe(self.file.name, metadata.etag, metadata.size)
        if answer.head is not None and path_send and PREPARED in path_send and isinstance(delivery, _BY_PREPARED_HEAD):
            start[PREPARED] = answer.head
            is_all = len(start["headers"]) == len(answer.head.headers)
            if self.kept_answers is not None and keep and is_all and isinstance(delivery, _KEPT):
                self.kept_answers.keep(scope, self.file, metadata, answer.head, delivery, facts, self.links)
        later: SendLater | None = extensions.get(SEND_LATER)
        if receive is None or type(delivery) is not Descriptor or not self._may_send_later(scope):
            later = None
        elif later is not None:
            delivery.later = later
        try:
            if TRANSFERS in scope:
                await deliver_limited(delivery, start, send, scope=scope, receive=receive, facts=facts)
            else:
                await deliver(delivery, start, send, receive=receive, facts=facts)
        except BaseException:
            if later is not None:
                later.drop()
            raise
        if later is not None and later.is_used:
            if TRANSFERS in scope:
                later.contexts += (scope[TRANSFERS].last(),)
            later.accounts = hold_accounts(facts, None)

    def _may_send_later(self, scope: Scope) -> bool:
        """Return whether nothing is to be done when the file has been sent that has to be done here."""
        if self.background is not None or USE in scope or TOGETHER in scope:
            return False
        return TRANSFERS not in scope or bool(scope[TRANSFERS].may_last)

    async def _redirect_nowait(self, scope: Scope, send: Send) -> bool:
        """Redirect the client if that needs no wait for the file or for a key, and return whether it was so."""
        redirect = self.redirect
        if scope["method"] != "GET" or not is_quick(redirect):
            return False
        if TRANSFERS in scope and scope[TRANSFERS].may_wait:
            return False
        try:
            opened = open_nowait(self.file, HEAD) if is_checked(redirect) else None
        except FileError:
            return False  # opened again, for its answer
        local = None if opened is None else local_of(opened)
        if local is None and is_checked(redirect):
            return False
        with nullcontext() if local is None else closing(local):
            try:
                answer = await self._redirection_of(opened, scope)
            except FileError as exc:
                await send_error(exc, scope, send)
                return True
        if answer is None:
            return False
        await deliver(Redirected(), self._start(answer, scope), send, facts=scope.get(ACCOUNT))
        return True

    async def _redirection(self, scope: Scope) -> Answer | None:
        """Return the answer that redirects the client, or None: send the file. Raises `FileError`."""
        if not is_checked(self.redirect):
            return await self._redirection_of(None, scope)
        async with self.file.open(HEAD) as opened:
            return await self._redirection_of(opened, scope)

    async def _redirection_of(self, opened: OpenFile | None, scope: Scope) -> Answer | None:
        """Do what `_redirection` does for an open file. None: for one that is described by its name."""
        redirect = self.redirect
        assert redirect is not None
        added = text_of(header for header in self.raw_headers if header[0] != b"set-cookie")
        metadata = FileMetadata() if opened is None else opened.metadata
        described = describe(metadata, self.presentation, added)
        if getattr(opened, "hides_coding", False):
            described.setdefault("content-encoding", "identity")  # else the store sends a useless coding
        request_id = request_id_of(scope)
        if request_id is not None:
            scope[ACCOUNT].describe(self.file.name, metadata.etag, metadata.size)
        headers: RedirectHeaders | None
        if request_id is not None and isinstance(redirect, CountedRedirect):
            headers = await redirect.counted_headers_for(self.file, described, request_id)
        else:
            headers = await redirect.headers_for(self.file, described)
        if headers is None:
            return None
        await _count(scope, metadata)
        single = {name: value for name, value in headers.items() if isinstance(value, str)}
        plan = make_redirect_plan(added, single)
        lines = [(name, line) for name, value in headers.items() if not isinstance(value, str) for line in value]
        answer = Answer(plan, [*raw(plan.headers), *(field for name, line in lines for field in raw({name: line}))])
        if self.kept_answers is not None and not (
            isinstance(redirect, CountedRedirect) or "content-encoding" in described
        ):
            facts: Facts | None = scope.get(ACCOUNT)
            fields = self._start(answer, scope)["headers"]
            self.kept_answers.keep_redirect(
                scope, self.file, metadata, fields, redirect, described, headers, facts, self.links
            )
        return answer

    def _lend(self, opened: OpenFile, metadata: FileMetadata, offer: Offer, start: Message, scope: Scope) -> None:
        """Keep a local file open while the answer waits for the application, which may delete the file."""
        local = local_of(opened)
        if local is None:
            return

        async def stream(receive: Receive, send: Send) -> None:
            request = DownloadRequest.from_headers(scope["method"], scope["headers"])
            answer = answer_to(request, metadata, self.presentation, self.raw_headers)
            answer = answer.from_cache(age_of(opened), cache_status_of(self.file))
            start = self._start(answer, scope)
            try:
                send_it = partial(deliver_limited, scope=scope) if TRANSFERS in scope else deliver
                await send_it(delivery_of(answer.plan, local), start, send, receive=receive, facts=scope.get(ACCOUNT))
            except FileError as exc:
                await send_error(exc, scope, send)

        path = self.file.location
        path = path if path is not None and os.path.isabs(path) else None
        offer.lend(Lent(local.shared(), path, start, stream, hold_accounts(scope.get(ACCOUNT), offer.facts)))

    def _order(self, scope: Scope) -> Order | Refusal | None:
        """Return the headers that have a proxy send the file, or why none may; None if no proxy is offered."""
        backend: OffloadBackend | None = (scope.get("extensions") or {}).get(EXTENSION)
        if backend is None:
            return None
        is_permitted = self.background is None if self.offload is None else self.offload
        refused = refusal(status=self.status_code, method=scope["method"], is_permitted=is_permitted)
        if refused is not None or (order := backend.headers_for(self.file)) is None:
            return refused or Refusal.RULE
        return rated(backend, order, scope[TRANSFERS].rate) if TRANSFERS in scope else order

    def _refusal(self, opened: OpenFile, request: DownloadRequest, order: Order, scope: Scope) -> Refusal | None:
        """Return why the proxy that obeys `order` may not send the open file, or None: it may."""
        is_coded = bool(self.raw_headers) and any(name == b"content-encoding" for name, _ in self.raw_headers)
        if is_awaited := awaits_line(scope, order):
            request = DownloadRequest.from_headers(scope["method"], scope["headers"])
        return refusal_once_open(
            opened,
            opened.metadata,
            request,
            method=scope["method"],
            is_remote=is_remote_order(order),
            is_coded=is_coded,
            awaits_line=is_awaited,
        )

    def _start(self, answer: Answer, scope: Scope) -> Message:
        headers = answer.headers.copy()  # the answer may be cached, and any middleware may change the message
        if close := close_after_body(scope):
            headers += raw(close)
        if self.raw_headers:
            headers += [header for header in self.raw_headers if header[0] == b"set-cookie"]
        return {"type": "http.response.start", "status": answer.plan.status, "headers": headers}


async def _count(scope: Scope, metadata: FileMetadata, plan: Plan | None = None) -> None:
    """Count an answer in the limits, and as a use of its link. plan: None if another server sends the file.

    Raises what `spend` and `claim` raise.
    """
    if TOGETHER in scope:
        await ask_together(scope, metadata, plan)
        return
    if TRANSFERS in scope and (spending := spend(scope, metadata, plan)) is not None:
        await spending
    if USE in scope:
        await claim(scope[USE], metadata, plan)


def _wants_a_digest(scope: Scope) -> bool:
    return b"want-repr-digest" in dict(scope["headers"])


def _not_a_file(value: object) -> WrongType:
    if hasattr(value, "__await__"):
        return WrongType("DownloadResponse takes a file, not a coroutine: await source.resolve(...) first")
    return wrong_type(
        "DownloadResponse takes a file, such as await source.resolve('a.txt') or LocalFile('a.txt')", value
    )


def _check_status(status: int) -> None:
    if not isinstance(status, int):
        raise wrong_type("status_code takes a number, such as 200", status)
    if status < 200 or status in (204, 205, 304):
        raise ValueError(f"a response with the status {status} has no body, so it cannot send a file")


def check_ways(redirect: object, offload: object) -> None:
    """Raise `WrongType` for values that do not say where, or by whom, a file is sent."""
    if redirect is not None and (not hasattr(redirect, "headers_for") or isinstance(redirect, type)):
        raise wrong_type("redirect takes a redirect, such as PresignedRedirect(storage)", redirect)
    if not (offload is None or isinstance(offload, bool)):
        raise wrong_type("offload takes True, False or None: OffloadMiddleware names the proxy", offload)


@lru_cache(maxsize=1024)
def _presentation(filename: str, attachment: bool, content_type: str | None) -> Presentation:
    return Presentation(filename=filename, attachment=attachment, content_type=content_type)


@lru_cache(maxsize=256)
def checked_headers(headers: tuple[tuple[str, str], ...]) -> RawHeaders:
    """Return further headers as a server needs them. Raises `ValueError` for a header that is refused."""
    if bad := [name for name, value in headers if not _is_latin(name) or not _is_latin(value)]:
        raise ValueError(f"write these headers as text in Latin-1: {', '.join(map(repr, bad))}")
    if reserved := {name.lower() for name, _ in headers if is_reserved(name.lower())}:
        raise ValueError(f"remove {', '.join(sorted(reserved))} from headers: DownloadResponse makes these itself")
    if bad := [name for name, value in headers if _CONTROL.search(name + value)]:
        raise ValueError(f"remove the control characters from these headers: {', '.join(map(repr, bad))}")
    if bad := [name for name, _ in headers if not _NAME.fullmatch(name)]:
        raise ValueError(f"{', '.join(map(repr, bad))} is not the name of a header: write one such as X-Robots-Tag")
    return raw({name.lower(): value for name, value in headers})


def _is_latin(text: object) -> bool:
    return isinstance(text, str) and all(character <= "\xff" for character in text)
