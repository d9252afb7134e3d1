"""Preconditions and If-Range, in the order of RFC 9110 section 13.2.2."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.conditional import failed_precondition, parse_etag_list, range_applies
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.request import DownloadRequest
from tests.http.asking import BARE, EARLIER, FILE, LARGE, LATER, MODIFIED, Fields, request

WEAK = FileMetadata(size=10, etag=ETag("v1", weak=True), last_modified=FILE.last_modified)
COMMA = FileMetadata(size=10, etag=ETag("a,b"))

STATUS: list[tuple[str, Fields, FileMetadata, int | None]] = [
    ("no condition", [], FILE, None),
    # 1. If-Match, strong comparison
    ("If-Match: equal", [("If-Match", '"v1"')], FILE, None),
    ("If-Match: other", [("If-Match", '"v2"')], FILE, 412),
    ("If-Match: *", [("If-Match", "*")], FILE, None),
    ("If-Match: * with blanks", [("If-Match", " * ")], FILE, None),
    ("If-Match: * without a tag", [("If-Match", "*")], BARE, None),
    ("If-Match: a tag where the file has none", [("If-Match", '"v1"')], BARE, 412),
    ("If-Match: weak in the request", [("If-Match", 'W/"v1"')], FILE, 412),
    ("If-Match: weak file, strong request", [("If-Match", '"v1"')], WEAK, 412),
    ("If-Match: both weak", [("If-Match", 'W/"v1"')], WEAK, 412),
    ("If-Match: in a list", [("If-Match", '"v0", "v1" ,"v2"')], FILE, None),
    ("If-Match: not in the list", [("If-Match", '"v0", W/"v1", "v2"')], FILE, 412),
    ("If-Match: in the second field", [("If-Match", '"v0"'), ("If-Match", '"v1"')], FILE, None),
    ("If-Match: comma inside", [("If-Match", '"a,b"')], COMMA, None),
    ("If-Match: comma inside is no two tags", [("If-Match", '"a","b"')], COMMA, 412),
    ("If-Match: unquoted", [("If-Match", "v1")], FILE, 412),
    ("If-Match: empty", [("If-Match", "")], FILE, 412),
    ("If-Match: other case", [("If-Match", '"V1"')], FILE, 412),
    ("If-Match: w/ in lower case", [("If-Match", 'w/"v1"')], FILE, 412),
    ("If-Match: prefix", [("If-Match", '"v"')], FILE, 412),
    ("If-Match: * in a list is no *", [("If-Match", '*, "v2"')], FILE, 412),
    ("If-Match: quoted star", [("If-Match", '"*"')], FILE, 412),
    # 2. else If-Unmodified-Since
    ("If-Unmodified-Since: same second", [("If-Unmodified-Since", MODIFIED)], FILE, None),
    ("If-Unmodified-Since: later", [("If-Unmodified-Since", LATER)], FILE, None),
    ("If-Unmodified-Since: earlier", [("If-Unmodified-Since", EARLIER)], FILE, 412),
    ("If-Unmodified-Since: no date", [("If-Unmodified-Since", "yesterday")], FILE, None),
    ("If-Unmodified-Since: twice", [("If-Unmodified-Since", EARLIER)] * 2, FILE, None),
    ("If-Unmodified-Since: file without a date", [("If-Unmodified-Since", EARLIER)], BARE, None),
    ("If-Unmodified-Since: RFC 850", [("If-Unmodified-Since", "Monday, 25-Dec-23 11:59:59 GMT")], FILE, 412),
    ("If-Match wins (true)", [("If-Match", '"v1"'), ("If-Unmodified-Since", EARLIER)], FILE, None),
    ("If-Match wins (false)", [("If-Match", '"v2"'), ("If-Unmodified-Since", LATER)], FILE, 412),
    # 3. If-None-Match, weak comparison
    ("If-None-Match: equal", [("If-None-Match", '"v1"')], FILE, 304),
    ("If-None-Match: other", [("If-None-Match", '"v2"')], FILE, None),
    ("If-None-Match: *", [("If-None-Match", "*")], FILE, 304),
    ("If-None-Match: * without a tag", [("If-None-Match", "*")], BARE, 304),
    ("If-None-Match: a tag where the file has none", [("If-None-Match", '"v1"')], BARE, None),
    ("If-None-Match: weak in the request", [("If-None-Match", 'W/"v1"')], FILE, 304),
    ("If-None-Match: weak file", [("If-None-Match", '"v1"')], WEAK, 304),
    ("If-None-Match: both weak", [("If-None-Match", 'W/"v1"')], WEAK, 304),
    ("If-None-Match: in a list", [("If-None-Match", '"v0",W/"v1"')], FILE, 304),
    ("If-None-Match: empty elements", [("If-None-Match", ',, "v0",\t, "v1" ,')], FILE, 304),
    ("If-None-Match: in the second field", [("If-None-Match", '"v0"'), ("If-None-Match", '"v1"')], FILE, 304),
    ("If-None-Match: comma inside", [("If-None-Match", '"x", "a,b"')], COMMA, 304),
    ("If-None-Match: half of a comma inside", [("If-None-Match", '"a", "b"')], COMMA, None),
    ("If-None-Match: unquoted", [("If-None-Match", "v1")], FILE, None),
    ("If-None-Match: half quoted", [("If-None-Match", '"v1')], FILE, None),
    ("If-None-Match: no comma between", [("If-None-Match", '"v1" "v2"')], FILE, None),
    ("If-None-Match: empty", [("If-None-Match", "")], FILE, None),
    ("If-None-Match: the tag a proxy has changed", [("If-None-Match", '"v1-gzip"')], FILE, None),
    # 4. else If-Modified-Since
    ("If-Modified-Since: same second", [("If-Modified-Since", MODIFIED)], FILE, 304),
    ("If-Modified-Since: later", [("If-Modified-Since", LATER)], FILE, 304),
    ("If-Modified-Since: earlier", [("If-Modified-Since", EARLIER)], FILE, None),
    ("If-Modified-Since: no date", [("If-Modified-Since", "0")], FILE, None),
    ("If-Modified-Since: with a length", [("If-Modified-Since", f"{MODIFIED}; length=10")], FILE, None),
    ("If-Modified-Since: twice", [("If-Modified-Since", LATER)] * 2, FILE, None),
    ("If-Modified-Since: file without a date", [("If-Modified-Since", LATER)], BARE, None),
    ("If-Modified-Since: asctime", [("If-Modified-Since", "Mon Dec 25 12:00:00 2023")], FILE, 304),
    ("If-Modified-Since: year 1", [("If-Modified-Since", "Mon, 01 Jan 0001 00:00:00 GMT")], FILE, None),
    ("If-None-Match wins (false)", [("If-None-Match", '"v2"'), ("If-Modified-Since", LATER)], FILE, None),
    ("If-None-Match wins (true)", [("If-None-Match", '"v1"'), ("If-Modified-Since", EARLIER)], FILE, 304),
    ("If-None-Match wins even unparsed", [("If-None-Match", "?"), ("If-Modified-Since", LATER)], FILE, None),
    # the order
    ("412 before 304", [("If-None-Match", '"v1"'), ("If-Match", '"v2"')], FILE, 412),
    ("If-Match true, then 304", [("If-Match", '"v1"'), ("If-None-Match", '"v1"')], FILE, 304),
    ("If-Match true, then If-Modified-Since", [("If-Match", "*"), ("If-Modified-Since", MODIFIED)], FILE, 304),
    ("If-Unmodified-Since true, then 304", [("If-Unmodified-Since", LATER), ("If-None-Match", '"v1"')], FILE, 304),
    ("both dates, older", [("If-Unmodified-Since", EARLIER), ("If-Modified-Since", MODIFIED)], FILE, 412),
    ("both dates, same", [("If-Unmodified-Since", MODIFIED), ("If-Modified-Since", MODIFIED)], FILE, 304),
    ("If-Range is none of them", [("If-Range", '"v2"')], FILE, None),
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("fields, metadata, status", [pytest.param(*row[1:], id=row[0]) for row in STATUS])
def test_preconditions(fields: Fields, metadata: FileMetadata, status: int | None, method: str) -> None:
    assert failed_precondition(request(fields, method), metadata) == status


@pytest.mark.parametrize(
    "value, metadata, applies",
    [
        pytest.param(None, FILE, True, id="absent"),
        pytest.param('"v1"', FILE, True, id="the tag"),
        pytest.param('"v2"', FILE, False, id="another tag"),
        pytest.param('W/"v1"', FILE, False, id="a weak tag of a strong file"),
        pytest.param('W/"v1"', WEAK, False, id="a weak tag of a weak file"),
        pytest.param('"v1"', WEAK, False, id="a strong tag of a weak file"),
        pytest.param('"v1"', BARE, False, id="a tag where the file has none"),
        pytest.param('"v1", "v2"', FILE, False, id="a list"),
        pytest.param("*", FILE, False, id="a star"),
        pytest.param("v1", FILE, False, id="an unquoted tag"),
        pytest.param("", FILE, False, id="nothing"),
        pytest.param(MODIFIED, FILE, True, id="the date"),
        pytest.param("Mon Dec 25 12:00:00 2023", FILE, True, id="the date in another format"),
        pytest.param(EARLIER, FILE, False, id="an earlier date"),
        pytest.param(LATER, FILE, False, id="a later date"),
        pytest.param(MODIFIED, BARE, False, id="a date where the file has none"),
        pytest.param("tomorrow", FILE, False, id="no date"),
        pytest.param("tomorrow", BARE, False, id="no date where the file has none"),
    ],
)
def test_if_range_takes_only_what_names_exactly_this_version(
    value: str | None, metadata: FileMetadata, applies: bool
) -> None:
    assert range_applies(DownloadRequest(range="bytes=0-1", if_range=value), metadata) is applies


@pytest.mark.parametrize("field", ['"v1"', MODIFIED])
def test_two_if_range_fields_match_nothing(field: str) -> None:
    assert not range_applies(request([("If-Range", field), ("If-Range", field)]), FILE)


@pytest.mark.parametrize(
    "value, tags",
    [
        ('"xyzzy"', ['"xyzzy"']),
        ('"xyzzy", "r2d2xxxx", "c3piozzzz"', ['"xyzzy"', '"r2d2xxxx"', '"c3piozzzz"']),
        ('W/"xyzzy", W/"r2d2xxxx"', ['W/"xyzzy"', 'W/"r2d2xxxx"']),
        ('""', ['""']),
        ('"a,b",",",",W/"', ['"a,b"', '","', '",W/"']),
        ('"\\"', ['"\\"']),
        ('"\xe9"', ['"\xe9"']),
        (',\t,"a" , ,', ['"a"']),
        ("", []),
        (",", []),
        ("*", []),
        ("a", []),
        ('"a" "b"', []),
        ('"a""b"', []),
        ('"a', []),
        ('a"', []),
        ('W"a"', []),
        ('w/"a"', []),
        ('W/ "a"', []),
        ('"a b"', []),
        ('"a\tb"', []),
        ('"a\x7f"', []),
        ('"π"', []),
        ('"a"; "b"', []),
        ('"a"\n', []),
    ],
)
def test_lists_of_entity_tags(value: str, tags: list[str]) -> None:
    assert parse_etag_list(value) == tags


etags = st.builds(ETag, st.text("\x21\x23,;/*W\x7e\x80\xff"), weak=st.booleans())


@given(st.lists(etags), st.sampled_from([",", ", ", " ,\t", ",,", " , , "]))
def test_a_written_list_is_read_back(tags: list[ETag], comma: str) -> None:
    assert [ETag.parse(text) for text in parse_etag_list(comma.join(map(str, tags)))] == tags


@given(st.text() | st.text('W/"*, \tab'))
def test_no_list_raises_and_what_is_found_in_it_are_tags(value: str) -> None:
    assert all(ETag.parse(text) is not None for text in parse_etag_list(value))


values = st.none() | st.text('W/"*, v1') | st.sampled_from(["*", '"v1"', 'W/"v1"', MODIFIED, EARLIER, LATER, "", "?"])


@given(
    st.builds(
        DownloadRequest,
        if_match=values,
        if_unmodified_since=values,
        if_none_match=values,
        if_modified_since=values,
        if_range=values,
    ),
    st.sampled_from([FILE, BARE, WEAK, COMMA]),
)
def test_no_condition_raises_and_each_status_has_its_cause(asked: DownloadRequest, metadata: FileMetadata) -> None:
    status = failed_precondition(asked, metadata)
    if status == 412:
        assert asked.if_match is not None or asked.if_unmodified_since is not None
    if status == 304:
        assert asked.if_none_match is not None or asked.if_modified_since is not None
    if range_applies(asked, metadata) and asked.if_range is not None:
        assert asked.if_range in (str(metadata.etag), MODIFIED)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text", ['"', '"a",', ",", " ", " ,", 'W/"a" ', "W/", '"" ', "\t", "a", '""', ', "', '"a" ,\t'], ids=repr
)
@pytest.mark.parametrize("end", ["", "x", '"', ","], ids=repr)
def test_a_huge_value_is_decided(text: str, end: str) -> None:
    value = text * (LARGE // len(text)) + end
    assert failed_precondition(DownloadRequest(if_match=value), FILE) == 412
    assert failed_precondition(DownloadRequest(if_none_match=value), FILE) is None
    assert not range_applies(DownloadRequest(if_range=value), FILE)
