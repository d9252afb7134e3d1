"""The multipart/byteranges body, RFC 9110 section 14.6: framing as bytes, between the parts of the file."""

import secrets
from collections.abc import Sequence

from downloadview_async.http.metadata import ByteRange


def new_boundary() -> str:
    """Return a boundary that cannot be guessed, so that nobody can put it into a file on purpose."""
    return secrets.token_hex(16)


def multipart_body(
    parts: Sequence[ByteRange], *, size: int, content_type: str | None, boundary: str
) -> tuple[tuple[bytes | ByteRange, ...], int]:
    """Return the pieces of the body in order, framing and file parts, and its exact length in bytes.

    There is a line end before the first boundary, too. It is an empty preamble, which the RFC allows [14.6]. nginx and
    Apache send it, and zsync drops everything up to the first line end.
    """
    type_line = f"Content-Type: {content_type}\r\n" if content_type else ""
    pieces: list[bytes | ByteRange] = []
    for part in parts:
        pieces.append(
            f"\r\n--{boundary}\r\n{type_line}Content-Range: {part.content_range(size)}\r\n\r\n".encode("latin-1")
        )
        pieces.append(part)
    pieces.append(f"\r\n--{boundary}--\r\n".encode("latin-1"))
    return tuple(pieces), sum(map(len, pieces))
