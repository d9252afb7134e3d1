"""HTTP/2 by zttp, as uvicorn 0.54 and later have it, for clients that read slowly, too.

uvicorn passes all of a body on to zttp, which keeps what the client has given no window for: a file that nobody reads
would be in memory as a whole. Here, `send` waits for the client. uvicorn calls its implementation experimental.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, cast

from uvicorn.protocols.http.auto_zttp_impl import AutoZttpProtocol
from uvicorn.protocols.http.zttp_h2_impl import RequestResponseCycle, ZttpH2Protocol

from downloadview_async.asgi.deadline import STALL_SECONDS
from downloadview_async.asgi.extensions import WATCHED
from downloadview_async.asgi.uvicorn.protocol import DownloadProtocol
from downloadview_async.asgi.uvicorn.watchdog import MINIMUM_RATE


class HTTP2Cycle(RequestResponseCycle):
    """One request and its answer, whose `send` waits until the client has taken what was sent before.

    uvicorn makes its own class. The protocol then changes the class of the object, so there is no constructor here.
    """

    protocol: "HTTP2Protocol"
    _taken: asyncio.Event | None = None

    async def send(self, message: Any) -> None:
        """Send a message of the application. The end follows when the client has taken the body."""
        if message["type"] == "http.response.body" and message.get("body") and not message.get("more_body", False):
            await self.send({**message, "more_body": True})
            message = {**message, "body": b""}
        await self._until_taken()
        await super().send(message)

    def wake(self) -> None:
        """Look again at what the client has taken."""
        if self._taken is not None:
            self._taken.set()

    @property
    def _untaken(self) -> int:
        """Bytes that wait for the window of the stream, or for the socket if it takes no more."""
        waiting = self.transport.get_write_buffer_size() if self.flow.write_paused else 0
        return (self.stream.pending_bytes or 0) + waiting

    async def _until_taken(self) -> None:
        """Wait until nothing is left of what was sent, or the client has left or taken too little for too long."""
        seconds = self.protocol.stall_seconds
        since, untaken = monotonic(), self._untaken
        while not self.disconnected and (left := self._untaken):
            if monotonic() - since >= seconds:
                if untaken - left < self.protocol.minimum_rate * seconds:
                    self._drop_client()
                    return
                since, untaken = monotonic(), left
            self._taken = asyncio.Event()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._taken.wait(), since + seconds - monotonic())
            self._taken = None

    def _drop_client(self) -> None:
        """Reset the stream, and the connection if that takes nothing at all."""
        self.logger.warning("Transfer aborted: the client took less than %d bytes a second", self.protocol.minimum_rate)
        is_stuck = self.flow.write_paused
        self.abort_stream()
        if is_stuck:
            self.transport.abort()
        self.disconnected = True
        self.message_event.set()


class HTTP2Protocol(ZttpH2Protocol):
    """uvicorn's protocol on zttp, which waits for clients that read slowly, and drops those that do not read.

    stall_seconds, minimum_rate: those of `DownloadProtocol`, for each answer.
    """

    def __init__(self, *args: Any, stall_seconds: float, minimum_rate: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stall_seconds = stall_seconds
        self.minimum_rate = minimum_rate

    def handle_request(self, event: Any) -> None:
        """Begin with an answer."""
        super().handle_request(event)
        cycle: Any = self.cycles[event.stream_id]
        cycle.__class__ = HTTP2Cycle
        cycle.protocol = self
        cycle.scope["extensions"][WATCHED] = True

    def flush(self) -> None:
        """Write what zttp has for the client, which may have enlarged its window."""
        super().flush()
        self._wake()

    def handle_rst_stream(self, event: Any) -> None:
        """End an answer that the client has cancelled."""
        cycle: Any = self.cycles.get(event.stream_id)
        super().handle_rst_stream(event)
        if cycle is not None:
            cycle.wake()

    def resume_writing(self) -> None:
        """Go on: the socket takes more."""
        super().resume_writing()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all answers."""
        super().connection_lost(exc)
        self._wake()

    def _wake(self) -> None:
        for cycle in list(self.cycles.values()):
            if isinstance(cycle, HTTP2Cycle):
                cycle.wake()


class DownloadProtocols(AutoZttpProtocol):
    """Serves HTTP/2 to clients that begin with it, or choose it by TLS, and HTTP/1.1 by `DownloadProtocol` to others.

    stall_seconds, minimum_rate: those of `DownloadProtocol`.
    """

    def __init__(
        self, *args: Any, stall_seconds: float = STALL_SECONDS, minimum_rate: int = MINIMUM_RATE, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        watch: dict[str, Any] = {"stall_seconds": stall_seconds, "minimum_rate": minimum_rate}
        common: dict[str, Any] = {"config": self.config, "server_state": self.server_state, "app_state": self.app_state}
        self._protocols = partial(HTTP2Protocol, **watch, **common), partial(DownloadProtocol, **watch, **common)

    def _switch(self, http2: bool, initial_data: bytes = b"") -> None:
        of_http2, of_http1 = self._protocols
        protocol: Any = of_http2(_loop=self.loop) if http2 else of_http1(_loop=self.loop)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if initial_data:
            protocol.data_received(initial_data)


def protocols(**watch: Any) -> Callable[..., asyncio.Protocol]:
    """Return what `uvicorn.Config` takes as `http`. watch: `stall_seconds` and `minimum_rate`."""
    made: Any = partial(DownloadProtocols, **watch)
    made.alpn_protocols = DownloadProtocols.alpn_protocols  # of TLS
    return cast("Callable[..., asyncio.Protocol]", made)
