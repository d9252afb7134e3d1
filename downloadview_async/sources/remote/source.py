"""Files of other HTTP servers: `RemoteSource` finds them below a URL, `RemoteFile` is one of them.

The request that opens a remote file also describes it: a GET, a GET of a single range and a HEAD each cost one upstream
request. Bytes are passed on undecoded.
"""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from downloadview_async.errors import ConfigurationError, FileMissing, UpstreamError, wrong_type
from downloadview_async.http.metadata import MAX_READS, ByteRange, FileMetadata
from downloadview_async.http.negotiation import hides_coding
from downloadview_async.http.ranges import NEAR, RangeSpec, read_from
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import (
    Answer,
    Content,
    Received,
    continued,
    described,
    fields_to_send,
    is_refusal,
    version_of,
)
from downloadview_async.sources.base import pass_listing_on
from downloadview_async.sources.listing import Entry, accepted_entries
from downloadview_async.sources.names import Names, canonical_name, check_names_option, has_dot_segment
from downloadview_async.sources.remote.client import Upstream, is_host
from downloadview_async.sources.remote.http1 import Response
from downloadview_async.sources.remote.httpx_client import HttpxResponse
from downloadview_async.sources.remote.listing import list_upstream
from downloadview_async.sources.workers import Slots


class RemoteSource:
    """The files below a URL.

    url: http or https, with the path that names are appended to, such as `https://files.example.org/pub/`. Its host
    must have only public addresses, unless `allow_hosts` lists it. The other options are those of `Upstream`.
    names: "portable" refuses names with a backslash or a colon and those of Windows devices, such as `aux.txt`; "any"
    accepts them; with "exact" a name is appended unchanged, with a slash at its beginning and empty segments. A name
    with a segment `.` is then missing, because an HTTP client would request another URL.
    lists: whether the server has this library and lists its folders, so that this source lists them, too.

    Raises `ConfigurationError` for an invalid URL, and for one with a user, a query or a fragment.
    """

    def __init__(
        self,
        url: str,
        *,
        client: Any = None,
        allow_hosts: Iterable[str] = (),
        max_connections: int = 100,
        connect_timeout: float = 10.0,
        read_timeout: float = 30.0,
        names: Names = "portable",
        lists: bool = False,
    ) -> None:
        check_names_option(names)
        self.names: Names = names
        if not isinstance(url, str):
            raise wrong_type("RemoteSource takes a URL, such as 'https://example.org/files/'", url)
        self.url = f"{url.rstrip('/')}/"
        self._upstream = Upstream(
            _host_of(url),
            allow_hosts=allow_hosts,
            client=client,
            max_connections=max_connections,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
        )
        if lists:
            pass_listing_on(self, SimpleNamespace(list=partial(accepted_entries, self._list, names)))

    @property
    def slots(self) -> Slots:
        """The connections to the server."""
        return self._upstream.slots

    def _list(self, folder: str) -> AsyncIterator[Entry]:
        path = quote(self.canonical(folder)) if folder else ""
        return list_upstream(self._upstream, f"{self.url}{path}{'/' if path else ''}")

    def canonical(self, name: str) -> str:
        """Return the name below the URL for a name from a request: see `HasCanonicalNames`.

        Raises `FileMissing` for a name that no file may have, and for one whose URL a client would change.
        """
        canonical = canonical_name(name, self.names)
        if has_dot_segment(canonical):
            raise FileMissing(f"an HTTP client would remove the dots from the URL of {name!r}")
        return canonical

    async def resolve(self, name: str, /) -> "RemoteFile":
        """Return the file called `name` below the URL. Raises `FileMissing` for a name that no file may have."""
        return RemoteFile(self.url + quote(self.canonical(name)), upstream=self._upstream)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._upstream.aclose()


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # `port` raises for an invalid port
    except ValueError as exc:
        raise ConfigurationError(f"{url!r} is not a URL: {exc}") from exc
    if parts.scheme not in ("http", "https") or not host or not is_host(host):
        raise ConfigurationError(f"{url!r} is not the http or https URL of a server")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError(
            f"the URL of {host!r} has a user, a query or a fragment: remove it; credentials belong in the headers of a "
            "client that you pass as client="
        )
    return host


class RemoteFile:
    """A file of another HTTP server, by a URL that the application has chosen.

    upstream: the client and the hosts to use. By default, a client for this file alone, for public addresses only.
    """

    def __init__(self, url: str, *, upstream: Upstream | None = None, name: str | None = None) -> None:
        if not isinstance(url, str):
            raise wrong_type("RemoteFile takes a URL, such as 'https://example.org/a.pdf'", url)
        self.location: str | None = url
        self.name = unquote(urlsplit(url).path).rpartition("/")[2] if name is None else name
        self._url = url
        self._upstream = upstream

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator["OpenRemoteFile"]:
        """Send the request upstream, and describe the file by its answer."""
        if self._upstream is None:
            async with (
                Upstream(_host_of(self._url)) as upstream,
                RemoteFile(self._url, upstream=upstream).open(request) as file,
            ):
                yield file
            return
        with await self._upstream.slots.take():
            opened = OpenRemoteFile(self._upstream, self._url)
            try:
                await opened.begin(request)
                yield opened
            finally:
                await opened.aclose()


class OpenRemoteFile:
    """The answer of an upstream, and further range requests for spans that are not in it."""

    def __init__(self, upstream: Upstream, url: str) -> None:
        self.metadata = FileMetadata()
        self._upstream = upstream
        self._url = url
        self._body: _Body | None = None
        self._wanted: list[RangeSpec] | None = None
        self._version: tuple[str | None, str | None] = None, None
        self._hides_coding = False
        self._short_answers = 0

    async def begin(self, request: DownloadRequest) -> None:
        """Pass the client's request on to the upstream. Raises `FileError`."""
        self._wanted = request.ranges
        fields = fields_to_send(request)
        response, answer = await self._ask(request.method, fields)
        self._body = body = _Body(response, answer, ranged="range" in fields)
        self._version = version_of(answer.fields)
        if answer.status != 416:  # its content is an error page
            self._hides_coding = hides_coding(answer.fields.get("content-encoding"))
        content = described(answer, request, self._url)
        self._short_answers += content.is_short
        self.metadata = content.metadata
        body.has(content)
        if not self.metadata.is_pinned:
            body.max_skip = math.inf  # only this answer is known to be of one version

    async def _ask(self, method: str, fields: Mapping[str, str]) -> tuple[Response | HttpxResponse, Answer]:
        """Return the response of the upstream, with its body unread, and its head.

        If an upstream refuses something it could have ignored, a plain GET is sent. Then we evaluate the conditions and
        cut the ranges, and do not read the body if the client sent a HEAD.
        """
        response = await self._upstream.send(method, self._url, fields)
        answer = _answer_of(response, fields)
        if not is_refusal(answer):
            return response, answer
        await response.settle()
        response = await self._upstream.send("GET", self._url, {})
        return response, _answer_of(response, {})

    @property
    def ends_with_connection(self) -> bool:
        """Whether only the end of the connection marks the end of the file: see `Unframed`."""
        return self._body is not None and self._body.ends_with_connection

    @property
    def reads_over(self) -> bool:
        """Whether a range was requested and the upstream sends the whole file: see `ReadsOver`."""
        body = self._body
        return body is not None and body.ranged and body.position == 0 and body.has_content

    @property
    def hides_coding(self) -> bool:
        """See `Recoded`."""
        return self._hides_coding

    @property
    def received(self) -> Received:
        """When the upstream described the file: see `Dated`."""
        assert self._body is not None
        return self._body.answer.received

    def arrived(self, span: ByteRange) -> bytes | None:
        """See `Arriving`."""
        body = self._body
        return None if body is None or not body.has_content else body.arrived(span)

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, undecoded: from the open answer if it has them, else from a new one.

        "A server might want to send only a subset of the data requested" [RFC 9110 15.3.7]. If a strong validator
        proves that it is the same version, the rest is read from the next answer.
        """
        if span is None and self.metadata.size is not None:
            span = ByteRange(0, self.metadata.size)
        while True:
            if self._body is None or not self._body.leads_to(span, partly=self.metadata.is_pinned):
                self._body = await self._reopened(span)
            body, piece = self._body, span
            if span is not None and body.stop is not None and body.stop < span.stop:
                piece = ByteRange(span.start, body.stop)
            async with aclosing(body.read(piece)) as chunks:
                async for chunk in chunks:
                    yield chunk
            if span is None or piece is None or piece.stop == span.stop or body.position < piece.stop:
                return
            span = ByteRange(piece.stop, span.stop)

    async def _reopened(self, span: ByteRange | None) -> "_Body":
        """Return a body of the same version that has the span, or its beginning. Raises `UpstreamError`."""
        await self.aclose()
        headers = {"accept-encoding": "identity"}
        if self._short_answers > MAX_READS:
            span = None  # read the whole file: the rest could cost any number of requests
        if span is not None:
            span = read_from(span, self._wanted, self.metadata.size)
            headers["range"] = f"bytes={span.start}-{span.stop - 1}"
        response, answer = await self._ask("GET", headers)
        self._body = body = _Body(response, answer, ranged=True)  # from here on, `aclose` closes it
        content = continued(answer, span, self.metadata, self._url)
        self._short_answers += content.is_short
        body.has(content)
        if version_of(answer.fields) != self._version:
            raise UpstreamError(f"{self._url!r} changed while it was sent")
        return body

    async def aclose(self) -> None:
        """Close the open answer."""
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()


class _Body:
    """The body of a response: the position of its next byte in the file, and where it ends (None: not known).

    ranged: whether a range was requested. If the answer is not a range then, the upstream has no ranges, and all bytes
    before a span have to be read.
    """

    def __init__(self, response: Response | HttpxResponse, answer: Answer, *, ranged: bool) -> None:
        self.answer = answer
        self.ranged = ranged
        self.max_skip = math.inf if ranged else NEAR
        self.position = 0
        self.stop: int | None = None
        self.has_content = answer.method != "HEAD"
        self.ends_with_connection = response.ends_with_connection
        self._response = response
        self._rest = b""

    def has(self, content: Content) -> None:
        """Set which bytes of the file are in the body."""
        self.position, self.stop, self.has_content = content.start, content.stop, content.exists

    def leads_to(self, span: ByteRange | None, *, partly: bool = False) -> bool:
        """Return whether the span (`partly`: its beginning) can be read from here without reading over much else."""
        if not self.has_content:
            return False
        if span is None:
            return self.position == 0 and self.stop is None
        gap = span.start - self.position
        stop = min(span.start + 1, span.stop) if partly else span.stop
        return 0 <= gap <= self.max_skip and (self.stop is None or stop <= self.stop)

    def arrived(self, span: ByteRange) -> bytes | None:
        """Return the bytes of the span if they are the rest of the body, and are here already."""
        if (self.position, self.stop) != (span.start, span.stop) or self._rest:
            return None
        body = self._response.arrived(len(span))
        if body is not None:
            self.has_content = False
        return body

    async def read(self, span: ByteRange | None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the span; those before it are read and dropped."""
        while span is None or self.position < span.stop:
            chunk = self._rest or await self._response.read()
            self._rest = b""
            if not chunk:
                self.has_content = False
                return
            if span is not None:
                skip = max(span.start - self.position, 0)
                self._rest = chunk[max(span.stop - self.position, 0) :]
                chunk = chunk[: len(chunk) - len(self._rest)]
                self.position += len(chunk)
                chunk = chunk[skip:]
            if chunk:
                yield chunk

    async def aclose(self) -> None:
        """Close the response. Its connection can be used again if little of the body is left."""
        await self._response.settle()


def _answer_of(response: Response | HttpxResponse, sent: Mapping[str, str]) -> Answer:
    fields = response.fields
    received = Received.now(fields)
    return Answer(status=response.status, fields=fields, received=received, method=response.method, sent=sent)
