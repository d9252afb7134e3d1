"""Upstreams as they are: kept connections, refusals of what could have been ignored, load that is passed on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.routing import Route

from downloadview_async import Cache, CachedSource, Download, OffloadMiddleware, RemoteSource, Rule, XAccelRedirect
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from tests.live import ask, listening, live
from tests.sources.test_remote import OK, TEN, Upstream, ok, partial, port, upstream

__all__ = ["port", "upstream"]  # fixtures
pytestmark = pytest.mark.asyncio

WHOLE = bytes(range(256)) * 4096
TAG = 'ETag: "x"'
REFUSALS = [400, 401, 403, 405, 406, 412, 415, 416, 417, 500, 501]


def status(code: int, *headers: str, body: bytes = b"no") -> bytes:
    lines = "".join(f"{line}\r\n" for line in headers)
    return f"HTTP/1.1 {code} X\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def is_head(request: bytes) -> bool:
    return request.startswith(b"HEAD ")


def answering(answer: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Leave the body of an answer to a HEAD out."""

    def answered(request: bytes) -> bytes:
        said = answer(request)
        return said.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if is_head(request) else said

    return answered


# Connections


@pytest.mark.parametrize(
    "answer",
    [
        ok(TEN, TAG),
        ok(WHOLE, TAG),
        ok(b""),
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n0\r\n\r\n",
        status(404, body=b"x" * 5000),
        status(500),
    ],
    ids=["short", "long", "empty", "chunked", "missing", "failing"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_connection_is_used_again(upstream: Upstream, port: int, answer: bytes, method: str) -> None:
    upstream.answers = [answering(lambda _: answer)]
    for _ in range(15):
        await ask(port, "/a", method=method)
    assert upstream.connections == 1


async def test_a_connection_is_used_again_after_parts_conditions_and_redirects(upstream: Upstream, port: int) -> None:
    upstream.answers = [partial("bytes 2-4/10", b"234", TAG)]
    assert (await ask(port, "/a", headers={"Range": "bytes=2-4"})).body == b"234"
    upstream.answers = [b'HTTP/1.1 304 X\r\nETag: "x"\r\nContent-Length: 1000000\r\n\r\n']
    assert (await ask(port, "/a", headers={"If-None-Match": '"x"'})).status == 304
    upstream.answers = [status(302, "Location: /b", body=b"there"), ok()]
    assert (await ask(port, "/a")).body == TEN
    upstream.answers = [status(416, "Content-Range: bytes */10")]
    assert (await ask(port, "/a", headers={"Range": "bytes=20-"})).status == 416
    assert (len(upstream.requests), upstream.connections) == (5, 1)


async def test_a_client_that_leaves_costs_the_connection(upstream: Upstream, port: int) -> None:
    upstream.answers = [OK + b"Content-Length: 100000000\r\n\r\n" + b"x" * 100_000]
    upstream.hold_after = asyncio.Event()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readexactly(1000)
    writer.close()
    await asyncio.wait_for(upstream.closed.wait(), 15)
    upstream.hold_after = None
    upstream.answers = [ok()]
    assert (await ask(port, "/a")).body == TEN
    assert upstream.connections == 2


async def test_a_request_on_a_kept_connection_may_be_cancelled_at_any_moment(upstream: Upstream) -> None:
    upstream.answers = [ok(TEN, TAG)]
    source = RemoteSource(f"http://127.0.0.1:{upstream.port}/", allow_hosts=["127.0.0.1"], max_connections=1)

    async def read() -> bytes:
        async with (await source.resolve("a")).open(GET) as opened:
            return b"".join([chunk async for chunk in opened.stream(None)])

    for steps in range(300):
        assert await read() == TEN  # a connection is kept, and the only slot is free
        async with anyio.create_task_group() as reading:
            reading.start_soon(read)
            for _ in range(steps):
                await asyncio.sleep(0)
            reading.cancel_scope.cancel()
    assert await read() == TEN
    await source.aclose()
    while upstream.open:
        upstream.closed.clear()
        await asyncio.wait_for(upstream.closed.wait(), 5)


@pytest.mark.parametrize("extra", [b"EXTRA", ok(b"forged")], ids=["bytes", "an-answer"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_more_than_an_answer_is_never_the_next_one(
    upstream: Upstream, port: int, extra: bytes, method: str
) -> None:
    """A HEAD that is answered with a body is the same."""
    upstream.answers = [OK + b"Content-Length: 10\r\n\r\n" + TEN + extra, ok(b"true")]
    await ask(port, "/a", method=method)
    assert (await ask(port, "/b")).body == b"true"
    assert upstream.connections == 2


class Closing:
    """An upstream that closes a kept connection when a further request has come, having sent `sends` of an answer."""

    def __init__(self) -> None:
        self.sends = b""
        self.requests = 0
        self.connections = 0
        self.always = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        is_first = True
        while request := await reader.readuntil(b"\r\n\r\n"):
            self.requests += 1
            if self.always or not is_first:
                writer.write(self.sends)
                return
            is_first = False
            writer.write(answering(lambda _: ok(TEN, TAG))(request))


@pytest_asyncio.fixture
async def closing() -> AsyncIterator[tuple[Closing, int]]:
    upstream = Closing()
    async with listening(upstream.serve) as served:
        source = RemoteSource(f"http://127.0.0.1:{served}/", allow_hosts=["127.0.0.1"], read_timeout=5)
        async with live(Starlette(routes=[Route("/{path:path}", Download(source))])) as port:
            yield upstream, port
        await source.aclose()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_request_on_a_kept_connection_that_was_closed_is_sent_once_more(
    closing: tuple[Closing, int], method: str
) -> None:
    upstream, port = closing
    for _ in range(3):
        assert (await ask(port, "/a", method=method)).status == 200
    assert (upstream.requests, upstream.connections) == (5, 3)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("body", [b"", b"slow", b"x" * 100_000])
@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=2-4"}], ids=["whole", "part"])
async def test_a_408_on_a_kept_connection_is_sent_once_more(
    closing: tuple[Closing, int], method: str, body: bytes, headers: dict[str, str]
) -> None:
    """The upstream tired of waiting, and closed the connection, when the request was on its way."""
    upstream, port = closing
    upstream.sends = answering(lambda _: status(408, "Connection: close", body=body))(method.encode() + b" ")
    for _ in range(3):
        answer = await ask(port, "/a", method=method, headers=headers)
        assert (answer.status, answer.complete) == (206 if headers and method == "GET" else 200, True)
    assert (upstream.requests, upstream.connections) == (5, 3)
    upstream.requests, upstream.connections, upstream.always = 0, 0, True
    assert (await ask(port, "/a")).status == 502
    assert (upstream.requests, upstream.connections) == (2, 1)


async def test_the_retry_is_by_a_new_connection_and_the_only_one(closing: tuple[Closing, int]) -> None:
    upstream, port = closing
    await asyncio.gather(*[ask(port, "/a") for _ in range(5)])
    upstream.requests, upstream.connections, upstream.always = 0, 0, True
    assert (await ask(port, "/a")).status == 502
    assert (upstream.requests, upstream.connections) == (2, 1)


@pytest.mark.parametrize("sends", [b"H", b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_nothing_is_sent_again_once_the_answer_has_begun(closing: tuple[Closing, int], sends: bytes) -> None:
    upstream, port = closing
    upstream.sends = sends
    assert (await ask(port, "/a")).status == 200
    assert (await ask(port, "/a")).status == 502
    assert upstream.requests == 2


async def test_a_new_connection_that_is_closed_is_not_tried_again(closing: tuple[Closing, int]) -> None:
    upstream, port = closing
    upstream.always = True
    assert (await ask(port, "/a")).status == 502
    assert upstream.requests == 1


# Refusals


@pytest.mark.parametrize("code", [*REFUSALS, 204, 404, 502, 503])
async def test_a_head_that_is_refused_is_answered(upstream: Upstream, port: int, code: int) -> None:
    upstream.answers = [answering(lambda request: status(code) if is_head(request) else ok(TEN, TAG))]
    answer = await ask(port, "/a", method="HEAD")
    assert (answer.status, answer.headers["content-length"], answer.headers["etag"]) == (200, "10", '"x"')
    assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    "code, expected, heads", [(404, 404, 2), (410, 404, 1), (429, 429, 1), (502, 502, 2), (503, 503, 2), (504, 502, 1)]
)
async def test_an_answer_about_the_file_or_the_load_is_not_a_refusal(
    upstream: Upstream, port: int, code: int, expected: int, heads: int
) -> None:
    """Some servers answer every HEAD so: what they say to a GET counts, and only what they say to a HEAD is doubted."""
    upstream.answers = [answering(lambda _: status(code, "Retry-After: 17"))]
    for method, fields, requests in (("HEAD", {}, heads), ("GET", {"Range": "bytes=0-1"}, 1), ("GET", {}, 1)):
        upstream.requests.clear()
        answer = await ask(port, "/a", method=method, headers=fields)
        assert (answer.status, len(upstream.requests)) == (expected, requests)
        assert answer.headers.get("retry-after") == ("17" if code in (429, 503) else None)


async def test_a_get_that_is_answered_with_nothing_is_a_502(upstream: Upstream, port: int) -> None:
    upstream.answers = [b"HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n"]
    for method in ("HEAD", "GET"):
        assert (await ask(port, "/a", method=method)).status == 502
    assert [request.split(b" ")[0] for request in upstream.requests] == [b"HEAD", b"GET", b"GET"]


async def test_what_is_refused_in_any_form_stays_refused(upstream: Upstream, port: int) -> None:
    upstream.answers = [answering(lambda _: status(403))]
    for method, fields, requests in (("HEAD", {}, 2), ("GET", {"Range": "bytes=0-1"}, 2), ("GET", {}, 1)):
        upstream.requests.clear()
        assert (await ask(port, "/a", method=method, headers=fields)).status == 502
        assert len(upstream.requests) == requests


@pytest.mark.parametrize("headers", [(TAG,), ()], ids=["tag", "no-validator"])
@pytest.mark.parametrize("sent", ["bytes 0-1048575/1048576", "bytes 500-2000/1048576", "bytes 1000-1010/1048576"])
async def test_a_206_with_more_than_was_asked_is_cut(
    upstream: Upstream, port: int, sent: str, headers: tuple[str, ...]
) -> None:
    first, last = (int(number) for number in sent.removeprefix("bytes ").partition("/")[0].split("-"))
    upstream.answers = [partial(sent, WHOLE[first : last + 1], *headers)]
    answer = await ask(port, "/a", headers={"Range": "bytes=1000-1009"})
    assert (answer.status, answer.body, answer.complete) == (206, WHOLE[1000:1010], True)
    assert answer.headers["content-range"] == f"bytes 1000-1009/{len(WHOLE)}"
    assert len(upstream.requests) == 1


async def test_a_203_counts_as_a_200(upstream: Upstream, port: int) -> None:
    """A proxy has changed what the origin sent, or its fields [RFC 9110 15.3.4]."""
    upstream.answers = [answering(lambda _: status(203, TAG, body=TEN))]
    for method, body in (("GET", TEN), ("HEAD", b"")):
        answer = await ask(port, "/a", method=method)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, body, "10")
    part = await ask(port, "/a", headers={"Range": "bytes=2-4"})
    assert (part.status, part.body, len(upstream.requests)) == (206, b"234", 3)


async def test_a_head_that_counts_no_bytes_is_not_believed(upstream: Upstream, port: int) -> None:
    """Many frameworks say so of every HEAD."""
    upstream.answers = [answering(lambda request: ok(b"" if is_head(request) else TEN))]
    assert (await ask(port, "/a", method="HEAD")).headers["content-length"] == "10"
    upstream.answers = [answering(lambda request: ok(b""))]
    assert (await ask(port, "/a", method="HEAD")).headers["content-length"] == "0"


async def test_a_head_without_a_length(upstream: Upstream, port: int) -> None:
    upstream.answers = [answering(lambda _: OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")]
    answer = await ask(port, "/a", method="HEAD")
    assert (answer.status, "content-length" in answer.headers, len(upstream.requests)) == (200, False, 1)


FIELDS: list[tuple[dict[str, str], tuple[int, bytes]]] = [
    ({"Range": "bytes=2-4"}, (206, b"234")),
    ({"Range": "bytes=-3"}, (206, b"789")),
    ({"Range": "bytes=8-"}, (206, b"89")),
    ({"Range": "bytes=20-"}, (416, b"")),
    ({"Range": "bytes=2-4", "If-Range": '"x"'}, (206, b"234")),
    ({"Range": "bytes=2-4", "If-Range": '"y"'}, (200, TEN)),
    ({"If-None-Match": '"x"'}, (304, b"")),
    ({"If-None-Match": '"y"'}, (200, TEN)),
    ({"If-Modified-Since": "Tue, 14 Nov 2023 22:13:20 GMT"}, (304, b"")),
    ({"If-Match": '"x"'}, (200, TEN)),
    ({"If-Match": '"y"'}, (412, b"")),
]


@pytest.mark.parametrize(
    "code, fields, expected",
    # 412 is an answer to If-Match
    [(code, *case) for code in REFUSALS for case in FIELDS if not (code == 412 and "If-Match" in case[0])],
)
async def test_fields_that_are_refused_are_heeded_here(
    upstream: Upstream, port: int, code: int, fields: dict[str, str], expected: tuple[int, bytes]
) -> None:
    def answer(request: bytes) -> bytes:
        optional = [name for name in (b"range:", b"if-", b"accept-encoding:") if name in request.lower()]
        is_refused = (optional == [b"accept-encoding:"] and code == 406) or len(optional) > 1
        return status(code) if is_refused else ok(TEN, TAG, "Last-Modified: Tue, 14 Nov 2023 22:13:20 GMT")

    upstream.answers = [answer]
    said = await ask(port, "/a", headers=fields)
    assert (said.status, said.body) == expected
    assert len(upstream.requests) == 2


async def test_an_upstream_that_takes_no_accept_encoding(upstream: Upstream, port: int) -> None:
    upstream.answers = [lambda request: status(406) if b"accept-encoding" in request.lower() else ok()]
    assert (await ask(port, "/a")).body == TEN
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("told", ["", "Content-Range: bytes */*", "Content-Range: nonsense"])
async def test_a_416_that_does_not_tell_the_size_is_asked_again(upstream: Upstream, port: int, told: str) -> None:
    upstream.answers = [lambda request: status(416, told or "X: y") if b"range:" in request.lower() else ok()]
    answer = await ask(port, "/a", headers={"Range": "bytes=2-4"})
    assert (answer.status, answer.body) == (206, b"234")


ERROR_PAGE = [
    "Content-Type: text/html",
    "Cache-Control: public, max-age=900",
    "Content-Encoding: gzip",
    "Content-Language: de",
    "Expires: Tue, 14 Nov 2033 22:13:20 GMT",
    "Vary: Accept-Language",
]


async def test_the_error_page_of_a_416_does_not_describe_the_file(upstream: Upstream, port: int) -> None:
    upstream.answers = [status(416, *ERROR_PAGE, "Content-Range: bytes */10", TAG)]
    answer = await ask(port, "/a.txt", headers={"Range": "bytes=20-"})
    assert (answer.status, answer.headers["content-range"], answer.headers["etag"]) == (416, "bytes */10", '"x"')
    assert answer.headers["cache-control"] == "private, no-store"
    assert {"content-type", "content-encoding", "content-language", "expires", "vary"}.isdisjoint(answer.headers)
    source = RemoteSource(f"http://127.0.0.1:{upstream.port}/", allow_hosts=["127.0.0.1"])
    async with (await source.resolve("a.txt")).open(DownloadRequest(range="bytes=20-")) as opened:
        assert replace(opened.metadata, max_reads=None) == FileMetadata(size=10, etag=ETag("x"))
        assert not opened.hides_coding
    await source.aclose()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_error_page_of_a_412_does_not_describe_the_file(upstream: Upstream, port: int, method: str) -> None:
    upstream.answers = [answering(lambda _: status(412, *ERROR_PAGE))]
    answer = await ask(port, "/a.txt", method=method, headers={"If-Match": '"y"'})
    assert (answer.status, answer.headers["cache-control"]) == (412, "private, no-store")
    assert {"content-encoding", "content-language", "expires", "vary"}.isdisjoint(answer.headers)


@pytest.mark.parametrize(
    "size, fields, expected",
    [
        (10, {"Range": "bytes=2-4"}, (206, b"234")),
        (0, {"Range": "bytes=0-"}, (200, b"")),
        (10, {"Range": "bytes=20-", "If-Range": '"x"'}, (416, b"")),
        (10, {"Range": "bytes=20-", "If-Range": '"y"'}, (200, TEN)),
    ],
    ids=["satisfiable", "empty", "same", "other"],
)
async def test_a_416_that_is_not_ours_is_asked_again(
    upstream: Upstream, port: int, size: int, fields: dict[str, str], expected: tuple[int, bytes]
) -> None:
    def answer(request: bytes) -> bytes:
        if b"range:" in request.lower():
            return status(416, *ERROR_PAGE, f"Content-Range: bytes */{size}")
        return ok(TEN[:size], TAG, "Content-Type: image/png")

    upstream.answers = [answer]
    said = await ask(port, "/a.txt", headers=fields)
    assert (said.status, said.body) == expected
    assert said.headers.get("content-type") == (None if said.status == 416 else "image/png")
    assert len(upstream.requests) == 2


async def test_a_part_that_is_redirected(upstream: Upstream, port: int) -> None:
    upstream.answers = [
        lambda request: (
            status(302, "Location: /there")
            if b"/pub/a " in request
            else (status(400) if b"range:" in request.lower() else ok())
        )
    ]
    answer = await ask(port, "/a", headers={"Range": "bytes=2-4"})
    assert (answer.status, answer.body) == (206, b"234")


async def test_a_206_that_nobody_has_asked_for(upstream: Upstream, port: int) -> None:
    upstream.answers = [partial("bytes 0-9/10", TEN)]
    answer = await ask(port, "/a")
    assert (answer.status, answer.body) == (200, TEN)
    upstream.answers = [partial("bytes 0-4/10", TEN[:5])]
    assert (await ask(port, "/a")).status == 502


MULTIPART = (
    b"--xyz\r\nContent-Type: image/png\r\nContent-Range: bytes 2-4/10\r\n\r\n234\r\n--xyz--\r\n",
    "Content-Type: multipart/byteranges; boundary=xyz",
)


@pytest.mark.parametrize(
    "answer",
    [
        status(206, body=b"234"),
        status(206, MULTIPART[1], body=MULTIPART[0]),
        status(206, MULTIPART[1].upper(), "Content-Range: bytes 2-4/10", body=MULTIPART[0]),
        partial("bytes 2-3/10", b"23"),
        partial("bytes 2-2/10", b"2", 'ETag: W/"x"'),
    ],
    ids=["no-range", "multipart", "multipart-with-range", "shorter", "shorter-weak"],
)
async def test_a_206_that_cannot_be_used_is_asked_again(upstream: Upstream, port: int, answer: bytes) -> None:
    upstream.answers = [lambda request: answer if b"range:" in request.lower() else ok()]
    said = await ask(port, "/a", headers={"Range": "bytes=2-4"})
    assert (said.status, said.body, said.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    assert [upstream.header("range", number) for number in range(len(upstream.requests))] == ["bytes=2-4", None]


class Sparing:
    """An upstream that sends less than what is asked, at most `length` bytes in an answer."""

    def __init__(self, content: bytes, length: int, *fields: str) -> None:
        self.content = content
        self.length = length
        self.fields = fields

    def __call__(self, request: bytes) -> bytes:
        lines = dict(line.split(": ", 1) for line in request.decode().lower().split("\r\n")[1:-2])
        if "range" not in lines:
            return ok(self.content, *self.fields)
        first, last = lines["range"].removeprefix("bytes=").split("-")
        size = len(self.content)
        start = int(first) if first else size - int(last)
        stop = min(int(last) + 1 if first and last else size, start + self.length)
        return partial(f"bytes {start}-{stop - 1}/{size}", self.content[start:stop], *self.fields)


@pytest.mark.parametrize(
    "value, start, stop", [("bytes=1000-9999", 1000, 10_000), ("bytes=-9000", -9000, None), ("bytes=0-8999", 0, 9000)]
)
@pytest.mark.parametrize("length, requests", [(9000, 1), (8999, 2), (4500, 2), (3000, 3), (1, 6)])
async def test_a_206_with_less_than_asked_is_continued(
    upstream: Upstream, port: int, value: str, start: int, stop: int | None, length: int, requests: int
) -> None:
    """ "A server might want to send only a subset of the data requested" [RFC 9110 15.3.7]."""
    upstream.answers = [Sparing(WHOLE, length, TAG)]
    answer = await ask(port, "/a", headers={"Range": value})
    assert (answer.status, answer.body, answer.complete) == (206, WHOLE[start:stop], True)
    assert len(upstream.requests) == requests


async def test_a_206_with_less_than_asked_is_not_continued_by_another_version(upstream: Upstream, port: int) -> None:
    upstream.answers = [Sparing(WHOLE, 2000, TAG), Sparing(WHOLE[::-1], 2000, 'ETag: "y"')]
    answer = await ask(port, "/a", headers={"Range": "bytes=1000-9999"})
    assert (answer.body, answer.complete) == (WHOLE[1000:3000], False)


async def test_what_is_asked_plainly_in_the_end_has_the_same_size(upstream: Upstream, port: int) -> None:
    sparing = Sparing(WHOLE, 1, TAG)
    upstream.answers = [lambda request: sparing(request) if b"range:" in request.lower() else ok(WHOLE + b"x", TAG)]
    answer = await ask(port, "/a", headers={"Range": "bytes=1000-9999"})
    assert (answer.body, answer.complete) == (WHOLE[1000:1005], False)


async def test_several_parts_with_less_than_asked_are_continued(upstream: Upstream, port: int) -> None:
    upstream.answers = [Sparing(WHOLE, 700, TAG)]
    answer = await ask(port, "/a", headers={"Range": "bytes=500000-500999,1000-1999"})
    assert (answer.status, answer.complete) == (206, True)
    for part in (WHOLE[500_000:501_000], WHOLE[1000:2000]):
        assert b"\r\n\r\n" + part + b"\r\n--" in answer.body


async def test_a_next_part_that_breaks_off_is_not_continued(upstream: Upstream, port: int) -> None:
    cut = partial("bytes 3000-9999/10000", b"x" * 7000, TAG, "Connection: close")[:-10]
    upstream.answers = [Sparing(WHOLE[:10_000], 2000, TAG), cut]
    answer = await ask(port, "/a", headers={"Range": "bytes=1000-9999"})
    assert not answer.complete
    assert len(upstream.requests) == 2


async def test_a_part_is_cut_out_of_a_large_file_whose_upstream_refuses_ranges(upstream: Upstream, port: int) -> None:
    upstream.answers = [lambda request: status(501) if b"range:" in request.lower() else ok(WHOLE, TAG)]
    answer = await ask(port, "/a", headers={"Range": "bytes=1000000-1000009"})
    assert (answer.status, answer.body) == (206, WHOLE[1_000_000:1_000_010])
    assert len(upstream.requests) == 2


async def test_a_proxy_is_told_of_a_file_whose_head_is_refused(upstream: Upstream) -> None:
    """A URL that is signed for GET."""
    upstream.answers = [answering(lambda request: status(403) if is_head(request) else ok(TEN, TAG))]
    url = f"http://127.0.0.1:{upstream.port}/"
    source = RemoteSource(url, allow_hosts=["127.0.0.1"])
    app = OffloadMiddleware(
        Starlette(routes=[Route("/{path:path}", Download(source))]),
        backend=XAccelRedirect([Rule(url, "/_up/")]),
    )
    async with live(app) as port:
        answer = await ask(port, "/a")
        assert (answer.status, answer.headers["x-accel-redirect"][:5], answer.headers["etag"]) == (200, "/_up/", '"x"')
    await source.aclose()


# Load


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize(
    "told, expected",
    [
        ("7", "7"),
        ("Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:13:20 GMT"),
        (None, "5"),
        ("soon", "5"),
        ("-1", "5"),
        ("7\r\nRetry-After: 8", "5"),
        ("9" * 40, "5"),
    ],
)
async def test_an_upstream_that_is_busy_is_passed_on(
    upstream: Upstream, port: int, code: int, told: str | None, expected: str
) -> None:
    upstream.answers = [status(code, *([] if told is None else [f"Retry-After: {told}"]))]
    answer = await ask(port, "/a")
    assert (answer.status, answer.headers["retry-after"]) == (code, expected)
    assert answer.headers["cache-control"] == "private, no-store"


# Content-Encoding


@pytest.mark.parametrize(
    "told, expected",
    [
        ("aws-chunked", None),
        ("AWS-Chunked", None),
        ("aws-chunked,gzip", "gzip"),
        ("GZIP, aws-chunked", "gzip"),
        ("gzip\r\nContent-Encoding: aws-chunked", "gzip"),
        ("identity", None),
        ("", None),
        (",", None),
        ("utf-8", None),
        ("none", None),
        ("gzip", "gzip"),
        ("br, gzip", "br, gzip"),
        ("x-own", "x-own"),
    ],
)
async def test_only_codings_that_a_client_can_decode_are_passed_on(
    upstream: Upstream, port: int, told: str, expected: str | None
) -> None:
    upstream.answers = [answering(lambda _: ok(TEN, f"Content-Encoding: {told}"))]
    for method in ("GET", "HEAD"):
        assert (await ask(port, "/a", method=method)).headers.get("content-encoding") == expected


# Validators


@pytest.mark.parametrize(
    "modified, date, is_told",
    [
        ("Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:13:20 GMT", False),
        ("Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:13:21 GMT", True),
        ("Tue, 14 Nov 2023 22:13:22 GMT", "Tue, 14 Nov 2023 22:13:21 GMT", False),
        ("Thu, 01 Jan 1970 00:00:00 GMT", "Tue, 14 Nov 2023 22:13:21 GMT", False),
        ("Thu, 01 Jan 1970 00:00:01 GMT", "Tue, 14 Nov 2023 22:13:21 GMT", False),
        ("Tue, 01 Jan 1980 00:00:00 GMT", "Tue, 14 Nov 2023 22:13:21 GMT", False),
        ("Sat, 26 Oct 1985 08:15:00 GMT", "Tue, 14 Nov 2023 22:13:21 GMT", False),
        ("Tue, 14 Nov 2023 22:13:20 GMT", None, True),
    ],
)
async def test_a_time_that_two_versions_may_share_is_not_a_validator(
    upstream: Upstream, port: int, modified: str, date: str | None, is_told: bool
) -> None:
    fields = [f"Last-Modified: {modified}", *([] if date is None else [f"Date: {date}"])]
    upstream.answers = [ok(TEN, *fields)]
    assert ("last-modified" in (await ask(port, "/a")).headers) == is_told
    answer = await ask(port, "/a", headers={"Range": "bytes=2-4", "If-Range": modified})
    assert answer.status == (206 if is_told else 200)


MEANINGLESS = [f"{day} GMT" for day in ("Thu, 01 Jan 1970 00:00:00", "Tue, 01 Jan 1980 00:00:00")]


@pytest.mark.parametrize("modified", [*MEANINGLESS, "Sat, 26 Oct 1985 08:15:00 GMT"])
@pytest.mark.parametrize("since", ["Tue, 14 Nov 2023 22:13:20 GMT", None], ids=["later", "same"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_304_by_a_time_that_says_nothing_proves_nothing(
    upstream: Upstream, port: int, modified: str, since: str | None, method: str
) -> None:
    """Each version of the file has the same Last-Modified, so the upstream says 304 of all of them."""

    def answer(request: bytes) -> bytes:
        if b"if-modified-since" in request.lower():
            return f"HTTP/1.1 304 X\r\nLast-Modified: {modified}\r\n\r\n".encode()
        return ok(TEN, f"Last-Modified: {modified}")

    upstream.answers = [answering(answer)]
    said = await ask(port, "/a", method=method, headers={"If-Modified-Since": since or modified})
    assert (said.status, said.body) == (200, b"" if method == "HEAD" else TEN)
    assert "last-modified" not in said.headers
    assert len(upstream.requests) == (2 if since else 1)


async def test_a_304_by_a_tag_counts_whatever_the_time_says(upstream: Upstream, port: int) -> None:
    upstream.answers = [f"HTTP/1.1 304 X\r\nLast-Modified: {MEANINGLESS[1]}\r\n{TAG}\r\n\r\n".encode()]
    for fields in ({"If-None-Match": '"x"'}, {"If-None-Match": '"x"', "If-Modified-Since": MEANINGLESS[1]}):
        assert (await ask(port, "/a", headers=fields)).status == 304
    assert len(upstream.requests) == 2


LATER = "Wed, 15 Nov 2023 22:13:20 GMT"
SINCE = "Tue, 14 Nov 2023 22:13:20 GMT"


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"If-None-Match": '"a"'}, 'ETag: "b"'),
        ({"If-None-Match": 'W/"a"'}, 'ETag: W/"b"'),
        ({"If-None-Match": '"a", "c"'}, 'ETag: "b"'),
        ({"If-None-Match": '"a"', "If-Modified-Since": LATER}, 'ETag: "b"'),
        ({"If-None-Match": '"a", "c"'}, "Vary: X"),  # of which of them?
        ({"If-Modified-Since": SINCE}, f"Last-Modified: {LATER}"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_304_of_another_version_proves_nothing(
    upstream: Upstream, port: int, fields: dict[str, str], said: str, method: str
) -> None:
    def answer(request: bytes) -> bytes:
        if b"\r\nif-" in request.lower():
            return f"HTTP/1.1 304 X\r\n{said}\r\n\r\n".encode()
        return ok(TEN, 'ETag: "b"', f"Last-Modified: {LATER}")

    upstream.answers = [answering(answer)]
    answered = await ask(port, "/a", method=method, headers=fields)
    assert (answered.status, answered.body) == (200, b"" if method == "HEAD" else TEN)
    assert (answered.headers["etag"], len(upstream.requests)) == ('"b"', 2)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"If-None-Match": '"a"'}, 'ETag: "a"'),
        ({"If-None-Match": '"a"'}, 'ETag: W/"a"'),
        ({"If-None-Match": '"b", W/"a"'}, 'ETag: "a"'),
        ({"If-None-Match": '"a"'}, "Vary: X"),
        ({"If-None-Match": '"a"'}, "ETag: unquoted"),
        ({"If-None-Match": "*"}, 'ETag: "b"'),
        ({"If-None-Match": "*"}, "Vary: X"),
        ({"If-None-Match": '"a"', "If-Modified-Since": SINCE}, f"Last-Modified: {LATER}"),
        ({"If-Modified-Since": LATER}, f"Last-Modified: {SINCE}"),
        ({"If-Modified-Since": LATER}, f"Last-Modified: {LATER}"),
        ({"If-Modified-Since": LATER}, "Vary: X"),
    ],
)
async def test_a_304_of_the_version_that_was_asked_about_is_passed_on(
    upstream: Upstream, port: int, fields: dict[str, str], said: str
) -> None:
    upstream.answers = [f"HTTP/1.1 304 X\r\n{said}\r\n\r\n".encode()]
    answer = await ask(port, "/a", headers=fields)
    assert (answer.status, len(upstream.requests)) == (304, 1)


@pytest.mark.parametrize(
    "first, said",
    [
        (['ETag: "a"'], 'ETag: "b"'),
        (['ETag: W/"a"', f"Last-Modified: {SINCE}"], 'ETag: W/"b"'),
        ([f"Last-Modified: {SINCE}"], f"Last-Modified: {LATER}"),
        ([f"Last-Modified: {LATER}"], f"Last-Modified: {SINCE}"),
    ],
)
async def test_a_cache_does_not_keep_a_copy_for_a_304_of_another_version(
    upstream: Upstream, tmp_path: Path, first: list[str], said: str
) -> None:
    """ "the cache MUST NOT use [it] to update any stored responses" [RFC 9111 4.3.4]."""

    def answer(request: bytes) -> bytes:
        if b"\r\nif-" in request.lower():
            return f"HTTP/1.1 304 X\r\n{said}\r\n\r\n".encode()
        return ok(TEN[::-1], said)

    url = f"http://127.0.0.1:{upstream.port}/"
    source = CachedSource(RemoteSource(url, allow_hosts=["127.0.0.1"]), Cache(tmp_path))
    async with live(Starlette(routes=[Route("/{path:path}", Download(source))])) as port:
        upstream.answers = [ok(TEN, "Cache-Control: max-age=0", *first)]
        assert (await ask(port, "/a")).body == TEN
        upstream.answers = [answer]
        assert (await ask(port, "/a")).body == TEN[::-1]
    await source.aclose()


async def test_a_304_keeps_what_it_says_about_caching(upstream: Upstream, port: int) -> None:
    said = ["Cache-Control: max-age=5", "Vary: Accept", 'ETag: "x"', "Age: 3"]
    upstream.answers = [("HTTP/1.1 304 X\r\n" + "".join(f"{line}\r\n" for line in said) + "\r\n").encode()]
    answer = await ask(port, "/a", headers={"If-None-Match": '"x"'})
    names = ("cache-control", "vary", "etag", "age")
    assert [answer.headers.get(name) for name in names] == [line.partition(": ")[2] for line in said]


@pytest.mark.parametrize("told, expected", [("7", "7"), ("7, 9", "7"), ("-1", None), ("soon", None), ("1.5", None)])
async def test_the_age_of_an_answer_is_passed_on(
    upstream: Upstream, port: int, told: str, expected: str | None
) -> None:
    upstream.answers = [answering(lambda _: ok(TEN, f"Age: {told}"))]
    for method in ("GET", "HEAD"):
        assert (await ask(port, "/a", method=method)).headers.get("age") == expected


# Many parts


def ranges(count: int, step: int) -> str:
    return "bytes=" + ",".join(f"{n * step}-{n * step}" for n in range(count))


class Counting:
    """An upstream of one large file that counts requests, and the bytes that were taken of it."""

    def __init__(self, size: int, *, has_ranges: bool, headers: list[str]) -> None:
        self.content = bytes(n % 251 for n in range(251)) * (size // 251)
        self.has_ranges = has_ranges
        self.headers = headers
        self.requests = 0
        self.sent = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
            self.requests += 1
            lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
            body, code, more = self.content, "200 OK", list(self.headers)
            if self.has_ranges and "range" in lines:
                first, last = (int(n) for n in lines["range"].removeprefix("bytes=").split("-"))
                code, body = "206 Partial Content", body[first : last + 1]
                more.append(f"Content-Range: bytes {first}-{last}/{len(self.content)}")
            more.append(f"Content-Length: {len(body)}")
            writer.write("\r\n".join([f"HTTP/1.1 {code}", *more, "", ""]).encode())
            for position in range(0, len(body), 65536):
                writer.write(body[position : position + 65536])
                await writer.drain()
                self.sent += min(65536, len(body) - position)


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([TAG], id="tag"),
        pytest.param([], id="no-validator", marks=pytest.mark.slow),
        pytest.param([f"Last-Modified: {MEANINGLESS[1]}"], id="1980", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "value, status_code, requests",
    [
        (ranges(60, 600_000), 200, 1),
        ("bytes=" + ",".join(f"{n * 600_000}-{n * 600_000}" for n in reversed(range(60))), 200, 1),
        (ranges(100, 1000), 206, 1),
        ("bytes=30000000-30000001,5-6,20000000-20000001,10000000-10000001", 206, 5),
        ("bytes=30000000-30000001,5-6", 206, 3),
    ],
    ids=["far", "backwards", "near", "four", "two"],
)
async def test_many_parts_cost_few_requests(
    has_ranges: bool, headers: list[str], value: str, status_code: int, requests: int
) -> None:
    upstream = Counting(40_000_000, has_ranges=has_ranges, headers=headers)
    async with listening(upstream.serve) as served:
        source = RemoteSource(f"http://127.0.0.1:{served}/", allow_hosts=["127.0.0.1"])
        async with live(Starlette(routes=[Route("/{path:path}", Download(source))])) as port:
            answer = await ask(port, "/a", headers={"Range": value})
        await source.aclose()
    if headers != [TAG] and requests > 1:
        status_code, requests = 200, 1
    assert (answer.status, answer.complete) == (status_code, True)
    assert upstream.requests <= requests
    assert upstream.sent <= 2 * len(upstream.content)
    if status_code == 200:
        assert answer.body == upstream.content
        return
    specs = value.removeprefix("bytes=").split(",")
    for spec in specs:
        first, last = (int(n) for n in spec.split("-"))
        head = f"Content-Range: bytes {first}-{last}/{len(upstream.content)}\r\n\r\n".encode()
        assert head.lower() + upstream.content[first : last + 1] + b"\r\n--" in answer.body.replace(
            b"Content-Range", b"content-range"
        )
