"""The parsers of `downloadview_async.http`, each beside another way to read or to write the same."""

import email.message
import email.parser
import email.policy
import io
import ntpath
import posixpath
import re
import struct
import time
import zipfile
import zlib
from datetime import UTC, datetime
from typing import Any

import h11

from downloadview_async.errors import FileError, UpstreamError
from downloadview_async.http import upstream
from downloadview_async.http.archive_names import distinct_names, safe_name
from downloadview_async.http.chunked import Dechunker
from downloadview_async.http.conditional import failed_precondition, parse_etag_list, range_applies
from downloadview_async.http.content_types import content_type_for, is_active, valid_content_type, with_charset
from downloadview_async.http.dates import (
    LATEST,
    LONGEST_DELTA,
    format_http_date,
    http_seconds,
    parse_delta_seconds,
    parse_http_date,
)
from downloadview_async.http.digest import ALGORITHMS, parse_repr_digest, preferred_digest, repr_digest
from downloadview_async.http.disposition import MAX_BYTES, client_filename, content_disposition, is_device_name
from downloadview_async.http.fields import length_of
from downloadview_async.http.log_text import LIMIT, escaped, shown
from downloadview_async.http.metadata import ByteRange, ETag, FileMetadata
from downloadview_async.http.multipart import multipart_body, new_boundary
from downloadview_async.http.negotiation import content_coding, hides_coding, preferred_encodings, preferred_type
from downloadview_async.http.plan import Presentation, make_plan
from downloadview_async.http.ranges import MAX_PARTS, parse_content_range, parse_range, read_from, select_ranges
from downloadview_async.http.request import DownloadRequest
from downloadview_async.http.response_head import END_OF_HEAD, parse_response_head
from downloadview_async.http.upstream import Answer, Received
from downloadview_async.http.zip_layout import Checked, Content, Member, ZipLayout
from tests.fuzz import inputs as st
from tests.fuzz.inputs import edited, edited_bytes, edited_text
from tests.fuzz.targets import is_printable_ascii, target

CONTENT = bytes(range(256))
SIZES = st.sampled_from([0, 1, 2, 10, 255, 256])
RANGES = edited("bytes=0-1", "bytes=-3", "bytes=5-", "bytes=0-1,3-4", "bytes=0-0, 2-2 ,4-4", "BYTES=0-", "items=0-1")
DATES = edited(
    "Mon, 25 Dec 2023 12:00:00 GMT",
    "Sunday, 06-Nov-94 08:49:37 GMT",
    "Sun Nov  6 08:49:37 1994",
    "Fri, 31 Dec 9999 23:59:60 GMT",
    "Thu, 29 Feb 2024 00:00:00 GMT",
    "Thu, 01 Jan 1970 00:00:00 GMT",
)
TAGS = edited('"v1"', 'W/"v1"', '"a,b"', '"v1", W/"v2" ,"v3"', "*", '""')


def parse_by_grammar(text: str) -> list[tuple[int | None, int | None]] | None:
    """Read a Range by the grammar of RFC 9110 14.1.2, character by character."""
    unit, equals, rest = text.partition("=")
    if unit.lower() != "bytes" or not equals or rest.count(",") >= MAX_PARTS:
        return None
    specs: list[tuple[int | None, int | None]] = []
    for element in rest.split(","):
        trimmed = element.strip(" \t")
        if not trimmed:
            continue
        first, hyphen, last = trimmed.partition("-")
        if not hyphen or not first + last or not set(first + last) <= set("0123456789"):
            return None
        numbers = [None if not digits else int(digits.lstrip("0")[:4000] or "0") for digits in (first, last)]
        low, high = (digits.lstrip("0") for digits in (first, last))
        if first and last and (len(low), low) > (len(high), high):
            return None
        specs.append((numbers[0], numbers[1]))
    return specs or None


@target(st.tuples(RANGES, SIZES))
def ranges(value: tuple[str, int]) -> None:
    text, size = value
    parsed, expected = parse_range(text), parse_by_grammar(text)
    assert (parsed is None) == (expected is None), (parsed, expected)
    if parsed is None or expected is None:
        return
    assert len(parsed) == len(expected)
    wanted: list[set[int]] = []
    for first, last in expected:
        if first is None:
            assert last is not None
            wanted.append(set(range(max(size - last, 0), size)))
        else:
            wanted.append(set(range(min(first, size), size if last is None else min(last + 1, size))))
    parts = select_ranges(parsed, size)
    together: set[int] = set().union(*wanted)
    if size == 0:
        assert parts == "whole"
    elif not together:
        assert parts == "unsatisfiable"
    elif parts == "whole":
        assert len([one for one in wanted if one]) > 2
        assert sum(map(len, wanted)) > size
    else:
        assert not isinstance(parts, str)
        got = [position for part in parts for position in range(part.start, part.stop)]
        assert len(got) == len(set(got)), "a byte is sent twice"
        assert set(got) == together
        assert read_from(parts[0], parsed, size).start == parts[0].start


@target(edited("bytes 0-1/10", "bytes 5-9/*", "bytes */10", "BYTES 0-0/1", "bytes 999999999999999999-1/2"))
def content_range(text: str) -> None:
    parsed = parse_content_range(text)
    if parsed is None:
        return
    part, size = parsed
    assert 0 <= part.start < part.stop
    assert size is None or part.stop <= size
    again = f"bytes {part.start}-{part.stop - 1}/{'*' if size is None else size}"
    assert parse_content_range(again) == parsed
    assert re.sub("(?<![0-9])0+(?=[0-9])", "", text.lower()) == again


def tags_of(text: str) -> list[str] | None:
    """Read a list of entity tags [RFC 9110 8.8.3, 5.6.1] by a machine of states; None if it is not one."""
    tags, place, needs_comma = [], 0, False
    while place < len(text):
        if text[place] in " \t":
            place += 1
        elif text[place] == ",":
            place, needs_comma = place + 1, False
        elif needs_comma:
            return None
        else:
            start = place
            place += 2 if text.startswith("W/", place) else 0
            if text[place : place + 1] != '"' or (end := text.find('"', place + 1)) < 0:
                return None
            if any(not (c == "!" or "#" <= c <= "~" or "\x80" <= c <= "\xff") for c in text[place + 1 : end]):
                return None
            place, needs_comma = end + 1, True
            tags.append(text[start:place])
    return tags


@target(TAGS)
def etags(text: str) -> None:
    expected = tags_of(text)
    assert parse_etag_list(text) == (expected or [])
    tag = ETag.parse(text)
    assert (str(tag) == text) if tag is not None else expected != [text]


METADATA = st.builds(
    FileMetadata,
    size=SIZES,
    etag=st.sampled_from([None, ETag("v1"), ETag("v1", weak=True), ETag("a,b")]),
    last_modified=st.sampled_from([None, 0, 1_703_505_600, 1_703_505_601, 4_000_000_000]),
    max_reads=st.sampled_from([None, None, 1, 4]),
)
FIELDS = st.optional(
    {
        b"range": RANGES,
        b"if-range": TAGS | DATES,
        b"if-match": TAGS,
        b"if-none-match": TAGS,
        b"if-modified-since": DATES,
        b"if-unmodified-since": DATES,
        b"accept-encoding": edited("gzip, br;q=0.5"),
        b"want-repr-digest": edited("sha-256=1, sha-512=3"),
    },
)


def request_of(method: str, fields: dict[bytes, str]) -> DownloadRequest:
    return DownloadRequest.from_headers(method, [(name, text.encode("latin-1")) for name, text in fields.items()])


def matches(field: str, etag: ETag | None, *, strong: bool) -> bool:
    if field.strip(" \t") == "*":
        return True
    if etag is None:
        return False
    for text in tags_of(field) or []:
        is_weak, value = text.startswith("W/"), text.removeprefix("W/")
        if value == f'"{etag.value}"' and not (strong and (is_weak or etag.weak)):
            return True
    return False


@target(st.tuples(st.sampled_from(["GET", "HEAD"]), FIELDS, METADATA))
def conditions(value: tuple[str, dict[bytes, str], FileMetadata]) -> None:
    method, fields, metadata = value
    request = request_of(method, fields)
    status, modified = failed_precondition(request, metadata), metadata.last_modified
    since = parse_http_date(fields.get(b"if-unmodified-since", "").strip(" \t"))
    modified_since = parse_http_date(fields.get(b"if-modified-since", "").strip(" \t"))
    expected: int | None = None  # the steps of RFC 9110 13.2.2
    if b"if-match" in fields:
        expected = None if matches(fields[b"if-match"], metadata.etag, strong=True) else 412
    elif since is not None and modified is not None and modified > since:
        expected = 412
    if expected is None:
        if b"if-none-match" in fields:
            expected = 304 if matches(fields[b"if-none-match"], metadata.etag, strong=False) else None
        elif modified_since is not None and modified is not None and modified <= modified_since:
            expected = 304
    assert status == expected
    if b"if-range" in fields and range_applies(request, metadata):
        text = fields[b"if-range"].strip(" \t")
        is_tag = metadata.etag is not None and text == str(metadata.etag) and not metadata.etag.weak
        assert is_tag or (modified is not None and parse_http_date(text) == modified)


@target(
    st.tuples(
        st.sampled_from(["GET", "HEAD"]),
        FIELDS,
        METADATA,
        st.text(),
        st.booleans(),
        st.just(None) | edited("text/html; charset=utf-8", "image/svg+xml").map(valid_content_type),
    )
)
def plans(value: tuple[str, dict[bytes, str], FileMetadata, str, bool, str | None]) -> None:
    method, fields, metadata, name, attachment, content_type = value
    request = request_of(method, fields)
    shown = Presentation(filename=name, attachment=attachment, content_type=content_type)
    plan = make_plan(request, metadata, shown, now=1_800_000_000.0)
    assert plan.status in (200, 206, 304, 412, 416)
    for field, text in plan.headers.items():
        assert re.fullmatch("[a-z-]+", field)
        assert re.fullmatch(r"[\t\x20-\x7e\x80-\xff]*", text), (field, text)
    content = CONTENT[: metadata.size]
    sent = b"".join(
        content[piece.start : piece.stop] if isinstance(piece, ByteRange) else piece or b"" for piece in plan.body
    )
    if plan.status in (304, 412, 416) or method == "HEAD":
        assert sent == b""
    else:
        assert plan.headers["content-length"] == str(len(sent))
    if plan.status == 200 and method == "GET":
        assert sent == content
    if "content-range" in plan.headers and plan.status == 206:
        named = parse_content_range(plan.headers["content-range"])
        assert named is not None
        assert named[1] == metadata.size
        assert sent == content[named[0].start : named[0].stop]
    elif plan.status == 206:
        assert [part for _, part in parts_of(plan.headers["content-type"], sent)] == [
            content[piece.start : piece.stop] for piece in plan.body if isinstance(piece, ByteRange)
        ]
    if not attachment and is_active(plan.headers.get("content-type", "text/plain")) and plan.status == 200:
        assert plan.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    if method == "GET" and plan.status in (206, 416):
        assert parse_by_grammar(fields[b"range"].strip(" \t"))


def parts_of(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """Return the Content-Range and the content of each part, as Python's parser of mail reads them."""
    head = f"Content-Type: {content_type}\r\nContent-Transfer-Encoding: binary\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts: list[tuple[str, bytes]] = []
    boundary = message.get_boundary()
    assert boundary is not None
    # the parser of mail makes text of a part, so the bytes are cut by the boundaries that it has read
    for piece in body.split(f"\r\n--{boundary}".encode())[1:-1]:
        lines, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = email.parser.BytesHeaderParser(policy=email.policy.HTTP).parsebytes(lines)
        parts.append((str(fields["Content-Range"]), content))
    assert message.is_multipart()
    assert len(parts) == len(message.get_payload())
    return parts


@target(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 255), st.integers(1, 99)), min_size=2, max_size=20),
        st.sampled_from([None, "text/plain", "text/html; charset=utf-8"]),
    )
)
def multipart(value: tuple[list[tuple[int, int]], str | None]) -> None:
    spans = [ByteRange(start, min(start + length, 256)) for start, length in value[0]]
    boundary = new_boundary()
    pieces, length = multipart_body(spans, size=256, content_type=value[1], boundary=boundary)
    body = b"".join(CONTENT[piece.start : piece.stop] if isinstance(piece, ByteRange) else piece for piece in pieces)
    assert len(body) == length
    assert parts_of(f"multipart/byteranges; boundary={boundary}", body) == [
        (span.content_range(256), CONTENT[span.start : span.stop]) for span in spans
    ]


@target(DATES)
def dates(text: str) -> None:
    now = 1_700_000_000.0
    seconds = parse_http_date(text, now=now)
    if seconds is None:
        return
    year, *fields = datetime.fromtimestamp(seconds, UTC).timetuple()[:6]
    # every accepted date has the fields of an answer, in one of three places
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    assert len(numbers) == 5
    assert all(number in (*numbers, 59) for number in (*fields[1:], year % 100 if year not in numbers else year))
    assert 0 <= seconds <= LATEST or year < 1970
    if 0 <= seconds <= LATEST:
        assert parse_http_date(format_http_date(seconds)) == seconds
        with_time = time.strptime(format_http_date(seconds), "%a, %d %b %Y %H:%M:%S GMT")
        assert with_time[:6] == (year, *fields)


@target(st.binary(8).map(lambda data: struct.unpack("<d", data.ljust(8, b"\0"))[0]) | st.integers(-(10**20), 10**20))
def seconds_of_moments(moment: float) -> None:
    seconds = None if moment != moment else http_seconds(moment)
    if seconds is not None:
        assert parse_http_date(format_http_date(seconds)) == seconds


@target(edited_text("0", "3600", "2147483648", "0009"))
def delta_seconds(text: str) -> None:
    seconds = parse_delta_seconds(text)
    is_number = text != "" and set(text) <= set("0123456789")
    assert (seconds is not None) == is_number
    if is_number:
        digits = text.lstrip("0") or "0"
        assert seconds == (min(int(digits), LONGEST_DELTA) if len(digits) < 4000 else LONGEST_DELTA)


NAMES = edited_text(
    "report.pdf",
    "π.txt",
    'a"; filename="x.bat',
    "..\\..\\CON",
    "nul.txt",
    "a/b/c.tar.gz",
    "é" * 200 + ".txt",
    "com¹.a",
    ".hidden",
    "a .",
    "x" * 300 + "." + "y" * 90,
)


@target(st.tuples(NAMES, st.booleans()), regressions=[("a" + "\u0327\u0301" * 30_000, True)])
def disposition(value: tuple[str, bool]) -> None:
    name, attachment = value
    text = content_disposition(name, attachment=attachment)
    assert is_printable_ascii(text)
    saved = client_filename(name)
    assert saved == client_filename(saved), "a name that is saved is sent under another name"
    assert 0 < len(saved.encode()) <= MAX_BYTES
    assert not {"/", "\\", "\0", "\r", "\n", "\u202e"} & set(saved)
    assert not is_device_name(saved)
    assert saved not in (".", "..")
    parsed = email.message.Message()
    parsed["Content-Disposition"] = text
    assert parsed.get_content_disposition() == ("attachment" if attachment else "inline")
    grammar = r'(attachment|inline); filename="([^"\\%/]+)"(; filename\*=UTF-8\'\'([!#$&+.^_`|~0-9A-Za-z%-]+))?'
    written = re.fullmatch(grammar, text)
    assert written is not None
    assert client_filename(written[2]) == written[2]
    extended = (written[4] or written[2]).encode()
    exact = re.sub(b"%(..)", lambda hexed: bytes([int(hexed[1], 16)]), extended).decode()
    assert (exact if written[4] else written[2]) == saved


@target(edited("text/html; charset=utf-8", 'a/b; c="d e"; f=g', "image/svg+xml", "text/plain;", "application/json"))
def content_types(text: str) -> None:
    valid = valid_content_type(text)
    assert valid in (None, text)
    if valid is None:
        return
    assert is_printable_ascii(text.replace("\t", " "))
    message = email.message.Message()
    message["Content-Type"] = text
    assert "/" in text.partition(";")[0]
    charset = with_charset(text)
    assert valid_content_type(charset) is not None or len(charset) > 255
    assert with_charset(charset) == charset
    if not is_active(text):
        assert "html" not in message.get_content_type()
        assert not message.get_content_type().endswith("+xml")


@target(NAMES)
def types_of_names(name: str) -> None:
    assert valid_content_type(content_type_for(name)) is not None


@target(
    edited("gzip, br;q=0.5", "*;q=0", "identity;q=0, *", "x-gzip", "br;q=1.000,gzip;q=0.001"),
    regressions=["gzip;q=0"],
)
def accepted_encodings(text: str) -> None:
    available = ("br", "zstd", "gzip")
    preferred = preferred_encodings(text, available)
    assert len(set(preferred)) == len(preferred)
    assert set(preferred) <= set(available)
    for name in preferred:  # it, or everything, is named
        assert name in text.lower() or "*" in text
    for element in text.split(","):
        name, _, quality = (part.strip(" \t").lower() for part in element.partition(";"))
        if quality in ("q=0", "q=0.0", "q=0.000") and text.lower().count(name) == 1:
            assert name not in preferred


@target(edited("text/html, */*;q=0.1", "application/json", "application/*;q=0.5, text/html;q=0", "*/*;q=1.000"))
def accepted_types(text: str) -> None:
    available = ("text/html", "application/json", "application/x-ndjson")
    assert preferred_type(text, available) in available


@target(edited("gzip", "br, gzip", "aws-chunked", "identity", "gzip,aws-chunked", "utf-8"))
def codings(text: str) -> None:
    coding = content_coding(text)
    if coding is None:
        return
    assert content_coding(coding) == coding
    assert not hides_coding(coding)
    assert "aws-chunked" not in coding.split(", ")


DIGEST = "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"


@target(
    edited(
        DIGEST, f"{DIGEST}, sha-512=:AA==:", "sha-256=1, sha-512=3", "a=(1 2);q=1, b=?1;c", 'a="\\"x", b=%"x"', "a=@-1"
    )
)
def digests(text: str) -> None:
    parsed = parse_repr_digest(text)
    assert all(len(value) == ALGORITHMS[name] for name, value in parsed)
    assert parse_repr_digest(repr_digest(parsed)) == parsed
    known = (("sha-256", b"a" * 32), ("sha-512", b"b" * 64))
    assert len(preferred_digest(known, text)) <= 1
    for name in ALGORITHMS:  # "0" is refused [RFC 9530 4]
        if re.fullmatch(f"{name}=0", text):
            assert name not in dict(preferred_digest(known, text))


@target(st.lists(st.tuples(st.sampled_from([b"content-length", b"Content-Length", b"x"]), st.latin().map(str.encode))))
def lengths(headers: list[tuple[bytes, bytes]]) -> None:
    length = length_of(headers)
    assert length is None or 0 <= length < 10**19


@target(edited_text("a.txt", "a\nb", "x" * 2000))
def log_texts(text: str) -> None:
    for line in (shown(text), escaped(text)):
        assert is_printable_ascii(line)
        assert len(line) <= LIMIT + 60


UPSTREAM = st.optional(
    {
        "content-length": edited("10", "0", "4"),
        "content-range": edited("bytes 0-3/10", "bytes 2-5/10", "bytes */10", "bytes 0-9/10", "bytes 0-1/*"),
        "content-type": edited("text/plain", "multipart/byteranges; boundary=x"),
        "content-encoding": edited("gzip", "aws-chunked", "identity"),
        "cache-control": edited("max-age=60", "no-store"),
        "etag": TAGS,
        "last-modified": DATES,
        "date": DATES,
        "age": edited("0", "10, 20"),
        "retry-after": edited("120", "Mon, 25 Dec 2023 12:00:00 GMT"),
        "vary": st.latin(),
        "expires": DATES,
        "repr-digest": edited(DIGEST),
        "content-digest": edited(DIGEST),
        "transfer-encoding": st.just("chunked"),
        "set-cookie": st.latin(),
        "x-accel-redirect": st.latin(),
        "x-sendfile": st.latin(),
    },
)
_STATUSES = [200, 200, 206, 206, 203, 204, 304, 403, 404, 406, 410, 412, 416, 429, 500, 503]


@target(st.tuples(st.sampled_from(_STATUSES), UPSTREAM, st.sampled_from(["GET", "HEAD"]), FIELDS))
def upstream_answers(value: tuple[int, dict[str, str], str, dict[bytes, str]]) -> None:
    status, fields, method, asked = value
    request = request_of(method, asked)
    sent = upstream.fields_to_send(request)
    answer = Answer(status=status, fields=fields, received=Received.now(fields), method=method, sent=sent)
    assert answer.received.age >= 0
    upstream.is_refusal(answer)
    try:
        content = upstream.described(answer, request, "http://upstream.example/a")
    except FileError:
        return
    metadata = content.metadata
    allowed = {"content-encoding", "content-language", "cache-control", "expires", "vary", "age"}
    assert {name for name, _ in metadata.headers} <= allowed
    assert all(not set("\r\n\0") & set(text) for _, text in metadata.headers)
    assert content.start >= 0
    assert content.stop is None or content.start <= content.stop
    if content.exists and content.stop is not None and metadata.size is not None:
        assert content.stop <= metadata.size
    plan = make_plan(request, metadata, Presentation(filename="a"), now=1_800_000_000.0)
    assert all(not set("\r\n\0") & set(text) for text in plan.headers.values())
    for span in (None, ByteRange(0, 4)):
        try:
            following = upstream.continued(answer, span, metadata, "http://upstream.example/a")
        except FileError:
            continue
        if status == 206 and span is not None:
            assert following.start <= span.start
            assert following.is_short or (following.stop is not None and following.stop >= span.stop)


# --- the bytes of an upstream server


def client_of(method: str) -> h11.Connection:
    """Return h11's client, which has just sent a request."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "upstream.example")]))
    client.send(h11.EndOfMessage())
    return client


HEADS = edited_bytes(
    b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\nETag: "v1"\r\nVary: a\r\nVary: b',
    b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-3/10",
    b"HTTP/1.0 200\nConnection: close, x\nX: a\n b",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nContent-Length: 5",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>",
    words=[b"Content-Length: 10", b"Transfer-Encoding: chunked", b"\r\n ", b"\n\t", b": ", b"HTTP/1.1 ", b"close"],
)


@target(st.tuples(HEADS, st.sampled_from(["GET", "HEAD"])), regressions=[(b"", "GET"), (b"\r", "GET")])
def heads_of_upstreams(value: tuple[bytes, str]) -> None:
    received, method = value
    raw = END_OF_HEAD.split(received, maxsplit=1)[0]
    try:
        head = parse_response_head(raw, method)
    except UpstreamError as exc:
        assert str(exc).isprintable()
        return
    assert 100 <= head.status <= 999
    for name, text in head.fields.items():
        assert re.fullmatch(r"[a-z0-9!#$%&'*+.^_`|~-]+", name)
        assert not set("\r\n\0") & set(text)
    assert head.length is None or (0 <= head.length < 10**18 and not head.is_chunked)
    if method == "HEAD" or head.status < 200 or head.status in (204, 304):
        assert head.length == 0
    client = client_of(method)
    client.receive_data(raw.removesuffix(b"\r") + b"\r\n\r\n")
    try:
        event = client.next_event()
    except h11.RemoteProtocolError:  # it refuses more: control characters, for example
        return
    if not isinstance(event, h11.Response | h11.InformationalResponse):
        return
    fields: dict[str, str] = {}
    for field, content in event.headers:
        name, text = field.decode(), content.decode("latin-1")
        fields[name] = f"{fields[name]}, {text}" if name in fields else text
    assert (event.status_code, fields) == (head.status, head.fields)


CHUNKED = edited_bytes(
    b"5\r\n01234\r\n3;a=b\r\n567\r\n0\r\n\r\n",
    b"0\r\nA: b\r\nContent-Length: 7\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    b"0000a \r\n0123456789\r\n0\r\n\r\n",
    b"1000\r\n" + bytes(4096) + b"\r\n0\r\n\r\n",
    words=[b"0\r\n\r\n", b"5\r\n01234\r\n", b"fffffffffffffff", b"1;" + b"x" * 5000, b"a" * 70_000],
)


def unchunked(sent: bytes, size: int) -> tuple[bytes, bytes, bool] | None:
    """Return the body, what comes after it and whether it is complete, of pieces of some size; None if it is wrong."""
    chunks, body, place = Dechunker(), [], 0
    try:
        while place < len(sent) and not chunks.is_complete:
            body.append(chunks.feed(sent[place : place + size]))
            place += size
    except UpstreamError as exc:
        assert str(exc).isprintable()
        return None
    return b"".join(body), chunks.rest + sent[place:], chunks.is_complete


@target(st.tuples(CHUNKED, st.integers(1, 7)), regressions=[(b"0\r\n" + b"A" * 4096 + b"\r\n\r\n", 1)])
def chunked_bodies(value: tuple[bytes, int]) -> None:
    sent, size = value
    whole = unchunked(sent, len(sent) + 1)
    assert unchunked(sent, size) == whole
    if whole is None:
        return
    body, rest, is_complete = whole
    assert len(body) + len(rest) <= len(sent)
    if re.search(rb"(?<!\r)\n", sent):  # with which a line of h11 may end
        return
    client = client_of("GET")
    client.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + sent)
    read = b""
    try:
        while not isinstance(event := client.next_event(), type(h11.NEED_DATA)):
            if isinstance(event, h11.Data):
                read += event.data
            if isinstance(event, h11.EndOfMessage):
                assert (read, client.trailing_data[0], True) == (body, rest, is_complete)
                return
    except h11.RemoteProtocolError:  # it refuses more, such as what stands in a trailer
        return
    assert read == body
    assert not is_complete


# --- archives

PATHS = edited_text(
    "a.txt",
    "a/b.txt",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "a//b",
    "a/./b",
    "a/../b",
    "folder/",
    "..",
    "a\\..\\b",
    "~/x",
    "-rf",
)


@target(PATHS, regressions=[".:."])
def names_in_archives(path: str) -> None:
    name = safe_name(path)
    assert name == safe_name(name)
    assert name.endswith("/") == path.endswith("/")
    name.encode()
    for system in (posixpath, ntpath):
        assert not system.isabs(name)
        assert not system.splitdrive(name)[0]
        inside = system.normpath(system.join("target", name))
        assert inside.split(system.sep)[0] == "target"
        assert inside != "target"
    assert is_single_line(name)


def is_single_line(text: str) -> bool:
    return not re.search("[\x00-\x1f\x7f]", text)


@target(st.lists(PATHS | st.sampled_from(["a", "a (2)", "a/b", "a/", "a.txt", "a (2).txt"]), max_size=12))
def distinct_names_in_archives(paths: list[str]) -> None:
    safe = [safe_name(path[:300]) for path in paths]
    names = distinct_names(safe)
    assert len(names) == len(safe)
    files = [name for name in names if not name.endswith("/")]
    assert len(set(files)) == len(files), "two files have one name"
    folders = {folder for name in names for folder in parents_of(name)}
    assert folders.isdisjoint(files), "a file is where a folder has to be"
    for name, path in zip(names, safe, strict=True):
        assert not path.endswith("/") or name == path
        assert safe_name(name) == name


def parents_of(name: str) -> list[str]:
    return ["/".join(name.split("/")[:number]) for number in range(1, name.count("/") + 1)]


MEMBERS = st.lists(
    st.tuples(
        PATHS,
        st.binary(max_size=20),
        st.just(None) | st.integers(-(2**40), 2**40) | st.integers(0, 2**32),
        st.just(None) | st.integers(0, 0o7777),
    ),
    max_size=8,
)


@target(st.tuples(MEMBERS, st.integers(0, 2000), st.integers(0, 2000)))
def zip_layouts(value: tuple[list[tuple[str, bytes, int | None, int | None]], int, int]) -> None:
    listed, start, stop = value
    names = distinct_names(safe_name(path[:4000]) for path, *_ in listed)
    contents = [b"" if name.endswith("/") else content for name, (_, content, *_) in zip(names, listed, strict=True)]
    members = [
        Member(name, len(content), modified, mode)
        for name, content, (_, _, modified, mode) in zip(names, contents, listed, strict=True)
    ]
    layout = _layout_of(members)
    if layout is None:
        return
    crcs = [zlib.crc32(content) for content in contents]
    whole = bytes_of(layout, contents, crcs, ByteRange(0, layout.size))
    assert len(whole) == layout.size
    known = bytes_of(layout, contents, crcs, ByteRange(0, layout.size), tells=dict(enumerate(crcs)))
    assert known == whole
    span = ByteRange(min(start, stop, layout.size), min(max(start, stop), layout.size))
    assert bytes_of(layout, contents, crcs, span) == whole[span.start : span.stop]
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        assert opened.testzip() is None
        assert [info.orig_filename for info in opened.infolist()] == names
        assert [opened.read(info) for info in opened.infolist()] == contents
        for info, member in zip(opened.infolist(), members, strict=True):
            assert info.is_dir() == member.is_folder
            assert member.mode is None or info.external_attr >> 16 & 0o7777 == member.mode


def _layout_of(members: list[Member]) -> ZipLayout | None:
    try:
        return ZipLayout(members)
    except ValueError:
        assert any(not 0 < len(member.name.encode()) <= 0xFFFF for member in members)
        return None


def bytes_of(
    layout: ZipLayout, contents: list[bytes], crcs: list[int], span: ByteRange, tells: dict[int, int] | None = None
) -> bytes:
    sent = bytearray()
    pieces: Any = layout.pieces(span, tells) if tells is not None else layout.pieces(span)
    for piece in pieces:
        if isinstance(piece, Content):
            sent += contents[piece.index][piece.span.start : piece.span.stop]
        elif isinstance(piece, Checked):
            sent += layout.checked(piece, crcs[piece.index])
        else:
            sent += piece
    return bytes(sent)
