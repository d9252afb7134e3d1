"""The Range header, RFC 9110 section 14: text in, byte ranges of a file out."""

import re
from typing import Literal

from downloadview_async.http.metadata import ByteRange

MAX_PARTS = 100
"""A Range of more parts than this is ignored: "a server [...] MAY ignore [...] many small ranges" [14.2]."""

NEAR = 256 * 1024
"""Bytes: to read over a gap this small costs less than another read of a file that is far away."""

_SPEC = re.compile("([0-9]*)-([0-9]*)")
_HUGE = 1 << 63  # no file reaches it; larger numbers mean the same once first and last have been compared

RangeSpec = tuple[int | None, int | None]
"""(first, last), (first, None) for "from first on", or (None, length) for "the last length bytes"."""


def _number(digits: str) -> int | None:
    # int() is never given unbounded digits: it refuses more than 4300 of them and is quadratic before that.
    if not digits:
        return None
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) < 19 else _HUGE


def parse_range(value: str) -> list[RangeSpec] | None:
    """Return the range-specs of a Range header, or None where the header is to be ignored.

    "A recipient [...] MUST ignore" what does not parse [14.2], so nothing here raises: an unknown unit, a bad
    number, a last position before the first, or more than `MAX_PARTS` parts are all None.
    """
    if value[:6].lower() != "bytes=" or value.count(",") >= MAX_PARTS:
        return None
    specs: list[RangeSpec] = []
    for element in value[6:].split(","):
        element = element.strip(" \t")
        if not element:
            continue  # "a recipient MUST parse and ignore a reasonable number of empty list elements" [5.6.1.2]
        match = _SPEC.fullmatch(element)
        if match is None:
            return None
        digits = match[1].lstrip("0"), match[2].lstrip("0")
        first, last = _number(match[1]), _number(match[2])
        if first is None and last is None:
            return None
        # by the digits, since all huge numbers are one
        if first is not None and last is not None and (len(digits[1]), digits[1]) < (len(digits[0]), digits[0]):
            return None
        specs.append((first, last))
    return specs or None


def select_ranges(specs: list[RangeSpec], size: int) -> list[ByteRange] | Literal["whole", "unsatisfiable"]:
    """Return the parts of a file of `size` bytes that `specs` ask for, or why there are none.

    Overlapping and adjacent parts are merged; the order is that of the request [15.3.7.2]. An empty file is always
    sent "whole": there is no position in it that a Content-Range could name. So is a file of which more than two
    parts are asked that sum up to more than all of it, which only an attack does [14.2, 17.15].
    """
    if size == 0:
        return "whole"
    wanted: list[ByteRange] = []
    for first, last in specs:
        if first is None:
            assert last is not None
            start, stop = max(size - last, 0), size
        else:
            start, stop = first, size if last is None else min(last + 1, size)
        if start < stop:
            wanted.append(ByteRange(start, stop))
    if not wanted:
        return "unsatisfiable"
    if len(wanted) > 2 and sum(map(len, wanted)) > size:
        return "whole"
    return wanted if len(wanted) == 1 else _merge(wanted)


def _merge(ranges: list[ByteRange]) -> list[ByteRange]:
    """Join what overlaps or touches. A joined part stands where the first of its pieces was asked for."""
    merged: list[tuple[int, ByteRange]] = []
    for index, part in sorted(enumerate(ranges), key=lambda item: item[1].start):
        if merged and part.start <= merged[-1][1].stop:
            position, before = merged.pop()
            merged.append((min(position, index), ByteRange(before.start, max(before.stop, part.stop))))
        else:
            merged.append((index, part))
    return [part for _, part in sorted(merged, key=lambda item: item[0])]


def reads_of(parts: list[ByteRange]) -> list[ByteRange]:
    """Return the spans to read for some parts, in their order: a part that soon follows the one before is read with it.

    The parts do not overlap.
    """
    reads: list[ByteRange] = []
    for part in parts:
        if reads and 0 <= part.start - reads[-1].stop <= NEAR:
            part = ByteRange(reads.pop().start, part.stop)
        reads.append(part)
    return reads


def read_from(span: ByteRange, specs: list[RangeSpec] | None, size: int | None) -> ByteRange:
    """Return the span with those parts of a file of `size` bytes that are wanted as well and soon follow it.

    Whoever reads all of that at once has them too. specs: what is wanted, or None: nothing else.
    """
    parts = select_ranges(specs, size) if specs is not None and size is not None else "whole"
    if isinstance(parts, str):
        return span
    following = [part for part in in_order_of_the_file(parts) if part.start >= span.stop]
    return reads_of([span, *following])[0]


def in_order_of_the_file(parts: list[ByteRange]) -> list[ByteRange]:
    """Return the parts sorted by where they begin."""
    return sorted(parts, key=lambda part: part.start)
