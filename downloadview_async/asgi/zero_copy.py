"""ASGI's Zero Copy Send: the server sends a span of a file by its descriptor. Other servers than ours may offer it."""

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

from anyio.lowlevel import checkpoint
from starlette.types import Message, Receive, Scope, Send

from downloadview_async.asgi.extensions import FOREIGN, PATHSEND, ZERO_COPY
from downloadview_async.errors import TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.local.open_file import CHUNK_SIZE, REWRITTEN, OpenLocalFile

_WINDOW = 1 << 20  # bytes of one message: the file is looked at again, and other tasks run, between two of them
_OTHERS = frozenset({ZERO_COPY, "http.response.trailers", "http.response.push", "http.response.early_hint", "tls"})


class NotingReceive:
    """Receives messages, and calls a function when the client has left."""

    def __init__(self, receive: Receive, when_left: Callable[[], None]) -> None:
        self.receive = receive
        self._when_left = when_left

    async def __call__(self) -> Message:
        """Receive a message."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            self._when_left()
        return message


class LentDescriptor:
    """The file of a Zero Copy Send. is_taken: whether the server has looked at its descriptor.

    Servers call its `fileno`, or use it as a number.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.is_taken = False

    def fileno(self) -> int:
        """Return the descriptor. Raises `ValueError` after `close`."""
        if self.is_closed:
            raise ValueError("the response ended before its file was sent")
        self.is_taken = True
        return self._descriptor

    __index__ = fileno

    @property
    def is_closed(self) -> bool:
        """Whether there is no descriptor."""
        return self._descriptor < 0

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def is_native(extensions: Mapping[str, Any]) -> bool:
    """Return whether a server that offers path sends sends such a file natively, as granian does.

    anycorn and nonecorn read it in Python, where they do not use `sendfile`, and tell in neither case whether the
    client got it. anycorn 0.20 cuts it off where it does: see `_arrives`. They offer other extensions, too.
    """
    offer = extensions.get(PATHSEND)
    return offer is not None and ("descriptor" in offer or FOREIGN in offer or _OTHERS.isdisjoint(extensions))


def with_zero_copy(scope: Scope, receive: Receive) -> Scope:
    """Return a scope whose path send is one that a response can use: none, one that is native, or Zero Copy Send."""
    extensions: Mapping[str, Any] | None = scope.get("extensions")
    if not extensions or "descriptor" in extensions.get(PATHSEND, {}) or _OTHERS.isdisjoint(extensions):
        return scope
    usable = {name: value for name, value in extensions.items() if name != PATHSEND}
    if ZERO_COPY in extensions and _arrives(receive):
        usable[PATHSEND] = {ZERO_COPY: True}
    return {**scope, "extensions": usable}


def _arrives(receive: Receive) -> bool:
    """Return whether the messages of a response arrive at the server, which then sends all of the file.

    A middleware such as `BaseHTTPMiddleware` fails with a message that it does not know. It has its own function to
    receive; that of nonecorn is the `get` of an `asyncio.Queue`, and that of anycorn is in its modules. A middleware
    that drops the message is noticed: see `send_zero_copy`.

    On asyncio, anycorn 0.20 waits for its socket by a function of anyio that asyncio refuses for the socket of a
    transport. It would cut the answer off where the kernel takes no more.
    """
    while isinstance(receive, NotingReceive):
        receive = receive.receive
    package = str(getattr(receive, "__module__", "")).partition(".")[0]
    return package == "asyncio" or (package == "anycorn" and not _is_on_asyncio())


def _is_on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def send_zero_copy(file: OpenLocalFile, span: ByteRange, send: Send, when_used: Callable[[], None]) -> None:
    """Send a span of an open file, after the start of its response. Call a function when the server sends bytes of it.

    What is not in the page cache is read by a worker and sent in chunks, as the server would wait for the disk. So is
    all that follows if a middleware drops the message.

    Raises `TransferAborted` if the file shrank or was written to.
    """
    try:  # its own position, which a server may move: others read the same file
        lent = LentDescriptor(os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        lent = LentDescriptor(-1)
    is_dropped, offset = lent.is_closed, span.start
    try:
        while offset < span.stop:
            count, chunk = min(_WINDOW, span.stop - offset), b""
            if not is_dropped and file.is_cached(offset, count):
                is_dropped = not await _lend(lent, offset, count, send)
                if is_dropped:
                    continue
                when_used()
            else:
                chunk = await file.read(ByteRange(offset, offset + min(count, CHUNK_SIZE)))
                count = len(chunk)
            if file.is_rewritten(is_last=offset + count == span.stop):
                raise TransferAborted(REWRITTEN, reason="file-changed")
            if not count or os.fstat(file.descriptor).st_size < offset + count:
                raise TransferAborted("the file ended before the end of the promised content", reason="file-changed")
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            offset += count
            await checkpoint()  # lets `receive` tell that the client has left
    finally:
        lent.close()
    await send({"type": "http.response.body", "body": b""})


async def _lend(lent: LentDescriptor, offset: int, count: int, send: Send) -> bool:
    """Have the server send a window. Return False if a middleware has dropped or kept the message."""
    message: Message = {"type": ZERO_COPY, "file": lent, "offset": offset, "count": count, "more_body": True}
    lent.is_taken = False
    try:
        await send(message)
    except RuntimeError as exc:
        if str(exc) == "Transport is closing":  # so says asyncio to nonecorn when the client has left
            raise ConnectionResetError(str(exc)) from exc
        raise
    if not lent.is_taken:
        message.clear()  # whoever has kept it sends nothing
        message.update({"type": "http.response.body", "body": b"", "more_body": True})
    return lent.is_taken
