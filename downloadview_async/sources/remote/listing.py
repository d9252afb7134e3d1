"""Listings of another server that has this library: the lines of JSON that it sends for `?format=ndjson`."""

import json
from collections.abc import AsyncGenerator

from downloadview_async.errors import FileError, FileMissing, TransferAborted, UpstreamError
from downloadview_async.sources.listing import Entry, aware_time
from downloadview_async.sources.remote.client import Upstream
from downloadview_async.sources.remote.http1 import Response
from downloadview_async.sources.remote.httpx_client import HttpxResponse

_MEDIA_TYPE = "application/x-ndjson"
_MAX_LINE = 1 << 16  # bytes; a name of 255 bytes, escaped, and its URL have a small part of that
_MISSING = (401, 403, 404, 410)  # a listing that our service may not read is not there for its clients either


async def list_upstream(upstream: Upstream, url: str) -> AsyncGenerator[Entry, None]:
    """Yield the entries of the folder at a URL, which ends with a slash. Only some lines are in memory.

    Raises `FileMissing` for a folder that does not exist or may not be listed, `UpstreamError`, `SourceUnavailable`,
    and `TransferAborted` if the rest cannot be read.
    """
    with await upstream.slots.take():
        response = await upstream.send("GET", f"{url}?format=ndjson", {"accept": _MEDIA_TYPE})
        try:
            if response.status in _MISSING:
                raise FileMissing(f"{url!r} answered {response.status}")
            media_type = response.fields.get("content-type", "").partition(";")[0].strip().lower()
            if response.status != 200 or media_type != _MEDIA_TYPE:
                raise UpstreamError(
                    f"{url!r} does not list: it answered {response.status} with {media_type or 'no type'!r}"
                )
            rest = b""
            async for chunk in _chunks_of(response, url):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _MAX_LINE:
                    raise UpstreamError(f"{url!r} sent a line of more than {_MAX_LINE} bytes")
                for line in lines:
                    yield entry_of(line)
            if rest:
                yield entry_of(rest)
        finally:
            await response.aclose()


async def _chunks_of(response: Response | HttpxResponse, url: str) -> AsyncGenerator[bytes, None]:
    try:
        while chunk := await response.read():
            yield chunk
    except FileError as exc:
        raise TransferAborted(f"{url!r} broke off: {exc}") from exc


def entry_of(line: bytes) -> Entry:
    """Return the entry that a line describes. Raises `UpstreamError` for a line that describes none."""
    try:
        fields = json.loads(line)
        name, size, modified, content_type = (fields[key] for key in ("name", "size", "modified", "type"))
        if not isinstance(name, str) or fields["kind"] not in ("file", "folder"):
            raise ValueError("it has neither a name nor a kind")
        is_folder = fields["kind"] == "folder"
        return Entry(
            name,
            is_folder,
            size if type(size) is int and size >= 0 and not is_folder else None,  # JSON's true is an int in Python
            None if modified is None else aware_time(modified),
            content_type if isinstance(content_type, str) else None,
        )
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise UpstreamError(f"the line {line[:200]!r} of a listing cannot be read: {exc}") from exc
