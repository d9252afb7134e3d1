"""Protection against SSRF: the hosts and addresses that a remote fetch may connect to. The default is to deny.

A name is looked up once, every address is checked, and the connection goes to an address that was checked. There is no
second lookup, which an attacker's name server could answer with another address.
"""

import ipaddress
import math
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import anyio
import httpcore2
import httpx2

from downloadview_async.errors import UpstreamError
from downloadview_async.sources.remote.network import Connection, connect
from downloadview_async.sources.workers import Workers

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_LOOKUPS = 4  # of one source at once

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public Internet. An IPv4 address may be wrapped in IPv6 in any form."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and address not in _SIX_TO_FOUR_RELAYS
    wrapped = address.ipv4_mapped or address.sixtofour
    if wrapped is None and address in _NAT64:
        wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if wrapped is not None:
        return is_public(wrapped)
    return address in _GLOBAL_UNICAST and address.is_global


def is_private(address: Address) -> bool:
    """Return whether an address belongs to this machine or to a private network: a host allowed by name may have it."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return True
    return address.is_private and not (
        address.is_link_local or address.is_unspecified or address.is_multicast or address.is_reserved
    )


class AllowedHosts:
    """The hosts that may be contacted: the one in the application's own URL, and those that are allowed by name.

    allow: names or literal addresses. Only these may have an address that is not public. Link-local addresses (cloud
    metadata) must be allowed by the address itself.
    """

    def __init__(self, host: str, allow: Iterable[str] = ()) -> None:
        self._allowed = {_normalized(name) for name in allow}
        self._hosts = self._allowed | {_normalized(host)}

    def permits(self, host: str) -> bool:
        """Return whether a request may be sent to this host, if its addresses are permitted too."""
        return _normalized(host) in self._hosts

    def permits_addresses(self, host: str, addresses: list[Address]) -> bool:
        """Return whether a connection may go to these addresses of `host`: either all are permitted or none."""
        if all(map(is_public, addresses)):
            return True
        host = _normalized(host)
        if host not in self._allowed:
            return False
        return all(map(is_private, addresses)) or [host] == [str(address) for address in addresses]


def _normalized(host: str) -> str:
    host = host.strip("[]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections for a client: looks each name up once, checks all addresses, connects to one of them.

    Each backend has a few threads for its lookups. Those of the event loop are shared: the lookups of one source whose
    name server does not answer would hold up those of all others.
    """

    def __init__(self, hosts: AllowedHosts) -> None:
        self._hosts = hosts
        self._workers = Workers(_LOOKUPS)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Return a connection. Raises `UpstreamError` for a host or an address that is not allowed."""
        addresses = await self._look_up(host, timeout)
        if not self._hosts.permits(host) or not self._hosts.permits_addresses(host, addresses):
            raise UpstreamError(
                f"{host!r} has the address {', '.join(map(str, addresses))}, which is not allowed: list the host in "
                "allow_hosts if this source is meant to reach it"
            )
        failure: Exception | None = None
        for address in addresses:
            try:
                return await connect(
                    str(address),
                    port,
                    family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                    timeout=timeout,
                    options=socket_options or (),
                )
            except httpcore2.ConnectError as exc:
                failure = exc
        raise failure or httpcore2.ConnectError(f"{host!r} has no address")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Raise `UpstreamError`: a remote file is never behind a Unix socket."""
        raise UpstreamError(f"a Unix socket cannot be an upstream: {path!r}")

    async def sleep(self, seconds: float) -> None:
        """Sleep between two tries of httpcore."""
        await anyio.sleep(seconds)

    async def _look_up(self, host: str, timeout: float | None) -> list[Address]:
        with suppress(ValueError):
            return [_without_zone(host)]
        try:
            with anyio.fail_after(timeout):
                entries = await self._workers.run_or_abandon(_entries_of, host, patience=math.inf)
        except TimeoutError as exc:
            raise httpcore2.ConnectTimeout(f"looking {host!r} up took more than {timeout} s") from exc
        except (OSError, OverflowError, UnicodeError) as exc:
            raise httpcore2.ConnectError(f"{host!r} cannot be looked up: {exc}") from exc
        return list(dict.fromkeys(map(_without_zone, entries)))


def _entries_of(host: str) -> list[str]:
    """Return the addresses of a host, as text. Blocks."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)]


def _without_zone(address: str) -> Address:
    """Return an address. The zone of a link-local one (fe80::1%eth0) is dropped: rules name addresses without it."""
    return ipaddress.ip_address(address.partition("%")[0])


_RETRIED = "downloadview_async.retried"


class _Pool(httpcore2.AsyncConnectionPool):
    """Keeps connections alive, and retries a request once if its kept-alive connection turns out to be closed."""

    newest = 0
    """The number of the connection made last."""

    def __init__(self, *, ssl_context: ssl.SSLContext, keepalive_expiry: float, backend: GuardedBackend) -> None:
        super().__init__(
            ssl_context=ssl_context,
            max_connections=None,
            max_keepalive_connections=20,
            keepalive_expiry=keepalive_expiry,
            network_backend=backend,
        )
        self._options = {
            "ssl_context": ssl_context,
            "keepalive_expiry": keepalive_expiry,
            "network_backend": backend,
        }
        self.distrusted = 0
        """Connections up to this number get no further requests."""

    def create_connection(self, origin: httpcore2.Origin) -> httpcore2.AsyncConnectionInterface:
        """Return a connection, which connects when its first request is sent."""
        self.newest += 1
        return _PooledConnection(self, self.newest, origin=origin, **self._options)


class _PooledConnection(httpcore2.AsyncHTTPConnection):
    """One connection of the pool. If a kept-alive one ends before its answer begins, the request is sent once more.

    "A client [...] MAY automatically retry [an idempotent] request" that failed for that reason [RFC 9110 9.2.2]. All
    our requests are GET or HEAD. A 408 has the same reason: the upstream no longer waited for a request [15.5.9].
    The other idle connections may be closed as well, so the retry uses a new one.
    """

    def __init__(self, pool: _Pool, number: int, **options: Any) -> None:
        super().__init__(**options)
        self._pool = pool
        self._number = number

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        """Send a request. Raises `ConnectionNotAvailable` to have the pool send it on a new connection."""
        may_retry = self._connection is not None and _RETRIED not in request.extensions
        try:
            response = await super().handle_async_request(request)
            if not (may_retry and response.status == 408):
                return response
            await response.aclose()
        except (httpcore2.ReadError, httpcore2.WriteError, httpcore2.RemoteProtocolError):
            if not may_retry or self._stream.has_answered:
                raise
        request.extensions[_RETRIED] = True
        self._pool.distrusted = self._pool.newest
        raise httpcore2.ConnectionNotAvailable

    def has_expired(self) -> bool:
        """Return whether this connection must get no further requests.

        If an upstream has sent more bytes than its answer announced, they must not be taken for the next answer.
        """
        if super().has_expired():
            return True
        return self.is_idle() and (self._number <= self._pool.distrusted or self._has_leftovers)

    @property
    def _stream(self) -> Connection:
        stream: Connection = self._connection._network_stream  # type: ignore[union-attr]  # noqa: SLF001
        return stream

    @property
    def _has_leftovers(self) -> bool:
        leftovers: bytes = self._connection._h11_state.trailing_data[0]  # type: ignore[union-attr]  # noqa: SLF001
        return leftovers != b""


@lru_cache(maxsize=1)
def _ssl_context() -> ssl.SSLContext:
    """Return the TLS context of all clients: loading the certificates takes as long as hundreds of requests."""
    return httpcore2.default_ssl_context()


def guarded_client(hosts: AllowedHosts, *, connect_timeout: float, read_timeout: float) -> httpx2.AsyncClient:
    """Return a client that connects only to these hosts, follows no redirects, and uses no cookies and no proxies."""
    context = _ssl_context()
    transport = httpx2.AsyncHTTPTransport(verify=context, trust_env=False)
    # This is the only way to give httpx's transport our network. No request waits in its pool, as our slots come first,
    # so a request that is cancelled while waiting cannot take a connection with it.
    transport._pool = _Pool(ssl_context=context, keepalive_expiry=5.0, backend=GuardedBackend(hosts))  # noqa: SLF001
    client = httpx2.AsyncClient(
        transport=transport,
        trust_env=False,
        follow_redirects=False,
        timeout=httpx2.Timeout(read_timeout, connect=connect_timeout),
    )
    # a cookie that an upstream sets for one user must not be sent for another
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client
