"""`make_plan`: decides everything about an answer before anything is sent."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from downloadview_async.http.conditional import failed_precondition, range_applies
from downloadview_async.http.content_types import content_type_for, is_active
from downloadview_async.http.dates import format_http_date
from downloadview_async.http.digest import preferred_digest, repr_digest
from downloadview_async.http.disposition import content_disposition
from downloadview_async.http.fields import OF_THE_CONTENT
from downloadview_async.http.metadata import ByteRange, FileMetadata, is_meaningful
from downloadview_async.http.multipart import multipart_body, new_boundary
from downloadview_async.http.ranges import in_order_of_the_file, reads_of, select_ranges
from downloadview_async.http.request import DownloadRequest

_OF_THE_ANSWER = frozenset({"age", "expires", "repr-digest"})
"""Headers of an answer with the file, which do not hold for an error or a redirect in its place."""

Headers = dict[str, str]
"""Header names in lower case, and their values."""

Piece = bytes | ByteRange | None
"""A piece of a body: bytes of the framing, a span of the file, or None for all of a file of unknown size."""

ACTIVE_POLICY = "sandbox; default-src 'none'"
"""The Content-Security-Policy of a file that is shown inline and could contain scripts: none of them runs."""

SVG_POLICY = f"{ACTIVE_POLICY}; style-src 'unsafe-inline'; img-src data:; font-src data:"
"""The same for an SVG image, which may use the styles, images and fonts in it: without its styles it is black."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An answer: its status, its headers, and the pieces of its body in order (none for HEAD, 304, 412, 416)."""

    status: int
    headers: Headers
    body: tuple[Piece, ...]

    @property
    def length(self) -> int | None:
        """The length of the body in bytes, or None if it is not known before the end."""
        if len(self.body) == 1:
            piece = self.body[0]
            return None if piece is None else len(piece)
        return None if None in self.body else sum(len(piece) for piece in self.body if piece is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation:
    """How the application presents a file: its name, whether it is saved or shown inline, and its content type."""

    filename: str
    attachment: bool = True
    content_type: str | None = None


def describe(
    metadata: FileMetadata,
    presentation: Presentation,
    headers: Headers | None = None,
    *,
    now: float | None = None,
    want: str | None = None,
) -> Headers:
    """Return the headers of a 200 with this file, except those of the framing: they do not depend on the sender.

    `headers` are the application's own and win over those that describe the file. `now` is in seconds, UTC.
    `want` is the Want-Repr-Digest of the request: see `preferred_digest`.
    """
    shown = _last_modified_shown(metadata.last_modified, time.time() if now is None else now)
    given = headers or {}
    described = {
        "content-type": presentation.content_type or metadata.content_type or content_type_for(presentation.filename),
        "content-disposition": given.get("content-disposition")
        or content_disposition(presentation.filename, attachment=presentation.attachment),
        "x-content-type-options": "nosniff",
    }
    if metadata.etag is not None:
        described["etag"] = str(metadata.etag)
    if shown is not None:
        described["last-modified"] = format_http_date(shown)
    described |= metadata.headers
    described |= given
    # Repr-Digest is about the bytes after the content coding [RFC 9530 3], and these digests about those before it.
    is_coded = "content-encoding" in described
    if metadata.digests and not is_coded and (digest := preferred_digest(metadata.digests, want)):
        described.setdefault("repr-digest", repr_digest(digest))
    # The application's Vary is added to ours, as a cache has to consider both [12.5.5].
    if varies := [value for name, value in (*metadata.headers, *given.items()) if name == "vary"]:
        described["vary"] = ", ".join(dict.fromkeys(varies))
    # The values that are sent count: the application's own headers may have changed both.
    inline = not described["content-disposition"].lower().startswith("attachment")
    if inline and is_active(described["content-type"]):
        described.setdefault("content-security-policy", _policy_for(described["content-type"]))
    return described


def _policy_for(content_type: str) -> str:
    """Return the Content-Security-Policy under which no script in a file runs and an SVG image keeps its styles."""
    essence = content_type.partition(";")[0].strip().lower()
    return SVG_POLICY if essence == "image/svg+xml" else ACTIVE_POLICY


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

    `headers` are the application's own and win over those that describe the file. An answer with a `status` other than
    200 has the whole file: preconditions and ranges apply only to a 200 [13.2.1, 14.2]. `now` is in seconds, UTC.
    """
    now = time.time() if now is None else now
    described = describe(metadata, presentation, headers, now=now, want=request.want_repr_digest)
    whole = _whole(request, metadata, described, status)
    return whole if status != 200 else narrowed(whole, request, metadata, now=now)


def narrowed(whole: Plan, request: DownloadRequest, metadata: FileMetadata, *, now: float | None = None) -> Plan:
    """Return the answer after the preconditions and the Range have been evaluated [13.2.1].

    `whole` is the answer without them, with the status 200. It is not changed.
    """
    now = time.time() if now is None else now
    modified = _last_modified_shown(metadata.last_modified, now)
    shown = metadata if modified == metadata.last_modified else replace(metadata, last_modified=modified)
    if failed := failed_precondition(request, shown, unshown=metadata.changed_at if modified is None else None):
        return _without_file(failed, whole.headers)
    if (specs := request.ranges) is None or metadata.size is None or not metadata.accept_ranges:
        return whole
    # A Last-Modified that moves with the clock does not identify a version, so no client may resume by it.
    if not range_applies(request, shown if modified is None else metadata):
        return whole
    parts = select_ranges(specs, metadata.size)
    if parts == "whole":
        return whole
    if parts == "unsatisfiable":
        extra = {"content-range": f"bytes */{metadata.size}", "accept-ranges": "bytes"}
        return _without_file(416, whole.headers, extra)
    if len(parts) > 1 and metadata.max_reads is not None:
        if not metadata.is_pinned or len(reads_of(parts)) > metadata.max_reads:
            # We may choose the order of the parts [15.3.7.2]: in the order of the file, no read has to go back.
            parts = in_order_of_the_file(parts)
        if len(reads_of(parts)) > metadata.max_reads:
            return whole
    return _partial(parts, metadata.size, whole.headers)


def make_offload_plan(
    metadata: FileMetadata,
    presentation: Presentation,
    offload: Mapping[str, str],
    *,
    headers: Headers | None = None,
    now: float | None = None,
) -> Plan:
    """Return the answer that tells a proxy to send the file: `offload` are the headers that the proxy obeys.

    It has the status 200 and an empty body, whatever the client requested. The proxy sends the bytes, so it evaluates
    Range and If-* and answers with 206, 304 or 416 where they demand it.
    """
    return Plan(200, describe(metadata, presentation, headers, now=now) | dict(offload) | {"content-length": "0"}, ())


def make_redirect_plan(headers: Headers, redirect: Mapping[str, str]) -> Plan:
    """Return the 307 to the place where the client gets the file.

    `headers` are the application's own; those in `redirect` win over them. Headers that describe the file are left
    out: the server that sends the file sets them.
    """
    kept = {name: value for name, value in headers.items() if name not in OF_THE_CONTENT | _OF_THE_ANSWER}
    safe = {"x-content-type-options": "nosniff", "content-length": "0"}
    return Plan(307, kept | safe | dict(redirect), ())


def is_shown_for_good(last_modified: int | None, now: float) -> bool:
    """Return whether the Last-Modified of an answer no longer depends on the clock, so that the answer can be kept."""
    return last_modified is None or last_modified + 1 <= now


def _last_modified_shown(last_modified: int | None, now: float) -> int | None:
    """Return the Last-Modified to send, or None if another version of the file could have the same.

    This is so for a time that cannot be the time of a change, and for the current second, in which the file may change
    again.
    """
    if last_modified is None or not is_meaningful(last_modified):
        return None
    if last_modified >= now:
        return int(now)  # "the origin server MUST replace that value with the message origination date" [8.8.2.1]
    return last_modified if is_shown_for_good(last_modified, now) else None


def _whole(request: DownloadRequest, metadata: FileMetadata, headers: Headers, status: int) -> Plan:
    body: tuple[Piece, ...] = (None,)
    if metadata.size is not None:
        headers["content-length"] = str(metadata.size)
        if metadata.accept_ranges:
            headers["accept-ranges"] = "bytes"
        body = (ByteRange(0, metadata.size),) if metadata.size else ()
    return Plan(status, headers, () if request.method == "HEAD" else body)


def _partial(parts: list[ByteRange], size: int, whole: Headers) -> Plan:
    if len(parts) == 1:
        part = parts[0]
        framing = {"content-range": part.content_range(size), "content-length": str(part.stop - part.start)}
        return Plan(206, whole | framing, (part,))
    # "a server MUST NOT generate a Content-Range header field in the [...] header section" of a multipart [15.3.7.2]
    boundary = new_boundary()
    body, length = multipart_body(parts, size=size, content_type=whole.get("content-type"), boundary=boundary)
    framing = {"content-type": f"multipart/byteranges; boundary={boundary}", "content-length": str(length)}
    return Plan(206, whole | framing, body)


def _without_file(status: int, headers: Headers, extra: Headers | None = None) -> Plan:
    kept = {name: value for name, value in headers.items() if name not in OF_THE_CONTENT} | (extra or {})
    if status != 304:
        # The freshness lifetime and the digest of the file do not hold for an error, which is for this request alone.
        for name in _OF_THE_ANSWER:
            kept.pop(name, None)
        kept |= {"cache-control": "private, no-store", "content-length": "0"}
    return Plan(status, kept, ())
