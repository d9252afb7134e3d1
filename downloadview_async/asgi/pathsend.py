"""Path sends of responses that are not ours, such as `FileResponse`: offloaded, or sent by the server or by us."""

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial

import anyio.to_thread
from starlette.types import Message, Receive, Scope, Send

from downloadview_async.accounts.facts import ACCOUNT, Facts, request_id_of
from downloadview_async.asgi.accounts import hold_accounts
from downloadview_async.asgi.answer import RawHeaders
from downloadview_async.asgi.deadline import in_time
from downloadview_async.asgi.delivery import Empty, Offloaded, Path, deliver, delivery_of
from downloadview_async.asgi.disconnect import until_the_client_leaves
from downloadview_async.asgi.errors import note_refusal, send_error
from downloadview_async.asgi.extensions import PATHSEND, SETTLED
from downloadview_async.asgi.handed_over import awaits_line, hand_over
from downloadview_async.asgi.limiting import deliver_limited, spend
from downloadview_async.asgi.offer import Lent, Offer
from downloadview_async.errors import FileError, FileMissing, TransferAborted
from downloadview_async.http.fields import FRAMING, OFFLOAD_ORDERS, OFFLOAD_TARGET, length_of
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.plan import Plan
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.offload.base import rated
from downloadview_async.offload.decision import Refusal, is_plain, refusal, selects_something
from downloadview_async.policy.limits.limits import TRANSFERS
from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.path import LocalFile

Stream = Callable[[Receive, Send], Awaitable[None]]

logger = logging.getLogger("downloadview_async")

_REPLACED = frozenset(name.encode() for name in FRAMING - {"connection"})


def _is_order(name: bytes) -> bool:
    """Return whether only a backend may set a header. Any application may set X-Accel-Buffering and other controls."""
    text = name.lower().decode("latin-1")
    return text in OFFLOAD_ORDERS or text == OFFLOAD_TARGET


class _Named:
    """The file at the path of a path send, which is not normalised."""

    def __init__(self, path: str) -> None:
        self.name = os.path.basename(path)
        self.location: str | None = path

    def open(self, request: DownloadRequest = GET) -> AbstractAsyncContextManager[OpenLocalFile]:
        assert self.location is not None
        return LocalFile(self.location).open(request)


class ForeignResponse:
    """One response that is not ours. Its start waits until it is known how its file is sent.

    path_send: whether the server, or the middleware further out, takes a path send.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, offer: Offer, *, path_send: bool) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._offer = offer
        self._path_send = path_send
        self._facts: Facts | None = scope.get(ACCOUNT)
        self._held: Message | None = None
        self._status = 200
        """The status of the last start that has been passed on."""

    async def send(self, message: Message) -> None:
        """Pass a message of the application on. A path send is offloaded, passed on, or sent in chunks."""
        if message["type"] == "http.response.start":
            message = self._without_orders(message)
            # A response without a length may be a stream whose first byte comes long after its start: do not hold that.
            if length_of(message["headers"]) is not None:
                self._held = message
                return
        elif message["type"] == PATHSEND and "descriptor" not in message:
            start, self._held = self._held, None
            await self._send_file(start, os.fsdecode(message["path"]), message)
            return
        await self.end()
        self._status = message.get("status", self._status)
        await self._send(message)

    async def end(self) -> None:
        """Send the start if it still waits."""
        if self._held is not None:
            held, self._held = self._held, None
            await self._send(held)

    async def _offer_and_lend(self, offloaded: Message, start: Message, path: str) -> None:
        """Have a proxy send a file. The file is lent to `Holding`, in case the application deletes or moves it."""
        context = _Named(path).open()
        try:
            opened = await context.__aenter__()
        except FileMissing as exc:  # the proxy would not find it either
            await send_error(exc, self._scope, self._send)
            return
        except FileError:  # the proxy may have the permission that we lack
            await self._lend(Lent(None, path, offloaded, self._standing_in(partial(self._stream_named, start, path))))
            return
        file = opened.shared()
        await context.__aexit__(None, None, None)
        try:
            if TRANSFERS in self._scope:
                if (spending := spend(self._scope, file.metadata)) is not None:
                    await spending
                hand_over(self._scope, {name.decode("latin-1").lower(): "" for name, _ in offloaded["headers"]})
        except FileError as exc:
            await file.aclose()
            await send_error(exc, self._scope, self._send)
            return
        except BaseException:  # cancelled
            await file.aclose()
            raise
        if (refused := refusal(is_telling=file.is_telling)) is not None:
            note_refusal(refused, self._scope["method"], self._scope["path"])
            try:
                await self._stream(start, file, self._receive, in_time(self._scope, self._send))
            finally:
                await file.aclose()
            return
        await self._lend(Lent(file, path, offloaded, self._standing_in(partial(self._stream, start, file))))

    def _standing_in(self, stream: Stream) -> Stream:
        """Return a function that sends the file in place of a proxy, or an error if it cannot."""

        async def stream_or_error(receive: Receive, send: Send) -> None:
            try:
                await stream(receive, send)
            except FileError as exc:
                await send_error(exc, self._scope, send)

        return stream_or_error

    async def _lend(self, lent: Lent) -> None:
        made = self._offer.made
        order = next(name for name, value in lent.start["headers"] if (name.lower(), value) in made)
        delivery = Offloaded(order.lower().decode("latin-1"))
        lent.accounts = hold_accounts(self._facts, self._offer.facts)
        self._offer.lend(lent)
        await deliver(delivery, lent.start, self._send, facts=self._facts)

    def _without_orders(self, start: Message) -> Message:
        """Return the start of a response with only those offload headers that a backend has made for this 200."""
        headers: RawHeaders = [(bytes(name), bytes(value)) for name, value in start.get("headers", ())]
        kept = [
            (name, value)
            for name, value in headers
            if not _is_order(name) or (start["status"] == 200 and (name.lower(), value) in self._offer.made)
        ]
        if len(kept) == len(headers):  # the headers of another type may be readable only once
            return start if isinstance(start.get("headers"), list) else {**start, "headers": headers}
        dropped = sorted({name.decode("latin-1") for name, _ in headers} - {name.decode("latin-1") for name, _ in kept})
        logger.warning(
            "%s %s: the application's %s is dropped: only a backend may set it, and only on a 200%s",
            escaped(self._scope["method"]),
            shown(self._scope["path"]),
            escaped(", ".join(dropped)),
            "" if (request_id := request_id_of(self._scope)) is None else f" (request {request_id})",
        )
        return {**start, "headers": kept}

    async def _send_file(self, start: Message | None, path: str, message: Message) -> None:
        # A middleware further in, or a response of ours, may have decided already that no proxy sends this file.
        if SETTLED not in message and start is not None and (offloaded := self._offloaded(start, path)) is not None:
            await self._offer_and_lend(offloaded, start, path)
            return
        if self._scope["method"] == "HEAD":
            await deliver(Empty(), start, self._send, facts=self._facts, status=self._status)
            return
        if not os.path.isabs(path):
            path = os.path.join(os.getcwd(), path)
        if not is_plain(path):
            path = await anyio.to_thread.run_sync(os.path.realpath, path)  # resolve it, as the kernel does
        if self._path_send:
            size = None if start is None else length_of(start["headers"])
            await deliver(Path(nullcontext(path), size), start, self._send, facts=self._facts, status=self._status)
            return
        try:
            send = in_time(self._scope, self._send)
            await self._stream_named(start, path, self._receive, send)
        except FileError as exc:
            if start is None:
                raise TransferAborted(f"the promised file cannot be sent: {exc}") from exc
            await send_error(exc, self._scope, self._send)

    def _offloaded(self, start: Message, path: str) -> Message | None:
        """Return the start that has a proxy send the file, or None if no proxy may."""
        headers: RawHeaders = list(start["headers"])
        names = {name.lower() for name, _ in headers}
        refused = refusal(
            status=start["status"],
            method=self._scope["method"],
            is_part=b"content-range" in names,
            is_ordered=any(map(_is_order, names)),
            has_rule=is_plain(path),
            is_coded=b"content-encoding" in names,
        )
        order = self._offer.headers_for(_Named(path)) if refused is None else None
        if order is not None and awaits_line(self._scope, order):
            request = DownloadRequest.from_headers(self._scope["method"], self._scope["headers"])
            if (refused := refusal(is_logged=selects_something(request, length_of(start["headers"])))) is not None:
                order = None
        if order is not None and TRANSFERS in self._scope:
            order = rated(self._offer, order, self._scope[TRANSFERS].rate)
        if order is None:
            note_refusal(refused or Refusal.RULE, self._scope["method"], self._scope["path"])
            return None
        made = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in order.items()]
        replaced = _REPLACED.union(name for name, _ in made)
        kept = [header for header in headers if header[0].lower() not in replaced]
        return {**start, "headers": [*kept, *made, (b"content-length", b"0")]}

    async def _stream_named(self, start: Message | None, path: str, receive: Receive, send: Send) -> None:
        async def stream(send: Send) -> None:
            async with _Named(path).open() as opened:
                await self._deliver(start, opened, send)

        await until_the_client_leaves(stream, receive, send)

    async def _stream(self, start: Message, file: OpenLocalFile, receive: Receive, send: Send) -> None:
        await self._deliver(start, file, send, receive)

    async def _deliver(
        self, start: Message | None, opened: OpenLocalFile, send: Send, receive: Receive | None = None
    ) -> None:
        length = opened.metadata.size or 0 if start is None else length_of(start["headers"])
        assert length is not None
        body = (ByteRange(0, length),) if length and self._scope["method"] != "HEAD" else ()
        delivery = delivery_of(Plan(200, {}, body), opened)
        if start is not None and TRANSFERS in self._scope and self._scope[TRANSFERS].is_ours:
            await deliver_limited(delivery, start, send, scope=self._scope, receive=receive, facts=self._facts)
        else:
            await deliver(delivery, start, send, receive=receive, facts=self._facts, status=self._status)
