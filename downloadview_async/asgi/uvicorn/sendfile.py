"""Path sends: the kernel sends an open file to the client's socket, one window after another.

`sendfile` gives the kernel the pages of the file, not a copy of them. If the file is written to before the client has
taken them, the client gets the new bytes. On the same machine, they stay in the queue of the client after its kernel,
which is ours, has acknowledged them. So if somebody may be writing to the file, it is copied, and looked at between
each copy and its sending. If it has changed, the answer stays incomplete.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any, Protocol

import anyio
from starlette.types import Message

from downloadview_async.asgi.loan import Batches, Lendable, LentFile
from downloadview_async.asgi.transfer import chunks_of, exactly
from downloadview_async.asgi.uvicorn.encrypted import MOST_HELD
from downloadview_async.asgi.uvicorn.room import Waiting, begin_to_wait, end_wait
from downloadview_async.asgi.uvicorn.sockets import socket_number
from downloadview_async.asgi.uvicorn.turns import has_waiting, turn
from downloadview_async.asgi.uvicorn.watchdog import Watched
from downloadview_async.errors import FileError, TransferAborted
from downloadview_async.http.metadata import ByteRange
from downloadview_async.sources.base import Piece
from downloadview_async.sources.local.open_file import CHUNK_SIZE, REWRITTEN, OpenLocalFile
from downloadview_async.sources.local.path import LocalFile
from downloadview_async.sources.local.refused_calls import Refusals
from downloadview_async.sources.workers import MID_TRANSFER

_WINDOW = CHUNK_SIZE  # the most bytes that are in memory
_TURN = 8 * _WINDOW  # bytes of pages that are sent in one turn, in one or more windows
_FIRST = 4 * _WINDOW  # bytes that a new answer sends at once
# Bytes that go through the transport when the socket is full, and there is no `epoll`, or still no room after the wait.
# The transport then waits for the client. Where `sendfile` goes on answering EAGAIN although the transport sends all,
# they double each time.
_FEW = 128

_FULL = -1

_MORE = getattr(socket, "MSG_MORE", 0)

_refusals = Refusals("sendfile")


class Sending(Watched, Waiting, Protocol):
    """A connection over which a file can be sent.

    flushed: a future that is done when the transport has sent all that it holds, or the connection is lost: see
    `flush`. None unless something waits for that. file_sent: the bytes of the last file that were sent.
    """

    flushed: "asyncio.Future[bool] | None"
    file_sent: int

    def note_untaken_bytes(self) -> None:
        """Note how many bytes the end of the connection, which has failed, drops."""


class Answer(Protocol):
    """uvicorn's request and response, as far as a path send uses it.

    is_unframed: whether the end of the connection is the end of the body.
    """

    scope: Any
    disconnected: bool
    response_started: bool
    chunked_encoding: bool | None
    expected_content_length: int
    is_unframed: bool

    def send(self, message: Any) -> Any:
        """Send a message of ASGI."""


async def send_path(connection: Sending, cycle: Answer, message: Message) -> None:
    """Send the file that the message names by its path. Raises `TransferAborted`, also if it cannot be opened."""
    try:
        async with LocalFile(message["path"]).open() as file:
            await send_file(connection, cycle, {**message, "descriptor": LentFile(file)})
    except FileError as exc:
        raise TransferAborted(f"opening a file failed: {exc}") from exc


async def send_pieces(connection: Sending, cycle: Answer, message: Message) -> None:
    """Send the pieces that the message lends. The end of the loan ends the wait for more pieces."""
    with anyio.CancelScope() as message["descriptor"].loan.scope:
        await send_file(connection, cycle, message)


async def send_file(connection: Sending, cycle: Answer, message: Message) -> None:
    """Send the span of the open file that the message lends, or the pieces.

    This is one coroutine and not several, because thousands of clients may wait in it. Raises `TransferAborted` if
    there are fewer bytes than promised, or a file cannot be read.
    """
    loop, transport = connection.loop, connection.transport
    lent: LentFile = message["descriptor"]
    if lent.loan.is_recalled:
        return  # the body follows
    body = lent.take()
    offset, count = message.get("offset", 0), message.get("count")
    del message
    source = None if isinstance(body, OpenLocalFile) else body
    promised = given = 0
    # Bytes since the last turn. A new answer waits for its turn soon, and sooner if others wait for theirs.
    in_turn = _TURN - (_WINDOW if has_waiting(loop) else _FIRST)
    is_full = has_waited = False  # is_full: whether the kernel has no room
    chunk: memoryview | bytes | None = None
    connection.file_sent = 0
    few, window = _FEW, _TURN
    socket_of_pieces: socket.socket | None = None
    try:
        if cycle.disconnected:
            return
        if not cycle.response_started:
            raise RuntimeError("the application sent a path send before the start of its response")
        pieces: Iterator[Piece] = iter(())
        if cycle.scope["method"] == "HEAD":
            source = None
        elif cycle.chunked_encoding or cycle.is_unframed:
            await _send_in_chunks(connection, lent, body, offset, count, cycle)
            source = None
        else:
            promised = cycle.expected_content_length if count is None else count
            if promised > cycle.expected_content_length:
                raise RuntimeError("the application sent a path send of more bytes than Content-Length promises")
            cycle.expected_content_length -= promised  # uvicorn counts down only what it sends itself
            if isinstance(body, OpenLocalFile):
                pieces = iter([(body, ByteRange(offset, offset + promised))])
            else:
                pieces = iter(body.first)
                with suppress(OSError):  # without one more descriptor, the transport writes all bytes
                    socket_of_pieces = socket.socket(fileno=os.dup(socket_number(connection)))
                    duplicate = socket_of_pieces.fileno()
        while not connection.is_lost:
            piece = next(pieces, None)
            if piece is None:
                # the memory of the pieces is used again, and their files are closed
                while transport.get_write_buffer_size() and not connection.is_lost:
                    await flush(connection)
                    in_turn = _TURN
                if source is None or (batch := await anext(source.rest, None)) is None:
                    break
                pieces = iter(batch)
                continue
            count = len(piece[1] if isinstance(piece, tuple) else piece)
            if count > promised - given:
                raise TransferAborted(f"the body has more than the {promised} bytes of the promised content")
            if not isinstance(piece, tuple):
                while transport.get_write_buffer_size() and not connection.is_lost:
                    await flush(connection)
                    in_turn = _TURN
                if not connection.is_lost:
                    sent = _write(connection, socket_of_pieces, piece, _MORE if given + count < promised else 0)
                    given += sent
                    in_turn += sent
                    if sent < count:
                        break
                    if in_turn >= _WINDOW and given < promised:
                        await turn(loop)
                        in_turn = 0
                continue
            file, offset = piece[0], piece[1].start
            lent.loan.has_files = True
            is_new = source is not None  # it has been opened and checked just now
            while count and not connection.is_lost:
                if transport.get_write_buffer_size():
                    await flush(connection)
                    await turn(loop)
                    in_turn = 0
                    continue
                if is_full:
                    is_full, chunk = False, None
                    if (waiting := begin_to_wait(connection)) is not None:
                        number, has_room = waiting
                        del waiting
                        try:
                            await has_room
                        finally:
                            end_wait(connection, number, has_room)
                        in_turn = 0
                    elif in_turn >= _TURN:
                        await turn(loop)
                        in_turn = 0
                    has_waited = True
                    continue
                length, by_transport = min(count, window, max(_WINDOW, _TURN - in_turn)), 0
                chunk = None
                if file.is_quick and file.is_recent():  # else it is not looked at again
                    length = min(length, _WINDOW)
                    chunk = file.view_nowait(length, offset) or await file.read(ByteRange(offset, offset + length))
                    _check(file, is_last=given + len(chunk) == promised)
                elif not is_new:
                    _check(file, is_last=False)
                is_new = False
                try:
                    number = socket_number(connection) if socket_of_pieces is None else duplicate
                    if chunk is not None:
                        sent = _unless_full(os.write, number, chunk)
                        in_turn = _TURN  # to copy takes several times as long
                    elif file.device in _refusals.devices:
                        sent = 0
                    else:
                        is_cached = file.is_cached(offset, length)
                        if not is_cached and length > _WINDOW:
                            length = _WINDOW  # a slow disk has to end a call soon: else it looks like one that hangs
                            is_cached = file.is_cached(offset, length)
                        if is_cached:
                            sent = _unless_full(os.sendfile, number, file.descriptor, offset, length)
                            in_turn += max(sent, 0)
                        else:
                            sent = await _sendfile_in_worker(connection, file, offset, length)
                    if sent == _FULL and not has_waited:
                        is_full = True
                        continue
                    has_waited = False
                    if sent == _FULL:
                        by_transport = min(count, few)
                        few = min(2 * few, _WINDOW)
                    else:
                        few = _FEW
                        if not sent:  # FUSE, too, sends 0 bytes before the end of the file: after a short read
                            by_transport = min(length, _WINDOW)
                        elif chunk is not None:
                            is_full = sent < len(chunk)
                        else:
                            is_full = sent < length
                            window = max(_WINDOW, min(2 * sent, _TURN))
                except ConnectionError:
                    await _abort(connection)
                    break
                except OSError as exc:
                    if chunk is None:
                        _refusals.note(file.device, exc)
                    by_transport = min(length, _WINDOW)
                if by_transport:
                    if chunk is None:
                        chunk = await file.read(ByteRange(offset, offset + by_transport))
                        _check(file, is_last=given + len(chunk) == promised)
                    else:
                        chunk = bytes(chunk[:by_transport])  # the transport may keep it
                    sent = _write(connection, None, chunk, 0)
                    if sent < len(chunk):
                        break
                    if sent > _FEW:
                        in_turn += _TURN
                if sent == 0:
                    raise TransferAborted(
                        f"the file ended {count} bytes before the end of the promised content", reason="file-changed"
                    )
                offset += sent
                given += sent
                count -= sent
                if in_turn >= _TURN and given < promised and not is_full:
                    await turn(loop)
                    in_turn = 0
            if count:
                break
        if connection.is_lost:
            cycle.disconnected = True  # uvicorn sets this only for the cycle that it has read last
            return
        if given < promised and not transport.is_closing():
            raise TransferAborted(f"the body ended {promised - given} bytes before the end of the promised content")
        await cycle.send({"type": "http.response.body", "body": b""})
    except (OSError, FileError) as exc:
        raise TransferAborted(f"sending a file failed: {exc}") from exc
    finally:
        if socket_of_pieces is not None:
            socket_of_pieces.close()
        try:
            if isinstance(body, Batches):
                await body.rest.aclose()
        finally:
            connection.file_sent += given
            lent.give_back(given)


def _unless_full(call: Callable[..., int], *arguments: Any) -> int:
    """Return what a system call returns, or `_FULL` if the socket has no room.

    An exception that has passed through the coroutine of a client would leave 432 bytes there, while the client stalls.
    """
    try:
        return call(*arguments)
    except BlockingIOError:
        return _FULL


def _write(connection: Sending, sock: socket.socket | None, text: bytes | memoryview, flags: int) -> int:
    """Write bytes: the kernel takes what it has room for, and the transport the rest.

    Returns how many bytes they have taken: fewer than all if the connection has failed, since a transport then drops
    what it is given.

    sock: the socket of the connection, whose transport holds nothing. flags: with MSG_MORE, the kernel may send the
    bytes together with those that follow.
    """
    sent = 0
    if sock is not None:
        try:
            sent = sock.send(text, flags)
        except OSError:  # the transport gets the same error, where it can be handled
            sent = 0
    if sent < len(text):
        if connection.transport.is_closing():  # lost while the file was read: uvloop would raise an error
            return sent
        connection.transport.write(memoryview(text)[sent:] if sent else text)  # a view takes 368 bytes while it waits
        if connection.transport.is_closing():
            return sent
    return len(text)


async def _send_in_chunks(
    connection: Sending, lent: LentFile, body: Lendable, offset: int, count: int | None, cycle: Answer
) -> None:
    """Send a body without a Content-Length: uvicorn frames its chunks."""
    if isinstance(body, OpenLocalFile):
        size = body.metadata.size or 0
        chunks = exactly(ByteRange(min(offset, size), size if count is None else offset + count), body)
    else:
        chunks = chunks_of(body.first, body.rest)
    async with aclosing(chunks):
        async for chunk in chunks:
            await cycle.send({"type": "http.response.body", "body": chunk, "more_body": True})
            lent.loan.sent += len(chunk)
            connection.file_sent += len(chunk)


async def _sendfile_in_worker(connection: Sending, file: OpenLocalFile, offset: int, length: int) -> int:
    """Send a window that is not in the page cache from a thread, which may wait for the disk. Return the bytes sent."""
    number = os.dup(socket_number(connection))  # the number itself may become another connection's meanwhile
    try:
        return await file.workers.run(
            _unless_full, os.sendfile, number, file.descriptor, offset, length, patience=MID_TRANSFER
        )
    finally:
        os.close(number)


def _check(file: OpenLocalFile, *, is_last: bool) -> None:
    """Raise `TransferAborted` if the bytes that were read, and those that are about to be sent, are of two versions."""
    if file.is_rewritten(is_last=is_last):
        raise TransferAborted(REWRITTEN, reason="file-changed")


async def _abort(connection: Sending) -> None:
    """End a connection whose client has left, and return when uvicorn knows that: it logs no broken answer then.

    A worker thread, or a look at the socket while reading is paused, may notice the client's end before uvicorn does.
    """
    if not connection.is_lost:
        connection.note_untaken_bytes()
        ended = flush(connection)
        connection.transport.abort()
        await ended


def flush(connection: Sending) -> "asyncio.Future[bool]":
    """Return a future that is done when the transport has sent everything that it holds, or the connection is lost.

    The kernel may send a file only after that. The result is whether everything was sent; a connection that closes may
    be lost right after that.
    """
    if connection.flushed is not None and not connection.flushed.done():
        return connection.flushed
    connection.flushed = connection.loop.create_future()
    # The transport calls `pause_writing` now, and `resume_writing` when it holds nothing any more. Without TLS, it has
    # this limit always.
    connection.transport.set_write_buffer_limits(high=0)
    return connection.flushed


def end_flush(connection: Sending) -> None:
    """Let a path send that waits for the transport continue: all is sent, or the connection is lost."""
    flushed, connection.flushed = connection.flushed, None
    if flushed is not None:
        if not connection.is_lost and connection.transport.get_extra_info("sslcontext"):
            connection.transport.set_write_buffer_limits(high=MOST_HELD)
        if not flushed.done():
            flushed.set_result(not connection.is_lost)
