"""`PreparedHead`: the header lines of an answer that is sent often, ready for HTTP/1.1."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from downloadview_async.http.fields import NAME_CHAR

_NAME = re.compile(f"(?!(?:connection|transfer-encoding)$){NAME_CHAR}+".encode())
_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")


def is_ordinary(name: bytes, value: bytes) -> bool:
    """Return whether a header is valid, in lower case [RFC 9110 5.1, 5.5], and not about the connection."""
    return bool(_NAME.fullmatch(name) and is_value(value))


def is_value(value: bytes) -> bool:
    """Return whether a value of a header is valid [RFC 9110 5.5]."""
    return _VALUE.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class PreparedHead:
    """The headers of a response that is sent often, with their lines in HTTP/1.1. length: the Content-Length.

    It may be used only if the start of the response still has exactly these headers: middleware may have added some.
    """

    headers: tuple[tuple[bytes, bytes], ...]
    lines: bytes
    length: int

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> "PreparedHead | None":
        """Return the prepared head, or None if a header is not ordinary: the server then checks the headers itself."""
        headers = tuple(headers)
        lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        lengths = [int(value) for name, value in headers if name == b"content-length" and value.isdigit()]
        if len(lengths) != 1 or not all(is_ordinary(name, value) for name, value in headers):
            return None
        return cls(headers, lines, lengths[0])

    def with_fields(self, fields: Sequence[tuple[bytes, bytes]]) -> "PreparedHead":
        """Return the head with further fields, which have to be ordinary."""
        lines = b"".join([b"%s: %s\r\n" % field for field in fields])
        return PreparedHead((*self.headers, *fields), self.lines + lines, self.length)
