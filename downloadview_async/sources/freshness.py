"""For how long a copy of a file may be sent without asking, and how to ask whether it is current (RFC 9111)."""

import re
import time
from collections.abc import Mapping

from downloadview_async.http.dates import format_http_date, parse_http_date
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.cache_directory import Entry
from downloadview_async.sources.virtual import VirtualFile

_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9a-z-]+)(?:=("[^"]*"|[^",\s]*))?')


def max_age_of(file: AsyncFile, metadata: FileMetadata, max_age: float) -> float | None:
    """Return for how many seconds a file is fresh; None for one that is not to be kept."""
    if isinstance(file, VirtualFile):
        if file.max_age is not None:
            return file.max_age
        return max_age if metadata.etag is not None or metadata.last_modified is not None else None
    headers: Mapping[str, str] = dict(metadata.headers)
    if "*" in headers.get("vary", ""):
        return None
    found = _DIRECTIVE.findall(headers.get("cache-control", "").lower())
    directives = {name for name, _ in found}
    if not directives.isdisjoint({"no-store", "private"}):
        return None
    if "no-cache" in directives:
        return 0.0
    said = [value.strip('"') for name, value in found if name in ("s-maxage", "max-age")]
    if said:
        # "If there is [...] an invalid value, the response is stale" and so it is asked for again [RFC 9111 4.2.1]
        return min(max_age, *(float(value) if re.fullmatch("[0-9]{1,10}", value) else 0.0 for value in said))
    if "expires" in headers:
        expires = parse_http_date(headers["expires"])
        return 0.0 if expires is None else min(max_age, max(0.0, expires - time.time()))
    return max_age


def asking_for_news(stale: Entry | None) -> DownloadRequest:
    """Return the request for a file, or for one that is not the one we have."""
    if stale is None:
        return GET
    if stale.metadata.etag is not None:
        return DownloadRequest(if_none_match=str(stale.metadata.etag))
    assert stale.metadata.last_modified is not None
    return DownloadRequest(if_modified_since=format_http_date(stale.metadata.last_modified))


def is_current(stale: Entry, metadata: FileMetadata) -> bool:
    """Return whether what was answered, with "not modified", is said of the very version we have."""
    if metadata.size not in (None, stale.metadata.size):
        return False
    return stale.metadata.etag is not None or metadata.last_modified == stale.metadata.last_modified
