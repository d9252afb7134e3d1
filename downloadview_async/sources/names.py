"""The names that may be looked up: relative, with checked segments, the same on every operating system."""

import re
from collections.abc import Callable, Sequence
from typing import Literal

from downloadview_async.errors import ConfigurationError, FileMissing
from downloadview_async.http.disposition import DEVICE_NAME

MAX_LENGTH = 4095
"""Bytes of UTF-8: Linux's PATH_MAX without the final NUL."""

Names = Literal["portable", "any", "exact"]
"""Which names a source accepts.

"portable": names for every operating system, without backslashes, colons and Windows devices such as `aux.txt`. "any":
these names, too. "exact": these too, and the name is the unchanged key of a store, with its empty segments.
"""

_CONTROL = r"[\x00-\x1f\x7f]"
# One search for everything: it runs several times for every request.
_FORBIDDEN = {
    "portable": re.compile(rf"{_CONTROL}|[\\:]|(?:^|/)(?:\.{{0,2}}|{DEVICE_NAME})(?:/|\Z)", re.IGNORECASE),
    "any": re.compile(rf"{_CONTROL}|(?:^|/)\.{{0,2}}(?:/|\Z)"),
    "exact": re.compile(rf"{_CONTROL}|(?:^|/)\.\.(?:/|\Z)|^\Z"),
}
_NOT_IN_ENTRY = r"\x00-\x1f\x7f/\ud800-\udfff"
# One match for the name of an entry: a listing may have a million of them.
_ENTRY = {
    "portable": re.compile(rf"(?!(?:\.{{1,2}}|(?i:{DEVICE_NAME}))\Z)[^{_NOT_IN_ENTRY}\\:]+"),
    "any": re.compile(rf"(?!\.{{1,2}}\Z)[^{_NOT_IN_ENTRY}]+"),
}
# One match for many names, each of which ends in a line feed.
_ENTRIES = {
    "portable": re.compile(rf"(?:(?!(?:\.{{1,2}}|(?i:{DEVICE_NAME}))\n)[^{_NOT_IN_ENTRY}\\:]++\n)*+"),
    "any": re.compile(rf"(?:(?!\.{{1,2}}\n)[^{_NOT_IN_ENTRY}]++\n)*+"),
}


def check_names_option(names: str) -> None:
    """Raise `ConfigurationError` for an invalid value of the option `names`."""
    if names not in _FORBIDDEN:
        raise ConfigurationError(f"names must be one of {', '.join(_FORBIDDEN)}, not {names!r}")


def canonical_name(name: str, names: Names = "portable") -> str:
    """Return the relative name, such as `a/b.txt`, that a name from a request stands for.

    `.` and empty segments are dropped, except at the end, where they would turn a directory's name into a file's:
    `/a//b`, `./a/b` and `a/./b` are all `a/b`, as for nginx, Apache and Caddy [RFC 3986 5.2.4]. With "exact" no segment
    is dropped.

    Raises `FileMissing` for a name that no file has: an empty one, one with `..`, a control character, a lone
    surrogate, or more than `MAX_LENGTH` bytes, and for a name that "portable" refuses.
    """
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise FileMissing(f"not valid Unicode: {name!r}") from None
    if length > MAX_LENGTH:
        raise FileMissing(f"the name is too long: {length} bytes")
    forbidden = _FORBIDDEN[names]
    if forbidden.search(name):
        *segments, last = name.split("/")
        name = "/".join([*(segment for segment in segments if segment not in ("", ".")), last])
        if forbidden.search(name):
            raise FileMissing(f"not a name of a file: {name!r}")
    return name


def canonical_folder(folder: str, names: Names = "portable") -> str:
    """Return the name of a folder without a slash at its end, in the form of `canonical_name`; "" for the top.

    Raises `FileMissing` for a name that no folder has.
    """
    if names == "exact":
        folder = folder.removesuffix("/")
    else:
        folder = "/".join(segment for segment in folder.split("/") if segment not in ("", "."))
    return canonical_name(folder, names) if folder else ""


def entry_check(folder: str, names: Names = "portable") -> Callable[[str], bool]:
    """Return a function that returns whether an entry of a folder may have a name.

    folder: as `canonical_folder` returns it. An entry's name is one that `canonical_name` accepts as the last segment.
    """
    longest = MAX_LENGTH - (len(folder.encode()) + 1 if folder else 0)
    is_name = _ENTRY["portable" if names == "portable" else "any"].fullmatch
    return lambda name: is_name(name) is not None and (4 * len(name) <= longest or len(name.encode()) <= longest)


def entries_check(folder: str, names: Names = "portable") -> Callable[[Sequence[str]], bool]:
    """Return a function that returns whether all of some entries of a folder may have their names.

    It takes half the time of `entry_check` for each. It may return False because one name is very long.
    """
    shortest = 4 * 255 + (len(folder.encode()) + 1 if folder else 0)
    if shortest > MAX_LENGTH:
        return lambda entries: False
    are_names = _ENTRIES["portable" if names == "portable" else "any"].fullmatch

    def are_valid(entries: Sequence[str]) -> bool:
        lines = "\n".join(entries) + "\n"
        return lines.count("\n") == len(entries) and max(map(len, entries)) <= 255 and are_names(lines) is not None

    return are_valid


def has_dot_segment(path: str) -> bool:
    """Return whether a path has a segment `.` or `..`, without which HTTP clients ask for a URL [RFC 3986 5.2.4]."""
    return not {".", ".."}.isdisjoint(path.split("/"))


def without_empty_segments(name: str) -> str:
    """Return a name without the segments that `canonical_name` drops, for a source whose names are any text.

    A slash at its beginning or end stays. A name with a segment `..` is returned unchanged, not resolved.
    """
    *parents, last = name.split("/")
    if not {"", ".", ".."}.intersection((*parents, last)) or ".." in (*parents, last):
        return name
    kept = [segment for segment in parents if segment not in ("", ".")]
    return "/" * name.startswith("/") + "/".join([*kept, "" if last == "." else last])


def check_canonical(name: str, names: Names = "portable") -> None:
    """Raise `FileMissing` for a name that `canonical_name` does not return unchanged."""
    if canonical_name(name, names) != name:
        raise FileMissing(f"not a name of a file: {name!r}")


def checked_segments(name: str, names: Names = "portable") -> list[str]:
    """Return the segments of a canonical name. Raises `FileMissing` for any other name."""
    check_canonical(name, names)
    return name.split("/")
