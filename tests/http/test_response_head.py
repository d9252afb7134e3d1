"""The heads of responses: what is read in one way alone, and what is refused."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.errors import UpstreamError
from downloadview_async.http.response_head import END_OF_HEAD, parse_response_head

OK = b"HTTP/1.1 200 OK"


def head(*lines: bytes, first: bytes = OK) -> bytes:
    return b"\r\n".join([first, *lines])


@pytest.mark.parametrize(
    "raw, method, status, length, is_chunked, is_last",
    [
        (head(), "GET", 200, None, False, False),
        (head(b"Content-Length: 5"), "GET", 200, 5, False, False),
        (head(b"content-length:5"), "GET", 200, 5, False, False),
        (head(b"Content-Length: 5", b"CONTENT-LENGTH:\t5 "), "GET", 200, 5, False, False),
        (head(b"Content-Length: 5, 5"), "GET", 200, 5, False, False),
        (head(b"Content-Length: 0"), "GET", 200, 0, False, False),
        (head(b"Content-Length: " + b"9" * 18), "GET", 200, 10**18 - 1, False, False),
        (head(b"Transfer-Encoding: chunked"), "GET", 200, None, True, False),
        (head(b"Transfer-Encoding: Chunked"), "GET", 200, None, True, False),
        (head(b"Transfer-Encoding: chunked", b"Content-Length: 5"), "GET", 200, None, True, True),
        (head(b"Content-Length: 5"), "HEAD", 200, 0, False, False),
        (head(b"Transfer-Encoding: chunked"), "HEAD", 200, 0, False, False),
        (head(b"Content-Length: 5", first=b"HTTP/1.1 304 X"), "GET", 304, 0, False, False),
        (head(b"Content-Length: 5", first=b"HTTP/1.1 204 X"), "GET", 204, 0, False, False),
        (head(first=b"HTTP/1.1 100 Continue"), "GET", 100, 0, False, False),
        (head(b"Content-Length: 5", first=b"HTTP/1.0 200 OK"), "GET", 200, 5, False, True),
        (head(b"Connection: close"), "GET", 200, None, False, True),
        (head(b"Connection: Keep-Alive , CLOSE"), "GET", 200, None, False, True),
        (head(b"Connection: x", b"Connection: close"), "GET", 200, None, False, True),
        (head(b"Connection: closed"), "GET", 200, None, False, False),
        (head(first=b"HTTP/1.1 200"), "GET", 200, None, False, False),
        (head(first=b"HTTP/1.1 200 "), "GET", 200, None, False, False),
        (head(first=b"HTTP/1.1 404 Gone fishin' \xe9"), "GET", 404, None, False, False),
        (b"HTTP/1.1 200 OK\nContent-Length: 5", "GET", 200, 5, False, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r", "GET", 200, 5, False, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length:\r\n 5", "GET", 200, 5, False, False),
    ],
)
def test_framing(raw: bytes, method: str, status: int, length: int | None, is_chunked: bool, is_last: bool) -> None:
    read = parse_response_head(raw, method)
    assert (read.status, read.length, read.is_chunked, read.is_last) == (status, length, is_chunked, is_last)


def test_fields() -> None:
    lines = [b"A: 1", b"a:\t2 ", b"B:", b"C: \xe9 x", b"D: a", b"\t b", b"E: x:y"]
    fields = {"a": "1, 2", "b": "", "c": "\xe9 x", "d": "a b", "e": "x:y"}
    assert parse_response_head(head(*lines), "GET").fields == fields
    assert parse_response_head(b"\n".join([OK, *lines]), "GET").fields == fields


@pytest.mark.parametrize(
    "raw",
    [
        *[
            head(b"Content-Length: " + value)
            for value in (b"", b"-1", b"+5", b"0x5", b"5 5", b"5;", b"5,6", b"5, ", b"1e3", b"\xb2", b"9" * 19)
        ],
        head(b"Content-Length: 5", b"Content-Length: 6"),
        *[
            head(b"Transfer-Encoding: " + value)
            for value in (
                b"",
                b"gzip",
                b"gzip, chunked",
                b"chunked, gzip",
                b"chunked, chunked",
                b"xchunked",
                b"chunked;",
            )
        ],
        head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
        head(b"Transfer-Encoding: chunked", first=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: x"),
        head(b"Content-Length : 5"),
        head(b"Content-Length"),
        head(b": 5"),
        head(b""),
        head(b"\xe9: 5"),
        head(b"A(: 5"),
        head(b"A: \x00"),
        head(b"A: x\rContent-Length: 5"),
        head(b"A: x\r\r"),
        head(b"A: \x0b"),
        head(b"A: \x0c"),
        *[
            head(first=first)
            for first in (
                b"",
                b"HTTP/2 200 OK",
                b"HTTP/1.2 200 OK",
                b"HTTP/0.9 200 OK",
                b"HTTP/1.1 099 X",
                b"HTTP/1.1 20 X",
                b"HTTP/1.1 2000 X",
                b"HTTP/1.1  200 OK",
                b"HTTP/1.1\t200 OK",
                b"HTTP/1.1 +20 X",
                b"HTTP/1.1 \xb200 X",
                b"http/1.1 200 OK",
                b" HTTP/1.1 200 OK",
                b"HTTP/1.1 200\x85",
                b"ICY 200 OK",
                b"<html>",
            )
        ],
        head(*[b"A: x"] * 1001),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_could_be_read_in_two_ways_is_refused(raw: bytes, method: str) -> None:
    with pytest.raises(UpstreamError):
        parse_response_head(raw, method)


PIECES = [
    *[b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 304 X", b"HTTP/1.1 200", b"\r\n", b"\n", b"\r", b" ", b"\t"],
    *[
        b"Content-Length",
        b"Transfer-Encoding",
        b"Connection",
        b"A",
        b":",
        b": ",
        b"5",
        b"6",
        b", ",
        b"chunked",
        b"close",
    ],
    *[b"gzip", b"\x00", b"\x0b", b"\xe9", b"-"],
]


@given(st.lists(st.sampled_from(PIECES), max_size=24), st.sampled_from(["GET", "HEAD"]))
def test_it_reads_what_h11_reads(pieces: list[bytes], method: str) -> None:
    """Each head is refused, or its framing is what another parser reads, which may be more generous."""
    raw = b"HTTP/1.1 200 OK\r\n" + b"".join(pieces)
    end = END_OF_HEAD.search(raw + b"\r\n\r\n")
    assert end is not None
    try:
        read = parse_response_head(raw[: end.start()], method)
    except UpstreamError:
        return
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data((raw + b"\r\n\r\n")[: end.end()])
    event = connection.next_event()
    assert isinstance(event, h11.Response)
    assert event.status_code == read.status
    fields: dict[str, str] = {}
    for name, value in event.headers:
        text = value.decode("latin-1")
        fields[name.decode()] = f"{fields[name.decode()]}, {text}" if name.decode() in fields else text
    assert fields.get("content-length") == read.fields.get("content-length")
    assert fields.get("transfer-encoding", "").lower() == read.fields.get("transfer-encoding", "").lower()
    assert (connection.their_state is h11.MUST_CLOSE) <= read.is_last
