"""`UpstreamURL`: a URL as an HTTP client needs it, with the host in ASCII [RFC 3986]."""

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, urlsplit

from downloadview_async.errors import UpstreamError

PORTS = {"http": 80, "https": 443}

_HOST = re.compile(r"[A-Za-z0-9_.-]+")
_AS_IT_IS = "/?:@[]!$&'()*+,;=%"  # what a target may have beside letters, digits and -._~ [RFC 3986 3.3]


@dataclass(frozen=True, slots=True)
class UpstreamURL:
    """The parts of a URL: the same for deciding where to connect to, for connecting, and for the request.

    host: in ASCII, without brackets. port: None if the URL has none. target: the path and the query.
    """

    scheme: str
    host: str
    port: int | None
    target: str
    userinfo: bool = False

    @property
    def origin(self) -> tuple[str, str, int]:
        """The scheme, the host and the port: a connection is for one of these."""
        return self.scheme, self.host, PORTS.get(self.scheme, 0) if self.port is None else self.port

    @property
    def authority(self) -> str:
        """The value of the field Host [RFC 9110 7.2]."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in (None, PORTS.get(self.scheme)) else f"{host}:{self.port}"

    def joined(self, location: str) -> "UpstreamURL":
        """Return the URL that a Location leads to. Raises `UpstreamError`."""
        with suppress(UnicodeError):
            location = location.encode("latin-1").decode()  # some servers send UTF-8
        try:
            reference = urlsplit(location)
        except ValueError as exc:
            raise UpstreamError(f"{location[:1000]!r} is not a URL: {exc}") from exc
        if reference.scheme:
            return parse_url(location)
        if reference.netloc:
            return parse_url(f"{self.scheme}:{location}")
        path, _, query = self.target.partition("?")
        if reference.path or reference.query:
            query = reference.query
        if reference.path.startswith("/"):
            path = reference.path
        elif reference.path:
            path = f"{path.rpartition('/')[0]}/{reference.path}"
        return parse_url(f"{self.scheme}://{self.authority}{path}?{query}")


@lru_cache(maxsize=1024)
def parse_url(url: str) -> UpstreamURL:
    """Return the parts of a URL. Raises `UpstreamError`."""
    try:
        parts = urlsplit(url)
        host, port = ascii_host(parts.hostname or ""), parts.port
        if not _HOST.fullmatch(host):
            address, _, zone = host.partition("%")
            ipaddress.ip_address(address)
            if zone and not _HOST.fullmatch(zone):
                raise ValueError("the zone of its address has characters that no zone has")
    except ValueError as exc:
        raise UpstreamError(f"{url[:1000]!r} is not the URL of a server: {exc}") from exc
    path = _without_dot_segments(parts.path) if "/." in parts.path else parts.path
    target = quote(f"{path or '/'}?{parts.query}" if parts.query else path or "/", safe=_AS_IT_IS)
    return UpstreamURL(parts.scheme, host, port, target, userinfo="@" in parts.netloc)


def _without_dot_segments(path: str) -> str:
    """Return a path without its segments `.` and `..` [RFC 3986 5.2.4]. Empty segments stay, unlike with `urljoin`."""
    segments: list[str] = []
    for segment in path.split("/")[1:]:
        if segment == ".." and segments:
            segments.pop()
        if segment not in (".", ".."):
            segments.append(segment)
    if path.endswith(("/.", "/..")):
        segments.append("")
    return f"/{'/'.join(segments)}"


def ascii_host(host: str) -> str:
    """Return the name of a host as name servers know it [RFC 5890], or unchanged if it cannot be converted."""
    if host.isascii():
        return host
    import idna  # imported here because few names need it

    try:
        return idna.encode(host, uts46=True).decode()
    except idna.IDNAError:
        return host
