"""Where settings come from: for the errors about them, and for their relative paths."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from downloadview_async import ConfigurationError

NO_FILE = "settings"
"""Stands for the file if there is none."""

COMMAND_LINE = "the command line"
"""Where a key was set that an option of the command has set."""

_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@dataclass(frozen=True, slots=True)
class Origin:
    """The file and the variables that the settings come from.

    directory: relative paths begin there. keys: where each key was set; one that is missing there comes from `file`.
    """

    file: str
    directory: Path
    keys: Mapping[str, str]

    def error(self, key: str, problem: str, *, because: str = "") -> ConfigurationError:
        """Return an error with one line: where the mistake is, in which key, what is wrong and what to do.

        because: another key that takes part in the mistake. If a variable has set it, the error names the variable.
        """
        place, other = self._place_of(key), self._place_of(because)
        if other not in (self.file, place):
            problem += f" ({because} comes from {other})"
        return ConfigurationError(f"{place}: {key}: {problem}" if key else f"{place}: {problem}")

    def _place_of(self, key: str) -> str:
        """Return where a key was set, or the table that it is in."""
        while key:
            if key in self.keys:
                return self.keys[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.file

    def absolute(self, key: str, path: str) -> str:
        """Return the path in a key, which is absolute, begins with `~`, or is relative to the directory.

        Raises `ConfigurationError` for a path of Windows: the service needs a POSIX system.
        """
        if _OF_WINDOWS.match(path):
            raise self.error(key, f"{path!r} is a path of Windows: give one of this system, such as /srv/files")
        return os.path.normpath(self.directory / os.path.expanduser(path))
