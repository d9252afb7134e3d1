"""Whether a request seems to have come to the application without a proxy in between."""

from starlette.types import Scope

_MARKS = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip"})
_PORTS = {"http": "80", "https": "443"}


def seems_direct(scope: Scope) -> bool:
    """Return whether a client has opened the address of the application itself.

    Proxies add header fields, and some speak HTTP/1.0, or close each connection. A client names the port of the server
    in Host. A proxy that does none of these cannot be told from a client.
    """
    server, headers = scope.get("server"), dict(scope["headers"])
    if not server or server[1] is None or scope.get("http_version") == "1.0" or not _MARKS.isdisjoint(headers):
        return False
    if headers.get(b"connection", b"").lower() == b"close":
        return False
    host = headers.get(b"host", b"").decode("latin-1")
    port = host.rpartition("]")[2].partition(":")[2]
    return (port or _PORTS.get(scope.get("scheme", "http"))) == str(server[1]) if host else False
