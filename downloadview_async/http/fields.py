"""Header fields that several parts have to agree on: each set is said here once."""

OFFLOAD_TARGET = "x-offload-target"
"""What a proxy asks another server for: the path and query, encoded and signed. The proxy itself knows which server."""

OFFLOAD_ORDERS = frozenset(
    {
        "x-accel-redirect",
        "x-sendfile",
        "x-sendfile2",
        "x-lighttpd-send-file",
        "x-litespeed-location",
        "x-reproxy-url",
    }
)
"""Headers that name the file a proxy has to send, each for some proxy. Names are in lower case."""

OFFLOAD_HEADERS = OFFLOAD_ORDERS | {
    OFFLOAD_TARGET,
    "x-accel-buffering",
    "x-accel-charset",
    "x-accel-expires",
    "x-accel-limit-rate",
}
"""Headers that some proxy obeys. Only a backend sets them; they are never taken from an application or an upstream."""
