"""`FolderEndpoint`: answers a request for a folder by a page or a stream of lines, and one for the view of a file."""

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import quote, unquote

import anyio
from anyio.lowlevel import checkpoint
from starlette.types import Message, Receive, Scope, Send

from downloadview_async.asgi.answer import raw
from downloadview_async.asgi.deadline import in_time
from downloadview_async.asgi.disconnect import close_after_body, until_the_client_leaves
from downloadview_async.asgi.errors import send_error
from downloadview_async.asgi.listing.data import Lines, document_of
from downloadview_async.asgi.listing.entries import FolderEntries
from downloadview_async.asgi.listing.order import Window
from downloadview_async.asgi.listing.page import ListingPage, Pages
from downloadview_async.asgi.listing.query import FORMATS, ListingQuery, query_of
from downloadview_async.asgi.listing.view import view_page_of
from downloadview_async.errors import FileError, FileMissing, LinkInvalid, TransferAborted
from downloadview_async.http.conditional import failed_precondition
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.request import DownloadRequest
from downloadview_async.policy.folders import carried
from downloadview_async.policy.grants import GRANT, Grant
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.digests.known import Digests
from downloadview_async.sources.names import MAX_LENGTH

logger = logging.getLogger("downloadview_async")

DOWNLOADS_SECONDS = 1.0
"""How long a page waits for the numbers of downloads: it is sent without them if their database does not answer."""

_AT_ONCE = 50  # rows of a page
_CHUNK = 64 * 1024
_CONTENT_TYPES = {name: media_type for media_type, name in FORMATS.items()} | {"html": "text/html; charset=utf-8"}
_NOT_IN_URL = re.compile(rb"[^!-~]")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderEndpoint:
    """Answers requests for the folders of a source.

    entries: those that may be shown. headers: further headers, by their names in lower case. has_access: whether an
    access decides about requests, so that no shared cache may keep the answers. has_archives: whether the URL of a
    folder with `?archive=zip` gives its archive. digests: those of the files, for their view pages.
    """

    entries: FolderEntries
    pages: Pages
    headers: Mapping[str, str] = field(default_factory=dict)
    has_access: bool = False
    has_archives: bool = False
    digests: Digests | None = None

    async def answer(
        self, folder: str, tail: str, grant: Grant | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a GET or a HEAD that access has allowed.

        folder: what the source lists. tail: the end of the URL's path that stands for it, below the top folder; it is
        empty or ends with a slash.
        """
        answer = partial(self._answer, folder, tail, grant, scope)
        await until_the_client_leaves(answer, receive, in_time(scope, send))

    async def _answer(self, folder: str, tail: str, grant: Grant | None, scope: Scope, send: Send) -> None:
        try:
            if (place := _canonical_place(scope, tail)) is not None:
                await self.redirect(place, scope, send)
                return
            query = self._query(grant, scope)
            if query.format == "ndjson":
                await self._stream(folder, query, grant, scope, send)
                return
            window = await self.entries.window(folder, query)
            files = [path for path, entry in window.entries if not entry.is_folder] if query.format == "html" else []
            downloads = await self._downloads(folder, files)
        except FileError as exc:
            await send_error(exc, scope, send)
            return
        body = await self._body(tail.strip("/"), query, window, grant, _above(tail, grant, scope), downloads)
        await self.send_page(body, self._headers(query, grant), scope, send)

    async def view(
        self, file: AsyncFile, key: str, tail: str, grant: Grant | None, scope: Scope, *, is_listed: bool
    ) -> tuple[bytes, dict[str, str]]:
        """Return the view page of a file, and its headers.

        key: what the source resolves. tail: the end of the URL's path that stands for the file, below the top folder.
        is_listed: whether the files before and after it may be known.

        Raises what `AsyncFile.open` raises.
        """
        content_type = None if grant is None else grant.content_type
        page = await view_page_of(file, tail, content_type, self.digests, key)
        page = replace(page, link=_link_of(grant, scope), above=_above(tail, grant, scope))
        folder, _, name = key.rpartition("/")
        if (downloads := await self._downloads(folder, [name])) is not None:
            page = replace(page, downloads=downloads.get(name, 0))
        if is_listed:
            try:
                previous, following = await self.entries.neighbours(folder, name)
                page = replace(page, previous=previous, next=following)
            except FileError:
                pass  # the file itself may be seen, its folder not
        headers = self._headers(ListingQuery(), grant, self.pages.view_headers)
        return self.pages.view(page).encode("utf-8", "replace"), headers

    async def send_page(self, body: bytes, headers: dict[str, str], scope: Scope, send: Send) -> None:
        """Send a whole page, or 304 or 412 by the preconditions of the request."""
        tag = ETag(hashlib.sha256(body).hexdigest()[:32], weak=True)
        headers["etag"] = str(tag)
        request = DownloadRequest.from_headers(scope["method"], scope["headers"])
        status = failed_precondition(request, FileMetadata(size=len(body), etag=tag)) or 200
        if status == 304:
            kept = ("cache-control", "etag", "vary")
            await _send_whole(304, {name: headers[name] for name in kept}, b"", scope, send)
            return
        if status == 412:
            body = b""
        await _send_whole(status, headers | {"content-length": str(len(body))}, body, scope, send)

    async def redirect(self, place: str, scope: Scope, send: Send) -> None:
        """Redirect to a relative URL, with the query of the request."""
        # Parsers of requests differ in the bytes that they let pass. A line end must not come into our head.
        query = _NOT_IN_URL.sub(lambda match: b"%%%02X" % ord(match[0]), scope["query_string"]).decode("ascii")
        headers = {
            "location": f"{place}?{query}" if query else place,
            "cache-control": self._cache_control(scope.get(GRANT)),
            "content-length": "0",
            "x-content-type-options": "nosniff",
        }
        await _send_whole(308, headers, b"", scope, send)

    def _query(self, grant: Grant | None, scope: Scope) -> ListingQuery:
        accept = ", ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"accept")
        if grant is None or grant.link_id is None or grant.folder is not None:
            return ListingQuery.of(scope["query_string"], accept, _link_of(grant, scope))
        if grant.uses is not None:
            raise LinkInvalid(f"the link {grant.link_id} counts downloads, and a listing is not a download")
        return ListingQuery.of(b"", accept)  # the query is that of the link

    async def _downloads(self, folder: str, paths: Sequence[str]) -> dict[str, int] | None:
        """Return how often some files of a folder were downloaded, by their paths; None if that cannot be said."""
        if self.pages.downloads is None or not paths:
            return None
        top = f"{folder.strip('/')}/".lstrip("/")
        try:
            with anyio.fail_after(DOWNLOADS_SECONDS):
                counts = await self.pages.downloads([top + path for path in paths])
        except Exception as exc:  # a database may raise anything, and the page is useful without it
            logger.warning("The downloads of a page cannot be read: %s", type(exc).__name__)
            return None
        return {name.removeprefix(top): count for name, count in counts.items()}

    async def _body(
        self,
        path: str,
        query: ListingQuery,
        window: Window,
        grant: Grant | None,
        above: int,
        downloads: Mapping[str, int] | None,
    ) -> bytes:
        entries = window.entries
        first, last = window.places()
        following = query.url(after=last) if window.following and last else None
        if query.format == "json":
            line_of = Lines(query_of(query.link)).line_of
            return document_of(path, await _in_turns(line_of(*entry) for entry in entries), following).encode()
        previous = query.url(before=first) if window.preceding and first else None
        can_reorder = grant is None or grant.link_id is None or grant.folder is not None
        has_archive = self.has_archives and can_reorder and not query.is_deep
        page = ListingPage(
            path=path,
            query=query,
            entries=entries,
            files=window.files,
            folders=window.folders,
            size=window.size if window.has_sizes else None,
            preceding=window.preceding,
            following=window.following,
            previous=previous,
            next=following,
            is_cut=window.is_cut,
            can_reorder=can_reorder,
            archive=query_of("archive=zip", query.link) if has_archive else None,
            above=above,
            downloads=downloads,
        )
        page = replace(page, rows=await _in_turns(self.pages.rows(page)))
        return self.pages.listing(page).encode("utf-8", "replace")

    def _headers(
        self, query: ListingQuery, grant: Grant | None, of_page: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        page = {name.lower(): value for name, value in (of_page or self.pages.headers).items()}
        varies = [value for name, value in self.headers.items() if name == "vary"]
        left_out = ("content-disposition", "cache-control", "vary")
        return {
            **{name: value for name, value in self.headers.items() if name not in left_out},
            **page,
            "content-type": _CONTENT_TYPES[query.format],
            "cache-control": self._cache_control(grant),
            "vary": ", ".join(["Accept", *varies]),
        }

    def _cache_control(self, grant: Grant | None) -> str:
        if grant is not None and grant.link_id is not None:
            return grant.cache_control(None, time.time())
        return "private, no-cache" if self.has_access else "no-cache"

    async def _stream(self, folder: str, query: ListingQuery, grant: Grant | None, scope: Scope, send: Send) -> None:
        start = _start(200, self._headers(query, grant), scope)
        is_head = scope["method"] == "HEAD"
        is_started = False
        try:
            async with aclosing(self.entries.batches(folder, query)) as batches:
                write = Lines(query_of(query.link)).line_of
                lines: list[str] = []
                length = 0
                async for batch in batches:
                    if not is_started:
                        await send(start)
                        is_started = True
                    if is_head:
                        break
                    for path, entry in zip(batch.paths, batch.entries, strict=True):
                        lines.append(write(path, entry))
                        length += len(lines[-1]) + 1
                        if length >= _CHUNK:
                            await _send_lines(lines, send)
                            lines, length = [], 0
                if lines:
                    await _send_lines(lines, send)
        except FileError as exc:
            if not is_started:
                await send_error(exc, scope, send)
                return
            raise TransferAborted(f"the rest of the listing cannot be read: {exc}") from exc
        if not is_started:
            await send(start)
        await send({"type": "http.response.body", "body": b""})


async def _in_turns(texts: Iterable[str]) -> list[str]:
    """Return the texts of the entries of a page. Other requests get their turn after each `_AT_ONCE`."""
    made: list[str] = []
    for text in texts:
        made.append(text)
        if not len(made) % _AT_ONCE:
            await checkpoint()
    return made


def _start(status: int, headers: Mapping[str, str], scope: Scope) -> Message:
    return {"type": "http.response.start", "status": status, "headers": raw({**headers, **close_after_body(scope)})}


async def _send_whole(status: int, headers: Mapping[str, str], body: bytes, scope: Scope, send: Send) -> None:
    await send(_start(status, headers, scope))
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def _send_lines(lines: list[str], send: Send) -> None:
    body = "\n".join(lines).encode() + b"\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


def folder_place(scope: Scope) -> str:
    """Return the URL of the same path with a slash at its end, relative to the URL of the request.

    It has the last segment of the path alone, so it keeps each prefix that a proxy or a mount has removed, and it never
    names another host. A `./` before it keeps a colon in it from ending a scheme.
    """
    sent = scope.get("raw_path")
    path = quote(scope["path"]) if sent is None else sent.partition(b"?")[0].decode("latin-1")
    last = unquote(path.rpartition("/")[2])
    return f"./{quote(last, safe='')}/" if last else "./"


def _link_of(grant: Grant | None, scope: Scope) -> str:
    """Return the parameters of the link to a folder by which a request has come, or an empty text."""
    is_link = grant is not None and grant.link_id is not None and grant.folder is not None
    return carried(scope["query_string"]).decode("ascii") if is_link else ""


def _above(tail: str, grant: Grant | None, scope: Scope) -> int:
    """Return how many folders of a tail are above the folder of the link by which a request has come."""
    if grant is None or grant.folder is None:
        return 0
    sent = scope.get("raw_path")
    path = scope["path"] if sent is None else unquote(sent.partition(b"?")[0].decode("latin-1"))
    return max(0, tail.count("/") - path.removeprefix(grant.folder).count("/"))


def _canonical_place(scope: Scope, tail: str) -> str | None:
    """Return the relative URL of a folder whose URL is written in another way, such as `/files//a/`; None if it is not.

    Links in a page are relative, so each folder has exactly one URL. Raises `FileMissing` for a path that is too long.
    """
    if len(tail) > MAX_LENGTH:
        raise FileMissing(f"the name of the folder is too long: {len(tail)} characters")
    segments = [segment for segment in tail.split("/") if segment not in ("", ".")]
    canonical = "".join(f"{segment}/" for segment in segments)
    sent = scope.get("raw_path")
    if sent is None or ".." in segments:  # which no source lists
        return None
    parts = sent.partition(b"?")[0].decode("latin-1").split("/")
    count = tail.count("/") + 1
    if canonical == tail and unquote("/".join(parts[-count:])) == tail:
        return None
    left, levels = len(tail), -1
    for part in map(unquote, reversed(parts)):
        left -= len(part)
        levels += part != "."  # a client removes such a segment before it counts the levels [RFC 3986 5.2.4]
        if left <= 0:
            return None if left < 0 else "../" * levels + quote(canonical) or "./"
        left -= 1  # the slash before it
    return None
