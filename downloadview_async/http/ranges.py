"""Range and Content-Range, RFC 9110 section 14: text in, byte ranges of a file out."""

import re
from typing import Literal

from downloadview_async.http.metadata import ByteRange

MAX_PARTS = 100
"""A Range with more parts than this is ignored: "a server [...] MAY ignore [...] many small ranges" [14.2]."""

NEAR = 256 * 1024
"""Bytes: reading over a gap this small costs less than another read of a remote file."""

_SPEC = re.compile("([0-9]*)-([0-9]*)")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.IGNORECASE)
_HUGE = 1 << 63  # no file is so long; once first and last are compared, larger numbers mean the same

RangeSpec = tuple[int | None, int | None]
"""(first, last), (first, None) for "from first on", or (None, length) for "the last length bytes"."""


def _number(digits: str) -> int | None:
    # int() must not get an unbounded number of digits: it refuses more than 4300, and takes quadratic time before.
    if not digits:
        return None
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) < 19 else _HUGE


def parse_range(value: str) -> list[RangeSpec] | None:
    """Return the range-specs of a Range header, or None if the header must be ignored.

    "A recipient [...] MUST ignore" a header that does not parse [14.2], so this never raises. It returns None for an
    unknown unit, a bad number, a last position before the first, and more than `MAX_PARTS` parts.
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
        # compared by their digits, as `_number` returns the same for all huge numbers
        if first is not None and last is not None and (len(digits[1]), digits[1]) < (len(digits[0]), digits[0]):
            return None
        specs.append((first, last))
    return specs or None


def parse_content_range(value: str) -> tuple[ByteRange, int | None] | None:
    """Return the part and the size that the Content-Range of an answer names, or None if it does not parse.

    The size is None for `*`, which stands for an unknown one.
    """
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None:
        return None
    first, last, size = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
    return (ByteRange(first, last + 1), size) if first <= last and (size is None or last < size) else None


def select_ranges(specs: list[RangeSpec], size: int) -> list[ByteRange] | Literal["whole", "unsatisfiable"]:
    """Return the parts of a file of `size` bytes that `specs` ask for, or why there are none.

    Overlapping and adjacent parts are merged; the order is that of the request [15.3.7.2]. An empty file is always
    sent "whole", as a Content-Range cannot name a position in it. A file is also sent "whole" if more than two parts
    together are longer than the file: only an attack asks for that [14.2, 17.15].
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
    """Join parts that overlap or touch. A joined part takes the place of the first of its pieces in the request."""
    merged: list[tuple[int, ByteRange]] = []
    for index, part in sorted(enumerate(ranges), key=lambda item: item[1].start):
        if merged and part.start <= merged[-1][1].stop:
            position, before = merged.pop()
            merged.append((min(position, index), ByteRange(before.start, max(before.stop, part.stop))))
        else:
            merged.append((index, part))
    return [part for _, part in sorted(merged, key=lambda item: item[0])]


def reads_of(parts: list[ByteRange]) -> list[ByteRange]:
    """Return the spans to read for some parts, in their order. A part within `NEAR` of the one before is read with it.

    The parts do not overlap.
    """
    reads: list[ByteRange] = []
    for part in parts:
        if reads and 0 <= part.start - reads[-1].stop <= NEAR:
            part = ByteRange(reads.pop().start, part.stop)
        reads.append(part)
    return reads


def read_from(span: ByteRange, specs: list[RangeSpec] | None, size: int | None) -> ByteRange:
    """Return the span, extended by the other requested parts of a file of `size` bytes that soon follow it.

    One read then gets them all. specs: all requested parts, or None if there are no others.
    """
    parts = select_ranges(specs, size) if specs is not None and size is not None else "whole"
    if isinstance(parts, str):
        return span
    following = [part for part in in_order_of_the_file(parts) if part.start >= span.stop]
    return reads_of([span, *following])[0]


def in_order_of_the_file(parts: list[ByteRange]) -> list[ByteRange]:
    """Return the parts sorted by where they begin."""
    return sorted(parts, key=lambda part: part.start)
