"""Which hosts and addresses a remote fetch may connect to: deny by default, checked at the connection itself.

A name is looked up once, every answer is checked, and the connection goes to an address that was checked: there is
no second lookup that an attacker's name server could answer otherwise.
"""

import ipaddress
import socket
import ssl
from collections.abc import Iterable
from functools import lru_cache
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import anyio
import httpcore2
import httpx2

from downloadview_async.errors import UpstreamError
from downloadview_async.sources.remote.network import Connection, connect

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")


def is_public(address: Address) -> bool:
    """Return whether an address is one of the public Internet, whatever form an IPv4 address is wrapped in."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and address not in _SIX_TO_FOUR_RELAYS
    wrapped = address.ipv4_mapped or address.sixtofour
    if wrapped is None and address in _NAT64:
        wrapped = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if wrapped is not None:
        return is_public(wrapped)
    return address in _GLOBAL_UNICAST and address.is_global


def is_private(address: Address) -> bool:
    """Return whether an address is of this machine or of a private network, as a host allowed by name may have."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return True
    return address.is_private and not (
        address.is_link_local or address.is_unspecified or address.is_multicast or address.is_reserved
    )


class AllowedHosts:
    """The hosts that an upstream may be: the one that the application's own URL names, and those allowed by name.

    allow: names or literal addresses. Only these may be at an address that is not public; link-local addresses (cloud
    metadata) only where the address itself is allowed.
    """

    def __init__(self, host: str, allow: Iterable[str] = ()) -> None:
        self._allowed = {_normalized(name) for name in allow}
        self._hosts = self._allowed | {_normalized(host)}

    def permits(self, host: str) -> bool:
        """Return whether a request may name this host at all."""
        return _normalized(host) in self._hosts

    def permits_addresses(self, host: str, addresses: list[Address]) -> bool:
        """Return whether a connection to `host` may go to any of the addresses it has: all of them, or none."""
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
    """Opens the connections of a client: looks a name up once, checks every address, connects to a checked one."""

    def __init__(self, hosts: AllowedHosts) -> None:
        self._hosts = hosts

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Return a connection. Raises `UpstreamError` for a host or an address that is not allowed."""
        addresses = await _look_up(host, port, timeout)
        if not self._hosts.permits(host) or not self._hosts.permits_addresses(host, addresses):
            raise UpstreamError(
                f"{host!r} is at {', '.join(map(str, addresses))}, which is not allowed: list the host in allow_hosts "
                "if this source is meant to reach it"
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
        raise UpstreamError(f"a Unix socket is no upstream: {path!r}")

    async def sleep(self, seconds: float) -> None:
        """Wait, as httpcore does between tries."""
        await anyio.sleep(seconds)


async def _look_up(host: str, port: int, timeout: float | None) -> list[Address]:
    try:
        with anyio.fail_after(timeout):
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError as exc:
        raise httpcore2.ConnectTimeout(f"looking {host!r} up took more than {timeout} s") from exc
    except (OSError, OverflowError, UnicodeError) as exc:
        raise httpcore2.ConnectError(f"{host!r} cannot be looked up: {exc}") from exc
    # the zone of a link-local address (fe80::1%eth0) is of no interest: it is refused or listed as it is
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


_RETRIED = "downloadview_async.retried"


class _Pool(httpcore2.AsyncConnectionPool):
    """Connections that are kept, and one retry of a request where a kept connection turned out to be closed."""

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
        """Connections up to this number take no further request."""

    def create_connection(self, origin: httpcore2.Origin) -> httpcore2.AsyncConnectionInterface:
        """Return a connection that is made when the first request is sent by it."""
        self.newest += 1
        return _PooledConnection(self, self.newest, origin=origin, **self._options)


class _PooledConnection(httpcore2.AsyncHTTPConnection):
    """One connection of the pool. A request by a kept one that ends before the answer has begun is sent once more.

    "A client [...] MAY automatically retry [an idempotent] request" that failed for that reason [RFC 9110 9.2.2], and
    all of ours are GET or HEAD. The other connections that are idle by then are as old, and are not tried.
    """

    def __init__(self, pool: _Pool, number: int, **options: Any) -> None:
        super().__init__(**options)
        self._pool = pool
        self._number = number

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        """Send a request. Raises `ConnectionNotAvailable` for the pool to send it by a new connection."""
        is_kept = self._connection is not None
        try:
            return await super().handle_async_request(request)
        except (httpcore2.ReadError, httpcore2.WriteError, httpcore2.RemoteProtocolError):
            if not is_kept or self._stream.has_answered or _RETRIED in request.extensions:
                raise
            request.extensions[_RETRIED] = True
            self._pool.distrusted = self._pool.newest
            raise httpcore2.ConnectionNotAvailable from None

    def has_expired(self) -> bool:
        """Return whether no further request may be sent by it.

        An upstream that has sent more than the answer which it announced must not have that taken for the next answer.
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
    """Return what all clients trust: reading the certificates takes as long as hundreds of requests."""
    return httpcore2.default_ssl_context()


def guarded_client(hosts: AllowedHosts, *, connect_timeout: float, read_timeout: float) -> httpx2.AsyncClient:
    """Return a client that connects nowhere else, follows nothing, keeps no cookies and knows no proxies."""
    context = _ssl_context()
    transport = httpx2.AsyncHTTPTransport(verify=context, trust_env=False)
    # The one way to give httpx's transport a network of our own. Nobody waits in its pool (our slots come first), so
    # a request cancelled while waiting cannot take a connection with it.
    transport._pool = _Pool(ssl_context=context, keepalive_expiry=5.0, backend=GuardedBackend(hosts))  # noqa: SLF001
    client = httpx2.AsyncClient(
        transport=transport,
        trust_env=False,
        follow_redirects=False,
        timeout=httpx2.Timeout(read_timeout, connect=connect_timeout),
    )
    # what an upstream sets for one user must not be sent for the next
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client
