"""`ObjectStorage`: the objects of S3, Google Cloud Storage or Azure as a storage, through obstore.

The request that opens an object also describes it: a GET, a GET of a single range and a HEAD each cost one request to
the store. Bytes from further requests must be of the same version.
"""

import math
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import anyio

from downloadview_async.errors import (
    AccessDenied,
    ConfigurationError,
    FileError,
    FileMissing,
    SourceUnavailable,
    TransferAborted,
    UpstreamBusy,
    UpstreamError,
    UpstreamTimeout,
)
from downloadview_async.http.content_types import valid_content_type
from downloadview_async.http.dates import http_seconds
from downloadview_async.http.metadata import (
    MAX_READS,
    ByteRange,
    ETag,
    FileMetadata,
    is_meaningful,
    is_telling,
    stat_validators,
    unsettled_seconds,
)
from downloadview_async.http.negotiation import content_coding, hides_coding
from downloadview_async.http.ranges import NEAR, RangeSpec, read_from
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.sigv4 import Credentials
from downloadview_async.http.upstream import REFUSALS
from downloadview_async.sources.bucket_listing import BucketListing
from downloadview_async.sources.listing import DescribedEntry, Entry
from downloadview_async.sources.local.open_file import CHUNK_SIZE
from downloadview_async.sources.names import canonical_folder, checked_segments
from downloadview_async.sources.tracing import span
from downloadview_async.sources.workers import Slots, Workers

SCHEMES = {"s3": "s3", "gs": "gcs", "az": "azure"}
"""The schemes of remote stores, and the extra that each needs."""

# obstore's client options. Callers pass them together with those of the store, which have other names.
_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_headers",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "root_certificate",
        "timeout",
        "user_agent",
    }
)
# `timeout` includes the body, which takes hours with a slow client. `read_timeout` runs only while we wait for the
# store. There are few retries, because the client is waiting and can try again itself.
_CLIENT_DEFAULTS = {"timeout": "7d", "connect_timeout": "10s", "read_timeout": "30s"}
_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(days=7)}

# Other names that obstore accepts for the same option.
_ALIASES = {
    "token": "session_token",
    "default_region": "region",
    "endpoint_url": "endpoint",
    "bucket_name": "bucket",
}
_ENDPOINTS = frozenset({"endpoint", "base_url"})
_PAGED_OPTIONS = frozenset(
    {"access_key_id", "secret_access_key", "session_token", "region", "skip_signature", "endpoint", "base_url"}
) | {"virtual_hosted_style_request", "bucket"}
_PAGED_CLIENT = frozenset({"allow_http", "timeout", "connect_timeout", "read_timeout"})
"""Options of a store whose folders are read page by page, with a client that has no others."""

_PLACING = _ENDPOINTS | {"virtual_hosted_style_request"}
_HTTP_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]+)?(/[!-~]*)?\Z", re.ASCII | re.IGNORECASE)
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
_LISTING_TIMES = 10  # a listing is many requests: it may take so many times the time of one
_EPOCH = datetime.fromtimestamp(0, UTC)

_PASSED_HEADERS = ("Content-Encoding", "Content-Language", "Cache-Control")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_UNKNOWN_TYPE = "binary/octet-stream"  # the type that S3 gives an object that was stored without one

_CLOCKS = 60  # seconds that the clock of a store may differ from ours: obstore does not pass on its Date

_STATUS = re.compile(r"non-2xx status code: ([0-9]{3})")
# Errors of S3 that are about all objects, not about one. They are in the body, which an answer to a HEAD does not have.
_MISCONFIGURED = re.compile(
    "<Code>(AuthorizationHeaderMalformed|ExpiredToken|InvalidAccessKeyId|InvalidToken|NoSuchBucket|RequestTimeTooSkewed"
    "|SignatureDoesNotMatch)</Code>"
)
# obstore has a class for this error of a GET, but not for that of a listing.
_LIST_REFUSED = re.compile("performing list request: .*non-2xx status code: 40[13]")
_THROTTLED = frozenset({"429", "503"})
_NON_PARTIAL = "non-partial response"  # obstore's error for a 200 to a range request
_ERRNO = re.compile(r"\(os error ([0-9]+)\)\Z")
_NOT_A_FILE = frozenset({"2", "20", "21", "36", "40"})  # ENOENT, ENOTDIR, EISDIR, ENAMETOOLONG, ELOOP
_DENIED = frozenset({"1", "13"})  # EPERM, EACCES


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
        self._arguments = _arguments(url, options)
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
            raise ConfigurationError(f"{self.url!r} cannot be used with these options: {_first_line(exc)}") from exc

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
            kept = {key: value for key, value in self._arguments.items() if _plain_name(key) not in _PLACING}
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
        config = {_ALIASES.get(name, name): value for name, value in environment.items() if value}
        given = {name: value for name, value in self._arguments.items() if isinstance(value, str | bool)}
        return MappingProxyType(config | {_plain_name(name): str(value) for name, value in given.items()})

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
        config, parts = self.config, urlsplit(self.url)
        if parts.scheme != "s3":
            return None
        virtual = config.get("virtual_hosted_style_request", "").lower() in ("true", "1", "yes", "on", "y", "t")
        host = f"s3.{config.get('region', 'us-east-1')}.amazonaws.com"
        endpoint = endpoint or config.get("endpoint") or f"https://{f'{parts.netloc}.' if virtual else ''}{host}"
        path = [unquote(parts.path).strip("/"), name]
        if not virtual:
            path.insert(0, parts.netloc)
        return "/".join([endpoint.rstrip("/"), *[quote(part) for part in path if part]])

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
                listed = await obstore.list_with_delimiter_async(self.store, prefix=folder or None)
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{folder!r} was not listed in time") from exc
        except FileError:
            raise
        except Exception as exc:
            if type(exc).__name__ == "InvalidPathError":
                raise UpstreamError(f"{folder!r} has a key that obstore cannot read: {_first_line(exc)}") from exc
            raise _file_error(exc, folder) from exc
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
            error_for=lambda text, name: _file_error(RuntimeError(text), name),
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


def _entry(name: str, size: int, modified: datetime | None, etag: str) -> Entry:
    entry, tag = Entry(name, size=size, modified=modified), ETag.parse(etag)
    if tag is None or tag.weak:
        return entry
    return DescribedEntry.of(entry, partial(FileMetadata, size=size, etag=tag))


class OpenObject:
    """One version of an object: its metadata from the store, and a stream that may have begun."""

    def __init__(self, store: Any, name: str, *, answer_timeout: float, of_disk: bool = False) -> None:
        self.metadata = FileMetadata()
        self._of_disk = of_disk
        self._store = store
        self._name = name
        self._answer_timeout = answer_timeout
        self.hides_coding = False
        """See `Recoded`."""
        self._version: tuple[str | None, Any, int] | None = None
        self._wanted: list[RangeSpec] | None = None
        self._has_ranges = True
        self._stream: Any = None
        self._span = ByteRange(0, 0)  # the rest of the stream, beginning with `_rest`
        self._rest = b""

    async def begin(self, request: DownloadRequest) -> None:
        """Pass the client's request on to the store. Raises `FileError`."""
        self._wanted = request.ranges
        options, answer = await self._ask(_options_for(request))
        if self._of_disk and (seconds := unsettled_seconds(_nanoseconds(answer.meta), time.time_ns())):
            await anyio.sleep(seconds)  # then a further change shows in the time
            options, answer = await self._ask(options)
        meta, attributes = answer.meta, answer.attributes
        self._version = _version(meta)
        etag, modified = self._validators(meta)
        # Without a strong tag, another version may have the same second.
        latest = math.inf if etag is not None and not etag.weak else time.time() - _CLOCKS
        if modified is not None and not (is_meaningful(modified) and modified <= latest):
            modified = None
        coding = attributes.get("Content-Encoding")
        self.hides_coding = hides_coding(coding)
        passed = {name.lower(): attributes.get(name, "\0") for name in _PASSED_HEADERS}
        passed["content-encoding"] = content_coding(coding or "") or "\0"
        content_type = valid_content_type(attributes.get("Content-Type"))
        self.metadata = FileMetadata(
            size=meta["size"],
            etag=etag,
            last_modified=modified,
            content_type=None if content_type == _UNKNOWN_TYPE else content_type,
            headers=tuple((name, value) for name, value in passed.items() if _FIELD_VALUE.fullmatch(value)),
        )
        # Without a strong validator, two reads cannot be shown to be of one version.
        self.metadata = replace(self.metadata, max_reads=MAX_READS if self.metadata.is_pinned else 1)
        if "head" not in options:
            self._take(answer)

    def _validators(self, meta: Mapping[str, Any]) -> tuple[ETag | None, int | None]:
        if self._of_disk:  # obstore's tag contains the inode, and is made of any time, meaningful or not
            changed = _nanoseconds(meta)
            if not is_telling(changed, time.time_ns(), is_coarse=not changed % 1_000_000_000):
                return None, None
            return stat_validators(meta["size"], changed)
        return ETag.parse(meta["e_tag"] or ""), http_seconds(meta["last_modified"].timestamp())

    def _take(self, answer: Any) -> None:
        self._span = ByteRange(*answer.range)
        self._stream = answer.stream(CHUNK_SIZE)

    async def _ask(self, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the options that the store has accepted, and its answer. Options that it refuses are left out."""
        while True:
            try:
                return options, await self._get(options)
            except _Refused as exc:
                self._has_ranges = self._has_ranges and not ("range" in options and "head" not in exc.instead)
                kept = {name: value for name, value in options.items() if name == "if_match"}
                options = kept | exc.instead

    async def _get(self, options: Any) -> Any:
        import obstore

        try:
            with anyio.fail_after(self._answer_timeout):
                return await obstore.get_async(self._store, self._name, options=options)
        except TimeoutError as exc:
            raise UpstreamTimeout(f"{self._name!r}: no answer within {self._answer_timeout} s") from exc
        except Exception as exc:
            if (instead := _instead_of(options, exc)) is not None:
                raise _Refused(instead) from exc
            raise _file_error(exc, self._name) from exc

    async def stream(self, span: ByteRange | None) -> AsyncIterator[bytes]:
        """Yield the bytes of the span: from the open answer if they come next in it, else from a new one.

        A broken stream is resumed where it broke, as long as each new stream has at least one byte and a strong
        validator proves that the version is the same. Raises `TransferAborted`.
        """
        assert self.metadata.size is not None
        left = ByteRange(0, self.metadata.size) if span is None else span
        reopened_for_nothing = has_begun = False
        while left.start < left.stop:
            if not self._leads_to(left):
                await self._reopen(left)
            try:
                chunk = self._rest or await anext(self._stream, b"")
                if not chunk:
                    raise UpstreamError(f"{self._name!r} ended {len(self._span)} bytes early")
            except Exception as exc:
                self.close()
                if reopened_for_nothing or (has_begun and not self.metadata.is_pinned):
                    raise TransferAborted(
                        f"{self._name!r} broke off at byte {left.start}: {_first_line(exc)}", reason="upstream-failed"
                    ) from exc
                reopened_for_nothing = True
                continue
            before, wanted = self._span.start, chunk[max(left.start - self._span.start, 0) :]
            wanted, self._rest = wanted[: len(left)], wanted[len(left) :]
            after = min(before + len(chunk) - len(self._rest), self._span.stop)
            self._span = ByteRange(after, self._span.stop)
            if wanted:
                reopened_for_nothing, has_begun = False, True
                left = ByteRange(left.start + len(wanted), left.stop)
                yield wanted

    def _leads_to(self, span: ByteRange) -> bool:
        """Return whether the open stream reaches the span without much in between."""
        gap = span.start - self._span.start
        max_gap = NEAR if self._has_ranges else math.inf
        return self._stream is not None and 0 <= gap <= max_gap and span.stop <= self._span.stop

    async def _reopen(self, span: ByteRange) -> None:
        """Open a stream of the same version that has this span. Raises `TransferAborted`."""
        self.close()
        span = read_from(span, self._wanted, self.metadata.size)
        options: dict[str, Any] = {"range": (span.start, span.stop)} if self._has_ranges else {}
        assert self._version is not None
        tag = ETag.parse(self._version[0] or "")
        if tag is not None and not tag.weak:  # "If-Match" compares strongly
            options["if_match"] = str(tag)
        try:
            options, answer = await self._ask(options)
        except FileError as exc:
            raise TransferAborted(
                f"{self._name!r} cannot be read on from byte {span.start}: {exc}", reason="upstream-failed"
            ) from exc
        is_whole = "range" not in options and "head" not in options
        expected = (0, self.metadata.size) if is_whole else (span.start, span.stop)
        if _version(answer.meta) != self._version or tuple(answer.range) != expected or "head" in options:
            raise TransferAborted(f"{self._name!r} changed while it was sent", reason="file-changed")
        self._take(answer)

    def close(self) -> None:
        """Close the open answer, and its connection if the body was not read to its end."""
        self._stream, self._rest = None, b""


class _Refused(Exception):
    """The store refuses a HEAD or a range, which it could have ignored. instead: the options for the next try."""

    def __init__(self, instead: dict[str, Any]) -> None:
        super().__init__(instead)
        self.instead = instead


def _arguments(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what obstore's `from_url` takes. Raises `ConfigurationError`."""
    parts = urlsplit(url)
    local = {
        "file": parts.netloc == "" and parts.path.startswith("/"),
        "memory": not parts.netloc + parts.path.strip("/"),
    }
    if not local.get(parts.scheme, parts.scheme in SCHEMES and parts.netloc) or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{url!r} is not the URL of an object store: give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
        )
    if parts.scheme in local:
        if options:
            raise ConfigurationError(f"{url!r} takes no options: remove {', '.join(sorted(options))}")
        return {}
    for name, value in options.items():
        if _plain_name(name) in _ENDPOINTS and not _HTTP_URL.match(str(value)):
            raise ConfigurationError(
                f"{name} is {value!r}, which is not the URL of a store: give one such as https://HOST"
            )
    client = dict(_CLIENT_DEFAULTS)
    if any(_plain_name(name) in _ENDPOINTS and str(value).startswith("http://") for name, value in options.items()):
        client["allow_http"] = "true"
    client |= options.pop("client_options", None) or {}
    client |= {name: _text(options.pop(name)) for name in list(options) if name in _CLIENT_OPTIONS}
    options = {name: _text(value) for name, value in options.items()}
    return {"retry_config": _RETRIES, **options, "client_options": client}


def _text(value: Any) -> Any:
    """Return a value for obstore, which does not accept numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _plain_name(name: str) -> str:
    name = name.lower().removeprefix("aws_")
    return _ALIASES.get(name, name)


def _options_for(request: DownloadRequest) -> dict[str, Any]:
    """Return the options for the request to the store: a body is requested only if it will be read."""
    if request.method != "GET":
        return {"head": True}
    if request.unconditional:
        return {}
    specs = request.ranges
    conditions = (request.if_match, request.if_unmodified_since, request.if_none_match, request.if_modified_since)
    if any(condition is not None for condition in conditions) or (specs is not None and len(specs) > 1):
        return {"head": True}  # the answer decides which bytes to read, if any
    return {} if specs is None else _range_option(specs[0])


def _range_option(spec: RangeSpec) -> dict[str, Any]:
    first, last = spec
    if first is None:
        return {"range": {"suffix": last}} if last else {"head": True}
    return {"range": {"offset": first} if last is None else (first, last + 1)}


def _nanoseconds(meta: Mapping[str, Any]) -> int:
    """Return when an object was changed, in nanoseconds since the epoch; obstore tells microseconds."""
    return int((meta["last_modified"] - _EPOCH) // timedelta(microseconds=1)) * 1000


def _version(meta: Mapping[str, Any]) -> tuple[str | None, Any, int]:
    return meta["e_tag"], meta["last_modified"], meta["size"]


def _instead_of(options: Mapping[str, Any], exc: Exception) -> dict[str, Any] | None:
    """Return the options for the next try if the store refuses a HEAD or a range. None: the error is its answer."""
    status = _STATUS.search(str(exc))
    if "range" in options:
        if _NON_PARTIAL in str(exc):
            return {}
        if type(exc).__name__ == "NotSupportedError":
            return {"head": True}  # Azure has no suffix ranges
        if type(exc).__name__ == "GenericError" and (status is None or status[1] == "416"):
            return {"head": True} if "range" in str(exc).lower() else None
    elif "head" not in options:
        return None
    refusals = REFUSALS | {406} | (set() if "if_match" in options else {412})
    return {} if status is not None and int(status[1]) in refusals else None


def _file_error(exc: Exception, name: str) -> FileError:
    """Return our error for an error of obstore."""
    reason = f"{name!r}: {_first_line(exc)}"
    kind = type(exc).__name__
    if match := _MISCONFIGURED.search(str(exc)):
        return UpstreamError(f"the store refuses the bucket or the credentials ({match[1]}): check them: {reason}")
    if isinstance(exc, FileNotFoundError) or kind == "InvalidPathError" or isinstance(exc, ValueError):
        return FileMissing(reason)
    if isinstance(exc, PermissionError) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return AccessDenied(f"the store denies {reason}")
    if kind == "PreconditionError":
        return UpstreamError(f"the object has been replaced by another version: {reason}")
    if match := _ERRNO.search(reason):
        if match[1] in _NOT_A_FILE:
            return FileMissing(reason)
        return AccessDenied(reason) if match[1] in _DENIED else SourceUnavailable(reason)
    status = _STATUS.search(reason)
    if _LIST_REFUSED.search(reason):
        return AccessDenied(f"the store denies {reason}")
    if status is not None and status[1] in _THROTTLED:
        return UpstreamBusy(f"the store is throttling: {reason}", status=int(status[1]))
    if status is None and "timed out" in str(exc):
        return UpstreamTimeout(reason)
    return UpstreamError(reason)


def _first_line(exc: Exception) -> str:
    """Return the message of an obstore error without the details of its code, of limited length."""
    return (str(exc).partition("\n\nDebug source:")[0] or type(exc).__name__)[:500]
