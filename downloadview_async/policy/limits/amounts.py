"""The amounts of limits as texts: `20MB/s`, `600/minute`, `50GB/day`, `1000 downloads/day`."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from downloadview_async.errors import ConfigurationError

SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""The units of bytes: powers of 1000."""

PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
"""The periods in seconds."""

LEAST_RATE = 1000
"""The least rate of a client, in bytes per second."""

_MOST = 2**53  # Lua's numbers, by which Redis counts, are exact up to here
_NUMBER = r"([0-9]{1,12})(?:\.([0-9]{1,6}))?"
_RATE = re.compile(rf"{_NUMBER}[ ]?([A-Za-z]*)/s(?:econd)?")
_REQUESTS = re.compile(r"([0-9]{1,12})(?: requests?)?/([a-z]+)")
_QUOTA = re.compile(rf"{_NUMBER}[ ]?([A-Za-z]*)/([a-z]+)")


@dataclass(frozen=True, slots=True)
class Window:
    """At most `amount` requests in `seconds`. text: the same in words, for clients."""

    amount: int
    seconds: int
    text: str


@dataclass(frozen=True, slots=True)
class Quota:
    """At most `amount` bytes or downloads in a period, which begins at a multiple of `seconds` in UTC.

    text: the same in words, for clients.
    """

    amount: int
    unit: Literal["bytes", "downloads"]
    seconds: int
    text: str


def rate_of(text: str) -> int:
    """Return the bytes per second in a text such as `20MB/s`. Raises `ConfigurationError`."""
    match = _RATE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[3] not in SIZES:
        raise ConfigurationError(f"{text!r} is not a rate: {_instead_of_rate(text)}")
    rate = _scaled(match[1], match[2], SIZES[match[3]])
    if rate is None or not LEAST_RATE <= rate <= _MOST:
        raise ConfigurationError(f"{text!r} is out of range: give 1kB/s or more, in whole bytes")
    return rate


def window_of(text: str) -> Window:
    """Return the window of a text such as `600/minute`. Raises `ConfigurationError`."""
    match = _REQUESTS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(f"{text!r} is not a number of requests: give such as 600/minute or 20/second")
    amount = int(match[1])
    if amount < 1:
        raise ConfigurationError(f"{text!r} allows no request: give 1 or more")
    seconds = _period(text, match[2])
    return Window(amount, seconds, f"at most {amount} {'request' if amount == 1 else 'requests'} per {match[2]}")


def quota_of(text: str) -> Quota:
    """Return the quota of a text such as `50GB/day` or `1000 downloads/day`. Raises `ConfigurationError`."""
    match = _QUOTA.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(f"{text!r} is not a quota: give such as 50GB/day or 1000 downloads/day")
    number, fraction, unit, period = match.groups()
    if unit in ("download", "downloads"):
        amount = None if fraction else int(number)
    elif unit in SIZES:
        amount = _scaled(number, fraction, SIZES[unit])
    else:
        raise ConfigurationError(f"{text!r} has an unknown unit: {_instead_of(unit, (*SIZES, 'downloads'))}")
    if amount is None or not 1 <= amount <= _MOST:
        raise ConfigurationError(f"{text!r} is out of range: give 1 or more, in whole bytes or downloads")
    seconds = _period(text, period)
    written = f"{number}.{fraction}" if fraction else number
    named = f"{written} {unit}" if unit not in SIZES else f"{written}{unit}"
    return Quota(amount, "bytes" if unit in SIZES else "downloads", seconds, f"at most {named} per {period}")


def _scaled(number: str, fraction: str | None, unit: int) -> int | None:
    """Return a decimal number of a unit as a whole number, or None if it is not whole."""
    digits = fraction or ""
    amount, rest = divmod(int(number + digits) * unit, 10 ** len(digits))
    return None if rest else amount


def _period(text: str, period: str) -> int:
    if period not in PERIODS:
        raise ConfigurationError(f"{text!r} has an unknown period: {_instead_of(period, PERIODS)}")
    return PERIODS[period]


def _instead_of_rate(text: object) -> str:
    size, slash, period = text.partition("/") if isinstance(text, str) else ("", "", "")
    unit = size.lstrip("0123456789. ")
    if unit.lower().removesuffix("s") in ("bit", "kbit", "mbit", "gbit", "kbps", "mbps") or unit.endswith("b"):
        return "give bytes per second, such as 20MB/s, which is 160 Mbit/s"
    if slash and period in ("s", "second") and size.startswith(tuple("0123456789")):
        return _instead_of(unit, SIZES)
    return "give bytes per second, such as 20MB/s or 500kB/s"


def _instead_of(name: str, known: "tuple[str, ...] | dict[str, int]") -> str:
    lower = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), lower, 1)
    return f"did you mean {lower[close[0]]}?" if close else f"use one of {', '.join(known)}"
