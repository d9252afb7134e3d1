"""The multipart/byteranges body, byte for byte and as a mail parser reads it."""

import email
import email.policy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.multipart import multipart_body, new_boundary
from tests.http.asking import answer, body

PARTS = [ByteRange(0, 2), ByteRange(3, 5)]


def test_the_framing_is_that_of_the_rfc() -> None:
    pieces, length = multipart_body(PARTS, size=10, content_type="text/plain", boundary="B")
    assert length == sum(map(len, pieces))
    assert pieces == (
        b"\r\n--B\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-1/10\r\n\r\n",
        ByteRange(0, 2),
        b"\r\n--B\r\nContent-Type: text/plain\r\nContent-Range: bytes 3-4/10\r\n\r\n",
        ByteRange(3, 5),
        b"\r\n--B--\r\n",
    )


def test_a_line_end_comes_before_the_first_boundary_as_from_nginx_and_apache() -> None:
    # zsync drops everything up to the first line end, and asks again for ever if that is the boundary
    pieces, _ = multipart_body(PARTS, size=10, content_type=None, boundary="B")
    assert isinstance(pieces[0], bytes)
    assert pieces[0].startswith(b"\r\n--B\r\n")


def test_parts_of_a_file_without_a_type_have_none() -> None:
    pieces, _ = multipart_body(PARTS, size=10, content_type=None, boundary="B")
    assert pieces[0] == b"\r\n--B\r\nContent-Range: bytes 0-1/10\r\n\r\n"


def test_boundaries_are_valid_unguessable_and_new_each_time() -> None:
    boundaries = {new_boundary() for _ in range(100)}
    assert len(boundaries) == 100
    assert all(len(boundary) == 32 and boundary.isalnum() for boundary in boundaries)  # 128 bits


def parsed(content_type: str, content: bytes) -> list[tuple[str | None, str, bytes]]:
    message = email.message_from_bytes(
        b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + content, policy=email.policy.HTTP
    )
    assert not message.defects
    assert message.preamble in (None, "")
    assert message.epilogue in (None, "")
    found = []
    for part in message.iter_parts():
        payload = part.get_payload(decode=True)
        assert isinstance(payload, bytes)
        found.append((part["content-range"], part.get_content_type(), payload))
    return found


@pytest.mark.parametrize("ranges", ["0-1,3-4", "8-9,0-1", "0-0,2-2,4-4,6-6,9-9", "0-0,-1"])
def test_a_mail_parser_finds_the_parts_in_the_order_they_were_asked_for(ranges: str) -> None:
    content = b"0123456789"
    plan = answer([("Range", f"bytes={ranges}")])
    found = parsed(plan.headers["content-type"], body(plan, content))
    asked = [spec.split("-") for spec in ranges.split(",")]
    expected = [(first or "9", last if first else "9") for first, last in asked]
    assert found == [
        (f"bytes {first}-{last}/10", "application/octet-stream", content[int(first) : int(last) + 1])
        for first, last in expected
    ]


# A mail parser may take line ends at the edges of a payload for framing, and other line ends for its own.
contents = st.binary(min_size=4, max_size=200).map(lambda data: data.translate(bytes(n | 0x80 for n in range(256))))


@given(contents, st.data())
def test_the_length_is_exact_and_every_part_is_found_whole(content: bytes, data: st.DataObject) -> None:
    size = len(content)
    starts = data.draw(st.lists(st.integers(0, size // 2 - 1), min_size=2, max_size=10, unique=True))
    plan = answer(
        [("Range", "bytes=" + ", ".join(f"{2 * start}-{2 * start}" for start in starts))],
        metadata=FileMetadata(size=size),
        filename="a.bin",
    )
    sent = body(plan, content)
    assert plan.status == 206
    assert plan.headers["content-length"] == str(len(sent)) == str(plan.length)
    assert parsed(plan.headers["content-type"], sent) == [
        (f"bytes {2 * start}-{2 * start}/{size}", "application/octet-stream", content[2 * start : 2 * start + 1])
        for start in starts
    ]
