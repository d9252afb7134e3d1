"""`HttpxClient`: fetches by a client of httpx2 or httpx that the user has passed."""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import anyio

from downloadview_async.errors import FileError, SourceUnavailable, UpstreamError, UpstreamRefused, UpstreamTimeout
from downloadview_async.http.upstream import joined_fields
from downloadview_async.sources.remote.http1 import MAX_REDIRECTS, MAX_REST, REST_SECONDS

_LENGTH = re.compile("[0-9]{1,18}")

# The errors of httpx and httpx2, by name, because either may be in use. The first that matches counts.
ERRORS: Mapping[str, type[FileError]] = {
    "PoolTimeout": SourceUnavailable,
    "TimeoutException": UpstreamTimeout,
    "HTTPError": UpstreamError,
    "InvalidURL": UpstreamError,
    "StreamError": UpstreamError,
    "CookieConflict": UpstreamError,
}


def client_error(exc: Exception) -> FileError | None:
    """Return our error for an error of the HTTP client, or None for any other error."""
    names = {cls.__name__ for cls in type(exc).__mro__ if cls.__module__.partition(".")[0] in ("httpx", "httpx2")}
    for name, error in ERRORS.items():
        if name in names:
            return error(f"{type(exc).__name__}: {exc}")
    return None


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        if error := client_error(exc):
            raise error from exc
        raise


class HttpxClient:
    """A client of the user's, which the user closes. head_seconds: for the head of an answer, after redirects."""

    def __init__(self, client: Any, *, head_seconds: float) -> None:
        self._client = client
        self._head_seconds = head_seconds

    async def fetch(
        self, method: str, url: str, fields: Mapping[str, str], check: Callable[[Any], None]
    ) -> "HttpxResponse":
        """Do what the `fetch` of `http1.Client` does. Also raises `SourceUnavailable`."""
        try:
            with _our_errors(), anyio.fail_after(self._head_seconds):
                return await self._fetch(method, url, fields, check)
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{url!r} took more than {self._head_seconds} s to answer") from exc

    async def _fetch(
        self, method: str, url: str, fields: Mapping[str, str], check: Callable[[Any], None]
    ) -> "HttpxResponse":
        # as bytes, because an entity tag may have more than ASCII, and httpx encodes text as ASCII
        raw = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        request = self._client.build_request(method, url, headers=raw)
        if "accept-encoding" not in fields:
            request.headers.pop("accept-encoding", None)  # else httpx names the codings that it could decode
        for _ in range(MAX_REDIRECTS + 1):
            check(request.url)
            response = await self._client.send(request, stream=True, follow_redirects=False)
            if response.next_request is None:
                return HttpxResponse(response)
            request = response.next_request
            await HttpxResponse(response).settle()
        raise UpstreamRefused(f"{url!r} redirects more than {MAX_REDIRECTS} times")

    async def aclose(self) -> None:
        """Do nothing: the owner of the client closes it."""


class HttpxResponse:
    """A response of httpx, with the interface of `http1.Response`."""

    def __init__(self, response: Any) -> None:
        self.method: str = response.request.method
        self.status: int = response.status_code
        self.fields = joined_fields(response.headers.raw)
        self.ends_with_connection: bool = (
            "content-length" not in self.fields
            and "transfer-encoding" not in self.fields
            and response.http_version.startswith("HTTP/1")
        )
        self._response = response
        self._chunks: AsyncIterator[bytes] = response.aiter_raw()

    def arrived(self, size: int) -> None:
        """Return None: httpx does not tell what has arrived."""

    async def read(self) -> bytes:
        """Return the next bytes of the body, not decoded; b"" at its end. Raises `FileError`."""
        with _our_errors():
            return await anext(self._chunks, b"")

    async def settle(self) -> None:
        """Read the rest if it is short, so that the connection can be used again, and close the response."""
        try:
            length = self.fields.get("content-length", "")
            left = int(length) - self._response.num_bytes_downloaded if _LENGTH.fullmatch(length) else 0
            if left <= MAX_REST or self.method == "HEAD" or self.status in (204, 304):
                read = 0
                with suppress(FileError), anyio.move_on_after(REST_SECONDS):
                    while read <= MAX_REST and (chunk := await self.read()):
                        read += len(chunk)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close the response, even when cancelled. Its connection is closed if the body was not read to its end."""
        with anyio.CancelScope(shield=True):
            await self._response.aclose()
