"""`?checksum=sha256`: the line of `sha256sum` about a file, instead of the file; the lines about those of a folder."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from urllib.parse import parse_qs

from starlette.responses import Response
from starlette.types import Message, Scope, Send

from downloadview_async.asgi.answer import raw
from downloadview_async.asgi.disconnect import close_after_body
from downloadview_async.errors import FileError, TransferAborted
from downloadview_async.http.request import HEAD
from downloadview_async.sources.base import AsyncFile
from downloadview_async.sources.digests.known import Digests
from downloadview_async.sources.digests.sidecar import checksum_line

_ALGORITHMS = {"sha256": "sha-256", "sha512": "sha-512"}
_PATIENCE = 5.0  # seconds that an answer waits for a digest
_LINES = 500  # that are sent together
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
        async with file.open(HEAD):  # one that is missing gives 404
            return _unknown_algorithm(headers)
    value = await _known(algorithm, digests, name, file)
    if value is None and digests.background and algorithm in digests.algorithms:
        if not await digests.computed(name, _PATIENCE):
            headers["Retry-After"] = str(int(_PATIENCE))
            return Response("The digest is being computed.\n", 202, headers, "text/plain")
        value = await _known(algorithm, digests, name, file)
    if value is None:
        return Response("No digest of this file is known.\n", 404, headers, "text/plain")
    return Response(checksum_line(value, file.name), 200, headers, "text/plain")


async def send_checksums(
    wanted: str, digests: Digests, folder: str, names: AsyncGenerator[str, None], scope: Scope, send: Send
) -> None:
    """Send the line about each file of a folder whose digest is known; 400: there is no such algorithm.

    folder: empty, or with a slash at its end. names: of the files in it.

    Raises `FileError` if nothing has been sent yet, else `TransferAborted`.
    """
    headers = _HEADERS | close_after_body(scope)
    if (algorithm := _ALGORITHMS.get(wanted)) is None:
        async with aclosing(names):
            await anext(names, None)  # a folder that is missing gives 404
        await _unknown_algorithm(headers)(scope, _nothing, send)
        return
    headers["Content-Type"] = "text/plain; charset=utf-8"
    start = {"type": "http.response.start", "status": 200, "headers": raw(headers)}
    lines: list[str] = []
    is_started = False
    try:
        async with aclosing(names):
            async for name in names:
                if scope["method"] == "HEAD":
                    break
                try:
                    file = await digests.source.resolve(folder + name)
                    value = await _known(algorithm, digests, folder + name, file)
                except FileError:
                    continue  # it was removed meanwhile, or cannot be read
                if value is not None:
                    lines.append(checksum_line(value, name))
                if len(lines) == _LINES:
                    if not is_started:
                        await send(start)
                        is_started = True
                    await send({"type": "http.response.body", "body": "".join(lines).encode(), "more_body": True})
                    lines = []
    except FileError as exc:
        if not is_started:
            raise
        raise TransferAborted(f"the rest of the folder cannot be read: {exc}") from exc
    if not is_started:
        await send(start)
    await send({"type": "http.response.body", "body": "".join(lines).encode()})


def _unknown_algorithm(headers: dict[str, str]) -> Response:
    return Response(f"checksum takes {' or '.join(_ALGORITHMS)}\n", 400, headers, "text/plain")


async def _nothing() -> Message:
    """Stand for the messages of a client that are not read."""
    return {"type": "http.disconnect"}


async def _known(algorithm: str, digests: Digests, name: str, file: AsyncFile) -> bytes | None:
    async with file.open(HEAD) as opened:
        return dict((await digests.find(name, opened)).digests).get(algorithm)
