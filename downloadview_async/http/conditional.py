"""Conditional requests, RFC 9110 section 13: do the request's preconditions let the file be sent?"""

import re
from typing import Literal

from downloadview_async.http.dates import parse_http_date
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.request import DownloadRequest

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*+"'
# A tag may contain a comma, so the list cannot be split at commas. Elements may be empty [5.6.1.2]. Possessive
# quantifiers keep the time linear, whatever 64 KiB of text contain.
_LIST = re.compile(rf"[ \t]*+(?:{_TAG})?[ \t]*+(?:,[ \t]*+(?:{_TAG})?[ \t]*+)*+")
_TAGS = re.compile(_TAG)


def parse_etag_list(value: str) -> list[str]:
    """Return the entity tags of If-Match or If-None-Match as they were sent; none if the list does not parse."""
    return _TAGS.findall(value) if _LIST.fullmatch(value) else []


def _any_matches(value: str, etag: ETag | None, *, strong: bool) -> bool:
    if value.strip(" \t") == "*":
        return True  # "if [it] is "*", the condition is [about] any current representation" [13.1.1, 13.1.2]
    if etag is None or (strong and etag.weak):
        return False
    tags = parse_etag_list(value)
    return f'"{etag.value}"' in tags or (not strong and f'W/"{etag.value}"' in tags)


def failed_precondition(
    request: DownloadRequest, metadata: FileMetadata, *, unshown: int | None = None
) -> Literal[304, 412] | None:
    """Return the status that the preconditions of a GET or HEAD demand, or None: go on. The order is that of 13.2.2.

    unshown: the second of the last change, if `metadata` leaves it out because the file may change again in it.
    """
    # 1. and 2. If-Match, else If-Unmodified-Since: 412
    if request.if_match is not None:
        if not _any_matches(request.if_match, metadata.etag, strong=True):
            return 412
    elif request.if_unmodified_since is not None:
        date = parse_http_date(request.if_unmodified_since)
        modified = metadata.last_modified if unshown is None else unshown
        if date is not None and modified is not None and modified > date:
            return 412
    # 3. and 4. If-None-Match, else If-Modified-Since: 304 for GET and HEAD
    if request.if_none_match is not None:
        if _any_matches(request.if_none_match, metadata.etag, strong=False):
            return 304
    elif request.if_modified_since is not None:
        date = parse_http_date(request.if_modified_since)
        modified = metadata.last_modified if unshown is None else unshown + 1
        if date is not None and modified is not None and modified <= date:
            return 304
    return None


def range_applies(request: DownloadRequest, metadata: FileMetadata) -> bool:
    """Return whether the Range counts: If-Range is absent, or names exactly this version [13.1.5].

    A weak tag never names a version, and a date only if it is the Last-Modified that would be sent.
    """
    value = request.if_range
    if value is None:
        return True
    if tag := ETag.parse(value):
        return not tag.weak and tag == metadata.etag  # "using the strong comparison function" [8.8.3.2]
    date = parse_http_date(value)
    return date is not None and date == metadata.last_modified
