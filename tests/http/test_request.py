"""`DownloadRequest`: from the raw headers of an ASGI scope."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.conditional import failed_precondition, range_applies
from downloadview_async.http.request import GET, HEAD, DownloadRequest
from tests.http.asking import FILE, answer


def test_a_request_without_such_fields_says_nothing() -> None:
    raw = [(b"host", b"example.org"), (b"x-range", b"bytes=0-1"), (b"x-sendfile-type", b"X-Accel-Redirect")]
    assert DownloadRequest.from_headers("GET", raw) == GET


def test_every_field_is_read() -> None:
    raw = [
        (b"if-match", b'"1"'),
        (b"if-unmodified-since", b"2"),
        (b"if-none-match", b'"3"'),
        (b"if-modified-since", b"4"),
        (b"if-range", b"5"),
        (b"range", b" bytes=0-1\t"),
        (b"accept-encoding", b"br"),
    ]
    assert DownloadRequest.from_headers("HEAD", raw) == DownloadRequest(
        method="HEAD",
        if_match='"1"',
        if_unmodified_since="2",
        if_none_match='"3"',
        if_modified_since="4",
        if_range="5",
        range="bytes=0-1",
        accept_encoding="br",
    )


@pytest.mark.parametrize("name, field", [("if-match", "if_match"), ("if-none-match", "if_none_match")])
def test_lists_in_several_fields_are_one_list(name: str, field: str) -> None:
    raw = [(name.encode(), value) for value in (b'"a"', b"", b'W/"b", "c"')]
    assert getattr(DownloadRequest.from_headers("GET", raw), field) == '"a", , W/"b", "c"'


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", ["range", "if-range", "if-modified-since", "if-unmodified-since"])
def test_a_field_that_comes_twice_and_may_not_is_no_value(name: str, times: int) -> None:
    raw = [(name.encode(), b"bytes=0-1")] * times
    assert getattr(DownloadRequest.from_headers("GET", raw), name.replace("-", "_")) == ""


def test_two_range_fields_are_ignored() -> None:
    assert answer([("Range", "bytes=0-1"), ("Range", "bytes=0-1")]).status == 200


@pytest.mark.parametrize(
    "name", ["if_match", "if_unmodified_since", "if_none_match", "if_modified_since", "range", "if_range"]
)
def test_what_makes_a_request_conditional(name: str) -> None:
    fields = {name: ""}
    # If-Range without Range means nothing [13.1.5]
    assert DownloadRequest(**fields).unconditional is (name == "if_range")


def test_an_encoding_is_no_condition() -> None:
    assert GET.unconditional
    assert HEAD.unconditional
    assert DownloadRequest(accept_encoding="br").unconditional


names = st.sampled_from(
    [b"if-match", b"if-none-match", b"if-range", b"range", b"if-modified-since", b"if-unmodified-since", b"host"]
)


@given(st.lists(st.tuples(names | st.binary(), st.binary())))
def test_no_headers_raise_here_or_where_they_are_used(raw: list[tuple[bytes, bytes]]) -> None:
    asked = DownloadRequest.from_headers("GET", raw)
    assert failed_precondition(asked, FILE) in (None, 304, 412)
    assert range_applies(asked, FILE) in (True, False)
