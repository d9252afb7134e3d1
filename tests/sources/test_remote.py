"""Remote files against an upstream that says exactly what a test tells it to, byte by byte."""

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.routing import Route

from downloadview_async import Cache, CachedSource, Download, RemoteSource
from downloadview_async.asgi.server import DownloadProtocol
from downloadview_async.http.request import GET
from downloadview_async.testing import call
from tests.live import Answer, ask, ask_raw, listening, live

TEN = b"0123456789"
OK = b"HTTP/1.1 200 OK\r\n"


class Upstream:
    """Answers each request with the next of `answers` (the last one for ever), and keeps what was asked."""

    def __init__(self) -> None:
        self.answers: list[bytes | Callable[[bytes], bytes]] = []
        self.requests: list[bytes] = []
        self.open = 0
        self.connections = 0
        self.closed = asyncio.Event()
        self.hold_after: asyncio.Event | None = None
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.connections += 1
        self.closed.clear()
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                body = answer(head) if callable(answer) else answer
                writer.write(body)
                await writer.drain()
                if self.hold_after is not None:
                    reading = asyncio.ensure_future(reader.read(1))
                    holding = asyncio.ensure_future(self.hold_after.wait())
                    await asyncio.wait([reading, holding], return_when="FIRST_COMPLETED")
                    reading.cancel()
                    holding.cancel()
                    return
                if b"content-length" not in body.lower() and b"chunked" not in body.lower():
                    return
                if b"connection: close" in body.lower():
                    return
        finally:
            self.open -= 1
            self.closed.set()

    def header(self, name: str, request: int = 0) -> str | None:
        for line in self.requests[request].decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name:
                return value
        return None


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    async with listening(upstream.serve) as upstream.port:
        yield upstream


@pytest_asyncio.fixture
async def port(upstream: Upstream) -> AsyncIterator[int]:
    url = f"http://127.0.0.1:{upstream.port}/pub"
    source = RemoteSource(url, allow_hosts=["127.0.0.1"], read_timeout=0.5)
    app = Starlette(routes=[Route("/{path:path}", Download(source))])
    async with live(app) as port:
        yield port
    await source.aclose()


pytestmark = pytest.mark.asyncio


def ok(body: bytes = TEN, *headers: str) -> bytes:
    return OK + _block(headers, body)


def _block(headers: tuple[str, ...], body: bytes) -> bytes:
    return "".join(f"{line}\r\n" for line in (*headers, f"Content-Length: {len(body)}")).encode() + b"\r\n" + body


def partial(content_range: str, body: bytes, *headers: str) -> bytes:
    return b"HTTP/1.1 206 Partial Content\r\n" + _block((f"Content-Range: {content_range}", *headers), body)


async def test_one_client_request_is_one_upstream_request(upstream: Upstream, port: int) -> None:
    upstream.answers = [ok(TEN, 'ETag: "x"')]
    assert (await ask(port, "/a%20b/%C3%A9.txt")).body == TEN
    assert upstream.requests[0].startswith(b"GET /pub/a%20b/%C3%A9.txt HTTP/1.1\r\n")
    assert upstream.header("accept-encoding") == "identity"
    upstream.answers = [OK + b"Content-Length: 10\r\n\r\n"]
    head = await ask(port, "/a", method="HEAD")
    assert (head.status, head.headers["content-length"]) == (200, "10")
    upstream.answers = [partial("bytes 2-4/10", b"234", 'ETag: "x"')]
    answer = await ask(port, "/a", headers={"Range": "bytes=2-4", "If-Range": '"x"'})
    assert (answer.status, answer.body, answer.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    assert (upstream.header("range", 2), upstream.header("if-range", 2)) == ("bytes=2-4", '"x"')
    assert [request.split(b" ")[0] for request in upstream.requests] == [b"GET", b"HEAD", b"GET"]


@pytest.mark.parametrize("kind", ["source", "cached"])
async def test_an_exact_name_is_asked_for_to_the_letter_or_not_at_all(
    upstream: Upstream, kind: str, tmp_path: Path
) -> None:
    """HTTP clients remove the segments `.` and `..` from a URL, and would ask for another file."""
    upstream.answers = [ok()]
    url = f"http://127.0.0.1:{upstream.port}/pub"
    remote = RemoteSource(url, allow_hosts=["127.0.0.1"], names="exact")
    source = CachedSource(remote, Cache(tmp_path)) if kind == "cached" else remote
    for name in (".", "./a", "a/.", "a/./b", "/.", "/./a", "a//.", "..", "../a", "a/../b", "a/.."):
        assert (await call(Download(source, key=lambda request, name=name: name), "/")).status == 404, name  # type: ignore[misc]
    assert upstream.requests == []
    names = ["a", "/a", "a//b", "a/", "...", ".a/b.", "%2e/a", "%2E%2e", "a/.%2e", "..%2fb", "..;/a", "..\\a", "a?b#c"]
    for name in names:
        assert (await call(Download(source, key=lambda request, name=name: name), "/")).status == 200, name  # type: ignore[misc]
    assert [unquote(request.split(b" ")[1].decode()) for request in upstream.requests] == [f"/pub/{n}" for n in names]
    await source.aclose()


@pytest.mark.parametrize(
    "header", ["X-Accel-Redirect", "X-Sendfile", "x-sendfile2", "X-LIGHTTPD-send-file", "X-Reproxy-URL"]
)
async def test_an_upstream_reached_without_its_proxy_is_a_502_and_not_an_empty_file(
    upstream: Upstream, port: int, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.answers = [ok(b"", f"{header}: /_files/a")]
    assert (await ask(port, "/a")).status == 502
    assert "behind its own proxy" in caplog.text
    upstream.answers = [ok(b"")]
    assert (await ask(port, "/a")).status == 200


async def test_conditions_and_validators_are_forwarded_and_nothing_else_of_the_client(
    upstream: Upstream, port: int
) -> None:
    upstream.answers = [b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\nContent-Length: 10\r\n\r\n']
    conditions = {"If-None-Match": '"x"', "If-Modified-Since": "Tue, 14 Nov 2023 22:13:20 GMT"}
    answer = await ask(port, "/a", headers={**conditions, "Cookie": "s=1", "Authorization": "Basic eA==", "X-Own": "1"})
    assert (answer.status, answer.headers["etag"]) == (304, '"x"')
    for name, value in conditions.items():
        assert upstream.header(name.lower()) == value
    for name in ("cookie", "authorization", "x-own", "referer", "x-forwarded-for"):
        assert upstream.header(name) is None


@pytest.mark.parametrize(
    "name, value", [("If-None-Match", '"x"'), ("If-Modified-Since", "Tue, 14 Nov 2023 22:13:20 GMT")]
)
async def test_a_304_without_validators_is_still_one(upstream: Upstream, port: int, name: str, value: str) -> None:
    upstream.answers = [b"HTTP/1.1 304 Not Modified\r\nContent-Length: 0\r\n\r\n"]
    assert (await ask(port, "/a", headers={name: value})).status == 304


async def test_an_entity_tag_of_any_legal_byte_is_forwarded(upstream: Upstream, port: int) -> None:
    upstream.answers = [ok(TEN, 'ETag: "x"')]
    raw = b'GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\nIf-None-Match: "\xe9"\r\n\r\n'
    assert (await ask_raw(port, raw)).status == 200
    assert upstream.header("if-none-match") == '"\xe9"'


async def test_a_redirect_to_another_port_of_an_allowed_host_is_refused(upstream: Upstream, port: int) -> None:
    upstream.answers = [b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:6379/\r\nContent-Length: 0\r\n\r\n"]
    assert (await ask(port, "/a")).status == 502
    assert len(upstream.requests) == 1


async def test_only_listed_headers_come_back(upstream: Upstream, port: int) -> None:
    upstream.answers = [
        ok(
            TEN,
            "X-Accel-Redirect: /secret",
            "X-Sendfile: /etc/passwd",
            "X-Reproxy-URL: http://x/",
            "Set-Cookie: a=b",
            "Keep-Alive: timeout=5",
            "Trailer: x",
            "X-Frame-Options: DENY",
            "Content-Type: image/png",
            "Content-Language: de",
            "Cache-Control: max-age=5",
            "Vary: Accept",
            'Content-Disposition: attachment; filename="evil.exe"',
        )
    ]
    answer = await ask(port, "/a.txt")
    assert set(answer.headers) == {
        *["date", "server", "connection", "content-length", "accept-ranges", "x-content-type-options"],
        *["content-type", "content-language", "cache-control", "vary", "content-disposition"],
    }
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == 'attachment; filename="a.txt"'


STATUSES = [
    *[
        (404, 404),
        (410, 404),
        (400, 502),
        (401, 502),
        (403, 502),
        (500, 502),
        (503, 503),
        (429, 429),
        (204, 502),
        (206, 502),
    ],
    *[(304, 502), (412, 502), (416, 502), (301, 502)],
]


@pytest.mark.parametrize("status, expected", STATUSES)
async def test_statuses_of_an_upstream(upstream: Upstream, port: int, status: int, expected: int) -> None:
    upstream.answers = [b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status]
    answer = await ask(port, "/a")
    assert answer.status == expected
    assert answer.body in (b"Not Found", b"Bad Gateway", b"Service Unavailable", b"Too Many Requests")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 1000 X\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"",
        OK + b"Content-Length: x\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        OK + b"X: " + b"y" * 300_000 + b"\r\n\r\n",
        OK + b"".join(b"X-%d: y\r\n" % n for n in range(20_000)) + b"\r\n",
    ],
    ids=["status", "nonsense", "nothing", "length", "negative", "two-lengths", "long-header", "many-headers"],
)
async def test_an_upstream_that_does_not_speak_http_is_a_502(upstream: Upstream, port: int, answer: bytes) -> None:
    upstream.answers = [answer]
    assert (await ask(port, "/a")).status == 502


@pytest.mark.parametrize(
    "content_range, body",
    [
        ("bytes 0-2/10", b"012"),
        ("bytes 2-4/4", b"234"),
        ("bytes 3-5/10", b"345"),
        ("bytes 1-3/10", b"123"),
        ("bytes 2-4/10", b"23"),
        ("bytes 4-2/10", b"234"),
        ("items 2-4/10", b"234"),
        ("bytes 2-4", b"234"),
        ("", b"234"),
        ("bytes +2-4/10", b"234"),
        ("bytes 2-4/" + "9" * 30, b"234"),
    ],
)
async def test_a_wrong_content_range_is_a_502(upstream: Upstream, port: int, content_range: str, body: bytes) -> None:
    upstream.answers = [partial(content_range, body)]
    assert (await ask(port, "/a", headers={"Range": "bytes=2-4"})).status == 502


async def test_a_range_of_an_upstream_without_ranges_is_cut_out_of_the_whole(upstream: Upstream, port: int) -> None:
    whole = bytes(range(256)) * 8192
    upstream.answers = [ok(whole)]
    answer = await ask(port, "/a", headers={"Range": "bytes=1000000-1000009"})
    assert (answer.status, answer.body) == (206, whole[1000000:1000010])
    assert len(upstream.requests) == 1
    parts = await ask(port, "/a", headers={"Range": "bytes=5-6,2000000-2000001,-1"})
    assert parts.status == 206
    assert parts.complete
    for piece in (whole[5:7], whole[2000000:2000002], whole[-1:]):
        assert b"\r\n\r\n" + piece + b"\r\n--" in parts.body


async def test_an_upstream_that_does_not_know_the_whole_size_gives_the_whole(upstream: Upstream, port: int) -> None:
    upstream.answers = [partial("bytes 2-4/*", b"234"), ok()]
    answer = await ask(port, "/a", headers={"Range": "bytes=2-4"})
    assert (answer.status, answer.body) == (200, TEN)


async def test_a_416_of_the_upstream_is_ours(upstream: Upstream, port: int) -> None:
    upstream.answers = [b"HTTP/1.1 416 X\r\nContent-Range: bytes */10\r\nContent-Length: 3\r\n\r\nno!"]
    answer = await ask(port, "/a", headers={"Range": "bytes=20-"})
    assert (answer.status, answer.headers["content-range"], answer.body) == (416, "bytes */10", b"")


async def test_a_416_that_does_not_tell_the_size_is_ours_too(upstream: Upstream, port: int) -> None:
    """Those of Apache and lighttpd do not, if they send by X-Sendfile."""
    upstream.answers = [b"HTTP/1.1 416 X\r\nContent-Length: 3\r\n\r\nno!", ok()]
    answer = await ask(port, "/a", headers={"Range": "bytes=20-"})
    assert (answer.status, answer.headers["content-range"], answer.body) == (416, "bytes */10", b"")
    assert [upstream.header("range", number) for number in (0, 1)] == ["bytes=20-", None]


async def test_a_head_that_the_upstream_does_not_know_becomes_a_get(upstream: Upstream, port: int) -> None:
    upstream.answers = [b"HTTP/1.1 405 X\r\nContent-Length: 0\r\n\r\n", ok()]
    answer = await ask(port, "/a", method="HEAD")
    assert (answer.status, answer.headers["content-length"]) == (200, "10")


async def test_parts_of_two_versions_are_never_mixed(upstream: Upstream, port: int) -> None:
    whole = b"a" * 1_000_000
    versions = itertools.count()
    upstream.answers = [lambda _: ok(whole, f'ETag: "{next(versions)}"')]
    answer = await ask(port, "/a", headers={"Range": "bytes=0-1,900000-900001"})
    assert not answer.complete


async def test_less_than_promised_aborts_the_client(upstream: Upstream, port: int) -> None:
    upstream.answers = [OK + b"Content-Length: 10\r\n\r\n01234"]
    upstream.hold_after = asyncio.Event()
    upstream.hold_after.set()
    answer = await ask(port, "/a")
    assert (answer.status, answer.body, answer.complete) == (200, b"01234", False)


async def test_more_than_promised_is_cut_at_the_promise(upstream: Upstream, port: int) -> None:
    upstream.answers = [OK + b"Content-Length: 10\r\n\r\n" + TEN + b"EXTRA"]
    answer = await ask(port, "/a")
    assert (answer.body, answer.complete) == (TEN, True)


async def test_a_broken_chunked_body_aborts_the_client(upstream: Upstream, port: int) -> None:
    upstream.answers = [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n01234\r\nzz"]
    answer = await ask(port, "/a")
    assert answer.body == b"01234"
    assert not answer.complete


async def test_unknown_size_is_streamed_without_ranges(upstream: Upstream, port: int) -> None:
    upstream.answers = [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n"]
    answer = await ask(port, "/a", headers={"Range": "bytes=0-1"})
    assert (answer.status, answer.body, answer.complete) == (200, TEN, True)
    assert not {"content-length", "accept-ranges", "content-range"} & answer.headers.keys()


async def test_compressed_bytes_are_passed_on_as_they_are(upstream: Upstream, port: int) -> None:
    bomb = b"\x1f\x8b" + b"\0" * 1000
    upstream.answers = [ok(bomb, "Content-Encoding: gzip")]
    answer = await ask(port, "/a")
    assert (answer.body, answer.headers["content-encoding"]) == (bomb, "gzip")


async def test_an_upstream_that_does_not_answer_is_a_504(upstream: Upstream, port: int) -> None:
    upstream.answers = [b"HTTP/1.1 200 OK\r\nContent-"]
    upstream.hold_after = asyncio.Event()
    assert (await ask(port, "/a")).status == 504
    await upstream.closed.wait()


async def test_an_upstream_that_stalls_in_the_body_aborts_the_client(upstream: Upstream, port: int) -> None:
    upstream.answers = [OK + b"Content-Length: 10\r\n\r\n01234"]
    upstream.hold_after = asyncio.Event()
    answer = await ask(port, "/a")
    assert (answer.status, answer.body, answer.complete) == (200, b"01234", False)
    await upstream.closed.wait()


async def test_an_upstream_that_refuses_connections_is_a_502() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        free = unused.getsockname()[1]
    source = RemoteSource(f"http://127.0.0.1:{free}/", allow_hosts=["127.0.0.1"])
    async with live(Starlette(routes=[Route("/{path:path}", Download(source))])) as other:
        assert (await ask(other, "/a")).status == 502
    await source.aclose()


@pytest.mark.parametrize("protocol", ["httptools", DownloadProtocol], ids=["uvicorn", "ours"])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("body", [b"", b"hello"], ids=["no-body", "body"])
async def test_a_client_that_leaves_closes_the_upstream_at_once(
    upstream: Upstream, protocol: Any, before: int, body: bytes
) -> None:
    """Long before the read timeout, which is half a minute here. before: requests on the same connection."""
    source = RemoteSource(f"http://127.0.0.1:{upstream.port}/", allow_hosts=["127.0.0.1"], read_timeout=30)
    async with live(Starlette(routes=[Route("/{path:path}", Download(source))]), http=protocol) as port:
        for answer in (
            b"",
            OK + b"Content-Length: 1000000\r\n\r\n" + b"x" * 100_000,
        ):  # before the first byte, and amid
            upstream.answers = [ok()]
            upstream.hold_after = None
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            # with a reset: our protocol answers a client that has only closed its side
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for _ in range(before):
                writer.write(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
                await reader.readuntil(TEN)
            upstream.answers = [answer]
            upstream.hold_after = asyncio.Event()
            count = len(upstream.requests)
            length = b"Content-Length: %d\r\n" % len(body) if body else b""
            writer.write(b"GET /a HTTP/1.1\r\nHost: x\r\n%s\r\n%s" % (length, body))
            while len(upstream.requests) == count:
                await asyncio.sleep(0.001)
            if answer:
                await reader.readexactly(1000)
            writer.close()
            await asyncio.wait_for(upstream.closed.wait(), 15)
            assert upstream.open == 0
    await source.aclose()


@pytest.mark.slow
async def test_a_request_cancelled_at_any_moment_leaves_no_connection_open(upstream: Upstream) -> None:
    upstream.answers = [OK + b"Connection: close\r\nContent-Length: 10\r\n\r\n" + TEN]
    source = RemoteSource(f"http://127.0.0.1:{upstream.port}/", allow_hosts=["127.0.0.1"])
    async with contextlib.aclosing(source):

        async def read() -> bytes:
            file = await source.resolve("a")
            async with file.open(GET) as opened:
                return b"".join([chunk async for chunk in opened.stream(None)])

        for steps in range(1000):
            async with anyio.create_task_group() as reading:
                reading.start_soon(read)
                for _ in range(steps):
                    await asyncio.sleep(0)
                reading.cancel_scope.cancel()
        assert await read() == TEN  # and by now the upstream has taken all the connections before
        while upstream.open:
            upstream.closed.clear()
            await asyncio.wait_for(upstream.closed.wait(), 5)


async def test_redirects_are_followed_within_the_allowed_hosts(upstream: Upstream, port: int) -> None:
    upstream.answers = [b"HTTP/1.1 302 X\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", ok()]
    answer = await ask(port, "/a.txt", headers={"Range": "bytes=2-4"})
    assert (answer.status, answer.body) == (206, b"234")
    assert upstream.requests[1].startswith(b"GET /elsewhere HTTP")
    assert upstream.header("range", 1) == "bytes=2-4"


async def test_the_answer_to_a_failing_upstream_gives_nothing_away(upstream: Upstream, port: int) -> None:
    upstream.answers = [b"HTTP/1.1 500 X\r\nContent-Length: 6\r\n\r\nsecret"]
    answer: Answer = await ask(port, "/a")
    assert answer.body == b"Bad Gateway"
    assert "127.0.0.1" not in str(answer.headers)
