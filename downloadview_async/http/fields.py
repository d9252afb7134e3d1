"""Header fields that several rooms have to agree on: the grammar of tokens, sets of names, the length of a body."""

from collections.abc import Iterable

TOKEN_CHAR = "[!#$%&'*+.^_`|~0-9A-Za-z-]"
"""One character of a token [RFC 9110 5.6.2], as a regular expression."""

NAME_CHAR = "[!#$%&'*+.^_`|~0-9a-z-]"
"""One character of the name of a field [RFC 9110 5.1] in lower case, as a regular expression."""

FRAMING = frozenset({"accept-ranges", "connection", "content-length", "content-range", "transfer-encoding"})
"""Headers that tell how a body is sent. Only the sender of the body sets them."""

OF_THE_FILE = FRAMING | {"content-disposition", "content-encoding", "content-type", "etag", "last-modified"}
"""Headers that describe the file that is sent, or tell how it is sent."""

OF_THE_CONNECTION = frozenset({"keep-alive", "te", "trailer", "upgrade", "proxy-authenticate", "proxy-connection"})
"""Headers for the next server only [7.6.1], beside those of `FRAMING`. No proxy passes them on."""

OF_THE_CONTENT = frozenset(
    {
        "accept-ranges",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-length",
        "content-security-policy",
        "content-type",
    }
)
"""Representation metadata, which an answer without the file leaves out.

"The sender SHOULD NOT generate representation metadata" except the validators and what a cache needs [15.4.5].
"""

OFFLOAD_TARGET = "x-offload-target"
"""The path and query that a proxy requests from another server, encoded and signed. The proxy knows which server."""

OFFLOAD_ORDERS: set[str] = set()
"""Headers that name the file for a proxy to send, for all kinds of proxies. Names are in lower case."""

OFFLOAD_HEADERS: set[str] = {OFFLOAD_TARGET}
"""Headers that some proxy obeys. Only a backend sets them; they are never taken from an application or an upstream.

Both sets grow with each `ProxyKind` that is made: look names up in them, and do not copy them.
"""


def reserve_offload_headers(*, orders: set[str], controls: set[str]) -> None:
    """Reserve headers for backends: orders name the file, controls tell the proxy how to send it."""
    OFFLOAD_ORDERS.update(orders)
    OFFLOAD_HEADERS.update(orders, controls)


def length_of(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return the Content-Length among the header fields of an answer; None if it is missing, repeated or invalid."""
    values = [bytes(value) for name, value in headers if bytes(name).lower() == b"content-length"]
    return int(values[0]) if len(values) == 1 and values[0].isdigit() and len(values[0]) < 20 else None


REQUEST_ID_PARAMETER = "x-request-id"
"""The parameter of a redirect's URL that carries the id of the request into the access log of S3."""
