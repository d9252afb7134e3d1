"""Files that are far away or made on demand, kept on a local disk: `CachedSource` over any source, and the `Cache`.

A complete file is a local one: it has a path for a proxy to send it by, ranges, and costs what local files cost. A file
that is not there yet is fetched once, by a task of its own, and everybody who wants it is fed while it arrives.
"""

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import isfunction
from typing import Any, TypeVar, TypeVarTuple

import anyio

from downloadview_async.errors import (
    AccessDenied,
    ConfigurationError,
    DownloadError,
    FileError,
    FileMissing,
    SourceUnavailable,
    TransferAborted,
)
from downloadview_async.http.conditional import failed_precondition
from downloadview_async.http.log_text import escaped, shown
from downloadview_async.http.metadata import MAX_READS, ByteRange, ETag, FileMetadata
from downloadview_async.http.ranges import parse_range
from downloadview_async.http.request import GET, DownloadRequest
from downloadview_async.http.upstream import Received
from downloadview_async.sources.base import AsyncFile, HasCanonicalNames, OpenFile, Source
from downloadview_async.sources.cache.directory import CacheDirectory, Part, protect
from downloadview_async.sources.cache.entry import Entry, data_name, is_describable, key_hash
from downloadview_async.sources.cache.freshness import asking_for_news, is_current, max_age_of, updated
from downloadview_async.sources.cache.spool import Arriving, ArrivingFile
from downloadview_async.sources.local.open_file import OpenLocalFile
from downloadview_async.sources.local.open_file_cache import OpenFileCache
from downloadview_async.sources.local.root import Opened
from downloadview_async.sources.virtual import VirtualFile
from downloadview_async.sources.workers import Workers

logger = logging.getLogger("downloadview_async")

MAX_AHEAD = 8 << 20
"""Bytes: a range that begins further on than that behind what has arrived is asked of the source itself."""

REMEMBER_SECONDS = 60.0
"""How long a file that was found not to be one for the cache is not tried again."""

UNUSED_SECONDS = 3600.0
UNUSED_AGES = 10
"""A file that nobody has used for so long, and for so many times `max_age`, is removed."""

_NEVER = -math.inf
_CHECK_SECONDS = 5.0  # how long what was found in the directory is believed without another look
_GROW = 8 << 20  # bytes of room that a file which arrives is given at a time
_MAX_KNOWN = 16384
_MAX_UNATTENDED = 4
_MAX_TRIES = 3
_THREADS = 4

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """What a cache has done in this process, and how full it is.

    hits: found complete and current, without a question. stale: the source was asked whether a file is still current.
    misses: it was not there; one that somebody has removed, which is found too late, is both. passed: of all, those
    that were answered by the source itself. bytes: on the disk, by all processes together, when they were last looked
    at.
    """

    hits: int
    misses: int
    stale: int
    passed: int
    bytes: int


@dataclass(slots=True, eq=False)
class Kept:
    """A complete file that this process knows of. All times are by the monotonic clock.

    checked: when it was found in the directory, or put there. current: until when it is sent without another look at
    anything. leased: when a proxy was last told of it. used: when it was last asked for. is_gone: whether somebody has
    removed it. file: what is given to those who ask for it, once somebody has.
    """

    source: str
    key: str
    hashed: str
    entry: Entry
    checked: float
    current: float
    leased: float
    used: float
    is_gone: bool = False
    file: "KeptFile | None" = None


class Cache:
    """Files in a directory on a local disk, for any number of sources and processes: see `CachedSource`.

    directory: is made if there is none, and belongs to the cache alone.
    max_bytes: what all files in it may take together, in whole blocks of the disk; those least recently used make room.
    max_age: seconds for which a file is sent without asking whether it is still current.

    Raises `ConfigurationError` for a directory that cannot be made or read, for numbers that are none, and where
    aiofiles is not installed. A directory that cannot be written to later, or that is full, is no error: what is not
    there then is sent without being kept, and the log says so once a minute.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, max_bytes: int = 10 << 30, max_age: float = 86_400.0
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0:
            raise ConfigurationError(f"max_bytes is a number of bytes, more than 0, not {max_bytes!r}")
        if isinstance(max_age, bool) or not isinstance(max_age, int | float) or not max_age >= 0:
            raise ConfigurationError(f"max_age is a number of seconds, 0 or more, not {max_age!r}")
        try:
            import aiofiles  # the writing side alone needs it
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                "a cache needs aiofiles: install downloadview_async with its extra `cache`"
            ) from exc
        self._open_async: Callable[..., Any] = aiofiles.open
        self.max_bytes = max_bytes
        self.max_age = float(max_age)
        self.directory = CacheDirectory(
            directory,
            max_bytes=max_bytes,
            max_unused=max(UNUSED_SECONDS, UNUSED_AGES * self.max_age),
            used=self._used,
        )
        self._workers = Workers()
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="downloadview-cache")
        self._open_files = OpenFileCache(self.directory.root, self._workers)
        self.kept: dict[tuple[str, str], Kept] = {}
        self._refused: dict[tuple[str, str], float] = {}
        self._fetches: dict[tuple[asyncio.AbstractEventLoop, str, str], _Fetch] = {}
        self._running: set[_Fetch] = set()
        """Those that have not ended, though nobody may join some of them any more."""
        self._sweeping: set[asyncio.Task[None]] = set()
        self._names: dict[str, CachedSource] = {}
        self._is_offloaded = False
        self._complained = -60.0
        self.counts = {"hits": 0, "misses": 0, "stale": 0, "passed": 0}

    @property
    def path(self) -> str:
        """The absolute path of the directory, which an offload rule names as its source."""
        return self.directory.root.path

    @property
    def counters(self) -> CacheCounters:
        """The counters as they are now."""
        return CacheCounters(**self.counts, bytes=self.directory.bytes)

    async def sweep(self) -> None:
        """Count what is there, and remove what killed processes and disuse have left.

        A cache that is used does this by itself once a minute; an application that starts may want to do it at once.
        """
        await self._attempt(self.directory.sweep)

    async def aclose(self) -> None:
        """End what is being fetched; what has not all arrived is removed. Those who wait for it are aborted."""
        await self._end(list(self._running))
        for task in list(self._sweeping):
            await asyncio.wait([task])

    # What follows is for `CachedSource` and its files.

    def enlist(self, source: "CachedSource") -> None:
        """Note who uses a name. Raises `ConfigurationError` where that is two, who would get each other's files."""
        if self._names.setdefault(source.name, source) is not source:
            raise ConfigurationError(
                f"two sources are called {source.name!r} in the cache {self.path!r}: give each a name= of its own"
            )

    async def end_of(self, source: str) -> None:
        """End what is being fetched from a source, and let go of its name."""
        await self._end([fetch for fetch in self._running if fetch.source == source])
        self._names.pop(source, None)
        for kept in list(self.kept.values()):
            if kept.source == source:
                kept.file = None  # which would be fetched again from there

    async def _end(self, fetches: "list[_Fetch]") -> None:
        for fetch in fetches:
            fetch.stop()
        for fetch in fetches:
            if fetch.loop is asyncio.get_running_loop():
                await asyncio.wait([fetch.task])

    async def find(self, source: str, key: str) -> Kept | None:
        """Return what is kept of a key, fresh or not, after a look at the disk if the last one was too long ago."""
        kept = self.kept.get((source, key))
        if kept is not None and time.monotonic() - kept.checked < _CHECK_SECONDS:
            return kept
        self._sweep_if_due()
        is_leased, now = self._is_offloaded, time.monotonic()
        entry = await self._attempt(partial(self.directory.find, source, key, lease=is_leased))
        if entry is not None:
            return self.remember(source, key, entry, leased=now if is_leased else _NEVER)
        self.kept.pop((source, key), None)
        return None

    def remember(self, source: str, key: str, entry: Entry, *, leased: float = _NEVER) -> Kept:
        """Note what is kept of a key."""
        before = self.kept.pop((source, key), None)
        now = time.monotonic()
        if before is not None and before.entry.data == entry.data:
            leased = max(leased, before.leased)
        while len(self.kept) >= _MAX_KNOWN:
            del self.kept[next(iter(self.kept))]
        kept = self.kept[source, key] = Kept(
            source=source,
            key=key,
            hashed=key_hash(source, key),
            entry=replace(entry, metadata=_first_equal(entry.metadata)),
            checked=now,
            current=now + min(_CHECK_SECONDS, entry.fresh_for(self.max_age)),
            leased=leased,
            used=now,
        )
        return kept

    def _used(self) -> dict[str, float]:
        """Return when files were last used, by their K, in seconds since the epoch."""
        began = time.time() - time.monotonic()
        return {kept.hashed: began + kept.used for kept in list(self.kept.values())}

    async def forget(self, source: str, key: str, data: str) -> None:
        """Drop a version of a key, unless another one is kept by now."""
        if (kept := self.kept.get((source, key))) is not None and kept.entry.data == data:
            del self.kept[source, key]
        await self._attempt(self.directory.forget, source, key, data)

    def location(self, kept: Kept) -> str | None:
        """Return the path of a complete file, which is kept long enough for a proxy to open it, or None."""
        if kept.is_gone:
            return None
        now = time.monotonic()
        if now - kept.leased >= _CHECK_SECONDS:
            # Once per file and process: from the first one on, each look into the directory is a lease.
            self._is_offloaded = True
            try:
                self.directory.lease(kept.hashed)
            except OSError:
                return None
            kept.leased = now
        return self.directory.root.locate(kept.entry.data)

    def open_at_once(self, kept: Kept) -> OpenLocalFile | None:
        """Open a complete file, which the caller then closes, if that waits for nothing."""
        try:
            local = self._open_files.open(kept.entry.data)
        except FileError:
            return None
        if local is None:
            return None
        # One that is opened again and again stays open, and is what it was: whoever is described so has been accepted.
        if local.metadata is not kept.entry.metadata and not _accept(local, kept):
            local.close()
            return None
        local.made_at = kept.entry.made_at
        return local

    @asynccontextmanager
    async def open(self, kept: Kept) -> AsyncIterator[OpenLocalFile | None]:
        """Open a complete file; None if it is not there any more."""
        local, is_accepted = self.open_at_once(kept), True
        if local is None:
            try:
                found = await self._workers.run_or_abandon(self.directory.root.open, kept.entry.data, discard=_close)
            except (FileMissing, AccessDenied):  # a link, or of another user by now: as good as gone
                yield None
                return
            local = OpenLocalFile(*found, workers=self._workers)
            is_accepted = _accept(local, kept)
        try:
            yield local if is_accepted else None
        finally:
            await local.aclose()

    def is_refused(self, source: str, key: str) -> bool:
        """Return whether a file has been found not to be one for the cache, not long ago."""
        until = self._refused.get((source, key))
        if until is None:
            return False
        if time.monotonic() < until:
            return True
        del self._refused[source, key]
        return False

    def refuse(self, source: str, key: str) -> None:
        """Note that a file is none for the cache."""
        while len(self._refused) >= _MAX_KNOWN:
            del self._refused[next(iter(self._refused))]
        self._refused[source, key] = time.monotonic() + REMEMBER_SECONDS

    def may_go_on(self, fetch: "_Fetch") -> bool:
        """Return whether a fetch may go on though nobody waits for it: a few may."""
        return sum(other.is_unattended for other in self._running if other is not fetch) < _MAX_UNATTENDED

    def fetch(self, source: str, key: str, inner: AsyncFile | None, stale: Entry | None) -> "_Fetch | None":
        """Return the fetch of a file, which may have begun long ago; without `inner`, only one that has.

        One whose answer is not fresh any more is not joined without asking whether it is current.
        """
        place = asyncio.get_running_loop(), source, key
        found, before = self._fetches.get(place), None
        if found is not None and not found.is_fresh:
            before = found.arrives
            found = None
        if found is None and inner is not None:
            found = self._fetches[place] = _Fetch(self, source, key, inner, stale, before)
            self._running.add(found)
            found.start()
            found.task.add_done_callback(partial(self._ended, found))
        return found

    def _ended(self, fetch: "_Fetch", task: asyncio.Task[None]) -> None:
        self._running.discard(fetch)

    def withdraw(self, fetch: "_Fetch") -> None:
        """Let nobody else join a fetch."""
        place = fetch.loop, fetch.source, fetch.key
        if self._fetches.get(place) is fetch:
            del self._fetches[place]

    async def begin(self, source: str, key: str, size: int | None) -> Part | None:
        """Return a file to fetch into, or None."""
        return await self._attempt(self.directory.begin, key_hash(source, key), size)

    async def grow(self, part: Part, size: int) -> bool:
        """Return whether a part may get so long."""
        if size <= part.reserved:
            return True
        room = size + _GROW if part.size is None else min(size + _GROW, part.size)
        return bool(await self._attempt(self.directory.grow, part, room))

    async def commit(self, part: Part, source: str, key: str, entry: Entry) -> Kept | None:
        """Keep a part that is complete, or give what the source has said since; None if that went wrong."""
        newer = self.kept.get((source, key))
        if newer is not None and newer.entry.validated > entry.validated:
            await self.discard(part)
            return newer

        def commit() -> bool:
            self.directory.commit(part, source, key, entry)
            return True

        return self.remember(source, key, entry) if await self._attempt(commit) else None

    async def discard(self, part: Part) -> None:
        """Remove a part."""
        await self._attempt(self.directory.discard, part)

    async def renew(self, source: str, key: str, entry: Entry) -> Kept:
        """Note that a file is still current, and what has been said of it."""
        await self._attempt(self.directory.renew, source, key, entry)
        return self.remember(source, key, entry)

    async def open_to_write(self, part: Part) -> Any:
        """Return a part as a file of aiofiles."""
        return await self._open_async(part.descriptor, "r+b", buffering=0, closefd=False, executor=self._executor)

    async def local_file(self, part: Part) -> OpenLocalFile:
        """Return a part to read from."""
        found = await self._workers.run(os.fstat, part.descriptor)
        return OpenLocalFile(part.descriptor, found, self.directory.root.is_quick, workers=self._workers)

    def complain(self, exc: BaseException) -> None:
        """Log that the disk failed, once a minute."""
        if time.monotonic() - self._complained >= 60.0:
            self._complained = time.monotonic()
            problem = escaped(str(exc))
            logger.warning("the cache %a cannot be used, files are sent without being kept: %s", self.path, problem)

    def _sweep_if_due(self) -> None:
        if self.directory.is_sweep_due and not self._sweeping:
            task = asyncio.create_task(self.sweep())
            self._sweeping.add(task)
            task.add_done_callback(self._sweeping.discard)

    async def _attempt(self, function: Callable[[*Ts], T], *args: *Ts) -> T | None:
        """Return what a call to the directory returns, or None where the disk fails."""
        try:
            return await self._workers.run(function, *args)
        except OSError as exc:
            self.complain(exc)
            return None


@lru_cache(maxsize=1024)
def _first_equal(metadata: FileMetadata) -> FileMetadata:
    # What was read again and says the same is the same object: answers are kept by it, and to compare it takes longer
    # than all else about a file that is kept.
    return metadata


def _close(opened: Opened) -> None:
    os.close(opened.descriptor)


def _accept(local: OpenLocalFile, kept: Kept) -> bool:
    """Describe an open file as the one that is kept, and protect it; False if somebody has changed it."""
    if local.size != kept.entry.metadata.size:
        return False
    protect(local.descriptor)
    local.metadata, local.made_at = kept.entry.metadata, kept.entry.made_at
    return True


class CachedSource:
    """The files of another source, kept in a cache.

    source: a `RemoteSource`, a `StorageSource`, a `VirtualSource`, or any other whose names are texts and stand for the
    same file whoever asks.
    name: what the source is called in the cache, in every process and after every restart: whoever has the same name in
    the same directory gets the same files. By default the URL of a `RemoteSource`, that of an `ObjectStorage`, with its
    endpoint, or the file and name of a `VirtualSource`'s function. Others need one.

    Raises `ConfigurationError` if another source in the cache has that name, and where one is needed.
    """

    def __init__(self, source: Source, cache: Cache, *, name: str | None = None) -> None:
        self.source = source
        self.cache = cache
        self.name = _name_of(source) if name is None else name
        self._canonical = source.canonical if isinstance(source, HasCanonicalNames) else None
        cache.enlist(self)

    async def resolve(self, name: Any, /) -> AsyncFile:
        """Return the file called `name`: from the cache if it is there and fresh, else as the source finds it.

        Raises what the source raises.
        """
        if not isinstance(name, str):
            return await self.source.resolve(name)
        if self._canonical is not None:
            name = self._canonical(name)  # each spelling would be fetched, and kept, again
        now = time.monotonic()
        if (kept := self.cache.kept.get((self.name, name))) is None or now >= kept.current:
            kept = await self.cache.find(self.name, name)
            if kept is None or not kept.entry.fresh_for(self.cache.max_age):
                inner = await self.source.resolve(name)
                if _is_local(inner) or (isinstance(inner, VirtualFile) and not inner.is_keepable):
                    return inner
                return CachedFile(self.cache, self.name, name, inner, stale=None if kept is None else kept.entry)
        self.cache.counts["hits"] += 1
        kept.used = now
        if kept.file is None:
            kept.file = KeptFile(self, kept)
        return kept.file

    async def aclose(self) -> None:
        """End what is being fetched, and close the source if it has to be."""
        await self.cache.end_of(self.name)
        close = getattr(self.source, "aclose", None)
        if close is not None:
            await close()


def _name_of(source: Source) -> str:
    """Return what tells a source from all others, here and in any other process that has the same directory.

    Raises `ConfigurationError` where that is not known.
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
        f"what tells this {kind} from another one in the same directory is not known: give CachedSource a name= for it"
    )


def _is_local(file: AsyncFile) -> bool:
    return file.location is not None and os.path.isabs(file.location)


class KeptFile:
    """A file of a `CachedSource` that was in the cache, and current, when it was asked for."""

    __slots__ = ("_kept", "_source", "name")

    def __init__(self, source: CachedSource, kept: Kept) -> None:
        self.name = kept.entry.name
        self._source = source
        self._kept = kept

    @property
    def location(self) -> str | None:
        """The path of the complete file, or None where no proxy can be told of it."""
        return self._source.cache.location(self._kept)

    def open_cached(self, request: DownloadRequest) -> OpenLocalFile | None:
        """Open the file, if that waits for nothing: see `open_at_once`."""
        return self._source.cache.open_at_once(self._kept)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Open the file, or have it fetched again if it has been removed."""
        source, kept = self._source, self._kept
        async with source.cache.open(kept) as opened:
            if opened is not None:
                yield opened
                return
        is_counted, kept.is_gone = kept.is_gone, True
        await source.cache.forget(kept.source, kept.key, kept.entry.data)
        inner = await source.source.resolve(kept.key)
        again = CachedFile(source.cache, kept.source, kept.key, inner, is_counted=is_counted)
        async with again.open(request) as fetched:
            yield fetched


class CachedFile:
    """A file of a `CachedSource` that is not in the cache, or not known to be current. It has a location once it is."""

    __slots__ = ("_cache", "_inner", "_is_counted", "_kept", "_key", "_source", "_stale", "name")

    def __init__(
        self,
        cache: Cache,
        source: str,
        key: str,
        inner: AsyncFile,
        *,
        stale: Entry | None = None,
        is_counted: bool = False,
    ) -> None:
        self.name = inner.name
        self._cache = cache
        self._source = source
        self._key = key
        self._inner = inner
        self._stale = stale
        self._kept: Kept | None = None
        self._is_counted = is_counted

    @property
    def location(self) -> str | None:
        """The path of the complete file, or None while there is none."""
        return None if self._kept is None else self._cache.location(self._kept)

    @asynccontextmanager
    async def open(self, request: DownloadRequest = GET) -> AsyncIterator[OpenFile]:
        """Open the file: the complete one, the one that arrives, or the source's own."""
        cache, source, key = self._cache, self._source, self._key
        for _ in range(_MAX_TRIES):
            kept = self._kept or self._fetched_meanwhile()
            if kept is not None:
                async with cache.open(kept) as opened:
                    if opened is not None:
                        self._kept = kept
                        self._count("hits")
                        yield opened
                        return
                self._kept = self._stale = None
                await cache.forget(source, key, kept.entry.data)
            self._count("misses" if self._stale is None else "stale")
            async with self._passed(request) as passed:
                if passed is not None:
                    cache.counts["passed"] += 1
                    yield passed
                    return
            fetch = cache.fetch(source, key, self._inner, self._stale)
            assert fetch is not None
            async with fetch.joined() as (fetch, arriving):
                if fetch.is_for_one and (arriving is None or _are_parts(request, arriving.metadata)):
                    continue  # it passes by once, and each part begins where it likes
                if arriving is not None and not (request.range and arriving.metadata.size is None and fetch.is_kept):
                    yield arriving
                    return
                # it is current, or has no size yet, without which there are no ranges
                if arriving is not None:
                    arriving.position = None
                await fetch.settled()
            self._kept = fetch.result
        raise SourceUnavailable(f"{self.name!r} does not stay in the cache")

    def _count(self, what: str) -> None:
        # one answer may take several tries, and is one
        if not self._is_counted:
            self._is_counted = True
            self._cache.counts[what] += 1

    def _fetched_meanwhile(self) -> Kept | None:
        kept = self._cache.kept.get((self._source, self._key))
        return kept if kept is not None and time.monotonic() < kept.current else None

    @asynccontextmanager
    async def _passed(self, request: DownloadRequest) -> AsyncIterator[OpenFile | None]:
        """Open the source's own file where the cache is not to be asked, else give None.

        For a HEAD of one that nobody fetches; for a file that is none for the cache; and for a range that begins far
        behind what has arrived, if the source has ranges.
        """
        cache, source, key, inner = self._cache, self._source, self._key, self._inner
        fetch = cache.fetch(source, key, None, None)
        is_far = not isinstance(inner, VirtualFile) and _is_far(request, fetch)
        if not (is_far or (fetch is None and (request.method == "HEAD" or cache.is_refused(source, key)))):
            yield None
            return
        async with inner.open(request) as opened:
            # a source that reads over what comes before a range had better be read once
            if not (is_far and getattr(opened, "reads_over", False)):
                yield opened
                return
        yield None


def _are_parts(request: DownloadRequest, metadata: FileMetadata) -> bool:
    return "," in (request.range or "") and metadata.accept_ranges and metadata.size is not None


def _is_far(request: DownloadRequest, fetch: "_Fetch | None") -> bool:
    if request.method != "GET" or request.range is None:
        return False
    specs = parse_range(request.range)
    if specs is None or len(specs) != 1:
        return False
    first, last = specs[0]
    arrived = 0 if fetch is None else fetch.arriving.arrived
    size = None if fetch is None or fetch.arriving.metadata is None else fetch.arriving.metadata.size
    if first is None:
        if size is None or last is None:
            return True  # the end of a file of any size
        first = max(size - last, 0)
    return first > arrived + MAX_AHEAD


class _Fetch:
    """One file on its way into the cache, by a task of its own.

    It ends when the last client breaks off; but once a client has been given all that it asked for, the file is
    fetched to its end, unless too many others are.
    """

    def __init__(
        self,
        cache: Cache,
        source: str,
        key: str,
        inner: AsyncFile,
        stale: Entry | None,
        before: "_Fetch | None" = None,
    ) -> None:
        self.source = source
        self.key = key
        self.loop = asyncio.get_running_loop()
        self.arriving = Arriving()
        self.result: Kept | None = None
        self.is_kept = False
        """Whether it will be in the cache, as far as is known."""
        self.task: asyncio.Task[None]
        self._cache = cache
        self._inner = inner
        self._stale = stale
        self.is_for_one = False
        """Whether the answer is for the first who asked alone: it is not for a cache, so not for others either."""
        self._before = before
        """Another one of the same file that arrives, of which the source is asked whether it is current."""
        self._same: _Fetch | None = None
        """That one, once the source has said so."""
        self._described_as: FileMetadata | None = None
        """What the source has answered."""
        self._entry: Entry | None = None
        """What is known of the file that arrives, from when the source has described it."""
        self._fresh_until = math.inf
        self._clients = 0
        self._is_given = False
        self._is_wanted = False
        self._scope = anyio.CancelScope()
        self._settled = anyio.Event()

    def start(self) -> None:
        """Begin."""
        self.task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Let the task end soon, and nobody join."""
        self._cache.withdraw(self)
        self.arriving.fail(SourceUnavailable("the fetch was ended"))
        self._scope.cancel()

    @property
    def is_fresh(self) -> bool:
        """Whether a client that asks now may have what the source has answered, or will answer.

        What is made here is being made: it is not old before it is complete.
        """
        return time.monotonic() < self._fresh_until

    @property
    def arrives(self) -> "_Fetch | None":
        """The one whose version arrives, for others to join: this, or the one that the source has confirmed."""
        if self._same is not None:
            return self._same
        is_joinable = self.is_kept and self._entry is not None and self.arriving.failure is None
        return self if is_joinable and not self._settled.is_set() else None

    @property
    def is_unattended(self) -> bool:
        """Whether it goes on though nobody waits for it."""
        return not self._clients and not self._settled.is_set()

    async def settled(self) -> None:
        """Wait until it has ended, or turns out not to be kept. Raises what it failed of."""
        while not self._settled.is_set() and self.arriving.is_on_disk:
            await self.arriving.wait()
        if self.arriving.failure is not None:
            raise self.arriving.failure_again()
        if self.result is None:
            self._cache.withdraw(self)
            self._cache.refuse(self.source, self.key)

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[tuple["_Fetch", ArrivingFile | None]]:
        """Give the fetch that has the file, and the file as it arrives; or None if the one that is kept is current."""
        arriving, joined_at = self.arriving, time.time()
        async with self._attended() as attendance:
            if self._before is not None:
                await attendance.enter_async_context(self._before._attended())  # noqa: SLF001
            while arriving.metadata is None and arriving.failure is None and not self._settled.is_set():
                await arriving.wait()
            if arriving.failure is not None:
                raise arriving.failure_again()
            if self._same is not None:
                yield await attendance.enter_async_context(self._same.joined())
                return
            if arriving.metadata is None or (self._settled.is_set() and self.is_kept):
                yield self, None
                return
            if self.is_for_one and self._is_given:
                yield self, None
                return
            self._is_given = True
            file = await attendance.enter_async_context(self._reading())
            if self._entry is not None and (self._entry.validated < joined_at or self._entry.age >= 1):
                file.made_at = self._entry.made_at
            yield self, file

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[ArrivingFile]:
        again = None if isinstance(self._inner, VirtualFile) else self._again
        described = self._described_as
        file = self.arriving.open(again=again, max_reads=_max_reads(described) if described is not None else MAX_READS)
        try:
            yield file
        finally:
            self._is_wanted = self._is_wanted or file.is_satisfied
            with anyio.CancelScope(shield=True):
                await file.aclose()

    async def _again(self, span: ByteRange) -> AsyncGenerator[bytes, None]:
        """Yield a span of the version that arrives, by another read of the source."""
        async with self._inner.open(DownloadRequest(range=f"bytes={span.start}-{span.stop - 1}")) as opened:
            if self._described_as is None or not _is_same_version(opened.metadata, self._described_as):
                raise TransferAborted(f"{self._inner.name!r} is not known to be the same version by now")
            async with _closing(opened.stream(span)) as chunks:
                async for chunk in chunks:
                    yield chunk

    @asynccontextmanager
    async def _attended(self) -> AsyncIterator[AsyncExitStack]:
        """Have one more client, and end the fetch after the last one where it is not to go on for others."""
        self._clients += 1
        try:
            async with AsyncExitStack() as attendance:
                yield attendance
        finally:
            self._clients -= 1
            goes_on = self._is_wanted and self.arriving.is_on_disk and self._cache.may_go_on(self)
            if self.is_unattended and not self.arriving.is_complete and not goes_on:
                self.stop()

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._fetch()
        except BaseException as exc:
            self.arriving.fail(exc if isinstance(exc, Exception) else SourceUnavailable("the fetch was cancelled"))
            if not isinstance(exc, Exception):
                raise
            if not isinstance(exc, DownloadError) and not self._clients:
                problem = escaped(f"{type(exc).__name__}: {exc}")
                logger.warning("fetching %s for the cache failed: %s", shown(self._inner.name), problem)
        finally:
            self._cache.withdraw(self)
            self._settled.set()
            self.arriving.notify()
            await self.arriving.aclose()

    async def _fetch(self) -> None:
        before = self._before
        known = self._stale if before is None or before._entry is None else before._entry  # noqa: SLF001
        request = asking_for_news(known)
        if known is not None and isinstance(self._inner, VirtualFile):
            said, now = self._inner.validators, time.time()
            is_same = failed_precondition(request, said) == 304 and is_current(known, said)
            if is_same and await self._confirmed(known, said, Received(date=now, at=now)):
                return
        try:
            async with self._inner.open(request) as opened:
                if known is None or failed_precondition(request, opened.metadata) != 304:
                    await self._receive(opened)
                    return
                is_same = is_current(known, opened.metadata)
                if is_same and await self._confirmed(known, opened.metadata, _received(opened)):
                    return
        except FileMissing:
            if self._stale is not None:
                await self._cache.forget(self.source, self.key, self._stale.data)
            raise
        async with self._inner.open(GET) as opened:  # it says "not modified" of another version, or not to keep it
            await self._receive(opened)

    async def _confirmed(self, known: Entry, metadata: FileMetadata, received: Received) -> bool:
        """Take what is known for current, as the source has just said, and return whether it may still be kept."""
        if (complete := self._completed_meanwhile(known)) is not None:
            known, self._before = complete, None
        described = updated(known.metadata, metadata)
        max_age = max_age_of(self._inner, described, self._cache.max_age, received)
        entry = self._described(described, received, max_age, data=known.data)
        if self._before is not None:
            self._same = None if max_age is None else self._before.arrives
            return self._same is not None
        if max_age is None or not is_describable(self.source, self.key, entry):
            await self._cache.forget(self.source, self.key, known.data)
            return False
        self.result = await self._cache.renew(self.source, self.key, entry)
        return True

    def _completed_meanwhile(self, known: Entry) -> Entry | None:
        """Return the version that has arrived while the source was asked whether it is current, if it is kept."""
        kept = None if self._before is None or self._before.arrives is not None else self._before.result
        if kept is None or kept.entry.metadata.etag != known.metadata.etag:
            return None
        return kept.entry if kept.entry.metadata.last_modified == known.metadata.last_modified else None

    def _described(self, metadata: FileMetadata, received: Received, max_age: float | None, *, data: str = "") -> Entry:
        """Return what is known of a file from what the source has just answered, and until when others may have it."""
        if not isinstance(self._inner, VirtualFile) or not max_age:
            self._fresh_until = time.monotonic() + (max_age or 0.0)
        return Entry(
            data=data,
            name=self._inner.name,
            metadata=metadata,
            validated=received.at,
            max_age=None if max_age == self._cache.max_age else max_age,
            age=received.age,
        )

    async def _receive(self, opened: OpenFile) -> None:
        received = _received(opened)
        metadata = self._described_as = opened.metadata
        max_age = max_age_of(self._inner, metadata, self._cache.max_age, received)
        size = metadata.size
        kept = replace(
            metadata,
            accept_ranges=True,
            max_reads=None,
            headers=tuple((name, value) for name, value in metadata.headers if name != "age"),
        )
        self._entry = self._described(kept, received, max_age)
        # where the connection's end is all that ends a file, nobody knows whether it is whole
        if getattr(opened, "ends_with_connection", False) or not self._is_describable(kept):
            max_age = None
        part = None if max_age is None else await self._cache.begin(self.source, self.key, size)
        if part is None:
            self.is_for_one = True
            self._cache.withdraw(self)
            self._cache.refuse(self.source, self.key)
            self.arriving.describe(metadata)
            await self._take_all(opened, size)
            return
        self.is_kept = True
        try:
            if kept.etag is None and kept.changed_at is None:
                # so that whoever resumes gets the rest of this very copy
                kept = replace(kept, etag=ETag(secrets.token_hex(16)))
            self._entry = replace(self._entry, metadata=kept)
            await self._describe(part, kept)
            await self._take_all(opened, size)
            if not self.arriving.is_on_disk:
                return
            assert self.arriving.metadata is not None
            complete = self.arriving.metadata
            entry = replace(self._entry, data=data_name(part.key, complete), metadata=complete)
            if isinstance(self._inner, VirtualFile):
                entry = replace(entry, validated=time.time())  # its `max_age` counts from when it has been made
            with anyio.CancelScope(shield=True):
                self.result = await self._cache.commit(part, self.source, self.key, entry)
        finally:
            if self.result is None:
                self.is_kept = False
                with anyio.CancelScope(shield=True):
                    await self._cache.discard(part)

    def _is_describable(self, metadata: FileMetadata) -> bool:
        entry = Entry(data=data_name("", metadata), name=self._inner.name, metadata=metadata, validated=0.0)
        return is_describable(self.source, self.key, entry)

    async def _describe(self, part: Part, metadata: FileMetadata) -> None:
        cache = self._cache
        local = await cache.local_file(part)
        try:
            file = await cache.open_to_write(part)
        except OSError:
            local.close()
            raise

        async def write(block: memoryview) -> int:
            count: int = await file.write(block)
            return count

        # From then on what arrives is handed on to those who are there, and who comes later would miss the beginning.
        async def reserve(size: int) -> bool:
            has_room = await cache.grow(part, size)
            if not has_room:
                cache.withdraw(self)
            return has_room

        def complain(exc: BaseException) -> None:
            cache.complain(exc)
            cache.withdraw(self)

        self.arriving.describe(metadata, file=local, write=write, reserve=reserve, complain=complain)

    async def _take_all(self, opened: OpenFile, size: int | None) -> None:
        """Take exactly what was promised. Raises `TransferAborted` where there is less."""
        arriving, left = self.arriving, size
        if size != 0:
            async with _closing(opened.stream(None if size is None else ByteRange(0, size))) as chunks:
                async for chunk in chunks:
                    await arriving.take(chunk if left is None else chunk[:left])
                    if not arriving.is_on_disk:
                        self._cache.withdraw(self)
                        if not self._clients or arriving.is_given_up:
                            self.stop()
                    if left is not None and (left := left - len(chunk)) <= 0:
                        break
        if left is not None and left > 0:
            raise TransferAborted(f"the file ended {left} bytes before what was promised of it")
        await arriving.flush()
        arriving.finish()


def _max_reads(metadata: FileMetadata) -> int:
    """Return how often one reader may have spans read from the source, each of which may be a request."""
    if not metadata.accept_ranges:
        return 1  # each read is one of the whole file
    return MAX_READS if metadata.max_reads is None else metadata.max_reads


def _received(opened: OpenFile) -> Received:
    now = time.time()
    return getattr(opened, "received", None) or Received(date=now, at=now)


def _is_same_version(metadata: FileMetadata, other: FileMetadata) -> bool:
    """Return whether two descriptions are known to be of the same bytes: only a strong validator tells."""
    if metadata.size != other.size or metadata.etag != other.etag:
        return False
    if metadata.etag is not None and not metadata.etag.weak:
        return True
    return metadata.changed_at is not None and metadata.changed_at == other.changed_at


@asynccontextmanager
async def _closing(chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    if isinstance(chunks, AsyncGenerator):
        async with aclosing(chunks):
            yield chunks
    else:
        yield chunks
