"""Which names may be looked up at all: relative, in validated segments, the same on every operating system."""

from downloadview_async.errors import FileMissing
from downloadview_async.http.disposition import is_device_name

MAX_LENGTH = 4095
"""Bytes of UTF-8: Linux's PATH_MAX without the final NUL."""


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
    segments = name.split("/")
    for segment in segments:
        if segment in ("", ".", "..") or any(c in "\\:\x7f" or c < " " for c in segment) or is_device_name(segment):
            raise FileMissing(f"not a name of a file: {name!r}")
    return segments
