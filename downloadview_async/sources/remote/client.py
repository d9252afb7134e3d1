"""The HTTP client for remote files: `Upstream`, with its slots, its redirects and its allowed hosts."""

import ipaddress
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import anyio

from downloadview_async.errors import (
    ConfigurationError,
    FileError,
    SourceUnavailable,
    UpstreamError,
    UpstreamTimeout,
    wrong_type,
)
from downloadview_async.sources.tracing import span
from downloadview_async.sources.workers import Slots

MAX_REDIRECTS = 5

# The rest of an answer is read, so that its connection can be used again, if it is this short and arrives this soon.
_MAX_REST = 64 * 1024  # bytes
_REST_SECONDS = 0.5

_PORTS = {"http": 80, "https": 443}

_LENGTH = re.compile("[0-9]{1,18}")

# The errors of httpx and httpx2, by name, because either may be in use. The first that matches counts.
ERRORS: Mapping[str, type[FileError]] = {
    "PoolTimeout": SourceUnavailable,
    "TimeoutException": UpstreamTimeout,
    "HTTPError": UpstreamError,
    "InvalidURL": UpstreamError,
    "StreamError": UpstreamError,
    "CookieConflict": UpstreamError,
}


def client_error(exc: Exception) -> FileError | None:
    """Return our error for an error of the HTTP client, or None for any other error."""
    names = {cls.__name__ for cls in type(exc).__mro__ if cls.__module__.partition(".")[0] in ("httpx", "httpx2")}
    for name, error in ERRORS.items():
        if name in names:
            return error(f"{type(exc).__name__}: {exc}")
    return None


def is_host(text: str) -> bool:
    """Return whether a text is the name of a host, or a literal address with or without brackets."""
    try:
        ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return re.fullmatch(r"([\w.-]|[^\x00-\x7f\s])+", text) is not None
    return True


class Upstream:
    """An HTTP client and the hosts that it may connect to.

    host: the host of the application's own URL. allow_hosts: further hosts, by name or literal address, that redirects
    may lead to. Only a host in this list may have an address that is not public (SSRF).
    headers: further headers for each request, such as an API key. Authorization is only sent to the first host.
    client: an `AsyncClient` of httpx2 or httpx to use instead of ours. It has its own transport, so hosts are still
    checked, but not the addresses that they resolve to.
    max_connections: upstream requests at once. A request that waits longer than two seconds for its turn gets a 503.
    connect_timeout, read_timeout: seconds to connect, and to wait for the next bytes. The head of an answer must be
    complete after the sum of both.

    Raises `ConfigurationError` if `allow_hosts` is not a list of hosts.
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
        # httpx is imported here because only remote files need it
        from downloadview_async.sources.remote.ssrf import AllowedHosts, guarded_client

        allowed = list(allow_hosts)
        if isinstance(allow_hosts, str) or not all(isinstance(name, str) and is_host(name) for name in allowed):
            raise ConfigurationError(
                "allow_hosts takes a list of hosts, as names or addresses without scheme, port and path, not "
                f"{allow_hosts!r}"
            )
        if not isinstance(host, str) or "/" in host:
            raise wrong_type("Upstream takes the name of a host, such as 'files.example.org'", host)
        self._hosts = AllowedHosts(host, allowed)
        self._headers = dict(headers or {})
        self._owns_client = client is None
        self._client = client or guarded_client(self._hosts, connect_timeout=connect_timeout, read_timeout=read_timeout)
        self.slots = Slots(max_connections, are_connections=True)
        self._head_timeout = connect_timeout + read_timeout

    async def aclose(self) -> None:
        """Close our own client and its connections. A client that was passed in stays open: its owner closes it."""
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
        with await self.slots.take():
            yield

    async def send(self, method: str, url: str, headers: Mapping[str, str]) -> Any:
        """Return the response, with its body unread, after at most `MAX_REDIRECTS` redirects.

        Raises `UpstreamError`, `UpstreamTimeout` or `SourceUnavailable`.
        """
        try:
            parts = urlsplit(url)
            with (
                span(
                    method,
                    http__request__method=method,
                    url__scheme=parts.scheme,
                    server__address=parts.hostname or "",
                    server__port=parts.port or _PORTS.get(parts.scheme, 0),
                ) as note,
                anyio.fail_after(self._head_timeout),
            ):
                response = await self._send(method, url, headers)
                note("http.response.status_code", response.status_code)
                return response
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{url!r} took more than {self._head_timeout} s to answer") from exc
        except Exception as exc:
            if error := client_error(exc):
                raise error from exc
            raise

    async def _send(self, method: str, url: str, headers: Mapping[str, str]) -> Any:
        # as bytes, because an entity tag may have more than ASCII, and httpx encodes text as ASCII
        raw = [(name.encode(), value.encode("latin-1")) for name, value in {**self._headers, **headers}.items()]
        request = self._client.build_request(method, url, headers=raw)
        if "accept-encoding" not in headers:
            request.headers.pop("accept-encoding", None)  # else httpx names the codings that it could decode
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
            raise UpstreamError(f"{origin!r} leads to the scheme {url.scheme!r}, which is not allowed")
        if url.userinfo or not self._hosts.permits(url.host):
            raise UpstreamError(f"{origin!r} leads to {url.host!r}: list the host in allow_hosts if that is intended")
        # An allowed host may only be asked for files, not for other services on other ports.
        if url.port is not None and url.port not in (urlsplit(origin).port, 80, 443):
            raise UpstreamError(f"{origin!r} leads to port {url.port} of {url.host!r}, which is not allowed")


async def settle(response: Any, chunks: AsyncIterator[bytes] | None = None) -> None:
    """Read the rest of a response if it is short, so that its connection can be used again, and close it.

    chunks: the iterator over the body, if reading has begun.
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
        if client_error(exc) is None:
            raise
    finally:
        await close(response)


async def close(response: Any) -> None:
    """Close a response, even when cancelled. Its connection is closed if the body was not read to its end."""
    with anyio.CancelScope(shield=True):
        await response.aclose()
