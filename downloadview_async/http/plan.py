"""`make_plan`: everything that is decided about an answer, before anything is done."""

import time
from dataclasses import dataclass, replace

from downloadview_async.http.conditional import failed_precondition, range_applies
from downloadview_async.http.content_types import content_type_for, is_active
from downloadview_async.http.dates import format_http_date
from downloadview_async.http.disposition import content_disposition
from downloadview_async.http.metadata import ByteRange, FileMetadata
from downloadview_async.http.multipart import multipart_body, new_boundary
from downloadview_async.http.ranges import parse_range, select_ranges
from downloadview_async.http.request import DownloadRequest

Headers = dict[str, str]
"""Header names in lower case, and their values."""

Piece = bytes | ByteRange | None
"""A piece of a body: framing as it is, a span of the file, or None: all there is of a file of unknown size."""

# What describes a file that is not sent: "the sender SHOULD NOT generate representation metadata" other than the
# validators and what a cache goes by [15.4.5].
_OF_THE_CONTENT = frozenset(
    {
        "accept-ranges",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-length",
        "content-security-policy",
        "content-type",
    }
)


@dataclass(frozen=True, slots=True)
class Plan:
    """An answer: its status, its headers, and the pieces of its body in order (none for HEAD, 304, 412, 416)."""

    status: int
    headers: Headers
    body: tuple[Piece, ...]

    @property
    def length(self) -> int | None:
        """The length of the body in bytes, or None where only its end will tell."""
        return None if None in self.body else sum(len(piece) for piece in self.body if piece is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation:
    """How the application wants a file shown: under which name, to be saved or to be looked at, as which type."""

    filename: str
    attachment: bool = True
    content_type: str | None = None


def describe(metadata: FileMetadata, presentation: Presentation) -> Headers:
    """Return the headers that a 200 with this file has, however its bytes are sent: all but those of the framing."""
    content_type = presentation.content_type or metadata.content_type or content_type_for(presentation.filename)
    headers = {
        "content-type": content_type,
        "content-disposition": content_disposition(presentation.filename, attachment=presentation.attachment),
        "x-content-type-options": "nosniff",
    }
    if not presentation.attachment and is_active(content_type):
        headers["content-security-policy"] = "sandbox; default-src 'none'"
    if metadata.etag is not None:
        headers["etag"] = str(metadata.etag)
    if metadata.last_modified is not None:
        headers["last-modified"] = format_http_date(metadata.last_modified)
    headers.update(metadata.headers)
    return headers


def make_plan(
    request: DownloadRequest,
    metadata: FileMetadata,
    presentation: Presentation,
    *,
    status: int = 200,
    headers: Headers | None = None,
    now: float | None = None,
) -> Plan:
    """Return the answer to a GET or HEAD for a file.

    `headers` are the application's own and win over those that describe the file. A `status` other than 200 is sent
    with the whole file: preconditions and ranges are only for a 200 [13.2.1, 14.2]. `now` is in seconds, UTC.
    """
    metadata = _not_from_the_future(metadata, time.time() if now is None else now)
    described = describe(metadata, presentation) | (headers or {})
    if status != 200:
        return _whole(request, metadata, described, status)
    if failed := failed_precondition(request, metadata):
        return _without_file(failed, described)
    if request.method != "GET" or request.range is None or metadata.size is None or not metadata.accept_ranges:
        return _whole(request, metadata, described, status)  # "Range [is] defined for [...] GET" alone [14.2]
    specs = parse_range(request.range)
    if specs is None or not range_applies(request, metadata):
        return _whole(request, metadata, described, status)
    parts = select_ranges(specs, metadata.size)
    if parts == "whole":
        return _whole(request, metadata, described, status)
    if parts == "unsatisfiable":
        return _without_file(416, described, {"content-range": f"bytes */{metadata.size}", "accept-ranges": "bytes"})
    return _partial(parts, metadata.size, described)


def _not_from_the_future(metadata: FileMetadata, now: float) -> FileMetadata:
    # "the origin server MUST replace that value with the message origination date" [8.8.2.1]
    if metadata.last_modified is not None and metadata.last_modified > now:
        return replace(metadata, last_modified=int(now))
    return metadata


def _whole(request: DownloadRequest, metadata: FileMetadata, headers: Headers, status: int) -> Plan:
    body: tuple[Piece, ...] = (None,)
    if metadata.size is not None:
        headers["content-length"] = str(metadata.size)
        if metadata.accept_ranges:
            headers["accept-ranges"] = "bytes"
        body = (ByteRange(0, metadata.size),) if metadata.size else ()
    return Plan(status, headers, () if request.method == "HEAD" else body)


def _partial(parts: list[ByteRange], size: int, headers: Headers) -> Plan:
    headers["accept-ranges"] = "bytes"
    if len(parts) == 1:
        headers["content-range"] = parts[0].content_range(size)
        headers["content-length"] = str(len(parts[0]))
        return Plan(206, headers, (parts[0],))
    # "a server MUST NOT generate a Content-Range header field in the [...] header section" of a multipart [15.3.7.2]
    boundary = new_boundary()
    body, length = multipart_body(parts, size=size, content_type=headers.get("content-type"), boundary=boundary)
    headers["content-type"] = f"multipart/byteranges; boundary={boundary}"
    headers["content-length"] = str(length)
    return Plan(206, headers, body)


def _without_file(status: int, headers: Headers, extra: Headers | None = None) -> Plan:
    kept = {name: value for name, value in headers.items() if name not in _OF_THE_CONTENT} | (extra or {})
    if status != 304:
        kept["content-length"] = "0"
    return Plan(status, kept, ())
