"""Chunked bodies: what they contain, in whatever pieces they arrive, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.errors import UpstreamError
from downloadview_async.http.chunked import Dechunker

WHOLE: list[tuple[bytes, bytes, bytes]] = [
    (b"0\r\n\r\n", b"", b""),
    (b"5\r\n01234\r\n0\r\n\r\n", b"01234", b""),
    (b"5\r\n01234\r\n3\r\n567\r\n0\r\n\r\n", b"01234567", b""),
    (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", b""),
    (b"0000a\r\n0123456789\r\n000\r\n\r\n", b"0123456789", b""),
    (b'5;a=b;c="d e"\r\n01234\r\n0;x\r\n\r\n', b"01234", b""),
    (b"5 \r\n01234\r\n0\t\r\n\r\n", b"01234", b""),
    (b"5\r\n\r\n0\r\n\r\n0\r\n\r\n", b"\r\n0\r\n", b""),
    (b"1\r\nx\r\n0\r\nA: b\r\nContent-Length: 7\r\n\r\n", b"x", b""),
    (b"1\r\nx\r\n0\r\n\r\nEXTRA", b"x", b"EXTRA"),
    (b"1\r\nx\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"x", b"HTTP/1.1 200 OK\r\n\r\n"),
]


def feed(chunks: Dechunker, sent: bytes, size: int) -> tuple[bytes, bytes]:
    """Return the body of what is sent in pieces of some size, and the bytes after it."""
    body, place = b"", 0
    while place < len(sent) and not chunks.is_complete:
        body += chunks.feed(sent[place : place + size])
        place += size
    return body, chunks.rest + sent[place:]


@pytest.mark.parametrize("sent, body, rest", WHOLE)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_whole_bodies(sent: bytes, body: bytes, rest: bytes, size: int) -> None:
    chunks = Dechunker()
    assert feed(chunks, sent, size) == (body, rest)
    assert chunks.is_complete


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"+5\r\n01234\r\n",
        b"0x5\r\n01234\r\n",
        b" 5\r\n01234\r\n",
        b"5_0\r\n",
        b"\xb2\r\n",
        b"5,\r\n01234\r\n",
        b"f" * 16 + b"\r\n",
        b"5\n01234\n0\n\r\n",
        b"5;\x00\r\n01234\r\n",
        b"5;a\nb\r\n01234\r\n",
        b"5;a\rb\r\n01234\r\n",
        b"5\r\n012345\r\n",
        b"5\r\n01234 \r\n",
        b"5\r\n012340\r\n\r\n",
        b"5;" + b"x" * 5000,
        b"5;" + b"x" * 5000 + b"\r\n",
        b"5\r\n01234" + b"x" * 5000,
        b"0\r\n" + b"A: " + b"x" * 5000 + b"\r\n\r\n",
        b"0\r\n" + b"A: x\r\n" * 20_000 + b"\r\n",
    ],
)
@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
def test_errors_in_the_framing(sent: bytes, size: int) -> None:
    with pytest.raises(UpstreamError):
        feed(Dechunker(), sent, size)


@pytest.mark.parametrize(
    "sent", [b"", b"5", b"5\r", b"5\r\n", b"5\r\n0123", b"5\r\n01234", b"5\r\n01234\r\n", b"0\r\n", b"0\r\nA: b\r\n"]
)
def test_a_body_that_has_not_ended_is_not_complete(sent: bytes) -> None:
    chunks = Dechunker()
    assert chunks.feed(sent) == sent[3:8].rstrip(b"\r\n") * sent.startswith(b"5")
    assert not chunks.is_complete


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(1, 30), max_size=40))
def test_any_body_in_any_pieces(parts: list[bytes], sizes: list[int]) -> None:
    sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    chunks, got, place = Dechunker(), b"", 0
    for size in [*sizes, len(sent)]:
        if place < len(sent):
            got += chunks.feed(sent[place : place + size])
            place += size
    assert (got, chunks.is_complete, chunks.rest) == (b"".join(parts), True, b"")
