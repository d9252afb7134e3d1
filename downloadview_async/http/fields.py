"""Header fields that several parts have to agree on: each set is said here once."""

OFFLOAD_TARGET = "x-offload-target"
"""What a proxy asks another server for: the path and query, encoded and signed. The proxy itself knows which server."""

OFFLOAD_ORDERS: set[str] = set()
"""Headers that name the file a proxy has to send, each for some proxy. Names are in lower case."""

OFFLOAD_HEADERS: set[str] = {OFFLOAD_TARGET}
"""Headers that some proxy obeys. Only a backend sets them; they are never taken from an application or an upstream.

Both sets grow with each `ProxyKind` that is made, so ask them for a name, and keep no copy.
"""


def reserve_offload_headers(*, orders: set[str], controls: set[str]) -> None:
    """Leave these headers to backends: orders, which name a file, and controls, which say how it is sent."""
    OFFLOAD_ORDERS.update(orders)
    OFFLOAD_HEADERS.update(orders, controls)
