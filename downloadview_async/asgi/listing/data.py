"""A listing as JSON, and as lines of JSON. The lines are put together here: an encoder takes several times as long."""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as _text
from urllib.parse import quote

from downloadview_async.http.content_types import content_type_for
from downloadview_async.sources.listing import Entry

_LONGEST_SUFFIX = 16
_MOST_SUFFIXES = 1000

is_plain = re.compile(r"[A-Za-z0-9_.-]++").fullmatch
"""Whether a text is the same in a URL, in HTML and in JSON, as most names are: one check takes less than three."""


class Lines:
    """Writes entries as JSON objects, each on one line, in ASCII. It keeps the types of the suffixes of one listing.

    query: the end of each URL, such as `?k=2026a&...`, in ASCII.
    """

    def __init__(self, query: str = "") -> None:
        self._end = f'{query}"}}'
        self._types: dict[str, str] = {}

    def line_of(self, path: str, entry: Entry) -> str:
        """Return the line of an entry. path: relative to the folder."""
        if is_plain(path):
            name, url = f'"{path}"', path
        else:
            name, url = _text(path), quote(path)  # a quoted URL has nothing that JSON would escape
        modified = "null" if entry.modified is None else f'"{_time(entry.modified)}"'
        if entry.is_folder:
            kind = '"kind":"folder","size":null'
            return f'{{"name":{name},{kind},"modified":{modified},"type":null,"url":"{url}/{self._end}'
        size = "null" if entry.size is None else entry.size
        kind = self._type_of(entry.name) if entry.content_type is None else _text(entry.content_type)
        return (
            f'{{"name":{name},"kind":"file","size":{size},"modified":{modified},"type":{kind},"url":"{url}{self._end}'
        )

    def _type_of(self, name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        if not stem or len(suffix) > _LONGEST_SUFFIX:
            return _text(content_type_for(name))
        kind = self._types.get(suffix)
        if kind is None:
            kind = _text(content_type_for(name))
            if len(self._types) < _MOST_SUFFIXES:
                self._types[suffix] = kind
        return kind


def document_of(path: str, lines: Iterable[str], following: str | None) -> str:
    """Return a page of a listing as one JSON object. lines: of its entries. following: the URL of the next page."""
    entries = ",\n".join(lines)
    return f'{{"path":{_text(path)},"entries":[{entries}],"next":{json.dumps(following)}}}\n'


def _time(modified: datetime) -> str:
    if modified.tzinfo is not UTC:
        modified = modified.astimezone(UTC)
    return f"{modified.isoformat('T', 'seconds')[:19]}Z"
