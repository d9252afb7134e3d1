"""Values as the settings write them: numbers with bounds, names of functions, sizes such as 10GiB, times such as 2h."""

import os
import re
from typing import Annotated

from msgspec import Meta

from downloadview_async import ConfigurationError

YEAR = 365 * 86_400
_LONGEST_AGE = 100 * YEAR
_MOST_BYTES = 2**63 - 1

Seconds = Annotated[float, Meta(gt=0, le=YEAR)]
Count = Annotated[int, Meta(ge=1)]
Text = Annotated[str, Meta(min_length=1)]
FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
"""A control character."""
KEY_LINE = re.compile(r"^[^\S\n]*([A-Za-z0-9_.-]{1,64})[^\S\n]+(\S{32,})[^\S\n]*$", re.MULTILINE)
"""A line of a keys file: the id of a key and its secret."""

_UNITS = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB"))},
    "KB": 1000,
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB"))},
}
_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def bytes_of(value: int | str) -> int | None:
    """Return the bytes of a size such as 4096, "500MB" or "10GiB"; None for any other text, and from 2^63 on."""
    if isinstance(value, str):
        match = re.fullmatch("([0-9]{1,19})[ ]?([A-Za-z]*)", value)
        if match is None or match[2] not in _UNITS:
            return None
        number = int(match[1]) * _UNITS[match[2]]
    else:
        number = value
    return number if 0 <= number <= _MOST_BYTES else None


def seconds_of(value: float | str) -> float | None:
    """Return the seconds of a time such as 90, "90s", "10m", "2h" or "1d"; None for other text, and above 100 years."""
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)[ ]?([a-z]?)", value)
        if match is None or match[2] not in _TIMES:
            return None
        number = float(match[1]) * _TIMES[match[2]]
    else:
        number = float(value)
    return number if 0 <= number <= _LONGEST_AGE else None


def is_server(store: str) -> bool:
    """Return whether a store is at the URL of a server, and not a file."""
    return "://" in store


def usable_store(path: str) -> str:
    """Return the absolute path of an SQLite file. Raises `ConfigurationError` if it can certainly not be opened."""
    directory = os.path.dirname(path)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigurationError(f"the directory {directory!r} is missing, or cannot be written to: create it")
    if os.path.lexists(path) and (os.path.isdir(path) or not os.access(path, os.R_OK | os.W_OK)):
        raise ConfigurationError(f"{path!r} is not a file that can be read and written: give another path")
    return path
