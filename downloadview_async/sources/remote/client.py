"""The HTTP client for remote files: `Upstream`, with its slots, its redirects and its allowed hosts."""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio

from downloadview_async.errors import ConfigurationError, UpstreamRefused, wrong_type
from downloadview_async.http.fields import TOKEN_CHAR
from downloadview_async.sources.remote.http1 import Client, Response
from downloadview_async.sources.remote.httpx_client import HttpxClient, HttpxResponse
from downloadview_async.sources.remote.ssrf import AllowedHosts, Network
from downloadview_async.sources.remote.urls import parse_url
from downloadview_async.sources.tracing import Note, span
from downloadview_async.sources.workers import Slots

_NAME = re.compile(f"{TOKEN_CHAR}+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_DEFAULTS = {"accept": "*/*", "user-agent": "downloadview_async"}


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

    Raises `ConfigurationError` if `allow_hosts` is not a list of hosts, and for a header that cannot be sent.
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
        allowed = list(allow_hosts)
        if isinstance(allow_hosts, str) or not all(isinstance(name, str) and is_host(name) for name in allowed):
            raise ConfigurationError(
                "allow_hosts takes a list of hosts, as names or addresses without scheme, port and path, not "
                f"{allow_hosts!r}"
            )
        if not isinstance(host, str) or "/" in host:
            raise wrong_type("Upstream takes the name of a host, such as 'files.example.org'", host)
        self._hosts = AllowedHosts(host, allowed)
        self._headers = {name.lower(): value for name, value in (headers or {}).items()}
        for name, value in self._headers.items():
            if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
                raise ConfigurationError(f"the header {name!r} of an upstream has a name or a value that is not valid")
        self._client: Client | HttpxClient
        if client is None:
            network = Network(self._hosts)
            self._client = Client(network, connect_timeout=connect_timeout, read_timeout=read_timeout)
            self._headers = _DEFAULTS | self._headers
        else:
            self._client = HttpxClient(client, head_seconds=connect_timeout + read_timeout)
        self.slots = Slots(max_connections, are_connections=True)

    async def aclose(self) -> None:
        """Close our own client and its connections. A client that was passed in stays open: its owner closes it."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    async def send(self, method: str, url: str, headers: Mapping[str, str]) -> Response | HttpxResponse:
        """Return the response, with its body unread, after at most `MAX_REDIRECTS` redirects.

        Raises `UpstreamError`, `UpstreamTimeout` or `SourceUnavailable`.
        """
        with _span(method, url) as note:
            fields = {**self._headers, **headers}
            response = await self._client.fetch(method, url, fields, partial(self._check, url))
            note("http.response.status_code", response.status)
            return response

    def _check(self, origin: str, url: Any) -> None:
        first = parse_url(origin)
        if url.scheme != "https" and (first.scheme == "https" or url.scheme != "http"):
            raise UpstreamRefused(f"{origin!r} leads to the scheme {url.scheme!r}, which is not allowed")
        if url.userinfo or not self._hosts.permits(url.host):
            raise UpstreamRefused(f"{origin!r} leads to {url.host!r}: list the host in allow_hosts if that is intended")
        # An allowed host may only be asked for files, not for other services on other ports.
        if url.port is not None and url.port not in (first.port, 80, 443):
            raise UpstreamRefused(f"{origin!r} leads to port {url.port} of {url.host!r}, which is not allowed")


def _span(method: str, url: str) -> AbstractContextManager[Note]:
    place = parse_url(url)
    return span(
        method,
        http__request__method=method,
        url__scheme=place.scheme,
        server__address=place.host,
        server__port=place.origin[2],
    )
