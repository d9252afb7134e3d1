"""`DownloadRequest`: the part of a request that decides which bytes of a file are sent, and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from downloadview_async.http.ranges import RangeSpec, parse_range

_LISTS = {
    b"if-match": "if_match",
    b"if-none-match": "if_none_match",
    b"accept-encoding": "accept_encoding",
    b"want-repr-digest": "want_repr_digest",
}
_SINGLE = {
    b"if-unmodified-since": "if_unmodified_since",
    b"if-modified-since": "if_modified_since",
    b"if-range": "if_range",
    b"range": "range",
}
FIELDS = frozenset(_LISTS) | frozenset(_SINGLE)
"""The names of all fields that are read, in lower case."""

_CONTRADICTORY = ""  # the value of a field that may be sent once and was sent twice: it never parses


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadRequest:
    """The method and the header fields that decide a download; absent fields are None.

    List fields that are sent several times are joined. A field that may be sent only once and was sent twice is the
    empty text, which never parses: two Range fields are ignored, and two If-Range fields match nothing.
    """

    method: str = "GET"
    if_match: str | None = None
    if_unmodified_since: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None
    if_range: str | None = None
    range: str | None = None
    accept_encoding: str | None = None
    want_repr_digest: str | None = None
    _ranges: list[RangeSpec] | Literal["unread"] | None = field(default="unread", init=False, repr=False, compare=False)

    @property
    def ranges(self) -> list[RangeSpec] | None:
        """The parts that a GET requests; None without a Range, and for one that has to be ignored [14.2].

        The text is parsed when this is first read, and not again.
        """
        if self._ranges == "unread":
            parsed = None if self.range is None or self.method != "GET" else parse_range(self.range)
            object.__setattr__(self, "_ranges", parsed)
            return parsed
        return self._ranges

    @classmethod
    def from_headers(cls, method: str, headers: Iterable[tuple[bytes, bytes]]) -> "DownloadRequest":
        """Read the raw headers of an ASGI scope: names in lower case, values as bytes (latin-1)."""
        headers = list(headers)
        if FIELDS.isdisjoint(dict(headers)):
            return _PLAIN.get(method) or cls(method=method)
        fields: dict[str, str] = {}
        for name, value in headers:
            if attribute := _LISTS.get(name):
                text = value.decode("latin-1")
                fields[attribute] = f"{fields[attribute]}, {text}" if attribute in fields else text
            elif attribute := _SINGLE.get(name):
                fields[attribute] = _CONTRADICTORY if attribute in fields else value.decode("latin-1").strip(" \t")
        return cls(method=method, **fields)

    @property
    def has_precondition(self) -> bool:
        """Whether the request has a precondition. If-Range does not count: it only decides about the Range."""
        return (
            self.if_none_match is not None
            or self.if_modified_since is not None
            or self.if_match is not None
            or self.if_unmodified_since is not None
        )

    @property
    def unconditional(self) -> bool:
        """Whether the answer depends on the file alone: there is neither a precondition nor a Range."""
        return self.range is None and not self.has_precondition


GET = DownloadRequest()
"""A plain GET of the whole file."""

HEAD = DownloadRequest(method="HEAD")
"""Asks only for the metadata of the whole, unencoded file."""

_PLAIN = {"GET": GET, "HEAD": HEAD}
