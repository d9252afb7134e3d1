"""Request heads: those that are refused, and the target, the Host and the body length of the others."""

import re
from functools import lru_cache
from ipaddress import IPv6Address


class Refused(Exception):
    """A head is refused, with a status and with the text of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text


def read_head(
    headers: list[tuple[bytes, bytes]], target: bytes, version: str, *, is_on_unix_socket: bool, is_upgrade: bool
) -> tuple[bytes, int | None]:
    """Return the target of a request in origin-form, and the length of its body in bytes: None if that is chunked.

    version: of HTTP. is_upgrade: whether the parser takes the request for one that another protocol answers.

    The headers are changed in place: Host without whitespace around it, or with the authority that the target had.

    Raises `Refused` for what the parser lets pass: another major version, a Host that is missing, repeated or invalid
    [RFC 9112 3.2], a transfer coding that is invalid or unknown [RFC 9112 6.1], an upgrade with a body.
    """
    if version[0] != "1":
        raise Refused(505, "HTTP Version Not Supported")
    fields = dict(headers)
    sent_host = fields.get(b"host")
    # "any HTTP/1.1 request message that lacks a Host header field and [...] any request message that contains more
    # than one Host header field line or a Host header field with an invalid field value" [RFC 9112 3.2]
    is_repeated = len(fields) < len(headers) and [name for name, _ in headers].count(b"host") > 1
    if is_repeated or (sent_host is None and version != "1.0"):
        raise Refused(400, "Invalid Host header field.")
    if sent_host is not None:
        host = sent_host.strip(b" \t")  # "excluding any leading or trailing whitespace" [RFC 9110 5.5]
        if is_on_unix_socket and _SOCKET_PATH.fullmatch(host):
            host = b""  # as for any URL without an authority [RFC 9110 7.2]
        if host is not sent_host:
            headers[headers.index((b"host", sent_host))] = b"host", host
        if not is_host(host):
            raise Refused(400, "Invalid Host header field.")
    if b"://" in target:
        target = _in_origin_form(target, headers)
    length: int | None = 0
    if b"transfer-encoding" in fields:
        length = None
        codings = b",".join([value for name, value in headers if name == b"transfer-encoding"]).lower()
        *others, last = [coding.strip() for coding in codings.split(b",")]
        if version == "1.0" or last != b"chunked" or b"content-length" in fields:
            raise Refused(400, "Invalid Transfer-Encoding header field.")
        if others:
            raise Refused(501, "Transfer coding not implemented.")
    elif b"content-length" in fields:
        length = int(fields[b"content-length"])  # the parser checks it, and refuses a second one
    # The parser would read the body of such a request as the next request.
    if length != 0 and is_upgrade and b"upgrade" in fields:
        raise Refused(400, "An upgrade of a request with a body is not supported.")
    return target, length


def _in_origin_form(target: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return a target in origin-form. The authority of one in absolute-form replaces Host [RFC 9112 3.2.2]."""
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        if not target.startswith(b"/"):
            raise Refused(400, "Invalid request target.")
        return target
    if not is_host(match["authority"]):
        raise Refused(400, "Invalid request target.")
    headers[:] = [field for field in headers if field[0] != b"host"]
    headers.append((b"host", match["authority"]))
    rest = match["target"]
    return rest if rest.startswith(b"/") else b"/" + rest


@lru_cache(maxsize=256)  # a server has few names
def is_host(value: bytes) -> bool:
    """Return whether a value is a valid one of Host: a host, which may be empty, and a port [RFC 9110 7.2]."""
    match = _HOST.fullmatch(value)
    if match is None or match["v6"] is None:
        return match is not None
    try:
        IPv6Address(match["v6"].decode())
    except ValueError:
        return False
    return True


_ABSOLUTE = re.compile(rb"(?i:https?)://(?P<authority>[^/?#:][^/?#]*)(?P<target>.*)", re.DOTALL)

# H2O, and clients that are made with an older Go, send the path of a Unix socket as the host that such a URL lacks.
_SOCKET_PATH = re.compile(rb"\[unix:[!-~]+\]|/[!-~]*")

# reg-name or IPv4address, IPvFuture, IPv6address [RFC 3986 3.2.2]
_HOST = re.compile(
    rb"(?:(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[v[0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+\]|"
    rb"\[(?P<v6>[0-9A-Fa-f:.]+)\])(?::[0-9]*)?"
)
