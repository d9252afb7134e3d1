"""HTTP/1 on the wire: heads, bodies, trailers, pipelines and ends of connections, as raw sockets see them."""

import asyncio
import contextlib
import functools
import itertools
import os
import re
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from downloadview_async.asgi.uvicorn import protocol as module
from downloadview_async.asgi.uvicorn.heads import is_host
from downloadview_async.asgi.uvicorn.protocol import MAX_HEAD_BYTES, DownloadProtocol
from downloadview_async.asgi.uvicorn.watchdog import check
from tests.asgi.test_server import CLOSE, MIB, app_for, dateless, get, served, small_buffers, talk
from tests.live import live, parse, uvicorn_for
from tests.servers import PROJECT, Server, free_port, serving

LOOPS = ["asyncio", "uvloop"]
pytestmark = pytest.mark.asyncio

CONTENT = os.urandom(MIB) * 16 + b"the end"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("root")
    (path / "big.bin").write_bytes(CONTENT)
    (path / "small.bin").write_bytes(b"the content")
    return path


class Wire:
    """An application, and what has come to it."""

    def __init__(self, root: Path) -> None:
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.app: Starlette = app_for(root)
        self.app.router.routes += [
            Route("/fields", self.fields, methods=["GET", "POST"]),
            Route("/late", self.late, methods=["GET", "POST"]),
            Route("/generated", self.generated, methods=["GET", "HEAD", "POST"]),
            Route("/breaks", self.breaks),
            Route("/framed", self.framed),
            Route("/body", self.body, methods=["POST"]),
        ]

    async def fields(self, request: Request) -> Response:
        self.headers.append(list(request.headers.raw))
        return PlainTextResponse(f"{request.scope['http_version']} {request.url.netloc} {request.url.path}")

    async def late(self, request: Request) -> Response:
        self.asked.set()
        await self.may_answer.wait()
        return await self.fields(request)

    async def generated(self, request: Request) -> Response:
        return StreamingResponse(_generated())

    async def breaks(self, request: Request) -> Response:
        return StreamingResponse(_breaking())

    async def framed(self, request: Request) -> Response:
        return StreamingResponse(_generated(), headers={"Transfer-Encoding": "chunked"})

    async def body(self, request: Request) -> Response:
        return PlainTextResponse(await request.body())


async def _generated() -> AsyncIterator[bytes]:
    for number in range(8):
        yield b"%d" % number * 50_000


async def _breaking() -> AsyncIterator[bytes]:
    yield b"some"
    await asyncio.sleep(0)
    raise RuntimeError("broken")


GENERATED = b"".join(b"%d" % number * 50_000 for number in range(8))


def post(path: str, *lines: str) -> bytes:
    return get(path, *lines, method="POST")


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]


# ------------------------------------------------------------------------------------------------ heads


HEADS = {
    b"GET /fields HTTP/1.1\r\nHost: x\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\nhOsT: x\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\nHost:\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\nHost: x:80\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\nHost: x \t\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\nHost: x:\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\nHost: [::1]:80\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x y\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: u@x\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x/y\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: [unix:/run/a]\r\n\r\n": 400,  # not over TCP
    b"GET /fields HTTP/1.1\r\nHost: /run/a\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: \xc3\xa9\r\n\r\n": 400,
    b"GET /fields HTTP/1.0\r\n\r\n": 200,
    b"GET /fields HTTP/1.0\r\nHost: x\r\n\r\n": 200,
    b"GET /fields HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n": 400,
    b"GET /fields HTTP/1.0\r\nHost: x y\r\n\r\n": 400,
    b"GET /fields HTTP/1.2\r\nHost: x\r\n\r\n": 200,  # as 1.1
    b"GET /fields HTTP/1.9\r\n\r\n": 400,
    b"GET /fields HTTP/0.9\r\n\r\n": 505,
    b"GET /fields\r\n\r\n": 505,
    b"GET /fields\r\n": 505,
    b"GET /fields HTTP/0.0\r\nHost: x\r\n\r\n": 505,
    b"GET /fields HTTP/2.0\r\nHost: x\r\n\r\n": 505,
    b"GET /fields HTTP/3.0\r\nHost: x\r\n\r\n": 505,
    b"GET /fields HTTP/9.9\r\nHost: x\r\n\r\n": 505,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": 505,
    b"GET /fields HTTP/1.10\r\nHost: x\r\n\r\n": 400,
    b"GET /fields HTTP/11.1\r\nHost: x\r\n\r\n": 400,
    b"GET /fields HTTP/a.1\r\nHost: x\r\n\r\n": 400,
    b"GET /fields HTTPS/1.1\r\nHost: x\r\n\r\n": 400,
    b"GET /fields http/1.1\r\nHost: x\r\n\r\n": 400,
    # absolute-form [RFC 9112 3.2.2]
    b"GET http://y:80/fields HTTP/1.1\r\nHost: x\r\n\r\n": 200,
    b"GET HTTPS://y/fields HTTP/1.1\r\nHost: x\r\n\r\n": 200,
    b"GET http://y/fields HTTP/1.0\r\n\r\n": 200,
    b"GET http://y/fields HTTP/1.1\r\n\r\n": 400,
    b"GET http://y HTTP/1.1\r\nHost: y\r\n\r\n": 404,
    b"GET http://u@y/fields HTTP/1.1\r\nHost: y\r\n\r\n": 400,
    b"GET http:///fields HTTP/1.1\r\nHost: y\r\n\r\n": 400,
    b"GET ftp://y/fields HTTP/1.1\r\nHost: y\r\n\r\n": 400,
    b"GET fields HTTP/1.1\r\nHost: x\r\n\r\n": 400,
    b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n": 400,
    # what could be read in two ways [RFC 9112 2.2, 5, 6.1, 6.3, 11.2]
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 3\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 0x3\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551617\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\nabc": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n": 501,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 501,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n": 200,
    b"POST /body HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 400,
    b"POST /body HTTP/1.0\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc": 200,
    b"POST /body HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 3\r\n\r\nabc": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n": 200,
    b"GET /fields HTTP/1.1\r\nHost : x\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\n Host: x\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\nX-Folded: a\r\n b\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\nX-Zero: \0\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\nX-Return: a\rb\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\n: no name\r\n\r\n": 400,
    b"GET /fields HTTP/1.1\nHost: x\n\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\n\r\n": 400,
    b"GET /fields HTTP/1.1\r\nHost: x\r\n\n": 400,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": 400,
    b"junk\r\n\r\n": 400,
}


async def test_heads(root: Path) -> None:
    wire = Wire(root)
    async with live(wire.app, http=DownloadProtocol) as port:
        for head, status in HEADS.items():
            for before in (b"", get()):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(before + head)
                expected = [200, status] if before else [status]
                received = b""
                while len(statuses(received)) < len(expected) or not received.partition(b"\r\n\r\n")[1]:
                    block = await asyncio.wait_for(reader.read(1 << 16), 30)
                    assert block, (head, received)
                    received += block
                assert statuses(received) == expected, (before + head, received)
                if status >= 500 or status == 400:
                    received += await asyncio.wait_for(reader.read(-1), 30)
                    answer = parse(received[received.rindex(b"HTTP/1.1 ") :])
                    assert answer.headers["connection"] == "close", head
                    assert answer.complete, head
                writer.close()


async def test_pipelined_requests_in_pieces_of_any_size(root: Path) -> None:
    """An end of a head, or of a body in chunks, may come in four pieces."""
    wire = Wire(root)
    chunked = b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    requests = get() + chunked + get("/ours/small.txt")
    cuts = [(place, place + length) for place in range(1, len(requests)) for length in (1, 2)]
    expected: list[int] | None = None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with uvicorn_for(wire.app, sockets=[listener], http=DownloadProtocol) as server:
            for first, second in [(len(requests), len(requests)), *cuts]:
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                while not server.server_state.connections:
                    await asyncio.sleep(0)
                (protocol,) = server.server_state.connections
                for piece in (requests[:first], requests[first:second], requests[second:]):
                    if piece:
                        protocol.data_received(piece)
                received = b""
                while len(statuses(received)) < 3:
                    block = await asyncio.wait_for(reader.read(1 << 16), 30)
                    assert block, (first, second, received)
                    received += block
                if expected is None:
                    expected = statuses(received)
                assert statuses(received) == expected, (first, second)
                writer.close()
                while server.server_state.connections:
                    await asyncio.sleep(0)


@pytest.mark.parametrize(
    "host, netloc",
    [
        ("[unix:/run/service.sock]", ""),  # H2O's, and
        ("/run/service.sock", ""),  # that of Go before 1.20.6
        ("x", "x"),
        ("", ""),
        ("[unix:]", None),
        ("[unix:/run/a b]", None),
        ("a/b", None),
    ],
)
async def test_a_unix_socket_has_no_host(root: Path, tmp_path: Path, host: str, netloc: str | None) -> None:
    wire, path = Wire(root), str(tmp_path / "socket")
    async with uvicorn_for(wire.app, uds=path, http=DownloadProtocol):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(f"GET /fields HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = parse(await reader.read())
        writer.close()
    if netloc is None:
        assert answer.status == 400
    else:
        assert answer.status == 200
        assert dict(wire.headers[0])[b"host"].decode() == netloc


@pytest.mark.parametrize(
    "value, valid",
    [
        ("", True),
        ("example.org", True),
        ("example.org.", True),
        ("a_b-c~d", True),
        ("a,b;c=d", True),
        ("%41.example", True),
        ("127.0.0.1:8000", True),
        (":80", True),
        ("x:99999", True),
        ("[::1]", True),
        ("[::ffff:127.0.0.1]:80", True),
        ("[v1.a:b]", True),
        ("%4", False),
        ("a%zz", False),
        ("a b", False),
        ("a\tb", False),
        ("a/b", False),
        ("a?b", False),
        ("a#b", False),
        ("a\\b", False),
        ("u@h", False),
        ("u:p@h", False),
        ("x:y", False),
        ("x:-1", False),
        ("x:80:80", False),
        ("::1", False),
        ("[::1", False),
        ("[::1]x", False),
        ("[1:2]", False),
        ("[::1%25eth0]", False),
        ("[]", False),
        ("<x>", False),
        ('"x"', False),
        ("é", False),
    ],
)
async def test_which_hosts_are_valid(value: str, valid: bool) -> None:
    assert is_host(value.encode()) is valid


async def test_an_absolute_target_names_the_host(root: Path) -> None:
    wire = Wire(root)
    request = b"GET http://y:80/fields HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n\r\n"
    async with live(wire.app, http=DownloadProtocol) as port:
        received = await talk(port, request + get("/fields", CLOSE))
    assert re.findall(rb"1\.1 \S+ \S+$|1\.1 y:80 /fields", received) == [b"1.1 y:80 /fields", b"1.1 x /fields"]
    assert sorted(wire.headers[0]) == [(b"host", b"y:80"), (b"x-a", b"1")]


@pytest.mark.parametrize("host", ["x", "80"])
async def test_the_body_after_an_absolute_target_ends_where_its_length_says(root: Path, host: str) -> None:
    request = b"POST http://y/body HTTP/1.1\r\nHost: %b\r\nContent-Length: 2\r\n\r\nab" % host.encode()
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await talk(port, request + get("/fields", CLOSE))
    assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", received)] == [200, 200]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
async def test_requests_in_pieces_of_any_size(root: Path, size: int) -> None:
    requests = [
        get(),
        b"\r\n" + get("/fields", "X-A: " + "b" * 50),
        post("/body", "Content-Length: 12") + b"\r\n\r\n\r\n\r\n\r\n\r\n",
        get("/ours/small.bin", "Range: bytes=2-4"),
        post("/body", CHUNKED) + b"4;a=b\r\n\r\n\r\n\r\n3\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n",
        get("/generated"),
        get("/ours/small.bin", CLOSE),
    ]
    data = b"".join(requests)
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        whole = await talk(port, data)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = asyncio.create_task(reader.read(-1))
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await asyncio.sleep(0)
        assert dateless(await asyncio.wait_for(received, 30)) == whole
        writer.close()
    assert statuses(whole) == [200, 200, 200, 206, 200, 200, 200]
    assert b"\r\n\r\n\r\n\r\nabcHTTP/1.1" in whole


# --------------------------------------------------------------------------------------------- trailers

TRAILERS = [b"Range: bytes=0-1", b"X-Forwarded-User: admin", b"Host: y", b"Expect: 100-continue", b"Connection: close"]


@pytest.mark.parametrize("is_late", [False, True])
async def test_trailers_are_no_headers(root: Path, is_late: bool) -> None:
    wire = Wire(root)
    wire.may_answer.set()
    body = b"3\r\nabc\r\n0\r\n"
    trailers = b"".join(trailer + b"\r\n" for trailer in TRAILERS) + b"\r\n"
    async with live(wire.app, http=DownloadProtocol) as port:
        for method, path in itertools.product(("GET", "POST"), ("/fields", "/late", "/ours/small.bin")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(get(path, CHUNKED, CLOSE, method=method) + body)
            if is_late:
                await asyncio.sleep(0.01)
            writer.write(trailers)
            received = await asyncio.wait_for(reader.read(-1), 30)
            writer.close()
            refused = method == "POST" and "ours" in path
            assert statuses(received) == [405 if refused else 200], (method, path)
    assert len(wire.headers) == 4
    for headers in wire.headers:
        assert sorted(headers) == [(b"connection", b"close"), (b"host", b"x"), (b"transfer-encoding", b"chunked")]


def patient(port: int) -> socket.socket:
    """Return a client whose kernel takes little for it."""
    client = small_buffers(port)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    return client


# What begins a body, and what is then sent again and again.
ENDLESS_BODIES = {
    "trailers": (b"0\r\n", b"X-Trailer: value\r\n"),
    "a trailer's name": (b"0\r\n", b"x" * 4096),
    "a trailer's value": (b"0\r\nX-Trailer: ", b"v" * 4096),
    "a folded trailer": (b"0\r\nX-Trailer: v", b"\r\n v"),
    "chunk extensions": (b"1", b";a=b"),
    "a chunk extension": (b"1;", b"a" * 4096),
    "an extension's value": (b"1;a=", b"b" * 4096),
    "a quoted value": (b'1;a="', b"b" * 4096),
    "extensions of every chunk": (b"", b"1;" + b"a" * 1000 + b"\r\nx\r\n"),
    "digits": (b"", b"0" * 4096),
}


@pytest.mark.parametrize(
    "refused, status",
    [
        (b"HEAD / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nHo\0st: a\r\n\r\n", 400),
        (b"HEAD /\1 HTTP/1.1\r\n\r\n", 400),
        (b"HEAD / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"HEAD / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * MAX_HEAD_BYTES, 400),
    ],
    ids=range(6),
)
async def test_a_refused_head_request_gets_no_body(root: Path, refused: bytes, status: int) -> None:
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await talk(port, refused)
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert received.endswith(b"\r\n\r\n")
        received = await talk(port, get(method="HEAD") + b"X / HTTP/1.1\r\n\r\n")
        assert received.count(b"HTTP/1.1 ") == 2
        assert b"content-length" not in received.rpartition(b"HTTP/1.1 ")[2]


ENDLESS_HEADS = {
    "a method": (b"", b"G" * 4096),
    "a target": (b"GET /", b"x" * 4096),
    "a query": (b"GET /?", b"x" * 4096),
    "a name": (b"GET / HTTP/1.1\r\n", b"x" * 4096),
    "a value": (b"GET / HTTP/1.1\r\nX-A: ", b"x" * 4096),
    "blanks before a value": (b"GET / HTTP/1.1\r\nX-A:", b" " * 4096),
    "headers": (b"GET / HTTP/1.1\r\n", b"X-A: b\r\n"),
    "folded lines": (b"GET / HTTP/1.1\r\nX-A: b", b"\r\n b"),
    "empty lines": (b"", b"\r\n"),
}


async def sent_until_refused(client: socket.socket, start: bytes, piece: bytes) -> int:
    """Send without end. Return how many bytes went before the connection ended."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, start)
    block = piece * (-(-(1 << 16) // len(piece)))
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 64 * MIB:
            await asyncio.wait_for(loop.sock_sendall(client, block), 30)
            sent += len(block)
    client.close()
    return sent


@pytest.mark.parametrize("path", ["/late", "/ours/big.bin", "/fields"], ids=["before", "during", "after"])
async def test_a_body_that_never_comes_to_its_end(
    root: Path, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.2)
    wire = Wire(root)
    async with live(wire.app, http=DownloadProtocol) as port:

        async def sends(name: str) -> None:
            start, piece = ENDLESS_BODIES[name]
            client = patient(port)
            await asyncio.get_running_loop().sock_sendall(client, get(path, CHUNKED))
            if path != "/late":
                await asyncio.get_running_loop().sock_recv(client, 12)
            assert await sent_until_refused(client, start, piece) < 16 * MIB, name

        refused = [name for name in ENDLESS_BODIES if "folded" not in name]
        await asyncio.gather(*map(sends, refused))
        if path != "/fields":
            assert caplog.text.count("around its body was refused") == len(refused)
        await asyncio.gather(*map(sends, ENDLESS_BODIES.keys() - refused))
        wire.may_answer.set()
        assert parse(await talk(port, get("/fields", CLOSE))).status == 200


@pytest.mark.parametrize(
    "before",
    ["", "/ours/small.bin", pytest.param("/ours/big.bin", marks=pytest.mark.slow)],
    ids=["first", "after", "behind"],
)
async def test_a_head_that_is_too_long(root: Path, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.2)
    http = functools.partial(DownloadProtocol, stall_seconds=0.5, minimum_rate=1 << 20)
    async with live(Wire(root).app, http=http) as port:

        async def sends(name: str) -> None:
            start, piece = ENDLESS_HEADS[name]
            client = patient(port)
            if before:
                await asyncio.get_running_loop().sock_sendall(client, get(before))
                await asyncio.get_running_loop().sock_recv(client, 12)
            assert await sent_until_refused(client, start, piece) < 16 * MIB, name

        await asyncio.gather(*map(sends, ENDLESS_HEADS))


async def test_a_field_of_64_kib_is_read(root: Path) -> None:
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await talk(port, get("/ours/small.bin", "Range: bytes=" + "9" * 65536 + "-", CLOSE))
        assert statuses(received) == [416]
        received = await talk(port, get("/ours/small.bin", "Range: bytes=" + "9" * MAX_HEAD_BYTES + "-", CLOSE))
        assert statuses(received) == [400]


# -------------------------------------------------------------------------------------------- pipelines


@pytest.mark.slow
async def test_ten_thousand_requests_wait_as_bytes_and_are_answered_in_order(root: Path) -> None:
    from tests.test_bounds import reset_peak, resident_peak

    first = get("/ours/big.bin")
    ranges = [get("/ours/big.bin", f"Range: bytes={n}-{n}") for n in range(5000)]
    requests = first + b"".join(ranges) + get("/ours/small.bin", CLOSE)
    with served(root, f"{DownloadProtocol.__module__}:{DownloadProtocol.__name__}") as server:
        port = int(server.address)
        await talk(port, get("/ours/small.bin", CLOSE))
        idle = reset_peak(server)
        clients = [await asyncio.open_connection("127.0.0.1", port, limit=1 << 14) for _ in range(30)]
        for reader, writer in clients:
            writer.write(requests)
            await reader.readexactly(12)
        await talk(port, get("/ours/small.bin", CLOSE))
        assert resident_peak(server) - idle < 30 * MIB
        for _, writer in clients[1:]:
            writer.transport.abort()
        received = b"HTTP/1.1 200" + await clients[0][0].read(-1)
        clients[0][1].close()
    _, _, rest = received.partition(b"\r\n\r\n")
    assert rest[: len(CONTENT)] == CONTENT
    rest = rest[len(CONTENT) :]
    assert [int(n) for n in re.findall(rb"\r\ncontent-range: bytes (\d+)-", rest)] == list(range(5000))
    assert rest.endswith(b"the content")


@pytest.mark.parametrize("path", ["/ours/small.bin", "/generated", pytest.param("/fields", marks=pytest.mark.slow)])
async def test_ten_thousand_requests_in_one_packet(root: Path, path: str) -> None:
    count = {"/fields": 10_000, "/generated": 100}.get(path, 2_000)
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await talk(port, f"GET {path} HTTP/1.1\r\nHost:\r\n\r\n".encode() * count + get(path, CLOSE))
    assert statuses(received) == [200] * (count + 1)


# ------------------------------------------------------------------------------- junk behind an answer

JUNK = {
    "junk": (b"junk\r\n\r\n", 400),
    "a record of TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10, 400),
    "a head that is too long": (b"GET / HTTP/1.1\r\nX: " + b"x" * (MAX_HEAD_BYTES + 1), 400),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "another version": (b"GET / HTTP/3.0\r\n\r\n", 505),
    "two lengths": (post("/body", "Content-Length: 1", "Content-Length: 2") + b"1", 400),
    "an upgrade with a body": (post("/body", "Connection: Upgrade", "Upgrade: h2c", "Content-Length: 1") + b"1", 400),
}
ANSWERS = ["/ours/big.bin", "/generated", "/ours/small.bin", "/fields", "/local/big.bin"]


@pytest.mark.parametrize("path", ANSWERS)
@pytest.mark.parametrize("waiting", [0, pytest.param(2, marks=pytest.mark.slow)])
async def test_junk_behind_a_request_is_answered_after_it(root: Path, path: str, waiting: int) -> None:
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        whole = await talk(port, get(path) * (waiting + 1) + get("/fields", CLOSE))
        whole = whole[: whole.rindex(b"HTTP/1.1 200")]
        for name, (junk, status) in JUNK.items():
            received = await talk(port, get(path) * (waiting + 1) + junk)
            assert received.startswith(whole), name
            assert statuses(received[len(whole) :]) == [status], name
            assert parse(received[len(whole) :]).complete, name


@pytest.mark.parametrize("path", ["/ours/big.bin", "/generated", "/late"])
async def test_junk_in_the_body_of_a_request_ends_its_answer(root: Path, path: str) -> None:
    wire = Wire(root)
    app = wire.app
    async with live(app, http=DownloadProtocol) as port:
        client = patient(port)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, get(path, CHUNKED))
        received = bytearray()
        if path == "/late":
            await wire.asked.wait()
        else:
            received += await loop.sock_recv(client, 12)
        if path == "/generated":  # may be complete by now
            path = "/ours/big.bin"
        await loop.sock_sendall(client, b"no size\r\n")
        with contextlib.suppress(ConnectionError):
            while block := await asyncio.wait_for(loop.sock_recv(client, 1 << 16), 30):
                received += block
        client.close()
        wire.may_answer.set()
    assert b"400 Bad Request" not in received
    assert received.count(b"HTTP/1.1 ") <= 1


class Switching(asyncio.Protocol):
    """Another protocol, which begins as one of WebSocket does."""

    def __init__(self, **options: Any) -> None:
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        self.transport.close()


@pytest.mark.parametrize("path", ["/ours/big.bin", "/generated", "/fields"])
async def test_another_protocol_behind_an_answer_begins_after_it(root: Path, path: str) -> None:
    upgrade = get("/", "Connection: Upgrade", "Upgrade: websocket")
    async with live(Wire(root).app, http=DownloadProtocol, ws=Switching) as port:
        whole = await talk(port, get(path) + get("/fields", CLOSE))
        received = await talk(port, get(path) + upgrade)
    assert received == whole[: whole.rindex(b"HTTP/1.1 200")] + b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


# -------------------------------------------------------------------------------------------- HTTP/1.0


def body_of(received: bytes) -> bytes:
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: keep-alive" not in head.lower()
    return body


@pytest.mark.parametrize("line", ["Connection: close", "Connection: keep-alive", "X-None: 1"])
async def test_http_10_gets_no_chunks(root: Path, line: str) -> None:
    async def pathsend(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(root / "big.bin")})

    app = Wire(root).app
    app.mount("/pathsend", pathsend)
    async with live(app, http=DownloadProtocol) as port:
        for path, content in {
            "/generated": GENERATED,
            "/framed": GENERATED,
            "/ours/big.bin": CONTENT,
            "/ours/small.bin": b"the content",
            "/pathsend/": CONTENT,
        }.items():
            received = await talk(port, get(path, line, version="1.0"))
            assert statuses(received[:20]) == [200]
            assert body_of(received) == content, path
            assert (b"content-length" in received[:1000]) == ("ours" in path), path
        assert body_of(await talk(port, get("/generated", line, version="1.0", method="HEAD"))) == b""


async def test_an_answer_to_http_10_that_fails_is_no_clean_end(root: Path) -> None:
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/breaks", version="1.0"))
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(-1), 30)
        writer.close()


# ------------------------------------------------------------------------------------ ends of connections


def half_closed(port: int, *requests: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(b"".join(requests))
    client.shutdown(socket.SHUT_WR)
    client.setblocking(False)
    return client


async def all_of(client: socket.socket, *, pause: float = 0) -> bytes:
    received = bytearray()
    while block := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1 << 18), 30):
        received += block
        await asyncio.sleep(pause)
    client.close()
    return bytes(received)


@pytest.mark.parametrize("path", ["/ours/big.bin", "/local/big.bin", "/generated", "/ours/small.bin", "/ours/none"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("line", [CLOSE, "X-None: 1"])
async def test_a_client_that_has_half_closed_gets_its_whole_answer(
    root: Path, path: str, version: str, line: str
) -> None:
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await all_of(half_closed(port, get(path, line, version=version)), pause=0.001)
        if version == "1.0" and path == "/generated":
            assert body_of(received) == GENERATED
        else:
            answer = parse(received)
            assert answer.complete
            assert answer.body == {"big.bin": CONTENT, "generated": GENERATED, "none": b"Not Found"}.get(
                path.rpartition("/")[2], b"the content"
            )


async def test_a_client_that_has_half_closed_gets_all_its_answers(root: Path) -> None:
    requests = get("/ours/big.bin") + get("/generated") + get("/fields") * 2000 + get()
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await all_of(half_closed(port, requests))
        cut = await all_of(half_closed(port, requests, get()[:20]))
    assert statuses(received.replace(CONTENT, b"")) == [200] * 2003
    assert CONTENT in received
    assert received.endswith(b"the content")
    assert dateless(cut) == dateless(received)


async def test_an_answer_that_comes_after_half_closing(root: Path) -> None:
    wire = Wire(root)
    async with live(wire.app, http=DownloadProtocol) as port:
        client = half_closed(port, get("/late"))
        await wire.asked.wait()
        await asyncio.sleep(0.05)  # for the end of the client's bytes to be read
        wire.may_answer.set()
        assert parse(await all_of(client)).complete


@pytest.mark.parametrize("begun", [b"", get()[:20], get("/ours/small.bin", "Content-Length: 5") + b"1"])
async def test_who_has_half_closed_and_waits_for_nothing_is_closed(root: Path, begun: bytes) -> None:
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await all_of(half_closed(port, begun))
    assert received == b"" or parse(received).complete


async def test_a_reset_after_half_closing_is_noticed() -> None:
    left = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        wire.asked.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    wire = SimpleNamespace(asked=asyncio.Event())
    async with live(app, http=DownloadProtocol) as port:
        client = half_closed(port, get())
        await wire.asked.wait()
        await asyncio.sleep(0.05)
        assert not left.is_set()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await asyncio.wait_for(left.wait(), 30)


CLOSING = {
    "a body": get("/generated", "Content-Length: 9999999"),
    "chunks": get("/generated", CHUNKED),
    "close": get("/generated", CLOSE, "Content-Length: 9999999"),
    "HTTP/1.0": get("/generated", "Content-Length: 9999999", version="1.0"),
    "no Host": b"POST / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n",
    "another version": b"POST / HTTP/2.0\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n",
    "junk": b"junk\r\n\r\n",
}


@pytest.mark.parametrize("asked", CLOSING)
async def test_what_a_client_goes_on_sending_does_not_cost_it_its_answer(root: Path, asked: str) -> None:
    loop = asyncio.get_running_loop()
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        client = small_buffers(port)
        await loop.sock_sendall(client, CLOSING[asked])
        received = await loop.sock_recv(client, 12)
        while block := await asyncio.wait_for(loop.sock_recv(client, 4096), 30):
            received += block
            chunk = b"400\r\n" + b"x" * 1024 + b"\r\n" if asked == "chunks" else b"x" * 1024
            await loop.sock_sendall(client, chunk)
        await loop.sock_sendall(client, b"x")  # not reset
        client.close()
    if asked == "HTTP/1.0":
        assert body_of(received) == GENERATED
    else:
        assert parse(received).complete


@pytest.mark.parametrize("path", ["/fields", "/generated", "/none", "/breaks", "/ours/small.bin", "/local/small.bin"])
@pytest.mark.parametrize(
    "line, body, closes",
    [
        (CHUNKED, b"", False),
        (CHUNKED, b"3\r\nabc\r\n", False),
        ("Content-Length: 2000000", b"", True),
        ("Content-Length: 5", b"", False),
        ("Content-Length: 0", b"", False),
    ],
)
async def test_an_answer_that_leaves_a_body_unread_says_that_it_closes(
    root: Path, path: str, line: str, body: bytes, closes: bool
) -> None:
    """Otherwise a proxy may send its next request on a connection that is about to close."""
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get(path, line) + body)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.close()
    assert head.lower().count(b"connection: close") == closes or path == "/breaks"


async def test_an_answer_after_the_whole_body_keeps_the_connection(root: Path) -> None:
    requests = post("/body", CHUNKED, "Expect: 100-continue") + b"3\r\nabc\r\n0\r\n\r\n"
    requests += post("/body", "Content-Length: 2000000") + b"a" * 2_000_000 + get("/fields", CLOSE)
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await talk(port, requests)
    assert statuses(received.replace(b"HTTP/1.1 100 Continue", b"")) == [200, 200, 200]


@pytest.mark.parametrize(
    "path", ["/fields", "/none", "/generated", "/ours/small.bin", "/ours/big.bin", "/local/small.bin"]
)
async def test_a_chunked_body_that_nobody_reads_is_dropped(root: Path, path: str) -> None:
    chunks = (b"%x\r\n" % 60_000 + b"a" * 60_000 + b"\r\n") * 16 + b"0\r\n\r\n"
    requests = (get(path, CHUNKED) + chunks) * 3 + get("/fields", CLOSE)  # less than 1 MiB each, more together
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        received = await talk(port, requests)
    assert len(re.findall(rb"HTTP/1\.1 (?:200 OK|404 Not Found)\r\n", received)) == 4


@pytest.mark.parametrize("path", ["/fields", "/none", "/ours/small.bin", "/local/small.bin"])
async def test_a_chunked_body_is_not_dropped_for_ever(root: Path, path: str) -> None:
    chunk = b"%x\r\n" % 60_000 + b"a" * 60_000 + b"\r\n"
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get(path, CHUNKED) + chunk)
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.write(chunk * 18 + b"0\r\n\r\n" + get("/fields"))
        assert b"HTTP/1.1" not in await asyncio.wait_for(reader.read(-1), 30)
        writer.close()


async def test_a_body_that_was_not_allowed_to_come_is_not_waited_for(root: Path) -> None:
    """A client that waits for 100 (Continue) need not send its body when another answer comes."""
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/fields", "Expect: 100-continue", "Content-Length: 60"))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert b"connection: close" in head.lower()
        writer.write(get("/fields"))
        assert b"HTTP/1.1" not in await asyncio.wait_for(reader.read(-1), 30)
        writer.close()


async def test_who_goes_on_sending_is_not_read_for_ever(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.3)
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        for request in (get("/fields", "Content-Length: 9999999"), CLOSING["junk"]):
            client = patient(port)
            sent = await sent_until_refused(client, request, b"x" * 4096)
            assert sent < 16 * MIB


async def test_a_client_that_closes_after_its_last_answer_is_closed_at_once(root: Path) -> None:
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get("/ours/small.bin", "Content-Length: 9999999"))
        assert b"the content" in await asyncio.wait_for(reader.read(-1), 30)
        before = len(os.listdir("/proc/self/fd"))
        writer.close()
        async with asyncio.timeout(4):
            while len(os.listdir("/proc/self/fd")) > before - 2:
                await asyncio.sleep(0.01)


async def test_a_client_that_resets_in_place_of_a_body_is_no_error(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    async with live(Wire(root).app, http=DownloadProtocol) as port:
        for number in range(200):
            client = socket.create_connection(("127.0.0.1", port))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.send(get("/ours/small.bin", "Content-Length: 9999999"))
            for _ in range(number % 20):
                await asyncio.sleep(0)
            client.close()
        assert statuses(await talk(port, get("/fields", CLOSE))) == [200]
    assert [record.message for record in caplog.records] == []


@contextlib.asynccontextmanager
async def running(app: Any, **options: Any) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=DownloadProtocol, log_config=None, access_log=False, lifespan="off", **options)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0)
    yield server, int(listener.getsockname()[1])
    server.should_exit = True
    await asyncio.wait_for(task, 30)


async def connected(server: uvicorn.Server, port: int) -> socket.socket:
    """Return a client whose connection the server has taken."""
    before = len(server.server_state.connections)
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    while len(server.server_state.connections) == before:
        await asyncio.sleep(0)
    return client


@pytest.mark.parametrize("begun", [0, 20, None], ids=["later", "half", "already"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
async def test_a_request_at_the_moment_of_the_end_is_answered(root: Path, begun: int | None, used: bool) -> None:
    loop = asyncio.get_running_loop()
    request = get("/ours/big.bin")
    async with running(Wire(root).app) as (server, port):
        client = await connected(server, port)
        protocol: Any
        (protocol,) = server.server_state.connections
        if used:
            client.send(get())
            while not (await loop.sock_recv(client, 4096)).endswith(b"the content"):
                pass
        if begun is None:
            client.send(request)  # is in the kernel, and not read yet, when the protocol is told
            protocol.shutdown()
        else:
            client.send(request[:begun])
            while begun and protocol._phase is not module._HEAD:
                await asyncio.sleep(0)
            server.should_exit = True
            while server.server_state not in module._shutting_down:
                await asyncio.sleep(0.001)
            if used and not begun:
                assert await all_of(client) == b""  # idle: closed at once
                return
            client.send(request[begun:])
        answer = parse(await all_of(client))
    assert answer.headers["connection"] == "close"
    assert answer.complete
    assert answer.body == CONTENT


async def test_a_request_at_the_moment_of_the_keep_alive_timeout_is_answered(root: Path) -> None:
    loop = asyncio.get_running_loop()
    async with running(Wire(root).app) as (server, port):
        client = await connected(server, port)
        protocol: Any
        (protocol,) = server.server_state.connections
        client.send(get())
        while not (await loop.sock_recv(client, 4096)).endswith(b"the content"):
            pass
        protocol._idle_since -= 2 * protocol.timeout_keep_alive
        client.send(get("/ours/big.bin", CLOSE))
        protocol.timeout_keep_alive_handler()
        assert parse(await all_of(client)).body == CONTENT


async def test_a_fresh_connection_that_asks_for_nothing_does_not_hold_up_the_end(root: Path) -> None:
    async with running(Wire(root).app) as (server, port):
        client = await connected(server, port)
        server.should_exit = True
        async with asyncio.timeout(4):
            assert await all_of(client) == b""


# ----------------------------------------------------------------------------------------- as it is served


@contextlib.contextmanager
def service(root: Path, log: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "downloadview_async.cli", "serve", str(root), "--port", str(port)]
    with serving(command, port, log=log, cwd=log.parent, env={"PYTHONPATH": str(PROJECT)}) as server:
        yield server


@pytest.mark.slow
async def test_the_service_as_it_comes(root: Path, tmp_path: Path) -> None:
    big, small = "/files/big.bin", "/files/small.bin"
    with service(root, tmp_path / "log") as server:
        port = int(server.address)
        plain = await talk(port, get(big, CLOSE))
        assert parse(plain).body == CONTENT
        trailer = b"0\r\nRange: bytes=0-1\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n"
        assert statuses(await talk(port, get(small, CHUNKED, CLOSE) + trailer)) == [200]
        assert "192.0.2.1" not in server.log
        for head, status in {
            b"GET /files/small.bin HTTP/1.1\r\n\r\n": 400,
            b"GET /files/small.bin HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n": 400,
            b"GET /files/small.bin HTTP/0.9\r\n\r\n": 505,
            b"GET /files/small.bin HTTP/2.0\r\nHost: x\r\n\r\n": 505,
            b"GET /files/small.bin HTTP/1.0\r\n\r\n": 200,
        }.items():
            assert statuses(await talk(port, head)) == [status]
            received = await talk(port, get(big) + head)
            assert received.partition(b"\r\n\r\n")[2][: len(CONTENT)] == CONTENT
            assert statuses(received[len(CONTENT) :]) == [status]
        assert b"transfer-encoding" not in (await talk(port, get("/", version="1.0"))).lower()
        assert parse(await all_of(half_closed(port, get(big)))).body == CONTENT
        client = patient(port)
        client.setblocking(True)
        client.sendall(get(big, CHUNKED))
        client.setblocking(False)
        assert await sent_until_refused(client, b"0\r\n", b"X-Trailer: value\r\n") < 16 * MIB
        server.wait_for_log("around its body was refused")


# ------------------------------------------------------------------------------------- other transports


@pytest.mark.parametrize("path", [pytest.param("/ours/big.bin", marks=pytest.mark.slow), "/generated", "/fields"])
async def test_tls(root: Path, certificate: dict[str, str], path: str, caplog: pytest.LogCaptureFixture) -> None:
    trusting = ssl.create_default_context(cafile=certificate["ssl_certfile"])
    trusting.check_hostname = False

    async def talk_tls(port: int, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(request)
        received = await asyncio.wait_for(reader.read(-1), 30)
        writer.close()
        return dateless(received)

    app = Wire(root).app
    async with live(app, http=DownloadProtocol) as plain, live(app, http=DownloadProtocol, **certificate) as port:
        for junk, _ in JUNK.values():
            assert await talk_tls(port, get(path) + junk) == await talk(plain, get(path) + junk)
        whole = get(path, version="1.0")
        assert body_of(await talk_tls(port, whole)) == body_of(await talk(plain, whole))
        trailer = b"0\r\nRange: bytes=0-1\r\n\r\n"
        assert statuses(await talk_tls(port, get("/ours/small.bin", CHUNKED, CLOSE) + trailer)) == [200]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(get())
        await reader.readuntil(b"the content")
        writer.close()
    assert "eof_received" not in caplog.text


class Pipe(asyncio.Transport):
    """A transport over no socket, as that of a pipe, which only keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = asyncio.Event()

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def close(self) -> None:
        self.closed.set()

    abort = close

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def test_a_transport_without_a_socket(root: Path) -> None:
    config = uvicorn.Config(Wire(root).app, log_config=None, access_log=False, timeout_keep_alive=0)
    for request, status in ((get("/ours/big.bin", CLOSE), 200), (get("/generated"), 200), (b"junk\r\n\r\n", 400)):
        protocol = DownloadProtocol(config, uvicorn.server.ServerState(), {}, asyncio.get_running_loop())
        pipe = Pipe()
        protocol.connection_made(pipe)
        protocol.pause_writing()
        check(protocol, (0, 0, 0))
        protocol.resume_writing()
        pipe.closed.clear()
        protocol.data_received(request)
        await asyncio.wait_for(pipe.closed.wait(), 30)
        protocol.shutdown()
        protocol.connection_lost(None)
        answer = parse(pipe.written)
        assert (answer.status, answer.complete) == (status, True)
