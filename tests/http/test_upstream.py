"""What an upstream is asked, what it refuses, and what its answer says of a file, as tables."""

import hashlib
from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest

from downloadview_async.errors import (
    FileError,
    FileMissing,
    PreconditionFailed,
    UpstreamBusy,
    UpstreamError,
    UpstreamRefused,
)
from downloadview_async.http.digest import Digests
from downloadview_async.http.metadata import MAX_READS, ByteRange, ETag, FileMetadata
from downloadview_async.http.request import DownloadRequest
from downloadview_async.http.upstream import (
    Answer,
    Received,
    content_length,
    content_range,
    continued,
    described,
    fields_to_send,
    is_refusal,
    joined_fields,
    single_range,
    validators,
    version_of,
)

NOW = 1_700_000_000.0
OLD = "Wed, 21 Oct 2015 07:28:00 GMT"
OLD_SECONDS = 1_445_412_480
JUST_NOW = "Tue, 14 Nov 2023 22:13:20 GMT"
ZIP = "Tue, 01 Jan 1980 00:00:00 GMT"
URL = "http://files.example.org/a.bin"
TAG = {"etag": '"one"'}


def answer(status: int, fields: dict[str, str] | None = None, *, method: str = "GET", **sent: str) -> Answer:
    asked = {name.replace("_", "-"): value for name, value in sent.items()}
    return Answer(status=status, fields=fields or {}, received=Received(date=NOW, at=NOW), method=method, sent=asked)


RANGED: dict[str, Any] = {"accept_encoding": "identity", "range": "bytes=2-5"}
PLAIN: dict[str, Any] = {"accept_encoding": "identity"}


@pytest.mark.parametrize(
    "request_, fields",
    [
        (DownloadRequest(), {}),
        (DownloadRequest(range="bytes=2-5"), {"range": "bytes=2-5"}),
        (DownloadRequest(range="bytes=2-"), {"range": "bytes=2-"}),
        (DownloadRequest(range="bytes=-5", if_range='"one"'), {"range": "bytes=-5", "if-range": '"one"'}),
        (DownloadRequest(range="bytes=2-5,8-9"), {}),  # cut here
        (DownloadRequest(range="bytes=x"), {}),
        (DownloadRequest(method="HEAD", range="bytes=2-5"), {}),
        (DownloadRequest(if_match='"one"', if_unmodified_since=OLD), {"if-match": '"one"', "if-unmodified-since": OLD}),
        (DownloadRequest(if_none_match='"one"'), {"if-none-match": '"one"'}),
        (DownloadRequest(if_modified_since=OLD), {"if-modified-since": OLD}),
        (DownloadRequest(if_modified_since=ZIP), {}),
        (DownloadRequest(if_modified_since="yesterday"), {}),
    ],
)
def test_what_an_upstream_is_asked(request_: DownloadRequest, fields: dict[str, str]) -> None:
    assert fields_to_send(request_) == {"accept-encoding": "identity", **fields}
    assert (single_range(request_) is not None) == ("range" in fields)


PART = {"content-range": "bytes 2-5/10"}
SHORT = {"content-range": "bytes 2-3/10"}


@pytest.mark.parametrize(
    "of, refused",
    [
        (answer(200, method="HEAD"), False),
        (answer(200, {"content-length": "0"}, method="HEAD"), True),
        (answer(200, {"content-length": "0", "x-accel-redirect": "/x"}, method="HEAD"), False),
        (answer(203, {"content-length": "10"}, method="HEAD"), False),
        (answer(203, {"content-length": "0"}, method="HEAD"), True),
        (answer(203, {"content-length": "0", "x-accel-redirect": "/x"}, method="HEAD"), False),
        (answer(200, {"content-length": "0"}), False),
        (answer(206, PART, **RANGED), False),
        (answer(206, {}, **RANGED), True),
        (answer(206, {"content-type": "multipart/byteranges; boundary=x"} | PART, **RANGED), True),
        (answer(206, SHORT, **RANGED), True),
        (answer(206, SHORT | TAG, **RANGED), False),
        (answer(206, {"content-range": "bytes 0-9/10"}, **RANGED), False),  # more than was asked
        (answer(206, {"content-range": "bytes 5-2/10"}, **RANGED), False),
        (answer(206, {"content-range": "bytes 2-3/*"}, **RANGED), False),
        (answer(206, {"content-range": "bytes 2-3/10"}, range="bytes=x"), False),
        (answer(206), False),
        (answer(304, {"last-modified": ZIP}, if_modified_since=OLD, **PLAIN), True),
        (answer(304, {"last-modified": OLD}, if_modified_since=OLD, **PLAIN), False),
        (answer(304, if_modified_since=OLD, **PLAIN), False),
        (answer(304, {"last-modified": ZIP}, if_none_match='"one"', **PLAIN), False),
        (answer(304, {"etag": '"one"'}, if_none_match='"one"', **PLAIN), False),
        (answer(304, {"etag": 'W/"one"'}, if_none_match='"one"', **PLAIN), False),
        (answer(304, {"etag": '"two"'}, if_none_match='"one"', **PLAIN), True),
        (answer(304, {"etag": '"two"'}, if_none_match='"one", "two"', **PLAIN), False),
        (answer(304, if_none_match='"one", "two"', **PLAIN), True),
        (answer(304, {"last-modified": OLD}, if_modified_since="yesterday", **PLAIN), True),
        (answer(406, **PLAIN), True),
        (answer(406), False),
        (answer(412, **RANGED), True),
        (answer(412, if_match='"one"', **PLAIN), False),
        (answer(412, **PLAIN), False),
        (answer(416, **RANGED), True),
        (answer(416, {"content-range": "bytes */1"}, **RANGED), False),
        (answer(416, {"content-range": "bytes */10"}, **RANGED), True),  # which has these bytes
        (answer(416, {"content-range": "bytes */1"} | TAG, if_range='"two"', **RANGED), True),
        (answer(416, {"content-range": "bytes */1"}, method="HEAD", **PLAIN), True),
        (answer(416, {"content-range": "bytes */1"}, **PLAIN), False),
        *((answer(status, **RANGED), True) for status in (400, 401, 403, 405, 418, 500, 501, 505)),
        *((answer(status, **PLAIN), False) for status in (400, 403, 405, 500, 501)),
        *((answer(status, **RANGED), False) for status in (204, 404, 410, 429, 502, 503, 504)),
        *((answer(status, method="HEAD", **PLAIN), True) for status in (204, 403, 404, 405, 501, 502, 503)),
        *((answer(status, method="HEAD", **PLAIN), False) for status in (410, 429, 504)),
    ],
)
def test_what_refuses_more_than_a_plain_get_asks_for(of: Answer, refused: bool) -> None:
    assert is_refusal(of) is refused


GET_PART = DownloadRequest(range="bytes=2-5")
GET = DownloadRequest()
HEAD = DownloadRequest(method="HEAD")


@pytest.mark.parametrize(
    "of, request_, expected",
    [
        (answer(200, {"content-length": "10"}), GET, {"size": 10, "stop": 10}),
        (answer(200), GET, {"size": None, "stop": None}),
        (answer(200, {"content-length": "10", "transfer-encoding": "chunked"}), GET, {"size": None}),
        (answer(200, {"content-length": "10"}, method="HEAD"), GET, {"size": 10, "exists": False}),
        (answer(200, {"content-length": "0"}), GET, {"size": 0, "stop": 0}),
        (answer(206, PART, **RANGED), GET_PART, {"size": 10, "start": 2, "stop": 6}),
        (answer(206, {"content-range": "bytes 2-5/*"}, **RANGED), GET_PART, {"size": None, "start": 2, "stop": 6}),
        (answer(206, SHORT, **RANGED), GET_PART, {"size": 10, "start": 2, "stop": 4, "is_short": True}),
        (answer(206, {"content-range": "bytes 0-9/10"}), GET, {"size": 10, "start": 0, "stop": 10}),
        *(
            (
                answer(206, {"content-range": f"bytes {first}-{last}/10"}, **RANGED),
                GET_PART,
                {"size": 10, "start": first, "stop": last + 1, "is_short": False},
            )
            for first, last in ((0, 9), (1, 5), (2, 6), (2, 9))
        ),
        (
            answer(206, {"content-range": "bytes 0-9/10"}, accept_encoding="identity", range="bytes=-3"),
            DownloadRequest(range="bytes=-3"),
            {"size": 10, "start": 0, "stop": 10, "is_short": False},
        ),
        (answer(203, {"content-length": "10"}), GET, {"size": 10, "stop": 10, "exists": True}),
        (answer(203, {"content-length": "10"}, **RANGED), GET_PART, {"size": 10, "start": 0, "stop": 10}),
        (answer(203, {"content-length": "10"}, method="HEAD"), GET, {"size": 10, "exists": False}),
        (answer(304, if_none_match='"one"'), replace(GET, if_none_match='"one"'), {"exists": False}),
        (answer(416, {"content-range": "bytes */1"}, **RANGED), GET_PART, {"size": 1, "exists": False}),
    ],
)
def test_what_an_answer_says_of_a_file(of: Answer, request_: DownloadRequest, expected: dict[str, Any]) -> None:
    content = described(of, request_, URL)
    for name, value in expected.items():
        assert getattr(content.metadata if name == "size" else content, name) == value, name


@pytest.mark.parametrize(
    "of, request_, error",
    [
        (answer(200, {"content-length": "0", "x-sendfile": "/x"}), GET, UpstreamError),
        (answer(200, {"content-length": "ten"}), GET, UpstreamError),
        (answer(204), GET, UpstreamRefused),
        (answer(206), GET, UpstreamError),
        (answer(206, PART), GET, UpstreamError),
        (answer(206, {"content-range": "bytes 1-4/10"}, **RANGED), GET_PART, UpstreamError),
        (answer(206, {"content-range": "bytes 3-6/10"}, **RANGED), GET_PART, UpstreamError),
        (answer(206, {"content-range": "bytes 6-9/10"}, **RANGED), GET_PART, UpstreamError),
        (answer(206, {"content-range": "bytes 0-1/2"}, **RANGED), GET_PART, UpstreamError),  # it has none of them
        (answer(203, {"content-length": "0", "x-sendfile": "/x"}), GET, UpstreamError),
        (answer(203, {"content-length": "ten"}), GET, UpstreamError),
        (answer(206, {"content-range": "bytes 2-10/10"}, **RANGED), GET_PART, UpstreamError),
        (answer(206, {"content-range": "bytes 5-2/10"}, **RANGED), GET_PART, UpstreamError),
        (answer(206, PART | {"content-length": "5"}, **RANGED), GET_PART, UpstreamError),
        (answer(304), GET, UpstreamError),
        (answer(404), GET, FileMissing),
        (answer(410), GET, FileMissing),
        (answer(412, if_match='"one"'), GET, PreconditionFailed),
        (answer(412), GET, UpstreamRefused),
        (answer(416), GET, UpstreamRefused),
        (answer(416, {"content-range": "bytes */1"}), GET, UpstreamRefused),
        (answer(429), GET, UpstreamBusy),
        (answer(503), GET, UpstreamBusy),
        (answer(500), GET, UpstreamError),
        (answer(502), GET, UpstreamError),
        (answer(504), GET, UpstreamError),
        (answer(501), GET, UpstreamRefused),
        (answer(401), GET, UpstreamRefused),
        (answer(403), GET, UpstreamRefused),
        (answer(451), GET, UpstreamRefused),
        (answer(301), GET, UpstreamRefused),
    ],
)
def test_what_an_answer_fails_with(of: Answer, request_: DownloadRequest, error: type[FileError]) -> None:
    with pytest.raises(FileError) as raised:
        described(of, request_, URL)
    assert type(raised.value) is error


@pytest.mark.parametrize(
    "value, told", [("7", "7"), (OLD, OLD), ("soon", "5"), ("-1", "5"), ("1" * 10, "5"), ("", "5")]
)
def test_only_a_retry_after_that_parses_is_passed_on(value: str, told: str) -> None:
    with pytest.raises(UpstreamBusy) as raised:
        described(answer(503, {"retry-after": value}), GET, URL)
    assert raised.value.retry_after == told


def test_the_fields_of_an_error_page_do_not_describe_the_file() -> None:
    page = {"content-type": "text/html", "cache-control": "no-store", "content-encoding": "gzip"}
    of = answer(416, {"content-range": "bytes */1"} | page | TAG, **RANGED)
    metadata = described(of, GET_PART, URL).metadata
    assert (metadata.content_type, metadata.headers, metadata.etag) == (None, (), ETag("one"))


KNOWN = ("sha-256", hashlib.sha256(b"0123456789").digest())
REPR = {"repr-digest": f"sha-256=:{b64encode(KNOWN[1]).decode()}:"}
CONTENT = {"content-digest": REPR["repr-digest"]}
OTHER = {"content-digest": f"sha-256=:{b64encode(bytes(32)).decode()}:"}


@pytest.mark.parametrize(
    "of, request_, digests",
    [
        (answer(200, TAG | REPR), GET, (KNOWN,)),
        (answer(200, REPR), GET, (KNOWN,)),
        (answer(200, REPR | OTHER), GET, (KNOWN,)),
        (answer(200, CONTENT), GET, (KNOWN,)),
        (answer(200, REPR | {"content-encoding": "identity"}), GET, (KNOWN,)),
        (answer(200, TAG | REPR, method="HEAD"), HEAD, (KNOWN,)),
        (answer(206, PART | REPR, **RANGED), GET_PART, (KNOWN,)),
        (answer(304, TAG | REPR, if_none_match='"one"'), DownloadRequest(if_none_match='"one"'), (KNOWN,)),
        # of this message alone, or of other bytes
        (answer(200, CONTENT, method="HEAD"), HEAD, ()),
        (answer(206, PART | CONTENT, **RANGED), GET_PART, ()),
        (answer(203, REPR), GET, ()),
        (answer(200, REPR | {"content-encoding": "gzip"}), GET, ()),
        (answer(200, REPR | {"content-encoding": "aws-chunked"}), GET, ()),
        (answer(200, CONTENT | {"content-encoding": "gzip"}), GET, ()),
        (answer(416, {"content-range": "bytes */1"} | REPR, **RANGED), GET_PART, ()),
        # what does not parse, or has another length
        (answer(200, {"repr-digest": "sha-256=:AAAA:"}), GET, ()),
        (answer(200, {"repr-digest": "sha-256=:" + "A" * 43 + "=:, md5=:AAAA:"}), GET, (("sha-256", bytes(32)),)),
        (answer(200, {"repr-digest": f"{REPR['repr-digest']}\r\nX-Accel-Redirect: /x"}), GET, ()),
        (answer(200, {"digest": "SHA-256=" + b64encode(KNOWN[1]).decode()}), GET, ()),
    ],
)
def test_the_digests_of_the_whole_file(of: Answer, request_: DownloadRequest, digests: Digests) -> None:
    assert described(of, request_, URL).metadata.digests == digests


def test_representation_fields_pass_an_allow_list() -> None:
    fields = {
        "content-type": "text/plain",
        "content-encoding": "gzip",
        "content-language": "de",
        "cache-control": "max-age=60",
        "expires": OLD,
        "vary": "Accept-Encoding",
        "age": "7, 9",
        "x-accel-redirect": "/etc/passwd",
        "set-cookie": "a=b",
    }
    metadata = described(answer(200, {"content-length": "10", **fields}), GET, URL).metadata
    assert metadata.content_type == "text/plain"
    assert dict(metadata.headers) == {
        "content-encoding": "gzip",
        "content-language": "de",
        "cache-control": "max-age=60",
        "expires": OLD,
        "vary": "Accept-Encoding",
        "age": "7",
    }
    bad = described(answer(200, {"age": "old", "content-encoding": "identity", "vary": "a\nb"}), GET, URL).metadata
    assert bad.headers == ()


@pytest.mark.parametrize(
    "fields, etag, modified",
    [
        ({"etag": '"one"'}, ETag("one"), None),
        ({"etag": "one"}, None, None),
        ({"last-modified": OLD}, None, OLD_SECONDS),
        ({"last-modified": ZIP}, None, None),
        ({"last-modified": "yesterday"}, None, None),
        ({"last-modified": JUST_NOW}, None, None),
        ({"last-modified": "Tue, 14 Nov 2023 22:13:10 GMT"}, None, None),  # within what two clocks may differ
        ({"last-modified": "Tue, 14 Nov 2023 22:13:10 GMT", "date": JUST_NOW}, None, int(NOW) - 10),
        ({"last-modified": "Tue, 14 Nov 2023 22:13:10 GMT", "etag": '"one"'}, ETag("one"), int(NOW) - 10),
    ],
)
def test_validators(fields: dict[str, str], etag: ETag | None, modified: int | None) -> None:
    found = validators(answer(200, fields))
    assert (found.etag, found.last_modified) == (etag, modified)


@pytest.mark.parametrize(
    "size, tag, max_reads", [(10, None, MAX_READS), (9 << 20, None, 1), (9 << 20, '"one"', MAX_READS)]
)
def test_how_many_requests_an_answer_may_cost(size: int, tag: str | None, max_reads: int) -> None:
    fields = {"content-length": str(size)} | ({} if tag is None else {"etag": tag})
    assert described(answer(200, fields), GET, URL).metadata.max_reads == max_reads


@pytest.mark.parametrize(
    "request_, fields, etag, modified",
    [
        (DownloadRequest(if_none_match='"one"'), TAG, ETag("one"), None),
        (DownloadRequest(if_none_match='"one", "two"'), {}, ETag("one"), None),  # a 304 says that one is current
        (DownloadRequest(if_none_match="*"), {}, None, None),
        (DownloadRequest(if_modified_since=OLD), {}, None, OLD_SECONDS),
        (DownloadRequest(if_modified_since=OLD), TAG, ETag("one"), OLD_SECONDS),
    ],
)
def test_a_304_is_about_what_the_client_has(
    request_: DownloadRequest, fields: dict[str, str], etag: ETag | None, modified: int | None
) -> None:
    sent = {name: value for name, value in fields_to_send(request_).items() if name != "accept-encoding"}
    of = Answer(status=304, fields=fields, received=Received(date=NOW, at=NOW), sent=sent)
    metadata = described(of, request_, URL).metadata
    assert (metadata.etag, metadata.last_modified) == (etag, modified)


PINNED = FileMetadata(size=10, etag=ETag("one"))
UNPINNED = FileMetadata(size=10)
SPAN = ByteRange(2, 6)


@pytest.mark.parametrize(
    "of, span, metadata, start, stop, is_short",
    [
        (answer(206, PART), SPAN, PINNED, 2, 6, False),
        (answer(206, {"content-range": "bytes 2-5/*"}), SPAN, PINNED, 2, 6, False),
        (answer(206, SHORT), SPAN, PINNED, 2, 4, True),
        (answer(206, {"content-range": "bytes 0-9/10"}), SPAN, PINNED, 0, 10, False),
        (answer(206, {"content-range": "bytes 1-5/10"}), SPAN, UNPINNED, 1, 6, False),
        (answer(206, {"content-range": "bytes 2-6/10"}), SPAN, PINNED, 2, 7, False),
        (answer(206, {"content-range": "bytes 0-9/10"}), None, PINNED, 0, 10, False),
        (answer(203, {"content-length": "10"}), SPAN, PINNED, 0, 10, False),
        (answer(200, {"content-length": "10"}), SPAN, PINNED, 0, 10, False),
        (answer(200), SPAN, PINNED, 0, None, False),
        (answer(200, {"content-length": "10"}), None, UNPINNED, 0, 10, False),
        (answer(200, {"content-length": "10"}), None, FileMetadata(), 0, 10, False),
    ],
)
def test_which_bytes_a_further_answer_has(
    of: Answer, span: ByteRange | None, metadata: FileMetadata, start: int, stop: int | None, is_short: bool
) -> None:
    content = continued(of, span, metadata, URL)
    assert (content.start, content.stop, content.is_short) == (start, stop, is_short)


@pytest.mark.parametrize(
    "of, span, metadata",
    [
        (answer(206, SHORT), SPAN, UNPINNED),
        (answer(206, {"content-range": "bytes 2-5/11"}), SPAN, PINNED),
        (answer(206, {"content-range": "bytes 3-5/10"}), SPAN, PINNED),
        (answer(206, {"content-range": "bytes 3-6/10"}), SPAN, PINNED),
        (answer(206, {"content-range": "bytes 1-4/10"}), SPAN, PINNED),
        (answer(206, PART), None, PINNED),
        (answer(206, {"content-range": "bytes 0-9/10"}), None, FileMetadata()),
        (answer(203, {"content-length": "11"}), SPAN, PINNED),
        (answer(200, {"content-length": "11"}), SPAN, PINNED),
        (answer(404), SPAN, PINNED),
    ],
)
def test_a_further_answer_without_the_span_is_an_error(
    of: Answer, span: ByteRange | None, metadata: FileMetadata
) -> None:
    with pytest.raises(UpstreamError):
        continued(of, span, metadata, URL)


def test_fields_are_joined_by_name() -> None:
    raw = [(b"Vary", b"a"), (b"vary", b"b"), (b"ETag", b'"\xe9"')]
    fields = joined_fields(raw)
    assert fields == {"vary": "a, b", "etag": '"\xe9"'}
    assert version_of(fields) == ('"\xe9"', None)
    assert content_length({}) is None
    assert content_range(PART) == (ByteRange(2, 6), 10)


def test_when_an_answer_was_made() -> None:
    plain = Received.now({})
    assert (plain.date, plain.age) == (plain.at, 0.0)
    aged = Received.now({"age": "7", "date": OLD})
    assert aged.date == OLD_SECONDS
    assert aged.age == aged.at - OLD_SECONDS
    assert Received.now({"age": "7"}).age == 7.0
    assert Received.now({"age": "x"}).age == 0.0


@pytest.mark.parametrize(
    "age, told",
    [
        ("7", "7"),
        ("7 , 9", "7"),
        ("0000000000007", "7"),
        ("2147483648", "2147483648"),
        ("9999999999", "2147483648"),
        ("9" * 11, "2147483648"),
        ("9" * 5000, "2147483648"),
        (f"{'9' * 11}, 7", "2147483648"),
        ("-7", None),
        ("7.5", None),
        ("7 9", None),
        ("", None),
    ],
)
def test_an_age_that_overflows_is_the_longest(age: str, told: str | None) -> None:
    assert Received.now({"age": age}).age == float(told or 0)
    metadata = described(answer(200, {"age": age}), GET, URL).metadata
    assert dict(metadata.headers).get("age") == told
