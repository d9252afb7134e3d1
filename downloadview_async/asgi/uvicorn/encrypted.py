"""Tells how much of the answers over TLS the client has taken, which neither the transport nor the loop tells.

The kernel knows how many encrypted bytes of a connection were acknowledged. Answers follow each other, and a client may
send the next request before it has taken the answer to the last one. So each answer is a part of one stream of bytes,
from the position at which it begins, and what was acknowledged is counted from the beginning of the connection.
"""

import asyncio
import os
from typing import Any, cast

from downloadview_async.asgi.uvicorn.sockets import Connection, acknowledged, queued, socket_number

_RECORD = 1 << 14  # bytes in a full record of TLS
_RECORD_FRAMING = 22  # bytes that TLS 1.3 adds to each


class CountingTransport:
    """A transport of TLS that counts what it is given. written: bytes. records: into how many TLS puts them."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written = self.records = 0

    def write(self, data: bytes) -> None:
        """Write and count."""
        self.written += len(data)
        self.records += -(-len(data) // _RECORD)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def as_transport(self) -> asyncio.Transport:
        """Return itself, as uvicorn takes it."""
        return cast("asyncio.Transport", self)


class EncryptedStream:
    """Counts the bytes of all answers on a connection, and how many of them the client has taken.

    The loop closes the socket before it tells the protocol of a loss, so from `open` to `close` this has a duplicate of
    its descriptor.
    """

    __slots__ = ("_before", "_end", "_number", "_transport")

    def __init__(self, transport: CountingTransport) -> None:
        self._transport = transport
        self._number: int | None = None
        self._before: int | None = None  # encrypted bytes of the handshake
        self._end = 0

    @property
    def position(self) -> int:
        """Where the next byte of an answer stands in the stream."""
        return self._transport.written

    def open(self, connection: Connection) -> None:
        """Begin to watch the socket, if that is not done already. Raises `OSError`."""
        if self._number is None:
            self._number = os.dup(socket_number(connection))
            if self._before is None:
                self._before = acknowledged(self._number) + queued(self._number)

    def taken(self) -> int | None:
        """Return up to which position the client's machine has acknowledged the stream; None if nobody knows.

        Only all records together are known, so the position may be wrong by a few bytes for each record on its way.
        """
        if self._before is None:
            return None
        end = self._end if self._number is None else acknowledged(self._number)
        written = self._transport.written
        encrypted = written + self._transport.records * _RECORD_FRAMING
        return min(written, max(0, end - self._before) * written // encrypted) if encrypted else 0

    def close(self) -> None:
        """Close the descriptor."""
        if self._number is not None:
            self._end = acknowledged(self._number)
            os.close(self._number)
            self._number = None
