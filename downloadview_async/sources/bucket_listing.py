"""Lists a folder of an S3 bucket page by page. obstore has no such call: it collects all entries before the first.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
"""

import re
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from urllib.parse import unquote_plus, urlencode
from xml.etree import ElementTree

import anyio
from anyio.lowlevel import checkpoint

from downloadview_async.errors import UpstreamError, UpstreamTimeout
from downloadview_async.http.sigv4 import Credentials, presigned_url
from downloadview_async.sources.listing import aware_time
from downloadview_async.sources.workers import Slots, Workers

_VALID_SECONDS = 300  # of the signature of a request
_MAX_PAGE = 8 << 20  # bytes; 1,000 keys of 1,024 bytes, each byte percent-encoded, have less
_PARSED_AT_ONCE = 1 << 15  # bytes, of some hundred keys
_SIZE = re.compile("[0-9]{1,18}")
_TRIES = 3
_PAUSE = 0.2  # seconds before the second try


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object or, without a size, a common prefix. key: relative to the folder."""

    key: str
    size: int | None = None
    modified: datetime | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class ListingPage:
    """At most 1,000 objects and common prefixes. following: what the request for the next page has, or None."""

    objects: list[ListedObject]
    following: str | None


class BucketListing:
    """Reads the folders of a bucket.

    url: of the bucket, without a slash at its end. credentials: None for a bucket that everyone may list. error_for:
    returns our error for the text of an error of the store. timeout: seconds for the request of one page.
    """

    def __init__(
        self,
        url: str,
        *,
        region: str,
        credentials: Credentials | None,
        error_for: Callable[[str, str], Exception],
        slots: Slots,
        workers: Workers,
        timeout: float,
    ) -> None:
        self._url = url
        self._region = region
        self._credentials = credentials
        self._error_for = error_for
        self._slots = slots
        self._workers = workers
        self._timeout = timeout
        self._tls: ssl.SSLContext | None = None

    async def pages(self, prefix: str) -> AsyncGenerator[ListingPage, None]:
        """Yield the pages of what begins with a prefix, up to the next slash. Only one is in memory.

        Raises `AccessDenied`, `SourceUnavailable`, `UpstreamError`.
        """
        import httpx2  # imported here because only buckets need it

        if self._url.startswith("https:") and self._tls is None:
            self._tls = await self._workers.run(httpx2.create_ssl_context)  # takes 0.1 s
        client = httpx2.AsyncClient(verify=self._tls or False, timeout=self._timeout)
        try:
            token: str | None = ""
            while token is not None:
                page = await page_of(await self._content(client, prefix, token), prefix)
                yield page
                token = page.following
        finally:
            with anyio.CancelScope(shield=True):
                await client.aclose()

    async def _content(self, client: Any, prefix: str, token: str) -> bytes:
        parameters = {"list-type": "2", "delimiter": "/", "prefix": prefix, "encoding-type": "url"}
        if token:
            parameters["continuation-token"] = token
        try:
            with await self._slots.take(), anyio.fail_after(self._timeout):
                for number in range(_TRIES):
                    if number:
                        await anyio.sleep(_PAUSE * number)
                    status, content = await self._answer(client, parameters)
                    if status < 500:
                        break
        except TimeoutError as exc:
            raise UpstreamTimeout(f"the store did not list {prefix!r} in {self._timeout} s") from exc
        if status == 200:
            return content
        text = content[:2000].decode(errors="replace")
        raise self._error_for(f"performing list request: non-2xx status code: {status}: {text}", prefix)

    async def _answer(self, client: Any, parameters: dict[str, str]) -> tuple[int, bytes]:
        """Return the status and the body. 599 stands for a connection that failed."""
        import httpx2

        url = self._signed(parameters)
        content = b""
        try:
            async with client.stream("GET", url) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MAX_PAGE:
                        raise UpstreamError(f"the store has sent more than {_MAX_PAGE} bytes as one page of a listing")
                return response.status_code, content
        except httpx2.HTTPError as exc:
            return 599, f"{type(exc).__name__}: {exc}".encode()

    def _signed(self, parameters: dict[str, str]) -> str:
        if self._credentials is None:
            return f"{self._url}?{urlencode(parameters)}"
        return presigned_url(
            self._url,
            self._credentials,
            region=self._region,
            seconds=_VALID_SECONDS,
            now=time.time(),
            parameters=parameters,
        )


async def page_of(content: bytes, prefix: str) -> ListingPage:
    """Return the page that an answer holds. Other tasks get their turn meanwhile, as this takes some milliseconds.

    Raises `UpstreamError` for an answer that is not a listing.
    """
    parser: ElementTree.XMLPullParser[Any] = ElementTree.XMLPullParser(("start", "end"))
    names: list[str] = []
    fields: dict[str, str] = {}
    listed: list[dict[str, str]] = []
    try:
        for start in range(0, len(content), _PARSED_AT_ONCE):
            parser.feed(content[start : start + _PARSED_AT_ONCE])
            events = cast("Iterator[tuple[str, ElementTree.Element]]", parser.read_events())
            for event, element in events:
                name = _name_of(element)
                if event == "start":
                    names.append(name)
                    continue
                names.pop()
                if len(names) == 1:
                    parts = {_name_of(part): part.text or "" for part in element}
                    if name in ("Contents", "CommonPrefixes"):
                        listed.append(parts)
                    else:
                        fields[name] = element.text or ""
                    element.clear()
                elif not names and name != "ListBucketResult":
                    raise ValueError(f"the answer is {name}")
            await checkpoint()
        parser.close()
        decoded: Callable[[str], str] = unquote_plus if fields.get("EncodingType") == "url" else str
        objects = [_object_of(parts, decoded, prefix) for parts in listed]
        following = fields["NextContinuationToken"] if fields.get("IsTruncated") == "true" else None
    except (ElementTree.ParseError, KeyError, ValueError) as exc:
        raise UpstreamError(f"the store does not answer with a listing: {type(exc).__name__}: {exc}") from exc
    return ListingPage(objects, following)


def _object_of(parts: dict[str, str], decoded: Callable[[str], str], prefix: str) -> ListedObject:
    if "Key" not in parts:
        return ListedObject(decoded(parts["Prefix"]).removeprefix(prefix))
    if _SIZE.fullmatch(parts["Size"]) is None:
        raise ValueError(f"{parts['Size'][:40]!r} is not a size")
    return ListedObject(
        decoded(parts["Key"]).removeprefix(prefix),
        int(parts["Size"]),
        aware_time(parts["LastModified"]),
        parts.get("ETag", ""),
    )


def _name_of(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
