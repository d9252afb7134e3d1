"""HTTP dates."""

import math
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.dates import (
    LATEST,
    LONGEST_DELTA,
    format_http_date,
    http_seconds,
    parse_delta_seconds,
    parse_http_date,
)
from tests.http.asking import LARGE

EXAMPLE = 784111777  # Sun, 06 Nov 1994 08:49:37 GMT, the RFC's own
NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    "text, seconds",
    [
        pytest.param("Sun, 06 Nov 1994 08:49:37 GMT", EXAMPLE, id="IMF-fixdate"),
        pytest.param("Sunday, 06-Nov-94 08:49:37 GMT", EXAMPLE, id="RFC 850"),
        pytest.param("Sun Nov  6 08:49:37 1994", EXAMPLE, id="asctime"),
        pytest.param("Sun Nov 06 08:49:37 1994", EXAMPLE, id="asctime with two digits"),
        pytest.param("Mon, 06 Nov 1994 08:49:37 GMT", EXAMPLE, id="the wrong weekday does not matter"),
        pytest.param("Thu, 01 Jan 1970 00:00:00 GMT", 0, id="the epoch"),
        pytest.param("Wed, 31 Dec 1969 23:59:59 GMT", -1, id="before the epoch"),
        pytest.param("Fri, 31 Dec 9999 23:59:59 GMT", LATEST, id="the last one"),
        pytest.param("Thu, 29 Feb 2024 00:00:00 GMT", 1709164800, id="leap day"),
        pytest.param("Sat, 31 Dec 2016 23:59:60 GMT", 1483228799, id="leap second"),
        pytest.param("Mon, 01 Jan 0001 00:00:00 GMT", -62135596800, id="the first year"),
    ],
)
def test_all_three_formats_are_read(text: str, seconds: int) -> None:
    assert parse_http_date(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "0", "784111777", "now", "GMT",
        "Sun, 06 Nov 1994 08:49:37", "Sun, 06 Nov 1994 08:49:37 UTC", "Sun, 06 Nov 1994 08:49:37 +0000",
        "Sun, 06 Nov 1994 08:49:37 gmt", "sun, 06 nov 1994 08:49:37 GMT", "Sun, 6 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 94 08:49:37 GMT", "06 Nov 1994 08:49:37 GMT", "Sun 06 Nov 1994 08:49:37 GMT",
        "Sun,  06 Nov 1994 08:49:37 GMT", " Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 GMT ",
        "Sun, 06 Nov 1994 08:49:37 GMT; length=10", "Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 8:49:37 GMT", "Sun, 06 Nov 1994 24:00:00 GMT", "Sun, 06 Nov 1994 08:60:00 GMT",
        "Sun, 06 Nov 1994 08:49:61 GMT", "Sun, 00 Nov 1994 08:49:37 GMT", "Sun, 31 Nov 1994 08:49:37 GMT",
        "Wed, 29 Feb 2023 00:00:00 GMT", "Sun, 06 Nov 0000 08:49:37 GMT", "Sun, 06 Nov 10000 08:49:37 GMT",
        "Sun, +6 Nov 1994 08:49:37 GMT", "Sun, ٠٦ Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:-1 GMT",
        "Sun, 06-Nov-1994 08:49:37 GMT", "Sun, 06-Nov-94 08:49:37 GMT", "Sunday, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-1994 08:49:37 GMT", "Sun Nov 6 08:49:37 1994", "Sun Nov  6 08:49:37 94",
        "Sun Nov  6 08:49:37 1994 GMT", "1994-11-06T08:49:37Z", "Sun, 06 Nov 1994 08:49:37 GMT\n", '"v1"', "*",
    ],
)  # fmt: skip
def test_what_is_no_date_is_none(text: str) -> None:
    assert parse_http_date(text) is None


@pytest.mark.parametrize(
    "text, year",
    [
        ("Sunday, 06-Nov-94 08:49:37 GMT", 1994),
        ("Sunday, 06-Nov-00 08:49:37 GMT", 2000),
        ("Sunday, 06-Nov-26 08:49:37 GMT", 2026),
        ("Sunday, 06-Nov-76 08:49:37 GMT", 2076),
        ("Sunday, 22-Nov-76 12:00:00 GMT", 2076),
        ("Sunday, 22-Nov-76 12:00:01 GMT", 1976),
        ("Sunday, 06-Nov-77 08:49:37 GMT", 1977),
        ("Sunday, 06-Nov-99 08:49:37 GMT", 1999),
    ],
)
def test_a_year_of_two_digits_is_at_most_fifty_years_ahead(text: str, year: int) -> None:
    seconds = parse_http_date(text, now=NOW)
    assert seconds is not None
    assert datetime.fromtimestamp(seconds, UTC).year == year


def test_a_leap_day_that_only_one_century_has() -> None:
    in_2080 = datetime(2080, 1, 1, tzinfo=UTC).timestamp()
    assert parse_http_date("Tuesday, 29-Feb-00 00:00:00 GMT", now=in_2080) == 951782400


@pytest.mark.parametrize(
    "moment, seconds",
    [
        (0, 0),
        (1.999, 1),
        (datetime(1994, 11, 6, 8, 49, 37, 999999, tzinfo=UTC), EXAMPLE),
        (datetime(1994, 11, 6, 8, 49, 37), EXAMPLE),
        (datetime(1994, 11, 6, 10, 49, 37, tzinfo=timezone(timedelta(hours=2))), EXAMPLE),
        (LATEST, LATEST),
        (LATEST + 1, None),
        (-0.5, None),
        (-1, None),
        (math.inf, None),
        (-math.inf, None),
        (math.nan, None),
        (1e300, None),
        pytest.param(10**400, None, id="more than a float can be"),
        pytest.param(-(10**400), None, id="less than a float can be"),
        (LATEST + 0.999, LATEST),
    ],
)
def test_moments_become_whole_seconds_that_a_date_can_name(moment: datetime | float, seconds: int | None) -> None:
    assert http_seconds(moment) == seconds


@given(st.integers(0, LATEST))
def test_dates_round_trip(seconds: int) -> None:
    assert parse_http_date(format_http_date(seconds)) == seconds


@given(st.datetimes(min_value=datetime(1000, 1, 1)), st.sampled_from(["%a %b %e %H:%M:%S %Y", "%a %b %d %H:%M:%S %Y"]))
def test_asctime_is_read_as_c_writes_it(moment: datetime, form: str) -> None:
    assert parse_http_date(moment.strftime(form)) == int(moment.replace(microsecond=0, tzinfo=UTC).timestamp())


@given(st.datetimes(datetime(1977, 1, 1), datetime(2076, 1, 1)))
def test_rfc_850_dates_within_fifty_years_are_read_right(moment: datetime) -> None:
    text = moment.strftime("%A, %d-%b-%y %H:%M:%S GMT")
    assert parse_http_date(text, now=NOW) == int(moment.replace(microsecond=0, tzinfo=UTC).timestamp())


@given(
    st.text()
    | st.from_regex(r"\A[A-Z][a-z]{2}, [0-9]{2} (Jan|Feb|Nov) [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT\Z")
    | st.from_regex(r"\A(Sun|Tues)day, [0-9]{2}-(Jan|Feb|Nov)-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT\Z"),
    st.integers(0, LATEST),
)
def test_no_text_raises(text: str, now: int) -> None:
    seconds = parse_http_date(text, now=now)
    assert seconds is None or -62135596800 <= seconds <= LATEST


@given(st.floats() | st.integers() | st.datetimes())
def test_no_moment_raises(moment: datetime | float) -> None:
    seconds = http_seconds(moment)
    assert seconds is None or 0 <= seconds <= LATEST


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", [" ", "0", "S", "Sun, ", "Sunday, 06-Nov-", "\t"], ids=repr)
def test_a_huge_value_is_decided(text: str) -> None:
    assert parse_http_date(text * (LARGE // len(text))) is None


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("0", 0),
        ("7", 7),
        ("0" * 20 + "60", 60),
        ("2147483647", LONGEST_DELTA - 1),
        ("2147483648", LONGEST_DELTA),
        ("2147483649", LONGEST_DELTA),
        ("9" * 11, LONGEST_DELTA),
        ("9" * 5000, LONGEST_DELTA),  # more digits than int() takes
        ("", None),
        ("-1", None),
        ("+1", None),
        ("1.5", None),
        (" 1", None),
        ("1_0", None),
        ("soon", None),
        ("\u0663", None),
        ("\u00b2", None),
    ],
)
def test_delta_seconds_that_overflow_are_the_longest(text: str, seconds: int | None) -> None:
    assert parse_delta_seconds(text) == seconds
