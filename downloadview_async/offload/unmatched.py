"""`Unmatched`: tells once in the log that the rules of a backend cover none of the files that are sent."""

import logging
import os
from collections.abc import Iterable

from downloadview_async.http.log_text import shown

MANY = 10
"""So many different files without a rule are a mistake, if no other file had one. There may be files for no proxy."""

logger = logging.getLogger("downloadview_async")


class Unmatched:
    """Counts different files that no rule covers, until a rule covers one.

    sources: those of the rules, without their last slashes.

    The warning comes at once if a rule names a directory that does not exist, or the same directory by another path,
    such as a symbolic link; else after `MANY` files.
    """

    def __init__(self, sources: Iterable[str]) -> None:
        self._sources = [source or "/" for source in sources]
        self._count: int | None = 0

    def end(self) -> None:
        """Count no more: a rule covers a file."""
        self._count = None

    def note(self, location: str) -> None:
        """Count a file that no rule covers, and warn once."""
        if self._count is None:
            return
        is_path = location.startswith("/")
        sources = [source for source in self._sources if source.startswith("/") == is_path]
        if not sources:
            return  # files of another kind: the application sends them itself
        self._count += 1
        advice = _advice(location, sources) if is_path and self._count == 1 else None
        if advice is None and self._count < MANY:
            return
        self._count = None
        logger.warning(
            "no offload rule covers %s, so no proxy sends it. The rules are for %s: %s",
            shown(location),
            ", ".join(map(shown, sources)),
            advice or f"write one for the directory of the file ({MANY} files had no rule, and none had one)",
        )


def _advice(location: str, sources: list[str]) -> str | None:
    real = os.path.realpath(location)
    for source in sources:
        if not os.path.isdir(source):
            return f"{shown(source)} is not a directory here, so correct it"
        root = os.path.realpath(source)
        if real.startswith(f"{root.rstrip('/')}/"):
            return f"{shown(source)} is {shown(root)} by another path, so write the path by which the files are opened"
    return None
