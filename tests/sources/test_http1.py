"""Our own HTTP client against servers that misbehave: real sockets, and bytes to the letter."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import anyio
import pytest

from downloadview_async import ConfigurationError, RemoteFile, RemoteSource, Upstream, UpstreamError, UpstreamTimeout
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.remote import http1
from downloadview_async.sources.remote.http1 import Client, Response
from downloadview_async.sources.remote.ssrf import AllowedHosts, Network
from downloadview_async.sources.remote.urls import parse_url
from tests.live import listening

pytestmark = pytest.mark.asyncio

OK = b"HTTP/1.1 200 OK\r\n"
TEN = b"0123456789"
PLAIN = OK + b"Content-Length: 10\r\n\r\n" + TEN
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class Server:
    """Answers each request with the same bytes, in pieces of `size`, and closes then if it is to."""

    def __init__(self, answer: bytes, *, closes: bool = False, size: int = 1 << 20) -> None:
        self.answer = answer
        self.closes = closes
        self.size = size
        self.connections = 0
        self.open = 0
        self.requests: list[bytes] = []
        self.closed = asyncio.Event()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                for place in range(0, len(self.answer), self.size):
                    writer.write(self.answer[place : place + self.size])
                    await writer.drain()
                    if self.size < 100:
                        await asyncio.sleep(0)
                if self.closes:
                    return
        finally:
            self.open -= 1
            self.closed.set()


@asynccontextmanager
async def served(server: Server) -> AsyncIterator[Client]:
    """Serve, and give a client that may connect to it."""
    async with listening(server.serve) as server.port:
        client = Client(Network(AllowedHosts("127.0.0.1", ["127.0.0.1"])), connect_timeout=10, read_timeout=10)
        try:
            yield client
        finally:
            await client.aclose()


async def fetch(client: Client, port: int, method: str = "GET", path: str = "/", **fields: str) -> Response:
    return await client.fetch(method, f"http://127.0.0.1:{port}{path}", fields, lambda url: None)


async def whole(response: Response) -> bytes:
    body = b""
    while chunk := await response.read():
        body += chunk
    return body


GOOD: list[tuple[bytes, bool, str, bytes, bool]] = [
    # what is sent, whether the connection is closed then, the method; the body, whether the connection is used again
    (PLAIN, False, "GET", TEN, True),
    (OK + b"Content-Length: 0\r\n\r\n", False, "GET", b"", True),
    (OK + b"Content-Length: 10\r\n\r\n", False, "HEAD", b"", True),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n", False, "HEAD", b"", True),
    (OK + b"\r\n", False, "HEAD", b"", True),
    (b"HTTP/1.1 304 X\r\nContent-Length: 10\r\n\r\n", False, "GET", b"", True),
    (b"HTTP/1.1 204 X\r\n\r\n", False, "GET", b"", True),
    (CHUNKED + b"5;x=y\r\n01234\r\n5\r\n56789\r\n0\r\nA: b\r\n\r\n", False, "GET", TEN, True),
    (OK + b"\r\n" + TEN, True, "GET", TEN, False),
    (OK + b"\r\n", True, "GET", b"", False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 10\r\n\r\n" + TEN, False, "GET", TEN, False),
    (OK + b"Connection: close\r\nContent-Length: 10\r\n\r\n" + TEN, False, "GET", TEN, False),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\nLink: </x>\r\n\r\n" + PLAIN, False, "GET", TEN, True),
    (b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n" + PLAIN, False, "GET", TEN, True),
    (OK + b"Content-Length: 10\r\nContent-Length: 10\r\n\r\n" + TEN, False, "GET", TEN, True),
    (b"HTTP/1.1 200 OK\nContent-Length: 10\n\n" + TEN, False, "GET", TEN, True),
    (OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", False, "GET", b"x", False),
    (PLAIN + b"EXTRA", False, "GET", TEN, False),
    (PLAIN + PLAIN, False, "GET", TEN, False),
    (PLAIN, False, "HEAD", b"", False),
    (CHUNKED + b"1\r\nx\r\n0\r\n\r\n" + PLAIN, False, "GET", b"x", False),
    (b"HTTP/1.1 204 X\r\n\r\n" + PLAIN, False, "GET", b"", False),
]


@pytest.mark.parametrize("answer, closes, method, body, is_kept", GOOD)
@pytest.mark.parametrize("size", [1 << 20, 1], ids=["at-once", "by-bytes"])
async def test_bodies(answer: bytes, closes: bool, method: str, body: bytes, is_kept: bool, size: int) -> None:
    server = Server(answer, closes=closes, size=size)
    async with served(server) as client:
        for _ in range(2):
            response = await fetch(client, server.port, method)
            assert await whole(response) == body
            assert await response.read() == b""
            assert response.arrived(0) is None
            await response.aclose()
            if size == 1 and not (closes or is_kept):
                await _until_all_has_come(client)
    assert len(server.requests) == 2
    assert server.connections == (1 if is_kept else 2)


async def _until_all_has_come(client: Client) -> None:
    """Wait until an idle connection, if there is one, is seen to have more bytes, or its end."""
    for _, _, connection in client._idle:
        while connection.is_quiet:
            await asyncio.sleep(0)


BAD: list[tuple[bytes, bool]] = [
    (b"", True),
    (b"HTTP/1.1 200 OK\r\nContent-", True),
    (b"HTTP/1.1 100 Continue\r\n\r\n", True),
    (b"HTTP/1.1 101 X\r\nUpgrade: x\r\n\r\n", False),
    (b"HTTP/1.1 100 Continue\r\n\r\n" * 30, False),
    (b"\r\n" + PLAIN, False),
    (b"<html>" * 100, True),
    (b"\x16\x03\x01" + b"\0" * 200_000, False),
    (b"x" * 200_000, False),
    (OK + b"A: " + b"x" * 200_000 + b"\r\n\r\n", False),
    (OK + b"A: x\r\n" * 2000 + b"\r\n", False),
    (OK + b"Content-Length: 10\r\nContent-Length: 5\r\n\r\n" + TEN, False),
    (OK + b"Content-Length: 10, 5\r\n\r\n" + TEN, False),
    (OK + b"Content-Length: -1\r\n\r\n" + TEN, False),
    (OK + b"Content-Length : 10\r\n\r\n" + TEN, False),
    (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", False),
    (OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
    (OK + b"A: x\rB: y\r\nContent-Length: 10\r\n\r\n" + TEN, False),
    (b"HTTP/2.0 200 OK\r\nContent-Length: 10\r\n\r\n" + TEN, False),
]
CUT: list[tuple[bytes, bytes, bool]] = [
    # what is sent, the part of the body that may be passed on, whether the connection is closed then
    (PLAIN[:-1], TEN[:-1], True),
    (OK + b"Content-Length: 10\r\n\r\n", b"", True),
    (CHUNKED, b"", True),
    (CHUNKED + b"5\r\n01234\r\n", b"01234", True),
    (CHUNKED + b"5\r\n01234\r\n0\r\n", b"01234", True),
    (CHUNKED + b"5\r\n01234\r\nzz\r\n", b"01234", False),
    (CHUNKED + b"5\r\n0123456\r\n0\r\n\r\n", b"01234", False),
    (CHUNKED + b"5\n01234\n0\n\n" + b"x" * 5000, b"", False),
    (CHUNKED + b"-5\r\n01234\r\n0\r\n\r\n", b"", False),
    (CHUNKED + b"f" * 20 + b"\r\n01234\r\n0\r\n\r\n", b"", False),
    (CHUNKED + b"5;" + b"x" * 9000 + b"\r\n01234\r\n0\r\n\r\n", b"", False),
    (CHUNKED + b"0\r\n" + b"A: x\r\n" * 20_000 + b"\r\n", b"", False),
]


@pytest.mark.parametrize("answer, closes", BAD)
@pytest.mark.parametrize("size", [1 << 20, 4096], ids=["at-once", "by-pages"])
async def test_heads_that_are_refused(answer: bytes, closes: bool, size: int) -> None:
    server = Server(answer, closes=closes, size=size)
    async with served(server) as client:
        with pytest.raises(UpstreamError):
            await fetch(client, server.port)
        await asyncio.wait_for(server.closed.wait(), 10)
    assert (len(server.requests), server.open) == (1, 0)


@pytest.mark.parametrize("answer, body, closes", CUT)
@pytest.mark.parametrize("size", [1 << 20, 1], ids=["at-once", "by-bytes"])
async def test_a_body_that_is_cut_or_broken_never_ends_properly(
    answer: bytes, body: bytes, closes: bool, size: int
) -> None:
    server = Server(answer, closes=closes, size=size if len(answer) < 1000 else 1 << 20)
    async with served(server) as client:
        response, got = await fetch(client, server.port), bytearray()

        async def read() -> None:
            while chunk := await response.read():
                got.extend(chunk)

        with pytest.raises(UpstreamError):
            await read()
        assert body.startswith(got)
        await response.settle()
        await asyncio.wait_for(server.closed.wait(), 10)
    assert server.open == 0


async def test_the_request_has_a_host_and_the_fields_and_nothing_else() -> None:
    server = Server(PLAIN)
    async with served(server) as client:
        await (await fetch(client, server.port, path="/a%20b?c=d", range="bytes=0-1")).settle()
        assert server.requests == [
            f"GET /a%20b?c=d HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\nrange: bytes=0-1\r\n\r\n".encode()
        ]


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nb", "a\rb", "a\0b", "a\x7f"])
async def test_nothing_of_a_client_can_begin_another_field(value: str) -> None:
    server = Server(PLAIN)
    async with served(server) as client:
        with pytest.raises(UpstreamError, match="control character"):
            await fetch(client, server.port, **{"if-none-match": value})
        upstream = Upstream("127.0.0.1", allow_hosts=["127.0.0.1"])
        file = RemoteFile(f"http://127.0.0.1:{server.port}/", upstream=upstream)
        with pytest.raises(UpstreamError):
            async with file.open(DownloadRequest(if_none_match=value)):
                pass
    assert (server.requests, server.connections) == ([], 0)


@pytest.mark.parametrize(
    "name, value", [("A b", "c"), ("A:", "c"), ("", "c"), ("A", "b\r\nC: d"), ("A", "\0"), ("A", "€")]
)
async def test_a_header_that_cannot_be_sent_is_refused_at_once(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match="the header"):
        Upstream("files.test", headers={name: value})


async def test_headers_of_an_upstream_replace_ours() -> None:
    server = Server(PLAIN)
    async with served(server):
        url = f"http://127.0.0.1:{server.port}/"
        for headers in ({}, {"User-Agent": "me", "ACCEPT": "text/plain", "Host": "files.test", "X-Key": "k"}):
            async with (
                Upstream("127.0.0.1", allow_hosts=["127.0.0.1"], headers=headers) as upstream,
                RemoteFile(url, upstream=upstream).open(GET),
            ):
                pass
    first, second = (dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2]) for head in server.requests)
    assert first == {
        b"host": b"127.0.0.1:%d" % server.port,
        b"accept": b"*/*",
        b"user-agent": b"downloadview_async",
        b"accept-encoding": b"identity",
    }
    assert second == {
        b"host": b"files.test",
        b"accept": b"text/plain",
        b"user-agent": b"me",
        b"x-key": b"k",
        b"accept-encoding": b"identity",
    }


async def test_credentials_stay_with_the_first_server() -> None:
    second = Server(PLAIN)
    async with served(second):
        first = Server(b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:%d/b\r\nContent-Length: 0\r\n\r\n" % second.port)
        async with served(first) as client:
            fields = {"authorization": "Basic eA==", "cookie": "a=b", "host": "first.test", "x-key": "k"}
            response = await fetch(client, first.port, **fields)
            assert await whole(response) == TEN
    assert b"authorization: Basic eA==\r\ncookie: a=b\r\n" in first.requests[0]
    assert second.requests == [b"GET /b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nx-key: k\r\n\r\n" % second.port]


@pytest.mark.parametrize(
    "location, target",
    [
        ("b", "/pub/b"),
        ("/b?c=d#e", "/b?c=d"),
        ("../../b", "/b"),
        ("./b", "/pub/b"),
        ("?q", "/pub/a?q"),
        ("//127.0.0.1:{port}/b", "/b"),
        ("http://127.0.0.1:{port}", "/"),
        ("HTTP://127.0.0.1:{port}/b", "/b"),
        ("/a b\u00fc", "/a%20b%C3%BC"),
        ("/%2e%2E/%c3", "/%2e%2E/%c3"),
        ("/a\tb", "/ab"),
    ],
)
async def test_where_a_redirect_leads(location: str, target: str) -> None:
    server = Server(b"")
    async with served(server) as client:
        place = location.format(port=server.port).encode()
        server.answer = b"HTTP/1.1 307 X\r\nLocation: %s\r\nContent-Length: 2\r\n\r\nhi" % place
        seen: list[str] = []

        def check(url: Any) -> None:
            seen.append(url.target)
            if len(seen) == 2:
                raise UpstreamError("enough")

        with pytest.raises(UpstreamError, match="enough"):
            await client.fetch("GET", f"http://127.0.0.1:{server.port}/pub/a", {}, check)
    assert seen[1] == target


@pytest.mark.parametrize(
    "location", ["http://[", "http://", "http://a b/", "http://127.0.0.1:x/", "http://127.0.0.1:99999/"]
)
async def test_a_location_that_is_not_a_url(location: str) -> None:
    server = Server(b"HTTP/1.1 302 X\r\nLocation: %s\r\nContent-Length: 1000000\r\n\r\n" % location.encode())
    async with served(server) as client:
        with pytest.raises(UpstreamError) as error:
            await fetch(client, server.port)
        await asyncio.wait_for(server.closed.wait(), 10)
    assert error.value.status == 502


# The examples of RFC 3986 5.4. Those whose path has parameters are for paths here, where `;` is a letter.
@pytest.mark.parametrize(
    "location, target",
    {
        "g": "/b/c/g",
        "./g": "/b/c/g",
        "g/": "/b/c/g/",
        "/g": "/g",
        "?y": "/b/c/d;p?y",
        "g?y": "/b/c/g?y",
        "#s": "/b/c/d;p?q",
        "g#s": "/b/c/g",
        ";x": "/b/c/;x",
        "": "/b/c/d;p?q",
        ".": "/b/c/",
        "./": "/b/c/",
        "..": "/b/",
        "../g": "/b/g",
        "../..": "/",
        "../../g": "/g",
        "../../../g": "/g",
        "/./g": "/g",
        "/../g": "/g",
        "g.": "/b/c/g.",
        ".g": "/b/c/.g",
        "g..": "/b/c/g..",
        "./../g": "/b/g",
        "./g/.": "/b/c/g/",
        "g/./h": "/b/c/g/h",
        "g/../h": "/b/c/h",
        "g;x=1/../y": "/b/c/y",
        "g?y/../x": "/b/c/g?y/../x",
        "g//h": "/b/c/g//h",
    }.items(),
)
async def test_where_a_location_leads(location: str, target: str) -> None:
    joined = parse_url("http://a/b/c/d;p?q").joined(location)
    assert (joined.origin, joined.target) == (("http", "a", 80), target)


@pytest.mark.parametrize("location, target", [("d", "/a//b/d"), ("../d", "/a//d"), ("../../d", "/a/d")])
async def test_empty_segments_stay(location: str, target: str) -> None:
    assert parse_url("http://a/a//b/c").joined(location).target == target


@pytest.mark.parametrize(
    "url, host, port, target",
    [
        ("http://Files.Test", "files.test", None, "/"),
        ("https://files.test:8443/a?b#c", "files.test", 8443, "/a?b"),
        ("http://[::1]:80/", "::1", 80, "/"),
        ("http://b\u00fccher.test/\u00fc", "xn--bcher-kva.test", None, "/%C3%BC"),
        ("http://127\u30020\u30020\u30021/", "127.0.0.1", None, "/"),
        ("http://files.test/a/../b/./c", "files.test", None, "/b/c"),
        ("http://files.test/.a/..b", "files.test", None, "/.a/..b"),
        ("http://files.test//public/a/.x", "files.test", None, "//public/a/.x"),
        ("http://files.test//[x/.b", "files.test", None, "//[x/.b"),
        ('http://files.test/a b"<>', "files.test", None, "/a%20b%22%3C%3E"),
    ],
)
async def test_urls(url: str, host: str, port: int | None, target: str) -> None:
    parsed = parse_url(url)
    assert (parsed.host, parsed.port, parsed.target, parsed.userinfo) == (host, port, target, False)


@pytest.mark.parametrize(
    "url", ["http://a%00b/", "http://a b/", "http://a\\b/", "http://a,b/", "http:///x", "http://[::1/"]
)
async def test_urls_without_a_server(url: str) -> None:
    with pytest.raises(UpstreamError):
        parse_url(url)


async def test_an_idle_connection_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(PLAIN)
    async with served(server) as client:
        await whole(await fetch(client, server.port))
        monkeypatch.setattr(http1, "_KEPT_SECONDS", 0.0)
        await whole(await fetch(client, server.port))
        assert server.connections == 2
        while server.open:
            server.closed.clear()
            await asyncio.wait_for(server.closed.wait(), 10)


async def test_few_connections_are_kept_and_all_are_closed_at_the_end() -> None:
    server = Server(OK + b"Content-Length: 10\r\n\r\n01234")  # the rest never comes
    async with served(server) as client:
        responses = [await fetch(client, server.port) for _ in range(30)]
        server.answer = PLAIN
        assert server.open == 30
        for response in responses:
            await response.aclose()
        await asyncio.gather(*[_read(client, server.port) for _ in range(30)])
        assert len(client._idle) <= 20
        under_way = await fetch(client, server.port)
        await client.aclose()
        assert client._idle == []
        assert await whole(under_way) == TEN
        assert client._idle == []
    while server.open:
        server.closed.clear()
        await asyncio.wait_for(server.closed.wait(), 10)


async def _read(client: Client, port: int) -> None:
    assert await whole(await fetch(client, port)) == TEN


async def test_a_rest_that_is_short_is_read_and_a_long_one_costs_the_connection() -> None:
    for size, connections in ((60_000, 1), (200_000, 2)):
        server = Server(OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        async with served(server) as client:
            for _ in range(2):
                await (await fetch(client, server.port)).settle()
        assert server.connections == connections


async def test_a_head_that_arrives_too_slowly_is_given_up() -> None:
    """Each byte arrives in time, but the head must be complete after the sum of both timeouts."""

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nA: ")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with listening(dribble) as port:
        source = RemoteSource(
            f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"], connect_timeout=0.2, read_timeout=0.2
        )
        with pytest.raises(UpstreamTimeout):
            async with (await source.resolve("a")).open(GET):
                pass
        await source.aclose()


async def test_a_body_that_nobody_reads_stays_with_the_upstream() -> None:
    sent = 0
    is_full = asyncio.Event()

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            try:
                await asyncio.wait_for(writer.drain(), 1)
            except TimeoutError:
                is_full.set()
                await reader.read()
                return
            sent += 65536

    async with listening(pour) as port:
        client = Client(Network(AllowedHosts("127.0.0.1", ["127.0.0.1"])), connect_timeout=10, read_timeout=10)
        response = await fetch(client, port)
        read = len(await response.read())
        await is_full.wait()
        assert sent < 32 << 20  # the buffers of both sockets
        assert read <= 256 * 1024
        await response.aclose()
        await client.aclose()


async def test_a_request_that_is_cancelled_closes_its_connection() -> None:
    for answer in (b"", OK, OK + b"Content-Length: 20\r\n\r\n" + TEN, CHUNKED + b"5\r\n012"):
        server = Server(answer)
        async with served(server) as client:
            reading = asyncio.create_task(_read(client, server.port))
            while not server.requests:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
            del reading
            await asyncio.wait_for(server.closed.wait(), 10)


@contextmanager
def threaded(answer: bytes) -> Iterator[tuple[int, Callable[[], int]]]:
    """Serve in threads, for any event loop; give the port, and a function that counts the connections."""
    accepted: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError):
            while connection.recv(65536).endswith(b"\r\n\r\n"):
                connection.sendall(answer)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                accepted.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1], lambda: len(accepted)
        listener.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()


@pytest.mark.parametrize("order", [["trio", "asyncio", "trio"], ["asyncio", "asyncio", "trio"]])
async def test_a_connection_is_used_again_on_another_event_loop(order: list[str]) -> None:
    def run(port: int) -> None:
        source = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"])

        async def read() -> bytes:
            async with (await source.resolve("a")).open(GET) as opened:
                return b"".join([chunk async for chunk in opened.stream(None)])

        for backend in order:
            assert anyio.run(read, backend=backend) == b"x" * 1_000_000
        anyio.run(source.aclose)

    with threaded(OK + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000) as (port, connections):
        await asyncio.to_thread(run, port)
        assert connections() == 1


async def test_timeouts_on_trio() -> None:
    def run(port: int) -> None:
        source = RemoteSource(f"http://127.0.0.1:{port}/", allow_hosts=["127.0.0.1"], read_timeout=0.2)

        async def read() -> None:
            async with (await source.resolve("a")).open(GET):
                pass

        with pytest.raises(UpstreamTimeout):
            anyio.run(read, backend="trio")

    with threaded(OK) as (port, _):
        await asyncio.to_thread(run, port)
