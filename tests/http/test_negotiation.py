"""Accept-Encoding: which precompressed sibling a client takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.negotiation import content_coding, hides_coding, preferred_encodings, preferred_type
from tests.http.asking import LARGE

ALL = ("br", "zstd", "gzip")


@pytest.mark.parametrize(
    "accepted, preferred",
    [
        (None, []),
        ("", []),
        ("gzip", ["gzip"]),
        ("GZip", ["gzip"]),
        ("x-gzip", ["gzip"]),
        ("gzip, deflate, br, zstd", ["br", "zstd", "gzip"]),
        ("deflate, compress", []),
        ("gzip;q=1.0, br;q=0.5", ["gzip", "br"]),
        ("br;q=0.5, zstd;q=0.9, gzip;q=0.7", ["zstd", "gzip", "br"]),
        ("gzip;q=0.001", ["gzip"]),
        ("gzip;Q=0.5", ["gzip"]),
        ("gzip ; q=0.5", ["gzip"]),
        ("\tgzip\t;\tq=0.5\t", ["gzip"]),
        ("gzip;q=1.", ["gzip"]),
        (",, gzip ,,", ["gzip"]),
        # refused
        ("gzip;q=0", []),
        ("gzip;q=0.0", []),
        ("gzip;q=0.000", []),
        ("gzip;q=0, br", ["br"]),
        ("*;q=0", []),
        ("*;q=0, gzip", ["gzip"]),
        # "*" is what is not named
        ("*", ["br", "zstd", "gzip"]),
        ("*, br;q=0", ["zstd", "gzip"]),
        ("gzip, *;q=0.5", ["gzip", "br", "zstd"]),
        ("identity, *;q=0.5", []),
        # the file as it is has a weight, too: its own, or that of "*"
        ("identity", []),
        ("identity;q=1, gzip;q=0.5", []),
        ("gzip;q=0.5, identity;q=0.5", ["gzip"]),
        ("gzip;q=1.0, identity; q=0.5, *;q=0", ["gzip"]),
        ("identity;q=0, gzip;q=0.1", ["gzip"]),
        ("gzip;q=0.1, *;q=0.5", ["br", "zstd"]),
        # RFC 9110 12.5.3's own
        ("compress, gzip", ["gzip"]),
        ("compress;q=0.5, gzip;q=1.0", ["gzip"]),
        # what does not parse is left out, and spoils nothing else
        ("gzip;q=2", []),
        ("gzip;q=1.001", []),
        ("gzip;q=-1", []),
        ("gzip;q=0.1234", []),
        ("gzip;q=.5", []),
        ("gzip;q=", []),
        ("gzip;q=x", []),
        ("gzip;q=nan", []),
        ("gzip;q=٠.٥", []),
        ("gzip;level=9", []),
        ("gzip br", []),
        ("gzip;q=0.5;q=1", []),
        ("gzip;q=inf, br", ["br"]),
        ("gzipped", []),
        ("\xffgzip, br", ["br"]),
    ],
)
def test_encodings_by_weight(accepted: str | None, preferred: list[str]) -> None:
    assert preferred_encodings(accepted, ALL) == preferred


def test_only_what_there_is_can_be_preferred() -> None:
    assert preferred_encodings("br, gzip", ("gzip",)) == ["gzip"]
    assert preferred_encodings("br, gzip", ()) == []


def test_equal_weights_keep_the_order_of_the_source() -> None:
    assert preferred_encodings("gzip, br", ("br", "gzip")) == ["br", "gzip"]
    assert preferred_encodings("gzip, br", ("gzip", "br")) == ["gzip", "br"]


@given(st.text() | st.text("gzipbr,;q=.01* \t"))
def test_no_value_raises_and_each_encoding_comes_at_most_once(value: str) -> None:
    preferred = preferred_encodings(value, ALL)
    assert set(preferred) <= set(ALL)
    assert len(preferred) == len(set(preferred))


weights = st.dictionaries(st.sampled_from([*ALL, "identity", "deflate"]), st.integers(0, 1000))


@given(weights)
def test_the_order_is_that_of_the_weights(weights: dict[str, int]) -> None:
    value = ", ".join(f"{name};q={weight / 1000:.3f}" for name, weight in weights.items())
    preferred = preferred_encodings(value, ALL)
    of_preferred = [weights[name] for name in preferred]
    assert of_preferred == sorted(of_preferred, reverse=True)
    assert set(preferred) == {
        name for name in ALL if weights.get(name, 0) > 0 and weights[name] >= weights.get("identity", 0)
    }


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text", [" ", ",", ";", "a", "gzip,", "gzip;", "*", ";q=", "gzip;q=0.", "q=0", "a ", "\t;"], ids=repr
)
def test_a_huge_value_is_decided(text: str) -> None:
    assert set(preferred_encodings(text * (LARGE // len(text)), ALL)) <= set(ALL)


@pytest.mark.parametrize(
    "value, coding, hides",
    [
        ("gzip", "gzip", False),
        ("GZIP , br", "gzip, br", False),
        ("aws-chunked", None, True),
        ("aws-chunked,gzip", "gzip", True),
        ("gzip, identity", "gzip", True),
        ("UTF-8", None, True),
        ("", None, False),
    ],
)
def test_codings_that_no_client_can_decode(value: str, coding: str | None, hides: bool) -> None:
    assert (content_coding(value), hides_coding(value)) == (coding, hides)


def test_no_content_encoding_hides_nothing() -> None:
    assert not hides_coding(None)


@pytest.mark.parametrize(
    "accept, expected",
    [
        (None, "a/x"),
        ("", "a/x"),
        ("*/*", "a/x"),
        ("b/y", "b/y"),
        ("a/x;q=0.5, b/y", "b/y"),
        ("a/*;q=0.1, b/y;q=0.2", "b/y"),
        ("b/y;q=0", "a/x"),
        ("*/*;q=0.8, a/x;q=0.1", "b/y"),
        ("b/y;charset=utf-8", "b/y"),
        ("b/y;q=2", "a/x"),
        (";;,,q=1", "a/x"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "a/x"),
    ],
)
def test_the_preferred_type(accept: str | None, expected: str) -> None:
    assert preferred_type(accept, ("a/x", "b/y")) == expected
