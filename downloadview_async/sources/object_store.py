"""`ObjectStorage`: the objects of S3, Google Cloud Storage or Azure as a storage, through obstore.

The request that opens an object also describes it: a GET, a GET of a single range and a HEAD each cost one request to
the store. Bytes from further requests must be of the same version.
"""

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing, suppress
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import anyio

from downloadview_async.errors import (
    ConfigurationError,
    FileError,
    FileMissing,
    SourceUnavailable,
    UpstreamError,
    UpstreamTimeout,
)
from downloadview_async.http.metadata import ETag, FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.sigv4 import Credentials
from downloadview_async.sources.bucket_listing import BucketListing
from downloadview_async.sources.listing import DescribedEntry, Entry
from downloadview_async.sources.names import canonical_folder, checked_segments
from downloadview_async.sources.object_errors import file_error, first_line, is_of_store
from downloadview_async.sources.object_options import ALIASES, ENDPOINTS, SCHEMES, arguments_of, plain_name
from downloadview_async.sources.open_object import OpenObject
from downloadview_async.sources.tracing import span
from downloadview_async.sources.workers import Slots, Workers

_PAGED_OPTIONS = frozenset(
    {"access_key_id", "secret_access_key", "session_token", "region", "skip_signature", "endpoint", "base_url"}
) | {"virtual_hosted_style_request", "bucket"}
_PAGED_CLIENT = frozenset({"allow_http", "timeout", "connect_timeout", "read_timeout"})
"""Options of a store whose folders are read page by page, with a client that has no others."""

_PLACING = ENDPOINTS | {"virtual_hosted_style_request"}
_MAX_BELOW = 64  # stores, each with its own connections
_MAKERS = 4  # threads that make such stores
# The options of S3 that obstore also reads from the environment.
_FROM_ENVIRONMENT = (
    "access_key_id",
    "secret_access_key",
    "session_token",
    "default_region",
    "region",
    "endpoint",
    "endpoint_url",
    "virtual_hosted_style_request",
)

_AFTERGLOW = 0.05  # seconds
_PIPES = 8  # that obstore's threads need at most, to start
_LISTING_TIMES = 10  # a listing is many requests: it may take so many times the time of one


class ObjectStorage:
    """The objects below a URL: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.

    `file:///absolute/directory` and `memory:///` use obstore's stores, for tests; in production, use
    `DirectoryStorage`, which never leaves its directory. A name is the rest of the key after the prefix, with segments
    between slashes.

    options: those of obstore for the store (`endpoint`, `access_key_id`, `region` ...) and for its client
    (`allow_http`, `connect_timeout` ...), and `credential_provider` or `retry_config`. An endpoint may begin with
    http://.
    max_connections: requests to the store at once. A request that waits longer than two seconds for its turn gets a
    503.
    answer_timeout: seconds until the head of an answer must be complete, including retries.

    Each process has a separate store with separate connections. A process that has opened an object must not be forked
    if the children open objects: obstore's threads do not survive that.

    Raises `ConfigurationError` for any other URL, for options that the store does not have, and if obstore is not
    installed.
    """

    def __init__(
        self, url: str, /, *, max_connections: int = 100, answer_timeout: float = 30.0, **options: Any
    ) -> None:
        self.url = url
        self._answer_timeout = answer_timeout
        self.slots = Slots(max_connections, are_connections=True)
        self._arguments = arguments_of(url, options)
        self._bases: dict[str | None, str | None] = {}
        """The URLs without a name, by the endpoint that was given."""
        self._made: tuple[int, Any] | None = (os.getpid(), self._make(url, self._arguments))
        self._below: dict[str, Any] = {}
        """Stores for keys with empty segments, by their endpoints, the most recently used last."""
        self._makers = Workers(_MAKERS)

    def _make(self, url: str, arguments: dict[str, Any]) -> Any:
        try:
            from obstore.store import from_url
        except ModuleNotFoundError as exc:
            extra = SCHEMES.get(urlsplit(self.url).scheme, "s3")
            raise ConfigurationError(
                f"{self.url!r} needs {exc.name}: install downloadview_async with its extra `{extra}`"
            ) from exc
        try:
            return from_url(url, **arguments)
        except Exception as exc:  # of many classes, but always about the URL or an option
            raise ConfigurationError(f"{self.url!r} cannot be used with these options: {first_line(exc)}") from exc

    @property
    def store(self) -> Any:
        """The obstore object itself. Objects that are put into it can be downloaded here."""
        process = os.getpid()
        if self._made is None or self._made[0] != process:
            self._made = (process, self._make(self.url, self._arguments))
            self._below = {}
        return self._made[1]

    async def _place_of(self, name: str) -> tuple[Any, str]:
        """Return the obstore store for a key, and the name of the key in it. Raises `FileMissing`."""
        segments = name.split("/")
        if "." in segments or not segments[-1]:
            raise FileMissing(f"obstore cannot name this key: {name!r}")
        store = self.store
        if "" not in segments:
            return store, name
        # obstore drops empty segments: it takes "/a" for "a". The part of the key up to the last empty segment becomes
        # a part of the URL of a separate store.
        base = self.url_of("")
        if base is None:
            raise FileMissing(f"only S3 has keys with empty segments: {name!r}")
        end = name.rfind("//") + 1
        endpoint = f"{base}/{quote(name[:end])}"
        if (below := self._below.pop(endpoint, None)) is None:
            kept = {key: value for key, value in self._arguments.items() if plain_name(key) not in _PLACING}
            placed: dict[str, Any] = {**kept, "endpoint": endpoint, "virtual_hosted_style_request": True}
            # making its HTTP client takes some 10 ms
            below = await self._makers.run(self._make, f"s3://{urlsplit(self.url).netloc}", placed)
        self._below[endpoint] = below
        while len(self._below) > _MAX_BELOW:
            del self._below[next(iter(self._below))]  # the least recently used one
        return below, name[end + 1 :]

    @property
    def config(self) -> Mapping[str, str]:
        """The options of the store by their names in obstore's documentation, including those from the environment.

        Empty for all stores but S3.
        """
        if urlsplit(self.url).scheme != "s3":
            return {}
        environment = {name: os.environ.get(f"AWS_{name.upper()}", "") for name in _FROM_ENVIRONMENT}
        config = {ALIASES.get(name, name): value for name, value in environment.items() if value}
        given = {name: value for name, value in self._arguments.items() if isinstance(value, str | bool)}
        return MappingProxyType(config | {plain_name(name): str(value) for name, value in given.items()})

    @property
    def credential_provider(self) -> Any:
        """The `credential_provider` among the options, or None."""
        return self._arguments.get("credential_provider")

    @property
    def place(self) -> str | None:
        """Identifies the store: its URL, and its endpoint or account. None for a store in memory."""
        if urlsplit(self.url).scheme == "memory":
            return None
        known = getattr(self.store, "config", {})
        where = [f"{name}={known[name]}" for name in ("account_name", "endpoint", "base_url") if name in known]
        return self.url_of("") or " ".join([self.url, *where])

    def url_of(self, name: str, endpoint: str | None = None) -> str | None:
        """Return the plain URL of an object of S3, at the given endpoint or that of the store; None for other stores.

        With `virtual_hosted_style_request` an endpoint includes the bucket, as for obstore.
        """
        if endpoint not in self._bases:
            self._bases[endpoint] = self._base_of(endpoint)
        base = self._bases[endpoint]
        return base if base is None or not name else f"{base}/{quote(name)}"

    def _base_of(self, endpoint: str | None) -> str | None:
        config, parts = self.config, urlsplit(self.url)
        if parts.scheme != "s3":
            return None
        virtual = config.get("virtual_hosted_style_request", "").lower() in ("true", "1", "yes", "on", "y", "t")
        host = f"s3.{config.get('region', 'us-east-1')}.amazonaws.com"
        endpoint = endpoint or config.get("endpoint") or f"https://{f'{parts.netloc}.' if virtual else ''}{host}"
        path = [unquote(parts.path).strip("/")]
        if not virtual:
            path.insert(0, parts.netloc)
        return "/".join([endpoint.rstrip("/"), *[quote(part) for part in path if part]])

    def object_url(self, name: str) -> str | None:
        """Return the store's own URL of an object, such as `gs://bucket/name`; None for files and in memory."""
        is_remote = self.url.partition("://")[0] in SCHEMES
        return f"{self.url.rstrip('/')}/{quote(name)}" if is_remote else None

    async def locate(self, name: str) -> str | None:
        """Return the plain URL of an object of S3, or the path of a file; None for other stores."""
        if urlsplit(self.url).scheme == "file":
            return f"{unquote(urlsplit(self.url).path).rstrip('/')}/{name}"
        return self.url_of(name)

    @asynccontextmanager
    async def open(self, name: str, request: DownloadRequest = GET) -> AsyncIterator["OpenObject"]:
        """Send the request to the store, and describe the object by its answer.

        Raises `FileMissing`, also for a name that no file may have, `AccessDenied`, `SourceUnavailable` (throttled),
        `UpstreamError`.
        """
        checked_segments(name, "exact")
        with await self.slots.take():
            await _start_threads()
            store, key = await self._place_of(name)
            of_disk = urlsplit(self.url).scheme == "file"
            with closing(OpenObject(store, key, answer_timeout=self._answer_timeout, of_disk=of_disk)) as opened:
                with span("object store", downloadview__store=urlsplit(self.url).scheme):
                    await opened.begin(request)
                yield opened

    async def list(self, folder: str = "", /) -> AsyncIterator[Entry]:
        """Yield the objects whose keys begin with that of the folder, and the folders below it: see `SupportsListing`.

        A bucket of S3 with a known key is read page by page. Of other stores, obstore collects all entries before the
        first is yielded, which may take ten times as long as `answer_timeout`. There are no keys with empty segments
        among the entries.

        Raises `UpstreamError` also for a folder with a key that obstore cannot read, such as one with a control
        character.
        """
        folder = canonical_folder(folder, "exact")
        if (bucket := self._bucket()) is not None:
            async with aclosing(self._listed_by_pages(bucket, folder)) as entries:
                async for entry in entries:
                    yield entry
            return
        import obstore

        try:
            with await self.slots.take(), anyio.fail_after(_LISTING_TIMES * self._answer_timeout):
                await _start_threads()
                listed = await obstore.list_with_delimiter_async(self.store, prefix=folder or None)
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{folder!r} was not listed in time") from exc
        except BaseException as exc:
            if isinstance(exc, FileError) or not is_of_store(exc):
                raise
            if type(exc).__name__ == "InvalidPathError":
                raise UpstreamError(f"{folder!r} has a key that obstore cannot read: {first_line(exc)}") from exc
            raise file_error(exc, folder) from exc
        folders, objects = listed["common_prefixes"], listed["objects"]
        if folder and not (folders or objects):
            raise FileMissing(f"the store has no key below {folder!r}")
        start = len(folder) + 1 if folder else 0
        of_disk = urlsplit(self.url).scheme == "file"
        for path in folders:
            yield Entry(path[start:], is_folder=True)
        for meta in objects:
            # consoles store an empty object under the name of a folder with a slash, which obstore removes
            if name := meta["path"][start:]:
                tag = "" if of_disk else meta["e_tag"] or ""
                yield _entry(name, meta["size"], meta["last_modified"], tag)

    def _bucket(self) -> BucketListing | None:
        """Return what reads the bucket page by page, or None if only obstore knows how to reach it."""
        config, parts = self.config, urlsplit(self.url)
        base = self.url_of("")
        is_known = (
            base is not None
            and _PAGED_OPTIONS.issuperset(config)
            and self._arguments["client_options"].keys() <= _PAGED_CLIENT
            and self.credential_provider is None
            and not parts.netloc.endswith("--x-s3")  # these buckets want another signature
        )
        if not is_known or base is None:
            return None
        credentials = None
        if config.get("skip_signature", "").lower() not in ("true", "1"):
            if not {"access_key_id", "secret_access_key"}.issubset(config):
                return None
            token = config.get("session_token")
            credentials = Credentials(config["access_key_id"], config["secret_access_key"], token)
        prefix = unquote(parts.path).strip("/")
        return BucketListing(
            base.removesuffix(f"/{quote(prefix)}") if prefix else base,
            region=config.get("region", "us-east-1"),
            credentials=credentials,
            error_for=lambda text, name: file_error(RuntimeError(text), name),
            slots=self.slots,
            workers=self._makers,
            timeout=self._answer_timeout,
        )

    async def _listed_by_pages(self, bucket: BucketListing, folder: str) -> AsyncGenerator[Entry, None]:
        top = unquote(urlsplit(self.url).path).strip("/")
        prefix = "".join(f"{part}/" for part in (top, folder) if part)
        is_empty = True
        async with aclosing(bucket.pages(prefix)) as pages:
            async for page in pages:
                is_empty = is_empty and not page.objects
                for listed in page.objects:
                    if listed.size is None:
                        if listed.key != "/":  # an empty segment
                            yield Entry(listed.key.removesuffix("/"), is_folder=True)
                    elif listed.key:  # not the empty object that stands for the folder itself
                        yield _entry(listed.key, listed.size, listed.modified, listed.etag)
        if folder and is_empty:
            raise FileMissing(f"the store has no key below {folder!r}")

    async def aclose(self) -> None:
        """Close the store and its connections before the process ends. If it is used again, a new one is made."""
        self._made = None
        self._below = {}
        # obstore's threads release their Python objects a moment after an answer. If the interpreter ends before that,
        # they abort it.
        with anyio.CancelScope(shield=True):
            await anyio.sleep(_AFTERGLOW)


_started_in: int | None = None  # the process in which obstore's threads run


async def _start_threads() -> None:
    """Have obstore start its threads, once in a process. Raises `SourceUnavailable` if descriptors have run out.

    obstore itself would panic then, and again at each later call, until the process ends.
    """
    global _started_in
    if _started_in == (process := os.getpid()):
        return
    import obstore
    from obstore.store import MemoryStore

    held: list[int] = []
    try:
        for _ in range(_PIPES):
            held += os.pipe()
    except OSError as exc:
        raise SourceUnavailable(f"obstore cannot start: {exc.strerror}") from exc
    finally:
        for descriptor in held:
            os.close(descriptor)
    with suppress(FileNotFoundError):
        await obstore.head_async(MemoryStore(), "none")
    _started_in = process


def _entry(name: str, size: int, modified: datetime | None, etag: str) -> Entry:
    entry, tag = Entry(name, size=size, modified=modified), ETag.parse(etag)
    if tag is None or tag.weak:
        return entry
    return DescribedEntry.of(entry, partial(FileMetadata, size=size, etag=tag))
