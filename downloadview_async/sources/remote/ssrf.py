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
from time import monotonic

import anyio

from downloadview_async.errors import UpstreamError, UpstreamRefused, UpstreamTimeout
from downloadview_async.sources.remote.network import Connection, connect
from downloadview_async.sources.remote.urls import ascii_host
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


@lru_cache(maxsize=1024)
def _normalized(host: str) -> str:
    host = ascii_host(host.strip("[]")).rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


class Network:
    """Opens connections: looks each name up once, checks all addresses, connects to one of them.

    Each network has a few threads for its lookups. Those of the event loop are shared: the lookups of one source whose
    name server does not answer would hold up those of all others.
    """

    def __init__(self, hosts: AllowedHosts) -> None:
        self._hosts = hosts
        self._workers = Workers(_LOOKUPS)

    async def connect(self, host: str, port: int, *, is_secure: bool, deadline: float) -> Connection:
        """Return a connection, with TLS if it has to be secure.

        Raises `UpstreamRefused` for a host or an address that is not allowed, `UpstreamError` for a connection that
        cannot be made, and `UpstreamTimeout` at the deadline, a time of `time.monotonic`.
        """
        addresses = await self._look_up(host, deadline)
        if not self._hosts.permits(host) or not self._hosts.permits_addresses(host, addresses):
            raise UpstreamRefused(
                f"{host!r} has the address {', '.join(map(str, addresses))}, which is not allowed: list the host in "
                "allow_hosts if this source is meant to reach it"
            )
        connection = await self._connect(addresses, host, port, deadline)
        if is_secure:
            try:
                # in a thread: the first time, it takes 0.1 s
                await connection.start_tls(await self._workers.run(ssl_context), host, deadline)
            except BaseException as exc:
                connection.close()
                if isinstance(exc, OSError):
                    raise UpstreamError(f"the certificates of this system cannot be read: {exc}") from exc
                raise
        return connection

    async def _connect(self, addresses: list[Address], host: str, port: int, deadline: float) -> Connection:
        failure: UpstreamError | None = None
        for address in addresses:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            try:
                return await connect(str(address), port, family=family, deadline=deadline)
            except UpstreamTimeout:
                raise
            except UpstreamError as exc:
                failure = exc
        raise failure or UpstreamError(f"{host!r} has no address")

    async def _look_up(self, host: str, deadline: float) -> list[Address]:
        with suppress(ValueError):
            return [_without_zone(host)]
        try:
            with anyio.fail_after(deadline - monotonic()):
                entries = await self._workers.run_or_abandon(_entries_of, host, patience=math.inf)
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{host!r} was not looked up in time") from exc
        except (OSError, OverflowError, UnicodeError) as exc:
            raise UpstreamError(f"{host!r} cannot be looked up: {exc}") from exc
        return list(dict.fromkeys(map(_without_zone, entries)))


def _entries_of(host: str) -> list[str]:
    """Return the addresses of a host, as text. Blocks."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)]


def _without_zone(address: str) -> Address:
    """Return an address. The zone of a link-local one (fe80::1%eth0) is dropped: rules name addresses without it."""
    return ipaddress.ip_address(address.partition("%")[0])


@lru_cache(maxsize=1)
def ssl_context() -> ssl.SSLContext:
    """Return the TLS context of all connections: loading the certificates takes as long as hundreds of requests."""
    import httpx2  # imported here because few need it: upstreams in the own network have no TLS

    context = httpx2.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
