"""The addresses of clients and proxies, as decisions about access compare them."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network


def address_of(client: str | None) -> IPv4Address | IPv6Address | None:
    """Return the address of a client; None for a text that is not one, as for a Unix socket or the client of a test.

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
