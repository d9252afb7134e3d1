"""What a completed download is: spans, layers and sessions, as tables and against a model that counts each byte."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import downloadview_async as dv
from downloadview_async.accounts.completion import MAX_LAYERS, MAX_LOOSE, MAX_SPANS, Session, Span, delivered

SIZE = 40


def outcome(**changes: Any) -> dv.Outcome:
    """Return the outcome of a whole file of 100 bytes, with some changes."""
    values: dict[str, Any] = {
        "request_id": "1",
        "time": 1_700_000_000.0,
        "method": "GET",
        "path": "/files/a.bin",
        "http_version": "1.1",
        "client": "192.0.2.7",
        "route": "/files/{path:path}",
        "source": "files",
        "name": "a.bin",
        "etag": '"1"',
        "size": 100,
        "status": 200,
        "kind": "zero-copy",
        "spans": (dv.ByteRange(0, 100),),
        "sent": 100,
        "result": "completed",
        "headers": ((b"user-agent", b"curl"),),
    }
    return dv.Outcome(**{**values, **changes})


WHOLE = ((0, 100),)
AFTER_A_CUT = {"result": "aborted", "reason": "client-left"}
TWO = (dv.ByteRange(0, 10), dv.ByteRange(50, 60))

DELIVERED = {
    "whole": ({}, True, WHOLE),
    "whole, as a range": ({"status": 206}, True, WHOLE),
    "a part": ({"status": 206, "spans": (dv.ByteRange(10, 20),), "sent": 10}, False, ((10, 20),)),
    "cut": ({"sent": 60, **AFTER_A_CUT}, False, ((0, 60),)),
    "cut at the end": ({"sent": 100, **AFTER_A_CUT}, False, WHOLE),
    "a part that was cut": (
        {"status": 206, "spans": (dv.ByteRange(10, 20),), "sent": 3, **AFTER_A_CUT},
        False,
        ((10, 13),),
    ),
    "parts": ({"status": 206, "spans": TWO, "sent": 300}, False, ((0, 10), (50, 60))),
    "unknown size": ({"size": None, "spans": (None,)}, True, ()),
    "a file of another package": ({"kind": "other", "source": None, "name": None}, True, WHOLE),
    "empty file": ({"size": 0, "spans": (), "sent": 0, "kind": "empty"}, True, ()),
    "a redirect": (
        {
            "kind": "redirected",
            "status": 307,
            "spans": (),
            "sent": 0,
            "result": "delegated",
            "delegated_to": "location",
        },
        False,
        (),
    ),
    "delegated": ({"spans": (), "sent": 0, "result": "delegated", "delegated_to": "x-accel-redirect"}, False, ()),
}
NOT_DELIVERED = {
    "HEAD": {"method": "HEAD", "spans": (), "sent": 0, "kind": "empty"},
    "304": {"status": 304, "spans": (), "sent": 0, "kind": "empty", "result": "not-modified"},
    "416": {"status": 416, "spans": (), "kind": "error", "result": "refused"},
    "404": {"status": 404, "spans": (), "kind": "error", "result": "refused", "size": None},
    "a listing": {"kind": "listing", "spans": (), "size": None},
    "another answer of the application": {"kind": "other", "spans": (), "size": None, "etag": None},
    "an empty one": {"kind": "other", "spans": (), "size": 0, "etag": None},
    "a page of another package": {"kind": "other", "etag": 'W/"1"'},
    "the form for a link": {"kind": "share"},
    "cut before the first byte": {"sent": 0, **AFTER_A_CUT},
    "parts that were cut": {"status": 206, "spans": TWO, "sent": 200, "unacknowledged": 9, **AFTER_A_CUT},
    "unknown size, cut": {"size": None, "spans": (None,), "unacknowledged": 9, **AFTER_A_CUT},
    "a redirect to HEAD": {"method": "HEAD", "kind": "redirected", "status": 307, "spans": (), "result": "delegated"},
    "a page elsewhere": {"kind": "other", "status": 307, "spans": ()},
}


A_RANGE = {"status": 206, "spans": (dv.ByteRange(10, 20),)}
LOOSE = {
    "nothing": ({"sent": 60, **AFTER_A_CUT}, ((0, 60),), None),
    "some bytes": ({"sent": 60, "unacknowledged": 9, **AFTER_A_CUT}, ((0, 60),), (60, 69)),
    "no more than the file has": ({"sent": 60, "unacknowledged": 90, **AFTER_A_CUT}, ((0, 60),), (60, 100)),
    "no more than the range has": ({"sent": 3, "unacknowledged": 9, **A_RANGE, **AFTER_A_CUT}, ((10, 13),), (13, 20)),
    "all that was sent": ({"sent": 0, "unacknowledged": 4, **A_RANGE, **AFTER_A_CUT}, (), (10, 14)),
}


@pytest.mark.parametrize(("changes", "spans", "loose"), LOOSE.values(), ids=LOOSE)
def test_what_a_client_may_have_besides(changes: dict[str, Any], spans: tuple[Span, ...], loose: Span | None) -> None:
    part = delivered(outcome(**changes))
    assert part is not None
    assert (part.spans, part.loose) == (spans, loose)


@pytest.mark.parametrize(("changes", "is_whole", "spans"), DELIVERED.values(), ids=DELIVERED)
def test_what_an_answer_delivers(changes: dict[str, Any], is_whole: bool, spans: tuple[Span, ...]) -> None:
    part = delivered(outcome(**changes))
    assert part is not None
    assert (part.is_whole, part.spans) == (is_whole, spans)
    assert part.by == changes.get("delegated_to", "")


@pytest.mark.parametrize("changes", NOT_DELIVERED.values(), ids=NOT_DELIVERED)
def test_answers_without_bytes_of_a_file(changes: dict[str, Any]) -> None:
    assert delivered(outcome(**changes)) is None


SAME = {
    "another route": {"route": "/other/{path:path}", "path": "/other/a.bin"},
    "another time": {"time": 1_700_100_000.0},
    "another address of a user": ({"user": "ada"}, {"user": "ada", "client": "198.51.100.1", "headers": ()}),
    "another program with the same link": ({"link_id": "L"}, {"link_id": "L", "headers": ()}),
    "another spelling of the path": ({"source": None}, {"source": None, "path": "//files/./a.bin"}),
    "another address in the same /64": ({"client": "2001:db8::1"}, {"client": "2001:db8::2"}),
}
OTHER = {
    "another file": {"name": "b.bin"},
    "another source": {"source": "other"},
    "another version": {"etag": '"2"'},
    "another size": {"size": 101},
    "another client": {"client": "192.0.2.8"},
    "another program at the same address": {"headers": ((b"user-agent", b"wget"),)},
    "a user": {"user": "ada"},
    "another client with the same link": ({"link_id": "L"}, {"link_id": "L", "client": "192.0.2.8"}),
    "no version, and another path": ({"source": None}, {"source": None, "path": "/files/b.bin"}),
}


def session_of(changes: dict[str, Any]) -> str:
    part = delivered(outcome(**changes))
    assert part is not None
    return part.session


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_the_same_session(pair: Any) -> None:
    first, second = pair if isinstance(pair, tuple) else ({}, pair)
    assert session_of(first) == session_of(second)


@pytest.mark.parametrize("pair", OTHER.values(), ids=OTHER)
def test_another_session(pair: Any) -> None:
    first, second = pair if isinstance(pair, tuple) else ({}, pair)
    assert session_of(first) != session_of(second)


def test_texts_that_a_database_refuses_are_escaped_and_cut() -> None:
    part = delivered(outcome(name="a\0\udce9" + "b" * 5000, user="\0"))
    assert part is not None
    assert part.file.startswith("a\\x00\\udce9bbb")
    assert len(part.file) < 1100
    assert part.user == "\\x00"


def downloads(*parts: Span, size: int = SIZE, min_share: float = 1.0) -> int:
    """Return how many downloads some spans make, one after the other."""
    session, total = Session(), 0
    for span in parts:
        count, session = session.after((span,), size, min_share)
        total += count
    return total


SESSIONS = {
    "in one piece": ([(0, 40)], 1),
    "in two pieces": ([(0, 20), (20, 40)], 1),
    "the end first": ([(20, 40), (0, 20)], 1),
    "with an overlap": ([(0, 25), (15, 40)], 1),
    "without the last byte": ([(0, 39)], 0),
    "without the first byte": ([(1, 40)], 0),
    "without a byte in the middle": ([(0, 19), (20, 40)], 0),
    "the first bytes, again and again": ([(0, 10)] * 100, 0),
    "twice": ([(0, 40)] * 2, 2),
    "two clients that look the same, in turns": ([(0, 20), (0, 20), (20, 40), (20, 40)], 2),
    "one whole and a half": ([(0, 20), (0, 40)], 1),
    "a player that seeks": ([(0, 12), (30, 40), (8, 31), (8, 31)], 1),
}


@pytest.mark.parametrize(("parts", "expected"), SESSIONS.values(), ids=SESSIONS)
def test_a_session(parts: list[Span], expected: int) -> None:
    assert downloads(*parts) == expected


Cut = tuple[int, int, int]
"""An answer that was reset: where it begins, and where its acknowledged and its passed-on bytes end."""


def downloads_after_cuts(*parts: Span | Cut, size: int = SIZE) -> int:
    """Return how many downloads some answers make, one after the other."""
    session, total = Session(), 0
    for start, stop, *passed_on in parts:
        loose = (stop, passed_on[0]) if passed_on else None
        count, session = session.after(((start, stop),) if start < stop else (), size, loose=loose)
        total += count
    return total


CUT: dict[str, tuple[list[Span | Cut], int]] = {
    "the client resumes where it is": ([(0, 20, 30), (25, 40)], 1),
    "at the end of what was passed on": ([(0, 20, 30), (30, 40)], 1),
    "at the end of what was acknowledged": ([(0, 20, 30), (20, 40)], 1),
    "behind what was passed on": ([(0, 20, 30), (31, 40)], 0),
    "it is cut again and again": ([(0, 10, 15), (12, 20, 30), (29, 30, 36), (35, 40)], 1),
    "nothing was acknowledged": ([(0, 10, 15), (12, 12, 30), (29, 40)], 1),
    "nothing at all": ([(0, 0, 15), (12, 40)], 1),
    "the client does not resume": ([(0, 20, 40)], 0),
    "it ends before the file does": ([(0, 20, 30), (25, 39)], 0),
    "the resumed part is written first": ([(25, 40), (0, 20, 30)], 1),
    "the resumed part, written first, was cut": ([(25, 30, 36), (0, 20, 30), (33, 40)], 1),
    "the next piece of another connection is written first": ([(30, 40), (0, 20, 30)], 0),
    "each confirms once": ([(0, 20, 30), (25, 40), (0, 20), (25, 40)], 1),
    "two that look the same, in turns": ([(0, 20, 30), (0, 25, 35), (22, 40), (33, 40)], 2),
    "in the other turns": ([(0, 20, 30), (0, 25, 35), (33, 40), (22, 40)], 2),
    "two that look the same, and do not resume": ([(0, 20, 30), (0, 25, 35)], 0),
    "a new beginning": ([(0, 20, 30), (0, 40)], 1),
    "the last byte is not acknowledged": ([(0, 39, 40)], 0),
}


@pytest.mark.parametrize(("parts", "expected"), CUT.values(), ids=CUT)
def test_answers_that_were_reset(parts: list[Span | Cut], expected: int) -> None:
    assert downloads_after_cuts(*parts) == expected


def cuts_of(positions: list[int], before: list[int], behind: list[int]) -> list[Span | Cut]:
    """Return the parts of a client that resumes at some positions, of which the last one is the end of the file.

    before: how many bytes it has at each that were not acknowledged. behind: how many were passed on that it lacks.
    """
    starts, parts = [0, *positions], list[Span | Cut]()
    for start, stop, less, more in zip(starts[:-1], positions, before, behind, strict=False):
        parts.append((start, max(start + 1, stop - less), min(SIZE, stop + more)))
    return [*parts[:-1], (starts[-2], SIZE)]


counts = st.lists(st.integers(1, 9), min_size=12, max_size=12)


@given(st.sets(st.integers(2, SIZE - 1), max_size=9), counts, counts, st.randoms(use_true_random=False))
def test_a_client_that_is_cut_counts_once_in_any_order(
    positions: set[int], before: list[int], behind: list[int], chance: Any
) -> None:
    parts = cuts_of([*sorted(positions), SIZE], before, behind)
    assert downloads_after_cuts(*parts) == 1
    abandoned = parts[:-1]
    assert downloads_after_cuts(*abandoned) == 0
    chance.shuffle(abandoned)
    assert downloads_after_cuts(*abandoned) == 0
    chance.shuffle(parts)
    assert downloads_after_cuts(*parts) == 1


SHARES = {
    "enough": ([(0, 36)], 0.9, 1),
    "not enough": ([(0, 35)], 0.9, 0),
    "the rest is not another download": ([(0, 36), (36, 40)], 0.9, 1),
    "nor is it for a small share": ([(0, 20), (20, 40)], 0.5, 1),
    "twice": ([(0, 36), (0, 36)], 0.9, 2),
    "whole after a part that counted": ([(0, 36), (0, 40)], 0.9, 2),
}


@pytest.mark.parametrize(("parts", "share", "expected"), SHARES.values(), ids=SHARES)
def test_a_share_of_a_file(parts: list[Span], share: float, expected: int) -> None:
    assert downloads(*parts, min_share=share) == expected


spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(spans, max_size=25), st.sampled_from([1.0, 0.9, 0.5, 0.01]))
def test_it_is_how_often_each_byte_was_delivered(parts: list[Span], share: float) -> None:
    depth = [0] * SIZE
    for start, stop in parts:
        for position in range(start, stop):
            depth[position] += 1
    often = range(1, len(parts) + 1)
    expected = sum(sum(count >= times for count in depth) >= share * SIZE for times in often)
    assert downloads(*parts, min_share=share) == expected


@given(st.lists(spans, max_size=25), st.randoms(use_true_random=False))
def test_the_order_and_the_batches_do_not_matter(parts: list[Span], chance: Any) -> None:
    mixed = list(parts)
    chance.shuffle(mixed)
    at_once, session = Session().after(tuple(mixed), SIZE)
    assert at_once == downloads(*parts)
    for layer in session.layers:
        assert all(first[1] < second[0] for first, second in itertools.pairwise(layer))
        assert all(start < stop for start, stop in layer)


def test_a_session_is_bounded() -> None:
    session = Session()
    for start in range(0, 4 * MAX_SPANS, 2):
        _, session = session.after(((start, start + 1),), 10 * MAX_SPANS)
    for _ in range(2 * MAX_LAYERS):
        _, session = session.after(((2000, 2001),), 10 * MAX_SPANS)
    assert len(session.layers) == MAX_LAYERS
    assert max(map(len, session.layers)) == MAX_SPANS
    ends = [(start, start + 1) for start in range(0, 100, 2)]
    for loose in ends:
        _, session = session.after((), 10 * MAX_SPANS, loose=loose)
    assert session.loose == tuple(ends[-MAX_LOOSE:])
    assert replace(session, layers=(), loose=()).after(((0, 5),), 5) == (1, Session())
