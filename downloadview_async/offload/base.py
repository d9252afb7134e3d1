"""The seam to reverse proxies: `OffloadBackend`, and the ASGI extension by which a response learns of one."""

from collections.abc import Mapping
from typing import Protocol

from downloadview_async.sources.base import AsyncFile

EXTENSION = "downloadview_async.offload"
"""The key in `scope["extensions"]` under which `OffloadMiddleware` offers its backend to a response."""

OFFLOAD_HEADERS = frozenset(
    {
        "x-accel-redirect",
        "x-accel-buffering",
        "x-accel-charset",
        "x-accel-expires",
        "x-accel-limit-rate",
        "x-sendfile",
        "x-sendfile2",
        "x-lighttpd-send-file",
        "x-litespeed-location",
        "x-reproxy-url",
    }
)
"""Headers that some proxy obeys. Only a backend sets them; they are never taken from an application or an upstream."""


class OffloadBackend(Protocol):
    """Knows one kind of proxy, and which files that proxy can reach."""

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return the headers that make the proxy send the file, names in lower case; None: stream it yourself."""
        ...
