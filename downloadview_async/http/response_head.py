"""The head of a response of HTTP/1.1, and how long its body is [RFC 9112]. Nothing here does I/O."""

import re
from dataclasses import dataclass

from downloadview_async.errors import UpstreamError
from downloadview_async.http.fields import TOKEN_CHAR

MAX_HEAD = 100 * 1024
"""The longest head that is read, in bytes."""

_MAX_FIELDS = 1000

END_OF_HEAD = re.compile(rb"\n\r?\n")
"""The end of the last line, and an empty line. "A recipient MAY recognize a single LF as a line terminator" [2.2]."""

_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*)?")
_NAME = re.compile(f"{TOKEN_CHAR}+").fullmatch
_FOLD = re.compile(r"\n[ \t]+")
_FORBIDDEN = "\0\v\f\r"
_LENGTH = re.compile("[0-9]{1,18}")


@dataclass(slots=True)
class ResponseHead:
    """The head of a response.

    fields: names in lower case; fields of the same name are joined. length: of the body, in bytes; None if it is not
    known before its end. is_chunked: whether the body consists of chunks. If neither is known, the end of the
    connection is the end of the body. is_last: whether the connection gets no further request.
    """

    status: int
    fields: dict[str, str]
    length: int | None
    is_chunked: bool
    is_last: bool


def parse_response_head(raw: bytes, method: str) -> ResponseHead:
    """Return the head of a response to a request with `method`. raw: without the empty line.

    Raises `UpstreamError` for whatever could be read in two ways: a field without a name, a control character that ends
    lines elsewhere, two lengths, a transfer coding other than chunked.
    """
    text = raw.decode("latin-1").replace("\r\n", "\n").removesuffix("\r")
    if any(character in text for character in _FORBIDDEN):
        raise UpstreamError("the head of the answer has a control character")
    first, _, rest = text.partition("\n")
    if "\n " in rest or "\n\t" in rest:
        rest = _FOLD.sub(" ", rest)
    if (match := _STATUS_LINE.fullmatch(first)) is None:
        raise UpstreamError(f"the answer is not one of HTTP/1.1: it begins with {first[:100]!r}")
    lines = rest.split("\n") if "\n" in text else []
    if len(lines) > _MAX_FIELDS:
        raise UpstreamError(f"the head of the answer has more than {_MAX_FIELDS} fields")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if not (colon and _NAME(name)):
            raise UpstreamError(f"the head of the answer has the line {line[:100]!r}, which is not a field")
        # A list may be sent in several fields. A field that may be sent only once does not parse when it is joined.
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    status = int(match[2])
    length = _length(fields) if "content-length" in fields else None
    is_chunked = "transfer-encoding" in fields and _is_chunked(fields["transfer-encoding"])
    is_last = match[1] == "0" or (is_chunked and length is not None)
    if "connection" in fields:
        is_last = is_last or "close" in (option.strip(" \t").lower() for option in fields["connection"].split(","))
    if method == "HEAD" or status < 200 or status in (204, 304):
        length, is_chunked = 0, False
    elif is_chunked:
        length = None  # "the Transfer-Encoding overrides the Content-Length" [6.3], but one of both may be forged
    return ResponseHead(status, fields, length, is_chunked, is_last)


def _length(fields: dict[str, str]) -> int:
    """Return the Content-Length. "A list consisting of the same decimal value repeated" becomes one value [6.3]."""
    text = fields["content-length"]
    if "," in text:
        values = {value.strip(" \t") for value in text.split(",")}
        text = fields["content-length"] = values.pop() if len(values) == 1 else text
    if not _LENGTH.fullmatch(text):
        raise UpstreamError(f"the answer has an invalid Content-Length: {text[:100]!r}")
    return int(text)


def _is_chunked(coding: str) -> bool:
    if coding.lower() != "chunked":
        raise UpstreamError(f"the answer has a transfer coding that was not asked for: {coding[:100]!r}")
    return True
