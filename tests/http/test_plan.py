"""`make_plan`: the rows of the table of what every download answers, on a file of ten bytes."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.dates import format_http_date, parse_http_date
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.plan import (
    Plan,
    Presentation,
    describe,
    make_offload_plan,
    make_plan,
    make_redirect_plan,
)
from downloadview_async.http.request import DownloadRequest
from tests.http.asking import (
    BARE,
    CONTENT,
    EARLIER,
    EMPTY,
    FILE,
    LARGE,
    LATER,
    MODIFIED,
    STREAM,
    Fields,
    answer,
    body,
)

WHOLE = (200, None, CONTENT)
UNSATISFIABLE = (416, "bytes */10", b"")


def part(first: int, last: int) -> tuple[int, str, bytes]:
    return 206, f"bytes {first}-{last}/10", CONTENT[first : last + 1]


RANGES: list[tuple[str, tuple[int, str | None, bytes]]] = [
    *((f"bytes={ranges}", WHOLE) for ranges in (
        "5-2", "a-b", "", "1", "-", "-1-2", "+1-2", "1_0-", "0x1-", "1.0-2", "--6", "\xb2-3", "0-1,5-2", ",",
    )),
    ("", WHOLE),
    ("items=0-1", WHOLE),
    ("BYTES=0-1", part(0, 1)),
    ("bytes=0-0", part(0, 0)),
    ("bytes=9-9", part(9, 9)),
    ("bytes=0-", part(0, 9)),
    ("bytes=0-9", part(0, 9)),
    ("bytes=2-99", part(2, 9)),
    ("bytes=-3", part(7, 9)),
    ("bytes=-10", part(0, 9)),
    ("bytes=-100", part(0, 9)),
    ("bytes=-0", UNSATISFIABLE),
    ("bytes=10-", UNSATISFIABLE),
    ("bytes=10-20", UNSATISFIABLE),
    ("bytes=50-60,70-80", UNSATISFIABLE),
    ("bytes=0-1,50-60", part(0, 1)),
    ("bytes=50-60,0-1", part(0, 1)),
    ("bytes=0-5,2-7", part(0, 7)),
    ("bytes=0-4,5-9", part(0, 9)),
    ("bytes=0-,0-,0-", WHOLE),
    ("bytes=0-,1-,2-,3-,4-", WHOLE),
    ("bytes=" + ",".join(["0-0"] * 101), WHOLE),
    ("bytes=0-" + "9" * 64000, part(0, 9)),
    ("bytes=" + "9" * 64000 + "-", UNSATISFIABLE),
    ("bytes=" + "0-0," * 16000, WHOLE),
]  # fmt: skip


@pytest.mark.parametrize("value, expected", RANGES, ids=lambda value: str(value)[:30])
def test_one_range(value: str, expected: tuple[int, str | None, bytes]) -> None:
    status, content_range, content = expected
    plan = answer([("Range", value)])
    assert plan.status == status
    assert plan.headers.get("content-range") == content_range
    assert plan.headers["content-length"] == str(len(content)) == str(plan.length)
    assert plan.headers["accept-ranges"] == "bytes"
    assert body(plan) == content


def test_no_range_is_the_whole_file() -> None:
    plan = answer()
    assert (plan.status, body(plan)) == (200, CONTENT)
    assert plan.headers == {
        "content-type": "application/octet-stream",
        "content-disposition": 'attachment; filename="ten.bin"',
        "x-content-type-options": "nosniff",
        "etag": '"v1"',
        "last-modified": MODIFIED,
        "content-length": "10",
        "accept-ranges": "bytes",
    }


def test_several_ranges_are_a_multipart_without_a_content_range_of_its_own() -> None:
    plan = answer([("Range", "bytes=0-1,3-4")], filename="a.txt")
    content_type, _, boundary = plan.headers["content-type"].partition("; boundary=")
    assert plan.status == 206
    assert content_type == "multipart/byteranges"
    assert "content-range" not in plan.headers
    assert plan.headers["etag"] == '"v1"'
    sent = body(plan)
    assert plan.headers["content-length"] == str(len(sent))
    lines = sent.decode().split("\r\n")
    assert lines == [
        "",
        f"--{boundary}",
        "Content-Type: text/plain; charset=utf-8",
        "Content-Range: bytes 0-1/10",
        "",
        "01",
        f"--{boundary}",
        "Content-Type: text/plain; charset=utf-8",
        "Content-Range: bytes 3-4/10",
        "",
        "34",
        f"--{boundary}--",
        "",
    ]


@pytest.mark.parametrize("value", ["bytes=0-0", "bytes=0-", "bytes=-1", "bytes=-0", "bytes=5-", "bytes=0-0,2-2"])
def test_any_range_of_an_empty_file_is_all_of_it(value: str) -> None:
    plan = answer([("Range", value)], metadata=EMPTY)
    assert plan.status == 200
    assert plan.headers["content-length"] == "0"
    assert plan.body == ()
    assert "content-range" not in plan.headers


@pytest.mark.parametrize("value", ["bytes=0-0", "bytes=10-", "bytes=0-1,3-4"])
def test_head_ignores_ranges(value: str) -> None:
    plan = answer([("Range", value), ("If-Range", '"v1"')], method="HEAD")
    assert plan.status == 200
    assert plan.headers == answer().headers
    assert plan.body == ()


@pytest.mark.parametrize("value", ["bytes=0-0", "bytes=-1", "bytes=0-1,3-4"])
def test_a_file_of_unknown_size_has_no_parts(value: str) -> None:
    plan = answer([("Range", value)], metadata=STREAM)
    assert plan.status == 200
    assert not {"accept-ranges", "content-length", "content-range"} & plan.headers.keys()
    assert plan.body == (None,)
    assert plan.length is None


def test_a_file_that_has_no_parts_is_sent_whole_with_its_length() -> None:
    plan = answer([("Range", "bytes=0-0")], metadata=replace(FILE, accept_ranges=False))
    assert plan.status == 200
    assert plan.headers["content-length"] == "10"
    assert "accept-ranges" not in plan.headers


# (id, headers, status, body)
CONDITIONAL_RANGES: list[tuple[str, Fields, int, bytes]] = [
    ("If-Range: the tag", [("If-Range", '"v1"')], 206, b"01"),
    ("If-Range: another tag", [("If-Range", '"v2"')], 200, CONTENT),
    ("If-Range: the tag, weak", [("If-Range", 'W/"v1"')], 200, CONTENT),
    ("If-Range: the date", [("If-Range", MODIFIED)], 206, b"01"),
    ("If-Range: an earlier date", [("If-Range", EARLIER)], 200, CONTENT),
    ("If-Range: a later date", [("If-Range", LATER)], 200, CONTENT),
    ("If-Range: nonsense", [("If-Range", "v1")], 200, CONTENT),
    ("If-Match true", [("If-Match", '"v1"')], 206, b"01"),
    ("If-Match false", [("If-Match", '"v2"')], 412, b""),
    ("If-Match *", [("If-Match", "*")], 206, b"01"),
    ("If-Unmodified-Since true", [("If-Unmodified-Since", MODIFIED)], 206, b"01"),
    ("If-Unmodified-Since false", [("If-Unmodified-Since", EARLIER)], 412, b""),
    ("If-None-Match true", [("If-None-Match", '"v2"')], 206, b"01"),
    ("If-None-Match false", [("If-None-Match", 'W/"v1"')], 304, b""),
    ("If-Modified-Since true", [("If-Modified-Since", EARLIER)], 206, b"01"),
    ("If-Modified-Since false", [("If-Modified-Since", MODIFIED)], 304, b""),
    ("412 before If-Range", [("If-Match", '"v2"'), ("If-Range", '"v1"')], 412, b""),
    ("304 before If-Range", [("If-None-Match", '"v1"'), ("If-Range", '"v2"')], 304, b""),
    ("all true", [("If-Match", '"v1"'), ("If-None-Match", '"v2"'), ("If-Range", '"v1"')], 206, b"01"),
    ("all true but If-Range", [("If-Match", '"v1"'), ("If-None-Match", '"v2"'), ("If-Range", "?")], 200, CONTENT),
]


@pytest.mark.parametrize("fields, status, content", [pytest.param(*row[1:], id=row[0]) for row in CONDITIONAL_RANGES])
def test_conditions_come_before_the_range(fields: Fields, status: int, content: bytes) -> None:
    plan = answer([("Range", "bytes=0-1"), *fields])
    assert plan.status == status
    assert body(plan) == content


def test_a_range_outside_the_file_is_no_error_where_if_range_does_not_hold() -> None:
    assert answer([("Range", "bytes=10-"), ("If-Range", '"v1"')]).status == 416
    assert answer([("Range", "bytes=10-"), ("If-Range", '"v2"')]).status == 200


def test_if_range_without_a_range_means_nothing() -> None:
    assert answer([("If-Range", '"v2"')]) == answer()


def test_a_replaced_file_of_the_same_size_and_second_does_not_resume() -> None:
    replaced = replace(FILE, etag=ETag("v1-a-nanosecond-later"))
    plan = answer([("Range", "bytes=5-"), ("If-Range", '"v1"')], metadata=replaced)
    assert (plan.status, body(plan)) == (200, CONTENT)


OWN = {
    "cache-control": "public, max-age=60",
    "expires": LATER,
    "vary": "Cookie",
    "content-location": "/files/1",
    "x-own": "yes",
}


def test_not_modified_keeps_what_a_cache_goes_by_and_has_no_body_and_no_length() -> None:
    encoded = replace(FILE, headers=(("content-encoding", "gzip"), ("content-language", "de")))
    plan = answer([("If-None-Match", '"v1"')], metadata=encoded, headers=OWN, attachment=False, filename="a.html")
    assert plan.status == 304
    assert plan.headers == {"etag": '"v1"', "last-modified": MODIFIED, "x-content-type-options": "nosniff", **OWN}
    assert plan.body == ()


@pytest.mark.parametrize(
    "status, fields",
    [(412, [("If-Match", '"v2"')]), (416, [("Range", "bytes=10-")])],
)
def test_an_error_is_never_public_and_carries_nothing_of_the_file(status: int, fields: Fields) -> None:
    plan = answer(fields, headers=OWN)
    assert plan.status == status
    assert plan.headers["cache-control"] == "private, no-store"
    assert plan.headers["content-length"] == "0"
    assert plan.body == ()
    assert not {"expires", "content-type", "content-disposition", "content-encoding"} & plan.headers.keys()
    assert plan.headers["x-own"] == "yes"
    assert plan.headers["x-content-type-options"] == "nosniff"


def test_416_says_how_long_the_file_is() -> None:
    plan = answer([("Range", "bytes=10-")])
    assert plan.headers["content-range"] == "bytes */10"
    assert plan.headers["accept-ranges"] == "bytes"


every_field = st.lists(
    st.tuples(
        st.sampled_from(["If-Match", "If-Unmodified-Since", "If-None-Match", "If-Modified-Since", "If-Range", "Range"]),
        st.sampled_from(['"v1"', '"v2"', 'W/"v1"', "*", MODIFIED, EARLIER, LATER, "bytes=0-1", "bytes=10-", "?", ""]),
    ),
    max_size=6,
)
files = st.sampled_from([FILE, EMPTY, STREAM, BARE])


@given(every_field, files)
def test_head_is_get_without_the_body(fields: Fields, metadata: FileMetadata) -> None:
    without_range = [field for field in fields if field[0] != "Range"]
    get = answer(without_range, metadata=metadata)
    head = answer(without_range, metadata=metadata, method="HEAD")
    assert (head.status, head.headers, head.body) == (get.status, get.headers, ())
    assert answer(fields, metadata=metadata, method="HEAD") == head


@given(every_field, files)
def test_the_length_is_that_of_the_body_in_every_answer(fields: Fields, metadata: FileMetadata) -> None:
    plan = answer(fields, metadata=metadata)
    content = CONTENT[: metadata.size]
    assert plan.status in (200, 206, 304, 412, 416)
    if metadata.size is None and plan.status == 200:
        assert plan.length is None
        assert "content-length" not in plan.headers
    else:
        assert plan.length == len(body(plan, content))
        assert plan.headers.get("content-length") == (None if plan.status == 304 else str(plan.length))
    assert ("content-range" in plan.headers) == (plan.status in (206, 416))
    assert plan.headers["x-content-type-options"] == "nosniff"
    assert all(name == name.lower() for name in plan.headers)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["Range", "If-Range", "If-Match", "If-None-Match", "If-Modified-Since"])
@pytest.mark.parametrize("text", ["0-0,", '"v",', "9", ",", " ", "\xff", "bytes=", '"'], ids=repr)
def test_a_huge_field_is_decided(name: str, text: str) -> None:
    value = text * (LARGE // len(text))
    plan = answer([("Range", "bytes=0-1"), (name, value)])
    expected = {"If-Match": 412, "Range": 200, "If-Range": 200}.get(name, 206)
    assert plan.status == expected


# What is shown, and as what.


@pytest.mark.parametrize("attachment", [True, False])
def test_the_disposition_always_names_the_file(attachment: bool) -> None:
    kind = "attachment" if attachment else "inline"
    for filename, named in [
        ("a.txt", 'filename="a.txt"'),
        ("π.txt", "filename=\"download.txt\"; filename*=UTF-8''%CF%80.txt"),
        ('a"; filename="x.bat', "filename=\"a_; filename=_x.bat\"; filename*=UTF-8''a%22%3B%20filename%3D%22x.bat"),
        ("", 'filename="download"'),
    ]:
        plan = answer(filename=filename, attachment=attachment)
        assert plan.headers["content-disposition"] == f"{kind}; {named}"


@pytest.mark.parametrize(
    "filename, sandboxed",
    [
        ("a.html", True),
        ("a.xhtml", True),
        ("a.svg", True),
        ("a.xml", True),
        ("a.pdf", True),
        ("a.js", True),
        ("a.mht", True),
        ("a.txt", False),
        ("a.png", False),
        ("a.mp4", False),
        ("a.bin", False),
        ("a", False),
    ],
)
def test_what_a_browser_could_run_is_sandboxed_inline_and_needs_not_be_attached(filename: str, sandboxed: bool) -> None:
    inline = answer(filename=filename, attachment=False)
    policy = "sandbox; default-src 'none'"
    if filename.endswith(".svg"):  # its own styles and images are harmless, and without them it is black
        policy += "; style-src 'unsafe-inline'; img-src data:; font-src data:"
    assert inline.headers.get("content-security-policy") == (policy if sandboxed else None)
    assert "content-security-policy" not in answer(filename=filename).headers


@pytest.mark.parametrize(
    "presentation, metadata_type, headers, sandboxed",
    [
        pytest.param(Presentation(filename="a.txt", attachment=False), "text/html", {}, True, id="by the file's type"),
        pytest.param(
            Presentation(filename="a.txt", attachment=False, content_type="text/html"),
            None, {}, True, id="by the application's type",
        ),
        pytest.param(
            Presentation(filename="a.html", attachment=False, content_type="text/plain"),
            "text/html", {}, False, id="the application's type wins",
        ),
        pytest.param(
            Presentation(filename="a.txt", attachment=False),
            None, {"content-type": "text/html"}, True, id="by the application's header",
        ),
        pytest.param(
            Presentation(filename="a.html"),
            None, {"content-disposition": "inline"}, True, id="inline by the application's header",
        ),
        pytest.param(
            Presentation(filename="a.html", attachment=False),
            None, {"content-disposition": 'Attachment; filename="b"'}, False, id="attached by the application's header",
        ),
    ],
)  # fmt: skip
def test_the_sandbox_goes_by_what_is_sent_in_the_end(
    presentation: Presentation, metadata_type: str | None, headers: dict[str, str], sandboxed: bool
) -> None:
    described = describe(FileMetadata(content_type=metadata_type), presentation, headers)
    assert ("content-security-policy" in described) is sandboxed


def test_the_applications_own_headers_win() -> None:
    own = {"content-type": "text/html", "content-security-policy": "default-src 'self'", "x-own": "yes"}
    plan = answer(headers=own, attachment=False)
    assert {name: plan.headers[name] for name in own} == own
    parts = answer([("Range", "bytes=0-0,2-2")], headers=own)
    assert parts.headers["content-type"].startswith("multipart/byteranges")
    assert b"Content-Type: text/html\r\n" in body(parts)


def test_the_application_keeps_its_headers_as_they_were() -> None:
    own = {"x-own": "yes"}
    answer([("Range", "bytes=0-1")], headers=own)
    assert own == {"x-own": "yes"}


def test_headers_of_the_version_are_sent_with_it() -> None:
    encoded = replace(FILE, headers=(("content-encoding", "gzip"), ("vary", "Accept-Encoding")))
    plan = answer([("Range", "bytes=0-1")], metadata=encoded)
    assert plan.headers["content-encoding"] == "gzip"
    assert plan.headers["vary"] == "Accept-Encoding"


@pytest.mark.parametrize("status", [201, 203, 404, 500])
def test_another_status_is_sent_with_the_whole_file(status: int) -> None:
    fields = [("Range", "bytes=0-1"), ("If-None-Match", '"v1"'), ("If-Match", '"v2"')]
    plan = answer(fields, status=status)
    assert plan.status == status
    assert body(plan) == CONTENT


def test_a_file_without_validators_has_no_such_headers() -> None:
    assert not {"etag", "last-modified"} & answer(metadata=BARE).headers.keys()


# Times in the future [8.8.2.1].

MODIFIED_AT = parse_http_date(MODIFIED)
assert MODIFIED_AT is not None


@pytest.mark.parametrize(
    "now, shown",
    [
        (MODIFIED_AT + 3600.0, MODIFIED),
        (MODIFIED_AT + 0.0, MODIFIED),
        (MODIFIED_AT - 0.5, EARLIER),
        (0.0, format_http_date(0)),
    ],
)
def test_a_file_from_the_future_is_dated_now(now: float, shown: str) -> None:
    assert answer(now=now).headers["last-modified"] == shown


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "modified, now, is_told",
    [
        (0, 1_700_000_000.0, False),
        (1, 1_700_000_000.0, False),
        (2, 1_700_000_000.0, True),
        (315532800, 1_700_000_000.0, False),
        # the next change may be within the same second
        (1_700_000_000, 1_700_000_000.25, False),
        (1_700_000_000, 1_700_000_000.99, False),
        (1_700_000_000, 1_700_000_001.0, True),
    ],
)
def test_a_time_that_another_version_may_have_is_neither_told_nor_compared(
    modified: int, now: float, is_told: bool, method: str
) -> None:
    dated = replace(FILE, last_modified=modified)
    date = format_http_date(modified)

    def asked(**fields: str) -> Plan:
        return make_plan(DownloadRequest(method=method, **fields), dated, Presentation(filename="a.bin"), now=now)

    assert asked().headers.get("last-modified") == (date if is_told else None)
    assert asked(if_modified_since=date).status == (304 if is_told else 200)
    # whatever version this second brings, it is later than the one before
    is_later = is_told or modified == 1_700_000_000
    assert asked(if_unmodified_since=format_http_date(max(modified - 1, 0))).status == (412 if is_later else 200)
    resumed = asked(range="bytes=2-", if_range=date)
    assert resumed.status == (206 if is_told and method == "GET" else 200)
    assert asked(range="bytes=2-").status == (206 if method == "GET" else 200)


@pytest.mark.parametrize(
    "modified, since, status",
    [
        # a date later than this second is later than every version that the file can still get in it
        (1_700_000_000, 1_700_000_000, 200),
        (1_700_000_000, 1_700_000_001, 304),
        (1_700_000_000, 2_000_000_000, 304),
        (0, 2_000_000_000, 200),
    ],
)
def test_a_file_of_this_second_is_not_modified_since_a_later_one(modified: int, since: int, status: int) -> None:
    fields = [("If-Modified-Since", format_http_date(since))]
    plan = answer(fields, metadata=replace(FILE, last_modified=modified), now=1_700_000_000.5)
    assert (plan.status, "last-modified" in plan.headers) == (status, False)


def test_the_clock_is_asked_where_no_time_is_given() -> None:
    plan = answer(metadata=replace(FILE, last_modified=parse_http_date("Fri, 31 Dec 9999 23:59:59 GMT")))
    shown = parse_http_date(plan.headers["last-modified"])
    assert shown is not None
    assert MODIFIED_AT is not None
    assert MODIFIED_AT < shown < 253402300799


def test_a_date_that_moves_with_the_clock_does_not_resume() -> None:
    now = MODIFIED_AT - 60.0 if MODIFIED_AT else 0.0
    shown = answer(now=now).headers["last-modified"]
    assert answer([("If-Modified-Since", shown)], now=now).status == 304
    assert answer([("Range", "bytes=5-"), ("If-Range", shown)], now=now).status == 200


def test_a_plan_is_a_value() -> None:
    assert Plan(200, {}, (ByteRange(0, 2), b"xyz")).length == 5
    assert Plan(200, {}, (None,)).length is None
    assert Plan(200, {}, ()).length == 0


def test_an_offload_is_described_like_the_file_and_promises_nothing_of_its_own() -> None:
    metadata = FileMetadata(size=10, etag=ETag("x"), last_modified=2_000, content_type="text/html")
    plan = make_offload_plan(
        metadata,
        Presentation(filename="a.html", attachment=False),
        {"x-accel-redirect": "/_files/a.html"},
        headers={"cache-control": "private"},
        now=1_000.0,
    )
    assert (plan.status, plan.body, plan.length) == (200, (), 0)
    assert plan.headers == {
        "content-type": "text/html",
        "content-disposition": 'inline; filename="a.html"',
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox; default-src 'none'",
        "etag": '"x"',
        "last-modified": "Thu, 01 Jan 1970 00:16:40 GMT",
        "cache-control": "private",
        "x-accel-redirect": "/_files/a.html",
        "content-length": "0",
    }


def test_a_redirect_says_nothing_of_the_file_and_the_place_wins() -> None:
    own = {"content-type": "text/html", "expires": "0", "vary": "Cookie", "cache-control": "public"}
    plan = make_redirect_plan(own, {"location": "https://files.example.org/x", "cache-control": "private"})
    assert (plan.status, plan.body) == (307, ())
    assert plan.headers == {
        "vary": "Cookie",
        "x-content-type-options": "nosniff",
        "content-length": "0",
        "location": "https://files.example.org/x",
        "cache-control": "private",
    }


FAR = 1_000_000


@pytest.mark.parametrize(
    "metadata, value, starts",
    [
        # of a version that can be told, the parts are read as they are asked for, as long as that is few reads
        ({"etag": ETag("a")}, f"bytes={2 * FAR}-{2 * FAR},0-0", [2 * FAR, 0]),
        ({"last_modified": 1_700_000_000}, f"bytes={2 * FAR}-{2 * FAR},0-0", [2 * FAR, 0]),
        # of any other in one go
        ({}, f"bytes={2 * FAR}-{2 * FAR},0-0", [0, 2 * FAR]),
        ({"etag": ETag("a", weak=True)}, f"bytes={2 * FAR}-{2 * FAR},0-0", [0, 2 * FAR]),
        # more reads than are allowed: the order of the file may have fewer, else the whole
        ({"etag": ETag("a")}, "bytes=8-8,6-6,4-4,2-2,0-0", [0, 2, 4, 6, 8]),
        ({"etag": ETag("a")}, ",".join([f"bytes=0-0,{FAR}-{FAR}", f"{2 * FAR}-{2 * FAR}"]), None),
    ],
)
def test_many_parts_of_a_file_that_is_far_away(metadata: dict[str, Any], value: str, starts: list[int] | None) -> None:
    described = FileMetadata(size=10 * FAR, max_reads=2, **metadata)
    request = DownloadRequest(method="GET", range=value)
    plan = make_plan(request, described, Presentation(filename="a.bin"))
    if starts is None:
        assert (plan.status, plan.body) == (200, (ByteRange(0, 10 * FAR),))
    else:
        assert plan.status == 206
        assert [piece.start for piece in plan.body if isinstance(piece, ByteRange)] == starts


DIGESTS = (("sha-256", bytes(32)), ("sha-512", bytes(64)))
IN_256 = f"sha-256=:{'A' * 43}=:"
IN_512 = f"sha-512=:{'A' * 86}==:"
HASHED = replace(FILE, digests=DIGESTS)


@pytest.mark.parametrize(
    "fields, status, digest",
    [
        ([], 200, IN_256),
        ([("Want-Repr-Digest", "sha-512=1")], 200, IN_512),
        ([("Want-Repr-Digest", "sha-512=1"), ("Want-Repr-Digest", "sha-256=2")], 200, IN_256),
        ([("Want-Repr-Digest", "sha-256=0, sha-512=0")], 200, None),
        # the digest is that of the whole representation, whatever part of it is sent
        ([("Range", "bytes=2-3")], 206, IN_256),
        ([("Range", "bytes=0-0,9-9")], 206, IN_256),
        ([("If-None-Match", '"v1"')], 304, IN_256),
        ([("If-Match", '"v2"')], 412, None),
        ([("Range", "bytes=10-")], 416, None),
    ],
)
def test_the_digest_is_sent_with_the_file(fields: Fields, status: int, digest: str | None) -> None:
    for method in ("GET", "HEAD") if status in (200, 304, 412) else ("GET",):
        plan = answer(fields, method=method, metadata=HASHED)
        assert (plan.status, plan.headers.get("repr-digest")) == (status, digest)


@pytest.mark.parametrize(
    "metadata, headers, digest",
    [
        (FILE, {}, None),
        (HASHED, {"repr-digest": "sha-256=:b3du:"}, "sha-256=:b3du:"),
        (HASHED, {"content-encoding": "gzip"}, None),
        (replace(HASHED, headers=(("content-encoding", "br"),)), {}, None),
        (replace(HASHED, headers=(("vary", "accept-encoding"),)), {}, IN_256),
    ],
)
def test_only_the_digest_of_the_bytes_that_are_sent(
    metadata: FileMetadata, headers: dict[str, str], digest: str | None
) -> None:
    assert answer(metadata=metadata, headers=headers).headers.get("repr-digest") == digest
    offloaded = make_offload_plan(metadata, Presentation(filename="a"), {"x-accel-redirect": "/a"}, headers=headers)
    assert offloaded.headers.get("repr-digest") == digest


def test_a_redirect_has_no_digest() -> None:
    assert "repr-digest" not in make_redirect_plan(answer(metadata=HASHED).headers, {"location": "/x"}).headers
