"""Tells how much of the answers over TLS the client has taken, which neither the transport nor the loop tells.

The kernel knows how many encrypted bytes of a connection were acknowledged. Answers follow each other, and a client may
send the next request before it has taken the answer to the last one. So each answer is a part of one stream of bytes,
from the position at which it begins. What was not acknowledged is the end of that stream, and is counted from there:
how many bytes TLS has added before does not matter then.
"""

import asyncio
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from downloadview_async.asgi.uvicorn.sockets import Connection, acknowledged, queued, socket_number

_RECORD = 1 << 14  # bytes in a full record of TLS
_STEP = 1 << 16  # bytes
_STEPS = 128  # together as many bytes as a socket holds


MOST_HELD = 64 << 10
"""Bytes that a transport of TLS holds before writing is paused. A part of a body is encrypted as a whole, so it may
hold that much more. The loops' own limit is 512 KiB."""


class CountingTransport:
    """A transport of TLS that counts what it is given.

    written, encrypted: bytes before and after encryption. steps: the two numbers as they were, every 64 KiB. on_step:
    is called before the write that makes them 64 KiB more.
    """

    def __init__(self, transport: asyncio.Transport, on_step: Callable[[], None]) -> None:
        self._transport = transport
        self._on_step = on_step
        self._framing = _framing_of(*transport.get_extra_info("cipher"))
        self.written = self.encrypted = 0
        self.steps = deque([(0, 0)], _STEPS)

    def write(self, data: bytes) -> None:
        """Write and count."""
        self.written += len(data)
        self.encrypted += len(data) + self._framing * -(-len(data) // _RECORD)
        if self.encrypted - self.steps[-1][0] >= _STEP:
            self.steps.append((self.encrypted, self.written))
            self._on_step()
        self._transport.write(data)

    def close(self) -> None:
        """Close, once: asyncio's transport forgets its socket if it is closed twice, and cannot be aborted then."""
        if not self._transport.is_closing():
            self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def as_transport(self) -> asyncio.Transport:
        """Return itself, as uvicorn takes it."""
        return cast("asyncio.Transport", self)

    def written_at(self, encrypted: int) -> int:
        """Return how many bytes had been written when they were so many encrypted ones."""
        steps = [*self.steps, (self.encrypted, self.written)]
        place = bisect_right(steps, (encrypted, self.written))
        if place == len(steps):
            return self.written
        (start, written), (end, written_then) = steps[place - 1] if place else (0, 0), steps[place]
        return written + max(0, encrypted - start) * (written_then - written) // (end - start)


def _framing_of(cipher: str, version: str, _: int) -> int:
    """Return how many bytes are added to each record; of ciphers with padding, which are old, the least number."""
    if version == "TLSv1.3":
        return 22
    return 21 if "CHACHA20" in cipher or "CCM8" in cipher else 29


class EncryptedStream:
    """Tells how much of all answers on a connection the client has taken.

    The loop closes the socket before it tells the protocol of a loss, so from `open` to `close` this has a duplicate of
    its descriptor.
    """

    __slots__ = ("_before", "_end", "_number", "_transport")

    def __init__(self, transport: CountingTransport) -> None:
        self._transport = transport
        self._number: int | None = None
        self._before: int | None = None  # encrypted bytes of the handshake
        self._end: tuple[int, int] | None = None  # acknowledged, and all that the kernel got

    @property
    def position(self) -> int:
        """Where the next byte of an answer stands in the stream."""
        return self._transport.written

    def open(self, connection: Connection) -> None:
        """Begin to watch the socket, if that is not done already. Raises `OSError`."""
        if self._number is None:
            self._end = None
            self._number = os.dup(socket_number(connection))
            if self._before is None:
                self._before = acknowledged(self._number) + queued(self._number) - self._transport.encrypted

    def taken(self) -> int | None:
        """Return up to which position the client's machine has acknowledged the stream; None if that is not known.

        Only the sum of the records on their way is known, so the position may be wrong by a few bytes for each.
        """
        self._look()
        if self._before is None or self._end is None:
            return None
        end, all_sent = self._end
        lacking = max(self._transport.encrypted, all_sent - self._before) - (end - self._before)
        return self._transport.written_at(max(0, self._transport.encrypted - lacking))

    def close(self) -> None:
        """Close the descriptor."""
        if self._number is not None:
            self._look()
            os.close(self._number)
            self._number = None

    def _look(self) -> None:
        if self._number is not None:
            with suppress(OSError):
                end = acknowledged(self._number)
                self._end = end, end + queued(self._number)
