"""The pure half of remote files: what an upstream is asked, and what its answer says of a file.

Conditions and the range go upstream, and an allow-list of headers comes back. Nothing here does I/O.
"""

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from downloadview_async.errors import FileMissing, PreconditionFailed, UpstreamBusy, UpstreamError
from downloadview_async.http.conditional import failed_precondition, parse_etag_list, range_applies
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.dates import parse_delta_seconds, parse_http_date
from downloadview_async.http.fields import OFFLOAD_ORDERS
from downloadview_async.http.metadata import MAX_READS, ByteRange, ETag, FileMetadata, is_meaningful
from downloadview_async.http.negotiation import content_coding
from downloadview_async.http.ranges import RangeSpec, parse_range, select_ranges
from downloadview_async.http.request import DownloadRequest

# Statuses of an upstream that may refuse what it could have ignored: a HEAD, a Range, a precondition. 404, 410 and 429
# are about the file or the client, and so are all that a gateway answers (502 to 504).
REFUSALS = frozenset({*range(400, 500), 500, 501, 505}) - {404, 406, 410, 412, 416, 429}

# Further ones that say nothing of a GET: URLs signed for GET and frameworks without routes for HEAD answer 404, servers
# of applications 204, and gateways 502 or 503 where an application sends a body all the same.
_REFUSALS_OF_HEAD = REFUSALS | {204, 404, 502, 503}

_MAX_ONCE = 8 << 20  # bytes of a file without a strong validator that are read for a few parts of it

_CLOCKS = 60  # seconds that the clock of an upstream which tells no Date may differ from ours

# Whatever else an upstream says stays with us: X-Accel-*, X-Sendfile*, X-Reproxy-* and Set-Cookie are orders to our
# proxy or to our client. Content-Length, -Type, -Range, ETag and Last-Modified are read, checked and made anew.
_PASSED_HEADERS = ("content-encoding", "content-language", "cache-control", "expires", "vary", "age")

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.IGNORECASE)
_UNSATISFIED_RANGE = re.compile(r"bytes \*/([0-9]{1,18})", re.IGNORECASE)
_LENGTH = re.compile("[0-9]{1,18}")
_RETRY_AFTER = re.compile("[0-9]{1,9}")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """When the answer of another server was made, in seconds.

    date: its Date, or where it tells none, when it was received, since the epoch. at: when it was received, since the
    epoch by our clock. age: how old it was then, as far as that can be told: the "corrected_initial_age"
    [RFC 9111 4.2.3].
    """

    date: float
    at: float
    age: float = 0.0

    @classmethod
    def now(cls, fields: Mapping[str, str]) -> "Received":
        """Return when an answer with these fields was made that has been received just now."""
        now = time.time()
        date = parse_http_date(fields.get("date", ""))
        age = max(0.0 if date is None else now - date, float(_age(fields) or 0))
        return cls(date=now if date is None else date, at=now, age=age)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The head of an upstream's answer, and the method and the header fields that it answers.

    fields, sent: names in lower case.
    """

    status: int
    fields: Mapping[str, str]
    received: Received
    method: str = "GET"
    sent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What an answer says of a file, and which of its bytes are in the content.

    start, stop: the first byte, and the one after the last; stop is None where it is not known. What was asked for may
    be a part of them. exists: whether there is any content of the file. is_short: whether more was asked for.
    """

    metadata: FileMetadata
    start: int = 0
    stop: int | None = None
    exists: bool = True
    is_short: bool = False


def joined_fields(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the fields of a message by their names in lower case."""
    fields: dict[str, str] = {}
    for raw_name, raw_value in raw:
        name, value = raw_name.lower().decode("latin-1"), raw_value.decode("latin-1")
        # A list may come in several fields. A field that may come once, and comes twice, does not parse then.
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def single_range(request: DownloadRequest) -> RangeSpec | None:
    """Return the range of a GET that asks for one, which is the upstream's to answer, else None."""
    if request.method != "GET" or request.range is None:
        return None
    specs = parse_range(request.range)
    return specs[0] if specs is not None and len(specs) == 1 else None


def fields_to_send(request: DownloadRequest) -> dict[str, str]:
    """Return the header fields that ask an upstream what a client asks us."""
    conditions = {
        "if-match": request.if_match,
        "if-unmodified-since": request.if_unmodified_since,
        "if-none-match": request.if_none_match,
        "if-modified-since": request.if_modified_since,
    }
    fields = {name: value for name, value in conditions.items() if value}
    since = parse_http_date(request.if_modified_since or "")
    if since is None or not is_meaningful(since):
        fields.pop("if-modified-since", None)  # all versions may have this time, so a 304 would prove nothing
    fields["accept-encoding"] = "identity"
    if (spec := single_range(request)) is not None:
        first, last = ("" if number is None else number for number in spec)
        fields["range"] = f"bytes={first}-{last}"
        if request.if_range:
            fields["if-range"] = request.if_range
    return fields


def is_refusal(answer: Answer) -> bool:
    """Return whether an answer refuses something that a GET alone would not ask for."""
    status, fields, sent = answer.status, answer.fields, answer.sent
    is_optional = answer.method == "HEAD" or len(sent) > 1
    match status:
        case 200 | 203 if answer.method == "HEAD":
            # Many frameworks count the bytes that they do not send. Few files are empty.
            return fields.get("content-length") == "0" and OFFLOAD_ORDERS.isdisjoint(fields)
        case 206 if "range" in sent:
            return _is_unusable_part(answer)
        case 304 if "if-modified-since" in sent and "if-none-match" not in sent:
            modified = parse_http_date(fields.get("last-modified", ""))
            return modified is not None and not is_meaningful(modified)
        case 406:
            return "accept-encoding" in sent
        case 412:
            return is_optional and {"if-match", "if-unmodified-since"}.isdisjoint(sent)
        case 416:
            return is_optional and not _is_unsatisfied(answer)
    return status in (_REFUSALS_OF_HEAD if answer.method == "HEAD" else REFUSALS) and is_optional


def described(answer: Answer, request: DownloadRequest, url: str) -> Content:
    """Return what an answer says of a file. Raises `FileError` for one that is a failure or makes no sense.

    request: what the client asks us. url: for the messages of errors.
    """
    status, fields, sent = answer.status, answer.fields, answer.sent
    pinning = validators(answer)
    metadata = _with_representation_fields(pinning, fields)
    has_content = answer.method != "HEAD"
    match status:
        case 200 | 203:  # a proxy has changed what the origin sent [RFC 9110 15.3.4]
            size = content_length(fields)
            if size == 0 and (order := OFFLOAD_ORDERS.intersection(fields)):
                raise UpstreamError(
                    f"{url!r} sent {', '.join(order)} and no bytes: it is behind its own proxy, whose URL this source "
                    "needs"
                )
            return Content(metadata=_readable(metadata, size), stop=size, exists=has_content)
        case 206 if (spec := single_range(request)) is not None and "range" in sent:
            part, size = content_range(fields)
            is_short = _is_short(answer)
            if size is not None and not is_short and not _has_range(part, spec, size):
                raise UpstreamError(f"{url!r} sent {fields.get('content-range')!r}, which is not what was asked")
            readable = _readable(metadata, size)
            return Content(metadata=readable, start=part.start, stop=part.stop, exists=has_content, is_short=is_short)
        case 206 if "content-range" in fields:  # of all there is, though nobody has asked for a part
            part, size = content_range(fields)
            if size is not None and part == ByteRange(0, size):
                return Content(metadata=_readable(metadata, size), stop=size, exists=has_content)
        case 304 if not {"if-none-match", "if-modified-since"}.isdisjoint(sent):
            return Content(metadata=_readable(_not_modified(metadata, request), None), exists=False)
        case 412 if not {"if-match", "if-unmodified-since"}.isdisjoint(sent):
            raise PreconditionFailed(f"{url!r} answered 412")
        case 416 if (match := _UNSATISFIED_RANGE.fullmatch(fields.get("content-range", ""))) and "range" in sent:
            # the other fields describe an error page
            return Content(metadata=_readable(pinning, int(match[1])), exists=False)
        case 404 | 410:
            raise FileMissing(f"{url!r} answered {status}")
        case 429 | 503:
            raise UpstreamBusy(f"{url!r} answered {status}", status=status, retry_after=_retry_after(fields))
    raise UpstreamError(f"{url!r} answered {status}")


def continued(answer: Answer, span: ByteRange | None, metadata: FileMetadata, url: str) -> Content:
    """Return which bytes are in the content of an answer to a further request for a span of a file, or for all of it.

    metadata: what the first answer has said. Raises `UpstreamError` where the answer does not have what was asked.
    """
    fields, size = answer.fields, metadata.size
    wanted = ByteRange(0, size) if span is None and size is not None else span
    if answer.status == 206 and wanted is not None:
        part, whole = content_range(fields)
        # only where a part was asked for may an answer have less
        is_short = span is not None and metadata.is_pinned and _begins(part, wanted)
        if not (is_short or _contains(part, wanted)) or whole not in (None, size):
            raise UpstreamError(f"{url!r} sent {part} of {whole} where {wanted} was asked")
        return Content(metadata=metadata, start=part.start, stop=part.stop, is_short=is_short)
    if answer.status in (200, 203) and (size is None or content_length(fields) in (None, size)):
        return Content(metadata=metadata, stop=content_length(fields))
    raise UpstreamError(f"{url!r} answered {answer.status} when asked for the next part")


def version_of(fields: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return what tells one version of a file from another where nothing better does."""
    return fields.get("etag"), fields.get("last-modified")


def validators(answer: Answer) -> FileMetadata:
    """Return the validators that an answer has.

    A Last-Modified that is not at least a second before Date may be shared by the next version, as may one that is not
    meaningful: neither is one [RFC 9110 8.8.2.2].
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
        raise UpstreamError(f"a Content-Length of {length!r}")
    return int(length)


def content_range(fields: Mapping[str, str]) -> tuple[ByteRange, int | None]:
    """Return the part and the size that a 206 names. Raises `UpstreamError` if it does not parse."""
    value = fields.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None or int(match[1]) > int(match[2]) or (match[3] != "*" and int(match[2]) >= int(match[3])):
        raise UpstreamError(f"a Content-Range of {value!r}")
    part = ByteRange(int(match[1]), int(match[2]) + 1)
    length = content_length(fields)
    if length is not None and length != len(part):
        raise UpstreamError(f"{length} bytes for a Content-Range of {value!r}")
    return part, None if match[3] == "*" else int(match[3])


def _is_unusable_part(answer: Answer) -> bool:
    """Return whether a 206 does not tell which part it is, or is a short one that nothing tells how to continue."""
    fields = answer.fields
    is_multipart = fields.get("content-type", "").lower().startswith("multipart/byteranges")
    if is_multipart or "content-range" not in fields:
        return True
    return _is_short(answer) and not validators(answer).is_pinned


def _is_short(answer: Answer) -> bool:
    """Return whether a 206 has the beginning of the range that was asked, and not all of it [RFC 9110 15.3.7]."""
    try:
        part, size = content_range(answer.fields)
    except UpstreamError:
        return False
    specs = parse_range(answer.sent["range"])
    parts = None if specs is None or size is None else select_ranges(specs, size)
    return isinstance(parts, list) and _begins(part, parts[0])


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
    """Return whether a 416 tells the size of a file that does not have what was asked of it [RFC 9110 15.5.17]."""
    match = _UNSATISFIED_RANGE.fullmatch(answer.fields.get("content-range", ""))
    specs = parse_range(answer.sent.get("range", ""))
    if match is None or specs is None or select_ranges(specs, int(match[1])) != "unsatisfiable":
        return False
    condition = DownloadRequest(if_range=answer.sent.get("if-range"))
    return range_applies(condition, validators(answer))


def _readable(metadata: FileMetadata, size: int | None) -> FileMetadata:
    """Return metadata with a size, which tells how many reads an answer may cost.

    Several requests have to be of one version, which only a strong validator tells. Without one, all parts are read
    from one answer, if the file is small enough to read over what is between them.
    """
    is_cheap = metadata.is_pinned or (size or 0) <= _MAX_ONCE
    return replace(metadata, size=size, max_reads=MAX_READS if is_cheap else 1)


def _retry_after(fields: Mapping[str, str]) -> str | None:
    value = fields.get("retry-after", "")
    return value if _RETRY_AFTER.fullmatch(value) or parse_http_date(value) is not None else None


def _age(fields: Mapping[str, str]) -> int | None:
    """Return the Age of an answer in seconds, of several the first one [RFC 9111 5.1], or None if it is not valid."""
    return parse_delta_seconds(fields.get("age", "").partition(",")[0].rstrip(" "))


def _with_representation_fields(metadata: FileMetadata, fields: Mapping[str, str]) -> FileMetadata:
    passed = {name: fields[name] for name in _PASSED_HEADERS if _FIELD_VALUE.fullmatch(fields.get(name, "\0"))}
    coding, age = content_coding(passed.pop("content-encoding", "")), _age(passed)
    if coding is not None:
        passed["content-encoding"] = coding
    passed.pop("age", None)
    if age is not None:
        passed["age"] = str(age)
    return replace(metadata, content_type=valid_content_type(fields.get("content-type")), headers=tuple(passed.items()))


def _not_modified(metadata: FileMetadata, request: DownloadRequest) -> FileMetadata:
    """Return metadata for which the client's validators are current, as a 304 says even where it names none."""
    if failed_precondition(request, metadata) == 304:
        return metadata
    tags = parse_etag_list(request.if_none_match or "")
    return replace(
        metadata,
        etag=ETag.parse(tags[0]) if tags else metadata.etag,
        last_modified=parse_http_date(request.if_modified_since or "") or metadata.last_modified,
    )
