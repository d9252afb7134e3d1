"""A listing as JSON, and as lines of JSON. The lines are put together here: an encoder takes several times as long."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as _text
from urllib.parse import quote

from downloadview_async.http.content_types import content_type_for
from downloadview_async.sources.listing import Entry


def line_of(path: str, entry: Entry) -> str:
    """Return an entry as a JSON object on one line, in ASCII. path: relative to the folder."""
    modified = "null" if entry.modified is None else f'"{_time(entry.modified)}"'
    url = quote(path)  # which has nothing that JSON would escape
    if entry.is_folder:
        return f'{{"name":{_text(path)},"kind":"folder","size":null,"modified":{modified},"type":null,"url":"{url}/"}}'
    size = "null" if entry.size is None else entry.size
    kind = _text(entry.content_type or content_type_for(entry.name))
    return f'{{"name":{_text(path)},"kind":"file","size":{size},"modified":{modified},"type":{kind},"url":"{url}"}}'


def document_of(path: str, entries: Iterable[tuple[str, Entry]], following: str | None) -> str:
    """Return a page of a listing as one JSON object. following: the URL of the next page, relative to this one."""
    lines = ",\n".join(line_of(*entry) for entry in entries)
    return f'{{"path":{_text(path)},"entries":[{lines}],"next":{json.dumps(following)}}}\n'


def _time(modified: datetime) -> str:
    if modified.tzinfo is not UTC:
        modified = modified.astimezone(UTC)
    return f"{modified.isoformat('T', 'seconds')[:19]}Z"
