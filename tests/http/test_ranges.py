"""Range: what is asked for, and which bytes of a file that is."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from downloadview_async.http.metadata import ByteRange
from downloadview_async.http.ranges import (
    MAX_PARTS,
    NEAR,
    RangeSpec,
    in_order_of_the_file,
    parse_content_range,
    parse_range,
    read_from,
    reads_of,
    select_ranges,
)
from tests.http.asking import LARGE

# What may stand after "bytes=" and is no list of ranges.
NO_RANGES = [
    "", "5-2", "a-b", "1", "-", "-1-2", "+1-2", "1_0-", "0x1-", "٣-٥", "1.0-2", "--6",
    # their siblings
    "0", "0--1", "0-+1", "- 1", "-+1", "--1", "0-1-2", "0-1 2-3", "0-1;1-2", "1e0-2", "0b0-1", "0o0-1", "-1_0",
    "0-1\x00", "0\x00-1", "\x0b0-1", "0-1\r", "0-1\n", "\xa00-1", "²-3", "0-²", "x-0", "0-x", "*", "*/10", "0-1/10",
    '"0-1"', "0\u20111", "bytes=0-1", "-٣", "0-\uff11",
    # one bad part spoils them all: what was meant cannot be known
    "0-1,5-2", "5-2,0-1", "0-1,x", "0-1,-", ",-", "0-1,--3", "0-1 3-4,5-6",
    # lists without an element
    " ", ",", ",,,", " , ,\t, ",
    # Go's net/http, TestParseRange
    "7", " 7 ", "5-4", "0-2,5-4", "2-5,4-3", "--5,4--3", "A-", "A- ", "A-Z", " -Z", "5-Z", "Ran-dom, garbage",
    "0x01-0x02", "         ", " , , ,   ",
    # blanks inside a part, which Apache, Go and Werkzeug put up with: not in the grammar of 14.1.2
    "1 -2", "1- 2", "   1 -2   ,  4- 5, 7 - 8 , ,,",
]  # fmt: skip
NO_BYTES = [
    "", "bytes", "=", "=0-1", "0-1", "items=0-1", "byte=0-1", "bytess=0-1", "none", "bytes 0-1", "bytes:0-1",
    "bytes =0-1", " bytes=0-1", "foo", "seconds=1-2", "bytes = 1 - 100", "bytes\uff1d0-1", "b\u0443tes=0-1",
]  # fmt: skip


@pytest.mark.parametrize("value", [f"bytes={ranges}" for ranges in NO_RANGES] + NO_BYTES)
def test_what_does_not_parse_is_ignored(value: str) -> None:
    assert parse_range(value) is None


PARSED: list[tuple[str, list[RangeSpec]]] = [
    ("bytes=0-1", [(0, 1)]),
    ("BYTES=0-1", [(0, 1)]),
    ("ByTeS=0-1", [(0, 1)]),
    ("bytes=0-", [(0, None)]),
    ("bytes=-3", [(None, 3)]),
    ("bytes=-0", [(None, 0)]),
    ("bytes=00000000000000000000001-0002", [(1, 2)]),
    ("bytes=0-1,3-4", [(0, 1), (3, 4)]),
    ("bytes=0-1 ,\t3-4", [(0, 1), (3, 4)]),
    ("bytes= 0-1", [(0, 1)]),
    ("bytes=,0-1,,", [(0, 1)]),
    ("bytes=9500-,-500", [(9500, None), (None, 500)]),
]


@pytest.mark.parametrize("value, specs", PARSED)
def test_what_parses_is_the_list_of_what_is_asked_for(value: str, specs: list[RangeSpec]) -> None:
    assert parse_range(value) == specs


# (header after "bytes=", size of the file, the parts as "first-last")
SELECTED = [
    # HTTP.md
    ("0-0", 10, ["0-0"]),
    ("9-9", 10, ["9-9"]),
    ("0-", 10, ["0-9"]),
    ("2-99", 10, ["2-9"]),
    ("-3", 10, ["7-9"]),
    ("-100", 10, ["0-9"]),
    ("0-1,50-60", 10, ["0-1"]),
    ("0-1,3-4", 10, ["0-1", "3-4"]),
    ("0-5,2-7", 10, ["0-7"]),
    ("0-4,5-9", 10, ["0-9"]),
    # RFC 9110 14.1.2, of 10000 bytes
    ("0-499", 10000, ["0-499"]),
    ("500-999", 10000, ["500-999"]),
    ("-500", 10000, ["9500-9999"]),
    ("9500-", 10000, ["9500-9999"]),
    ("0-0,-1", 10000, ["0-0", "9999-9999"]),
    ("0-0, -1", 10000, ["0-0", "9999-9999"]),
    (" ,0-0,, -1,", 10000, ["0-0", "9999-9999"]),
    ("500-600,601-999", 10000, ["500-999"]),
    ("500-700,601-999", 10000, ["500-999"]),
    ("500-999,7000-7999", 8000, ["500-999", "7000-7999"]),
    # Go's net/http; what it leaves apart and touches is merged here
    ("0-9", 10, ["0-9"]),
    ("5-", 10, ["5-9"]),
    ("0-20", 10, ["0-9"]),
    ("15-,0-5", 10, ["0-5"]),
    ("1-2,5-", 10, ["1-2", "5-9"]),
    ("-2 , 7-", 11, ["7-10"]),
    ("0-0 ,2-2, 7-", 11, ["0-0", "2-2", "7-10"]),
    ("-5", 10, ["5-9"]),
    ("-15", 10, ["0-9"]),
    ("0-4", 11, ["0-4"]),
    ("2-", 11, ["2-10"]),
    ("-5", 11, ["6-10"]),
    ("3-7", 11, ["3-7"]),
    ("0-0,-2", 11, ["0-0", "9-10"]),
    ("0-1,5-8", 11, ["0-1", "5-8"]),
    ("0-1,5-", 11, ["0-1", "5-10"]),
    ("5-1000", 11, ["5-10"]),
    # merging: whole, touching, nested, in any order; a part stands where its first piece was asked for
    ("5-9,0-4", 10, ["0-9"]),
    ("8-9,0-1", 10, ["8-9", "0-1"]),
    ("8-8,0-1,9-9", 10, ["8-9", "0-1"]),
    ("0-1,8-8,2-2", 10, ["0-2", "8-8"]),
    ("5-5,0-0,7-7,6-6", 10, ["5-7", "0-0"]),
    ("5-5,0-0,4-4", 10, ["4-5", "0-0"]),
    ("0-2,3-5,6-9", 10, ["0-9"]),
    ("0-9,3-4", 10, ["0-9"]),
    ("3-4,0-9", 10, ["0-9"]),
    ("0-3,0-3", 10, ["0-3"]),
    ("0-9,0-9", 10, ["0-9"]),
    ("0-0,2-2,1-1", 10, ["0-2"]),
    ("0-0,2-2", 10, ["0-0", "2-2"]),
    ("0-,-1", 10, ["0-9"]),
    # what cannot be satisfied does not count, neither for the order nor for the sum
    ("-0,0-0", 10, ["0-0"]),
    ("0-0,10-,-0", 10, ["0-0"]),
    ("10-,10-,10-,0-0", 10, ["0-0"]),
    # as large as a number gets
    ("0-18446744073709551615", 10, ["0-9"]),
    ("0-9223372036854775807", 10, ["0-9"]),
    ("-18446744073709551616", 10, ["0-9"]),
    ("0-" + "9" * 5000, 10, ["0-9"]),
    ("-" + "9" * 5000, 10, ["0-9"]),
    ("0" * 5000 + "3-" + "0" * 5000 + "4", 10, ["3-4"]),
    ("0-0", 1, ["0-0"]),
    ("-1", 1, ["0-0"]),
    ("9007199254740993-9007199254740993", 1 << 60, ["9007199254740993-9007199254740993"]),
    ("-1", 1 << 60, [f"{(1 << 60) - 1}-{(1 << 60) - 1}"]),
]


@pytest.mark.parametrize("ranges, size, parts", SELECTED)
def test_satisfiable_ranges_become_parts_that_do_not_touch(ranges: str, size: int, parts: list[str]) -> None:
    specs = parse_range(f"bytes={ranges}")
    assert specs is not None
    selected = select_ranges(specs, size)
    assert isinstance(selected, list)
    assert [f"{part.start}-{part.stop - 1}" for part in selected] == parts


@pytest.mark.parametrize(
    "ranges",
    [
        "-0", "10-", "10-20", "50-60,70-80", "10-10", "99999999999999999999-", "9" * 5000 + "-", "-0,-0",
        "18446744073709551615-18446744073709551616", "-000", "10-,-0",
    ],
)  # fmt: skip
def test_where_no_range_is_in_the_file_nothing_is_selected(ranges: str) -> None:
    specs = parse_range(f"bytes={ranges}")
    assert specs is not None
    assert select_ranges(specs, 10) == "unsatisfiable"


@pytest.mark.parametrize(
    "ranges", ["0-,0-,0-", "0-,1-,2-,3-,4-", "0-4,2-6,5-9", "-10,-1,0-0", "0-9,10-,0-0,1-1"], ids=str
)
def test_many_parts_that_sum_to_more_than_the_file_are_the_whole_file(ranges: str) -> None:
    specs = parse_range(f"bytes={ranges}")
    assert specs is not None
    assert select_ranges(specs, 10) == "whole"


@pytest.mark.parametrize("ranges", ["0-0", "0-", "-1", "-0", "5-9", "0-0,-1"])
def test_an_empty_file_is_always_whole(ranges: str) -> None:
    specs = parse_range(f"bytes={ranges}")
    assert specs is not None
    assert select_ranges(specs, 0) == "whole"


def test_more_than_a_hundred_parts_are_ignored_and_a_hundred_are_not() -> None:
    def header(count: int) -> str:
        return "bytes=" + ",".join(f"{2 * n}-{2 * n}" for n in range(count))

    specs = parse_range(header(MAX_PARTS))
    assert MAX_PARTS == 100
    assert specs is not None
    selected = select_ranges(specs, 1000)
    assert isinstance(selected, list)
    assert len(selected) == MAX_PARTS
    assert parse_range(header(MAX_PARTS + 1)) is None


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text",
    ["0", "-", ",", " ", "\t", "0-", "-0", "0-0,", " ,", "1-0,", "9", "0-9", "a", "=", "0 ", "- ", "\x00", "0-0 "],
    ids=repr,
)
@pytest.mark.parametrize("end", ["", "x", "-", "-1"])
def test_a_huge_header_is_decided(text: str, end: str) -> None:
    specs = parse_range("bytes=" + text * (LARGE // len(text)) + end)
    assert specs is None or select_ranges(specs, 10)


@given(st.text() | st.text("bytes=0123456789-, \t").map("bytes={}".format))
def test_no_header_raises(value: str) -> None:
    specs = parse_range(value)
    assert specs is None or 0 < len(specs) <= MAX_PARTS
    for size in (0, 1, 10):
        assert specs is None or select_ranges(specs, size)


positions = st.integers(0, 120)
range_specs = st.one_of(
    st.tuples(positions, positions).map(lambda pair: (min(pair), max(pair))),
    st.tuples(positions, st.none()),
    st.tuples(st.none(), positions),
)


def written(spec: RangeSpec) -> str:
    return "-".join("" if number is None else str(number) for number in spec)


@given(st.lists(range_specs, min_size=1, max_size=MAX_PARTS), st.sampled_from([",", ", ", " ,", ",,", "\t,\t"]))
def test_a_written_list_is_read_back(specs: list[RangeSpec], comma: str) -> None:
    value = "bytes=" + comma.join(map(written, specs))
    assert parse_range(value) == (specs if value.count(",") < MAX_PARTS else None)


def asked_for(spec: RangeSpec, size: int) -> set[int]:
    """The positions of a file that a spec asks for, byte by byte."""
    first, last = spec
    if first is None:
        assert last is not None
        return {n for n in range(size) if n >= size - last}
    return {n for n in range(size) if n >= first and (last is None or n <= last)}


narrow_specs = st.tuples(positions, st.integers(0, 3)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(range_specs | narrow_specs, min_size=1, max_size=12), st.integers(1, 100))
@example([(0, 5), (2, 7)], 10)
@example([(8, 8), (0, 1), (9, 9)], 10)
def test_parts_are_disjoint_in_bounds_in_order_and_exactly_what_is_asked_for(specs: list[RangeSpec], size: int) -> None:
    wanted = [asked_for(spec, size) for spec in specs]
    wanted = [positions for positions in wanted if positions]
    selected = select_ranges(specs, size)
    if not wanted:
        assert selected == "unsatisfiable"
        return
    if len(wanted) > 2 and sum(map(len, wanted)) > size:
        assert selected == "whole"
        return
    assert isinstance(selected, list)
    covered = [set(range(part.start, part.stop)) for part in selected]
    assert set.union(*covered) == set.union(*wanted)
    by_position = sorted(selected, key=lambda part: part.start)
    assert all(before.stop < after.start for before, after in pairwise(by_position))
    first_asked = [min(n for n, positions in enumerate(wanted) if positions <= part) for part in covered]
    assert first_asked == sorted(first_asked)


@given(st.integers(1, 1 << 62), st.integers(0, 1 << 70), st.integers(0, 1 << 70))
def test_numbers_of_any_size_keep_to_the_file(size: int, first: int, count: int) -> None:
    specs = parse_range(f"bytes={first}-{first + count}")
    assert specs is not None
    expected = [ByteRange(first, min(first + count + 1, size))] if first < size else "unsatisfiable"
    assert select_ranges(specs, size) == expected


@pytest.mark.parametrize(
    "parts, reads",
    [
        ([], []),
        ([(0, 1)], [(0, 1)]),
        ([(0, 1), (1, 2)], [(0, 2)]),
        ([(0, 1), (1 + NEAR, 2 + NEAR)], [(0, 2 + NEAR)]),
        ([(0, 1), (2 + NEAR, 3 + NEAR)], [(0, 1), (2 + NEAR, 3 + NEAR)]),
        ([(5, 6), (0, 1)], [(5, 6), (0, 1)]),  # it would have to go back
        ([(0, 1), (2, 3), (4, 5)], [(0, 5)]),
    ],
)
def test_parts_that_follow_each_other_are_one_read(parts: list[tuple[int, int]], reads: list[tuple[int, int]]) -> None:
    assert reads_of([ByteRange(*part) for part in parts]) == [ByteRange(*read) for read in reads]


@pytest.mark.parametrize(
    "wanted, size, read",
    [
        (None, 10 * NEAR, (2, 3)),  # nothing else
        ("bytes=2-2,4-5", None, (2, 3)),  # nobody knows where that is
        ("bytes=2-2,4-5", 10 * NEAR, (2, 6)),
        ("bytes=4-5,2-2", 10 * NEAR, (2, 6)),
        ("bytes=0-0,2-2", 10 * NEAR, (2, 3)),
        (f"bytes=2-2,{5 * NEAR}-", 10 * NEAR, (2, 3)),
        ("bytes=2-2,4-", 3, (2, 3)),
    ],
)
def test_what_is_read_with_a_part(wanted: str | None, size: int | None, read: tuple[int, int]) -> None:
    specs = None if wanted is None else parse_range(wanted)
    assert read_from(ByteRange(2, 3), specs, size) == ByteRange(*read)


def test_the_order_of_the_file() -> None:
    parts = [ByteRange(4, 6), ByteRange(0, 1), ByteRange(2, 3)]
    assert in_order_of_the_file(parts) == [ByteRange(0, 1), ByteRange(2, 3), ByteRange(4, 6)]


CONTENT_RANGES = {
    "bytes 0-4/10": (ByteRange(0, 5), 10),
    "Bytes 9-9/10": (ByteRange(9, 10), 10),
    "bytes 2-3/*": (ByteRange(2, 4), None),
    f"bytes 0-0/{'9' * 18}": (ByteRange(0, 1), 10**18 - 1),
    f"bytes 0-0/{'9' * 19}": None,
    "bytes 5-2/10": None,
    "bytes 5-2/*": None,
    "bytes 0-10/10": None,
    "bytes */10": None,
    "bytes 0-4/10, bytes 5-6/10": None,
    "bytes 0-4": None,
    "items 0-4/10": None,
    "bytes ٣-٥/9": None,
    "": None,
}


@pytest.mark.parametrize(("value", "named"), CONTENT_RANGES.items())
def test_the_part_that_an_answer_names(value: str, named: tuple[ByteRange, int | None] | None) -> None:
    assert parse_content_range(value) == named
