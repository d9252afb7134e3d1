"""`?checksum=sha256`: the line of `sha256sum` about a file, instead of the file."""

from urllib.parse import parse_qs

from starlette.responses import Response
from starlette.types import Scope

from downloadview_async.asgi.disconnect import close_after_body
from downloadview_async.http.request import HEAD
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.digests.known import Digests
from downloadview_async.sources.digests.sidecar import checksum_line

_ALGORITHMS = {"sha256": "sha-256", "sha512": "sha-512"}
_PATIENCE = 5.0  # seconds that an answer waits for a digest
_HEADERS = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}


def wanted_checksum(query: bytes) -> str | None:
    """Return the value of `checksum` in a query, or None if the query does not have exactly one."""
    if b"checksum=" not in query:
        return None
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("checksum", [])
    return values[0] if len(values) == 1 else None


async def checksum_response(wanted: str, digests: Digests, name: str, file: AsyncFile, scope: Scope) -> Response:
    """Return the answer with the line about a file, whose digest is computed if `digests` does that in the background.

    202 with Retry-After: it is still being computed. 404: it is not known. 400: there is no such algorithm. Raises
    `FileError`.
    """
    headers = _HEADERS | close_after_body(scope)
    if (algorithm := _ALGORITHMS.get(wanted)) is None:
        return Response(f"checksum takes {' or '.join(_ALGORITHMS)}\n", 400, headers, "text/plain")
    value = await _known(algorithm, digests, name, file)
    if value is None and digests.background and algorithm in digests.algorithms:
        if not await digests.computed(name, _PATIENCE):
            headers["Retry-After"] = str(int(_PATIENCE))
            return Response("The digest is being computed.\n", 202, headers, "text/plain")
        value = await _known(algorithm, digests, name, file)
    if value is None:
        return Response("No digest of this file is known.\n", 404, headers, "text/plain")
    return Response(checksum_line(value, file.name), 200, headers, "text/plain")


async def _known(algorithm: str, digests: Digests, name: str, file: AsyncFile) -> bytes | None:
    async with file.open(HEAD) as opened:
        return dict((await digests.find(name, opened)).digests).get(algorithm)
