"""The amounts of a plan as people write them: `100k` clients, `2MB/s` or `10Gbit/s`."""

import re

from downloadview_async import ConfigurationError
from downloadview_async.service.values import bytes_of

_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)[ ]?"
_COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6}
_RATES: dict[str, float] = {
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "k", "M", "G"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G"), 1)},
    **{f"{prefix}bit": 1000**power / 8 for power, prefix in enumerate(("", "k", "M", "G"))},
}


def count_of(option: str, text: str, *, per_second: bool = False) -> float:
    """Return a number such as 100k or 2.5M, more than 0. Raises `ConfigurationError`.

    per_second: whether `/s` may follow it.
    """
    match = re.fullmatch(_NUMBER + "([kKM]?)" + "(?:/s)?" * per_second, text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigurationError(f"{option} is {text!r}: give a number above 0, such as 5000, 100k or 2M")
    return float(match[1]) * _COUNTS[match[2]]


def rate_of(option: str, text: str) -> float:
    """Return the bytes per second of a rate such as 2MB/s or 10Gbit/s. Raises `ConfigurationError`."""
    match = re.fullmatch(_NUMBER + "([A-Za-z]+)/s", text.strip())
    if match is None or match[2] not in _RATES or float(match[1]) == 0:
        raise ConfigurationError(f"{option} is {text!r}: give a rate above 0, such as 500kB/s, 2MB/s or 10Gbit/s")
    return float(match[1]) * _RATES[match[2]]


def size_of(option: str, text: str) -> float:
    """Return the bytes of a size such as 100MB or 16GiB, more than 0. Raises `ConfigurationError`."""
    size = bytes_of(text)
    if not size:
        raise ConfigurationError(f"{option} is {text!r}: give a size above 0, such as 10KiB, 100MB or 16GiB")
    return float(size)
