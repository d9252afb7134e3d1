"""Files of other HTTP servers: `RemoteSource` finds them below a URL, `RemoteFile` is one of them.

The request that opens a remote file is its description too: a GET, a GET of a single range and a HEAD each cost one
upstream request. Conditions and the range go upstream, an allow-list of headers comes back, bytes are passed on raw.
"""

import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

import anyio

from downloadview_async.errors import (
    ConfigurationError,
    FileError,
    FileMissing,
    PreconditionFailed,
    SourceUnavailable,
    UpstreamBusy,
    UpstreamError,
    UpstreamTimeout,
)
from downloadview_async.http.conditional import failed_precondition, parse_etag_list, range_applies
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.dates import parse_http_date
from downloadview_async.http.fields import OFFLOAD_ORDERS
from downloadview_async.http.metadata import MAX_READS, ByteRange, ETag, FileMetadata, is_meaningful
from downloadview_async.http.negotiation import content_coding, hides_coding
from downloadview_async.http.ranges import NEAR, RangeSpec, parse_range, read_from, select_ranges
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import Received
from downloadview_async.sources.names import Names, canonical_name, check_names_option
from downloadview_async.sources.workers import Slots

MAX_REDIRECTS = 5

# What is left of an answer is read so that its connection can be used again, if it is this little and comes this soon.
_MAX_REST = 64 * 1024  # bytes
_REST_SECONDS = 0.5

# Statuses of an upstream that may refuse what it could have ignored: a HEAD, a Range, a precondition. 404, 410 and 429
# are about the file or the client, and so are all that a gateway answers (502 to 504).
REFUSALS = frozenset({*range(400, 500), 500, 501, 505}) - {404, 406, 410, 412, 416, 429}

# Further ones that say nothing of a GET: URLs signed for GET and frameworks without routes for HEAD answer 404, servers
# of applications 204, and gateways 502 or 503 where an application sends a body all the same.
_REFUSALS_OF_HEAD = REFUSALS | {204, 404, 502, 503}

_MAX_ONCE = 8 << 20  # bytes of a file without a strong validator that are read for a few parts of it

_CLOCKS = 60  # seconds that the clock of an upstream which tells no Date may differ from ours

# Whatever else an upstream says stays with us: X-Accel-*, X-Sendfile*, X-Reproxy-* and Set-Cookie are orders to our
# proxy or to our client. Content-Length, -Type, -Range, ETag and Last-Modified are read, checked and made anew.
_PASSED_HEADERS = ("content-encoding", "content-language", "cache-control", "expires", "vary", "age")

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.IGNORECASE)
_UNSATISFIED_RANGE = re.compile(r"bytes \*/([0-9]{1,18})", re.IGNORECASE)
_LENGTH = re.compile("[0-9]{1,18}")
_AGE = re.compile("([0-9]{1,10})(?: *,|$)")  # of several the first one [RFC 9111 5.1]
_RETRY_AFTER = re.compile("[0-9]{1,9}")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

# The errors of httpx and httpx2, by name because either may be in use; the first that fits counts.
ERRORS: Mapping[str, type[FileError]] = {
    "PoolTimeout": SourceUnavailable,
    "TimeoutException": UpstreamTimeout,
    "HTTPError": UpstreamError,
    "InvalidURL": UpstreamError,
    "StreamError": UpstreamError,
    "CookieConflict": UpstreamError,
}


def _file_error(exc: Exception) -> FileError | None:
    """Return our error for one of the client's, or None for one that is not the upstream's fault."""
    names = {cls.__name__ for cls in type(exc).__mro__ if cls.__module__.partition(".")[0] in ("httpx", "httpx2")}
    for name, error in ERRORS.items():
        if name in names:
            return error(f"{type(exc).__name__}: {exc}")
    return None


class Upstream:
    """A client and the hosts it may be used for.

    host: the host of the application's own URL. allow_hosts: further hosts, by name or literal address, that
    redirects may lead to; only a host in this list may be at an address that is not public.
    headers: further headers of each request, such as the key of an API. Authorization stays with the first host.
    client: an `AsyncClient` of httpx2 or httpx to use in place of our own. It brings its own transport: hosts are
    still checked, the addresses they resolve to are not.
    max_connections: upstream requests at once; who waits longer than two seconds for one is turned away.
    connect_timeout, read_timeout: seconds to connect, and to wait for the next bytes. Both together are what an
    upstream has until its answer's head is complete, however slowly it drips.
    """

    def __init__(
        self,
        host: str,
        *,
        allow_hosts: Iterable[str] = (),
        headers: Mapping[str, str] | None = None,
        client: Any = None,
        max_connections: int = 100,
        connect_timeout: float = 10.0,
        read_timeout: float = 30.0,
    ) -> None:
        # httpx is only needed, and only imported, by who has remote files
        from downloadview_async.sources.remote.ssrf import AllowedHosts, guarded_client

        self._hosts = AllowedHosts(host, allow_hosts)
        self._headers = dict(headers or {})
        self._owns_client = client is None
        self._client = client or guarded_client(self._hosts, connect_timeout=connect_timeout, read_timeout=read_timeout)
        self._slots = Slots(max_connections)
        self._head_timeout = connect_timeout + read_timeout

    async def aclose(self) -> None:
        """Close our own client and its connections; one that was passed in is its owner's to close."""
        if self._owns_client:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the connections. Raises `SourceUnavailable`."""
        slot = await self._slots.take()
        try:
            yield
        finally:
            self._slots.free(slot)

    async def send(self, method: str, url: str, headers: Mapping[str, str]) -> Any:
        """Return the response, its body unread, after at most `MAX_REDIRECTS` redirects.

        Raises `UpstreamError`, `UpstreamTimeout` or `SourceUnavailable`.
        """
        try:
            with anyio.fail_after(self._head_timeout):
                return await self._send(method, url, headers)
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{url!r} took more than {self._head_timeout} s to answer") from exc
        except Exception as exc:
            if error := _file_error(exc):
                raise error from exc
            raise

    async def _send(self, method: str, url: str, headers: Mapping[str, str]) -> Any:
        # as bytes: an entity tag may hold more than ASCII, which is all that httpx makes of text
        raw = [(name.encode(), value.encode("latin-1")) for name, value in {**self._headers, **headers}.items()]
        request = self._client.build_request(method, url, headers=raw)
        if "accept-encoding" not in headers:
            request.headers.pop("accept-encoding", None)  # what the client would decode, if it were asked to
        for _ in range(MAX_REDIRECTS + 1):
            self._check(request.url, url)
            response = await self._client.send(request, stream=True, follow_redirects=False)
            if response.next_request is None:
                return response
            request = response.next_request
            await settle(response)
        raise UpstreamError(f"{url!r} redirects more than {MAX_REDIRECTS} times")

    def _check(self, url: Any, origin: str) -> None:
        secure = urlsplit(origin).scheme == "https"
        if url.scheme != "https" and (secure or url.scheme != "http"):
            raise UpstreamError(f"not a scheme to fetch {origin!r} by: {url.scheme!r}")
        if url.userinfo or not self._hosts.permits(url.host):
            raise UpstreamError(f"{origin!r} leads to {url.host!r}, which is not in allow_hosts")
        # A host is allowed for its files, not for whatever else listens there.
        if url.port is not None and url.port not in (urlsplit(origin).port, 80, 443):
            raise UpstreamError(f"{origin!r} leads to port {url.port} of {url.host!r}")


async def settle(response: Any, chunks: AsyncIterator[bytes] | None = None) -> None:
    """Read the little that may be left of a response, so that its connection can be used again, and close it.

    chunks: what of the body has not been read yet, where somebody has begun to read it.
    """
    try:
        length = response.headers.get("content-length", "")
        left = int(length) - response.num_bytes_downloaded if _LENGTH.fullmatch(length) else 0
        if left <= _MAX_REST or response.request.method == "HEAD" or response.status_code in (204, 304):
            read = 0
            with anyio.move_on_after(_REST_SECONDS):
                async for chunk in response.aiter_raw() if chunks is None else chunks:
                    read += len(chunk)
                    if read > _MAX_REST:
                        break
    except Exception as exc:
        if _file_error(exc) is None:
            raise
    finally:
        await close(response)


async def close(response: Any) -> None:
    """Close a response, and its connection if bytes are left in it, even when cancelled."""
    with anyio.CancelScope(shield=True):
        await response.aclose()


class RemoteSource:
    """The files below a URL.

    url: http or https, with the path that names are appended to, such as `https://files.example.org/pub/`. Its host
    must have public addresses only, unless `allow_hosts` lists it. The other options are those of `Upstream`.
    names: "portable" refuses names with a backslash or a colon and those of Windows devices, such as `aux.txt`; "any"
    takes them; with "exact" a name is appended to the letter, with a slash at its beginning and empty segments.

    Raises `ConfigurationError` for a URL that is none, or that carries a password or a query.
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
    ) -> None:
        check_names_option(names)
        self.names: Names = names
        self.url = f"{url.rstrip('/')}/"
        self._upstream = Upstream(
            _host_of(url),
            allow_hosts=allow_hosts,
            client=client,
            max_connections=max_connections,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
        )

    def canonical(self, name: str) -> str:
        """Return the name below the URL that a name from a request stands for: see `HasCanonicalNames`."""
        return canonical_name(name, self.names)

    async def resolve(self, name: str, /) -> "RemoteFile":
        """Return the file called `name` below the URL. Raises `FileMissing` for what no file may be called."""
        return RemoteFile(self.url + quote(self.canonical(name)), upstream=self._upstream)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._upstream.aclose()


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a bad port is found by asking for it
    except ValueError as exc:
        raise ConfigurationError(f"{url!r} is not a URL: {exc}") from exc
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigurationError(f"{url!r} is not the http or https URL of a server")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError(
            f"the URL of {host!r} has a user, a query or a fragment: credentials belong in the headers of a client "
            "that you pass as client="
        )
    return host


class RemoteFile:
    """A file of another HTTP server, by a URL that the application has chosen.

    upstream: the client and the hosts to use; without one, a client for this file alone and for public addresses.
    """

    def __init__(self, url: str, *, upstream: Upstream | None = None, name: str | None = None) -> None:
        self.location: str | None = url
        self.name = unquote(urlsplit(url).path).rpartition("/")[2] if name is None else name
        self._url = url
        self._upstream = upstream

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator["OpenRemoteFile"]:
        """Send the one request upstream, and describe the file by what it answers."""
        if self._upstream is None:
            async with (
                Upstream(_host_of(self._url)) as upstream,
                RemoteFile(self._url, upstream=upstream).open(request) as file,
            ):
                yield file
            return
        async with self._upstream.slot():
            opened = OpenRemoteFile(self._upstream, self._url)
            try:
                await opened.begin(request)
                yield opened
            finally:
                await opened.aclose()


class OpenRemoteFile:
    """What an upstream has answered, and further ranged requests where a span is asked for that is not in it."""

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
        """Ask the upstream what the client asks us. Raises `FileError`."""
        spec = _single_range(request)
        self._wanted = parse_range(request.range) if request.range is not None else None
        response, sent = await self._ask(request.method, _forwarded(request, spec))
        self._body = _Body(response, ranged=spec is not None)
        self._version = _version(self._body.fields)
        if response.status_code != 416:  # whose content is an error page
            self._hides_coding = hides_coding(self._body.fields.get("content-encoding"))
        self.metadata = _readable(self._described(self._body, request, spec, sent))
        if not self.metadata.is_pinned:
            self._body.max_skip = math.inf  # all parts are of the one version that is open

    async def _ask(self, method: str, headers: Mapping[str, str]) -> tuple[Any, Mapping[str, str]]:
        """Return the answer of the upstream, and the headers that it answers.

        An upstream that refuses what it could have ignored is asked once more, by a GET and nothing else: conditions
        are evaluated and ranges are cut by us, and the body of an answer to a HEAD is not read.
        """
        response = await self._upstream.send(method, self._url, headers)
        if not _is_refusal(response, method, headers):
            return response, headers
        await settle(response)
        return await self._upstream.send("GET", self._url, {}), {}

    def _described(
        self, body: "_Body", request: DownloadRequest, spec: RangeSpec | None, sent: Mapping[str, str]
    ) -> FileMetadata:
        """Return what the answer says of the file. Raises `FileError` for one that is a failure or makes no sense."""
        status, fields = body.response.status_code, body.fields
        validators = _validators(fields, body.received)
        metadata = _entity(validators, fields)
        match status:
            case 200:
                body.stop = size = _size(fields)
                if size == 0 and (order := OFFLOAD_ORDERS.intersection(fields)):
                    raise UpstreamError(
                        f"{self._url!r} sent {', '.join(order)} and no bytes: it is behind a proxy of its own, whose "
                        "URL this source needs"
                    )
                return replace(metadata, size=size)
            case 206 if spec is not None and "range" in sent:
                part, size = _content_range(fields)
                if size is not None and select_ranges([spec], size) != [part]:
                    if not _is_short(fields, sent):
                        raise UpstreamError(
                            f"{self._url!r} sent {fields.get('content-range')!r}, which is not what was asked"
                        )
                    self._short_answers += 1
                body.position, body.stop = part.start, part.stop
                return replace(metadata, size=size)
            case 206 if "content-range" in fields:  # of all there is, though nobody has asked for a part
                part, size = _content_range(fields)
                if size is not None and part == ByteRange(0, size):
                    body.stop = size
                    return replace(metadata, size=size)
            case 304 if not {"if-none-match", "if-modified-since"}.isdisjoint(sent):
                body.has_content = False
                return _not_modified(metadata, request)
            case 412 if not {"if-match", "if-unmodified-since"}.isdisjoint(sent):
                raise PreconditionFailed(f"{self._url!r} answered 412")
            case 416 if (match := _UNSATISFIED_RANGE.fullmatch(fields.get("content-range", ""))) and "range" in sent:
                body.has_content = False
                return replace(validators, size=int(match[1]))  # the rest describes an error page
            case 404 | 410:
                raise FileMissing(f"{self._url!r} answered {status}")
            case 429 | 503:
                raise UpstreamBusy(f"{self._url!r} answered {status}", status=status, retry_after=_retry_after(fields))
        raise UpstreamError(f"{self._url!r} answered {status}")

    @property
    def ends_with_connection(self) -> bool:
        """Whether nothing but the end of the connection tells where the file ends: it may have been cut off there."""
        return self._body is not None and self._body.ends_with_connection

    @property
    def reads_over(self) -> bool:
        """Whether a range was asked for, and the upstream sends the whole file all the same."""
        body = self._body
        return body is not None and body.ranged and body.position == 0 and body.has_content

    @property
    def hides_coding(self) -> bool:
        """See `Recoded`."""
        return self._hides_coding

    @property
    def received(self) -> Received:
        """When the file was described."""
        assert self._body is not None
        return self._body.received

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span, raw: from the answer that is open if they are in it, else from a new one.

        "A server might want to send only a subset of the data requested" [RFC 9110 15.3.7]: where a strong validator
        tells that it is the same version, what an answer does not have is read from the next one.
        """
        if span is None and self.metadata.size is not None:
            span = ByteRange(0, self.metadata.size)
        try:
            while True:
                if self._body is None or not self._body.has(span, partly=self.metadata.is_pinned):
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
        except Exception as exc:
            if error := _file_error(exc):
                raise error from exc
            raise

    async def _reopened(self, span: ByteRange | None) -> "_Body":
        """Return a body that the span is in, or begins in, of the same version of the file. Raises `UpstreamError`."""
        await self.aclose()
        headers = {"accept-encoding": "identity"}
        if self._short_answers > MAX_READS:
            span = None  # the rest could cost any number of requests
        if span is not None:
            span = read_from(span, self._wanted, self.metadata.size)
            headers["range"] = f"bytes={span.start}-{span.stop - 1}"
        response, _ = await self._ask("GET", headers)
        self._body = body = _Body(response, ranged=True)  # closed with us from here on
        fields, expected = body.fields, self.metadata.size
        if response.status_code == 206 and span is not None:
            part, size = _content_range(fields)
            is_short = self.metadata.is_pinned and part.start == span.start and part.stop < span.stop
            if (part != span and not is_short) or size not in (None, expected):
                raise UpstreamError(f"{self._url!r} sent {part} of {size} where {span} was asked")
            self._short_answers += is_short
            body.position, body.stop = part.start, part.stop
        elif response.status_code == 200 and (expected is None or _size(fields) in (None, expected)):
            body.stop = _size(fields)
        else:
            raise UpstreamError(f"{self._url!r} answered {response.status_code} when asked for the next part")
        if _version(fields) != self._version:
            raise UpstreamError(f"{self._url!r} changed while it was sent")
        return body

    async def aclose(self) -> None:
        """Close the answer that is open."""
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()


class _Body:
    """The body of a response: which bytes of the file come next, and where it ends (None: not known).

    ranged: a range was asked for, so if this is not one, the upstream has none, and reading over is the only way.
    """

    def __init__(self, response: Any, *, ranged: bool) -> None:
        self.response = response
        self.fields = _fields(response)
        self.received = _received(self.fields)
        self.ranged = ranged
        self.max_skip = math.inf if ranged else NEAR
        self.position = 0
        self.stop: int | None = None
        self.has_content = response.request.method != "HEAD"
        framed = {"content-length", "transfer-encoding"}.intersection(self.fields)
        self.ends_with_connection = not framed and response.http_version.startswith("HTTP/1")
        self._chunks = response.aiter_raw()
        self._rest = b""

    def has(self, span: ByteRange | None, *, partly: bool = False) -> bool:
        """Return whether the span, or the beginning of it, can be read from here without reading over much else."""
        if not self.has_content:
            return False
        if span is None:
            return self.position == 0 and self.stop is None
        gap = span.start - self.position
        stop = min(span.start + 1, span.stop) if partly else span.stop
        return 0 <= gap <= self.max_skip and (self.stop is None or stop <= self.stop)

    async def read(self, span: ByteRange | None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the span, reading over what comes before it."""
        while span is None or self.position < span.stop:
            chunk = self._rest or await anext(self._chunks, b"")
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
        """Close the response. Its connection can be used again if little or nothing is left of it."""
        await settle(self.response, self._chunks)


def _is_refusal(response: Any, method: str, headers: Mapping[str, str]) -> bool:
    """Return whether an answer refuses something that a GET alone would not ask for."""
    status, is_optional = response.status_code, method == "HEAD" or len(headers) > 1
    match status:
        case 200 if method == "HEAD":
            # Many frameworks count the bytes that they do not send. Few files are empty.
            return bool(response.headers.get("content-length") == "0" and OFFLOAD_ORDERS.isdisjoint(response.headers))
        case 206 if "range" in headers:
            return _is_unusable_part(_fields(response), headers)
        case 304 if "if-modified-since" in headers and "if-none-match" not in headers:
            modified = parse_http_date(response.headers.get("last-modified", ""))
            return modified is not None and not is_meaningful(modified)
        case 406:
            return "accept-encoding" in headers
        case 412:
            return is_optional and {"if-match", "if-unmodified-since"}.isdisjoint(headers)
        case 416:
            return is_optional and not _is_unsatisfied(_fields(response), headers)
    return status in (_REFUSALS_OF_HEAD if method == "HEAD" else REFUSALS) and is_optional


def _is_unusable_part(fields: dict[str, str], headers: Mapping[str, str]) -> bool:
    """Return whether a 206 does not tell which part it is, or is a short one that nothing tells how to continue."""
    is_multipart = fields.get("content-type", "").lower().startswith("multipart/byteranges")
    if is_multipart or "content-range" not in fields:
        return True
    return _is_short(fields, headers) and not _validators(fields, _received(fields)).is_pinned


def _is_short(fields: dict[str, str], headers: Mapping[str, str]) -> bool:
    """Return whether a 206 has the beginning of the range that was asked, and not all of it [RFC 9110 15.3.7]."""
    try:
        part, size = _content_range(fields)
    except UpstreamError:
        return False
    specs = parse_range(headers["range"])
    parts = None if specs is None or size is None else select_ranges(specs, size)
    return isinstance(parts, list) and part.start == parts[0].start and part.stop < parts[0].stop


def _is_unsatisfied(fields: dict[str, str], headers: Mapping[str, str]) -> bool:
    """Return whether a 416 tells the size of a file that does not have what was asked of it [RFC 9110 15.5.17]."""
    match = _UNSATISFIED_RANGE.fullmatch(fields.get("content-range", ""))
    specs = parse_range(headers.get("range", ""))
    if match is None or specs is None or select_ranges(specs, int(match[1])) != "unsatisfiable":
        return False
    condition = DownloadRequest(if_range=headers.get("if-range"))
    return range_applies(condition, _validators(fields, _received(fields)))


def _single_range(request: DownloadRequest) -> RangeSpec | None:
    if request.method != "GET" or request.range is None:
        return None
    specs = parse_range(request.range)
    return specs[0] if specs is not None and len(specs) == 1 else None


def _forwarded(request: DownloadRequest, spec: RangeSpec | None) -> dict[str, str]:
    conditions = {
        "if-match": request.if_match,
        "if-unmodified-since": request.if_unmodified_since,
        "if-none-match": request.if_none_match,
        "if-modified-since": request.if_modified_since,
    }
    headers = {name: value for name, value in conditions.items() if value}
    since = parse_http_date(request.if_modified_since or "")
    if since is None or not is_meaningful(since):
        headers.pop("if-modified-since", None)  # all versions may have this time, so a 304 would prove nothing
    headers["accept-encoding"] = "identity"
    if spec is not None:
        first, last = ("" if number is None else number for number in spec)
        headers["range"] = f"bytes={first}-{last}"
        if request.if_range:
            headers["if-range"] = request.if_range
    return headers


def _fields(response: Any) -> dict[str, str]:
    fields: dict[str, str] = {}
    for raw_name, raw_value in response.headers.raw:
        name, value = raw_name.lower().decode("latin-1"), raw_value.decode("latin-1")
        # A list may come in several fields. A field that may come once, and comes twice, then is none that parses.
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _version(fields: dict[str, str]) -> tuple[str | None, str | None]:
    return fields.get("etag"), fields.get("last-modified")


def _validators(fields: dict[str, str], received: Received) -> FileMetadata:
    """Return the validators that an answer has.

    A Last-Modified that is not at least a second before Date may be shared by the next version, as may one that is not
    meaningful: neither is one [RFC 9110 8.8.2.2].
    """
    etag = ETag.parse(fields.get("etag", ""))
    modified = parse_http_date(fields.get("last-modified", ""))
    margin = 1 if "date" in fields or etag is not None else _CLOCKS
    if modified is not None and not (is_meaningful(modified) and modified <= received.date - margin):
        modified = None
    return FileMetadata(etag=etag, last_modified=modified)


def _readable(metadata: FileMetadata) -> FileMetadata:
    """Return metadata that tells how many reads an answer may cost.

    Several requests have to be of one version, which only a strong validator tells. Without one, all parts are read
    from one answer, if the file is small enough to read over what is between them.
    """
    is_cheap = metadata.is_pinned or (metadata.size or 0) <= _MAX_ONCE
    return replace(metadata, max_reads=MAX_READS if is_cheap else 1)


def _received(fields: dict[str, str]) -> Received:
    now = time.time()
    date = parse_http_date(fields.get("date", ""))
    told = _AGE.match(fields.get("age", ""))
    age = max(0.0 if date is None else now - date, float(told[1]) if told else 0.0, 0.0)
    return Received(date=now if date is None else date, at=now, age=age)


def _retry_after(fields: dict[str, str]) -> str | None:
    value = fields.get("retry-after", "")
    return value if _RETRY_AFTER.fullmatch(value) or parse_http_date(value) is not None else None


def _entity(metadata: FileMetadata, fields: dict[str, str]) -> FileMetadata:
    passed = {name: fields[name] for name in _PASSED_HEADERS if _FIELD_VALUE.fullmatch(fields.get(name, "\0"))}
    coding, told = content_coding(passed.pop("content-encoding", "")), _AGE.match(passed.pop("age", ""))
    if coding is not None:
        passed["content-encoding"] = coding
    if told is not None:
        passed["age"] = told[1]
    return replace(metadata, content_type=valid_content_type(fields.get("content-type")), headers=tuple(passed.items()))


def _size(fields: dict[str, str]) -> int | None:
    length = fields.get("content-length")
    if length is None or "transfer-encoding" in fields:
        return None
    if not _LENGTH.fullmatch(length):
        raise UpstreamError(f"a Content-Length of {length!r}")
    return int(length)


def _content_range(fields: dict[str, str]) -> tuple[ByteRange, int | None]:
    """Return the part and the size that a 206 names. Raises `UpstreamError` for what is none."""
    value = fields.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None or int(match[1]) > int(match[2]) or (match[3] != "*" and int(match[2]) >= int(match[3])):
        raise UpstreamError(f"a Content-Range of {value!r}")
    part = ByteRange(int(match[1]), int(match[2]) + 1)
    length = _size(fields)
    if length is not None and length != len(part):
        raise UpstreamError(f"{length} bytes for a Content-Range of {value!r}")
    return part, None if match[3] == "*" else int(match[3])


def _not_modified(metadata: FileMetadata, request: DownloadRequest) -> FileMetadata:
    """Return metadata for which the client's validators are current, as a 304 says even where it names none."""
    if failed_precondition(request, metadata) == 304:
        return metadata
    tags = parse_etag_list(request.if_none_match or "")
    return replace(
        metadata,
        etag=ETag.parse(tags[0]) if tags else metadata.etag,
        last_modified=parse_http_date(request.if_modified_since or "") or metadata.last_modified,
    )
