"""`CachedSource`: keeps the files of any source, remote or made on demand, on a local disk.

A complete file is a local file: a proxy can send it by its path, it has ranges, and it costs as much as a local file. A
missing file is fetched once (single-flight) by a separate task, and all clients get its bytes while they arrive.
"""

import logging
import math
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from inspect import isfunction
from typing import Any

from downloadview_async.errors import ConfigurationError, FileError, FileMissing, SourceUnavailable, wrong_type
from downloadview_async.http.digest import check_algorithms
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.metadata import FileMetadata
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.sources.base import (
    AsyncFile,
    HasCanonicalNames,
    OpenFile,
    Source,
    check_source,
    on_demand_of,
    pass_listing_on,
)
from downloadview_async.sources.cache.fill import Fill
from downloadview_async.sources.cache.freshness import is_withdrawal
from downloadview_async.sources.cache.index import Cache, Kept
from downloadview_async.sources.cache.purges import Position
from downloadview_async.sources.local.open_file import OpenLocalFile

MAX_AHEAD = 8 << 20
"""Bytes: a range that begins further than this after the bytes that have arrived is read from the source itself."""

CACHE_NAME = "downloadview"
"""The name of every cache of this library in Cache-Status: it tells nothing about the machine or the source."""

_HIT = f"{CACHE_NAME}; hit"
_STALE_IF_ERROR = f"{CACHE_NAME}; fwd=stale; detail=stale-if-error"
_MAX_TRIES = 3

logger = logging.getLogger("downloadview_async")


class CachedSource:
    """The files of another source, kept in a cache.

    source: a `RemoteSource`, a `StorageSource`, a `VirtualSource`, or any other whose names are text and stand for the
    same file for every client.
    name: identifies the source in the cache, in every process and after every restart: sources with the same name and
    directory get the same files. The default is the URL of a `RemoteSource`, the URL of an `ObjectStorage` with its
    endpoint, or the file and name of a `VirtualSource`'s function. Other sources need a name.

    digests: algorithms, such as "sha-256". The digests of a file are computed while it is fetched, and kept with it, so
    that it is not read again for them. A file whose bytes do not have the digest that its source tells is not kept.

    It lists folders if the source does: listings are not kept in the cache.

    Raises `ConfigurationError` if another source in the cache has this name, if a name is needed, or for an unknown
    algorithm.
    """

    def __init__(self, source: Source, cache: Cache, *, name: str | None = None, digests: Sequence[str] = ()) -> None:
        check_source(source, "CachedSource")
        check_algorithms(digests, "digests")
        if not isinstance(cache, Cache):
            raise wrong_type("CachedSource takes a cache, such as Cache('cache')", cache)
        self.source = source
        self.cache = cache
        self.digests = tuple(digests)
        self.name = _name_of(source) if name is None else name
        self._canonical = source.canonical if isinstance(source, HasCanonicalNames) else None
        if self._canonical is not None:
            self.canonical = self._canonical  # as an attribute of the object: see `pass_listing_on`
        cache.enlist(self)
        pass_listing_on(self, source)

    async def resolve(self, name: Any, /) -> AsyncFile:
        """Return the file called `name`: from the cache if it is there and fresh, else from the source.

        Raises what the source raises.
        """
        if not isinstance(name, str):
            return await self.source.resolve(name)
        if self._canonical is not None:
            name = self._canonical(name)  # else each spelling would be fetched and kept separately
        cache, now = self.cache, time.monotonic()
        cache.catch_up()
        if (kept := cache.kept.get((self.name, name))) is None or now >= kept.current:
            kept = await cache.find(self.name, name)
            if kept is None or not kept.entry.fresh_for(cache.max_age):
                if kept is not None and (reason := cache.staleness(kept)) is not None:
                    cache.counts["hits"] += 1
                    kept.used = now
                    cache.revalidate_soon(kept)
                    ttl = -math.ceil(kept.entry.overdue(cache.max_age))
                    return KeptFile(self, kept, f"{_HIT}; ttl={ttl}; detail={reason}")
                began = cache.directory.purges.position()
                try:
                    inner = await self.source.resolve(name)
                except FileError as exc:
                    if kept is None or not await cache.replaces(kept, exc):
                        raise
                    cache.counts["revalidated"] += 1
                    return KeptFile(self, kept, _STALE_IF_ERROR)
                if not _is_keepable(inner):
                    return inner
                return CachedFile(cache, self.name, name, inner, stale=kept, began=began)
        cache.counts["hits"] += 1
        kept.used = now
        if kept.file is None:
            kept.file = KeptFile(self, kept)
        return kept.file

    async def purge(self, name: str = "", *, is_prefix: bool = False) -> int:
        """Remove a file from the cache, or with `is_prefix` all whose names begin with `name`.

        Returns how many files there were. Requests that come afterwards, in all processes that share the directory, ask
        the source. Running answers get the rest of their files, but what the source was asked for before is not kept.
        The prefix is compared letter by letter: `v1` is also the beginning of `v10/a`; an empty one covers all files.

        Raises `FileMissing` for a name that no file can have, `SourceUnavailable` if the disk fails.
        """
        if self._canonical is not None:
            name = self._canonical_prefix(name) if is_prefix else self._canonical(name)
        return await self.cache.purge(self.name, name, is_prefix=is_prefix)

    def _canonical_prefix(self, prefix: str) -> str:
        """Return the beginning of the canonical forms of all names that begin with a prefix."""
        assert self._canonical is not None
        name = self._canonical(f"{prefix}-")  # no name that is reserved ends so, nor does a folder
        return name[:-1] if name.endswith("-") else prefix

    async def revalidate(self, kept: Kept) -> None:
        """Ask the source whether a kept file is still current, and fetch it if it is not: for `Cache`."""
        cache = self.cache
        began = cache.directory.purges.position()
        try:
            inner = await self.source.resolve(kept.key)
            if not _is_keepable(inner):
                await cache.forget(self.name, kept.key, kept.entry.data)
                return
            fetch = cache.fetch(self.name, kept.key, inner, kept.entry, began=began)
            async with fetch.joined() as (fetch, arriving):
                if arriving is not None:
                    arriving.position = None  # it reads nothing
                if not fetch.is_for_one:
                    await fetch.settled()
        except Exception as exc:  # a source may raise anything
            if isinstance(exc, FileError) and is_withdrawal(exc):
                await cache.forget(self.name, kept.key, kept.entry.data)
            else:
                cache.rest(kept, exc)
            if isinstance(exc, FileMissing):
                return
            problem = escaped(f"{type(exc).__name__}: {exc}")
            logger.warning("the cached %s cannot be revalidated: %s", shown(kept.entry.name), problem)

    async def aclose(self) -> None:
        """End the fills from the source, and close it if it has `aclose`."""
        await self.cache.end_of(self.name)
        close = getattr(self.source, "aclose", None)
        if close is not None:
            await close()


def _name_of(source: Source) -> str:
    """Return a name that identifies a source, here and in every other process that uses the same directory.

    Raises `ConfigurationError` if none is known.
    """
    kind = type(source).__qualname__
    if isinstance(url := getattr(source, "url", None), str):
        return f"{kind} {url}"
    if isinstance(place := getattr(getattr(source, "storage", None), "place", None), str):
        return f"{kind} {place}"
    make = getattr(source, "make", None)
    if isfunction(make) and make.__closure__ is None and "<" not in make.__qualname__:
        return f"{kind} {make.__code__.co_filename} {make.__module__}.{make.__qualname__}"
    raise ConfigurationError(
        f"this {kind} cannot be told from another one in the same cache directory: give CachedSource a name= for it"
    )


def _is_keepable(file: AsyncFile) -> bool:
    """Return whether a cache may keep a file: it is not local, and content that is made on demand allows it."""
    on_demand = on_demand_of(file)
    is_local = file.location is not None and os.path.isabs(file.location)
    return not is_local and (on_demand is None or on_demand.is_keepable)


class KeptFile:
    """A file of a `CachedSource` that was in the cache, and might be sent from there, when it was requested.

    cache_status: see `HasCacheStatus`.
    """

    __slots__ = ("_kept", "_source", "cache_status", "name")

    def __init__(self, source: CachedSource, kept: Kept, cache_status: str = _HIT) -> None:
        self.name = kept.entry.name
        self.cache_status = cache_status
        self._source = source
        self._kept = kept

    @property
    def location(self) -> str | None:
        """The path of the complete file, or None if no proxy can send it."""
        return self._source.cache.location(self._kept)

    def open_nowait(self, request: DownloadRequest) -> OpenLocalFile | None:
        """Open the file without waiting, or return None: see `OpensNowait`."""
        return self._source.cache.open_nowait(self._kept)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Open the file, or fetch it again if it has been removed."""
        source, kept = self._source, self._kept
        async with source.cache.open(kept) as opened:
            if opened is not None:
                yield opened
                return
        is_counted, kept.is_gone = kept.is_gone, True
        await source.cache.forget(kept.source, kept.key, kept.entry.data)
        began = source.cache.directory.purges.position()
        inner = await source.source.resolve(kept.key)
        again = CachedFile(source.cache, kept.source, kept.key, inner, began=began, is_counted=is_counted)
        async with again.open(request) as fetched:
            yield fetched


class CachedFile:
    """A file of a `CachedSource` that is not in the cache, or not fresh. It has a location once it is both.

    began: the end of the log of purges before the source was asked for `inner`.
    """

    __slots__ = (
        "_began",
        "_cache",
        "_inner",
        "_is_counted",
        "_is_purged",
        "_kept",
        "_key",
        "_source",
        "_stale",
        "cache_status",
        "name",
    )

    def __init__(
        self,
        cache: Cache,
        source: str,
        key: str,
        inner: AsyncFile,
        *,
        began: Position,
        stale: Kept | None = None,
        is_counted: bool = False,
    ) -> None:
        self.name = inner.name
        self.cache_status: str | None = None
        """See `HasCacheStatus`."""
        self._cache = cache
        self._source = source
        self._key = key
        self._inner = inner
        self._began = began
        self._is_purged = False
        self._stale = stale
        self._kept: Kept | None = None
        self._is_counted = is_counted

    @property
    def location(self) -> str | None:
        """The path of the complete file, or None as long as it is not complete."""
        return None if self._kept is None else self._cache.location(self._kept)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Open the complete file, the file while it arrives, or the file of the source itself.

        If the source fails and the cache may send the file although it is stale, open that one.
        """
        stale = self._stale
        async with AsyncExitStack() as stack:
            try:
                opened = await stack.enter_async_context(self._open(request))
            except FileError as exc:
                if stale is None or not await self._cache.replaces(stale, exc):
                    raise
                local = await stack.enter_async_context(self._cache.open(stale))
                if local is None:
                    raise
                self._kept, self.cache_status, opened = stale, _STALE_IF_ERROR, local
            yield opened

    @asynccontextmanager
    async def _open(self, request: DownloadRequest) -> AsyncIterator[OpenFile]:
        cache, source, key = self._cache, self._source, self._key
        status = _HIT
        for _ in range(_MAX_TRIES):
            kept = self._kept or self._fetched_meanwhile()
            if kept is not None:
                async with cache.open(kept) as opened:
                    if opened is not None:
                        self._kept, self.cache_status = kept, status
                        self._count("hits")
                        yield opened
                        return
                self._kept = self._stale = None
                await cache.forget(source, key, kept.entry.data)
            self._count("misses" if self._stale is None else "revalidated")
            reason = f"{CACHE_NAME}; fwd={'miss' if self._stale is None else 'stale'}"
            async with self._passed(request) as passed:
                if passed is not None:
                    cache.counts["passed"] += 1
                    self.cache_status = reason
                    yield passed
                    return
            running = cache.running(source, key)
            stale = None if self._stale is None else self._stale.entry
            fetch = cache.fetch(source, key, self._inner, stale, began=self._began)
            is_collapsed = fetch is running
            async with fetch.joined() as (fetch, arriving):
                if fetch.is_for_one and (arriving is None or _are_parts(request, arriving.metadata)):
                    continue  # an uncacheable stream can be read only once, but several ranges need to seek
                if fetch.is_kept or fetch.result is not None:
                    reason += "; collapsed" if is_collapsed else "; stored"
                if arriving is not None and not (request.range and arriving.metadata.size is None and fetch.is_kept):
                    self.cache_status = reason
                    yield arriving
                    return
                # the kept file is current, or the size is not known yet, and without it there are no ranges
                if arriving is not None:
                    arriving.position = None
                await fetch.settled()
            self._kept, status, self._is_purged = fetch.result, reason, fetch.is_purged
            if stale is not None and fetch.result is not None and fetch.result.entry.data == stale.data:
                status = f"{CACHE_NAME}; fwd=stale; fwd-status=304"
        raise SourceUnavailable(f"{self.name!r} does not stay in the cache")

    def _count(self, what: str) -> None:
        # one request may take several tries, but is counted once
        if not self._is_counted:
            self._is_counted = True
            self._cache.counts[what] += 1

    def _fetched_meanwhile(self) -> Kept | None:
        kept = self._cache.kept.get((self._source, self._key))
        return kept if kept is not None and time.monotonic() < kept.current else None

    @asynccontextmanager
    async def _passed(self, request: DownloadRequest) -> AsyncIterator[OpenFile | None]:
        """Open the file of the source itself if the cache does not help, else give None.

        It does not help with a HEAD of a file that is not being fetched, with a file that is uncacheable, or was purged
        while the source was asked, and with a range that begins far after the bytes that have arrived, if the source
        has ranges and nothing is kept.
        """
        cache, source, key, inner = self._cache, self._source, self._key, self._inner
        fetch = cache.running(source, key)
        # a kept file that the source confirms has any range
        is_far = self._stale is None and on_demand_of(inner) is None and _is_far(request, fetch)
        is_uncacheable = self._is_purged or cache.is_refused(source, key)
        if not (is_far or (fetch is None and (request.method == "HEAD" or is_uncacheable))):
            yield None
            return
        async with inner.open(request) as opened:
            # a source that reads the file from its beginning to get to a range is read only once, by a fill
            if not (is_far and getattr(opened, "reads_over", False)):
                yield opened
                return
        yield None


def _are_parts(request: DownloadRequest, metadata: FileMetadata) -> bool:
    return len(request.ranges or ()) > 1 and metadata.accept_ranges and metadata.size is not None


def _is_far(request: DownloadRequest, fetch: "Fill | None") -> bool:
    if request.ranges is None or len(request.ranges) != 1:
        return False
    first, last = request.ranges[0]
    arrived = 0 if fetch is None else fetch.arriving.arrived
    size = None if fetch is None or fetch.arriving.metadata is None else fetch.arriving.metadata.size
    if first is None:
        if size is None or last is None:
            return True  # the end of a file whose size is not known
        first = max(size - last, 0)
    return first > arrived + MAX_AHEAD
