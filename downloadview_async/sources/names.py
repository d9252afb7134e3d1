"""Which names may be looked up at all: relative, in validated segments, the same on every operating system."""

import re

from downloadview_async.errors import FileMissing
from downloadview_async.http.disposition import DEVICE_NAME

MAX_LENGTH = 4095
"""Bytes of UTF-8: Linux's PATH_MAX without the final NUL."""

# One search for all of it: this runs for every request, more than once.
_FORBIDDEN = re.compile(rf"[\x00-\x1f\x7f\\:]|(?:^|/)(?:\.{{0,2}}|{DEVICE_NAME})(?:/|\Z)", re.IGNORECASE)


def checked_segments(name: str) -> list[str]:
    """Return the segments of a relative name such as `a/b.txt`.

    Raises `FileMissing` for what no file is called: an absolute or an empty name, an empty segment, `.`, `..`, a
    backslash, a colon, a control character, a lone surrogate, a Windows device, or more than `MAX_LENGTH` bytes.
    """
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise FileMissing(f"not valid Unicode: {name!r}") from None
    if length > MAX_LENGTH:
        raise FileMissing(f"a name of {length} bytes")
    if _FORBIDDEN.search(name):
        raise FileMissing(f"not a name of a file: {name!r}")
    return name.split("/")
