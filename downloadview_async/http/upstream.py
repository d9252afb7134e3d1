"""The pure half of remote files: which header fields to send to an upstream, and what its answer means.

Conditions and the range are sent upstream; an allow-list of headers is passed back. Nothing here does I/O.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from downloadview_async.errors import FileMissing, PreconditionFailed, UpstreamBusy, UpstreamError, UpstreamRefused
from downloadview_async.http.conditional import failed_precondition, parse_etag_list, range_applies
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.dates import parse_delta_seconds, parse_http_date
from downloadview_async.http.digest import Digests, parse_repr_digest
from downloadview_async.http.fields import OFFLOAD_ORDERS
from downloadview_async.http.metadata import MAX_READS, ByteRange, ETag, FileMetadata, is_meaningful
from downloadview_async.http.negotiation import content_coding
from downloadview_async.http.ranges import RangeSpec, parse_content_range, parse_range, select_ranges
from downloadview_async.http.request import DownloadRequest

# With these statuses an upstream may refuse a HEAD, a Range or a precondition, which it could have ignored. 404, 410
# and 429 are about the file or the client; 502 to 504 are answers of a gateway. They are not refusals.
REFUSALS = frozenset({*range(400, 500), 500, 501, 505}) - {404, 406, 410, 412, 416, 429}

# To a HEAD, these too leave open what a GET would get: URLs signed for GET and frameworks without routes for HEAD
# answer 404, application servers 204, and gateways 502 or 503 if the application sends a body to a HEAD.
_REFUSALS_OF_HEAD = REFUSALS | {204, 404, 502, 503}

_MAX_ONCE = 8 << 20  # bytes: a file without a strong validator up to this size is read once for all of its parts

_CLOCKS = 60  # seconds by which the clock of an upstream may differ from ours if it sends no Date

# No other header of an upstream is passed on: X-Accel-*, X-Sendfile*, X-Reproxy-* and Set-Cookie are orders to our
# proxy or to our client. Content-Length, -Type, -Range, ETag and Last-Modified are read, checked and generated anew.
_PASSED_HEADERS = ("content-language", "cache-control", "expires", "vary", "content-encoding", "age")

_UNSATISFIED_RANGE = re.compile(r"bytes \*/([0-9]{1,18})", re.IGNORECASE)
_LENGTH = re.compile("[0-9]{1,18}")
_RETRY_AFTER = re.compile("[0-9]{1,9}")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """When the answer of another server was made.

    date: its Date, or if it has none, when it was received, in seconds since the epoch. at: when it was received by our
    clock, in seconds since the epoch. age: how many seconds old it was then, as far as that is known: the
    "corrected_initial_age" [RFC 9111 4.2.3].
    """

    date: float
    at: float
    age: float = 0.0

    @classmethod
    def now(cls, fields: Mapping[str, str]) -> "Received":
        """Return the times of an answer with these fields that has just been received."""
        now = time.time()
        date = parse_http_date(fields.get("date", ""))
        age = max(0.0 if date is None else now - date, float(_age(fields) or 0))
        return cls(date=now if date is None else date, at=now, age=age)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The head of an upstream's answer, with the method and the header fields of the request.

    fields, sent: names in lower case.
    """

    status: int
    fields: Mapping[str, str]
    received: Received
    method: str = "GET"
    sent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """The file that an answer describes, and the bytes of the file that are in its content.

    start, stop: the first byte, and the one after the last; stop is None if it is not known. The requested bytes may be
    a part of these. exists: whether the answer has any content of the file. is_short: whether it has less than was
    requested.
    """

    metadata: FileMetadata
    start: int = 0
    stop: int | None = None
    exists: bool = True
    is_short: bool = False


def joined_fields(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the fields of a message by their names in lower case; fields of the same name are joined."""
    fields: dict[str, str] = {}
    for raw_name, raw_value in raw:
        name, value = raw_name.lower().decode("latin-1"), raw_value.decode("latin-1")
        # A list may be sent in several fields. A field that may be sent only once does not parse when it is joined.
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def single_range(request: DownloadRequest) -> RangeSpec | None:
    """Return the range of a GET for a single range, which is sent upstream; else None."""
    specs = request.ranges
    return specs[0] if specs is not None and len(specs) == 1 else None


def fields_to_send(request: DownloadRequest) -> dict[str, str]:
    """Return the header fields that pass a client's request on to an upstream."""
    conditions = {
        "if-match": request.if_match,
        "if-unmodified-since": request.if_unmodified_since,
        "if-none-match": request.if_none_match,
        "if-modified-since": request.if_modified_since,
    }
    fields = {name: value for name, value in conditions.items() if value}
    since = parse_http_date(request.if_modified_since or "")
    if since is None or not is_meaningful(since):
        fields.pop("if-modified-since", None)  # every version may have this time, so a 304 would prove nothing
    fields["accept-encoding"] = "identity"
    if (spec := single_range(request)) is not None:
        first, last = ("" if number is None else number for number in spec)
        fields["range"] = f"bytes={first}-{last}"
        if request.if_range:
            fields["if-range"] = request.if_range
    return fields


def is_refusal(answer: Answer) -> bool:
    """Return whether an answer refuses something optional, so that a plain GET may get the file."""
    status, fields, sent = answer.status, answer.fields, answer.sent
    is_optional = answer.method == "HEAD" or len(sent) > 1
    match status:
        case 200 | 203 if answer.method == "HEAD":
            # Many frameworks send the length of the empty body that a HEAD gets. Few files are really empty.
            return fields.get("content-length") == "0" and OFFLOAD_ORDERS.isdisjoint(fields)
        case 206 if "range" in sent:
            return _is_unusable_part(answer)
        case 304 if not {"if-none-match", "if-modified-since"}.isdisjoint(sent):
            return _is_of_another_version(answer)
        case 406:
            return "accept-encoding" in sent
        case 412:
            return is_optional and {"if-match", "if-unmodified-since"}.isdisjoint(sent)
        case 416:
            return is_optional and not _is_unsatisfied(answer)
    return status in (_REFUSALS_OF_HEAD if answer.method == "HEAD" else REFUSALS) and is_optional


def described(answer: Answer, request: DownloadRequest, url: str) -> Content:
    """Return what an answer tells about a file. Raises `FileError` for any other answer.

    request: the client's request to us. url: for error messages.
    """
    status, fields, sent = answer.status, answer.fields, answer.sent
    has_content = answer.method != "HEAD"
    match status:
        case 200 | 203:  # a proxy has changed what the origin sent [RFC 9110 15.3.4]
            size = content_length(fields)
            if size == 0 and (order := OFFLOAD_ORDERS.intersection(fields)):
                raise UpstreamError(
                    f"{url!r} sent {', '.join(order)} and no bytes: it is behind its own proxy, so give this source "
                    "the URL of that proxy"
                )
            return Content(metadata=_metadata(answer, size), stop=size, exists=has_content)
        case 206 if (spec := single_range(request)) is not None and "range" in sent:
            part, size = content_range(fields)
            is_short = _is_short(answer)
            if size is not None and not is_short and not _has_range(part, spec, size):
                sent_range = fields.get("content-range")
                raise UpstreamError(f"{url!r} sent {sent_range!r}, which is not the requested range")
            metadata = _metadata(answer, size)
            return Content(metadata=metadata, start=part.start, stop=part.stop, exists=has_content, is_short=is_short)
        case 206 if "content-range" in fields:  # the whole file as a part, though no Range was sent
            part, size = content_range(fields)
            if size is not None and part == ByteRange(0, size):
                return Content(metadata=_metadata(answer, size), stop=size, exists=has_content)
            raise UpstreamError(f"{url!r} sent a part, and was not asked for one")
        case 304 if not {"if-none-match", "if-modified-since"}.isdisjoint(sent):
            return Content(metadata=_readable(_not_modified(_metadata(answer, None), request), None), exists=False)
        case 412 if not {"if-match", "if-unmodified-since"}.isdisjoint(sent):
            raise PreconditionFailed(f"{url!r} answered 412")
        case 416 if (match := _UNSATISFIED_RANGE.fullmatch(fields.get("content-range", ""))) and "range" in sent:
            # the other fields describe the error page
            return Content(metadata=_readable(validators(answer), int(match[1])), exists=False)
        case 404 | 410:
            raise FileMissing(f"{url!r} answered {status}")
        case 429 | 503:
            raise UpstreamBusy(f"{url!r} answered {status}", status=status, retry_after=_retry_after(fields))
        case 206 | 304 | 500 | 502 | 504:  # nobody has asked for a part, or whether it was modified
            raise UpstreamError(f"{url!r} answered {status}")
    raise UpstreamRefused(f"{url!r} answered {status}", answered=status)


def continued(answer: Answer, span: ByteRange | None, metadata: FileMetadata, url: str) -> Content:
    """Return which bytes of the file are in the answer to a further request, for a span or (None) for the whole file.

    metadata: from the first answer. Raises `UpstreamError` if the answer does not have the requested bytes.
    """
    fields, size = answer.fields, metadata.size
    wanted = ByteRange(0, size) if span is None and size is not None else span
    if answer.status == 206 and wanted is not None:
        part, whole = content_range(fields)
        # only an answer to a request for a part may have less
        is_short = span is not None and metadata.is_pinned and _begins(part, wanted)
        if not (is_short or _contains(part, wanted)) or whole not in (None, size):
            raise UpstreamError(f"{url!r} sent {part} of {whole}, but {wanted} was requested")
        return Content(metadata=metadata, start=part.start, stop=part.stop, is_short=is_short)
    if answer.status in (200, 203) and (size is None or content_length(fields) in (None, size)):
        return Content(metadata=metadata, stop=content_length(fields))
    raise UpstreamError(f"{url!r} answered {answer.status} to the request for the next part")


def version_of(fields: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return the fields that tell one version of a file from another, whether they are strong validators or not."""
    return fields.get("etag"), fields.get("last-modified")


def validators(answer: Answer) -> FileMetadata:
    """Return the validators of an answer.

    A Last-Modified less than a second before Date is left out, because the next version may have the same
    [RFC 9110 8.8.2.2]; so is one that is not meaningful.
    """
    fields = answer.fields
    etag = ETag.parse(fields.get("etag", ""))
    modified = parse_http_date(fields.get("last-modified", ""))
    margin = 1 if "date" in fields or etag is not None else _CLOCKS
    if modified is not None and not (is_meaningful(modified) and modified <= answer.received.date - margin):
        modified = None
    return FileMetadata(etag=etag, last_modified=modified)


def content_length(fields: Mapping[str, str]) -> int | None:
    """Return the Content-Length of an answer, or None without one. Raises `UpstreamError` if it does not parse."""
    length = fields.get("content-length")
    if length is None or "transfer-encoding" in fields:
        return None
    if not _LENGTH.fullmatch(length):
        raise UpstreamError(f"the upstream sent an invalid Content-Length: {length!r}")
    return int(length)


def content_range(fields: Mapping[str, str]) -> tuple[ByteRange, int | None]:
    """Return the part and the size that a 206 names. Raises `UpstreamError` if it does not parse."""
    value = fields.get("content-range", "")
    if (named := parse_content_range(value)) is None:
        raise UpstreamError(f"the upstream sent an invalid Content-Range: {value!r}")
    part, size = named
    length = content_length(fields)
    if length is not None and length != len(part):
        raise UpstreamError(f"the upstream sent a Content-Length of {length} with a Content-Range of {value!r}")
    return part, size


def _is_unusable_part(answer: Answer) -> bool:
    """Return whether a 206 does not name its part, or is short and has no strong validator to get the rest by."""
    fields = answer.fields
    is_multipart = fields.get("content-type", "").lower().startswith("multipart/byteranges")
    if is_multipart or "content-range" not in fields:
        return True
    return _is_short(answer) and not validators(answer).is_pinned


def _is_short(answer: Answer) -> bool:
    """Return whether a 206 has only the beginning of the requested range [RFC 9110 15.3.7]."""
    try:
        part, size = content_range(answer.fields)
    except UpstreamError:
        return False
    specs = parse_range(answer.sent["range"])
    parts = None if specs is None or size is None else select_ranges(specs, size)
    return isinstance(parts, list) and _begins(part, parts[0])


def _is_of_another_version(answer: Answer) -> bool:
    """Return whether a 304 has validators other than those that it was requested by [RFC 9111 4.3.4].

    The same holds for a time that every version may have, and if it leaves open which of several versions is current.
    """
    fields, sent = answer.fields, answer.sent
    if "if-none-match" in sent:
        request = DownloadRequest(if_none_match=sent["if-none-match"])
        if (etag := ETag.parse(fields.get("etag", ""))) is None:
            return len(parse_etag_list(sent["if-none-match"])) > 1
        return failed_precondition(request, FileMetadata(etag=etag)) is None
    modified, since = (parse_http_date(text) for text in (fields.get("last-modified", ""), sent["if-modified-since"]))
    return modified is not None and (not is_meaningful(modified) or since is None or modified > since)


def _has_range(part: ByteRange, spec: RangeSpec, size: int) -> bool:
    """Return whether the range that was asked for can be cut out of a part of a file."""
    parts = select_ranges([spec], size)
    return isinstance(parts, list) and _contains(part, parts[0])


def _begins(part: ByteRange, wanted: ByteRange) -> bool:
    """Return whether a part is the beginning of what is wanted, and not all of it."""
    return part.start == wanted.start and part.stop < wanted.stop


def _contains(part: ByteRange, wanted: ByteRange) -> bool:
    return part.start <= wanted.start and wanted.stop <= part.stop


def _is_unsatisfied(answer: Answer) -> bool:
    """Return whether a 416 is right: it tells a size with which the range cannot be satisfied [RFC 9110 15.5.17]."""
    match = _UNSATISFIED_RANGE.fullmatch(answer.fields.get("content-range", ""))
    specs = parse_range(answer.sent.get("range", ""))
    if match is None or specs is None or select_ranges(specs, int(match[1])) != "unsatisfiable":
        return False
    condition = DownloadRequest(if_range=answer.sent.get("if-range"))
    return range_applies(condition, validators(answer))


def _readable(metadata: FileMetadata, size: int | None) -> FileMetadata:
    """Return metadata with a size and with the number of reads that an answer may cost."""
    return replace(metadata, size=size, max_reads=_max_reads(metadata, size))


def _max_reads(metadata: FileMetadata, size: int | None) -> int:
    """Return the number of reads that an answer may cost.

    Several reads must be of one version, which only a strong validator proves. Without one, all parts are read from one
    answer, if the file is small enough to read over the gaps between them.
    """
    return MAX_READS if metadata.is_pinned or (size or 0) <= _MAX_ONCE else 1


def _retry_after(fields: Mapping[str, str]) -> str | None:
    value = fields.get("retry-after", "")
    return value if _RETRY_AFTER.fullmatch(value) or parse_http_date(value) is not None else None


def _age(fields: Mapping[str, str]) -> int | None:
    """Return the Age of an answer in seconds, of several the first one [RFC 9111 5.1], or None if it is not valid."""
    return parse_delta_seconds(fields.get("age", "").partition(",")[0].rstrip(" "))


def _metadata(answer: Answer, size: int | None) -> FileMetadata:
    """Return what an answer tells about a file of some size."""
    pinning, fields = validators(answer), answer.fields
    return FileMetadata(
        size=size,
        etag=pinning.etag,
        last_modified=pinning.last_modified,
        content_type=valid_content_type(fields.get("content-type")),
        max_reads=_max_reads(pinning, size),
        headers=tuple(_passed_fields(fields)),
        digests=_digests(answer),
    )


def _passed_fields(fields: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in _PASSED_HEADERS:
        value = fields.get(name)
        if value is None or not _FIELD_VALUE.fullmatch(value):
            continue
        if name == "content-encoding":
            value = content_coding(value)
        elif name == "age":
            value = None if (age := _age(fields)) is None else str(age)
        if value is not None:
            yield name, value


def _digests(answer: Answer) -> Digests:
    """Return the digests of the whole file that an upstream tells.

    They are about the bytes after a content coding [RFC 9530 3], so there must be none. Content-Digest is about the
    content of one message [2], which is the whole file in a 200 to a GET. A 203 has other bytes than the origin sent.
    """
    fields = answer.fields
    if answer.status == 203 or fields.get("content-encoding", "").strip(" \t").lower() not in ("", "identity"):
        return ()
    is_whole = answer.status == 200 and answer.method == "GET"
    for name in ("repr-digest", "content-digest") if is_whole else ("repr-digest",):
        if name in fields and (digests := parse_repr_digest(fields[name])):
            return digests
    return ()


def _not_modified(metadata: FileMetadata, request: DownloadRequest) -> FileMetadata:
    """Return metadata with the client's validators, which a 304 confirms even if it has no validators itself."""
    if failed_precondition(request, metadata) == 304:
        return metadata
    tags = parse_etag_list(request.if_none_match or "")
    return replace(
        metadata,
        etag=ETag.parse(tags[0]) if tags else metadata.etag,
        last_modified=parse_http_date(request.if_modified_since or "") or metadata.last_modified,
    )
