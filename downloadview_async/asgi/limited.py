"""`LimitsMiddleware`: limits for the answers of any application, such as Starlette's `FileResponse`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import anyio
from anyio.lowlevel import checkpoint
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts
from downloadview_async.asgi.accounts import Account
from downloadview_async.asgi.delivery import SMALL
from downloadview_async.asgi.errors import send_error
from downloadview_async.asgi.extensions import FOREIGN, PACE, PATHSEND, ZERO_COPY
from downloadview_async.asgi.limiting import Limiting, counted, half_close_of, limits_of, paced
from downloadview_async.asgi.zero_copy import is_native
from downloadview_async.errors import FileError, wrong_type
from downloadview_async.http.dates import parse_http_date
from downloadview_async.http.fields import length_of
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.ranges import parse_content_range
from downloadview_async.policy.limits.limits import TRANSFERS, Transfers

_ROUNDS = 20  # of the loop, in which an application that listens can stop, as if the client had left


class LimitsMiddleware:
    """Keeps all answers of `app` within `limits`, whatever makes them: `FileResponse`, `StaticFiles`, a stream.

        app = Starlette(routes=[Mount("/files", StaticFiles(directory="files"))])
        app = LimitsMiddleware(app, limits=Limits(concurrent=8, rate="20MB/s"))

    Each request counts for `requests`. A transfer is a GET whose answer has the status 200 or 206 and a body, so a page
    is one, too. It is counted when its head is about to leave; one that is refused gets 429 in its place. Bytes of the
    same path are those of the same file if the answers have the same ETag, or else the same Last-Modified and size.
    Answers of this library count as they do with the `limits` of `Download`.

    Put it around `OffloadMiddleware`, so that the proxy keeps the rate, and inside `Accounts`. The client is known
    before the application is called, so "user" and "link" are those of the limits of `Download`.

    limits: `Limits`, `SourceLimit`, or a list of them.

    Raises `ConfigurationError` for limits that are not such.
    """

    def __init__(self, app: ASGIApp, limits: Limiting | Sequence[Limiting]) -> None:
        if not callable(app):
            raise wrong_type("LimitsMiddleware takes an ASGI application, and then limits", app)
        self.app = app
        self.limits = limits_of(limits)
        if not self.limits:
            raise wrong_type("LimitsMiddleware takes limits, such as Limits(rate='20MB/s')", limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, unless it is refused."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        around: Transfers | None = scope.get(TRANSFERS)
        with nullcontext(around) if around is not None else Transfers() as transfers:
            try:
                if not transfers.begin_nowait(self.limits, scope, is_transfer=False):
                    await transfers.begin(self.limits, scope, receive, is_transfer=False)
            except FileError as exc:
                await send_error(exc, scope, send)
                return
            if scope["method"] != "GET" or around is not None:
                await self.app(scope, receive, send)
            else:
                await _Limited(transfers, scope, receive, send).answer(self.app)


class _Limited:
    """One answer, which is limited here unless it is ours."""

    def __init__(self, transfers: Transfers, scope: Scope, receive: Receive, send: Send) -> None:
        self._transfers = transfers
        self._scope = scope
        self._receive = receive
        self._send = send
        self._stack = ExitStack()
        self._small = 0  # bytes that leave in one message, at the rate of small answers
        self._account: Account | None = None
        self._has_left = False
        self._waiting: anyio.CancelScope | None = None
        self._pending: anyio.CancelScope | None = None
        self._is_refused = False
        self._receiving = anyio.Lock()
        self._received: list[Message] = []

    async def answer(self, app: ASGIApp) -> None:
        """Have an application answer the request. What it raises after it was refused is dropped."""
        extensions = dict(self._scope.get("extensions") or {})
        is_limited = bool(self._transfers.rates) and (PACE not in extensions or FOREIGN in extensions.get(PATHSEND, {}))
        if is_limited or not is_native(extensions):
            extensions.pop(PATHSEND, None)  # its rate could not be limited, or not even its end be told
        extensions.pop(ZERO_COPY, None)
        scope = {**self._scope, "extensions": extensions, TRANSFERS: self._transfers}
        facts: Facts | None = scope.get(ACCOUNT)
        if facts is not None:
            facts.enter(scope)
        with self._stack:
            try:
                await app(scope, self.receive, self.send)
            except Exception:
                if not self._is_refused:
                    raise

    async def receive(self) -> Message:
        """Receive a message, or one that came while the answer waited."""
        async with self._receiving:
            if self._received:
                return self._received.pop(0)
            if not self._is_refused:
                with anyio.CancelScope() as self._pending:
                    return await self._next()
            return {"type": "http.disconnect"}

    async def _next(self) -> Message:
        """Receive a message from the server, and note if it tells that the client has left."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._has_left = True
            if self._account is not None:
                self._account.drop()
            if self._waiting is not None:
                self._waiting.cancel()
        return message

    async def send(self, message: Message) -> None:
        """Send a message at the rate of the client. Raises `OSError` after a refusal, as if the client had left."""
        if self._is_refused:
            raise OSError("the answer was refused, because a limit is reached")
        if message["type"] == "http.response.start" and not self._transfers.is_ours:
            message = {**message, "headers": list(message.get("headers", ()))}  # they may be readable only once
            await self._begin(message)
        elif self._small and message["type"] != "http.response.start":
            size, self._small = self._small, 0
            await anyio.sleep(max(shared.take(size) for shared in self._transfers.rates))
        await self._send(message)
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if (is_last or message["type"] == PATHSEND) and not self._transfers.is_ours:
            self._stack.close()
            self._transfers.end()  # a background task may follow

    async def _begin(self, start: Message) -> None:
        """Count the transfer that begins with this start, if one does. Raises `OSError` if it is refused."""
        length = length_of(start["headers"])
        if start["status"] not in (200, 206) or length == 0:
            return
        try:
            if not self._transfers.is_held:
                await self._hold()
            fields = {bytes(name).lower(): bytes(value) for name, value in start["headers"]}
            metadata, span = file_of(start["status"], fields, length)
            if self._transfers.counts_bytes:
                spending = self._transfers.spend(self._scope["path"], metadata, length, (span,))
                if spending is not None:
                    await spending
        except FileError as exc:
            await send_error(exc, self._scope, self._send)
            self._is_refused = True
            if self._pending is not None:
                self._pending.cancel()
            for _ in range(_ROUNDS):
                await checkpoint()
            raise OSError(str(exc)) from exc
        rates = self._transfers.rates
        if rates and length is not None and length <= SMALL:
            self._small, rates = length, ()
        if self._transfers.counts_bytes:
            self._account = self._stack.enter_context(counted(self._transfers, self._scope, self._send))
            self._send = self._account.send
        if rates:
            self._send = self._stack.enter_context(paced(rates, self._scope, self._send))

    async def _hold(self) -> None:
        """Hold the leases. Stop waiting for them if the client leaves."""
        if not self._transfers.may_wait:
            await self._transfers.hold()
            return
        failure: FileError | None = None
        async with anyio.create_task_group() as tasks:
            self._waiting = tasks.cancel_scope
            tasks.start_soon(self._listen)
            try:
                await self._transfers.hold(half_close_of(self._scope))
            except FileError as exc:
                failure = exc  # raised below, so that it is not wrapped in an `ExceptionGroup`
            tasks.cancel_scope.cancel()
        self._waiting = None
        if failure is not None:
            raise failure
        if self._has_left:
            raise OSError("the client has left")

    async def _listen(self) -> None:
        """Listen for the client to leave. What else it sends is kept for the application."""
        while not self._has_left:
            async with self._receiving:
                self._received.append(await self._next())


def file_of(status: int, fields: Mapping[bytes, bytes], length: int | None) -> tuple[FileMetadata, ByteRange | None]:
    """Return what the head of an answer tells about its file, and which part of it follows; None: all of it.

    fields: its headers, with names in lower case. length: of its body in bytes, None if it is not known.
    """
    metadata = FileMetadata(
        etag=ETag.parse(fields.get(b"etag", b"").decode("latin-1")),
        last_modified=parse_http_date(fields.get(b"last-modified", b"").decode("latin-1")),
    )
    if status == 200 and length is not None:
        return replace(metadata, size=length), ByteRange(0, length)
    part, size = parse_content_range(fields.get(b"content-range", b"").decode("latin-1")) or (None, None)
    # without a size: several parts, or a body whose length is not known
    return (metadata, None) if size is None else (replace(metadata, size=size), part)
