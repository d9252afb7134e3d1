"""The freshness lifetime of a copy, the request that revalidates it, and what an error says of it (RFC 9111, 5861)."""

import re
from collections.abc import Mapping
from dataclasses import replace

from downloadview_async.errors import FileError, UpstreamRefused
from downloadview_async.http.dates import format_http_date, parse_delta_seconds, parse_http_date
from downloadview_async.http.fields import TOKEN_CHAR
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import Received
from downloadview_async.sources.base import OnDemand
from downloadview_async.sources.cache.entry import Entry

_FAILURES = frozenset({500, 502, 503, 504})  # "a situation that would result in a 500, 502, 503, or 504" [RFC 5861 4]
_OF_THE_REQUEST = frozenset({408, 412, 425, 429})  # client errors that are not about the file

_OF_A_304 = ("cache-control", "expires", "vary")

_DIRECTIVE = re.compile(rf"""({TOKEN_CHAR}+)(?:=("[^"]*"|[^",\s]*))?""")


def max_age_of(on_demand: OnDemand | None, metadata: FileMetadata, max_age: float, received: Received) -> float | None:
    """Return for how many seconds after it was received a file is fresh; None if it must not be kept.

    on_demand: for content that is made on demand. max_age: the longest lifetime in seconds, and the one of a file that
    names none. It counts from our request; a lifetime that the file names counts from the origin's answer [RFC 9111
    4.2.3].
    """
    if on_demand is not None:
        if on_demand.max_age is not None:
            return on_demand.max_age
        return max_age if metadata.etag is not None or metadata.changed_at is not None else None
    headers: Mapping[str, str] = dict(metadata.headers)
    if "*" in headers.get("vary", ""):
        return None
    directives = _DIRECTIVE.findall(headers.get("cache-control", "").lower())
    names = {name for name, _ in directives}
    if not names.isdisjoint({"no-store", "private"}):
        return None
    if "no-cache" in names:
        return 0.0
    lifetime = _delta(directives, "s-maxage")  # "overrides [...] the max-age directive" for a shared cache [5.2.2.10]
    if lifetime is None:
        lifetime = _delta(directives, "max-age")
    if lifetime is None and "expires" in headers:
        expires = parse_http_date(headers["expires"])
        # by the clock of the origin: "expires_value - date_value" [4.2.1]
        lifetime = 0.0 if expires is None else expires - received.date
    return max_age if lifetime is None else max(0.0, min(max_age, lifetime - received.age))


def stale_seconds(metadata: FileMetadata, *, while_revalidate: float, if_error: float) -> tuple[float, float]:
    """Return for how many seconds after its lifetime a copy may be sent while it is revalidated, and after an error.

    These are stale-while-revalidate and stale-if-error of the origin [RFC 5861 3, 4]; `while_revalidate` and `if_error`
    hold if it sends none. Both are 0 if the origin forbids stale answers: "by a no-cache response directive, a
    must-revalidate response directive, or an applicable s-maxage or proxy-revalidate" [RFC 9111 4.2.4].
    """
    directives = _DIRECTIVE.findall(dict(metadata.headers).get("cache-control", "").lower())
    names = {name for name, _ in directives}
    if not names.isdisjoint({"no-cache", "must-revalidate", "s-maxage", "proxy-revalidate"}):
        return 0.0, 0.0
    of_origin = _delta(directives, "stale-while-revalidate"), _delta(directives, "stale-if-error")
    return (
        while_revalidate if of_origin[0] is None else of_origin[0],
        if_error if of_origin[1] is None else of_origin[1],
    )


def _delta(directives: list[tuple[str, str]], name: str) -> float | None:
    """Return the seconds of a directive, or None without it.

    "If there is [...] an invalid value", or more than one, "the response is [...] stale" [4.2.1].
    """
    values = {value.strip('"') for directive, value in directives if directive == name}
    if not values:
        return None
    value = values.pop()
    return 0.0 if values else float(parse_delta_seconds(value) or 0)


def is_failure(exc: FileError) -> bool:
    """Return whether a source has failed, so that a stale copy may be sent: stale-if-error [RFC 5861 4]."""
    return exc.status in _FAILURES and not isinstance(exc, UpstreamRefused)


def is_withdrawal(exc: FileError) -> bool:
    """Return whether a source gives the file no longer, so that no stale copy may be sent.

    Any answer but a 5xx takes the place of the kept one [RFC 9111 4.3.3], and so does a redirect to a host that may not
    be requested.
    """
    status = exc.answered if isinstance(exc, UpstreamRefused) else exc.status
    return status is None or (status < 500 and status not in _OF_THE_REQUEST)


def updated(kept: FileMetadata, metadata: FileMetadata) -> FileMetadata:
    """Return the metadata of a kept file, updated by the caching headers of a 304 [RFC 9111 3.2]."""
    news = {name: value for name, value in metadata.headers if name in _OF_A_304}
    headers = dict(kept.headers) | news
    return kept if headers == dict(kept.headers) else replace(kept, headers=tuple(headers.items()))


def asking_for_news(stale: Entry | None) -> DownloadRequest:
    """Return the request that revalidates a kept file, or a plain GET if that is not possible."""
    if stale is None:
        return GET
    if stale.metadata.etag is not None:
        return DownloadRequest(if_none_match=str(stale.metadata.etag))
    if stale.metadata.changed_at is None:
        return GET
    return DownloadRequest(if_modified_since=format_http_date(stale.metadata.changed_at))


def is_current(stale: Entry, metadata: FileMetadata) -> bool:
    """Return whether a "not modified" answer is about the version that is kept."""
    if metadata.size not in (None, stale.metadata.size):
        return False
    return stale.metadata.etag is not None or metadata.last_modified == stale.metadata.last_modified
