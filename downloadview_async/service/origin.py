"""Where settings come from: for the errors about them, and for their relative paths."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from downloadview_async import ConfigurationError

COMMAND_LINE = "the command line"
"""Where a key was set that an option of the command has set."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The file and the variables that the settings come from.

    directory: relative paths begin there. keys: where each key was set; one that is missing there comes from `file`.
    """

    file: str
    directory: Path
    keys: Mapping[str, str]

    def error(self, key: str, problem: str) -> ConfigurationError:
        """Return an error with one line: where the mistake is, in which key, what is wrong and what to do."""
        place, part = self.file, key
        while part:
            if part in self.keys:
                place = self.keys[part]
                break
            part = part[: max(part.rfind("."), part.rfind("["), 0)]
        return ConfigurationError(f"{place}: {key}: {problem}" if key else f"{place}: {problem}")

    def absolute(self, path: str) -> str:
        """Return a path that is absolute or relative to the directory."""
        return os.path.normpath(self.directory / path)
