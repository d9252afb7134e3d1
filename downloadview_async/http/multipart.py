"""The multipart/byteranges body, RFC 9110 section 14.6: framing as bytes, between the parts of the file."""

import secrets
from collections.abc import Sequence

from downloadview_async.http.metadata import ByteRange


def new_boundary() -> str:
    """Return a boundary that nobody can guess, so that no file can contain it on purpose."""
    return secrets.token_hex(16)


def multipart_body(
    parts: Sequence[ByteRange], *, size: int, content_type: str | None, boundary: str
) -> tuple[tuple[bytes | ByteRange, ...], int]:
    """Return the pieces of the body in order, framing and file parts, and its exact length in bytes."""
    type_line = f"Content-Type: {content_type}\r\n" if content_type else ""
    pieces: list[bytes | ByteRange] = []
    before = f"--{boundary}\r\n"
    for part in parts:
        pieces.append(f"{before}{type_line}Content-Range: {part.content_range(size)}\r\n\r\n".encode("latin-1"))
        pieces.append(part)
        before = f"\r\n--{boundary}\r\n"
    pieces.append(f"\r\n--{boundary}--\r\n".encode("latin-1"))
    return tuple(pieces), sum(map(len, pieces))
