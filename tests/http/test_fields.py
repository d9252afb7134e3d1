"""The length of a body among the header fields of an answer."""

import pytest

from downloadview_async.http.fields import length_of

LENGTH = b"content-length"


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ([], None),
        ([(b"etag", b"1")], None),
        ([(b"etag", b"1"), (LENGTH, b"0")], 0),
        ([(b"Content-Length", b"12")], 12),
        ([(bytearray(LENGTH), bytearray(b"12"))], 12),
        ([(LENGTH, b"9" * 19)], 10**19 - 1),
        ([(LENGTH, b"9" * 20)], None),
        ([(LENGTH, b"1"), (LENGTH, b"1")], None),
        *(([(LENGTH, value)], None) for value in (b"", b"-1", b"+1", b" 1", b"1, 1", b"1_0", "٣".encode(), b"x")),
    ],
)
def test_length(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    assert length_of(headers) == length
    assert length_of(iter(headers)) == length
