"""`Answer`: a plan with its headers for ASGI. Answers to files that do not change are kept."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from downloadview_async.asgi.prepared_head import PreparedHead
from downloadview_async.http import content_types
from downloadview_async.http.digest import preferred_digest
from downloadview_async.http.fields import FRAMING, OFFLOAD_HEADERS
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.plan import (
    Headers,
    Plan,
    Presentation,
    is_shown_for_good,
    make_offload_plan,
    make_plan,
    narrowed,
)
from downloadview_async.http.request import DownloadRequest
from downloadview_async.sources.base import OpenFile

RawHeaders = list[tuple[bytes, bytes]]
"""Headers in the form of an ASGI message."""

# Made here from the file itself. An application that set them could promise other bytes than are sent.
_MADE_HERE = FRAMING | {"etag", "last-modified"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan and its headers for ASGI. head: the same as lines of HTTP/1.1, for an answer that is cached."""

    plan: Plan
    headers: RawHeaders
    head: PreparedHead | None = None

    def from_cache(self, age: str | None, status: str | None) -> "Answer":
        """Return the answer with Age and Cache-Status, which differ between requests, so that no kept answer has them.

        age, status: None: without this field. An answer without the metadata of the file has no Age.
        """
        fields = []
        if age is not None and self.plan.status in (200, 206, 304) and "age" not in self.plan.headers:
            fields.append((b"age", age.encode()))
        if status is not None and "cache-status" not in self.plan.headers:
            fields.append((b"cache-status", status.encode()))
        if not fields:
            return self
        return Answer(self.plan, [*self.headers, *fields], None if self.head is None else self.head.with_fields(fields))


def answer_to(
    request: DownloadRequest,
    metadata: FileMetadata,
    presentation: Presentation,
    headers: RawHeaders,
    offload: Mapping[str, str] | None = None,
    *,
    status: int = 200,
    keep: bool = False,
) -> Answer:
    """Return the answer to a request for a file.

    headers: those of the application; Set-Cookie is left out. offload: the headers by which a proxy sends the file.
    keep: whether the answer may come from, and go to, the cache of answers.
    """
    if request.want_repr_digest is not None and metadata.digests:
        # Answers are kept by the digest, which is one of few, not by the text of the client.
        metadata = replace(metadata, digests=preferred_digest(metadata.digests, request.want_repr_digest))
    added = tuple([header for header in headers if header[0] != b"set-cookie"]) if headers else ()
    offered = None if offload is None else tuple(offload.items())
    if not keep or status != 200 or not is_shown_for_good(metadata.last_modified, time.time()):
        plan = _plan(request, metadata, presentation, added, offered, status=status)
        return Answer(plan, raw(plan.headers))
    digests, changes = len(metadata.digests), content_types.changes
    whole = _kept_answer(request.method, metadata, presentation, added, offered, digests, changes)
    if offered is not None or request.unconditional:
        return whole
    plan = narrowed(whole.plan, request, metadata)
    return whole if plan is whole.plan else Answer(plan, raw(plan.headers))


def _plan(
    request: DownloadRequest,
    metadata: FileMetadata,
    presentation: Presentation,
    added: tuple[tuple[bytes, bytes], ...],
    offload: tuple[tuple[str, str], ...] | None,
    *,
    status: int = 200,
) -> Plan:
    if offload is None:
        return make_plan(request, metadata, presentation, status=status, headers=text_of(added))
    return make_offload_plan(metadata, presentation, dict(offload), headers=text_of(added))


@lru_cache(maxsize=1024)  # the answer changes only when the file does: `metadata` is part of the key
def _kept_answer(
    method: str,
    metadata: FileMetadata,
    presentation: Presentation,
    added: tuple[tuple[bytes, bytes], ...],
    offload: tuple[tuple[str, str], ...] | None,
    digests: int,
    type_changes: int,
) -> Answer:
    """Return the answer to a request without conditions and ranges.

    digests: how many there are in `metadata`, whose hash does not tell. With it, the answers before and after a digest
    became known have different keys, which need no slow comparison. type_changes: how often the table of content types
    has changed.
    """
    plan = _plan(DownloadRequest(method=method), metadata, presentation, added, offload)
    headers = raw(plan.headers)
    return Answer(plan, headers, PreparedHead.of(headers))


def is_reserved(name: str) -> bool:
    """Return whether an application may not set a header, given in lower case: it is made from the file."""
    return name in _MADE_HERE or name in OFFLOAD_HEADERS


def text_of(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return raw headers as text, without those that only we may set."""
    text = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return {name: value for name, value in text.items() if not is_reserved(name)}


def raw(headers: Mapping[str, str]) -> RawHeaders:
    """Return headers in the form of an ASGI message."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def age_of(opened: OpenFile) -> str | None:
    """Return the value of Age for an open file in seconds, or None if the origin has answered this request itself."""
    made_at: float | None = getattr(opened, "made_at", None)
    return None if made_at is None else str(max(0, int(time.time() - made_at)))
