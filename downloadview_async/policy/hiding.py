"""`Hidden`: names of files and directories that do not exist for clients, such as `.env` and everything in `.git`."""

import fnmatch
import re
from collections.abc import Iterable

from downloadview_async.errors import ConfigurationError, FileMissing, WrongType

_NOT_NAMES = ("", ".", "..")
_SLASH = re.compile(r"[/\\]")


class Hidden:
    """Refuses each name that has a segment which matches a pattern.

    patterns: those of `fnmatch`, such as `.*` or `*.key`. Upper and lower case are the same.

    Raises `ConfigurationError` for a pattern with a slash, and for a single string.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        if isinstance(patterns, str) or not isinstance(patterns, Iterable):
            raise WrongType(f"hide is {patterns!r}: give a list of patterns, such as ['.*', '*.key']")
        patterns = list(patterns)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise WrongType(f"hide has {pattern!r}: give patterns as text, such as '.*'")
            if not pattern or "/" in pattern:
                raise ConfigurationError(
                    f"hide has {pattern!r}: a pattern is for one segment of a path, so remove the slash"
                )
        self.matches = re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)", re.IGNORECASE).match
        """Returns a match for one segment that is hidden. It must not be empty, `.` or `..`, or have a backslash."""

    def check(self, name: object) -> None:
        """Raise `FileMissing` for a name that is hidden."""
        if self.hides(name):
            raise FileMissing(f"hidden: {name!r}")

    def hides(self, name: object) -> bool:
        """Return whether a name is hidden: one of its segments matches a pattern."""
        text = str(name)
        segments = _SLASH.split(text)
        if "\\" in text:
            segments += text.split("/")  # on this system, a backslash may also be a character of a name
        return any(segment not in _NOT_NAMES and self.matches(segment) for segment in segments)
