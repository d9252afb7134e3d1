"""Times in HTTP fields: dates, which are seconds since the epoch (UTC), and lengths of time in seconds.

RFC 9110 section 5.6.7, RFC 9111 section 1.2.2.
"""

import math
import re
from datetime import UTC, datetime
from functools import lru_cache
from time import gmtime

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = {name: number for number, name in enumerate(_MONTHS, start=1)}

_DAY_NAME = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_LONG_DAY_NAME = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_TIME = "(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_MONTH_NAME = f"(?P<month>{'|'.join(_MONTHS)})"

# "A recipient that parses a timestamp value in an HTTP field MUST accept all three HTTP-date formats." [5.6.7]
_FORMATS = (
    re.compile(f"{_DAY_NAME}, (?P<day>[0-9]{{2}}) {_MONTH_NAME} (?P<year>[0-9]{{4}}) {_TIME} GMT"),  # IMF-fixdate
    re.compile(f"{_LONG_DAY_NAME}, (?P<day>[0-9]{{2}})-{_MONTH_NAME}-(?P<year>[0-9]{{2}}) {_TIME} GMT"),  # RFC 850
    re.compile(f"{_DAY_NAME} {_MONTH_NAME} (?P<day>[0-9]{{2}}| [0-9]) {_TIME} (?P<year>[0-9]{{4}})"),  # asctime
)

_FIXDATE_LENGTH = 29  # characters; no other format has as many

LATEST = 253402300799
"""The last second that an HTTP date can name: Fri, 31 Dec 9999 23:59:59 GMT."""


LONGEST_DELTA = 1 << 31
"""Seconds that stand for any number of more: "the cache MUST consider the value to be 2147483648" [RFC 9111 1.2.2]."""


def http_seconds(moment: datetime | float) -> int | None:
    """Return a moment as whole seconds since the epoch, or None if an HTTP date cannot name it.

    A datetime without a time zone is taken as UTC. A moment before the epoch cannot be named.
    """
    if isinstance(moment, datetime):
        moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return math.floor(moment) if 0 <= moment < LATEST + 1 else None


def format_http_date(seconds: int) -> str:
    """Return `seconds` since the epoch as an IMF-fixdate. 0 <= seconds <= `LATEST`."""
    year, month, day, hour, minute, second, weekday, _, _ = gmtime(seconds)
    date = f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year:04}"
    return f"{date} {hour:02}:{minute:02}:{second:02} GMT"


def parse_http_date(text: str, *, now: float | None = None) -> int | None:
    """Return the seconds since the epoch that an HTTP date names, or None if it is not a valid one.

    A two-digit year that appears to be more than 50 years after `now` (default: the clock) is taken as 100 years
    earlier [RFC 9110 5.6.7].
    """
    return _parse_fixdate(text) if len(text) == _FIXDATE_LENGTH else _parse(text, now)


@lru_cache(maxsize=256)
def _parse_fixdate(text: str) -> int | None:
    """Parse a text as long as an IMF-fixdate, whose year has four digits. Most dates are parsed again and again."""
    return _parse(text, None)


def _parse(text: str, now: float | None) -> int | None:
    for pattern in _FORMATS:
        if match := pattern.fullmatch(text):
            break
    else:
        return None
    # The grammar allows a leap second. Seconds since the epoch have none, so it counts as the second before.
    second = 59 if match["second"] == "60" else int(match["second"])
    time = (int(match["hour"]), int(match["minute"]), second)
    year, month, day = int(match["year"]), _MONTH[match["month"]], int(match["day"])
    if len(match["year"]) == 2:
        today = datetime.now(UTC) if now is None else datetime.fromtimestamp(now, UTC)
        year += today.year // 100 * 100
        if (year, month, day, *time) > (today.year + 50, *today.timetuple()[1:6]):
            year -= 100
    try:
        return int(datetime(year, month, day, *time, tzinfo=UTC).timestamp())
    except ValueError:
        return None


def parse_delta_seconds(text: str) -> int | None:
    """Return the seconds of an Age or a max-age, at most `LONGEST_DELTA`, or None if they are not valid."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0")
    return LONGEST_DELTA if len(digits) > 10 else min(int(digits or "0"), LONGEST_DELTA)
