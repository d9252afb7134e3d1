"""The addresses of clients and proxies, as decisions about access compare them."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from downloadview_async.errors import ConfigurationError

ANYONE = "*"
"""The address that stands for every proxy, and the name that stands for every user."""

PEER = "downloadview_async.peer"
"""The key of the address of the peer in an ASGI scope, which `KeepPeer` keeps."""


def address_of(client: str | None) -> IPv4Address | IPv6Address | None:
    """Return the address of a client; None for another text, as for a Unix socket or the client of a test.

    An IPv4 client of a server that listens on IPv6 has its IPv4 address. A zone, as in `fe80::1%eth0`, is left out.
    """
    try:
        address = ip_address((client or "").partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def network_of(client: str | None) -> str:
    """Return the clients that count as one: an IPv4 address, or the /64 of an IPv6 address, which one person has.

    Returns a text that is not an address unchanged, and an empty string without one.
    """
    address = address_of(client)
    if address is None:
        return client or ""
    return str(ip_network((address, 64), strict=False) if isinstance(address, IPv6Address) else address)


class TrustedAddresses:
    """The proxies that are trusted: their addresses and networks; `*` stands for all.

    Raises `ConfigurationError` for one that is not an address.
    """

    def __init__(self, addresses: Iterable[str]) -> None:
        if isinstance(addresses, str):
            raise ConfigurationError(f"trusted is {addresses!r}: give a list of addresses and networks")
        self._networks = []
        self._has_all = False
        for address in addresses:
            try:
                if address == ANYONE:
                    self._has_all = True
                else:
                    self._networks.append(ip_network(address))
            except ValueError as exc:
                raise ConfigurationError(
                    f"{address!r} is not a trusted address ({exc}): give one such as 10.0.0.7 or 10.0.0.0/8"
                ) from exc
        self._is_in = lru_cache(maxsize=1024)(self._is_in_a_network)

    def __bool__(self) -> bool:
        return self._has_all or bool(self._networks)

    def has(self, peer: str | None) -> bool:
        """Return whether a peer is trusted."""
        return self._has_all or (bool(self._networks) and self._is_in(peer))

    def _is_in_a_network(self, peer: str | None) -> bool:
        address = address_of(peer)
        return address is not None and any(address in network for network in self._networks)


def peer_of(scope: Mapping[str, Any]) -> str | None:
    """Return the address from which a request comes directly, which a proxy may have; None if nobody knows it."""
    if PEER in scope:
        peer: str | None = scope[PEER]
        return peer
    client = scope.get("client")
    return client[0] if client else None
