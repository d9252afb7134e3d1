"""The seam to reverse proxies: `OffloadBackend`, and the ASGI extension by which a response learns of one."""

from collections.abc import Mapping
from typing import Protocol

from downloadview_async.http.fields import OFFLOAD_TARGET
from downloadview_async.sources.base import AsyncFile

EXTENSION = "downloadview_async.offload"
"""The key in `scope["extensions"]` under which `OffloadMiddleware` offers its backend to a response."""


class Redirect(Protocol):
    """Knows where else a client can fetch some files."""

    async def headers_for(self, file: AsyncFile, described: Mapping[str, str]) -> Mapping[str, str] | None:
        """Return the headers of a 307, Location and Cache-Control among them, in lower case; None: send it yourself.

        described: the headers that the file would have here, which it has to have there too. None as well where it
        cannot have one of those that protect the client.

        Raises `FileError`.
        """
        ...


class OffloadBackend(Protocol):
    """Knows one kind of proxy, and which files that proxy can reach."""

    def headers_for(self, file: AsyncFile) -> Mapping[str, str] | None:
        """Return the headers that make the proxy send the file, names in lower case; None: stream it yourself.

        With `OFFLOAD_TARGET` among them, the proxy fetches the file from another server: that is for a GET alone, and
        not before `signed` has seen them.
        """
        ...


async def signed(backend: OffloadBackend, file: AsyncFile, headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return the headers of a backend as the proxy needs them: signed, if the backend can (`signed`) and has to.

    Raises `FileError`.
    """
    if OFFLOAD_TARGET not in headers or (sign := getattr(backend, "signed", None)) is None:
        return headers
    found: Mapping[str, str] = await sign(file, headers)
    return found
