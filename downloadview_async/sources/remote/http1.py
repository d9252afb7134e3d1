"""`Client`: fetches by HTTP/1.1, with connections that are kept [RFC 9112].

It sends GET and HEAD without a body, and no cookies. It supports no proxies, no content codings and only HTTP/1.1, so
each request costs little. For these, pass a client of httpx: see `httpx_client`.

A connection belongs to one response at a time. It is kept for the next request only if the body was read to the end
of its framing, and nothing followed.
"""

import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic

from downloadview_async.errors import UpstreamError, UpstreamRefused, UpstreamTimeout
from downloadview_async.http.chunked import Dechunker
from downloadview_async.http.response_head import END_OF_HEAD, MAX_HEAD, ResponseHead, parse_response_head
from downloadview_async.sources.remote.network import Connection
from downloadview_async.sources.remote.ssrf import Network
from downloadview_async.sources.remote.urls import UpstreamURL, parse_url

MAX_REDIRECTS = 5
MAX_REST = 64 * 1024
"""The most bytes of the rest of an answer that are read so that its connection can be used again."""
REST_SECONDS = 0.5
"""The most seconds for that."""

_FOR_ONE_SERVER = frozenset({"authorization", "cookie", "host"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_INFORMATIONAL = 20  # interim responses before one answer
_READ = 256 * 1024  # bytes of a body at once
_FEW = 64 * 1024  # bytes of a head or of chunks at once: they may be tiny, and are parsed without a pause

_KEPT = 20  # idle connections of one client
_KEPT_SECONDS = 5.0

_NOT_IN_A_FIELD = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

Origin = tuple[str, str, int]


class Client:
    """Sends requests, follows their redirects, and keeps connections.

    connect_timeout, read_timeout: seconds to connect, and to wait for the next bytes. The head of an answer, after
    redirects, must be complete after the sum of both.
    """

    def __init__(self, network: Network, *, connect_timeout: float, read_timeout: float) -> None:
        self._network = network
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._idle: list[tuple[float, Origin, Connection]] = []
        """When each began to be idle; the last one is the latest."""
        self._lock = threading.Lock()
        self._is_closed = False

    async def fetch(
        self, method: str, url: str, fields: Mapping[str, str], check: Callable[[UpstreamURL], None]
    ) -> "Response":
        """Return the response to a request, with its body unread, after at most `MAX_REDIRECTS` redirects.

        fields: names in lower case. check: raises an error for a URL that may not be requested.

        Raises `UpstreamError` and `UpstreamTimeout`.
        """
        deadline = monotonic() + self._connect_timeout + self._read_timeout
        try:
            return await self._fetch(method, url, fields, check, deadline)
        except UpstreamTimeout as exc:
            raise UpstreamTimeout(f"{url!r} did not answer in time: {exc}") from exc

    async def _fetch(
        self,
        method: str,
        url: str,
        fields: Mapping[str, str],
        check: Callable[[UpstreamURL], None],
        deadline: float,
    ) -> "Response":
        place = parse_url(url)
        for _ in range(MAX_REDIRECTS + 1):
            check(place)
            response = await self._answer(method, place, fields, deadline)
            if response.status not in _REDIRECTS or "location" not in response.fields:
                return response
            try:
                following = place.joined(response.fields["location"])
            except UpstreamError:
                await response.aclose()
                raise
            if not _is_same_server(place, following):
                fields = {name: value for name, value in fields.items() if name not in _FOR_ONE_SERVER}
            place = following
            await response.settle()
        raise UpstreamRefused(f"{url!r} redirects more than {MAX_REDIRECTS} times")

    async def aclose(self) -> None:
        """Close the idle connections, and the others when their responses end."""
        self._is_closed = True
        self._close_idle()

    async def _answer(self, method: str, url: UpstreamURL, fields: Mapping[str, str], deadline: float) -> "Response":
        """Send a request, once more if a connection that was kept ends before its answer begins.

        "A client [...] MAY automatically retry [an idempotent] request" that failed for that reason [RFC 9110 9.2.2]. A
        408 has the same reason: the upstream no longer waited for a request [15.5.9]. The other idle connections may be
        closed as well, so the retry uses a new one.
        """
        origin, head = url.origin, _request_head(method, url, fields)
        if (connection := self._take_idle(origin)) is not None:
            try:
                response = await self._ask(connection, origin, method, head, deadline)
                if response.status != 408:
                    return response
                await response.aclose()
            except UpstreamTimeout:
                raise
            except UpstreamError:
                if connection.has_answered:
                    raise
            self._close_idle(origin)
        until = min(deadline, monotonic() + self._connect_timeout)
        connection = await self._network.connect(url.host, origin[2], is_secure=url.scheme == "https", deadline=until)
        return await self._ask(connection, origin, method, head, deadline)

    async def _ask(
        self, connection: Connection, origin: Origin, method: str, head: bytes, deadline: float
    ) -> "Response":
        is_broken = False
        try:
            try:
                await connection.send(head, min(deadline, monotonic() + self._read_timeout))
            except UpstreamError:
                is_broken = True  # it may have answered nevertheless, before it closed the connection
            answered, rest = await self._read_head(connection, method, deadline)
        except BaseException:
            connection.close()
            raise

        def release(*, is_complete: bool) -> None:
            if is_complete and not (is_broken or answered.is_last or self._is_closed):
                self._keep(origin, connection)
            else:
                connection.close()

        return Response(method, answered, rest, connection, release, self._read_timeout)

    async def _read_head(self, connection: Connection, method: str, deadline: float) -> tuple[ResponseHead, bytes]:
        """Return the head of the final answer, and the bytes after it. Interim ones are dropped [RFC 9110 15.2]."""
        received, searched = bytearray(), 0
        for _ in range(_MAX_INFORMATIONAL + 1):
            while (end := END_OF_HEAD.search(received, searched)) is None:
                if len(received) > MAX_HEAD:
                    raise UpstreamError(f"the head of the answer has more than {MAX_HEAD} bytes")
                searched = max(len(received) - 2, 0)
                more = await connection.receive(_FEW, min(deadline, monotonic() + self._read_timeout))
                if not more:
                    raise UpstreamError("the connection was closed before the end of the head of an answer")
                received += more
            if end.start() > MAX_HEAD:
                raise UpstreamError(f"the head of the answer has more than {MAX_HEAD} bytes")
            head = parse_response_head(bytes(received[: end.start()]), method)
            if head.status >= 200:
                return head, bytes(received[end.end() :])
            if head.status == 101:
                raise UpstreamError("the upstream switches to another protocol, which nobody asked it for")
            del received[: end.end()]
            searched = 0
        raise UpstreamError(f"the upstream sent more than {_MAX_INFORMATIONAL} interim responses")

    def _take_idle(self, origin: Origin) -> Connection | None:
        """Return a connection that was kept, without it being kept any longer; None if there is none."""
        with self._lock:
            for place in range(len(self._idle) - 1, -1, -1):
                if self._idle[place][1] == origin:
                    since, _, connection = self._idle.pop(place)
                    if monotonic() - since < _KEPT_SECONDS and connection.is_quiet:
                        return connection
                    connection.close()
        return None

    def _keep(self, origin: Origin, connection: Connection) -> None:
        now = monotonic()
        with self._lock:
            self._idle.append((now, origin, connection))
            while self._idle and (len(self._idle) > _KEPT or now - self._idle[0][0] >= _KEPT_SECONDS):
                self._idle.pop(0)[2].close()

    def _close_idle(self, origin: Origin | None = None) -> None:
        with self._lock:
            closing = [entry for entry in self._idle if origin in (None, entry[1])]
            self._idle = [entry for entry in self._idle if entry not in closing]
        for _, _, connection in closing:
            connection.close()


class Response:
    """The answer to a request, whose body is read as it arrives."""

    __slots__ = ("_chunks", "_connection", "_left", "_release", "_rest", "_seconds", "fields", "method", "status")

    def __init__(
        self,
        method: str,
        head: ResponseHead,
        rest: bytes,
        connection: Connection,
        release: Callable[..., None],
        seconds: float,
    ) -> None:
        self.method = method
        self.status = head.status
        self.fields = head.fields
        self._left = head.length
        """Bytes of the body that are not read yet; None if their number is not known."""
        self._chunks = Dechunker() if head.is_chunked else None
        self._rest = rest
        self._connection: Connection | None = connection
        self._release = release
        self._seconds = seconds
        if self._left == 0:
            self._end(is_complete=not rest)

    @property
    def ends_with_connection(self) -> bool:
        """Whether only the end of the connection is the end of the body."""
        return "content-length" not in self.fields and "transfer-encoding" not in self.fields

    def arrived(self, size: int) -> bytes | None:
        """Return the rest of the body if it has `size` bytes, and they are here already; else None."""
        if self._connection is None or size != self._left:
            return None
        if len(self._rest) < size:
            self._rest += self._connection.receive_nowait(size - len(self._rest))
        if len(self._rest) < size:
            return None
        received, self._rest = self._rest, b""
        self._left = 0
        self._end(is_complete=len(received) == size)
        return received[:size]

    async def read(self) -> bytes:
        """Return the next bytes of the body; b"" at its end. Raises `UpstreamError` if it ends early."""
        return await self._read(monotonic() + self._seconds)

    async def settle(self) -> None:
        """Read the rest if it is short, so that the connection can be used again, and close the response."""
        if self._connection is None:
            return
        try:
            if (self._left or 0) <= MAX_REST:
                deadline, read = monotonic() + REST_SECONDS, 0
                with suppress(UpstreamError):
                    while read <= MAX_REST and (chunk := await self._read(deadline)):
                        read += len(chunk)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close the response. Its connection is closed if the body was not read to its end."""
        if self._connection is not None:
            self._end(is_complete=False)

    async def _read(self, deadline: float) -> bytes:
        while (connection := self._connection) is not None:
            left = self._left
            received, self._rest = self._rest, b""
            if not received:
                size = _FEW if self._chunks is not None else _READ if left is None else min(left, _READ)
                received = await connection.receive(size, deadline)
            if not received:
                if left is None and self._chunks is None:
                    self._end(is_complete=False)
                    return b""
                raise UpstreamError("the connection was closed before the end of the body")
            if self._chunks is not None:
                received = self._chunks.feed(received)
                if self._chunks.is_complete:
                    self._end(is_complete=not self._chunks.rest)
            elif left is not None:
                if len(received) >= left:
                    self._end(is_complete=len(received) == left)
                    received = received[:left]
                self._left = left - len(received)
            if received:
                return received
        return b""

    def _end(self, *, is_complete: bool) -> None:
        self._connection = None
        self._release(is_complete=is_complete)


def _is_same_server(url: UpstreamURL, following: UpstreamURL) -> bool:
    """Return whether a redirect stays at the same server, at most from http to https with their own ports."""
    is_upgrade = url.origin == ("http", url.host, 80) and following.origin == ("https", url.host, 443)
    return is_upgrade or url.origin == following.origin


def _request_head(method: str, url: UpstreamURL, fields: Mapping[str, str]) -> bytes:
    if _NOT_IN_A_FIELD.search("".join(fields.values())):
        raise UpstreamError(f"a header for {url.host!r} has a control character")
    fields = {"host": url.authority, **fields}
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    return f"{method} {url.target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")
